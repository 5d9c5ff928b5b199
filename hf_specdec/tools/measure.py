"""Measure ways to generate against one another, on a machine that may also be busy with other work.

Methods take turns batch by batch, and every ratio is taken within a round, before the median over the rounds: if
something slows the machine down for a while, both sides slow down. Owns the clocks and the ratios; prints nothing.
"""

import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..models.cached import CachedModel
from ..models.self_fed import SelfFedModel
from ..records.stats import SpeculationStats
from .bare import BareForwards

VANILLA, ASSISTED, OURS = "vanilla", "HF assisted", "hf_specdec"
Batch = dict[str, Tensor]  # input_ids and attention_mask, [rows, columns], left-padded


@dataclass
class Method:
    """A way to generate.

    Attributes:
        name: as shown in tables.
        family: `VANILLA`, `ASSISTED` or `OURS`.
        options: makes fresh arguments of `generate()` for each run.
        gamma: γ if it is constant, else `None`.
        drafter: what drafts in ours, by its name on the command line; empty for the pair's draft.
    """

    name: str
    family: str
    options: Callable[[], dict[str, Any]] = dict
    gamma: int | None = None
    drafter: str = ""


@dataclass(frozen=True)
class Run:
    """One `generate()` call.

    Attributes:
        seconds: total wall time.
        first_seconds: wall time until every row had its first new token.
        tokens: new tokens, each row counted to its end.
        first_tokens: the new tokens from the same target forward as the first one.
        decode_seconds: wall time from the next target forward on. By then both models have prefilled, whichever did so
            before the first token; every method leaves out the drafts of one forward.
        forwards: forwards of the target, including the prefill.
    """

    seconds: float
    first_seconds: float
    tokens: int
    first_tokens: int
    decode_seconds: float
    forwards: int


@dataclass
class Record:
    """The measurements of one method in one setting.

    Attributes:
        rounds: `[rounds][batches]`.
        stats: statistics of the timed rounds; only ours fills them.
        rows: the new tokens of every row, batch after batch, in the untimed round.
        differing: indices of rows that differed from vanilla's in some run.
        refusal: the first line of the error if the method refuses the input.
        peak_bytes: peak memory of one call beyond what was in use before, `None` if it cannot be read.
        compared: whether rows are compared with vanilla's.
    """

    method: Method
    rounds: list[list[Run]] = field(default_factory=list)
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    rows: list[list[int]] = field(default_factory=list)
    differing: set[int] = field(default_factory=set)
    refusal: str = ""
    peak_bytes: int | None = None
    compared: bool = True


class Arrivals(BaseStreamer):
    """A streamer that records when the first token arrives, how many come with it, and when the next forward begins."""

    def __init__(self, rows: int):
        self.rows, self.forwards, self.columns, self.first_seconds = rows, 0, -1, 0.0
        self._forwards_at_first = 0
        self.next_forward_seconds: float | None = None

    def put(self, value: Tensor) -> None:
        if self.columns < 0:  # the prompt
            self.columns = 0
            return
        if self.columns == 0:
            self.first_seconds, self._forwards_at_first = time.perf_counter(), self.forwards
        if self.forwards == self._forwards_at_first:
            self.columns += value.numel() // self.rows

    def end(self) -> None:
        pass

    def count_forward(self) -> None:
        self.forwards += 1
        if self.columns > 0 and self.next_forward_seconds is None:
            self.next_forward_seconds = time.perf_counter()


def timed(
    target: PreTrainedModel, batch: Batch, new_tokens: int, options: dict[str, Any], samples: int | None = None
) -> tuple[Run, Tensor]:
    """Time one `generate()` call, greedy or with several samples of each prompt; returns its times and sequences."""
    rows, width = batch["input_ids"].shape
    arrivals = Arrivals(rows * (samples or 1))
    options = {"do_sample": samples is not None, "num_return_sequences": samples or 1} | options
    with counting(target, arrivals.count_forward, ours="strategy" in options):
        synchronize(target.device)
        began = time.perf_counter()
        sequences = target.generate(**batch, max_new_tokens=new_tokens, streamer=arrivals, **options)
        synchronize(target.device)
        ended = time.perf_counter()
    lengths = [len(row) for row in new_rows(target, sequences, width)]
    first = sum(min(length, arrivals.columns) for length in lengths)
    run = Run(
        seconds=ended - began,
        first_seconds=arrivals.first_seconds - began,
        tokens=sum(lengths),
        first_tokens=first,
        decode_seconds=ended - (arrivals.next_forward_seconds or ended),
        forwards=arrivals.forwards,
    )
    return run, sequences


Timer = Callable[..., tuple[Run, Tensor]]  # of the arguments of `timed`

# Where our loop calls a model.
_FEEDING: list[tuple[type, str]] = [
    *((CachedModel, name) for name in ("_feed", "_feed_static", "read_prompt")),
    *((SelfFedModel, name) for name in ("_step", "read_prompt")),
]


