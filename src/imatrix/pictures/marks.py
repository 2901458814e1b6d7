"""Cells that have no colour: their hatches and marks, and the legend that explains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from imatrix.pictures.grids import State
from imatrix.pictures.looks import Look
from imatrix.pictures.page import MARGIN, Page, within
from imatrix.pictures.texts import SMALL, fitted, width_of

__all__ = [
    "HATCHES",
    "LOW",
    "THINNEST",
    "UNSEEN",
    "WHITE",
    "add_items",
    "add_legend",
    "draw_line",
    "draw_swatch",
    "hatched",
    "mark_style",
]

HATCHES = {
    State.NO_ROWS: "xxxxx",
    State.ZERO: ".....",
    State.FIRST: "\\\\\\\\\\",
    State.SECOND: "/////",
    State.SHAPE: "+++++",
    State.NONE: "ooo",
}
_WORDS = {
    State.ABSENT: "not in the matrix",
    State.NO_ROWS: "no rows",
    State.ZERO: "only zeros",
    State.FIRST: "in the first only",
    State.SECOND: "in the second only",
    State.SHAPE: "shapes differ",
    State.NONE: "nothing to compare",
}

# marks of experts: no rows, or the fewest
UNSEEN = "unseen"
THINNEST = "thinnest"

# Points: cells below this would lose a dot, or be lost themselves.
LOW = 4.0
WHITE: dict[str, Any] = {"facecolor": "#ffffff", "edgecolor": "#000000", "lw": 0.6}


def hatched(look: Look, state: State) -> dict[str, Any]:
    """How a cell of this state is drawn: keyword arguments of a patch."""
    colour = {State.FIRST: look.first, State.SECOND: look.second}.get(state, look.muted)
    return {"facecolor": look.paper, "edgecolor": colour, "hatch": HATCHES[state], "lw": 0}


def mark_style(which: str, row: float) -> dict[str, Any]:
    """How a marker looks on cells that are `row` points high."""
    if which == THINNEST:
        return {
            "marker": "o",
            "markersize": within(row, 7.0, 10.0),
            "markerfacecolor": "none",
            "markeredgecolor": "#ff3d7f",
            "markeredgewidth": 1.6,
        }
    if row >= LOW:
        return {"marker": ".", "markersize": within(0.7 * row, 3.0, 5.0), "color": "#000000"}
    return {
        "marker": "s",
        "markersize": 3.4,
        "markerfacecolor": "#ffffff",
        "markeredgecolor": "#000000",
        "markeredgewidth": 0.8,
    }


def add_legend(
    page: Page,
    start: float,
    states: frozenset[State],
    marks: Sequence[str] = (),
    row: float = 0.0,
    texts: Mapping[str, str] | None = None,
) -> None:
    """What the cells without a colour are.

    Args:
        start: where it starts, in inches from the left.
        marks: of experts, on cells that are `row` points high.
        texts: other words for a state, by its name.
    """
    items: list[tuple[State | str, str]] = [
        (state, (texts or {}).get(state.name, text))
        for state, text in _WORDS.items()
        if state in states
    ]
    items += [(mark, {UNSEEN: "no rows", THINNEST: "fewest rows"}[mark]) for mark in marks]
    add_items(
        page,
        start,
        page.width - MARGIN,
        [(partial(_draw_mark, page, item, row), text) for item, text in items],
    )


def add_items(
    page: Page,
    start: float,
    end: float,
    items: Sequence[tuple[Callable[[float, float], object], str]],
) -> None:
    """Marks and what they mean, one behind the other, in as many lines as they need.

    Args:
        start, end: between which they stand, in inches from the left.
        items: what draws the mark, 0.24 inches wide and 0.12 high, with its top left corner at a
            place; and the words for it.
    """
    if not items:
        return
    places = []
    left, top = start, page.take(0.3) + 0.1
    for draw_mark, text in items:
        text = fitted(text, end - start - 0.3, SMALL)
        width = 0.3 + width_of(text, SMALL) + 0.2
        if left + width - 0.2 > end and left > start:
            left, top = start, page.take(0.2)
        places.append((draw_mark, text, left, top))
        left += width

    def draw() -> None:
        for draw_mark, text, x, y in places:
            draw_mark(x, y)
            page.text(x + 0.3, y, text, SMALL, color=page.look.muted)

    page.add(draw)


def draw_swatch(page: Page, left: float, top: float, how: Mapping[str, Any]) -> None:
    """A patch of a legend; how: keyword arguments of matplotlib's."""
    from matplotlib.patches import Rectangle

    page.figure.add_artist(
        Rectangle(
            (left, page.y - top - 0.12), 0.24, 0.13, transform=page.figure.dpi_scale_trans, **how
        )
    )


def draw_line(page: Page, left: float, top: float, how: Mapping[str, Any]) -> None:
    """A line of a legend, with a marker in its middle; how: keyword arguments of matplotlib's."""
    from matplotlib.lines import Line2D

    page.figure.add_artist(
        Line2D(
            [left, left + 0.12, left + 0.24],
            [page.y - top - 0.055] * 3,
            markevery=[1],
            transform=page.figure.dpi_scale_trans,
            **how,
        )
    )


def _draw_mark(page: Page, item: State | str, row: float, left: float, top: float) -> None:
    if item == State.ABSENT:
        draw_swatch(page, left, top, {"facecolor": page.look.absent, "lw": 0})
    elif isinstance(item, State):
        draw_swatch(page, left, top, hatched(page.look, item))
    else:
        if item == UNSEEN and row >= LOW:
            draw_swatch(page, left, top, WHITE)
        draw_line(page, left, top, {"linestyle": "", **mark_style(item, row)})
