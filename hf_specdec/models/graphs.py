"""Forwards with fixed shapes (`cache_implementation="static"`): on CUDA captured once as graphs, then replayed.
They can also be compiled (`speculation_compile`).

A decode step of a small model costs more to launch than to compute. Here the only inputs are token ids and the places
of each row's tokens. Slots, positions and masks are computed on the device, attention is over the whole capacity, and
rows and widths are rounded up to a few values, so a step runs the same kernels on the same memory. Caches and graphs
are kept for the model's next call (`kept.py`). On other devices the same code runs without graphs, on exactly the rows.

Before a call decodes, it captures all graphs that it is likely to need, the largest first. Others run as they are the
first time, and are captured when they are needed again.

Rows are filled up to a power of two. Fill writes to the last slots of its storage rows, where no row has entries:

    batch of 3, rows 0 and 2 active      slots 0 ...                capacity - 17 ...
    storage row 0   row 0                the cat sat on  .          .
    storage row 1   row 2                one two .                  .
    storage row 2   row 1, finished      a   dog ran                .     not in this step, over 2 rows
    storage row 3   none                                            fill in steps over 4 rows
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..cache.ragged import RaggedCache
from ..device import first_line, no_bookkeeping
from ..kernels import packing
from ..kernels.attention import folded_attention
from ..kernels.swap import compiling_ours
from .capture import GraphPool, capturing
from .compiled import BLOCKS, LONGEST, compiled
from .masks import ragged_mask
from .parts import Parts

logger = logging.get_logger(__name__)

# Tokens per row; wider blocks are fed in the ordinary way.
WIDTHS = (1, 2, 3, 5, 9, LONGEST)
# Calls that try to capture a model's forwards although it has failed before: the reason may have been another thread.
_ATTEMPTS = 2


def bucket(rows: int) -> int:
    """How many rows the graphs for `rows` rows have: 1, 2, 4, 8, 16..."""
    return 1 << (rows - 1).bit_length()


@dataclass
class _Step:
    """Buffers of one (rows, width): `ids` `[rows, width]`, `places` `[3, rows]`, and its graph, once captured.

    Attributes:
        result: `[rows, width, vocab]`, the logits that a replay leaves.
        was_needed: whether a call has run it.
    """

    ids: Tensor
    places: Tensor  # by row: the first slot, the position id of slot 0, the last slot that has a position
    graph: "torch.cuda.CUDAGraph | None" = None
    result: Tensor | None = None
    was_needed: bool = False


class StaticForwards:
    """Runs a model on a cache of fixed capacity, with one set of buffers for each (rows, width).

    Args:
        cache: its storage does not move as long as no block is wider than WIDTHS; if it does, graphs are dropped.
        compiles: the widths, STEPS or BLOCKS, that `torch.compile` compiles, over all rows that the cache stores.
            Logits of STEPS need not be exact; BLOCKS round as uncompiled code and are compiled again when the model
            has changed.
    """

    def __init__(self, cache: RaggedCache, compiles: Sequence[int] = ()):
        self.cache = cache
        self.compiles = compiles
        self.parts = Parts()
        self.compile_seconds = 0.0
        self._compiled: Callable[[PreTrainedModel, _Step], Tensor] | None = None
        self._failed = False
        self._capacity = cache.capacity
        self._steps: dict[tuple[int, int], _Step] = {}
        self._pool: GraphPool | None = None
        self._captures = False  # whether this call may capture graphs
        self._failures = 0

    def begin(self, parts: Parts, captures: bool = False) -> None:
        """A call begins.

        Args:
            parts: of the model, whose graphs are dropped if its weights have moved: they would still read the old ones.
            captures: whether to capture graphs.
        """
        if self.parts.places != parts.places:
            self._drop_graphs()
        self.parts = parts
        self._captures = captures and self._failures < _ATTEMPTS

    def __call__(self, model: PreTrainedModel, ids: Tensor, places: Tensor) -> Tensor:
        """`[rows, width, vocab]` logits, valid until the next call.

        Args:
            ids: `[rows, width]`, the tokens of each active row of the cache; at most `WIDTHS[-1]`.
            places: `[3, rows]`, see `_Step`.
        """
        rows, width = ids.shape
        step = self._step_for(model, rows, width)
        step.ids[:rows, :width].copy_(ids)
        step.places[:, :rows].copy_(places)
        if rows < len(step.ids):
            step.places[:, rows:].copy_(self._fill)
        if step.graph is None:
            with compiling_ours():  # it compiles again if the model has changed
                logits = self._forward(step)(model, step)
        else:
            assert step.result is not None
            step.graph.replay()
            logits = step.result
        return logits[:rows, :width]

    def takes(self, rows: int, width: int) -> bool:
        """Whether to feed so many rows and tokens with fixed shapes; else they are fed in the ordinary way."""
        fits = width <= WIDTHS[-1]
        return fits and (self._captures or not self.compiles or self._is_compiled(rows, width))

    @property
    def nbytes(self) -> int:
        """Memory of the storage and of results, without what graphs need while they run."""
        return self.cache.nbytes + (0 if self._pool is None else self._pool.nbytes)

    def _step_for(self, model: PreTrainedModel, rows: int, width: int) -> _Step:
        if self._capacity != self.cache.capacity:  # the storage has moved
            self._capacity = self.cache.capacity
            self._drop_graphs()
        if self._pool is not None or self._captures:
            key = bucket(rows), self._filled_up(bucket(rows), width)
            step = self._step(*key)
            if step.graph is None and step.was_needed and self._captures:
                self._capture(model, [key])
            step.was_needed = True
            if step.graph is not None or self._captures:
                return step
        return self._step(rows, self._filled_up(rows, width))

    def _filled_up(self, rows: int, width: int) -> int:
        if self._is_compiled(rows, width):
            width = max(width, self.compiles[0])
            if not self._captures:
                return width
        return next(w for w in WIDTHS if w >= width)

    def _step(self, rows: int, width: int) -> _Step:
        if (rows, width) not in self._steps:
            with torch.inference_mode(False):  # a later call may not be in inference mode
                ids = torch.zeros(rows, width, dtype=torch.int64, device=self.cache.device)
                places = self._fill.repeat(1, rows)
            self._steps[rows, width] = _Step(ids, places)
        return self._steps[rows, width]

    @functools.cached_property
    def _fill(self) -> Tensor:
        """`[3, 1]`, the places of a row that is fill."""
        with torch.inference_mode(False):
            return torch.tensor([[self._capacity - WIDTHS[-1]], [0], [0]]).to(self.cache.device)

    def compile(self, model: PreTrainedModel) -> None:
        """Compile the widths in `compiles`, unless that was done before; the cache must be empty."""
        began, rows = perf_counter(), self.cache.storage_rows
        self.compile_seconds = 0.0
        if not self.compiles or self._compiled is not None or self._failed:
            return
        exact = self.compiles is BLOCKS
        try:
            run = compiled(self._run, exact)
            with no_bookkeeping(model, self.cache.device)(), folded_attention(), packing.exchanged(), compiling_ours():
                self._run(model, self._step(rows, 1))  # allocates storage
                for width in BLOCKS[3:4] if exact else self.compiles:
                    step = self._step(rows, width)
                    if exact:
                        torch._dynamo.mark_dynamic(step.ids, 1, min=BLOCKS[0], max=BLOCKS[-1])
                    run(model, step)
            self._compiled = run
        except Exception as error:  # from a compiler, which may be missing
            self._failed = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning_once(f"{type(model).__name__} could not be compiled ({reason}): it runs uncompiled.")
        self.compile_seconds = perf_counter() - began

    def capture(self, model: PreTrainedModel, widths: Sequence[int]) -> None:
        """Capture the steps of these widths for all numbers of rows that the batch can have while its rows end.

        The largest comes first: it decides how much memory the pool needs.
        """
        if not self._captures:
            return
        rows = [1 << n for n in range(bucket(len(self.cache.lengths)).bit_length())]
        keys = {(count, self._filled_up(count, width)) for count in rows for width in widths}
        missing = [key for key in keys if self._step(*key).graph is None]
        self._capture(model, sorted(missing, key=lambda key: (key[0] * key[1], key), reverse=True))

    def _capture(self, model: PreTrainedModel, keys: Sequence[tuple[int, int]]) -> None:
        """All rows are fill, so no entry of a row that is being decoded is touched."""
        if not keys:
            return
        try:
            with capturing(), no_bookkeeping(model, self.cache.device)(), folded_attention(), compiling_ours():
                pool, logits = self._pool or GraphPool(self.cache.device), None
                for key in keys:
                    step = self._step(*key)
                    step.places.copy_(self._fill.expand(-1, len(step.ids)))
                    run = functools.partial(self._forward(step), model, step)
                    if logits is None:  # the current stream must own storage that the first forward allocates
                        logits = run()
                    result = pool.result(logits, *key, logits.shape[-1])
                    step.graph, step.result = pool.capture(run, result), result
                    self._pool = pool
        except Exception as error:  # a forward that raises by itself will raise again, outside of a capture
            self._captures = False
            self._failures += 1
            logger.warning_once(
                f"{type(model).__name__} could not be captured as a CUDA graph ({first_line(error)}): its forwards "
                "are launched one by one."
            )

    def _drop_graphs(self) -> None:
        self._steps.clear()
        self._pool = None
        self.__dict__.pop("_fill", None)

    def _run(self, model: PreTrainedModel, step: _Step) -> Tensor:
        first, position, last = step.places[:, :, None].unbind()
        slots = first + torch.arange(step.ids.shape[1], device=step.ids.device)
        self.cache.prepare_slots(slots)
        positions = (slots.minimum(last) + position).clamp(min=0)
        mask = ragged_mask(model, slots, self.cache.capacity)
        inputs = {"past_key_values": self.cache, "use_cache": True, "attention_mask": mask, "return_dict": True}
        return model(input_ids=step.ids, position_ids=positions, **inputs).logits

    def _forward(self, step: _Step) -> Callable[[PreTrainedModel, _Step], Tensor]:
        return self._compiled if self._compiled and self._is_compiled(*step.ids.shape) else self._run

    def _is_compiled(self, rows: int, width: int) -> bool:
        is_compiled = self._compiled is not None and rows == self.cache.storage_rows
        return is_compiled and max(width, self.compiles[0]) in self.compiles
