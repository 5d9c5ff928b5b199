"""Files of DFlash, DSpark and P-EAGLE heads: every format gives the head that was written."""

from pathlib import Path
from typing import Any

import eagle3_reference
import pytest
import torch
from conftest import VOCAB, make_prompts
from dflash_reference import MASK, make_parts, random_head
from eagle3_reference import SIZES, some_tokens
from safetensors.torch import load_file
from test_dflash import WINDOW, make_muse
from test_eagle3 import make_target, speculate
from test_head_files import change, write
from torch import Tensor
from transformers import PreTrainedModel

import hf_specdec
from hf_specdec import DFlashHead
from hf_specdec.drafters.heads.loading import head_format, head_of_module, load_folder, read_config
from hf_specdec.drafters.heads.saving import head_tensors, save_folder
from hf_specdec.models.tap import FINAL

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return make_target()


def zlab(head: DFlashHead, folder: Path, **changes: Any) -> Path:
    ids = [i - 1 for i in head.parts.aux_ids]
    config = SIZES | ROPE | {"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_target_layers": 3}
    config |= {"block_size": head.parts.block_size, "dflash_config": {"mask_token_id": MASK, "target_layer_ids": ids}}
    return write(folder, config | changes, dict(head.state_dict()))


def deepspec(head: DFlashHead, folder: Path, **changes: Any) -> Path:
    ids = [i - 1 for i in head.parts.aux_ids]
    config = SIZES | ROPE | {"architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "target_layer_ids": ids}
    config |= {"block_size": head.parts.block_size, "mask_token_id": MASK, "markov_head_type": "vanilla"}
    return write(folder, config | changes, dict(head.state_dict()))


def speculators(head: DFlashHead, folder: Path, kind: str, layer: dict[str, Any], **changes: Any) -> Path:
    parts, tensors = head.parts, dict(head.state_dict())
    if head.target_ids is not None:
        known = torch.zeros(VOCAB, dtype=torch.bool)
        known[head.target_ids] = True
        tensors |= {"d2t": head.target_ids - torch.arange(len(head.target_ids)), "t2d": known}
    tensors |= {"verifier_norm.weight": torch.ones(32)}
    config = {
        "speculators_model_type": kind, "aux_hidden_state_layer_ids": list(parts.aux_ids), "mask_token_id": MASK,
        "block_size": parts.block_size, "draft_vocab_size": parts.draft_vocab_size or VOCAB,
        "transformer_layer_config": SIZES | ROPE | {"model_type": "qwen3"} | layer,
    }  # fmt: skip
    return write(folder, config | changes, tensors)


def assert_same(mine: Any, theirs: DFlashHead) -> None:
    """The same parts that matter, and the same outputs."""
    torch.manual_seed(0)
    states, embedded, before = torch.randn(2, 2, 5, 32), torch.randn(2, 4, 32), torch.tensor([[5, 6, 7, 8]] * 2)
    outputs = []
    for head in (mine, theirs):
        hidden = head(embedded, torch.arange(4)[None])
        one = [head.mix(list(states)), hidden, head.logits(hidden, torch.ones(VOCAB, 32))]
        one += [head.correction(before)] if head.parts.markov_rank else []
        one += [head.confidence(hidden, before)] if head.parts.confidence_width else []
        outputs.append(one)
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    for name in ("aux_ids", "block_size", "mask_token", "from_anchor", "longest", "layers", "causal_windows"):
        assert getattr(mine.parts, name) == getattr(theirs.parts, name), name
    ids = [None if head.target_ids is None else head.target_ids.tolist() for head in (mine, theirs)]
    assert ids[0] == ids[1]


def test_every_format_gives_the_head_that_was_written(tmp_path: Path) -> None:
    plain = random_head(make_parts(WINDOW, layers=2))
    layers = {"layer_types": WINDOW["layer_types"], "sliding_window": 6, "use_sliding_window": True}
    assert_same(load_folder(zlab(plain, tmp_path / "zlab", **WINDOW)), plain)
    assert head_format(read_config(tmp_path / "zlab")) == "z-lab"
    assert load_folder(tmp_path / "zlab").parts.states_of(2) == (1, FINAL)

    dspark = random_head(
        make_parts(from_anchor=True, markov_rank=5, confidence_width=37, has_lm_head=True, has_embeddings=True)
    )
    assert_same(load_folder(deepspec(dspark, tmp_path / "deepspec")), dspark)
    assert head_format(read_config(tmp_path / "deepspec")) == "DeepSpec"

    for name, kind, said, head in (
        ("a", "dflash", {}, make_parts(WINDOW, layers=2, causal_windows=True)),
        ("b", "dflash", {"sliding_window_non_causal": True, "sample_from_anchor": True},
         make_parts(WINDOW, layers=2, from_anchor=True)),
        ("c", "dspark", {"sliding_window_non_causal": True},
         make_parts(WINDOW, layers=2, from_anchor=True, markov_rank=5)),
    ):  # fmt: skip
        whole = random_head(hf_specdec.DFlashConfig(**vars(head) | {"has_lm_head": True, "draft_vocab_size": 40}),
            some_tokens(40))  # fmt: skip
        found = load_folder(speculators(whole, tmp_path / name, kind, layers | {"num_hidden_layers": 2}, **said))
        assert_same(found, whole)
        assert found.parts.states_of(2) == (1, 2)

    muse = make_muse()
    muse.save_pretrained(tmp_path / "hf")
    assert head_format(read_config(tmp_path / "hf")) == "HF"
    shared: Any = head_of_module(muse)
    assert_same(load_folder(tmp_path / "hf"), shared)
    assert shared.fc.weight.data_ptr() == muse.encoder.fc.weight.data_ptr() and muse.encoder.fc.weight.requires_grad
    assert head_of_module(muse) is shared and head_of_module(make_target()) is None


def test_the_usual_layers_where_a_config_names_none(tmp_path: Path) -> None:
    head = random_head(make_parts(aux_ids=(2, 15, 30), layers=3))
    folder = zlab(head, tmp_path, dflash_config={"mask_token_id": MASK}, num_target_layers=32, num_hidden_layers=3)
    assert load_folder(folder).parts.aux_ids == (2, 16, 30)


def test_parallel_slots_are_read_from_and_written_to_files(target: PreTrainedModel, tmp_path: Path) -> None:
    parts = eagle3_reference.make_parts(mask_token=MASK, layers=2, draft_vocab_size=40)
    head = eagle3_reference.random_head(parts, some_tokens(40))
    save_folder(head, tmp_path / "a", target)
    found: Any = load_folder(tmp_path / "a")
    assert found.parts.mask_token == MASK and torch.equal(found.masked(), head.masked())
    assert load_file(tmp_path / "a" / "model.safetensors")["mask_hidden"].shape == (1, 1, 96)
    config = SIZES | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "draft_vocab_size": 40}
    tensors = head_tensors(head) | {"mask_hidden": head.mask_hidden[None].clone()}
    found = load_folder(write(tmp_path / "b", config | {"ptd_token_id": MASK}, tensors))
    assert found.parts.mask_token == MASK and torch.equal(found.masked(), head.masked())


