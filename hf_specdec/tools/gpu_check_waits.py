"""Whether an iteration of the loop waits for the GPU, other than by its one event.

PyTorch's sync debug mode raises an error at operations that wait, such as `.item()` and copies to the host; it does not
see a wait for an event. It is switched on around each iteration from the second one of a call on, in a second call:
the first iteration may do work that is done once.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..loop.decoding import SpeculativeDecoding
from ..pairs.pair import SpecPair
from .arguments import encode
from .gpu_check import CPU_ONLY, NOT_MEASURED, OK, SKIPPED, STATIC, WRONG, Case, Part, Scale, attempt
from .gpu_check_pair import embedded_pair, embedded_prompts
from .gpu_check_tokens import rows_of

GAMMA, BATCH = 4, 8


def parts() -> list[Part]:
    return [Part("waits/iterations", 90, waits)]


class Collected(BaseStreamer):
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value)

    def end(self) -> None:
        pass


@dataclass
class Watched:
    """
    Attributes:
        iterations: how many ran under the sync debug mode.
        found: where the first one waited; empty if none did.
    """

    iterations: int = 0
    found: str = ""


def waits(scale: Scale) -> Iterator[Case]:
    """Every way through the loop: greedy, sampled, look-up, one row and eight uneven ones, and what ends a call."""
    if not scale.is_cuda:
        yield Case("all", SKIPPED, f"{CPU_ONLY}: nothing waits for a CPU")
        return
    pair = embedded_pair(scale, torch.float32)
    for rows, name, options in calls(pair):
        yield attempt(f"{name}, {rows_of(rows)}", partial(watched_call, pair, rows, options))


def calls(pair: SpecPair) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Rows, a name, and the arguments of `generate()`."""
    model = {"assistant_model": pair.draft, "num_assistant_tokens": GAMMA}
    look_up = {"prompt_lookup_num_tokens": GAMMA}
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    for rows in (1, BATCH):
        yield rows, "greedy", model
        yield rows, "greedy, static", {**model, **STATIC}
        yield rows, "greedy, default schedule", {"assistant_model": pair.draft}
        yield rows, "sampled", {**model, **sampling}
        yield rows, "sampled, static", {**model, **sampling, **STATIC}
        yield rows, "look-up", look_up
        yield rows, "look-up, sampled", {**look_up, **sampling}
        yield rows, "stop strings", {**model, "stop_strings": ["\n\n\n"], "tokenizer": pair.tokenizer}
        yield rows, "max_time", {**model, "max_time": 600.0}
        yield rows, "streamer", {**model, "streamer": Collected()}


def watched_call(pair: SpecPair, rows: int, options: dict[str, Any]) -> tuple[str, str]:
    inputs = encode(embedded_prompts(pair, rows), pair.tokenizer, pair.target.device)
    call = partial(
        pair.target.generate, **inputs, strategy="spec", max_new_tokens=32, **{"do_sample": False, **options}
    )
    call()
    with watched_iterations() as watched:
        try:
            call()
        except RuntimeError:
            if not watched.found:
                raise
    if watched.found:
        return WRONG, watched.found
    if watched.iterations == 0:
        return NOT_MEASURED, "the call had no second iteration"
    return OK, f"{watched.iterations} iterations without a wait"


@contextmanager
def watched_iterations() -> Iterator[Watched]:
    """Inside the block, iterations run under the sync debug mode, from each call's second one on."""
    watched, original = Watched(), SpeculativeDecoding.iterate
    begun: set[int] = set()

    def step(self: SpeculativeDecoding, *args: Any, **kwargs: Any) -> Any:
        if id(self) not in begun:
            begun.add(id(self))
            return original(self, *args, **kwargs)
        watched.iterations += 1
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(self, *args, **kwargs)
        except RuntimeError as error:
            if "synchroniz" in str(error):
                watched.found = place_of(error)
            raise
        finally:
            torch.cuda.set_sync_debug_mode(before)

    SpeculativeDecoding.iterate = step  # type: ignore[method-assign]
    try:
        yield watched
    finally:
        SpeculativeDecoding.iterate = original  # type: ignore[method-assign]


def place_of(error: BaseException) -> str:
    """The calls that led to an error, the innermost last, by file and line."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " > ".join(f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}" for frame in frames)
