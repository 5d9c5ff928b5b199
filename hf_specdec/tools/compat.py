"""Does a class decode the same with and without speculation? Compared on tiny random models, for us and for HF.

Each method's outcome is one of

    identical   the tokens of vanilla `generate()`
    tie         other tokens that rounding explains, by the rule of `check_lossless` (see `lossless.py`)
    refused     an exception raised on purpose, whose message says what is missing
    error       any other exception
    wrong       other tokens, or logits further off than rounding explains

If the tokens are identical, the logits may also be as far off as those of the target alone, fed in blocks.
If the target alone, fed in blocks, is as far from vanilla as a wrong result, the comparison is repeated with other
weights (a different choice of experts or keys spoils it); the result stays wrong if this keeps happening.
"""

import contextlib
import copy
import functools
import linecache
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import hf_specdec

from .lossless import BUG, Comparison, Rounding, Row, compare
from .lossless import TIE as NUMERICAL_TIE
from .tiny_inputs import Inputs, inputs_of
from .tiny_models import Entry, NotBuildable, build, perturbed

IDENTICAL, TIE, REFUSED, ERROR, WRONG = "identical", "tie", "refused", "error", "wrong"
OURS, ASSISTED = "ours", "assisted"
NEW_TOKENS = 24
GAMMA = 3
_SEEDS = 4
_LEAST_NOISE = 1e-5  # likewise: smaller differences cannot be told from rounding
_UNKNOWN_NOISE = 16  # units in the last place, if the target's own rounding could not be measured
_MOST_NOISE = 1e-3  # of the logits' deviation, in float32: a larger difference is not rounding
_DELIBERATE = (ValueError, TypeError, NotImplementedError)
Given = TypeVar("Given")


@dataclass(frozen=True)
class Answer:
    """What one call of `generate()` returned.

    Attributes:
        sequences: `[batch, tokens]`, with the prompt if the class returns it.
        new_tokens: how many were requested.
        rows: the new tokens with their logits; empty if the class does not return them.
    """

    sequences: Tensor
    new_tokens: int
    rows: list[Row] = field(default_factory=list)


def examine(
    entry: Entry,
    batches: tuple[int, ...] = (1, 4),
    seed: int = 0,
    assisted: bool = True,
    dtype: torch.dtype = torch.float32,
    new_tokens: int = NEW_TOKENS,
) -> dict[str, Any]:
    """Everything that the table says about a class."""
    result: dict[str, Any] = {"name": entry.name, "model_type": entry.model_type, "mappings": list(entry.mappings)}
    result |= {"dtype": str(dtype).removeprefix("torch.")}
    try:
        target = build(entry, seed, dtype)
        kinds = inputs_of(target)
    except NotBuildable as error:
        return result | {"build": str(error), "cases": []}
    result |= {"build": None, "layer_types": _layer_types(target), "cases": []}
    for kind, make in kinds.items():
        for batch in batches:
            comparison = functools.partial(_Comparison, entry, make, batch, assisted, dtype, new_tokens)
            result["cases"].append({"inputs": kind, "batch": batch} | _case(comparison, seed))
    return result


def _layer_types(model: PreTrainedModel) -> list[str]:
    return sorted(set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()))


def _case(comparison: Callable[[int], "_Comparison"], seed: int) -> dict[str, Any]:
    """One comparison, repeated with another seed if rounding decides it or the draft is too good or too bad."""
    best: dict[str, Any] = {}
    for attempt in range(_SEEDS):
        case = comparison(seed + 100 * attempt).run()
        if case["vanilla"] is not None:
            return case
        if not best or _quality(case) > _quality(best):
            best = case
        if _quality(case) >= 2:
            break
    return best


