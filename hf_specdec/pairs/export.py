"""Exports of a pair: options for an inference server, or a Hub repository whose code calls hf_specdec.

Reads the models' configurations if it can, and writes text files; loads no weights and contacts no server.
"""

import json
import os
import pprint
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..loop.schedule import DEFAULT_GAMMA
from .catalogue import suggest_draft
from .export_heads import HeadKind, check_served, draft_length, head_kind, sglang_flags, vllm_config
from .loading import find_pair
from .pair_file import FILE_NAME, ModelReference, PairConfig

TEMPLATES = Path(__file__).parents[1] / "assets" / "export"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
GAMMA, SCHEDULE = "num_assistant_tokens", "num_assistant_tokens_schedule"


@dataclass(frozen=True)
class Exported:
    """The files that an export wrote, and notes about them (also in its README.md)."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def export_pair(pair: PairConfig, to: str, folder: str | Path) -> Exported:
    """Write a pair for use elsewhere.

    Args:
        pair: from `pair_to_export`.
        to: "vllm", "sglang" or "custom-generate".
        folder: output folder; created if needed.

    Raises:
        ValueError: if the pair cannot be exported that way.
        FileExistsError: if the folder has different files with the same names.
    """
    if to not in EXPORTERS:
        raise ValueError(f"Unknown export {to!r}; known: {', '.join(EXPORTERS)}")
    gamma = pair.recommended.get(GAMMA, DEFAULT_GAMMA)
    if not isinstance(gamma, int) or isinstance(gamma, bool) or gamma < 1:
        raise ValueError(f"`recommended` in the pair file must have `{GAMMA}` of at least 1, got {gamma!r}")
    files, notes = EXPORTERS[to](pair, gamma)
    if not pair.speculate:
        notes.insert(
            0, "Measurements found that speculation **does not pay** for this pair (`speculate` in its pair file)."
        )
    # A target's own folder has a README.md of its own.
    is_model = (Path(folder) / "config.json").is_file()
    name = f"{to}-head.md" if head_kind(pair) is not None and to in _SERVERS else f"{to}.md"
    files["custom_generate/README.md" if is_model else "README.md"] = _fill(name, pair, notes=_bullets(notes))
    return Exported(_write(files, Path(folder)), tuple(notes))


def pair_to_export(name: str | None, target: str | None, draft: str | None, revision: str | None = None) -> PairConfig:
    """The named pair, or the pair of `target` and `draft`, with its models by Hub id or absolute path.

    Args:
        name: a local folder or Hub repository with specdec_pair.json; or None.
        target: Hub id or local folder of the target, if `name` is None.
        draft: the same for the draft; by default the catalogue's.
        revision: revision of `name`, or of the target.

    Raises:
        ValueError, OSError: if there is no such pair.
    """
    if name is not None:
        if target or draft:
            raise ValueError("Expected a pair, or a target with its draft, got both")
        found = find_pair(name, revision)
        if found is None:
            raise ValueError(
                f"Expected {FILE_NAME} in {name}, found none that can be read: name a pair, or a target and a draft"
            )
        pair = replace(found.config, target=found.target, draft=found.draft)
    elif target:
        pair = PairConfig(ModelReference(target, revision), ModelReference(draft or suggest_draft(target).draft))
    else:
        raise ValueError("Expected a pair or a target, got neither")
    return replace(pair, target=_absolute(pair.target), draft=_absolute(pair.draft))


def _absolute(reference: ModelReference) -> ModelReference:
    path = Path(reference.name_or_path)
    if reference.gguf_file is not None:
        raise ValueError(
            f"{path} has its weights in GGUF ({reference.gguf_file}), which exports cannot name: save the pair with "
            "`SpecPair.save_pretrained(FOLDER, weights=True)`, which writes plain weights, and export that"
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"Expected a model in {path}, found no config.json")
        if reference.revision is not None:
            raise ValueError(f"{path} is a local folder, which has no revision {reference.revision!r}")
        return ModelReference(str(path.resolve()))
    if not HUB_ID.fullmatch(reference.name_or_path):
        raise ValueError(f"Expected a local folder or Hub id, got {reference.name_or_path!r}, which is neither")
    return reference


def _vllm(pair: PairConfig, gamma: int) -> tuple[dict[str, str], list[str]]:
    kind = head_kind(pair)
    sizes, notes = _compare_for_server(pair, kind)
    config: dict[str, Any]
    if kind is not None:
        config = vllm_config(kind, pair.draft, draft_length(kind, gamma, notes))
    else:
        config = {"method": "draft_model", "model": pair.draft.name_or_path, "num_speculative_tokens": gamma}
        if pair.draft.revision is not None:
            config["revision"] = pair.draft.revision
        if getattr(_config(pair.draft), "pard_token", None) is not None:
            config["parallel_drafting"] = True
    if len(set(sizes)) > 1:
        config["use_heterogeneous_vocab"] = True
        notes.append(
            f"The embeddings differ in size ({sizes[0]} and {sizes[1]}), which vLLM rejects for `draft_model` unless "
            "`use_heterogeneous_vocab` is set, as it is here; drafts are then greedy."
        )
    command = ["vllm", "serve", pair.target.name_or_path]
    if pair.target.revision is not None:
        command += ["--revision", pair.target.revision]
    command += ["--speculative-config", json.dumps(config)]
    return {"speculative_config.json": _json(config), "serve.sh": _script(command)}, notes


def _sglang(pair: PairConfig, gamma: int) -> tuple[dict[str, str], list[str]]:
    kind = head_kind(pair)
    sizes, notes = _compare_for_server(pair, kind)
    if len(set(sizes)) > 1:
        notes.append(
            f"The embeddings differ in size ({sizes[0]} and {sizes[1]}); whether SGLang accepts that was not checked."
        )
    flags: dict[str, Any] = {"model_path": pair.target.name_or_path, "revision": pair.target.revision}
    if kind is not None:
        flags |= sglang_flags(kind, pair.draft, draft_length(kind, gamma, notes))
    else:
        flags |= {
            "speculative_algorithm": "STANDALONE",
            "speculative_draft_model_path": pair.draft.name_or_path,
            "speculative_draft_model_revision": pair.draft.revision,
            "speculative_num_steps": gamma,
            "speculative_eagle_topk": 1,
            "speculative_num_draft_tokens": gamma + 1,
        }
    flags = {name: value for name, value in flags.items() if value is not None}
    command = ["python3", "-m", "sglang.launch_server"]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return {"flags.json": _json(flags), "serve.sh": _script(command)}, notes


def _custom_generate(pair: PairConfig, gamma: int) -> tuple[dict[str, str], list[str]]:
    kind = head_kind(pair)
    if kind is not None and kind.own:
        raise ValueError(
            "The draft is MTP layers in the target's own checkpoint: no code is needed, pass `use_mtp=True` to its "
            "`generate()`, or put it into its generation config"
        )
    _refuse_encoder_decoders(_config(pair.target), None if kind is not None else _config(pair.draft))
    place = _place_of_draft(pair)
    values = {"draft_place": f"{place!r}, {pair.draft.revision!r}", "recommended": pprint.pformat(pair.recommended)}
    is_file = kind is not None and kind.name != "assistant on the target's entries"  # else it is a transformers model
    values["load"] = _LOAD_HEAD if is_file else _LOAD_MODEL
    files = {
        "custom_generate/generate.py": _fill("generate.py.txt", pair, **values),
        "custom_generate/requirements.txt": (TEMPLATES / "requirements.txt").read_text(encoding="utf-8"),
    }
    notes = []
    if _folders(pair):
        notes.append("Models are local folders: put their Hub ids into README.md before sharing this.")
    if place.startswith("."):
        notes.append(
            f"The draft is looked for at `{place}`, relative to the folder that the target is loaded from: move them "
            "together."
        )
    return files, notes


# How generate.py loads the draft.
_LOAD_MODEL = "AutoModelForCausalLM.from_pretrained(name, **place, dtype=model.dtype)"
_LOAD_HEAD = 'hf_specdec.load_head(name, revision=place.get("revision"), dtype=model.dtype)'


def _place_of_draft(pair: PairConfig) -> str:
    """The draft's Hub id; or its folder relative to the target's, beginning with a dot.

    Not relative to the exported folder: transformers runs a copy of the code, which does not know where it came from. A
    target does.
    """
    target, draft = pair.target.name_or_path, pair.draft.name_or_path
    folders = _folders(pair)
    if draft not in folders:
        return draft
    if target not in folders:
        raise ValueError(
            f"The draft {draft} is a local folder, which generate.py finds from the target's, but the target {target} "
            "is on the Hub: name the draft by Hub id, or download the target "
            f"(`hf download {target} --local-dir FOLDER`) and export with --target FOLDER"
        )
    place = Path(os.path.relpath(draft, target)).as_posix()
    return place if place.startswith(".") else f"./{place}"


_SERVERS = ("vllm", "sglang")
EXPORTERS: dict[str, Callable[[PairConfig, int], tuple[dict[str, str], list[str]]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "custom-generate": _custom_generate,
}


def _compare_for_server(pair: PairConfig, kind: HeadKind | None) -> tuple[list[int], list[str]]:
    """The sizes of the two vocabularies, empty if they could not be read or the draft is a head; and notes about
    settings not exported."""
    if kind is not None:
        check_served(kind, pair.draft)
    configs = (_config(pair.target), _config(pair.draft)) if kind is None else (_config(pair.target),)
    _refuse_encoder_decoders(*configs)
    notes = []
    if _folders(pair):
        notes.append(f"{' and '.join(_folders(pair))}: local paths, so the command works only on this machine.")
    left_out = {k: v for k, v in pair.recommended.items() if k != GAMMA and (k, v) != (SCHEDULE, "constant")}
    if left_out:
        values = ", ".join(f"`{name}={value!r}`" for name, value in left_out.items())
        notes.append(f"Recommended for hf_specdec, but not exported: {values}.")
    if None in configs and kind is None:
        notes.append("The models' configurations could not be read here, so their vocabularies were not compared.")
    sizes = [config.get_text_config(decoder=True).vocab_size for config in configs if config is not None]
    return sizes if len(sizes) == 2 else [], notes


def _config(reference: ModelReference) -> PreTrainedConfig | None:
    """The model's configuration; None if it cannot be loaded, or needs custom code."""
    try:
        return AutoConfig.from_pretrained(reference.name_or_path, revision=reference.revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def _refuse_encoder_decoders(*configs: PreTrainedConfig | None) -> None:
    for config in configs:
        if config is not None and config.is_encoder_decoder:
            raise ValueError(f"Expected decoder-only models, got the encoder-decoder model type {config.model_type!r}")


def _folders(pair: PairConfig) -> list[str]:
    """The models that are local folders."""
    return [r.name_or_path for r in (pair.target, pair.draft) if Path(r.name_or_path).is_dir()]


def _fill(template: str, pair: PairConfig, **values: str) -> str:
    """Fill a template; models as Markdown, the target as arguments of `from_pretrained`, folders without a path."""
    on_the_hub = []
    for role, reference in (("target", pair.target), ("draft", pair.draft)):
        name, argument = Path(reference.name_or_path).name, f"PATH_OR_HUB_ID_OF_THE_{role.upper()}"
        if reference.name_or_path not in _folders(pair):
            name = argument = reference.name_or_path
            on_the_hub.append(name)
        revision = "" if reference.revision is None else f", revision={json.dumps(reference.revision)}"
        values |= {role: f"`{name}`", f"{role}_arguments": json.dumps(argument) + revision}
    values["base_models"] = "".join(["base_model:\n", *(f"- {name}\n" for name in on_the_hub)] if on_the_hub else [])
    text = Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)
    return text.rstrip("\n") + "\n"


def _bullets(notes: list[str]) -> str:
    return "\n".join(["Note:\n", *(f"- {note}" for note in notes)]) if notes else ""


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _script(command: list[str]) -> str:
    comment = "# Written by `hf-specdec export`; README.md says for which version."
    return f'#!/usr/bin/env bash\n{comment}\nexec {shlex.join(command)} "$@"\n'


def _write(files: dict[str, str], folder: Path) -> tuple[Path, ...]:
    paths = {folder / name: text for name, text in files.items()}
    others = [str(path) for path, text in paths.items() if path.exists() and path.read_text(encoding="utf-8") != text]
    if others:
        raise FileExistsError(f"{', '.join(others)} would be overwritten: choose another folder, or remove these files")
    for path, text in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if path.suffix == ".sh":
            path.chmod(0o755)
    return tuple(paths)
