"""What the functions that draw are given: checks, and how a matrix is named in a heading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from imatrix.matrix.importance import ImportanceMatrix
from imatrix.pictures.grids import Grid
from imatrix.pictures.looks import LOOKS
from imatrix.pictures.page import MARGIN
from imatrix.pictures.texts import SMALL, TITLE, clean, width_of
from imatrix.words import plural

__all__ = [
    "check_kinds",
    "check_look",
    "check_matrix",
    "choose",
    "describe_matrix",
    "find_weight",
    "heading_width",
]

_Choice = TypeVar("_Choice")

# Beyond these a picture cannot be read any more (and Agg ends at 65,536 pixels).
_MOST_KINDS = 300
_LIMITS = (3.0, 40.0)


def choose(label: str, value: str, known: Mapping[str, _Choice]) -> _Choice:
    """The one of these that a name stands for.

    Raises:
        ValueError: there is none; the message lists the names.
    """
    if value not in known:
        raise ValueError(f"{label} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def check_matrix(matrix: ImportanceMatrix, style: str, width: float | None) -> None:
    """Refuse an empty matrix, an unknown style and a width that cannot be drawn.

    Raises:
        ValueError: one of these.
    """
    if not len(matrix):
        raise ValueError("there is nothing to draw: the matrix is empty")
    check_look(style, width)


def check_look(style: str, width: float | None) -> None:
    """Refuse an unknown style and a width that cannot be drawn.

    Raises:
        ValueError: one of these.
    """
    choose("style", style, LOOKS)
    if width is not None and not _LIMITS[0] <= width <= _LIMITS[1]:
        low, high = _LIMITS
        raise ValueError(f"width must be {low:g} to {high:g} inches, got {width:g}")


def check_kinds(grid: Grid) -> None:
    """Refuse more kinds of weights than a picture has room for.

    Raises:
        ValueError: there are more.
    """
    if len(grid.rows) > _MOST_KINDS:
        raise ValueError(
            f"there are {len(grid.rows)} kinds of weights, more than the {_MOST_KINDS} that can be "
            "drawn: is this an importance matrix of a model with blk.N.* names?"
        )


def find_weight(matrix: ImportanceMatrix, name: str) -> str:
    """The whole name of a weight, whose `.weight` may be left out.

    Raises:
        KeyError: there is no such weight; the message names the nearest ones.
    """
    if name not in matrix and f"{name}.weight" in matrix:
        return f"{name}.weight"
    matrix[name]  # raises the error if there is none
    return name


def describe_matrix(matrix: ImportanceMatrix, name: str) -> str:
    """A matrix in a line of a heading: its weights, head blocks and chunks."""
    text = f"{len(matrix)} weights: {len(matrix.trunk)} trunk, {len(matrix.head)} head"
    if blocks := sorted(matrix.head_blocks):
        text += f" (block {', '.join(map(str, blocks))})"
    if matrix.chunk_count:
        text += f"; {plural(matrix.chunk_count, 'chunk')}"
        text += f" of {matrix.chunk_size} tokens" if matrix.chunk_size else ""
    return f"{name}: {text}" if name else text


def heading_width(title: str, notes: Sequence[str]) -> float:
    """A width at which the heading has few lines."""
    wanted = [
        width_of(clean(title), TITLE, bold=True),
        *(width_of(clean(note), SMALL) for note in notes),
    ]
    return 2 * MARGIN + 0.05 + min(max(wanted), 5.6)
