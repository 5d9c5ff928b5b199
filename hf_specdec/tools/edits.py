"""Editing tasks: functions of Python's standard library, each to be written again with a variable renamed."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Modules that have been in the library for long, and change little.
MODULES = (
    *("argparse", "bisect", "calendar", "cmd", "colorsys", "configparser", "copy", "csv", "dataclasses", "difflib"),
    *("fileinput", "fnmatch", "fractions", "ftplib", "gettext", "glob", "heapq", "imaplib", "ipaddress", "mailbox"),
    *("mimetypes", "ntpath", "optparse", "pickletools", "posixpath", "pprint", "random", "sched", "shlex", "shutil"),
    *("smtplib", "statistics", "string", "tarfile", "tempfile", "textwrap", "trace", "uuid", "wave", "zipfile"),
)
LINES = range(8, 30)  # of a function
LEAST_USES = 3  # of the variable


def rows() -> Iterator[dict[str, Any]]:
    """Prompts: a function, and the first line of the same one with its first long argument renamed."""
    for module in MODULES:
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None or not found.origin.endswith(".py"):
            continue
        text = Path(found.origin).read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef) or node.decorator_list or node.end_lineno is None:
                continue
            source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            names = [arg.arg for arg in node.args.args if len(arg.arg) > 2]
            again = names and re.sub(rf"\b{names[0]}\b", f"{names[0]}_", source)
            many = names and len(re.findall(rf"\b{names[0]}\b", source)) >= LEAST_USES
            if again and many and len(source.splitlines()) in LINES:
                begin = again.splitlines()[0]
                yield {"text": f"{source}\n\n\n{begin}\n", "category": "edit", "reference": again[len(begin) + 1 :]}
