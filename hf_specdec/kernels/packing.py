"""A second copy of linear weights, in the layout that oneDNN's matrix products prefer.

On CPUs PyTorch converts bfloat16 weights to that layout in each product, which for the few tokens of a verification
takes as long as the product itself; for float32 it uses a library that may be slow with few rows. With weights packed
once, products are much faster and the same: bit for bit in bfloat16, up to rounding in float32, so float32 logits may
shift by that much when packing begins. Which shapes become faster is measured once per machine.

While calls of `generate(strategy="spec")` run, `nn.Linear.forward` is this module's function, which uses packed weights
only in threads that are inside such a call, for the layers of its models. Models are not touched.
"""

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers.utils import logging

from . import machine
from .swap import Function, Swap, compiles_ours, operators

logger = logging.get_logger(__name__)

# By default, models of up to so many bytes are packed, once their calls may have generated so many tokens in all.
MAX_BYTES = 1 << 30
MIN_NEW_TOKENS = 64
# How much faster products must be for a weight to be packed. Small weights cost hardly any memory, and their products
# take too few microseconds to measure more than that they are not slower.
_MIN_GAIN, _MIN_GAIN_OF_SMALL = 1.1, 0.9
_SMALL_BYTES = 1 << 20
# Number of measurements: more than the least if any is within a margin (a factor) of the gain that is enough.
_LEAST_ROUNDS, _MOST_ROUNDS, _MARGIN = 3, 9, 1.05
# How much of a weight to measure with.
_TRIED_BYTES = 1 << 24
# Words of 8 bytes whose sum is kept. A prime, as rows have lengths with many divisors.
_RUN = 1021
# Number of tokens per product to pack for.
_TOKENS = 16


class _Packed(NamedTuple):
    weight: Tensor  # oneDNN's
    fingerprint: tuple[Tensor, Tensor]  # of the model's own weight


class _Pair(NamedTuple):
    own: Tensor  # the model's weight
    packed: Tensor


class _Thread(threading.local):
    def __init__(self) -> None:
        self.layers: dict[nn.Module, _Pair] = {}
        self.weights: dict[int, _Pair] = {}  # the same, by address of the weight


_thread = _Thread()
_lock = threading.Lock()
_kept: "WeakKeyDictionary[nn.Module, _Packed]" = WeakKeyDictionary()
_changing: "WeakSet[nn.Module]" = WeakSet()  # models whose weights changed after packing
_new_tokens: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()  # by model, over all calls
_gains: dict[tuple[torch.Size, torch.dtype, int], bool] = {}  # by shape, dtype and threads, whether packing pays


@contextmanager
def packed_linears(
    models: Iterable[nn.Module], wanted: bool | None, new_tokens: int, by_clock: bool = True
) -> Iterator[float]:
    """Inside, linear layers of `models` use packed weights in this thread.

    Args:
        wanted: pack every model (True), none (False), or where it pays (None): models with up to 1 GiB of such weights,
            which do not change, once calls are long or many enough. Only shapes that become faster are packed, which is
            measured once per machine and kept (`machine.decision`).
        new_tokens: the most tokens that this call can generate.
        by_clock: leave out layers whose products would not become faster, as measured here. Processes that compute a
            model together must not measure: each would leave out different layers. Then None packs none.

    Yields: seconds that packing took; nearly 0 if an earlier call has done it.
    """
    packed = PackedLinears(models, wanted, new_tokens, by_clock)
    with packed.in_use():
        yield packed.seconds


