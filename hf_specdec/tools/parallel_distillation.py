"""Distillation of a draft that predicts several tokens in one forward (`ParallelDrafter`), as in PARD.

After some positions of a text come mask tokens, and the draft learns the target's distribution there too:

    fed        the cat sat on | [m1 m2] after "the" | [m1] after "cat"
    position    0   1   2  3  |   1  2              |   2
    sees        the text before, and the mask tokens before it in its block

All blocks of a text share one forward, under a mask of their own. Few blocks are long: a mask token is kept only if
those before it in its block are (conditional drop, An et al. 2025, arXiv:2504.18583).
"""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.parallel import mask_token
from ..models.masks import Mask, follows_masks, ragged_mask
from .distillation import Distillation, distillation_loss
from .recipe import Recipe

DRAFTS = 8  # tokens that one forward learns to predict
KEPT, LEAST_KEPT = 0.7, 0.2  # of the blocks with k mask tokens, the share that has one more; of all, the least that do


def add_mask_token(draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Make a draft predict in parallel: name a mask token in its config, unless it has one.

    It is the first id after the tokenizer's. If that is beyond the embedding, a row is added, for no text.

    Returns: its id.

    Raises:
        ValueError: if the model cannot be trained so.
    """
    if not follows_masks(draft):
        raise ValueError(
            f"{type(draft).__name__} cannot learn to draft in parallel here: that needs position ids and attention "
            "that takes 4-D masks (sdpa or eager) in all layers. Train it without --parallel"
        )
    known = mask_token(draft)
    if known is not None:
        return known
    token: int = max(tokenizer.get_vocab().values()) + 1
    if token >= draft.config.get_text_config(decoder=True).vocab_size:
        draft.resize_token_embeddings(token + 1, mean_resizing=False)
    embedding = draft.get_input_embeddings().weight
    with torch.no_grad():
        embedding[token] = embedding[:token].mean(dim=0)
    draft.config.pard_token = token
    return token


def blocks(length: int, most: int) -> tuple[Tensor, Tensor]:
    """Choose blocks of mask tokens for a text of `length` tokens, at random.

    Args:
        most: mask tokens in a block.

    Returns: for each mask token, the last position that its block has seen, and its place in the block, from 1 on.
    """
    order = torch.randperm(length - 1)  # a position's blocks are as long as its rank allows
    seen = []
    for place in range(1, most + 1):
        chosen = order[: round((length - 1) * max(KEPT**place, LEAST_KEPT))]
        seen.append(chosen[chosen + place < length])
    places = [torch.full_like(chosen, place) for place, chosen in enumerate(seen, 1)]
    return torch.cat(seen), torch.cat(places)


def block_mask(model: PreTrainedModel, length: int, seen: Tensor, place: Tensor) -> Mask:
    """The attention mask for a text of `length` tokens and its blocks, in the form that the model's layers expect."""
    text = torch.arange(length, device=seen.device)
    position, reach = torch.cat([text, seen + place]), torch.cat([text, seen])  # reach: how far into the text it sees
    is_text = torch.arange(len(position), device=seen.device) < length
    same_block = ~is_text[:, None] & ~is_text & (reach[:, None] == reach)
    allowed = (is_text & (position <= reach[:, None])) | same_block
    names = ("full_attention", "sliding_attention", "chunked_attention")
    mask = ragged_mask(model, position[None], 0, dict.fromkeys(names, position[None]))  # no token sees a later one

    def within(mask: Tensor) -> Tensor:
        return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)

    if isinstance(mask, dict):
        return {name: None if each is None else within(each) for name, each in mask.items()}
    return within(mask)


class ParallelDistillation(Distillation):
    """A draft with a mask token in training."""

    def __init__(self, draft: PreTrainedModel, target: PreTrainedModel, examples: Dataset, recipe: Recipe) -> None:
        token = mask_token(draft)
        assert token is not None, "add_mask_token() comes first"
        self._mask_token = token
        super().__init__(draft, target, examples, recipe)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        ids, counted = batch["input_ids"], batch["counted"]
        rows, length = ids.shape
        with torch.no_grad(), self._accelerator.autocast():
            target_logits = self.target(ids, attention_mask=batch["attention_mask"], use_cache=False).logits
        seen, place = (chosen.to(ids.device) for chosen in blocks(length, DRAFTS - 1))
        position = torch.cat([torch.arange(length, device=ids.device), seen + place])
        masks = ids.new_full((rows, len(seen)), self._mask_token)
        inputs: dict[str, Any] = {
            "input_ids": torch.cat([ids, masks], dim=1),
            "position_ids": position.expand(rows, -1),
            # Rows are padded on the right, so nothing that counts sees padding.
            "attention_mask": block_mask(self._draft, length, seen, place),
        }
        logits = self._draft(**inputs, use_cache=False).logits
        return distillation_loss(logits, target_logits[:, position], self.recipe.argmax_weight, counted[:, position])
