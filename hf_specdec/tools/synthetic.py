"""Untrained pairs of any size: big random ones, and the embedded pair with the cost of a large model.

For measuring speed where no weights can be downloaded. Each docstring says how often target and draft agree, and why.
"""

import argparse
import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..pairs.pair import DEMO_PAIR, SpecPair
from ..pairs.pair_file import ModelReference, PairConfig
from .arguments import load_pair

KINDS = ("big", "medium", "embedded-big")
_MEDIUM = {"layers": 12, "hidden_size": 768, "intermediate_size": 2304}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("synthetic pairs")
    add = group.add_argument
    add("--synthetic", choices=KINDS, help="instead of a pair: `big`, a random Llama of 300M whose first two layers "
        "draft; `medium`, one of 90M; `embedded-big`, the embedded pair with a 300M target that computes the "
        "same")  # fmt: skip
    add("--random-draft", action="store_true", help="give the draft random weights, so that it never agrees")


def load(args: argparse.Namespace) -> SpecPair:
    """Load the pair that the arguments of `add_pair_arguments` and `add_arguments` describe."""
    if args.synthetic is None:
        pair = load_pair(args)
    else:
        if args.pair or args.target:
            raise SystemExit("expected --synthetic, or --pair or --target, got both")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, "float32" if args.dtype == "auto" else args.dtype)
        if args.synthetic == "embedded-big":
            pair = embedded_big_pair(dtype, device)
        else:
            pair = big_pair(dtype, device, **(_MEDIUM if args.synthetic == "medium" else {}))
    if args.random_draft:
        if not isinstance(pair.draft, PreTrainedModel):
            raise SystemExit(f"--random-draft is for draft models, but the pair's is a {type(pair.draft).__name__}")
        pair.draft, pair.sources = random_like(pair.draft), None
    return pair


def big_pair(
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    layers: int = 24,
    hidden_size: int = 1024,
    intermediate_size: int = 3072,
    draft_layers: int = 2,
    epsilon: float = 0.03,
    seed: int = 0,
) -> SpecPair:
    """A random Llama of 306M parameters with its first layers as the draft, and the embedded pair's tokenizer.

    The layers after the draft's are scaled down by `epsilon`, so the draft mostly agrees: about four times in five at
    0.03, half of the time at 0.08.
    """
    tokenizer = AutoTokenizer.from_pretrained(DEMO_PAIR / "target")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(hidden_size // 128, 1),
        max_position_embeddings=32768,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    target, draft = llama_pair(config, dtype, device, draft_layers=draft_layers, epsilon=epsilon, seed=seed)
    return SpecPair(target, draft, tokenizer, _config("big"))


def llama_pair(
    config: LlamaConfig, dtype: torch.dtype, device: str = "cpu", *, draft_layers: int, epsilon: float, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random Llama and a draft of its first layers, which share their tensors; both are made on the device.

    The layers after the draft's are scaled down by `epsilon`: the smaller, the more often the draft agrees.
    """
    target = _random_llama(config, dtype, device, seed)
    scale_later_layers(target, draft_layers, epsilon)
    return target, first_layers(target, draft_layers)


@torch.no_grad()
def scale_later_layers(target: PreTrainedModel, first: int, factor: float) -> None:
    """Multiply what the layers from number `first` on add to the residual stream."""
    for layer in target.model.layers[first:]:
        layer.self_attn.o_proj.weight *= factor
        layer.mlp.down_proj.weight *= factor


def tune_agreement(target: PreTrainedModel, draft: PreTrainedModel, wanted: float, tokens: int = 256) -> float:
    """Scale the layers after the draft's until the two agree on a share of about `wanted` of a random text's tokens.

    For a draft of the target's first layers. Returns the share that was reached.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.config.vocab_size, (1, tokens), generator=generator).to(target.device)

    @torch.inference_mode()
    def choices(model: PreTrainedModel) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits.argmax(dim=-1)

    drafted, layers = choices(draft), draft.config.num_hidden_layers
    factor, low, high, agreement = 1.0, 0.01, 100.0, 0.0
    for _ in range(12):
        agreement = float((choices(target) == drafted).float().mean())
        if abs(agreement - wanted) < 0.04:
            break
        low, high = (factor, high) if agreement > wanted else (low, factor)
        scale_later_layers(target, layers, (low * high) ** 0.5 / factor)
        factor = (low * high) ** 0.5
    return agreement


def first_layers(target: PreTrainedModel, count: int) -> PreTrainedModel:
    """A draft of the target's first layers, embeddings, norm and head; it shares the target's weights."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    with torch.device("meta"):
        draft = AutoModelForCausalLM.from_config(config)
    draft.load_state_dict(target.state_dict(), strict=False, assign=True)
    draft.model.rotary_emb = target.model.rotary_emb
    draft.generation_config = copy.deepcopy(target.generation_config)
    return draft.eval()


def embedded_big_pair(
    dtype: torch.dtype, device: str = "cpu", *, layers: int = 48, intermediate_size: int = 10240
) -> SpecPair:
    """The embedded pair with an enlarged target: realistic text and acceptance at the cost ratio of a large model."""
    pair = SpecPair.from_pretrained(str(DEMO_PAIR), dtype=dtype, device_map=device)
    pair.target = enlarged(pair.target, layers, intermediate_size)
    pair.config = _config("embedded-big")
    return pair


def enlarged(model: PreTrainedModel, layers: int, intermediate_size: int, seed: int = 0) -> PreTrainedModel:
    """A Llama that computes the same function as `model` with more layers and wider MLPs.

    The layers appended to its own add nothing (`o_proj` and `down_proj` are zero), nor do the columns added to each
    `down_proj`; all other new weights are random, so that they cost what weights cost.
    """
    config = copy.deepcopy(model.config)
    own, width = config.num_hidden_layers, config.intermediate_size
    if layers < own or intermediate_size < width:
        raise ValueError(
            f"expected at least {own} layers and an intermediate size of {width}, got {layers} and {intermediate_size}"
        )
    config.num_hidden_layers, config.intermediate_size = layers, intermediate_size
    big = _random_llama(config, model.dtype, str(model.device), seed)
    with torch.no_grad():
        for layer in big.model.layers:
            layer.mlp.down_proj.weight.zero_()
        for layer in big.model.layers[own:]:
            layer.self_attn.o_proj.weight.zero_()
        theirs = model.state_dict()
        for name, parameter in big.state_dict().items():
            if name in theirs:
                part = tuple(slice(size) for size in theirs[name].shape)
                parameter[part] = theirs[name]
    big.generation_config = copy.deepcopy(model.generation_config)
    return big


def random_like(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """A model of the same shape with random weights and untied embeddings, so that it agrees with nothing."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    torch.manual_seed(seed)
    fresh = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device)
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.eval()


def _random_llama(config: LlamaConfig, dtype: torch.dtype, device: str, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _config(name: str) -> PairConfig:
    return PairConfig(ModelReference(f"synthetic {name} target"), ModelReference(f"synthetic {name} draft"))
