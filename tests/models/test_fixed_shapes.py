"""Forwards kept between calls follow changes of the model; captures are on a simulated CUDA device."""

import gc
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pretend_cuda
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import make_prompts, perturbed
from static_calls import OPTIONS, Calls, make_target
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_specdec.models import compiled, graphs, kept
from hf_specdec.models.parts import parts_of

# ------------------------------------------------------------------------- other weights


def assign(target: PreTrainedModel, other: PreTrainedModel) -> None:
    target.load_state_dict(other.state_dict(), assign=True)
    target.tie_weights()


def swap_parameters(target: PreTrainedModel, other: PreTrainedModel) -> None:
    for module, theirs in zip(target.modules(), other.modules()):
        module._parameters.update(theirs._parameters)


def set_data(target: PreTrainedModel, other: PreTrainedModel) -> None:
    """As `Module.to` does."""
    for parameter, theirs in zip(target.parameters(), other.parameters()):
        parameter.data = theirs.data


def change_in_place(target: PreTrainedModel, other: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter, theirs in zip(target.parameters(), other.parameters()):
            parameter.copy_(theirs)


def exchange_two(target: PreTrainedModel, other: PreTrainedModel) -> None:
    mlp = target.model.layers[0].mlp, target.model.layers[1].mlp
    mlp[0].up_proj.weight, mlp[1].up_proj.weight = mlp[1].up_proj.weight, mlp[0].up_proj.weight


def untie(target: PreTrainedModel, other: PreTrainedModel) -> None:
    target.lm_head.weight = other.lm_head.weight


def replace_a_buffer(target: PreTrainedModel, other: PreTrainedModel) -> None:
    target.model.rotary_emb.inv_freq = target.model.rotary_emb.inv_freq * 9


def change_dtype(target: PreTrainedModel, other: PreTrainedModel) -> None:
    set_data(target, other)
    target.to(torch.float64)


def scale_scores(target: PreTrainedModel, other: PreTrainedModel) -> None:
    target.model.layers[1].self_attn.scaling *= 9


def change_the_activation(target: PreTrainedModel, other: PreTrainedModel) -> None:
    target.model.layers[0].mlp.act_fn = nn.Tanh()


CHANGES_OF_WEIGHTS = [
    assign, swap_parameters, set_data, change_in_place, exchange_two, untie, replace_a_buffer, scale_scores,
    change_the_activation, change_dtype,
]  # fmt: skip


def test_captured_forwards_are_the_models_after_each_change(cuda):
    call = Calls(make_target(), pretend_cuda.move)
    said = [call()[0]]
    for number, change in enumerate(CHANGES_OF_WEIGHTS):
        change(call.target, pretend_cuda.move(make_target(seed=32 + number)))
        captures = len(cuda.captures)
        said.append(call()[0])
        assert said[-1] != said[-2], change
        assert (len(cuda.captures) > captures) == (change is not change_in_place), change
    captures = len(cuda.captures)
    assert call()[0] == said[-1] and len(cuda.captures) == captures  # and they are kept again


def test_storage_of_another_dtype_is_not_used_again():
    call = Calls(make_target())
    call()
    storage = kept._kept[call.target][-1].forwards.cache
    for model in (call.target, call.draft):
        model.to(torch.float64)
    call()
    assert kept._kept[call.target][-1].forwards.cache is not storage
    assert {layer.keys.dtype for layer in kept._kept[call.target][-1].forwards.cache.layers} == {torch.float64}


def test_graphs_replay_with_new_tokens_and_other_rows_and_are_made_on_the_models_device(cuda):
    call = Calls(make_target(), pretend_cuda.move)
    with torch.cuda.device(torch.device("cuda", 3)):
        call(rows=3)
    replays, captures = cuda.replays, len(cuda.captures)
    call(rows=3, seed=1)
    assert cuda.replays > replays + 4 and len(cuda.captures) < 2 * captures
    assert set(cuda.captures) == {call.target.device}


def test_autocast_around_one_call_is_not_that_of_the_next():
    model = make_target()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = parts_of(model)
    assert inside != parts_of(model)


MODES: dict[str, Any] = {
    "deterministic": lambda on: torch.use_deterministic_algorithms(on),
    "TF32": lambda on: torch.set_float32_matmul_precision("high" if on else "highest"),
    "sums in bfloat16": lambda on: setattr(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", not on
    ),
    "sums in float16": lambda on: setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", not on),
    "benchmark": lambda on: setattr(torch.backends.cudnn, "benchmark", on),
    "no cuDNN": lambda on: setattr(torch.backends.cudnn, "enabled", not on),
    "no flash attention": lambda on: torch.backends.cuda.enable_flash_sdp(not on),
    "no efficient attention": lambda on: torch.backends.cuda.enable_mem_efficient_sdp(not on),
    "default dtype": lambda on: torch.set_default_dtype(torch.float64 if on else torch.float32),
}


@pytest.mark.parametrize("name", MODES)
def test_modes_of_pytorch_are_part_of_what_graphs_are_kept_for(name):
    model = make_target()
    before = parts_of(model)
    MODES[name](True)
    try:
        assert parts_of(model) != before
    finally:
        MODES[name](False)


def test_a_private_tensor_that_is_exchanged_is_noticed():
    model = make_target()
    model.model.norm._shift = torch.ones(4)
    before = parts_of(model)
    model.model.norm._shift = torch.ones(4)
    assert parts_of(model) != before


# ------------------------------------------------------------------------- hooks


class Counted(ModelHook):
    def __init__(self, seen: list[int]):
        self.seen = seen

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(1)
        return args, kwargs


@contextmanager
def hooked(model: PreTrainedModel, kind: str, seen: list[int]) -> Iterator[None]:
    def note(module: nn.Module, *_: Any) -> None:
        if kind != "global" or module is model.model.norm:
            seen.append(1)

    register = {
        "forward": model.model.layers[1].register_forward_hook,
        "pre-hook": model.model.norm.register_forward_pre_hook,
        "pre-hook of the model": model.register_forward_pre_hook,
        "global": nn.modules.module.register_module_forward_hook,
    }
    if kind == "accelerate":
        add_hook_to_module(model.model.norm, Counted(seen))
        yield
        return
    handle = register[kind](note)
    yield
    handle.remove()


def test_hooks_see_every_forward_though_graphs_were_captured_before(cuda, caplog):
    graphs.logger.warning_once.cache_clear()
    call = Calls(make_target(), pretend_cuda.move)
    for kind in ("forward", "pre-hook"):
        captures = len(cuda.captures)
        call()
        assert len(cuda.captures) > captures
        seen: list[int] = []
        with hooked(call.target, kind, seen):
            _, stats = call()
        # Vanilla's, one per token, and ours.
        assert len(seen) == OPTIONS["max_new_tokens"] + stats.target_forwards + stats.target_prefill_forwards
    assert "LlamaForCausalLM runs without CUDA graphs: it has hooks" in caplog.text


@pytest.mark.parametrize("kind", ["forward", "pre-hook", "pre-hook of the model", "global", "accelerate"])
def test_each_kind_of_hook_is_found(kind):
    model = make_target()
    assert not parts_of(model).hooked
    with hooked(model, kind, []):
        assert parts_of(model).hooked and compiled.compilable(model, compiled.STEPS, True, "drafts") == ()


# ----------------------------------------------------------------------- detected changes


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "train mode": lambda model: model.train(),
    "a config's attribute": lambda model: setattr(model.config, "rms_norm_eps", 0.5),
    "attention implementation": lambda model: model.set_attn_implementation("eager"),
    "a layer less": lambda model: setattr(model.model, "layers", model.model.layers[:1]),
    "one layer twice": lambda model: model.model.layers.__setitem__(1, model.model.layers[0]),
    "a forward of one's own": lambda model: setattr(model.lm_head, "forward", lambda states: -states @ states),
    "a list": lambda model: model.settings["active"].append("b"),
    "a plain tensor": lambda model: setattr(model, "steering", torch.ones(1)),
    "a larger vocabulary": lambda model: model.resize_token_embeddings(120, mean_resizing=False),
    "a hook": lambda model: model.lm_head.register_forward_hook(print),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parts_differ_after_a_change(name):
    model = make_target()
    model.settings = {"active": ["a"], "scale": 2.0}
    before = parts_of(model)
    assert parts_of(model) == before
    CHANGES[name](model)
    assert parts_of(model) != before


def test_parts_stay_the_same_over_calls_and_changes_in_place():
    call = Calls(make_target())
    before = parts_of(call.target)
    call()
    with torch.no_grad():
        call.target.lm_head.weight.mul_(2)
    assert parts_of(call.target) == before


def test_a_forward_that_was_exchanged_does_not_keep_its_model_alive():
    target = make_target()
    target.forward = types.MethodType(type(target).forward, target)
    gone, draft = weakref.ref(target), perturbed(target, 0.0)
    target.generate(**make_prompts(1), **OPTIONS, assistant_model=draft, strategy="spec", cache_implementation="static")
    assert target in kept._kept
    del target
    gc.collect()
    assert gone() is None


# ------------------------------------------------------------------------------ compiled, by any torch


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each compilation, in a torch that cannot isolate them from each other."""
    options_seen: list[dict[str, Any]] = []

    def compile(function: Callable[..., Tensor], *, dynamic: bool, options: dict[str, Any]) -> Callable[..., Tensor]:
        options_seen.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "keep_tensor_guards_unsafe", list, raising=False)
    return options_seen


@pytest.mark.parametrize("what", ["draft", "target"])
def test_a_torch_that_cannot_isolate_compilations_compiles(what, compilations, caplog):
    Calls(make_target())(cache_implementation=None, speculation_compile=what)
    assert [options["emulate_precision_casts"] for options in compilations] == [what == "target"]
    assert "could not be compiled" not in caplog.text


@pytest.mark.parametrize("what", ["draft", "target"])
def test_a_torch_that_cannot_leave_out_guards_is_named_and_nothing_is_compiled(what, compilations, caplog, monkeypatch):
    monkeypatch.delattr(torch.compiler, "keep_tensor_guards_unsafe", raising=False)
    graphs.logger.warning_once.cache_clear()
    Calls(make_target())(cache_implementation=None, speculation_compile=what)
    assert not compilations
    assert f"could not be compiled (PyTorch {torch.__version__} cannot drop guards" in caplog.text


def test_compiled_code_goes_on_with_other_weights_and_not_with_another_kind(compilations):
    call, options = Calls(make_target()), {"cache_implementation": None, "speculation_compile": "target"}
    said = [call(**options)[0]]
    for change, count in ((assign, 1), (scale_scores, 2), (change_dtype, 3)):
        change(call.target, make_target(seed=33 + count))
        said.append(call(**options)[0])
        assert len(compilations) == count and said[-1] != said[-2]


def test_why_a_model_is_not_compiled_is_the_reason_that_was_found(compilations, caplog):
    graphs.logger.warning_once.cache_clear()
    call = Calls(make_target())
    with hooked(call.target, "pre-hook of the model", []):
        call(cache_implementation=None, speculation_compile="target")
    call.target.peft_config = {}
    call(cache_implementation=None, speculation_compile="target")
    assert "LlamaForCausalLM verifies uncompiled: it has hooks" in caplog.text
    assert "LlamaForCausalLM verifies uncompiled: it has adapters, which may be switched" in caplog.text
    assert "change their shapes" not in caplog.text and not compilations
