"""MTP layers: the target's own layers for further tokens, in batches, beside what transformers does with one row."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCAB, make_model, make_prompts
from mtp_reference import (
    AsModel,
    make_deepseek,
    make_mellum,
    make_module,
    make_tensors,
    module_logits,
    save_with,
    uneven,
    write_tensors,
)
from test_eagle3 import asked, check, kept, make_target, quiet, speculate, true_states  # noqa: F401 - a fixture
from test_sampling import VOCAB as FEW
from test_sampling import check_continuations
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

import hf_specdec
from hf_specdec import SpeculationStats
from hf_specdec.drafters.heads import entries, mtp_files
from hf_specdec.loop.schedule import Constant
from hf_specdec.models.tap import FINAL
from hf_specdec.pairs import mtp

Asked = list[tuple[list[int], int, Tensor]]


def compare(asked: Asked, target: PreTrainedModel, logits_of: Any) -> None:  # noqa: F811
    """The layers' logits are those of the reference, from scratch, on true hidden states.

    Args:
        logits_of: of states and text.
    """
    assert len({drafted for _, drafted, _ in asked}) > 1
    chosen = {round(i * (len(asked) - 1) / 39) for i in range(40)}
    for text, drafted, logits in (asked[i] for i in chosen):
        count = len(text) - drafted
        (states,) = true_states(target, (FINAL,), text[:count])
        expected = logits_of(states[: count - 1], text)
        scale = max(float(expected.abs().max()), 1)
        assert float((logits - expected).abs().max()) <= 1e-5 * scale, (count, drafted)


# --------------------------------------------------------------------------- layers that transformers has a module for


@pytest.fixture(scope="module")
def deep() -> tuple[PreTrainedModel, Any]:
    """A target with three layers for three further tokens."""
    target = make_deepseek(3)
    return target, make_module(target)


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_several_layers_run_one_after_the_other(
    gamma: int, deep: tuple[PreTrainedModel, Any], asked: Asked  # noqa: F811
) -> None:  # fmt: skip
    """Fewer drafts than layers leave entries to make later; for more, the last layer reads its own output."""
    target, module = deep
    for batch in (1, 3):
        asked.clear()
        check(target, module, make_prompts(batch), gamma)
        if gamma > 1:
            compare(asked, target, lambda states, text: module_logits(module, states, text))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "_CHUNK", 5)
    monkeypatch.setattr(entries, "_MOST_WAITING", 5)


@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 4, "eos_token_id": [5, 77, 11, 40]}], ids=["plain", "chunks"]
)
def test_iterations_without_drafts_leave_nothing_out(
    options: dict[str, Any], deep: tuple[PreTrainedModel, Any], asked: Asked, small_pieces: None,  # noqa: F811
    kept: list[int], monkeypatch: pytest.MonkeyPatch,  # noqa: F811
) -> None:  # fmt: skip
    plan: Iterator[int] = iter([3, 0, 0, 2, 1, 1, 0, 0, 0, 4, 1, 0, 4, 5] + [3] * 50)
    monkeypatch.setattr(Constant, "plan", lambda self, *_: next(plan))
    target, module = deep
    check(target, module, make_prompts(3), max_new_tokens=30, **options)
    compare(asked, target, lambda states, text: module_logits(module, states, text))
    assert max(kept) <= 3 * 16 * 32 * 4  # rows, tokens of 44, width, bytes


def test_beside_transformers(tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The same text as `use_mtp` there gives for one row; four rows, which it refuses; the weights are read once.

    The MTP layer has a window, and experts.
    """
    saved = make_mellum()
    folder = save_with(tmp_path, saved, make_tensors(saved))
    target: Any = AutoModelForCausalLM.from_pretrained(folder)
    target.generation_config.pad_token_id = 0
    options = {"max_new_tokens": 20, "do_sample": False}
    one, four = make_prompts(1), make_prompts(4)
    with pytest.raises(ValueError, match="batch_size"):
        target.generate(**four, **options, use_mtp=True)
    theirs = target.generate(**one, **options, use_mtp=True)
    reads: list[Any] = []
    load = mtp_files.load_layers
    monkeypatch.setattr(mtp, "load_layers", lambda *a: reads.append(a) or load(*a))
    for inputs in (one, four):
        stats = SpeculationStats()
        way = {"strategy": "spec", "use_mtp": True, "num_assistant_tokens": 2, "speculation_stats": stats}
        got = target.generate(**inputs, **options, **way)
        assert got.tolist() == target.generate(**inputs, **options).tolist()
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert target.generate(**one, **options, **way).tolist() == theirs.tolist()
    assert len(reads) == 1
    module = MtpModel.from_pretrained(target)
    assert max(len(text) for text, _, _ in asked) > 3 * target.config.sliding_window
    compare(asked, target, lambda states, text: module_logits(module, states, text))


