"""Whether speculation changes a model's output: greedy and coupled outputs, token by token.

Owns the comparison and its verdicts; does not deal with command lines or tables.

Vanilla and speculative decoding must give the same tokens: greedily, and where both sample with the noise of one seed
(`speculation_acceptance="coupled"`). `two_sample.py` compares samples of the other acceptance rules by their law.

In a low-precision dtype, two correct programs may still diverge, because a forward over several tokens rounds
differently from one over a single token. At the first differing token of a row (later ones may differ), both paths have
seen the same prefix, so their logits there decide.
It is a *numerical tie* if all of this holds, and a *BUG* otherwise:

1. each path chose the best token of its own scores, with noise if there is any;
2. the gap between the two tokens, summed over both paths, is at most the *bound*;
3. up to there, the logits of the two paths differ by at most the bound (over vanilla's TOP best tokens per position).

A row of identical tokens is also a BUG if it fails condition 3. The bound is the larger of

- the *resolution*: two units in the last place of the dtype at the magnitude of the row's logits, because each of the
  four logits in the sum of the gaps is rounded by half a unit in the last step;
- twice the *noise* of the target itself. It comes from the differences between vanilla's logits (one token at a time,
  with transformers' cache) and one plain forward over the whole unpadded text without a cache: at each position of all
  prompts, the largest over the TOP tokens. If logits are off by at most n, the sum of two tokens' gaps is off by at
  most 2n.

The largest difference seen would be a poor measure: with more positions, or another way of speculating, a larger one
turns up, and the fewer positions there were, the larger it is. So the noise is the level that one of COMPARED times as
many positions is expected to exceed, and at least the largest difference seen. Each difference is itself the largest
of TOP, so they follow Gumbel's law of extremes, which their mean and spread determine. On 12 prompts of 64 tokens of
the embedded pair in bfloat16: largest difference 0.125, noise 0.17, bound 0.35, our largest deviation 0.125; with 48
of the 768 positions, the largest difference alone may be 0.0625.

The noise is measured without our code, so a bug that spoils our logits cannot hide in it. The report also shows how
much the bound may hide: the share of positions at which vanilla's own best two tokens are that close.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..pairs.pair import SpecPair
from ..records.stats import SpeculationStats
from ..sampling.noise import gumbel, state
from .arguments import Prompt, encode

TOP = 20  # tokens per position whose logits are compared
COMPARED = 10  # compared positions per position at which noise was measured: a run has 4 ways
EULER = 0.5772156649  # the mean of the standard Gumbel law
IDENTICAL, TIE, BUG = "identical", "tie", "BUG"


@dataclass(frozen=True)
class Way:
    """A way to speculate: `drafter` is "model" or "look-up"."""

    drafter: str
    gamma: int
    batch_size: int = 1

    def __str__(self) -> str:
        return f"{self.drafter} γ={self.gamma}"

    def options(self, pair: SpecPair) -> dict[str, Any]:
        """The arguments of `generate()`."""
        if self.drafter == "look-up":
            return {"strategy": "spec", "prompt_lookup_num_tokens": self.gamma}
        given = {"strategy": "spec", "assistant_model": pair.draft, "num_assistant_tokens": self.gamma}
        return given | pair.tokenizers


@dataclass(frozen=True)
class Row:
    """What one call generated for one prompt.

    Attributes:
        tokens: the new tokens, up to and including the first end token.
        logits: `[tokens, vocab]`, the model's own.
        scores: `[tokens, vocab]`, the logits after all logits processors; their argmax is chosen.
    """

    tokens: list[int]
    logits: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Comparison:
    """One row of speculative decoding, compared with vanilla's.

    Attributes:
        prompt: its number, from 1.
        position: the number of the first new token that differs, from 1; `None` if none does.
        tokens: vanilla's and our token there; `None` if that row had already ended.
        gaps: by how much each path prefers its own token to the other's, in scores; `None` if one had ended.
        deviation: the largest difference between the two paths' logits up to that position.
        resolution: two units in the last place at the magnitude of the logits.
    """

    prompt: int
    position: int | None
    tokens: tuple[int | None, int | None]
    gaps: tuple[float, float] | None
    deviation: float
    resolution: float

    def judge(self, noise: float) -> tuple[str, str]:
        """The verdict, and why: see the rule at the top of this file. `noise`: of the target itself."""
        bound = max(self.resolution, 2 * noise)
        if self.position is not None and self.gaps is None:
            who = "vanilla" if self.tokens[0] is None else "speculation"
            return BUG, f"{who} ended earlier"
        if self.gaps is not None and not min(self.gaps) >= 0:
            return BUG, "not the best token of its own path"
        if not self.deviation <= bound:
            return BUG, f"logits off by {self.deviation:.2g}, rounding explains {bound:.2g}"
        if self.gaps is None:
            return IDENTICAL, ""
        if not sum(self.gaps) <= bound:
            return BUG, f"gaps of {sum(self.gaps):.2g} in all, rounding explains {bound:.2g}"
        return TIE, f"gaps of {sum(self.gaps):.2g} in all, within {bound:.2g}"


@dataclass
class Rounding:
    """The differences between vanilla and plain forwards of the target.

    Attributes:
        differences: the largest difference between their logits at each position.
        margins: the gap between vanilla's best and second-best score at each position.
    """

    differences: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    @property
    def noise(self) -> float:
        """The largest difference expected at COMPARED times as many positions, at least the largest seen."""
        if not self.differences:
            return 0.0
        scale = statistics.pstdev(self.differences) * math.sqrt(6) / math.pi
        mode = statistics.fmean(self.differences) - EULER * scale
        return max(*self.differences, mode + scale * math.log(COMPARED * len(self.differences)))

    def add(self, row: Row, reference: Tensor) -> None:
        self.differences += (_top(row.logits, row.logits) - _top(reference, row.logits)).abs().amax(dim=-1).tolist()
        self.margins += (-row.scores.topk(2).values.diff(dim=-1)).flatten().tolist()


@dataclass
class TokenResult:
    """The comparison of all prompts in one way."""

    way: Way
    rounding: Rounding  # shared by the ways of one batch size, complete when all batches have run
    comparisons: list[Comparison] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    def verdicts(self) -> list[tuple[Comparison, str, str]]:
        return [(comparison, *comparison.judge(self.rounding.noise)) for comparison in self.comparisons]

    @property
    def bound(self) -> float:
        return max(2 * self.rounding.noise, *(c.resolution for c in self.comparisons))

    @property
    def near_ties(self) -> float:
        """The share of vanilla's positions whose best two scores are within the bound, so that a tie would pass."""
        margins = self.rounding.margins
        return sum(margin <= self.bound for margin in margins) / len(margins)

    def to_dict(self) -> dict[str, Any]:
        verdicts = self.verdicts()
        counts = Counter(verdict for _, verdict, _ in verdicts)
        return asdict(self.way) | {
            "rows": len(verdicts),
            "identical": counts[IDENTICAL],
            "ties": counts[TIE],
            "bugs": counts[BUG],
            "acceptance_rate": round(self.stats.acceptance_rate, 4),
            "block_efficiency": round(self.stats.block_efficiency, 3),
            "drafted_tokens": self.stats.drafted_tokens,
            "accepted_tokens": self.stats.accepted_tokens,
            "deviation": max(c.deviation for c in self.comparisons),
            "noise": self.rounding.noise,
            "noise_positions": len(self.rounding.differences),
            "noise_seen": max(self.rounding.differences),
            "bound": self.bound,
            "near_ties": round(self.near_ties, 4),
            "divergences": [asdict(c) | {"verdict": v, "why": why} for c, v, why in verdicts if v != IDENTICAL],
        }


