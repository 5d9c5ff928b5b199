"""From the host to the device without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int] | Sequence[bool], device: torch.device) -> Tensor:
    """A 1-D tensor of `values`; `torch.tensor(values, device=device)` would wait for what is queued on the device."""
    return torch.tensor(values).to(device, non_blocking=True)
