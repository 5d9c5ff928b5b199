"""Token agreement of two generated sequences, as an `evaluate` module; it only needs `evaluate`."""

from typing import Any

# With `from evaluate import Metric`, evaluate.load() would mistake the base class for the module's own class.
import datasets
import evaluate

_DESCRIPTION = """
How far two ways to generate agree, token by token, such as decoding with and without speculation.

Sequences are compared by position, without any alignment: after an insertion they agree only by chance. Two sequences
agree up to their first divergence; if one ends and the other continues, they diverge there.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of int, or list of str): sequences of token ids, without padding; or texts, which are
        compared character by character.
    references (the same type): the sequences to compare with.
    use_aggregator (bool): False gives lists with one entry per pair instead of means. Defaults to True.
Returns:
    exact_match (float): share of pairs that are identical, lengths included.
    token_agreement (float): share of positions that hold the same token, out of the longer sequence's length; mean
        over pairs. Two empty sequences agree fully (1.0), an empty and a non-empty one not at all (0.0).
    prefix_agreement (float): the same, counting only positions before the first divergence.
    first_divergence (float or None): position, from 0, of the first divergence; mean over the pairs that diverge, None
        if none does.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("hf_specdec/metrics/token_agreement")
    >>> metric.compute(predictions=[[5, 6, 7, 8], [1, 2]], references=[[5, 6, 0, 8], [1, 2]])
    {'exact_match': 0.5, 'token_agreement': 0.875, 'prefix_agreement': 0.75, 'first_divergence': 2.0}
    >>> metric.compute(predictions=[[5, 6, 7, 8], [1, 2]], references=[[5, 6, 0, 8], [1, 2]], use_aggregator=False)
    {'exact_match': [0.0, 1.0], 'token_agreement': [0.75, 1.0], 'prefix_agreement': [0.5, 1.0], 'first_divergence': [2, None]}
    >>> metric.compute(predictions=["sly fox"], references=["shy fox"])["first_divergence"]
    1.0
"""  # noqa: E501 (an output is one line)

_CITATION = """
@misc{hf_specdec_token_agreement,
  title  = {Token agreement, an evaluate module of hf_specdec},
  author = {{The hf_specdec authors}},
  year   = {2026}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TokenAgreement(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        ids, text = datasets.Sequence(datasets.Value("int64")), datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            # The first that fits is used, and a string would pass for a sequence.
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": ids, "references": ids}),
            ],
        )

    def _compute(
        self, predictions: list[Any], references: list[Any], use_aggregator: bool = True
    ) -> dict[str, list[Any] | float | None]:
        rows = [compare(prediction, reference) for prediction, reference in zip(predictions, references)]
        lists: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
        if not use_aggregator:
            return dict(lists)
        known = {name: [value for value in values if value is not None] for name, values in lists.items()}
        return {name: sum(values) / len(values) if values else None for name, values in known.items()}


def compare(prediction: Any, reference: Any) -> dict[str, float | int | None]:
    """The figures of one pair of sequences."""
    longer = max(len(prediction), len(reference))
    same = [p == r for p, r in zip(prediction, reference)]
    prefix = same.index(False) if False in same else len(same)
    return {
        "exact_match": float(prefix == longer),
        "token_agreement": sum(same) / longer if longer else 1.0,
        "prefix_agreement": prefix / longer if longer else 1.0,
        "first_divergence": None if prefix == longer else prefix,
    }
