"""Whether a draft fits a target: tokenizers, same device, caches that can roll back; and its likely cost.

`check_draft_model` runs on every call and raises at the first mismatch; `compare` runs once and lists all in one table.
"""

import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..cache.layers import check_layers
from ..cache.states import has_states
from ..device import model_device
from ..drafters.bridge import bridge_between, known_bridge
from ..drafters.other_tokenizer import check_kind, check_size
from ..drafters.parallel import mask_token
from ..models.abilities import Abilities
from ..models.checks import check_config, check_states
from ..records import fragment

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

Tokenizer: TypeAlias = PreTrainedTokenizerBase
COLOURS = {"ok": "green", "note": "yellow", "error": "bold red"}
TITLE = "Target and draft"
HEADERS = ("", "target", "draft", "", "what to know or do")


def check_draft_model(
    draft: PreTrainedModel, target: PreTrainedModel, tokenizer: Tokenizer | None, assistant_tokenizer: Tokenizer | None
) -> tuple[Tokenizer, Tokenizer] | None:
    """Raise a TypeError or ValueError unless `draft` can draft for `target`.

    Returns: the tokenizers of target and draft, if these differ.
    """
    check_architecture(draft, target)
    check_device(draft, target)
    tokenizers = different_tokenizers(draft, target, tokenizer, assistant_tokenizer)
    check_states_of_draft(draft)
    return tokenizers


