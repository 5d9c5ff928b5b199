"""Calls with `cache_implementation="static"` that are compared with vanilla, on a CPU or a simulated CUDA device."""

from collections.abc import Callable
from typing import Any

from conftest import SIZES, make_model, make_prompts, perturbed
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import hf_specdec

OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 9}


def make_target(seed: int = 31, **changes: Any) -> PreTrainedModel:
    return make_model(LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **changes}), seed)


class Calls:
    """Calls of one target, on its device, with a draft that agrees in part.

    Args:
        both: options of all calls, vanilla's too.
    """

    def __init__(self, target: PreTrainedModel, move: Callable[[Any], Any] = lambda model: model, **both: Any):
        self.draft, self.target, self.both = perturbed(target, 0.1, seed=5), target, OPTIONS | both
        self.spec(rows=2, max_new_tokens=2)  # asks what the models can do, which takes long on a simulated device
        hf_specdec.release()
        self.draft, self.target = move(self.draft), move(target)

    def prompts(self, rows: int, seed: int, width: int = 20) -> dict[str, Tensor]:
        """On the device of the target; by default longer than the blocks that graphs are captured for."""
        return {
            name: tensor.to(self.target.device) for name, tensor in make_prompts(rows, width=width, seed=seed).items()
        }

    def vanilla(self, rows: int = 1, seed: int = 0, width: int = 20) -> list[list[int]]:
        tokens: list[list[int]] = self.target.generate(**self.prompts(rows, seed, width), **self.both).tolist()
        return tokens

    def spec(self, rows: int = 1, seed: int = 0, width: int = 20, **options: Any) -> Any:
        options = {"cache_implementation": "static", "num_assistant_tokens": 3} | self.both | options
        prompts = self.prompts(rows, seed, width)
        return self.target.generate(**prompts, assistant_model=self.draft, strategy="spec", **options)

    def __call__(
        self, seed: int = 0, rows: int = 1, width: int = 20, **options: Any
    ) -> tuple[list[Any], hf_specdec.SpeculationStats]:
        """The tokens, checked against vanilla's, and the statistics."""
        stats = hf_specdec.SpeculationStats()
        given = self.spec(rows, seed, width, speculation_stats=stats, **options)
        assert given.tolist() == self.vanilla(rows, seed, width)
        return given.tolist(), stats
