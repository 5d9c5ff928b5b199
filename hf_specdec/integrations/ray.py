"""Ray Data: `map_batches(SpecGenerator, ...)` generates for a column of prompts, with a pair of models in each actor.

Ray places the actors, moves the rows and repeats what was lost. Here is only what an actor does; nothing imports Ray.
"""

from typing import Any

import numpy as np
import torch

from ..pairs.pair import SpecPair
from ..tools.texts import COUNTERS, columns_of, texts_for


class SpecGenerator:
    """Adds to a batch of rows the columns generated_text, generated_tokens, finish_reason, error and counters.

        rows.map_batches(
            SpecGenerator,
            fn_constructor_kwargs={"target": "Qwen/Qwen3-8B", "draft": "Qwen/Qwen3-0.6B", "max_new_tokens": 256},
            batch_size=256, concurrency=2, num_gpus=1,
        )

    Each row's text is the one of its prompt alone.

    Args:
        target, draft: as for `SpecPair.from_pretrained`, in which each actor loads them.
        column: with a text or chat messages.
        together: how many texts are decoded together. Rows of a batch begin as others end, so let Ray's batches have
            several times as many.
        load_options: arguments of `from_pretrained` for both models. By default, the device is CUDA if there is one.
        on_error: "result" writes why a prompt cannot be decoded into the column `error`; "raise" stops with it.
        generate_options: those of `generate_many`.

    Raises:
        ValueError: for options that need to know a row's place in the whole, or give several texts for one row.
    """

    def __init__(
        self,
        target: str,
        draft: str | None = None,
        *,
        column: str = "prompt",
        together: int = 16,
        load_options: dict[str, Any] | None = None,
        on_error: str = "result",
        **generate_options: Any,
    ):
        if on_error not in ("result", "raise"):
            raise ValueError(f"`on_error` must be 'raise' or 'result', got {on_error!r}")
        if generate_options.get("speculation_seed") is not None:
            raise ValueError(
                "SpecGenerator takes no `speculation_seed`: a batch of Ray Data does not know which rows it holds, so "
                "all batches would get the same seeds. `hf-specdec generate --seed` numbers the rows"
            )
        if generate_options.get("num_return_sequences") not in (None, 1):
            raise ValueError("SpecGenerator gives each row one text: repeat rows instead of `num_return_sequences`")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pair = SpecPair.from_pretrained(target, draft, **{"device_map": device} | (load_options or {}))
        self.column, self.on_error = column, on_error
        self._options = generate_options | {"batch_size": together, "num_return_sequences": 1}
        torch.seed()  # else all actors would draw the same numbers

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with more columns."""
        if self.column not in batch:
            raise ValueError(f"`column` {self.column!r} is not in the batch, which has {', '.join(batch)}")
        values = [value.tolist() if isinstance(value, np.ndarray) else value for value in batch[self.column]]
        found: list[dict[str, Any]] = [{} for _ in values]
        for result in texts_for(self.pair, values, **self._options):
            if result.error is not None and self.on_error == "raise":
                raise ValueError(f"row {result.index} of a batch cannot be decoded: {result.error}") from result.error
            found[result.index] = columns_of(result)
        made = {
            "generated_text": _objects([row["text"] for row in found]),
            "generated_tokens": _objects([np.array(row["tokens"], np.int64) for row in found]),
            "finish_reason": _objects([row["finish_reason"] for row in found]),
            "error": _objects([row["error"] for row in found]),
        }
        made |= {name: np.array([row["statistics"][name] for row in found]) for name in (*COUNTERS, "seconds")}
        if taken := sorted(made.keys() & batch.keys()):
            raise ValueError(f"the batch has a column {taken[0]!r} already: rename it")
        return batch | made


def _objects(values: list[Any]) -> np.ndarray:
    """`[rows]`, of any kind: NumPy would make a table of lists of equal length."""
    made = np.empty(len(values), object)
    for row, value in enumerate(values):
        made[row] = value
    return made
