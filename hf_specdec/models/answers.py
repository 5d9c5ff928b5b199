"""Answers of models to probes: one memory and one tolerance rule for all probes.

A probe computes the same logits in two ways and compares them. They are never equal to the last bit, because kernels
round differently for different shapes. The allowed difference is measured, not assumed: vanilla also computes logits in
two ways (a text in one forward, and token by token), and their difference shows how much the model rounds, whatever its
precision, kernels and weights. A probe may find a few times that difference.
"""

import contextlib
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..device import first_line, model_device

T = TypeVar("T")

# In units of the standard deviation of logits; root mean square over the vocabulary.
_FACTOR = 6.0  # the allowed difference, as a multiple of the measured noise
_LEAST = 1e-5  # always allowed, however small the measured noise
_EPS = 6.0  # always allowed, in units of the last place: masks select other kernels, which the noise need not show
_UNMEASURED, _UNMEASURED_IN_HALF = 1e-4, 0.1  # allowed where noise cannot be measured
_MOST = 0.02  # float32 or TF32 rounding does not explain a larger difference between the two ways of vanilla
_MOST_IN_HALF = 0.25  # the same in bfloat16 and float16
_HALF = 1e-4  # the eps of half precisions is above this
_IDS = 512  # probe texts use the first so many token ids
# Rounding alone may make a router choose other experts. No model does so on every text; a fault shows in every text.
_ATTEMPTS = 3


class Differs(Exception):
    """A probe got logits that differ from vanilla's."""


class CannotBeAsked(Exception):
    """The model cannot be fed a few tokens of text alone, or gives no finite logits."""


@dataclass(frozen=True)
class Answer:
    """Whether a model can do something.

    Attributes:
        reason: what the probe saw it do instead, as a verb phrase that follows its name; empty if it can.
        cause: the exception that ended the probe.
        asked: False where the model could not be probed.
    """

    reason: str = ""
    cause: BaseException | None = None
    asked: bool = True

    def __bool__(self) -> bool:
        return not self.reason

    @property
    def compared(self) -> bool:
        """Whether the reason is an observed result, not a failure of the probe."""
        return isinstance(self.cause, Differs)

    def refusal(self, message: str) -> ValueError:
        """The error with this message, chained to the cause."""
        error = ValueError(message)
        error.__cause__ = self.cause
        return error


# model -> (question, precision) -> finding
_memory: "weakref.WeakKeyDictionary[PreTrainedModel, dict[Hashable, Any]]" = weakref.WeakKeyDictionary()


def remembered(model: PreTrainedModel, question: Hashable, find_out: Callable[[], T]) -> T:
    """The result of `find_out`, called once per model, question, attention implementation and precision.

    Nothing is remembered for models in training mode, because dropout makes their answers random.
    """
    known = _memory.setdefault(model, {})
    key = question, precision(model)
    if key not in known or model.training:
        found = find_out()
        if model.training:
            return found
        known[key] = found
    result: T = known[key]
    return result


def ask(model: PreTrainedModel, question: Hashable, probe: Callable[[int], None]) -> Answer:
    """The answer to a question; see `remembered`.

    Args:
        question: identifies the question, the same in every call.
        probe: asks it with a text made from the seed that it is passed; it raises if the answer is no.
    """
    return remembered(model, question, lambda: _ask(probe))


@torch.no_grad()
def _ask(probe: Callable[[int], None]) -> Answer:
    answer = Answer()
    for seed in range(_ATTEMPTS):
        try:
            probe(seed)
            return Answer()
        except CannotBeAsked as error:
            return Answer(asked=False, cause=_without_frames(error))
        except Differs as error:
            answer = Answer(str(error), _without_frames(error))
        except Exception as error:  # a model may fail in any way where it was not made for this: the answer is no
            return Answer(f"fails when it is tried ({first_line(error)})", _without_frames(error))
    return answer


def _without_frames(error: BaseException) -> BaseException:
    """Frames hold the model, which an answer must not keep alive."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error


def precision(model: PreTrainedModel) -> Hashable:
    """The settings that rounding depends on, besides the model's code and weights."""
    implementation: str = model.config.get_text_config(decoder=True)._attn_implementation
    return implementation, model.dtype, _autocast(model), torch.get_float32_matmul_precision()


def _autocast(model: PreTrainedModel) -> torch.dtype | None:
    device = model_device(model).type
    with contextlib.suppress(RuntimeError):  # devices without autocast
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def tolerance(model: PreTrainedModel, noise: float | None = None) -> float:
    """How far apart logits may be; see `apart`.

    Args:
        noise: measured for this model in this precision; `None` where it was not.
    """
    eps = _eps(model)
    if noise is None:
        return _UNMEASURED_IN_HALF if eps > _HALF else _UNMEASURED
    least = max(_LEAST, _EPS * eps)
    return max(least, _FACTOR * noise) if is_rounding(model, noise) else least


def _eps(model: PreTrainedModel) -> float:
    """The eps of the coarsest precision that a forward computes in."""
    return max(torch.finfo(dtype).eps for dtype in (model.dtype, _autocast(model)) if dtype is not None)


def is_rounding(model: PreTrainedModel, noise: float) -> bool:
    """Whether rounding can explain this much noise."""
    return noise <= (_MOST_IN_HALF if _eps(model) > _HALF else _MOST)


def measured_noise(model: PreTrainedModel, measure: Callable[[], float]) -> float:
    """A model's noise in its present precision, measured once."""
    return remembered(model, "noise", measure)


def apart(got: Tensor, expected: Tensor) -> float:
    """How far apart logits `[..., vocab]` are at the worst position, in standard deviations of the expected ones."""
    got, expected = (torch.nan_to_num(logits.float(), nan=0.0, posinf=0.0, neginf=0.0) for logits in (got, expected))
    difference = (got - expected).square().mean(dim=-1).sqrt().max()
    return float(difference / expected.std().clamp(min=torch.finfo(torch.float32).tiny))


def check_same(model: PreTrainedModel, got: Tensor, expected: Tensor, noise: float | None, reason: str) -> None:
    """Raise `Differs` unless rounding explains the difference between logits `[..., vocab]`.

    Args:
        noise: see `tolerance`.
        reason: what the model does if they differ, as in `Answer`.
    """
    found, allowed = apart(got, expected), tolerance(model, noise)
    if not found <= allowed:
        raise Differs(f"{reason} (logits are {found:.2g} standard deviations apart; rounding is up to {allowed:.2g})")


def ordinary_tokens(model: PreTrainedModel, count: int, seed: int) -> list[int]:
    """Random text tokens that do not repeat periodically; none stands for padding, the end of a text, or an image."""
    config = model.config.get_text_config(decoder=True)
    named = [vars(each) for each in (config, model.config, model.generation_config) if each is not None]
    values = [value for names in named for name, value in names.items() if name.endswith(("_id", "_index", "_ids"))]
    special = {v for value in values for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
    ids = [token for token in range(min(config.vocab_size, _IDS)) if token not in special] or [0]
    generator = torch.Generator().manual_seed(seed)
    return [ids[i] for i in torch.randint(len(ids), (count,), generator=generator).tolist()]
