"""The arguments that scripts share, and loading what they describe: a pair and prompts.

By default a script uses the embedded pair and its held-out prompts, and needs no network.
"""

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..pairs.pair import DEMO_PAIR, SpecPair
from ..pairs.pair_file import FILE_NAME
from . import edits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
TEXT_COLUMNS = ("text", "prompt", "question", "instruction", "turns")
DATASET_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".parquet": "parquet"}


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        text: the text.
        category: its group in reports; "all" if it has none.
        reference: the expected continuation, if the data has one.
        is_chat: whether a chat template was applied, which adds the special tokens.
    """

    text: str
    category: str = "all"
    reference: str | None = None
    is_chat: bool = False


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pair")
    add = group.add_argument
    add("--pair", metavar="PAIR", help="Hub id or folder of a pair (specdec_pair.json); default: the embedded pair")
    add("--target", help="Hub id or path of the target, instead of --pair")
    add("--draft", help='Hub id or path of the draft for --target; "auto" (default) looks it up in the catalogue')
    add("--gguf-file", metavar="NAME", help="GGUF file with the target's weights, in --target's folder or repository")
    add("--draft-gguf-file", metavar="NAME", help="the same for --draft")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of both models (default: float32)")
    add("--device", help="device of both models, such as cuda:0 (default: cuda if available, else cpu)")
    add("--revision", help="revision of --pair, or of the target")
    add("--trust-remote-code", action="store_true", help="allow code from Hub repositories to run")
    add("--threads", type=int, metavar="N", help="number of torch threads (default: torch's own choice)")


def load_pair(args: argparse.Namespace) -> SpecPair:
    """Load the pair that `add_pair_arguments` describes, on its device and ready to generate."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if getattr(args, "name", None) is not None:  # some commands take it without --pair
        if args.pair is not None:
            raise SystemExit(f"expected PAIR or --pair, got both: {args.name} and {args.pair}")
        args.pair = args.name
    if args.pair is not None and (args.target or args.draft):
        raise SystemExit("expected --pair, or --target with --draft, got both")
    if args.draft is not None and args.target is None:
        raise SystemExit("expected --target with --draft, got none")
    if args.pair is not None:
        check_is_pair(args.pair)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = args.pair or args.target or str(DEMO_PAIR)
    return SpecPair.from_pretrained(
        source,
        args.draft,
        revision=args.revision,
        gguf_file=args.gguf_file,
        draft_gguf_file=args.draft_gguf_file,
        dtype=DTYPES[args.dtype],
        device_map=device,
        trust_remote_code=args.trust_remote_code,
    )


def check_is_pair(name: str) -> None:
    """Raise a ValueError that says what to do, if `name` is a local folder without a pair file."""
    folder = Path(name)
    if not folder.is_dir() or (folder / FILE_NAME).is_file():
        return
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if not gguf and not (folder / "config.json").is_file():
        raise ValueError(f"{name} holds neither a pair ({FILE_NAME}) nor a model (config.json)")
    option = "" if (folder / "config.json").is_file() else f" --gguf-file {gguf[0]}"
    raise ValueError(
        f"{name} is a model, not a pair: it has no {FILE_NAME}. Name a draft for it: --target {name}{option} "
        "--draft DRAFT"
    )


def add_prompt_arguments(parser: argparse.ArgumentParser, prompts: int, prompt_tokens: int | None = None) -> None:
    """`prompts`: default number of prompts; `prompt_tokens`: default number of first tokens to use, all if None."""
    group = parser.add_argument_group("prompts")
    add = group.add_argument
    add("--dataset", metavar="NAME", help="a dataset: Hub id, local folder, or .jsonl/.json/.csv/.txt/.parquet file; "
        "default: the embedded pair's held-out prompts")  # fmt: skip
    add("--edits", action="store_true", help="instead: a function of the standard library, to be written again with "
        "a variable renamed")  # fmt: skip
    add("--dataset-config", metavar="NAME", help="configuration of the dataset")
    add("--split", default="test", help="split of the dataset; local files always have `train` (default: %(default)s)")
    add("--column", help=f"column with the text (default: the first of {', '.join(TEXT_COLUMNS)})")
    add("--reference-column", help="column with the expected answer, for scripts that compare (default: `reference`)")
    add("--category-column", default="category", help="column to group reports by, if it exists (default: category)")
    add("--prompts", type=int, default=prompts, metavar="N", help=f"number of prompts (default: {prompts})")
    add("--prompt-tokens", type=int, default=prompt_tokens, metavar="N",
        help=f"use the first N tokens of each prompt (default: {prompt_tokens or 'all'})")  # fmt: skip
    add("--chat-template", action="store_true", help="apply the tokenizer's chat template to each prompt")


