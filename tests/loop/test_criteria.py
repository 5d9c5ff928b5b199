"""Criteria of the user's are called as in vanilla, but rows need not wait for them: rows that were ahead are cut.

A drafter that knows what the target says makes some rows faster than others.
"""

from typing import Any

import pytest
import torch
from conftest import VOCAB, make_pair, make_prompts
from test_stopping import CRITERIA, LastToken, NthCall, Recording
from torch import Tensor
from transformers import StoppingCriteria

from hf_specdec import Draft, Drafter, SpeculationStats, Trace
from hf_specdec.loop import invariants
from hf_specdec.sampling.context import Context

WIDTH, NEW, GAMMA = 14, 40, 4


class Oracle(Drafter):
    """Drafts what the target will say in the `fast` rows, and something else in the others."""

    def __init__(self, sequences: Tensor, fast: list[int]):
        self.sequences = torch.nn.functional.pad(sequences, (0, GAMMA))
        self.fast = fast

    def propose(self, context: Context, max_tokens: int) -> Draft:
        lines = [self.sequences[row, context.ends[row] :][:max_tokens] for row in context.rows]
        wrong = [0 if row in self.fast else 1 for row in context.rows]
        return Draft((torch.stack(lines) + torch.tensor(wrong)[:, None]) % VOCAB)


class Stops(StoppingCriteria):
    """Ends rows after a number of new tokens each."""

    def __init__(self, after: list[int]):
        self.after = torch.tensor(after)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - WIDTH >= self.after


def rare(sequences: Tensor) -> int:
    """A token that no row generates."""
    return min(set(range(2, 60)) - set(sequences.flatten().tolist()))


@pytest.fixture(scope="module", params=["llama", "mistral-sliding", "gemma2", "gpt2"])
def target(request: pytest.FixtureRequest) -> Any:
    """Dense, with sliding windows, with both kinds of layers, and with learned positions."""
    return make_pair(request.param)[0]


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("after", [[30, 5, 9], [5, 30, 1], [12, 12, 12], [40, 2, 40]])
def test_rows_that_were_ahead_end_where_vanilla_ends_them(target, after, eos, monkeypatch):
    """With everything that `generate()` returns. In vanilla, ended rows have records of padding; ours are zero."""
    monkeypatch.setattr(invariants, "ENABLED", True)
    inputs = make_prompts(3, seed=3)
    whole = target.generate(**inputs, max_new_tokens=NEW)
    outputs = ("scores", "logits", "hidden_states", "attentions")
    kwargs = {
        **inputs,
        "max_new_tokens": NEW,
        "return_dict_in_generate": True,
        "eos_token_id": rare(whole) if eos else None,
    }
    kwargs |= {f"output_{name}": True for name in outputs}
    target.set_attn_implementation("eager")
    expected = target.generate(**kwargs, stopping_criteria=[Stops(after)])
    stats, trace = SpeculationStats(), Trace()
    given = target.generate(
        **kwargs,
        stopping_criteria=[Stops(after)],
        strategy="spec",
        assistant_model=Oracle(whole, fast=[1, 2]),
        num_assistant_tokens=GAMMA,
        speculation_stats=stats,
        speculation_trace=trace,
    )
    assert given.sequences.tolist() == expected.sequences.tolist()
    steps = expected.sequences.shape[1] - WIDTH
    ends = [min(n, steps) for n in after] if eos else [steps] * 3
    assert [row.committed_tokens for row in stats.per_row] == ends
    assert stats.committed_tokens == sum(ends)
    assert ("taken back" in trace.to_text()) == any(iteration.withdrawn for iteration in trace.iterations)
    assert "taken back" in trace.to_text() or after != [30, 5, 9] or not eos
    for name in ("scores", "logits"):
        for step, (ours, theirs) in enumerate(zip(getattr(given, name), getattr(expected, name), strict=True)):
            for row, end in enumerate(ends):
                wanted = theirs[row] if step < end else torch.zeros_like(theirs[row])
                torch.testing.assert_close(ours[row], wanted, rtol=1e-4, atol=1e-4)
    for name in ("hidden_states", "attentions"):
        for step, (ours, theirs) in enumerate(zip(getattr(given, name), getattr(expected, name), strict=True)):
            for mine, other in zip(ours, theirs, strict=True):
                for row, end in enumerate(ends):
                    wanted = other[row, ..., -1, :] if step < end else torch.zeros_like(other[row, ..., -1, :])
                    torch.testing.assert_close(mine[row, ..., -1, :], wanted, rtol=1e-4, atol=1e-4)
    assert_same_caches(given, expected, inputs)


