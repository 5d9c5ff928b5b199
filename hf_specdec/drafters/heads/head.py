"""Head: what all heads have in common, as far as drafters, caches and files need to know."""

from typing import Any

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """A module that drafts from hidden states of a target.

    Attributes:
        parts: its config, with `layer`, the config of its layers.
        target_ids: `[draft vocabulary]`, the target's token for each of the head's; `None` if they are the same.
    """

    parts: Any
    norm: nn.Module
    target_ids: Tensor | None
    uses_target = True  # as its drafter does; see `Drafter`

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        weight: Any = self.norm.weight
        assert isinstance(weight, Tensor)
        return weight

    def num_parameters(self) -> int:
        """As of a model."""
        return sum(weight.numel() for weight in self.parameters())
