"""Swaps a function of the process while our calls run.

Code that `torch.compile` makes during a swap outlives the call, so our functions stay out of compiled code unless only
we will ever call it.
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
# Operators in code that is compiled for us alone; each run decides what they do.
operators = torch.library.Library("hf_specdec", "FRAGMENT")


@contextmanager
def compiling_ours() -> Iterator[None]:
    """Inside, compiled code is for our calls alone."""
    before, _thread.compiles_ours = _thread.compiles_ours, True
    try:
        yield
    finally:
        _thread.compiles_ours = before


def compiles_ours() -> bool:
    return _thread.compiles_ours


class Swap:
    """Replaces a function with ours while our calls run, in any thread.

    Args:
        read, write: get and set the function.
        make: makes our function from the current one. It must make a new one each time: if a wrapper around an earlier
            one of ours is left in place, we must not end up inside ourselves.
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
