"""Prompts for tiny models: text, and text with an image or sound if that can be made without a processor.

Most multimodal classes accept the output of their vision or audio tower (`mm_encoder_outputs`), in the same form for
all of them. The others get pixels or features of the shape that they need.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.bark.generation_configuration_bark import BarkSemanticGenerationConfig

from .tiny_models import prompts

Inputs: TypeAlias = Callable[[PreTrainedModel, int, int], dict[str, Any]]

_WIDTH = 20
_PLACEHOLDERS = 4  # tokens that stand for an image or a sound


def inputs_of(model: PreTrainedModel) -> dict[str, Inputs]:
    """The kinds of prompts to try with a model, by name."""
    config = model.config
    for key in (type(model).__name__, f"{config.model_type}/{model.main_input_name}", config.model_type):
        if key in _OWN:
            return _OWN[key]
    if config.is_encoder_decoder:
        return {"text": _encoder_text}
    kinds: dict[str, Inputs] = {"text": _text}
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        for kind in ("image", "audio"):
            if _placeholder(model, kind) is not None:
                kinds[kind] = _media(kind)
    return kinds


def _text(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    return prompts(batch, _WIDTH, seed)


def _encoder_text(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    return prompts(batch, _WIDTH, seed, side="right")


def _placeholder(model: PreTrainedModel, kind: str) -> int | None:
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        value = getattr(model.config, name, None)
        if isinstance(value, int):
            return value
    return None


def _media(kind: str) -> Inputs:
    """A prompt with an image or a sound in its middle, given as its tower's output."""

    def make(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
        inputs: dict[str, Any] = dict(prompts(batch, _WIDTH, seed))
        place = slice(_WIDTH - 8, _WIDTH - 8 + _PLACEHOLDERS)
        inputs["input_ids"][:, place] = _placeholder(model, kind)
        inputs["attention_mask"][:, place.start :] = 1
        inputs["input_ids"][:, place.stop :] = inputs["input_ids"][:, place.stop :].clamp(min=4)
        width = model.config.get_text_config(decoder=True).hidden_size
        features = _randn(model, seed, batch, _PLACEHOLDERS, width)
        for form in (features, tuple(features)):  # some classes want one, some the other
            output = BaseModelOutputWithPooling(pooler_output=form)
            output.deepstack_features = [form if isinstance(form, tuple) else features.flatten(0, 1)]
            inputs["mm_encoder_outputs"] = {kind: output}
            with contextlib.suppress(Exception), torch.no_grad():
                model(**copy.deepcopy(inputs))
                break
        return inputs

    return make


def _randn(model: PreTrainedModel, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.dtype)


def _features(name: str, *shape: str | int, text: bool = False, **more: Callable[[int], Tensor]) -> Inputs:
    """Random inputs called `name`, `[batch, *shape]`; a name in `shape` is an attribute of the config."""

    def make(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
        sizes = [size if isinstance(size, int) else _attribute(model.config, size) for size in shape]
        inputs: dict[str, Any] = dict(prompts(batch, _WIDTH, seed)) if text else {}
        inputs[name] = _randn(model, seed, batch, *sizes)
        return inputs | {key: value(batch) for key, value in more.items()}

    return make


def _attribute(config: Any, path: str) -> int:
    for name in path.split("."):
        config = getattr(config, name)
    return int(config)


def _pixels(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    """Text and pixels, of the size that the vision tower expects."""
    size = model.config.vision_config.image_size
    return {**prompts(batch, _WIDTH, seed), "pixel_values": _randn(model, seed, batch, 3, size, size)}


def _with_question(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    """InstructBLIP: image tokens in the prompt, and the question again for the Q-Former."""
    inputs = _pixels(model, batch, seed)
    count = model.config.num_query_tokens
    token = _placeholder(model, "image")
    if token is None:
        token = _placeholder(model, "video")
    inputs["input_ids"] = torch.cat([inputs["input_ids"].new_full((batch, count), token), inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "qformer_input_ids" in inspect.signature(model.forward).parameters:
        inputs["qformer_input_ids"] = prompts(batch, 6, seed)["input_ids"].clamp(min=4)
    return inputs


def _kosmos2(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    inputs = _pixels(model, batch, seed)
    place = torch.zeros_like(inputs["input_ids"])
    place[:, -8 : -8 + model.config.latent_query_num] = 1
    inputs["attention_mask"][:, -8:] = 1
    return {**inputs, "image_embeds_position_mask": place}


def _idefics(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    inputs = _pixels(model, batch, seed)
    inputs["pixel_values"] = inputs["pixel_values"][:, None]
    return {**inputs, "image_attention_mask": torch.ones(batch, _WIDTH, 1, dtype=torch.long)}


def _udop(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    boxes = torch.rand(batch, _WIDTH, 4, generator=torch.Generator().manual_seed(seed))
    return {**_encoder_text(model, batch, seed), "bbox": boxes}


def _video(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    """InstructBLIP-Video: four frames, each with its own query tokens."""
    inputs = _with_question(model, batch, seed)
    extra = 3 * model.config.num_query_tokens
    for name, value in (("input_ids", model.config.video_token_index), ("attention_mask", 1)):
        inputs[name] = torch.cat([inputs[name].new_full((batch, extra), value), inputs[name]], dim=1)
    inputs["pixel_values"] = inputs["pixel_values"][:, None].repeat(1, 4, 1, 1, 1)
    return inputs


def _patches(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    patches = _randn(model, seed, batch, 8, 2 + model.config.vision_config.patch_embed_hidden_size)
    patches[..., :2] = 1 + torch.arange(8)[:, None]
    return {"flattened_patches": patches, "attention_mask": torch.ones(batch, 8)}


def _unconditional(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    return dict(model.get_unconditional_inputs(batch))


def _codebooks(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    """Musicgen's decoder: one row per codebook and prompt."""
    return {"input_ids": prompts(batch * model.config.num_codebooks, 4, seed)["input_ids"].clamp(min=4)}


def _before_sound(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    """Text whose last token says that sound follows."""
    inputs = _text(model, batch, seed)
    inputs["input_ids"][:, -1] = model.config.audio_bos_token_id
    return inputs


def _first_codebook(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    """CSM's depth decoder: the state of the backbone, and the token of the first codebook."""
    states = _randn(model, seed, batch, model.config.backbone_hidden_size)
    return {"input_ids": prompts(batch, 4, seed)["input_ids"][:, :2].clamp(min=4), "backbone_last_hidden_state": states}


def _semantic(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    config = BarkSemanticGenerationConfig(
        text_encoding_offset=1, text_pad_token=100, semantic_infer_token=101, semantic_vocab_size=90,
        semantic_pad_token=90, max_input_semantic_length=_WIDTH, eos_token_id=90, max_new_tokens=None,
    )  # fmt: skip
    return {**prompts(batch, _WIDTH, seed), "semantic_generation_config": config}


def _with_documents(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
    """RAG: the documents that a retriever would have found."""
    documents = prompts(batch * model.config.n_docs, _WIDTH, seed, side="right")
    scores = _randn(model, seed, batch, model.config.n_docs)
    context = {"context_input_ids": documents["input_ids"], "context_attention_mask": documents["attention_mask"]}
    return {**_encoder_text(model, batch, seed), **context, "doc_scores": scores, "n_docs": model.config.n_docs}


def _into_speech(make: Inputs) -> Inputs:
    """SeamlessM4T: the language to speak."""

    def made(model: PreTrainedModel, batch: int, seed: int) -> dict[str, Any]:
        for name in ("text_decoder_lang_to_code_id", "t2u_lang_code_to_id", "vocoder_lang_code_to_id"):
            setattr(model.generation_config, name, {"eng": 5})
        return {**make(model, batch, seed), "tgt_lang": "eng", "return_intermediate_token_ids": True}

    return made


_FRAMES = _features("input_features", 64, "encoder_config.num_mel_bins")
_IMAGE16 = {"image": _features("pixel_values", 3, 16, 16)}
# Inputs of classes that no general rule fits, by model type.
_OWN: dict[str, dict[str, Inputs]] = {
    "whisper/input_features": {"audio": _features("input_features", "num_mel_bins", 1024)},
    "moonshine": {"audio": _features("input_values", 4000)},
    "moonshine_streaming": {"audio": _features("input_values", 4000)},
    "speech_to_text": {"audio": _features("input_features", 40, "input_feat_per_channel")},
    "speecht5": {"audio": _features("input_values", 4000)},
    "speech-encoder-decoder": {"audio": _features("inputs", 4000)},
    "seamless_m4t/input_features": {"audio": _features("input_features", 40, "feature_projection_input_dim")},
    "seamless_m4t_v2/input_features": {"audio": _features("input_features", 40, "feature_projection_input_dim")},
    **{
        kind: {"audio": _FRAMES}
        for kind in (
            "canary",
            "cohere_asr",
            "parakeet_ctc",
            "parakeet_rnnt",
            "parakeet_tdt",
            "lasr_ctc",
            "granite_speech5_ctc",
            "nemotron3_5_asr",
            "nemotron_asr_streaming",
        )
    },
    "MoshiForConditionalGeneration": {"audio": _unconditional},
    "musicgen_decoder": {"audio": _codebooks},
    "musicgen_melody_decoder": {"audio": _codebooks},
    "pocket_tts": {"text": _before_sound},
    "gradium_phonon_tts": {"text": _before_sound},
    "csm_depth_decoder_model": {"audio": _first_codebook},
    "semantic": {"text": _semantic},
    "rag": {"text": _with_documents},
    "SeamlessM4TForTextToSpeech": {"text": _into_speech(_encoder_text)},
    "SeamlessM4Tv2ForTextToSpeech": {"text": _into_speech(_encoder_text)},
    "pix2struct": {"image": _patches},
    "vision-encoder-decoder": _IMAGE16,
    "pp_formulanet": _IMAGE16,
    "blip": {"image": _pixels},
    "blip-2": {"image": _with_question},
    "instructblip": {"image": _with_question},
    "instructblipvideo": {"image": _video},
    "git": {"text": _text, "image": _pixels},
    "kosmos-2": {"image": _kosmos2},
    "idefics": {"image": _idefics},
    "udop": {"text": _udop},
    "voxtral_realtime": {"audio": _features("input_features", "audio_config.num_mel_bins", 400, text=True)},
}
