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

    def shared_output(self, target: Any) -> Tensor | None:
        """The target's output weights for the tokens that this head knows; `None` for a head with its own."""
        if self.parts.has_lm_head:
            return None
        weight: Tensor = target.get_output_embeddings().weight
        return weight if self.target_ids is None else weight[self.target_ids.to(weight.device)]

    def num_parameters(self) -> int:
        """As of a model."""
        return sum(weight.numel() for weight in self.parameters())