def _quality(case: dict[str, Any]) -> int:
    """2: a good comparison; 1: the draft or the text says little; 0: rounding decided."""
    if case.get("rounding_decides"):
        return 0
    agreement = case["agreement"]
    if case[OURS]["outcome"] in (WRONG, ERROR, REFUSED):
        return 2
    return 1 + (case["distinct"] >= case["new_tokens"] // 4 and (agreement is None or 0.1 <= agreement <= 0.95))


@dataclass
class _Comparison:
    """The methods compared with vanilla, for one tiny model and one batch of prompts."""

    entry: Entry
    make: Inputs
    batch: int
    assisted: bool
    dtype: torch.dtype
    new_tokens: int
    seed: int

    def run(self) -> dict[str, Any]:
        self.target = target = build(self.entry, self.seed, self.dtype)
        case: dict[str, Any] = {"seed": self.seed, "new_tokens": self.new_tokens, "vanilla": None}
        try:
            self.inputs = inputs = self.make(target, self.batch, self.seed)
            self.expected = expected = answer_of(target, inputs, self.new_tokens)
        except Exception as error:
            return case | {"vanilla": _message(error), "where": _where(error)}
        self.noise = case["noise"] = self._noise()
        case["distinct"] = len(expected.sequences[0, -self.new_tokens :].unique())
        draft, case["perturbation"], case["agreement"] = self._draft()
        case["drafter"], assistant = "model", {"assistant_model": draft}
        if not _reads_text(draft):
            case["drafter"], assistant = "look-up", {"prompt_lookup_num_tokens": GAMMA, "max_matching_ngram_size": 1}
        draft.generation_config.num_assistant_tokens = GAMMA
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        stats, schedule = hf_specdec.SpeculationStats(), {"num_assistant_tokens_schedule": "constant"}
        ours = {"strategy": "spec", "num_assistant_tokens": GAMMA, **schedule, **assistant}
        case[OURS] = self._outcome("/hf_specdec/", speculation_stats=stats, **ours)
        if stats.target_forwards:
            case["acceptance"] = stats.acceptance_rate
            case["efficiency"] = stats.block_efficiency
        elif case[OURS]["outcome"] in (IDENTICAL, TIE):
            case[OURS] = {"outcome": ERROR, "message": "strategy='spec' was ignored: it decoded nothing"}
        case["rounding_decides"] = case[OURS].pop("in_blocks_too", False)
        if self.assisted:
            case[ASSISTED] = self._outcome("/transformers/generation/", **assistant)
        return case

    def _noise(self) -> float:
        """How far rounding can move the target's logits, measured if they can be computed in another way."""
        ways = (_one_forward(self.target, self.inputs, self.expected, positions) for positions in (True, False))
        measured = min((self._off(logits) for logits in ways if logits is not None), default=math.inf)
        deviation = float(self.expected.rows[0].logits.std()) if self.expected.rows else 0.0
        if self.dtype is not torch.float32:
            return measured if measured < math.inf else _UNKNOWN_NOISE * torch.finfo(self.dtype).eps * deviation
        if measured > _MOST_NOISE * deviation:
            measured = _UNKNOWN_NOISE * torch.finfo(self.dtype).eps * deviation
        return max(measured, _LEAST_NOISE * deviation)

    def _off(self, reference: Tensor) -> float:
        rounding = Rounding()
        for row, logits in zip(self.expected.rows, reference.float()):
            rounding.add(row, logits)
        return rounding.noise

    def _outcome(self, package: str, **options: Any) -> dict[str, Any]:
        return outcome(lambda: answer_of(self.target, self.inputs, self.new_tokens, **options), self.judge, package)

    def judge(self, given: Answer) -> dict[str, Any]:
        """The outcome of a method's answer, compared with vanilla's tokens and logits."""
        expected = self.expected
        if given.sequences.shape != expected.sequences.shape:
            shapes = [tuple(answer.sequences.shape) for answer in (given, expected)]
            return {"outcome": WRONG, "message": f"shape {shapes[0]} instead of {shapes[1]}"}
        if not (given.rows and expected.rows):
            same = torch.equal(given.sequences, expected.sequences)
            return {"outcome": IDENTICAL} if same else {"outcome": WRONG, "message": _difference(given, expected)}
        rows = map(_until_the_end, expected.rows, given.rows)
        pairs = enumerate(rows, start=1)
        comparisons = [compare(number, *rows, self.dtype) for number, rows in pairs]
        verdicts = [(c, *c.judge(self.noise)) for c in comparisons]
        ties = sum(verdict == NUMERICAL_TIE for _, verdict, _ in verdicts)
        bugs = [(c, why) for c, verdict, why in verdicts if verdict == BUG]
        if not bugs:
            return {"outcome": TIE, "message": f"{ties} rows"} if ties else {"outcome": IDENTICAL}
        in_blocks_too = self._in_blocks_too(comparisons)
        if in_blocks_too and all(comparison.position is None for comparison, _ in bugs):
            return {"outcome": TIE, "message": f"{ties} rows"} if ties else {"outcome": IDENTICAL}
        first, why = min(bugs, key=lambda bug: bug[0].position or self.new_tokens + 1)
        where = f"differs at new token {first.position}" if first.position else "has other logits"
        return {
            "outcome": WRONG,
            "message": f"row {first.prompt} {where} ({len(bugs)} rows; {why})",
            "in_blocks_too": in_blocks_too,
        }

    def _in_blocks_too(self, comparisons: list[Comparison]) -> bool:
        """Whether the target alone, fed in blocks, is as far from vanilla."""
        blocks = _in_blocks(self.target, self.inputs, self.expected)
        noise = max([0.0, *map(self._off, blocks)])
        return all(comparison.judge(noise)[0] != BUG for comparison in comparisons)

    def _draft(self) -> tuple[PreTrainedModel, float, float | None]:
        """A perturbed copy that agrees with the target on about half of vanilla's tokens, its noise, its agreement."""
        low, high, noise = 0.0, 4.0, 0.12
        for _ in range(9):
            draft = perturbed(self.target, noise, self.seed + 1)
            agreement = self._agreement(draft)
            if agreement is None or 0.3 <= agreement <= 0.75:
                break
            low, high = (noise, high) if agreement > 0.75 else (low, noise)
            noise = min((low + high) / 2, 3 * noise) if agreement > 0.75 else (low + high) / 2
        return draft, noise, agreement

    def _agreement(self, model: PreTrainedModel) -> float | None:
        """The share of vanilla's tokens that are the model's argmax, in one forward over all of them."""
        ways = (_one_forward(model, self.inputs, self.expected, positions) for positions in (True, False))
        logits = next((logits for logits in ways if logits is not None), None)
        if logits is None or len(logits) != len(self.expected.sequences):  # RAG has a row for each document
            return None
        agree = logits.argmax(dim=-1) == self.expected.sequences[:, -self.new_tokens :]
        return float(agree.float().mean())


def _until_the_end(expected: Row, given: Row) -> tuple[Row, Row]:
    """Two rows without the padding that both have after an end; what counts as an end is up to the class.

    Ours has no logits there; vanilla has those of the rows that continue.
    """
    is_told = given.logits.ne(0).any(dim=-1).tolist()
    length = max((i for i, told in enumerate(is_told, start=1) if told), default=0)
    if given.tokens[length:] != expected.tokens[length:]:
        return expected, given
    cut = [Row(row.tokens[:length], row.logits[:length], row.scores[:length]) for row in (expected, given)]
    return cut[0], cut[1]


def _reads_text(draft: PreTrainedModel) -> bool:
    """Whether a model can be fed nothing but tokens, as drafts are."""
    if draft.config.is_encoder_decoder:
        return True
    try:
        with torch.no_grad():
            draft(input_ids=torch.tensor([[5, 6, 7]]))
    except Exception:
        return False
    return True


def answer_of(model: PreTrainedModel, inputs: dict[str, Any], new_tokens: int, **kwargs: Any) -> Answer:
    """What a greedy call returns, with the logits of its new tokens."""
    told = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    out = model.generate(**copy.deepcopy(inputs), max_new_tokens=new_tokens, do_sample=False, **told, **kwargs)
    sequences = getattr(out, "sequences", out)
    if not isinstance(sequences, Tensor):
        raise TypeError(f"the class returns {type(out).__name__}, which holds no tokens")
    steps: list[Any] = [getattr(out, name, None) for name in ("logits", "scores")]
    if sequences.ndim != 2 or not all(isinstance(s, tuple) and len(s) == new_tokens for s in steps):
        return Answer(sequences, new_tokens)  # codes of several codebooks, a waveform, or a class without logits
    logits, scores = (torch.stack(s, dim=1).float() for s in steps)
    tokens = sequences[:, -new_tokens:]
    if logits.shape != scores.shape or logits.shape[:-1] != tokens.shape or int(tokens.max()) >= logits.shape[-1]:
        return Answer(sequences, new_tokens)
    return Answer(sequences, new_tokens, [Row(*row) for row in zip(tokens.tolist(), logits, scores, strict=True)])


def outcome(run: Callable[[], Given], judge: Callable[[Given], dict[str, Any]], package: str) -> dict[str, Any]:
    """A method's outcome: the judgement of its answer, or the kind of exception that it raised."""
    try:
        given = run()
    except Exception as error:
        refused = isinstance(error, _DELIBERATE) and _raised_on_purpose(error, package)
        return {"outcome": REFUSED if refused else ERROR, "message": _message(error), "where": _where(error)}
    return judge(given)


def _difference(given: Answer, expected: Answer) -> str:
    unlike = given.sequences != expected.sequences
    row, column = min(unlike.nonzero()[:, :2].tolist(), key=lambda place: place[1])
    return f"row {row + 1} differs in column {column}; the class returns no logits"


@torch.no_grad()
def _one_forward(model: PreTrainedModel, inputs: dict[str, Any], expected: Answer, positions: bool) -> Tensor | None:
    """`[batch, new tokens, vocab]`: the new tokens' logits, from one forward over all; `None` if there are none.

    Args:
        positions: whether to pass them, counted from each row's first token.
    """
    kwargs, sequences, new_tokens = copy.deepcopy(inputs), expected.sequences, expected.new_tokens
    try:
        if model.config.is_encoder_decoder:
            kwargs["decoder_input_ids"] = sequences[:, :-1]
        else:
            mask = kwargs.get("attention_mask")
            kwargs["input_ids"] = sequences[:, :-1]
            if mask is not None:
                mask = kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), new_tokens - 1)], dim=1)
                if positions:
                    kwargs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(**kwargs).logits
    except Exception:
        return None
    # Whisper's own `generate()` returns only the new tokens
    return logits[:, -new_tokens:] if logits.ndim == 3 and logits.shape[1] >= new_tokens else None


