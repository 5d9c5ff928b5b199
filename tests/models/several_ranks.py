"""Ranks on this machine: a test file runs itself as several processes, each of which makes the same checks in turn.

A hang ends by a time limit: that of one collective, or of all ranks together.
"""

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from conftest import ARCHITECTURES, make_model, make_prompts, perturbed
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_specdec
from hf_specdec import SpeculationStats

_SECONDS, _COLLECTIVE_SECONDS = 400, 120  # until a hang ends: of all ranks, of one collective
SPEC: dict[str, Any] = {"strategy": "spec"}


class Models:
    """Loads the models of `save_pair` by name: as they are, or sharded by transformers."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._loaded: dict[Any, PreTrainedModel] = {}

    def __call__(self, name: str, **sharded: int) -> PreTrainedModel:
        key = (name, *sharded.items())
        if key not in self._loaded:
            self._loaded[key] = self.new(name, **sharded)
        return self._loaded[key]

    def new(self, name: str, **sharded: int) -> PreTrainedModel:
        from transformers.distributed import DistributedConfig

        config = {"distributed_config": DistributedConfig(**sharded)} if sharded else {}
        return AutoModelForCausalLM.from_pretrained(self._folder / name, **config).eval()


Check = Callable[[Models], None]


def save_pair(folder: Path, architecture: str, prefix: str = "") -> None:
    """The target as `prefix` or "target", and a draft that agrees in part."""
    config = ARCHITECTURES[architecture]()
    config.num_hidden_layers = 3  # so that stages own one and two
    target = make_model(config)
    target.save_pretrained(folder / (prefix or "target").rstrip("_"))
    perturbed(target, 0.12).save_pretrained(folder / f"{prefix}draft")


def generate(model: PreTrainedModel, rows: int, seed: int = 0, random_seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(random_seed)
    prompts = {} if "input_ids" in kwargs else make_prompts(rows, seed=seed)
    return model.generate(**{"max_new_tokens": 16, "do_sample": False, **prompts, **kwargs})


def same(target: PreTrainedModel, plain: PreTrainedModel, rows: int, seed: int = 0, **kwargs: Any) -> None:
    """Speculation with sharded models gives one process's vanilla tokens, with drafts accepted and rejected."""
    stats = SpeculationStats()
    kwargs = {"num_assistant_tokens": 3, **kwargs}
    ours: Tensor = generate(target, rows, seed, speculation_stats=stats, **SPEC, **kwargs)
    assert torch.equal(ours, generate(plain, rows, seed)), "other tokens than one process"
    assert 0 < stats.acceptance_rate < 1, stats


def be_a_rank(folder: Path, names: Sequence[str], checks: Sequence[Check]) -> None:
    """Make these checks. A rank that fails one goes on; the time limit of the process group ends what waits for it."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=_COLLECTIVE_SECONDS))
    models = Models(folder)
    for check in (check for check in checks if check.__name__ in names):
        began, came = time.perf_counter(), ""
        try:
            check(models)
        except BaseException:
            came = traceback.format_exc()
        line = {"check": check.__name__, "came": came, "seconds": round(time.perf_counter() - began, 2)}
        with (folder / f"rank{distributed.get_rank()}").open("a") as file:
            file.write(json.dumps(line) + "\n")
    os._exit(0)  # without waiting for anybody


def run_ranks(
    script: str, folder: Path, world: int, names: Sequence[str], **environment: str
) -> dict[tuple[str, int], str]:
    """Run a test file as ranks.

    Returns: the traceback by check and rank, empty if there is none. What was not reached is missing.
    """
    shared = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
    shared |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (Path(hf_specdec.__file__).parents[1], Path(__file__).parents[1]))),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(folder), *names],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), **environment},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"stderr{rank}").open("w"),
        )
        for rank in range(world)
    ]
    end = time.monotonic() + _SECONDS
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):  # one has died, and others may wait for it
                end = min(end, time.monotonic() + 20)
            time.sleep(0.2)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    found = {}
    for rank in range(world):
        print((folder / f"stderr{rank}").read_text()[-2000:])
        file = folder / f"rank{rank}"
        for line in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
            found[line["check"], rank] = line["came"]
            print(rank, line["check"], line["seconds"])
    return found


def assert_reached(outcome: dict[tuple[str, int], str], check: str, world: int) -> None:
    for rank in range(world):
        came = outcome.get((check, rank), "not reached: a rank died or waited for others until its time was over")
        assert not came, f"rank {rank}: {came}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])
