"""Quality of continuations, vanilla and speculative side by side, compared prompt by prompt.

Owns the metrics of a set of continuations, the `evaluate` modules that compute them, and the interval of a difference.
Generates continuations on request; prints nothing.

A *run* is one continuation per prompt, `run[prompt] = [token, ...]`, cut after the first end token. Greedy decoding
has one run per method, sampling one per seed.
"""

import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..metrics import path as metric_path
from ..pairs.pair import DEMO_PAIR
from ..records.stats import SpeculationStats
from . import bootstrap
from .arguments import Prompt

Run = list[list[int]]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """One metric for both methods.

    Attributes:
        name: the metric.
        vanilla, speculative: `[prompts]`, one value per prompt (the mean over its runs).
        scale: converts the mean over prompts to the figure shown; perplexity is the exponential of a mean.
    """

    name: str
    vanilla: np.ndarray
    speculative: np.ndarray
    scale: Callable[[Any], Any] = np.asarray

    @property
    def means(self) -> tuple[float, float]:
        """The figures shown for vanilla and speculative."""
        return float(self.scale(self.vanilla.mean())), float(self.scale(self.speculative.mean()))

    @property
    def difference(self) -> float:
        """Speculative minus vanilla."""
        return self.means[1] - self.means[0]

    @property
    def equal(self) -> bool:
        """Whether both have the same value for every prompt."""
        return bool(np.array_equal(self.vanilla, self.speculative))

    def to_dict(self, interval: bool) -> dict[str, Any]:
        """The figures in tables, as plain JSON types, with the difference's interval if there are enough prompts."""
        vanilla, speculative = self.means
        shown = {"vanilla": vanilla, "speculative": speculative, "difference": self.difference, "equal": self.equal}
        if not interval or len(self.vanilla) < bootstrap.LEAST:
            return shown
        low, high = self.interval()
        return shown | {"interval": [low, high], "contains_0": low <= 0 <= high}

    def interval(self) -> tuple[float, float]:
        """The 95 % percentile bootstrap interval of the difference; prompts are resampled with both methods' values."""

        def difference(drawn: np.ndarray) -> np.ndarray:
            vanilla, speculative = (self.scale(v[drawn].mean(axis=1)) for v in (self.vanilla, self.speculative))
            return np.asarray(speculative - vanilla)

        return bootstrap.interval(len(self.vanilla), difference)


@dataclass(frozen=True)
class TextMetric:
    """An `evaluate` module that compares one text with a reference.

    Attributes:
        module: the module.
        names: its scores: the name in tables -> the key in its results.
    """

    module: Any
    names: dict[str, str]

    @classmethod
    def load(cls, name: str) -> "TextMetric":
        """Load by Hub name or path. Scores: the result named like the module, or "score", or else all floats."""
        import evaluate

        module, short = evaluate.load(name, keep_in_memory=True), Path(name).stem
        result = module.compute(predictions=["a b c d"], references=["a b c d"])
        key = next((key for key in (short, "score") if key in result), None)
        names = {short: key} if key else {k: k for k, value in result.items() if isinstance(value, float)}
        if not names:
            raise ValueError(f"expected a result called {short!r} or 'score', or floats, got {result}")
        return cls(module, names)

    def scores(self, text: str, reference: str) -> dict[str, float]:
        try:
            result = self.module.compute(predictions=[text], references=[reference])
        except ZeroDivisionError:  # bleu's, if the text is empty
            return dict.fromkeys(self.names, 0.0)
        return {name: float(result[key]) for name, key in self.names.items()}


def generate(target: PreTrainedModel, batches: Iterable[Batch], seed: int, **options: Any) -> Run:
    """One run over all batches, with `torch` seeded once; `options` are passed to `target.generate`."""
    torch.manual_seed(seed)
    eos = target.generation_config.eos_token_id
    ends = set() if eos is None else set(torch.tensor(eos).flatten().tolist())
    run = []
    for batch in batches:
        for row in target.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist():
            length = next((at for at, token in enumerate(row, start=1) if token in ends), len(row))
            run.append(row[:length])
    return run


