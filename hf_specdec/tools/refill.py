"""`generate_many` against static batches, on prompts of different lengths: ways take turns, part by part."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..generate.many import _Many, _Results, generate_many
from ..generate.places import Places
from ..generate.prompts import Preparation
from ..loop.refill import RefilledDecoding
from ..pairs.pair import SpecPair
from ..records.stats import SpeculationStats
from .measure import counting, synchronize

Text = tuple[list[int], int]  # a prompt, and how many new tokens it gets
Way = Callable[[list[Text]], dict[int, list[int]]]  # new tokens by index

_NO_END: dict[str, Any] = {"eos_token_id": 10**9, "pad_token_id": 0}
REFILLED, STATIC, SORTED, VANILLA = (
    "generate_many",
    "static batches",
    "static batches, sorted",
    "vanilla, static batches",
)


def compare_ways(
    pair: SpecPair,
    texts: list[str],
    count: int,
    batch_size: int,
    lengths: tuple[float, float],
    parts: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Decode all prompts in each way, part by part.

    Args:
        texts: prompts begin with 5 or more tokens of these, which repeat if there are fewer than `count`.
        lengths: median and σ of the lognormal distribution of new tokens.
        options: of speculation.
    """
    rng = random.Random(0)
    jobs: list[Text] = []
    for number in range(count):
        ids = pair.tokenizer(texts[number % len(texts)])["input_ids"]
        new = min(max(round(lengths[0] * rng.lognormvariate(0, lengths[1])), 1), 400)
        jobs.append((ids[: rng.randint(5, max(len(ids), 5))], new))
    stats = SpeculationStats()
    ways: dict[str, Way] = {
        VANILLA: lambda part: _static(pair, part, batch_size, {}),
        STATIC: lambda part: _static(pair, part, batch_size, _spec(pair) | options),
        SORTED: lambda part: _static(pair, part, batch_size, _spec(pair) | options, by_length=True),
        REFILLED: lambda part: _refilled(pair, part, batch_size, options | {"speculation_stats": stats}),
    }
    size = -(-count // parts)
    for way in ways.values():
        way(jobs[: 2 * batch_size])  # probes, and measuring what to pack
    stats.__init__()  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    forwards, differing = dict.fromkeys(ways, 0), 0
    with _timed_host_work() as host, _timed_steps() as steps:
        for number, begin in enumerate(range(0, count, size)):
            part = jobs[begin : begin + size]
            found: dict[str, dict[int, list[int]]] = {}
            for name in sorted(ways, key=lambda name: (list(ways).index(name) + number) % len(ways)):
                own = [0]

                def tick(own: list[int] = own) -> None:
                    own[0] += 1

                with counting(pair.target, tick, ours=name != VANILLA):
                    synchronize(pair.target.device)
                    began = time.perf_counter()
                    found[name] = ways[name](part)
                    synchronize(pair.target.device)
                    seconds[name].append(time.perf_counter() - began)
                forwards[name] += own[0]
            differing += sum(found[REFILLED][i] != found[VANILLA][i] for i in range(len(part)))
    tokens = sum(new for _, new in jobs)
    total = sum(seconds[REFILLED])
    return {
        "prompts": count,
        "batch_size": batch_size,
        "tokens": tokens,
        "ways": {
            name: {
                "forwards": forwards[name],
                "seconds": sum(taken),
                "tokens_per_second": tokens / sum(taken),
                "ratio": median(plain / own for plain, own in zip(seconds[VANILLA], taken)),
            }
            for name, taken in seconds.items()
        },
        "host_share": sum(host.values()) / total,
        "prepare_share": host["prepare"] / total,
        "reading_ratio": median(steps) if steps else 1.0,
        "doubled_share": sum(ratio > 2 for ratio in steps) / max(len(steps), 1),
        "acceptance_rate": stats.acceptance_rate,
        "differing": differing,
    }


def _spec(pair: SpecPair) -> dict[str, Any]:
    return {"strategy": "spec", "assistant_model": pair.draft}


def _refilled(pair: SpecPair, part: list[Text], batch_size: int, options: dict[str, Any]) -> dict[int, list[int]]:
    results = generate_many(
        pair.target,
        [prompt for prompt, _ in part],
        pair.draft,
        batch_size=batch_size,
        max_new_tokens=[new for _, new in part],
        do_sample=False,
        **_NO_END,
        **options,
    )
    return {result.index: result.new_tokens.tolist() for result in results}


def _static(
    pair: SpecPair, part: list[Text], batch_size: int, options: dict[str, Any], by_length: bool = False
) -> dict[int, list[int]]:
    order = sorted(range(len(part)), key=lambda i: part[i][1]) if by_length else list(range(len(part)))
    found: dict[int, list[int]] = {}
    for begin in range(0, len(part), batch_size):
        chosen = order[begin : begin + batch_size]
        rows = [torch.tensor(part[i][0]) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, 0, padding_side="left")
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, padding_side="left")
        out = pair.target.generate(
            ids.to(pair.target.device),
            attention_mask=mask.to(pair.target.device),
            max_new_tokens=max(part[i][1] for i in chosen),
            stopping_criteria=StoppingCriteriaList([_Lengths(ids.shape[1], [part[i][1] for i in chosen])]),
            do_sample=False,
            **_NO_END,
            **options,
        )
        new = out[:, ids.shape[1] :].tolist()
        found |= {i: tokens[: part[i][1]] for i, tokens in zip(chosen, new)}
    return found


class _Lengths(StoppingCriteria):
    """Ends each row of a batch after its number of new tokens, as an EOS token would."""

    def __init__(self, width: int, new_tokens: list[int]):
        self._ends = torch.tensor(new_tokens) + width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids.shape[1] >= self._ends).to(input_ids.device)


@contextmanager
def _timed_host_work() -> Iterator[dict[str, float]]:
    """Inside, seconds are counted that `generate_many` takes to prepare and admit texts and to make results, apart from
    forwards.
    """
    timed = [
        ("prepare", Preparation, "of"),
        ("admit", Places, "admit"),
        ("result", RefilledDecoding, "_end"),
        ("result", _Results, "of"),
        ("result", _Many, "_count"),
    ]
    seconds = {kind: 0.0 for kind, _, _ in timed}
    originals = [getattr(cls, name) for _, cls, name in timed]

    def counted(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[kind] += time.perf_counter() - began

        return call

    try:
        for (kind, cls, name), original in zip(timed, originals):
            setattr(cls, name, counted(kind, original))
        yield seconds
    finally:
        for (_, cls, name), original in zip(timed, originals):
            setattr(cls, name, original)


@contextmanager
def _timed_steps() -> Iterator[list[float]]:
    """Inside, how much longer `generate_many`'s iterations become by a piece of new prompts, for each that reads one:
    all seconds / those without the piece.
    """
    ratios: list[float] = []
    step = RefilledDecoding.step

    def timed(self: RefilledDecoding) -> Any:
        is_piece = bool(self._unread and self.context.rows)
        began, before = time.perf_counter(), self.stats.prefill_seconds
        ended = step(self)
        seconds = time.perf_counter() - began
        if is_piece:
            ratios.append(seconds / (seconds - (self.stats.prefill_seconds - before)))
        return ended

    try:
        RefilledDecoding.step = timed  # type: ignore[method-assign]
        yield ratios
    finally:
        RefilledDecoding.step = step  # type: ignore[method-assign]
