"""Calls with fixed shapes in a row, between which the weights change: captured graphs must read the new ones."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from ..records.stats import SpeculationStats
from . import tiny_models
from .gpu_check import CPU_ONLY, ERROR, OK, SKIPPED, STATIC, WRONG, Case, Part, Scale, attempt
from .gpu_check_tokens import FAMILIES, NOISE, compare_calls, entry_of, greedy, on_device, pair_of, rows_of

GAMMA = 3


def parts() -> list[Part]:
    return [Part("static/weights", 60, changing_weights)]


@dataclass
class Graphs:
    """How many CUDA graphs were captured and launched."""

    captures: int = 0
    replays: int = 0


@contextmanager
def counted_graphs() -> Iterator[Graphs]:
    """Count captures and replays inside the block; nothing without CUDA."""
    graphs, graph_class = Graphs(), torch.cuda.CUDAGraph
    originals = {name: getattr(graph_class, name) for name in ("capture_end", "replay") if hasattr(graph_class, name)}

    def counting(name: str, field: str) -> Callable[..., None]:
        def counted(self: object, *args: object, **kwargs: object) -> None:
            setattr(graphs, field, getattr(graphs, field) + 1)
            originals[name](self, *args, **kwargs)

        return counted

    for name, field in (("capture_end", "captures"), ("replay", "replays")):
        if name in originals:
            setattr(graph_class, name, counting(name, field))
    try:
        yield graphs
    finally:
        for name, original in originals.items():
            setattr(graph_class, name, original)


def changing_weights(scale: Scale) -> Iterator[Case]:
    """For several numbers of rows in turn: a call, one with weights overwritten in place, one with other tensors."""
    target, draft = pair_of("dense", scale)
    new_tokens = 16 if scale.tiny else 32
    others = other_weights()

    def overwritten() -> None:
        target.load_state_dict(next(others).state_dict())

    def replaced() -> None:
        for parameter, new in zip(target.parameters(), next(others).parameters(), strict=True):
            parameter.data = new.data.to(scale.device, copy=True)

    with counted_graphs() as graphs:
        for rows in (1, 8, 3, 8, 1):
            inputs = on_device(tiny_models.prompts(rows, 20, seed=rows), scale.device)
            options = {"assistant_model": draft, **STATIC}
            check = partial(compare_calls, target, inputs, new_tokens, options, gamma=GAMMA)
            yield attempt(f"{rows_of(rows)}", check)
            for change in (overwritten, replaced):
                before = greedy(target, inputs, new_tokens)
                change()
                if torch.equal(greedy(target, inputs, new_tokens), before):
                    yield Case(rows_of(rows), ERROR, "the new weights give the old tokens, so nothing was checked")
                yield attempt(f"{rows_of(rows)}, weights {change.__name__}", check)
        yield attempt("draft's weights overwritten", partial(follows_the_draft, target, draft, scale, new_tokens))
    yield of_graphs(graphs, scale)


def other_weights() -> Iterator[PreTrainedModel]:
    """Models with other weights, all near the first one, so that its draft agrees with them in part."""
    first = tiny_models.build(entry_of(FAMILIES["dense"]))
    for seed in itertools.count(5):
        yield tiny_models.perturbed(first, NOISE, seed)


def follows_the_draft(
    target: PreTrainedModel, draft: PreTrainedModel, scale: Scale, new_tokens: int
) -> tuple[str, str]:
    """A draft that gets the target's weights agrees with it; one that is still read with its old ones does not."""
    inputs = on_device(tiny_models.prompts(8, 20, seed=8), scale.device)
    accepted = []
    for _ in range(2):
        stats = SpeculationStats()
        way = {"strategy": "spec", "num_assistant_tokens": GAMMA, "assistant_model": draft, **STATIC}
        greedy(target, inputs, new_tokens, speculation_stats=stats, **way)
        accepted.append(f"{stats.accepted_tokens} of {stats.drafted_tokens}")
        same = stats.accepted_tokens == stats.drafted_tokens
        draft.load_state_dict(target.state_dict())
    return (OK if same else WRONG), f"drafts accepted: {accepted[0]} before, {accepted[1]} after"


def of_graphs(graphs: Graphs, scale: Scale) -> Case:
    """Whether graphs were really used."""
    name, details = "CUDA graphs", f"{graphs.captures} captured, {graphs.replays} launches"
    if not scale.is_cuda:
        return Case(name, SKIPPED, f"{CPU_ONLY}: the same code ran without graphs")
    return Case(name, OK if graphs.replays else ERROR, details)
