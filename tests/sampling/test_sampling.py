"""Sampling: `generate(do_sample=True, strategy="spec")` draws from exactly the distribution that vanilla draws from.

Vocabularies are so small that the law of all continuations can be computed, by feeding every prefix to the target and
to transformers' own logits processors. Samples are compared with it: all continuations at once and the marginals of one
and two tokens (chi-squared), and, most powerful where a wrong acceptance rule lets the draft through, the mean
log-likelihood ratio of the draft's law to the target's. The smallest p-value counts, times the number of tests.

Many rows of one call are many samples of short continuations. For a single row the target is a Markov chain instead:
then each token of one long call is a sample, of a known row of the transition matrix.

False alarms: with a new seed or another torch a case fails by chance with probability ALARM = 1e-4; with seeds fixed as
they are, never. Power: `test_a_bias_of_two_percent_would_be_seen`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import SIZES, make_model, perturbed
from torch import Tensor
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.rwkv.modeling_rwkv import RwkvCausalLMOutput

from hf_specdec import Draft, Drafter, Either, RowProcessor, SpeculationStats, SuffixDrafter

ALARM = 1e-4
SAMPLES = 20_000
ROWS = 500  # per call

Law = np.ndarray  # one axis per new token

VOCAB = 10
CONFIG: dict[str, Any] = SIZES | {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "initializer_range": 0.6,
}


class Rotate(LogitsProcessor):
    """An unknown processor, so it is called step by step; its effect depends on the length."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.linspace(0, 1.5, scores.shape[1]).roll(input_ids.shape[1] % 3)


def processors(**options: Any) -> LogitsProcessorList:
    """The processors that transformers builds from these arguments of `generate()`, in its order."""
    known: list[tuple[str, Callable[[Any], LogitsProcessor]]] = [
        ("repetition_penalty", RepetitionPenaltyLogitsProcessor),
        ("logits_processor", lambda processors: processors[0]),
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ]
    return LogitsProcessorList([make(options[name]) for name, make in known if options.get(name)])


# -------------------------------------------------------------------------------------------------------- exact laws


@torch.no_grad()
def exact_law(model: PreTrainedModel, prompt: list[int], new_tokens: int, process: LogitsProcessorList) -> Law:
    """The distribution of the next tokens after one prompt."""
    law = torch.ones(1, dtype=torch.float64)
    ids = torch.tensor([prompt])
    for _ in range(new_tokens):
        distributions = process(ids, model(ids).logits[:, -1].float()).softmax(-1).double()
        law = (law[:, None] * distributions).flatten()
        tokens = torch.arange(VOCAB).repeat(len(ids))[:, None]
        ids = torch.cat([ids.repeat_interleave(VOCAB, dim=0), tokens], dim=1)
    return (law / law.sum()).view([VOCAB] * new_tokens).numpy()


def marginals(joint: np.ndarray) -> list[np.ndarray]:
    """Of each token, and of each two adjacent ones."""
    axes = range(joint.ndim)
    kept = [(i,) for i in axes] + [(i, i + 1) for i in axes[:-1]]
    return [joint.sum(axis=tuple(i for i in axes if i not in keep)) for keep in kept]


def chi_squared(counts: np.ndarray, law: np.ndarray) -> float:
    """The p-value of samples drawn in several contexts: `[contexts, outcomes]` counts and probabilities."""
    statistic, freedom = 0.0, 0
    for seen, p in zip(counts, law, strict=True):
        expected = p * seen.sum()
        if (seen[p == 0] > 0).any():
            return 0.0
        small = expected < 5  # these are pooled
        if 0 < expected[small].sum() < 5 and not small.all():  # the pool takes the next larger one as well
            small |= expected == expected[~small].min()
        seen, expected = (np.append(x[~small], x[small].sum()) for x in (seen, expected))
        seen, expected = seen[expected > 0], expected[expected > 0]
        statistic += ((seen - expected) ** 2 / expected).sum()
        freedom += max(len(seen) - 1, 0)
    return float(scipy.stats.chi2.sf(statistic, freedom))


