"""specdec_pair.json: which target and draft form a pair, and how they are best run together.

Owns the file's schema, and reading and writing it. Knows nothing about models.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FILE_NAME = "specdec_pair.json"
VERSION = 1


@dataclass(frozen=True)
class ModelReference:
    """Where one model of a pair is.

    Attributes:
        name_or_path: a Hub id, or a path relative to the folder of the pair file ("." is that folder).
        revision: a branch, tag or commit on the Hub.
    """

    name_or_path: str
    revision: str | None = None


@dataclass(frozen=True)
class PairConfig:
    """What a pair file says.

    Attributes:
        target, draft: where the models are.
        speculate: False where measurements showed that speculation does not pay: `pair.generate` then decodes without.
        recommended: options of `generate()` by their names there, such as `num_assistant_tokens`; what a call gives
            itself comes first.
        tokenizer: what was compared when the pair was made: `vocab_size` and `sha256` of the sorted vocabulary.
        measured: one entry per measurement: date, command, device, dtype, batch size and the figures.
        version: of this schema.
    """

    target: ModelReference
    draft: ModelReference
    speculate: bool = True
    recommended: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write the file into `folder`, which is made if need be."""
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
                f"{where} has version {content['version']!r}, this hf_specdec reads {VERSION}: update hf_specdec"
            )
        unknown = sorted(content.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"{where} has unknown entries {unknown}")
        target, draft = (ModelReference(**content.pop(name)) for name in ("target", "draft"))
        return cls(target, draft, **content)

    @classmethod
    def load(cls, folder: str | Path) -> "PairConfig":
        path = Path(folder) / FILE_NAME
        return cls.from_json(path.read_text(encoding="utf-8"), str(path))
