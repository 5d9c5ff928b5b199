"""What is found out once per machine and kept in the user's cache folder, `~/.cache/hf_specdec` (`$XDG_CACHE_HOME`)."""

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
    """Where we keep files; it need not exist. Raises: FileNotFoundError where the user has no home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "hf_specdec"
    except RuntimeError as error:
        raise FileNotFoundError(f"no cache folder ({error}): set $XDG_CACHE_HOME") from error


def decision(name: str, decide: Callable[[], tuple[bool, dict[str, Any]]]) -> bool:
    """What `decide()` once said on this machine: the same for every process, though each might measure another value.

    It is kept as JSON; the file of the process that is first to write it holds for all. Remove it to decide anew. Where
    it cannot be kept, or read, each process decides for itself.

    Args:
        name: of the file, one for each question.
        decide: answers it; returns the answer, and what led to it, for people who read the file.
    """
    try:
        path = cache_folder() / f"decisions-{_kind(torch.get_num_threads())}" / f"{name}.json"
    except OSError:
        return decide()[0]
    known = _read(path)
    if known is not None:
        return known
    answer, reason = decide()
    about = {"cpu": _cpu()[0], "torch": torch.__version__, "threads": torch.get_num_threads()}
    try:
        _write(path, json.dumps({"answer": answer, **reason, **about}, indent=1) + "\n")
    except OSError:
        return answer
    known = _read(path)  # it may be another process's
    return answer if known is None else known


def _read(path: Path) -> bool | None:
    """The answer in a file; `None` if there is none that can be read."""
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return answer if isinstance(answer, bool) else None


def _write(path: Path, text: str) -> None:
    """Make the file at once, unless another process has made one meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        made.write_text(text, encoding="utf-8")
        try:
            os.link(made, path)
        except OSError:  # there is one already, or the file system has no links
            if _read(path) is None:
                made.replace(path)


def _kind(threads: int) -> str:
    """Names all that speed depends on: processor, PyTorch's build, threads. Homes may be shared by machines."""
    settings = {name: value for name, value in os.environ.items() if name.endswith("_MAX_CPU_ISA")}  # oneDNN's
    kind = (*_cpu(), torch.__version__, torch.__config__.show(), threads, sorted(settings.items()))
    return hashlib.sha256(repr(kind).encode()).hexdigest()[:16]


@functools.cache
def _cpu() -> tuple[str, str]:
    """The processor's name, and what it can do."""
    name, features = platform.processor() or platform.machine(), ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return name, features
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return found.get("model name", name), found.get("flags", found.get("Features", features))
