"""Beside other engines: the files that they are given, and what is made of their times. The engines do not run here."""

import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import SIZES, make_model
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_specdec.tools import engines
from hf_specdec.tools.engines import ENGINES, Engine, Timed

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = spec_from_file_location("compare_engines", SCRIPTS / "compare_engines.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["compare_engines"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("weights", "tolerance"), [("float32", 0), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_other_engines_get_the_same_weights(
    weights: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made once, from the wheel's file."""
    write_gguf(make_model(LlamaConfig(**SIZES), seed=3), tmp_path / "wheel.gguf", quantized=True)
    monkeypatch.setattr(engines, "FOLDER", tmp_path / "cache" / "model")
    wheel = tmp_path / "wheel.gguf"
    monkeypatch.setattr(engines, "download_gguf", lambda folder: Path(shutil.copy(wheel, folder / "a.gguf")))
    (tmp_path / "cache").mkdir()
    file = engines.gguf_file(weights)
    assert [path.name for path in file.parent.iterdir()] == [f"model-{weights}.gguf"]
    expected, found = (
        AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
        for path in (wheel, file)
    )
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.allclose(found[name], values, rtol=tolerance, atol=0 if weights != "float16" else 1e-7), name
    monkeypatch.setattr(engines, "download_gguf", None)
    assert engines.gguf_file(weights) == file  # without another download


def test_engines_take_turns_and_one_that_fails_is_not_asked_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    class Fake:
        def __init__(self, its: tuple[Engine, ...], threads: int) -> None:
            assert threads == 2

        def answer(self, engine: Engine, prompt: list[int], new_tokens: int) -> Timed | str:
            asked.append((engine.program, prompt[0]))
            if engine.program == "llama.cpp":
                return "ImportError: no such thing"
            seconds = 2.0 if engine.program == "transformers" else 0.5
            other = prompt[0] == 7 and engine.program != "transformers"
            return Timed([1, 2, 3 + other], seconds * prompt[0], 0.1)

        def end(self) -> None:
            asked.append(("end", 0))

    monkeypatch.setattr(script, "Team", Fake)
    chosen = (Engine("transformers", "float32"), Engine("hf_specdec", "float32", "head"), Engine("llama.cpp", "4 bits"))
    found = script.measure(chosen, [[5], [7]], 3, 2, 2)
    assert asked.count(("llama.cpp", 5)) + asked.count(("llama.cpp", 7)) == 1
    assert {first for first, _ in asked[:7:3]} != {"transformers"} and asked[-1] == ("end", 0)
    plain, ours, failed = script.summary(found)
    assert plain["ratio"] == 1 and plain["same_texts"] == 1 and plain["tokens_per_second"] == pytest.approx(12 / 48)
    assert ours["ratio"] == 4 and ours["same_texts"] == 0.5 and ours["engine"] == "hf_specdec, float32, head"
    assert failed == {"engine": "llama.cpp, 4 bits", "failed": "ImportError: no such thing"}


def test_a_failure_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(engine: Engine, threads: int) -> None:
        raise OSError(f"no {engine.program} for {threads}")

    monkeypatch.setattr(engines, "_llama", refuse)
    engines._loaded.cache_clear()
    question = {"engine": ["llama.cpp", "float32", ""], "prompt": [1], "new_tokens": 2, "threads": 3}
    assert engines.handle(question) == {"error": "OSError: no llama.cpp for 3"}
    assert len({engine.name for engine in ENGINES}) == len(ENGINES)
