"""What suffix decoding searches, against plain loops over lists: the index, the rows of a call, and the memory."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from hf_specdec.drafters.suffix_index import NO_TOKEN, VOTERS, Continuation, Found, Limits, SuffixIndex
from hf_specdec.drafters.suffix_texts import CallTexts, Memory, Text
from hf_specdec.sampling.context import Context

PAD = 0
WIDE = Limits(tokens=8, factor=100.0, probability=0.0, vocab_size=1000)


# ------------------------------------------------------------------------------------------------- slow references


def matching(one: list[int], other: list[int], depth: int) -> int:
    """How many last tokens are equal, up to `depth`; ids that are not tokens equal nothing."""
    n = 0
    while n < min(depth, len(one), len(other)) and one[-1 - n] == other[-1 - n] >= 0:
        n += 1
    return n


def occurrences(tail: list[int], texts: list[list[int]], depth: int) -> tuple[int, list[list[int]]]:
    """The length of the longest end of `tail` after which some text goes on, and what follows each time."""
    sizes = [(matching(text[:i], tail, depth), text[i:]) for text in texts for i in range(1, len(text)) if text[i] >= 0]
    longest = max((size for size, _ in sizes), default=0)
    return longest, [following for size, following in sizes if size == longest > 0]


def assert_follows(given: Continuation, size: int, following: list[list[int]], limits: Limits = WIDE) -> None:
    """Each token has most votes of those occurrences that agree so far; it ends for a reason."""
    alive, score = 1.0, 0.0
    for i in range(limits.tokens):
        votes = Counter(f[i] for f in following if len(f) > i and 0 <= f[i] < limits.vocab_size)
        most = max(votes.values(), default=0)
        probability = most / (sum(votes.values()) + 1 / (size + i)) if size else 0.0
        if i == len(given.tokens):
            assert not votes or i >= limits.factor * size or alive * probability < limits.probability
            break
        assert votes[given.tokens[i]] == most
        assert given.confidence[i] == pytest.approx(probability)
        alive *= probability
        score += alive
        following = [f for f in following if len(f) > i and f[i] == given.tokens[i]]
    assert given.score == pytest.approx(score)
    assert len(given.tokens) == len(given.confidence) <= limits.tokens


def what_follows(index: SuffixIndex, found: Found) -> tuple[int, list[list[int]]]:
    """The same as `occurrences`, of an index."""
    longest = max(found.sizes, default=0)
    texts = [index.tokens[place:].tolist() for place, n in zip(found.places, found.sizes) if n == longest]
    return longest, [text[: text.index(NO_TOKEN)] for text in texts]


def until_separator(texts: list[list[int]]) -> list[list[int]]:
    return sorted(text[: text.index(NO_TOKEN)] if NO_TOKEN in text else text for text in texts)


def some_text(rng: random.Random, alphabet: int, most: int) -> list[int]:
    """Random tokens with repetitions, and now and then an id that is not one."""
    text: list[int] = []
    while len(text) < most:
        begin = rng.randrange(len(text) + 1)
        text += text[begin : begin + rng.randrange(20)] or [rng.randrange(alphabet)]
        text += [NO_TOKEN] if rng.random() < 0.02 else []
    return text[:most]


# ----------------------------------------------------------------------------------------------------------- memory


def filled(texts: list[list[int]], depth: int = 24, max_tokens: int = 100_000, max_requests: int = 1000) -> Memory:
    memory = Memory(depth, max_tokens, max_requests)
    for text in texts:
        memory.add(Text(np.array(text, np.int32)))
    return memory


def look_up(memory: Memory, tail: list[int]) -> Found:
    asking = SuffixIndex(len(tail) + 1, memory.index.depth)
    end = asking.first + len(tail)
    asking.tokens[asking.first : end] = tail
    return memory.index.find(asking.query(end), WIDE.tokens)


@pytest.mark.parametrize("depth", [1, 3, 16, 24])
@pytest.mark.parametrize("alphabet", [2, 5])
def test_memory_finds_all_occurrences_of_the_longest_run(alphabet: int, depth: int) -> None:
    """In few and short texts, so that no more than `VOTERS` places count."""
    rng = random.Random(alphabet * depth)
    matched = 0
    for _ in range(40):
        texts = [some_text(rng, alphabet, rng.randint(1, 10)) for _ in range(3)]
        memory = filled(texts, depth)
        for text in [*texts, some_text(rng, alphabet, 30)]:
            tail = text[: rng.randint(1, len(text))]
            size, following = occurrences(tail, texts, depth)
            found = look_up(memory, tail)
            own_size, own_following = what_follows(memory.index, found)
            assert own_size == size
            assert sorted(own_following) == until_separator(following)
            assert_follows(memory.index.follow(found, WIDE), size, until_separator(following))
            matched += size > 1
    assert matched > 20 or depth == 1


def test_the_latest_places_vote() -> None:
    memory = filled([[1, 2]] * VOTERS + [[1, 3]] * VOTERS)
    found = look_up(memory, [9, 1])
    assert len(found.places) == VOTERS
    assert memory.index.follow(found, WIDE).tokens == [3]


def test_a_long_text_that_comes_again_is_found_whole_though_its_words_are_common() -> None:
    """There are more than `VOTERS` places after each short run."""
    rng = random.Random(0)
    texts = [[rng.randrange(3) for _ in range(300)] for _ in range(40)]
    memory = filled(texts, depth=64)
    for text in texts:
        found = look_up(memory, text[:200])
        assert max(found.sizes) == 64
        assert memory.index.follow(found, WIDE).tokens == text[200:208]


@pytest.mark.parametrize("max_tokens", [40, 150, 9000])
@pytest.mark.parametrize("max_requests", [3, 1000])
def test_memory_holds_the_latest_texts_that_fit(max_tokens: int, max_requests: int) -> None:
    """9000 positions are more than an index begins with."""
    rng = random.Random(max_tokens)
    memory, texts = Memory(24, max_tokens, max_requests), []
    forgotten = 0
    for _ in range(300):
        texts.append([rng.randrange(4) for _ in range(rng.randint(1, max_tokens // 4))])
        memory.add(Text(np.array(texts[-1], np.int32)))
        held = [text.tokens.tolist() for text in memory]
        assert held == texts[-len(held) :]
        assert len(held) == len(memory) <= max_requests
        assert memory.tokens == sum(map(len, held)) and memory.tokens + len(held) <= max_tokens
        forgotten += len(held) < min(len(texts), max_requests)
        # Nothing is forgotten in vain: what is kept and the next older text would leave less than a text's room.
        if len(held) < min(len(texts), max_requests):
            assert memory.tokens + len(held) + len(texts[-len(held) - 1]) + 1 > max_tokens - max_tokens // 4
        tail = texts[-1][: rng.randint(1, len(texts[-1]))]
        if max_tokens < 200:
            size, following = occurrences(tail, held, 24)
            own_size, own_following = what_follows(memory.index, look_up(memory, tail))
            assert own_size == size
            assert len(following) >= VOTERS or sorted(own_following) == sorted(following)
    assert forgotten > 50 or max_requests == 3


def test_memory_takes_no_more_bytes_than_its_limit_says() -> None:
    memory = Memory(64, 50_000, 100_000)
    for number in range(400):
        memory.add(Text(np.arange(number, number + 500, dtype=np.int32)))
    assert memory.index.nbytes < 66 * 50_000
    few = Memory(64, 50_000, 2)
    for number in range(400):
        few.add(Text(np.arange(number, number + 500, dtype=np.int32)))
    assert few.index.nbytes < 66 * 10_000  # for as much as is held, not as was seen


def test_of_a_text_that_is_too_long_the_end_is_kept() -> None:
    memory = filled([list(range(100))], max_tokens=11)
    assert [text.tokens.tolist() for text in memory] == [list(range(90, 100))]
    for max_tokens, max_requests in ((1, 5), (5, 0)):
        assert list(filled([[1, 2, 3]], max_tokens=max_tokens, max_requests=max_requests)) == []


def test_known_tokens_are_compared_with_but_not_found() -> None:
    memory = Memory(24, 1000, 10)
    memory.add(Text(np.array([1, 2, 3, 4, 5, 6], np.int32), known=3))
    assert [look_up(memory, tail).sizes for tail in ([1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [7, 3, 4])] == [
        [],
        [],
        [],
        [4],
        [2],
    ]
    memory._rebuild(500)
    assert look_up(memory, [1, 2]).sizes == []
    assert look_up(memory, [1, 2, 3, 4]).sizes == [4]


# ------------------------------------------------------------------------------------------------------ continuations


def follow(texts: list[list[int]], tail: list[int], limits: Limits = WIDE) -> list[int]:
    memory = filled(texts)
    return memory.index.follow(look_up(memory, tail), limits).tokens


def test_the_most_frequent_token_follows() -> None:
    texts = [[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]]
    assert follow(texts, [1, 2]) == [3, 5]
    assert follow(texts[:2], [1, 2]) == [4]  # of equals, the latest


def test_a_draft_is_bounded_by_its_limits() -> None:
    texts = [list(range(1, 100))]
    assert follow(texts, [5, 6]) == [7, 8, 9, 10, 11, 12, 13, 14]
    assert follow(texts, [5, 6], WIDE._replace(factor=1.5)) == [7, 8, 9]
    assert follow(texts, [6], WIDE._replace(factor=0.1)) == [7]
    assert follow(texts, [5, 6], WIDE._replace(vocab_size=9)) == [7, 8]
    # 1/2, 1/2 * 2/3, 1/2 * 2/3 * 3/4...
    assert follow(texts, [6], WIDE._replace(probability=0.3)) == [7, 8]


def test_a_token_is_the_surer_the_longer_the_run_and_the_more_occurrences_there_are() -> None:
    def sure(texts: list[list[int]], tail: list[int]) -> float:
        memory = filled(texts)
        return memory.index.follow(look_up(memory, tail), WIDE).confidence[0]

    assert sure([[1, 2, 3]], [2]) == 1 / 2
    assert sure([[1, 2, 3]], [1, 2]) == 2 / 3
    assert sure([[1, 2, 3]] * 9, [2]) == 9 / 10
    assert sure([[1, 2, 3]] * 4 + [[1, 2, 4]], [1, 2]) == 4 / 5.5


# ----------------------------------------------------------------------------------------------------- rows of a call


def make_context(rows: list[list[int]], room: int = 400) -> Context:
    width = max(map(len, rows))
    prompt = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    return Context(prompt, [width - len(row) for row in rows], width + room, PAD)


def found_in(texts: CallTexts, row: int, everywhere: bool = True) -> tuple[int, list[list[int]]]:
    end = texts.own(row).stop
    found = texts.index.find(texts.index.query(end), WIDE.tokens, but=end)
    assert everywhere or all(place in texts.everything_of(row) for place in found.places)
    return what_follows(texts.index, found)


@pytest.mark.parametrize("alphabet", [2, 6])
def test_rows_are_found_as_far_as_they_are_committed(alphabet: int) -> None:
    """Tokens are committed in pieces and taken back again; rows leave; texts outgrow the room that they began with."""
    rng = random.Random(alphabet)
    for _ in range(12):
        prompts = [[rng.randrange(alphabet) for _ in range(rng.randint(1, 9))] for _ in range(3)]
        context = make_context(prompts)
        texts = CallTexts(context, 24, 1000, [])
        for _ in range(40):
            context.append([[rng.randrange(alphabet) for _ in range(rng.randint(0, 6))] for _ in context.rows])
            if rng.random() < 0.2:
                row = rng.choice(context.rows)
                context.withdraw(row, rng.randint(0, context.ends[row] - context.prompt_width))
            if rng.random() < 0.02 and len(context.rows) > 1:
                context.rows.pop(0)
            texts.update(context)
            rows = [context.row(row).tolist() for row in range(3)]
            for row, tokens in enumerate(rows):
                others = [text for other, text in enumerate(rows) if other != row]
                size, following = occurrences(tokens, [tokens, *others], 24)
                own_size, own_following = found_in(texts, row)
                assert own_size <= size
                if len(following) < VOTERS // 4:  # runs of a smaller linked size count too, and so do other rows' ends
                    assert own_size == size
                    assert set(map(tuple, own_following)) <= set(map(tuple, following))


def test_a_single_row_is_found_exactly() -> None:
    rng = random.Random(3)
    for alphabet in (3, 8):
        context = make_context([[rng.randrange(alphabet) for _ in range(5)]])
        texts = CallTexts(context, 16, 1000, [])
        for _ in range(15):
            context.append([[rng.randrange(alphabet) for _ in range(rng.randint(1, 5))]])
            if rng.random() < 0.3:
                context.withdraw(0, rng.randint(1, 4))
                texts.update(context)
                context.append([[rng.randrange(alphabet)]])
            texts.update(context)
            tokens = context.row(0).tolist()
            size, following = occurrences(tokens, [tokens], 16)
            assert found_in(texts, 0) == (size, sorted(following, key=len)[:VOTERS])


def test_a_copy_goes_on_in_what_was_copied() -> None:
    context = make_context([[7, 1, 2, 3, 1, 2, 3]])
    texts = CallTexts(context, 24, 1000, [])
    own = texts.own(0)
    found = texts.index.find(texts.index.query(own.stop), WIDE.tokens, but=own.stop)
    assert texts.index.follow(found, WIDE, own).tokens == [1, 2, 3, 1, 2, 3, 1, 2]
    assert texts.index.follow(found, WIDE).tokens == [1, 2, 3]


def test_rows_of_one_prompt_are_found_once() -> None:
    prompt = [5, 6, 7, 8]
    context = make_context([prompt, prompt, [5, 6]])
    texts = CallTexts(context, 24, 1000, [])
    assert found_in(texts, 2) == (2, [[7, 8]])
    context.append([[1, 2], [3, 4], [9]])
    texts.update(context)
    assert found_in(texts, 2)[0] == 0
    context.append([[5], [5, 6], [7, 8]])
    texts.update(context)
    assert [found_in(texts, row)[0] for row in (1, 2)] == [2, 2]
    assert sorted(found_in(texts, 1)[1]) == [[7, 8, 1, 2, 5], [9, 7, 8]]
    assert sorted(found_in(texts, 2)[1]) == [[1, 2, 5], [3, 4, 5, 6]]
    remembered = [(text.tokens[text.known :].tolist(), text.tokens.tolist()) for text in texts.to_remember()]
    assert remembered == [
        ([5, 6, 7, 8, 1, 2, 5], [5, 6, 7, 8, 1, 2, 5]),
        ([8, 3, 4, 5, 6], [5, 6, 7, 8, 3, 4, 5, 6]),
        ([5, 6, 9, 7, 8], [5, 6, 9, 7, 8]),
    ]


def test_what_the_encoder_read_is_found_but_is_not_part_of_the_text() -> None:
    encoded = [np.array([4, 5, 6, 7], np.int32), np.array([4, NO_TOKEN, 6, 9], np.int32)]
    context = make_context([[1, 4, 5], [1, 2, 6]])
    texts = CallTexts(context, 24, 1000, encoded)
    assert found_in(texts, 0, everywhere=False) == (2, [[6, 7]])
    assert found_in(texts, 1) == (1, [[9], [7]])
    context.append([[6, 7], [4]])
    texts.update(context)
    assert found_in(texts, 0)[0] == 0  # the encoder's input does not go on in the row's text
    assert [text.tokens.tolist() for text in texts.to_remember()] == [
        [4, 5, 6, 7, NO_TOKEN, 1, 4, 5, 6, 7],
        [4, NO_TOKEN, 6, 9, NO_TOKEN, 1, 2, 6, 4],
    ]


def test_ids_that_are_not_tokens_end_runs_and_drafts() -> None:
    image = 5000
    context = make_context([[1, 2, image, 3, 1, 2]])
    assert found_in(CallTexts(context, 24, 1000, []), 0) == (0, [])
    context = make_context([[1, image, 3, 4, 1, image, 3]])
    assert found_in(CallTexts(context, 24, 1000, []), 0) == (1, [[4, 1]])
