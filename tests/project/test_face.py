"""`import imatrix`: what it offers, what type checkers see of it, and what it loads."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import imatrix


def stub() -> ast.Module:
    return ast.parse(Path(imatrix.__file__).with_suffix(".pyi").read_text("utf-8"))


def test_the_stub_names_what_the_package_offers() -> None:
    """A type checker reads the stub instead of the module."""
    imported = {}
    offered: list[str] = []
    for node in stub().body:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            imported.update({each.name: node.module for each in node.names})
        elif isinstance(node, ast.Assign):
            offered = ast.literal_eval(node.value)
    assert offered == imatrix.__all__
    assert set(imported) == set(offered)
    for name, module in imported.items():
        assert getattr(imatrix, name) is getattr(importlib.import_module(module), name), name


def test_nothing_is_loaded_before_it_is_used() -> None:
    """`import imatrix` loads neither the engine nor a library that only some uses need."""
    code = (
        "import sys, imatrix\n"
        "heavy = ('imatrix.native.engine', 'imatrix.native.quantizer', 'imatrix.cli', 'jinja2',\n"
        "         'matplotlib', 'rich', 'distributed', 'pyarrow')\n"
        "print(*[name for name in heavy if name in sys.modules])\n"
        "assert set(imatrix.__all__) == set(dir(imatrix))\n"
        "imatrix.Collector\n"
        "assert 'imatrix.native.engine' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