@contextmanager
def counting(target: PreTrainedModel, count: Callable[[], None], ours: bool) -> Iterator[None]:
    """Inside the block, `count` is called before each forward of the target: by a hook, except in our loop, because
    models with hooks are not compiled.
    """
    originals: list[Any] = [getattr(cls, name) for cls, name in _FEEDING]

    def counted(original: Any) -> Any:
        def feed(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.model is target:
                count()
            return original(self, *args, **kwargs)

        return feed

    hook = None if ours else target.register_forward_pre_hook(lambda *_: count())
    try:
        for (cls, name), original in zip(_FEEDING, originals if ours else ()):
            setattr(cls, name, counted(original))
        yield
    finally:
        for (cls, name), original in zip(_FEEDING, originals):
            setattr(cls, name, original)
        if hook is not None:
            hook.remove()


def new_rows(target: PreTrainedModel, sequences: Tensor, width: int) -> list[list[int]]:
    """The tokens after the prompt of `width` columns in each row, up to the first end token (the rest is padding)."""
    eos = target.generation_config.eos_token_id
    ends = set() if eos is None else set(torch.tensor(eos).flatten().tolist())
    rows = sequences[:, width:].tolist()
    return [row[: next((at for at, token in enumerate(row, 1) if token in ends), len(row))] for row in rows]


class Comparison:
    """Methods that take turns on the same batches.

    Call `warm_up` first, then `round` as often as needed; `weigh` reads peak memory.

    Args:
        methods: the first must be vanilla; all others are compared with its tokens.
        bare: also measured after each batch, if given.
        advance: called with a method's name before each of its runs.
        timer: times one `generate()` call, as `timed` does.
        may_fail: families whose errors are recorded as refusals; those of others are raised.
        samples: sample so many texts of each prompt, which are not compared; by default one, greedily.

    Attributes:
        records: one per method, by name.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        methods: Sequence[Method],
        batches: Sequence[Batch],
        new_tokens: int,
        bare: BareForwards | None = None,
        advance: Callable[[str], None] = lambda name: None,
        timer: Timer = timed,
        may_fail: Sequence[str] = (ASSISTED,),
        samples: int | None = None,
    ):
        self.timer, self.may_fail, self.samples = timer, may_fail, samples
        self.target, self.batches, self.new_tokens, self.bare, self.advance = target, batches, new_tokens, bare, advance
        self.records = {method.name: Record(method, compared=samples is None) for method in methods}
        self.reference = self.records[methods[0].name]

    def warm_up(self) -> None:
        """An untimed round: its rows are kept, and adaptive schedules learn the costs."""
        for index, record in self._turns(self.records):
            self._run(record, index, keep=True)
        if self.bare is not None:
            lengths = {n for record in self.records.values() for n in around(checked(record))}
            self.bare.prepare(self.batches[0], self.reference.rows, lengths)
        for record in self.records.values():
            record.stats = SpeculationStats()

    def round(self, names: Iterable[str] | None = None) -> None:
        """A timed round of vanilla and the named methods, or of all."""
        chosen = self.records if names is None else {self.reference.method.name, *names}
        for record in (self.records[name] for name in chosen):
            record.rounds.append([])
        for index, record in self._turns(chosen):
            run = self._run(record, index)
            if run is not None:
                record.rounds[-1].append(run)
            if record is self.reference and self.bare is not None:
                self.bare.measure()

    def weigh(self) -> None:
        """Read each method's peak memory in one untimed run on the last batch."""
        for record in self.records.values():
            with peak_memory(self.target.device) as peak:
                self._run(record, len(self.batches) - 1)
            record.peak_bytes = None if record.refusal else peak.get("bytes")

    def _turns(self, names: Iterable[str]) -> Iterator[tuple[int, Record]]:
        """Batch by batch: vanilla, then the others in a new random order, so that none always follows the same one."""
        others = [record for name in names if (record := self.records[name]) is not self.reference]
        for index in range(len(self.batches)):
            for record in [self.reference, *random.sample(others, len(others))]:
                self.advance(record.method.name)
                yield index, record

    def _run(self, record: Record, index: int, keep: bool = False) -> Run | None:
        """Run one method on one batch; `None` if it refuses. `keep` stores the run's rows."""
        if record.refusal:
            return None
        batch = self.batches[index]
        options = record.method.options()
        if record.method.family == OURS:
            options["speculation_stats"] = record.stats
        try:
            more = {} if self.samples is None else {"samples": self.samples}
            run, sequences = self.timer(self.target, batch, self.new_tokens, options, **more)
        except Exception as error:
            if record.method.family not in self.may_fail:
                raise
            record.refusal = (str(error) or type(error).__name__).splitlines()[0]
            return None
        rows = new_rows(self.target, sequences, batch["input_ids"].shape[1])
        if keep:
            record.rows.extend(rows)
        if not record.compared:
            return run
        first = sum(len(batch["input_ids"]) for batch in self.batches[:index])
        record.differing |= {at for at, row in enumerate(rows, first) if row != self.reference.rows[at]}
        return run


def checked(record: Record) -> float:
    """Tokens in a typical verification forward: γ + 1, with the mean γ if it varies; 1 if nothing is drafted."""
    if record.method.gamma is not None:
        return 1 + record.method.gamma
    stats = record.stats
    return 1 + (stats.drafted_tokens / stats.row_iterations if stats.row_iterations else 0)


def around(tokens: float) -> list[int]:
    """Forward lengths to measure for a mean number of tokens that may still change a little."""
    return [int(tokens)] if tokens == int(tokens) else [max(int(tokens) - 1, 1), int(tokens) + 2]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Set `["bytes"]` to the block's peak memory beyond what was in use before; leave it out if unknown.

    CUDA: memory of torch's allocator. CPU: the resident set, whose high-water mark can be reset on Linux.
    """
    found: dict[str, int] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        torch.cuda.synchronize(device)
        found["bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        if hasattr(libc := CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # else memory that earlier runs freed would be reused unnoticed
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found["bytes"] = _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def synchronize(device: torch.device) -> None:
    """Wait until the accelerator has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
