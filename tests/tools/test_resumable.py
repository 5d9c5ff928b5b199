"""Outputs that go on after a process was killed: whole lines, one row per index, nothing of others' files."""

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_specdec.tools.journal import encoded, read, whole
from hf_specdec.tools.resumable import Resumable

SETTINGS = {"dataset": "a", "column": "text"}


def line(index: int, sample: int | None = None, error: str | None = None) -> dict[str, Any]:
    return {"index": index} | ({} if sample is None else {"sample": sample}) | {"text": f"é{index}\n", "error": error}


def write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.write_bytes(b"".join(map(encoded, rows)))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def output(tmp_path: Path) -> Resumable:
    made = Resumable(tmp_path / "made" / "out.jsonl")  # the folder too
    made.begin(SETTINGS, overwrite=False)
    return made


def add(output: Resumable, rank: int, *indices: int) -> Path:
    journal = output.open(rank)
    for index in indices:
        journal.append([line(index)])
    journal.close()
    return journal.path


# Journals


@pytest.mark.parametrize("torn", [b"{", b'{"index": 7, "text": "x", "error": null}', b"x" * 200_000])
def test_a_torn_last_line_is_cut(output: Resumable, torn: bytes) -> None:
    path = add(output, 0, 3, 1)
    length = path.stat().st_size
    with path.open("ab") as file:
        file.write(torn)
    assert output.done() == {1, 3} and whole(path) == length
    add(output, 0, 7)
    assert [found["index"] for _, found in read(path)] == [3, 1, 7]


def test_a_damaged_line_is_named(output: Resumable) -> None:
    path = add(output, 0, 3)
    with path.open("ab") as file:
        file.write(b"\0\0\n")
    with pytest.raises(ValueError, match=r"line 2 of .*rank0.jsonl is damaged"):
        output.done()


def test_a_full_disk_leaves_whole_lines(output: Resumable) -> None:
    """In a process of its own, whose files may have 1,000 bytes: the last write is torn."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            journal = output.open(0)
            try:
                for index in range(100):
                    journal.append([line(index)])
            except OSError as error:
                os.write(tell, str(error).encode())
        finally:
            os._exit(0)
    os.close(tell)
    os.waitpid(pid, 0)
    with os.fdopen(told, encoding="utf-8") as file:
        message = file.read()
    assert "rows that were written before are kept" in message and "rank0.jsonl" in message
    path = output.folder / "rank0.jsonl"
    assert 900 < path.stat().st_size == whole(path) <= 1000
    assert output.done() == set(range(len(lines_of(path))))


def test_nothing_can_be_written(output: Resumable) -> None:
    (output.folder / "rank0.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: rows that were written before are kept"):
        output.open(0).append([line(0)])


def test_two_processes_do_not_write_one_journal(output: Resumable) -> None:
    journal = output.open(0)
    output.open(1).close()
    for again in (lambda: output.open(0), lambda: output.begin(SETTINGS, overwrite=True)):
        with pytest.raises(BlockingIOError, match="another process is writing the same output"):
            again()
    journal.close()
    output.open(0).close()


# The whole


def test_rows_of_all_processes_are_put_in_order(output: Resumable) -> None:
    add(output, 0, 4, 2)
    add(output, 11, 0, 3)
    assert not output.finish(5, write) and not output.output.exists()
    add(output, 2, 1, 4)  # one that is there already
    assert output.finish(5, write) and output.is_complete
    assert lines_of(output.output) == [line(index) for index in range(5)]
    assert sorted(path.name for path in output.folder.iterdir()) == ["lock", "settings.json"]
    assert output.finish(5, write)


def test_a_disk_that_is_full_at_the_end_loses_nothing(output: Resumable) -> None:
    add(output, 0, 0, 1)

    def fails(path: Path, rows: Iterator[dict[str, Any]]) -> None:
        write(path, rows)
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(OSError, match=r"No space left on device: all rows are kept in .*Make room"):
        output.finish(2, fails)
    assert not output.output.exists() and not list(output.folder.glob("*.part"))
    assert output.finish(2, write) and len(lines_of(output.output)) == 2


def test_an_index_is_done_with_all_its_samples(tmp_path: Path) -> None:
    output = Resumable(tmp_path / "out.jsonl", copies=3)
    output.begin(SETTINGS, overwrite=False)
    journal = output.open(0)
    journal.append([line(0, 0), line(0, 1), line(0, 2)])
    journal.append([line(1, 0), line(1, 1)])  # torn off
    journal.append([line(2, error="too long")])
    assert output.done() == {0, 2}
    journal.append([line(1, 0), line(1, 1), line(1, 2)])
    assert output.finish(3, write)
    assert [(row["index"], row.get("sample")) for row in lines_of(output.output)] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, None)
    ]  # fmt: skip
    journal.close()


# What was there before


def test_other_settings_are_named_once_there_are_rows(output: Resumable) -> None:
    output.begin(SETTINGS | {"column": "prompt"}, overwrite=False)  # nothing was written
    add(output, 0, 3)
    with pytest.raises(ValueError, match=r"begun with column = 'prompt', and now that is 'text': .*--overwrite"):
        output.begin(SETTINGS, overwrite=False)
    output.begin(SETTINGS | {"column": "prompt"}, overwrite=False)
    assert output.done() == {3}
    output.begin(SETTINGS, overwrite=True)
    assert output.done() == set()


def test_a_complete_output_stays(output: Resumable) -> None:
    add(output, 0, 0)
    assert output.finish(1, write)
    output.begin(SETTINGS, overwrite=False)
    assert output.is_complete
    with pytest.raises(ValueError, match="begun with limit = None, and now that is 3"):
        output.begin(SETTINGS | {"limit": 3}, overwrite=False)
    output.output.unlink()
    output.begin(SETTINGS, overwrite=False)
    assert not output.is_complete  # and begins anew


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "out.jsonl"
    foreign.write_text("mine")
    output = Resumable(foreign)
    with pytest.raises(FileExistsError, match=r"out.jsonl exists, .*so it is not ours: choose another --output"):
        output.begin(SETTINGS, overwrite=False)
    assert list(tmp_path.iterdir()) == [foreign]
    output.begin(SETTINGS, overwrite=True)
    (output.folder / "mine.txt").write_text("mine")
    add(output, 0, 0)
    assert foreign.read_text() == "mine"  # until the new one is complete
    output.begin(SETTINGS, overwrite=False)  # a killed process goes on
    assert output.finish(1, write) and lines_of(foreign) == [line(0)]
    output.begin(SETTINGS, overwrite=True)
    assert (output.folder / "mine.txt").exists()


def test_journals_without_settings_are_not_ours(output: Resumable) -> None:
    add(output, 0, 3)
    (output.folder / "settings.json").unlink()
    with pytest.raises(FileExistsError, match=r"rank0.jsonl exists, but not .*settings.json"):
        output.begin(SETTINGS, overwrite=False)


@pytest.mark.parametrize(("name", "kind"), [("file/out.jsonl", NotADirectoryError), ("folder", IsADirectoryError)])
def test_an_output_that_cannot_be_made(tmp_path: Path, name: str, kind: type[OSError]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(kind):
        Resumable(tmp_path / name).begin(SETTINGS, overwrite=False)
