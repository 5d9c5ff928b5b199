"""The output ends exactly where vanilla `generate()` would end, wherever in a block that token is."""

import copy
import itertools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import VOCAB, assert_lossless, make_prompts, ways_to_draft
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import stopping_criteria

from hf_specdec import SpeculationStats

WIDTH, NEW = 14, 18
Rows = list[list[int]]


def prompts(batch: int) -> dict[str, Any]:
    """Uneven prompts; the first has a long continuation without repetitions."""
    return make_prompts(batch, seed=4)


def new_tokens(target: Any, inputs: dict[str, Any], **kwargs: Any) -> Rows:
    """Vanilla's new tokens."""
    return target.generate(**inputs, **{"max_new_tokens": NEW, **kwargs})[:, inputs["input_ids"].shape[1] :].tolist()


def some_ends(new: Rows, at: int = 5) -> list[int]:
    """Tokens that end each row after a different number of tokens: the first at `at`, the next 3 later..."""
    return [row[min(at + 3 * i, NEW - 2)] for i, row in enumerate(new)]


# Ends of a sequence


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gamma", [1, 5])
def test_eos_ends_a_row_at_every_position_of_a_block(small_pair, batch, gamma):
    """The target drafts for itself, so that every draft is accepted and blocks are as long as possible."""
    target, inputs = small_pair[0], prompts(batch)
    new = new_tokens(target, inputs)
    steps = {step % (gamma + 1): step for step in reversed(range(NEW)) if new[0].index(new[0][step]) == step}
    assert set(steps) == set(range(gamma + 1))
    for step in steps.values():
        arguments = {"max_new_tokens": step + 4, "eos_token_id": new[0][step]}
        expected = target.generate(**inputs, **arguments)
        assert (expected[0, WIDTH + step + 1 :] == 0).all()
        way = {"strategy": "spec", "assistant_model": target, "num_assistant_tokens": gamma}
        assert target.generate(**inputs, **arguments, **way).tolist() == expected.tolist(), step


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("several", [False, True])
def test_rows_end_at_their_own_eos(small_pair, batch, several):
    inputs = prompts(batch)
    eos = some_ends(new_tokens(small_pair[0], inputs))
    arguments = {"max_new_tokens": NEW, "eos_token_id": eos if several else eos[0]}
    expected = assert_lossless(small_pair, inputs, lambda: dict(arguments))[:, WIDTH:]
    ends = [row.index(0) if 0 in row else len(row) for row in expected.tolist()]
    assert len(set(ends)) == batch if several else expected.shape[1] < NEW or batch > 1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_output_has_max_new_tokens(small_pair, batch, count, eos):
    inputs = prompts(batch)
    ends = some_ends(new_tokens(small_pair[0], inputs), at=3) if eos else None
    for arguments in ({"max_new_tokens": count}, {"max_length": WIDTH + count}):
        expected = assert_lossless(small_pair, inputs, lambda a=arguments: {"eos_token_id": ends, **a})
        assert eos or expected.shape[1] == WIDTH + count


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("arguments", [{"min_new_tokens": 7}, {"min_length": WIDTH + 7}, {"min_new_tokens": 10}])
def test_no_row_ends_before_its_minimum(small_pair, batch, arguments):
    inputs = prompts(batch)
    ends = some_ends(new_tokens(small_pair[0], inputs), at=2)
    expected = assert_lossless(small_pair, inputs, lambda: {"max_new_tokens": NEW, "eos_token_id": ends, **arguments})
    assert expected.shape[1] > WIDTH + 7


@pytest.mark.parametrize("pad", [5, "eos"])
def test_ended_rows_are_padded_as_vanilla_pads_them(small_pair, pad):
    inputs = prompts(3)
    eos = some_ends(new_tokens(small_pair[0], inputs))[0]
    pad = eos if pad == "eos" else pad
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
    arguments = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": pad}
    expected = assert_lossless(small_pair, inputs, lambda: dict(arguments))
    assert expected[0, -1] == pad


def test_a_model_whose_padding_is_its_eos_decodes_as_in_vanilla(small_pair):
    """The model's own generation config defines it, and the prompts contain that token in places."""
    target, inputs = copy.deepcopy(small_pair[0]), prompts(3)
    eos = some_ends(new_tokens(target, inputs))[0]
    target.generation_config.eos_token_id = target.generation_config.pad_token_id = eos
    inputs["input_ids"][1:, -3] = eos
    inputs["input_ids"][inputs["attention_mask"] == 0] = eos
    expected = assert_lossless((target, small_pair[1]), inputs, lambda: {"max_new_tokens": NEW})
    assert expected[0, -2:].tolist() == [eos, eos]


