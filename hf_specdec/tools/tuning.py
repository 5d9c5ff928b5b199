"""Finds the draft length and schedule that suit a pair: a race that drops the slower half in each round.

Owns the race and what it writes into a pair file; `measure.py` does the measuring.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..pairs.compatibility import vocabulary_check
from ..pairs.loading import find_pair
from ..pairs.pair import SpecPair
from ..pairs.pair_file import FILE_NAME, ModelReference, PairConfig
from . import bootstrap
from .bare import BareForwards
from .measure import Comparison, Record
from .methods import ours, vanilla
from .settings import Setting
from .summary import Spread, ratio

LEAST_ROUNDS, MOST_ROUNDS = 3, 20  # of the winner: fewer give no useful quartiles, more add nothing
# How far the speed-up with other prompts may be from the one measured: neighbouring draft lengths differ by about 5 to
# 10 %, so a figure less certain than twice that cannot decide between them.
MOST_SPREAD = 0.2


@dataclass(frozen=True)
class Contender:
    """One choice of options and how it did.

    Attributes:
        name: as shown in tables.
        options: arguments of `generate()`.
        record: its runs.
        speedup: over vanilla, in the rounds that it took part in.
        interval: 95 % interval of the speed-up on other prompts of the same kind; None if there are too few prompts.
    """

    name: str
    options: dict[str, Any]
    record: Record
    speedup: Spread
    interval: tuple[float, float] | None = None

    @property
    def pays(self) -> bool:
        """Whether it was faster than vanilla in three rounds out of four."""
        return self.speedup.q1 >= 1


def candidates(
    gammas: Sequence[int], schedules: Sequence[str], thresholds: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Options to try, by name: constant γs, schedules ("heuristic" ones begin with the middle γ), and the longest γ,
    cut short when the draft's confidence is below a threshold."""
    gammas = sorted(gammas)
    constant = {"num_assistant_tokens_schedule": "constant"}
    found: dict[str, dict[str, Any]] = {f"γ={n}": {"num_assistant_tokens": n, **constant} for n in gammas}
    for name in schedules:
        start = {} if name == "optimal" else {"num_assistant_tokens": gammas[len(gammas) // 2]}
        found[name] = {**start, "num_assistant_tokens_schedule": name}
    for threshold in thresholds:
        options = {"num_assistant_tokens": gammas[-1], **constant, "assistant_confidence_threshold": threshold}
        found[f"γ≤{gammas[-1]}, confidence {threshold:g}"] = options
    return found


def race(
    pair: SpecPair,
    tried: dict[str, dict[str, Any]],
    setting: Setting,
    new_tokens: int,
    seconds: float,
    bare: BareForwards,
    report: Callable[[str], None] = lambda text: None,
    drafter: str = "model",
) -> list[Contender]:
    """Measure the candidates against vanilla, dropping the slower half after each round, until `seconds` are over.

    At least one round of all, and `LEAST_ROUNDS` of the winner, always run, however long they take.

    Args:
        drafter: its name, see `methods.drafter`.

    Returns: all contenders, sorted by rounds survived, then by speed-up.
    """
    end = time.monotonic() + seconds
    methods = {name: ours(pair.draft, options | pair.tokenizers, name, drafter) for name, options in tried.items()}
    comparison = Comparison(pair.target, [vanilla(), *methods.values()], setting.batches, new_tokens, bare, report)
    records = {name: comparison.records[method.name] for name, method in methods.items()}
    speedups: dict[str, Spread] = {}
    comparison.warm_up()
    alive = list(methods)
    while True:
        began = time.monotonic()
        comparison.round(methods[name].name for name in alive)
        speedups |= {name: ratio(comparison.reference, records[name]) for name in alive}
        alive.sort(key=lambda name: -speedups[name].median)
        over = time.monotonic() + (time.monotonic() - began) / 2 > end
        done = len(records[alive[0]].rounds)
        if done >= LEAST_ROUNDS and (over or done >= MOST_ROUNDS):
            break
        alive = alive[: max(2, len(alive) // (4 if over else 2))]
    contenders = [
        Contender(name, options, records[name], speedups[name], interval(comparison.reference, records[name]))
        for name, options in tried.items()
    ]
    return sorted(contenders, key=lambda contender: (-len(contender.record.rounds), -contender.speedup.median))


def interval(slow: Record, fast: Record) -> tuple[float, float] | None:
    """The 95 % interval of the speed-up, by bootstrapping over batches, each with all its rounds.

    Rounds repeat the same greedy text: they show how steady the clock is, but nothing about other prompts. None if
    there are fewer than `bootstrap.LEAST` batches.
    """
    rounds = list(zip(slow.rounds, fast.rounds))
    batches = len(rounds[0][0])
    if batches < bootstrap.LEAST:
        return None
    # [batches], of vanilla and of the contender
    seconds = [np.array([sum(each[side][i].seconds for each in rounds) for i in range(batches)]) for side in (0, 1)]
    tokens = [np.array([sum(each[side][i].tokens for each in rounds) for i in range(batches)]) for side in (0, 1)]

    def speedup(drawn: np.ndarray) -> np.ndarray:
        costs = [seconds[side][drawn].sum(axis=1) / tokens[side][drawn].sum(axis=1) for side in (0, 1)]
        return np.asarray(costs[0] / costs[1])

    return bootstrap.interval(batches, speedup)


def doubt(best: Contender, setting: Setting) -> str:
    """Why there are too few prompts or tokens to say whether and how well speculation pays; empty if enough."""
    batches = len(setting.batches)
    if best.interval is None:
        unit = "prompts" if setting.batch_size == 1 else f"batches of {setting.batch_size} prompts"
        return f"{batches} {unit} cannot show how much speed-ups vary; {bootstrap.LEAST} can: more --prompts"
    low, high = best.interval
    found = f"with other prompts the speed-up may be {low:.2f} to {high:.2f} (95 % interval over {batches} batches)"
    if not (low > 1 and best.pays) and not (high < 1 and not best.pays):
        return f"{found}, so it is unclear whether speculation pays: more --prompts, --new-tokens or --minutes"
    if high - low > 2 * MOST_SPREAD * best.speedup.median:
        return f"{found}, which is too wide for a choice: more --prompts or --new-tokens"
    return ""


def outcome(config: PairConfig, best: Contender, entry: dict[str, Any]) -> PairConfig:
    """The pair file's content after a race: whether speculation pays, with which options, and the measurements.

    It pays if the winner was faster than vanilla in three rounds out of four.
    """
    recommended = best.options if best.pays else {}
    return replace(config, speculate=best.pays, recommended=recommended, measured=[*config.measured, entry])


def measured_entry(
    best: Contender, bare: BareForwards, setting: Setting, surroundings: dict[str, Any]
) -> dict[str, Any]:
    """The record of a race in a pair file."""
    kept = ("date", "command", "device", "threads", "dtype", "torch", "transformers")
    return {name: surroundings[name] for name in kept} | {
        "batch_size": setting.batch_size,
        "prompt_tokens": list(setting.lengths),
        "options": best.options,
        "acceptance_rate": round(best.record.stats.acceptance_rate, 4),
        "block_efficiency": round(best.record.stats.block_efficiency, 3),
        "cost_ratio": bare.cost_ratio(best.record.method.drafter),
        "speedup": best.speedup.median,
        "speedup_quartiles": [best.speedup.q1, best.speedup.q3],
        "speedup_interval": None if best.interval is None else [round(bound, 4) for bound in best.interval],
    }


def pair_file_for(pair: SpecPair, folder: Path) -> PairConfig:
    """The pair file in `folder`, or a new one that refers to the places of `pair`'s models.

    Raises:
        SystemExit: if the folder holds another pair, or the models are not stored anywhere.
    """
    if pair.sources is None:
        raise SystemExit("a pair file needs a pair that can be loaded again, got a synthetic one")
    if (folder / FILE_NAME).is_file():
        found = find_pair(str(folder))
        assert found is not None
        named = [found.target.name_or_path, found.draft.name_or_path]
        measured = [source.name_or_path for source in pair.sources]
        files = [source.gguf_file for source in pair.sources]
        if list(map(_place, named)) != list(map(_place, measured)) or files != [
            found.target.gguf_file,
            found.draft.gguf_file,
        ]:
            raise SystemExit(f"{folder / FILE_NAME} is about {' and '.join(named)}, not {' and '.join(measured)}")
        return found.config
    target, draft = (_reference(source, folder) for source in pair.sources)
    return PairConfig(target, draft, tokenizer=vocabulary_check(pair.tokenizer))


def _place(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _reference(source: ModelReference, folder: Path) -> ModelReference:
    """`source` as a pair file in `folder` names it: Hub ids unchanged, local folders by relative path."""
    if not Path(source.name_or_path).is_dir():
        return source
    way = os.path.relpath(Path(source.name_or_path).resolve(), folder.resolve())
    return replace(source, name_or_path=way if way.startswith(".") else f"./{way}")
