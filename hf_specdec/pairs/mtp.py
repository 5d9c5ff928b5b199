"""MTP layers of a target: where they are, and the head that is made of them, once for each target."""

import functools
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import PreTrainedModel

from ..device import model_device
from ..drafters.heads.mtp import MtpHead, head_of_module
from ..drafters.heads.mtp_files import (
    INDEX,
    files_with_layers,
    holds_layers,
    holds_nothing_else,
    load_as_transformers,
    load_layers,
    names_in,
)
from ..options import Options
from .loading import explain, find_pair, hub_file

_lock = threading.Lock()  # so that calls that begin together read a checkpoint once
# By target or module, then by what it was made from.
_made: "WeakKeyDictionary[nn.Module, dict[Hashable, MtpHead]]" = WeakKeyDictionary()


def mtp_layers(assistant_model: object, target: PreTrainedModel, options: Options) -> object:
    """The head of a call that drafts with MTP layers; `assistant_model` itself, if it does not.

    Args:
        assistant_model: with `use_mtp`, where the layers are, or `None` for the target's own checkpoint. Without it, it
            may be such layers too: a module of transformers, a folder that holds nothing else, the target's own name.

    Raises:
        ValueError: if there are none, or they do not fit.
    """
    if isinstance(assistant_model, nn.Module):
        head = _kept(assistant_model, (), lambda: head_of_module(assistant_model))
        if head is not None:
            return head
    if not options.use_mtp:
        is_name = isinstance(assistant_model, (str, Path)) and assistant_model != "auto"
        layers = mtp_named(str(assistant_model), target) if is_name else None
        return assistant_model if layers is None else layers
    if assistant_model is not None and not isinstance(assistant_model, (str, Path, MtpHead)):
        raise ValueError(
            "`use_mtp` and `assistant_model` each choose a drafter: pass one of them, or as `assistant_model` the name "
            f"of what holds the MTP layers, got {type(assistant_model).__name__}"
        )
    if options.prompt_lookup_num_tokens is not None:
        raise ValueError("`use_mtp` and `prompt_lookup_num_tokens` each choose a drafter: pass one of them")
    if isinstance(assistant_model, MtpHead):
        return assistant_model
    return _layers_of(target, None if assistant_model is None else str(assistant_model))


def mtp_named(name: str, target: PreTrainedModel) -> MtpHead | None:
    """The MTP layers that a name means beside this target, perhaps those of a local pair; `None` if it means others."""
    found = find_pair(name, roles=("draft",)) if Path(name).is_dir() else None
    name = name if found is None else found.draft.name_or_path
    return _layers_of(target, name) if _are_layers(name, target) else None


def _layers_of(target: PreTrainedModel, name: str | None) -> MtpHead:
    kind = name, target.name_or_path, target.dtype, model_device(target)
    head: MtpHead = _kept(target, kind, lambda: _load(name, target))
    return head


def _kept(owner: nn.Module, kind: Hashable, make: Any) -> Any:
    """The head that `make` has made for an owner, now or in an earlier call."""
    with _lock:
        known = _made.get(owner, {})
        if kind in known:
            return known[kind]
        head = make()
        if head is not None:
            _made.setdefault(owner, {})[kind] = head
        return head


def _load(name: str | None, target: PreTrainedModel) -> MtpHead:
    where = name or target.name_or_path
    if not where:
        raise ValueError(
            f"`use_mtp` reads MTP layers from the target's checkpoint, and this {type(target).__name__} was not loaded "
            "by name: pass the folder that holds them as `assistant_model`"
        )
    try:
        files = _files(where, None if name else getattr(target.config, "_commit_hash", None))
    except OSError as error:
        raise ValueError(f"The MTP layers of {where!r} could not be read: {error}") from error
    if holds_layers(names_in(files)):
        return load_layers(files, target)
    count = getattr(target.config.get_text_config(decoder=True), "num_mtp_layers", None)
    if name is None and count:
        return load_as_transformers(target)
    found = f"its config says {count} MTP layers" if count else "its config has no `num_mtp_layers`"
    raise ValueError(
        f"{where} holds no MTP layers that hf_specdec reads: there is no tensor `mtp.fc.weight`, and the target is "
        f"{type(target).__name__}; {found}"
    )


def _are_layers(name: str, target: PreTrainedModel) -> bool:
    """Whether a name, given as `assistant_model`, means MTP layers and not a draft model."""
    folder = Path(name)
    same = name == target.name_or_path or (
        folder.is_dir() and Path(target.name_or_path).is_dir() and folder.samefile(target.name_or_path)
    )
    if not same and not folder.is_dir():
        return False
    try:
        names = _names(name)
    except (OSError, ValueError):  # whoever loads it as a model will say so
        return False
    return holds_layers(names) if same else holds_nothing_else(names)


@functools.lru_cache(maxsize=16)
def _names(name: str) -> list[str]:
    """Those of the tensors of a local folder; of a Hub repository, those that may belong to MTP layers. Read once."""
    folder = Path(name)
    return names_in(folder.glob("*.safetensors") if folder.is_dir() else _files(name, None))


def _files(name: str, revision: str | None) -> list[Path]:
    """Those safetensors files of a local folder or Hub repository that may hold MTP layers.

    Raises:
        OSError: if a repository cannot be read, or has none.
    """
    folder = Path(name)
    if folder.is_dir():
        index = folder / INDEX
        every = sorted(file.name for file in folder.glob("*.safetensors"))
        found = [folder / file for file in files_with_layers(every, index if index.is_file() else None)]
    else:
        try:
            index_file = hub_file(name, INDEX, revision)
            wanted = files_with_layers(["model.safetensors"], index_file)
            found = [file for file in (hub_file(name, file, revision) for file in wanted) if file is not None]
        except LocalEntryNotFoundError as error:
            raise OSError(explain(error, name, revision)) from error
    return found
