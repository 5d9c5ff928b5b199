"""Pairs with GGUF models: loaded as in transformers, saved as plain weights, errors that say what to do."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, make_model, perturbed
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from hf_specdec import SpecPair
from hf_specdec.cli import main
from hf_specdec.pairs import loading
from hf_specdec.pairs.export import pair_to_export
from hf_specdec.pairs.pair_file import FILE_NAME, ModelReference, PairConfig
from hf_specdec.tools import tuning

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    target = make_model(LlamaConfig(**SIZES), seed=21)
    return target, perturbed(target, 0.1)


@pytest.fixture(scope="module")
def folder(models: tuple[PreTrainedModel, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target and draft in one folder, as in repositories on the Hub; and the target in 8-bit blocks."""
    folder = tmp_path_factory.mktemp("gguf")
    for name, model in zip(("target.gguf", "draft.gguf"), models):
        write_gguf(model, folder / name)
    write_gguf(models[0], folder / "target-q8.gguf", quantized=True)
    return folder


def load(folder: Path, target: str = "target.gguf", draft: str = "draft.gguf", **options: Any) -> SpecPair:
    options = {"dtype": torch.float32, **options}
    return SpecPair.from_pretrained(folder, folder, gguf_file=target, draft_gguf_file=draft, **options)


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("target", ["target.gguf", "target-q8.gguf"])
def test_a_pair_in_gguf_says_what_its_target_says(folder: Path, models: Any, target: str) -> None:
    pair = load(folder, target)
    assert same_weights(pair.draft, models[1])
    assert same_weights(pair.target, models[0]) == (target == "target.gguf")
    plain = AutoModelForCausalLM.from_pretrained(folder, gguf_file=target, dtype=torch.float32)
    inputs = pair.tokenizer("the quick fat dog has a big hat", return_tensors="pt", return_token_type_ids=False)
    assert inputs["input_ids"].shape[1] > 8
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    expected = plain.generate(**inputs, **options).sequences
    out = pair.generate(**inputs, **options)
    assert out.sequences.tolist() == expected.tolist()
    assert 0 < out.speculation.accepted_tokens < out.speculation.drafted_tokens


@pytest.mark.parametrize("target", ["target.gguf", "target-q8.gguf"])
def test_saved_as_plain_weights_it_is_the_same_pair(folder: Path, tmp_path: Path, target: str) -> None:
    pair = load(folder, target)
    pair.save_pretrained(tmp_path)
    again = SpecPair.from_pretrained(tmp_path, dtype=torch.float32)
    assert same_weights(pair.target, again.target) and same_weights(pair.draft, again.draft)
    assert pair.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    text = "a cat\nsat"
    assert pair.tokenizer(text)["input_ids"] == again.tokenizer(text)["input_ids"]
    assert again.target.generation_config.to_dict() == pair.target.generation_config.to_dict()
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert "quantization_config" not in config
    assert pair.target.hf_quantizer is not None  # the user's model is unchanged
    assert "gguf_file" not in (tmp_path / FILE_NAME).read_text()


def test_weights_that_are_still_quantized_are_not_saved(folder: Path, tmp_path: Path) -> None:
    pair = load(folder)
    layer = pair.target.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM are quantized \(gguf\), and transformers cannot save them"):
        pair.save_pretrained(tmp_path)


def test_a_plain_draft_goes_with_a_target_in_gguf(folder: Path, models: Any, tmp_path: Path) -> None:
    models[1].save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder, gguf_file="draft.gguf").save_pretrained(tmp_path)
    pair = SpecPair.from_pretrained(folder, tmp_path, gguf_file="target.gguf", dtype=torch.float32)
    assert same_weights(pair.target, models[0]) and same_weights(pair.draft, models[1])
    assert not pair.compatibility.errors


def test_a_pair_file_names_the_files_and_loads_them(folder: Path, tmp_path: Path) -> None:
    config = tuning.pair_file_for(load(folder), tmp_path)
    config.save(tmp_path)
    assert PairConfig.load(tmp_path) == config and config.draft.gguf_file == "draft.gguf"
    again = SpecPair.from_pretrained(tmp_path, dtype=torch.float32)
    assert same_weights(again.target, load(folder).target) and not same_weights(again.target, again.draft)
    with pytest.raises(SystemExit, match="is about"):
        tuning.pair_file_for(load(folder, "target-q8.gguf"), tmp_path)
    with pytest.raises(ValueError, match=r"weights in GGUF \(target.gguf\), which exports cannot name"):
        pair_to_export(str(tmp_path), None, None)


def test_a_file_that_is_not_there_is_named_with_those_that_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"`gguf_file`: .* has no file 'q4.gguf'; it has draft.gguf, target-q8.gguf, tar"):
        load(folder, "q4.gguf")
    with pytest.raises(OSError, match=r"`gguf_file`: .* has no file 'q4.gguf'"):
        load(folder, draft="q4.gguf")
    with pytest.raises(
        OSError, match=r"target.gguf is a file, expected a folder or Hub id: pass .*gguf_file='target.g"
    ):
        SpecPair.from_pretrained(folder / "target.gguf", folder)
    with pytest.raises(ValueError, match="`draft_gguf_file` is the GGUF file of `draft`, which was not given"):
        SpecPair.from_pretrained(folder, gguf_file="target.gguf", draft_gguf_file="draft.gguf")
    (tmp_path / "text.gguf").write_text("no GGUF at all, but long enough for a header")
    with pytest.raises(OSError, match="does not start with the GGUF magic bytes"):
        load(tmp_path, "text.gguf", "text.gguf")


@pytest.mark.parametrize("part", [loading.load_tokenizer, loading.load_model])
def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, part: Any) -> None:
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda *_: False)
    with pytest.raises(ImportError, match=r"`gguf_file`: target.gguf cannot be read: .*pip install gguf") as caught:
        part(ModelReference(str(folder), gguf_file="target.gguf"))
    assert isinstance(caught.value.__cause__, ImportError)


def test_the_command_line_takes_gguf_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--target", str(folder), "--draft", str(folder)]
    files = ["--gguf-file", "target.gguf", "--draft-gguf-file", "draft.gguf"]
    assert main(["check", *models, *files, "--device", "cpu"]) == 0
    findings = {each["property"]: each for each in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert findings["tokens"]["verdict"] == "ok"
    assert main(["check", *models, "--gguf-file", "nowhere.gguf", "--draft-gguf-file", "draft.gguf"]) == 1
    assert "has no file 'nowhere.gguf'" in capsys.readouterr().err


def test_a_draft_is_trained_for_a_target_in_gguf(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """distill_draft loads its target by itself."""
    path = Path(__file__).parents[2] / "scripts" / "distill_draft.py"
    spec = importlib.util.spec_from_file_location("distill_draft", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", ["distill_draft"])
    arguments = ["--target", str(folder), "--gguf-file", "target.gguf", "--from-layers", "1", "--device", "cpu"]
    start = script.load_start(script.parser().parse_args(arguments))
    assert start.draft.config.num_hidden_layers == 1 and start.sources[0].gguf_file == "target.gguf"
