"""Tiny targets with MTP layers, and what these layers say, from scratch for one row without a cache."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from conftest import VOCAB, make_model
from safetensors.torch import load_file, save_file
from test_eagle3 import quiet
from torch import Tensor, nn
from transformers import DeepseekV3Config, MellumConfig, PreTrainedModel
from transformers.modeling_layers import MtpModel

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "max_position_embeddings": 512,
}  # fmt: skip


def make_deepseek(layers: int) -> PreTrainedModel:
    """A quiet target whose config says so many MTP layers."""
    config = DeepseekV3Config(
        **_COMMON, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1, num_mtp_layers=layers,
    )  # fmt: skip
    return uneven(quiet(make_model(config), 0.01))


def make_mellum() -> PreTrainedModel:
    """One whose only MTP layer has a window."""
    config = MellumConfig(
        **_COMMON, num_key_value_heads=2, head_dim=8, num_experts=4, num_mtp_layers=1, sliding_window=7,
        layer_types=["sliding_attention", "full_attention"], mlp_layer_types=["dense", "sparse"],
    )  # fmt: skip
    return uneven(quiet(make_model(config), 0.01))


@torch.no_grad()
def uneven(target: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose final norm does more than to set a length: states before and after it are told apart."""
    weight = target.get_decoder().norm.weight
    weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
    return target


@torch.no_grad()
def make_module(target: PreTrainedModel, noise: float = 0.15, seed: int = 3) -> Any:
    """transformers' own module with the MTP layers of a target, which agree with it in part."""
    torch.manual_seed(seed)
    module: Any = MtpModel(target, target.config.num_mtp_layers).eval()
    for weight in module.layers.parameters():  # the base class knows no experts
        weight.normal_(std=0.3) if weight.ndim > 1 else weight.fill_(1)
    for layer in module.layers:
        layer.post_norm.weight.copy_(target.get_decoder().norm.weight)
        _make_kindred(layer.eh_proj, layer.mtp_block, noise)
    return module


