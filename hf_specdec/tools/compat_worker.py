"""Examines classes in a separate process: `python -m hf_specdec.tools.compat_worker`, see `isolated.py`."""

import time
import warnings
from typing import Any

import torch

from .arguments import quiet
from .compat import examine
from .isolated import serve
from .tiny_models import Entry


def answer(question: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    dtype = getattr(torch, question["dtype"])
    entry = Entry(**{**question["entry"], "mappings": tuple(question["entry"]["mappings"])})
    result = examine(entry, tuple(question["batches"]), question["seed"], dtype=dtype)
    return result | {"seconds": round(time.perf_counter() - start, 2)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    quiet()
    serve(answer)
