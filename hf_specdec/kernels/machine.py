"""Measured once per machine, kept in the user's cache folder: `~/.cache/hf_specdec` (`$XDG_CACHE_HOME`)."""

import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def cache_folder() -> Path:
    """The folder for our files; it may not exist. Raises: FileNotFoundError if the user has no home folder."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "hf_specdec"
    except RuntimeError as error:
        raise FileNotFoundError(f"no cache folder ({error}): set $XDG_CACHE_HOME") from error


def decision(name: str, decide: Callable[[], tuple[bool, dict[str, Any]]]) -> bool:
    """The first answer of `decide()` on this machine: the same for every process, though measurements may differ.

    It is kept as JSON; the file of the first process to write it holds for all. Delete it to decide again. If it cannot
    be written or read, each process decides for itself.

    Args:
        name: name of the file, one per question.
        decide: returns the answer, and the reasons for it, for people who read the file.
    """
    try:
        path = cache_folder() / f"decisions-{_kind(torch.get_num_threads())}" / f"{name}.json"
    except OSError:
        return decide()[0]
    known = _read(path)
    if known is not None:
        return known
    answer, reason = decide()
    about = {"cpu": cpu()[0], "torch": torch.__version__, "threads": torch.get_num_threads()}
    try:
        _write(path, json.dumps({"answer": answer, **reason, **about}, indent=1) + "\n")
    except OSError:
        return answer
    known = _read(path)  # another process may have written it
    return answer if known is None else known


def _read(path: Path) -> bool | None:
    """The answer in a file; `None` if it cannot be read."""
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return answer if isinstance(answer, bool) else None


def _write(path: Path, text: str) -> None:
    """Create the file atomically, unless another process has created it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        made.write_text(text, encoding="utf-8")
        try:
            os.link(made, path)
        except OSError:  # it exists already, or the file system has no links
            if _read(path) is None:
                made.replace(path)


def _kind(threads: int) -> str:
    """A hash of everything that affects speed (processor, PyTorch build, threads): machines may share a home folder."""
    settings = {name: value for name, value in os.environ.items() if name.endswith("_MAX_CPU_ISA")}  # oneDNN's
    kind = (*cpu(), torch.__version__, torch.__config__.show(), threads, sorted(settings.items()))
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:16]


@functools.cache
def cpu() -> tuple[str, str]:
    """The processor's name and features."""
    name, features = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return name, features
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return found.get("model name", name), found.get("flags", found.get("Features", features))
