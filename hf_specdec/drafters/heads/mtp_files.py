"""Reads MTP layers from checkpoints that have them beside the target's own weights, as `mtp.*`.

    mtp.fc.weight                       [hidden, 2 * hidden], of embedding and hidden state side by side
    mtp.pre_fc_norm_embedding.weight    [hidden], before it
    mtp.pre_fc_norm_hidden.weight       [hidden], before it
    mtp.layers.0.*                      a layer of the target's kind, with attention
    mtp.norm.weight                     [hidden], after it

Other names are read by transformers' own `MtpModel`, which knows them for the models that it supports.
"""

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_layers

from ...device import first_line, model_device
from .mtp import MtpHead, head_of_module

INDEX = "model.safetensors.index.json"
_PREFIX = "mtp."
_TELLING = "mtp.fc.weight"
# Names of `MtpLayer`, by those in checkpoints without the prefix.
_NAMES = {
    "fc.": "eh_proj.",
    "pre_fc_norm_embedding.": "enorm.",
    "pre_fc_norm_hidden.": "hnorm.",
    "norm.": "post_norm.",
    "layers.0.": "mtp_block.",
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def files_with_layers(files: Iterable[str | Path], index: Path | None = None) -> list[str]:
    """The names of those files that may hold MTP layers.

    Args:
        files: of the checkpoint.
        index: its index, if it has one.
    """
    if index is None:
        return [str(file) for file in files]
    weights: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return sorted({file for name, file in weights.items() if name.startswith(_PREFIX)})


def names_in(files: Iterable[Path]) -> list[str]:
    """The names of all tensors in these files; only their headers are read."""
    names: list[str] = []
    for file in files:
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


def holds_layers(names: Iterable[str]) -> bool:
    """Whether a checkpoint with these tensors has MTP layers in the format of this file."""
    return _TELLING in names


def holds_nothing_else(names: list[str]) -> bool:
    """Whether it has nothing else, so that it is a head and not a model."""
    return holds_layers(names) and all(name.startswith(_PREFIX) for name in names)


def load_layers(files: list[Path], target: PreTrainedModel) -> MtpHead:
    """The MTP layers in these files, in the target's dtype and on its device.

    Raises:
        ValueError: if tensors are missing, unknown, or of another shape or kind; it names file, key and shape.
    """
    tensors: dict[str, Tensor] = {}
    home: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            mine = {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(_PREFIX)}  # noqa: SIM118 - not a mapping
        tensors |= mine
        home |= dict.fromkeys(mine, file)
    found = ", ".join(sorted({str(file) for file in home.values()})) or str(files[0])
    if _TELLING not in tensors:
        raise ValueError(f"{found} has no `{_TELLING}`, so it holds no MTP layers that hf_specdec reads")
    layer = _make_layer(target, any(".experts." in name for name in tensors), found)
    expected = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    given: dict[str, Tensor] = {}
    for name, tensor in _merged(tensors).items():
        own = _our_name(name)
        if own not in expected:
            raise ValueError(
                f"{found} holds `{name}` {list(tensor.shape)}, which is no part of the one MTP layer that hf_specdec "
                f"makes for {type(target).__name__}"
            )
        if tensor.shape != expected[own]:
            raise ValueError(
                f"`{name}` in {found} has the shape {list(tensor.shape)}, but the MTP layer of {type(target).__name__} "
                f"needs {list(expected[own])}: it is for another target"
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"`{name}` in {found} is {tensor.dtype}: quantized MTP layers are not supported")
        given[own] = tensor.to(target.dtype)
    for name in sorted(expected.keys() - given.keys()):
        raise ValueError(f"{found} has no `{_published(name)}` {list(expected[name])}, which the MTP layer needs")
    layer.load_state_dict(given, assign=True)
    if any(buffer.is_meta for buffer in layer.buffers()):
        raise ValueError(f"The layers of {type(target).__name__} hold values that {found} does not: they are not read")
    decoder: Any = target.get_decoder()
    head = MtpHead(layer.config, nn.ModuleList([layer]), getattr(decoder, "rotary_emb", None))
    return head.to(model_device(target)).eval().requires_grad_(False)


def load_as_transformers(target: PreTrainedModel) -> MtpHead:
    """The MTP layers that transformers itself finds in the target's checkpoint. It reads them once, here.

    Raises:
        ValueError: if it finds none.
    """
    kind: Any = getattr(modeling_layers, "MtpModel", None)
    if kind is None:
        raise ValueError("This version of transformers has no MTP layers: install 5.23 or later")
    try:
        head = head_of_module(kind.from_pretrained(target, device_map={"": model_device(target)}))
    except Exception as error:  # of many kinds
        raise ValueError(
            f"The MTP layers of {type(target).__name__} could not be loaded from {target.name_or_path!r}: "
            f"{first_line(error)}"
        ) from error
    assert head is not None
    return head.eval().requires_grad_(False)


def _make_layer(target: PreTrainedModel, has_experts: bool, file: str) -> Any:
    """An MTP layer without weights, whose decoder layer is like the target's."""
    kind: Any = getattr(modeling_layers, "MtpLayer", None)
    decoder: Any = target.get_decoder()
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    name = type(target).__name__
    if kind is None:
        raise ValueError("This version of transformers has no MTP layers: install 5.23 or later")
    if not layers or norm is None:
        raise ValueError(
            f"{file} holds MTP layers, but the decoder of {name} has no `layers` and `norm` to make them like: draft "
            "with a model or by look-up instead"
        )
    config = _config_of_layer(target.config.get_text_config(decoder=True), has_experts)
    try:
        with torch.device("meta"):
            return kind(config, type(layers[-1]), type(norm), 0)
    except Exception as error:  # of many kinds
        raise ValueError(f"The layers of {name} cannot be made as MTP layers ({first_line(error)})") from error


def _config_of_layer(config: PreTrainedConfig, has_experts: bool) -> PreTrainedConfig:
    """The target's config as if it had the MTP layer only. What it says of layers by number is about its own."""
    if getattr(config, "num_mtp_layers", None):
        own = config.get_mtp_config()
    else:
        own = copy.deepcopy(config)
        own.num_hidden_layers = 1
        if getattr(own, "layer_types", None) is not None:
            own.layer_types = ["full_attention"]
        for name, value in (("mlp_only_layers", [] if has_experts else [0]), ("decoder_sparse_step", 1)):
            if hasattr(own, name):
                setattr(own, name, value)
    if own._attn_implementation not in ("sdpa", "eager"):
        own._attn_implementation = "sdpa"
    mtp_config: PreTrainedConfig = own
    return mtp_config


def _our_name(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    start = next((start for start in _NAMES if name.startswith(start)), None)
    return name if start is None else _NAMES[start] + name.removeprefix(start)


def _published(name: str) -> str:
    """The inverse."""
    start = next(start for start, mine in _NAMES.items() if name.startswith(mine))
    return _PREFIX + start + name.removeprefix(_NAMES[start])


def _merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with all experts of a layer in one tensor, as transformers' layers have them."""
    merged: dict[str, Tensor] = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if found := _EXPERT.fullmatch(name):
            place, number, part = found.groups()
            experts.setdefault(place, {}).setdefault(int(number), {})[part] = tensor
        else:
            merged[name] = tensor
    for place, by_number in experts.items():
        every = [by_number[number] for number in sorted(by_number)]
        for i, parts in enumerate(every):
            missing = {"gate_proj", "up_proj", "down_proj"} - parts.keys()
            if missing:
                raise ValueError(f"The MTP layers have no `{place}.{i}.{sorted(missing)[0]}.weight`")
        both = [torch.cat([parts["gate_proj"], parts["up_proj"]]) for parts in every]
        merged[f"{place}.gate_up_proj"] = torch.stack(both)
        merged[f"{place}.down_proj"] = torch.stack([parts["down_proj"] for parts in every])
    return merged
