"""Reads heads from folders, in the formats in which they are published. Those of EAGLE-3 and P-EAGLE:

| format | config.json | layers in the file | the states that an id i means |
|---|---|---|---|
| SafeAILab, SpecForge | a model's config with `draft_vocab_size` | `midlayer.*` | before layer i |
| DeepSpec | a model's config with `target_layer_ids` | `layers.N.*` | after layer i |
| speculators | `speculators_model_type`, sizes in `transformer_layer_config` | `layers.N.*` | before layer i |

The parts of a head are read off the names and shapes of its tensors. The config tells what these cannot. Formats of
DFlash and DSpark heads are in `dflash_files.py`.
"""

import json
import weakref
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .dflash import DFlashConfig, DFlashHead
from .dflash_files import KINDS, dflash_parts, is_dflash, is_dspark
from .dflash_files import our_name as dflash_name
from .eagle3 import Eagle3Config, Eagle3Head, make_rotary
from .head import Head

logger = logging.get_logger(__name__)

SAFEAILAB, DEEPSPEC, SPECULATORS = "SafeAILab / SpecForge", "DeepSpec", "speculators"
ZLAB, HF = "z-lab", "HF"
# Files of a head's repository.
PATTERNS = ["config.json", "*.safetensors", "pytorch_model*.bin"]
# Tensors that a head does not need: maps that follow from others, and copies of the target's that training leaves.
_UNUSED = ("t2d", "d2t", "verifier_", "target_model.")
_VARIANTS = ("norm_before_residual", "norm_output")
_TOLD = (*_VARIANTS, "mask_token", "block_size", "from_anchor")  # in the log, of those that a head has
_EAGLE_KINDS = ("eagle3", "peagle")  # as `speculators_model_type`
_OF_MODULES = ("block_size", "target_layer_ids")  # in the config of transformers' models that are DFlash heads
_of_modules: "weakref.WeakKeyDictionary[PreTrainedModel, Any]" = weakref.WeakKeyDictionary()  # their heads
MASK_KEYS = ("mask_token_id", "ptd_token_id", "pard_token")  # of P-EAGLE heads


def head_format(config: Mapping[str, Any]) -> str | None:
    """The format of a head with this config.json, whether or not it is supported; `None` if it is no head's."""
    names = " ".join(config.get("architectures") or []).lower()
    if "speculators_model_type" in config:
        return SPECULATORS
    if is_dflash(config):
        return ZLAB if "dflash_config" in config else DEEPSPEC if is_dspark(config) else HF
    if "target_layer_ids" in config:
        return DEEPSPEC
    is_eagle = "eagle" in names or "eagle_config" in config or "draft_vocab_size" in config
    return SAFEAILAB if is_eagle else None


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; empty if it has none.

    Raises:
        ValueError: if it is not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def load_folder(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", **changes: Any
) -> Eagle3Head | DFlashHead:
    """Load a head.

    Args:
        folder: with config.json, and model.safetensors or pytorch_model.bin.
        dtype: of its weights; by default as in the file.
        changes: attributes of the head's config, instead of what config.json says; `None` for no change.

    Raises:
        ValueError: for a format, tensor or setting that is not supported; it names file, key and shape.
        OSError: if there are no weights.
    """
    config, at = read_config(folder), folder / "config.json"
    form = head_format(config)
    if form is None:
        raise ValueError(
            f"{at} is not the config of a head that hf_specdec reads: EAGLE-3 of {SAFEAILAB}, {DEEPSPEC} or "
            f"{SPECULATORS}, DFlash of {HF}, {ZLAB}, {DEEPSPEC} or {SPECULATORS}"
        )
    kind = config.get("speculators_model_type", "eagle3")
    if kind not in (*_EAGLE_KINDS, *KINDS):
        known = ", ".join(map(repr, (*_EAGLE_KINDS, *KINDS)))
        raise ValueError(f"{at}: `speculators_model_type` is {kind!r}, hf_specdec reads {known}")
    file, tensors = _read_tensors(folder)
    parts: Eagle3Config | DFlashConfig
    if is_dflash(config):
        tensors = {dflash_name(name): tensor for name, tensor in tensors.items()}
        sizes = config.get("transformer_layer_config", config)
        parts, name = dflash_parts(config, _layer_config(sizes, at, "qwen3"), tensors, at), "a DFlash head"
    else:
        tensors = {_our_name(name): tensor for name, tensor in tensors.items()}
        parts, name = _parts(config, form, tensors, folder), "an EAGLE-3 head"
    parts = _changed(parts, changes, file, name)
    head = _assembled(parts, tensors, file, dtype)
    size = parts.draft_vocab_size or parts.vocab_size
    logger.info(
        f"{folder} holds {name} in the format of {form}: {parts.layers} layer(s), "
        + (f"{size} tokens, " if size else "")
        + ", ".join(f"{flag}={getattr(parts, flag)}" for flag in _TOLD if hasattr(parts, flag))
    )
    return head.to(device).eval()


