"""Conversations: using the cache from turn to turn changes no answer, and saves what it should."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ARCHITECTURES, SIZES, make_model, perturbed
from test_recurrent import ARCHITECTURES as RECURRENT
from transformers import LlamaConfig, PreTrainedModel

from hf_specdec import SpecPair
from hf_specdec.generate import outcome
from hf_specdec.pairs import DEMO_PAIR
from hf_specdec.records.stats import RowStep
from hf_specdec.tools.conversation import INTERRUPTED, Conversation, Turn
from hf_specdec.tools.terminal_chat import _drafting

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
FORGETFUL = TEMPLATE.replace("m.content", "m.content[:9]")  # as templates do that leave out what a model has thought
QUESTIONS = ("what is abc", "and def", "say xyz again")


def silent(step: RowStep) -> None:
    pass


def conversation(
    target: PreTrainedModel, tokenizer: Any, template: str | None = TEMPLATE, max_new_tokens: int = 24
) -> Conversation:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    pair = SpecPair(target, perturbed(target, 0.05), tokenizer)
    return Conversation(pair, _drafting("model", pair), {"do_sample": False}, max_new_tokens)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """It ends some answers by itself."""
    target = make_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "initializer_range": 0.3}), seed=12)
    target.generation_config.eos_token_id = [3, 17, 40, 55, 70, 80]
    return target


@pytest.fixture
def chat(llama: PreTrainedModel, tokenizer: Any) -> Conversation:
    return conversation(llama, tokenizer)


@pytest.fixture(scope="module")
def embedded() -> SpecPair:
    return SpecPair.from_pretrained(DEMO_PAIR, dtype="float32")


def assert_is_vanillas(chat: Conversation, turn: Turn) -> None:
    ids = chat.pair.tokenizer.pad({"input_ids": [turn.prompt]}, return_tensors="pt")
    vanilla = chat.pair.target.generate(**ids, **chat.options, max_new_tokens=turn.limit)
    assert turn.answer == vanilla[0, len(turn.prompt) :].tolist()


@contextmanager
def fed_tokens(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens each forward inside the block gets."""
    counts: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counts.append(kwargs["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    hook.remove()


def ask_all(chat: Conversation, questions: tuple[str, ...] = QUESTIONS, reuse: bool = True) -> list[tuple[Turn, int]]:
    """The turns, and how many tokens the target was fed in each."""
    turns = []
    for question in questions:
        if not reuse:
            chat._forget()
        with fed_tokens(chat.pair.target) as counts:
            turns.append((chat.ask(question, silent), sum(counts)))
    return turns


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL, None], ids=["whole", "forgetful", "none"])
def test_reuse_saves_what_is_cached_and_changes_no_answer(llama, tokenizer, template):
    chat = conversation(llama, tokenizer, template)
    chat.warm_up()
    with_reuse = ask_all(chat)
    without = ask_all(conversation(llama, tokenizer, template), reuse=False)
    assert {turn.finished for turn, _ in with_reuse} == {"eos", "max_length"}
    assert 0 < chat.stats.acceptance_rate < 1
    for (turn, fed), (again, fed_anew) in zip(with_reuse, without, strict=True):
        assert_is_vanillas(chat, turn)
        assert turn.answer == again.answer and again.reused == 0
        assert fed == fed_anew - turn.reused
    assert with_reuse[0][0].reused == 0
    assert all(turn.reused > len(with_reuse[0][0].prompt) for turn, _ in with_reuse[1:])


def test_reuse_with_the_embedded_pair(embedded):
    lines = ("def fib(n):", "class Stack:", "import os")
    chat = Conversation(embedded, _drafting("model", embedded), {"do_sample": False}, max_new_tokens=12)
    turns = ask_all(chat, lines)
    told = [f"{line}{turn.text}" for line, (turn, _) in zip(lines, turns)]
    assert "\n".join(told) == embedded.tokenizer.decode(turns[-1][0].prompt) + turns[-1][0].text
    for turn, _ in turns:
        assert_is_vanillas(chat, turn)
    assert all(0.4 * len(turn.prompt) < turn.reused < len(turn.prompt) for turn, _ in turns[1:])


@pytest.mark.parametrize(("name", "reuses"), [("falcon_h1", {False}), ("mistral-sliding", {False, True})])
def test_caches_that_cannot_be_cut_are_used_whole_or_not_at_all(tokenizer, name, reuses):
    target = make_model((RECURRENT | ARCHITECTURES)[name](), seed=3)
    chat = conversation(target, tokenizer, TEMPLATE, max_new_tokens=12)
    cached = 0
    for turn, _ in ask_all(chat):
        assert_is_vanillas(chat, turn)
        assert turn.reused in (0, cached)
        cached = len(turn.prompt) + len(turn.answer) - 1
    assert {turn.reused > 0 for turn in chat.turns[1:]} == reuses


def test_a_prompt_that_is_cached_whole_is_fed_its_last_token(llama, tokenizer):
    chat = conversation(llama, tokenizer, TEMPLATE.replace("in messages", "in messages[-1:]"))
    _, _, again = (chat.ask(question, silent) for question in ("what", "abc", "abc"))
    assert again.reused == len(again.prompt) - 1
    assert_is_vanillas(chat, again)