@pytest.mark.parametrize("after", [[25, 20, 23], [25, 18, 140]])
def test_caches_handed_back_have_what_windows_need_where_rows_were_cut(target, after):
    """Without attentions, layers with a window keep that and some slack, and rows were ahead by more."""
    inputs = make_prompts(3, seed=3)
    whole = target.generate(**inputs, max_new_tokens=140)
    kwargs = {**inputs, "max_new_tokens": 140, "return_dict_in_generate": True, "eos_token_id": rare(whole)}
    expected = target.generate(**kwargs, stopping_criteria=[Stops(after)])
    way = {"strategy": "spec", "assistant_model": Oracle(whole, fast=[1, 2]), "num_assistant_tokens": GAMMA}
    given = target.generate(**kwargs, **way, stopping_criteria=[Stops(after)])
    assert given.sequences.tolist() == expected.sequences.tolist()
    assert_same_caches(given, expected, inputs)


def assert_same_caches(given: Any, expected: Any, inputs: dict[str, Tensor]) -> None:
    """The columns of each row that vanilla does not take for padding."""
    columns = expected.sequences.shape[1] - 1
    for mine, other in zip(given.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for row, first in enumerate((inputs["attention_mask"] == 0).sum(dim=1).tolist()):
            held = min(mine.keys.shape[2], columns - first)
            assert mine.keys.shape == other.keys.shape
            torch.testing.assert_close(mine.keys[row, :, -held:], other.keys[row, :, -held:], rtol=1e-4, atol=1e-4)


def test_a_row_may_have_left_by_its_eos_before_a_criterion_ends_it_earlier(small_pair):
    target, inputs = small_pair[0], make_prompts(2, seed=4)
    whole = target.generate(**inputs, max_new_tokens=NEW)
    new = whole[1, WIDTH:].tolist()
    eos = next(
        token for i, token in enumerate(new) if i >= 12 and new.index(token) == i and token not in whole[0, WIDTH:]
    )
    kwargs = {**inputs, "max_new_tokens": NEW, "eos_token_id": eos}
    for after in ([30, 5], [30, 20]):
        expected = target.generate(**kwargs, stopping_criteria=[Stops(after)])
        stats = SpeculationStats()
        way = {"strategy": "spec", "assistant_model": Oracle(whole, fast=[1]), "num_assistant_tokens": GAMMA}
        given = target.generate(**kwargs, **way, stopping_criteria=[Stops(after)], speculation_stats=stats)
        assert given.tolist() == expected.tolist()
        assert stats.per_row[1].committed_tokens == min(after[1], new.index(eos) + 1)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("name", [*CRITERIA, "two"])
@pytest.mark.parametrize("fast", [[0], [1], [0, 2], []])
def test_criteria_that_count_or_look_at_other_rows_see_what_they_see_in_vanilla(small_pair, name, fast, eos):
    target, inputs = small_pair[0], make_prompts(3, seed=4)
    whole = target.generate(**inputs, max_new_tokens=18)
    new = whole[:, WIDTH:].tolist()

    def criteria() -> list[StoppingCriteria]:
        return [Recording(), *([NthCall(9), LastToken([new[1][6]])] if name == "two" else [CRITERIA[name](new)])]

    kwargs = {**inputs, "max_new_tokens": 18, "eos_token_id": new[-1][10] if eos else None}
    theirs, ours = criteria(), criteria()
    expected = target.generate(**kwargs, stopping_criteria=theirs)
    way = {"strategy": "spec", "assistant_model": Oracle(whole, fast), "num_assistant_tokens": GAMMA}
    assert target.generate(**kwargs, **way, stopping_criteria=ours).tolist() == expected.tolist()
    assert [ids for ids, _ in ours[0].shown] == [ids for ids, _ in theirs[0].shown]


def test_a_criterion_costs_no_forward(small_pair):
    target, inputs = small_pair[0], make_prompts(4, seed=4)
    forwards = []
    for criteria in ([], [Recording()]):
        stats = SpeculationStats()
        target.generate(
            **inputs,
            max_new_tokens=NEW,
            strategy="spec",
            assistant_model=small_pair[1],
            num_assistant_tokens=GAMMA,
            stopping_criteria=criteria,
            speculation_stats=stats,
        )
        forwards.append((stats.target_forwards, stats.committed_tokens))
    assert forwards[0] == forwards[1]


def test_a_streamer_is_given_nothing_that_is_taken_back(small_pair):
    class Streamer:
        def __init__(self) -> None:
            self.columns: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.columns.append(value.tolist())

        def end(self) -> None:
            pass

    target, inputs = small_pair[0], make_prompts(1, seed=4)
    whole = target.generate(**inputs, max_new_tokens=NEW)
    for after in range(1, 12):
        expected, given = Streamer(), Streamer()
        kwargs = {**inputs, "max_new_tokens": NEW, "eos_token_id": rare(whole)}
        target.generate(**kwargs, streamer=expected, stopping_criteria=[Stops([after])])
        way = {"strategy": "spec", "assistant_model": Oracle(whole, fast=[0]), "num_assistant_tokens": GAMMA}
        target.generate(**kwargs, **way, streamer=given, stopping_criteria=[Stops([after])])
        assert given.columns == expected.columns
