"""The processes of one command, as torchrun and `accelerate launch` start them, each with a share of the work."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed

_MOST = timedelta(minutes=30)  # that one may begin later than another


class Processes:
    """This process among those of its command.

    Attributes:
        rank: its number.
        count: how many there are.
        local: its number on this machine.

    Raises:
        ValueError: if the environment names a number of processes, but not this one's place among them.
    """

    def __init__(self) -> None:
        try:
            self.count = int(os.environ.get("WORLD_SIZE", 1))
            self.rank = int(os.environ["RANK"]) if self.count > 1 else 0
            self.local = int(os.environ.get("LOCAL_RANK", self.rank))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')!r} and RANK {os.environ.get('RANK')!r}: start several "
                "processes with `torchrun` or `accelerate launch`, or unset these variables"
            ) from error

    @property
    def device(self) -> str | None:
        """The accelerator of this process, where each has its own."""
        return f"cuda:{self.local}" if self.count > 1 and torch.cuda.is_available() else None

    def first(self, act: Callable[[], None]) -> None:
        """The first process acts, and the others wait for it. If it raises an error, so do all.

        After this they need nothing of each other.
        """
        if self.count == 1:
            act()
            return
        distributed.init_process_group("gloo", timeout=_MOST)
        try:
            raised: list[Exception | None] = [None]
            if self.rank == 0:
                try:
                    act()
                except Exception as error:
                    raised = [error]
            distributed.broadcast_object_list(raised, src=0)
        finally:
            distributed.destroy_process_group()
        if raised[0] is not None:
            raise raised[0]
