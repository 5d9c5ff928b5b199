"""Forwards with fixed shapes (`cache_implementation="static"`): on CUDA captured once as graphs, then replayed.
They can also be compiled (`speculation_compile`).

A decode step of a small model costs more to launch than to compute. Here the only inputs are token ids and the places
of each row's tokens. Slots, positions and masks are computed on the device, attention is over the whole capacity, and
widths are rounded up to a few values, so a step of the same rows runs the same kernels on the same memory. Caches and
graphs are kept for the model's next call. On other devices the same code runs without graphs.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..cache.ragged import RaggedCache
from ..device import no_bookkeeping
from ..kernels import packing
from ..kernels.attention import folded_attention
from ..kernels.swap import compiling_ours
from .compiled import BLOCKS, HOOKED, LONGEST, compiled, has_adapters
from .masks import ragged_mask
from .parts import Parts, parts_of

logger = logging.get_logger(__name__)

# Tokens per row; wider blocks are fed in the ordinary way.
WIDTHS = (1, 2, 3, 5, 9, LONGEST)


@dataclass
class _Step:
    """Buffers of one (rows, width): `ids` `[rows, width]`, `places` `[3, rows]`, `logits` `[rows, width, vocab]`."""

    ids: Tensor
    places: Tensor  # by row: the first slot, the position id of slot 0, the last slot that has a position
    logits: Tensor | None = None
    graph: "torch.cuda.CUDAGraph | None" = None


class StaticForwards:
    """Runs a model on a cache of fixed capacity, with one set of buffers for each (rows, width).

    Args:
        cache: its storage must not move.
        compiles: the widths, STEPS or BLOCKS, that `torch.compile` compiles, over all rows of the cache. Logits of
            STEPS need not be exact; BLOCKS round as uncompiled code and are compiled again when the model has changed.
        parts: the parts of the model. Its forwards are not captured if it is hooked.
    """

    def __init__(self, cache: RaggedCache, compiles: Sequence[int] = (), parts: Parts | None = None):
        self.compiles = compiles
        self.parts = parts or Parts()
        self.compile_seconds = 0.0
        self._cache = cache
        self._compiled: Callable[[PreTrainedModel, _Step], Tensor] | None = None
        self._failed = False
        self._steps: dict[tuple[int, int], _Step] = {}
        self._captures = cache.device.type == "cuda" and not self.parts.hooked

    def __call__(self, model: PreTrainedModel, ids: Tensor, places: Tensor) -> Tensor:
        """`[rows, width, vocab]` logits, valid until the next call.

        Args:
            ids: `[rows, width]`, the tokens of each active row of the cache; at most `WIDTHS[-1]`.
            places: `[3, rows]`, see `_Step`.
        """
        rows, width = ids.shape
        step = self._step(rows, self._filled_up(rows, width))
        step.ids[:, :width].copy_(ids)
        step.places.copy_(places)
        if self._captures and step.graph is None:
            self._capture(model, step)
        if step.graph is None:
            with compiling_ours():  # it compiles again if the model has changed
                step.logits = self._forward(step)(model, step)
        else:
            step.graph.replay()
        assert step.logits is not None
        return step.logits[:, :width]

    def takes(self, rows: int, width: int) -> bool:
        """Whether to feed so many rows and tokens with fixed shapes; else they are fed in the ordinary way."""
        fits = width <= WIDTHS[-1]
        return fits and (self._captures or not self.compiles or self._is_compiled(rows, width))

    def is_for(self, parts: Parts, compiles: Sequence[int]) -> bool:
        """Whether storage and compiled code fit a model with these parts."""
        return self.compiles == compiles and self.parts == parts._replace(places=self.parts.places)

    def read_from(self, parts: Parts) -> None:
        """Drop graphs if the model's weights have moved, because they would still read the old addresses."""
        if self.parts.places != parts.places:
            self._steps.clear()
        self.parts = parts

    def _filled_up(self, rows: int, width: int) -> int:
        if self._is_compiled(rows, width):
            width = max(width, self.compiles[0])
            if not self._captures:
                return width
        return next(w for w in WIDTHS if w >= width)

    def _step(self, rows: int, width: int) -> _Step:
        if (rows, width) not in self._steps:
            with torch.inference_mode(False):  # a later call may not be in inference mode
                ids, places = (
                    torch.zeros(shape, dtype=torch.int64, device=self._cache.device)
                    for shape in ((rows, width), (3, rows))
                )
            self._steps[rows, width] = _Step(ids, places)
        return self._steps[rows, width]

    def compile(self, model: PreTrainedModel) -> None:
        """Compile the widths in `compiles`, unless that was done before; the cache must be empty."""
        began, rows = perf_counter(), len(self._cache.lengths)
        self.compile_seconds = 0.0
        if not self.compiles or self._compiled is not None or self._failed:
            return
        exact = self.compiles is BLOCKS
        try:
            run = compiled(self._run, exact)
            with no_bookkeeping(model, self._cache.device)(), folded_attention(), packing.exchanged(), compiling_ours():
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

    def _run(self, model: PreTrainedModel, step: _Step) -> Tensor:
        first, position, last = step.places[:, :, None].unbind()
        slots = first + torch.arange(step.ids.shape[1], device=step.ids.device)
        self._cache.prepare_slots(slots)
        positions = (slots.minimum(last) + position).clamp(min=0)
        mask = ragged_mask(model, slots, self._cache.capacity)
        inputs = {"past_key_values": self._cache, "use_cache": True, "attention_mask": mask, "return_dict": True}
        return model(input_ids=step.ids, position_ids=positions, **inputs).logits

    def _forward(self, step: _Step) -> Callable[[PreTrainedModel, _Step], Tensor]:
        return self._compiled if self._compiled and self._is_compiled(*step.ids.shape) else self._run

    def _is_compiled(self, rows: int, width: int) -> bool:
        is_compiled = self._compiled is not None and rows == len(self._cache.lengths)
        return is_compiled and max(width, self.compiles[0]) in self.compiles

    def _capture(self, model: PreTrainedModel, step: _Step) -> None:
        try:
            with torch.cuda.device(self._cache.device):  # streams belong to the current device
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(2):  # libraries allocate their workspaces the first time
                        self._forward(step)(model, step)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step.logits = self._forward(step)(model, step)
                step.graph = graph
        except RuntimeError as error:
            self._captures = False
            logger.warning_once(
                f"{type(model).__name__} could not be captured as a CUDA graph ({str(error).splitlines()[0]}): its "
                "forwards are launched one by one."
            )


