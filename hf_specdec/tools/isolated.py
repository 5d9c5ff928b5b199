"""A worker process that answers one question at a time, restarted if it crashes or takes too long."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LATE = "no answer within"  # how the reason begins if a worker took too long


class Worker:
    """Runs `module` (as `python -m`) as a server of JSON lines.

    Args:
        module: a module whose main block calls `serve(handler)`.
        log: a file that the worker's standard error is appended to; without one it is dropped.
    """

    def __init__(self, module: str, log: Path | None = None):
        self.module, self.log = module, log
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer, or `{"crash": why}` if the worker died or was stopped after `seconds`."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        answer, end = b"", time.monotonic() + seconds
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            while not answer.endswith(b"\n"):
                ready, _, _ = select.select([process.stdout], [], [], max(end - time.monotonic(), 0))
                if not ready:
                    self.stop()
                    return {"crash": f"{LATE} {seconds:g} s"}
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    self.stop()
                    return {"crash": f"the process ended with code {process.returncode}"}
                answer += piece
        except BrokenPipeError:
            self.stop()
            return {"crash": f"the process ended with code {process.returncode}"}
        result: dict[str, Any] = json.loads(answer)
        return result

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", self.module]
        with open(self.log or os.devnull, "ab") as errors:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def serve(handler: Any) -> None:
    """Answer each line of standard input; the handler's own output goes to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        with contextlib.suppress(KeyboardInterrupt):
            for line in sys.stdin:
                out.write(json.dumps(handler(json.loads(line))) + "\n")
                out.flush()
