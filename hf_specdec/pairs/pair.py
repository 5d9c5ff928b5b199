"""Pairs of target and draft that are loaded, run, saved and shared together."""

import functools
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..drafters.heads import Head, MtpHead
from ..options import OPTION_NAMES
from ..records import fragment
from .card import license_of, write_card
from .choice import find_draft
from .compatibility import (
    Compatibility,
    compare,
    devices_of,
    differing_tokens,
    dtype_of,
    quantity,
    vocabulary_check,
)
from .head_compatibility import compare_head, kind_of
from .heads import as_head, head_of_pair, save_head
from .loading import find_pair, load_model, load_tokenizer, pin, save_model
from .pair_file import FILE_NAME, ModelReference, PairConfig

logger = logging.get_logger(__name__)

DEMO_PAIR = Path(__file__).parents[1] / "assets" / "demo_pair"
# Arguments of `generate()` that only speculation uses.
SPECULATION_ARGUMENTS = {*OPTION_NAMES, "assistant_tokenizer", "speculation_stats", "speculation_trace"}


@dataclass
class SpecPair:
    """A target, its draft and their tokenizer.

    Attributes:
        target: the target model.
        draft: the draft model, or a head on the target's hidden states.
        tokenizer: the target's tokenizer.
        config: the contents of the pair file.
        draft_tokenizer: the tokenizer that came with the draft, if any.
        sources: where target and draft came from; None for models made in memory.
    """

    target: PreTrainedModel
    draft: PreTrainedModel | Head | MtpHead
    tokenizer: PreTrainedTokenizerBase
    config: PairConfig = field(default_factory=PairConfig)
    draft_tokenizer: PreTrainedTokenizerBase | None = None
    sources: tuple[ModelReference, ModelReference] | None = None

    @classmethod
    def from_pretrained(
        cls,
        target: str | Path,
        draft: str | Path | None = None,
        *,
        revision: str | None = None,
        draft_revision: str | None = None,
        gguf_file: str | None = None,
        draft_gguf_file: str | None = None,
        **kwargs: Any,
    ) -> "SpecPair":
        """Load both models and the tokenizer, and check that they fit.

        Args:
            target: Hub id or local folder of the target, or of a pair (with a specdec_pair.json).
            draft: Hub id or local folder of the draft model or head, or of a pair that has it. None or "auto": the pair
                file's, else the catalogue's draft for the target (`hf_specdec.suggest_draft`).
            revision: branch, tag or commit of `target` on the Hub.
            draft_revision: the same for `draft`.
            gguf_file: the file in the target's folder or Hub repository that holds its weights and tokenizer in GGUF
                (needs the extra `gguf`).
            draft_gguf_file: the same for `draft`.
            kwargs: arguments of `from_pretrained` for both models: `dtype`, `device_map`, `attn_implementation`,
                `token`, `cache_dir`, `trust_remote_code`... The tokenizers get those that they understand.

        Raises:
            OSError: if something cannot be loaded.
            ImportError: if a package that reads GGUF is missing.
            ValueError: if the two do not fit, with a table of the mismatches; or if no draft is known.
        """
        roles = ("target", "draft") if draft in (None, "auto") else ("target",)
        found = find_pair(str(target), revision, roles=roles, **kwargs)
        reference = found.target if found else ModelReference(str(target), revision)
        reference = replace(reference, gguf_file=gguf_file or reference.gguf_file)
        source = pin(reference, **kwargs)  # first, so an unreachable target is the error reported
        if draft in (None, "auto"):
            if draft_revision is not None:
                raise ValueError("`draft_revision` is the revision of `draft`, which was not given: pass both")
            if draft_gguf_file is not None:
                raise ValueError("`draft_gguf_file` is the GGUF file of `draft`, which was not given: pass both")
            draft_reference = found.draft if found else find_draft("auto", str(target), revision, **kwargs)
            config = found.config if found else PairConfig(reference, draft_reference)
        else:
            draft_reference = find_draft(str(draft), str(target), draft_revision, **kwargs)
            draft_reference = replace(draft_reference, gguf_file=draft_gguf_file or draft_reference.gguf_file)
            # Measurements with another draft do not apply to this one.
            config = PairConfig(reference, draft_reference, tokenizer=found.config.tokenizer if found else {})
        sources = (source, pin(draft_reference, **kwargs))

        tokenizer = load_tokenizer(sources[0], **kwargs)
        _check_recorded_vocabulary(tokenizer, config, sources[0])
        model = load_model(sources[0], **kwargs)
        head = head_of_pair(sources[1], model, **kwargs)
        draft_tokenizer = None
        if head is None:
            try:
                draft_tokenizer = load_tokenizer(sources[1], **kwargs)
            except OSError:  # it has none; the report says so
                draft_tokenizer = None
            head = load_model(sources[1], **kwargs)
        pair = cls(model, head, tokenizer, config, draft_tokenizer, sources)
        pair.compatibility.raise_errors()
        return pair

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`target.generate(...)` with the draft, as the pair file recommends; arguments of the call take precedence.

        If the pair file says that speculation does not pay, the target decodes alone, unless the call passes a
        `strategy` or an `assistant_model`. With `strategy="vanilla"` it always does. A strategy or an `assistant_model`
        may also be in the call's generation config.
        """
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        named = {name for name in ("strategy", "assistant_model") if getattr(given, name, None) is not None}
        named |= kwargs.keys() & {"strategy", "assistant_model"}
        strategy = kwargs.get("strategy", getattr(given, "strategy", None) or "spec")
        if strategy == "vanilla":
            return self.target.generate(*args, **{"tokenizer": self.tokenizer, **kwargs, "strategy": strategy})
        if not self.config.speculate and not named:
            logger.warning_once(
                f"{FILE_NAME} says that speculation does not pay for this pair: the target decodes alone, and "
                'speculation options are ignored. Pass strategy="spec" to speculate anyway.'
            )
            kwargs = {name: value for name, value in kwargs.items() if name not in SPECULATION_ARGUMENTS}
            return self.target.generate(*args, **{"tokenizer": self.tokenizer, **kwargs})
        if "assistant_model" not in named:
            options = {k: v for k, v in self.config.recommended.items() if getattr(given, k, None) is None}
            kwargs = {"assistant_model": self.draft, **self.tokenizers, **options, **kwargs}
        return self.target.generate(*args, **{**kwargs, "strategy": strategy})

    @functools.cached_property
    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """Arguments of `generate()`: `tokenizer` and `assistant_tokenizer`.

        They are compared once. If they are the same, one is passed for both, so that no call compares them again.
        """
        other = self.draft_tokenizer
        if other is None or not differing_tokens(self.tokenizer, other)[0]:
            other = self.tokenizer
        return {"tokenizer": self.tokenizer, "assistant_tokenizer": other}

    @property
    def has_two_tokenizers(self) -> bool:
        """Whether the draft has another tokenizer than the target."""
        return self.tokenizers["assistant_tokenizer"] is not self.tokenizer

    @functools.cached_property
    def compatibility(self) -> Compatibility:
        """The report made when the pair was loaded, including notes."""
        return self.check()

    def check(self) -> Compatibility:
        """Report how the two fit in their current state: `print(pair.check())`, or `rich.print` it."""
        if as_head(self.draft) is not None:
            return compare_head(self.target, self.draft, self.tokenizer)
        draft: Any = self.draft
        return compare(self.target, draft, self.tokenizer, self.draft_tokenizer)

    def __repr__(self) -> str:
        lines = [", ".join(self._described(role).values()) for role in ("target", "draft")]
        return f"SpecPair\n  target: {lines[0]}\n  draft: {lines[1]}\n  recommended: {self._recommended()}"

    def _repr_html_(self) -> str:
        target, draft = self._described("target"), self._described("draft")
        rows = ((name, target[name], draft[name]) for name in target)
        return fragment.table(("", "target", "draft"), rows, "SpecPair", f"recommended: {self._recommended()}")

    def _described(self, role: Literal["target", "draft"]) -> dict[str, str]:
        """A model's origin, class, size, dtype and device, in words."""
        model: Any = getattr(self, role)
        memory = ModelReference(getattr(model, "name_or_path", ""))
        source = self.sources[role == "draft"] if self.sources else memory
        at = f"@{source.revision}" if source.revision else ""
        return {
            "from": " ".join(filter(None, (f"{source.name_or_path}{at}", source.gguf_file))) or "made in memory",
            "class": type(model).__name__,
            "size": f"{quantity(model.num_parameters()).strip()} parameters",
            "dtype": dtype_of(model),
            "device": devices_of(model),
        }

    def _recommended(self) -> str:
        """The pair file's recommendation, in words."""
        if not self.config.speculate:
            return "not to speculate"
        options = (f"{name}={value!r}" for name, value in self.config.recommended.items())
        return ", ".join(options) or "the default options"

    def save_pretrained(self, folder: str | Path, weights: bool | None = None) -> None:
        """Write the pair file and a card (README.md) into `folder`, and the models if needed.

        Args:
            folder: created if needed. A README.md that hf_specdec has not written is kept.
            weights: None saves models from local folders or memory, with the tokenizer, in `target/` and `draft/`, and
                refers to models from the Hub by id and commit. True saves both; False saves neither. Models loaded from
                GGUF are saved as plain weights in the dtype that they have in memory.

        Raises:
            ValueError: if `weights=False` and a model is not on the Hub, or if weights are quantized in memory in a
                format that transformers cannot save.
        """
        self._save(Path(folder), str(folder), weights)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a target and draft pair",
        weights: bool | None = None,
    ) -> str:
        """Upload the output of `save_pretrained` to a model repository, which is created if needed.

        Returns: the commit's URL.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), repo_id, weights)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        return str(commit.commit_url)

    def _save(self, folder: Path, name: str, weights: bool | None) -> None:
        """`name`: the name that the card tells people to load."""
        parts: dict[str, tuple[Any, PreTrainedTokenizerBase]] = {
            "target": (self.target, self.tokenizer),
            "draft": (self.draft, self.draft_tokenizer or self.tokenizer),
        }
        references, licenses = [], {}
        for (role, (model, tokenizer)), source in zip(parts.items(), self.sources or (None, None)):
            licenses[role] = license_of(source) if source else None
            if source and not weights and not Path(source.name_or_path).is_dir():
                references.append(source)
                continue
            if weights is False:
                raise ValueError(f"The {role} is not on the Hub, so a pair without its weights would be unusable")
            if as_head(model) is not None:
                save_head(model, folder / role, self.target, source)
            else:
                save_model(model, folder / role)
                tokenizer.save_pretrained(folder / role)
            references.append(ModelReference(f"./{role}"))
        config = replace(
            self.config, target=references[0], draft=references[1], tokenizer=vocabulary_check(self.tokenizer)
        )
        config.save(folder)
        head = as_head(self.draft)
        write_card(folder, name, config, licenses, "draft model" if head is None else kind_of(head))


def demo_pair() -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the embedded pair: `(target, draft, tokenizer)`, in float32 on the CPU.

    Two small Llamas that write Python, trained by `scripts/train_demo_pair.py`; the card is in their folder.
    """
    target, draft = (
        AutoModelForCausalLM.from_pretrained(DEMO_PAIR / name, dtype=torch.float32) for name in ("target", "draft")
    )
    return target, draft, AutoTokenizer.from_pretrained(DEMO_PAIR / "target")


def _check_recorded_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PairConfig, source: ModelReference) -> None:
    """Raise a ValueError unless the tokenizer is the one that the pair file was written with."""
    found = vocabulary_check(tokenizer)
    for name, expected in config.tokenizer.items():
        if found.get(name) != expected:
            raise ValueError(
                f"The tokenizer files in {source.name_or_path} have changed since {FILE_NAME} was written: it recorded "
                f"{name} {expected}, they have {found.get(name)}. Restore them, or, if the change is intended, "
                f"remove `tokenizer` from {FILE_NAME}"
            )
