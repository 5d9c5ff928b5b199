"""Architectures of every family, each with its own kinds of layers and inputs, generate the same as without us.

`scripts/compat_matrix` covers all classes; these are a sample, built and compared in the same way: tiny, rows of
uneven lengths, prompts beyond the sliding windows, drafts that agree in part. The representative of each family
always runs, in float32 and in bfloat16; the others are marked slow.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_specdec.models import abilities, layout
from hf_specdec.models.abilities import Abilities
from hf_specdec.tools import compat, compat_table, tiny_configs, tiny_models
from hf_specdec.tools.compat import ERROR, IDENTICAL, OURS, REFUSED, TIE, WRONG
from hf_specdec.tools.isolated import Worker
from hf_specdec.tools.lossless import Row
from hf_specdec.tools.tiny_models import Entry

ENTRIES = {entry.name: entry for entry in tiny_models.entries()}

examine = functools.partial(compat.examine, new_tokens=14)  # enough for the shortest row to cross the windows

FAMILIES: dict[str, list[str]] = {
    "dense": [
        "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
        "OPTForCausalLM", "Phi3ForCausalLM", "FalconForCausalLM", "MptForCausalLM", "GPTBigCodeForCausalLM",
        "CohereForCausalLM", "Olmo2ForCausalLM", "NemotronForCausalLM", "BertLMHeadModel",
    ],
    "experts": ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "DbrxForCausalLM"],
    "latent attention": ["DeepseekV3ForCausalLM", "MiniCPM3ForCausalLM"],
    "windows": [
        "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Cohere2ForCausalLM", "MistralForCausalLM", "GptOssForCausalLM",
        "Exaone4ForCausalLM", "Llama4ForCausalLM",
    ],
    "chosen keys": ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"],
    "recurrent and hybrid": [
        "Mamba2ForCausalLM", "BambaForCausalLM", "GraniteMoeHybridForCausalLM",
        "FalconH1ForCausalLM", "Qwen3NextForCausalLM", "NemotronHForCausalLM", "Lfm2MoeForCausalLM",
    ],
    "state of their own": ["MiniMaxForCausalLM", "xLSTMForCausalLM", "OpenAIGPTLMHeadModel"],
    "encoder-decoder": [
        "T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel",
        "PegasusForConditionalGeneration", "M2M100ForConditionalGeneration", "WhisperForConditionalGeneration",
        "VisionEncoderDecoderModel",
    ],
    "images and sound": [
        "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
        "Gemma3ForConditionalGeneration", "InternVLForConditionalGeneration", "Idefics3ForConditionalGeneration",
        "IdeficsForVisionText2Text", "Mistral3ForConditionalGeneration", "VoxtralForConditionalGeneration",
    ],
}  # fmt: skip
# Their own code returns different logits for a block than token by token: an error with the reason.
REFUSED_CLASSES = {
    "CpmAntForCausalLM": "fails when it is tried",
    "DogeForCausalLM": "cannot be used beyond 12 tokens",
    "JambaForCausalLM": "does not continue a recurrent state over several tokens",
    "MambaForCausalLM": "does not continue a recurrent state over several tokens",
    "MoshiForCausalLM": "masks have no window",
    "ProphetNetForCausalLM": "`use_cache` is only supported for `decoder_input_ids` of length 1",
    "RecurrentGemmaForCausalLM": "keeps state",
    "ReformerModelWithLMHead": "returns logits for 1 of 3 tokens",
}
# The same by accident if rows are as long, or texts as short, as in a simple probe.
DECEIVERS = {
    "GPTNeoForCausalLM": "its local layers mask by a band that is aligned with the longest row",
    "ImageGPTForCausalImageModeling": "it flattens a mask of four dimensions",
    "DeepseekV4ForCausalLM": "blocks that begin in padding are compressed otherwise",
}
# Their `generate()` makes more than one token per step, or does not go token by token.
OWN_DECODING = {
    "HiggsAudioV2ForConditionalGeneration": "higgs_audio_v2",
    "LasrForCTC": "lasr_ctc",
    "ParakeetForTDT": "parakeet_tdt",
    "PocketTTSForConditionalGeneration": "pocket_tts",
}
ALWAYS = {
    "LlamaForCausalLM", "GPT2LMHeadModel", "FalconForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM",
    "Gemma3ForCausalLM", "GptOssForCausalLM", "Llama4ForCausalLM", "DeepseekV32ForCausalLM", "Mamba2ForCausalLM",
    "Qwen3NextForCausalLM", "Lfm2MoeForCausalLM", "xLSTMForCausalLM", "T5ForConditionalGeneration",
    "VisionEncoderDecoderModel", "Qwen2VLForConditionalGeneration", "IdeficsForVisionText2Text",
}  # fmt: skip
IN_BFLOAT16 = [
    "LlamaForCausalLM", "MixtralForCausalLM", "Gemma3ForCausalLM", "Qwen3NextForCausalLM",
    "BartForConditionalGeneration",
]  # fmt: skip
SAMPLE = [
    pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)
    for names in FAMILIES.values()
    for name in names
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


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_a_class_says_in_half_precision_what_it_said_but_for_ties(name: str) -> None:
    result = examine(ENTRIES[name], batches=(4,), assisted=False, dtype=torch.bfloat16)
    assert result["build"] is None and result["dtype"] == "bfloat16"
    for case in result["cases"]:
        assert case["vanilla"] is None, case
        assert case[OURS]["outcome"] in (IDENTICAL, TIE), case
        assert case["acceptance"] > 0.05


@pytest.mark.parametrize("name", DECEIVERS)
def test_a_class_that_deceives_a_simple_probe_says_what_it_said_or_is_refused(name: str) -> None:
    entry = ENTRIES.get(name, Entry(name, "imagegpt"))
    (case,) = examine(entry, batches=(4,), assisted=False)["cases"]
    assert case["vanilla"] is None
    assert case[OURS]["outcome"] in (IDENTICAL, REFUSED), f"{case}: {DECEIVERS[name]}"


@pytest.mark.parametrize("name", OWN_DECODING)
def test_a_class_with_a_decoding_method_of_its_own_is_refused(name: str) -> None:
    (case,) = examine(Entry(name, OWN_DECODING[name]), batches=(1,), assisted=False)["cases"]
    assert case["vanilla"] is None
    assert case[OURS]["outcome"] == REFUSED, case


@pytest.mark.parametrize("name", REFUSED_CLASSES)
def test_a_class_that_cannot_is_refused_by_name(name: str) -> None:
    result = examine(ENTRIES[name], batches=(1, 4), assisted=False)
    for batch in (1, 4):
        kind, message = compat_table.outcome(result, OURS, batch)
        assert kind == REFUSED and REFUSED_CLASSES[name] in message


def test_other_tokens_are_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification is one position too far, and the table shows it."""
    original = layout.Layout.positions

    def broken(self: Any, *args: Any) -> torch.Tensor:
        return original(self, *args) + (args[-1].shape[1] == compat.GAMMA + 1)

    monkeypatch.setattr(layout.Layout, "positions", broken)
    monkeypatch.setattr(abilities, "rehearse", lambda *_, **__: None)  # which would find it first
    result = examine(ENTRIES["LlamaForCausalLM"], batches=(1,), assisted=False)
    kind, message = compat_table.outcome(result, OURS, 1)
    assert kind == WRONG and "differs at new token" in message


