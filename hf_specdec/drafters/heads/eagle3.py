"""EAGLE-3 heads (Li et al. 2025): one or a few layers on hidden states from three layers of the target.

    g_t = fc(a1_t, a2_t, a3_t)                     the target's states at token t, mixed
    h_t = layers(norm(embed(x_{t+1})), norm(g_t))  the first layer reads both side by side, and adds to g_t
    logits of x_{t+2} = lm_head(norm(h_t))

For a token after a draft, h_t takes the place of g_t. P-EAGLE heads (Hui et al. 2026) draft all tokens in one forward:
there, a learned vector takes the place of the target's states, and a mask token that of the draft. Checkpoints differ
in which norms they have and where; see `Eagle3Config`. The head knows nothing of rows, caches and texts, which are
`entries.py`'s.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ...models.tap import FINAL
from .head import Head


@dataclass(frozen=True)
class Eagle3Config:
    """The parts of a head, and how they are joined.

    Attributes:
        layer: sizes of the layers (hidden, intermediate, heads), activation, epsilon of norms, rotary positions.
        vocab_size: the target's.
        draft_vocab_size: how many tokens the head can propose; `None` for all.
        aux_ids: the head reads the target's states before these layers; `None` for the usual ones (see `states_of`).
        aux_count: how many states it reads per token.
        uses_aux: it reads those, not the states after the target's final norm.
        layers: how many layers it has.
        target_hidden_size: width of the target's states; `None` if it is the head's.
        has_fc: states are mixed by a linear layer; else there is one, of the head's width.
        has_embeddings, has_lm_head: of its own; else the target's.
        norm_before_fc: one norm over all states side by side.
        fc_norm: one norm for each of them.
        norm_before_residual: the first layer adds to the normed g_t.
        norm_output: the normed h_t takes the place of g_t, not h_t itself.
        qk_norm: a norm for each head's queries and keys.
        biases: projections with a bias, such as "q_proj".
        mask_token: id of the token that stands for a draft where all are predicted in one forward (P-EAGLE); `None`
            for a head that drafts token by token.
    """

    layer: PreTrainedConfig
    vocab_size: int
    draft_vocab_size: int | None = None
    aux_ids: tuple[int, ...] | None = None
    aux_count: int = 3
    uses_aux: bool = True
    layers: int = 1
    target_hidden_size: int | None = None
    has_fc: bool = True
    has_embeddings: bool = False
    has_lm_head: bool = True
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    biases: tuple[str, ...] = ()
    mask_token: int | None = None

    longest: ClassVar[None] = None  # it can draft any number of tokens

    def states_of(self, layers: int) -> tuple[int, ...]:
        """The ids, as `models/tap.py` counts them, of the states that it reads of a target with so many layers."""
        if not self.uses_aux:
            return (FINAL,)
        return (2, layers // 2, layers - 3) if self.aux_ids is None else self.aux_ids


class Eagle3Head(Head):
    """An EAGLE-3 head. `generate(assistant_model=head, strategy="spec")` drafts with it.

    Args:
        config: its parts.
        target_ids: `[draft vocabulary]`, the target's token for each of the head's; `None` if they are the same.
    """

    def __init__(self, config: Eagle3Config, target_ids: Tensor | None = None):
        super().__init__()
        self.parts = config
        self.config = copy(config.layer)
        self.config._attn_implementation = "sdpa"
        width, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        given = config.target_hidden_size or width
        if config.has_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.norm_before_fc:
            self.input_norm = nn.RMSNorm(config.aux_count * given, eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(given, eps) for _ in range(config.aux_count))
        if config.has_fc:
            self.fc = nn.Linear(config.aux_count * given, width, bias="fc" in config.biases)
        self.layers = nn.ModuleList(_Layer(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(width, eps)
        if config.has_lm_head:
            self.lm_head = nn.Linear(width, config.draft_vocab_size or config.vocab_size, bias=False)
        if config.mask_token is not None:
            self.mask_hidden = nn.Parameter(torch.randn(config.aux_count * given))
        self.rotary = make_rotary(config.layer)
        self.register_buffer("target_ids", target_ids, persistent=False)

    def mix(self, states: Sequence[Tensor]) -> Tensor:
        """g of each token, `[rows, width, hidden]`, from the target's states, each `[rows, width, target hidden]`."""
        states = [part.to(self.device, self.dtype) for part in states]
        if self.parts.fc_norm:
            states = [norm(part) for norm, part in zip(self.fc_norm, states, strict=True)]
        joined = torch.cat(states, dim=-1) if len(states) > 1 else states[0]
        if self.parts.norm_before_fc:
            joined = self.input_norm(joined)
        return self.fc(joined) if self.parts.has_fc else joined

    def masked(self) -> Tensor:
        """What stands for g of a token that is not known yet, `[hidden]`."""
        return self.mix(self.mask_hidden.chunk(self.parts.aux_count))

    def forward(
        self, given: Tensor, embedded: Tensor, positions: Tensor, cache: Any = None, mask: Any = None
    ) -> Tensor:
        """h of each token, which also is the next one's `given`.

        Args:
            given: `[rows, width, hidden]`, g or h of tokens t.
            embedded: `[rows, width, hidden]`, embeddings of the tokens t + 1.
            positions: `[rows, width]`.
            cache: takes keys and values, layer by layer, and returns those to attend to.
            mask: of the attention; by layer type where layers differ, `None` if causal.
        """
        rope = self.rotary(given, positions)
        types = getattr(self.config, "layer_types", None)
        for i, layer in enumerate(self.layers):
            of_layer = mask[types[i]] if isinstance(mask, dict) and types is not None else mask
            given = layer(given, embedded if i == 0 else None, rope, cache, of_layer)
        return self.norm(given) if self.parts.norm_output else given

    def logits(self, hidden: Tensor, shared: Tensor | None = None) -> Tensor:
        """`[rows, width, draft vocabulary]` from h.

        Args:
            shared: `[draft vocabulary, hidden]`, of the target's output weights, for a head without its own.
        """
        normed = hidden if self.parts.norm_output else self.norm(hidden)
        if self.parts.has_lm_head:
            return self.lm_head(normed)
        assert shared is not None
        return nn.functional.linear(normed, shared)