def head_of_module(module: Any) -> Head | None:
    """The head that a module is, or that shares the weights of a loaded model of transformers; `None` for others."""
    if isinstance(module, Head):
        return module
    if not isinstance(module, PreTrainedModel) or not all(hasattr(module.config, key) for key in _OF_MODULES):
        return None
    tensors = {dflash_name(name): tensor for name, tensor in module.state_dict().items()}
    known = _of_modules.get(module)
    if known is None or known.fc.weight.data_ptr() != tensors["fc.weight"].data_ptr():
        name = Path(type(module).__name__)
        parts = dflash_parts(module.config.to_dict(), module.config, tensors, name)
        known = _of_modules[module] = _assembled(parts, tensors, name, None).to(module.device).eval()
    return known


def _changed(
    parts: Eagle3Config | DFlashConfig, changes: Mapping[str, Any], file: Path, name: str
) -> Eagle3Config | DFlashConfig:
    """The parts with a caller's changes.

    Raises:
        ValueError: if such a head does not have what they are about.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    for key in changes.keys() - {field.name for field in fields(parts)}:
        raise ValueError(f"`{key}` says nothing about {name}, which {file} holds: leave it out")
    count = parts.aux_count
    parts = replace(parts, **changes)
    if parts.aux_ids is not None and len(parts.aux_ids) != count:
        raise ValueError(f"`aux_ids` must name {count} layers, as many as {file} reads, got {parts.aux_ids}")
    return parts


def _parts(config: dict[str, Any], form: str, tensors: dict[str, Tensor], folder: Path) -> Eagle3Config:
    """The config of our module, from a checkpoint's config and tensors."""
    file = folder / "config.json"
    eagle = config.get("eagle_config") or {}
    sizes = config["transformer_layer_config"] if form == SPECULATORS else config
    layer = _layer_config(sizes, file)
    given = config.get("target_hidden_size") or layer.hidden_size
    uses_aux = eagle.get("use_aux_hidden_state", config.get("use_aux_hidden_state", True))
    ids = config.get("eagle_aux_hidden_state_layer_ids") or eagle.get("eagle_aux_hidden_state_layer_ids")
    if form == DEEPSPEC:
        ids = [i + 1 for i in config["target_layer_ids"]]  # it counts what a layer returns
    count = (len(ids) if ids else 3) if uses_aux else 1
    fc = tensors.get("fc.weight")
    if fc is None and uses_aux:
        raise ValueError(f"The weights in {folder} have no `fc.weight` [{layer.hidden_size}, {count * given}]")
    if fc is not None and fc.shape[1] != count * given:
        raise ValueError(
            f"`fc.weight` in {folder} has the shape {list(fc.shape)}, but {file} says that it reads {count} states of "
            f"width {given} ({count * given} in all)"
        )
    vocab_size, draft_size = sizes.get("vocab_size"), config.get("draft_vocab_size")
    if not isinstance(vocab_size, int):
        raise ValueError(f"{file} has no `vocab_size`, the size of the target's vocabulary")
    lm_head = tensors.get("lm_head.weight")
    draft_size = draft_size if lm_head is None or draft_size else len(lm_head)
    flags = {name: bool(config.get(name, eagle.get(name, False))) for name in _VARIANTS}
    if form == SPECULATORS:  # without the key, vLLM takes it for true
        flags["norm_before_residual"] = bool(config.get("norm_before_residual", True))
    return Eagle3Config(
        layer=layer,
        vocab_size=vocab_size,
        draft_vocab_size=None if draft_size in (None, vocab_size) else draft_size,
        aux_ids=tuple(ids) if ids and uses_aux else None,
        aux_count=count,
        uses_aux=uses_aux,
        layers=1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("layers.")), default=0),
        target_hidden_size=None if given == layer.hidden_size else given,
        has_fc=fc is not None,
        has_embeddings="embed_tokens.weight" in tensors,
        has_lm_head=lm_head is not None,
        norm_before_fc="input_norm.weight" in tensors,
        fc_norm="fc_norm.0.weight" in tensors,
        qk_norm="layers.0.self_attn.q_norm.weight" in tensors,
        biases=tuple({name.split(".")[-2] for name in tensors if name.endswith(".bias")}),
        mask_token=_mask_token(config, tensors, count * given, folder),
        **flags,
    )