def likelihood_ratio(counts: np.ndarray, law: np.ndarray, suspect: np.ndarray) -> float:
    """The p-value of the sum of log(suspect / law), whose mean and variance under `law` are known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(np.clip(np.log(suspect / law), -5, 5))
    mean = (law * ratio).sum(-1)
    variance = (law * ratio**2).sum(-1) - mean**2
    n = counts.sum(-1)
    score = ((counts * ratio).sum() - n @ mean) / np.sqrt(max(n @ variance, 1e-12))
    return float(2 * scipy.stats.norm.sf(abs(score)))


def check_continuations(target: PreTrainedModel, share: float, calls: int, **way: Any) -> None:
    """Three tokens after a prompt follow the target's law. A wrong one that would be seen has token 2 less often.

    Args:
        share: of its probability.
        calls: of `ROWS` samples each.
        way: to draft.
    """
    law = exact_law(target, [3, 4, 5], 3, processors(temperature=1.2))
    suspect = law.copy()
    suspect[2] *= share
    suspect /= suspect.sum()
    torch.manual_seed(0)
    stats, counts = SpeculationStats(), np.zeros(law.shape)
    for _ in range(calls):
        tokens = target.generate(
            torch.tensor([[3, 4, 5]]), strategy="spec", num_assistant_tokens=3, do_sample=True, top_k=0,
            temperature=1.2, max_new_tokens=3, num_return_sequences=ROWS, speculation_stats=stats, **way,
        )  # fmt: skip
        np.add.at(counts, tuple(tokens[:, 3:].numpy().T), 1)
    assert 0.05 < stats.acceptance_rate < 0.99
    assert p_value(counts, law, suspect) > ALARM


def p_value(counts: np.ndarray, law: Law, suspect: Law) -> float:
    """The p-value of these samples under `law`, as an upper bound."""
    views = [*zip(marginals(counts), marginals(law), strict=True), (counts, law)]
    tests = [chi_squared(n.reshape(1, -1), p.reshape(1, -1)) for n, p in views]
    tests.append(likelihood_ratio(*(x.reshape(1, -1) for x in (counts, law, suspect))))
    return min(1.0, min(tests) * len(tests))


# ------------------------------------------------------------------------------------------------------------ drafters


class Random(Drafter):
    """Random drafts of random lengths by row, with their true (uniform) `probs` or passed off as deterministic."""

    def __init__(self, honest: bool):
        self.honest = honest

    def propose(self, context: Any, max_tokens: int) -> Draft:
        shape = len(context.rows), max_tokens
        tokens = torch.randint(VOCAB, shape)
        probs = torch.full((*shape, VOCAB), 1 / VOCAB) if self.honest else None
        return Draft(tokens, probs, torch.randint(max_tokens + 1, shape[:1]).tolist())


class Mixing(Either):
    """In nearly all iterations some rows copy and others do not."""

    def expected(self, max_tokens: int) -> float:
        return float(torch.rand(1))


# --------------------------------------------------------------------------------------------------- many rows at once


@dataclass
class Case:
    """One call.

    Attributes:
        drafts: "model", "close model", "look-up", "either", or a drafter.
        options: of `generate()`; those that change the target's law are worked into it.
        prompts: real tokens of each row.
        new_tokens: of each row.
    """

    drafts: str | Drafter = "model"
    options: dict[str, Any] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=lambda: [[3, 4, 5]])
    new_tokens: int = 3


class Sums(RowProcessor):
    """A grammar on the sum of the new tokens after prompts of three. One sum in four leaves a single token."""

    def begin(self, prompts: Tensor) -> None:
        self.new: list[list[int]] = [[] for _ in prompts]

    def accept(self, row: int, token: int) -> None:
        self.new[row].append(token)

    def rollback(self, row: int, count: int) -> None:
        del self.new[row][-count:]

    def mask(self, row: int) -> Tensor:
        return self.masks(torch.tensor([sum(self.new[row])]))[0]

    @staticmethod
    def masks(sums: Tensor) -> Tensor:
        tokens = torch.arange(VOCAB)
        return torch.where((sums % 4 == 3)[:, None], tokens == 2, (tokens + sums[:, None]) % 3 != 0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # for `exact_law`, which asks in any order
        return scores.masked_fill(~self.masks(input_ids[:, 3:].sum(dim=1)), -torch.inf)


CASES = {
    "γ=3": Case(new_tokens=4, options={"num_assistant_tokens": 3}),
    "γ=1, hot": Case(options={"num_assistant_tokens": 1, "temperature": 1.5}),
    "block": Case(new_tokens=4, options={"num_assistant_tokens": 3, "speculation_acceptance": "block"}),
    "coupled": Case(options={"num_assistant_tokens": 3, "speculation_acceptance": "coupled", "top_k": 6}),
    "a close draft": Case("close model", options={"num_assistant_tokens": 3}, new_tokens=4),
    "cold, top-k": Case(options={"num_assistant_tokens": 3, "temperature": 0.7, "top_k": 4}),
    "top-p": Case(options={"num_assistant_tokens": 3, "top_p": 0.8}),
    "repetition penalty": Case(options={"num_assistant_tokens": 3, "repetition_penalty": 1.8}),
    "confidence threshold": Case(options={"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.4}),
    "everything": Case(
        new_tokens=4,
        options={
            "num_assistant_tokens": 3,
            "num_assistant_tokens_schedule": "heuristic_transient",
            "assistant_confidence_threshold": 0.3,
            "repetition_penalty": 1.4,
            "temperature": 1.3,
            "top_k": 8,
            "top_p": 0.9,
        },
    ),
    "four uneven prompts": Case(
        options={"num_assistant_tokens": 3, "repetition_penalty": 1.3, "temperature": 0.8},
        prompts=[[3, 4, 5, 6, 7], [8, 9], [2], [7, 3, 3]],
    ),
    "a grammar": Case(options={"num_assistant_tokens": 3, "logits_processor": [Sums()]}, new_tokens=4),
    "look-up": Case("look-up", options={"temperature": 0.7}, prompts=[[3, 5, 0, 4, 5, 0, 9, 5]]),
    "suffixes, other rows' too": Case(SuffixDrafter(max_requests=40), options={"num_assistant_tokens": 3}),
    "a model or suffixes": Case("either", options={"num_assistant_tokens": 3, "temperature": 0.8}),
    "random drafts, q one-hot": Case(Random(honest=False), options={"num_assistant_tokens": 3, "top_p": 0.95}),
    "random drafts, q uniform": Case(Random(honest=True), options={"num_assistant_tokens": 3, "top_k": 6}),
}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    target = make_model(LlamaConfig(**CONFIG))
    return {"target": target, "model": perturbed(target, 0.3), "close model": perturbed(target, 0.02)}


def law_and_suspect(case: Case, prompt: list[int], models: dict[str, PreTrainedModel]) -> tuple[Law, Law]:
    """The target's law after a prompt, and the draft's, to which a wrong rule would be biased (else a uniform one)."""
    process = processors(**case.options)
    law = exact_law(models["target"], prompt, case.new_tokens, process)
    name = "model" if case.drafts == "either" else case.drafts
    if isinstance(name, str) and name in models:
        return law, exact_law(models[name], prompt, case.new_tokens, process)
    return law, np.full_like(law, 1 / law.size)


def samples(case: Case, models: dict[str, PreTrainedModel]) -> tuple[np.ndarray, SpeculationStats]:
    """For each prompt, how often each continuation came."""
    draft = models.get(case.drafts) if isinstance(case.drafts, str) else case.drafts
    if case.drafts == "either":
        draft = Mixing(models["model"], SuffixDrafter(max_requests=40))
    width = max(map(len, case.prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in case.prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in case.prompts])
    options = {"top_k": 0} | case.options
    if case.drafts == "look-up":
        options |= {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}
    torch.manual_seed(0)
    stats = SpeculationStats()
    counts = np.zeros([len(ids), *[VOCAB] * case.new_tokens])
    for _ in range(SAMPLES // ROWS):
        output = models["target"].generate(
            ids,
            attention_mask=mask,
            strategy="spec",
            assistant_model=draft,
            do_sample=True,
            max_new_tokens=case.new_tokens,
            num_return_sequences=ROWS // len(ids),
            speculation_stats=stats,
            **options,
        )
        prompt = np.repeat(np.arange(len(ids)), ROWS // len(ids))
        np.add.at(counts, (prompt, *output[:, width:].numpy().T), 1)

    return counts, stats


# Slow: other cases together cover these.
LONG = (
    "suffixes, other rows' too",
    "cold, top-k",
    "top-p",
    "repetition penalty",
    "confidence threshold",
    "random drafts, q one-hot",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LONG)) for n in CASES])
def test_continuations_follow_the_targets_law(name, models):
    """20000 continuations of 3 or 4 tokens, against the exact law of each prompt."""
    case = CASES[name]
    counts, stats = samples(case, models)
    assert counts.sum() == SAMPLES
    assert 0.05 < stats.acceptance_rate < 0.99  # both outcomes of the acceptance test were frequent
    rows = zip(counts, case.prompts, strict=True)
    p_values = [p_value(seen, *law_and_suspect(case, prompt, models)) for seen, prompt in rows]
    assert min(p_values) > ALARM / len(p_values)


@pytest.mark.parametrize("name", ["γ=3", "a close draft", "cold, top-k", "random drafts, q uniform"])
def test_a_bias_of_two_percent_would_be_seen(name, models):
    """2% in total variation towards the draft is found in each of 20 such sets of samples; no bias, in none."""
    law, suspect = law_and_suspect(CASES[name], CASES[name].prompts[0], models)
    distance = np.abs(suspect - law).sum() / 2
    biased = law + 0.02 / distance * (suspect - law)
    rng = np.random.default_rng(0)
    for _ in range(20):
        unbiased, counts = (rng.multinomial(SAMPLES, x.ravel()).reshape(law.shape) for x in (law, biased))
        assert p_value(counts, law, suspect) < ALARM < p_value(unbiased, law, suspect)


# ------------------------------------------------------------------------------------------ one row, or four, at length


class MarkovModel(PreTrainedModel, GenerationMixin):
    """Its next token depends only on the last one. The cheapest possible model, so that single rows can be long."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: LlamaConfig, seed: int, noise: float = 0.0):
        super().__init__(config)
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(config.vocab_size, config.vocab_size, generator=generator)
        table += noise * torch.randn(table.shape, generator=generator)
        self.table = torch.nn.Parameter(table, requires_grad=False)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        assert input_ids is not None
        if past_key_values is not None:
            states = input_ids[:, None, :, None].float()
            past_key_values.update(states, states, 0)
        return CausalLMOutputWithPast(logits=self.table[input_ids], past_key_values=past_key_values)


