"""Clock: how long the parts of an iteration take, also where a device works through them later than the host.

On CUDA a call that queues work returns at once, so the host's clock would count a draft's work as the verification's,
during which the host waits. There, laps end with events on the device. They are read after the iteration's one wait.
"""

from time import perf_counter

import torch

from ..device import has_events


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
        self._ends: list[torch.cuda.Event] = []
        self._laps: list[float] = []
        self.begin()

    def begin(self) -> None:
        """Begin a group of laps."""
        self._began = self._last = perf_counter()
        self._laps.clear()
        self._ends = [self._event()] if self._has_events else []

    @property
    def seconds(self) -> float:
        """The host's time since `begin` or `read`."""
        return perf_counter() - self._began

    def lap(self) -> None:
        """End a lap: with the work that was queued so far, on CUDA."""
        if self._ends:
            self._ends.append(self._event())
            return
        now = perf_counter()
        self._laps.append(now - self._last)
        self._last = now

    def read(self) -> list[float]:
        """End the last lap, after a wait for the device. Returns: seconds of each lap of the group."""
        now = perf_counter()
        if self._ends:
            pairs = zip(self._ends, self._ends[1:])
            laps = [begin.elapsed_time(end) / 1000 for begin, end in pairs]
            last = max(now - self._began - sum(laps), 0.0)
        else:
            laps, last = list(self._laps), now - self._last
        self.begin()
        return [*laps, last]

    def _event(self) -> "torch.cuda.Event":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
