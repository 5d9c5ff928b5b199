"""Training of EAGLE-3 heads for a target: test-time training (Li et al. 2025), on hidden states made on the fly.

The head drafts several tokens from each position, each from its own output for the one before, as it does when it is
used. The text's own tokens are put in for the drafted ones. Needs the extra `train`, as `distillation.py` does.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, PreTrainedModel

from ..drafters.heads import Eagle3Config, Eagle3Head
from ..models.tap import Tap
from .distillation import Distillation, distillation_loss
from .recipe import Recipe

DRAFTED = 4  # drafts from each position
ALONE = 0.6  # of the steps learn only the first, which is cheaper, and what the others build upon
DECAY = 0.8  # how much less each of them counts than the one before
KEPT = 0.5  # of the host's free memory, at most, holds what the target makes of the texts, for later epochs


def frequent_tokens(rows: Iterable[Sequence[int]], count: int, vocab_size: int) -> Tensor:
    """`[count]`, sorted: the tokens that come most often; unseen ones, lowest first, where there are too few."""
    seen = Counter(token for row in rows for token in row if token < vocab_size)
    known = [token for token, _ in seen.most_common(count)]
    rest = (token for token in range(vocab_size) if token not in seen)
    while len(known) < count:
        known.append(next(rest))
    return torch.tensor(sorted(known))


def new_head(
    target: PreTrainedModel,
    target_ids: Tensor | None = None,
    layers: int = 1,
    mlp_width: int | None = None,
    shares_output: bool = False,
) -> Eagle3Head:
    """A head with random layers, the target's embeddings, and a copy of its output weights.

    Args:
        target_ids: the tokens that it can propose; `None` for all.
        mlp_width: of its layers' MLP; the target's by default.
        shares_output: it uses the target's output weights instead of a copy, which are not trained and not saved.

    Raises:
        ValueError: for a target with fewer than three layers, or without weights of its width at both ends.
    """
    config = target.config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    if count < 3:
        raise ValueError(f"an EAGLE-3 head reads three layers, and {type(target).__name__} has {count}")
    sizes = {name: getattr(config, name) for name in ("hidden_size", "vocab_size", "num_attention_heads")}
    heads = sizes["num_attention_heads"]
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = getattr(config, "intermediate_size", None)
    layer = LlamaConfig(
        **sizes,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=width + width % 2,
        intermediate_size=mlp_width or (inner if isinstance(inner, int) else 4 * config.hidden_size),
        max_position_embeddings=getattr(config, "max_position_embeddings", None) or 2048,
        rms_norm_eps=getattr(config, "rms_norm_eps", None) or 1e-6,
        num_hidden_layers=layers,
    )
    parts = Eagle3Config(
        layer,
        config.vocab_size,
        draft_vocab_size=None if target_ids is None else len(target_ids),
        aux_ids=(min(2, count - 2), max(count // 2, min(2, count - 2) + 1), count) if count < 8 else None,
        layers=layers,
        norm_before_residual=True,
        has_lm_head=not shares_output,
    )
    head = Eagle3Head(parts, target_ids)
    with torch.no_grad():
        for weight in head.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.5 * weight.shape[1] ** -0.5)
        output: Any = target.get_output_embeddings()
        if not shares_output:
            head.lm_head.weight.copy_(output.weight if target_ids is None else output.weight[target_ids])
    return head.to(target.device, target.dtype).eval()


class _Steps:
    """The keys and values of all drafts from all positions: those of the text, then those of each draft."""

    def __init__(self) -> None:
        self._held: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def update(self, key: Tensor, value: Tensor, index: int) -> tuple[Tensor, Tensor]:
        held = self._held.setdefault(index, [])
        held.append((key, value))
        return torch.cat([k for k, _ in held], dim=2), torch.cat([v for _, v in held], dim=2)


def training_loss(
    head: Eagle3Head,
    states: Sequence[Tensor],
    tokens: Tensor,
    wanted: Tensor,
    counted: Tensor,
    embeddings: Tensor,
    argmax_weight: float = 0.0,
    drafted: int = DRAFTED,
    output: Tensor | None = None,
) -> Tensor:
    """The mean loss of `drafted` drafts from each position, each weighted by DECAY of the one before.

    Args:
        states: of the target, each `[rows, tokens, hidden]`.
        tokens: `[rows, tokens]`.
        wanted: `[rows, tokens, draft vocabulary]`, the target's logits.
        counted: `[rows, tokens]` bool, positions whose logits are to be learned.
        embeddings: `[vocabulary, hidden]`, the target's.
        output: `[draft vocabulary, hidden]`, of the target's, for a head without its own.
    """
    rows, length = len(tokens), tokens.shape[1] - 1
    drafted = min(drafted, length)
    learned = F.pad(counted[:, 1:].bool(), (0, drafted))  # by the position that a first draft comes from
    at = torch.arange(length, device=tokens.device).expand(rows, -1)
    text = torch.ones(rows, length, length, device=at.device).tril().bool()  # what a draft sees of it
    given, cache = head.mix(states)[:, :-1], _Steps()
    losses, weights = [], []
    for step in range(drafted):
        if step == 1:
            at = _still_needed(learned, length, drafted)
            if at.shape[1] == 0:
                break
            given = given.gather(1, at[..., None].expand(-1, -1, given.shape[-1]))
            text = text.gather(1, at[..., None].expand(-1, -1, length))
        ahead, valid = (at + 1 + step).clamp(max=length), learned.gather(1, at + step)
        embedded = F.embedding(tokens.gather(1, ahead), embeddings).to(given.dtype)
        own = torch.eye(at.shape[1], device=at.device).bool().expand(rows, -1, -1)
        given = head(given, embedded, at + step, cache, torch.cat([text, *[own] * step], dim=2)[:, None])
        if bool(valid.any()):
            logits, target_logits = head.logits(given[valid], output), wanted[valid.nonzero()[:, 0], ahead[valid]]
            losses.append(DECAY**step * distillation_loss(logits, target_logits, argmax_weight))
            weights.append(DECAY**step)
    return torch.stack(losses).sum() / sum(weights)


def _still_needed(learned: Tensor, length: int, drafted: int) -> Tensor:
    """`[rows, most of a row]`: the positions from which a second or later draft is learned; then any others."""
    needed = torch.stack([learned[:, step : step + length] for step in range(1, drafted)]).any(dim=0)
    return needed.long().argsort(dim=1, descending=True, stable=True)[:, : int(needed.sum(dim=1).max())]


class _Outputs(NamedTuple):
    """What the target makes of one text, on the host.

    Attributes:
        states: those that the head reads, each `[tokens, hidden]`.
        logits: `[learned tokens, draft vocabulary]`.
    """

    states: list[Tensor]
    logits: Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (*self.states, self.logits))


class HeadDistillation(Distillation):
    """A head in training; `Distillation` says what else it does.

    The target reads each text once, as long as what it makes of them all fits into a share KEPT of the host's memory.
    """

    def __init__(self, draft: Any, target: PreTrainedModel, examples: Dataset, recipe: Recipe) -> None:
        super().__init__(draft, target, examples, recipe)
        self._kept: dict[bytes, _Outputs] = {}
        self._room = int(KEPT * psutil.virtual_memory().available)  # bytes

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        counted = batch.pop("counted").bool()
        head: Any = self._accelerator.unwrap_model(self._draft)
        outputs = self._of_target(head, batch, counted)
        kept = zip(*(each.states for each in outputs))
        states = [pad_sequence(list(parts), batch_first=True).to(counted.device) for parts in kept]
        logits = torch.cat([each.logits for each in outputs]).to(counted.device)
        wanted = logits.new_zeros(*counted.shape, logits.shape[-1])
        wanted[counted] = logits
        embeddings: Any = self.target.get_input_embeddings()
        shared = head.shared_output(self.target)
        with self._accelerator.autocast():
            return training_loss(
                head,
                states,
                batch["input_ids"],
                wanted,
                counted,
                embeddings.weight.detach(),
                self.recipe.argmax_weight,
                1 if self.step < ALONE * self.recipe.steps else DRAFTED,
                output=None if shared is None else shared.detach().to(head.dtype),  # the head's weights are float32
            )

    def _of_target(self, head: Any, batch: dict[str, Tensor], counted: Tensor) -> list[_Outputs]:
        """Of each row."""
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        texts = [
            torch.stack([ids[:length], learned[:length].to(ids.dtype)]).cpu().numpy().tobytes()
            for ids, learned, length in zip(batch["input_ids"], counted, lengths)
        ]
        found = {text: self._kept[text] for text in texts if text in self._kept}
        new = [row for row, text in enumerate(texts) if text not in found]
        if new:
            for row, outputs in zip(
                new, self._read(head, {name: part[new] for name, part in batch.items()}, counted[new])
            ):
                found[texts[row]] = outputs
                if outputs.nbytes <= self._room:
                    self._kept[texts[row]] = outputs
                    self._room -= outputs.nbytes
        return [found[text] for text in texts]

    @torch.no_grad()
    def _read(self, head: Any, batch: dict[str, Tensor], counted: Tensor) -> Iterator[_Outputs]:
        """One forward of the target; of its outputs, those that the head learns from."""
        seen: list[list[Tensor]] = []
        layers = self.target.config.get_text_config(decoder=True).num_hidden_layers
        tap = Tap(self.target, head.parts.states_of(layers), lambda states, rows, columns: seen.append(states))
        try:
            with self._accelerator.autocast(), tap.listening():
                logits = self.target(**batch, use_cache=False).logits
            rows = len(logits)
            tap.hand_over(list(range(rows)), [0] * rows)
        finally:
            tap.close()
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            learned = logits[row][counted[row]]
            yield _Outputs(
                [part[row, :length].to("cpu", copy=True) for part in seen[0]],
                (learned if head.target_ids is None else learned[:, head.target_ids]).to("cpu", copy=True),
            )
