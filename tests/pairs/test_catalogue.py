"""suggest_draft: the catalogue's pairs, the rules, and the answer if it knows no draft."""

import datetime
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from hf_specdec.pairs import catalogue
from hf_specdec.pairs.catalogue import Suggestion, read_catalogue, suggest_draft

FAMILIES: list[dict[str, Any]] = read_catalogue()["families"]
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["family"])


def models(family: dict[str, Any]) -> dict[str, float]:
    return {name: draft["billions"] for name, draft in family["drafts"].items()} | family["targets"]


def suggestions(family: dict[str, Any]) -> list[Suggestion]:
    """Drafts for the family's models that have one."""
    found = []
    for name in models(family):
        try:
            found.append(suggest_draft(name))
        except ValueError as error:
            assert "at most a third of its size" in str(error)
    return found


def test_the_catalogue_is_dated():
    date = datetime.date.fromisoformat(read_catalogue()["as_of"])
    assert datetime.date(2026, 1, 1) < date <= datetime.date.today()


def test_no_model_is_in_two_families():
    names = [name.lower() for family in FAMILIES for name in models(family)]
    assert len(names) == len(set(names))


@families
def test_every_entry_is_complete(family):
    assert family.keys() - {"pairs"} == {"family", "source", "note", "drafts", "targets"}
    url = urlsplit(family["source"])
    assert url.scheme == "https" and url.netloc and url.path.strip("/")
    for name, billions in models(family).items():
        assert name.count("/") == 1 and not set(name) & set(" \\:")
        assert 0.01 < billions < 1000
    for draft in family["drafts"].values():
        assert draft.keys() == {"billions", "license"} and draft["license"]


@families
def test_drafts_are_smaller_and_of_the_targets_family(family):
    found = suggestions(family)
    assert found
    for suggestion in found:
        assert suggestion.draft in family["drafts"]
        assert suggestion.draft != suggestion.target
        assert models(family)[suggestion.draft] < models(family)[suggestion.target]
        assert suggestion.license == family["drafts"][suggestion.draft]["license"]
        assert suggestion.source == family["source"] and suggestion.note == family["note"]


@families
def test_the_rule_chooses_the_largest_small_draft(family):
    if "pairs" in family:
        return
    sizes = models(family)
    for suggestion in suggestions(family):
        shares = {name: sizes[name] / sizes[suggestion.target] for name in family["drafts"]}
        small = [share for share in shares.values() if share <= 0.1]
        assert shares[suggestion.draft] == (max(small) if small else min(shares.values())) <= 1 / 3


@families
def test_every_draft_of_a_family_is_of_use(family):
    assert {suggestion.draft for suggestion in suggestions(family)} == family["drafts"].keys()


@pytest.mark.parametrize(
    ("target", "draft"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"),
        ("Qwen/Qwen3-32B", "Qwen/Qwen3-1.7B"),
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-0.6B"),  # 3.3 of its 30 billion parameters are active
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"),
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"),
        ("google/gemma-2-9b-it", "google/gemma-2-2b-it"),
        ("facebook/opt-6.7b", "facebook/opt-125m"),
        ("openai/whisper-large-v3", "distil-whisper/distil-large-v3"),
    ],
)
def test_known_pairs(target, draft):
    assert suggest_draft(target).draft == draft


def test_what_is_special_about_a_pair_is_in_its_note():
    assert "151936" in suggest_draft("Qwen/Qwen2.5-7B").note
    assert "Encoder-decoder" in suggest_draft("openai/whisper-small.en").note


def test_a_name_in_another_case_is_the_same_model():
    assert suggest_draft("qwen/QWEN3-8b") == suggest_draft("Qwen/Qwen3-8B")


def test_an_unknown_target_is_told_what_to_do():
    with pytest.raises(ValueError) as caught:
        suggest_draft("someone/Some-Model-7B")
    text = str(caught.value)
    for part in ("'someone/Some-Model-7B'", read_catalogue()["as_of"], "same family", "prompt_lookup_num_tokens=8"):
        assert part in text
    assert text.endswith("scripts/distill_draft --target someone/Some-Model-7B")
    assert "closest" not in text


def test_a_target_that_is_nearly_known_is_told_the_names():
    with pytest.raises(ValueError, match=r"the closest names there are Qwen/Qwen3-8B, .*5 to 20 times smaller"):
        suggest_draft("Qwen/Qwen3-8B-FP8")


@pytest.mark.parametrize("target", ["Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-360M", "distil-whisper/distil-large-v3"])
def test_a_known_target_without_a_smaller_draft_is_told_so(target):
    with pytest.raises(ValueError, match=rf"'{target}'.*at most a third of its size.*prompt_lookup_num_tokens"):
        suggest_draft(target)


# Local folders


def folder_with(config: str, folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config, encoding="utf-8")
    return str(folder)


def test_a_folder_of_the_hub_cache_is_known_by_its_repository(tmp_path):
    folder = folder_with("{}", tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "0123abc")
    assert suggest_draft(folder) == suggest_draft("Qwen/Qwen3-8B")


def test_a_folder_is_known_by_the_name_in_its_config(tmp_path):
    folder = folder_with(json.dumps({"_name_or_path": "Qwen/Qwen3-8B"}), tmp_path / "mine")
    suggestion = suggest_draft(folder)
    assert (suggestion.target, suggestion.draft) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B")
    assert f"{folder}/config.json records Qwen/Qwen3-8B" in suggestion.note


@pytest.mark.parametrize("config", ["{}", "[]", "not JSON", '{"_name_or_path": 7}', '{"_name_or_path": "/data/mine"}'])
def test_a_folder_without_a_known_name_is_unknown_whatever_it_is_called(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    folder_with(config, tmp_path / "Qwen" / "Qwen3-8B")
    with pytest.raises(ValueError, match="No draft is known for 'Qwen/Qwen3-8B'") as caught:
        suggest_draft("Qwen/Qwen3-8B")
    assert ("'/data/mine' is not in" if "/data" in config else "does not record its Hub id") in str(caught.value)


def test_the_catalogue_is_packaged():
    assert catalogue.CATALOGUE.is_relative_to(Path(catalogue.__file__).parents[1] / "assets")
