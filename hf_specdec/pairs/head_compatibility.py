"""Whether a head fits a target, in one table; and its likely cost. `compatibility.py` does so for draft models."""

import math
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from ..device import model_device
from ..drafters.heads import DFlashHead, Eagle3Head, MtpHead
from ..drafters.heads.gemma4 import shares_entries
from ..models.abilities import Abilities
from ..options import DEFAULTS, Options
from .compatibility import Compatibility, Finding, Tokenizer, bytes_per_token, devices_of, dtype_of, quantity
from .heads import as_head, drafter_of_head


def kind_of(draft: object) -> str:
    """What a head is, in words."""
    head = as_head(draft)
    if isinstance(head, Eagle3Head):
        return "EAGLE-3 head" if head.parts.mask_token is None else "P-EAGLE head"
    if isinstance(head, DFlashHead):
        return "DSpark head" if head.parts.markov_rank else "DFlash head"
    return "MTP layers" if isinstance(head, MtpHead) else "assistant on the target's entries"


def compare_head(target: PreTrainedModel, draft: Any, tokenizer: Tokenizer) -> Compatibility:
    """Check whether a head can draft for `target`, and whether that is likely to pay.

    Args:
        target: the target model.
        draft: the head.
        tokenizer: the target's, which is the head's too.
    """
    head = as_head(draft)
    about, complaint = _complaint(target, head)
    names = type(target).__name__, kind_of(head)
    config = target.config.get_text_config(decoder=True)
    states = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
    mine, drafts, advice = _vocabulary(head, config.vocab_size)

    def finding(row: str, of_target: str, of_head: str, note: str = "") -> Finding:
        error = complaint if row == about else ""
        verdict: Literal["ok", "note", "error"] = "error" if error else "note" if note else "ok"
        return Finding(row, of_target, of_head, verdict, error or note)

    dtypes = dtype_of(target), str(head.dtype).removeprefix("torch.")
    return Compatibility(
        (
            finding("architecture", *names),
            finding("hidden states", states, _reads(head, config.num_hidden_layers)),
            finding("vocabulary", f"{config.vocab_size:,}", mine, advice),
            finding("tokens", f"{len(tokenizer.get_vocab()):,}", "the target's"),
            finding("drafts", "", drafts),
            finding("dtype", *dtypes, "" if dtypes[0] == dtypes[1] else "works; one dtype is the usual choice"),
            finding("device", devices_of(target), devices_of(head)),
            finding("parameters", quantity(target.num_parameters()), quantity(head.num_parameters())),
            _cost_ratio(target, head),
        )
    )


def _complaint(target: PreTrainedModel, head: Any) -> tuple[str, str]:
    """The row of the table that says why the head cannot draft for this target, and why; both empty if it can."""
    if not Abilities.of(target).own_cache:
        name = type(target).__name__
        why = f"{name} carries its own state from step to step, which heads cannot read along: use a draft model"
        return "architecture", why
    options = Options(**DEFAULTS | {"num_assistant_tokens_schedule": "constant"})
    config = target.config.get_text_config(decoder=True)
    try:
        drafter_of_head(head, target, options)
    except ValueError as error:
        if _width(head) == config.hidden_size and _vocab_size(head) not in (None, config.vocab_size):
            return "vocabulary", str(error)
        return "device" if head.device != model_device(target) else "hidden states", str(error)
    return "", ""


def _width(head: Any) -> int:
    """Of the target's states that it reads."""
    if isinstance(head, MtpHead):
        return int(head.config.hidden_size)
    if shares_entries(head):
        return int(head.pre_projection.in_features) // 2
    return int(head.parts.target_hidden_size or head.parts.layer.hidden_size)


def _vocab_size(head: Any) -> int | None:
    """Of the target that it was made for; `None` if it does not say."""
    parts = getattr(head, "parts", None)
    size: int | None = parts.vocab_size if parts is not None else head.config.get_text_config(decoder=True).vocab_size
    return size


def _reads(head: Any, layers: int) -> str:
    """What a head reads of a target with so many layers."""
    if isinstance(head, MtpHead):
        return f"the last ones, of width {_width(head)}"
    if shares_entries(head):
        return f"the last ones, of width {_width(head)}, and keys and values"
    ids = ", ".join("last" if i < 0 else str(i) for i in head.parts.states_of(layers))
    return f"before layers {ids}, of width {_width(head)}"


def _vocabulary(head: Any, size: int) -> tuple[str, str, str]:
    """How many tokens it proposes; how many drafts at once; and what to know about the first."""
    parts = getattr(head, "parts", None)
    known = getattr(parts, "draft_vocab_size", None) or getattr(parts, "vocab_size", None) or size
    at_once = isinstance(head, DFlashHead) or getattr(parts, "mask_token", None) is not None
    longest = getattr(parts, "longest", None) or math.inf
    drafts = "one forward for each" if not at_once else "all in one forward"
    if longest < math.inf:
        drafts += f", at most {longest}"
    advice = f"never drafts the other {size - known:,}; the target says them all the same" if known < size else ""
    return f"{known:,}", drafts, advice


def _cost_ratio(target: PreTrainedModel, head: Any) -> Finding:
    """From the weights that one forward of each reads; the target's output layer, where the head uses it."""
    mine = sum(
        weight.numel() * weight.element_size()
        for name, weight in head.named_parameters()
        if "embed_tokens" not in name and "markov_w1" not in name
    )
    has_output = shares_entries(head) or getattr(getattr(head, "parts", None), "has_lm_head", False)
    output: Any = target.get_output_embeddings()
    if not has_output and isinstance(output, nn.Module):
        ids = getattr(head, "target_ids", None)
        rows: Any = output.weight
        share = 1.0 if ids is None else len(ids) / len(rows)
        mine += share * sum(weight.numel() * weight.element_size() for weight in output.parameters())
    sizes = bytes_per_token(target), float(mine)
    ratio = sizes[1] / sizes[0]
    advice = f"c ≈ {ratio:.2f}, estimated from the weights that one forward needs; scripts/benchmark_speed measures it"
    whole, part = (f"{quantity(size)}B a forward" for size in sizes)
    return Finding("cost ratio", whole, part, "note" if ratio > 0.5 else "ok", advice)
