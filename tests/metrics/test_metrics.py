"""The `evaluate` modules acceptance_rate and token_agreement, loaded by path as users load them."""

import doctest
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import hf_specdec
from hf_specdec.records.stats import Iteration, RowStep

evaluate = pytest.importorskip("evaluate")
pytestmark = pytest.mark.usefixtures("evaluate_cache")

PACKAGE = Path(hf_specdec.__file__).parent
NAMES = ("acceptance_rate", "token_agreement")


def load(name: str, **options: Any) -> Any:
    return evaluate.load(str(PACKAGE / "metrics" / name), **options)


@pytest.fixture
def acceptance() -> Any:
    return load("acceptance_rate")


@pytest.fixture
def agreement() -> Any:
    return load("token_agreement")


def simulated_steps(rows: int, iterations: int, seed: int) -> list[list[RowStep]]:
    """Iterations of rows that draft up to 5 tokens, accept some, and sometimes end at an accepted token."""
    draw = random.Random(seed)
    steps = []
    for _ in range(iterations):
        steps.append([])
        for row in range(rows):
            drafted = list(range(draw.randint(0, 5)))
            accepted = draw.randint(0, len(drafted))
            ends = accepted > 0 and draw.random() < 0.2
            committed = drafted[:accepted] + ([] if ends else [99])
            steps[-1].append(RowStep(row, 10, drafted, accepted, committed, "eos" if ends else None))
    return steps


@pytest.mark.parametrize("name", NAMES)
def test_loading_by_path_opens_no_connection(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if `evaluate` has not been told to stay offline."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for path in PACKAGE / "metrics" / name, PACKAGE / "metrics" / name / f"{name}.py":
        metric = evaluate.load(str(path), module_type="metric")
        assert metric.name == name
        assert metric.description and metric.citation and metric.inputs_description in metric.compute.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_the_package_says_where_a_metric_is(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate.load(hf_specdec.metrics.path(name)).name == name


@pytest.mark.parametrize("name", ["rouge", "", "../metrics/acceptance_rate", "__pycache__"])
def test_a_metric_that_is_not_ours_is_refused_with_the_names_of_ours(name: str) -> None:
    with pytest.raises(ValueError, match=f"^Unknown metric '{name}'; known metrics: 'acceptance_rate', 'token_agree"):
        hf_specdec.metrics.path(name)


def test_saying_where_metrics_are_imports_nothing_but_paths() -> None:
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['NAMES'], *sys.modules)"
    file = str(PACKAGE / "metrics" / "__init__.py")
    out = subprocess.run([sys.executable, "-I", "-c", code, file], capture_output=True, text=True, check=True).stdout
    assert out.startswith(str(NAMES)) and not {"torch", "evaluate", "datasets"} & set(out.split())


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_the_documentation_hold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PACKAGE.parent)
    test = doctest.DocTestParser().get_doctest(load(name).inputs_description, {}, name, None, None)
    assert len(test.examples) >= 4
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_is_a_space(name: str) -> None:
    """The Hub reads the card's YAML; `launch_gradio_widget` uses `gr.inputs`, which gradio 4 no longer has."""
    folder = PACKAGE / "metrics" / name
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert card["sdk"] == "gradio" and str(card["sdk_version"]).startswith("3.")
    assert {"title", "emoji", "colorFrom", "colorTo", "description", "license"} <= card.keys()
    assert {"evaluate", "metric"} <= set(card["tags"])
    assert f"{name}.py" in (folder / card["app_file"]).read_text(encoding="utf-8")
    assert "evaluate" in (folder / "requirements.txt").read_text(encoding="utf-8")
    example = {"acceptance_rate": ([1], [2]), "token_agreement": ([[1]], [[2]])}[name]
    for output in load(name).compute(predictions=example[0], references=example[1]):
        assert f"**{output}**" in text, f"the card does not explain {output}"


# acceptance_rate


