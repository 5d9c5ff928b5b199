"""Architectures of every family, each with its own kinds of layers and inputs, say what they say without us.

`scripts/compat_matrix` goes over all classes; these are a sample, built and compared as there: tiny, in float32, rows
of uneven lengths, prompts beyond the sliding windows, drafts that agree in part.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_specdec import forward
from hf_specdec.masks import takes_ragged_rows
from hf_specdec.tools import compat, compat_table, tiny_models
from hf_specdec.tools.compat import ERROR, IDENTICAL, OURS, REFUSED, WRONG, examine
from hf_specdec.tools.isolated import Worker

ENTRIES = {entry.name: entry for entry in tiny_models.entries()}

FAMILIES: dict[str, list[str]] = {
    "dense": [
        "LlamaForCausalLM", "MptForCausalLM", "BertLMHeadModel", "Phi3ForCausalLM", "GPTBigCodeForCausalLM",
        "CohereForCausalLM", "Olmo2ForCausalLM", "NemotronForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
        "GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM", "FalconForCausalLM",
    ],
    "experts": ["Qwen3MoeForCausalLM", "DbrxForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM"],
    "latent attention": ["DeepseekV3ForCausalLM", "MiniCPM3ForCausalLM"],
    "windows": [
        "Gemma3ForCausalLM", "Llama4ForCausalLM", "GptOssForCausalLM", "Gemma2ForCausalLM", "Cohere2ForCausalLM",
        "MistralForCausalLM", "Exaone4ForCausalLM",
    ],
    "chosen keys": ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"],
    "recurrent and hybrid": [
        "Mamba2ForCausalLM", "Qwen3NextForCausalLM", "NemotronHForCausalLM", "Lfm2MoeForCausalLM", "BambaForCausalLM",
        "GraniteMoeHybridForCausalLM", "FalconH1ForCausalLM",
    ],
    "state of their own": ["MiniMaxForCausalLM", "xLSTMForCausalLM", "OpenAIGPTLMHeadModel"],
    "encoder-decoder": [
        "T5ForConditionalGeneration", "WhisperForConditionalGeneration", "VisionEncoderDecoderModel",
        "BartForConditionalGeneration", "MarianMTModel", "PegasusForConditionalGeneration",
        "M2M100ForConditionalGeneration",
    ],
    "images and sound": [
        "Qwen2VLForConditionalGeneration", "IdeficsForVisionText2Text", "VoxtralForConditionalGeneration",
        "LlavaForConditionalGeneration", "Qwen3VLForConditionalGeneration", "Gemma3ForConditionalGeneration",
        "InternVLForConditionalGeneration", "Idefics3ForConditionalGeneration", "Mistral3ForConditionalGeneration",
    ],
}  # fmt: skip
# Whose own code gives several tokens other logits than one after the other: refused, and why.
REFUSED_CLASSES = {
    "CpmAntForCausalLM": "gives several tokens on a filled cache other logits than one after the other",
    "DogeForCausalLM": "cannot be used beyond 12 tokens",
    "JambaForCausalLM": "does not continue a recurrent state over several tokens",
    "MambaForCausalLM": "does not continue a recurrent state over several tokens",
    "MoshiForCausalLM": "masks know of no window",
    "ProphetNetForCausalLM": "gives several tokens on a filled cache other logits than one after the other",
    "RecurrentGemmaForCausalLM": "keeps state where no cache of transformers holds it",
    "ReformerModelWithLMHead": "gives several tokens other logits than one after the other",
}
# The first ones of each family differ most; the others are run with `-m slow`.
USUAL = {"recurrent and hybrid": 4, "state of their own": 2, "latent attention": 1, "chosen keys": 1, "experts": 2}
SAMPLE = [
    pytest.param(name, marks=[pytest.mark.slow] * (place >= USUAL.get(family, 3)))
    for family, names in FAMILIES.items()
    for place, name in enumerate(names)
]


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_says_what_it_said(name: str) -> None:
    result = examine(ENTRIES[name], batches=(1, 4), assisted=False)
    assert result["build"] is None
    assert [case["batch"] for case in result["cases"]][:2] == [1, 4]
    for case in result["cases"]:
        assert case["vanilla"] is None, case
        assert case[OURS]["outcome"] == IDENTICAL, case
    rates = [case["acceptance"] for case in result["cases"]]
    assert 0.05 < sum(rates) / len(rates) < 0.95


@pytest.mark.parametrize("name", REFUSED_CLASSES)
def test_a_class_that_cannot_is_refused_by_name(name: str) -> None:
    result = examine(ENTRIES[name], batches=(1, 4), assisted=False)
    for batch in (1, 4):
        kind, message = compat_table.outcome(result, OURS, batch)
        assert kind == REFUSED and REFUSED_CLASSES[name] in message


def test_other_tokens_are_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """One position too far where drafts are verified, and the table says so."""
    original = forward.CachedModel._positions

    def broken(self: Any, *args: Any) -> torch.Tensor:
        return original(self, *args) + (args[-1].shape[1] == compat.GAMMA + 1)

    monkeypatch.setattr(forward.CachedModel, "_positions", broken)
    result = examine(ENTRIES["LlamaForCausalLM"], batches=(1,), assisted=False)
    kind, message = compat_table.outcome(result, OURS, 1)
    assert kind == WRONG and "differs at new token" in message


def test_exceptions_raised_on_purpose_are_refusals_and_others_are_errors() -> None:
    result = examine(ENTRIES["LlamaForCausalLM"], batches=(4,))
    kind, message = compat_table.outcome(result, compat.ASSISTED, 4)
    assert kind == REFUSED and message == "ValueError: assisted generate is only supported for batch_size = 1"

    def somebody_elses() -> None:
        raise ValueError("not our words")

    def our_mistake() -> None:
        forward.CachedModel._positions(None, [], None)  # type: ignore[arg-type]

    for run in (somebody_elses, our_mistake):
        found = compat._outcome(run, torch.zeros(1, 1), lambda: torch.zeros(1, 1), "hf_specdec/")
        assert found["outcome"] == ERROR


def test_a_model_that_reads_the_length_of_the_longest_row_keeps_rows_in_step() -> None:
    """Llama 4 scales its queries by it; only beyond 8192 tokens, so no short text would show it."""
    for honours in (False, True):
        config = tiny_models.tiny_config(ENTRIES["Llama4ForCausalLM"])
        config.attn_temperature_tuning = not honours
        config.floor_scale = 8192
        torch.manual_seed(0)
        assert takes_ragged_rows(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()) is honours


def test_every_class_of_the_mappings_is_listed_once() -> None:
    names = [entry.name for entry in tiny_models.entries()]
    assert len(names) == len(set(names)) > 200
    assert {"LlamaForCausalLM", "T5ForConditionalGeneration", "WhisperForConditionalGeneration"} <= set(names)


def test_a_worker_that_dies_or_hangs_is_told_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "moody.py").write_text(
        "import os, time\n"
        "from hf_specdec.tools.isolated import serve\n"
        "def answer(question):\n"
        "    print('chatter')\n"
        "    if question['do'] == 'die': os._exit(3)\n"
        "    if question['do'] == 'hang': time.sleep(60)\n"
        "    return {'did': question['do']}\n"
        "serve(answer)\n"
    )
    paths = [str(tmp_path), str(Path(__file__).parent.parent)]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    worker = Worker("moody")
    assert worker.ask({"do": "work"}, 60) == {"did": "work"}
    assert worker.ask({"do": "die"}, 60) == {"crash": "the process ended with code 3"}
    assert worker.ask({"do": "hang"}, 2) == {"crash": "no answer within 2 s"}
    assert worker.ask({"do": "work"}, 60) == {"did": "work"}
    worker.stop()


def test_the_page_counts_and_lists_everything() -> None:
    def case(ours: str, batch: int, vanilla: str | None = None) -> dict[str, Any]:
        method = {"outcome": ours, "message": "" if ours == IDENTICAL else "ValueError: no X in AModel"}
        return {"inputs": "text", "batch": batch, "vanilla": vanilla, OURS: method, compat.ASSISTED: method}

    results = [
        {
            "name": "AModel",
            "build": None,
            "layer_types": ["full_attention"],
            "cases": [case(IDENTICAL, 1), case(REFUSED, 4)],
        },
        {"name": "BModel", "build": None, "cases": [case(WRONG, 1), case(WRONG, 4)]},
        {"name": "CModel", "build": "ImportError: timm", "cases": []},
        {"name": "DModel", "build": None, "cases": [case("", 1, "TypeError: no"), case("", 4, "TypeError: no")]},
    ]
    assert compat_table.counts(results, [1])["1"][OURS] == {
        IDENTICAL: 1, WRONG: 1, compat_table.NOT_BUILT: 1, compat_table.VANILLA_CANNOT: 1,
    }  # fmt: skip
    page = compat_table.markdown(results, [1, 4], "the command")
    assert "| identical | 1 (50%) | 1 (50%) | 0 (0%) | 0 (0%) |" in page
    assert "| AModel | full | text | ✓ | ✓ | refused | refused |" in page
    assert "- refused: ValueError: no X in CLASS: AModel" in page
    assert "- CModel: ImportError: timm" in page and "- DModel: TypeError: no" in page and "the command" in page