@torch.no_grad()
def nats_per_token(target: PreTrainedModel, batches: Iterable[Batch], run: Run) -> list[float]:
    """For each prompt, the mean of −log p(token | prompt, tokens before it) over its continuation.

    p is the target's own distribution, before any logits processor and at temperature 1. One forward per batch; prompts
    with continuations are right-padded, so that positions count from 0 in any model. The exponential is the perplexity.
    """
    means, continuations = [], iter(run)
    for batch in batches:
        prompts = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
        texts = [torch.cat([ids, ids.new_tensor(next(continuations))]) for ids in prompts]
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True)
        logits = target(input_ids=padded, attention_mask=mask, use_cache=False).logits
        for row, prompt, text in zip(logits, prompts, texts):
            predicting = row[len(prompt) - 1 : len(text) - 1].float()
            means.append(float(torch.nn.functional.cross_entropy(predicting, text[len(prompt) :])))
    return means


def distinct_bigrams(tokens: list[int]) -> float:
    """The share of a continuation's pairs of adjacent tokens that are distinct; 1.0 if there are no pairs."""
    pairs = list(itertools.pairwise(tokens))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def compare_runs(vanilla: list[Run], speculative: list[Run], agreement: Any) -> list[Comparison]:
    """The metrics that need no reference: agreement with vanilla, length, distinct bigrams.

    Greedy runs are compared with vanilla's. Sampled runs differ even within one method, so each is compared with
    vanilla's runs of *other* seeds. So are vanilla's own runs, which shows the agreement by chance.

    Args:
        vanilla, speculative: equally many runs of each, over the same prompts.
        agreement: the `evaluate` module token_agreement.
    """
    pairs = list(itertools.permutations(range(len(vanilla)), 2)) or [(0, 0)]
    others = [tokens for _, other in pairs for tokens in vanilla[other]]
    figures = []
    for runs in vanilla, speculative:
        own = [tokens for index, _ in pairs for tokens in runs[index]]
        results = agreement.compute(predictions=own, references=others, use_aggregator=False)
        lengths = [[float(len(tokens)) for tokens in run] for run in runs]
        distinct = [[distinct_bigrams(tokens) for tokens in run] for run in runs]
        figures.append(
            {
                "exact match, vanilla": _by_prompt(results["exact_match"], len(pairs)),
                "token agreement, vanilla": _by_prompt(results["token_agreement"], len(pairs)),
                "tokens": np.mean(lengths, axis=0),
                "distinct bigrams": np.mean(distinct, axis=0),
            }
        )
    return [Comparison(name, figures[0][name], figures[1][name]) for name in figures[0]]


def compare_perplexity(
    target: PreTrainedModel, batches: list[Batch], vanilla: list[Run], speculative: list[Run]
) -> Comparison:
    """Perplexity of the continuations under the target, given their prompts: exp of the mean over prompts and runs."""
    nats = [np.mean([nats_per_token(target, batches, run) for run in runs], axis=0) for runs in (vanilla, speculative)]
    return Comparison("perplexity", nats[0], nats[1], np.exp)


