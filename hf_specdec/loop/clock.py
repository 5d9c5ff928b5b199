"""Clock: how long the parts of an iteration take, also where a device works through them later than the host.

On CUDA a call that queues work returns at once, so the host's clock would count a draft's work as the verification's,
during which the host waits. There, laps end with events on the device. They are read after the iteration's one wait.
The clock stands still while graphs are captured, which is counted elsewhere.
"""

from itertools import pairwise
from time import perf_counter

import torch

from ..device import has_events
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
        self._has_events = has_events(device)
        self._events: list[torch.cuda.Event] = []
        self.begin()

    def begin(self) -> None:
        """Begin a group of laps."""
        self._times = [self._now()]
        self._captured = [captured_seconds()]
        self._events = [self._event()] if self._has_events else []

    @property
    def seconds(self) -> float:
        """The host's time since `begin` or `read`."""
        return self._now() - self._times[0]

    def lap(self) -> None:
        """End a lap: with the work that was queued so far, on CUDA."""
        self._times.append(self._now())
        self._captured.append(captured_seconds())
        if self._has_events:
            self._events.append(self._event())

    def read(self) -> list[float]:
        """End the last lap, after a wait for the device. Returns: seconds of each lap of the group."""
        total = self.seconds
        laps = [end - begin for begin, end in pairwise(self._times)]
        if self._has_events:
            captured = [end - begin for begin, end in pairwise(self._captured)]
            laps = [begin.elapsed_time(end) / 1000 for begin, end in pairwise(self._events)]
            laps = [max(seconds - n, 0.0) for seconds, n in zip(laps, captured)]
        self.begin()
        return [*laps, max(total - sum(laps), 0.0)]

    def _now(self) -> float:
        return perf_counter() - captured_seconds()

    def _event(self) -> "torch.cuda.Event":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
