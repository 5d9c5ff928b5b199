"""How fast: vanilla, HF assisted generation and ours on random Llamas with the shapes of public ones.

A draft is the first layers of its target and shares their tensors; the later layers are scaled so that the two agree
on about AGREEMENT of the tokens. Methods take turns, and ratios are taken within a round (see `measure.py`).
"""

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from ..records.stats import Iteration, SpeculationStats
from . import methods
from .gpu_check import ERROR, OK, REFUSED, STATIC, Case, Part, Scale
from .measure import ASSISTED, OURS, Batch, Comparison, Method, Record, Run, synchronize
from .summary import decode_cost, ratio, total_cost
from .synthetic import llama_pair, tune_agreement

AGREEMENT = 0.8
EPSILON = 0.05  # where the search for it begins
LEAST_SHARE = 0.05  # of a call that must be decoding
GRAPHS = "static"


@dataclass(frozen=True)
class Shape:
    """The shape of a target, and how many of its layers draft."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    draft_layers: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=16384,
            # Wider layers add up more terms: like this, they add as much to the residual stream as narrow ones.
            initializer_range=0.05 * (1024 / self.hidden) ** 0.5,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )


# Layers and heads of Llama 3.2 1B and Llama 3 8B. The smaller one has a smaller vocabulary, since its head would
# otherwise cost a draft of 150M more than all of its layers.
SHAPES = {
    "1B-150M": Shape(2048, 8192, 16, 32, 8, 32768, draft_layers=2),
    "8B-1B": Shape(4096, 14336, 32, 32, 8, 128256, draft_layers=3),
}
TINY_SHAPES = {
    "tiny-a": Shape(64, 128, 4, 4, 2, 256, draft_layers=1),
    "tiny-b": Shape(96, 192, 6, 6, 2, 256, draft_layers=1),
}


@dataclass(frozen=True)
class Setting:
    """Rows, prompt tokens per row, and new tokens per row."""

    pair: str
    rows: int
    context: int
    new_tokens: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.pair}/{self.rows}x{self.context}"


def parts(scale: Scale) -> list[Part]:
    """The most important settings come first: the time limit may cut the others."""
    small, large = TINY_SHAPES if scale.tiny else SHAPES
    short, middle, long = (8, 16, 32) if scale.tiny else (64, 1024, 8192)
    new_tokens, rounds, many = (6, 1, 2) if scale.tiny else (96, 3, 8)

    def setting(pair: str, rows: int, context: int) -> Setting:
        return Setting(pair, rows, context, new_tokens, rounds)

    def plain(pair: str, rows: int, context: int) -> Part:
        chosen = setting(pair, rows, context)
        return Part(f"speed/{chosen.name}", 100, partial(measured, chosen, False), may_be_cut=True)

    def compiled(pair: str, rows: int, context: int) -> Part:
        chosen = setting(pair, rows, context)
        return Part(f"compiled/{chosen.name}", 150, partial(measured, chosen, True), may_be_cut=True)

    order = [
        plain(small, 1, short), plain(small, 1, middle), compiled(small, 1, short), plain(small, many, short),
        plain(small, many, middle), plain(large, 1, short), plain(large, 1, middle), compiled(large, 1, short),
        plain(large, many, short), plain(large, many, middle), plain(small, 1, long), plain(large, 1, long),
        plain(small, many, long), plain(large, many, long), compiled(small, many, short), compiled(large, many, short),
        compiled(small, 1, middle), compiled(large, 1, middle), compiled(small, many, middle),
        compiled(large, many, middle), compiled(small, 1, long), compiled(large, 1, long), compiled(small, many, long),
        compiled(large, many, long),
    ]  # fmt: skip
    return order[:10] if scale.tiny else order


# -------------------------------------------------------------------------------------------------------- one setting


def measured(setting: Setting, compiles: bool, scale: Scale) -> Iterator[Case]:
    """One setting: each method's case, with its figures. `compiles`: vanilla with transformers' own compilation."""
    target, draft, agreement = loaded_pair(setting.pair, scale)
    chosen = [methods.vanilla(), compiled_vanilla(scale)] if compiles else [methods.vanilla(), *fast_methods(draft)]
    first: dict[str, FirstCalls] = {}
    current: list[str] = []

    def timer(model: PreTrainedModel, batch: Batch, new_tokens: int, options: dict[str, Any]) -> tuple[Run, Tensor]:
        run, sequences = timed_apart(model, batch, new_tokens, options)
        calls = FirstCalls(run.seconds + run.first_seconds, options.get("speculation_stats"))
        first.setdefault(current[-1], calls)
        return run, sequences

    comparison = Comparison(
        target,
        chosen,
        [random_prompts(target, setting)],
        setting.new_tokens,
        advance=current.append,
        timer=timer,
        may_fail=(ASSISTED, OURS),
    )
    comparison.warm_up()
    comparison.round()  # untimed too: schedules have learned the costs by now, and graphs are captured
    for record in comparison.records.values():
        record.rounds.clear()
        record.stats = Laps()
    for _ in range(setting.rounds):
        comparison.round()
    floor = Floor.of(target, setting, bandwidth(scale))
    for record in comparison.records.values():
        if compiles and record is comparison.reference:
            continue  # the part without compilation reports it
        if record.refusal:
            yield refused(record)
        else:
            yield case_of(record, comparison.reference, setting, floor, first[record.method.name])
    if not compiles:
        yield Case("pair", OK, f"agreement {agreement:.2f} on random text, {floor.describe()}")


def fast_methods(draft: PreTrainedModel) -> list[Method]:
    return [
        methods.assisted(draft, methods.DEFAULT),
        methods.ours(draft, {}, methods.DEFAULT),
        methods.ours(draft, STATIC, GRAPHS),
    ]


def compiled_vanilla(scale: Scale) -> Method:
    """transformers compiles the decoding steps of a static cache by itself, on CUDA."""
    name = "vanilla static, compiled" if scale.is_cuda else "vanilla static"
    return Method(name, ASSISTED, lambda: dict(STATIC))


_loaded: dict[str, tuple[PreTrainedModel, PreTrainedModel, float]] = {}  # the last pair only


def loaded_pair(name: str, scale: Scale) -> tuple[PreTrainedModel, PreTrainedModel, float]:
    """Target, draft, and how often they agree; kept until another pair is asked for."""
    if name not in _loaded:
        _loaded.clear()
        gc.collect()
        if scale.is_cuda:
            torch.cuda.empty_cache()
        shape = (TINY_SHAPES if scale.tiny else SHAPES)[name]
        dtype, layers = torch.bfloat16, shape.draft_layers
        target, draft = llama_pair(shape.config(), dtype, scale.device, draft_layers=layers, epsilon=EPSILON)
        _loaded[name] = target, draft, tune_agreement(target, draft, AGREEMENT)
    return _loaded[name]


def random_prompts(target: PreTrainedModel, setting: Setting) -> Batch:
    generator = torch.Generator().manual_seed(setting.context)
    shape = (setting.rows, setting.context)
    ids = torch.randint(1, target.config.vocab_size, shape, generator=generator).to(target.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def timed_apart(target: PreTrainedModel, batch: Batch, new_tokens: int, options: dict[str, Any]) -> tuple[Run, Tensor]:
    """Time a call for all tokens, and one for the first token; the difference is decoding.

    A streamer would tell when the first token comes, but would also wait for the device at each step. What ours does
    after the first token counts as decoding, reading the prompt with the draft model too.
    """

    def seconds(tokens: int, given: dict[str, Any]) -> tuple[float, Tensor]:
        synchronize(target.device)
        began = time.perf_counter()
        sequences = target.generate(**batch, max_new_tokens=tokens, do_sample=False, **given)
        synchronize(target.device)
        return time.perf_counter() - began, sequences

    whole, sequences = seconds(new_tokens, options)
    first, _ = seconds(1, {name: value for name, value in options.items() if name != "speculation_stats"})
    rows = len(sequences)
    return Run(whole, first, rows * new_tokens, rows, max(whole - first, 1e-6), forwards=0), sequences


# ---------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class FirstCalls:
    """A method's first two calls: what they took, and the statistics of the longer one, if it has any."""

    seconds: float
    stats: SpeculationStats | None


