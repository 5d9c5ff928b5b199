"""Something of the process's, exchanged while calls of ours run.

What `torch.compile` makes while it is exchanged outlives the call, so functions of ours stay out of compiled code,
unless nobody but us will ever call that.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Function = Callable[..., Any]


class _Thread(threading.local):
    compiles_ours = False


_thread = _Thread()
# What stands in code that is compiled for us alone; what it does is decided each time that it runs.
operators = torch.library.Library("hf_specdec", "FRAGMENT")


@contextmanager
def compiling_ours() -> Iterator[None]:
    """What is compiled inside is called by nobody but us."""
    before, _thread.compiles_ours = _thread.compiles_ours, True
    try:
        yield
    finally:
        _thread.compiles_ours = before


def compiles_ours() -> bool:
    return _thread.compiles_ours


class Swap:
    """Puts a function of ours in place of another while calls of ours run, in whichever threads.

    Args:
        read, write: where the function is.
        make: from the function that is there, ours. One of its own each time: who wraps an earlier one, and leaves that
            in place, must not find us behind themselves.
    """

    def __init__(self, read: Callable[[], Function], write: Callable[[Function], object], make: Callable[[Any], Any]):
        self._read, self._write, self._make = read, write, make
        self._lock = threading.Lock()
        self._calls = 0  # over all threads
        self._original: Function | None = None
        self._ours: Function | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._calls += 1
            if self._calls == 1:
                self._original = self._read()
                self._ours = self._make(self._original)
                self._write(self._ours)
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if self._calls == 0 and self._read() is self._ours:
                    assert self._original is not None
                    self._write(self._original)
