"""Whether a draft fits a target: same tokenizer, same device, caches that can be rolled back."""

from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .cache import check_layers


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
