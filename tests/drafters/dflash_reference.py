"""DFlash and DSpark written down plainly, for one row, without a cache; and tiny heads for tiny targets."""

from typing import Any

import torch
from conftest import VOCAB
from eagle3_reference import SIZES, _linear, _norm, _turn, with_random_weights
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config

from hf_specdec import DFlashConfig, DFlashHead

MASK = 95  # the id of the mask token


def make_parts(sizes: dict[str, Any] | None = None, **changes: Any) -> DFlashConfig:
    changes = {"aux_ids": (1, 2), "block_size": 4, "mask_token": MASK, "vocab_size": VOCAB} | changes
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    rope |= {"num_hidden_layers": changes.get("layers", 1)}
    sizes = SIZES | rope | {"vocab_size": changes["vocab_size"] or VOCAB} | (sizes or {})
    return DFlashConfig(Qwen3Config(**sizes), **changes)


def random_head(parts: DFlashConfig, target_ids: Tensor | None = None, seed: int = 3) -> DFlashHead:
    return with_random_weights(lambda: DFlashHead(parts, target_ids), seed)


@torch.no_grad()
def kindred_head(
    target: PreTrainedModel, target_ids: Tensor | None = None, noise: float = 0.1, dspark: bool = False, **changes: Any
) -> DFlashHead:
    """A head that often says what a quiet target says: what that would say if it had no layers.

    The block's tokens all look at the last committed one, so only the first draft follows from the one before it. With
    `dspark`, W1 and W2 are the target's embeddings and output weights: then all drafts follow from those before them.
    """
    config = target.config.get_text_config(decoder=True)
    width, vocab = config.hidden_size, config.vocab_size
    sizes = {"hidden_size": width, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": width}
    changes = {"mask_token": vocab - 1, "vocab_size": vocab} | changes
    if target_ids is not None:
        changes |= {"draft_vocab_size": len(target_ids), "has_lm_head": True}
    if dspark:
        changes |= {"markov_rank": width, "from_anchor": True}
    head = random_head(make_parts(sizes, **changes), target_ids)
    layer, embeddings = head.layers[0], target.get_input_embeddings().weight
    for weight in head.parameters():
        if weight.ndim == 1:
            weight.fill_(1)
    head.hidden_norm.weight.fill_(0.01)  # the context says little
    attention, mask = layer.self_attn, embeddings[head.parts.mask_token]
    attention.q_proj.weight.zero_()
    attention.v_proj.weight.copy_(300 * (torch.eye(width) - torch.outer(mask, mask) / mask.dot(mask)))
    attention.o_proj.weight.copy_(torch.eye(width))
    layer.mlp.down_proj.weight *= noise
    output = target.get_output_embeddings().weight
    known = output if target_ids is None else output[target_ids]
    if head.parts.has_lm_head:
        head.lm_head.weight.copy_(known)
    if dspark:
        attention.v_proj.weight.zero_()
        head.norm.weight.fill_(noise)
        head.markov_head["markov_w1"].weight.copy_(_norm(embeddings, torch.ones(width)))
        head.markov_head["markov_w2"].weight.copy_(known)
    if head.parts.confidence_width:
        proj: Any = head.confidence_head["proj"]
        proj.weight.normal_(std=1.0)
        proj.bias.zero_()
    return head


@torch.no_grad()
def reference_logits(head: DFlashHead, target: PreTrainedModel, states: list[Tensor], tokens: list[int]) -> Tensor:
    """`[draft vocabulary]`, the logits of the token after `tokens`.

    Args:
        states: one tensor `[t, hidden]` per layer that the head reads, of the first t tokens. Token t is the last
            committed one, and all after it are drafts.
    """
    parts, w = head.parts, dict(head.state_dict())
    embeddings = w.get("embed_tokens.weight", target.get_input_embeddings().weight)
    context = _norm(_linear(w, "fc", torch.cat(states, dim=-1)), w["hidden_norm.weight"])
    t = len(context)
    hidden = embeddings[torch.tensor([tokens[t]] + [parts.mask_token] * (parts.block_size - 1))]
    types = getattr(parts.layer, "layer_types", None) or ["full_attention"] * parts.layers
    for i in range(parts.layers):
        at, read = f"layers.{i}", _norm(hidden, w[f"layers.{i}.input_layernorm.weight"])
        whole = torch.cat([context, read])
        q, k, v = (
            _linear(w, f"{at}.self_attn.{x}_proj", whole).unflatten(-1, (-1, parts.layer.head_dim)) for x in "qkv"
        )
        if parts.qk_norm:
            q, k = _norm(q, w[f"{at}.self_attn.q_norm.weight"]), _norm(k, w[f"{at}.self_attn.k_norm.weight"])
        q, k = _turn(q)[t:], _turn(k)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / parts.layer.head_dim**0.5
        if types[i] == "sliding_attention":
            for one in range(parts.block_size):
                for key in range(len(whole)):
                    ahead = key - (t + one)
                    if abs(ahead) > parts.layer.sliding_window or (parts.causal_windows and ahead > 0):
                        scores[:, one, key] = -torch.inf
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        hidden = hidden + _linear(w, f"{at}.self_attn.o_proj", out)
        read = _norm(hidden, w[f"{at}.post_attention_layernorm.weight"])
        gate, up = (_linear(w, f"{at}.mlp.{x}_proj", read) for x in ("gate", "up"))
        hidden = hidden + _linear(w, f"{at}.mlp.down_proj", torch.nn.functional.silu(gate) * up)
    hidden = _norm(hidden, w["norm.weight"])[len(tokens) - 1 - t + (not parts.from_anchor)]
    logits: Tensor = w.get("lm_head.weight", target.get_output_embeddings().weight) @ hidden
    if parts.markov_rank:
        before = w["markov_head.markov_w1.weight"][tokens[-1]]
        logits = logits + w["markov_head.markov_w2.weight"] @ before
    return logits