@torch.no_grad()
def make_tensors(target: PreTrainedModel, noise: float = 0.15, seed: int = 3) -> dict[str, Tensor]:
    """The tensors of an MTP layer as checkpoints have them, for a target that has an attention layer at its end."""
    torch.manual_seed(seed)
    decoder: Any = target.get_decoder()
    width = target.config.hidden_size
    block = copy.deepcopy(decoder.layers[-1])
    for weight in block.parameters():
        weight += 0.1 * torch.randn_like(weight)
    fc = nn.Linear(2 * width, width, bias=False)
    _make_kindred(fc, block, noise)
    tensors = {f"layers.0.{name}": tensor for name, tensor in by_expert(block.state_dict()).items()}
    norm = decoder.norm.weight
    tensors |= {"fc.weight": fc.weight, "norm.weight": norm}
    for name in ("embedding", "hidden"):
        tensors[f"pre_fc_norm_{name}.weight"] = norm.mean().round() + 0.1 * torch.randn_like(norm)  # about 0, or 1
    return {f"mtp.{name}": tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _make_kindred(project: nn.Linear, block: nn.Module, noise: float) -> None:
    """The layer hands the embedding on, so it says what the target would if it had no layers: quiet ones often do."""
    width = project.out_features
    project.weight.copy_(torch.cat([torch.eye(width), noise * torch.randn(width, width) / width**0.5], dim=1))
    for name, weight in block.named_parameters():
        if name.split(".")[-2] in ("o_proj", "down_proj") or name.endswith("down_proj"):
            weight *= noise


def by_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with one tensor per expert and projection, as they are published."""
    found = {}
    for name, tensor in tensors.items():
        place, _, last = name.rpartition(".")
        for i, part in enumerate(tensor if place.endswith(".experts") else ()):
            if last == "gate_up_proj":
                gate, up = part.chunk(2)
                found |= {f"{place}.{i}.gate_proj.weight": gate, f"{place}.{i}.up_proj.weight": up}
            else:
                found[f"{place}.{i}.down_proj.weight"] = part
        if not place.endswith(".experts"):
            found[name] = tensor
    return found


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def save_with(folder: Path, target: PreTrainedModel, tensors: dict[str, Tensor], shards: bool = False) -> Path:
    """The target's own checkpoint with these tensors in it, in one file or in two with an index."""
    target.save_pretrained(folder)
    file = folder / "model.safetensors"
    own = load_file(file)
    if not shards:
        save_file(own | tensors, file, metadata={"format": "pt"})
        return folder
    file.unlink()
    parts = {"model-00001-of-00002.safetensors": own, "model-00002-of-00002.safetensors": tensors}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    where = {tensor: name for name, part in parts.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


class AsModel:
    """An MTP layer as the only layer of a model like its target."""

    def __init__(self, target: PreTrainedModel, tensors: dict[str, Tensor]):
        config = copy.deepcopy(target.config)
        config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
        self.model: Any = type(target)(config).eval()
        block = copy.deepcopy(target.get_decoder().layers[-1])
        own = {name.removeprefix("mtp."): tensor for name, tensor in tensors.items()}
        of_block = {name.removeprefix("layers.0."): t for name, t in own.items() if name.startswith("layers.0.")}
        if any(".experts." in name for name in of_block):
            of_block = _stacked(of_block)
        block.load_state_dict(of_block)
        block.self_attn.layer_idx = 0
        self.model.model.layers[0] = block
        self.norms = [copy.deepcopy(target.get_decoder().norm) for _ in range(2)]
        with torch.no_grad():
            self.model.model.norm.weight.copy_(own["norm.weight"])
            for norm, name in zip(self.norms, ("embedding", "hidden")):
                norm.weight.copy_(own[f"pre_fc_norm_{name}.weight"])
        self.fc, self.target = own["fc.weight"], target

    @torch.no_grad()
    def logits(self, states: Tensor, text: list[int]) -> Tensor:
        """`[vocabulary]`, of the token after `text`; `states` `[t, hidden]` are the target's, the rest are drafts."""
        embed, given = self.target.get_input_embeddings(), states
        while True:
            ids = torch.tensor(text[1 : len(given) + 1])
            joined = torch.cat([self.norms[0](embed(ids)), self.norms[1](given)], dim=-1) @ self.fc.T
            at = torch.arange(1, len(given) + 1)[None]
            hidden = self.model.model(inputs_embeds=joined[None], position_ids=at, use_cache=False).last_hidden_state[0]
            if len(given) == len(text) - 1:
                logits: Tensor = self.target.get_output_embeddings()(hidden[-1])
                return logits
            given = torch.cat([given, hidden[-1:]])


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    experts = {int(name.split(".experts.")[1].split(".")[0]) for name in tensors if ".experts." in name}
    place = "mlp.experts"
    parts = {
        part: torch.stack([tensors[f"{place}.{i}.{part}.weight"] for i in sorted(experts)])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    both = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
    return rest | {f"{place}.gate_up_proj": both, f"{place}.down_proj": parts["down_proj"]}


@torch.no_grad()
def module_logits(module: Any, states: Tensor, text: list[int]) -> Tensor:
    """The same with the layers of transformers' own module, one after the other, then the last one again and again."""
    count, given = len(states), states
    for depth in range(len(text) - count):
        layer = min(depth, len(module.layers) - 1)
        begin = 1 + layer
        ids = torch.tensor(text[begin : begin + len(given)])
        at = torch.arange(begin, begin + len(given))
        hidden = module.forward_layer(layer, given[None], at[None], None, input_ids=ids[None])[0]
        given = hidden if depth + 1 < len(module.layers) else torch.cat([given, hidden[-1:]])
    logits: Tensor = module.shared_head(hidden[-1])
    return logits
