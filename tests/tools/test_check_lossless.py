"""scripts/check_lossless: sound code passes, near-ties are called ties, and code broken on purpose is called a BUG.

The script runs in this process, on the embedded pair and on a tiny random one; monkeypatching breaks what it calls.
False alarms of the sampled check: once in 1000 seeds, and the seeds here are fixed.
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import SIZES, make_model, perturbed
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_specdec import demo_pair
from hf_specdec.loop import decoding
from hf_specdec.models import abilities
from hf_specdec.models.cached import CachedModel
from hf_specdec.models.layout import Layout
from hf_specdec.sampling import acceptance, rules
from hf_specdec.sampling.acceptance import Verdict
from hf_specdec.tools import two_sample
from hf_specdec.tools.lossless import BUG, IDENTICAL, TIE, Comparison, Row, compare, spacing
from hf_specdec.tools.two_sample import chi_squared, critical_value, detectable_bias, rounding_of_laws, tail

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_lossless.py"
SMALL = ["--prompts", "2", "--new-tokens", "24", "--gamma", "3", "--samples", "0", "--prompt-tokens", "30"]

Check = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Iterator[Check]:
    """Run the script: its exit code, and the JSON in the last line of its output."""
    spec = importlib.util.spec_from_file_location("check_lossless", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = script.main(list(arguments))
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    yield run


def save_pair(folder: Path, tokenizer: PreTrainedTokenizerFast, initializer_range: float) -> list[str]:
    """The arguments for a random pair on disk. The smaller the range, the closer the logits."""
    target = make_model(LlamaConfig(**{**SIZES, "initializer_range": initializer_range}))
    for name, model in {"target": target, "draft": perturbed(target, 0.12)}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return ["--target", str(folder / "target"), "--draft", str(folder / "draft")]


def total(result: dict[str, Any], name: str) -> int:
    return sum(way[name] for way in result["greedy"])


# ---------------------------------------------------------------------------------------------------------- sound code


def test_the_embedded_pair_in_float32_is_identical(check):
    code, result = check(*SMALL, "--batch-size", "1", "2")
    assert code == 0 and result["lossless"] and not result["failures"] and not result["sampled"]
    assert [(way["drafter"], way["batch_size"]) for way in result["greedy"]] == [
        ("model", 1), ("look-up", 1), ("model", 2), ("look-up", 2),
    ]  # fmt: skip
    for way in result["greedy"]:
        assert way["rows"] == way["identical"] == 2 and not way["divergences"]
        assert 0 < way["deviation"] <= way["bound"] < 1e-4
    assert all(way["accepted_tokens"] for way in result["greedy"])


def test_near_ties_are_ties(check, tmp_path, tokenizer):
    """This pair's logits are so close that paths diverge in bfloat16; rounding explains every case."""
    arguments = ["--dtype", "bfloat16", "--prompts", "8", "--new-tokens", "40", "--batch-size", "4"]
    code, result = check(*save_pair(tmp_path, tokenizer, 0.05), *SMALL, *arguments)
    assert code == 0 and total(result, "bugs") == 0
    assert total(result, "ties") >= 2 and total(result, "identical") >= 2
    for way in result["greedy"]:
        assert way["ties"] == len(way["divergences"])
        for divergence in way["divergences"]:
            vanilla, ours = divergence["gaps"]
            assert divergence["verdict"] == TIE and vanilla >= 0 and ours >= 0 and vanilla + ours <= way["bound"]
            assert divergence["tokens"][0] != divergence["tokens"][1]