def test_layers_that_only_transformers_knows(tmp_path: Path, asked: Asked) -> None:  # noqa: F811
    """Checkpoints that number them after the target's own layers; the class knows their names."""
    saved = make_deepseek(1)
    module = make_module(saved)
    (layer,) = module.layers
    tensors = {}
    for name, tensor in layer.state_dict().items():
        name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.", name.startswith("post_norm"))
        tensors[f"model.layers.2.{name}"] = tensor.contiguous()
    target: Any = AutoModelForCausalLM.from_pretrained(save_with(tmp_path, saved, tensors))
    target.generation_config.pad_token_id = 0
    target._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2.*"]  # the class's are for the real size
    options = {"max_new_tokens": 16, "do_sample": False}
    theirs = target.generate(**make_prompts(1), **options, use_mtp=True)
    spec = {"strategy": "spec", "use_mtp": True, "num_assistant_tokens": 1}
    assert target.generate(**make_prompts(1), **options, **spec).tolist() == theirs.tolist()
    asked.clear()
    spec["num_assistant_tokens"] = 3
    got = target.generate(**make_prompts(4), **options, **spec)
    assert got.tolist() == target.generate(**make_prompts(4), **options).tolist()
    compare(asked, target, lambda states, text: module_logits(module, states, text))


# ------------------------------------------------------------------------------------------- layers in checkpoints only


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next"])
def test_hybrids_with_recurrent_layers(name: str, tmp_path: Path, asked: Asked) -> None:  # noqa: F811
    """Which transformers refuses; the layer reads its own output for all drafts after the first."""
    target = uneven(make_target(name))
    tensors = make_tensors(target)
    folder = str(write_tensors(tmp_path, tensors))
    with pytest.raises(ValueError, match=r"stateful|num_mtp_layers"):
        target.generate(**make_prompts(1), use_mtp=True, max_new_tokens=4)
    reference = AsModel(target, tensors)
    for batch in (1, 3):
        asked.clear()
        check(target, folder, make_prompts(batch), 3, max_new_tokens=12)
        compare(asked, target, reference.logits)


# ------------------------------------------------------------------------------------------------------------- sampling


