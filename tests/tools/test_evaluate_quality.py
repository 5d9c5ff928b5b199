"""scripts/evaluate_quality and its parts: runs, metrics by prompt, and intervals of differences."""

import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, SIZES, make_model, make_prompts
from torch import Tensor
from transformers import LlamaConfig

import hf_specdec
from hf_specdec.pairs import DEMO_PAIR
from hf_specdec.sampling import rules
from hf_specdec.sampling.acceptance import Verdict, accept_greedy
from hf_specdec.tools import quality
from hf_specdec.tools.arguments import Prompt
from hf_specdec.tools.quality import Comparison

evaluate = pytest.importorskip("evaluate")
pytestmark = pytest.mark.usefixtures("evaluate_cache")

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_quality.py"
SMALL = ["--prompts", "3", "--new-tokens", "10", "--seeds", "2", "--prompt-tokens", "40"]

BLEU = '''
import datasets
import evaluate


class Bleu(evaluate.Metric):
    """The share of a reference's words that a text has; like the Hub's bleu it divides by the text's length."""

    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        text, reference = predictions[0].split(), references[0].split()
        return {"RESULT": len(set(text) & set(reference)) / len(text), "length": len(text)}
'''

Script = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """Run the script: its exit code, its output, and the JSON in the last line of that."""
    monkeypatch.setenv("COLUMNS", "160")
    spec = importlib.util.spec_from_file_location("evaluate_quality", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> tuple[int, str, dict[str, Any]]:
        code = module.main([*SMALL, *arguments])
        printed = capsys.readouterr().out
        return code, printed, json.loads(printed.splitlines()[-1])

    yield run


def text_metric(folder: Path, name: str, result: str) -> str:
    """A module `name` on disk whose result is called `result`; returns its path."""
    path = folder / name / f"{name}.py"
    path.parent.mkdir()
    path.write_text(BLEU.replace("RESULT", result).replace("Bleu", name.capitalize()), encoding="utf-8")
    return str(path.parent)


def accept_the_first_draft_unseen(draft_tokens: Tensor, draft_lengths: Tensor, scores: Tensor) -> Verdict:
    """Broken: the first draft is accepted whatever the target's choice."""
    verdict = accept_greedy(draft_tokens, draft_lengths, scores)
    tokens = verdict.tokens.clone()
    tokens[:, 0] = torch.where(draft_lengths > 0, draft_tokens[:, 0], tokens[:, 0])
    return verdict._replace(tokens=tokens, accepted=verdict.accepted.clamp(min=1).minimum(draft_lengths))


# runs


def test_a_run_ends_with_its_first_end_token() -> None:
    """In batches as alone: everything after it is padding."""
    model = make_model(LlamaConfig(**SIZES), seed=3)
    inputs = make_prompts(4)
    free = quality.generate(model, [inputs], 0, max_new_tokens=20, do_sample=False)
    assert [len(row) for row in free] == [20] * 4
    ends = sorted({free[0][5], free[1][9]})
    model.generation_config.eos_token_id = ends
    cut = quality.generate(model, [inputs], 0, max_new_tokens=20, do_sample=False)
    for whole, row in zip(free, cut):
        length = next((at for at, token in enumerate(whole, start=1) if token in ends), 20)
        assert row == whole[:length]
    assert min(map(len, cut)) < max(map(len, cut))


def test_a_seed_decides_all_batches_together() -> None:
    """The same seed gives the same run, and two of its batches do not repeat their random numbers."""
    model = make_model(LlamaConfig(**SIZES), seed=3)
    batch = make_prompts(1)
    options = {"max_new_tokens": 20, "do_sample": True}
    first, again, other = (quality.generate(model, [batch, batch], seed, **options) for seed in (0, 0, 1))
    assert first == again != other
    assert first[0] != first[1]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_nats_per_token_are_those_of_single_unpadded_rows(name: str) -> None:
    """With learned positions (OPT), too; prompts and continuations of different lengths."""
    model = make_model(ARCHITECTURES[name](), seed=4)
    batches = [make_prompts(3, seed=1), make_prompts(2, seed=2)]
    run = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]]
    expected: list[float] = []
    rows = [(ids, mask) for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"])]
    for (ids, mask), continuation in zip(rows, run):
        context, total = ids[mask.bool()].tolist(), 0.0
        for token in continuation:
            p = model(torch.tensor([context])).logits[0, -1].softmax(dim=-1).detach()
            total -= math.log(float(p[token]))
            context.append(token)
        expected.append(total / len(continuation))
    assert quality.nats_per_token(model, batches, run) == pytest.approx(expected, abs=1e-5)


# comparisons


def test_sampled_runs_are_compared_with_vanillas_of_other_seeds() -> None:
    """So vanilla is not compared with itself."""
    agreement = quality.load_metric("token_agreement")
    vanilla, speculative = [[[1, 2, 3, 4]], [[1, 2, 5, 6]]], [[[1, 2, 3, 4]], [[9, 9, 9, 9]]]
    rows = {row.name: row for row in quality.compare_runs(vanilla, speculative, agreement)}
    assert rows["token agreement, vanilla"].means == (0.5, 0.25)  # of speculative: 2 of 4 with run 2, 0 with run 1
    assert rows["exact match, vanilla"].means == (0.0, 0.0)
    greedy = {row.name: row for row in quality.compare_runs(vanilla[:1], speculative[:1], agreement)}
    assert greedy["exact match, vanilla"].means == (1.0, 1.0) and greedy["exact match, vanilla"].equal


def test_values_are_by_prompt_and_mean_over_runs() -> None:
    agreement = quality.load_metric("token_agreement")
    vanilla = [[[1, 1, 1], [2]], [[1, 2, 3, 4, 5], [2, 2]]]
    rows = {row.name: row for row in quality.compare_runs(vanilla, vanilla, agreement)}
    assert rows["tokens"].vanilla.tolist() == [4.0, 1.5]
    assert rows["distinct bigrams"].vanilla.tolist() == [0.75, 1.0]


def test_the_interval_contains_0_for_noise_and_excludes_it_for_a_difference() -> None:
    """200 pairs of equal distributions: 0 is inside in 95 % of them, but for a chance of 0.01 between 90 and 98.5 %."""
    draw = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        prompts = draw.normal(size=40)  # the part of a prompt's value that both methods share
        low, high = Comparison("", *(prompts + 0.5 * draw.normal(size=(2, 40)))).interval()
        inside += low <= 0 <= high
    assert 0.90 <= inside / 200 <= 0.985
    better = Comparison("", prompts, prompts + 0.3 + 0.2 * draw.normal(size=40)).to_dict(interval=True)
    assert not better["contains_0"] and better["interval"][0] > 0.2


def test_prompts_that_differ_much_do_not_widen_the_interval() -> None:
    """Both methods' values of a prompt are resampled together."""
    prompts = 100.0 * np.arange(30)
    low, high = Comparison("", prompts, prompts + np.tile([0.9, 1.1], 15)).interval()
    assert 0.95 < low < high < 1.05


def test_perplexity_is_the_exponential_of_mean_nats() -> None:
    row = Comparison("perplexity", np.array([1.0, 3.0]), np.array([2.0, 2.0]), np.exp)
    assert (
        row.means == pytest.approx((math.exp(2), math.exp(2))) and row.difference == pytest.approx(0) and not row.equal
    )
    low, high = row.interval()
    assert low == pytest.approx(math.exp(2) - math.exp(3)) and high == pytest.approx(math.exp(2) - math.exp(1))


def test_references_are_compared_as_text_and_by_token(tmp_path: Path) -> None:
    """Prompts without a reference are left out; an empty continuation scores 0, and does not stop the script."""
    tokenizer = hf_specdec.demo_pair()[2]
    metrics, missing = quality.load_text_metrics([text_metric(tmp_path, "bleu", "bleu")])
    assert not missing
    prompts = [
        Prompt("a", reference="return self.x\n"),
        Prompt("b"),
        Prompt("c", reference="pass"),
        Prompt("d", "", "\n"),
    ]
    ids = [tokenizer(text)["input_ids"] for text in ("return self.x", "whatever", " ", "whatever")]
    rows = quality.compare_with_references(
        prompts, [ids], [[ids[0]] * 4], tokenizer, quality.load_metric("token_agreement"), metrics
    )
    values = {row.name: (row.vanilla.tolist(), row.speculative.tolist()) for row in rows}
    assert values["exact match, reference"] == ([1.0, 0.0], [1.0, 0.0])
    assert values["bleu"] == ([1.0, 0.0], [1.0, 0.0])
    reference = tokenizer("return self.x\n")["input_ids"]
    assert values["token agreement, reference"][0][0] == len(ids[0]) / len(reference) < 1


def test_metrics_that_do_not_load_are_named_and_the_others_work(tmp_path: Path) -> None:
    """A score is found under the module's name, as "score", or else all floats count."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "broken.py").write_text("import no_such_library\n", encoding="utf-8")
    names = [text_metric(tmp_path, "chrf", "score"), text_metric(tmp_path, "other", "recall"), str(broken), "rouge"]
    counts = text_metric(tmp_path, "counts", "unused")
    source = (tmp_path / "counts" / "counts.py").read_text(encoding="utf-8")
    (tmp_path / "counts" / "counts.py").write_text(source.replace('"unused": ', '"unused": [] and '), encoding="utf-8")
    names.append(counts)
    metrics, missing = quality.load_text_metrics(names)
    assert [metric.scores("a b", "a b") for metric in metrics] == [{"chrf": 1.0}, {"recall": 1.0}]
    assert list(missing) == [str(broken), "rouge", counts]
    assert "expected a result called 'counts'" in missing[counts]
    assert "no_such_library" in missing[str(broken)] and "out of reach" in missing["rouge"]


@pytest.mark.parametrize("offline", ["1", ""])
def test_a_hub_out_of_reach_is_asked_once_at_most(offline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` itself would wait for it file by file, with or without HF_HUB_OFFLINE."""
    asked = []
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    monkeypatch.setattr(evaluate.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    real = evaluate.utils.file_utils.requests.Session.request
    monkeypatch.setattr(
        evaluate.utils.file_utils.requests.Session, "request", lambda *a, **k: asked.append(k["url"]) or real(*a, **k)
    )
    metrics, missing = quality.load_text_metrics(["rouge", "bleu"])
    assert not metrics and list(missing) == ["rouge", "bleu"]
    assert len(asked) == (0 if offline else 1)


def test_references_of_embedded_prompts_follow_them_in_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shortened prompts as well; if this Python's sources differ, there is no reference."""
    tokenizer = hf_specdec.demo_pair()[2]
    row = json.loads((DEMO_PAIR / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])
    (tmp_path / row["module"]).write_text(
        f"# {row['text'][:20]} elsewhere\n{row['text']}XY and so on", encoding="utf-8"
    )
    monkeypatch.setattr(quality.sysconfig, "get_path", lambda name: str(tmp_path))
    whole, short = (quality.with_true_continuations([Prompt(row["text"][:n])], tokenizer, 6)[0] for n in (None, 20))
    assert whole.reference is not None and "XY and so on".startswith(whole.reference.strip())
    assert short.reference is not None and row["text"][20:].startswith(short.reference)
    for prompt, n in (whole, 6), (short, 6):
        assert len(tokenizer(prompt.reference)["input_ids"]) <= n
    chat = Prompt(f"<user>{row['text']}<assistant>")  # as after a chat template
    assert quality.with_true_continuations([chat], tokenizer, 6) == [chat]
    (tmp_path / row["module"]).write_text("# rewritten", encoding="utf-8")
    assert quality.with_true_continuations([Prompt(row["text"])], tokenizer, 6)[0].reference is None


# the script


def test_the_embedded_pair_passes(script: Script, tmp_path: Path) -> None:
    code, printed, result = script("--prompts", "8", "--metrics", text_metric(tmp_path, "bleu", "bleu"), "rouge")
    assert code == 0 and result["identical"] is True
    assert all(row["equal"] for row in result["greedy"]["metrics"].values())
    rows = result["sampled"]["metrics"]
    assert {"token agreement, vanilla", "perplexity", "tokens", "distinct bigrams"} <= rows.keys()
    assert not rows["perplexity"]["equal"]
    assert all(row["contains_0"] == (row["interval"][0] <= 0 <= row["interval"][1]) for row in rows.values())
    assert printed.count("│ contains 0") == sum(row["contains_0"] for row in rows.values())
    assert printed.count("│ excludes 0") == sum(not row["contains_0"] for row in rows.values())
    for mode in "greedy", "sampled":
        accepted = result[mode]["acceptance"]
        assert 0 < accepted["acceptance_rate"] < 1 < accepted["block_efficiency"]
    assert ("bleu" in rows) == (result["references"] > 1)
    if result["references"] > 1:
        assert "not available" in printed and "out of reach" in result["not_available"]["rouge"]


def test_no_two_sampled_runs_share_a_seed(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both methods: runs with a common seed would not be independent."""
    seeds = []
    real = quality.generate

    def noting(target: Any, batches: Any, seed: int, **options: Any) -> quality.Run:
        seeds.append((options["do_sample"], seed))
        return real(target, batches, seed, **options)

    monkeypatch.setattr(quality, "generate", noting)
    script("--metrics")
    sampled = [seed for do_sample, seed in seeds if do_sample]
    assert len(sampled) == len(set(sampled)) == 4


@pytest.mark.parametrize(("dtype", "code"), [("float32", 1), ("bfloat16", 0)])
def test_greedy_outputs_that_differ_fail_in_float32(
    script: Script, monkeypatch: pytest.MonkeyPatch, dtype: str, code: int
) -> None:
    monkeypatch.setattr(rules, "accept_greedy", accept_the_first_draft_unseen)
    got, printed, result = script("--dtype", dtype, "--metrics")
    assert got == code and result["identical"] is False
    assert not result["greedy"]["metrics"]["exact match, vanilla"]["equal"]
    assert "differs" in printed and ("is a bug" if code else "near-ties may") in printed


def test_a_dataset_without_references_is_told(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": text}) for text in ("def f(", "class A:", "import")), encoding="utf-8"
    )
    code, printed, result = script("--dataset", str(path), "--batch-size", "2")
    assert code == 0 and result["references"] == 0 and "0 of 3 prompts have a reference" in printed
    assert not any("reference" in name for name in result["greedy"]["metrics"])


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--prompts", "1"], "at least 2 prompts"), (["--seeds", "1"], "at least 2 --seeds")]
)
def test_too_little_to_compare_is_refused(
    script: Script, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        script(*arguments)
    assert message in str(error.value) + capsys.readouterr().err
