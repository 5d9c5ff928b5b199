"""Kinds of caches, weights and wrappers: each gives vanilla's tokens, or raises an error before any forward."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, make_model, make_pair, make_prompts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, MtpCache, StaticSlidingWindowLayer
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

import hf_specdec
from hf_specdec.cache.ragged import RaggedCache
from hf_specdec.device import forward_parameters
from hf_specdec.kernels import attention
from hf_specdec.models import kept
from hf_specdec.models.abilities import Abilities

NEW_TOKENS = 16
NOISE = {"gemma2": 0.35}


@functools.cache
def pair(name: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_pair(name, NOISE.get(name, 0.08))


def generate(target: Any, draft: Any = None, batch: int = 4, width: int = 14, **kwargs: Any) -> Any:
    """Greedy, from uneven prompts; vanilla without a draft."""
    if draft is not None:
        kwargs = {"assistant_model": draft, "strategy": "spec", "num_assistant_tokens": 4} | kwargs
    prompts = make_prompts(batch, width=width, seed=batch)
    return target.generate(**{**prompts, "max_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs)


def check_identical(target: Any, draft: Any, **kwargs: Any) -> None:
    """Vanilla's tokens for one and for four rows, with partly accepted drafts."""
    stats = hf_specdec.SpeculationStats()
    for batch in (1, 4):
        for gamma in (1, 4):
            ours = generate(target, draft, batch, num_assistant_tokens=gamma, speculation_stats=stats, **kwargs)
            assert ours.tolist() == generate(target, None, batch, **kwargs).tolist(), f"batch {batch}, γ = {gamma}"
    assert 0.02 < stats.acceptance_rate < 0.98


# cache_implementation

REFUSED_KINDS = {
    "offloaded": "keys and values on the model's device",
    "offloaded_static": "keys and values on the model's device",
    "offloaded_hybrid": "keys and values on the model's device",
    "offloaded_hybrid_chunked": "keys and values on the model's device",
    "quantized": "cannot roll back exactly",
    "paged": "continuous batching",
    "bogus": "not known here",
}
WORKING_KINDS = ("dynamic", "static", "sliding_window", "hybrid", "hybrid_chunked")


def test_every_kind_that_transformers_knows_works_or_is_refused():
    assert set(ALL_CACHE_IMPLEMENTATIONS) <= {*REFUSED_KINDS, *WORKING_KINDS}


