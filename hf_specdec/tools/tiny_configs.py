"""Shrinks the default config of any architecture so far that a random model of it can be built in a moment.

Sizes are recognised by the names of config attributes, also in nested configs. Every kind of layer in the default
config is kept: lists with one entry per layer are cut down to one layer of each kind, all in the same way.
"""

import re
from typing import Any

from transformers import PreTrainedConfig

VOCAB = 128
FIRST_SPECIAL = 96  # ids from here on stand for images, audio and the like; prompts do not use them
WINDOW = 12

_WIDTH, _INNER, _HEADS, _HEAD_DIM, _LAYERS = 32, 64, 4, 8, 2

# Largest value by attribute name; the first pattern that matches the whole name counts. Smaller defaults stay.
_SIZES: list[tuple[str, int | None]] = [
    (r"type_vocab_size|task_type_vocab_size|additional_vocab_size", None),
    (r".*vocab_size.*|num_embeds|num_embeddings|codebook_size|num_centroids|n_token", VOCAB),
    (r"max_2d_position_embeddings", 1024),
    (r".*max_.*position_embeddings|.*max_(source|target)_positions|n_positions|n_ctx|max_seq_len|model_max_length"
     r"|context_length|max_(text|speech)_positions|original_max_position_embeddings|max_vit_seq_len|max_pos_emb", 512),
    (r"sliding_window|sliding_window_size|attention_window_size|attention_chunk_size|local_attention"
     r"|keep_window_size|local_attention_window_len", WINDOW),
    (r"rel_extent|floor_scale|log_scaling_n_floor", 16),
    (r"qk_head_dim", 2 * _HEAD_DIM),
    (r".*(head_dim|head_size|d_kv|dim_head|d_head|kv_channels|v_head_dim|index_head_dim|mamba_d_head|mamba_headdim)",
     _HEAD_DIM),
    (r"rotary_dim", 4),
    (r".*(num_key_value_heads|kv_n_heads|num_kv_heads|num_query_groups)", 2),
    (r"(linear_num_key_heads)", 2),
    (r"index_n_heads", 32),  # scores are sums of ReLUs: with few heads, many keys tie at 0, and the choice is arbitrary
    (r".*(attention_heads|num_heads|n_head|n_heads|mamba_n_heads|mamba_num_heads|linear_num_value_heads|resampler_heads"
     r"|resampler_n_heads)", _HEADS),
    (r".*(q_lora_rank|kv_lora_rank|o_lora_rank|hc_lowrank|laurel_rank|adapter_rank|gated_norm_rank|time_step_rank"
     r"|mamba_dt_rank)", 16),
    (r"(mamba_)?(d_)?state(_size)?|ssm_state_size|mamba_d_state", 8),
    (r"(mamba_)?n_groups|mamba_ngroups|mamba_n_groups|o_groups", 2),
    (r"(mamba_)?chunk_size|block_size", 8),
    (r"num_layers_per_stack", _LAYERS),
    (r".*(_layers|n_layer|num_layers|num_blocks|depth|layers|resampler_depth)", _LAYERS),
    (r".*(experts_per_tok|experts_per_token|moe_topk|moe_top_k|moe_k|topk_group|top_k_experts)", 2),
    (r".*(num_experts|num_local_experts|n_routed_experts|moe_num_experts|expert_capacity)", 4),
    (r"n_group|num_expert_group", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"zero_expert_num", 2),
    (r"index_topk", 8),
    (r"index_topk_blocks", 2),
    (r"index_block_size", 4),
    (r".*(intermediate_size|ffn_dim|mlp_dim|d_ff|ffn_hidden_size|dim_ff|dff|d_inner|feed_forward_size"
     r"|intermediate_size_mlp|ffn_size|inner_dim|mid_dim)", _INNER),
    (r"num_mel_bins|input_feat_size|feature_size|mel_dim|n_mel_bins", 16),
    (r"image_size|img_size|crop_size|resolution", 16),
    (r"patch_size|encoder_stride", 8),
    (r"num_filters", 4),
    (r"post_conv_.*_channels", _WIDTH),
    (r".*(hidden_size.*|d_model|n_embd|embed_dim|embedding_dim|emb_dim|width|lru_width|projection_dim|out_dim|in_dim"
     r"|output_dim|projector_.*_dim|embedding_size|output_size|dim_model.*|_embd|hidden_dim|proj_dim|output_channels"
     r"|conv_channels|num_filters|codebook_dim|projection_intermediate_size|embed_proj_dim|latent_channels"
     r"|base_channels|input_size|pooler_output_size|codevector_dim|prenet_units|postnet_units|upsample_initial_channel"
     r"|vector_quantization_hidden_dimension|router_hidden_size|attention_hidden_size|token_embed_dim|dim)", _WIDTH),
    (r"d_rel", 8),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups|upsample_groups", 4),
    (r"num_(query|image)_tokens|latent_query_num|resampler_n(um)?_latents|num_latents", 4),
    (r"num_position_embeddings", 16),
    (r"initializer_range|init_std|initializer_factor|init_scale|init_method_std", None),
]  # fmt: skip
_STEPS = re.compile(r".*(_period|_interval|_every_n_layers|sliding_window_pattern|_sparse_step|layer_group_size)")
_LAYER_NUMBERS = re.compile(r".*(_layers|_idxs|_indexes|_indices|_layer_ids)|summary_idxs")
_INIT = re.compile(r"initializer_range|init_std|init_scale|init_method_std")
_TOKEN = re.compile(r".*_(token|start|end|newline|patch)_(id|index|ids)|.*_token_ids|.*_id|.*_index")
_ORDINARY = {"bos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 2, "sep_token_id": 3, "cls_token_id": 3,
             "mask_token_id": 3, "unk_token_id": 3}  # fmt: skip

