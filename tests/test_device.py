"""Forwards run without PyTorch's autograd bookkeeping, which callers must not notice."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pretend_cuda
import pytest
import torch
from conftest import make_pair, make_prompts
from torch import Tensor

from hf_specdec.device import no_bookkeeping, row_index
from hf_specdec.sampling.context import Context


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("sample", [False, True])
def test_what_generate_returns_is_free_of_inference_mode(batch: int, sample: bool) -> None:
    target, draft = make_pair("llama")
    out = target.generate(
        **make_prompts(batch), assistant_model=draft, strategy="spec", max_new_tokens=12, do_sample=sample,
        return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    layers = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    found = list(tensors([out.sequences, out.scores, out.logits, out.hidden_states, layers]))
    assert len(found) > 4 * 12
    assert not any(tensor.is_inference() for tensor in found)


def test_what_a_hook_keeps_may_take_part_in_a_backward_pass() -> None:
    target, draft = make_pair("llama")
    kept: list[Tensor] = []
    hook = target.model.layers[0].register_forward_hook(lambda module, args, output: kept.extend(tensors(output)))
    try:
        target.generate(**make_prompts(1), assistant_model=draft, strategy="spec", max_new_tokens=8, do_sample=False)
    finally:
        hook.remove()
    probe = torch.nn.Linear(kept[0].shape[-1], 1)
    probe(kept[0]).sum().backward()
    assert probe.weight.grad is not None


def test_only_models_without_hooks_go_without_bookkeeping() -> None:
    target, _ = make_pair("llama")
    cpu = torch.device("cpu")
    assert no_bookkeeping(target, cpu) is torch.inference_mode
    assert no_bookkeeping(target, torch.device("cuda")) is nullcontext
    for register in (target.register_forward_hook, target.model.norm.register_forward_pre_hook):
        hook = register(lambda *args: None)
        assert no_bookkeeping(target, cpu) is nullcontext
        hook.remove()
    assert no_bookkeeping(target, cpu) is torch.inference_mode


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_calls_in_inference_mode_and_outside_of_it_may_follow_each_other(options: dict[str, Any]) -> None:
    """Caches and tokens are written in both modes, and static ones are kept between calls."""
    target, draft = make_pair("llama")
    prompts = make_prompts(4)
    limits: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    expected = target.generate(**prompts, **limits)
    for mode in (nullcontext, torch.inference_mode, nullcontext):
        hook = target.register_forward_hook(lambda *args: None) if mode is nullcontext else None
        with mode():
            ids = target.generate(**prompts, **limits, assistant_model=draft, strategy="spec", **options)
        if hook is not None:
            hook.remove()
        assert torch.equal(ids, expected)


def test_a_context_that_grows_in_inference_mode_is_written_outside_of_it() -> None:
    context = Context(torch.ones(2, 400, dtype=torch.int64), [0, 0], max_length=5000, pad_token_id=0)
    with torch.inference_mode():
        context.write_drafts(torch.ones(2, 9, dtype=torch.int64), offset=1000)
    context.append([[7], [8]])
    assert context.row(0)[-1] == 7


def test_rows_that_commit_nothing_stay_as_they_are() -> None:
    for rows in (1, 2):
        context = Context(torch.ones(rows, 4, dtype=torch.int64), [0] * rows, max_length=9, pad_token_id=0)
        context.append([[]] * rows)
        assert context.ends == [4] * rows and context.tokens.dtype == torch.int64


def test_an_index_of_rows_belongs_to_the_stream_that_made_it(cuda: pretend_cuda.Device) -> None:
    """Work on another stream would not wait for it."""
    device = torch.device("cuda", 0)
    first = row_index([2, 0], device)
    assert row_index([2, 0], device) is first
    with torch.cuda.stream(torch.cuda.Stream()):
        assert row_index([2, 0], device) is not first
    assert row_index([2, 0], device) is first
