"""How the package is arranged: folders import downwards only, files are short, one folder patches transformers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_specdec

PACKAGE = Path(hf_specdec.__file__).parent
# From the top down: what stands in one line may import what stands in later ones, and nothing else of the package.
STOREYS = (
    *("__main__", "cli", "integrations", "tools", "__init__", "generate", "pairs", "loop", "drafters", "models"),
    *("cache", "sampling", "kernels", "records", "metrics", "options", "device"),
)
# Assigned to by the one folder that may; the kernels exchange functions through `kernels/swap.py`, and put them back.
PATCHING = "generate"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "metrics" not in path.parts or path.name == "__init__.py")


def place(path: Path) -> str:
    """The storey of a file: its folder, or its name if it is in none."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules(path: Path) -> Iterator[list[str]]:
    """The modules of the package that a file imports, each as its parts below the package."""
    parents = list(path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parents[: len(parents) - node.level + 1] + (node.module.split(".") if node.module else [])
            yield from ([base] if base else [[alias.name] for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_specdec":
            yield (node.module or "").split(".")[1:] or ["__init__"]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "hf_specdec":
                    yield alias.name.split(".")[1:] or ["__init__"]


def test_every_folder_has_a_storey() -> None:
    assert {place(path) for path in FILES} == set(STOREYS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = STOREYS.index(place(path))
    for parts in modules(path):
        there = parts[0] if parts[0] in STOREYS else "__init__"
        assert there == place(path) or STOREYS.index(there) > here, f"{place(path)} imports {'.'.join(parts)}"


def test_no_two_files_import_each_other() -> None:
    """Not even within a folder."""
    names = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}
    imports = {
        name: {".".join(parts) for parts in modules(path)} & names.keys() - {name} for name, path in names.items()
    }
    while imports:
        free = [name for name, needed in imports.items() if not needed & imports.keys()]
        assert free, f"a circle among {sorted(imports)}"
        for name in free:
            del imports[name]


def patches(tree: ast.Module) -> Iterator[str]:
    """What a file assigns to, or deletes, of objects that it imports from transformers."""
    foreign = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if ((node.module or "") if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0] == "transformers"
    }
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            targets = [ast.Attribute(node.args[0], "?", ast.Store())]
        for target in targets:
            while isinstance(target, (ast.Attribute, ast.Subscript)):
                inner = target.value
                if isinstance(inner, ast.Name) and inner.id in foreign:
                    yield ast.unparse(node)
                target = inner


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_folder_changes_transformers(path: Path) -> None:
    found = list(patches(ast.parse(path.read_text(encoding="utf-8"))))
    assert not found or place(path) == PATCHING, found


def test_patches_are_seen() -> None:
    """As they are written where they are allowed."""
    assert list(patches(ast.parse((PACKAGE / "generate" / "strategy.py").read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_look_at_no_frames(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 420
    assert "_getframe" not in text and "currentframe" not in text


def test_few_files_stand_outside_of_folders() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_few_functions_have_many_parameters() -> None:
    many = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > 11:
                    many.append(f"{path.name}: {node.name}")
    assert len(many) <= 3, many


def test_tests_mirror_the_package() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    tests = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    assert tests <= folders
    assert folders - tests == set()


def test_all_files_are_packaged() -> None:
    """Wheels hold the modules, and other files as far as the patterns of pyproject.toml match them."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["hf_specdec"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others <= packaged, sorted(map(str, others - packaged))
