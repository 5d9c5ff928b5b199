"""Chat prompts to train and to measure drafts on: questions, summaries, code, rewriting, JSON and lists.

Made from the topics and patterns in assets/chat_prompts.json and, for summaries, rewriting and code, from docstrings of
Python's standard library (PSF license). No prompt for training shares a topic, or a module, with one that is held out.

    python -m hf_specdec.tools.chat_prompts FOLDER      # train.jsonl and heldout.jsonl, for --dataset
"""

import ast
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from .stdlib import STDLIB, modules

PATTERNS = json.loads((Path(__file__).parents[1] / "assets" / "chat_prompts.json").read_text(encoding="utf-8"))
CATEGORIES = ("question", "summary", "code", "rewrite", "json", "list")
SHORTEST, LONGEST = 120, 600  # characters of a docstring that becomes part of a prompt
HELD_OUT_EVERY = 12  # one topic of so many is held out


def prompts(held_out: bool, of_texts: int = 2000) -> list[dict[str, str]]:
    """`prompt` and `category` of each, in random order, the same every time.

    Args:
        held_out: those to measure on, not those to train on.
        of_texts: at most so many are made from docstrings.
    """
    rows = [{"prompt": text, "category": category} for category, text in _of_topics(held_out)]
    texts = list(_docstrings(held_out))
    kinds = [(category, pattern) for category, patterns in PATTERNS["about_texts"].items() for pattern in patterns]
    for number, text in enumerate(random.Random(0).sample(texts, min(of_texts, len(texts)))):
        category, pattern = kinds[number % len(kinds)]
        rows.append({"prompt": pattern.replace("{x}", text), "category": category})
    random.Random(1).shuffle(rows)
    return rows


def balanced(rows: list[dict[str, str]], each: int) -> list[dict[str, str]]:
    """The first `each` rows of every category, category by category."""
    chosen = [[row for row in rows if row["category"] == category][:each] for category in CATEGORIES]
    return [row for group in chosen for row in group]


def _of_topics(held_out: bool) -> Iterator[tuple[str, str]]:
    for category, by_kind in PATTERNS["about_topics"].items():
        for kind, patterns in by_kind.items():
            for number, topic in enumerate(PATTERNS["topics"][kind]):
                if (number % HELD_OUT_EVERY == HELD_OUT_EVERY // 2) == held_out:
                    for pattern in patterns:
                        text = pattern.replace("{x}", topic)
                        yield category, re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _docstrings(held_out: bool) -> Iterator[str]:
    """First paragraphs of the standard library's docstrings, of a length that suits a prompt; none twice."""
    seen = set()
    for name in modules(held_out):
        try:
            tree = ast.parse((STDLIB / name).read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            text = (ast.get_docstring(node) or "")[:LONGEST].rsplit("\n\n", 1)[0].strip()
            if len(text) >= SHORTEST and text not in seen:
                seen.add(text)
                yield text


def main(folder: str) -> None:
    """Write `train.jsonl`, and `heldout.jsonl` with 16 prompts of each category."""
    for name, rows in (("train", prompts(False)), ("heldout", balanced(prompts(True), 16))):
        file = Path(folder) / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{file}: {len(rows)} prompts")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("expected one argument, a folder: python -m hf_specdec.tools.chat_prompts FOLDER")
    main(sys.argv[1])
