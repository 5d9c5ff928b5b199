"""Other work on the machine, to measure what speculation is worth beside it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE, Popen

# Products of matrices on one thread each, until the process that started it is gone.
_WORK = """
import os, sys
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
import numpy
matrix = numpy.ones((256, 256), dtype=numpy.float32)
print("working", flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(20):
        matrix @ matrix
"""


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Inside the block, so many other processes compute all the time."""
    started: list[Popen[str]] = []
    try:
        for _ in range(processes):
            command = [sys.executable, "-c", _WORK, str(os.getpid())]
            started.append(Popen(command, stdout=PIPE, text=True))
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != "working\n":
                raise RuntimeError(f"a process that should keep the machine busy ended with code {process.wait()}")
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