def check_tokens(
    pair: SpecPair,
    prompts: list[Prompt],
    ways: list[Way],
    new_tokens: int,
    advance: Callable[[], None] = lambda: None,
    seed: int | None = None,
) -> list[TokenResult]:
    """Decode with vanilla and in each way, and compare.

    Args:
        pair, prompts: the models and prompts; prompts are left-padded into batches of each way's size.
        new_tokens: maximum per prompt.
        advance: called after each batch and way.
        seed: of the first prompt, where all sample, the next prompts having the next seeds; `None` for greedy decoding.
    """
    roundings = {way.batch_size: Rounding() for way in ways}
    results = [TokenResult(way, roundings[way.batch_size]) for way in ways]
    for batch_size, rounding in roundings.items():
        for first in range(0, len(prompts), batch_size):
            inputs = encode(prompts[first : first + batch_size], pair.tokenizer, pair.target.device)
            seeds = None if seed is None else [seed + first + row for row in range(len(inputs["input_ids"]))]
            vanilla = decode(pair.target, inputs, new_tokens, seeds)
            for prompt, row in zip(unpadded(inputs), vanilla):
                rounding.add(row, plain_logits(pair.target, prompt, row.tokens))
            for result in results:
                if result.way.batch_size != batch_size:
                    continue
                options = result.way.options(pair) | {"speculation_stats": result.stats}
                rows = decode(pair.target, inputs, new_tokens, seeds, **options)
                for number, pair_of_rows in enumerate(zip(vanilla, rows, strict=True), start=first + 1):
                    result.comparisons.append(compare(number, *pair_of_rows, pair.target.dtype))
                advance()
    return results


