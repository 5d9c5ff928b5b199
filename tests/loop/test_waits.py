"""At most one wait per iteration for a pretended CUDA device, whatever the call asks for; and CUDA's clock.

Each case runs once before it is counted, because models are probed the first time.
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretend_cuda
import pytest
import test_shared_entries
import torch
from conftest import VOCAB, make_pair, make_prompts
from mtp_reference import make_tensors, write_tensors
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import hf_specdec
from hf_specdec.drafters import Draft
from hf_specdec.drafters.heads.mtp_files import load_layers
from hf_specdec.loop import clock
from hf_specdec.loop.decoding import SpeculativeDecoding
from hf_specdec.loop.refill import RefilledDecoding
from hf_specdec.loop.schedule import Constant
from hf_specdec.sampling.context import Context

Pair = tuple[PreTrainedModel, PreTrainedModel]


class Null(BaseStreamer):
    def put(self, value: Tensor) -> None:
        assert not value.is_cuda

    def end(self) -> None: ...


class Never(StoppingCriteria):
    """Knows the last tokens, as a harness does, and holds a tensor on the device."""

    def __init__(self, like: Tensor, mixes: bool = False):
        self.stops = torch.full((1,), -5, device=like.device)
        self.mixes = mixes
        self.widths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.widths.append(input_ids.shape[1])
        if self.mixes:
            return input_ids[:, -1] == self.stops
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Repeats(hf_specdec.Drafter):
    """A user's drafter: the last token again."""

    def propose(self, context: Context, max_tokens: int) -> Draft:
        last = [int(context.row(row)[-1]) for row in context.rows]
        device = context.tokens.device
        return Draft(torch.tensor(last)[:, None].expand(-1, max_tokens).to(device, non_blocking=True))


