"""The choice of a call's drafter, from what was passed as `assistant_model` and the options."""

import functools
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..device import model_device
from ..drafters import Drafter, EarlyExitDrafter, Either, OtherTokenizerDrafter, PromptLookupDrafter
from ..drafters.heads import Head
from ..drafters.parallel import drafter_of
from ..models.checks import check_mode, unwrapped
from ..options import Options
from .catalogue import suggest_draft
from .compatibility import check_draft_model
from .heads import as_head, drafter_of_head, head_of
from .loading import find_pair, load_model, pin
from .mtp import mtp_layers
from .pair_file import ModelReference

_loading = threading.Lock()  # so that calls that begin together load a draft once


def make_drafter(
    assistant_model: object,
    target: PreTrainedModel,
    options: Options,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Drafter:
    """Make the drafter that a call asks for.

    Args:
        assistant_model: a model, a head, a Hub id or local path (of either, or of a pair that has one), "auto" for the
            draft in the target's pair file or the catalogue, a `Drafter`, or `None` for prompt look-up. With `use_mtp`,
            where the target's MTP layers are, or `None` for its own checkpoint.
        target: the model that it drafts for.
        options: the call's options.
        tokenizer: the target's tokenizer. If the draft's differs, drafts are translated.
        assistant_tokenizer: the draft's tokenizer.

    Raises:
        ValueError, TypeError: if `assistant_model` is not a drafter, or does not fit the target.
    """
    if options.speculation_compile == "attention" and model_device(target).type != "cpu":
        raise ValueError(
            f"`speculation_compile='attention'` is for CPUs, and the target is on {model_device(target)}: leave it out"
        )
    if options.assistant_early_exit is not None:
        for name, other in (
            ("assistant_model", assistant_model),
            ("prompt_lookup_num_tokens", options.prompt_lookup_num_tokens),
            ("use_mtp", options.use_mtp or None),
        ):
            if other is not None:
                raise ValueError(f"`assistant_early_exit` and `{name}` each choose a drafter: pass one of them")
    assistant_model = mtp_layers(assistant_model, target, options)
    has_none = assistant_model is None or isinstance(assistant_model, Drafter)
    if has_none and options.speculation_compile == "draft":
        raise ValueError(
            "`speculation_compile='draft'` compiles a draft model, and this call has none: pass one as "
            "`assistant_model`, or leave the option out"
        )
    if isinstance(assistant_model, Either) and assistant_model.given_model is not None:
        check_mode(assistant_model.given_model, "`model_draft`", "model_draft")
        if check_draft_model(assistant_model.given_model, target, tokenizer, assistant_tokenizer) is not None:
            raise ValueError(
                "`model_draft` of hf_specdec.Either has another tokenizer than the target: pass it as "
                "hf_specdec.OtherTokenizerDrafter(model_draft, tokenizer, assistant_tokenizer)"
            )
    if isinstance(assistant_model, Drafter):
        _check_threshold(assistant_model, options)
        return assistant_model
    if options.assistant_early_exit is not None:
        return EarlyExitDrafter(target, options.assistant_early_exit, options.assistant_confidence_threshold)
    if assistant_model is None:
        return PromptLookupDrafter(options.max_matching_ngram_size)
    if options.prompt_lookup_num_tokens is not None:
        raise ValueError("`assistant_model` and `prompt_lookup_num_tokens` each choose a drafter: pass one of them")
    if isinstance(assistant_model, (str, Path)):
        of_the_target = (target.name_or_path,) if assistant_model == "auto" else ()
        with _loading:
            assistant_model = load_draft(str(assistant_model), target.dtype, model_device(target), *of_the_target)
    head = as_head(assistant_model)
    if head is not None:
        return drafter_of_head(head, target, options)
    draft = draft_model(assistant_model)
    check_mode(draft, "`assistant_model`", "assistant_model")
    different = check_draft_model(draft, target, tokenizer, assistant_tokenizer)
    threshold = options.assistant_confidence_threshold
    if different is None:
        return drafter_of(draft, threshold, options.compiles("draft"))
    if options.speculation_compile == "draft":
        raise ValueError(
            "`speculation_compile='draft'` does not compile drafts with another tokenizer than the target's: leave it "
            "out"
        )
    return OtherTokenizerDrafter(draft, *different, threshold)


def _check_threshold(drafter: Drafter, options: Options) -> None:
    """Raise a ValueError for a call's threshold, which a drafter that was made before does not know."""
    threshold, own = options.assistant_confidence_threshold, getattr(drafter, "confidence_threshold", None)
    if not threshold or threshold == own:
        return
    name = type(drafter).__name__
    raise ValueError(
        f"`assistant_confidence_threshold` is {threshold!r}, but `assistant_model` is a {name}, which was made before "
        "the call and decides itself where a draft ends: "
        + (
            f"make it with `confidence_threshold={threshold!r}`, or leave the option out"
            if own is not None
            else "leave the option out, or pass a draft model, which takes it"
        )
    )


def draft_model(assistant_model: object) -> PreTrainedModel:
    """The model that drafts: `assistant_model` itself, or the one inside an adapter's wrapper.

    Raises:
        TypeError: if it is no model of transformers.
    """
    draft = unwrapped(assistant_model)
    if not isinstance(draft, torch.nn.Module) or not hasattr(draft, "config"):
        raise TypeError(
            "`assistant_model` must be a transformers model, a Hub id or local path, or a hf_specdec.Drafter, "
            f"got {type(draft).__name__}"
        )
    model: PreTrainedModel = draft
    return model


@functools.lru_cache(maxsize=4)
def load_draft(name: str, dtype: torch.dtype, device: torch.device, target: str = "") -> PreTrainedModel | Head:
    """Load a draft model or head by name, once per dtype and device; `target` is the target's name, for "auto"."""
    try:
        reference = pin(find_draft(name, target))
        head = head_of(reference, dtype=dtype, device=device)
        return load_model(reference, dtype=dtype).to(device) if head is None else head
    except (OSError, ValueError) as error:
        raise ValueError(f"`assistant_model` {name!r} could not be loaded: {error}") from error


def find_draft(name: str, target: str, revision: str | None = None, **kwargs: Any) -> ModelReference:
    """The draft model for a name: the model itself, or the draft of the named pair; for "auto", the target's draft.

    `revision` applies to `name`, or, for "auto", to `target`.
    """
    if name != "auto":
        found = find_pair(name, revision, roles=("draft",), **kwargs)
        return found.draft if found else ModelReference(name, revision)
    if not target:
        raise ValueError('"auto" looks the draft up by the target\'s name, and this target was not loaded by name')
    for folder in (target, str(Path(target).parent)) if Path(target).is_dir() else (target,):
        found = find_pair(folder, revision, roles=("draft",), **kwargs)
        if found and (folder == target or Path(found.target.name_or_path) == Path(target).resolve()):
            return found.draft
    return ModelReference(suggest_draft(target).draft)
