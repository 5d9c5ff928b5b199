"""Packed weights: the same products, from the current weights, only in our calls and threads."""

import copy
import gc
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, make_model, make_prompts, perturbed
from torch import Tensor, nn
from transformers import LlamaConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_specdec import SpeculationStats
from hf_specdec.kernels import machine, packing
from hf_specdec.kernels.packing import packed_linears

Pair = tuple[PreTrainedModel, PreTrainedModel]
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if packing._packs(dtype)]

pytestmark = [
    pytest.mark.skipif(not DTYPES, reason="this machine's PyTorch packs no weights"),
    pytest.mark.usefixtures("weights_packed_from_the_first_token_on"),
]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens in each product with a packed weight, in any thread."""
    seen: list[int] = []
    multiply = packing._multiply

    def count(tokens: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        if packing._thread.weights:
            seen.append(tokens.numel() // tokens.shape[-1])
        return multiply(tokens, packed, bias)

    monkeypatch.setattr(packing, "_multiply", count)
    return seen


@pytest.fixture
def pair() -> Pair:
    """A pair that this test may change."""
    target = make_model(LlamaConfig(**SIZES), seed=3)
    return target, perturbed(target, 0.12, seed=4)


def vanilla(target: PreTrainedModel, batch: int = 2, new_tokens: int = 12, **kwargs: Any) -> list[list[int]]:
    out = target.generate(**make_prompts(batch), do_sample=False, max_new_tokens=new_tokens, **kwargs)
    assert isinstance(out, Tensor)
    return out.tolist()


def spec(pair: Pair, batch: int = 2, new_tokens: int = 12, **kwargs: Any) -> list[list[int]]:
    options = {"assistant_model": pair[1], "strategy": "spec", "num_assistant_tokens": 3} | kwargs
    return vanilla(pair[0], batch, new_tokens, **options)


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (5, 4), (1, 1, 64), (2, 5, 192), (8, 4, 264), (1, 600, 128)])
def test_products_are_those_of_pytorch(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for out in (1, 7, 96, 350):
        layer = nn.Linear(shape[-1], out, bias=bias, dtype=dtype)
        for tokens in (torch.randn(shape), torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2], torch.randn(shape).mT.mT):
            tokens = tokens.to(dtype)
            with torch.no_grad():
                expected = layer(tokens)
                with packed_linears([layer], True, 0):
                    assert packing._thread.weights
                    given = layer(tokens)
            assert given.dtype == dtype and given.shape == expected.shape
            scale = tokens.float().abs().matmul(layer.weight.float().abs().T).max().item()
            assert (given.double() - expected.double()).abs().max().item() <= 4 * torch.finfo(dtype).eps * scale
            if dtype == torch.bfloat16 and not bias:
                assert torch.equal(given, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_with_packed_weights_say_the_same(dtype: torch.dtype, pair: Pair, products: list[int]) -> None:
    pair = pair[0].to(dtype), pair[1].to(dtype)
    without = spec(pair, new_tokens=40, speculation_pack_weights=False)
    assert not products
    stats = SpeculationStats()
    assert spec(pair, new_tokens=40, speculation_stats=stats) == without
    assert products
    assert stats.packing_seconds > 0
    assert 0.1 < stats.acceptance_rate < 0.95
    if dtype == torch.float32:
        assert without == vanilla(pair[0], new_tokens=40)


def test_the_draft_is_packed_too(pair: Pair, products: list[int]) -> None:
    spec(pair)
    both = len(products)
    products.clear()
    spec((pair[0], None), prompt_lookup_num_tokens=3, assistant_model=None, num_assistant_tokens=None)  # type: ignore[arg-type]
    assert 0 < len(products) < both


# ------------------------------------------------------------------------------------------ weights that are not packed


def test_what_is_too_big_or_asked_too_seldom_is_left(
    pair: Pair, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [m.weight.numel() * 4 for m in pair[0].modules() if type(m) is nn.Linear]
    monkeypatch.setattr(packing, "MAX_BYTES", sum(sizes) - 1)
    spec(pair)
    assert not products
    spec(pair, speculation_pack_weights=True)
    assert products


def test_short_calls_pack_once_there_were_enough(
    pair: Pair, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MIN_NEW_TOKENS", 24)
    asked: list[Tensor] = []
    monkeypatch.setattr(packing, "_gains_by_it", lambda weight: not asked.append(weight))
    spec(pair, new_tokens=11)
    spec(pair, new_tokens=12)
    assert not products
    assert not asked, "measured though nothing could come of it"
    spec(pair, new_tokens=1)
    assert products


def test_products_that_would_not_be_faster_are_left(
    pair: Pair, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = pair[0].get_output_embeddings().weight
    monkeypatch.setattr(packing, "_gains_by_it", lambda weight: weight.shape == head.shape)
    stats = SpeculationStats()
    spec(pair, speculation_stats=stats)
    prefills = stats.target_prefill_forwards + stats.draft_prefill_forwards
    assert len(products) == stats.target_forwards + stats.draft_forwards + prefills  # the head's, once in each


@pytest.mark.parametrize(
    "odd",
    [
        lambda layer: layer.to(torch.float64),
        lambda layer: layer.to("meta"),
        lambda layer: nn.Linear(7, 8),  # rows that are no multiple of 8 bytes
        lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
        lambda layer: type("Other", (nn.Linear,), {})(16, 8),
        lambda layer: _with_weight(layer, layer.weight.T.contiguous().T),
    ],
)
def test_other_layers_are_left_and_who_asked_is_told(
    odd: Callable[[nn.Linear], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(packing.logger, "warning_once", said.append)
    layer = odd(nn.Linear(16, 8))
    with packed_linears([layer], None, 0):
        assert not packing._thread.weights
    assert not said
    with packed_linears([layer], True, 0):
        assert not packing._thread.weights
    assert "finds nothing to pack in" in said[0]


def _with_weight(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    layer.weight = nn.Parameter(weight.detach())
    return layer


def test_packing_can_be_switched_off_in_pytorch(pair: Pair, products: list[int]) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        spec(pair)
    assert not products


def test_the_option_is_a_bool(pair: Pair) -> None:
    with pytest.raises(TypeError, match="`speculation_pack_weights` must be a bool, got 'yes' of type str"):
        spec(pair, speculation_pack_weights="yes")


# ------------------------------------------------------------------------------------------------- weights that change


def _halve(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.down_proj.weight.data.mul_(-0.5)  # which autograd's version counter does not see


def _swap_rows(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].self_attn.v_proj.weight.data
    weight.copy_(weight.roll(3, dims=0))


def _swap_hidden_units(model: PreTrainedModel) -> None:
    """Swaps groups of eight, rows of gate and up and columns of down, so that the latter's row sums stay."""
    mlp = model.model.layers[0].mlp
    for layer, dim in ((mlp.up_proj, 0), (mlp.down_proj, 1)):
        layer.weight.data.copy_(layer.weight.data.roll(8, dims=dim))


