"""Pairs of target and draft: loading them together, the embedded one, and the drafter that a call asks for."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .compatibility import check_draft_model
from .drafters import Drafter, ModelDrafter, PromptLookupDrafter
from .options import Options
from .pair_file import FILE_NAME, ModelReference, PairConfig

DEMO_PAIR = Path(__file__).parent / "assets" / "demo_pair"


@dataclass
class SpecPair:
    """A target, its draft and their tokenizer."""

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: PairConfig

    @classmethod
    def from_pretrained(cls, target: str, draft: str | None = None, **kwargs: Any) -> "SpecPair":
        folder = Path(target)
        if draft is None and (folder / FILE_NAME).is_file():
            config = PairConfig.load(folder)
            names = [str(folder / reference.name_or_path) for reference in (config.target, config.draft)]
        else:
            names = [target, str(draft)]
            config = PairConfig(ModelReference(names[0]), ModelReference(names[1]))
        models = [AutoModelForCausalLM.from_pretrained(name, **kwargs).eval() for name in names]
        return cls(models[0], models[1], AutoTokenizer.from_pretrained(names[0]), config)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`target.generate(...)` with the draft; the pair file's recommendations come last."""
        if not self.config.speculate:
            return self.target.generate(*args, **kwargs)
        options = {**self.config.recommended, **kwargs}
        return self.target.generate(*args, assistant_model=self.draft, strategy="spec", **options)


def demo_pair() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded pair: `(target, draft, tokenizer)`, in float32 on the CPU.

    Two small Llamas that write Python, trained by `scripts/train_demo_pair.py`; the card is in their folder.
    """
    target, draft = (
        AutoModelForCausalLM.from_pretrained(DEMO_PAIR / name, dtype=torch.float32) for name in ("target", "draft")
    )
    return target, draft, AutoTokenizer.from_pretrained(DEMO_PAIR / "target")


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