def _mask_token(config: dict[str, Any], tensors: dict[str, Tensor], width: int, folder: Path) -> int | None:
    """The mask token of a P-EAGLE head; `None` for others. What stands for the target's states becomes one vector."""
    token = next((config[key] for key in MASK_KEYS if config.get(key) is not None), None)
    hidden = tensors.get("mask_hidden")
    if hidden is None and config.get("speculators_model_type") != "peagle":
        return None
    if hidden is None or hidden.numel() != width:
        found = "no such tensor" if hidden is None else f"the shape {list(hidden.shape)}"
        raise ValueError(f"`mask_hidden` of a P-EAGLE head in {folder}: expected [1, {width}], found {found}")
    if type(token) is not int:
        raise ValueError(f"{folder / 'config.json'} has no `{MASK_KEYS[0]}`, which stands for a draft, got {token!r}")
    tensors["mask_hidden"] = hidden.flatten()
    return token


def _layer_config(sizes: dict[str, Any], file: Path, usual: str = "llama") -> PreTrainedConfig:
    """The config of the layers; `model_type` says how to read it, by default as `usual`."""
    kind = sizes.get("model_type", usual)
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"{file}: transformers does not know the `model_type` {kind!r} of the head's layers")
    try:
        layer: PreTrainedConfig = CONFIG_MAPPING[kind](**{k: v for k, v in sizes.items() if k != "model_type"})
    except Exception as error:  # of many kinds
        raise ValueError(f"{file}: the head's layers cannot be made from these sizes: {error}") from error
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "hidden_act", "rms_norm_eps")
    missing = [name for name in (*needed, "rope_parameters") if getattr(layer, name, None) is None]
    if missing:
        raise ValueError(f"{file}: the head's layers have no `{missing[0]}`; their `model_type` is {kind!r}")
    return layer


def _our_name(name: str) -> str:
    name = name.removeprefix("model.")
    return f"layers.0.{name.removeprefix('midlayer.')}" if name.startswith("midlayer.") else name


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """All tensors of a folder by name, and a file that holds some of them."""
    files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    if not files:
        files = sorted(folder.glob("pytorch_model*.bin"))
        for file in files:
            tensors |= torch.load(file, map_location="cpu", weights_only=True)
    if not files:
        raise OSError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin beside config.json")
    return files[0], tensors


def _assembled(
    parts: Eagle3Config | DFlashConfig, tensors: dict[str, Tensor], file: Path, dtype: torch.dtype | None
) -> Eagle3Head | DFlashHead:
    """The head with these tensors.

    Raises:
        ValueError: if some are missing, unknown, or of another shape or kind.
    """
    ids = _target_ids(parts, tensors, file)
    head: Eagle3Head | DFlashHead
    with torch.device("meta"):
        head = Eagle3Head(parts) if isinstance(parts, Eagle3Config) else DFlashHead(parts)
    head.rotary, head.target_ids = make_rotary(parts.layer), ids
    expected = {name: tensor.shape for name, tensor in head.state_dict().items()}
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(_UNUSED) and "rotary" not in name}
    for name in sorted(expected.keys() - given.keys()):
        raise ValueError(f"{file} has no `{name}` {list(expected[name])}, which its config asks for")
    for name in sorted(given.keys() - expected.keys()):
        raise ValueError(
            f"{file} holds `{name}` {list(given[name].shape)}, which is no part of the EAGLE-3 and DFlash heads that "
            "hf_specdec knows"
        )
    for name, tensor in given.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"`{name}` in {file} has the shape {list(tensor.shape)}, but its config asks for {list(expected[name])}"
            )
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(f"`{name}` in {file} is {tensor.dtype}: quantized heads are not supported")
    head.load_state_dict({name: tensor.to(dtype or tensor.dtype) for name, tensor in given.items()}, assign=True)
    return head.requires_grad_(False)


def _target_ids(parts: Eagle3Config | DFlashConfig, tensors: dict[str, Tensor], file: Path) -> Tensor | None:
    """The target's token for each of the head's: d2t holds what to add to the head's."""
    offsets, known = tensors.get("d2t"), tensors.get("t2d")
    size = parts.draft_vocab_size
    if size is None or parts.vocab_size is None:
        return None
    if offsets is None and known is not None:
        ids = known.nonzero()[:, 0]
    elif offsets is None:
        raise ValueError(
            f"{file} has neither `d2t` [{size}] nor `t2d` [{parts.vocab_size}], which tell the target's token for each "
            f"of the head's {size}"
        )
    else:
        ids = offsets.long() + torch.arange(len(offsets))
    wrong = f"`{'t2d' if offsets is None else 'd2t'}` in {file}"
    if len(ids) != size:
        raise ValueError(f"{wrong} is for {len(ids)} tokens, but the head has {size}")
    if not bool(((ids >= 0) & (ids < parts.vocab_size)).all()) or len(ids.unique()) != size:
        raise ValueError(
            f"{wrong} does not lead to {size} different tokens of the target, which has {parts.vocab_size}: it must "
            "hold offsets, target token minus the head's"
        )
    if known is not None and (len(known) != parts.vocab_size or not bool(known.bool()[ids].all())):
        raise ValueError(f"`d2t` and `t2d` {list(known.shape)} in {file} do not belong together")
    return ids
