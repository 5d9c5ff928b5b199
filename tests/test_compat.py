"""Architectures of every family, each with its own kinds of layers and inputs, say what they say without us.

`scripts/compat_matrix` goes over all classes; these are a sample. Tiny models, built and compared as there: float32, all
rows of an uneven batch, prompts beyond the sliding windows, drafts that agree in part.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_specdec import forward
from hf_specdec.tools import compat, compat_table, tiny_models
from hf_specdec.tools.compat import ERROR, IDENTICAL, OURS, REFUSED, WRONG, examine
from hf_specdec.tools.isolated import Worker

ENTRIES = {entry.name: entry for entry in tiny_models.entries()}

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
        "Exaone4ForCausalLM",
    ],
    "encoder-decoder": [
        "T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel", "PegasusForConditionalGeneration",
        "M2M100ForConditionalGeneration", "WhisperForConditionalGeneration", "VisionEncoderDecoderModel",
    ],
    "images and sound": [
        "LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
        "Gemma3ForConditionalGeneration", "InternVLForConditionalGeneration", "Idefics3ForConditionalGeneration",
        "Mistral3ForConditionalGeneration", "VoxtralForConditionalGeneration",
    ],
}  # fmt: skip
SAMPLE = [name for names in FAMILIES.values() for name in names]


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