def load_prompts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Load the prompts that `add_prompt_arguments` describes, evenly spaced over the dataset (so over categories)."""
    if args.prompts < 1:
        raise SystemExit(f"expected --prompts of at least 1, got {args.prompts}")
    edited = getattr(args, "edits", False)  # not every script has it
    if edited and args.dataset is not None:
        raise SystemExit("expected --edits or --dataset, got both")
    given = edits.rows() if edited else _embedded_rows() if args.dataset is None else _dataset_rows(args)
    rows = list(given)
    if not rows:
        raise SystemExit(f"expected prompts in {args.dataset}, found no rows")
    count = min(args.prompts, len(rows))
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    column = args.column or next((name for name in TEXT_COLUMNS if name in chosen[0]), None)
    if column is None or column not in chosen[0]:
        raise SystemExit(f"expected a text column, found {sorted(chosen[0])}; name it with --column")
    reference = args.reference_column or "reference"
    return [
        Prompt(
            _templated(_shorten(_first(row[column]), args.prompt_tokens, tokenizer), args.chat_template, tokenizer),
            str(row.get(args.category_column) or "all"),
            None if row.get(reference) is None else _first(row[reference]),
            args.chat_template,
        )
        for row in chosen
    ]


def encode(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, device: torch.device) -> dict[str, torch.Tensor]:
    """One left-padded batch: `input_ids` and `attention_mask`, `[prompts, tokens]`."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    special = not any(prompt.is_chat for prompt in prompts)
    texts = [prompt.text for prompt in prompts]
    batch = tokenizer(texts, **options, add_special_tokens=special, return_token_type_ids=False)
    return dict(batch.to(device))


def _embedded_rows() -> Iterable[dict[str, Any]]:
    lines = (DEMO_PAIR / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        yield {"text": row["text"], "category": "class" if row["text"].startswith("class") else "function"}


def _dataset_rows(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    try:
        rows: Iterable[dict[str, Any]] = load_rows(args)
        return rows
    except ValueError as error:
        raise SystemExit(str(error)) from error


def load_rows(args: argparse.Namespace) -> Any:
    """The `datasets.Dataset` of `--dataset`, `--dataset-config` and `--split`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    try:
        from datasets import exceptions, load_dataset, load_from_disk
    except ImportError as error:
        raise ValueError("--dataset needs the package datasets: pip install 'hf_specdec[datasets]'") from error
    path = Path(args.dataset)
    try:
        if path.is_file():
            if path.suffix not in DATASET_FILES:
                raise ValueError(f"expected a file with one of {', '.join(DATASET_FILES)}, got {path.name}")
            if path.stat().st_size == 0:
                raise ValueError("the file is empty")
            return load_dataset(DATASET_FILES[path.suffix], data_files=str(path), split="train")
        if (path / "dataset_dict.json").is_file():  # as `save_to_disk` writes it
            return load_from_disk(str(path))[args.split]
        if (path / "state.json").is_file():
            return load_from_disk(str(path))
        return load_dataset(args.dataset, args.dataset_config, split=args.split)
    except IndexError as error:  # what `datasets` raises for a saved one
        raise ValueError(f"--dataset {args.dataset} could not be loaded: it seems to have no rows") from error
    except (OSError, ValueError, KeyError, exceptions.DatasetsError) as error:
        reason = error.__cause__ or error  # of a damaged file, only the cause says something
        raise ValueError(f"--dataset {args.dataset} could not be loaded: {reason}") from error


def _first(value: Any) -> str:
    """The text, or the first of several, such as Spec-Bench's `turns`: that one needs no context."""
    return str(value[0]) if isinstance(value, (list, tuple)) else str(value)


def _templated(text: str, is_chat: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    if not is_chat:
        return text
    if tokenizer.chat_template is None:
        raise SystemExit("--chat-template: the target's tokenizer has none")
    message = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def _shorten(text: str, tokens: int | None, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokens is None:
        return text
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= tokens else str(tokenizer.decode(ids[:tokens]))


def positive(value: str) -> int:
    """An argparse type: an int of at least 1."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return int(value)


def count(value: str) -> int:
    """An argparse type: an int of at least 0."""
    return 0 if value == "0" else positive(value)


def quiet() -> None:
    """Keep loading messages out of the tables."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
