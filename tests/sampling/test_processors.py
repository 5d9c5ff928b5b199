"""Logits processors treat every position as in vanilla `generate()`, and the returned scores show it."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import VOCAB, assert_lossless, make_pair, make_prompts, ways_to_draft
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation.logits_process import (
    AlternatingCodebooksLogitsProcessor,
    BarkEosPrioritizerLogitsProcessor,
    TopHLogitsWarper,
    WhisperNoSpeechDetection,
    WhisperTimeStampLogitsProcessor,
)

from hf_specdec import SpeculationStats
from hf_specdec.sampling.processors import BLIND, PURE, unknown_names

WIDTH, NEW = 14, 14
STEP_BY_STEP = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
}

# By the processor that generate() builds: its arguments. `new` are the new tokens of the rows without it.
Rows = list[list[int]]
ARGUMENTS: dict[str, Callable[[Rows], dict[str, Any]]] = {
    "RepetitionPenaltyLogitsProcessor": lambda new: {"repetition_penalty": 1.8},
    "NoRepeatNGramLogitsProcessor": lambda new: {"no_repeat_ngram_size": 1},
    "NoRepeatNGramLogitsProcessor, of two": lambda new: {"no_repeat_ngram_size": 2, "repetition_penalty": 0.6},
    "EncoderRepetitionPenaltyLogitsProcessor": lambda new: {"encoder_repetition_penalty": 0.4},
    "EncoderNoRepeatNGramLogitsProcessor": lambda new: {"encoder_no_repeat_ngram_size": 1},
    "NoBadWordsLogitsProcessor": lambda new: {"bad_words_ids": [[row[1]] for row in new] + [new[0][3:5]]},
    "SequenceBiasLogitsProcessor": lambda new: {"sequence_bias": {tuple(new[0][:2]): -9.0, (new[-1][4],): 4.0}},
    "MinLengthLogitsProcessor": lambda new: {"min_length": WIDTH + 6},
    "MinNewTokensLengthLogitsProcessor": lambda new: {"min_new_tokens": 7},
    "ForcedEOSTokenLogitsProcessor": lambda new: {"forced_eos_token_id": 5},
    "SuppressTokensLogitsProcessor": lambda new: {"suppress_tokens": [row[2] for row in new]},
    "SuppressTokensAtBeginLogitsProcessor": lambda new: {"begin_suppress_tokens": [row[0] for row in new]},
    "ExponentialDecayLengthPenalty": lambda new: {"exponential_decay_length_penalty": (2, 1.5)},
    "WatermarkLogitsProcessor": lambda new: {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "WatermarkLogitsProcessor, selfhash": lambda new: {
        "watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2)
    },
    "SynthIDTextWatermarkLogitsProcessor": lambda new: {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123, 340], ngram_len=3)
    },
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": lambda new: {"guidance_scale": 1.5},
    "PrefixConstrainedLogitsProcessor": lambda new: {"prefix_allowed_tokens_fn": other_third},
}
NEED_EOS: dict[str, Callable[[Rows], int]] = {
    "MinLengthLogitsProcessor": lambda new: an_end(new),
    "MinNewTokensLengthLogitsProcessor": lambda new: an_end(new),
    "ExponentialDecayLengthPenalty": lambda new: min(set(range(2, VOCAB)) - {token for row in new for token in row}),
}

# By class name: a user's processor, with parameters that matter at most positions.
OBJECTS: dict[str, Callable[[], LogitsProcessor]] = {
    "TemperatureLogitsWarper": lambda: TemperatureLogitsWarper(0.5),
    "TopKLogitsWarper": lambda: TopKLogitsWarper(3),
    "TopPLogitsWarper": lambda: TopPLogitsWarper(0.5),
    "TopHLogitsWarper": lambda: TopHLogitsWarper(0.4),
    "MinPLogitsWarper": lambda: MinPLogitsWarper(0.3),
    "TypicalLogitsWarper": lambda: TypicalLogitsWarper(0.2),
    "EpsilonLogitsWarper": lambda: EpsilonLogitsWarper(0.05),
    "EtaLogitsWarper": lambda: EtaLogitsWarper(0.05),
    "InfNanRemoveLogitsProcessor": InfNanRemoveLogitsProcessor,
    "LogitNormalization": LogitNormalization,
    "AlternatingCodebooksLogitsProcessor": lambda: AlternatingCodebooksLogitsProcessor(WIDTH, 30, 40),
    "BarkEosPrioritizerLogitsProcessor": lambda: BarkEosPrioritizerLogitsProcessor(7, 0.02),
    "WhisperTimeStampLogitsProcessor": lambda: WhisperTimeStampLogitsProcessor(
        SimpleNamespace(no_timestamps_token_id=60, eos_token_id=59, bos_token_id=1), begin_index=WIDTH
    ),
    "WhisperNoSpeechDetection": lambda: WhisperNoSpeechDetection(5, begin_index=1),
}


def other_third(batch_id: int, prefix: torch.Tensor) -> list[int]:
    """Allowed tokens that depend on the row, its last token and its length."""
    return list(range((batch_id + int(prefix[-1]) + len(prefix)) % 3, VOCAB, 3))


def new_tokens(target: Any, inputs: dict[str, Any], **kwargs: Any) -> Rows:
    """Vanilla's new tokens."""
    return target.generate(**inputs, max_new_tokens=NEW, **kwargs)[:, inputs["input_ids"].shape[1] :].tolist()


