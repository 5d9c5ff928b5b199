"""Bare forwards of target and draft on filled caches: their times, and the speed-up if nothing else took time."""

import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..pairs.heads import as_head
from .bare_heads import bare_step

REPEATS = 3  # per batch and round


class BareForward:
    """Forwards of one model over a few more tokens, always at the same position in the same text.

    They use transformers' own cache and attention, as vanilla decoding does; the cache is cropped back after each.

    Args:
        input_ids, mask: `[rows, columns]`, the text so far.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, mask: Tensor):
        self.model, self.ids, self.mask = model, input_ids, mask
        self.cache = DynamicCache(config=model.config)
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._forward(input_ids, mask, **few)
        if hasattr(self.cache, "activate_past_recording"):  # sliding windows can be cropped from here on
            self.cache.activate_past_recording()

    @property
    def croppable(self) -> bool:
        """Whether the cache can be rolled back; otherwise nothing can be measured twice."""
        return bool(getattr(self.cache, "is_croppable", True))

    def seconds(self, tokens: int) -> float:
        """Wall time of one forward over `tokens` new tokens per row."""
        ids = self.ids[:, -tokens:]
        mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        _synchronize(self.model)
        began = time.perf_counter()
        self._forward(ids, mask)
        _synchronize(self.model)
        took = time.perf_counter() - began
        self.cache.crop(-tokens)
        return took

    @torch.inference_mode()
    def _forward(self, ids: Tensor, mask: Tensor, **kwargs: Any) -> None:
        if not bool(self.mask.all()):  # without padding, generate() passes no mask either
            kwargs["attention_mask"] = mask
        self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **kwargs)


class BareForwards:
    """The forwards that the methods of one setting consist of, measured a few times per round.

    Args:
        target: the target.
        draft: the pair's draft model or head.
        heads: other heads that draft, by the name of the drafter (see `methods.DRAFTERS`).

    Attributes:
        target_seconds: the target's wall times, by tokens per forward.
        draft_seconds: wall times of the draft's one-token forward, or of one forward of a head that drafts.
        head_seconds: the same of the heads, by name; empty where one forward is not like another.
        missing: the reason if nothing can be measured, otherwise empty.
    """

    def __init__(self, target: PreTrainedModel, draft: Any, heads: Mapping[str, Any] | None = None):
        self.target, self.draft, self.heads = target, draft, heads or {}
        self.target_seconds: dict[int, list[float]] = {}
        self.draft_seconds: list[float] = []
        self.head_seconds: dict[str, list[float]] = {name: [] for name in self.heads}
        self.missing = ""
        self._target: BareForward | None = None
        self._drafts: list[tuple[list[float], Callable[[], float]]] = []  # where times go, and what takes one

    def prepare(self, batch: dict[str, Tensor], rows: list[list[int]], lengths: Iterable[int]) -> None:
        """Fill both caches up to the middle of vanilla's continuations.

        Args:
            batch: `input_ids` and `attention_mask` of the prompts.
            rows: vanilla's continuations of them (rows beyond the batch are ignored).
            lengths: tokens per target forward to measure.
        """
        ids = batch["input_ids"]
        rows = rows[: len(ids)]
        half = min(map(len, rows)) // 2
        ids = torch.cat([ids, torch.tensor([row[:half] for row in rows], dtype=ids.dtype, device=ids.device)], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, :half])], dim=1)
        target = BareForward(self.target, ids, mask)
        models = [target]
        if as_head(self.draft) is None:
            known = self.draft.config.get_text_config(decoder=True).vocab_size  # of another tokenizer, perhaps
            models.append(BareForward(self.draft, ids.clamp(max=known - 1), mask))
        if not all(model.croppable for model in models):
            self.missing = "a cache that cannot be rolled back"
            return
        self._target = target
        self.target_seconds = {tokens: [] for tokens in sorted({1, *lengths}) if tokens <= ids.shape[1]}
        for model in models:  # warm up
            for tokens in self.target_seconds:
                model.seconds(tokens)
        for model in models[1:]:
            self._drafts.append((self.draft_seconds, functools.partial(model.seconds, 1)))
        heads = [(self.head_seconds[name], head) for name, head in self.heads.items()]
        heads += [(self.draft_seconds, self.draft)] if len(models) == 1 else []
        for seconds, head in heads:
            step = bare_step(head, self.target, *ids.shape)
            if step is not None:
                step()
                self._drafts.append((seconds, functools.partial(_timed, self.target, step)))
        if not any(seconds is self.draft_seconds for seconds, _ in self._drafts):
            self.missing = "the draft's forwards are not all alike, or need the target's cache"

    def measure(self) -> None:
        if self._target is None:
            return
        for _ in range(REPEATS):
            for tokens, seconds in self.target_seconds.items():
                seconds.append(self._target.seconds(tokens))
            for seconds, take in self._drafts:
                seconds.append(take())

    def seconds_of(self, drafter: str) -> float | None:
        """The median wall time of one forward that drafts, by the name of the drafter; `None` if it is not known."""
        of_the_pair = drafter in ("", "model", "either")
        seconds = self.draft_seconds if of_the_pair else self.head_seconds.get(drafter)
        return statistics.median(seconds) if seconds else None

    def cost_ratio(self, drafter: str = "") -> float | None:
        """c: that time, divided by that of the target's one-token forward."""
        draft = self.seconds_of(drafter)
        return None if draft is None else round(draft / self.target_median(1), 4)

    def ideal(self, tau: float, tokens: float, draft_forwards: float, drafter: str = "") -> float | None:
        """The speed-up over vanilla at block efficiency `tau` if nothing but forwards took time.

        τ · t_target(1) / (t_target(γ + 1) + γ · t_draft(1)), with γ + 1 = `tokens` and γ = `draft_forwards`. Both may
        be means: t_target is interpolated linearly between measured lengths.

        Returns: `None` where the time of some forward is not known.
        """
        draft = self.seconds_of(drafter) if draft_forwards else 0.0
        below = max((n for n in self.target_seconds if n <= tokens), default=None)
        above = min((n for n in self.target_seconds if n >= tokens), default=None)
        if below is None or above is None or draft is None:
            return None
        share = (tokens - below) / max(above - below, 1)
        block = (1 - share) * self.target_median(below) + share * self.target_median(above)
        return tau * self.target_median(1) / (block + draft_forwards * draft)

    def to_dict(self) -> dict[str, Any]:
        """Medians in milliseconds, and the cost ratio c."""
        draft = self.seconds_of("")
        if draft is None:
            return {"missing": self.missing}
        found: dict[str, Any] = {
            "target_ms": {tokens: round(self.target_median(tokens) * 1000, 3) for tokens in self.target_seconds},
            "draft_ms": round(draft * 1000, 3),
            "cost_ratio": self.cost_ratio(),
        }
        heads = {name: statistics.median(seconds) for name, seconds in self.head_seconds.items() if seconds}
        return found | ({"heads_ms": {name: round(s * 1000, 3) for name, s in heads.items()}} if heads else {})

    def target_median(self, tokens: int) -> float:
        return statistics.median(self.target_seconds[tokens])


def _timed(model: PreTrainedModel, step: Callable[[], None]) -> float:
    _synchronize(model)
    began = time.perf_counter()
    step()
    _synchronize(model)
    return time.perf_counter() - began


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
