"""Clock: how long the parts of an iteration take, also where a device works through them later than the host.

On CUDA a call that queues work returns at once, so the host's clock would count a draft's work as the verification's,
during which the host waits. There, laps end with events on the device. They are read after the iteration's one wait.
The clock stands still while graphs are captured, which is counted elsewhere.
"""

from itertools import pairwise
from time import perf_counter
from typing import NamedTuple

import torch

from ..device import current_stream
from ..models.capture import captured_seconds


class Clock:
    """Times laps: each begins where the previous one ended.

    `read` ends the last of a group of laps, when the host has just waited for all work of the group. So it ends at the
    same time for host and device, and the laps always add up to the host's time.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[_Mark] = []
        self.begin()

    def begin(self) -> None:
        """Begin a group of laps."""
        self._marks = [self._mark()]

    @property
    def seconds(self) -> float:
        """The host's time since `begin` or `read`."""
        return _now() - self._marks[0].seconds

    def lap(self) -> None:
        """End a lap: with the work that was queued so far, on CUDA."""
        self._marks.append(self._mark())

    def read(self) -> list[float]:
        """End the last lap, after a wait for the device. Returns: seconds of each lap of the group."""
        total, laps = self.seconds, [end.since(begin) for begin, end in pairwise(self._marks)]
        self.begin()
        return [*laps, max(total - sum(laps), 0.0)]

    def _mark(self) -> "_Mark":
        stream, event = current_stream(self._device), None
        if stream is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(stream)
        return _Mark(_now(), captured_seconds(), event)


class _Mark(NamedTuple):
    """Between two laps: the host's time, what was captured until then, and where there are streams, an event."""

    seconds: float
    captured: float
    event: "torch.cuda.Event | None"

    def since(self, other: "_Mark") -> float:
        if self.event is None or other.event is None:
            return self.seconds - other.seconds
        between = other.event.elapsed_time(self.event) / 1000
        return max(between - (self.captured - other.captured), 0.0)


def _now() -> float:
    return perf_counter() - captured_seconds()
