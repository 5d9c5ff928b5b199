"""What `scripts/benchmark_many` compares: the same texts in each way, and how many target forwards that takes."""

from typing import Any

import pytest

from hf_specdec import SpecPair
from hf_specdec.generate.many import _Many
from hf_specdec.generate.places import Places
from hf_specdec.loop.refill import RefilledDecoding
from hf_specdec.tools.refill import REFILLED, SORTED, STATIC, VANILLA, compare_ways


def test_ways_are_compared_on_the_same_texts(small_pair: Any, tokenizer: Any) -> None:
    pair = SpecPair(*small_pair, tokenizer)
    originals = Places.admit, _Many._count, RefilledDecoding.step
    texts = ["abc de f", "x y z hello world", "hello"]
    found = compare_ways(pair, texts, 12, 3, lengths=(4, 1.0), parts=2, options={"num_assistant_tokens": 3})
    assert found["differing"] == 0 and 0 < found["acceptance_rate"] < 1
    ways = found["ways"]
    assert [*ways] == [VANILLA, STATIC, SORTED, REFILLED] and ways[VANILLA]["ratio"] == 1
    for way in ways.values():
        assert way["tokens_per_second"] == pytest.approx(found["tokens"] / way["seconds"])
    assert ways[REFILLED]["forwards"] < ways[STATIC]["forwards"] < ways[VANILLA]["forwards"]
    assert 0 < found["prepare_share"] < found["host_share"] < 1
    assert found["reading_ratio"] > 0
    assert (Places.admit, _Many._count, RefilledDecoding.step) == originals
