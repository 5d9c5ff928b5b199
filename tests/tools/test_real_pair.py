"""Every drafter with SmolLM2-135M-Instruct, greedy, on chat prompts. `./scripts/test -m real` downloads the model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hf_specdec import SuffixDrafter
from hf_specdec.drafters import Either
from hf_specdec.pairs import DEMO_PAIR, SpecPair
from hf_specdec.tools.arguments import Prompt
from hf_specdec.tools.chat_prompts import balanced, prompts
from hf_specdec.tools.distillation import first_layers
from hf_specdec.tools.lossless import BUG, IDENTICAL, Way, check_tokens
from hf_specdec.tools.smollm2 import smollm2_pair

pytestmark = pytest.mark.real
NEW_TOKENS = 24


def other_tokenizer(pair: SpecPair) -> dict[str, Any]:
    """The embedded target, of 8M parameters."""
    other = SpecPair.from_pretrained(str(DEMO_PAIR), dtype=pair.target.dtype)
    return {"assistant_model": other.target, "tokenizer": pair.tokenizer, "assistant_tokenizer": other.tokenizer}


DRAFTERS: dict[str, Callable[[SpecPair], dict[str, Any]]] = {
    "head": lambda pair: {"assistant_model": pair.draft},
    "head, γ = 4": lambda pair: {"assistant_model": pair.draft, "num_assistant_tokens": 4},
    "first layers": lambda pair: {"assistant_model": first_layers(pair.target, 20)},
    "other tokenizer": other_tokenizer,
    "look-up": lambda pair: {"prompt_lookup_num_tokens": 4},
    "suffix": lambda pair: {"assistant_model": SuffixDrafter()},
    "either": lambda pair: {"assistant_model": Either(first_layers(pair.target, 20), SuffixDrafter())},
    "early exit": lambda pair: {"assistant_early_exit": 25},
}


@dataclass(frozen=True)
class Own(Way):
    """A way by the name of its drafter in DRAFTERS."""

    def options(self, pair: SpecPair) -> dict[str, Any]:
        return {"strategy": "spec", **DRAFTERS[self.drafter](pair)}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest) -> SpecPair:
    return SpecPair(*smollm2_pair(request.param))


@pytest.fixture(scope="module")
def asked(pair: SpecPair) -> list[Prompt]:
    """12 held-out prompts in the chat template."""
    return [
        Prompt(
            pair.tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
            ),
            row["category"],
        )
        for row in balanced(prompts(held_out=True), 2)
    ]


@pytest.mark.parametrize("batch_size", [1, 12])
def test_every_drafter_leaves_the_text_as_it_is(pair: SpecPair, asked: list[Prompt], batch_size: int) -> None:
    """In bfloat16 up to ties, as `check_lossless` judges them."""
    ways: list[Way] = [Own(name, 0, batch_size) for name in DRAFTERS]
    for result in check_tokens(pair, asked, ways, NEW_TOKENS):
        verdicts = {verdict for _, verdict, _ in result.verdicts()}
        assert BUG not in verdicts, (str(result.way), result.verdicts())
        assert pair.target.dtype != torch.float32 or verdicts == {IDENTICAL}, str(result.way)
        assert result.stats.committed_tokens > 12 and result.stats.drafted_tokens > 0, str(result.way)
        assert result.stats.accepted_tokens > 0 or result.way.drafter == "first layers", str(result.way)
