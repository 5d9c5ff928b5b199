"""Builders shared by the tests: tiny models with real argmax gaps, and drafts that agree only in part."""

import copy
import random
import re
import string
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pretend_cuda
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)
from transformers.utils import logging

from hf_specdec import SpeculationStats, options
from hf_specdec.generate import strategy
from hf_specdec.kernels import packing
from hf_specdec.loop.optimal import Optimal
from hf_specdec.tools import lossless

# A second thread only slows down such small matrices, by a lot if the machine is shared.
torch.set_num_threads(1)

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _sized(config: type[PreTrainedConfig], **changes: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: config(**{k: v for k, v in {**SIZES, **changes}.items() if v != "drop"})


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _sized(LlamaConfig),
    "mistral": _sized(MistralConfig, sliding_window=None),
    "mistral-sliding": _sized(MistralConfig, sliding_window=12),
    "qwen2": _sized(Qwen2Config),
    "qwen3": _sized(Qwen3Config, head_dim=8),
    "gemma": _sized(GemmaConfig, head_dim=8),
    "gemma2": _sized(Gemma2Config, head_dim=8, sliding_window=12),
    "phi": _sized(PhiConfig),
    "stablelm": _sized(StableLmConfig, head_dim="drop"),
    "mixtral": _sized(MixtralConfig, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    ),
    "gpt_neox": _sized(GPTNeoXConfig, num_key_value_heads="drop"),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, init_std=0.2,
        max_position_embeddings=256, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    ),
    "falcon": lambda: FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
        new_decoder_architecture=True, num_kv_heads=2, alibi=False, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    ),
    "falcon-alibi": lambda: FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
        alibi=True, multi_query=True, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    ),
    "bloom": lambda: BloomConfig(
        vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    ),
}  # fmt: skip


