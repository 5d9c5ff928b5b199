"""Early exit: a model's first layers, norm and head draft for the whole model (LayerSkip, Elhoushi et al. 2024).

The parts are *views*: models of the same class that share all modules but their list of layers, where stand-ins take
the place of the layers that do not run. So the model's own code embeds tokens, makes masks and applies norm and head,
and neither its modules nor its config are touched.

Keys and values of the first layers are those of the whole model, so drafts are written to the target's own cache. What
left the first layers is kept, and verification goes on from there.
"""

import functools
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..device import model_device
from ..sampling.context import Context
from .answers import Answer, Differs, ask, check_same, ordinary_tokens
from .cached import CachedModel
from .probes import Vanilla, make_cached_model


class EarlyExit:
    """Views of a model that runs its first layers for drafts, and the others for verification.

    Args:
        model: a model whose decoder has one list of layers.
        layers: how many of them draft, 1 or more, and fewer than there are.

    Attributes:
        draft: the first layers, norm and head.
        states_only: the same without the head, where that can be told apart.
        rest: the layers after them; begins with the kept states.
    """

    def __init__(self, model: PreTrainedModel, layers: int):
        path = layers_path(model)
        every = list(model.get_submodule(path))
        self._tap = _Tap(every[layers - 1])
        after = [_StandIn(layer, self._tap.again) for layer in every[layers:]]
        before = [_StandIn(layer, self._given) for layer in every[:layers]]
        self.draft = _view(model, {path: nn.ModuleList([*every[: layers - 1], self._tap, *after])})
        self.rest = _view(model, {path: nn.ModuleList([*before, *every[layers:]])})
        head: Any = model.get_output_embeddings()
        place = _path_of(head, model)
        self.states_only = _view(self.draft, {place: _NoHead(len(head.weight))}) if place else self.draft

    def forget(self) -> None:
        """New drafts begin: drop the kept states."""
        self._tap.outputs.clear()

    def resumed(self, width: int) -> PreTrainedModel | None:
        """What runs the next forward, over the first `width` tokens that were drafted; `None` if no state is kept."""
        states = [output[0] if isinstance(output, tuple) else output for output in self._tap.outputs]
        if not states or any(s.ndim != 3 for s in states) or sum(s.shape[1] for s in states) < width:
            return None
        whole = torch.cat(states, dim=1)[:, :width]
        self._whole = (whole,) if isinstance(self._tap.outputs[0], tuple) else whole
        return self.rest

    @property
    def is_plain(self) -> bool:
        """Whether layers hand on nothing but hidden states."""
        return all(isinstance(o, Tensor) or (isinstance(o, tuple) and len(o) == 1) for o in self._tap.outputs)

    def _given(self) -> Any:
        return self._whole


class _StandIn(nn.Module):
    """Takes the place of a layer that does not run. It has the layer's attributes, since models ask for some."""

    def __init__(self, layer: nn.Module, output: Any):
        super().__init__()
        vars(self).update(layer=layer, output=output)  # not as a module: its parameters are not ours

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output()


class _NoHead(nn.Module):
    """Takes the place of a head whose logits nobody reads."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self._vocab_size = vocab_size

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self._vocab_size)


class _Tap(nn.Module):
    """Runs a layer and keeps what it returns."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.outputs: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        own = vars(self)["_modules"]
        return own[name] if name in own else getattr(own["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.outputs.append(self.layer(*args, **kwargs))
        return self.outputs[-1]

    def again(self) -> Any:
        return self.outputs[-1]


def layers_path(model: PreTrainedModel, user: str = "`assistant_early_exit`") -> str:
    """The name of the module list that holds the layers of a model's decoder.

    Args:
        user: what needs it, for the message.

    Raises:
        ValueError: if there is not exactly one list with as many modules as the config has layers.
    """
    decoder = model.get_decoder()
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    inside = _path_of(decoder, model)
    found = [
        f"{inside}.{name}" if inside else name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        lists = "no list" if not found else f"{len(found)} lists ({', '.join(found)})"
        raise ValueError(
            f"{user} needs the list of layers of {type(model).__name__}, but its decoder has {lists} "
            f"of {count} modules: pass a draft model as `assistant_model`"
        )
    return found[0]


def resumes(model: PreTrainedModel, layers: int) -> Answer:
    """Whether verification may go on from the states after the first `layers`: it gets the same logits."""
    return ask(model, ("goes on after layers", layers), functools.partial(_go_on, model, layers))


def _go_on(model: PreTrainedModel, layers: int, seed: int) -> None:
    """Three drafts after a text: verification after the first layers gets the logits of a whole one."""
    vanilla = Vanilla(model)
    *text, a, b, c = ordinary_tokens(model, 9, seed)
    vanilla.check_asked(text, closely=seed > 0)
    ids = torch.tensor([text], device=model_device(model))
    context = Context(ids, [0], max_length=len(text) + 4, pad_token_id=0)
    target = make_cached_model(model, context, ragged=True)
    target.prefill(context)
    context.write_drafts(torch.tensor([[a, b, c]], device=ids.device))
    expected = target.forward(context, 4).logits
    target.commit(context)

    early = EarlyExit(model, layers)
    drafts = CachedModel(early.draft, target.cache, target.layout, encoded=target.encoded)
    for _ in range(4):
        drafts.forward(context, 1)
    if not early.is_plain:
        raise Differs("has layers that hand on more than hidden states")
    target.commit(context)
    target.early = early
    got = target.forward(context, 4).logits
    check_same(
        model, got[0], expected[0], vanilla.noise, f"returns different logits when it goes on after {layers} layers"
    )


def _view(model: PreTrainedModel, replaced: dict[str, nn.Module]) -> PreTrainedModel:
    """A model that shares the modules of another one, except for the replaced ones and those that contain them."""
    copies: dict[str, nn.Module] = {"": _copy(model)}
    for path, module in replaced.items():
        *parents, last = path.split(".")
        for depth in range(1, len(parents) + 1):
            name = ".".join(parents[:depth])
            if name not in copies:
                copies[name] = _copy(model.get_submodule(name))
                copies[".".join(parents[: depth - 1])]._modules[parents[depth - 1]] = copies[name]
        copies[".".join(parents)]._modules[last] = module
    view: Any = copies[""]
    return view


def _copy(module: nn.Module) -> nn.Module:
    """A module with the same parameters, submodules and attributes. Methods that were put on it belong to the copy."""
    copy: nn.Module = object.__new__(type(module))
    vars(copy).update(vars(module))
    vars(copy)["_modules"] = dict(module._modules)
    for name, value in vars(module).items():  # accelerate, for one, puts a `forward` on modules
        if isinstance(value, types.MethodType) and value.__self__ is module:
            vars(copy)[name] = types.MethodType(value.__func__, copy)
        elif isinstance(value, functools.partial) and module in _of_type(value.args, nn.Module):
            args = [copy if argument is module else argument for argument in value.args]
            vars(copy)[name] = functools.partial(value.func, *args, **value.keywords)
    return copy


def _of_type(values: Iterable[Any], kind: type) -> list[Any]:
    return [value for value in values if isinstance(value, kind)]


def _path_of(wanted: nn.Module | None, model: nn.Module) -> str:
    """The name of a module inside of a model; empty for the model itself, or a module that is not in it."""
    return next((name for name, module in model.named_modules() if module is wanted), "")