# Stop strings


def a_stop_string(tokenizer: Any, new: Rows, step: int = 6) -> str:
    """It begins inside one token of the first row and ends inside the next but one."""
    before, within, last = tokenizer.convert_ids_to_tokens(new[0][step - 2 : step + 1])
    return before[-1] + within + last[0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("where", ["argument", "config", "model", "criterion"])
def test_stop_strings_end_a_row_inside_a_block(small_pair, tokenizer, batch, where):
    target, inputs = copy.deepcopy(small_pair[0]), prompts(batch)
    new = new_tokens(target, inputs)
    strings = [a_stop_string(tokenizer, [row], 6 + i) for i, row in enumerate(new)]
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": NEW}
    if where == "argument":
        arguments["stop_strings"] = strings
    elif where == "config":
        arguments = {"tokenizer": tokenizer}
        config = GenerationConfig(stop_strings=strings, max_new_tokens=NEW, pad_token_id=0)
        arguments["generation_config"] = config
    elif where == "model":
        target.generation_config.stop_strings = strings
    else:
        arguments["stopping_criteria"] = StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])
    expected = assert_lossless((target, small_pair[1]), inputs, lambda: dict(arguments))[:, WIDTH:].tolist()
    assert len(expected[0]) < NEW
    text = tokenizer.decode(expected[0])
    assert strings[0] in text and (batch > 1 or strings[0] not in text[:-2])
    if where == "config":
        assert config.stop_strings == strings
    elif where == "model":
        assert target.generation_config.stop_strings == strings


@pytest.mark.parametrize("batch", [1, 3])
def test_stop_strings_and_eos_end_rows_whichever_comes_first(small_pair, tokenizer, batch):
    inputs = prompts(batch)
    new = new_tokens(small_pair[0], inputs)
    for step in (4, 9):
        arguments = {"stop_strings": a_stop_string(tokenizer, new, step), "eos_token_id": new[0][6]}
        arguments |= {"tokenizer": tokenizer, "max_new_tokens": NEW}
        expected = assert_lossless(small_pair, inputs, lambda a=arguments: dict(a))
        assert int((expected[0, WIDTH:] != 0).sum()) == min(step, 6) + 1


def test_a_stop_string_of_the_call_beats_that_of_the_model(small_pair, tokenizer):
    target, inputs = copy.deepcopy(small_pair[0]), prompts(1)
    new = new_tokens(target, inputs)
    target.generation_config.stop_strings = [a_stop_string(tokenizer, new, 4)]
    arguments = {"tokenizer": tokenizer, "max_new_tokens": NEW, "stop_strings": [a_stop_string(tokenizer, new, 10)]}
    expected = assert_lossless((target, small_pair[1]), inputs, lambda: dict(arguments))
    assert expected.shape[1] == WIDTH + 11


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_stop_strings_without_a_tokenizer_are_refused(small_pair, where):
    target = copy.deepcopy(small_pair[0])
    arguments: dict[str, Any] = {"max_new_tokens": NEW}
    if where == "argument":
        arguments["stop_strings"] = ["stop"]
    elif where == "config":
        arguments = {"generation_config": GenerationConfig(stop_strings=["stop"], max_new_tokens=NEW)}
    else:
        target.generation_config.stop_strings = ["stop"]
    with pytest.raises(ValueError, match=r"`stop_strings` needs .* tokenizer"):
        target.generate(**prompts(1), strategy="spec", assistant_model=small_pair[1], **arguments)


# Time


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eos", [None, 9])
@pytest.mark.parametrize(("seconds", "count"), [(1e-9, 1), (1e6, 8)])
def test_time_ends_all_rows_or_none(small_pair, batch, eos, seconds, count):
    arguments = {"max_new_tokens": 8, "max_time": seconds, "eos_token_id": eos}
    assert assert_lossless(small_pair, prompts(batch), lambda: dict(arguments)).shape[1] == WIDTH + count


@pytest.mark.parametrize("seconds", [0.5, 4.5, 9.5])
def test_time_may_run_out_inside_a_block(small_pair, monkeypatch, seconds):
    """A clock that advances when the criterion reads it: once per token, as in vanilla."""
    arguments = {"max_new_tokens": NEW, "max_time": seconds}

    def fresh() -> dict[str, Any]:
        clock = itertools.count()
        fake = SimpleNamespace(**{**vars(time), "time": lambda: float(next(clock))})
        monkeypatch.setattr(stopping_criteria, "time", fake)
        return arguments

    assert assert_lossless(small_pair, prompts(1), fresh).shape[1] == WIDTH + int(seconds) + 1


# Users' criteria