def make_model(config: PreTrainedConfig, seed: int = 0, **kwargs: Any) -> PreTrainedModel:
    """A randomly initialised float32 model, with no EOS token unless a test sets one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kwargs).eval()
    model.generation_config.pad_token_id = 0
    return model


def perturbed(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A copy that agrees only partly with `model`: each weight matrix gets relative Gaussian noise."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim >= 2:
                parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return draft


def make_pair(name: str, noise: float = 0.12, seed: int = 0, **kwargs: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    target = make_model(ARCHITECTURES[name](), seed, **kwargs)
    return target, perturbed(target, noise, seed + 1)


def make_prompts(batch: int, width: int = 14, seed: int = 0) -> dict[str, torch.Tensor]:
    """`batch` prompts of uneven lengths, left-padded to `width` (the first one fills it)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (batch, width), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        padding = int(torch.randint(0, width, (1,), generator=generator))
        mask[row, :padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def repeating_prompts(batch: int) -> dict[str, torch.Tensor]:
    """The same, ending in six tokens that each row has had just before."""
    prompts = make_prompts(batch, seed=batch)
    prompts["input_ids"][:, -6:] = prompts["input_ids"][:, -12:-6]
    prompts["attention_mask"][:, -12:] = 1
    return prompts


# What `pytest --under NAME` adds to each call with strategy="spec": other paths to the same tokens.
PATHS: dict[str, dict[str, Any]] = {
    "optimal": {"num_assistant_tokens_schedule": "optimal"},
    "static": {"cache_implementation": "static"},
    "packed": {},
    "compiled": {"speculation_compile": "attention"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--under", choices=sorted(PATHS), help="speculate under this schedule, kind of cache, ...")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--under") == "compiled":
        SIZES["head_dim"] = 32  # compiled attention needs heads at least this wide


@pytest.fixture(autouse=True, scope="session")
def cache_of_these_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Per-machine files go to a temporary folder: no user file is read or written, not even by child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def path_under_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    path = PATHS.get(request.config.getoption("--under"), {})
    speculate = strategy.STRATEGIES["spec"]

    def under_path(original: Any, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return speculate(original, model, *args, **path | kwargs)

    if path:
        monkeypatch.setitem(strategy.STRATEGIES, "spec", under_path)
    if "num_assistant_tokens_schedule" in path:
        # With measured times it would hardly ever draft here: tiny targets cost no more than their drafts.
        plan, rng = Optimal.plan, random.Random(0)

        def wander(self: Optimal, *args: int) -> int:
            return rng.randint(0, self._max_gamma) if plan(self, *args) >= 0 else 0

        monkeypatch.setattr(Optimal, "plan", wander)


@pytest.fixture(autouse=True)
def drafts_that_do_not_go_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default schedule depends on measured times, so the same call may draft differently: tests opt in by name."""
    monkeypatch.setitem(options.DEFAULTS, "num_assistant_tokens_schedule", "constant")


@pytest.fixture(autouse=True)
def weights_as_they_are(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing must not depend on measured times either."""
    if request.config.getoption("--under") == "packed":
        request.getfixturevalue("weights_packed_from_the_first_token_on")
    else:
        monkeypatch.setitem(options.DEFAULTS, "speculation_pack_weights", False)


@pytest.fixture
def weights_packed_from_the_first_token_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls here are too short, and models too small, to benefit."""
    monkeypatch.setitem(options.DEFAULTS, "speculation_pack_weights", None)
    monkeypatch.setattr(packing, "MIN_NEW_TOKENS", 0)
    monkeypatch.setattr(packing, "_gains_by_it", lambda weight: True)


@pytest.fixture(autouse=True)
def scripts_that_leave_no_settings() -> Iterator[None]:
    """Scripts silence transformers in their own process, which here is the tests' process."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def cuda() -> Iterator[pretend_cuda.Device]:
    """A simulated CUDA device."""
    with pretend_cuda.device() as device:
        yield device


@pytest.fixture(scope="session")
def evaluate_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`evaluate` copies modules into a cache, which must stay the same while a process lives."""
    evaluate = pytest.importorskip("evaluate")
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", folder / "metrics")
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        (folder / "modules").mkdir()
        patch.syspath_prepend(folder / "modules")  # a user's cache, which transformers may have added, comes later
        yield


@pytest.fixture(scope="session")
def llama_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny Llama and a draft that it agrees with about half of the time."""
    return make_pair("llama")


@pytest.fixture(scope="session")
def small_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Even cheaper, with one layer each; half of the model's drafts are accepted, and a fifth of look-up's."""
    target = make_model(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}), seed=12)
    return target, perturbed(target, 0.08, seed=13)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair tokens of one and two letters, so strings can end inside tokens; some tokens end words or lines."""
    letters = string.ascii_lowercase
    pairs = [(a, " ") for a in letters[:20]] + [(a, "\n") for a in letters[20:]]
    pairs += [(a, letters[(i + shift) % 26]) for shift in (3, 7) for i, a in enumerate(letters)][: VOCAB - 56]
    tokens = ["<pad>", "<bos>", *letters, " ", "\n", *("".join(pair) for pair in pairs)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>")


def ways_to_draft(draft: PreTrainedModel, gammas: tuple[int, ...] = (1, 5)) -> dict[str, dict[str, Any]]:
    """Arguments of `generate()` for speculation, by name: with a draft model, and with prompt look-up."""
    ways: dict[str, dict[str, Any]] = {
        f"γ={gamma}": {"strategy": "spec", "assistant_model": draft, "num_assistant_tokens": gamma} for gamma in gammas
    }
    ways["look-up"] = {"strategy": "spec", "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    return ways


def assert_lossless(
    pair: tuple[PreTrainedModel, PreTrainedModel],
    inputs: dict[str, Any],
    fresh: Callable[[], dict[str, Any]] = dict,
    gammas: tuple[int, ...] = (1, 5),
) -> torch.Tensor:
    """Every drafting method gives vanilla's tokens. `fresh` makes the other arguments anew for each call.

    Returns: vanilla's tokens, prompt included.
    """
    target, draft = pair

    def tokens(**way: Any) -> torch.Tensor:
        output = target.generate(**inputs, **way, **fresh())
        return output if isinstance(output, torch.Tensor) else output.sequences

    expected = tokens()
    for name, way in ways_to_draft(draft, gammas).items():
        given = tokens(**way)
        assert given.tolist() == expected.tolist(), f"{name}: {given.tolist()} instead of {expected.tolist()}"
    return expected


class Fragment(HTMLParser):
    """A parsed `_repr_html_`, checked to affect nothing else on the page and to suit light and dark pages.

    Attributes:
        tables: for each table its lines, headers included, as lists of the text in their cells.
        chips: (text, style) of each.
        text: what is outside of tables.
    """

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.chips: list[tuple[str, str]] = []
        self.text = ""
        self.feed(shown._repr_html_())
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"div", "table", "tr", "th", "td", "span", "br"}  # no script, no style sheet, no link
        found = {name: value or "" for name, value in attrs}
        assert found.keys() <= {"style", "title"}  # no ids and classes either, which the page may have too
        style = dict(part.split(": ") for part in found.get("style", "").split("; ") if part)
        assert "color" not in style and "url" not in found.get("style", "") and style.get("position") is None
        if "background" in style:
            alpha = re.fullmatch(r"rgba\(\d+, \d+, \d+, (\.\d+)\)", style["background"])
            assert alpha and float(alpha[1]) <= 0.3
        if tag != "br":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "span":
            self.chips.append(("", found["style"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "span" in self.open:
            self.chips[-1] = (self.chips[-1][0] + data, self.chips[-1][1])
        if "table" not in self.open:
            self.text += data
        else:
            self.tables[-1][-1][-1] += data


def assert_same_but_for_ties(target: PreTrainedModel, inputs: dict[str, torch.Tensor], **way: Any) -> None:
    """For half precision: tokens may differ from vanilla's if rounding decides, by the rule of `check_lossless`."""
    new_tokens = way.pop("max_new_tokens", 24)
    expected = lossless.decode(target, inputs, new_tokens)
    given = lossless.decode(target, inputs, new_tokens, strategy="spec", **way)
    rounding = lossless.Rounding()
    for prompt, row in zip(lossless.unpadded(inputs), expected):
        rounding.add(row, lossless.plain_logits(target, prompt, row.tokens))
    for number, rows in enumerate(zip(expected, given, strict=True)):
        verdict, why = lossless.compare(number, *rows, target.dtype).judge(rounding.noise)
        assert verdict != lossless.BUG, f"row {number}: {why}"


def generate_with(target: Any, draft: Any = None, **kwargs: Any) -> Any:
    """Greedy `generate()`: vanilla without a draft, else with strategy='spec', which must really have run."""
    kwargs = {"do_sample": False, "max_new_tokens": 14, **kwargs}
    if draft is None:
        return target.generate(**kwargs)
    stats = SpeculationStats()
    out = target.generate(**{"strategy": "spec", **kwargs}, assistant_model=draft, speculation_stats=stats)
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    return out
