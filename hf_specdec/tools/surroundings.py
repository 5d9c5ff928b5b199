"""The machine and the commit of a measurement."""

import os
import subprocess
from pathlib import Path

import torch

from ..kernels.machine import cpu


def cpu_name() -> str:
    """The CPU's model, or the kind of machine if the system does not say."""
    return cpu()[0]


def instruction_set() -> str:
    """The vector instructions that PyTorch and oneDNN use here. With units for bfloat16, figures differ most.

    `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` can limit both to less than the CPU has.
    """
    found, limit = [torch.backends.cpu.get_cpu_capability()], os.environ.get("ONEDNN_MAX_CPU_ISA")
    if limit is not None:
        found.append(f"oneDNN limited to {limit}")
    elif {"avx512_bf16", "amx_bf16"} & set(cpu()[1].split()):
        found.append("bf16 units")
    return ", ".join(found)


def commit() -> str | None:
    """The commit of the checkout that contains this package, if there is one; with "+" if files changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")
