"""Compiled attention: equals PyTorch's for all shapes; the same tokens; and behaviour if it cannot be compiled."""

import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, make_model, make_prompts, perturbed
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig
from transformers.utils import logging

from hf_specdec import SpeculationStats
from hf_specdec.kernels import compiled_attention
from hf_specdec.pairs import choice

pytestmark = pytest.mark.skipif(compiled_attention.find_compiler() is None, reason="needs a C++ compiler")

# rows, K/V heads, groups, queries, keys, width, width of values
SHAPES = {
    "one of each": (1, 1, 1, 1, 1, 32, 32),
    "decoding": (1, 2, 2, 5, 1100, 64, 64),
    "one chunk less one": (2, 3, 1, 1, 255, 32, 64),
    "more lanes than sums": (2, 1, 13, 1, 300, 64, 32),
    "a full block of lanes": (1, 2, 4, 4, 513, 64, 64),
    "several blocks of lanes": (3, 2, 4, 9, 777, 128, 96),
    "odd widths of queries": (1, 2, 2, 3, 40, 80, 32),
}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is built or loaded yet; the folder for the build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled_attention._function.cache_clear()
    logging.get_logger("hf_specdec.kernels.compiled_attention").warning_once.cache_clear()
    yield tmp_path / "hf_specdec"
    compiled_attention._function.cache_clear()