def _beside_vanilla(dtype: torch.dtype, closeness: float) -> dict[str, Any]:
    """The verdict on a token whose score in vanilla is `closeness` below the best."""
    step = torch.tensor([[1.0, 1.0 - closeness, 0.0]]), torch.tensor([[1.0 - closeness, 1.0, 0.0]])
    expected, given = (
        compat.Answer(torch.tensor([[token]]), 1, [Row([token], logits, logits)]) for token, logits in enumerate(step)
    )
    comparison = compat._Comparison(ENTRIES["LlamaForCausalLM"], lambda *_: {}, 1, False, dtype, 1, 0)
    comparison.target, comparison.inputs = tiny_models.build(ENTRIES["LlamaForCausalLM"]), {}
    comparison.expected, comparison.noise = expected, 0.01 if dtype is torch.bfloat16 else 1e-6
    return comparison.judge(given)


def test_rounding_explains_other_tokens_only_within_the_noise_of_the_dtype() -> None:
    assert _beside_vanilla(torch.bfloat16, 0.008)["outcome"] == TIE
    assert _beside_vanilla(torch.bfloat16, 0.1)["outcome"] == WRONG
    assert _beside_vanilla(torch.float32, 0.008)["outcome"] == WRONG


def test_the_rows_of_a_prompt_start_within_the_windows_and_beyond_them() -> None:
    for seed in range(20):
        lengths = sorted(tiny_models.prompts(4, 20, seed)["attention_mask"].sum(dim=1).tolist())
        assert lengths[0] < tiny_configs.WINDOW - 3 and lengths[-2] > tiny_configs.WINDOW and lengths[-1] == 20
        assert len(set(lengths)) == 4


