"""scripts/distill_draft: from a target and a text file to a pair, interrupted and resumed, and its errors."""

import importlib.util
import json
import os
import random
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import datasets
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_model
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from hf_specdec import Eagle3Head
from hf_specdec.pairs import SpecPair
from hf_specdec.tools.distillation import Distillation

SCRIPT = Path(__file__).parents[2] / "scripts" / "distill_draft.py"
SMALL = "--steps 6 --rows 4 --lr 0.01 --examples 8 --block-tokens 16 --prompts 6 --prompt-tokens 6 --new-tokens 8 "
SMALL += "--checkpoint-every 4 --device cpu --threads 1"
Script = Callable[..., int]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A target whose next token depends mostly on the last one, which a single layer can learn."""
    folder = tmp_path_factory.mktemp("models") / "target"
    model = make_model(ARCHITECTURES["llama"](), seed=3)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "o_proj" in name:
                weights *= 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of random words."""
    letters = random.Random(0)
    words = ["".join(letters.choices(string.ascii_lowercase, k=letters.randint(2, 7))) for _ in range(600)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, 600, 10)))
    return path


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("distill_draft", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """Runs the script in this process; returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["distill_draft", *map(str, arguments)])
        return module.main()

    yield run
    datasets.enable_progress_bars()


def refusal(script: Script, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The script's error message."""
    with pytest.raises(SystemExit) as stopped:
        script(*arguments)
    return str(stopped.value.code) + capsys.readouterr().err


def test_a_random_draft_becomes_a_pair_with_a_higher_acceptance(tmp_path: Path, target: Path, text: Path) -> None:
    output = tmp_path / "pair"
    arguments = [*SMALL.split(), "--steps", "40", "--rows", "8", "--examples", "40", "--new-tokens", "16"]
    arguments += ["--checkpoint-every", "20"]
    arguments += ["--target", target, "--random", "1", "--dataset", text, "--output", output]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rose"]
    assert result["acceptance_rate"] > result["acceptance_rate_before"] + 0.02
    assert result["sampled_acceptance_rate"] > result["sampled_acceptance_rate_before"]
    assert list(result["steps"]) == ["0", "20", "40"]
    assert "before" in done.stdout and "greedy α" in done.stdout

    pair = SpecPair.from_pretrained(str(output))
    assert pair.draft.config.num_hidden_layers == 1
    assert Path(pair.target.name_or_path).resolve() == target.resolve()
    (entry,) = pair.config.measured
    assert entry["acceptance_rate"] == result["acceptance_rate"]
    ids = pair.tokenizer("the quick brown fox", return_tensors="pt", return_token_type_ids=False)
    out = pair.generate(**ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, pair.target.generate(**ids, max_new_tokens=12, do_sample=False))
    assert not list(output.glob("training/checkpoint-*"))


def test_a_parallel_draft_becomes_a_pair(
    tmp_path: Path, target: Path, text: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pair"
    arguments = [*SMALL.split(), "--target", target, "--dataset", text]
    assert script(*arguments, "--random", "1", "--parallel", "--output", output) in (0, 1)
    pair = SpecPair.from_pretrained(str(output))
    assert pair.draft.config.pard_token == 96  # the tokenizer has 96 tokens
    assert not pair.compatibility.errors
    ids = pair.tokenizer("the quick brown fox", return_tensors="pt", return_token_type_ids=False)
    out = pair.generate(**ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, pair.target.generate(**ids, max_new_tokens=12, do_sample=False))
    said = refusal(script, capsys, *arguments, "--draft", output / "draft", "--output", tmp_path / "further")
    assert "expected --parallel: LlamaForCausalLM predicts several tokens in one forward" in said


def test_held_out_prompts_are_in_no_example(tmp_path: Path, target: Path, text: Path, script: Script) -> None:
    output = tmp_path / "pair"
    options = [*SMALL.split(), "--steps", "1", "--examples", "60", "--prompt-tokens", "16"]
    script(*options, "--target", target, "--from-layers", "1", "--dataset", text, "--output", output)
    texts = datasets.load_from_disk(output / "training" / "texts")
    held = [tuple(row) for row in texts["heldout"]["input_ids"]]
    assert len(held) == 6
    written = texts["train"]
    assert len(written) == 180
    assert not set(held) & {tuple(row[: len(held[0])]) for row in written["input_ids"]}


def test_ctrl_c_and_resume_end_with_the_weights_of_an_uninterrupted_run(
    tmp_path: Path, target: Path, text: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SMALL.split(), "--target", target, "--random", "1", "--dataset", text]
    script(*options, "--output", tmp_path / "whole")
    train = Distillation.train

    def interrupted(self: Distillation) -> Iterator[float]:
        for loss in train(self):
            if self.step == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield loss

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "train", interrupted)
        assert script(*options, "--output", tmp_path / "parts") == 130
    assert [each.name for each in (tmp_path / "parts" / "training").glob("checkpoint-*")] == ["checkpoint-000005"]
    assert not (tmp_path / "parts" / "draft").exists()
    with monkeypatch.context() as patch:
        patch.setattr("hf_specdec.tools.distillation.examples", pytest.fail)  # the target has already written
        assert script("--resume", "--output", tmp_path / "parts", "--device", "cpu") in (0, 1)
    whole, parts = (load_file(tmp_path / name / "draft" / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    runs = [json.loads((tmp_path / name / "training" / "run.json").read_text()) for name in ("whole", "parts")]
    assert runs[0] == runs[1]


def test_the_exit_code_is_1_when_acceptance_does_not_rise(
    tmp_path: Path, target: Path, text: Path, script: Script
) -> None:
    """A learning rate of zero teaches nothing."""
    options = [*SMALL.split(), "--lr", "0", "--target", target, "--from-layers", "1", "--dataset", text]
    assert script(*options, "--output", tmp_path / "pair") == 1


def test_a_resumed_run_keeps_its_settings(
    tmp_path: Path, script: Script, capsys: pytest.CaptureFixture[str], module: ModuleType
) -> None:
    said = refusal(script, capsys, "--resume", "--output", tmp_path)
    assert "expected an unfinished run in" in said
    assert "with --resume, got none" in refusal(script, capsys, "--resume")
    module.write_run(tmp_path, {"settings": module.settings(module.parser().parse_args(["--lr", "0.5"]))})
    said = refusal(script, capsys, "--resume", "--output", tmp_path, "--lr", "0.1")
    assert "a resumed run keeps its settings, but lr was 0.5, now 0.1" in said
    (tmp_path / "specdec_pair.json").touch()
    assert "is finished" in refusal(script, capsys, "--resume", "--output", tmp_path)


def test_an_existing_output_is_not_touched(tmp_path: Path, script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(script, capsys, "--output", tmp_path)
    assert f"--output {tmp_path} exists: give a new folder, or add --resume" in said
    assert not list(tmp_path.iterdir())


def test_a_draft_with_another_tokenizer_is_refused(
    tmp_path: Path, target: Path, text: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same size, but with its tokens in another order."""
    draft = tmp_path / "draft"
    make_model(ARCHITECTURES["llama"]()).save_pretrained(draft)
    transformers.AutoTokenizer.from_pretrained(target).save_pretrained(draft)
    path = draft / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    output = tmp_path / "pair"
    arguments = ["--target", target, "--draft", draft, "--dataset", text, "--output", output, "--device", "cpu"]
    assert "tokenizer" in refusal(script, capsys, *arguments)
    assert not output.exists()


def test_starts_that_exclude_each_other_are_refused(
    tmp_path: Path, target: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--target", target, "--output", tmp_path / "pair"]
    assert "got several" in refusal(script, capsys, *arguments, "--draft", target, "--from-layers", "1")
    assert "takes 1 to 1 of its 2 layers, got 2" in refusal(script, capsys, *arguments, "--from-layers", "2")
    assert "not allowed with" in refusal(script, capsys, *arguments, "--from-layers", "1", "--random", "1")


@pytest.mark.parametrize("content", ["", "abc"])
def test_too_little_text_is_refused(
    tmp_path: Path, target: Path, script: Script, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    for name, inside in (("empty.txt", content), ("empty.jsonl", json.dumps({"text": content}) + "\n")):
        path = tmp_path / name
        path.write_text(inside)
        arguments = ["--target", target, "--from-layers", "1", "--dataset", path, "--output", tmp_path / "pair"]
        said = refusal(script, capsys, *arguments, "--device", "cpu")
        assert "expected more than the 24 held out: give more text, or hold out fewer prompts" in said


def test_the_default_text_takes_no_chat_template(
    tmp_path: Path, target: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--target", target, "--from-layers", "1", "--chat-template", "--output", tmp_path / "pair"]
    assert "expected --dataset with --chat-template" in refusal(script, capsys, *arguments, "--device", "cpu")


def test_a_head_becomes_a_folder_that_drafts(
    tmp_path: Path, text: Path, tokenizer: PreTrainedTokenizerFast, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ARCHITECTURES["llama"]()
    config.update({"num_hidden_layers": 3})
    target = make_model(config, seed=3)
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    output = tmp_path / "head"
    options = [*SMALL.split(), "--target", tmp_path / "target", "--dataset", text, "--output", output]
    script(*options, "--head", "eagle3", "--draft-vocab-size", "60")
    assert f"The head is in {output}." in capsys.readouterr().out
    pair = SpecPair.from_pretrained(output)
    assert isinstance(pair.draft, Eagle3Head) and len(pair.config.measured) == 1
    assert pair.config.draft.name_or_path == "." and not pair.compatibility.errors
    written = json.loads((output / "config.json").read_text())
    assert written["speculators_model_type"] == "eagle3" and written["draft_vocab_size"] == 60
    assert load_file(output / "model.safetensors")["d2t"].shape == (60,)
    ids = tokenizer("the quick brown fox", return_tensors="pt", return_token_type_ids=False)
    out = target.generate(**ids, max_new_tokens=12, do_sample=False, strategy="spec", assistant_model=str(output))
    assert torch.equal(out, target.generate(**ids, max_new_tokens=12, do_sample=False))
    found = refusal(script, capsys, *SMALL.split(), "--target", tmp_path / "target", "--draft-vocab-size", "9")
    assert "expected --head with --draft-vocab-size" in found