class _Layer(nn.Module):
    """A decoder layer. The first one reads embeddings and hidden states side by side."""

    def __init__(self, config: Eagle3Config, index: int):
        super().__init__()
        width, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        self.joins, self.norm_before_residual = index == 0, config.norm_before_residual
        self.input_layernorm = nn.RMSNorm(width, eps)
        if self.joins:
            self.hidden_norm = nn.RMSNorm(width, eps)
        self.self_attn = Attention(config, index, 2 * width if self.joins else width)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, embedded: Tensor | None, rope: Any, cache: Any, mask: Any) -> Tensor:
        residual = hidden
        if embedded is None:
            read = self.input_layernorm(hidden)
        else:
            normed = self.hidden_norm(hidden)
            residual = normed if self.norm_before_residual else hidden
            read = torch.cat([self.input_layernorm(embedded), normed], dim=-1)
        hidden = residual + self.self_attn(read, rope, cache, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Attention with rotary positions.

    Args:
        config: with `layer`, `biases` and `qk_norm`.
        index: the layer's in the cache.
        reads: width of its input.
    """

    is_causal = True  # without a mask

    def __init__(self, config: Any, index: int, reads: int):
        super().__init__()
        layer = config.layer
        heads = layer.num_attention_heads
        kv_heads = getattr(layer, "num_key_value_heads", None) or heads
        self.index, self.head_dim = index, head_dim(layer)
        self.num_key_value_groups = heads // kv_heads  # transformers' attention functions read it
        self.q_proj = nn.Linear(reads, heads * self.head_dim, bias="q_proj" in config.biases)
        self.k_proj = nn.Linear(reads, kv_heads * self.head_dim, bias="k_proj" in config.biases)
        self.v_proj = nn.Linear(reads, kv_heads * self.head_dim, bias="v_proj" in config.biases)
        self.o_proj = nn.Linear(heads * self.head_dim, layer.hidden_size, bias="o_proj" in config.biases)
        self.normed = config.qk_norm
        if self.normed:
            self.q_norm = nn.RMSNorm(self.head_dim, layer.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, layer.rms_norm_eps)

    def forward(self, read: Tensor, rope: Any, cache: Any, mask: Any) -> Tensor:
        shape = (*read.shape[:2], -1, self.head_dim)
        query, key, value = (project(read).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *rope)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.head_dim**-0.5)
        attended: Tensor = self.o_proj(out.reshape(*read.shape[:2], -1))
        return attended


class MLP(nn.Module):
    """A gated MLP; `config` has `layer` and `biases`."""

    def __init__(self, config: Any):
        super().__init__()
        width, inner = config.layer.hidden_size, config.layer.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias="gate_proj" in config.biases)
        self.up_proj = nn.Linear(width, inner, bias="up_proj" in config.biases)
        self.down_proj = nn.Linear(inner, width, bias="down_proj" in config.biases)
        self.act = ACT2FN[config.layer.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


def head_dim(layer: PreTrainedConfig) -> int:
    """The width of each attention head."""
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def make_rotary(layer: PreTrainedConfig) -> nn.Module:
    """The rotary positions that a config describes; those of its first layer's type, if they differ by type."""
    parameters: dict[str, Any] = layer.rope_parameters
    if any(isinstance(value, dict) for value in parameters.values()):
        types = getattr(layer, "layer_types", None) or ["full_attention"]
        layer = copy(layer)
        layer.rope_parameters = parameters = parameters[types[0]]
    partial = parameters.get("partial_rotary_factor", 1.0)
    if partial not in (None, 1, 1.0):
        raise ValueError(f"The head turns only {partial} of each key (`partial_rotary_factor`), which is not supported")
    rotary: nn.Module = LlamaRotaryEmbedding(layer)
    return rotary
