"""Tiny random models of every class that transformers can generate with, and drafts that agree with them in part."""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .tiny_configs import FIRST_SPECIAL, shrink

_MAPPINGS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
_MOST_PARAMETERS = 20_000_000


class NotBuildable(Exception):
    """Why no tiny model of a class was made here."""


@dataclass(frozen=True)
class Entry:
    """A class of a mapping.

    Attributes:
        name: of the class.
        model_type: the config's.
        mappings: the mappings of transformers that list it.
    """

    name: str
    model_type: str
    mappings: tuple[str, ...]


def entries() -> list[Entry]:
    """Every class of the mappings once, in alphabetical order."""
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
    return sorted(result, key=lambda entry: entry.name.lower())


def _own_type(name: str, types: list[str]) -> str:
    """Of several config types that lead to a class, the one that the class names as its own."""
    if len(types) == 1:
        return types[0]
    own = getattr(_class(name), "config_class", None)
    return next((t for t in types if t in CONFIG_MAPPING and CONFIG_MAPPING[t] is own), types[0])


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def tiny_config(entry: Entry) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[entry.model_type]
    config = config_class(**shrink(config_class()))
    own = getattr(_class(entry.name), "config_class", None) or type(config)
    if not isinstance(config, own):  # the class is the decoder of a larger model
        config = next((c for c in vars(config).values() if isinstance(c, own)), config)
    if entry.mappings == ("CAUSAL_LM",) and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def build(entry: Entry, seed: int = 0, **kwargs: Any) -> PreTrainedModel:
    """A tiny random model in float32 without an EOS token, whose argmax gaps are real."""
    try:
        model_class = _class(entry.name)
        config = tiny_config(entry)
        if kwargs:
            config._attn_implementation = kwargs["attn_implementation"]
        with torch.device("meta"):
            size = model_class._from_config(copy.deepcopy(config), dtype=torch.float32)
        parameters = sum(p.numel() for p in size.parameters())
        if parameters > _MOST_PARAMETERS:
            large = sorted(((p.numel(), n, tuple(p.shape)) for n, p in size.named_parameters()), reverse=True)[:4]
            raise NotBuildable(f"not shrunk: {parameters / 1e6:.0f}M parameters, {large}")
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=torch.float32).eval()
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
    """Make every weight matter: what was initialised too small is enlarged, embeddings do not drown the layers, and no
    output is tied to them, which makes random models repeat their last token. Ids that stand for images are never said.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        embedding, head = None, model.get_output_embeddings()
        with contextlib.suppress(NotImplementedError):
            embedding = getattr(model.get_input_embeddings(), "weight", None)
        if head is not None and isinstance(getattr(head, "weight", None), Tensor):
            if head.weight is embedding or model.config.is_encoder_decoder:
                head.weight = torch.nn.Parameter(0.2 * torch.randn(head.weight.shape, generator=generator))
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
    """A copy that agrees with `model` only in part: each weight matrix gets relative Gaussian noise."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return draft


def prompts(batch: int, width: int, seed: int, side: str = "left") -> dict[str, Tensor]:
    """`batch` prompts of uneven lengths, padded to `width`; the first one fills it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, FIRST_SPECIAL, (batch, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        padding = int(torch.randint(1, width - 1, (1,), generator=generator))
        mask[row, slice(None, padding) if side == "left" else slice(width - padding, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
