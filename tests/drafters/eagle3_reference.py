"""EAGLE-3 written down plainly, for one row, without a cache; and tiny heads for tiny targets."""

from collections.abc import Callable
from typing import Any

import torch
from conftest import VOCAB
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from hf_specdec import Eagle3Config, Eagle3Head

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": VOCAB, "num_hidden_layers": 1, "rms_norm_eps": 1e-6,
}  # fmt: skip


def make_parts(sizes: dict[str, Any] | None = None, **changes: Any) -> Eagle3Config:
    changes = {"vocab_size": VOCAB, "aux_ids": (0, 1, 2)} | changes
    return Eagle3Config(LlamaConfig(**SIZES | {"vocab_size": changes["vocab_size"]} | (sizes or {})), **changes)


def some_tokens(count: int, vocab_size: int = VOCAB, without: tuple[int, ...] = ()) -> Tensor:
    """The target's tokens that a head with a reduced vocabulary knows."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(5))
    return order[[int(t) not in without for t in order]][:count].sort().values


@torch.no_grad()
def with_random_weights(make: Callable[[], Any], seed: int) -> Any:
    torch.manual_seed(seed)
    head = make().eval().requires_grad_(False)
    for weight in head.parameters():
        if weight.ndim == 1:
            weight.copy_(1 + 0.2 * torch.randn_like(weight))
        else:
            weight.normal_(std=weight.shape[1] ** -0.5)
    return head


def random_head(parts: Eagle3Config, target_ids: Tensor | None = None, seed: int = 3) -> Eagle3Head:
    return with_random_weights(lambda: Eagle3Head(parts, target_ids), seed)


@torch.no_grad()
def kindred_head(
    target: PreTrainedModel, target_ids: Tensor | None = None, noise: float = 0.1, **changes: Any
) -> Eagle3Head:
    """A head that says what the target would say if it had no layers: a quiet target often does.

    Its one attention head looks at the entry itself, and hands the embedding on. Hidden states only add noise.
    """
    config = target.config.get_text_config(decoder=True)
    width, vocab = config.hidden_size, config.vocab_size
    sizes = {"hidden_size": width, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": width}
    count = None if target_ids is None else len(target_ids)
    head = random_head(make_parts(sizes, vocab_size=vocab, draft_vocab_size=count, **changes), target_ids)
    attention, layer = head.layers[0].self_attn, head.layers[0]
    for weight in head.parameters():
        if weight.ndim == 1:
            weight.fill_(1)
    eye = torch.eye(width)
    for project, scale in ((attention.q_proj, 3.0), (attention.k_proj, 3.0), (attention.v_proj, 1.0)):
        project.weight.copy_(torch.cat([scale * eye, 0 * eye], dim=1))
    attention.o_proj.weight.copy_(eye)
    layer.mlp.down_proj.weight *= noise
    head.fc.weight *= noise
    whole = target.get_output_embeddings().weight
    head.lm_head.weight.copy_(whole if target_ids is None else whole[target_ids])
    return head


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + SIZES["rms_norm_eps"]).sqrt() * weight


def _turn(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions 0, 1, ... of `[tokens, heads, d]`."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


@torch.no_grad()
def reference_logits(head: Eagle3Head, target: PreTrainedModel, states: list[Tensor], tokens: list[int]) -> Tensor:
    """`[draft vocabulary]`, the logits of the token after `tokens`.

    Args:
        states: one tensor `[t, hidden]` per layer that the head reads, of the first t tokens. Where `tokens` has more
            than t + 1, the rest are drafts: then h stands in for the target's states, from scratch for each. In P-EAGLE
            heads it is a learned vector, and a mask token stands in for the draft.
    """
    parts, w = head.parts, dict(head.state_dict())
    embeddings = w.get("embed_tokens.weight", target.get_input_embeddings().weight)

    def mixed(states: list[Tensor]) -> Tensor:
        if parts.fc_norm:
            states = [_norm(s, w[f"fc_norm.{i}.weight"]) for i, s in enumerate(states)]
        joined = torch.cat(states, dim=-1)
        if parts.norm_before_fc:
            joined = _norm(joined, w["input_norm.weight"])
        return _linear(w, "fc", joined) if parts.has_fc else joined

    given, known = mixed(states), len(states[0])
    while True:
        ids = torch.tensor(tokens[1 : len(given) + 1])
        if parts.mask_token is not None:
            ids[known:] = parts.mask_token
        hidden = given
        for i in range(parts.layers):
            hidden = _layer(parts, w, i, hidden, embeddings[ids] if i == 0 else None)
        if parts.norm_output:
            hidden = _norm(hidden, w["norm.weight"])
        if len(given) == len(tokens) - 1:
            break
        following = hidden[-1:]
        if parts.mask_token is not None:
            following = mixed([part[None] for part in w["mask_hidden"].chunk(parts.aux_count)])
        given = torch.cat([given, following])
    last = hidden[-1] if parts.norm_output else _norm(hidden[-1], w["norm.weight"])
    whole = target.get_output_embeddings().weight
    output = w.get("lm_head.weight", whole if head.target_ids is None else whole[head.target_ids])
    logits: Tensor = output @ last
    return logits


def _layer(parts: Eagle3Config, w: dict[str, Tensor], i: int, hidden: Tensor, embedded: Tensor | None) -> Tensor:
    at, config = f"layers.{i}", parts.layer
    residual = hidden
    if embedded is None:
        read = _norm(hidden, w[f"{at}.input_layernorm.weight"])
    else:
        normed = _norm(hidden, w[f"{at}.hidden_norm.weight"])
        residual = normed if parts.norm_before_residual else hidden
        read = torch.cat([_norm(embedded, w[f"{at}.input_layernorm.weight"]), normed], dim=-1)
    q, k, v = (_linear(w, f"{at}.self_attn.{x}_proj", read).unflatten(-1, (-1, config.head_dim)) for x in "qkv")
    if parts.qk_norm:
        q, k = _norm(q, w[f"{at}.self_attn.q_norm.weight"]), _norm(k, w[f"{at}.self_attn.k_norm.weight"])
    q, k = _turn(q), _turn(k)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / config.head_dim**0.5
    ahead = torch.ones(scores.shape[-2:]).triu(1).bool()
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(ahead, -torch.inf).softmax(-1), v).flatten(1)
    hidden = residual + _linear(w, f"{at}.self_attn.o_proj", out)
    read = _norm(hidden, w[f"{at}.post_attention_layernorm.weight"])
    gate, up = (_linear(w, f"{at}.mlp.{x}_proj", read) for x in ("gate", "up"))
    return hidden + _linear(w, f"{at}.mlp.down_proj", torch.nn.functional.silu(gate) * up)
