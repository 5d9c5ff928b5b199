"""Files of heads: every format gives the head that was written, and what is wrong with a file is said by name."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, make_model, make_prompts
from eagle3_reference import SIZES, make_parts, random_head, some_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import hf_specdec
from hf_specdec import Eagle3Head
from hf_specdec.drafters.heads.loading import load_folder, logger
from hf_specdec.drafters.heads.saving import head_tensors, save_folder


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    config = ARCHITECTURES["llama"]()
    config.update({"num_hidden_layers": 3})
    return make_model(config)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], binary: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if binary:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def safeailab(head: Eagle3Head, folder: Path, binary: bool = False, **changes: Any) -> Path:
    """The dialect of SafeAILab and SpecForge: the layer is called midlayer."""
    tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in head_tensors(head).items()}
    config = SIZES | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "draft_vocab_size": head.parts.draft_vocab_size or VOCAB,
        "num_hidden_layers": 7,  # it may be the target's
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(head.parts.aux_ids or ())},
    }
    return write(folder, config | changes, tensors, binary)


def deepspec(head: Eagle3Head, folder: Path, **changes: Any) -> Path:
    ids = [i - 1 for i in head.parts.aux_ids or ()]
    config = SIZES | {"architectures": ["Qwen3Eagle3Model"], "model_type": "qwen3", "target_layer_ids": ids}
    return write(folder, config | changes, head_tensors(head))


def speculators(head: Eagle3Head, folder: Path, target: PreTrainedModel, **changes: Any) -> Path:
    save_folder(head, folder, target)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_same(mine: Eagle3Head, theirs: Eagle3Head) -> None:
    """The same outputs, states, tokens and layers."""
    torch.manual_seed(0)
    parts = theirs.parts
    given = parts.target_hidden_size or parts.layer.hidden_size
    states = [torch.randn(2, 5, given) for _ in range(parts.aux_count)]
    embedded = torch.randn(2, 5, parts.layer.hidden_size)
    outputs = []
    for head in (mine, theirs):
        hidden = head(head.mix(states), embedded, torch.arange(5)[None])
        outputs.append((hidden, head.logits(hidden, torch.ones(VOCAB, parts.layer.hidden_size))))
    for one, other in zip(*outputs):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert mine.parts.states_of(9) == theirs.parts.states_of(9)
    ids = [None if head.target_ids is None else head.target_ids.tolist() for head in (mine, theirs)]
    assert ids[0] == ids[1]


HEADS: dict[str, Callable[[], Eagle3Head]] = {
    "plain": lambda: random_head(make_parts()),
    "reduced": lambda: random_head(make_parts(draft_vocab_size=40), some_tokens(40)),
    "own embeddings": lambda: random_head(make_parts(has_embeddings=True, norm_before_fc=True)),
    "fc_norm": lambda: random_head(make_parts(fc_norm=True)),
    "qk_norm": lambda: random_head(make_parts(qk_norm=True, aux_ids=(1, 2, 3, 1, 2), aux_count=5)),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("form", ["SafeAILab", "DeepSpec", "speculators"])
def test_every_format_gives_the_head_that_was_written(
    name: str, form: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    head = HEADS[name]()
    if form == "SafeAILab":
        assert_same(load_folder(safeailab(head, tmp_path / "a")), head)
        assert_same(load_folder(safeailab(head, tmp_path / "b", binary=True)), head)
    elif form == "DeepSpec":
        if head.target_ids is not None:
            return
        # It counts what a layer returns, so the state before layer 0 has no id.
        parts = make_parts(aux_ids=(1, 2, 3))
        assert json.loads((deepspec(random_head(parts), tmp_path) / "config.json").read_text())["target_layer_ids"] == [
            0, 1, 2,
        ]  # fmt: skip
        assert_same(load_folder(tmp_path), random_head(parts))
    else:
        assert_same(load_folder(speculators(head, tmp_path, target)), head)


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_output"])
def test_what_only_the_config_can_say(flag: str, target: PreTrainedModel, tmp_path: Path) -> None:
    head = random_head(make_parts(**{flag: True}))
    if flag == "norm_output":
        assert_same(load_folder(safeailab(head, tmp_path / "a", norm_output=True)), head)
    assert_same(load_folder(speculators(head, tmp_path / "b", target)), head)
    assert_same(load_folder(safeailab(head, tmp_path / "c"), **{flag: True}), head)
    assert_same(hf_specdec.load_head(tmp_path / "c", **{flag: True}), head)


def test_a_config_of_speculators_without_the_key_means_true(target: PreTrainedModel, tmp_path: Path) -> None:
    """As vLLM reads it."""
    head = random_head(make_parts(norm_before_residual=True))
    folder = speculators(head, tmp_path, target)
    config = json.loads((folder / "config.json").read_text())
    del config["norm_before_residual"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(load_folder(folder), head)


def test_other_sizes_and_the_last_state(target: PreTrainedModel, tmp_path: Path) -> None:
    wide = random_head(make_parts({"hidden_size": 24}, target_hidden_size=32, has_embeddings=True, layers=2))
    assert_same(load_folder(speculators(wide, tmp_path / "a", target)), wide)
    last = random_head(make_parts(uses_aux=False, aux_ids=None, aux_count=1, has_fc=False))
    folder = safeailab(last, tmp_path / "b", eagle_config={"use_aux_hidden_state": False})
    assert_same(load_folder(folder), last)


def test_the_usual_layers_where_a_config_names_none(tmp_path: Path) -> None:
    head = load_folder(safeailab(random_head(make_parts()), tmp_path, eagle_config={}))
    assert head.parts.states_of(32) == (2, 16, 29)
    assert load_folder(tmp_path, aux_ids=(1, 2, 3)).parts.states_of(32) == (1, 2, 3)


def test_ids_of_maps_are_offsets(tmp_path: Path) -> None:
    head = random_head(make_parts(draft_vocab_size=40), some_tokens(40))
    folder = safeailab(head, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["d2t"] + torch.arange(40), head.target_ids)
    del tensors["d2t"]
    save_file(tensors, folder / "model.safetensors")
    assert load_folder(folder).target_ids.tolist() == head.target_ids.tolist()  # t2d says as much


def test_folders_heads_and_pairs_do_as_drafts(
    target: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = random_head(make_parts())
    expected = target.generate(**make_prompts(2), max_new_tokens=8, do_sample=False).tolist()
    folder = speculators(head, tmp_path / "head", target)
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    try:
        for draft in (folder, str(folder), head, hf_specdec.load_head(folder)):
            stats = hf_specdec.SpeculationStats()
            got = target.generate(
                **make_prompts(2), max_new_tokens=8, do_sample=False, strategy="spec", assistant_model=draft,
                speculation_stats=stats, num_assistant_tokens=2,
            )  # fmt: skip
            assert got.tolist() == expected
            assert stats.drafted_tokens > 0
    finally:
        logger.removeHandler(caplog.handler)
    assert f"{folder} holds an EAGLE-3 head in the format of speculators" in caplog.text


# ------------------------------------------------------------------------------------------------------------ bad input


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Set or remove tensors of a file."""
    file = folder / "model.safetensors"
    whole = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in whole.items() if tensor is not None}, file)


