"""The house keeps its levels: which module may import which, and how large the central rooms may
grow.

This test imports nothing: the syntax trees say what each module imports, also inside functions and
    for type checkers.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "imatrix"

FACE = "imatrix"
# CONTRIBUTING, "The house", has the same table.
LEVELS = (
    ("errors", "tensors", "words", "entries", "_version"),
    ("files",),
    ("native",),
    ("formats", "model"),
    ("matrix",),
    ("text",),
    ("engine",),
    ("heads", "quantization", "cluster", "evaluation"),
    ("collect", "recipes"),
    ("pictures",),
    ("report",),
    ("demo",),
    ("cli",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
OUTSIDE = ("__init__", "__main__")  # the face, and what starts the command line


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# A module by its name. A Cython module has no Python syntax tree, so its stub is read instead.
MODULES = {
    name_of(path): path
    for suffix in ("*.pyi", "*.py")
    for path in sorted(PACKAGE.rglob(suffix))
    if path.with_suffix(".py") != PACKAGE / "__init__.py" or suffix == "*.py"
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else FACE


def imports(module: str) -> Iterator[tuple[str, str, int]]:
    """Every module of the package that this one imports, with the imported name and the line."""
    package = module if MODULES[module].stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == FACE:
                    yield alias.name, "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            if base.split(".")[0] != FACE:
                continue
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                yield (
                    (inside, "", node.lineno)
                    if inside in MODULES
                    else (
                        base,
                        alias.name,
                        node.lineno,
                    )
                )


IMPORTS = {name: list(imports(name)) for name in MODULES}


def test_what_stands_at_the_top() -> None:
    """The modules that every package uses; all others are in a package named for its subject."""
    top = {path.stem for path in PACKAGE.glob("*.py")}
    assert top <= {*OUTSIDE, "_version", "errors", "entries", "tensors", "words", "demo"}
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} | top == {
        *LEVEL_OF,
        *OUTSIDE,
    }


def test_a_room_imports_only_rooms_of_the_levels_before_its_own() -> None:
    wrong = [
        f"{module} imports {target} in line {line}"
        for module, targets in IMPORTS.items()
        if room_of(module) not in (FACE, "__main__")
        for target, _, line in targets
        if room_of(target) != room_of(module)
        and not (room_of(target) == FACE and room_of(module) == "cli")
        and LEVEL_OF.get(room_of(target), len(LEVELS)) >= LEVEL_OF[room_of(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    seen: dict[str, int] = {}
    path: list[str] = []

    def walk(module: str) -> None:
        if module in path:
            pytest.fail(" -> ".join([*path[path.index(module) :], module]))
        if module in seen:
            return
        path.append(module)
        for target, _, _ in IMPORTS.get(module, ()):
            if target != FACE:  # only cli imports the face, which does not import cli
                walk(target)
        seen[path.pop()] = 1

    for module in MODULES:
        walk(module)


def test_no_private_name_of_another_module_is_imported() -> None:
    wrong = [
        f"{module} takes {name} of {target} in line {line}"
        for module, targets in IMPORTS.items()
        for target, name, line in targets
        if name.startswith("_") and not name.startswith("__")
    ]
    assert not wrong, "\n".join(wrong)


def test_contributing_has_the_table() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \| .+ \|$", page, re.MULTILINE)
    told = [tuple(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows]
    assert told[: len(LEVELS)] == list(LEVELS)
    assert [int(number) for number, _ in rows][: len(LEVELS)] == list(range(1, len(LEVELS) + 1))
    for room in LEVEL_OF:
        assert room == "_version" or re.search(rf"^- `{room}`", page, re.MULTILINE), room


def test_every_module_says_what_it_is_for() -> None:
    for name, path in MODULES.items():
        if path.suffix == ".py":
            told = ast.get_docstring(TREES[name])
            assert told, name
            assert not told.startswith("TODO"), name


@pytest.mark.parametrize(
    ("path", "most"),
    [
        ("src/imatrix/collect/collector.py", 400),
        ("ext/session.cpp", 499),
        ("ext/evaluator.cpp", 499),
    ],
)
def test_the_central_files_stay_small(path: str, most: int) -> None:
    assert len((ROOT / path).read_text("utf-8").splitlines()) <= most


def test_settings_travel_as_frozen_values() -> None:
    """No dict of anything carries settings from one function to the next, and no locals() does
    either."""
    wrong = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in ("locals", "vars"):
                    wrong.append(f"{name}: {node.func.id}() in line {node.lineno}")
            elif isinstance(node, ast.arg) and node.annotation is not None:
                kind = ast.unparse(node.annotation)
                if node.arg in ("settings", "options", "arguments") and "Any]" in kind:
                    wrong.append(f"{name}: {node.arg}: {kind} in line {node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_what_takes_long_is_marked_and_listed() -> None:
    marked = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(each) == "pytest.mark.slow" for each in node.decorator_list
            ):
                marked.add(node.name)
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    [listed] = re.findall(r"^- `slow`: (.+?)^- ", page, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(test_\w+)`", listed)) == marked