class PackedLinears:
    """The same for work that pauses, so that it is `in_use` several times; arguments as for `packed_linears`."""

    def __init__(self, models: Iterable[nn.Module], wanted: bool | None, new_tokens: int, by_clock: bool = True):
        began = perf_counter()
        self._layers: dict[nn.Module, _Pair] = {}
        if wanted or (wanted is None and by_clock):
            with _lock, torch.no_grad():
                for model in models:
                    self._layers |= _packed_layers(model, bool(wanted), new_tokens, by_clock)
        self._weights = {pair.own.data_ptr(): pair for pair in self._layers.values()}
        self.seconds = perf_counter() - began

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, linear layers use packed weights in this thread."""
        before = _thread.layers, _thread.weights
        _thread.layers, _thread.weights = self._layers, self._weights
        try:
            with exchanged() if self._layers else nullcontext():
                yield
        finally:
            _thread.layers, _thread.weights = before


def forget(model: nn.Module | None = None) -> None:
    """Free the packed weights of a model, or all; calls in progress keep theirs until they end."""
    with _lock:
        if model is None:
            _kept.clear()
        else:
            for module in model.modules():
                _kept.pop(module, None)


def _packed_layers(model: nn.Module, wanted: bool, new_tokens: int, by_clock: bool) -> dict[nn.Module, _Pair]:
    """The original and packed weight of each packed linear layer; packs layers first where needed."""
    _new_tokens[model] = _new_tokens.get(model, 0) + new_tokens
    modules: Iterable[Any] = model.modules()
    layers = [module for module in modules if _can_be_packed(module)]
    often = _new_tokens[model] >= MIN_NEW_TOKENS
    if not (wanted or often or any(layer in _kept for layer in layers)):
        return {}  # before measuring anything
    layers = [layer for layer in layers if not by_clock or _gains_by_it(layer.weight)]
    if _have_changed(layers):
        for layer in layers:
            _kept.pop(layer, None)
        if not wanted:
            _changing.add(model)
            logger.warning_once(
                f"Weights of {type(model).__name__} have changed since they were packed for the CPU, so they are no "
                "longer packed. `speculation_pack_weights=True` packs them again after each change."
            )
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    pays = often and size <= MAX_BYTES and model not in _changing
    if wanted or pays:
        for layer in layers:
            if layer not in _kept:
                sums, rest = _fingerprint(layer.weight)
                _kept[layer] = _Packed(_pack(layer.weight), (sums, rest.clone()))
    if wanted and not layers:
        logger.warning_once(
            f"`speculation_pack_weights` finds nothing to pack in {type(model).__name__}: it has no linear layers "
            "on the CPU, in float32 or bfloat16, that packing would make faster."
        )
    return {layer: _Pair(layer.weight, _kept[layer].weight) for layer in layers if layer in _kept}


def _can_be_packed(module: Any) -> bool:
    if type(module) is not nn.Linear or type(module.weight) not in (Tensor, nn.Parameter):
        return False
    weight, bias = module.weight, module.bias
    is_plain = weight.device.type == "cpu" and weight.layout is torch.strided and weight.is_contiguous()
    is_plain = is_plain and (bias is None or bias.dtype == weight.dtype)
    has_sums = weight.numel() > 0 and (weight.shape[1] * weight.element_size()) % 8 == weight.data_ptr() % 8 == 0
    return is_plain and has_sums and _packs(weight.dtype)


def _packs(dtype: torch.dtype) -> bool:
    mkldnn = torch.backends.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _gains_by_it(weight: Tensor) -> bool:
    """Whether packing makes products with weights like this one faster: decided once per machine."""
    kind = (weight.shape, weight.dtype, torch.get_num_threads())
    if kind not in _gains:
        rows, columns = weight.shape
        name = f"packing-{str(weight.dtype).removeprefix('torch.')}-{rows}x{columns}"
        _gains[kind] = machine.decision(name, lambda: _decide(weight))
    return _gains[kind]


def _decide(weight: Tensor) -> tuple[bool, dict[str, Any]]:
    """Whether packing pays, and the measurements: rounds continue until all agree, or the median decides."""
    is_small = weight.numel() * weight.element_size() <= _SMALL_BYTES
    enough = _MIN_GAIN_OF_SMALL if is_small else _MIN_GAIN
    weight = weight.detach()[: max(_TRIED_BYTES // (weight.shape[1] * weight.element_size()), 1)]
    packed, gains = _pack(weight), list[float]()
    while len(gains) < _MOST_ROUNDS:
        gains.append(_measure_gain(weight, packed))
        is_clear = min(gains) > enough * _MARGIN or max(gains) < enough / _MARGIN
        if is_clear and len(gains) >= _LEAST_ROUNDS:
            break
    gain = median(gains)
    return gain >= enough, {"gain": round(gain, 3), "enough": enough, "rounds": [round(g, 3) for g in gains]}


def _measure_gain(weight: Tensor, packed: Tensor) -> float:
    """How many times faster products with one and with five tokens are with the packed weight."""
    plain_seconds = packed_seconds = 0.0
    for tokens in (1, 5):
        few = weight.new_ones(1, tokens, weight.shape[1])
        plain, ours = [], []
        for _ in range(4):  # alternate, and keep the fastest: a busy machine only makes products slower
            clock = [perf_counter()]
            nn.functional.linear(few, weight)
            clock.append(perf_counter())
            _multiply(few, packed, None)
            clock.append(perf_counter())
            plain.append(clock[1] - clock[0])
            ours.append(clock[2] - clock[1])
        plain_seconds, packed_seconds = plain_seconds + min(plain), packed_seconds + min(ours)
    return plain_seconds / packed_seconds


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _TOKENS)
    return packed


def _fingerprint(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int64 sums of the raw memory in runs of _RUN words, and what is left after the last of them.

    Rounding hides no change, and it is as fast as reading. Runs begin elsewhere in each row, so exchanged rows and
    columns show too.
    """
    words = weight.view(torch.int64)
    runs, left = divmod(words.numel(), _RUN)
    whole = words.as_strided((runs, _RUN), (_RUN, 1))
    return whole.sum(dim=1), words.as_strided((left,), (1,), words.storage_offset() + runs * _RUN)


