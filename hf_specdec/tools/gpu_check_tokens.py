"""Greedy tokens of tiny models of many families, compared with vanilla's one by one, in float32."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..records.stats import SpeculationStats
from . import compat, lossless, tiny_models
from .gpu_check import ERROR, OK, STATIC, WRONG, Case, Part, Scale, attempt
from .tiny_inputs import inputs_of

ROWS = (1, 8)
NOISE = 0.12  # at which the drafts of these models agree in part

# The classes whose tiny models are tried, by family.
FAMILIES = {
    "dense": "LlamaForCausalLM",
    "window": "MistralForCausalLM",
    "window-and-full": "Gemma2ForCausalLM",
    "chunked": "Llama4ForCausalLM",
    "experts": "Qwen3MoeForCausalLM",
    "latent-attention": "DeepseekV3ForCausalLM",
    "learned-positions": "GPT2LMHeadModel",
    "alibi": "BloomForCausalLM",
    "encoder-decoder": "T5ForConditionalGeneration",
    "encoder-decoder-2": "BartForConditionalGeneration",
    "sound": "WhisperForConditionalGeneration",
    "recurrent": "Mamba2ForCausalLM",
    "gated-delta": "Qwen3NextForCausalLM",
    "hybrid": "BambaForCausalLM",
    "image": "LlavaForConditionalGeneration",
}
WINDOWS = ("window", "window-and-full", "chunked")
HYBRIDS = ("recurrent", "gated-delta", "hybrid")


def parts() -> list[Part]:
    return [
        *(Part(f"tokens/{name}", 40, partial(one_family, name)) for name in FAMILIES),
        Part("windows/beyond", 60, beyond_windows),
        Part("hybrids/rejected", 60, rejected_by_hybrids),
    ]


def one_family(name: str, scale: Scale) -> Iterator[Case]:
    """One row and eight uneven ones, on the ordinary cache and with fixed shapes."""
    target, draft = pair_of(name, scale)
    new_tokens = 12 if scale.tiny else 24
    for rows in ROWS:
        inputs = prompts_of(name, rows, scale)
        check = partial(compare_calls, target, inputs, new_tokens, gamma=3)
        yield attempt(rows_of(rows), partial(check, {"assistant_model": draft}))
        yield attempt(f"{rows_of(rows)}, static", partial(check, {"assistant_model": draft, **STATIC}))


def beyond_windows(scale: Scale) -> Iterator[Case]:
    """Prompts of several windows, and continuations of several more, with look-up too."""
    width, new_tokens = (30, 16) if scale.tiny else (60, 64)
    for name in WINDOWS:
        target, draft = pair_of(name, scale)
        for rows in ROWS:
            inputs = on_device(tiny_models.prompts(rows, width, seed=3), scale.device)
            check = partial(compare_calls, target, inputs, new_tokens, gamma=5)
            yield attempt(f"{name}, {rows_of(rows)}", partial(check, {"assistant_model": draft}))
            yield attempt(f"{name}, {rows_of(rows)}, static", partial(check, {"assistant_model": draft, **STATIC}))
        yield attempt(f"{name}, {rows_of(rows)}, look-up", partial(check, {}))


def rejected_by_hybrids(scale: Scale) -> Iterator[Case]:
    """Drafts that nearly always have to be undone, and some that do not: recurrent states go back to a snapshot."""
    new_tokens = 10 if scale.tiny else 48
    for name in HYBRIDS:
        for noise in (0.06,) if scale.tiny else (0.06, 0.3):
            target, draft = pair_of(name, scale, noise)
            for rows in ROWS:
                inputs = prompts_of(name, rows, scale)
                check = partial(compare_calls, target, inputs, new_tokens, {"assistant_model": draft}, gamma=5)
                yield attempt(f"{name}, {rows_of(rows)}, noise {noise}", check)


def pair_of(name: str, scale: Scale, noise: float = NOISE) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny model of a family and its draft; both are made on the CPU, so that they are the same everywhere."""
    target = tiny_models.build(entry_of(FAMILIES[name]))
    draft = tiny_models.perturbed(target, noise)
    return target.to(scale.device), draft.to(scale.device)


def entry_of(class_name: str) -> tiny_models.Entry:
    return next(entry for entry in tiny_models.entries() if entry.name == class_name)


def prompts_of(name: str, rows: int, scale: Scale) -> dict[str, Any]:
    """Prompts of uneven lengths, left-padded if the family takes a left-padded text; with images or sound if it can."""
    model = tiny_models.build(entry_of(FAMILIES[name]))
    make = list(inputs_of(model).values())[-1]
    inputs: dict[str, Any] = on_device(make(model, rows, 0), scale.device)
    return inputs


def on_device(value: Any, device: str) -> Any:
    """Tensors in dicts, lists, tuples and model outputs, moved to a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, ModelOutput):
        moved = copy.copy(value)
        for name, item in vars(value).items():
            setattr(moved, name, on_device(item, device))
        return moved
    if isinstance(value, dict):
        return {name: on_device(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(item, device) for item in value)
    return value


def compare_calls(
    target: PreTrainedModel, inputs: dict[str, Any], new_tokens: int, options: dict[str, Any], gamma: int
) -> tuple[str, str]:
    """Outcome and details of greedy speculation: the tokens must be vanilla's, in float32 without exception."""
    own = {"num_assistant_tokens": gamma} if "assistant_model" in options else {}
    if not own:
        own = {"prompt_lookup_num_tokens": gamma, "max_matching_ngram_size": 1}
    given = {"strategy": "spec", **own, **options}
    expected = greedy(target, inputs, new_tokens)
    stats = SpeculationStats()
    found = greedy(target, inputs, new_tokens, speculation_stats=stats, **given)
    if found.shape != expected.shape or not torch.equal(found, expected):
        return WRONG, difference(target, inputs, new_tokens, given, expected, found)
    if stats.drafted_tokens == 0:
        return ERROR, "nothing was drafted, so nothing was checked"
    return OK, f"{stats.accepted_tokens} of {stats.drafted_tokens} drafts accepted"


def greedy(target: PreTrainedModel, inputs: dict[str, Any], new_tokens: int, **options: Any) -> Tensor:
    output = target.generate(**copy.deepcopy(inputs), max_new_tokens=new_tokens, do_sample=False, **options)
    tokens: Tensor = getattr(output, "sequences", output)
    return tokens


def difference(
    target: PreTrainedModel,
    inputs: dict[str, Any],
    new_tokens: int,
    options: dict[str, Any],
    expected: Tensor,
    found: Tensor,
) -> str:
    """Where the tokens part, and how close the two choices were in a second run with logits."""
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    unlike = (found != expected).nonzero().tolist()
    row, column = min(unlike, key=lambda place: place[1])
    text = f"row {row} of {len(expected)} differs first, in column {column} of {expected.shape[1]}"
    answers = [compat.answer_of(target, inputs, new_tokens, **more) for more in ({}, options)]
    if not all(answer.rows for answer in answers):
        return text
    closer = lossless.compare(row, answers[0].rows[row], answers[1].rows[row], target.dtype)
    gaps = "none" if closer.gaps is None else " and ".join(f"{gap:.2g}" for gap in closer.gaps)
    return f"{text}; gaps between the two tokens {gaps}, logits off by {closer.deviation:.2g}"


def rows_of(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} uneven rows"
