"""DFlash heads (arXiv:2602.06036) and DSpark heads (arXiv:2607.05147): a few layers that draft a block in one forward.

    c_t = hidden_norm(fc(a1_t, a2_t, ...))     the target's states at token t, mixed: the context
    block = embed(x_n, mask, mask, ...)        the last committed token, whose states are not known yet, and mask tokens
    h = layers(block)                          each layer's tokens attend to all c_t and to all of the block
    logits of x_{n+j} = lm_head(norm(h_j))     with `from_anchor`, h_j says x_{n+j+1}

A layer makes keys and values of the context and of the block with the same weights; queries are the block's. So h does
not depend on drafts. In DSpark heads, logits do: W2 W1[x_{n+j-1}] is added to those of x_{n+j}, and another layer says
from h_j and W1[x_{n+j-1}] how probable it is that x_{n+j} will be accepted.
The head knows nothing of rows, caches and texts, which are the task of `blocks.py`.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import rotate_half

from ...models.tap import FINAL
from .eagle3 import MLP, Attention, make_rotary
from .head import Head


@dataclass(frozen=True)
class DFlashConfig:
    """The parts of a head.

    Attributes:
        layer: sizes of the layers, as for `Eagle3Config`; its `layer_types` and `sliding_window` say which layers see
            no token farther away than that.
        aux_ids: the head reads the target's states before these layers.
        block_size: how many tokens a block has, including the last committed one.
        mask_token: id of the token that stands for a draft.
        from_anchor: the block's first token predicts the first draft; else that is what its first mask token does.
        vocab_size: the target's; `None` where the config does not say.
        draft_vocab_size: how many tokens the head can propose; `None` for all.
        layers: how many layers it has.
        target_hidden_size: width of the target's states; `None` if it is the head's.
        has_embeddings, has_lm_head: of its own; else the target's.
        qk_norm: a norm for each head's queries and keys.
        biases: projections with a bias, such as "q_proj".
        causal_windows: in layers with a window, tokens of the block do not see later ones.
        normed_last: the states after the last layer are those after the final norm.
        markov_rank: width of W1's rows; 0 for logits that do not depend on drafts.
        confidence_width: how many numbers the layer reads that predicts acceptance; 0 for none.
    """

    layer: PreTrainedConfig
    aux_ids: tuple[int, ...]
    block_size: int
    mask_token: int
    from_anchor: bool = False
    vocab_size: int | None = None
    draft_vocab_size: int | None = None
    layers: int = 1
    target_hidden_size: int | None = None
    has_embeddings: bool = False
    has_lm_head: bool = False
    qk_norm: bool = True
    biases: tuple[str, ...] = ()
    causal_windows: bool = False
    normed_last: bool = False
    markov_rank: int = 0
    confidence_width: int = 0

    @property
    def aux_count(self) -> int:
        """How many states it reads per token."""
        return len(self.aux_ids)

    @property
    def longest(self) -> int:
        """The most tokens that it can draft."""
        return self.block_size - (not self.from_anchor)

    def states_of(self, layers: int) -> tuple[int, ...]:
        """The ids, as `models/tap.py` counts them, of the states that it reads of a target with so many layers."""
        return tuple(FINAL if self.normed_last and i == layers else i for i in self.aux_ids)


class DFlashHead(Head):
    """A DFlash or DSpark head. `generate(assistant_model=head, strategy="spec")` drafts with it.

    Args:
        config: its parts.
        target_ids: `[draft vocabulary]`, the target's token for each of the head's; `None` if they are the same.
    """

    def __init__(self, config: DFlashConfig, target_ids: Tensor | None = None):
        super().__init__()
        self.parts = config
        self.config = copy(config.layer)
        self.config._attn_implementation = "sdpa"
        width, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        if config.has_embeddings:
            assert config.vocab_size is not None
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.fc = nn.Linear(config.aux_count * (config.target_hidden_size or width), width, bias="fc" in config.biases)
        self.hidden_norm = nn.RMSNorm(width, eps)
        self.layers = nn.ModuleList(_Layer(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(width, eps)
        known = config.draft_vocab_size or config.vocab_size
        if config.has_lm_head:
            assert known is not None
            self.lm_head = nn.Linear(width, known, bias=False)
        if config.markov_rank:
            assert config.vocab_size is not None and known is not None
            self.markov_head = nn.ModuleDict(
                {
                    "markov_w1": nn.Embedding(config.vocab_size, config.markov_rank),
                    "markov_w2": nn.Linear(config.markov_rank, known, bias=False),
                }
            )
        if config.confidence_width:
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(config.confidence_width, 1)})
        self.rotary = make_rotary(config.layer)
        self.register_buffer("target_ids", target_ids, persistent=False)

    def mix(self, states: Sequence[Tensor]) -> Tensor:
        """c of each token, `[rows, width, hidden]`, from the target's states, each `[rows, width, target hidden]`."""
        joined = torch.cat([part.to(self.device, self.dtype) for part in states], dim=-1)
        mixed: Tensor = self.hidden_norm(self.fc(joined))
        return mixed

    def remember(self, context: Tensor, positions: Tensor, cache: Any) -> None:
        """Write the keys and values of the context, `[rows, width, hidden]`, to a cache."""
        rope = self.rotary(context, positions)
        for layer in self.layers:
            attention: Any = layer.self_attn
            attention.remember(context, rope, cache)

    def forward(self, embedded: Tensor, positions: Tensor, cache: Any = None, mask: Any = None) -> Tensor:
        """h of each token of a block.

        Args:
            embedded: `[rows, block, hidden]`, embeddings of its tokens.
            positions: `[rows, block]`.
            cache: takes keys and values, layer by layer, and returns them after those of the context.
            mask: of the attention; by layer type where layers differ, `None` if all keys are seen.
        """
        rope = self.rotary(embedded, positions)
        types = getattr(self.config, "layer_types", None)
        hidden = embedded
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, rope, cache, mask[types[i]] if isinstance(mask, dict) and types else mask)
        normed: Tensor = self.norm(hidden)
        return normed

    def logits(self, hidden: Tensor, shared: Tensor | None = None) -> Tensor:
        """`[rows, width, draft vocabulary]` from h; `shared` is the target's output weights, if it uses them."""
        if self.parts.has_lm_head:
            return self.lm_head(hidden)
        assert shared is not None
        return nn.functional.linear(hidden.to(shared.device), shared)

    def correction(self, before: Tensor) -> Tensor:
        """What is added to logits, `[rows, width, draft vocabulary]`.

        Args:
            before: `[rows, width]`, the token before each of them.
        """
        rows: Tensor = self.markov_head["markov_w1"](before)
        added: Tensor = self.markov_head["markov_w2"](rows)
        return added

    def confidence(self, hidden: Tensor, before: Tensor) -> Tensor:
        """`[rows, width]`: how probable it is that the tokens drafted from h are accepted, if those before them are.

        Args:
            before: `[rows, width]`, the token before each of them.
        """
        if self.parts.confidence_width > hidden.shape[-1]:
            hidden = torch.cat([hidden, self.markov_head["markov_w1"](before)], dim=-1)
        said: Tensor = self.confidence_head["proj"](hidden)
        return said[..., 0].float().sigmoid()


class _Layer(nn.Module):
    """A decoder layer, whose attention sees the context too."""

    def __init__(self, config: DFlashConfig, index: int):
        super().__init__()
        width, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.self_attn = _Attention(config, index, width)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, rope: Any, cache: Any, mask: Any) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, cache, mask)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class _Attention(Attention):
    is_causal = False

    def remember(self, context: Tensor, rope: Any, cache: Any) -> None:
        """Write keys and values of `[rows, width, hidden]` to the cache."""
        shape = (*context.shape[:2], -1, self.head_dim)
        key, value = self.k_proj(context).view(shape), self.v_proj(context).view(shape)
        if self.normed:
            key = self.k_norm(key)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        cos, sin = (part[:, None] for part in rope)
        cache.update(key * cos + rotate_half(key) * sin, value, self.index)