_kept: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[RaggedCache, StaticForwards]]" = weakref.WeakKeyDictionary()


def borrow(
    model: PreTrainedModel, rows: int, device: torch.device, capacity: int, compiles: Sequence[int] = ()
) -> tuple[RaggedCache, StaticForwards]:
    """An empty cache of at least `capacity` slots and a block, and the forwards on it, compiled if requested.

    Those of an earlier call are reused where they fit and the model's parts have not changed.
    """
    capacity += WIDTHS[-1]
    parts, kept = parts_of(model), _kept.pop(model, None)  # no other call may use them meanwhile
    if parts.hooked and device.type == "cuda":
        logger.warning_once(f"{type(model).__name__} runs without CUDA graphs: {HOOKED}.")
    if kept is not None and kept[0].is_reusable(rows, device, capacity) and kept[1].is_for(parts, compiles):
        cache, forwards = kept
        cache.clear()
        forwards.read_from(parts)
    else:
        if compiles:
            step = max(256, 1 << capacity.bit_length() - 3)  # a somewhat longer call can reuse the compiled code
            capacity = -(-capacity // step) * step
        cache = RaggedCache(rows, device, capacity, capacity)
        forwards = StaticForwards(cache, compiles, parts)
    forwards.compile(model)
    return cache, forwards


def give_back(model: PreTrainedModel, cache: RaggedCache, forwards: StaticForwards) -> None:
    """The call is over: keep its cache and forwards for the next one."""
    if has_adapters(model):  # captured graphs would not notice a switch of adapters between calls
        return
    _kept[model] = cache, forwards