def test_a_block_that_keeps_three_of_four(acceptance: Any) -> None:
    """Drafts [the quick brown fox], three accepted, the target adds "sly": four tokens from one forward."""
    result = acceptance.compute(predictions=[3], references=[4])
    assert result.pop("acceptance_rate_interval")[0] < 0.75
    assert result == {
        "acceptance_rate": 0.75,
        "block_efficiency": 4.0,
        "mean_accepted_length": 3.0,
        "acceptance_by_position": [1.0, 1.0, 1.0, 0.0],
        "accepted_length_histogram": [0, 0, 0, 1],
        "blocks": 1,
        "drafted_tokens": 4,
        "accepted_tokens": 3,
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_figures_are_those_of_speculation_stats(acceptance: Any, seed: int) -> None:
    """Rows that end at an accepted token commit one token fewer; blocks without drafts count in τ."""
    stats = hf_specdec.SpeculationStats()
    for rows in simulated_steps(rows=3, iterations=20, seed=seed):
        stats.add(Iteration(rows, 0.0, 0.0, 0.0, draft_forwards=1))
    assert stats.committed_tokens < stats.accepted_tokens + stats.row_iterations
    for iteration in stats.to_dict()["iterations"]:
        acceptance.add_batch(predictions=iteration["accepted"], references=iteration["drafted"])
    result = acceptance.compute(committed_tokens=stats.committed_tokens)
    same = {"acceptance_rate", "block_efficiency", "mean_accepted_length", "acceptance_by_position",
            "accepted_length_histogram", "drafted_tokens", "accepted_tokens"}  # fmt: skip
    assert {name: result[name] for name in same} == {name: getattr(stats, name) for name in same}
    assert result["blocks"] == stats.row_iterations


def test_one_by_one_in_batches_and_at_once_are_the_same() -> None:
    """In memory, and through the file in which `evaluate` collects."""
    accepted, drafted = [4, 1, 0, 3, 2], [4, 4, 0, 4, 3]
    metrics = [load("acceptance_rate", keep_in_memory=memory) for memory in (False, True)]
    for metric in metrics:
        expected = metric.compute(predictions=accepted, references=drafted)
        for a, d in zip(accepted, drafted):
            metric.add(prediction=a, reference=d)
        assert metric.compute() == expected
        for at in slice(0, 2), slice(2, 5):
            metric.add_batch(predictions=accepted[at], references=drafted[at])
        assert metric.compute() == expected
    assert expected["blocks"] == 5


def test_the_interval_covers_the_true_rate() -> None:
    """500 simulated runs of 100 blocks, γ = 5, each draft accepted with probability 0.7: 95 % should cover; outside of
    92 to 98 % of the runs only with probability 0.002 (binomial; the seed is fixed). Drafts as independent trials
    cover about 76 %.
    """
    interval = sys.modules[type(load("acceptance_rate")).__module__].interval
    true = sum(0.7**i for i in range(1, 6)) / 5
    draw = random.Random(0)

    def block() -> int:
        return next((kept for kept in range(5) if draw.random() >= 0.7), 5)

    covered = 0
    for _ in range(500):
        low, high = interval([block() for _ in range(100)], [5] * 100)
        assert 0 <= low < high <= 1
        covered += low <= true <= high
    assert 0.92 <= covered / 500 <= 0.98


@pytest.mark.parametrize(
    ("accepted", "drafted", "expected"),
    [
        ([5] * 10, [5] * 10, [0.722, 1.0]),  # as 10 trials that all succeeded, not as 50
        ([0] * 10, [5] * 10, [0.0, 0.278]),
        ([0, 0], [0, 0], [0.0, 1.0]),  # nothing drafted, nothing known
        ([1], [2], [0.055, 0.945]),  # one block, one trial
    ],
)
def test_the_interval_at_the_edges(acceptance: Any, accepted: list[int], drafted: list[int], expected: list[float]):
    result = acceptance.compute(predictions=accepted, references=drafted)
    assert result["acceptance_rate_interval"] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(
    ("accepted", "drafted", "message"),
    [
        ([1, 5], [4, 4], "5.0 accepted of 4.0 drafted in block 1"),
        ([-1], [4], "-1.0 accepted of 4.0"),
        ([0.8], [4], "expected whole numbers .* got 0.8 accepted"),
        ([None], [4], "got None accepted"),
        ([1, 2], [4], "Mismatch in the number"),
        ([], [], "at least one block"),
    ],
)
def test_counts_that_cannot_be_are_refused(acceptance: Any, accepted: list, drafted: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        acceptance.compute(predictions=accepted, references=drafted)


@pytest.mark.parametrize("committed", [2, 6])
def test_committed_tokens_that_do_not_fit_the_blocks_are_refused(acceptance: Any, committed: int) -> None:
    with pytest.raises(ValueError, match=f"committed_tokens between 3 .* and 5 .* got {committed}"):
        acceptance.compute(predictions=[1, 2], references=[4, 4], committed_tokens=committed)


# token_agreement


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "tokens", "prefix", "divergence"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0, 1.0, 1.0, None),
        ([1, 9, 3, 4], [1, 2, 3, 4], 0.0, 0.75, 0.25, 1),
        ([1, 2], [1, 2, 3, 4], 0.0, 0.5, 0.5, 2),  # one is the beginning of the other
        ([1, 2, 3, 4], [1, 2], 0.0, 0.5, 0.5, 2),
        ([9, 1, 2, 3], [1, 2, 3, 4], 0.0, 0.0, 0.0, 0),  # there is no alignment
        ([], [], 1.0, 1.0, 1.0, None),
        ([], [1, 2], 0.0, 0.0, 0.0, 0),
    ],
)
def test_agreement_of_one_pair(
    agreement: Any,
    prediction: list[int],
    reference: list[int],
    exact: float,
    tokens: float,
    prefix: float,
    divergence: int | None,
) -> None:
    """As token ids, and as texts, character by character."""
    expected = {
        "exact_match": exact,
        "token_agreement": tokens,
        "prefix_agreement": prefix,
        "first_divergence": divergence,
    }
    assert agreement.compute(predictions=[prediction], references=[reference]) == expected
    as_text = ["".join(map(chr, (64 + token for token in ids))) for ids in (prediction, reference)]
    assert agreement.compute(predictions=as_text[:1], references=as_text[1:]) == expected


