"""Tiny models that see or hear, and handmade prompts for them: placeholder ids, pixels, grids, features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from conftest import SIZES, perturbed
from transformers import PreTrainedModel

IMAGE, VIDEO, START, END = 90, 91, 92, 93  # ids below 88 are text
TEXT = {**SIZES, "head_dim": 8}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
CLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "projection_dim": 16, "vision_use_head": False, "initializer_range": 0.2,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1,
    "initializer_range": 0.2,
}  # fmt: skip
WHISPER = {
    "d_model": 16, "hidden_size": 16, "encoder_layers": 1, "num_hidden_layers": 1, "encoder_attention_heads": 2,
    "num_attention_heads": 2, "encoder_ffn_dim": 32, "intermediate_size": 32, "num_mel_bins": 4,
    "max_source_positions": 8, "initializer_range": 0.2,
}  # fmt: skip

Inputs = dict[str, torch.Tensor]
Size = tuple[int, int]  # the meaning of an image's size depends on the family


@dataclass(frozen=True)
class Family:
    """Models of one kind.

    Attributes:
        config: a tiny configuration.
        tokens: how many placeholders stand for an image of a size.
        inputs: what a batch's images add to the prompt, given the images of each row.
        token_types: the name under which the prompt says which of its tokens are placeholders.
        noise: how far a draft's weights are moved.
    """

    config: Callable[[], transformers.PreTrainedConfig]
    tokens: Callable[[Size], int]
    inputs: Callable[[list[list[Size]], torch.Generator], Inputs]
    token_types: str | None = None
    auto: str = "AutoModelForImageTextToText"
    noise: float = 0.08


def _grids(rows: list[list[Size]], generator: torch.Generator, values: int) -> Inputs:
    grids = [[1, *size] for row in rows for size in row]
    patches = sum(h * w for _, h, w in grids)
    return {
        "pixel_values": torch.randn(patches, values, generator=generator),
        "image_grid_thw": torch.tensor(grids),
    }


def _pixels(rows: list[list[Size]], generator: torch.Generator, *shape: int) -> Inputs:
    return {"pixel_values": torch.randn(sum(map(len, rows)), *(shape or (3, 8, 8)), generator=generator)}


def _by_row(rows: list[list[Size]], generator: torch.Generator) -> Inputs:
    """`[batch, images, 3, 8, 8]`; an all-zero image means none."""
    pixels = torch.zeros(len(rows), max(map(len, rows)), 3, 8, 8)
    for row, images in enumerate(rows):
        pixels[row, : len(images)] = torch.randn(len(images), 3, 8, 8, generator=generator)
    return {"pixel_values": pixels}


def _tiled(rows: list[list[Size]], generator: torch.Generator) -> Inputs:
    """A whole image and its two halves, 8 x 16: the layout of LLaVA-NeXT."""
    count = sum(map(len, rows))
    return {
        "pixel_values": torch.randn(count, 3, 3, 8, 8, generator=generator),
        "image_sizes": torch.tensor([[8, 16]] * count),
    }


def _sound(rows: list[list[Size]], generator: torch.Generator) -> Inputs:
    features = torch.randn(sum(map(len, rows)), 4, 16, generator=generator)
    return {"input_features": features}


def _masked_sound(rows: list[list[Size]], generator: torch.Generator) -> Inputs:
    features = _sound(rows, generator)["input_features"]
    return {"input_features": features, "feature_attention_mask": torch.ones(len(features), 16, dtype=torch.long)}


def _config(
    name: str, text: dict[str, Any] | None = None, **values: Any
) -> Callable[[], transformers.PreTrainedConfig]:
    return lambda: getattr(transformers, name)(text_config={**TEXT, **(text or {})}, **values)


_QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        _config("Qwen2VLConfig", {"rope_parameters": MROPE}, **_QWEN_IDS,
                vision_config={**QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
        lambda size: size[0] * size[1] // 4, lambda rows, g: _grids(rows, g, 12), "mm_token_type_ids",
    ),
    "qwen2_5_vl": Family(
        _config("Qwen2_5_VLConfig", {"rope_parameters": MROPE}, **_QWEN_IDS,
                vision_config={**QWEN_VISION, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32,
                               "window_size": 8, "fullatt_block_indexes": [0]}),
        lambda size: size[0] * size[1] // 4, lambda rows, g: _grids(rows, g, 12), "mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        _config("Qwen3VLConfig", {"rope_parameters": MROPE}, **_QWEN_IDS,
                vision_config={**QWEN_VISION, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32,
                               "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
        lambda size: size[0] * size[1] // 4, lambda rows, g: _grids(rows, g, 12), "mm_token_type_ids",
    ),
    "llava": Family(
        _config("LlavaConfig", {"model_type": "llama"}, image_token_index=IMAGE,
                vision_config={**CLIP, "model_type": "clip_vision_model"}),
        lambda size: 4, _pixels,
    ),
    "llava_next": Family(
        _config("LlavaNextConfig", {"model_type": "mistral", "sliding_window": None}, image_token_index=IMAGE,
                image_grid_pinpoints=[[8, 16]], vision_config={**CLIP, "model_type": "clip_vision_model"}),
        lambda size: 4 + 2 * (4 + 1), _tiled,
    ),
    "llava_onevision": Family(
        _config("LlavaOnevisionConfig", {"model_type": "qwen2"}, image_token_index=IMAGE, video_token_index=VIDEO,
                image_grid_pinpoints=[[8, 16]], vision_config={**CLIP, "model_type": "siglip_vision_model"}),
        lambda size: 4 + 2 * (4 + 1), _tiled,
    ),
    "gemma3": Family(
        _config("Gemma3Config", {"sliding_window": 12, "query_pre_attn_scalar": 8,
                                 "layer_types": ["sliding_attention", "full_attention"]},
                tie_word_embeddings=False, mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=START,
                eoi_token_index=END, vision_config=CLIP),
        lambda size: 4, _pixels, "token_type_ids", noise=0.2,
    ),
    "paligemma": Family(
        _config("PaliGemmaConfig", {"model_type": "gemma"}, tie_word_embeddings=False, image_token_index=IMAGE,
                vocab_size=96, hidden_size=32, projection_dim=32,
                vision_config={**CLIP, "model_type": "siglip_vision_model", "projection_dim": 32}),
        lambda size: 4, _pixels, "token_type_ids", noise=0.2,
    ),
    "smolvlm": Family(
        _config("SmolVLMConfig", {"model_type": "llama"}, image_token_id=IMAGE, scale_factor=2, vision_config=CLIP),
        lambda size: 1, _by_row,
    ),
    "idefics3": Family(
        _config("Idefics3Config", {"model_type": "llama"}, image_token_id=IMAGE, scale_factor=2, vision_config=CLIP),
        lambda size: 1, _by_row,
    ),
    "internvl": Family(
        _config("InternVLConfig", {"model_type": "qwen2"}, image_token_id=IMAGE, image_seq_length=1,
                vision_config={**CLIP, "image_size": [8, 8], "patch_size": [4, 4]}),
        lambda size: 1, _pixels,
    ),
    "qwen2_audio": Family(
        _config("Qwen2AudioConfig", {"model_type": "qwen2"}, audio_token_index=IMAGE, audio_config=WHISPER),
        lambda size: 4, _masked_sound, auto="AutoModelForMultimodalLM",
    ),
    "voxtral": Family(
        _config("VoxtralConfig", {"model_type": "llama"}, audio_token_id=IMAGE,
                audio_config={**WHISPER, "intermediate_size": 64}),
        lambda size: 4, _sound, auto="AutoModelForMultimodalLM",
    ),
}  # fmt: skip


def make_multimodal(name: str, seed: int = 0, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target and a draft of its kind that agrees in part, float32, without an EOS token."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    auto = getattr(transformers, family.auto)
    target = auto.from_config(family.config(), dtype=torch.float32, **kwargs).eval()
    target.generation_config.pad_token_id = 0
    target.generation_config.eos_token_id = None
    return target, perturbed(target, family.noise, seed + 1)


def make_multimodal_prompts(name: str, rows: list[list[Size]], seed: int = 0) -> Inputs:
    """Prompts with these images, of uneven lengths, left-padded: text, then each image followed by text."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(2, 88, (length,), generator=generator).tolist()

    prompts = []
    for index, images in enumerate(rows):
        ids = text(2 + index)
        for size in images:
            ids += [START, *[IMAGE] * family.tokens(size), END, *text(3)]
        prompts.append(ids + text(2))
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if family.token_types:
        inputs[family.token_types] = (ids == IMAGE).long()
    if any(rows):
        inputs.update(family.inputs(rows, generator))
    return inputs
