"""Progress of long work: a bar in a terminal; elsewhere, as in a log file, an occasional line."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS = 30.0  # between lines


@contextmanager
def progress(console: Console, what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yields a function to call with the number of steps done and, optionally, a note: `advance(7, "loss 0.5")`.

    Args:
        console: where to show the progress.
        what: title of the work.
        total: number of steps.
        done: steps already done.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, completed=done)

            def show(done: int, note: str = "") -> None:
                bar.update(task, completed=done, description=", ".join(filter(None, (what, note))))

            yield show
        return
    printed = time.monotonic()

    def tell(done: int, note: str = "") -> None:
        nonlocal printed
        if done == total or time.monotonic() - printed >= SECONDS:
            printed = time.monotonic()
            console.print(f"{what}: {', '.join(filter(None, (f'{done} of {total}', note)))}")

    yield tell
