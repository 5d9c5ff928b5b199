"""The model card of a pair: README.md with metadata for the Hub, usage and measurements.

Owns the text. `pair.py` decides where models come from and how they are saved.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .loading import hub_file
from .pair_file import FILE_NAME, ModelReference, PairConfig

# We overwrite cards that have this line; without it, the card belongs to the user.
MARK = "<!-- Written by hf_specdec. Remove this line to keep your changes when the pair is saved again. -->"


def write_card(
    folder: Path, name: str, config: PairConfig, licenses: dict[str, str | None], kind: str = "draft model"
) -> None:
    """Write README.md into `folder`, unless a card that is not ours exists.

    Args:
        folder: the folder of specdec_pair.json.
        name: the name that the usage example loads.
        config: the pair's config.
        licenses: the licenses of "target" and "draft"; None if unknown.
        kind: of the draft.
    """
    path = folder / "README.md"
    if not path.exists() or MARK in path.read_text(encoding="utf-8"):
        path.write_text(card_text(name, config, licenses, kind), encoding="utf-8")


def card_text(name: str, config: PairConfig, licenses: dict[str, str | None], kind: str = "draft model") -> str:
    references = {"target": config.target, "draft": config.draft}
    names = [r.name_or_path for r in references.values()]
    on_the_hub = [name for name in names if not name.startswith(".") and not Path(name).is_absolute()]
    license = licenses["target"] if licenses["target"] == licenses["draft"] else None
    data = ModelCardData(
        base_model=list(dict.fromkeys(on_the_hub)) or None,
        license=license,
        library_name="hf_specdec",
        pipeline_tag="text-generation",
        tags=["speculative-decoding"],
    )
    rows = [
        [
            role,
            f"`{_portable(r.name_or_path)}`",
            f"`{r.revision}`" if r.revision else "",
            licenses[role] or "not stated",
        ]
        for role, r in references.items()
    ]
    return f"""---
{data.to_yaml()}
---
{MARK}
# {Path(name).name}: a pair for speculative decoding

A target model and {_article(kind)} {kind} that makes its `generate()` faster, with unchanged output.
Loaded with `hf_specdec`.

{_table(["", "model", "revision", "license"], rows)}

## Use

```python
from hf_specdec import SpecPair

pair = SpecPair.from_pretrained({json.dumps(_portable(name))})
inputs = pair.tokenizer("Once upon a time", return_tensors="pt").to(pair.target.device)
ids = pair.generate(**inputs, max_new_tokens=64)
print(pair.tokenizer.decode(ids[0], skip_special_tokens=True))
```

`{FILE_NAME}` records where the models are{_recommendation(config)}

## Measured

{_measured(config.measured)}
"""


def _article(noun: str) -> str:
    return "an" if noun[:1] in "AEIOaeio" or noun.startswith("MTP") else "a"


def license_of(reference: ModelReference, **hub: Any) -> str | None:
    """The license in the model's own card, if the card can be read."""
    path: Path | None = Path(reference.name_or_path, "README.md")
    if not Path(reference.name_or_path).is_dir():
        try:
            path = hub_file(reference.name_or_path, "README.md", reference.revision, **hub)
        except OSError:
            return None
    return ModelCard.load(path, ignore_metadata_errors=True).data.license if path and path.is_file() else None


def _recommendation(config: PairConfig) -> str:
    if not config.speculate:
        return ", and that measurements found no speed-up: `pair.generate` decodes without the draft."
    if not config.recommended:
        return "."
    options = ", ".join(f"`{name}={value!r}`" for name, value in config.recommended.items())
    return f", and the defaults of `pair.generate`: {options}."


def _measured(measured: list[dict[str, Any]]) -> str:
    """A table with one line per measurement, and the commands below it."""
    if not measured:
        return "Nothing yet: `scripts/tune` measures a pair and writes the result here."
    columns = [name for name in dict.fromkeys(name for entry in measured for name in entry) if name != "command"]
    text = _table(columns, [[_cell(entry.get(name)) for name in columns] for entry in measured])
    commands = dict.fromkeys(_portable_command(str(entry["command"])) for entry in measured if "command" in entry)
    return text + ("\n\n```bash\n" + "\n".join(commands) + "\n```" if commands else "")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_cell(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else _portable(str(value)).replace("|", "\\|").replace("\n", " ")


def _portable(text: str) -> str:
    """The last part of an absolute path, because the rest only applies to the writer's machine; other text as is."""
    return Path(text).name if Path(text).is_absolute() else text


def _portable_command(command: str) -> str:
    """A command without absolute paths, including those in `--option=PATH`."""
    try:
        words = shlex.split(command)
    except ValueError:  # an apostrophe: not a command line, but still text
        words = command.split()
    parts = (word.rpartition("=") for word in words)
    return shlex.join(option + equals + _portable(value) for option, equals, value in parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
