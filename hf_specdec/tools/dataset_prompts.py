"""The prompts of a dataset: texts, or chat messages, in one of its columns."""

import argparse
import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from .arguments import DATASET_FILES, load_rows, positive

COLUMNS = ("messages", "prompt", "text", "question", "instruction")
_COMPARED = 10_000  # rows of a dataset that tell it from others, as many as take no noticeable time


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    add = group.add_argument
    add("--dataset", required=True, metavar="NAME", help="a dataset: Hub id, local folder, or "
        f"{'/'.join(DATASET_FILES)} file")  # fmt: skip
    add("--dataset-config", metavar="NAME", help="configuration of the dataset")
    add("--split", default="train", help="split of the dataset; local files always have `train` (default: train)")
    add("--column", help="column with a text, or with chat messages, for which the tokenizer's template is used "
        f"(default: the first of {', '.join(COLUMNS)})")  # fmt: skip
    add("--chat-template", action="store_true", help="make each text a user's message")
    add("--limit", type=positive, metavar="N", help="only the first N rows")


class DatasetPrompts:
    """The prompts that `add_dataset_arguments` describes.

    Raises:
        ValueError: if there is no such dataset or column, or no row in it.
    """

    def __init__(self, args: argparse.Namespace):
        rows = load_rows(args)
        names = list(rows.column_names)
        column = args.column or next((name for name in COLUMNS if name in names), None)
        if column is None:
            raise ValueError(f"--dataset {args.dataset} has the columns {', '.join(names)}: name one with --column")
        if column not in names:
            raise ValueError(f"--column {column} is not in --dataset {args.dataset}, which has {', '.join(names)}")
        if len(rows) == 0:
            raise ValueError(f"--dataset {args.dataset}, split {args.split}, has no rows")
        self.column: str = column
        kind = str(rows.data.schema.field(column).type)  # in Arrow; messages are a list of structs
        self.is_text = "string" in kind.split("<")[0] or kind == "null"
        if not self.is_text and "<" not in kind:
            raise ValueError(f"--column {column} holds {kind}: name one with texts or chat messages")
        self.is_chat = args.chat_template or not self.is_text
        self._rows = rows.select_columns([column])
        self.count = len(rows) if args.limit is None else min(args.limit, len(rows))

    @property
    def arrow_type(self) -> Any:
        """The column's type in Arrow."""
        return self._rows.data.schema.field(self.column).type

    @property
    def key(self) -> str:
        """What the column holds: "prompt" or "messages"."""
        return "prompt" if self.is_text else "messages"

    def __getitem__(self, index: int) -> Any:
        """What the column holds."""
        return self._rows[index][self.column]

    def fingerprint(self) -> str:
        """Another one for other rows, as far as some of them tell."""
        seen = hashlib.sha256(str(len(self._rows)).encode())
        step = -(-len(self._rows) // _COMPARED)
        for index in range(0, len(self._rows), step):
            seen.update(json.dumps(self[index], default=str).encode())
        return seen.hexdigest()[:16]

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise a ValueError if the tokenizer has no template for chat messages."""
        if self.is_chat and tokenizer.chat_template is None:
            what = "--chat-template" if self.is_text else f"--column {self.column} holds chat messages"
            raise ValueError(f"{what}, but the target's tokenizer has no chat template: use a column with text")