def _have_changed(layers: list[Any]) -> bool:
    """Whether any weights are not as they were when they were packed."""
    known = [(layer.weight, _kept[layer]) for layer in layers if layer in _kept]
    if any((own.dtype, own.shape) != (kept.weight.dtype, kept.weight.shape) for own, kept in known):
        return True
    now = [part for own, _ in known for part in _fingerprint(own)]
    before = [part for _, kept in known for part in kept.fingerprint]
    return bool(known) and not torch.equal(torch.cat(now), torch.cat(before))


def _multiply(tokens: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = _operator()(tokens, packed, bias, "none", [], "")
    return product


@functools.cache
def _operator() -> Any:
    """Cached, because a look-up by name takes a microsecond, hundreds of times per forward."""
    return torch.ops.mkldnn._linear_pointwise.default


def _over(original: Function) -> Function:
    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            if compiles_ours() and input.device.type == "cpu":
                return torch.ops.hf_specdec.linear(input, self.weight, self.bias)
        else:
            known = _thread.layers.get(self)
            if known is not None and known.own is self.weight and _takes(input, known.packed):
                return _multiply(input, known.packed, self.bias)
        result: Tensor = original(self, input)
        return result

    return forward


def _takes(tokens: Tensor, packed: Tensor) -> bool:
    is_usual = type(tokens) is Tensor and tokens.dtype == packed.dtype and tokens.ndim > 1 and tokens.numel() > 0
    return is_usual and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def _compiled_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compiled code has weights but no layers."""
    known = _thread.weights.get(weight.data_ptr())
    if known is not None and known.own.shape == weight.shape and _takes(input, known.packed):
        return _multiply(input, known.packed, bias)
    return nn.functional.linear(input, weight, bias)


def _fake_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


operators.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
operators.impl("linear", _compiled_linear, "CompositeExplicitAutograd")
torch.library.register_fake("hf_specdec::linear", _fake_linear, lib=operators)

# Inside, linear layers may use packed weights.
exchanged = Swap(lambda: nn.Linear.forward, lambda function: setattr(nn.Linear, "forward", function), _over)