def compare_with_references(
    prompts: list[Prompt],
    vanilla: list[Run],
    speculative: list[Run],
    tokenizer: PreTrainedTokenizerBase,
    agreement: Any,
    metrics: list[TextMetric],
) -> list[Comparison]:
    """Compare continuations with the prompts' references; prompts without one are left out.

    Exact match compares texts without surrounding white space, token agreement compares tokens by position, and
    `metrics` score each continuation separately.
    """
    known = [(i, str(prompt.reference)) for i, prompt in enumerate(prompts) if has_reference(prompt)]
    references = [reference.strip() for _, reference in known]
    reference_tokens = [tokenizer(reference, add_special_tokens=False)["input_ids"] for _, reference in known]
    figures = []
    for runs in vanilla, speculative:
        tokens = [run[i] for run in runs for i, _ in known]
        texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
        repeated = references * len(runs)
        exact = agreement.compute(predictions=texts, references=repeated, use_aggregator=False)["exact_match"]
        by_position = agreement.compute(
            predictions=tokens, references=reference_tokens * len(runs), use_aggregator=False
        )["token_agreement"]
        scores = {"exact match, reference": exact, "token agreement, reference": by_position}
        for metric in metrics:
            each = [metric.scores(text, reference) for text, reference in zip(texts, repeated)]
            scores |= {name: [row[name] for row in each] for name in metric.names}
        figures.append({name: _by_prompt(values, len(runs)) for name, values in scores.items()})
    return [Comparison(name, figures[0][name], figures[1][name]) for name in figures[0]]


def has_reference(prompt: Prompt) -> bool:
    """Whether the reference contains anything but white space."""
    return bool((prompt.reference or "").strip())


def load_metric(name: str) -> Any:
    """One of our own `evaluate` modules."""
    import evaluate

    return evaluate.load(metric_path(name), keep_in_memory=True)


def load_text_metrics(names: list[str]) -> tuple[list[TextMetric], dict[str, str]]:
    """The metrics that load and work, and for each of the others the reason, by name."""
    import evaluate

    evaluate.config.HF_EVALUATE_OFFLINE = evaluate.config.HF_EVALUATE_OFFLINE or not _hub_answers()
    metrics, missing = [], {}
    for name in names:
        try:
            metrics.append(TextMetric.load(name))
        except FileNotFoundError as error:
            offline = evaluate.config.HF_EVALUATE_OFFLINE
            missing[name] = "no such folder, not in the cache, and the Hub is out of reach" if offline else str(error)
        except Exception as error:  # whatever a third-party module raises, the others still work
            missing[name] = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return metrics, missing


def acceptance(stats: SpeculationStats) -> dict[str, Any]:
    """The results of our module acceptance_rate over all iterations that `stats` counted."""
    metric = load_metric("acceptance_rate")
    for iteration in stats.iterations:
        metric.add_batch(predictions=iteration["accepted"], references=iteration["drafted"])
    return dict(metric.compute(committed_tokens=stats.committed_tokens))


def with_true_continuations(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> list[Prompt]:
    """The embedded pair's held-out prompts, with the `new_tokens` tokens that follow them in the standard library.

    They are cut from modules of Python 3.11.7. `reference` stays `None` if this Python's module differs or has no
    source, or if a chat template was applied.
    """
    lines = (DEMO_PAIR / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for prompt in prompts:
        row = next((row for row in rows if row["text"].startswith(prompt.text)), None)
        path = library / row["module"] if row else None
        source = path.read_text(encoding="utf-8") if path and path.is_file() else ""
        start = source.find(row["text"]) if row else -1
        if start >= 0:
            following = tokenizer(source[start + len(prompt.text) :], add_special_tokens=False)["input_ids"]
            prompt = replace(prompt, reference=tokenizer.decode(following[:new_tokens]))
        found.append(prompt)
    return found


def _hub_answers() -> bool:
    """Checked once, because `evaluate` ignores HF_HUB_OFFLINE and waits 100 s per file if the Hub does not answer."""
    import evaluate
    import requests

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in evaluate.config.ENV_VARS_TRUE_VALUES:
        return False
    try:
        requests.head(evaluate.config.HF_ENDPOINT, timeout=5)
    except requests.RequestException:
        return False
    return True


def _by_prompt(values: list[float], runs: int) -> np.ndarray:
    """`[runs * prompts]`, run after run -> `[prompts]`, means over runs."""
    return np.reshape(values, (runs, -1)).mean(axis=0)
