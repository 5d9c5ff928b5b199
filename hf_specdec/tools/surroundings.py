"""The machine and the commit of a measurement."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def cpu_name() -> str:
    """The CPU's model, or the kind of machine if the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def instruction_set() -> str:
    """The vector instructions that PyTorch and oneDNN use here. With units for bfloat16, figures differ most.

    `ATEN_CPU_CAPABILITY` and `ONEDNN_MAX_CPU_ISA` can limit both to less than the CPU has.
    """
    name = torch.backends.cpu.get_cpu_capability()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    units = [label for label, has in (("bf16 units", _has("avx512_bf16", "amx_bf16")),) if has and limit is None]
    return ", ".join([name, *units, *([] if limit is None else [f"oneDNN limited to {limit}"])])


def _has(*features: str) -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return any(feature in flags for feature in features)


def commit() -> str | None:
    """The commit of the checkout that contains this package, if there is one; with "+" if files changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")
