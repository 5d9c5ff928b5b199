"""Pairs of target and draft: the embedded one, loading a draft by name, and whether two models fit together."""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .cache import check_layers
from .drafters import Drafter, ModelDrafter, PromptLookupDrafter
from .options import Options

_DEMO_PAIR = Path(__file__).parent / "assets" / "demo_pair"


def demo_pair() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded pair: `(target, draft, tokenizer)`, in float32 on the CPU.

    Two small Llamas that write Python, trained by `scripts/train_demo_pair.py`; the card is in their folder.
    """
    target, draft = (
        AutoModelForCausalLM.from_pretrained(_DEMO_PAIR / name, dtype=torch.float32) for name in ("target", "draft")
    )
    return target, draft, AutoTokenizer.from_pretrained(_DEMO_PAIR / "target")


def make_drafter(
    assistant_model: object,
    target: PreTrainedModel,
    options: Options,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Drafter:
    """The drafter that a call asks for.

    Args:
        assistant_model: a model, a Hub id or local path, a `Drafter`, or `None` for prompt look-up.
        target: the model that it drafts for.
        options: the call's options.
        tokenizer, assistant_tokenizer: of target and draft; looked at where vocabulary sizes differ.

    Raises:
        ValueError, TypeError: if that does not name a drafter, or one that does not fit the target.
    """
    if isinstance(assistant_model, Drafter):
        return assistant_model
    if assistant_model is None:
        return PromptLookupDrafter(options.max_matching_ngram_size)
    if options.prompt_lookup_num_tokens is not None:
        raise ValueError("`assistant_model` and `prompt_lookup_num_tokens` each choose a drafter: pass one of them")
    if isinstance(assistant_model, (str, Path)):
        assistant_model = load_draft(str(assistant_model), target.dtype, target.device)
    if not isinstance(assistant_model, torch.nn.Module) or not hasattr(assistant_model, "config"):
        raise TypeError(
            "`assistant_model` must be a transformers model, a Hub id or local path, or a hf_specdec.Drafter, "
            f"got {type(assistant_model).__name__}"
        )
    draft: Any = assistant_model
    check_draft_model(draft, target, tokenizer, assistant_tokenizer)
    return ModelDrafter(draft, options.assistant_confidence_threshold)


@functools.lru_cache(maxsize=4)
def load_draft(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A draft model by Hub id or local path, loaded once per dtype and device."""
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`assistant_model` {name!r} could not be loaded: it is neither a local folder with a model nor a Hub id "
            f"that can be reached ({str(error).splitlines()[0]})"
        ) from error


def check_draft_model(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    assistant_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raise a ValueError unless `draft` can draft for `target`."""
    name = type(draft).__name__
    if not getattr(draft, "can_generate", bool)():
        raise TypeError(f"`assistant_model` must be a causal language model, but {name} cannot generate text")
    if draft.config.is_encoder_decoder:
        raise ValueError(f"`assistant_model` must be a decoder-only model, {name} is an encoder-decoder model")
    if draft.device != target.device:
        raise ValueError(
            f"`assistant_model` is on {draft.device}, the target on {target.device}: move it with "
            f"`assistant_model.to({str(target.device)!r})`"
        )
    check_layers(DynamicCache(config=draft.config.get_text_config(decoder=True)), f"`assistant_model` ({name})")
    check_vocabularies(draft, target, tokenizer, assistant_tokenizer)


def check_vocabularies(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    assistant_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raise a ValueError unless both models mean the same by each token id.

    Embeddings may be padded to different sizes over one tokenizer (Qwen2.5 7B and 0.5B), so where sizes differ the
    tokenizers decide: those given, else those that the models were loaded with.
    """
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (target, draft)]
    if tokenizer is None or assistant_tokenizer is None:
        if sizes[0] == sizes[1]:
            return
        tokenizer = tokenizer or _tokenizer_of(target)
        assistant_tokenizer = assistant_tokenizer or _tokenizer_of(draft)
        if tokenizer is None or assistant_tokenizer is None:
            raise ValueError(
                f"The vocabularies of target and `assistant_model` differ in size ({sizes[0]} and {sizes[1]}), and "
                "their tokenizers are not known: pass `tokenizer` and `assistant_tokenizer`, or use a draft of the "
                "same family"
            )
    if tokenizer.get_vocab() != assistant_tokenizer.get_vocab():
        raise ValueError(
            f"Target and `assistant_model` have different tokenizers (vocabulary sizes {sizes[0]} and {sizes[1]}), "
            "which strategy='spec' does not support yet: use a draft of the same family"
        )


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer stored where the model was loaded from, if it can be had."""
    if not model.name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError):
        return None
