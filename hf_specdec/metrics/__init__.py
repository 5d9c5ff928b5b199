"""Paths of this package's `evaluate` modules: `evaluate.load(hf_specdec.metrics.path("acceptance_rate"))`.

`evaluate` loads the modules in the folders next to this file; they are never imported from here.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent
NAMES = tuple(sorted(folder.name for folder in _FOLDER.iterdir() if (folder / f"{folder.name}.py").is_file()))


def path(name: str) -> str:
    """The folder of a metric, for `evaluate.load`.

    Args:
        name: one of `NAMES`: "acceptance_rate" or "token_agreement".

    Raises:
        ValueError: for any other name.
    """
    if name not in NAMES:
        raise ValueError(f"Unknown metric {name!r}; known metrics: {', '.join(map(repr, NAMES))}")
    return str(_FOLDER / name)
