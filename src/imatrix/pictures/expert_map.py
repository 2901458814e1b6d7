"""`experts`: the rows that each expert saw, experts against blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from imatrix.entries import THIN
from imatrix.matrix.experts import expert_rows
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.pictures.arguments import check_matrix, describe_matrix, heading_width
from imatrix.pictures.grids import Grid, State, expert_grid
from imatrix.pictures.heatmaps import block_ticks, draw_grid, has_room, part_boxes, runs
from imatrix.pictures.looks import Look, Style
from imatrix.pictures.marks import LOW, THINNEST, UNSEEN, WHITE, add_legend, mark_style
from imatrix.pictures.page import LEAST_PLOT, MARGIN, Page, drawing, within
from imatrix.pictures.scales import add_scale, log_scale, number_ticks
from imatrix.pictures.texts import SMALL, labels_width, width_of
from imatrix.words import few, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "experts",
]


def experts(
    matrix: ImportanceMatrix,
    *,
    name: str = "",
    style: Style = "light",
    width: float | None = None,
) -> Figure:
    """A map of the rows that each expert saw: experts against blocks, on a logarithmic scale.

    A block's experts have the rows of its weight (gate, up, down) that has the fewest. Experts
    without a row are white with a dot, the three with the fewest rows have a circle; the heading
    names them. Below it, by block, the most, the median and the fewest rows of the experts that
    have any, and the line of 32 rows under which a mean is thin.

    Args:
        name, style, width: as for `layers`.

    Returns:
        A figure with an axes for each part ("trunk", "head") whose image holds the rows
        [n_experts, n_blocks], NaN where there are none, and one each for the lines below
        ("trunk rows", "head rows").

    Raises:
        ImportError, ValueError: as for `layers`.
        ValueError: no weight has a count an expert.
    """
    check_matrix(matrix, style, width)
    grid = expert_grid(matrix)
    if not grid.parts:
        raise ValueError(
            "there are no experts to draw: no weight has a count for each expert. The model may "
            "be a dense one; a .dat file does not keep the experts' counts (draw the GGUF file)"
        )
    with drawing():
        cmap, norm = log_scale(grid.values, style)
        n_columns = sum(len(part.columns) for part in grid.parts)
        labels = max(labels_width(grid.rows), labels_width(["10000"])) + 0.2
        wanted = 2 * MARGIN + labels + within(0.22 * n_columns + 0.4, 3.6, 8.4)
        title, notes = (
            "Rows each expert saw",
            [describe_matrix(matrix, name), _describe_experts(matrix)],
        )
        page = Page(style, width or max(wanted, heading_width(title, notes)), title, notes)
        plot = max(page.width - 2 * MARGIN - labels, LEAST_PLOT)
        left = page.width - MARGIN - plot
        height = within(0.16 * len(grid.rows), 1.4, 6.6)
        top = page.take(0.2 + height) + 0.2
        words = _spread_words(page.look, plot)[1] + 0.14
        below = page.take(words + 1.1 + 0.42) + words

        def draw() -> None:
            box = (left, top, plot, height)
            axes = draw_grid(page, grid, box, cmap, norm, None, describe=lambda rows: f"{rows:.0f}")
            _mark_experts(grid, axes, plot, height)
            axes[0].set_ylabel("expert", size=SMALL, color=page.look.muted)
            _draw_spread(page, grid, (left, below, plot, 1.1))

        page.add(draw)
        marks = [UNSEEN] if State.NO_ROWS in grid.states else []
        if State.VALUE in grid.states:
            add_scale(page, (left, min(plot, 4.2)), cmap, norm, "rows (log scale)")
            marks.append(THINNEST)
        add_legend(
            page,
            left,
            grid.states & {State.ABSENT},
            marks,
            72 * height / len(grid.rows),
            {"ABSENT": "no such expert"},
        )
        return page.finish()


def _describe_experts(matrix: ImportanceMatrix) -> str:
    rows = expert_rows(matrix)
    places = [
        (int(n), block, expert) for block, seen in rows.items() for expert, n in enumerate(seen)
    ]
    unseen = [place for place in places if place[0] == 0]
    thin = sum(0 < n < THIN for n, _, _ in places)
    text = f"{plural(len(places), 'expert')} in {plural(len(rows), 'block')}: "
    if unseen:
        first = few([f"blk.{block} expert {expert}" for _, block, expert in unseen], 3)
        text += f"{len(unseen)} saw no rows ({first}), "
    else:
        text += "all saw rows, "
    text += f"{thin} saw fewer than {THIN}."
    least = sorted(place for place in places if place[0] > 0)[:3]
    if least:
        listed = ", ".join(f"blk.{block} expert {expert} ({n})" for n, block, expert in least)
        text += f" Fewest: {listed}"
    return text


def _mark_experts(grid: Grid, axes: Sequence[Axes], width: float, height: float) -> None:
    """White cells with a dot for experts without rows, circles for the thinnest."""
    from matplotlib.patches import Rectangle

    row = height / len(grid.rows) * 72  # points
    thinnest = set(_thinnest(grid))
    aside = 0.36 if has_room(grid, width, row / 72) else 0.0  # beside the number in the cell
    for part, each in zip(grid.parts, axes, strict=True):
        if row >= LOW:
            for column, line in enumerate((part.states == State.NO_ROWS).T):
                for start, end in runs(line):
                    place = (column - 0.5, start - 0.5)
                    each.add_patch(Rectangle(place, 1, end - start, **WHITE))
        unseen, columns = np.nonzero(part.states == State.NO_ROWS)
        each.plot(columns, unseen, linestyle="", label="unseen", **mark_style(UNSEEN, row))
        circles = [
            (column - aside, expert)
            for column, block in enumerate(part.columns)
            for expert in range(len(grid.rows))
            if (int(block), expert) in thinnest
        ]
        if circles:
            each.plot(*zip(*circles, strict=True), linestyle="", clip_on=False, label="thinnest",
                      **mark_style(THINNEST, row))  # fmt: skip


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


def _spread_words(
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


def _draw_spread(page: Page, grid: Grid, box: tuple[float, float, float, float]) -> None:
    """Most, median and fewest rows of the experts of each block."""
    left, top, width, height = box
    values = np.append(grid.values, THIN)
    low, high = values.min() / 1.5, values.max() * 1.5
    for n, (part, (x, w)) in enumerate(zip(grid.parts, part_boxes(grid, left, width), strict=True)):
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
        block_ticks(axes, part, w / len(part.columns), shown=True)
        number_ticks(axes, low, high, height, axis="y", shown=n == 0)
    for text, colour, (x, y) in _spread_words(page.look, width)[0]:
        page.text(left + x, top - 0.2 - y, text, SMALL, color=colour)
    page.text(left + width / 2, top + height + 0.22, "block", SMALL, ha="center",
              color=page.look.muted)  # fmt: skip