def test_exceptions_raised_on_purpose_are_refusals_and_others_are_errors() -> None:
    result = examine(ENTRIES["LlamaForCausalLM"], batches=(4,))
    kind, message = compat_table.outcome(result, compat.ASSISTED, 4)
    assert kind == REFUSED and message == "ValueError: assisted generate is only supported for batch_size = 1"

    def somebody_elses() -> None:
        raise ValueError("not our words")

    def our_mistake() -> None:
        layout.Layout.positions(None, [], None)  # type: ignore[arg-type]

    for run in (somebody_elses, our_mistake):
        found = compat.outcome(run, lambda answer: {"outcome": IDENTICAL}, "hf_specdec/")
        assert found["outcome"] == ERROR


def test_a_model_that_reads_the_length_of_the_longest_row_keeps_rows_in_step() -> None:
    """Llama 4 scales its queries by it; only beyond 8192 tokens, so a short text would not show it."""
    for honours in (False, True):
        config = tiny_models.tiny_config(ENTRIES["Llama4ForCausalLM"])
        config.attn_temperature_tuning = not honours
        config.floor_scale = 8192
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        assert bool(Abilities.of(model).ragged) is honours


def test_every_class_of_the_mappings_is_listed_once() -> None:
    names = [entry.name for entry in tiny_models.entries()]
    assert len(names) == len(set(names)) > 200
    assert {"LlamaForCausalLM", "T5ForConditionalGeneration", "WhisperForConditionalGeneration"} <= set(names)


@pytest.mark.slow
def test_every_class_that_generates_is_listed_once() -> None:
    names = [entry.name for entry in tiny_models.every_entry()]
    assert len(names) == len(set(names)) and set(ENTRIES) < set(names)
    assert {"ImageGPTForCausalImageModeling", "CsmForConditionalGeneration", "BarkModel", "MoshiDepthDecoder"} <= set(
        names
    )


@pytest.mark.slow
def test_a_run_goes_beyond_every_window_that_a_config_names() -> None:
    for entry in ENTRIES.values():
        try:
            config = tiny_models.tiny_config(entry).get_text_config(decoder=True)
        except ValueError:  # of those listed as not built
            continue
        for name in (
            "sliding_window",
            "window_size",
            "attention_chunk_size",
            "attention_window_size",
            "local_attention",
        ):
            window = getattr(config, name, None)
            assert not isinstance(window, int) or window <= tiny_configs.WINDOW, (entry.name, name, window)


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
    paths = [str(tmp_path), str(Path(__file__).parents[2])]
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
            "dtype": "float32",
            "build": None,
            "layer_types": ["full_attention"],
            "cases": [case(IDENTICAL, 1), case(REFUSED, 4)],
        },
        {"name": "BModel", "dtype": "float32", "build": None, "cases": [case(WRONG, 1), case(WRONG, 4)]},
        {"name": "CModel", "dtype": "float32", "build": "ImportError: timm", "cases": []},
        {
            "name": "DModel",
            "dtype": "float32",
            "build": None,
            "cases": [case("", 1, "TypeError: no"), case("", 4, "TypeError: no")],
        },
    ]
    assert compat_table.counts(results, [1])["1"][OURS] == {
        IDENTICAL: 1, WRONG: 1, compat_table.NOT_BUILT: 1, compat_table.VANILLA_CANNOT: 1,
    }  # fmt: skip
    in_bfloat16 = results[0] | {"dtype": "bfloat16", "cases": [case(TIE, 1), case(TIE, 4)]}
    page = compat_table.markdown([*results, in_bfloat16], [1, 4], "the command")
    assert "| identical | 1 (50%) | 1 (50%) | 0 (0%) | 0 (0%) |" in page
    assert "| identical but for ties | 1 (100%) | 1 (100%) | 1 (100%) | 1 (100%) |" in page
    assert "| AModel | full | text | ✓ | refused | ✓ tie | ✓ tie | ✓ | refused | ✓ tie | ✓ tie |" in page
    assert "- refused: ValueError: no X in CLASS: AModel" in page
    assert "- CModel (in float32): ImportError: timm" in page and "- DModel (in float32): TypeError: no" in page
    assert "the command" in page