def test_a_target_whose_config_chooses_its_cache_reads_everything_again(llama, tokenizer):
    target = copy.deepcopy(llama)
    target.generation_config.cache_implementation = "dynamic"
    chat = conversation(target, tokenizer)
    assert [turn.reused for turn, _ in ask_all(chat)] == [0, 0, 0]


def interrupting(after: int) -> Callable[[RowStep], None]:
    left = [after]

    def tell(step: RowStep) -> None:
        left[0] -= len(step.committed)
        if left[0] <= 0:
            raise KeyboardInterrupt

    return tell


def test_an_interrupted_answer_stays_and_the_conversation_goes_on(chat):
    first = chat.ask(QUESTIONS[0], silent)
    cut = chat.ask(QUESTIONS[1], interrupting(after=3))
    assert cut.finished == INTERRUPTED and 3 <= len(cut.answer) < cut.limit
    assert chat.messages[-1] == {"role": "assistant", "content": cut.text} and chat.turns == [first, cut]
    last = chat.ask(QUESTIONS[2], silent)
    assert cut.reused <= last.reused < len(last.prompt)  # what was cached before the interrupted call
    assert_is_vanillas(chat, last)


def test_a_question_that_is_interrupted_before_its_first_token_is_taken_back(chat):
    chat.ask(QUESTIONS[0], silent)
    before = copy.deepcopy((chat.messages, chat.stats))

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = chat.pair.target.register_forward_pre_hook(interrupt)
    turn = chat.ask(QUESTIONS[1], silent)
    hook.remove()
    assert turn.answer == [] and (chat.messages, chat.stats) == before
    assert_is_vanillas(chat, chat.ask(QUESTIONS[1], silent))


def test_an_interrupt_while_the_cache_is_filled_drops_it(chat, monkeypatch):
    chat.ask(QUESTIONS[0], silent)

    def interrupt(decoding: Any, width: int, cache: Any) -> None:
        cache.reset()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outcome, "hand_back_cache", interrupt)
        assert chat.ask(QUESTIONS[1], silent).reused > 0
    last = chat.ask(QUESTIONS[2], silent)
    assert last.reused == 0
    assert_is_vanillas(chat, last)


def test_a_comparison_starts_from_as_much_cache_and_leaves_the_conversation_alone(chat):
    for question in QUESTIONS[:2]:
        turn = chat.ask(question, silent)
    messages, shown = copy.deepcopy(chat.messages), []
    with fed_tokens(chat.pair.target) as counts:
        compared = chat.compare(shown.append)
    assert compared.answer == shown == turn.answer and compared.same == len(shown)
    assert compared.speedup == pytest.approx(compared.seconds / turn.seconds)
    assert counts == [turn.reused, len(turn.prompt) - turn.reused, *[1] * (len(shown) - 1)]
    assert chat.messages == messages
    assert_is_vanillas(chat, chat.ask(QUESTIONS[2], silent))


def test_a_comparison_with_an_interrupted_answer_is_as_long(chat):
    turn = chat.ask(QUESTIONS[0], interrupting(after=3))
    assert chat.compare(lambda token: None).answer == turn.answer


def test_reset_begins_anew(chat):
    first = chat.ask(QUESTIONS[0], silent)
    chat.ask(QUESTIONS[1], silent)
    chat.reset()
    again = chat.ask(QUESTIONS[0], silent)
    assert (again.prompt, again.answer, again.reused) == (first.prompt, first.answer, 0)


def test_a_conversation_that_is_too_long_stays_as_it_was(chat):
    turn = chat.ask("q" * 235, silent)
    assert turn.limit == 256 - len(turn.prompt) < 24  # what the model has positions for
    messages = chat.messages
    with pytest.raises(ValueError, match=r"too long.*256 positions; /reset begins anew"):
        chat.ask("and " * 20, silent)
    assert chat.messages is messages


def test_a_system_message_comes_first(llama, tokenizer):
    chat = conversation(llama, tokenizer)
    chat = Conversation(chat.pair, chat.drafting, chat.options, 8, system="be kind")
    assert chat.pair.tokenizer.decode(chat.ask("hello", silent).prompt).startswith("s be kind\nu hello\na")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "be kind"}]


def test_what_is_no_chat_is_an_error(embedded):
    with pytest.raises(ValueError, match="no chat template, so --system has no place"):
        Conversation(embedded, {}, {}, 8, system="be kind")
    pair: Any = SimpleNamespace(target=SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True)), tokenizer=None)
    with pytest.raises(ValueError, match="SimpleNamespace has an encoder"):
        Conversation(pair, {}, {}, 8)


def test_the_tokenizers_end_ends_answers_of_a_target_that_names_none(tokenizer):
    target = make_model(ARCHITECTURES["llama"](), seed=12)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "c"
    assert conversation(target, tokenizer).options["eos_token_id"] == tokenizer.eos_token_id