class AtLeast(StoppingCriteria):
    """Stops at a length; its `max_length` is not the output's."""

    def __init__(self, length: int) -> None:
        self.length, self.max_length = length, 3

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class LastToken(StoppingCriteria):
    """A user's EOS criterion."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens)


class NthCall(StoppingCriteria):
    """Counts its calls; the rows stop one after another."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        return self.left + 3 * torch.arange(len(input_ids)) <= 0


class AnyRow(StoppingCriteria):
    """Stops all rows once one of them generates a token."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], self.tokens).any().expand(len(input_ids))


class OwnEos(EosTokenCriteria):
    """A subclass of transformers' criterion with a different end."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(input_ids, scores, **kwargs) & (input_ids.shape[1] > WIDTH + 8)


class OwnLimit(MaxLengthCriteria):
    """A subclass of transformers' criterion that continues for two more tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.max_length + 2)


CRITERIA: dict[str, Callable[[Rows], StoppingCriteria]] = {
    "length": lambda new: AtLeast(WIDTH + 12),
    "last token": lambda new: LastToken(some_ends(new)),
    "calls": lambda new: NthCall(8),
    "other rows": lambda new: AnyRow([new[-1][7]]),
    "own EOS": lambda new: OwnEos(some_ends(new, at=9)),
    "own limit": lambda new: OwnLimit(WIDTH + 9),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("name", CRITERIA)
def test_custom_criteria_end_rows_as_in_vanilla(small_pair, name, eos, batch):
    """Without an EOS token, vanilla continues finished rows until all are finished."""
    inputs = prompts(batch)
    new = new_tokens(small_pair[0], inputs)

    def fresh() -> dict[str, Any]:
        criteria = StoppingCriteriaList([CRITERIA[name](new)])
        return {"max_new_tokens": NEW, "eos_token_id": new[-1][10] if eos else None, "stopping_criteria": criteria}

    assert assert_lossless(small_pair, inputs, fresh).shape[1] < WIDTH + NEW


@pytest.mark.parametrize("batch", [1, 3])
def test_finished_rows_run_on_where_nothing_has_an_eos(small_pair, tokenizer, batch):
    """Known criteria too: without an EOS token, strings and time end no row before the others."""
    inputs = prompts(batch)
    new = new_tokens(small_pair[0], inputs)
    strings = [a_stop_string(tokenizer, [row], 4 + 4 * i) for i, row in enumerate(new)]
    arguments = {"stop_strings": strings, "tokenizer": tokenizer, "max_new_tokens": NEW, "eos_token_id": None}
    expected = assert_lossless(small_pair, inputs, lambda: dict(arguments))[:, WIDTH:]
    assert expected.shape[1] < NEW
    assert expected.tolist() == [row[: expected.shape[1]] for row in new]


def test_finished_rows_that_run_on_have_scores_up_to_the_end_of_the_output(small_pair, tokenizer):
    (target, draft), inputs = small_pair, prompts(3)
    strings = [a_stop_string(tokenizer, [row], 4 + 4 * i) for i, row in enumerate(new_tokens(target, inputs))]
    kwargs = {**inputs, "stop_strings": strings, "tokenizer": tokenizer, "max_new_tokens": NEW}
    kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    expected = target.generate(**kwargs)
    for way in ways_to_draft(draft).values():
        given = target.generate(**kwargs, **way)
        assert given.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(torch.stack(given.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_several_criteria_end_a_row_at_the_first_of_them(small_pair, tokenizer, batch):
    inputs = prompts(batch)
    new = new_tokens(small_pair[0], inputs)

    def fresh() -> dict[str, Any]:
        return {
            "max_new_tokens": NEW,
            "max_time": 1e6,
            "eos_token_id": new[-1][9],
            "stop_strings": a_stop_string(tokenizer, new, 8),
            "tokenizer": tokenizer,
            "stopping_criteria": [AtLeast(WIDTH + 14), NthCall(11), LastToken([new[0][10]])],
        }

    assert assert_lossless(small_pair, inputs, fresh).shape[1] < WIDTH + NEW


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("limit", [3, WIDTH + 1, WIDTH + 7, WIDTH + 30])
def test_a_length_criterion_of_the_user_replaces_the_limit(small_pair, batch, limit):
    arguments = {"max_new_tokens": NEW, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(limit)])}
    expected = assert_lossless(small_pair, prompts(batch), lambda: dict(arguments))
    assert expected.shape[1] == max(limit, WIDTH + 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_eos_criterion_of_the_user_replaces_the_eos(small_pair, batch):
    inputs = prompts(batch)
    ends = some_ends(new_tokens(small_pair[0], inputs))
    for eos in (None, ends[0], 9):
        criteria = StoppingCriteriaList([EosTokenCriteria(ends[-1:] + ends[1:2])])
        arguments = {"max_new_tokens": NEW, "eos_token_id": eos, "stopping_criteria": criteria}
        assert_lossless(small_pair, inputs, lambda a=arguments: dict(a))


class Recording(StoppingCriteria):
    """Records its inputs, and stops nothing."""

    def __init__(self) -> None:
        self.shown: list[tuple[Rows, tuple[torch.Tensor, ...] | None]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.shown.append((input_ids.tolist(), scores))
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_a_criterion_is_shown_vanillas_tokens_and_scores_once_per_step(small_pair, batch, with_scores, eos):
    (target, draft), inputs = small_pair, prompts(batch)
    kwargs: dict[str, Any] = {**inputs, "max_new_tokens": NEW}
    if eos:
        kwargs["eos_token_id"] = some_ends(new_tokens(target, inputs))
    if with_scores:
        kwargs |= {"return_dict_in_generate": True, "output_scores": True}
    expected = Recording()
    target.generate(**kwargs, stopping_criteria=[expected])
    for way in ways_to_draft(draft).values():
        recording = Recording()
        target.generate(**kwargs, **way, stopping_criteria=[recording])
        assert [ids for ids, _ in recording.shown] == [ids for ids, _ in expected.shown]
        for (ids, ours), (_, theirs) in zip(recording.shown, expected.shown):
            assert (ours is None) == (theirs is None) == (not with_scores)
            if theirs is not None:
                assert len(ours) == len(theirs)
                live = torch.tensor([row[-1] != 0 for row in ids])  # an ended row has a 0 there
                torch.testing.assert_close(ours[-1][live], theirs[-1][live], rtol=1e-4, atol=1e-4)


class Sure(StoppingCriteria):
    """Reads the scores: stops rows that were confident of their last token."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def __call__(self, input_ids: torch.Tensor, scores: tuple[torch.Tensor, ...], **kwargs: Any) -> torch.Tensor:
        assert len(scores) == input_ids.shape[1] - WIDTH
        return scores[-1].softmax(dim=-1).gather(1, input_ids[:, -1:]).squeeze(1) > self.bound


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eos", [False, True])
def test_a_criterion_may_read_the_scores(small_pair, batch, eos):
    inputs = prompts(batch)
    outputs = {"return_dict_in_generate": True, "output_scores": True}
    plain = small_pair[0].generate(**inputs, max_new_tokens=NEW, **outputs)
    surest = torch.stack(plain.scores).softmax(dim=-1).amax(dim=-1)  # [steps, rows]
    bound = float(surest.amax(dim=0).min()) - 0.01  # every row reaches it
    arguments = {"max_new_tokens": NEW, "stopping_criteria": [Sure(bound)], **outputs}
    arguments["eos_token_id"] = min(set(range(2, VOCAB)) - set(plain.sequences.flatten().tolist())) if eos else None
    expected = assert_lossless(small_pair, inputs, lambda: dict(arguments))
    assert expected.shape[1] < WIDTH + NEW