def make(shape: tuple[int, ...], dtype: torch.dtype, masked: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value and mask, strided as in models: heads within positions, and room after the keys."""
    rows, kv_heads, groups, queries, keys, width, value_width = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def states(positions: int, heads: int, columns: int) -> Tensor:
        return 2 * torch.randn(rows, positions, heads, columns, generator=generator).to(dtype)

    query = states(queries, kv_heads * groups, width).transpose(1, 2)
    key = states(keys + 5, kv_heads, width).transpose(1, 2).contiguous()[:, :, :keys]
    value = states(keys + 3, kv_heads, value_width).transpose(1, 2)[:, :, :keys]
    if masked == "no mask":
        return query, key, value, None
    mask = torch.rand(1 if masked == "one for all rows" else rows, 1, queries, keys, generator=generator) < 0.5
    if masked == "few":  # chunks of keys that only the last query sees, or all except that one; or nobody sees anything
        mask[..., 256:] = False
        mask[:, :, -1] ^= True
        mask[:, :, -1, :256] = False
    return query, key, value, mask


def check(shape: tuple[int, ...], dtype: torch.dtype, masked: str) -> None:
    query, key, value, mask = make(shape, dtype, masked)
    assert compiled_attention.takes(query, key, value, mask)
    given = compiled_attention.attend(query, key, value, mask, scaling=0.05)

    groups = query.shape[1] // key.shape[1]
    exact = query.double(), key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
    scores = exact[0] @ exact[1].transpose(2, 3) * 0.05
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1).nan_to_num(nan=0.0) @ exact[2]).transpose(1, 2)
    assert given.shape == expected.shape and given.dtype == dtype and given.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(given.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("masked", ["no mask", "one for each row", "one for all rows", "few"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_attention(shape: tuple[int, ...], dtype: torch.dtype, masked: str) -> None:
    check(shape, dtype, masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_few_heads_and_many_threads_divide_the_keys(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        for masked in ("no mask", "one for each row", "few"):
            check((1, 2, 2, 3, 3000, 64, 64), dtype, masked)
            check((2, 1, 1, 1, 600, 32, 32), dtype, masked)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="leaves out instructions of x86")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_other_processors(dtype: torch.dtype, anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["-march=x86-64-v2" if flag == "-march=native" else flag for flag in compiled_attention._FLAGS]
    monkeypatch.setattr(compiled_attention, "_FLAGS", flags)
    for shape in SHAPES.values():
        check(shape, dtype, "one for each row")


def test_scores_that_overflow_an_exponential() -> None:
    query, key, value, mask = make((1, 1, 2, 2, 400, 32, 32), torch.float32, "one for each row")
    given = compiled_attention.attend(query * 1000, key * 1000, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query * 1000, key * 1000, value, mask, enable_gqa=True)
    torch.testing.assert_close(given, expected.transpose(1, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, m: (q.half(), k.half(), v.half(), m),
        lambda q, k, v, m: (q, k.bfloat16(), v.bfloat16(), m),
        lambda q, k, v, m: (q, k, v[..., :24], m),
        lambda q, k, v, m: (q[..., :31], k[..., :31], v, m),
        lambda q, k, v, m: (q[:, :3], k, v, m),
        lambda q, k, v, m: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v, m),
        lambda q, k, v, m: (q, k, v, m.float()),
        lambda q, k, v, m: (q, k, v, m[..., :-1]),
        lambda q, k, v, m: (q, k, v, m.expand(-1, 2, -1, -1)),
        lambda q, k, v, m: (q.to("meta"), k.to("meta"), v.to("meta"), m),
        lambda q, k, v, m: (torch.nn.Parameter(q), k, v, m),
    ],
)  # fmt: skip
def test_what_it_cannot_do_it_does_not_take(change: Callable[..., Any]) -> None:
    states = make((2, 2, 2, 3, 50, 64, 64), torch.float32, "one for each row")
    assert compiled_attention.takes(*states)
    assert not compiled_attention.takes(*change(*states))


def test_neither_gradients_nor_other_precisions_are_lost() -> None:
    states = make((2, 2, 2, 3, 50, 64, 64), torch.float32, "no mask")
    with torch.enable_grad():
        assert not compiled_attention.takes(*states)
    with torch.autocast("cpu", torch.bfloat16):
        assert not compiled_attention.takes(*states)


# ------------------------------------------------------------------------------------------------------- in generate()


def llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**{**SIZES, "head_dim": 32, **changes})


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "grouped": llama,
    "one group each": lambda: llama(num_key_value_heads=4),
    "sliding": lambda: MistralConfig(**{**SIZES, "head_dim": 32, "sliding_window": 12}),
}


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of queries in each call of compiled attention."""
    attend, seen = compiled_attention.attend, []

    def counted(query: Tensor, *args: Any) -> Tensor:
        seen.append(query.shape[2])
        return attend(query, *args)

    monkeypatch.setattr(compiled_attention, "attend", counted)
    return seen


def speculate(pair: Any, prompts: dict[str, Tensor], compile: Any = "attention", **options: Any) -> Any:
    stats = SpeculationStats()
    options = {"assistant_model": pair[1], "num_assistant_tokens": 4, "max_new_tokens": 40} | options
    options["num_assistant_tokens_schedule"] = "constant"  # whatever is under test
    given = pair[0].generate(
        **prompts, strategy="spec", speculation_compile=compile, speculation_stats=stats, **options
    )
    return given.tolist(), stats


@pytest.mark.core
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_vanillas(name: str, rows: int, cache: str | None, uses: list[int]) -> None:
    for seed in range(3):
        target = make_model(CONFIGS[name](), seed)
        pair, prompts = (target, perturbed(target, 0.1, seed + 1)), make_prompts(rows, seed=seed)
        expected = target.generate(**prompts, max_new_tokens=40).tolist()
        for gamma in (1, 4, 7):
            given, stats = speculate(pair, prompts, num_assistant_tokens=gamma, cache_implementation=cache)
            assert given == expected
            assert 0 < stats.acceptance_rate < 1
            assert gamma + 1 in uses or cache == "static"  # which rounds up
            assert len(uses) > 2 * stats.target_forwards  # layers
            uses.clear()
        speculate(pair, prompts, compile=False)
        target.generate(**prompts, max_new_tokens=4)
        assert not uses, "without being asked for"


def test_a_call_inside_another_asks_for_itself(uses: list[int]) -> None:
    target = make_model(llama())
    pair, prompts = (target, perturbed(target, 0.1)), make_prompts(1)
    counts: list[int] = []

    def inner(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        before = len(uses)
        if not counts:
            speculate(pair, prompts, compile=False)
            counts.append(len(uses) - before)
            uses.clear()
        return torch.zeros(len(input_ids), dtype=torch.bool)

    speculate(pair, prompts, stopping_criteria=[inner])
    assert counts == [0] and uses


def test_look_up_has_attention_to_compile(uses: list[int]) -> None:
    target, prompts = make_model(llama()), make_prompts(2)
    expected = target.generate(**prompts, max_new_tokens=40).tolist()
    for compile in (True, "attention"):
        uses.clear()
        given, _ = speculate((target, None), prompts, compile, prompt_lookup_num_tokens=3, num_assistant_tokens=None)
        assert given == expected and uses


def test_it_is_built_once(anew: Path) -> None:
    target, prompts = make_model(llama()), make_prompts(1)
    pair = target, perturbed(target, 0.1)
    _, stats = speculate(pair, prompts)
    assert stats.compile_seconds > 0
    (library,) = anew.iterdir()
    made = library.stat().st_mtime_ns
    assert speculate(pair, prompts)[1].compile_seconds == 0
    compiled_attention._function.cache_clear()  # another process
    assert speculate(pair, prompts)[1].compile_seconds > 0
    assert [path.stat().st_mtime_ns for path in anew.iterdir()] == [made]


@pytest.mark.parametrize(
    ("compiler", "reason"), [(None, "no C++ compiler found: install one"), ("false", "returned non-zero exit status 1")]
)
def test_without_a_compiler_attention_is_pytorchs(
    compiler: str | None, reason: str, anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, uses: list[int]
) -> None:
    found = None if compiler is None else shutil.which(compiler)
    monkeypatch.setattr(compiled_attention.shutil, "which", lambda name: found)
    target, prompts = make_model(llama()), make_prompts(1)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(compiled_attention.logger, "propagate", True)
    for _ in range(2):
        given, _ = speculate((target, perturbed(target, 0.1)), prompts)
        assert given == target.generate(**prompts, max_new_tokens=40).tolist()
    assert not uses
    messages = [record.getMessage() for record in caplog.records if "PyTorch's is used" in record.getMessage()]
    assert len(messages) == 1 and reason in messages[0]


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    eager = make_model(llama(), attn_implementation="eager")
    speculate((eager, perturbed(eager, 0.1)), make_prompts(1))
    assert "Attention of LlamaForCausalLM is 'eager', and only 'sdpa' is compiled" in caplog.text

    target, prompts = make_model(llama()), make_prompts(1)
    draft = perturbed(target, 0.1)
    with pytest.raises(TypeError, match="`speculation_compile` must be a bool or a string, got 3 of type int"):
        speculate((target, draft), prompts, compile=3)
    with pytest.raises(
        ValueError, match="must be one of 'draft', 'target', 'attention', or True for all of them, got 'it'"
    ):
        speculate((target, draft), prompts, compile="it")
    monkeypatch.setattr(choice, "model_device", lambda model: torch.device("cuda:0"))
    with pytest.raises(ValueError, match=r"`speculation_compile='attention'` is for CPUs.*on cuda:0: leave it out"):
        speculate((target, draft), prompts)
    with pytest.raises(
        ValueError, match="`speculation_compile='draft'` compiles a draft model, and this call has none"
    ):
        speculate((target, None), prompts, compile="draft", prompt_lookup_num_tokens=3, num_assistant_tokens=None)
