"""Runs parts of the GPU check in a process of its own: `python -m hf_specdec.tools.gpu_check_worker`.

A question names a part, the scale, and a file for notes, to which each case is added as soon as it is known. A question
without a part asks where this process runs.
"""

import json
import platform
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from . import gpu_check_pair, gpu_check_speed, gpu_check_static, gpu_check_tokens, gpu_check_waits
from .arguments import quiet
from .gpu_check import Case, Part, Scale, run_part
from .isolated import serve
from .surroundings import cpu_name, instruction_set


def parts(scale: Scale) -> list[Part]:
    """All parts in the order in which they run: what must be right, then what should be fast."""
    tokens, static, waits = gpu_check_tokens.parts(), gpu_check_static.parts(), gpu_check_waits.parts()
    every = [*tokens, *static, *waits, *gpu_check_pair.parts(), *gpu_check_speed.parts(scale)]
    # The limits are those of a GPU; a CPU may be shared.
    return [replace(part, seconds=4 * part.seconds) for part in every] if scale.tiny else every


def answer(question: dict[str, Any]) -> dict[str, Any]:
    scale = Scale(question["device"], question["tiny"])
    if question["part"] is None:
        return about(scale)
    (part,) = (part for part in parts(scale) if part.name == question["part"])
    with Path(question["notes"]).open("w", encoding="utf-8") as notes:

        def note(case: Case) -> None:
            notes.write(json.dumps(asdict(case)) + "\n")
            notes.flush()

        return run_part(part, scale, note)


def about(scale: Scale) -> dict[str, Any]:
    """Where the check runs; also what takes long at first: imports and the start of CUDA."""
    torch.ones(1, device=scale.device).sum().item()
    return {
        "device": torch.cuda.get_device_name(scale.device) if scale.is_cuda else cpu_name(),
        "instruction_set": instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
    }


def exact_float32() -> None:
    """Products of float32 in float32: TF32 would round like a half-precision format."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    quiet()
    exact_float32()
    serve(answer)