BAD_FILES: list[tuple[dict[str, Any], dict[str, Tensor | None], str]] = [
    ({"speculators_model_type": "new"}, {}, "`speculators_model_type` is 'new', hf_specdec reads 'eagle3', 'peagle',"),
    ({"dflash_config": {}}, {}, "config.json has no `target_layer_ids`"),
    ({"vocab_size": "96"}, {}, "config.json: the head's layers cannot be made from these sizes: .*vocab_size"),
    ({"model_type": "nothing"}, {}, "does not know the `model_type` 'nothing'"),
    ({"model_type": "gpt2"}, {}, "have no `.*`; their `model_type` is 'gpt2'"),
    ({}, {"fc__weight": None}, r"no `fc.weight` \[32, 96\]"),
    (
        {"target_hidden_size": 64},
        {},
        r"`fc.weight` .* has the shape \[32, 96\], .* 3 states of width 64 \(192 in all\)",
    ),
    ({}, {"norm__weight": None}, r"model.safetensors has no `norm.weight` \[32\]"),
    ({}, {"norm__weight": torch.ones(31)}, r"`norm.weight` in .* has the shape \[31\], .* asks for \[32\]"),
    ({}, {"midlayer__extra__weight": torch.ones(3)}, r"holds `layers.0.extra.weight` \[3\], which is no part"),
    ({}, {"norm__weight": torch.ones(32).to(torch.int8)}, "`norm.weight` in .* is torch.int8: quantized heads"),
    ({}, {"d2t": None, "t2d": None}, r"neither `d2t` \[40\] nor `t2d` \[96\]"),
    ({}, {"d2t": torch.zeros(39, dtype=torch.int64)}, "`d2t` in .* is for 39 tokens, but the head has 40"),
    ({}, {"d2t": some_tokens(40)}, "`d2t` in .* does not lead to 40 different tokens .* it must hold offsets"),
    ({}, {"t2d": torch.zeros(VOCAB, dtype=torch.bool)}, r"`d2t` and `t2d` \[96\] in .* do not belong together"),
]