@pytest.mark.parametrize("step_by_step", [False, True])
def test_decoding_ends_with_the_last_row_and_is_fast_until_then(small_pair, tokenizer, step_by_step):
    """Without an EOS token, finished rows continue, but not past the last row's end and not token by token."""
    target, inputs = small_pair[0], prompts(3)
    new = new_tokens(target, inputs)
    stats = SpeculationStats()
    arguments: dict[str, Any] = {"max_new_tokens": 60, "speculation_stats": stats}
    if step_by_step:
        arguments["stopping_criteria"] = [NthCall(3), Recording()]
    else:
        strings = [a_stop_string(tokenizer, [row], 4 + 4 * i) for i, row in enumerate(new)]
        arguments |= {"stop_strings": strings, "tokenizer": tokenizer}
    way = {"strategy": "spec", "assistant_model": target, "num_assistant_tokens": 4}
    steps = target.generate(**inputs, **arguments, **way).shape[1] - WIDTH
    assert 3 < steps < NEW
    assert stats.target_forwards <= -(-steps // 5) + 1  # and the prefill


def test_nothing_is_drafted_or_decoded_past_the_end(small_pair):
    """The statistics count committed tokens: none after an end."""
    (target, draft), inputs = small_pair, prompts(3)
    ends = some_ends(new_tokens(target, inputs))
    for way in ways_to_draft(draft).values():
        stats = SpeculationStats()
        ids = target.generate(**inputs, max_new_tokens=NEW, eos_token_id=ends, speculation_stats=stats, **way)
        assert stats.committed_tokens == int((ids[:, WIDTH:] != 0).sum())
