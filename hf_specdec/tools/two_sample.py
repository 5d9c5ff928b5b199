"""Whether sampled continuations follow vanilla's distribution: a two-sample test, and how small a bias it would find.

Equally many continuations are drawn both ways. Each token, and each pair of adjacent tokens, is compared by a
chi-squared test whose statistic is summed over the prompts. For two samples of n outcomes each, from distributions p
and q, the statistic is chi-squared with non-centrality n·Σ(p − q)²/(p + q). By Cauchy-Schwarz that is at least 2n·δ²,
where δ is the total variation between p and q over the cells compared: the power holds for any bias of size δ, in any
direction.

In a low-precision dtype, two correct programs draw from distributions that differ by rounding. So the null hypothesis
is not "equal" but "at most twice as far apart as vanilla and a plain forward of the target", measured without our
code: a non-central chi-squared distribution.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..pairs.pair import SpecPair
from ..records.stats import SpeculationStats
from .arguments import Prompt, encode
from .lossless import Way, cut

ALARM = 1e-3  # probability that a run fails by chance
POWER = 0.9
NEW_TOKENS = 4  # per continuation
PROMPT_TOKENS = 16  # per prompt; few, since it is prefilled once per continuation
ROWS = 100  # continuations drawn per call
RARE = 10  # outcomes seen less often, in both samples together, share one cell
SAMPLING: dict[str, Any] = {"do_sample": True, "max_new_tokens": NEW_TOKENS, "num_return_sequences": ROWS}

Outcome = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """One test: the tokens `[begin, end)` of all continuations.

    Attributes:
        statistic, freedom: summed over the prompts.
        granted: the non-centrality that rounding explains.
        p_value: of this test alone; a run makes `tests` of them, and fails if any p-value is below ALARM / tests.
        detectable: the bias that this test finds with probability POWER; `None` if there is nothing to compare.
    """

    begin: int
    end: int
    statistic: float
    freedom: int
    granted: float
    p_value: float
    detectable: float | None

    @property
    def name(self) -> str:
        return f"token {self.end}" if self.end - self.begin == 1 else f"tokens {self.begin + 1} and {self.end}"


@dataclass
class SampledResult:
    """Continuations drawn in one way, compared with vanilla's."""

    way: Way
    samples: int  # on each side, over all prompts
    tests: int  # of the whole run
    views: list[View]
    stats: SpeculationStats

    @property
    def p_value(self) -> float:
        """The way's p-value, corrected for all tests of the run (Bonferroni)."""
        return min(1.0, self.tests * min(view.p_value for view in self.views))

    @property
    def differs(self) -> bool:
        return self.p_value < ALARM

    def to_dict(self) -> dict[str, Any]:
        return {
            "drafter": self.way.drafter,
            "gamma": self.way.gamma,
            "samples": self.samples,
            "p_value": self.p_value,
            "alarm": ALARM,
            "power": POWER,
            "differs": self.differs,
            "acceptance_rate": round(self.stats.acceptance_rate, 4),
            "block_efficiency": round(self.stats.block_efficiency, 3),
            "drafted_tokens": self.stats.drafted_tokens,
            "accepted_tokens": self.stats.accepted_tokens,
            "views": [asdict(view) | {"name": view.name} for view in self.views],
        }