def an_end(new: Rows) -> int:
    """A token that ends the first row early, and the others elsewhere or never."""
    return next(token for i, token in enumerate(new[0]) if i == new[0].index(token) >= 3)


def built_processors(target: Any, inputs: dict[str, Any], **kwargs: Any) -> LogitsProcessorList:
    """The processors that `generate()` passes to a decoding method."""

    def hand_over(model: Any, input_ids: torch.Tensor, **prepared: Any) -> LogitsProcessorList:
        return prepared["logits_processor"]

    return target.generate(**inputs, max_new_tokens=NEW, custom_generate=hand_over, **kwargs)


def live_rows(sequences: torch.Tensor, eos: int | None) -> torch.Tensor:
    """`[batch, steps]`: whether the row was still running before its token of that step."""
    ended = (sequences[:, WIDTH:] == (-1 if eos is None else eos)).cumsum(dim=1)
    return torch.nn.functional.pad(ended, (1, -1)) == 0


def assert_same_scores(given: Any, expected: Any, eos: int | None = None) -> None:
    """Sequences are equal; so are scores and logits, for each row up to its end."""
    assert given.sequences.tolist() == expected.sequences.tolist()
    live = live_rows(expected.sequences, eos)
    for name in ("scores", "logits"):
        ours, theirs = getattr(given, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if theirs is not None:
            assert len(ours) == len(theirs) == live.shape[1], name
            for step in range(len(theirs)):
                rows = live[:, step]
                torch.testing.assert_close(ours[step][rows], theirs[step][rows], rtol=1e-4, atol=1e-4)


def assert_lossless_scores(pair: Any, inputs: dict[str, Any], fresh: Callable[[], dict[str, Any]]) -> Any:
    """Every drafting method gives vanilla's tokens, scores and logits. Returns vanilla's output."""
    target, draft = pair
    outputs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = target.generate(**inputs, **outputs, **fresh())
    for way in ways_to_draft(draft).values():
        given = target.generate(**inputs, **way, **outputs, **fresh())
        assert_same_scores(given, expected, fresh().get("eos_token_id"))
    return expected


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_processors_that_generate_builds_do_what_they_do_in_vanilla(small_pair, name, batch):
    target, inputs = small_pair[0], make_prompts(batch)
    plain = new_tokens(target, inputs)
    others = {"eos_token_id": NEED_EOS[name](plain)} if name in NEED_EOS else {}
    arguments = {**others, **ARGUMENTS[name](plain)}
    built = built_processors(target, inputs, **arguments)
    assert name.split(",")[0] in {type(processor).__name__ for processor in built}
    gammas = (4,) if "selfhash" in name else (1, 5)  # that one is slow
    expected = assert_lossless(small_pair, inputs, lambda: {"max_new_tokens": NEW, **arguments}, gammas)
    assert expected[:, WIDTH:].tolist() != new_tokens(target, inputs, **others)  # otherwise the case shows nothing


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", OBJECTS)
def test_processors_that_a_user_passes_do_what_they_do_in_vanilla(small_pair, name, batch):
    def fresh() -> dict[str, Any]:
        return {"max_new_tokens": 12, "logits_processor": LogitsProcessorList([OBJECTS[name]()])}

    expected = assert_lossless_scores(small_pair, make_prompts(batch), fresh)
    unchanged = all(torch.equal(*pair) for pair in zip(expected.scores, expected.logits))
    assert unchanged == (name in ("InfNanRemoveLogitsProcessor", "WhisperNoSpeechDetection"))


def test_every_processor_that_skips_steps_has_a_case_here():
    cases = {name.split(",")[0] for name in [*ARGUMENTS, *OBJECTS]} | {"ForcedBOSTokenLogitsProcessor"}
    assert {kind.__name__ for kind in BLIND | PURE} <= cases


@pytest.mark.parametrize("name", ARGUMENTS)
def test_only_processors_that_may_keep_state_are_called_step_by_step(small_pair, name):
    target, inputs = small_pair[0], make_prompts(2)
    built = built_processors(target, inputs, eos_token_id=9, **ARGUMENTS[name](new_tokens(target, inputs)))
    assert set(unknown_names(built)) == {type(processor).__name__ for processor in built} & STEP_BY_STEP


@pytest.mark.parametrize("batch", [1, 2])
def test_a_forced_first_token_comes_first(small_pair, batch):
    inputs = {"input_ids": torch.arange(3, 3 + batch)[:, None]}
    arguments = {"max_new_tokens": 9, "forced_bos_token_id": 8, "begin_suppress_tokens": [37, 29]}
    assert assert_lossless(small_pair, inputs, lambda: dict(arguments))[:, 1].tolist() == [8] * batch


@pytest.mark.parametrize("broken_draft", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_invalid_values_are_removed_before_anybody_looks_at_them(small_pair, batch, broken_draft):
    target, draft = (copy.deepcopy(model) for model in small_pair)
    for model in (target, draft)[: 1 + broken_draft]:
        model.lm_head.weight.data[7] = torch.nan
    arguments = {"max_new_tokens": NEW, "remove_invalid_values": True}
    expected = assert_lossless((target, draft), make_prompts(batch), lambda: dict(arguments))
    assert len(set(expected[0, WIDTH:].tolist())) > 3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_guidance_with_a_negative_prompt_is_that_of_vanilla(small_pair, batch, padded):
    inputs, negative = make_prompts(batch), make_prompts(batch, width=6, seed=5)
    arguments = {"guidance_scale": 1.5, "negative_prompt_ids": negative["input_ids"]}
    if padded:
        arguments["negative_prompt_attention_mask"] = negative["attention_mask"]
    expected = assert_lossless(small_pair, inputs, lambda: {"max_new_tokens": NEW, **arguments})
    assert expected[:, WIDTH:].tolist() != new_tokens(small_pair[0], inputs, guidance_scale=1.5)


@pytest.mark.parametrize("arguments", [{"guidance_scale": 1.5}, {"watermarking_config": "synthid"}])
def test_processors_with_state_go_on_when_some_rows_have_ended(small_pair, arguments):
    inputs = make_prompts(3)
    if "watermarking_config" in arguments:
        arguments = ARGUMENTS["SynthIDTextWatermarkLogitsProcessor"]([])
    eos = an_end(new_tokens(small_pair[0], inputs, **arguments))
    expected = assert_lossless(small_pair, inputs, lambda: {"max_new_tokens": NEW, "eos_token_id": eos, **arguments})
    assert (expected[:, -1] == 0).any() and not (expected[:, -1] == 0).all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ends", [False, True])
def test_a_constraint_is_asked_about_vanillas_prefixes_only_and_in_its_order(small_pair, batch, ends):
    """The function knows only these prefixes, like a trie or a parser that fails on any other."""
    (target, draft), inputs = small_pair, make_prompts(batch)
    eos = an_end(new_tokens(target, inputs, prefix_allowed_tokens_fn=other_third)) if ends else None
    known: dict[tuple[int, ...], list[int]] = {}

    def learn(batch_id: int, prefix: torch.Tensor) -> list[int]:
        return known.setdefault((batch_id, *prefix.tolist()), other_third(batch_id, prefix))

    kwargs = {**inputs, "max_new_tokens": NEW, "eos_token_id": eos}
    expected = target.generate(**kwargs, prefix_allowed_tokens_fn=learn)
    for way in ways_to_draft(draft).values():
        asked = []

        def recall(batch_id: int, prefix: torch.Tensor, asked: list[Any] = asked) -> list[int]:
            asked.append((batch_id, *prefix.tolist()))
            return known[asked[-1]]

        given = target.generate(**kwargs, **way, prefix_allowed_tokens_fn=recall)
        assert given.tolist() == expected.tolist()
        assert asked == list(known)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "warpers",
    [
        {"temperature": 0.7},
        {"temperature": 3.0, "top_p": 0.8, "min_p": 0.1},
        {"typical_p": 0.99, "top_h": 0.9},
        {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "repetition_penalty": 1.8},
    ],
)
def test_sampling_from_the_one_best_token_is_greedy_decoding(small_pair, batch, warpers):
    """No false alarms: whatever is drawn, only one token has a probability."""
    (target, draft), inputs = small_pair, make_prompts(batch)
    greedy = {name: value for name, value in warpers.items() if name == "repetition_penalty"}
    expected = target.generate(**inputs, max_new_tokens=12, **greedy)
    sampled = {"do_sample": True, "top_k": 1, **warpers}
    for way in ways_to_draft(draft).values():
        assert target.generate(**inputs, max_new_tokens=12, **sampled, **way).tolist() == expected.tolist()


ORDERS = {
    "typical, penalty": lambda: [TypicalLogitsWarper(0.4), RepetitionPenaltyLogitsProcessor(1.8)],
    "penalty, typical": lambda: [RepetitionPenaltyLogitsProcessor(1.8), TypicalLogitsWarper(0.4)],
    "min-p, bias": lambda: [MinPLogitsWarper(0.3), SequenceBiasLogitsProcessor({(4,): 6.0})],
    "bias, min-p": lambda: [SequenceBiasLogitsProcessor({(4,): 6.0}), MinPLogitsWarper(0.3)],
    "five": lambda: [
        TemperatureLogitsWarper(0.5),
        NoRepeatNGramLogitsProcessor(1),
        TopKLogitsWarper(8),
        NoBadWordsLogitsProcessor([[40], [5, 6]]),
        LogitNormalization(),
    ],
    "stateful among pure": lambda: [TypicalLogitsWarper(0.4), Counting(), RepetitionPenaltyLogitsProcessor(1.8)],
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_processors_are_applied_in_their_order(small_pair, order, batch):
    def fresh(reverse: bool = False) -> dict[str, Any]:
        processors = ORDERS[order]()
        return {"max_new_tokens": 12, "logits_processor": LogitsProcessorList(processors[:: -1 if reverse else 1])}

    inputs = make_prompts(batch)
    expected = assert_lossless_scores(small_pair, inputs, fresh)
    other = small_pair[0].generate(**inputs, **fresh(reverse=True), return_dict_in_generate=True, output_scores=True)
    assert not all(map(torch.equal, expected.scores, other.scores))  # otherwise the case shows nothing


class Stateless(LogitsProcessor):
    """A function of the prefix, though that cannot be known."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, input_ids.shape[1] % 3 :: 3] -= 6.0  # in place, as is common
        return scores


class Counting(LogitsProcessor):
    """Has state: counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores + 4.0 * (torch.arange(VOCAB) % 5 == self.calls % 5)


class Remembering(LogitsProcessor):
    """Has its own state for each row: the number of even tokens seen."""

    def __init__(self) -> None:
        self.even: Any = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.even = self.even + (input_ids[:, -1] % 2 == 0)
        return scores + 4.0 * (torch.arange(VOCAB) % 3 == self.even[:, None] % 3)


class Neighbours(LogitsProcessor):
    """Reads the other rows: all rows avoid the last token of every row."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, input_ids[:, -1]] -= 9.0
        return scores + 3.0 * (torch.arange(VOCAB) % 4 == input_ids[:, -2:].sum() % 4)


class OwnTemperature(TemperatureLogitsWarper):
    """A subclass of a processor that needs no prefix; this one does."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return super().__call__(input_ids, scores) + 4.0 * (torch.arange(VOCAB) % 3 == input_ids[:, -1:] % 3)


class OwnPenalty(RepetitionPenaltyLogitsProcessor):
    """A subclass of a stateless processor; this one has state."""

    calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().__call__(input_ids, scores) + 4.0 * (torch.arange(VOCAB) % 4 == self.calls % 4)


USER_WRITTEN = {kind.__name__: kind for kind in (Stateless, Counting, Remembering, Neighbours)}
USER_WRITTEN |= {"OwnTemperature": lambda: OwnTemperature(0.7), "OwnPenalty": lambda: OwnPenalty(2.0)}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("name", USER_WRITTEN)
def test_user_written_processors_do_what_they_do_in_vanilla(small_pair, name, ends, batch):
    (target, _), inputs = small_pair, make_prompts(batch)

    def fresh(eos: int | None = None) -> dict[str, Any]:
        return {"logits_processor": LogitsProcessorList([USER_WRITTEN[name]()]), "eos_token_id": eos}

    eos = an_end(new_tokens(target, inputs, **fresh())) if ends else None
    expected = assert_lossless(small_pair, inputs, lambda: {"max_new_tokens": NEW, **fresh(eos)})
    assert expected[:, WIDTH:].tolist() != new_tokens(target, inputs, eos_token_id=eos)


class Recording(LogitsProcessor):
    """Records its inputs."""

    def __init__(self) -> None:
        self.shown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.shown.append((input_ids.clone(), scores.clone()))
        return scores


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ends", [False, True])
def test_a_processor_is_shown_vanillas_prefixes_and_scores_once_per_step(small_pair, batch, ends):
    (target, draft), inputs = small_pair, make_prompts(batch)
    kwargs = {**inputs, "max_new_tokens": NEW, "repetition_penalty": 1.8}
    if ends:
        kwargs["eos_token_id"] = an_end(new_tokens(target, inputs, repetition_penalty=1.8))
    expected = Recording()
    sequences = target.generate(**kwargs, logits_processor=[expected])
    live = live_rows(sequences, kwargs.get("eos_token_id"))
    for way in ways_to_draft(draft).values():
        recording = Recording()
        target.generate(**kwargs, **way, logits_processor=[recording])
        assert [ids.tolist() for ids, _ in recording.shown] == [ids.tolist() for ids, _ in expected.shown]
        for step, ((_, ours), (_, theirs)) in enumerate(zip(recording.shown, expected.shown)):
            torch.testing.assert_close(ours[live[:, step]], theirs[live[:, step]], rtol=1e-4, atol=1e-4)


class OnlyLiveRows(LogitsProcessor):
    """A constraint without rules for rows that have ended: it bans every token there."""

    def __init__(self, eos: int) -> None:
        self.eos = eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill((input_ids[:, WIDTH:] == self.eos).any(dim=1)[:, None], -torch.inf)


def test_what_processors_leave_of_ended_rows_does_not_matter(small_pair):
    """The target drafts for itself, so that blocks continue after the end of a row."""
    target, inputs = small_pair[0], make_prompts(3)
    eos = an_end(new_tokens(target, inputs))
    arguments = {"max_new_tokens": NEW, "eos_token_id": eos, "logits_processor": [OnlyLiveRows(eos)]}
    expected = assert_lossless((target, target), inputs, lambda: dict(arguments))
    assert (expected[:, -1] == 0).any() and not (expected[:, -1] == 0).all()


@pytest.mark.parametrize("pad", [-1, VOCAB + 7])
def test_processors_never_meet_padding_that_vanilla_would_not_show_them(small_pair, pad):
    """Some configs have a padding id that no token has; it must not be looked up for rows that merely lag."""
    inputs = {"input_ids": make_prompts(3)["input_ids"].clamp(min=2)}
    arguments = {"max_new_tokens": NEW, "pad_token_id": pad, "repetition_penalty": 1.8, "sequence_bias": {(4,): 1.0}}
    assert_lossless(small_pair, inputs, lambda: dict(arguments))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"renormalize_logits": True, "repetition_penalty": 1.8, "no_repeat_ngram_size": 1},
        {"guidance_scale": 1.5},
    ],
)
def test_scores_and_logits_are_those_of_vanilla(small_pair, batch, arguments):
    (target, draft), inputs = small_pair, make_prompts(batch)
    eos = an_end(new_tokens(target, inputs, **arguments))
    kwargs = {"max_new_tokens": NEW, "eos_token_id": eos, **arguments}
    expected = assert_lossless_scores((target, draft), inputs, lambda: dict(kwargs))
    assert bool(arguments) != all(map(torch.equal, expected.scores, expected.logits))
    live = live_rows(expected.sequences, eos)
    assert live[:, -1].any() and (batch == 1 or not live.all())


