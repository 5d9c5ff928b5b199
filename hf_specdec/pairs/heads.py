"""Heads by name: local folders and Hub repositories."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.utils import logging

from ..device import model_device
from ..drafters.heads import DFlashHead, Eagle3Head, HeadDrafter, MtpHead, drafter_of
from ..drafters.heads.gemma4 import SharedEntriesDrafter, shares_entries
from ..drafters.heads.loading import PATTERNS, head_format, head_of_module, load_folder, read_config
from ..drafters.heads.mtp_drafter import MtpDrafter
from ..drafters.heads.saving import save_folder
from ..options import Options
from .loading import explain, hub_arguments, hub_file, pin, save_model
from .mtp import mtp_named
from .pair_file import ModelReference

logger = logging.get_logger(__name__)

DEMO_HEAD = Path(__file__).parents[1] / "assets" / "demo_head"


def demo_head() -> Eagle3Head:
    """Load the EAGLE-3 head of the embedded pair's target (`demo_pair`), in float32 on the CPU.

    It was trained by `scripts/distill_draft`; the command is in the card beside it.
    """
    head = load_folder(DEMO_HEAD, dtype=torch.float32)
    assert isinstance(head, Eagle3Head)
    return head


def load_head(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    norm_before_residual: bool | None = None,
    norm_output: bool | None = None,
    aux_ids: Sequence[int] | None = None,
) -> Eagle3Head | DFlashHead:
    """Load a head, to pass as `assistant_model`. Its name does as well, unless something must be changed.

    Args:
        name: a Hub id or local folder: an EAGLE-3 or P-EAGLE head in the format of SafeAILab, SpecForge, DeepSpec or
            speculators, or a DFlash or DSpark head in that of transformers, z-lab, DeepSpec or speculators.
        revision: branch, tag or commit on the Hub.
        dtype: of its weights; by default as in the file.
        device: the target's.
        norm_before_residual, norm_output: of EAGLE-3 heads, where the checkpoint's config is silent or wrong.
        aux_ids: the same for the target's layers whose inputs it reads, 0 for the first.

    Raises:
        OSError: if it cannot be loaded.
        ValueError: if it is no head, or one that is not supported; it names file, key and shape.
    """
    reference = pin(ModelReference(str(name), revision))
    changes: dict[str, Any] = {"norm_before_residual": norm_before_residual, "norm_output": norm_output}
    changes["aux_ids"] = None if aux_ids is None else tuple(aux_ids)
    head = head_of(reference, dtype=dtype, device=device, **changes)
    if head is None:
        raise ValueError(
            f"{name} is not a head on hidden states: its config.json has none of their keys (`draft_vocab_size`, "
            "`speculators_model_type`, ...). Load a draft model with AutoModelForCausalLM"
        )
    return head


def head_of_pair(reference: ModelReference, target: PreTrainedModel, **arguments: Any) -> Any:
    """The head of a pair, in the target's dtype and on its device; `None` if its draft is none.

    Args:
        arguments: of `from_pretrained`; only those about the Hub are used.
    """
    hub = hub_arguments(arguments)
    if reference.gguf_file is None and (layers := mtp_named(reference.name_or_path, target)) is not None:
        return layers
    return head_of(reference, hub, dtype=target.dtype, device=model_device(target))


def save_head(head: Any, folder: Path, target: PreTrainedModel, source: ModelReference | None) -> None:
    """Write the files of a pair's head.

    Args:
        source: where it was read from; its files are copied if its format cannot be written here.

    Raises:
        ValueError: if neither is possible.
    """
    if isinstance(head, Eagle3Head):
        save_folder(head, folder, target)
        return
    if isinstance(head, PreTrainedModel):
        save_model(head, folder)
        return
    if source is None or source.name_or_path == target.name_or_path:
        where = "made in memory" if source is None else "read from the target's own checkpoint"
        raise ValueError(
            f"The draft is a {type(head).__name__} that was {where}, and hf_specdec writes EAGLE-3 heads only: put its "
            "files into a folder of their own, and load the pair from there"
        )
    place = Path(source.name_or_path)
    if not place.is_dir():
        place = Path(snapshot_download(source.name_or_path, revision=source.revision, allow_patterns=PATTERNS))
    folder.mkdir(parents=True, exist_ok=True)
    for file in (file for pattern in PATTERNS for file in place.glob(pattern)):
        if not (folder / file.name).exists() or not file.samefile(folder / file.name):
            shutil.copyfile(file, folder / file.name)


def head_of(
    reference: ModelReference, hub: Mapping[str, Any] | None = None, **options: Any
) -> Eagle3Head | DFlashHead | None:
    """The head that a reference names; `None` if that is not a head.

    Args:
        hub: arguments of `from_pretrained` about the Hub.
        options: of `load_folder`.
    """
    hub = hub or {}
    folder = head_folder(reference, **hub)
    if folder is None or head_format(read_config(folder)) is None:
        return None
    if not Path(reference.name_or_path).is_dir():
        name, revision = reference.name_or_path, reference.revision
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS, **hub))
        except Exception as error:
            raise OSError(explain(error, name, revision)) from error
    return load_folder(folder, **options)


def head_folder(reference: ModelReference, **hub: Any) -> Path | None:
    """The local folder of a reference's config.json; `None` if there is none, or it is a file in GGUF."""
    if reference.gguf_file is not None or Path(reference.name_or_path).is_dir():
        return None if reference.gguf_file is not None else Path(reference.name_or_path)
    try:
        file = hub_file(reference.name_or_path, "config.json", reference.revision, **hub)
    except LocalEntryNotFoundError:  # loading it as a model will say so
        return None
    return None if file is None else file.parent


def as_head(assistant_model: object) -> Any:
    """The head that a module is; `None` for other modules and objects."""
    if isinstance(assistant_model, MtpHead) or shares_entries(assistant_model):
        return assistant_model
    return head_of_module(assistant_model)


def drafter_of_head(head: Any, target: PreTrainedModel, options: Options) -> HeadDrafter:
    """The drafter of a call whose `assistant_model` is a head."""
    for part in ("draft", "target"):
        if options.speculation_compile == part:
            raise ValueError(
                f"`speculation_compile={part!r}` needs forwards of fixed shapes, and `assistant_model` is a head on "
                "hidden states, which has none: leave it out, or use 'attention'"
            )
    if options.speculation_compile is True:
        logger.warning_once("`assistant_model` is a head on hidden states, so only attention is compiled.")
    threshold = options.assistant_confidence_threshold
    if isinstance(head, MtpHead):
        return MtpDrafter(head, target, threshold)
    if shares_entries(head):
        return SharedEntriesDrafter(head, target, threshold)
    return drafter_of(head, target, threshold)
