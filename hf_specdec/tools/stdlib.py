"""The sources of Python's standard library, as text to train and measure on (PSF license)."""

import sysconfig
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])
# Not ordinary code, or not shipped by every system.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"}
SKIPPED_FOLDERS |= {"turtledemo", "pydoc_data", "encodings", "__pycache__", "lib-dynload"}
# The embedded pair never saw these; its held-out prompts are cut from them.
HELD_OUT = (
    *("textwrap.py", "fractions.py", "queue.py", "shlex.py", "statistics.py", "heapq.py", "calendar.py", "pprint.py"),
    *("tempfile.py", "graphlib.py", "ftplib.py", "configparser.py", "gettext.py", "selectors.py", "sched.py", "csv.py"),
    *("cmd.py", "json/encoder.py", "concurrent/futures/thread.py", "http/cookies.py", "zipapp.py", "shelve.py"),
)


def modules(held_out: bool = False) -> list[Path]:
    """Paths below `STDLIB`: the modules that are held out, or the others."""
    if held_out:
        return [Path(name) for name in HELD_OUT if (STDLIB / name).exists()]
    names = [path.relative_to(STDLIB) for path in sorted(STDLIB.rglob("*.py"))]
    names = [name for name in names if SKIPPED_FOLDERS.isdisjoint(name.parts) and name.as_posix() not in HELD_OUT]
    return [name for name in names if not name.parts[0].startswith("config-")]  # how this Python was built