def test_folders_and_modules_do_as_drafts(target: PreTrainedModel, tmp_path: Path) -> None:
    folder = zlab(random_head(make_parts()), tmp_path)
    for draft in (str(folder), hf_specdec.load_head(folder), make_muse()):
        assert speculate(target, draft, make_prompts(2), max_new_tokens=6).drafted_tokens > 0


# ------------------------------------------------------------------------------------------------------------ bad input


BAD_FILES: list[tuple[dict[str, Any], dict[str, Tensor | None], str]] = [
    ({"target_layer_ids": None}, {}, "config.json has no `target_layer_ids`, the layers of the target"),
    ({"block_size": 0}, {}, "config.json has no `block_size`, how many tokens it reads at once: .* got 0"),
    ({"mask_token_id": None}, {}, "config.json has no `mask_token_id`, what stands for a draft: .* got None"),
    ({"mask_token_id": 400}, {}, "a vocabulary with the mask token 400, but LlamaForCausalLM has tokens 0 to 95"),
    ({"target_layer_ids": [0, 5]}, {}, r"before layers \[1, 6\], but LlamaForCausalLM has 3 layers, so 6 does not"),
    ({"target_layer_ids": [0, 1, 2, 3, 4]}, {}, r"`fc.weight` beside .* \[32, 64\], which is not made for 5 states"),
    ({"vocab_size": 50}, {}, r"`lm_head.weight` in .* has the shape \[96, 32\], .* asks for \[50, 32\]"),
    ({"num_hidden_layers": 2}, {}, r"has no `layers.1.input_layernorm.weight` \[32\], which its config asks for"),
    ({"vocab_size": None}, {}, "cannot be made from these sizes|has no `vocab_size`"),
    ({"layer_types": ["chunked_attention"]}, {}, "`layer_types` has 'chunked_attention', which is not supported"),
    ({"layer_types": ["sliding_attention"]}, {}, "'sliding_attention', but `sliding_window` is not set"),
    ({"markov_head_type": "rnn"}, {}, "`markov_head_type` is 'rnn', hf_specdec reads 'vanilla' heads only"),
    ({}, {"fc__weight": None}, r"have no `fc.weight` \[32, 2 target widths\]"),
    ({}, {"fc__weight": torch.ones(32, 96)}, "made for hidden states of width 48, but LlamaForCausalLM has width 32"),
    ({}, {"hidden_norm__weight": None}, r"model.safetensors has no `hidden_norm.weight` \[32\]"),
    ({}, {"norm__weight": torch.ones(31)}, r"`norm.weight` in .* has the shape \[31\], .* asks for \[32\]"),
    ({}, {"extra__weight": torch.ones(3)}, r"holds `extra.weight` \[3\], which is no part of the EAGLE-3 and DFlash"),
]