def check_architecture(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    name = type(draft).__name__
    if not getattr(draft, "can_generate", bool)():
        raise TypeError(f"`assistant_model` must be a causal language model, but {name} cannot generate text")
    if draft.config.is_encoder_decoder and not target.config.is_encoder_decoder:
        raise ValueError(
            f"`assistant_model` must be a decoder-only model, but {name} is an encoder-decoder model: the target "
            f"({type(target).__name__}) has no encoder inputs for it"
        )


def check_states_of_draft(draft: PreTrainedModel) -> None:
    """Raise a ValueError if a draft model cannot roll back to accepted tokens. May run it on a few tokens."""
    name = type(draft).__name__
    check_config(draft, "`assistant_model`")
    if not Abilities.of(draft).own_cache:
        return  # its abilities are tested with its first prompt
    cache = DynamicCache(config=draft.config.get_text_config(decoder=True))
    check_layers(cache, f"`assistant_model` ({name})")
    able = Abilities.of(draft)
    if has_states(cache) and not (able.states() or (answer := able.states(at_once=1))):
        raise answer.refusal(
            f"`assistant_model` ({name}) "
            + ("keeps state outside the transformers cache, so it " * answer.compared)
            + f"cannot roll back to accepted tokens (it {answer.reason}): use another draft"
        )


def check_device(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    here, there = model_device(draft), model_device(target)
    if here != there:
        raise ValueError(
            f"`assistant_model` is on {here}, the target on {there}: move it with `assistant_model.to({str(there)!r})`"
        )


def different_tokenizers(
    draft: PreTrainedModel, target: PreTrainedModel, tokenizer: Tokenizer | None, assistant_tokenizer: Tokenizer | None
) -> tuple[Tokenizer, Tokenizer] | None:
    """The tokenizers of target and draft if a token id may mean different things to the two, else `None`.

    Models with the same tokenizer may pad embeddings to different sizes (Qwen2.5 7B and 0.5B), so if sizes differ the
    tokenizers decide: those given, else those that the models were loaded with. Tokens added to a finished vocabulary
    (chat and tool markers) may differ: a draft that gets them wrong is merely rejected.

    Raises:
        ValueError: if that cannot be found out; or if they differ, and one cannot be mapped to bytes or has more tokens
            than its model.
    """
    sizes = [_vocab_size(model) for model in (target, draft)]
    if tokenizer is None or assistant_tokenizer is None:
        if _same_size(target, draft):
            return None
        tokenizer = tokenizer or tokenizer_of(target)
        assistant_tokenizer = assistant_tokenizer or tokenizer_of(draft)
        if tokenizer is None or assistant_tokenizer is None:
            raise ValueError(
                f"The vocabularies of target and `assistant_model` differ in size ({sizes[0]} and {sizes[1]}), and "
                "their tokenizers are not known: pass both, `tokenizer` for the target's and `assistant_tokenizer` for "
                "the draft's"
            )
    if tokenizer is assistant_tokenizer:
        return None
    if known_bridge(tokenizer, assistant_tokenizer) is None and not differing_tokens(tokenizer, assistant_tokenizer)[0]:
        return None
    bridge = bridge_between(tokenizer, assistant_tokenizer)
    check_size("tokenizer", bridge.target.size, "the target", target)
    check_size("assistant_tokenizer", bridge.draft.size, "`assistant_model`", draft)
    if draft.config.is_encoder_decoder or target.config.is_encoder_decoder:
        raise ValueError(
            f"Target ({type(target).__name__}) and `assistant_model` ({type(draft).__name__}) have different "
            "tokenizers, which strategy='spec' does not support for encoder-decoder models: use a draft of the same "
            "family"
        )
    return tokenizer, assistant_tokenizer


def differing_tokens(one: Tokenizer, other: Tokenizer) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """Each `(id, token)` that only one tokenizer has: first those of the base vocabulary, then the added ones."""
    added = one.get_added_vocab().keys() | other.get_added_vocab().keys()
    differing = sorted((i, token) for token, i in one.get_vocab().items() ^ other.get_vocab().items())
    return [item for item in differing if item[1] not in added], [item for item in differing if item[1] in added]


def tokenizer_of(model: PreTrainedModel) -> Tokenizer | None:
    """The tokenizer stored with the model, if it can be loaded."""
    return _load_tokenizer(model.name_or_path) if model.name_or_path else None


@functools.lru_cache(maxsize=8)
def _load_tokenizer(name: str) -> Tokenizer | None:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Finding:
    """One line of the report: the values of both models, whether they fit, and advice if not."""

    property: str
    target: str
    draft: str
    verdict: Literal["ok", "note", "error"] = "ok"
    advice: str = ""


@dataclass(frozen=True)
class Compatibility:
    """How a draft fits a target. `print` it, or hand it to `rich.print` for colours."""

    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that prevent the two from working together."""
        return tuple(finding for finding in self.findings if finding.verdict == "error")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """The findings worth knowing that do not prevent it."""
        return tuple(finding for finding in self.findings if finding.verdict == "note")

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """One table; if it is too wide, the advice follows on separate lines."""
        from rich.measure import Measurement
        from rich.text import Text

        whole = self._table(with_advice=True)
        if Measurement.get(console, options.update(max_width=10**6), whole).maximum <= options.max_width:
            yield whole
            return
        yield self._table(with_advice=False)
        for finding in self.findings:
            if finding.advice:
                verdict = (finding.verdict, COLOURS[finding.verdict])
                yield Text.assemble(verdict, f" {finding.property}: {finding.advice}")

    def _table(self, with_advice: bool) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(title=TITLE, title_justify="left")
        for header in HEADERS[: 4 + with_advice]:
            table.add_column(header, overflow="fold")
        for finding in self.findings:
            # Text, because tokens such as [/INST] would be read as markup.
            cells = (finding.property, finding.target, finding.draft)
            verdict = Text(finding.verdict, COLOURS[finding.verdict])
            table.add_row(*map(Text, cells), verdict, *[Text(finding.advice)][:with_advice])
        return table

    def to_text(self, width: int = 80) -> str:
        """The report in plain text, at most `width` columns wide."""
        from rich.console import Console

        # In a notebook, or if the environment says so, rich would display the table or measure the terminal instead.
        console = Console(file=io.StringIO(), width=width, color_system=None, force_jupyter=False, force_terminal=False)
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        verdicts = (fragment.chip(finding.verdict, COLOURS[finding.verdict]) for finding in self.findings)
        rows = ((f.property, f.target, f.draft, verdict, f.advice) for f, verdict in zip(self.findings, verdicts))
        return fragment.table(HEADERS, rows, above=TITLE)

    def raise_errors(self) -> None:
        """Raise a ValueError that lists the errors, if there are any."""
        if self.errors:
            raise ValueError(f"The draft does not fit the target:\n{Compatibility(self.errors)}")


def compare(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: Tokenizer,
    draft_tokenizer: Tokenizer | None = None,
) -> Compatibility:
    """Check whether `draft` can draft for `target`, and whether that is likely to pay.

    Args:
        target: the target model.
        draft: the draft model.
        tokenizer: the target's tokenizer.
        draft_tokenizer: the draft's tokenizer; None if it came without one.
    """
    return Compatibility(
        (
            _architecture(target, draft),
            _embeddings(target, draft),
            _tokens(target, draft, tokenizer, draft_tokenizer),
            _special_tokens(target, draft),
            _positions(target, draft),
            _dtype(target, draft),
            _device(target, draft),
            _parameters(target, draft),
            _cost_ratio(target, draft),
        )
    )


def vocabulary_check(tokenizer: Tokenizer) -> dict[str, Any]:
    """A pair file's record of a tokenizer: `vocab_size`, and the `sha256` of its tokens and ids, sorted by id."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    text = json.dumps(vocabulary, ensure_ascii=True, separators=(",", ":"))
    return {"vocab_size": len(vocabulary), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _complaint(check: Callable[..., object], *arguments: Any) -> str:
    """The error message of a check; empty if it passes."""
    try:
        check(*arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _finding(
    property: str, values: Iterable[str], advice: str = "", otherwise: Literal["note", "error"] = "note"
) -> Finding:
    """Make a finding of the values of target and draft; without advice, all is well."""
    target, draft = values
    return Finding(property, target, draft, otherwise if advice else "ok", advice)


def _architecture(target: PreTrainedModel, draft: PreTrainedModel) -> Finding:
    names = type(target).__name__, type(draft).__name__
    complaint = ""
    if Abilities.of(target).own_cache:
        cache = DynamicCache(config=target.config.get_text_config(decoder=True))
        complaint = _complaint(check_layers, cache, f"the target ({names[0]})")
        complaint = complaint or _complaint(check_states, target, cache, "the target")
    complaint = complaint or _complaint(check_architecture, draft, target) or _complaint(check_states_of_draft, draft)
    return _finding("architecture", names, complaint, "error")


def _embeddings(target: PreTrainedModel, draft: PreTrainedModel) -> Finding:
    sizes = [_vocab_size(model) for model in (target, draft)]
    advice = "" if _same_size(target, draft) else "padded differently: fine if the tokenizer is the same"
    return _finding("embeddings", (f"{size:,}" for size in sizes), advice)


def _vocab_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _same_size(target: PreTrainedModel, draft: PreTrainedModel) -> bool:
    """Whether both have equally many ids, not counting a mask token after them that a parallel draft may have."""
    size, draft_size = _vocab_size(target), _vocab_size(draft)
    return draft_size == size or (draft_size == size + 1 and mask_token(draft) == size)


def _tokens(
    target: PreTrainedModel, draft: PreTrainedModel, tokenizer: Tokenizer, draft_tokenizer: Tokenizer | None
) -> Finding:
    count = f"{len(tokenizer.get_vocab()):,}"
    if draft_tokenizer is None:
        advice = "the draft has no tokenizer to compare: put the one that it was trained with into its folder"
        return _finding("tokens", (count, "unknown"), advice, "note" if _same_size(target, draft) else "error")
    counts = count, f"{len(draft_tokenizer.get_vocab()):,}"
    regular, added = differing_tokens(tokenizer, draft_tokenizer)
    if regular:
        complaint = _complaint(different_tokenizers, draft, target, tokenizer, draft_tokenizer)
        complaint = complaint or _complaint(check_kind, draft)
        if complaint:
            return _finding("tokens", counts, f"different tokenizers ({_ids(regular)}). {complaint}", "error")
        by = "by token" if bridge_between(tokenizer, draft_tokenizer).by_token else "as text"
        return _finding("tokens", counts, f"different tokenizers ({_ids(regular)}): drafts are translated {by}")
    return _finding("tokens", counts, f"added tokens differ ({_ids(added)}): drafted poorly" if added else "")


def _ids(differing: list[tuple[int, str]]) -> str:
    return f"{len({i for i, _ in differing}):,} ids, the first is {differing[0][0]}, {differing[0][1]!r} in one of them"


def _special_tokens(target: PreTrainedModel, draft: PreTrainedModel) -> Finding:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = [[getattr(model.generation_config, name, None) for name in names] for model in (target, draft)]
    shown = (" / ".join("none" if i is None else str(i) for i in values) for values in ids)
    return _finding("bos / eos / pad", shown, "" if ids[0] == ids[1] else "the target's are used")


def _positions(target: PreTrainedModel, draft: PreTrainedModel) -> Finding:
    configs = (model.config.get_text_config(decoder=True) for model in (target, draft))
    limits = [getattr(config, "max_position_embeddings", None) or math.inf for config in configs]
    shown = ("no limit" if limit == math.inf else f"{limit:,}" for limit in limits)
    advice = f"nothing is drafted beyond {limits[1]:,} tokens" if limits[1] < limits[0] else ""
    return _finding("positions", shown, advice)


def _dtype(target: PreTrainedModel, draft: PreTrainedModel) -> Finding:
    shown = [dtype_of(model) for model in (target, draft)]
    return _finding("dtype", shown, "" if shown[0] == shown[1] else "works; one dtype is the usual choice (`dtype`)")


def _device(target: PreTrainedModel, draft: PreTrainedModel) -> Finding:
    shown = (devices_of(model) for model in (target, draft))
    return _finding("device", shown, _complaint(check_device, draft, target), "error")


def _parameters(target: PreTrainedModel, draft: PreTrainedModel) -> Finding:
    counts = [model.num_parameters() for model in (target, draft)]
    advice = "" if counts[1] < counts[0] else "a draft that is no smaller than its target cannot pay: use a smaller one"
    return _finding("parameters", (quantity(count) for count in counts), advice)


def _cost_ratio(target: PreTrainedModel, draft: PreTrainedModel) -> Finding:
    sizes = [bytes_per_token(model) for model in (target, draft)]
    ratio = sizes[1] / sizes[0]
    advice = f"c ≈ {ratio:.2f}, estimated from the weights that one token needs; scripts/benchmark_speed measures it"
    if ratio > 0.5:
        advice = f"drafting at more than half the cost of the target rarely pays: use a smaller draft ({advice})"
    target_size, draft_size = (f"{quantity(size)}B a token" for size in sizes)
    return Finding("cost ratio", target_size, draft_size, "note" if ratio > 0.5 else "ok", advice)


def bytes_per_token(model: PreTrainedModel) -> float:
    """The bytes of weights that a one-token forward reads: without input embeddings and inactive experts."""
    config = model.config.get_text_config(decoder=True)
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next(filter(None, counts), 1)
    active = min(getattr(config, "num_experts_per_tok", None) or experts, experts)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings()
    looked_up = None if outputs is not None and outputs.weight is inputs else inputs
    return sum(
        parameter.numel() * parameter.element_size() * (active / experts if ".experts." in name else 1)
        for name, parameter in model.named_parameters()
        if parameter is not looked_up
    )


def dtype_of(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def devices_of(model: PreTrainedModel) -> str:
    """All devices that hold parameters."""
    return ", ".join(sorted({str(parameter.device) for parameter in model.parameters()}))


def quantity(number: float) -> str:
    """Three digits and the unit's prefix: 6210000 is "6.21 M"."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
