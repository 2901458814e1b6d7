"""Cells that have no colour: their hatches and marks, and the legend that explains them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    "add_legend",
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
    if not items:
        return
    places = []
    left, top = start, page.take(0.3) + 0.1
    for item, text in items:
        text = fitted(text, page.width - MARGIN - start - 0.3, SMALL)
        width = 0.3 + width_of(text, SMALL) + 0.2
        if left + width - 0.2 > page.width - MARGIN and left > start:
            left, top = start, page.take(0.2)
        places.append((item, text, left, top))
        left += width

    def draw() -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Rectangle

        inches = page.figure.dpi_scale_trans
        how: dict[str, Any]
        for item, text, x, y in places:
            if isinstance(item, State):
                how = (
                    {"facecolor": page.look.absent, "lw": 0}
                    if item == State.ABSENT
                    else hatched(page.look, item)
                )
                page.figure.add_artist(
                    Rectangle((x, page.y - y - 0.12), 0.24, 0.13, transform=inches, **how)
                )
            else:
                if item == UNSEEN and row >= LOW:
                    page.figure.add_artist(
                        Rectangle((x, page.y - y - 0.12), 0.24, 0.13, transform=inches, **WHITE)
                    )
                page.figure.add_artist(
                    Line2D(
                        [x + 0.12], [page.y - y - 0.055], transform=inches, linestyle="",
                        **mark_style(item, row),
                    )
                )  # fmt: skip
            page.text(x + 0.3, y, text, SMALL, color=page.look.muted)

    page.add(draw)