@pytest.mark.parametrize(("config", "tensors", "match"), BAD_FILES)
def test_what_is_wrong_with_a_file(
    config: dict[str, Any], tensors: dict[str, Tensor | None], match: str, target: PreTrainedModel, tmp_path: Path
) -> None:
    head = random_head(make_parts(draft_vocab_size=40), some_tokens(40))
    folder = safeailab(head, tmp_path, **config)
    change(folder, **tensors)
    with pytest.raises(ValueError, match=match):
        target.generate(**make_prompts(1), strategy="spec", assistant_model=str(folder), max_new_tokens=4)


def test_folders_without_weights_or_heads(tmp_path: Path, target: PreTrainedModel) -> None:
    folder = safeailab(random_head(make_parts()), tmp_path / "a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no weights: expected model\.safetensors or pytorch_model\.bin"):
        hf_specdec.load_head(folder)
    target.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"is not a head on hidden states: its config\.json has none of their keys"):
        hf_specdec.load_head(tmp_path / "b")
    with pytest.raises(ValueError, match=r"`aux_ids` must name 3 layers, as many as .* reads, got"):
        hf_specdec.load_head(safeailab(random_head(make_parts()), tmp_path / "a"), aux_ids=[1, 2])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"target_hidden_size": 48}, "made for hidden states of width 48, but LlamaForCausalLM has width 32"),
        ({"vocab_size": 50}, "made for a vocabulary of 50 tokens, but LlamaForCausalLM has 96"),
        ({"aux_ids": (1, 2, 4)}, r"before layers \[1, 2, 4\], but LlamaForCausalLM has 3 layers, so 4 does not exist"),
        (
            {"sizes": {"hidden_size": 24}, "target_hidden_size": 32},
            r"without `embed_tokens.weight`, .* expected floats \[96, 24\], but .* has torch.float32 \[96, 32\]",
        ),
    ],
)
def test_heads_of_other_targets(changes: dict[str, Any], match: str, target: PreTrainedModel) -> None:
    def run() -> None:
        target.generate(
            **make_prompts(1), strategy="spec", assistant_model=random_head(make_parts(**changes)), max_new_tokens=4
        )

    calls: list[None] = []
    hook = target.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        with pytest.raises(ValueError, match=match):
            run()
    finally:
        hook.remove()
    assert not calls


@pytest.mark.parametrize("part", ["draft", "target"])
def test_options_that_a_head_cannot_follow(part: str, target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=f"`speculation_compile='{part}'` needs forwards of fixed shapes"):
        target.generate(
            **make_prompts(1), strategy="spec", assistant_model=random_head(make_parts()), speculation_compile=part,
            max_new_tokens=4,
        )  # fmt: skip


def test_targets_whose_states_cannot_be_tapped(monkeypatch: pytest.MonkeyPatch, target: PreTrainedModel) -> None:
    from hf_specdec.models import tap

    monkeypatch.setattr(tap.Tap, "_listen", lambda self, heard, layers, i: pytest.importorskip("types").SimpleNamespace(
        remove=lambda: None
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"of LlamaForCausalLM cannot be tapped: expected \[1, tokens, hidden size\]"):
        target.generate(**make_prompts(1), strategy="spec", assistant_model=random_head(make_parts()), max_new_tokens=4)


def test_models_that_carry_a_state_of_their_own(target: PreTrainedModel) -> None:
    """They are fed by their own code, so nobody says which states belong to which tokens."""
    from transformers import RwkvConfig

    config = RwkvConfig(
        vocab_size=VOCAB, hidden_size=32, attention_hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        context_length=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = make_model(config)
    with pytest.raises(ValueError, match="`assistant_model` is a head that reads hidden states as the target's cache"):
        model.generate(**make_prompts(1), strategy="spec", assistant_model=random_head(make_parts()), max_new_tokens=4)
