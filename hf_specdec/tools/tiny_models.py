"""Tiny random models of every class that transformers can generate with, and drafts that agree with them in part."""

import contextlib
import copy
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import transformers.models
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .tiny_configs import FIRST_SPECIAL, shrink

_MAPPINGS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
_MOST_PARAMETERS = 20_000_000


class NotBuildable(Exception):
    """No tiny model of a class could be built; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A class that has a `generate()`.

    Attributes:
        name: the class's name.
        model_type: its config's.
        mappings: transformers' mappings that list it; none if only its own module does.
        module: the module that defines it, if `transformers` does not export it.
    """

    name: str
    model_type: str
    mappings: tuple[str, ...] = ()
    module: str = "transformers"


def entries() -> list[Entry]:
    """Every class in the text mappings, once, in alphabetical order; listing them imports nothing."""
    found: dict[str, dict[str, list[str]]] = {}
    for mapping in _MAPPINGS:
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {})
        for model_type, classes in names.items():
            for name in classes if isinstance(classes, (list, tuple)) else [classes]:
                found.setdefault(name, {}).setdefault(model_type, []).append(mapping)
    result = []
    for name, types in found.items():
        mappings = tuple(dict.fromkeys(m for ms in types.values() for m in ms))
        result.append(Entry(name, _own_type(name, list(types)), mappings))
    return _sorted(result)


def every_entry() -> list[Entry]:
    """`entries()` and every other class of transformers that has a `generate()`. Imports all modeling files."""
    found = {entry.name: entry for entry in entries()}
    for model_class in _generating_classes():
        name, config_class = model_class.__name__, getattr(model_class, "config_class", None)
        if name not in found:
            module = "transformers" if hasattr(transformers, name) else model_class.__module__
            found[name] = Entry(name, getattr(config_class, "model_type", ""), module=module)
    return _sorted(list(found.values()))


def _sorted(found: list[Entry]) -> list[Entry]:
    return sorted(found, key=lambda entry: entry.name.lower())


def _generating_classes() -> Iterator[Any]:
    for package in pkgutil.iter_modules(transformers.models.__path__, "transformers.models."):
        for module in pkgutil.iter_modules(importlib.import_module(package.name).__path__, f"{package.name}."):
            if not module.name.rpartition(".")[2].startswith("modeling_"):
                continue
            try:
                members = vars(importlib.import_module(module.name))
            except ImportError:  # a package is missing; today no such file defines a class that generates
                continue
            for member in list(members.values()):
                own = inspect.isclass(member) and member.__module__ == module.name
                if own and issubclass(member, PreTrainedModel) and hasattr(member, "generate"):
                    yield member


def _own_type(name: str, types: list[str]) -> str:
    """The config type that a class names as its own, if several lead to it."""
    if len(types) == 1:
        return types[0]
    own = getattr(getattr(transformers, name), "config_class", None)
    return next((t for t in types if t in CONFIG_MAPPING and CONFIG_MAPPING[t] is own), types[0])


def _class(entry: Entry) -> Any:
    return getattr(importlib.import_module(entry.module), entry.name)


def tiny_config(entry: Entry) -> PreTrainedConfig:
    own: Any = getattr(_class(entry), "config_class", None)
    known = entry.model_type in CONFIG_MAPPING
    config_class = CONFIG_MAPPING[entry.model_type] if known else own
    config = config_class(**shrink(config_class()))
    own = own or type(config)
    if not isinstance(config, own):  # the class is the decoder of a larger model
        config = next((c for c in vars(config).values() if isinstance(c, own)), config)
    if entry.mappings == ("CAUSAL_LM",) and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def build(entry: Entry, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any) -> PreTrainedModel:
    """A tiny random model without an EOS token, whose argmax gaps are real."""
    try:
        model_class = _class(entry)
        if not issubclass(model_class, GenerationMixin):
            raise NotBuildable("its `generate()` is not that of GenerationMixin, so no decoding method can be chosen")
        config = tiny_config(entry)
        if kwargs:
            config._attn_implementation = kwargs["attn_implementation"]
        with torch.device("meta"):
            size = model_class._from_config(copy.deepcopy(config), dtype=dtype)
        parameters = sum(p.numel() for p in size.parameters())
        if parameters > _MOST_PARAMETERS:
            large = sorted(((p.numel(), n, tuple(p.shape)) for n, p in size.named_parameters()), reverse=True)[:4]
            raise NotBuildable(f"not shrunk: {parameters / 1e6:.0f}M parameters, {large}")
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=dtype).eval()
    except NotBuildable:
        raise
    except Exception as error:
        raise NotBuildable(f"{type(error).__name__}: {error}") from error
    if not model.can_generate():
        raise NotBuildable("the class cannot generate")
    _enlarge(model)
    _plain_generation_config(model)
    return model


def _enlarge(model: PreTrainedModel) -> None:
    """Make every weight matter: weights initialised too small are enlarged, embeddings do not drown out the layers, and
    no output is tied to them, since that makes random models repeat their last token. Image ids are never generated.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embedding, head = None, model.get_output_embeddings()
        with contextlib.suppress(NotImplementedError):
            embedding = getattr(model.get_input_embeddings(), "weight", None)
        if head is not None and isinstance(getattr(head, "weight", None), Tensor):
            if head.weight is embedding or model.config.is_encoder_decoder:
                random = 0.2 * torch.randn(head.weight.shape, generator=generator)
                head.weight = torch.nn.Parameter(random.to(head.weight.dtype))
            head.weight[FIRST_SPECIAL:] = 0
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.is_floating_point():
                continue
            std = float(parameter.std())
            if not std > 0:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif std < 0.1 or (std > 0.2 and parameter is embedding):
                parameter.mul_(0.2 / std)


def _plain_generation_config(model: PreTrainedModel) -> None:
    old = model.generation_config
    plain = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    for name in ("decoder_start_token_id", "cache_implementation"):
        setattr(plain, name, getattr(old, name, None))
    if model.config.is_encoder_decoder and plain.decoder_start_token_id is None:
        plain.decoder_start_token_id = 2
    model.generation_config = plain


def perturbed(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A copy that agrees only partly with `model`: each weight matrix gets relative Gaussian noise."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return draft


def prompts(batch: int, width: int, seed: int, side: str = "left") -> dict[str, Tensor]:
    """`batch` prompts of uneven lengths, padded to `width`; the first one fills it.

    The lengths of the others come from equal parts of the range, so that some start within a window and some beyond it.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, FIRST_SPECIAL, (batch, width), generator=generator)
    mask = torch.ones_like(ids)
    for row, part in enumerate(torch.randperm(batch - 1, generator=generator).tolist(), start=1):
        low, high = (1 + (width - 2) * edge // (batch - 1) for edge in (part, part + 1))
        padding = int(torch.randint(low, max(high, low + 1), (1,), generator=generator))
        mask[row, slice(None, padding) if side == "left" else slice(width - padding, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
