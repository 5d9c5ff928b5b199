"""Which public draft suits a public target: a dated catalogue of families whose models share a tokenizer, and of heads.

The facts are in assets/catalogue.json, with their sources; its `rule` describes what `_choose` does. Nothing is loaded
or downloaded here. Loading a pair checks whether the two tokenizers really agree.
"""

import difflib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).parents[1] / "assets" / "catalogue.json"
SMALL, TOO_LARGE = 1 / 10, 1 / 3  # of the target's parameters per token


@dataclass(frozen=True)
class Suggestion:
    """A draft for a target.

    Attributes:
        target: Hub id of the target, as the catalogue spells it.
        draft: Hub id of the draft.
        license: the draft's license, as its card states it.
        source: URL of the card, announcement or documentation that the pairing rests on.
        note: further remarks; may be empty.
    """

    target: str
    draft: str
    license: str
    source: str
    note: str = ""


def suggest_draft(target: str) -> Suggestion:
    """The draft that the catalogue pairs with `target`.

    Args:
        target: a Hub id, in upper or lower case; or a local folder, identified by the Hub id of the cache folder around
            it, or of its config.json (written by transformers before 5; for a fine-tuned model, the id of its base).

    Raises:
        ValueError: if the catalogue has no draft for it; the message lists alternatives.
    """
    name, how = _hub_id(str(target))
    for family in read_catalogue()["families"]:
        known = {model.lower(): model for model in _models(family)}
        if name.lower() in known:
            target_id = known[name.lower()]
            draft = _choose(family, target_id)
            if draft is None:
                raise ValueError(_no_smaller_draft(family, target_id))
            notes = (part for part in (how, family["note"]) if part)
            license = family["drafts"][draft]["license"]
            return Suggestion(target_id, draft, license, family["source"], " ".join(notes))
    raise ValueError(_unknown(str(target), name))


def suggest_heads(target: str) -> tuple[Suggestion, ...]:
    """The public heads on `target`'s hidden states that the catalogue knows; each one's `note` begins with its kind.

    Args:
        target: as for `suggest_draft`.
    """
    name, how = _hub_id(str(target))
    return tuple(
        Suggestion(
            head["target"], head["head"], head["license"], head["source"], " ".join(filter(None, _notes(head, how)))
        )
        for head in read_catalogue()["heads"]
        if head["target"].lower() == name.lower()
    )


def _notes(head: dict[str, str], how: str) -> tuple[str, ...]:
    return f"{head['kind']}.", head["note"], how


@functools.cache
def read_catalogue() -> dict[str, Any]:
    """The catalogue as stored on disk: `as_of` (ISO date), `rule`, `left_out` and `families`; the same of `heads`."""
    content: dict[str, Any] = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return content


def _models(family: dict[str, Any]) -> dict[str, float]:
    """Billions of parameters per token, by model of the family."""
    return {name: draft["billions"] for name, draft in family["drafts"].items()} | family["targets"]


def _choose(family: dict[str, Any], target: str) -> str | None:
    """The draft for a target of this family; None if all drafts are too large."""
    if "pairs" in family:
        pairs: dict[str, str] = family["pairs"]
        return pairs.get(target)
    size = _models(family)[target]
    drafts = {name: draft["billions"] / size for name, draft in family["drafts"].items()}
    small = [name for name, share in drafts.items() if share <= SMALL]
    if small:
        return max(small, key=drafts.__getitem__)
    smallest = min(drafts, key=drafts.__getitem__)
    return smallest if drafts[smallest] <= TOO_LARGE else None


def _hub_id(target: str) -> tuple[str, str]:
    """The Hub id for a name, empty if a folder does not record one; and a note on how it was found."""
    folder = Path(target)
    if not folder.is_dir():
        return target, ""
    for part in reversed(folder.resolve().parts):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/"), ""
    config = folder / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        recorded = content.get("_name_or_path") if isinstance(content, dict) else None
    except (OSError, ValueError):
        recorded = None
    if not isinstance(recorded, str):
        return "", ""
    return recorded, f"{config} records {recorded}; a fine-tuned model accepts fewer drafts."


def _unknown(target: str, name: str) -> str:
    catalogue = read_catalogue()
    models = [model for family in catalogue["families"] for model in _models(family)]
    lowered = {model.lower(): model for model in models}
    close = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.75)]
    did_you_mean = f"; the closest names there are {', '.join(close)}" if close else ""
    what = "it" if name == target else repr(name) if name else "a local folder that does not record its Hub id"
    return (
        f"No draft is known for {target!r}: {what} is not in the catalogue of {catalogue['as_of']}{did_you_mean}. "
        f"Pass a model of the same family that is 5 to 20 times smaller as the draft; {_without_a_family(target)}"
    )


def _no_smaller_draft(family: dict[str, Any], target: str) -> str:
    return (
        f"No draft is known for {target!r}: in its family ({family['family']}), the catalogue of "
        f"{read_catalogue()['as_of']} recommends no draft that has at most a third of its size. Instead, "
        + _without_a_family(target)
    )


def _without_a_family(target: str) -> str:
    if heads := suggest_heads(target):
        return f"pass a head on its hidden states as `assistant_model`, such as {heads[0].draft} ({heads[0].license})"
    return (
        "draft without a model, from the prompt (`prompt_lookup_num_tokens=8`); or train a draft on your own text: "
        f"scripts/distill_draft --target {target}"
    )