@pytest.mark.parametrize("kind", WORKING_KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_cache_implementations_give_vanillas_tokens(name, kind):
    check_identical(*pair(name), cache_implementation=kind)


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_cache_implementations_that_cannot_work_are_refused_with_the_reason(kind):
    target, draft = pair()
    with pytest.raises(ValueError, match=rf"`cache_implementation` '{kind}' .*{REFUSED_KINDS[kind]}.*'dynamic' or"):
        generate(target, draft, cache_implementation=kind)


def test_a_cache_implementation_in_the_models_generation_config_is_refused_too():
    target = make_model(ARCHITECTURES["llama"]())
    target.generation_config.cache_implementation = "quantized"
    with pytest.raises(ValueError, match=r"`cache_implementation` 'quantized'.*cannot roll back"):
        generate(target, pair()[1])


# Caches that users make


class Diary(DynamicCache):
    """A user's subclass that adds something but changes no behaviour."""

    def note(self) -> None:
        self.notes = [layer.get_seq_length() for layer in self.layers]


USER_CACHES: dict[str, Callable[[Any, int], Cache]] = {
    "DynamicCache": lambda config, length: DynamicCache(),
    "DynamicCache by config": lambda config, length: DynamicCache(config=config),
    "StaticCache": lambda config, length: StaticCache(config=config, max_cache_len=length),
    "layers as they come": lambda config, length: Cache(layer_class_to_replicate=DynamicLayer),
    "windows": lambda config, length: Cache(layers=[DynamicSlidingWindowLayer(length) for _ in range(2)]),
    "static windows": lambda config, length: Cache(layers=[StaticSlidingWindowLayer(length, length) for _ in range(2)]),
    "a subclass": lambda config, length: Diary(),
}


def check_same_entries(ours: Cache, theirs: Cache, masks: Tensor) -> None:
    """Equal in shape, and in value at the columns of tokens, which `masks` `[batch, columns]` marks."""
    assert int(ours.get_seq_length()) == int(theirs.get_seq_length())
    for mine, layer in zip(ours.layers, theirs.layers, strict=True):
        assert mine.keys.shape == layer.keys.shape
        held = masks[:, max(int(theirs.get_seq_length()) - layer.keys.shape[2], 0) :]
        for a, b in ((mine.keys, layer.keys), (mine.values, layer.values)):
            width = min(held.shape[1], a.shape[2])
            real = held[:, None, :width, None].bool()
            assert torch.allclose(a[:, :, :width] * real, b[:, :, :width] * real, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", USER_CACHES)
@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma2"])
def test_two_turns_on_a_users_cache(name, kind, batch):
    """Also past the window; after each turn the object holds what vanilla leaves in it."""
    target, draft = pair(name)
    caches = [USER_CACHES[kind](target.config, 80) for _ in range(2)]
    prompts = make_prompts(batch, width=18, seed=batch)
    turns: list[list[Tensor]] = []
    for cache, arguments in zip(caches, ({}, {"assistant_model": draft, "strategy": "spec"})):
        options = {"do_sample": False, "past_key_values": cache, **arguments}
        first = target.generate(**prompts, **options, max_new_tokens=9)
        question = torch.randint(2, VOCAB, (batch, 5), generator=torch.Generator().manual_seed(8))
        mask = torch.cat([prompts["attention_mask"], torch.ones(batch, first.shape[1] - 18 + 5, dtype=int)], dim=1)
        second = target.generate(torch.cat([first, question], dim=1), attention_mask=mask, **options, max_new_tokens=12)
        turns.append([first, second])
    assert turns[1][0].equal(turns[0][0]) and turns[1][1].equal(turns[0][1])
    columns = turns[0][1].shape[1] - 1
    masks = torch.cat([prompts["attention_mask"], torch.ones(batch, columns - 18, dtype=int)], dim=1)
    check_same_entries(caches[1], caches[0], masks)


class Forgetful(DynamicLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        self.keys, self.values = self.keys[:, :, -8:], self.values[:, :, -8:]
        return keys, values


class Rounded(DynamicCache):
    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(key_states.round(decimals=1), *args, **kwargs)


class FakeOffloaded(DynamicCache):
    """`DynamicCache(offloading=True)` needs an accelerator."""

    offloading = True

    def __init__(self) -> None:
        super().__init__()
        self.offloading = True


REFUSED_CACHES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "quantized": (lambda config: QuantizedCache("fp8", config), r"QuantizedCache, which .* cannot roll back"),
    "offloaded": (lambda config: FakeOffloaded(), r"FakeOffloaded with `offloading`.*the model's device"),
    "forgetful layers": (
        lambda config: Cache(layer_class_to_replicate=Forgetful),
        r"its own methods \(Forgetful.update\)",
    ),
    "rounding": (lambda config: Rounded(), r"a Rounded with its own methods \(Rounded.update\)"),
    "of another kind of drafting": (lambda config: MtpCache(), r"MtpCache.get_mask_sizes, MtpCache.get_query_offset"),
    "windows that the model has not": (
        lambda config: Cache(layers=[DynamicSlidingWindowLayer(12) for _ in range(2)]),
        r"Layer 0 of `past_key_values` \(Cache\) keeps only the last 12 tokens, but the model attends to 30",
    ),
    "static windows that the model has not": (
        lambda config: Cache(layers=[StaticSlidingWindowLayer(64, 12) for _ in range(2)]),
        r"Layer 0 of `past_key_values` \(Cache\) keeps only the last 12 tokens, but the model attends to 30",
    ),
}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", REFUSED_CACHES)
def test_caches_that_do_more_than_keep_are_refused_by_name(kind, batch):
    target, draft = pair()
    make, message = REFUSED_CACHES[kind]
    fed: list[Any] = []
    hook = target.register_forward_pre_hook(lambda *_: fed.append(_))
    with pytest.raises(ValueError, match=message):
        generate(target, draft, batch, past_key_values=make(target.config))
    hook.remove()
    assert not fed


def test_windows_narrower_than_the_models_are_refused():
    target, draft = pair("mistral-sliding")
    narrow = Cache(layers=[DynamicSlidingWindowLayer(5) for _ in range(2)])
    with pytest.raises(ValueError, match="keeps only the last 5 tokens, but the model attends to 12"):
        generate(target, draft, past_key_values=narrow)


def test_the_self_attention_part_of_a_pair_of_caches_is_what_is_looked_at():
    target, draft = pair()
    both = EncoderDecoderCache(QuantizedCache("fp8", target.config), DynamicCache())
    with pytest.raises(ValueError, match="is a EncoderDecoderCache, which strategy='spec' cannot roll back"):
        generate(target, draft, past_key_values=both)


# Weights on other devices


class OneDevice(TorchDispatchMode):
    """Fails if tensors of different devices meet, which the meta device would not notice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in ("_to_copy", "copy_"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
            assert len({tensor.device for tensor in tensors}) <= 1, f"{func} mixes devices"
        return func(*args, **(kwargs or {}))


def test_layers_of_a_cache_may_be_on_devices_of_their_own():
    """Layer 1 is on another device than the index tensors; entries never leave their layer's device."""
    cache = RaggedCache(3, torch.device("cpu"), capacity=8, max_capacity=300)
    states = [torch.randn(3, 2, 5, 4, device=device) for device in ("cpu", "meta")]
    with OneDevice():
        for lengths in ([0, 0, 0], [4, 2, 5], [9, 60, 7]):
            cache.lengths = lengths
            cache.prepare(5)
            for index, new in enumerate(states):
                keys, values = cache.update(new, new, index)
                assert keys.device == values.device == new.device
        cache.activate([2, 0])
        assert [keys.device.type for _, keys, _ in cache.columns([0, 3, 1], 70)] == ["cpu", "meta"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("target", "draft", "disk")}
    for name, model in zip(("target", "draft"), pair()):
        model.save_pretrained(folders[name])
    return folders


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
DEVICE_MAPS: dict[str, Any] = {
    "one layer on disk": dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk"},
    "all on disk": dict.fromkeys(PARTS, "disk"),
    "auto": "auto",
}


@pytest.mark.parametrize("device_map", DEVICE_MAPS)
def test_device_maps(device_map, saved):
    pytest.importorskip("accelerate")
    target, draft = (
        AutoModelForCausalLM.from_pretrained(
            saved[name], device_map=DEVICE_MAPS[device_map], offload_folder=saved["disk"] / name, dtype=torch.float32
        )
        for name in ("target", "draft")
    )
    check_identical(target, pair()[1], max_new_tokens=8)
    check_identical(pair()[0], draft, max_new_tokens=8)
    check_identical(target, draft, max_new_tokens=8)


def test_weights_that_accelerate_moves_in_for_each_forward():
    accelerate = pytest.importorskip("accelerate")
    target, draft = (accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu") for model in pair())
    assert target.device.type == draft.device.type == "meta"
    check_identical(target, draft)
    check_identical(target, draft, cache_implementation="static")
    assert Abilities.of(target).ragged


# Adapters


def with_adapter(model: PreTrainedModel, seed: int, scale: float = 0.5) -> Any:
    """A LoRA adapter over a copy of `model`, strong enough to change its output."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter *= scale
    assert not generate(adapted).equal(generate(model))
    return adapted


def test_a_target_with_an_adapter():
    adapted = with_adapter(pair()[0], seed=5)
    check_identical(adapted, pair()[0])
    check_identical(adapted, with_adapter(pair()[0], seed=5, scale=0.3))


def test_a_draft_with_an_adapter_drafts_row_by_row_like_any_other():
    """The wrapper's signature has no positions; the wrapped model takes them."""
    draft = with_adapter(pair()[0], seed=6, scale=0.3)
    check_identical(pair()[0], draft)
    inside, wrapped = hf_specdec.SpeculationStats(), hf_specdec.SpeculationStats()
    generate(pair()[0], draft, speculation_stats=wrapped)
    generate(pair()[0], draft.get_base_model(), speculation_stats=inside)
    assert wrapped.acceptance_rate == inside.acceptance_rate > 0


def test_one_models_adapter_is_switched_off_while_it_drafts():
    target = with_adapter(pair()[0], seed=5)

    class WithoutAdapter(hf_specdec.ModelDrafter):
        def propose(self, *args: Any) -> hf_specdec.Draft:
            with target.disable_adapter():
                return super().propose(*args)

    check_identical(target, WithoutAdapter(target.get_base_model()))
    with target.disable_adapter():
        assert generate(target, pair()[1]).equal(generate(pair()[0]))


def test_an_adapter_added_to_the_model_itself():
    peft = pytest.importorskip("peft")
    adapted = copy.deepcopy(pair()[0])
    torch.manual_seed(3)
    adapted.add_adapter(peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False), adapter_name="a")
    check_identical(adapted, pair()[0])
    check_identical(pair()[0], adapted)
    adapted.disable_adapters()
    assert generate(adapted, pair()[1]).equal(generate(pair()[0]))


def test_fixed_forwards_are_not_kept_where_adapters_may_be_switched():
    """A captured graph would keep using the adapter that it was captured with."""
    target = with_adapter(pair()[0], seed=5)
    check_identical(target, pair()[0], cache_implementation="static")
    assert target.get_base_model() not in kept._kept
    with target.disable_adapter():
        check_identical(target, pair()[1], cache_implementation="static")


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_in_front_of_the_prompt_are_refused(kind):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        copy.deepcopy(pair()[0]), getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")
    ).eval()
    with pytest.raises(ValueError, match=r"prepared by PeftModelForCausalLM .*prefix tuning.*such as LoRA"):
        generate(tuned, pair()[1])
    with pytest.raises(ValueError, match=r"`assistant_model` \(PeftModelForCausalLM\) needs virtual tokens"):
        generate(pair()[0], tuned)
    # One such call does not spoil the wrapped model.
    tuned.generate(**make_prompts(1), max_new_tokens=2)
    assert generate(tuned.get_base_model(), pair()[1]).equal(generate(pair()[0]))


def test_an_adapter_for_each_row_is_refused():
    target = with_adapter(pair()[0], seed=5)
    names = ["default", "__base__", "default", "__base__"]
    assert generate(target, pair()[1], 1, adapter_names=names[:1]).equal(generate(target, None, 1))
    with pytest.raises(ValueError, match="`adapter_names` chooses adapters by the index of rows"):
        generate(target, pair()[1], adapter_names=names)


# Quantized weights


def int8(model: PreTrainedModel) -> Any:
    """Int8 weights, and activations scaled over all tokens of an input together."""
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_target_whose_logits_depend_on_the_tokens_fed_with_it_is_refused():
    with pytest.raises(ValueError, match=r"quantization of LlamaForCausalLM makes .* quantize weights only"):
        generate(int8(pair()[0]), pair()[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_draft_drafts():
    check_identical(pair()[0], int8(pair()[0]))


class WeightOnly(torch.nn.Module):
    """A linear layer of int8 weights, one scale per output, computing in float32."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("_packed_params", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self._packed_params * self.scale)


def test_quantized_weights_alone_do_not_matter():
    quantized = copy.deepcopy(pair()[0])
    for layer in quantized.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, WeightOnly(getattr(layer.mlp, name)))
    check_identical(quantized, pair()[1])
    check_identical(pair()[0], quantized)


# Wrapped, compiled, in other modes


def test_compiled_models():
    """The wrapper of `torch.compile` hides nothing from us; real compilation would take half a minute here."""
    target, draft = (copy.deepcopy(model) for model in pair())
    with torch.compiler.set_stance("force_eager"):
        compiled = torch.compile(draft)
        assert "position_ids" in forward_parameters(compiled)
        check_identical(pair()[0], compiled)
        target.forward = torch.compile(target.forward)
        check_identical(target, draft)


def test_compiled_code_never_folds_attention(monkeypatch):
    """It outlives our call in which it was compiled."""
    folds: list[Tensor] = []
    original = attention.folded
    monkeypatch.setattr(attention, "folded", lambda *args: (folds.append(args[0]), original(*args))[1])
    generate(*pair())
    assert folds
    folds.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    generate(*pair())
    assert not folds


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_of_autograd(mode):
    with mode():
        check_identical(*pair())


def test_autocast():
    """Half precision: with several tokens at once, ties may fall differently, so the draft is the target."""
    target, draft = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = generate(target, draft, 1, output_logits=True, return_dict_in_generate=True)
        theirs = generate(target, None, 1, output_logits=True, return_dict_in_generate=True)
    same = ours.sequences == theirs.sequences
    if not same.all():
        first = int((~same[0]).nonzero()[0]) - 14
        top = theirs.logits[first][0].topk(2).values
        assert top[0] - top[1] < 0.1, "no tie"


def test_a_target_in_training_mode_is_told_so(caplog):
    target = copy.deepcopy(pair()[0]).train()
    check_identical(target, pair()[1])  # it has no dropout
    random = make_model(LlamaConfig(**{**pair()[0].config.to_dict(), "attention_dropout": 0.3})).train()
    generate(random, pair()[1])
    assert "LlamaForCausalLM is in training mode" in caplog.text
    assert Abilities.of(random.eval()).ragged, "an answer found under dropout was kept"


def test_modules_around_a_draft_are_refused():
    with pytest.raises(
        TypeError,
        match=r"pass the model inside, `assistant_model=model\.module`",
    ):
        generate(pair()[0], torch.nn.DataParallel(pair()[1]))
