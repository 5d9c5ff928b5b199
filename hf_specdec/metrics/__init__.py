"""Where the `evaluate` modules of this package are: `evaluate.load(hf_specdec.metrics.path("acceptance_rate"))`.

The modules in the folders beside this file are loaded by `evaluate`, never imported from here.
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
