"""CUDA graphs that share a memory pool, and the time that capturing them takes."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

_WARM_UPS = 2  # libraries allocate their workspaces, and choose their kernels, the first time
# PyTorch allows one capture at a time in a process: each begins by waiting for the whole device.
_one_at_a_time = threading.Lock()


class _Thread(threading.local):
    seconds = 0.0


_thread = _Thread()


def captured_seconds() -> float:
    """Wall time that this thread has spent capturing graphs, over all calls."""
    return _thread.seconds


@contextmanager
def capturing() -> Iterator[None]:
    """Inside, the time counts as spent capturing."""
    began = perf_counter()
    try:
        yield
    finally:
        _thread.seconds += perf_counter() - began


class GraphPool:
    """The graphs of one model's forwards, in one pool of memory, and the buffer for their results.

    Graphs of one pool may overwrite each other's memory, in whatever order they are replayed. Why that is safe:

    - Nothing in the pool outlives a replay: inputs are outside of it, and each graph ends with a copy of its result to
      a buffer outside of it. All graphs share this buffer, so a result is valid until the next replay.
    - Replays never overlap: a pool belongs to one call at a time, which runs on one stream. Calls in other threads may
      run on other streams, and a draft's calls beside its target's. So there is no pool for the whole process.
    - A pool has a side stream of its own, because the workspaces that libraries keep by stream are in its graphs too.
    - It is dropped with its graphs: PyTorch frees a pool without graphs, and does not accept it again.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._handle = torch.cuda.graph_pool_handle()
        self._buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the results."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def result(self, like: Tensor, *shape: int) -> Tensor:
        """Where a graph leaves its result, with the dtype of `like`; ask for the largest first."""
        numel = math.prod(shape)
        if self._buffer is None or self._buffer.numel() < numel or self._buffer.dtype != like.dtype:
            with torch.inference_mode(False):  # a later call may not be in inference mode
                self._buffer = like.new_zeros(numel)
        return self._buffer[:numel].view(shape)

    def capture(self, run: Callable[[], Tensor], result: Tensor) -> "torch.cuda.CUDAGraph":
        """A graph that replays `result.copy_(run())`. If that raises, nothing is left of it.

        Other threads may use the device meanwhile. They must not synchronize all of it, and PyTorch does not let them
        draw random numbers on it.
        """
        with _one_at_a_time, torch.cuda.device(self._device), _casts_anew():
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                # PyTorch leaves the side stream current if ending a capture fails; this context does not.
                with torch.cuda.stream(self._stream):
                    for _ in range(_WARM_UPS):
                        run()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(
                        graph, pool=self._handle, stream=self._stream, capture_error_mode="thread_local"
                    ):
                        result.copy_(run())
            finally:
                current.wait_stream(self._stream)
        return graph


@contextmanager
def _casts_anew() -> Iterator[None]:
    """Inside, autocast casts weights in each forward. Casts that it caches are freed when its context ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