@pytest.fixture
def by_iteration(cuda: pretend_cuda.Device, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The waits of each iteration since the last `clear()`."""
    found: list[list[str]] = []
    iterate = SpeculativeDecoding.iterate

    def counted(self: SpeculativeDecoding) -> None:
        before = len(cuda.waits)
        iterate(self)
        found.append(cuda.waits[before:])

    monkeypatch.setattr(SpeculativeDecoding, "iterate", counted)
    return found


@functools.cache
def on_cuda(name: str) -> Pair:
    if name == "assistant":
        target = test_shared_entries.make_target()
        return tuple(map(pretend_cuda.move, (target, test_shared_entries.make_assistant(target))))  # type: ignore[return-value]
    target, draft = make_pair(
        name.removesuffix("-eager").removesuffix("-head").removesuffix("-block").removesuffix("-mtp")
    )
    if name.endswith("-mtp"):
        with tempfile.TemporaryDirectory() as folder:
            write_tensors(Path(folder), make_tensors(target))
            draft = load_layers([Path(folder) / "model.safetensors"], target)  # type: ignore[assignment]
    if name.endswith("-head"):
        parts = hf_specdec.Eagle3Config(target.config, VOCAB, draft_vocab_size=40, aux_ids=(0, 1, 2))
        draft = hf_specdec.Eagle3Head(parts, torch.arange(5, 45)).requires_grad_(False)  # type: ignore[assignment]
    if name.endswith("-block"):
        block = hf_specdec.DFlashConfig(
            target.config, (1, 2), 5, 9, from_anchor=True, vocab_size=VOCAB, markov_rank=4, confidence_width=36,
            qk_norm=False,
        )  # fmt: skip
        draft = hf_specdec.DFlashHead(block).requires_grad_(False)  # type: ignore[assignment]
    for model in (target, draft) if name.endswith("-eager") else ():
        model.set_attn_implementation("eager")
    return pretend_cuda.move(target), pretend_cuda.move(draft)  # type: ignore[return-value]


def decode(pair: Pair, rows: int, **options: Any) -> Tensor:
    prompts = {name: value.to("cuda") for name, value in make_prompts(rows, width=14).items()}
    options = {"do_sample": False, "max_new_tokens": 18, "assistant_model": pair[1], **options}
    if options["assistant_model"] is not None and not isinstance(options["assistant_model"], hf_specdec.Drafter):
        options.setdefault("num_assistant_tokens", 4)
    return pair[0].generate(**prompts, strategy="spec", **options)


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "greedy": ("llama", 1, {}),
    "greedy, ragged": ("llama", 4, {}),
    "default schedule": ("llama", 4, {"num_assistant_tokens": None, "num_assistant_tokens_schedule": "optimal"}),
    "sampled": ("llama", 4, {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 20}),
    "look-up": ("llama", 4, {"assistant_model": None, "prompt_lookup_num_tokens": 4}),
    "a user's drafter": ("llama", 4, {"assistant_model": Repeats()}),
    "confidence threshold": ("llama", 4, {"assistant_confidence_threshold": 0.05}),
    "streamer": ("llama", 1, {"streamer": Null()}),
    "max_time": ("llama", 4, {"max_time": 1000.0}),
    "stop strings": ("llama", 4, {"stop_strings": ["zzzz", "qqqq"]}),
    "EOS": ("llama", 4, {"eos_token_id": [3, 5, 7, 11, 13]}),
    "criteria": ("llama", 4, {"stopping_criteria": Never}),
    "criteria, one row": ("llama", 1, {"stopping_criteria": Never}),
    "repetition penalty": ("llama", 4, {"repetition_penalty": 1.1}),
    "n-grams": ("llama", 1, {"no_repeat_ngram_size": 3}),
    "scores": ("llama", 4, {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}),
    "states and weights": (
        "llama-eager", 4, {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True},
    ),
    "alibi, lockstep": ("bloom", 4, {}),
    "a head": ("llama-head", 4, {}),
    "a head, sampled": ("mistral-sliding-head", 4, {"do_sample": True, "repetition_penalty": 1.1}),
    "a block": ("mistral-sliding-block", 4, {"do_sample": True, "assistant_confidence_threshold": 0.5}),
    "MTP layers": ("llama-mtp", 4, {}),
    "MTP layers, sampled": ("mistral-sliding-mtp", 4, {"do_sample": True, "repetition_penalty": 1.1}),
    "an assistant": ("assistant", 4, {}),
    "an assistant, sampled": ("assistant", 4, {"do_sample": True, "assistant_confidence_threshold": 0.05}),
    "sliding window": ("mistral-sliding", 4, {}),
    "static": ("llama", 4, {"cache_implementation": "static"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_wait_per_iteration(case: str, by_iteration: list[list[str]], tokenizer: Any) -> None:
    name, rows, options = CASES[case]
    pair = on_cuda(name)
    if "stop_strings" in options:
        options = {**options, "tokenizer": tokenizer}
    for _ in range(2):
        by_iteration.clear()
        more = dict(options)
        if more.get("stopping_criteria") is Never:
            more["stopping_criteria"] = [Never(pair[0].lm_head.weight)]
        decode(pair, rows, **more)
    assert_one_wait(by_iteration)


def assert_one_wait(by_iteration: list[list[str]]) -> None:
    assert len(by_iteration) > 2
    assert all(len(waits) == 1 and "synchronize (device.py" in waits[0] for waits in by_iteration[1:]), by_iteration


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "opt"])
def test_one_wait_per_iteration_with_other_models(name: str, by_iteration: list[list[str]]) -> None:
    pair = on_cuda(name)
    for _ in range(2):
        by_iteration.clear()
        decode(pair, 3)
    assert_one_wait(by_iteration)


@pytest.mark.parametrize("name", ["llama", "llama-head", "mistral-sliding-block", "llama-mtp", "assistant"])
def test_one_wait_per_iteration_where_rows_are_replaced(
    name: str, cuda: pretend_cuda.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the next prompts in between waits for nothing."""
    found: list[list[str]] = []
    step = RefilledDecoding.step

    def counted(self: RefilledDecoding) -> Any:
        before = len(cuda.waits)
        ended = step(self)
        found.append(cuda.waits[before:])
        return ended

    monkeypatch.setattr(RefilledDecoding, "step", counted)
    target, draft = on_cuda(name)
    texts = [list(range(2, 4 + n)) for n in (5, 12, 3, 9, 30, 4)]
    options = {"batch_size": 2, "max_new_tokens": 6, "num_assistant_tokens": 3, "do_sample": False}
    for _ in range(2):
        found.clear()
        assert len(list(hf_specdec.generate_many(target, texts, draft, **options))) == len(texts)
    assert_one_wait(found)


def test_rows_that_finish_do_not_wait(by_iteration: list[list[str]]) -> None:
    target, draft = make_pair("llama")
    prompts = make_prompts(4)
    whole = target.generate(**prompts, do_sample=False, max_new_tokens=18)[:, prompts["input_ids"].shape[1] :]
    ends = [int(whole[1, 6]), int(whole[2, 9])]
    pretend_cuda.move(target), pretend_cuda.move(draft)
    for _ in range(2):
        by_iteration.clear()
        stats = hf_specdec.SpeculationStats()
        decode((target, draft), 4, eos_token_id=ends, pad_token_id=0, speculation_stats=stats)
    assert len({row.row_iterations for row in stats.per_row}) > 1
    assert_one_wait(by_iteration)


class Own(LogitsProcessor):
    """May keep state, so that it is called as vanilla calls it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


def test_processors_in_order_wait_once_per_step_as_in_vanilla(by_iteration: list[list[str]]) -> None:
    pair, stats = on_cuda("llama"), hf_specdec.SpeculationStats()
    decode(pair, 1, logits_processor=LogitsProcessorList([Own()]))
    by_iteration.clear()
    decode(pair, 1, logits_processor=LogitsProcessorList([Own()]), speculation_stats=stats)
    for waits, accepted in zip(by_iteration[1:], stats.iterations[1:]):
        assert len(waits) == accepted["accepted"][0] + 1


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_criteria_are_called_as_in_vanilla(rows: int, mixes: bool, cuda: pretend_cuda.Device) -> None:
    """Also if they compare ids with tensors on the device, which costs them a wait."""
    pair = on_cuda("llama")
    ours = Never(pair[0].lm_head.weight, mixes)
    given = decode(pair, rows, stopping_criteria=[ours])
    vanilla = Never(pair[0].lm_head.weight, mixes)
    prompts = {name: value.to("cuda") for name, value in make_prompts(rows, width=14).items()}
    expected = pair[0].generate(**prompts, do_sample=False, max_new_tokens=18, stopping_criteria=[vanilla])
    assert given.equal(expected)
    assert ours.widths == vanilla.widths


def test_a_users_drafts_outside_the_vocabulary_are_told(cuda: pretend_cuda.Device) -> None:
    class Wild(Repeats):
        def propose(self, context: Context, max_tokens: int) -> Draft:
            return Draft(super().propose(context, max_tokens).tokens + 10_000)

    with pytest.raises(ValueError, match=r"Wild proposed token ids from 10[0-9]* to 10[0-9]*, but the target's vocab"):
        decode(on_cuda("llama"), 3, assistant_model=Wild())


@pytest.mark.parametrize("threshold", [0.02, 0.5])
def test_unsure_drafts_are_not_proposed(threshold: float, cuda: pretend_cuda.Device) -> None:
    """The device tells how many tokens each row proposes: as many as on a CPU, where drafting stops."""
    seen = []
    for move in (lambda pair: pair, lambda pair: tuple(map(pretend_cuda.move, pair))):
        target, draft = move(make_pair("llama"))
        prompts = {name: value.to(target.lm_head.weight.device) for name, value in make_prompts(3).items()}
        stats = hf_specdec.SpeculationStats()
        target.generate(
            **prompts, do_sample=False, max_new_tokens=30, assistant_model=draft, strategy="spec",
            num_assistant_tokens=5, assistant_confidence_threshold=threshold, speculation_stats=stats,
        )  # fmt: skip
        seen.append(stats.iterations)
    assert seen[0] == seen[1]
    drafted = {n for iteration in seen[0] for n in iteration["drafted"]}
    assert len(drafted) > 1


# ------------------------------------------------------------------------------------------------------------ the clock


def test_the_schedule_and_the_statistics_see_the_devices_time(
    cuda: pretend_cuda.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA a draft is queued in no time; its seconds are those between two events, and all add up to the host's."""
    pair, now, learned = on_cuda("llama"), [0.0, 0.0], []  # the host's time and the device's

    def host() -> float:
        return now[0]

    def wait(name: str, original: Callable[[str], None] = cuda.wait) -> None:
        now[0] = now[1] = max(now)
        original(name)

    def queue(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def queued(*args: Any, **kwargs: Any) -> Any:
            now[1] = max(now) + seconds
            return function(*args, **kwargs)

        return queued

    decode(pair, 1)
    monkeypatch.setattr(clock, "perf_counter", host)
    cuda.clock = lambda: max(now)  # an event is reached when the work before it is done
    monkeypatch.setattr(cuda, "wait", wait)
    for name, seconds in (("prefill", 5.0), ("draft", 3.0), ("verify", 10.0)):
        monkeypatch.setattr(SpeculativeDecoding, name, queue(seconds, getattr(SpeculativeDecoding, name)))
    monkeypatch.setattr(Constant, "update", lambda self, iteration: learned.append(iteration))
    stats = hf_specdec.SpeculationStats()
    decode(pair, 1, num_assistant_tokens_schedule="constant", speculation_stats=stats)
    n = stats.target_forwards
    assert [(i.draft_seconds, i.verify_seconds, i.other_seconds) for i in learned] == [(3.0, 10.0, 0.0)] * n
    assert (stats.prefill_seconds, stats.draft_seconds, stats.verify_seconds) == (5.0, 3.0 * n, 10.0 * n)
    assert stats.seconds == max(now)
