"""docs/troubleshooting.md quotes messages as they are, and names every kind of error."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt

from imatrix import errors

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"

HOLE = "\0"  # a value that the message fills in


def quoted() -> list[str]:
    """The messages that the page has as headings."""
    tokens = MarkdownIt("commonmark").parse(PAGE.read_text(encoding="utf-8"))
    return [
        child.content
        for token, text in pairwise(tokens)
        if token.type == "heading_open" and token.tag == "h3"
        for child in text.children or ()
    ]


def of_python(path: Path) -> Iterator[str]:
    """String literals; values that f-strings fill in become holes, and literals joined by + become
    one."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else HOLE
        if isinstance(node, ast.JoinedStr):
            return "".join(text(value) for value in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        if isinstance(node, ast.IfExp):  # the message with the addition and without it
            return text(node.body) or HOLE
        return HOLE

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
            yield text(node)


def of_cpp(path: Path) -> Iterator[str]:
    """The string literals of each statement; whatever stands between two of them becomes a hole."""
    source = path.read_text(encoding="utf-8")
    parts: list[str] = []
    end = 0
    for found in re.finditer(r'"((?:[^"\\\n]|\\.)*)"|;', source):
        if found[0] == ";":
            yield HOLE + "".join(parts) + HOLE
            parts = []
            continue
        if parts and source[end : found.start()].strip():
            parts.append(HOLE)
        parts.append(found[1])
        end = found.end()


def test_every_message_is_one_of_ours() -> None:
    messages = [
        message
        for path in (ROOT / "src" / "imatrix").rglob("*.py")
        for message in of_python(path)
        if len(message) > 10
    ]
    messages += [m for path in (ROOT / "ext").glob("*.cpp") for m in of_cpp(path)]
    headings = quoted()
    assert len(headings) > 50
    unknown = []
    for heading in headings:
        pieces = heading.split("…")
        assert sum(len(piece.strip()) for piece in pieces) > 8, heading
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        if not any(pattern.search(message) for message in messages):
            unknown.append(heading)
    assert unknown == []


def test_every_kind_of_error_is_named() -> None:
    page = PAGE.read_text(encoding="utf-8")
    kinds = [
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.ImatrixError)
    ]
    assert len(kinds) > 8
    assert [name for name in kinds if f"`{name}`" not in page] == []
