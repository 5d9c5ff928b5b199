"""Pure processors are called as rarely as what they read of the tokens allows, and only for the rows that need it."""

from typing import Any

import pytest
import torch
from conftest import VOCAB, make_prompts
from test_processors import ARGUMENTS, NEED_EOS, built_processors, new_tokens
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from hf_specdec import SpeculationStats
from hf_specdec.sampling import prefixes
from hf_specdec.sampling.context import Context
from hf_specdec.sampling.prefixes import Positions, process
from hf_specdec.sampling.processors import BLIND, PURE

PER_ROW = {"EncoderRepetitionPenaltyLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor"}
BY_LENGTH = {"ExponentialDecayLengthPenalty", "WhisperTimeStampLogitsProcessor"}
FEW = sorted({kind.__name__ for kind in PURE} - PER_ROW - BY_LENGTH - {"ForcedBOSTokenLogitsProcessor"})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Size]]:
    """By class, the shape of the scores in each call."""
    seen: dict[str, list[torch.Size]] = {}

    def watch(kind: Any) -> None:
        original = kind.__call__

        def call(self: Any, input_ids: Tensor, scores: Tensor) -> Tensor:
            assert len(input_ids) == len(scores)
            seen.setdefault(type(self).__name__, []).append(scores.shape)
            return original(self, input_ids, scores)

        monkeypatch.setattr(kind, "__call__", call)

    for kind in PURE:
        if "__call__" in vars(kind):
            watch(kind)
    return seen


@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("name", FEW)
def test_calls_are_at_most_one_and_a_half_per_column(llama_pair, name, batch, calls):
    """Of those committed and those drafted. Rows are at different columns after a few iterations."""
    (target, draft), inputs = llama_pair, make_prompts(batch)
    plain = new_tokens(target, inputs)
    kwargs = {"eos_token_id": NEED_EOS[name](plain)} if name in NEED_EOS else {}
    kwargs |= ARGUMENTS[name](plain)
    kwargs = {**inputs, "max_new_tokens": 40, **kwargs}
    expected = target.generate(**kwargs)
    vanillas = len(calls.pop(name))
    stats = SpeculationStats()
    way = {"strategy": "spec", "assistant_model": draft, "num_assistant_tokens": 5, "speculation_stats": stats}
    assert target.generate(**kwargs, **way).tolist() == expected.tolist()
    assert batch == 1 or len({row.row_iterations for row in stats.per_row}) > 1
    assert len(calls[name]) <= 1.5 * (vanillas + stats.draft_forwards)
    assert max(shape[0] for shape in calls[name]) <= batch * 6


@pytest.mark.parametrize("name", sorted({name for name in ARGUMENTS if name.split(",")[0] in FEW}))
def test_one_call_for_many_positions_gives_what_a_call_for_each_gives(small_pair, name):
    """Also where prefixes are shorter than what a processor looks for."""
    target, inputs = small_pair[0], make_prompts(3)
    plain = new_tokens(target, inputs)
    built = built_processors(target, inputs, eos_token_id=9, **ARGUMENTS[name](plain))
    processor = next(p for p in built if type(p).__name__ == name.split(",")[0])
    generator = torch.Generator().manual_seed(3)
    for width in (1, 2, 3, 14):
        context = Context(torch.randint(2, 9, (3, width), generator=generator), [0, 0, 0], 60, 0)
        context.append([[5, 6, 7, 5], [4], [3, 3, 3, 3, 3, 3, 3, 8]])
        context.rows = [2, 0]
        context.write_drafts(torch.randint(2, 9, (2, 5), generator=generator))
        positions = Positions.after(context, 0, 6)
        scores = torch.randn(12, VOCAB, generator=generator)
        given = process(processor, positions, scores)
        for i, (row, end) in enumerate(zip(positions.rows, positions.ends)):
            prefix, before = context.tokens[:, :end], torch.zeros(3, VOCAB)
            before[row] = scores[i]
            wanted = processor(prefix, before)[row]
            torch.testing.assert_close(given[i], wanted, rtol=0, atol=1e-6, msg=f"{width} {row} {end}")


def test_a_penalty_that_skips_the_prompt_skips_it_in_all_rows(llama_pair):
    """By a number, or by one for each row of the batch."""
    (target, draft), inputs = llama_pair, make_prompts(3)
    for ignored in (14, torch.tensor([3, 14, 9])):

        def processors(ignored: Any = ignored) -> LogitsProcessorList:
            return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=ignored)])

        expected = target.generate(**inputs, max_new_tokens=20, logits_processor=processors())
        way = {"strategy": "spec", "assistant_model": draft, "num_assistant_tokens": 4}
        given = target.generate(**inputs, max_new_tokens=20, logits_processor=processors(), **way)
        assert given.tolist() == expected.tolist()


def test_every_pure_processor_is_of_a_known_kind_or_called_by_length() -> None:
    kinds = {*prefixes._BY_NUMBER, *prefixes._BY_LAST, *prefixes._OF_BATCH, *prefixes._SET}
    assert kinds <= PURE | BLIND
    assert {kind.__name__ for kind in PURE - kinds} == {"WhisperTimeStampLogitsProcessor"}
