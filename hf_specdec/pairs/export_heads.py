"""Exports of pairs whose draft is a head: which kind it is, and what inference servers call that.

Reads config.json only. The names are those in the documentation of vLLM and SGLang as of November 2026.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..drafters.heads.dflash_files import is_dflash, is_dspark
from ..drafters.heads.loading import MASK_KEYS, head_format, read_config
from ..drafters.heads.saving import SHARES_OUTPUT
from .heads import head_folder
from .pair_file import ModelReference, PairConfig


@dataclass(frozen=True)
class HeadKind:
    """A kind of head.

    Attributes:
        name: in words.
        vllm: its `method` there.
        sglang: its `--speculative-algorithm` there; `None` if none is documented.
        at_once: all drafts come from one forward, for which vLLM must be told `parallel_drafting`.
        own: it is in the target's own checkpoint.
        longest: the most tokens that it can draft; `None` for any number.
        shares_output: it uses the target's output weights for its own vocabulary.
    """

    name: str
    vllm: str
    sglang: str | None
    at_once: bool = False
    own: bool = False
    longest: int | None = None
    shares_output: bool = False


def head_kind(pair: PairConfig) -> HeadKind | None:
    """The kind of head that a pair's draft is; `None` for draft models, and for what cannot be read."""
    if pair.draft.name_or_path == pair.target.name_or_path:
        return HeadKind("MTP layers", "mtp", "EAGLE", own=True)
    config = _config(pair.draft)
    if "backbone_hidden_size" in config:
        return HeadKind("assistant on the target's entries", "mtp", None)
    if head_format(config) is None:
        return None
    if is_dflash(config):
        size = config.get("block_size") or (config.get("dflash_config") or {}).get("block_size")
        longest = size if is_dspark(config) or config.get("sample_from_anchor") else size and size - 1
        if is_dspark(config):
            return HeadKind("DSpark head", "dspark", "DSPARK", longest=longest)
        return HeadKind("DFlash head", "dflash", "DFLASH", longest=longest)
    shares = bool(config.get(SHARES_OUTPUT))
    if config.get("speculators_model_type") == "peagle" or any(config.get(key) is not None for key in MASK_KEYS):
        return HeadKind("P-EAGLE head", "eagle3", None, at_once=True, shares_output=shares)
    return HeadKind("EAGLE-3 head", "eagle3", "EAGLE3", shares_output=shares)


def check_served(kind: HeadKind, draft: ModelReference) -> None:
    """Raise a ValueError for heads that only hf_specdec reads."""
    if kind.shares_output:
        raise ValueError(
            f"The head {draft.name_or_path} has no output weights (`lm_head.weight`), which vLLM and SGLang expect in "
            "its file: export a head that was trained without `--share-output`"
        )


def vllm_config(kind: HeadKind, draft: ModelReference, gamma: int) -> dict[str, Any]:
    """The value of `--speculative-config`."""
    config: dict[str, Any] = {"method": kind.vllm}
    if not kind.own:
        config["model"] = draft.name_or_path
        if draft.revision is not None:
            config["revision"] = draft.revision
    config["num_speculative_tokens"] = gamma
    if kind.at_once:
        config["parallel_drafting"] = True
    return config


def sglang_flags(kind: HeadKind, draft: ModelReference, gamma: int) -> dict[str, Any]:
    """The options by their names in `sglang.Engine(...)`.

    Raises:
        ValueError: if SGLang documents none for this kind.
    """
    if kind.sglang is None:
        raise ValueError(
            f"The draft {draft.name_or_path} is a head that SGLang's documentation has no algorithm for ({kind.name}): "
            "export the pair for vLLM, or with another draft"
        )
    flags: dict[str, Any] = {"speculative_algorithm": kind.sglang}
    if not kind.own:
        flags["speculative_draft_model_path"] = draft.name_or_path
        flags["speculative_draft_model_revision"] = draft.revision
    if kind.sglang == "DSPARK":
        return flags | {"speculative_dspark_block_size": gamma}
    if kind.sglang == "DFLASH":
        return flags | {"speculative_num_draft_tokens": gamma + 1}
    steps = {"speculative_num_steps": gamma, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": gamma + 1}
    return flags | steps


def draft_length(kind: HeadKind, gamma: int, notes: list[str]) -> int:
    """γ, but no more than such a head can draft, which then is noted."""
    if kind.longest is None or gamma <= kind.longest:
        return gamma
    notes.append(f"The head drafts at most {kind.longest} tokens, so that is the draft length, not {gamma}.")
    return kind.longest


def _config(reference: ModelReference) -> dict[str, Any]:
    """The config.json of a draft; empty if it cannot be read."""
    try:
        folder: Path | None = head_folder(reference)
        return {} if folder is None else read_config(folder)
    except (OSError, ValueError):
        return {}
