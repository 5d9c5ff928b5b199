"""specdec_pair.json: which target and draft form a pair, and the best options for them.

Owns the file's schema, reading and writing. Knows nothing about models.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..options import OPTION_NAMES

FILE_NAME = "specdec_pair.json"
VERSION = 1


@dataclass(frozen=True)
class ModelReference:
    """Where one model of a pair is.

    Attributes:
        name_or_path: a Hub id, or a folder relative to the pair file's ("." is that folder, "./draft" is inside it; a
            name without a dot is a folder if that folder exists, else a Hub id).
        revision: a branch, tag or commit on the Hub.
        gguf_file: the file there that holds the weights, if they are in GGUF.
    """

    name_or_path: str
    revision: str | None = None
    gguf_file: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry in a pair file; without `gguf_file` if that is None, so older versions can read it."""
        return {name: value for name, value in asdict(self).items() if name != "gguf_file" or value is not None}


@dataclass(frozen=True)
class PairConfig:
    """The contents of a pair file.

    Attributes:
        target: where the target is.
        draft: where the draft is.
        speculate: False if measurements showed that speculation does not pay: `pair.generate` then decodes without it.
        recommended: speculation options by their names in `generate()`, such as `num_assistant_tokens`. Others raise an
            error: an untrusted file must not set other options of `generate()`. Options of a call take precedence.
        tokenizer: the tokenizer when the pair was made: `vocab_size`, and `sha256` of the sorted vocabulary.
        measured: one entry per measurement: date, command, device, dtype, batch size and the figures.
        version: version of this schema.
    """

    target: ModelReference = ModelReference("./target")
    draft: ModelReference = ModelReference("./draft")
    speculate: bool = True
    recommended: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    version: int = VERSION

    def __post_init__(self) -> None:
        unknown = sorted(set(self.recommended) - set(OPTION_NAMES))
        if unknown:
            raise ValueError(f"A pair can recommend {', '.join(OPTION_NAMES)}, not {', '.join(unknown)}")

    def to_json(self) -> str:
        """The text of the pair file."""
        models = {"target": self.target.to_dict(), "draft": self.draft.to_dict()}
        return json.dumps(asdict(self) | models, indent=2, ensure_ascii=False) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write the file into `folder`, which is created if needed."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def from_json(cls, text: str, where: str = FILE_NAME) -> "PairConfig":
        """Parse a pair file; `where` names it in errors."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(content, dict) or not {"version", "target", "draft"} <= content.keys():
            raise ValueError(f"{where} must be an object with at least `version`, `target` and `draft`")
        if content["version"] != VERSION:
            raise ValueError(
                f"{where} has version {content['version']!r}, but this hf_specdec reads {VERSION}: update hf_specdec"
            )
        unknown = sorted(content.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{where} has unknown entries {unknown}")
        kinds = {"speculate": bool, "recommended": dict, "tokenizer": dict, "measured": list}
        for name, kind in kinds.items():
            if not isinstance(content.get(name, kind()), kind):
                raise ValueError(f"`{name}` in {where} must be a {kind.__name__}, got {content[name]!r}")
        target, draft = (_reference(content.pop(name), f"`{name}` in {where}") for name in ("target", "draft"))
        return cls(target, draft, **content)

    @classmethod
    def load(cls, folder: str | Path) -> "PairConfig":
        """Read the pair file in `folder`."""
        path = Path(folder) / FILE_NAME
        return cls.from_json(path.read_text(encoding="utf-8"), str(path))


def _reference(content: Any, where: str) -> ModelReference:
    entries = content if isinstance(content, dict) else {}
    known = {f.name for f in fields(ModelReference)}
    texts = all(value is None or isinstance(value, str) for value in entries.values())
    if not entries.keys() <= known or not texts or not entries.get("name_or_path"):
        raise ValueError(
            f"{where} must be an object with `name_or_path` and, at most, `revision` and `gguf_file`, got {content!r}"
        )
    return ModelReference(**entries)