def _in_blocks(model: PreTrainedModel, inputs: dict[str, Any], expected: Answer) -> Iterator[Tensor]:
    """The same with the model alone, fed in blocks on a transformers cache; the blocks are cut in several ways."""
    mask, sequences, new_tokens = inputs.get("attention_mask"), expected.sequences, expected.new_tokens
    if model.config.is_encoder_decoder or mask is None:
        return
    start = sequences.shape[1] - new_tokens
    mask = torch.cat([mask, mask.new_ones(len(mask), new_tokens)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with contextlib.suppress(Exception), torch.no_grad():
        for first in range(1, GAMMA + 2):
            cache, at, blocks = DynamicCache(config=model.config.get_text_config(decoder=True)), 0, []
            for end in (start, *range(start + first, sequences.shape[1] - 1, GAMMA + 1), sequences.shape[1] - 1):
                fed = copy.deepcopy(inputs) if at == 0 else {"input_ids": sequences[:, at:end]}
                fed |= {"attention_mask": mask[:, :end], "position_ids": positions[:, at:end]}
                logits = model(**fed, past_key_values=cache, use_cache=True).logits
                blocks.append(logits[:, -1:] if at == 0 else logits)
                at = end
            yield torch.cat(blocks, dim=1)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().replace("\n", " ")[:400]


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno}"


def _raised_on_purpose(error: Exception, package: str) -> bool:
    """Whether the exception comes from a `raise` statement of `package` (part of a path)."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return package in frame.filename and line.startswith("raise")
