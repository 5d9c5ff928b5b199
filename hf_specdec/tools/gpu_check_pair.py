"""Sampled text in float32 and ragged batches in bfloat16, by the rules of `check_lossless`, on the embedded pair."""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..pairs.pair import DEMO_PAIR, SpecPair
from . import lossless, two_sample
from .arguments import Prompt, load_prompts
from .gpu_check import OK, STATIC, WRONG, Case, Part, Scale, attempt
from .lossless import BUG, IDENTICAL, TIE, TokenResult, Way
from .synthetic import big_pair
from .two_sample import ROWS, SampledResult

GAMMA, BATCH = 4, 8
LONGEST, SHORTEST = 80, 20  # tokens of the prompts


def parts() -> list[Part]:
    return [Part("bf16/ragged", 60, half_precision), Part("sampling/two-sample", 90, sampled)]


class StaticWay(Way):
    """A way to speculate with fixed shapes, on CUDA with graphs."""

    def __str__(self) -> str:
        return f"{super().__str__()}, static"

    def options(self, pair: SpecPair) -> dict[str, Any]:
        return super().options(pair) | STATIC


def half_precision(scale: Scale) -> Iterator[Case]:
    """Eight prompts of their own lengths in one batch: each row is vanilla's but for ties that rounding explains."""
    rows, new_tokens = (BATCH, 12) if scale.tiny else (BATCH, 64)
    sizes = {"layers": 4, "hidden_size": 64, "intermediate_size": 128, "draft_layers": 1}
    pair = big_pair(torch.bfloat16, scale.device, **sizes) if scale.tiny else embedded_pair(scale, torch.bfloat16)
    prompts = embedded_prompts(pair, rows)
    for way in (Way("model", GAMMA, rows), StaticWay("model", GAMMA, rows), Way("look-up", GAMMA, rows)):

        def check(way: Way = way) -> tuple[str, str]:
            (result,) = lossless.check_tokens(pair, prompts, [way], new_tokens)
            return judged_greedy(result)

        yield attempt(f"{way}, {rows} rows", check)


def judged_greedy(result: TokenResult) -> tuple[str, str]:
    counts = Counter(verdict for _, verdict, _ in result.verdicts())
    details = f"{counts[IDENTICAL]} rows identical, {counts[TIE]} ties, bound {result.bound:.2g}"
    details += f", {result.stats.accepted_tokens} of {result.stats.drafted_tokens} drafts accepted"
    if counts[BUG]:
        wrong = next((c, why) for c, verdict, why in result.verdicts() if verdict == BUG)
        return WRONG, f"prompt {wrong[0].prompt}, new token {wrong[0].position}: {wrong[1]}; {details}"
    return OK, details


def sampled(scale: Scale) -> Iterator[Case]:
    """Two samples, ours and vanilla's, from a fixed seed: a chance of 1 in 1000 to fail though nothing is wrong."""
    pair = embedded_pair(scale, torch.float32)
    prompts = embedded_prompts(pair, 1 if scale.tiny else 4)
    samples = ROWS if scale.tiny else 15 * ROWS
    ways = [Way("model", GAMMA), Way("look-up", GAMMA), StaticWay("model", GAMMA)]
    for way in ways[:2] if scale.tiny else ways:

        def check(way: Way = way) -> tuple[str, str]:
            torch.manual_seed(0)
            (result,) = two_sample.check_sampled(pair, prompts, [way], samples)
            return judged_sampled(result)

        yield attempt(f"{way}", check)


def judged_sampled(result: SampledResult) -> tuple[str, str]:
    finds = [view.detectable for view in result.views if view.detectable is not None]
    details = f"p = {result.p_value:.2g} with {result.samples} samples a side"
    if finds:
        details += f", would find a bias of {min(finds):.1%} to {max(finds):.1%}"
    details += f"; {result.stats.accepted_tokens} of {result.stats.drafted_tokens} drafts accepted"
    return (WRONG if result.differs else OK), details


def embedded_pair(scale: Scale, dtype: torch.dtype) -> SpecPair:
    pair = SpecPair.from_pretrained(str(DEMO_PAIR), dtype=dtype)
    pair.target.to(scale.device)
    pair.draft.to(scale.device)
    return pair


def embedded_prompts(pair: SpecPair, count: int) -> list[Prompt]:
    """Held-out prompts of the embedded pair, cut to uneven lengths; the first one is the longest."""
    names = ("dataset", "prompt_tokens", "column", "reference_column")
    chosen = argparse.Namespace(prompts=count, category_column="category", chat_template=False, **dict.fromkeys(names))
    prompts = []
    for number, prompt in enumerate(load_prompts(chosen, pair.tokenizer)):
        ids = pair.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        kept = max(LONGEST - number * LONGEST // count, SHORTEST)
        prompts.append(replace(prompt, text=pair.tokenizer.decode(ids[:kept])))
    return prompts
