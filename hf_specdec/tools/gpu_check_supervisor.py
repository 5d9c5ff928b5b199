"""Runs the parts of the GPU check one after the other in a worker process, within their time limits.

A part that takes too long, or that brings the process down, costs no more than itself: its worker is stopped, the cases
it had noted are kept, and the next part gets a new worker.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .gpu_check import ERROR, NOT_REACHED, TIMED_OUT, Case, Part, Scale, result_of
from .isolated import LATE, Worker

START = 150.0  # seconds for a worker to start: imports from a cold disk, and CUDA
LEAST = 3.0  # with less time left, no part begins
REST = "the rest"


class Supervisor:
    """Runs parts until they are all done or the time is over.

    Args:
        worker: a worker that answers as `gpu_check_worker` does.
        scale: handed on to it.
        seconds: for everything, from now on.
        notes: a file for the cases of the part that runs.

    Attributes:
        about: where the check runs; empty until a worker has started.
    """

    def __init__(self, worker: Worker, scale: Scale, seconds: float, notes: Path):
        self.worker, self.notes = worker, notes
        self.about: dict[str, Any] = {}
        self._question = {"device": scale.device, "tiny": scale.tiny, "notes": str(notes)}
        self._end, self._seconds = time.monotonic() + seconds, seconds
        self._started = False

    def run(self, parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
        """The result of each part, in order (see `gpu_check.run_part`)."""
        try:
            for part in parts:
                yield self._result(part)
        finally:
            self.worker.stop()
            self.notes.unlink(missing_ok=True)

    @property
    def _left(self) -> float:
        return self._end - time.monotonic()

    def _result(self, part: Part) -> dict[str, Any]:
        over = f"the limit of {self._seconds:g} s for the whole check"
        if self._left < LEAST:
            return result_of(part, [Case("all", NOT_REACHED, over)], 0.0)
        began = time.monotonic()
        self.notes.unlink(missing_ok=True)
        crash = self._start()
        is_whole = part.seconds <= self._left
        if not crash:
            answer = self.worker.ask({"part": part.name, **self._question}, min(part.seconds, max(self._left, 0.1)))
            if "crash" not in answer:
                if answer.pop("restart"):
                    self._stop()
                return answer
            crash = str(answer["crash"])
        self._stop()
        cases = self._noted()
        if not crash.startswith(LATE):
            cases.append(Case(REST, ERROR, f"{crash}{self._last_words()}"))
        elif is_whole:
            cases.append(Case(REST, TIMED_OUT, crash))
        else:
            cases.append(Case(REST, NOT_REACHED, f"cut by {over}"))
        return result_of(part, cases, time.monotonic() - began)

    def _start(self) -> str:
        """Start a worker if none runs. Returns why that failed, or nothing."""
        if self._started:
            return ""
        answer = self.worker.ask({"part": None, **self._question}, min(START, max(self._left, 0.1)))
        if "crash" in answer:
            return f"{answer['crash']} (while it started)"
        self.about, self._started = answer, True
        return ""

    def _stop(self) -> None:
        self.worker.stop()
        self._started = False

    def _noted(self) -> list[Case]:
        """The cases that a part had noted before its worker ended."""
        if not self.notes.exists():
            return []
        lines = self.notes.read_text(encoding="utf-8").splitlines(keepends=True)
        return [Case(**json.loads(line)) for line in lines if line.endswith("\n")]

    def _last_words(self) -> str:
        """The last line that the worker wrote to its log."""
        log = self.worker.log
        lines = [] if log is None or not log.exists() else log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"; its last words: {last[:300]}" if last else ""
