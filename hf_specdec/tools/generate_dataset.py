"""`hf-specdec generate`: a text for each row of a dataset, written as they end, in one process or several.

Owns the command's arguments and what is in a row; `resumable` owns the files.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..generate.many import Generated
from ..pairs.pair import SpecPair
from ..records.stats import SpeculationStats
from .arguments import add_pair_arguments, load_pair, positive, quiet
from .dataset_prompts import DatasetPrompts, add_dataset_arguments
from .journal import encoded
from .processes import Processes
from .progress import progress
from .resumable import Resumable, Rows, Write
from .texts import COUNTERS, Unreadable, columns_of, texts_for
from .vllm_script import vllm_script

ENGINES = ("hf_specdec", "vllm")
_OWN = {  # options with an argument of their own
    "max_new_tokens": "--new-tokens",
    "num_assistant_tokens": "--gamma",
    "speculation_seed": "--seed",
    "assistant_model": "--draft",
    "batch_size": "--batch-size",
    "on_error": "--on-error",
    "tokenizer": "--target",
}
_SUFFIXES = (".jsonl", ".parquet")
_TOGETHER = 1000  # rows of a parquet file that are written at once
_HASHED = 1 << 20  # bytes of a model's file: names and shapes of its tensors, and some weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dataset_arguments(parser)
    add_pair_arguments(parser)
    add = parser.add_argument_group("generation").add_argument
    add("--new-tokens", type=positive, default=256, metavar="N", help="limit of new tokens (default: 256)")
    add("--options", nargs="*", default=[], metavar="NAME=VALUE", help="other options of generate(), such as "
        "do_sample=true temperature=0.8 stop_strings='[\"\\n\"]' (values are JSON, or else text)")  # fmt: skip
    add("--seed", type=int, metavar="S", help="sampled text is a function of S, the row and the target; with "
        "speculation_acceptance=coupled")  # fmt: skip
    add("--gamma", type=positive, metavar="γ", help="draft length (default: the pair file's, else the library's)")
    add("--batch-size", type=positive, default=16, metavar="N", help="texts at a time (default: 16)")
    add("--on-error", choices=("result", "raise"), default="result", help="a prompt that cannot be decoded: write its "
        "error as its result, or stop with it (default: result)")  # fmt: skip
    add("--engine", choices=ENGINES, default=ENGINES[0], help="vllm: print a script that does the same with vLLM")
    add = parser.add_argument_group("output").add_argument
    add("--output", required=True, metavar="FILE", help=f"file to write: {' or '.join(_SUFFIXES)}")
    add("--overwrite", action="store_true", help="begin anew, whatever is there")


def run(args: argparse.Namespace) -> None:
    """Generate what is missing of the output, and print what was done; the last line is JSON.

    Raises:
        OSError, ValueError: for what the user can mend; rows that were written are kept.
    """
    output = Path(args.output)
    if output.suffix not in _SUFFIXES:
        raise ValueError(f"--output must end in {' or '.join(_SUFFIXES)}, got {output.name}")
    options = parse_options(args.options)
    if args.engine == "vllm":
        print(vllm_script(args, options), end="")
        return
    quiet()
    processes = Processes()
    prompts = DatasetPrompts(args)
    copies = options.setdefault("num_return_sequences", 1)
    whole = Resumable(output, copies)
    processes.first(lambda: whole.begin(_settings(args, options, prompts), args.overwrite))
    console = Console(highlight=False)
    report: dict[str, Any] = {"rank": processes.rank, "rows": 0, "errors": 0}
    if not whole.is_complete:
        with closing(whole.open(processes.rank)) as journal:
            done = whole.done()
            mine = range(processes.rank, prompts.count, processes.count)
            # If others have just written the output, the journals are gone.
            todo = [] if whole.is_complete else [index for index in mine if index not in done]
            report |= {"kept": len(mine) - len(todo)}
            if todo:
                args.device = args.device or processes.device
                pair = load_pair(args)
                prompts.check(pair.tokenizer)
                work = _Work(args, options, prompts, pair)
                kept = len(mine) - len(todo)
                shown = console if processes.rank == 0 else Console(quiet=True)
                with progress(shown, "rows", len(mine), kept) as show:
                    for rows in work.rows(todo):
                        journal.append(rows)
                        work.count(rows)
                        show(kept + work.done, work.note)
                report |= work.report()
    report["output"] = str(output) if whole.finish(prompts.count, _writer(output, prompts, copies)) else None
    if report["output"] is None:
        console.print(f"Process {processes.rank} is done; the last one writes {output}.")
    print(json.dumps(report))


def parse_options(given: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` as options of `generate()`.

    Raises:
        ValueError: if one is not like this, or has an argument of its own.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--options must be NAME=VALUE, got {text!r}")
        if name in _OWN:
            raise ValueError(f"--options {name}: use {_OWN[name]}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    copies = found.get("num_return_sequences", 1)
    if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
        raise ValueError(f"--options num_return_sequences must be an int of at least 1, got {copies!r}")
    return found


class _Work:
    """The share of one process, and what it came to."""

    def __init__(self, args: argparse.Namespace, options: dict[str, Any], prompts: DatasetPrompts, pair: SpecPair):
        self._args, self._prompts, self._pair = args, prompts, pair
        self._options = {"max_new_tokens": args.new_tokens} | options
        if args.gamma is not None:
            self._options["num_assistant_tokens"] = args.gamma
        self._copies: int = options["num_return_sequences"]
        self._stats = SpeculationStats()
        self._began = time.monotonic()
        self._errors = self.done = 0

    def rows(self, todo: list[int]) -> Iterator[Rows]:
        """The rows of each index, as they end.

        Raises:
            ValueError: for options that cannot be used; with `--on-error raise`, if one cannot be decoded.
        """
        args, copies = self._args, self._copies
        seeds: dict[str, Any] = {}
        if args.seed is None:
            torch.seed()  # else all processes would draw the same numbers, and so would this one when it goes on
        else:
            first = (args.seed + copies * index for index in todo)
            seeds["speculation_seed"] = [seed + copy for seed in first for copy in range(copies)]
            seeds["speculation_acceptance"] = "coupled"
        options = {"batch_size": args.batch_size, "speculation_stats": self._stats} | self._options | seeds
        waiting: dict[int, list[Generated]] = {}  # by place in `todo`
        values = (self._prompts[index] for index in todo)
        try:
            found = texts_for(self._pair, values, self._prompts.is_chat, **options)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"--options {' '.join(args.options)} cannot be used: {error}") from error
        for result in found:
            results = waiting.setdefault(result.index, [])
            results.append(result)
            if len(results) == copies or isinstance(result.error, Unreadable):
                yield self._rows_of(todo[result.index], waiting.pop(result.index))

    def _rows_of(self, index: int, results: list[Generated]) -> Rows:
        failed = next((result for result in results if result.error is not None), None)
        if failed is not None and self._args.on_error == "raise":
            raise ValueError(f"row {index} of the dataset cannot be decoded: {failed.error}") from failed.error
        chosen = [failed] if failed is not None else sorted(results, key=lambda result: result.sample)
        rows: Rows = []
        for result in chosen:
            row: dict[str, Any] = {"index": index}
            if len(chosen) > 1:
                row["sample"] = result.sample
            rows.append(row | {self._prompts.key: self._prompts[index]} | columns_of(result))
        return rows

    def count(self, rows: Rows) -> None:
        self.done += 1
        self._errors += any(row["error"] is not None for row in rows)

    @property
    def note(self) -> str:
        """The state of things, for the progress bar."""
        found = self.report()
        return f"{found['tokens_per_second']:.0f} tokens/s, acceptance {found['acceptance_rate']:.0%}"

    def report(self) -> dict[str, Any]:
        stats, seconds = self._stats, time.monotonic() - self._began
        return {
            "rows": self.done,
            "errors": self._errors,
            "new_tokens": stats.committed_tokens,
            "seconds": seconds,
            "tokens_per_second": stats.committed_tokens / seconds,
            "acceptance_rate": stats.acceptance_rate,
            "block_efficiency": stats.block_efficiency,
        }


def _settings(args: argparse.Namespace, options: dict[str, Any], prompts: DatasetPrompts) -> dict[str, Any]:
    """What rows depend on: an output goes on only with the same."""
    places = ("dataset", "pair", "target", "draft")
    others = ("dataset_config", "split", "limit", "chat_template", "gguf_file", "draft_gguf_file", "revision", "dtype")
    found: dict[str, Any] = {name: _absolute(getattr(args, name)) for name in places}
    found |= {name: getattr(args, name) for name in (*others, "new_tokens", "seed", "gamma")}
    found |= {"column": prompts.column, "rows": prompts.fingerprint(), "options": options}
    for name in ("pair", "target", "draft"):
        found[f"files of {name}"] = None if getattr(args, name) is None else _files(Path(getattr(args, name)))
    return found


def _absolute(name: str | None) -> str | None:
    """The same from any folder, if it is a local path."""
    return name if name is None or not Path(name).exists() else str(Path(name).resolve())


def _files(folder: Path) -> str | None:
    """What tells the models in a local folder from others that were there before or come later."""
    if not folder.is_dir():
        return None
    seen = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors", ".bin", ".gguf") and path.is_file():
            with path.open("rb") as file:
                seen.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode() + file.read(_HASHED))
    return seen.hexdigest()[:16]


def _writer(output: Path, prompts: DatasetPrompts, copies: int) -> Write:
    return _write_jsonl if output.suffix == ".jsonl" else partial(_write_parquet, prompts=prompts, copies=copies)


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("wb") as file:
        for row in rows:
            file.write(encoded(row))


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], prompts: DatasetPrompts, copies: int) -> None:
    import pyarrow
    from pyarrow import parquet

    whole, text = pyarrow.int64(), pyarrow.string()
    as_json = isinstance(prompts.arrow_type, pyarrow.BaseExtensionType)  # messages of different kinds
    columns = {"index": whole, "sample": whole, prompts.key: text if as_json else prompts.arrow_type, "text": text}
    columns |= {"tokens": pyarrow.list_(whole), "finish_reason": text, "error": text}
    columns["statistics"] = pyarrow.struct({**dict.fromkeys(COUNTERS, whole), "seconds": pyarrow.float64()})
    if copies == 1:
        del columns["sample"]
    schema = pyarrow.schema(columns)
    with parquet.ParquetWriter(path, schema) as writer:
        while some := list(islice(rows, _TOGETHER)):
            if as_json:
                some = [row | {prompts.key: json.dumps(row[prompts.key], ensure_ascii=False)} for row in some]
            writer.write_table(pyarrow.Table.from_pylist(some, schema))
