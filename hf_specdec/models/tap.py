"""Tap: the hidden states of a target's own forwards, for drafters that are heads on them.

Hooks on the target's layers read the states while one of its forwards runs, and hand them over right after it: those of
a prompt chunk by chunk, as it is fed. Nothing is kept here. transformers can return some hidden states too
(`output_hidden_states=[2, 5]`), but the hooks that it installs for that stay on the model, and make all later calls
slower.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .early_exit import layers_path

FINAL = -1  # stands for what the decoder returns: the last layer's states after the final norm

# Takes the states of a forward, one tensor `[rows, width, hidden]` per id; which rows of the batch these are; and the
# context's column of each row's first state.
Reader = Callable[[list[Tensor], list[int], list[int]], None]


class Tap:
    """Reads hidden states of a model until it is closed.

    Args:
        model: a model whose decoder has one list of layers.
        ids: i stands for the states before layer i, so the number of layers stands for those before the final norm;
            FINAL for those after it.
        reader: is given the states of each forward.
        whole: of all tokens. Else those of tokens without logits may be left out.

    Raises:
        ValueError: for a model without a list of layers, or an id that it does not have.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], reader: Reader, whole: bool = True):
        self._model = model
        self._ids = list(ids)
        self._reader = reader
        self._heard: list[list[Tensor]] = [[] for _ in ids]
        self._thread: int | None = None  # of the forward in progress; others may run the model at the same time
        # Layers on the entries of others are run only where logits are asked for.
        shared = getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0)
        self.needs_all = whole and bool(shared)
        layers = list(model.get_submodule(layers_path(model, "A head on hidden states")))
        check_ids(self._ids, len(layers), type(model).__name__)
        self._handles = [self._listen(heard, layers, i) for heard, i in zip(self._heard, self._ids)]

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, this thread runs one of the model's forwards."""
        for heard in self._heard:
            heard.clear()
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    @property
    def width(self) -> int:
        """Of how many tokens per row it has heard states in the last forward: the last ones."""
        return sum(states.shape[1] for states in self._heard[0])

    def hand_over(self, rows: list[int], columns: list[int]) -> None:
        """Give the states of the last forward to the reader.

        Args:
            rows: of the batch, in the forward's order.
            columns: by row, the context's column of its first token.

        Raises:
            ValueError: if they are not one vector per token.
        """
        found = [_joined(heard) for heard in self._heard]
        for heard in self._heard:
            heard.clear()
        for i, states in zip(self._ids, found):
            if states is None or states.ndim != 3 or len(states) != len(rows) or states.shape[:2] != found[0].shape[:2]:
                shape = "none" if states is None else f"shape {list(states.shape)}"
                raise ValueError(
                    f"The hidden states of {type(self._model).__name__} cannot be tapped: expected "
                    f"[{len(rows)}, tokens, hidden size] for {_name(i)}, found {shape}. Pass a draft model as "
                    "`assistant_model`, not a head"
                )
        self._reader(found, rows, columns)

    def _listen(self, heard: list[Tensor], layers: list[nn.Module], i: int) -> Any:
        """A hook that reads the states with one id."""

        def add(states: Any) -> None:
            if self._thread == threading.get_ident():
                heard.append(states)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            add(args[0] if args else kwargs["hidden_states"])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            add(output if isinstance(output, Tensor) else output[0])

        if i == FINAL:
            return self._model.get_decoder().register_forward_hook(after)
        if i == len(layers):
            return layers[-1].register_forward_hook(after)
        return layers[i].register_forward_pre_hook(before, with_kwargs=True)


def check_ids(ids: Sequence[int], layers: int, model: str) -> None:
    """Raise a ValueError for ids that a model with so many layers does not have."""
    wrong = [i for i in ids if i != FINAL and not 0 <= i <= layers]
    if wrong:
        raise ValueError(
            f"`assistant_model` is a head on the hidden states before layers {list(ids)}, but {model} has {layers} "
            f"layers, so {wrong[0]} does not exist: use a head that was trained for this model"
        )


def _name(i: int) -> str:
    return "the decoder's output" if i == FINAL else f"the states before layer {i}"


def _joined(heard: list[Tensor]) -> Any:
    """The states of all parts of a forward: `generate()` may read a prompt in chunks."""
    if len(heard) < 2:
        return heard[0] if heard else None
    return torch.cat(heard, dim=1)