class Laps(SpeculationStats):
    """Statistics that also keep each iteration's times, without those of the first two of a call.

    The first one reads the prompt with the target, the second one may do so with the draft.
    """

    def __init__(self) -> None:
        super().__init__()
        self.laps: list[tuple[float, float, float]] = []
        self._iteration = 0

    def add_prefill(self, *args: Any, **kwargs: Any) -> None:
        super().add_prefill(*args, **kwargs)
        self._iteration = 0

    def add(self, iteration: Iteration) -> None:
        super().add(iteration)
        self._iteration += 1
        if self._iteration > 2:
            self.laps.append((iteration.draft_seconds, iteration.verify_seconds, iteration.other_seconds))

    def split(self) -> dict[str, float]:
        """Mean milliseconds per iteration: drafting, verification with acceptance, the rest.

        The host's times: work that drafting has queued on the device may be waited for in verification.
        """
        if not self.laps:
            return {}
        columns = zip(("draft_ms", "verify_ms", "rest_ms"), zip(*self.laps))
        return {name: round(1000 * statistics.fmean(seconds), 3) for name, seconds in columns}


@dataclass(frozen=True)
class Floor:
    """The memory-bandwidth floor of decoding token by token.

    A step of vanilla decoding reads every weight that takes part once (the input embedding is only looked up), and the
    keys and values of all rows. So it takes at least

        (weight bytes + rows · (context + new tokens / 2) · KV bytes per token) / copy bandwidth

    seconds, for one token of each row. The bandwidth is that of a copy on this device, reading and writing counted.
    A method's share of the floor is its tokens per second divided by rows / floor; speculation may exceed 100%.
    """

    seconds: float
    weight_bytes: int
    cache_bytes: float
    bytes_per_second: float

    @classmethod
    def of(cls, target: PreTrainedModel, setting: Setting, bytes_per_second: float) -> "Floor":
        config = target.config
        weights = sum(p.numel() * p.element_size() for p in target.parameters())
        if not config.tie_word_embeddings:
            table = target.get_input_embeddings().weight
            weights -= table.numel() * table.element_size()
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * target.dtype.itemsize
        cache = setting.rows * (setting.context + setting.new_tokens / 2) * per_token
        return cls((weights + cache) / bytes_per_second, weights, cache, bytes_per_second)

    def share(self, rows: int, tokens_per_second: float) -> float:
        return tokens_per_second * self.seconds / rows

    def describe(self) -> str:
        """The floor and what it is made of."""
        return (
            f"weights {self.weight_bytes / 1e9:.2f} GB and cache {self.cache_bytes / 1e9:.3f} GB per step at "
            f"{self.bytes_per_second / 1e9:.0f} GB/s: floor {self.seconds * 1000:.3f} ms per step"
        )