STATES = 6
PHASES = 3  # of `Rotate`
CHAINS: dict[str, Case] = {
    "γ=3": Case(options={"num_assistant_tokens": 3}),
    "γ=1, cold": Case(options={"num_assistant_tokens": 1, "temperature": 0.7}),
    "look-up, top-p": Case("look-up", options={"top_p": 0.9}),
    "heuristic, threshold": Case(
        options={"num_assistant_tokens_schedule": "heuristic_transient", "assistant_confidence_threshold": 0.4}
    ),
    "step by step": Case(options={"num_assistant_tokens": 3, "logits_processor": [Rotate()]}),
}
ALONE_OR_TOGETHER = [("γ=3", 1), ("step by step", 4)]
# Slow, as above: with one row or four, the same happens in them.
ALONE_OR_TOGETHER += [
    pytest.param(name, rows, marks=pytest.mark.slow)
    for name, rows in (
        *(("γ=1, cold", 1), ("step by step", 1), ("look-up, top-p", 1)),
        *(("heuristic, threshold", rows) for rows in (1, 4)),
    )
]


@pytest.fixture(scope="module")
def chains() -> dict[str, PreTrainedModel]:
    sizes = {"vocab_size": STATES, "hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = LlamaConfig(**CONFIG | sizes | {"max_position_embeddings": 100_000})
    return {"target": MarkovModel(config, seed=0).eval(), "model": MarkovModel(config, seed=0, noise=0.5).eval()}


def transition_law(model: PreTrainedModel, process: LogitsProcessorList) -> np.ndarray:
    """`[PHASES, STATES, STATES]`: the law of the next token by number of columns (modulo PHASES) and by last token."""
    states = torch.arange(STATES)[:, None]
    logits = model(states).logits[:, -1]
    laws = [process(states.expand(-1, PHASES + phase), logits.clone()).softmax(-1) for phase in range(PHASES)]
    return torch.stack(laws).double().numpy()


def p_value_of_transitions(tokens: np.ndarray, width: int, law: np.ndarray, suspect: np.ndarray) -> float:
    """The p-value, as an upper bound, of the transitions in `tokens` `[rows, columns]` after `width` prompt columns."""
    rows, columns = tokens.shape
    counts = np.zeros([rows, PHASES, STATES, STATES, STATES])  # row, phase, last but one, last, next
    for column in range(width, columns):
        before, last, new = tokens[:, column - 2 : column + 1].T
        np.add.at(counts, (np.arange(rows), column % PHASES, before, last, new), 1)

    def view(keep: str, x: np.ndarray) -> np.ndarray:
        return np.einsum(f"rpbln->{keep}n", x).reshape(-1, STATES)

    by_row = chi_squared(view("rpl", counts), np.tile(law.reshape(-1, STATES), (rows, 1)))
    by_past = chi_squared(view("pbl", counts), np.repeat(law[:, None], STATES, axis=1).reshape(-1, STATES))
    ratio = likelihood_ratio(view("pl", counts), law.reshape(-1, STATES), suspect.reshape(-1, STATES))
    return min(1.0, 3 * min(by_row, by_past, ratio))


class CarryingModel(MarkovModel):
    """The same with its own state, the sum of all tokens, so that its own code feeds it."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, state: Any = None, **kwargs: Any
    ) -> RwkvCausalLMOutput:
        sums = input_ids.sum(dim=1) + (0 if state is None else state[0])
        return RwkvCausalLMOutput(logits=self.table[input_ids], state=[sums])


@pytest.fixture(scope="module")
def carrying_chains(chains) -> dict[str, PreTrainedModel]:
    noise = {"target": 0.0, "model": 0.5}
    return {name: CarryingModel(chains[name].config, seed=0, noise=noise[name]).eval() for name in chains}


@pytest.mark.parametrize(("name", "rows"), ALONE_OR_TOGETHER)
def test_each_token_of_a_long_call_follows_the_targets_law(name, rows, chains):
    """20000 tokens, in one row or in four uneven ones (in lockstep, as this model ignores masks)."""
    check_long_call(CHAINS[name], rows, chains)


@pytest.mark.parametrize(("name", "rows"), [("γ=3", 1), ("step by step", 4)])
def test_so_does_a_model_with_a_state_of_its_own(name, rows, carrying_chains):
    check_long_call(CHAINS[name], rows, carrying_chains)


def check_long_call(case: Case, rows: int, chains: dict[str, PreTrainedModel]) -> None:
    prompt = torch.tensor([[1, 2, 3], [0, 4, 1], [0, 0, 5], [2, 2, 2]])[:rows]
    options = {"top_k": 0} | case.options
    torch.manual_seed(1)
    stats = SpeculationStats()
    tokens = chains["target"].generate(
        prompt,
        attention_mask=(prompt > 0).long(),
        strategy="spec",
        assistant_model=chains.get(case.drafts) if isinstance(case.drafts, str) else case.drafts,
        do_sample=True,
        max_new_tokens=20_000 // rows,
        speculation_stats=stats,
        **options,
    )
    assert 0.05 < stats.acceptance_rate < 0.95
    process = processors(**options)
    law = transition_law(chains["target"], process)
    suspect = transition_law(chains["model"], process) if case.drafts == "model" else np.full_like(law, 1 / STATES)
    assert p_value_of_transitions(tokens.numpy(), prompt.shape[1], law, suspect) > ALARM


def test_a_bias_of_five_percent_would_be_seen_in_one_row(chains):
    """5% in total variation towards the draft, at each of 4000 tokens, a fifth of the draws in the test above."""
    law, draft = (transition_law(chains[name], processors()) for name in ("target", "model"))
    distance = np.abs(draft - law).sum(-1, keepdims=True) / 2
    biased = law + 0.05 / distance * (draft - law)
    rng = np.random.default_rng(0)

    def walk(p: np.ndarray) -> np.ndarray:
        tokens = [1, 2, 3]
        for column in range(3, 4003):
            tokens.append(int(np.searchsorted(np.cumsum(p[column % PHASES, tokens[-1]])[:-1], rng.random())))
        return np.array([tokens])

    for _ in range(5):
        seen, unseen = (p_value_of_transitions(walk(p), 3, law, draft) for p in (biased, law))
        assert seen < ALARM < unseen