def _roll_columns(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight.copy_(weight.roll(8, dims=1))


def _exchange_columns(model: PreTrainedModel) -> None:
    weight = model.lm_head.weight.data
    weight[:, [4, 5, 20, 21]] = weight[:, [20, 21, 4, 5]]


def _train(model: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    ids = make_prompts(2)["input_ids"]
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def _load(model: PreTrainedModel) -> None:
    model.load_state_dict(make_model(LlamaConfig(**SIZES), seed=9).state_dict())


def _replace(model: PreTrainedModel) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().flip(0))


def _exchange_layer(model: PreTrainedModel) -> None:
    model.lm_head = copy.deepcopy(model.lm_head)
    model.lm_head.weight.data.copy_(model.lm_head.weight.data.roll(1, dims=0))


@pytest.mark.parametrize(
    "change",
    [
        _halve,
        _swap_rows,
        _swap_hidden_units,
        _roll_columns,
        _exchange_columns,
        _train,
        _load,
        _replace,
        _exchange_layer,
    ],
    ids=lambda f: f.__name__,
)
def test_changed_weights_are_noticed(
    change: Callable[[PreTrainedModel], None], pair: Pair, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = vanilla(pair[0], new_tokens=30)
    assert spec(pair, new_tokens=30) == first
    change(pair[0])
    changed = vanilla(pair[0], new_tokens=30)
    assert changed != first
    assert spec(pair, new_tokens=30) == changed
    assert spec(pair, new_tokens=30, speculation_pack_weights=True) == changed
    assert spec(pair, new_tokens=30) == changed


def test_who_changes_weights_packs_no_more_unless_asked(
    pair: Pair, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(packing.logger, "warning_once", said.append)
    lookup = {"assistant_model": None, "num_assistant_tokens": None, "prompt_lookup_num_tokens": 3}
    spec(pair, **lookup)
    _halve(pair[0])
    products.clear()
    spec(pair, **lookup)
    assert not products
    assert "LlamaForCausalLM have changed" in said[0] and "`speculation_pack_weights=True`" in said[0]
    spec(pair, **lookup, speculation_pack_weights=True)
    assert products


def test_another_dtype_is_another_weight(products: list[int]) -> None:
    """Zeros have the same sums in any dtype."""
    layer, before = nn.Linear(16, 8), 0
    layer.weight.data.zero_()
    for dtype in (*DTYPES, torch.float64, *DTYPES[::-1]):
        layer.to(dtype)
        with torch.no_grad(), packed_linears([layer], True, 0):
            assert torch.equal(layer(torch.ones(1, 16, dtype=dtype)), layer.bias[None])
        before += dtype in DTYPES
        assert len(products) == before


def test_another_shape_is_another_weight(products: list[int]) -> None:
    """Of the same memory."""
    layer = nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        for inputs in (16, 8):
            layer.weight.data = layer.weight.data.view(-1, inputs)
            expected = layer(torch.ones(1, inputs))
            with packed_linears([layer], True, 0):
                torch.testing.assert_close(layer(torch.ones(1, inputs)), expected)
    assert len(products) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes_are_refused_as_by_pytorch(dtype: torch.dtype, products: list[int]) -> None:
    layer = nn.Linear(16, 8, dtype=dtype)
    with torch.no_grad(), packed_linears([layer], True, 0):
        for other in {torch.float32, torch.bfloat16, torch.float64} - {dtype}:
            with pytest.raises(RuntimeError, match="same dtype"):
                layer(torch.ones(1, 16, dtype=other))
    assert not products


def test_nothing_is_kept_of_models_that_are_gone(pair: Pair) -> None:
    gc.collect()
    before = len(packing._kept)
    own = copy.deepcopy(pair)
    spec(own)
    assert len(packing._kept) > before
    del own
    gc.collect()
    assert len(packing._kept) == before


# ------------------------------------------------------------------------------------------------ only inside our calls


class Inside(LogitsProcessor):
    """Runs an action once in the middle of `generate()`."""

    def __init__(self, call: Callable[[], None]):
        self.call: Callable[[], None] | None = call

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        call, self.call = self.call, None
        if call is not None:
            call()
        return scores


def inside(call: Callable[[], None]) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList([Inside(call)])}


def test_linear_layers_are_pytorchs_again_afterwards(pair: Pair) -> None:
    before = nn.Linear.forward

    def fail() -> None:
        assert nn.Linear.forward is not before
        raise ArithmeticError("in the middle")

    with pytest.raises(ArithmeticError, match="middle"):
        spec(pair, **inside(fail))
    assert nn.Linear.forward is before
    assert not packing._thread.weights
    assert spec(pair) == vanilla(pair[0])
    assert nn.Linear.forward is before


def test_other_threads_compute_as_ever(pair: Pair, products: list[int]) -> None:
    counted: list[int] = []

    def elsewhere() -> None:
        before = len(products)
        thread = threading.Thread(target=lambda: vanilla(pair[0]))
        thread.start()
        thread.join()
        counted.append(len(products) - before)

    spec(pair, **inside(elsewhere))
    assert counted == [0]
    assert products


def test_calls_within_calls_have_their_own_layers(pair: Pair, products: list[int]) -> None:
    other = make_model(LlamaConfig(**SIZES), seed=8)
    counted: list[int] = []

    def within() -> None:
        expected = vanilla(other, 1)
        for packs in (False, True):
            before = len(products)
            options = {"prompt_lookup_num_tokens": 2, "strategy": "spec", "speculation_pack_weights": packs}
            assert vanilla(other, 1, **options) == expected
            counted.append(len(products) - before)

        products.clear()

    expected = vanilla(pair[0])
    assert spec(pair, **inside(within)) == expected
    assert counted[0] == 0 < counted[1]
    assert products  # of the outer call, which continues


def test_calls_in_inference_mode_leave_nothing_that_others_could_not_take(pair: Pair, products: list[int]) -> None:
    with torch.inference_mode():
        first = spec(pair)
    assert products
    assert spec(pair) == first == vanilla(pair[0])


def test_gradients_may_be_taken_inside(pair: Pair) -> None:
    """As gradient guidance does, in a processor or criterion."""
    layer = pair[0].model.layers[0].mlp.up_proj

    def differentiate() -> None:
        with torch.enable_grad():
            pair[0](input_ids=make_prompts(1)["input_ids"]).logits.logsumexp(-1).sum().backward()

    spec(pair, **inside(differentiate))
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_a_weight_that_is_replaced_in_the_middle_is_taken(pair: Pair) -> None:
    def replace() -> None:
        layer = pair[0].lm_head
        layer.weight = nn.Parameter(layer.weight.detach().roll(1, dims=0))

    with torch.no_grad(), packed_linears([pair[0]], True, 0):
        ids = make_prompts(1)["input_ids"]
        before = pair[0](input_ids=ids).logits
        replace()
        torch.testing.assert_close(pair[0](input_ids=ids).logits, before.roll(1, dims=-1))


def test_autocast_is_honoured(pair: Pair, products: list[int]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        given = spec(pair, new_tokens=20)
        without = spec(pair, new_tokens=20, speculation_pack_weights=False)
    assert given == without
    assert not products


def test_experts_without_tokens(products: list[int]) -> None:
    layer = nn.Linear(16, 8)
    with torch.no_grad(), packed_linears([layer], True, 0):
        assert layer(torch.empty(0, 16)).shape == (0, 8)
        assert layer(torch.ones(16)).shape == (8,)
        assert not products
        assert layer(torch.ones(1, 16)).shape == (1, 8)
    assert products


def test_what_is_compiled_inside_is_compiled_without_it(products: list[int]) -> None:
    """It also runs outside."""
    layer, tokens = nn.Linear(16, 8), torch.randn(2, 16)
    compiled = torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = layer(tokens)
        with packed_linears([layer], True, 0):
            torch.testing.assert_close(compiled(tokens), expected)
            assert not products
        torch.testing.assert_close(compiled(tokens), expected)


# --------------------------------------------------------------------------------------------- what pays, decided once


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is decided yet; the folder for the decisions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(monkeypatch)
    return tmp_path / "hf_specdec"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(packing, "_gains_by_it", GAINS_BY_IT)
    monkeypatch.setattr(packing, "_gains", {})


GAINS_BY_IT = packing._gains_by_it


def measure(gains: Iterable[float], monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Let measurements find these gains in this order. Returns: the shapes that were measured."""
    measured: list[torch.Size] = []
    following = iter(gains)

    def find(weight: Tensor, packed: Tensor) -> float:
        measured.append(weight.shape)
        return next(following)

    monkeypatch.setattr(packing, "_measure_gain", find)
    return measured


BIG, SMALL = torch.Size([600, 520]), torch.Size([96, 32])


@pytest.mark.parametrize(("shape", "gain", "pays"), [(BIG, 1.2, True), (BIG, 1.0, False), (SMALL, 1.0, True)])
def test_big_weights_must_gain_and_small_ones_must_not_lose(
    shape: torch.Size, gain: float, pays: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure(itertools.repeat(gain), monkeypatch)
    assert packing._gains_by_it(torch.ones(shape)) is pays
    assert measured == [shape] * 3


@pytest.mark.parametrize(
    ("gains", "pays", "rounds"),
    [
        ([1.5, 1.6, 1.4], True, 3),
        ([0.9, 1.0, 0.8], False, 3),
        ([1.5, 0.5, 1.5, 1.4, 1.5, 1.6, 1.5, 1.5, 1.5], True, 9),  # disturbed once
        ([1.0, 1.0, 3.0, 1.0, 0.9, 1.0, 1.0, 2.0, 1.0], False, 9),
        ([1.12, 1.5, 1.5, 1.12, 1.08, 1.11, 1.09, 1.12, 1.3], True, 9),  # close to the required gain
        ([1.12, 1.0, 1.09, 1.12, 1.08, 1.11, 1.09, 1.08, 1.0], False, 9),
    ],
)
def test_single_disturbances_do_not_decide(
    gains: list[float], pays: bool, rounds: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure(gains, monkeypatch)
    assert packing._gains_by_it(torch.ones(BIG)) is pays
    assert len(measured) == rounds


@pytest.mark.parametrize(("first", "later"), [(1.11, 1.09), (1.09, 1.11), (1.8, 0.5)])
def test_what_was_decided_once_holds_for_later_processes(
    first: float, later: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure(itertools.repeat(first), monkeypatch)
    pays = packing._gains_by_it(torch.ones(BIG))
    assert pays is (first > 1.1)
    rounds = len(measured)
    packing._gains_by_it(torch.ones(BIG))
    assert len(measured) == rounds, "measured again in one process"
    forget(monkeypatch)
    measured = measure(itertools.repeat(later), monkeypatch)
    assert packing._gains_by_it(torch.ones(BIG)) is pays
    assert not measured


def test_each_shape_dtype_and_number_of_threads_is_a_question_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure(itertools.repeat(1.0), monkeypatch)
    weights = [torch.ones(shape, dtype=dtype) for shape in (BIG, SMALL, SMALL[::-1]) for dtype in DTYPES]
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for weight in weights:
            packing._gains_by_it(weight)
    assert len(measured) == 3 * 2 * len(weights)
    assert len(list(folder.rglob("*.json"))) == 2 * len(weights)
    assert len(list(folder.iterdir())) == 2
    assert not [path for path in folder.rglob("*") if path.is_dir() and path.parent != folder], "scratch is left"
    kept = json.loads(next(folder.rglob("packing-float32-600x520.json")).read_text())
    assert (kept["answer"], kept["gain"], kept["threads"]) in [(False, 1.0, 1), (False, 1.0, 2)]
    assert kept["torch"] == torch.__version__ and kept["cpu"]


@pytest.mark.parametrize("other", ["cpu", "torch", "isa"])
def test_another_machine_decides_for_itself(other: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Homes may be shared between machines, and PyTorch may be replaced."""
    measure(itertools.repeat(2.0), monkeypatch)
    assert packing._gains_by_it(torch.ones(BIG))
    forget(monkeypatch)
    measured = measure(itertools.repeat(0.5), monkeypatch)
    if other == "cpu":
        monkeypatch.setattr(machine, "cpu", lambda: ("Z80", "no flags at all"))
    elif other == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert not packing._gains_by_it(torch.ones(BIG))
    assert measured


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"answer": "yes"}', '{"answer": 1}', "\udcff"])
def test_a_file_that_cannot_be_read_is_replaced(content: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(itertools.repeat(2.0), monkeypatch)
    packing._gains_by_it(torch.ones(BIG))
    [path] = folder.rglob("*.json")
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    forget(monkeypatch)
    measured = measure(itertools.repeat(0.5), monkeypatch)
    assert not packing._gains_by_it(torch.ones(BIG))
    assert measured and json.loads(path.read_text())["answer"] is False


def test_where_nothing_can_be_kept_each_process_decides(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_text("a file where the folder should be")
    for gain in (2.0, 0.5):
        forget(monkeypatch)
        measure(itertools.repeat(gain), monkeypatch)
        assert packing._gains_by_it(torch.ones(BIG)) is (gain > 1)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    forget(monkeypatch)
    measure([2.0] * 3, monkeypatch)
    assert packing._gains_by_it(torch.ones(BIG))
    with pytest.raises(FileNotFoundError, match=r"no home.*XDG_CACHE_HOME"):
        machine.cache_folder()


@pytest.mark.parametrize("links", [True, False], ids=["", "without links"])
def test_who_measures_at_the_same_time_believes_who_was_first(
    links: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(machine.os, "link", lambda *paths: (_ for _ in ()).throw(OSError("not here")))

    def another_process() -> tuple[bool, dict[str, Any]]:
        assert machine.decision("question", lambda: (False, {"gain": 0.5})) is False
        return True, {"gain": 2.0}

    assert machine.decision("question", another_process) is False
    assert json.loads(next(folder.rglob("*.json")).read_text())["gain"] == 0.5


def test_gains_are_measured_once_per_shape(pair: Pair, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.Size] = []
    measure_gain = packing._measure_gain

    def record(weight: Tensor, packed: Tensor) -> float:
        measured.append(weight.shape)
        gain = measure_gain(weight, packed)
        assert gain > 0
        return gain

    monkeypatch.setattr(packing, "_measure_gain", record)
    for _ in range(2):
        spec(pair)
    assert set(measured) == {m.weight.shape for m in pair[0].modules() if type(m) is nn.Linear}
    assert all(3 <= n <= 9 for n in Counter(measured).values())
