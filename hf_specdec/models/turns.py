"""Turns: how ranks decode different prompts with models whose weights are gathered from all ranks in each forward.

FSDP and DeepSpeed ZeRO-3 keep a part of each weight on each rank. So a forward of one rank is possible only while all
other ranks make a forward of the same model. But ranks accept different drafts, and need different numbers of forwards.

Before each forward, ranks tell each other which model they want to run. If any wants to run the draft, all do: those
that do not want to, on a token that nobody needs. Else all run the target. A rank whose call has ended goes on in this
way until all have ended.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import distributed, nn

from ..device import model_device, to_device, to_host


@contextmanager
def in_turns(models: Sequence[nn.Module], group: "distributed.ProcessGroup | None") -> Iterator[None]:
    """Inside, each rank of `group` may make any number of forwards of these models. All ranks must enter.

    Args:
        models: those that are preferred come last.
        group: `None` for all ranks.
    """
    if not models:
        yield
        return
    turns = _Turns(models, group)
    # Before the hooks that gather weights, which come first otherwise.
    hooks = [
        model.register_forward_pre_hook(partial(turns.wait, index), prepend=True) for index, model in enumerate(models)
    ]
    try:
        yield
    finally:
        try:
            turns.end()
        finally:
            for hook in hooks:
                hook.remove()


class _Turns:
    def __init__(self, models: Sequence[nn.Module], group: "distributed.ProcessGroup | None"):
        self._models = models
        self._group = group
        self._device = model_device(models[0])
        self._is_idle = False  # this rank makes a forward that only others need

    def wait(self, index: int, *_: Any) -> None:
        """Return when it is the turn of a model that this rank wants to run."""
        while not self._is_idle and (chosen := self._choose(index)) != index:
            self._run_idle(chosen)

    def end(self) -> None:
        """Make forwards for others until they have ended too."""
        while (chosen := self._choose(None)) is not None:
            self._run_idle(chosen)

    def _choose(self, wanted: int | None) -> Any:
        """The model whose turn it is; `None` if no rank wants to run any."""
        wants = to_device([int(index == wanted) for index in range(len(self._models))], self._device)
        distributed.all_reduce(wants, group=self._group)
        return max((index for index, count in enumerate(to_host(wants).tolist()) if count), default=None)

    def _run_idle(self, index: int) -> None:
        model = self._models[index]
        ids = torch.zeros(1, 1, dtype=torch.int64, device=model_device(model))
        self._is_idle = True
        try:
            with torch.no_grad():
                model(input_ids=ids, use_cache=False)
        finally:
            self._is_idle = False
