"""Static batches for `generate_many`, where rows cannot be replaced while others go on: one `generate()` call each.

The texts of a block are sorted by the length of their prompts. A batch is padded where that changes nothing; otherwise
its prompts have equal lengths.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import MaxTimeCriteria, StoppingCriteriaList

from ..cache.states import has_states
from ..device import forward_parameters
from ..loop.stopping import Stopping
from ..models.masks import takes_position_ids
from ..records.stats import SpeculationStats
from ..sampling.context import Context
from ..sampling.processors import BLIND
from .places import Done
from .prompts import Entry, Preparation
from .session import Checked, PreparedCall

Item = tuple[Entry, PreparedCall, int]  # a text, its call, and its seed


class StaticBatches:
    """Decodes blocks of texts in batches of up to `size`.

    Args:
        checked: the call of a prompt of one token.
    """

    def __init__(self, preparation: Preparation, checked: Checked, size: int):
        self._preparation = preparation
        self._size = size
        self._has_encoder = checked.encoder is not None
        self._pads = self._has_encoder or has_states(checked.cache) or takes_position_ids(checked.call.model)
        self._stats = SpeculationStats()

    def take_stats(self) -> SpeculationStats:
        """What was counted since the last time."""
        stats, self._stats = self._stats, SpeculationStats()
        return stats

    def decode(self, block: Iterable[Item]) -> Iterator[list[Done] | tuple[Item, Exception]]:
        """The texts of one block, batch by batch, or a text and why it cannot be decoded."""
        batches: dict[Any, list[list[Item]]] = {}
        for item in sorted(block, key=lambda item: len(item[0].prompt)):
            lists = batches.setdefault(self._kind(item), [[]])
            if len(lists[-1]) == self._size:
                lists.append([])
            lists[-1].append(item)
        for batch in (batch for lists in batches.values() for batch in lists):
            try:
                yield self._decode(batch)
            except Exception:
                for item in batch:  # one of them may be to blame
                    try:
                        yield self._decode([item])
                    except Exception as error:
                        yield item, error

    def _kind(self, item: Item) -> Any:
        """Texts of one kind may be in one batch."""
        entry, call, _ = item
        if self._pads and all(type(processor) in BLIND for processor in call.processors):
            return None
        return len(entry.prompt), call.max_length

    def _decode(self, batch: list[Item]) -> list[Done]:
        preparation, calls = self._preparation, [call for _, call, _ in batch]
        device = calls[0].input_ids.device
        pad = calls[0].config._pad_token_tensor
        prompts = [torch.tensor(entry.prompt) for entry, _, _ in batch]
        side = "right" if self._has_encoder else "left"

        def padded(rows: list[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side=side).to(device)

        ids = padded(prompts, 0 if pad is None else int(pad))
        masks = {"attention_mask": padded([torch.ones_like(prompt) for prompt in prompts], 0)}
        options = dict(preparation.options)
        if preparation.resolved.speculation_acceptance == "coupled":
            options["speculation_seed"] = [seed for _, _, seed in batch]
        stats = SpeculationStats()
        room = [call.max_length - call.input_ids.shape[1] for call in calls]
        options.pop("max_length", None)
        options |= {"max_new_tokens": max(room), "num_return_sequences": 1}
        sequences = preparation.model.generate(
            ids,
            **(masks if "attention_mask" in forward_parameters(preparation.model) else {}),
            **options,
            strategy="spec",
            assistant_model=preparation.assistant_model,
            speculation_stats=stats,
        )
        self._stats.merge(stats)
        width = calls[0].input_ids.shape[1] if self._has_encoder else ids.shape[1]
        return [self._done(item, sequences[row, width:], stats, row) for row, item in enumerate(batch)]

    def _done(self, item: Item, new: Tensor, stats: SpeculationStats, row: int) -> Done:
        """A text, cut where it would have ended alone: a batch may go on longer, and pads what has ended."""
        entry, call, _ = item
        counted = stats.per_row[row]
        tokens = new[: counted.committed_tokens].tolist()
        prompt = call.input_ids.to("cpu")
        context = Context(prompt, [0], call.max_length, 0)
        timeless = StoppingCriteriaList(c for c in call.criteria if type(c) is not MaxTimeCriteria)
        count, reason = Stopping(timeless, call.max_length).first_end(context, 0, tokens) or (len(tokens), "max_time")
        own = SpeculationStats(per_row=[counted], target_forwards=counted.row_iterations)
        for name in vars(counted):
            setattr(own, name, getattr(counted, name))
        own.committed_tokens = counted.committed_tokens = count
        return Done(
            entry, torch.cat([prompt[0], torch.tensor(tokens[:count], dtype=torch.int64)]), prompt.shape[1], reason, own
        )
