"""Whether a head was made for a target; nothing is run."""

from typing import Any

from transformers import PreTrainedModel

from ...device import model_device
from ...models.tap import check_ids
from .head import Head


def check_fit(head: Head, target: PreTrainedModel) -> None:
    """Raise a ValueError, with the sizes found, unless a head can draft for this target."""
    parts, name = head.parts, type(target).__name__
    config = target.config.get_text_config(decoder=True)
    width = parts.layer.hidden_size
    check_sizes(parts.target_hidden_size or width, parts.vocab_size, target)
    mask = getattr(parts, "mask_token", None)
    if mask is not None and not 0 <= mask < config.vocab_size:
        _differ("a vocabulary", f"with the mask token {mask}", f"{name} has tokens 0 to {config.vocab_size - 1}")
    check_ids(parts.states_of(config.num_hidden_layers), config.num_hidden_layers, name)
    check_device(head, target)
    for has, shared, key in (
        (parts.has_embeddings, target.get_input_embeddings(), "embed_tokens.weight"),
        (parts.has_lm_head, target.get_output_embeddings(), "lm_head.weight"),
    ):
        weight: Any = getattr(shared, "weight", None)
        found = "none" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        if not has and (weight is None or not weight.is_floating_point() or weight.shape[1] != width):
            raise ValueError(
                f"`assistant_model` is a head without `{key}`, so it uses the target's: expected floats "
                f"[{config.vocab_size}, {width}], but {name} has {found}. Use a head that has its own"
            )


def check_sizes(width: int, vocab_size: int | None, target: PreTrainedModel) -> None:
    """Raise a ValueError unless a target has hidden states of this width, and this vocabulary if it is known."""
    config, name = target.config.get_text_config(decoder=True), type(target).__name__
    if width != config.hidden_size:
        _differ("hidden states", f"of width {width}", f"{name} has width {config.hidden_size}")
    if vocab_size not in (None, config.vocab_size):
        _differ("a vocabulary", f"of {vocab_size} tokens", f"{name} has {config.vocab_size}")


def check_device(head: Any, target: PreTrainedModel) -> None:
    """Raise a ValueError if a head is on another device than its target."""
    here, there = head.device, model_device(target)
    if here != there:
        raise ValueError(
            f"`assistant_model` is on {here}, the target on {there}: move it with `assistant_model.to({str(there)!r})`"
        )


def _differ(what: str, mine: str, theirs: str) -> None:
    raise ValueError(
        f"`assistant_model` is a head for another target: it was made for {what} {mine}, but {theirs}. Use a head that "
        "was trained for this model"
    )
