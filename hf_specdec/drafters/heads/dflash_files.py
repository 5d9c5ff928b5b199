"""How files of DFlash and DSpark heads say what the parts of a head are. `loading.py` reads the files.

| format | recognised by | the states that an id i means | the first draft |
|---|---|---|---|
| HF | `block_size`, `target_layer_ids`, and tensors `encoder.*` | after layer i | of the first mask token |
| z-lab | `dflash_config` | after layer i | of the first mask token |
| DeepSpec | "dspark" in `architectures` | after layer i, -1 for embeddings | of the last committed token |
| speculators | `speculators_model_type` | before layer i | as `sample_from_anchor` says |

What comes after the last layer is normed in all of them but speculators', which take it as engines do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from .dflash import DFlashConfig

KINDS = ("dflash", "dspark")  # as `speculators_model_type`
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_NAMES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}


def is_dflash(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a DFlash or DSpark head."""
    kind = config.get("speculators_model_type")
    if kind is not None:
        return kind in KINDS
    return "dflash_config" in config or ("block_size" in config and "target_layer_ids" in config) or is_dspark(config)


def is_dspark(config: Mapping[str, Any]) -> bool:
    """Whether it was trained as a DSpark head; DeepSpec's DFlash heads were, without what is DSpark's own."""
    names = [config.get("speculators_model_type") or "", *(config.get("architectures") or ())]
    return any("dspark" in name.lower() for name in names)


def our_name(name: str) -> str:
    name = name.removeprefix("model.")
    return _NAMES.get(name, name)


def dflash_parts(
    config: Mapping[str, Any], layer: PreTrainedConfig, tensors: Mapping[str, Tensor], file: Path
) -> DFlashConfig:
    """The config of our module, from a checkpoint's config and the tensors with our names.

    Args:
        layer: the config of its layers.
        file: the config.json, for messages.

    Raises:
        ValueError: for what is missing or not supported; it names file, key and shape.
    """
    of_speculators = "speculators_model_type" in config
    more = config.get("dflash_config") or {}
    ids = config.get("aux_hidden_state_layer_ids") if of_speculators else _either("target_layer_ids", config, more)
    key = "aux_hidden_state_layer_ids" if of_speculators else "target_layer_ids"
    if ids is None and not of_speculators and "num_target_layers" in config:
        ids = _usual_layers(config["num_target_layers"], layer.num_hidden_layers)
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
        raise ValueError(f"{file} has no `{key}`, the layers of the target that the head reads, got {ids!r}")
    whole = {name: _either(name, config, more) for name in ("block_size", "mask_token_id")}
    for name, what in (
        ("block_size", "how many tokens it reads at once"),
        ("mask_token_id", "what stands for a draft"),
    ):
        if type(whole[name]) is not int or whole[name] < (name == "block_size"):
            raise ValueError(f"{file} has no `{name}`, {what}: expected an integer, got {whole[name]!r}")
    anchored = _either("sample_from_anchor", config, more)
    if anchored is None:
        anchored = is_dspark(config)
    _check_layers(layer, file)
    given = _target_width(layer, len(ids), tensors, file)
    sizes = config.get("transformer_layer_config") or config
    vocab_size, draft_size = sizes.get("vocab_size"), config.get("draft_vocab_size")
    lm_head, first, proj = (
        tensors.get(name) for name in ("lm_head.weight", "markov_head.markov_w1.weight", "confidence_head.proj.weight")
    )
    if vocab_size is None and (lm_head is not None or "embed_tokens.weight" in tensors or first is not None):
        raise ValueError(f"{file} has no `vocab_size`, the size of the target's vocabulary")
    if first is not None and config.get("markov_head_type", "vanilla") != "vanilla":
        raise ValueError(
            f"{file}: `markov_head_type` is {config['markov_head_type']!r}, hf_specdec reads 'vanilla' heads only"
        )
    return DFlashConfig(
        layer=layer,
        aux_ids=tuple(i if of_speculators else i + 1 for i in ids),
        block_size=whole["block_size"],
        mask_token=whole["mask_token_id"],
        from_anchor=bool(anchored),
        vocab_size=vocab_size,
        draft_vocab_size=None if draft_size in (None, vocab_size) else draft_size,
        layers=layer.num_hidden_layers,
        target_hidden_size=None if given == layer.hidden_size else given,
        has_embeddings="embed_tokens.weight" in tensors,
        has_lm_head=lm_head is not None,
        qk_norm="layers.0.self_attn.q_norm.weight" in tensors,
        biases=tuple({n.split(".")[-2] for n in tensors if n.endswith(".bias") and not n.startswith("confidence")}),
        causal_windows=not config.get("sliding_window_non_causal", False)
        if of_speculators
        else bool(more.get("causal")),
        normed_last=not of_speculators,
        markov_rank=0 if first is None else first.shape[1],
        confidence_width=0 if proj is None else proj.shape[1],
    )


def _either(name: str, config: Mapping[str, Any], more: Mapping[str, Any]) -> Any:
    """A setting, from the top level or `dflash_config`."""
    return config.get(name) if config.get(name) is not None else more.get(name)


def _usual_layers(target_layers: int, layers: int) -> list[int]:
    """The layers that z-lab's heads read where their config names none: evenly spaced, without the last ones."""
    if layers == 1:
        return [target_layers // 2]
    last = target_layers - 3
    return [round(1 + i * (last - 1) / (layers - 1)) for i in range(layers)]


def _check_layers(layer: PreTrainedConfig, file: Path) -> None:
    types = set(getattr(layer, "layer_types", None) or ())
    if types - _LAYER_TYPES:
        raise ValueError(f"{file}: `layer_types` has {sorted(types - _LAYER_TYPES)[0]!r}, which is not supported")
    if "sliding_attention" in types and not getattr(layer, "sliding_window", None):
        raise ValueError(f"{file}: `layer_types` has 'sliding_attention', but `sliding_window` is not set")


def _target_width(layer: PreTrainedConfig, count: int, tensors: Mapping[str, Tensor], file: Path) -> int:
    """Width of each of the target's states."""
    fc = tensors.get("fc.weight")
    if fc is None:
        raise ValueError(f"The weights beside {file} have no `fc.weight` [{layer.hidden_size}, {count} target widths]")
    if fc.shape[1] % count:
        raise ValueError(
            f"`fc.weight` beside {file} has the shape {list(fc.shape)}, which is not made for {count} states per token"
        )
    return fc.shape[1] // count