def test_samples_of_sound_code_follow_one_law(check, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(two_sample.SAMPLING, "num_return_sequences", 500)
    code, result = check(*save_pair(tmp_path, tokenizer, 0.2), *SMALL, "--samples", "2000")
    assert code == 0
    for way in result["sampled"]:
        assert way["samples"] == 4000 and way["p_value"] > 0.05 and way["accepted_tokens"]
        assert all(0.02 < view["detectable"] < 0.3 and view["granted"] < 1e-3 for view in way["views"])


def test_samples_are_granted_what_rounding_explains():
    """Almost nothing in float32; more in bfloat16, but little next to the few hundredths that the test can detect."""
    target, _, tokenizer = demo_pair()
    inputs = dict(tokenizer("def fibonacci(n):\n    ", return_tensors="pt", return_token_type_ids=False))
    torch.manual_seed(0)
    assert rounding_of_laws(target, inputs) < 1e-10
    assert 1e-7 < rounding_of_laws(target.bfloat16(), inputs) < 1e-3


# ------------------------------------------------------------------------------------------------ broken on purpose


def keep_a_rejected_token(monkeypatch):
    """The target's cache has the first rejected token's entry in place of the last committed one's."""
    roll_back = decoding.SpeculativeDecoding.roll_back

    def one_off(self: decoding.SpeculativeDecoding) -> None:
        active = list(self.context.rows)
        roll_back(self)
        cache = self.target.cache
        for index, row in enumerate(active):
            end = cache.lengths[row]
            for layer in cache.layers:
                layer.keys[index, :, end - 1] = layer.keys[index, :, end]
                layer.values[index, :, end - 1] = layer.values[index, :, end]

    monkeypatch.setattr(decoding.SpeculativeDecoding, "roll_back", one_off)


def accept_everything(monkeypatch):
    def accept(draft_tokens: Tensor, draft_lengths: Tensor, scores: Tensor) -> Verdict:
        tokens = scores.argmax(dim=-1)
        tokens = torch.cat([draft_tokens, tokens[:, -1:]], dim=1)
        tokens = tokens.scatter(1, draft_lengths[:, None], scores.argmax(-1).gather(1, draft_lengths[:, None]))
        return Verdict(tokens, draft_lengths, torch.ones_like(draft_lengths, dtype=torch.bool))

    monkeypatch.setattr(rules, "accept_greedy", accept)


def shift_positions(monkeypatch):
    """Positions are off by one during verification, but not over the prompt (rotary positions are relative)."""
    positions = Layout.positions

    def shifted(self: Layout, rows: list[int], starts: list[int], slots: Tensor) -> Tensor:
        return positions(self, rows, starts, slots) + (max(starts) > 0)

    monkeypatch.setattr(Layout, "positions", shifted)
    monkeypatch.setattr(abilities, "rehearse", lambda *_, **__: None)  # which would find it first


def spoil_logits(monkeypatch):
    """A thousandth off: too little to change these tokens."""
    forward = CachedModel.forward

    def spoiled(self: CachedModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = output.logits.clone()  # of a tensor made in inference mode
        output.logits[..., ::2] += 1e-3
        return output

    monkeypatch.setattr(CachedModel, "forward", spoiled)
    monkeypatch.setattr(abilities, "rehearse", lambda *_, **__: None)  # which would find it first


SOUND: dict[str, dict[str, Any]] = {}  # by dtype, the script's result for sound code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mutant", [keep_a_rejected_token, accept_everything, shift_positions])
def test_wrong_tokens_are_a_bug(check, monkeypatch, mutant, dtype):
    """In bfloat16 too: the bug's effect on our logits cannot hide in the noise, which is measured without us."""
    if dtype not in SOUND:
        SOUND[dtype] = check(*SMALL, "--dtype", dtype, "--batch-size", "2")[1]
    sound = SOUND[dtype]
    mutant(monkeypatch)
    code, result = check(*SMALL, "--dtype", dtype, "--batch-size", "2")
    assert code == 1 and not result["lossless"] and "rounding" in result["failures"][0]
    assert total(sound, "bugs") == 0 < total(result, "bugs")
    assert [way["noise"] for way in result["greedy"]] == [way["noise"] for way in sound["greedy"]]


def test_wrong_logits_behind_the_right_tokens_are_a_bug(check, monkeypatch):
    spoil_logits(monkeypatch)
    code, result = check(*SMALL, "--batch-size", "2")
    assert code == 1 and total(result, "bugs") == 4
    for divergence in result["greedy"][0]["divergences"]:
        assert divergence["position"] is None and "logits off by" in divergence["why"]


def keep_what_the_draft_says(monkeypatch):
    """Rejected with the right probability, but then drawn from the target's law instead of the residual."""
    monkeypatch.setattr(acceptance, "residual", lambda p, q: p)


def accept_every_sample(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)


@pytest.mark.parametrize("mutant", [keep_what_the_draft_says, accept_every_sample])
def test_samples_from_another_law_are_found(check, tmp_path, tokenizer, monkeypatch, mutant):
    monkeypatch.setitem(two_sample.SAMPLING, "num_return_sequences", 500)
    mutant(monkeypatch)
    code, result = check(*save_pair(tmp_path, tokenizer, 0.2), *SMALL, "--samples", "2000")
    assert code == 1 and total(result, "bugs") == 0
    way = result["sampled"][0]
    assert way["differs"] and way["p_value"] < 1e-6
    assert any("samples differ: model" in failure for failure in result["failures"])


def test_a_run_without_drafts_shows_nothing(check):
    """One new token leaves no room for a draft."""
    code, result = check(*SMALL[:4], "--samples", "0", "--new-tokens", "1", "--batch-size", "1")
    assert code == 1 and "no draft was ever accepted" in result["failures"][0]
    assert total(result, "bugs") == 0


# ------------------------------------------------------------------------------------------------------- the verdict


def row(tokens: list[int], *logits: list[float]) -> Row:
    return Row(tokens, torch.tensor(logits), torch.tensor(logits))


VANILLA = row([0, 1], [4.0, 0.0, 0.0], [0.0, 4.0, 3.96])


@pytest.mark.parametrize(
    ("ours", "verdict", "why"),
    [
        (VANILLA, IDENTICAL, ""),
        (row([0, 2], [4.0, 0.0, 0.0], [0.0, 3.98, 4.0]), TIE, "gaps of 0.06"),
        (row([0, 2], [4.0, 0.0, 0.0], [0.0, 3.93, 4.03]), BUG, "gaps of 0.14"),
        (row([0, 2], [4.0, 0.0, 0.0], [0.0, 4.0, 3.98]), BUG, "not the best token"),
        (row([0, 2], [4.0, 0.0, 0.3], [0.0, 3.98, 4.0]), BUG, "logits off by 0.3"),
        (row([0, 2], [4.0, 0.0, 0.0], [0.3, 3.98, 4.0]), BUG, "logits off by 0.3"),
        (row([0, 1], [4.0, 0.0, float("nan")], [0.0, 4.0, 3.96]), BUG, "logits off by nan"),
        (row([0], [4.0, 0.0, 0.0]), BUG, "speculation ended earlier"),
        (row([0, 1, 1], *VANILLA.logits.tolist(), [0.0, 4.0, 0.0]), BUG, "vanilla ended earlier"),
    ],
)
def test_verdict(ours, verdict, why):
    """With noise of 0.05, rounding explains gaps of 0.1 in total; float32 itself resolves far more."""
    found = compare(1, VANILLA, ours, torch.float32).judge(noise=0.05)
    assert found[0] == verdict and found[1].startswith(why)


def test_what_follows_a_divergence_does_not_count():
    ours = row([2, 0], [4.0, 0.0, 4.0], [9.0, 0.0, 0.0])
    vanilla = row([0, 1], [4.0, 0.0, 4.0], [0.0, 4.0, 3.96])
    comparison = compare(3, vanilla, ours, torch.float32)
    assert comparison.position == 1 and comparison.deviation == 0 and comparison.gaps == (0, 0)
    assert comparison.judge(noise=0.0)[0] == TIE


def test_two_units_in_the_last_place_are_explained_without_any_noise():
    """bfloat16 has 8 significant bits: neighbours between 4 and 8 are 1/32 apart."""
    assert spacing(5.0, torch.bfloat16) == 1 / 32 and spacing(4.0, torch.bfloat16) == 1 / 32
    assert spacing(3.99, torch.bfloat16) == 1 / 64 and spacing(5.0, torch.float32) == 2.0**-21
    for gap, verdict in ((1 / 32, TIE), (3 / 64, BUG)):  # on each path; two units are 1/16 in all
        comparison = Comparison(1, 1, (0, 1), (gap, gap), gap, 2 * spacing(5.0, torch.bfloat16))
        assert comparison.judge(noise=0.0)[0] == verdict


# ------------------------------------------------------------------------------------------------------ the statistics


@pytest.mark.parametrize("freedom", [1, 7, 120])
@pytest.mark.parametrize("noncentrality", [0.0, 0.3, 40.0, 900.0])
def test_tail_is_that_of_scipy(freedom, noncentrality):
    law = scipy.stats.ncx2(freedom, noncentrality) if noncentrality else scipy.stats.chi2(freedom)
    for quantile in (0.01, 0.5, 0.9, 0.9999, 1 - 1e-8):
        x = law.ppf(quantile)
        assert tail(x, freedom, noncentrality) == pytest.approx(law.sf(x), rel=1e-5, abs=1e-13)
    assert critical_value(freedom, 1e-4, noncentrality) == pytest.approx(law.isf(1e-4), rel=1e-6)


def test_statistic_is_that_of_a_contingency_table():
    """Outcomes 2 and 3 are rare; even together they are too few for a cell, so they join the smallest one."""
    first, second = Counter({(0,): 60, (1,): 30, (2,): 4, (4,): 6}), Counter({(0,): 70, (1,): 20, (3,): 3, (4,): 7})
    table = np.array([[60, 30, 10], [70, 20, 10]])
    expected = scipy.stats.chi2_contingency(table, correction=False)
    assert chi_squared(first, second) == pytest.approx((expected.statistic, expected.dof))
    assert chi_squared(first, first)[0] == 0


def test_the_stated_bias_is_found_with_the_stated_power():
    """A bias spread as evenly as possible, so that the bound is nearly tight; and without bias, few alarms.

    400 pairs of samples: the shares may be off by 0.045 (three standard deviations) and 0.0175.
    """
    rng = np.random.default_rng(0)
    cells, samples, significance = 40, 2000, 0.01
    bias = detectable_bias(samples, cells - 1, significance, 0.9)
    law = np.full(cells, 1 / cells)
    biased = law * (1 + 2 * bias * np.tile([1, -1], cells // 2))
    assert np.abs(biased - law).sum() / 2 == pytest.approx(bias)

    def draw(p: np.ndarray) -> Counter[tuple[int, ...]]:
        return Counter({(i,): int(n) for i, n in enumerate(rng.multinomial(samples, p)) if n})

    def alarms(p: np.ndarray) -> float:
        return np.mean([tail(*chi_squared(draw(law), draw(p))) < significance for _ in range(400)])

    assert alarms(biased) >= 0.9 - 0.045
    assert alarms(law) <= significance + 0.0175
