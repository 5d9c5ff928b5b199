"""Texts for values that are prompts: strings, or lists of chat messages. What datasets and Ray Data have in common."""

from collections.abc import Iterable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..generate.many import Generated, generate_many
from ..models.rope import positions_of
from ..pairs.pair import SpecPair

COUNTERS = ("row_iterations", "committed_tokens", "drafted_tokens", "accepted_tokens")  # of each result


class Unreadable(ValueError):
    """A value is no prompt."""


def texts_for(pair: SpecPair, values: Iterable[Any], is_chat: bool = False, /, **options: Any) -> Iterator[Generated]:
    """Results of `generate_many` for values, with the pair's draft, as its file recommends.

    Args:
        is_chat: strings are users' messages.
        options: those of `generate_many`.

    Returns: results as they end. Of a value that cannot be decoded, `error` says why; of one that is no prompt there is
        one result, with an `Unreadable`.

    Raises:
        TypeError, ValueError: for options with which no value could be decoded, at once.
    """
    longest = positions_of(pair.target)
    unreadable: dict[int, Exception] = {}

    def prompts() -> Iterator[list[int] | None]:
        for index, value in enumerate(values):
            try:
                yield prompt_ids(value, pair.tokenizer, is_chat, longest)
            except Exception as error:  # a template may raise anything
                unreadable[index] = error
                yield None  # which `generate_many` cannot decode

    def with_reason(result: Generated) -> Generated:
        reason = unreadable.pop(result.index, None)
        if reason is not None:
            result.error = Unreadable(str(reason))
            result.error.__cause__ = reason
        return result

    own = {"assistant_model": pair.draft, "tokenizer": pair.tokenizer, **pair.config.recommended}
    if pair.has_two_tokenizers:
        own["assistant_tokenizer"] = pair.tokenizers["assistant_tokenizer"]
    return map(with_reason, generate_many(pair.target, prompts(), on_error="result", **own | options))


def columns_of(result: Generated) -> dict[str, Any]:
    """A result as columns of a table."""
    stats = result.speculation
    return {
        "text": None if result.error is not None else result.text,
        "tokens": result.new_tokens.tolist(),
        "finish_reason": result.finished,
        "error": None if result.error is None else str(result.error),
        "statistics": {name: getattr(stats, name) for name in (*COUNTERS, "seconds")},
    }


def prompt_ids(value: Any, tokenizer: PreTrainedTokenizerBase, is_chat: bool, longest: int | None) -> list[int]:
    """The token ids of a text or of chat messages. If the last message is the assistant's, it is continued.

    Args:
        is_chat: a text is a user's message.
        longest: how many tokens the model has positions for.

    Raises:
        TypeError, ValueError, or what the template raises: if it is neither, empty or too long.
    """
    if isinstance(value, str) and not is_chat:
        ids = tokenizer(value)["input_ids"]
    else:
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
        is_list = isinstance(messages, list) and len(messages) > 0
        if not is_list or not all(isinstance(message, dict) and "role" in message for message in messages):
            raise TypeError(f"expected a text or a list of messages with roles, got {_shortened(value)}")
        # A table has all keys in each message.
        given = [{name: part for name, part in message.items() if part is not None} for message in messages]
        goes_on = given[-1]["role"] == "assistant"
        ids = tokenizer.apply_chat_template(
            given, tokenize=True, return_dict=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )
    if not ids:
        raise ValueError("the prompt is empty")
    if longest is not None and len(ids) >= longest:
        raise ValueError(f"the prompt is too long: it has {len(ids)} tokens, and the model {longest} positions")
    return [int(token) for token in ids]


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
