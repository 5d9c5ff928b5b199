"""An output of many rows that several processes write together, and that goes on after any of them was killed.

    out.jsonl             all rows in their order, once they are there
    out.jsonl.run/        settings.json, and a journal for each process: rank0.jsonl, rank1.jsonl ...

Owns these files, and nothing of what is in a row but its "index", "sample" and "error".
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from .journal import Journal, alone, read

Rows = list[dict[str, Any]]  # all of one index
Write = Callable[[Path, Iterator[dict[str, Any]]], None]

_JOURNAL = re.compile(r"rank\d+\.jsonl")


class _Place(NamedTuple):
    """Where the rows of an index are, which are written together.

    Attributes:
        begin: the number of the first byte.
        rows: how many there are.
    """

    journal: Path
    begin: int
    rows: int


class Resumable:
    """The output of one command, and the folder beside it.

    Args:
        output: the file to write in the end.
        copies: how many rows each index has; one if that has an error.
        again: what a user may do about an output that is not this command's, for messages.
    """

    def __init__(self, output: Path, copies: int = 1, again: str = "choose another --output, or pass --overwrite"):
        self.output = output
        self.folder = output.with_name(output.name + ".run")
        self._settings = self.folder / "settings.json"
        self._copies = copies
        self._again = again

    def begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Begin, or go on with what was begun with the same settings. One process does this, before others `open`.

        Args:
            overwrite: forget what is there. An output is replaced when the new one is complete.

        Raises:
            FileExistsError: if the output is not ours.
            ValueError: if it was begun with other settings.
            OSError: if it cannot be written.
        """
        if self.output.is_dir():
            raise IsADirectoryError(f"{self.output} is a folder: name a file")
        if overwrite:
            self._clear()
        state = self._state()
        settings = json.loads(json.dumps(settings))  # as it will be read
        for part in self.folder.glob("*.part"):  # of a process that was killed
            part.unlink()
        if state is None:
            if self.output.exists() and not overwrite:
                raise FileExistsError(
                    f"{self.output} exists, but not {self._settings}, so it is not ours: {self._again}"
                )
            if journals := self._journals():
                raise FileExistsError(f"{journals[0]} exists, but not {self._settings}: {self._again}")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save(settings, is_complete=False)
            return
        if state["settings"] != settings and not state["complete"] and self._is_empty():
            state["settings"] = settings
            self._save(settings, is_complete=False)
        if state["settings"] != settings:
            names = sorted({*state["settings"], *settings})
            was = {name: state["settings"].get(name) for name in names}
            differing = next(name for name in names if was[name] != settings.get(name))
            raise ValueError(
                f"{self.output} was begun with {differing} = {was[differing]!r}, and now that is "
                f"{settings.get(differing)!r}: repeat the command as it was, {self._again}"
            )
        if state["complete"] and not self.output.exists():  # it was moved away
            self._save(settings, is_complete=False)

    @property
    def is_complete(self) -> bool:
        """Whether the output has all rows."""
        state = self._state()
        return state is not None and bool(state["complete"])

    def open(self, rank: int) -> Journal:
        """The journal of one process.

        Raises:
            OSError: if it cannot be written, or another process writes it.
        """
        return Journal(self.folder / f"rank{rank}.jsonl")

    def done(self) -> set[int]:
        """The indices that have all their rows."""
        return set(self._places())

    def finish(self, count: int, write: Write) -> bool:
        """Write the output, if the indices up to `count` are done. Each process calls this at its end.

        Args:
            write: writes rows into a file.

        Returns: whether the output is there.
        """
        with alone(self.folder / "lock"):
            if not self.is_complete:
                places = self._places()
                if len(places) < count:
                    return False
                rows = self._lines(places[index] for index in sorted(places))
                try:
                    with self._replacing(self.output) as file:
                        write(file, rows)
                except OSError as error:
                    kept = f"all rows are kept in {self.folder}. Make room, then repeat the command"
                    raise OSError(error.errno, f"{error.strerror or error}: {kept}", str(self.output)) from error
                state = self._state()
                assert state is not None
                self._save(state["settings"], is_complete=True)
            for journal in self._journals():
                journal.unlink()
            return True

    def _places(self) -> dict[int, _Place]:
        """Where the rows of each index are that has all of them."""
        found: dict[int, _Place] = {}
        for journal in self._journals():
            first = count = 0
            with suppress(FileNotFoundError):  # another process has written the output just now
                for begin, line in read(journal):
                    if line.get("sample", 0) == 0:  # what comes before it and is too few was torn off
                        first, count = begin, 0
                    count += 1
                    if count == self._copies or line["error"] is not None:
                        found.setdefault(line["index"], _Place(journal, first, count))
        return found

    def _lines(self, places: Iterable[_Place]) -> Iterator[dict[str, Any]]:
        files = {journal: journal.open("rb") for journal in self._journals()}
        try:
            for journal, begin, count in places:
                files[journal].seek(begin)
                for _ in range(count):
                    yield json.loads(files[journal].readline())
        finally:
            for file in files.values():
                file.close()

    def _journals(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _JOURNAL.fullmatch(path.name))

    def _state(self) -> dict[str, Any] | None:
        if not self._settings.exists():
            return None
        state = json.loads(self._settings.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not {"settings", "complete"} <= state.keys():
            raise ValueError(f"{self._settings} is not ours: choose another --output, or remove it")
        return state

    def _save(self, settings: dict[str, Any], is_complete: bool) -> None:
        text = json.dumps({"complete": is_complete, "settings": settings}, indent=1, ensure_ascii=False)
        with self._replacing(self._settings) as file:
            file.write_text(text + "\n", encoding="utf-8")

    def _is_empty(self) -> bool:
        """Whether no row was written, and no process is about to write one."""
        for journal in self._journals():
            Journal(journal).close()
        return all(journal.stat().st_size == 0 for journal in self._journals())

    def _clear(self) -> None:
        """Remove our files, unless a process is writing them."""
        journals = self._journals()
        for journal in journals:
            Journal(journal).close()
        for path in (self._settings, *journals):
            path.unlink(missing_ok=True)

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """Gives a file to write, which takes the place of `path` if all goes well, and is removed if not."""
        temporary = self.folder / f"{path.name}.{os.getpid()}.part"
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
