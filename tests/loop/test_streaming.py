"""Streamers get the same as from vanilla `generate()`: the prompt, one token per row and step, and the end."""

import threading
from typing import Any

import pytest
import torch
from conftest import make_prompts, ways_to_draft
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import hf_specdec

WIDTH, NEW = 14, 16


class Recording(BaseStreamer):
    """Records its inputs: shapes and values."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.events.append((tuple(value.shape), value.dtype, value.device.type, value.tolist()))

    def end(self) -> None:
        self.events.append("end")


class Scribbling(Recording):
    """Overwrites its inputs after recording them."""

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if value.ndim == 1:
            value.fill_(3)


class NthCall(StoppingCriteria):
    """Has state, so that it is called step by step; the rows stop one after another."""

    def __init__(self) -> None:
        self.left = 7

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        return self.left + 2 * torch.arange(len(input_ids)) <= 0


def arguments_of(ends: str, target: Any, inputs: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The criteria that end the rows, anew for each call. Strings and criteria keep rows running until all are done."""
    if ends == "length":
        return {}
    if ends == "criterion":
        return {"stopping_criteria": StoppingCriteriaList([NthCall()])}
    new = target.generate(**inputs, max_new_tokens=NEW)[:, WIDTH:].tolist()
    last = [row[5 + 3 * i] for i, row in enumerate(new)]
    if ends == "eos":
        return {"eos_token_id": last}
    return {"stop_strings": tokenizer.convert_ids_to_tokens(last), "tokenizer": tokenizer}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ends", ["length", "eos", "string", "criterion"])
@pytest.mark.parametrize("kind", [Recording, Scribbling])
def test_a_streamer_gets_the_calls_that_vanilla_makes(small_pair, tokenizer, kind, ends, batch):
    (target, draft), inputs = small_pair, make_prompts(batch, seed=4)

    def stream(**way: Any) -> tuple[list[Any], list[list[int]]]:
        streamer = kind()
        arguments = arguments_of(ends, target, inputs, tokenizer)
        ids = target.generate(**inputs, max_new_tokens=NEW, streamer=streamer, **arguments, **way)
        return streamer.events, ids.tolist()

    expected = stream()
    events, ids = expected
    assert events[0][3] == inputs["input_ids"].tolist()
    assert len(events) == len(ids[0]) - WIDTH + 2
    assert events.count("end") == 1
    if ends != "length":
        assert len(events) < NEW + 2
    for name, way in ways_to_draft(draft).items():
        assert stream(**way) == expected, name


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_streamed_as_soon_as_every_row_has_them(small_pair, batch):
    """Not all at the end: the streamer's tokens grow between the target's forwards, and never run ahead."""
    target, draft = small_pair
    inputs = make_prompts(batch, seed=4)
    streamer, seen = Recording(), []
    hook = target.register_forward_hook(lambda *_: seen.append(len(streamer.events)))
    try:
        way = {"strategy": "spec", "assistant_model": draft, "num_assistant_tokens": 4}
        stats = hf_specdec.SpeculationStats()
        target.generate(**inputs, max_new_tokens=NEW, streamer=streamer, speculation_stats=stats, **way)
    finally:
        hook.remove()
    seen = seen[-stats.target_forwards :]  # everything before it was prefill
    assert seen[0] == 1
    assert len(set(seen)) >= len(seen) / 2
    assert max(seen) < NEW + 2


def test_nothing_behind_the_end_is_streamed(small_pair):
    """Though the target drafts for itself, and the block continues after the end."""
    target, inputs = small_pair[0], make_prompts(1, seed=4)
    new = target.generate(**inputs, max_new_tokens=NEW)[0, WIDTH:].tolist()
    for end in (3, 5, 8):
        for way in ways_to_draft(target).values():
            streamer = Recording()
            target.generate(**inputs, max_new_tokens=NEW, eos_token_id=new[end], streamer=streamer, **way)
            assert [event[3][0] for event in streamer.events[1:-1]] == new[: new.index(new[end]) + 1]


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_a_text_streamer_prints_the_same_text(small_pair, tokenizer, capsys, skip_prompt):
    (target, draft), inputs = small_pair, make_prompts(1, seed=4)

    def printed(**way: Any) -> str:
        streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        target.generate(**inputs, max_new_tokens=NEW, streamer=streamer, **way)
        return capsys.readouterr().out

    expected = printed()
    assert len(expected.split()) > 3
    for name, way in ways_to_draft(draft).items():
        assert printed(**way) == expected, name


def test_a_text_iterator_gives_the_same_pieces_to_another_thread(small_pair, tokenizer):
    (target, draft), inputs = small_pair, make_prompts(1, seed=4)

    def pieces(**way: Any) -> list[str]:
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        kwargs = {**inputs, "max_new_tokens": NEW, "streamer": streamer, **way}
        thread = threading.Thread(target=target.generate, kwargs=kwargs)
        thread.start()
        received = list(streamer)
        thread.join()
        return received

    expected = pieces()
    assert len(expected) > 3
    for name, way in ways_to_draft(draft).items():
        assert pieces(**way) == expected, name


def test_a_text_streamer_refuses_a_batch_as_in_vanilla(small_pair, tokenizer):
    for way in ({}, *ways_to_draft(small_pair[1]).values()):
        with pytest.raises(ValueError, match="batch size 1"):
            small_pair[0].generate(**make_prompts(2), max_new_tokens=4, streamer=TextStreamer(tokenizer), **way)


def test_a_streamer_may_be_given_to_the_decoding_method(small_pair):
    (target, draft), inputs = small_pair, make_prompts(2)
    expected, given = Recording(), Recording()
    target.generate(**inputs, max_new_tokens=6, streamer=expected)
    target.generate(**inputs, max_new_tokens=6, custom_generate=hf_specdec.speculative(draft, streamer=given))
    assert given.events == expected.events
