"""Acceptance rate of speculative decoding, as an `evaluate` module; it only needs `evaluate`."""

import math
from typing import Any

# With `from evaluate import Metric`, evaluate.load() would mistake the base class for the module's own class.
import datasets
import evaluate

_DESCRIPTION = """
How many of a draft model's tokens the target model accepted in speculative decoding.

A block is one iteration for one row: the draft proposes some tokens, the target accepts the first few of them and adds
one token of its own. The acceptance rate α is the share of proposed tokens that were accepted; the block efficiency τ
is the number of tokens that one forward of the target yields for a row (1 without speculation).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of int): for each block, how many drafted tokens were accepted.
    references (list of int): for each block, how many tokens were drafted; 0 is allowed.
    committed_tokens (int, optional): how many tokens all blocks together added to their rows. By default every block
        adds its accepted tokens and one more; a row that ended at an accepted token (EOS) added fewer.
Returns:
    acceptance_rate (float): α, accepted / drafted tokens; 0.0 if nothing was drafted.
    acceptance_rate_interval (list of two floats): its 95 % confidence interval over blocks.
    block_efficiency (float): τ, committed tokens / blocks.
    mean_accepted_length (float): accepted tokens / blocks.
    acceptance_by_position (list of float): entry i is the share of (i + 1)-th drafts that were accepted, which needs
        all drafts before them accepted too.
    accepted_length_histogram (list of int): entry k counts the blocks in which k drafts were accepted.
    blocks, drafted_tokens, accepted_tokens (int): the counts from which the rates are computed.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("hf_specdec/metrics/acceptance_rate")
    >>> results = metric.compute(predictions=[4, 1, 3, 0], references=[4, 4, 4, 4])
    >>> results["acceptance_rate"], results["block_efficiency"]
    (0.5, 3.0)
    >>> results["acceptance_by_position"], results["accepted_length_histogram"]
    ([0.75, 0.5, 0.5, 0.25], [1, 1, 0, 1, 1])
    >>> [round(bound, 2) for bound in results["acceptance_rate_interval"]]
    [0.17, 0.83]

    With `SpeculationStats` of hf_specdec, or its `to_dict()` read back from JSON:

    >>> iterations = [{"rows": [0, 1], "drafted": [4, 4], "accepted": [4, 2]}, {"rows": [1], "drafted": [4], "accepted": [0]}]
    >>> for iteration in iterations:
    ...     metric.add_batch(predictions=iteration["accepted"], references=iteration["drafted"])
    >>> metric.compute()["acceptance_rate"]
    0.5
"""  # noqa: E501 (an example is one line)

_CITATION = """
@inproceedings{leviathan2023fast,
  title     = {Fast Inference from Transformers via Speculative Decoding},
  author    = {Leviathan, Yaniv and Kalman, Matan and Matias, Yossi},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  url       = {https://arxiv.org/abs/2211.17192}
}
"""

Z = 1.959964  # the normal distribution's 97.5 % point


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AcceptanceRate(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        # float64, because `datasets` would silently truncate 2.7 to an int64; `_check` rejects it.
        count = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": count, "references": count}),
            reference_urls=["https://arxiv.org/abs/2211.17192", "https://arxiv.org/abs/2302.01318"],
        )

    def _compute(
        self, predictions: list[float], references: list[float], committed_tokens: int | None = None
    ) -> dict[str, Any]:
        _check(predictions, references)
        accepted, drafted = [int(a) for a in predictions], [int(d) for d in references]
        blocks, accepted_tokens, drafted_tokens = len(accepted), sum(accepted), sum(drafted)
        if committed_tokens is None:
            committed_tokens = accepted_tokens + blocks
        if not accepted_tokens <= committed_tokens <= accepted_tokens + blocks:
            raise ValueError(
                f"expected committed_tokens between {accepted_tokens} (the accepted ones) and "
                f"{accepted_tokens + blocks} (one more per block), got {committed_tokens}"
            )
        positions = range(max(drafted, default=0))
        return {
            "acceptance_rate": accepted_tokens / drafted_tokens if drafted_tokens else 0.0,
            "acceptance_rate_interval": interval(accepted, drafted),
            "block_efficiency": committed_tokens / blocks,
            "mean_accepted_length": accepted_tokens / blocks,
            "acceptance_by_position": [sum(a > i for a in accepted) / sum(d > i for d in drafted) for i in positions],
            "accepted_length_histogram": [accepted.count(k) for k in range(max(accepted, default=0) + 1)],
            "blocks": blocks,
            "drafted_tokens": drafted_tokens,
            "accepted_tokens": accepted_tokens,
        }


def interval(accepted: list[int], drafted: list[int]) -> list[float]:
    """Wilson's 95 % interval of α, `[low, high]`, with the *effective* number of independent drafts as trials.

    The drafts of a block are accepted up to the first rejected one, so they are not independent trials; blocks are
    assumed to be independent. The variance of α over blocks (linearised, as for any ratio of sums) tells how many
    independent drafts would be as informative: α(1 − α) / variance, and at most the number of drafts. If blocks show
    no variance (all or none accepted, a single block), each block counts as one trial.

    If nothing was drafted: `[0.0, 1.0]`.
    """
    pairs = [(a, d) for a, d in zip(accepted, drafted) if d]
    blocks, total = len(pairs), sum(drafted)
    if not blocks:
        return [0.0, 1.0]
    rate = sum(accepted) / total
    variance = blocks / max(blocks - 1, 1) * sum((a - rate * d) ** 2 for a, d in pairs) / total**2
    trials = min(rate * (1 - rate) / variance, total) if variance and blocks > 1 else blocks
    middle = rate + Z**2 / (2 * trials)
    half = Z * math.sqrt(rate * (1 - rate) / trials + Z**2 / (4 * trials**2))
    scale = 1 + Z**2 / trials
    return [max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)]


def _check(predictions: list[float], references: list[float]) -> None:
    if not predictions:
        raise ValueError("expected at least one block, got none")
    for block, (a, d) in enumerate(zip(predictions, references)):
        if a is None or d is None or a != int(a) or d != int(d) or not 0 <= a <= d:
            raise ValueError(
                "expected whole numbers with 0 <= accepted (predictions) <= drafted (references), got "
                f"{a} accepted of {d} drafted in block {block}"
            )