@pytest.mark.parametrize(("config", "tensors", "match"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_what_is_wrong_with_a_file(
    config: dict[str, Any], tensors: dict[str, Tensor | None], match: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    """Said before any forward."""
    head = random_head(make_parts(markov_rank=5, has_lm_head=True, from_anchor=True))
    folder = deepspec(head, tmp_path, **config)
    change(folder, **tensors)
    calls: list[None] = []
    hook = target.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        with pytest.raises(ValueError, match=match):
            target.generate(**make_prompts(1), strategy="spec", assistant_model=str(folder), max_new_tokens=4)
    finally:
        hook.remove()
    assert not calls


def test_what_is_wrong_with_parallel_slots(target: PreTrainedModel, tmp_path: Path) -> None:
    head = eagle3_reference.random_head(eagle3_reference.make_parts(mask_token=MASK))
    for name, hidden, match in (
        ("a", None, r"`mask_hidden` of a P-EAGLE head in .*: expected \[1, 96\], found no such tensor"),
        ("b", torch.ones(1, 64), r"expected \[1, 96\], found the shape \[1, 64\]"),
    ):
        save_folder(head, tmp_path / name, target)
        change(tmp_path / name, mask_hidden=hidden)
        with pytest.raises(ValueError, match=match):
            hf_specdec.load_head(tmp_path / name)
    config = SIZES | {"draft_vocab_size": VOCAB, "model_type": "llama"}
    with pytest.raises(ValueError, match=r"config.json has no `mask_token_id`, which stands for a draft, got None"):
        hf_specdec.load_head(write(tmp_path / "c", config, head_tensors(head)))


def test_settings_that_say_nothing_about_a_head(tmp_path: Path) -> None:
    folder = zlab(random_head(make_parts()), tmp_path)
    with pytest.raises(
        ValueError, match=r"`norm_output` says nothing about a DFlash head, which .* holds: leave it out"
    ):
        hf_specdec.load_head(folder, norm_output=True)
    assert hf_specdec.load_head(folder, aux_ids=(0, 2)).parts.states_of(3) == (0, 2)


def test_targets_that_lend_no_weights(tmp_path: Path) -> None:
    head = random_head(make_parts({"hidden_size": 24}, target_hidden_size=32))
    with pytest.raises(ValueError, match=r"without `embed_tokens.weight`, .* expected floats \[96, 24\]"):
        make_target().generate(**make_prompts(1), strategy="spec", assistant_model=head, max_new_tokens=4)