def check_sampled(
    pair: SpecPair,
    prompts: list[Prompt],
    ways: list[Way],
    samples: int,
    advance: Callable[[], None] = lambda: None,
) -> list[SampledResult]:
    """Draw continuations of NEW_TOKENS tokens with vanilla and in each way, and compare their distributions.

    Args:
        pair, prompts: the target continues the first PROMPT_TOKENS tokens of each prompt, by its generation config.
        ways: their batch sizes are ignored.
        samples: continuations per prompt and way, a multiple of ROWS.
        advance: called after each ROWS continuations.
    """
    spans = [(i, i + 1) for i in range(NEW_TOKENS)] + [(i, i + 2) for i in range(NEW_TOKENS - 1)]
    tests = len(spans) * len(ways)
    stats = [SpeculationStats() for _ in ways]
    sums = [[(0.0, 0)] * len(spans) for _ in ways]
    distance = 0.0

    def draw(inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
        rows: list[list[int]] = []
        while len(rows) < samples:
            output = pair.target.generate(**inputs, **SAMPLING, **options)
            rows += cut(output[:, inputs["input_ids"].shape[1] :], pair.target)
            advance()
        return rows

    for prompt in prompts:
        inputs = encode([prompt], pair.tokenizer, pair.target.device)
        inputs = {name: tensor[:, :PROMPT_TOKENS] for name, tensor in inputs.items()}
        distance += rounding_of_laws(pair.target, inputs) / len(prompts)
        vanilla = draw(inputs)
        for number, way in enumerate(ways):
            rows = draw(inputs, **way.options(pair), speculation_stats=stats[number])
            for i, (begin, end) in enumerate(spans):
                counts = [Counter(tuple(row[begin:end]) for row in source) for source in (vanilla, rows)]
                statistic, freedom = chi_squared(counts[0], counts[1])
                sums[number][i] = sums[number][i][0] + statistic, sums[number][i][1] + freedom

    total = samples * len(prompts)

    def view(span: tuple[int, int], statistic: float, freedom: int) -> View:
        # Twice the difference in logits is four times the distance, and the distances of prefixes add up.
        granted = 4 * total * distance * span[1]
        if freedom == 0:
            return View(*span, statistic, freedom, granted, 1.0, None)
        detectable = detectable_bias(total, freedom, ALARM / tests, POWER, granted)
        return View(*span, statistic, freedom, granted, tail(statistic, freedom, granted), detectable)

    return [
        SampledResult(way, total, tests, [view(span, *s) for span, s in zip(spans, sums[i])], stats[i])
        for i, way in enumerate(ways)
    ]


@torch.inference_mode()
def rounding_of_laws(target: PreTrainedModel, inputs: dict[str, Tensor]) -> float:
    """The distance between vanilla's and a plain forward's next-token distributions: the mean Σ(p − q)²/(p + q).

    From the second new token on: vanilla takes the first one from a plain forward itself.
    """
    out = target.generate(**inputs, **SAMPLING, return_dict_in_generate=True, output_logits=True)
    width = inputs["input_ids"].shape[1]
    if len(out.logits) == 1:
        return 0.0
    vanilla = torch.stack(out.logits[1:], dim=1).double().softmax(-1)
    plain = target(input_ids=out.sequences[:, :-1], use_cache=False).logits[:, width:].double().softmax(-1)
    terms = (vanilla - plain) ** 2 / (vanilla + plain).clamp(min=torch.finfo(torch.float64).tiny)
    return float(terms.sum(-1).mean())


# -------------------------------------------------------------------------------------------------------- the statistic


def chi_squared(first: Counter[Outcome], second: Counter[Outcome]) -> tuple[float, int]:
    """The statistic and its degrees of freedom, from the counts of each outcome in two samples of equal size."""
    both = first + second
    common = [x for x, count in both.most_common() if count >= RARE]
    rare = both.total() - sum(both[x] for x in common)
    if 0 < rare < RARE and common:  # too few for their own cell: merged with the smallest one
        common.pop()
    cells = [(first[x], second[x]) for x in common]
    rest = [sample.total() - sum(sample[x] for x in common) for sample in (first, second)]
    if any(rest):
        cells.append((rest[0], rest[1]))
    return sum((a - b) ** 2 / (a + b) for a, b in cells), max(len(cells) - 1, 0)


def tail(statistic: float, freedom: int, noncentrality: float = 0.0) -> float:
    """The probability that a (non-central) chi-squared variable is at least `statistic`: a Poisson mixture of tails."""
    half = noncentrality / 2
    spread = 10 * math.sqrt(half) + 40
    j = torch.arange(max(int(half - spread), 0), int(half + spread) + 1, dtype=torch.float64)
    log_weight = j * math.log(half) - half - torch.lgamma(j + 1) if half else torch.where(j == 0, 0.0, -math.inf)
    tails = torch.special.gammaincc(freedom / 2 + j, torch.full_like(j, statistic / 2))
    return min(float((log_weight.exp() * tails).sum()), 1.0)


def critical_value(freedom: int, significance: float, noncentrality: float = 0.0) -> float:
    """The statistic whose tail is `significance`."""
    return _solve(lambda x: tail(x, freedom, noncentrality) < significance)


def detectable_bias(samples: int, freedom: int, significance: float, power: float, noncentrality: float = 0.0) -> float:
    """The total variation that the test finds with probability `power`, at most 1.

    Args:
        samples: size of each sample, over all contexts whose statistics were summed; the bias is then the root mean
            square over contexts.
        freedom, significance: of the test.
        noncentrality: allowed by the null hypothesis (see `tail`).
    """
    threshold = critical_value(freedom, significance, noncentrality)
    needed = _solve(lambda x: tail(threshold, freedom, x) > power)
    return min(math.sqrt(needed / (2 * samples)), 1.0)


def _solve(reached: Callable[[float], bool]) -> float:
    """The smallest positive number for which `reached` holds; it must hold for all larger ones."""
    low, high = 0.0, 1.0
    while not reached(high):
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