def test_samples_follow_the_targets_law(tmp_path: Path) -> None:
    """As in `test_sampling.py`; a wrong law that would be seen has one token half as often."""
    config: Any = transformers.Qwen3_5TextConfig(
        vocab_size=FEW, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, initializer_range=0.6, linear_num_key_heads=1, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"], head_dim=8,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    few = quiet(make_model(config), 0.1)
    folder = str(write_tensors(tmp_path, make_tensors(few, noise=0.4)))
    check_continuations(few, 0.5, 4, assistant_model=folder)


def test_coupled_text_is_the_same_for_any_draft_length(deep: tuple[PreTrainedModel, Any]) -> None:
    target, module = deep
    call = {"do_sample": True, "max_new_tokens": 16, "temperature": 0.7, "strategy": "spec"}
    call |= {"speculation_acceptance": "coupled", "speculation_seed": 7} | make_prompts(3)
    expected = target.generate(**call, prompt_lookup_num_tokens=2)
    for gamma in (2, 4):
        stats = SpeculationStats()
        got = target.generate(**call, assistant_model=module, num_assistant_tokens=gamma, speculation_stats=stats)
        assert torch.equal(got, expected)
        assert 0 < stats.acceptance_rate < 1


# -------------------------------------------------------------------------------------------------------- which is used


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = make_target("qwen3_5")
    return save_with(tmp_path_factory.mktemp("hybrid"), target, make_tensors(target), shards=True)


def test_every_way_to_ask_for_them(hybrid: Path, tmp_path: Path) -> None:
    target: Any = AutoModelForCausalLM.from_pretrained(hybrid)
    target.generation_config.pad_token_id = 0
    plain = target.generate(**make_prompts(2), max_new_tokens=9, do_sample=False)
    alone = write_tensors(tmp_path, make_tensors(target))
    (tmp_path / "config.json").write_text("{}")

    def stats_of(**way: Any) -> SpeculationStats:
        stats = SpeculationStats()
        options = {"max_new_tokens": 9, "do_sample": False, "num_assistant_tokens": 2, "speculation_stats": stats}
        assert target.generate(**make_prompts(2), **options | way).tolist() == plain.tolist()
        return stats

    def check_use(**way: Any) -> None:
        stats = stats_of(**way)
        assert stats.accepted_tokens > 0 and stats.draft_forwards > 0

    check_use(strategy="spec", use_mtp=True)
    check_use(strategy="spec", use_mtp=True, assistant_model=str(alone))
    for source in (str(hybrid), hybrid, alone, mtp.mtp_layers(alone, target, options_of())):
        check_use(strategy="spec", assistant_model=source)
    with hf_specdec.attached(target, use_mtp=True):
        check_use()
        assert stats_of(prompt_lookup_num_tokens=2, num_assistant_tokens=None).draft_forwards == 0
    config = transformers.GenerationConfig(use_mtp=True, pad_token_id=0)
    check_use(strategy="spec", generation_config=config)
    assert config.use_mtp
    assert stats_of(strategy="spec", generation_config=config, use_mtp=False).draft_forwards == 0
    target.generation_config.use_mtp = True
    check_use(strategy="spec")
    target.generation_config.use_mtp = None
    stats = SpeculationStats()
    method = hf_specdec.speculative(use_mtp=True, num_assistant_tokens=2, speculation_stats=stats)
    got = target.generate(**make_prompts(2), max_new_tokens=9, do_sample=False, custom_generate=method)
    assert got.tolist() == plain.tolist()
    assert stats.draft_forwards > 0


def options_of() -> Any:
    return hf_specdec.options.Options(**hf_specdec.options.DEFAULTS | {"num_assistant_tokens_schedule": "constant"})


def test_a_checkpoint_of_another_size_is_a_draft_model(hybrid: Path) -> None:
    """Though it has MTP layers too."""
    other = make_model(make_target("qwen3_5").config, seed=5)
    stats = SpeculationStats()
    options = {"max_new_tokens": 6, "do_sample": False, "strategy": "spec", "speculation_stats": stats}
    other.generate(**make_prompts(1), **options, assistant_model=str(hybrid), num_assistant_tokens=2)
    assert stats.draft_prefill_forwards + stats.draft_forwards > 0
    assert mtp.mtp_layers(str(hybrid), other, options_of()) == str(hybrid)


def test_a_target_and_its_layers_are_not_kept_alive(hybrid: Path) -> None:
    target: Any = AutoModelForCausalLM.from_pretrained(hybrid)
    target.generate(**make_prompts(1), max_new_tokens=4, do_sample=False, strategy="spec", use_mtp=True)
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None


# --------------------------------------------------------------------------------------------------------------- errors


def refused(target: PreTrainedModel, match: str, **way: Any) -> None:
    """With this message, before the target runs."""
    runs: list[int] = []
    hook = target.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        with pytest.raises(ValueError, match=match):
            target.generate(**make_prompts(1), max_new_tokens=4, strategy="spec", **way)
    finally:
        hook.remove()
    assert not runs


def test_options_that_contradict_each_other() -> None:
    target = make_target("qwen3_5")
    refused(target, "not loaded by name: pass the folder", use_mtp=True)
    refused(
        target, "`use_mtp` and `assistant_model` each .*got Qwen3_5ForCausalLM", use_mtp=True, assistant_model=target
    )
    refused(target, "`use_mtp` and `prompt_lookup_num_tokens` each", use_mtp=True, prompt_lookup_num_tokens=3)
    refused(target, "`assistant_early_exit` and `use_mtp` each", use_mtp=True, assistant_early_exit=1)
    with pytest.raises(TypeError, match="`use_mtp` must be a bool, got 'yes'"):
        target.generate(**make_prompts(1), strategy="spec", use_mtp="yes")


_QUERIES = "mtp.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("mtp.fc.weight", None, "no tensor `mtp.fc.weight`, .*no `num_mtp_layers`"),
        (_QUERIES, None, rf"model.safetensors has no `{_QUERIES}` \["),
        (_QUERIES, torch.zeros(3, 32), rf"`{_QUERIES}` in .*safetensors has the shape \[3, 32\], .*another target"),
        ("mtp.layers.1.x", torch.zeros(1), r"holds `mtp.layers.1.x` \[1\], which is no part of the one"),
        (_QUERIES, torch.zeros(64, 32, dtype=torch.int8), f"`{_QUERIES}` in .* is torch.int8: quantized"),
    ],
    ids=["no fc", "missing", "shape", "too many", "quantized"],
)
def test_files_that_are_not_right(name: str, tensor: Tensor | None, match: str, tmp_path: Path) -> None:
    target = make_target("qwen3_5")
    tensors = {n: t for n, t in (make_tensors(target) | {name: tensor}).items() if t is not None}
    refused(target, match, assistant_model=str(write_tensors(tmp_path, tensors)), use_mtp=True)


def test_modules_that_do_not_fit(deep: tuple[PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target, module = deep
    other = make_target("qwen3_5")
    other.config.vocab_size += 1
    refused(other, f"another target: .* vocabulary of {VOCAB} tokens, .* has {VOCAB + 1}", assistant_model=module)
    other.config.hidden_size = 40
    refused(other, "hidden states of width 32, but .* has width 40", assistant_model=module)
    module = make_module(target)
    module.config.layer_types = ["linear_attention"] * 3
    refused(target, "of type 'linear_attention', and hf_specdec rolls back", assistant_model=module)
    module = make_module(target)
    monkeypatch.setattr(module.layers[1].mtp_block, "forward", lambda *a, **k: 1 / 0)
    refused(target, "cannot be run on a cache .*ZeroDivisionError", assistant_model=module)
