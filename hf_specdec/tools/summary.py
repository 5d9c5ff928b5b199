"""From runs to figures: ratios within each round, their median and quartiles, and the counts they rest on."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .bare import BareForwards
from .measure import ASSISTED, OURS, Record, Run, checked
from .settings import Setting


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, _, high = statistics.quantiles([*values, *values][: max(2, len(values))], method="inclusive")
        return cls(round(statistics.median(values), 4), round(low, 4), round(high, 4))


def total_cost(runs: Iterable[Run]) -> float:
    """Seconds per new token."""
    runs = list(runs)
    return sum(run.seconds for run in runs) / sum(run.tokens for run in runs)


def decode_cost(runs: Iterable[Run]) -> float:
    """Seconds per new token after those of the first target forward; NaN if there are none."""
    runs = list(runs)
    tokens = sum(run.tokens - run.first_tokens for run in runs)
    return sum(run.decode_seconds for run in runs) / tokens if tokens else math.nan


def first_cost(runs: Iterable[Run]) -> float:
    """Seconds to the first token, per batch."""
    return statistics.fmean(run.first_seconds for run in runs)


COSTS = {"": total_cost, "decode_": decode_cost, "first_token_": first_cost}


def ratio(
    slow: Record,
    fast: Record,
    cost: Callable[[Iterable[Run]], float] = total_cost,
    batches: Sequence[int] | None = None,
) -> Spread:
    """How many times cheaper `fast` is, by `cost`, on all or the given batches, over the rounds of both."""
    values = []
    for theirs, mine in zip(slow.rounds, fast.rounds):
        chosen = range(len(theirs)) if batches is None else batches
        values.append(cost(theirs[i] for i in chosen) / cost(mine[i] for i in chosen))
    return Spread.of(values)


def summarise(setting: Setting, records: dict[str, Record], bare: BareForwards) -> dict[str, Any]:
    """All figures of one setting, as plain JSON types."""
    reference, *others = (record for record in records.values() if not record.refusal)
    rivals = [record for record in others if record.method.family == ASSISTED]
    low, high = setting.lengths
    result: dict[str, Any] = {
        "label": setting.label,
        "batch_size": setting.batch_size,
        "context": setting.context,
        "prompt_tokens": [low, high],
        "bare": bare.to_dict(),
        "methods": {name: figures(setting, record, reference, rivals, bare) for name, record in records.items()},
    }
    return result


def figures(
    setting: Setting, record: Record, reference: Record, rivals: Sequence[Record], bare: BareForwards
) -> dict[str, Any]:
    """One method's figures: against vanilla, against the best of the `rivals`, and its counts."""
    if record.refusal:
        return {"family": record.method.family, "refused": record.refusal}
    result: dict[str, Any] = {"family": record.method.family, "gamma": record.method.gamma}
    for name, cost in COSTS.items():
        result[f"{name}ms"] = _finite(round(statistics.median(map(cost, record.rounds)) * 1000, 3))
        result[f"{name}speedup"] = _plain(ratio(reference, record, cost))
        if record.method.family == OURS and rivals:
            best = max(rivals, key=lambda rival: ratio(reference, rival, cost).median)
            result[f"{name}over_assisted"] = _plain(ratio(best, record, cost))
            result[f"{name}best_assisted"] = best.method.name
    tokens, forwards = (sum(getattr(run, name) for run in record.rounds[0]) for name in ("tokens", "forwards"))
    speeds = [1 / total_cost(runs) for runs in record.rounds]
    result |= {
        "tokens_per_second": round(statistics.median(speeds), 2),
        "tokens": tokens,
        "target_forwards": forwards,
        "block_efficiency": round(tokens / forwards * len(setting.batches) / len(record.rows), 3),
        "differing_rows": len(record.differing),
        "rows": len(record.rows),
        "compared": record.compared,
        "peak_bytes": record.peak_bytes,
        "categories": _categories(setting, record, reference),
    }
    return result | _speculation(record, result, bare)


def growth(settings: Sequence[dict[str, Any]]) -> dict[str, float]:
    """For each method, the cost of a decoded token at the longest context divided by that at the shortest.

    Args:
        settings: summaries; those with the batch size of the first one are compared.
    """
    alike = [s for s in settings if s["batch_size"] == settings[0]["batch_size"]]
    short, long = (choose(alike, key=lambda s: s["prompt_tokens"][1])["methods"] for choose in (min, max))
    costs = {name: (long[name].get("decode_ms"), short[name].get("decode_ms")) for name in short}
    return {name: round(a / b, 3) for name, (a, b) in costs.items() if a and b} if len(alike) > 1 else {}


def _speculation(record: Record, result: dict[str, Any], bare: BareForwards) -> dict[str, Any]:
    """α, τ, and how close decoding comes to the ideal of bare forwards."""
    stats = record.stats
    if record.method.family != OURS or not stats.target_forwards:
        return {}
    best, speedup = ideal(record, bare), result["decode_speedup"]
    return {
        "acceptance_rate": round(stats.acceptance_rate, 4),
        "block_efficiency": round(stats.block_efficiency, 3),
        "acceptance_by_position": [round(share, 4) for share in stats.acceptance_by_position],
        "drafted_by_position": stats.drafted_by_position,
        "ideal": None if best is None else round(best, 3),
        "draft_forwards": stats.draft_forwards,
        "efficiency": None if best is None or speedup is None else round(speedup["median"] / best, 3),
    }


def ideal(record: Record, bare: BareForwards) -> float | None:
    """The speed-up at one of ours' measured τ if only bare forwards took time; `None` where some are not known."""
    stats = record.stats
    drafts = stats.draft_forwards / stats.target_forwards
    if record.method.gamma is not None and drafts > 1:  # else one forward makes all drafts
        drafts = record.method.gamma
    return bare.ideal(stats.block_efficiency, checked(record), drafts, record.method.drafter)


def _categories(setting: Setting, record: Record, reference: Record) -> dict[str, Any]:
    """The speed-up by prompt category."""
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(setting.categories):
        indices.setdefault(name, []).append(index)
    return {name: _plain(ratio(reference, record, batches=chosen)) for name, chosen in indices.items()}


def _plain(spread: Spread) -> dict[str, float] | None:
    return None if math.isnan(spread.median) else asdict(spread)


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