def test_means_are_over_pairs_and_divergence_over_those_that_diverge(agreement: Any) -> None:
    pairs = {"predictions": [[1, 2], [1, 2, 3, 4], [5, 6]], "references": [[1, 2], [1, 2, 9, 4], [5, 7]]}
    lists = agreement.compute(**pairs, use_aggregator=False)
    assert lists["token_agreement"] == [1.0, 0.75, 0.5] and lists["first_divergence"] == [None, 2, 1]
    assert agreement.compute(**pairs) == {
        "exact_match": pytest.approx(1 / 3),
        "token_agreement": 0.75,
        "prefix_agreement": pytest.approx(2 / 3),
        "first_divergence": 1.5,
    }
    assert agreement.compute(predictions=[[1]], references=[[1]])["first_divergence"] is None


def test_ids_and_texts_cannot_be_compared(agreement: Any) -> None:
    for prediction, reference in (("12", [1, 2]), ([1, 2], "12")):
        with pytest.raises(ValueError, match="don't match the expected format"):
            agreement.compute(predictions=[prediction], references=[reference])


def test_modules_combine(agreement: Any) -> None:
    """Two of one kind, under different names; batches go to both."""
    both = evaluate.combine({"first": agreement, "again": load("token_agreement")}, force_prefix=True)
    both.add_batch(predictions=[[1, 2], [3]], references=[[1, 2], [4]])
    result = both.compute()
    assert result["first_exact_match"] == result["again_exact_match"] == 0.5
    mixed = evaluate.combine([load("acceptance_rate"), str(PACKAGE / "metrics" / "acceptance_rate")])
    assert mixed.compute(predictions=[1], references=[2])["acceptance_rate_1_acceptance_rate"] == 0.5
