"""A journal: a file of JSON lines that only grows, so that a process that is killed loses no line that it has written.

One process writes it. Others may read it meanwhile: a line without its end is not there yet.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

fcntl: Any
try:
    import fcntl
except ImportError:  # not a POSIX system: nothing tells two writers apart
    fcntl = None

_BLOCK = 1 << 16  # bytes


class Journal:
    """Appends lines to a file, which is made if needed. A torn last line, of a process that was killed, is cut.

    Raises:
        OSError: if the file cannot be written, or another process writes it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        try:
            _lock(self._file, path)
            self._length = whole(path)
            if os.path.getsize(path) > self._length:
                self._file.truncate(self._length)
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write lines, which are in the file when this returns.

        Raises:
            OSError: if they cannot be written; the file holds whole lines then, those of earlier calls.
        """
        data = b"".join(encoded(line) for line in lines)
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError as error:
            with suppress(OSError):  # the next one to open it cuts what this cannot
                self._file.truncate(self._length)
            raise type(error)(
                error.errno,
                f"{error.strerror}: rows that were written before are kept. Make room, then repeat the command",
                str(self.path),
            ) from error
        self._length += len(data)

    def close(self) -> None:
        self._file.close()


def encoded(line: dict[str, Any]) -> bytes:
    """A line of JSON, with its end."""
    return (json.dumps(line, ensure_ascii=False, default=str) + "\n").encode()


def whole(path: Path) -> int:
    """How many of a file's bytes are whole lines."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(end - _BLOCK, 0)
            file.seek(begin)
            found = file.read(end - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            end = begin
    return 0


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines of a journal, each with the number of the byte that it begins at.

    Raises:
        ValueError: if a line is not a JSON object.
    """
    begin = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise ValueError(f"line {number} of {path} is damaged: begin anew with --overwrite")
            yield begin, found
            begin += len(line)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same file, which is made if needed; others wait."""
    with open(path, "ab") as file:
        if fcntl is not None:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(file: IO[bytes], path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, "another process is writing the same output: wait for it, or choose another one", str(path)
        ) from error
    except OSError:
        pass  # file systems without locks