# Exceptions to the rules, by model type: changes to the shrunk arguments.
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8}
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_INDEXER = {"indexer_n_heads": 32, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
            "indexer_compress_ratio": 4}  # fmt: skip
_DECODER = {"decoder": {"is_decoder": True, "add_cross_attention": True}}
SPECIAL: dict[str, dict[str, Any]] = {
    "encoder-decoder": _DECODER,
    "vision-encoder-decoder": _DECODER,
    "speech-encoder-decoder": _DECODER,
    "bamba": {**_MAMBA2, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8},
    "zamba2": {"n_mamba_heads": 8, "attention_hidden_size": 64, "attention_head_dim": 16, "num_query_groups": 4,
               "num_key_value_heads": 4, "kv_channels": 8, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3],
               "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    "recurrent_gemma": {"num_hidden_layers": 6, "num_key_value_heads": 2},
    "hrm_text": {"num_hidden_layers": 16},
    "blt": {"encoder_hash_byte_group_vocab": 64, "num_hidden_layers": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "nemotron": {"num_key_value_heads": 2},
    "hunyuan_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                            "mrope_section": [1, 1, 1, 1]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "xmod": {"default_language": "en_XX"},
    "florence_vision": {"embed_dim": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4],
                        "num_groups": [1, 2, 2, 4], "window_size": 4},
    "speecht5": {"num_feat_extract_layers": 7},
    "wav2vec2": {"num_feat_extract_layers": 7},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "vision_config": {"image_size": 64}},
    "dots3_note_text": {"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8,
                        "swa_qk_rope_head_dim": 8, "swa_v_head_dim": 8, "swa_num_attention_heads": 4,
                        "swa_num_key_value_heads": 4},
    "muse_spark_audio": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "radio": {"video_temporal_patch_size": 2},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "dots1": {**_EXPERTS, "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "num_dense_layers": 1},
    "mistral4": {"head_dim": 16},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 0, 1], "layer_types": ["indexed_attention"] * 4,
                            "indexer_types": ["full"] * 4, "no_rope_layers": [1, 0, 1, 0],
                            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_hidden_layers": 4},
    "step3p5": {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": WINDOW,
                "mlp_layer_types": ["dense", "dense", "sparse", "sparse"], "num_hidden_layers": 4,
                "rope_parameters": {t: {"rope_type": "default", "rope_theta": 10000.0}
                                    for t in ("full_attention", "sliding_attention")}},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "gemma3n_text": {"intermediate_size": _INNER},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
                            "rope_parameters": {"sliding_attention": _MROPE, "full_attention": _MROPE}},
    "qwen4_exp_text": {**_INDEXER, "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8,
                       "split_ngram_parts": 2, "heads_per_ngram": 2},
    "nemotron_h_omni": {"video_temporal_patch_size": 2},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
                             "moe_intermediate_size": [64, 32]},
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 4},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "blip-2": {"image_token_index": 100},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "qwen3_asr": {"eos_token_id": 127},
    "vibevoice": {"eos_token_id": 127},
    **{kind: {"block_size": 512} for kind in ("semantic", "coarse_acoustics", "fine_acoustics")},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "mistral3": {"text_config": {"sliding_window": None}},
    "gpt_neo": {"window_size": WINDOW},
    "reformer": {"axial_pos_shape": [8, 64], "axial_pos_embds_dim": [8, 24], "is_decoder": True},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 2, "qk_dim_factor": 1.0},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "glm_ocr_text": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    **{t: {"rope_parameters": _MROPE} for t in (
        "qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text", "glm46v_text", "glm4v_text",
        "qwen3_vl_text", "qwen3_vl_moe_text", "cosmos3_edge_text", "cosmos3_omni_text", "glm_image_text",
        "qwen2_5_omni_text", "qwen3_omni_moe_text", "qwen2_5_omni_talker", "glm46v", "glmga_text")},
}  # fmt: skip


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments for `config`'s class that make a tiny config with the same kinds of layers."""
    changes: dict[str, Any] = {}
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    layers = _layers(config)
    kept = _kept_layers(fields, layers)
    specials = iter(range(FIRST_SPECIAL, VOCAB))
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = {"model_type": value.model_type, **shrink(value)}
        elif name == "tie_word_embeddings":
            changes[name] = False  # tied ones make random models repeat the last token
        elif isinstance(value, bool):
            continue
        elif name in _ORDINARY and isinstance(value, int):
            changes[name] = _ORDINARY[name]
        elif name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id", "eod_token_id"):
            changes[name] = None
        elif isinstance(value, int) and _TOKEN.fullmatch(name) and value >= 0:
            changes[name] = next(specials)
        elif name == "head_dim" and value is None:
            changes[name] = _HEAD_DIM
        elif name.endswith("num_key_value_heads") and isinstance(value, int):
            queries = fields.get(name.replace("key_value", "attention"))
            changes[name] = _HEADS if value == queries else min(value, 2)
        elif isinstance(value, int):
            small = _small(name, value)
            if small != value:
                changes[name] = small
        elif isinstance(value, float) and _INIT.fullmatch(name):
            changes[name] = 0.2
        elif kept is not None and isinstance(value, (list, tuple)) and len(value) == layers:
            changes[name] = [value[i] for i in kept]
        elif isinstance(value, (list, tuple)) and _LAYER_NUMBERS.fullmatch(name):
            limit = len(kept) if kept is not None else _LAYERS
            changes[name] = [i for i in value if isinstance(i, int) and i < limit] or ([limit - 1] if value else [])
        elif name == "rope_parameters" and isinstance(value, dict):
            continue
    if kept is not None:
        changes[_real_name(config, "num_hidden_layers")] = len(kept)
    elif any(_STEPS.fullmatch(name) for name in fields):
        for name, value in fields.items():
            if _STEPS.fullmatch(name) and isinstance(value, int) and value > 2:
                changes[name] = 2
            elif name.endswith("_layer_offset") and isinstance(value, int):
                changes[name] = min(value, 1)
        changes[_real_name(config, "num_hidden_layers")] = 4
    for name, value in SPECIAL.get(config.model_type, {}).items():
        if isinstance(value, dict) and isinstance(changes.get(name), dict):
            changes[name] = changes[name] | value
        else:
            changes[name] = value
    return changes


def _small(name: str, value: int) -> int:
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return value if size is None else min(value, size)
    return value


def _layers(config: PreTrainedConfig) -> int | None:
    for name in ("num_hidden_layers", "num_layers", "n_layers"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _real_name(config: PreTrainedConfig, name: str) -> str:
    for candidate in (config.attribute_map.get(name, name), "num_layers", "n_layers"):
        if candidate in vars(config):
            return candidate
    return name


def _kept_layers(fields: dict[str, Any], layers: int | None) -> list[int] | None:
    """Which layers of the default to keep: the first of each kind, twice if there are few kinds."""
    lists = [v for k, v in fields.items() if isinstance(v, (list, tuple)) and len(v) == layers and layers > 2]
    if not lists or layers is None:
        return None
    kinds: dict[str, int] = {}
    for i in range(layers):
        kinds.setdefault(repr([v[i] for v in lists if not _counts_up(v)]), i)
    kept = sorted(kinds.values())[:6]
    return kept * 2 if len(kept) <= 2 else kept


def _counts_up(values: Any) -> bool:
    return len(set(map(repr, values))) > 6
