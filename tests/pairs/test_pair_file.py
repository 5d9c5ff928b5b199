"""specdec_pair.json: files can be written and read back, and an unknown entry raises an error that names it."""

import json
from typing import Any

import pytest

from hf_specdec.pairs.pair_file import FILE_NAME, VERSION, ModelReference, PairConfig

FULL = PairConfig(
    ModelReference("Qwen/Qwen3-8B", "v1"),
    ModelReference("./draft"),
    speculate=False,
    recommended={"num_assistant_tokens": 7, "num_assistant_tokens_schedule": "constant"},
    tokenizer={"vocab_size": 96, "sha256": "ab"},
    measured=[{"date": "2026-11-24", "α": 0.7}],
)


@pytest.mark.parametrize("config", [FULL, PairConfig()], ids=["full", "defaults"])
def test_what_is_saved_is_loaded(config, tmp_path):
    path = config.save(tmp_path / "new" / "folder")
    assert path.name == FILE_NAME
    assert PairConfig.load(path.parent) == config


def test_the_file_is_for_people_too():
    text = FULL.to_json()
    assert text.startswith('{\n  "target": {\n    "name_or_path": "Qwen/Qwen3-8B"')
    assert '"α": 0.7' in text
    assert text.endswith("}\n")


def test_target_and_draft_are_enough():
    text = json.dumps({"version": VERSION, "target": {"name_or_path": "."}, "draft": {"name_or_path": "a/b"}})
    assert PairConfig.from_json(text) == PairConfig(ModelReference("."), ModelReference("a/b"))


def changed(**entries: Any) -> str:
    return json.dumps({**json.loads(FULL.to_json()), **entries})


BAD = {
    "not JSON": ("{", "HERE is not JSON: "),
    "a list": ("[]", "HERE must be an object with at least `version`, `target` and `draft`"),
    "no draft": ('{"version": 1, "target": {"name_or_path": "."}}', "at least `version`, `target` and `draft`"),
    "newer": (changed(version=2), "HERE has version 2, but this hf_specdec reads 1: update hf_specdec"),
    "unknown": (changed(gamma=5, beta=1), r"HERE has unknown entries \['beta', 'gamma'\]"),
    "bare name": (changed(target="a/b"), "`target` in HERE must be an object with `name_or_path`.*got 'a/b'"),
    "no name": (changed(draft={"revision": "v1"}), "`draft` in HERE must be an object with `name_or_path`"),
    "empty name": (changed(draft={"name_or_path": ""}), "`draft` in HERE must be an object with `name_or_path`"),
    "more than a name": (changed(draft={"name_or_path": "a", "sha": "b"}), "`draft` in HERE must be an object"),
    "revision": (changed(draft={"name_or_path": "a", "revision": 3}), "`draft` in HERE must be an object"),
    "speculate": (changed(speculate="no"), "`speculate` in HERE must be a bool, got 'no'"),
    "not an option": (
        changed(recommended={"num_assistant_tokens": 5, "custom_generate": "org/code", "trust_remote_code": True}),
        "A pair can recommend num_assistant_tokens, .*, not custom_generate, trust_remote_code",
    ),
    "recommended": (changed(recommended=[5]), r"`recommended` in HERE must be a dict, got \[5\]"),
    "tokenizer": (changed(tokenizer="ab"), "`tokenizer` in HERE must be a dict"),
    "measured": (changed(measured={}), "`measured` in HERE must be a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_understood_is_refused_by_name(case):
    text, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        PairConfig.from_json(text, "HERE")
