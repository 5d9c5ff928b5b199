"""Writes EAGLE-3 and P-EAGLE heads in the format of speculators, which `vllm serve FOLDER` reads too."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from .eagle3 import Eagle3Head

SPECULATORS_VERSION = "0.9.0"
SHARES_OUTPUT = "uses_output_weights_of_verifier"  # ours, in a config; speculators has no such heads


def save_folder(head: Eagle3Head, folder: Path, target: PreTrainedModel, draft_length: int = 5) -> None:
    """Write config.json and model.safetensors.

    Args:
        head: with a layer list, an fc and a vocabulary as speculators has them.
        folder: created if needed.
        target: the model that it drafts for, for the record.
        draft_length: how many tokens to draft, as far as the format's readers know no better.
    """
    parts = head.parts
    layer = {**parts.layer.to_diff_dict(), "model_type": parts.layer.model_type, "vocab_size": parts.vocab_size}
    layer |= {"num_hidden_layers": parts.layers}
    method = {"proposal_type": "greedy", "speculative_tokens": draft_length, "verifier_accept_k": 1}
    config: dict[str, Any] = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "draft_vocab_size": parts.draft_vocab_size or parts.vocab_size,
        "norm_before_residual": parts.norm_before_residual,
        "norm_before_fc": parts.norm_before_fc,
        "fc_norm": parts.fc_norm,
        "norm_output": parts.norm_output,
        "eagle_aux_hidden_state_layer_ids": None if parts.aux_ids is None else list(parts.aux_ids),
        "target_hidden_size": parts.target_hidden_size,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{**method, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": target.name_or_path, "architectures": [type(target).__name__]},
        },
        "transformer_layer_config": layer,
    }
    if not parts.has_lm_head:
        config[SHARES_OUTPUT] = True
    if not parts.uses_aux:
        config["eagle_config"] = {"use_aux_hidden_state": False}
    if parts.mask_token is not None:
        config |= {"architectures": ["PEagleDraftModel"], "speculators_model_type": "peagle"}
        config["mask_token_id"], config["speculators_config"]["algorithm"] = parts.mask_token, "peagle"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(head_tensors(head), folder / "model.safetensors", metadata={"format": "pt"})


def head_tensors(head: Eagle3Head) -> dict[str, Tensor]:
    """The weights by name, and the maps of a reduced vocabulary: d2t is added to its ids, t2d says which it has."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    if "mask_hidden" in tensors:
        tensors["mask_hidden"] = tensors["mask_hidden"][None, None]
    ids = head.target_ids
    if ids is not None:
        ids = ids.cpu()
        known = torch.zeros(head.parts.vocab_size, dtype=torch.bool)
        known[ids] = True
        tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": known}
    return tensors