_bandwidth: dict[str, float] = {}


def bandwidth(scale: Scale) -> float:
    """Bytes per second that a copy on the device reads and writes, the best of a few; measured once per process."""
    if scale.device not in _bandwidth:
        source = torch.zeros((1 << 24) if scale.tiny else (1 << 31), dtype=torch.uint8, device=scale.device)
        to = torch.empty_like(source)
        seconds = []
        for _ in range(6):
            synchronize(source.device)
            began = time.perf_counter()
            to.copy_(source)
            synchronize(source.device)
            seconds.append(time.perf_counter() - began)
        _bandwidth[scale.device] = 2 * source.numel() / min(seconds)
    return _bandwidth[scale.device]


def case_of(record: Record, vanilla: Record, setting: Setting, floor: Floor, first: FirstCalls) -> Case:
    """A method's line: decoding speed, its ratio to vanilla within the rounds, and where the time goes."""
    runs = [run for round_ in record.rounds for run in round_]
    name = record.method.name
    speed = 1 / statistics.median(decode_cost([run]) for run in runs)
    figures: dict[str, Any] = {
        "pair": setting.pair,
        "rows": setting.rows,
        "context": setting.context,
        "new_tokens": setting.new_tokens,
        "method": name,
        "tokens_per_second": round(speed, 2),
        "over_vanilla": ratio(vanilla, record, decode_cost).median,
        "whole_call_over_vanilla": ratio(vanilla, record, total_cost).median,
        "first_token_ms": round(1000 * statistics.median(run.first_seconds for run in runs), 3),
        "floor_share": round(floor.share(setting.rows, speed), 4),
        "floor_ms": round(1000 * floor.seconds, 4),
        "one_time_seconds": round(
            first.seconds - statistics.median(run.seconds + run.first_seconds for run in runs), 3
        ),
        "rounds": len(record.rounds),
        "differing_rows": len(record.differing),
    }
    too_short = any(run.decode_seconds < LEAST_SHARE * run.seconds for run in runs)
    details = f"{speed:.1f} tokens/s, {figures['over_vanilla']:.2f}x vanilla, {figures['floor_share']:.0%} of the floor"
    stats = record.stats
    if record.method.family == OURS and isinstance(stats, Laps) and first.stats is not None:
        figures |= stats.split()
        figures |= {
            "acceptance_rate": round(stats.acceptance_rate, 4),
            "block_efficiency": round(stats.block_efficiency, 3),
            "target_forwards": stats.target_forwards,
            "draft_forwards": stats.draft_forwards,
            "capture_seconds": first.stats.capture_seconds,
            "compile_seconds": first.stats.compile_seconds,
        }
        details += f", α {stats.acceptance_rate:.2f}, τ {stats.block_efficiency:.2f}"
    if too_short:
        details += "; imprecise, since decoding took less than 5% of some call"
    return Case(name, OK, details, figures | {"imprecise": too_short})


def refused(record: Record) -> Case:
    """HF's own refusals are part of the table; an exception of ours is an error."""
    outcome = REFUSED if record.method.family == ASSISTED else ERROR
    return Case(record.method.name, outcome, record.refusal, {"method": record.method.name, "refused": record.refusal})