# From the model's own distribution: temperatures and cuts would scale rounding, or make jumps of it.
_SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def decode(
    target: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int, seeds: list[int] | None = None, **options: Any
) -> list[Row]:
    """`generate()`, one `Row` per row of the batch.

    Args:
        seeds: by row, where the call samples with their noise; scores then include it. `None` for greedy decoding.
        options: of `generate()`; without a strategy, vanilla's.
    """
    mask = inputs["attention_mask"]
    options |= {"max_new_tokens": new_tokens, "return_dict_in_generate": True}
    options |= {"output_logits": True, "output_scores": True, "do_sample": False} | (_SAMPLED if seeds else {})
    if seeds and "strategy" in options:
        options |= {"speculation_acceptance": "coupled", "speculation_seed": seeds}
    with coupled_choice(seeds, mask) if seeds and "strategy" not in options else nullcontext():
        out = target.generate(**inputs, **options)
    rows = cut(out.sequences[:, inputs["input_ids"].shape[1] :], target)
    logits, scores = (torch.stack(steps, dim=1).float() for steps in (out.logits, out.scores))
    for row, (seed, length) in enumerate(zip(seeds or [], mask.sum(dim=1).tolist())):
        places = [state(seed, length + i) for i in range(scores.shape[1])]
        scores[row] += gumbel(places, scores.shape[2], scores.device)
    return [Row(tokens, logits[i, : len(tokens)], scores[i, : len(tokens)]) for i, tokens in enumerate(rows)]


@contextmanager
def coupled_choice(seeds: list[int], attention_mask: Tensor) -> Iterator[None]:
    """Inside, `torch.multinomial` draws as `speculation_acceptance="coupled"` does: for vanilla `generate()`.

    No logits processor could do that, because transformers appends its own after it.

    Args:
        seeds: by row.
        attention_mask: `[rows, columns]`, of the prompt.
    """
    lengths: list[int] = (attention_mask.shape[1] - attention_mask.long().argmax(dim=1)).tolist()
    steps = itertools.count()

    def choose(probs: Tensor, num_samples: int) -> Tensor:
        step = next(steps)
        places = [state(seed, length + step) for seed, length in zip(seeds, lengths)]
        return (probs.log() + gumbel(places, probs.shape[1], probs.device)).argmax(dim=1, keepdim=True)

    with mock.patch.object(torch, "multinomial", choose):
        yield


def cut(tokens: Tensor, model: PreTrainedModel) -> list[list[int]]:
    """Each row up to and including its first end token; the rest is padding."""
    eos = model.generation_config.eos_token_id
    ends = set() if eos is None else set(torch.tensor(eos).flatten().tolist())
    return [row[: next((i for i, t in enumerate(row, start=1) if t in ends), len(row))] for row in tokens.tolist()]


def unpadded(inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    """The prompts of a batch without padding: `[tokens]` each."""
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        yield ids[mask.bool()]


@torch.inference_mode()
def plain_logits(target: PreTrainedModel, prompt: Tensor, tokens: list[int]) -> Tensor:
    """The logits for each of `tokens` from one forward over the whole text, without a cache: `[tokens, vocab]`."""
    ids = torch.cat([prompt, prompt.new_tensor(tokens[:-1])])
    return target(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 :].float()


def compare(prompt: int, vanilla: Row, spec: Row, dtype: torch.dtype) -> Comparison:
    """Compare two rows that continue the same prompt with a model of that dtype."""
    shorter = min(len(vanilla.tokens), len(spec.tokens))
    at = next((i for i in range(shorter) if vanilla.tokens[i] != spec.tokens[i]), shorter)
    same = slice(at + 1)  # the positions at which both paths had seen the same prefix
    length = min(at + 1, shorter)
    deviation = _difference(vanilla.logits[:length], spec.logits[:length], vanilla.logits[:length])
    resolution = 2 * spacing(float(_top(vanilla.logits[same], vanilla.logits[same]).abs().max()), dtype)
    if len(vanilla.tokens) == len(spec.tokens) == at:
        return Comparison(prompt, None, (None, None), None, deviation, resolution)
    a, b = ((row.tokens[at] if at < len(row.tokens) else None) for row in (vanilla, spec))
    if a is None or b is None:
        return Comparison(prompt, at + 1, (a, b), None, deviation, resolution)
    gaps = float(vanilla.scores[at, a] - vanilla.scores[at, b]), float(spec.scores[at, b] - spec.scores[at, a])
    return Comparison(prompt, at + 1, (a, b), gaps, deviation, resolution)


def spacing(magnitude: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of a dtype at a given magnitude."""
    return float(torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(magnitude))) if magnitude else 0.0


def _top(logits: Tensor, by: Tensor) -> Tensor:
    return logits.gather(-1, by.topk(min(TOP, by.shape[-1])).indices)


def _difference(a: Tensor, b: Tensor, by: Tensor) -> float:
    return float((_top(a, by) - _top(b, by)).abs().max())
