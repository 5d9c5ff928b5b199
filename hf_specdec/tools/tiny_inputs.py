"""Prompts for tiny models: text, and where it can be made without a processor, text with an image or sound."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from .tiny_models import prompts

Inputs: TypeAlias = Callable[[PreTrainedModel, int, int], dict[str, Any]]

_WIDTH = 20


def inputs_of(model: PreTrainedModel) -> dict[str, Inputs]:
    """The kinds of prompts that are tried with a model, by name."""
    if model.config.is_encoder_decoder:
        return {"text": _encoder_text}
    return {"text": _text}


def _text(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    return prompts(batch, _WIDTH, seed)


def _encoder_text(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    return prompts(batch, _WIDTH, seed, side="right")
