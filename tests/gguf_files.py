"""Tiny models in GGUF, the format of llama.cpp."""

import string
from pathlib import Path

import pytest
from conftest import SIZES
from transformers import PreTrainedModel

gguf = pytest.importorskip("gguf")

LETTERS = [*string.ascii_lowercase, "Ġ", "Ċ"]
MERGES = [(a, b) for a in "abcdefgh" for b in "aeioust"][: SIZES["vocab_size"] - 2 - len(LETTERS)]
TOKENS = ["<pad>", "<bos>", *LETTERS, *("".join(pair) for pair in MERGES)]


def write_gguf(model: PreTrainedModel, path: Path, quantized: bool = False) -> None:
    """A tiny Llama as llama.cpp's converter writes it: its names, and its order of the rows of q and k."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        values = weight.float().contiguous().numpy()
        known = names.get_name(name, try_suffixes=(".weight",))
        if quantized and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(known, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(known, values)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