@pytest.mark.parametrize("name", ["scores", "logits"])
def test_scores_and_logits_come_separately(small_pair, name):
    (target, draft), inputs = small_pair, make_prompts(2)
    kwargs = {**inputs, "max_new_tokens": 6, "return_dict_in_generate": True, f"output_{name}": True}
    expected = target.generate(**kwargs, repetition_penalty=1.8)
    given = target.generate(**kwargs, repetition_penalty=1.8, assistant_model=draft, strategy="spec")
    assert_same_scores(given, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_transition_scores_can_be_computed_from_the_result(small_pair, batch):
    (target, draft), inputs = small_pair, make_prompts(batch)
    eos = an_end(new_tokens(target, inputs))
    kwargs = {"max_new_tokens": NEW, "eos_token_id": eos, "return_dict_in_generate": True, "output_scores": True}
    live = None
    transitions = []
    for way in ({}, *ways_to_draft(draft).values()):
        output = target.generate(**inputs, **kwargs, **way)
        live = live_rows(output.sequences, eos)
        scores = target.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        transitions.append(scores[live])
    for given in transitions[1:]:
        torch.testing.assert_close(given, transitions[0], rtol=1e-4, atol=1e-4)


def test_these_drafts_are_accepted_in_part(small_pair):
    """The basis of the tests above: blocks end early, late and in between."""
    target, draft = small_pair
    for batch in (1, 3):
        for name, way in ways_to_draft(draft).items():
            stats = SpeculationStats()
            target.generate(**make_prompts(batch), max_new_tokens=NEW, speculation_stats=stats, **way)
            assert 0.1 < stats.acceptance_rate < 0.9, name


@pytest.mark.parametrize("batch", [1, 3])
def test_infinite_scores_made_by_processors_are_chosen_as_vanilla_chooses(batch: int) -> None:
    """-inf (EOS is banned) plus inf (its score grows exponentially) is NaN, and NaN is vanilla's argmax."""
    target, draft = make_pair("llama")
    kwargs = {**make_prompts(batch, seed=2), "max_new_tokens": 20, "do_sample": False, "eos_token_id": 7}
    kwargs |= {"min_new_tokens": 12, "exponential_decay_length_penalty": (2, 1e9)}
    expected = target.generate(**kwargs)
    for gamma in (1, 4):
        out = target.generate(**kwargs, assistant_model=draft, strategy="spec", num_assistant_tokens=gamma)
        assert out.tolist() == expected.tolist()
