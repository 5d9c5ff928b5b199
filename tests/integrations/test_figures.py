"""What grammars and a harness's stopping criteria cost: tokens per target forward with them and without.

`./scripts/test -m clients -s tests/integrations/test_figures.py` prints the figures.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_specdec
from hf_specdec.pairs import pair

pytestmark = pytest.mark.clients

FILE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "size": {"type": "integer"},
        "active": {"type": "boolean"},
        "kind": {"enum": ["file", "directory", "link"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "size", "active", "kind", "tags"],
    "additionalProperties": False,
}
SHOTS = """TESTS = [
    {"name": "setup.py", "size": 1200, "active": true, "kind": "file", "tags": ["python", "build"]},
    {"name": "lib", "size": 0, "active": false, "kind": "directory", "tags": ["code"]},
    {"name": "latest", "size": 17, "active": true, "kind": "link", "tags": ["home", "shell"]},
    """
PROMPTS = [SHOTS, SHOTS.replace("TESTS", "data"), "import json\nexpected = [\n    ", "def f(x):\n    return "]
Make = Callable[[], dict[str, Any]]


@pytest.fixture(scope="module")
def demo() -> Any:
    target, draft, tokenizer = hf_specdec.demo_pair()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    return target, draft, tokenizer


def block_efficiency(demo: Any, prompts: list[str], new_tokens: int, make: Make) -> float:
    """τ with γ = 4, where tokens are vanilla's. `make` makes the other arguments, anew for each call."""
    target, draft, tokenizer = demo
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    expected = target.generate(**inputs, max_new_tokens=new_tokens, **make())
    stats = hf_specdec.SpeculationStats()
    way = {"strategy": "spec", "assistant_model": draft, "num_assistant_tokens": 4, "speculation_stats": stats}
    given = target.generate(**inputs, max_new_tokens=new_tokens, **way, **make())
    assert torch.equal(given, expected)
    return stats.block_efficiency


@pytest.mark.parametrize("rows", [1, 4])
def test_a_json_schema_costs_at_most_a_quarter_of_the_block_efficiency(demo, rows):
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor

    target, _, tokenizer = demo
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=target.config.vocab_size)
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(FILE), any_whitespace=False)

    class StepByStep(LogitsProcessor):
        """What it was before processors could go back."""

        is_pure = False

    def figure(*kinds: type) -> float:
        return block_efficiency(
            demo, PROMPTS[:rows], 100, lambda: {"logits_processor": [kind(compiled) for kind in kinds]}
        )

    free, grammar, stepwise = figure(), figure(LogitsProcessor), figure(StepByStep)
    print(f"{rows} rows: τ {free:.2f} free, {grammar:.2f} with the schema, {stepwise:.2f} if called step by step")
    assert grammar >= 0.75 * free > stepwise


@pytest.mark.parametrize("rows", [4, 8])
def test_a_harness_criterion_costs_at_most_five_percent(demo, rows):
    criteria = pytest.importorskip("lm_eval.models.utils_hf").stop_sequences_criteria
    lines = (Path(pair.DEMO_PAIR) / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["text"] for line in lines][1 :: 60 // rows][:rows]
    width = demo[2](prompts, padding=True, return_tensors="pt")["input_ids"].shape[1]
    free = block_efficiency(demo, prompts, 60, dict)
    for until in (["\0never"], ["\n\n", "def "]):
        stopped = block_efficiency(
            demo, prompts, 60, lambda u=until: {"stopping_criteria": criteria(demo[2], u, width, rows)}
        )
        print(f"{rows} rows: τ {free:.2f} without criteria, {stopped:.2f} until {until}")
        assert stopped >= 0.95 * free
