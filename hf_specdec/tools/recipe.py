"""How a draft is trained, and what updates its weights."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """How a draft is trained.

    Attributes:
        steps: number of weight updates.
        rows: examples per forward.
        accumulate: forwards per step.
        lr: peak learning rate, reached after a tenth of the steps, then falling linearly to zero.
        optimizer: "adamw", or "muon" for the matrices between embeddings and output (see `optimizers`).
        argmax_weight: see `distillation_loss`.
        completion_only_loss: train on the target's continuations, not on the prompts (as in TRL).
        mixed_precision: "no", "bf16" or "fp16", for both models' forwards; the draft's weights are float32.
        seed: seed for the order of the examples.
    """

    steps: int
    rows: int
    accumulate: int = 1
    lr: float = 1e-3
    optimizer: str = "adamw"
    argmax_weight: float = 0.5
    completion_only_loss: bool = False
    mixed_precision: str = "no"
    seed: int = 0


def optimizers(
    draft: nn.Module, lr: float, optimizer: str = "adamw", decay: float = 0.01
) -> list[torch.optim.Optimizer]:
    """What updates the draft's weights.

    Muon (Jordan et al. 2024; scaled to AdamW's learning rates as by Liu et al. 2025, arXiv:2502.16982) takes the
    weights of linear layers but the last, AdamW the others.

    Args:
        optimizer: "adamw" or "muon".
        decay: of the weights that AdamW takes.

    Raises:
        ValueError: if this PyTorch has no Muon.
    """
    weights = list(draft.parameters())
    chosen: list[torch.optim.Optimizer] = []
    if optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"expected PyTorch 2.9 or newer with optimizer='muon', found {torch.__version__}: use 'adamw'"
            )
        last = draft.get_output_embeddings() if isinstance(draft, PreTrainedModel) else getattr(draft, "lm_head", None)
        matrices = [part.weight for part in draft.modules() if isinstance(part, nn.Linear) and part is not last]
        chosen.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
        weights = [each for each in weights if not any(each is matrix for matrix in matrices)]
    return [*chosen, torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=decay)]
