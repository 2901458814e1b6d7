"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import THIN
from imatrix.pictures.numbers import Contrast, Grid, Part, Quantity, State
from imatrix.pictures.page import (
    LOOKS,
    MARGIN,
    SMALL,
    Look,
    Page,
    Style,
    clean,
    fitted,
    width_of,
    within,
)
from imatrix.pictures.scales import colour_map, log_scale, number_ticks, short, step_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

# --- the pieces --------------------------------------------------------------

_HATCHES = {
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


UNSEEN = "unseen"
THINNEST = "thinnest"


def _hatched(look: Look, state: State) -> dict[str, Any]:
    colour = {State.FIRST: look.first, State.SECOND: look.second}.get(state, look.muted)
    return {"facecolor": look.paper, "edgecolor": colour, "hatch": _HATCHES[state], "lw": 0}


def draw_grid(
    page: Page,
    grid: Grid,
    box: tuple[float, float, float, float],
    cmap: Colormap,
    norm: Normalize,
    xlabel: str | None,
    *,
    prefix: str = "",
    labels: bool = True,
    told: Callable[[float], str] = short,
) -> list[Axes]:
    """A heat map, an axes a part.

    Args:
        xlabel: None for no ticks and no label below.
        told: how values are written into the cells, where these are large enough.
    """
    left, top, width, height = box
    row = height / len(grid.rows)
    drawn = []
    boxes = _part_boxes(grid, left, width)
    roomy = _roomy(grid, width, row)
    for part, (x, w) in zip(grid.parts, boxes, strict=True):
        axes = page.axes((x, top, w, height), prefix + part.label)
        drawn.append(axes)
        axes.imshow(part.values, cmap=cmap, norm=norm, aspect="auto", interpolation="none")
        cell = w / len(part.columns)
        _rule(page, axes, part, cell, row)
        for state in _HATCHES:
            if state != State.NO_ROWS or xlabel is not None:  # experts are marked otherwise
                _hatch(page, axes, part, state)
        if roomy:
            _write_values(axes, part, cmap, norm, told)
        page.text(x + w / 2, top - 0.05, part.label, SMALL, ha="center", va="bottom",
                  color=page.look.muted)  # fmt: skip
        _block_ticks(axes, part, cell, shown=xlabel is not None)
        row_ticks(axes, grid.rows, row, shown=labels and len(drawn) == 1)
    if xlabel is not None and any(part.columns != ("",) for part in grid.parts):
        page.text(left + width / 2, top + height + 0.22, xlabel, SMALL, ha="center",
                  color=page.look.muted)  # fmt: skip
    return drawn


def _part_boxes(grid: Grid, left: float, width: float) -> list[tuple[float, float]]:
    """(left, width) of each part: in proportion to its columns, but room for its label."""
    gap = 0.09
    free = width - gap * (len(grid.parts) - 1)
    total = sum(len(part.columns) for part in grid.parts)
    widths = [free * len(part.columns) / total for part in grid.parts]
    least = [
        width_of(part.label, SMALL) + 0.04 if len(grid.parts) > 1 else 0.0 for part in grid.parts
    ]
    short = [max(0.0, need - have) for need, have in zip(least, widths, strict=True)]
    spare = [max(0.0, have - need) for need, have in zip(least, widths, strict=True)]
    share = min(1.0, sum(short) / sum(spare)) if sum(spare) else 0.0
    boxes = []
    for have, more, less in zip(widths, short, spare, strict=True):
        boxes.append((left, have + more - share * less))
        left += boxes[-1][1] + gap
    return boxes


def _rule(page: Page, axes: Axes, part: Part, cell: float, row: float) -> None:
    """Thin lines between cells that are large enough for them."""
    n_rows, n_columns = part.values.shape
    look: dict[str, Any] = {"colors": page.look.paper, "linewidth": 0.6}
    if row >= 0.12:
        axes.hlines(np.arange(n_rows - 1) + 0.5, -0.5, n_columns - 0.5, **look)
    if cell >= 0.12:
        axes.vlines(np.arange(n_columns - 1) + 0.5, -0.5, n_rows - 0.5, **look)
    axes.set(xlim=(-0.5, n_columns - 0.5), ylim=(n_rows - 0.5, -0.5))


def _hatch(page: Page, axes: Axes, part: Part, state: State) -> None:
    from matplotlib.patches import Rectangle

    for row, line in enumerate(part.states == state):
        for start, end in _runs(line):
            axes.add_patch(
                Rectangle((start - 0.5, row - 0.5), end - start, 1, **_hatched(page.look, state))
            )


def _runs(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(start, end) of neighbours that are true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    for start, end in edges.reshape(-1, 2).tolist():  # noqa: UP028 - lists
        yield start, end


def _roomy(grid: Grid, width: float, row: float) -> bool:
    """Whether there is room for a number in each cell."""
    boxes = zip(grid.parts, _part_boxes(grid, 0.0, width), strict=True)
    return row >= 0.18 and all(w / len(part.columns) >= 0.44 for part, (_, w) in boxes)


def _write_values(
    axes: Axes, part: Part, cmap: Colormap, norm: Normalize, told: Callable[[float], str]
) -> None:
    for (row, column), value in np.ndenumerate(part.values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = cmap(norm(value))
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        axes.text(
            column,
            row,
            told(float(value)),
            size=7,
            ha="center",
            va="center_baseline",
            color="#000000" if light else "#ffffff",
        )


def _block_ticks(axes: Axes, part: Part, cell: float, *, shown: bool) -> None:
    if part.columns == ("",) or not shown:
        axes.set_xticks([])
        return
    room = max(width_of(label, SMALL) for label in part.columns) + 0.08
    step = step_of(room / cell)
    at = list(range(0, len(part.columns), step))
    axes.set_xticks(at, [part.columns[n] for n in at])


def row_ticks(axes: Axes, rows: Sequence[str], row: float, *, shown: bool) -> None:
    if not shown:
        axes.set_yticks([])
        return
    at = list(range(0, len(rows), step_of(0.15 / row)))
    axes.set_yticks(at, [clean(rows[n], 34) for n in at])


def mark_experts(grid: Grid, axes: Sequence[Axes], width: float, height: float) -> None:
    """White cells with a dot for experts without rows, circles for the thinnest."""
    from matplotlib.patches import Rectangle

    row = height / len(grid.rows) * 72  # points
    thinnest = set(_thinnest(grid))
    aside = 0.36 if _roomy(grid, width, row / 72) else 0.0  # where a number is
    for part, each in zip(grid.parts, axes, strict=True):
        if row >= _LOW:
            for column, line in enumerate((part.states == State.NO_ROWS).T):
                for start, end in _runs(line):
                    place = (column - 0.5, start - 0.5)
                    each.add_patch(Rectangle(place, 1, end - start, **_WHITE))
        unseen, columns = np.nonzero(part.states == State.NO_ROWS)
        each.plot(columns, unseen, linestyle="", label="unseen", **_mark(UNSEEN, row))
        circles = [
            (column - aside, expert)
            for column, block in enumerate(part.columns)
            for expert in range(len(grid.rows))
            if (int(block), expert) in thinnest
        ]
        if circles:
            each.plot(*zip(*circles, strict=True), linestyle="", clip_on=False, label="thinnest",
                      **_mark(THINNEST, row))  # fmt: skip


# Points: cells below this would lose a dot, or be lost themselves.
_LOW = 4.0
_WHITE: dict[str, Any] = {"facecolor": "#ffffff", "edgecolor": "#000000", "lw": 0.6}


def _mark(which: str, row: float) -> dict[str, Any]:
    """How a marker looks where cells are `row` points high."""
    if which == THINNEST:
        return {
            "marker": "o",
            "markersize": within(row, 7.0, 10.0),
            "markerfacecolor": "none",
            "markeredgecolor": "#ff3d7f",
            "markeredgewidth": 1.6,
        }
    if row >= _LOW:
        return {"marker": ".", "markersize": within(0.7 * row, 3.0, 5.0), "color": "#000000"}
    return {
        "marker": "s",
        "markersize": 3.4,
        "markerfacecolor": "#ffffff",
        "markeredgecolor": "#000000",
        "markeredgewidth": 0.8,
    }


def _thinnest(grid: Grid, n: int = 3) -> list[tuple[int, int]]:
    """(block, expert) of those with the fewest rows, those without any left out."""
    found = [
        (float(part.values[expert, column]), int(block), expert)
        for part in grid.parts
        for column, block in enumerate(part.columns)
        for expert in np.argsort(part.values[:, column], kind="stable")[:n].tolist()
        if np.isfinite(part.values[expert, column])
    ]
    return [(block, expert) for _, block, expert in sorted(found)[:n]]


def spread_words(
    look: Look, width: float
) -> tuple[list[tuple[str, str, tuple[float, float]]], float]:
    """What the lines below the map are: (text, colour, place right of the left edge and above
    the lowest line), and the height of it all."""
    lines: list[list[tuple[str, str, float]]] = [[]]
    at = 0.0
    for text, colour in (
        ("rows of a block's experts:", look.muted),
        ("fewest to most,", look.line),
        ("median;", look.second),
        (f"dashed: {THIN}, thin below", look.muted),
    ):
        room = width_of(text, SMALL)
        if at + room > width and lines[-1]:
            lines.append([])
            at = 0.0
        lines[-1].append((text, colour, at))
        at += room + 0.08
    words = [
        (text, colour, (x, 0.16 * (len(lines) - 1 - n)))
        for n, line in enumerate(lines)
        for text, colour, x in line
    ]
    return words, 0.16 * len(lines)


def draw_spread(page: Page, grid: Grid, box: tuple[float, float, float, float]) -> None:
    """Most, median and fewest rows of the experts of each block."""
    left, top, width, height = box
    values = np.append(grid.values, THIN)
    low, high = values.min() / 1.5, values.max() * 1.5
    for n, (part, (x, w)) in enumerate(
        zip(grid.parts, _part_boxes(grid, left, width), strict=True)
    ):
        axes = page.axes((x, top, w, height), f"{part.label} rows")
        axes.set_facecolor(page.look.paper)
        axes.set_yscale("log")
        place = np.arange(len(part.columns))
        seen = [column[np.isfinite(column)] for column in part.values.T]
        low_mid_high = np.array(
            [(c.min(), np.median(c), c.max()) if c.size else (np.nan, np.nan, np.nan) for c in seen]
        )
        for edge in (0, 2):
            axes.plot(
                place, low_mid_high[:, edge], color=page.look.line, marker="_", markersize=5,
                linestyle="", label=("fewest", "", "most")[edge],
            )  # fmt: skip
        axes.vlines(place, low_mid_high[:, 0], low_mid_high[:, 2], colors=page.look.line, lw=1.2)
        axes.plot(
            place, low_mid_high[:, 1], color=page.look.second, marker="o", markersize=3.2,
            linestyle="", label="median",
        )  # fmt: skip
        axes.axhline(THIN, color=page.look.muted, linewidth=0.9, linestyle=(0, (4, 2)))
        axes.set(xlim=(-0.5, len(part.columns) - 0.5), ylim=(low, high))
        _block_ticks(axes, part, w / len(part.columns), shown=True)
        number_ticks(axes, low, high, height, axis="y", shown=n == 0)
    for text, colour, (x, y) in spread_words(page.look, width)[0]:
        page.text(left + x, top - 0.2 - y, text, SMALL, color=colour)
    page.text(left + width / 2, top + height + 0.22, "block", SMALL, ha="center",
              color=page.look.muted)  # fmt: skip


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
        marks: of experts, where cells are `row` points high.
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
                    else _hatched(page.look, item)
                )
                page.figure.add_artist(
                    Rectangle((x, page.y - y - 0.12), 0.24, 0.13, transform=inches, **how)
                )
            else:
                if item == UNSEEN and row >= _LOW:
                    page.figure.add_artist(
                        Rectangle((x, page.y - y - 0.12), 0.24, 0.13, transform=inches, **_WHITE)
                    )
                page.figure.add_artist(
                    Line2D(
                        [x + 0.12], [page.y - y - 0.055], transform=inches, linestyle="",
                        **_mark(item, row),
                    )
                )  # fmt: skip
            page.text(x + 0.3, y, text, SMALL, color=page.look.muted)

    page.add(draw)


def signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    return "0.00" if text[1:] == "0.00" else text


# --- scales, texts -----------------------------------------------------------


def value_scale(
    values: NDArray[np.float64], quantity: Quantity, style: Style
) -> tuple[Colormap, Normalize]:
    from matplotlib.colors import Normalize

    if quantity.log:
        return log_scale(values, style)
    assert quantity.limits is not None
    low, high = quantity.limits
    return colour_map(style), Normalize(low, high)


def contrast_scale(
    values: NDArray[np.float64], contrast: Contrast, style: Style
) -> tuple[Colormap, Normalize]:
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    if not contrast.centred:
        if values.max(initial=0.0) < 10 * contrast.least:
            # equal matrices get the lowest colour, not one in the middle
            values = np.array([1, 10]) * contrast.least
        return log_scale(values, style, "cividis")
    look = LOOKS[style]
    most = float(np.abs(values).max(initial=contrast.least))
    cmap = LinearSegmentedColormap.from_list("difference", look.diverging)
    return cmap.with_extremes(bad=look.absent), Normalize(-most, most)
