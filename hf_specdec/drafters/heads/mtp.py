"""Multi-token prediction (MTP) layers: layers of the target's own kind, trained with it, that predict further tokens.

    h0_t = the target's states at token t, after its final norm
    hk_t = norm(layer_k(project(norm(embed(x_{t+k})), norm(h(k-1)_t))))    k = 1, 2, ...
    logits of x_{t+k+1} = the target's own head of hk_t

Most models have one layer. After the last layer its own output goes in again, for as many drafts as are asked for.
Embeddings, rotary positions and the output layer are the target's.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_layers

from ...cache.ragged import RaggedCache
from ...device import first_line
from ...models.masks import MASKED_LAYER_TYPES, takes_masks
from .fit import check_device, check_sizes


class MtpHead(nn.Module):
    """The MTP layers of a target. `generate(use_mtp=True, strategy="spec")` drafts with them.

    Args:
        config: of the layers, as if they were a model.
        layers: each takes embeddings, hidden states, rotary positions, mask, positions and cache, as transformers'
            `MtpLayer`.
        rotary: the target's rotary positions; `None` if its layers know positions themselves.
        final_norm: applied to what each layer returns; `None` if they do that themselves.
    """

    uses_target = True  # as its drafter does; see `Drafter`

    def __init__(
        self,
        config: PreTrainedConfig,
        layers: nn.ModuleList,
        rotary: nn.Module | None,
        final_norm: nn.Module | None = None,
    ):
        super().__init__()
        self.config, self.layers, self.final_norm = config, layers, final_norm
        self._rotary = (rotary,)  # not as a module: it is the target's
        self._rotary_asks = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self) -> int:
        """As of a model."""
        return sum(weight.numel() for weight in self.parameters())

    def mix(self, states: list[Tensor]) -> Tensor:
        """h0 of each token, `[rows, width, hidden]`, from the target's states."""
        return states[0].to(self.device, self.dtype)

    def forward(
        self,
        given: Tensor,
        embedded: Tensor,
        positions: Tensor,
        cache: Any = None,
        mask: Any = None,
        layer: int = 0,
    ) -> Tensor:
        """What one layer makes of each token, `[rows, width, hidden]`.

        Args:
            given: `[rows, width, hidden]`, what the layer before made of it.
            embedded: `[rows, width, hidden]`, embeddings of the tokens to join with it.
            positions: `[rows, width]`, those of these tokens.
            cache: takes keys and values by layer, and returns those to attend to.
            mask: of the attention; by layer type where the config names types, `None` if causal.
            layer: which one.
        """
        rotary, types = self._rotary[0], getattr(self.config, "layer_types", None)
        asked = {"layer_type": types[layer]} if self._rotary_asks and types is not None else {}
        hidden: Tensor = self.layers[layer](
            embedded,
            given,
            position_embeddings=None if rotary is None else rotary(embedded, position_ids=positions, **asked),
            attention_mask=mask[types[layer]] if isinstance(mask, dict) and types is not None else mask,
            position_ids=positions,
            past_key_values=cache,
        )
        return hidden if self.final_norm is None else self.final_norm(hidden)


def head_of_module(model: Any) -> MtpHead | None:
    """The head with the layers of transformers' own MTP module; `None` if it is not one."""
    kind: Any = getattr(modeling_layers, "MtpModel", None)
    if kind is None or not isinstance(model, kind):
        return None
    own: Any = model
    return MtpHead(own.config, own.layers, own.rotary_emb, own.shared_post_norm if own.use_shared_post_norm else None)


def check_mtp(head: MtpHead, target: PreTrainedModel) -> None:
    """Raise a ValueError unless a head can draft for this target."""
    check_sizes(head.config.hidden_size, head.config.vocab_size, target)
    check_device(head, target)
    types = set(getattr(head.config, "layer_types", None) or ()) - MASKED_LAYER_TYPES
    if types:
        raise ValueError(
            f"The MTP layers of {type(target).__name__} are of type {sorted(types)[0]!r}, and hf_specdec rolls back "
            f"keys and values only ({', '.join(sorted(MASKED_LAYER_TYPES))}): draft with a model or by look-up instead"
        )
    model: Any = head
    if not takes_masks(model):
        raise ValueError(
            f"The MTP layers of {type(target).__name__} use the attention implementation "
            f"{head.config._attn_implementation!r}, which takes no masks for rows of different lengths: load them with "
            "'sdpa' or 'eager'"
        )
    _try_out(head, type(target).__name__)


@torch.no_grad()
def _try_out(head: MtpHead, name: str) -> None:
    """Raise a ValueError if the layers do not run as `MtpHead` runs them: on two made-up tokens."""
    cache = RaggedCache(1, head.device, 2, 2)
    hidden = torch.zeros(1, 2, head.config.hidden_size, device=head.device, dtype=head.dtype)
    positions = torch.arange(2, device=head.device)[None]
    causal = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=head.device).tril()
    if head.config._attn_implementation == "eager":
        causal = torch.where(causal, 0.0, torch.finfo(head.dtype).min).to(head.dtype)
    try:
        for layer in range(len(head.layers)):
            cache.prepare(2)
            if head(hidden, hidden, positions, cache, causal, layer).shape != hidden.shape:
                raise TypeError("they return another shape than they are given")
    except Exception as error:  # layers may fail in any way where they were not made for this
        raise ValueError(
            f"The MTP layers of {name} cannot be run on a cache of keys and values alone ({first_line(error)}): draft "
            "with a model or by look-up instead"
        ) from error
