"""A grid as a heat map, an axes for each part of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imatrix.pictures.grids import Grid, Part, State
from imatrix.pictures.looks import Style
from imatrix.pictures.marks import HATCHES, hatched
from imatrix.pictures.numbers import Quantity
from imatrix.pictures.page import Page
from imatrix.pictures.scales import colour_map, log_scale, short, step_of
from imatrix.pictures.texts import SMALL, clean, width_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

__all__ = [
    "ROW",
    "block_ticks",
    "cell_width",
    "draw_grid",
    "has_room",
    "part_boxes",
    "row_ticks",
    "runs",
    "value_scale",
    "wanted_width",
]

# inches of a row of cells
ROW = 0.21
# inches between two parts
_GAP = 0.09
# inches of a row with room for text
_LEAST_ROW = 0.18
# points of that text
_IN_CELL = 7.0
# Luminance that black and white have the same contrast with, 4.6: (L + 0.05) / 0.05 = 1.05 / (L + 0.05)
_MIDDLE = 1.05**0.5 * 0.05**0.5 - 0.05


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
    describe: Callable[[float], str] = short,
    texts: Sequence[NDArray[np.str_]] | None = None,
) -> list[Axes]:
    """A heat map, an axes a part.

    Args:
        xlabel: what the columns are; None for no ticks and no label below.
        describe: gives the text of a value, for cells that are large enough.
        texts: of the cells of each part [n_rows, n_columns], instead of what `describe` gives; a
            part whose cells are too small for its texts has none.
    """
    left, top, width, height = box
    row = height / len(grid.rows)
    drawn = []
    needed = [] if texts is None else [cell_width(each.ravel()) for each in texts]
    boxes = part_boxes(grid, left, width, needed)
    roomy = has_room(grid, width, row)
    for n, (part, (x, w)) in enumerate(zip(grid.parts, boxes, strict=True)):
        axes = page.axes((x, top, w, height), prefix + part.label)
        drawn.append(axes)
        axes.imshow(part.values, cmap=cmap, norm=norm, aspect="auto", interpolation="none")
        cell = w / len(part.columns)
        _rule(page, axes, part, cell, row)
        for state in HATCHES:
            if state != State.NO_ROWS or xlabel is not None:  # experts are marked otherwise
                _hatch(page, axes, part, state)
        if texts is not None:
            # a width that was made to fit may be less by a rounding
            if row >= _LEAST_ROW and cell >= needed[n] - 1e-6:
                _write(axes, part, cmap, norm, partial(_text_at, texts[n]))
        elif roomy:
            _write(axes, part, cmap, norm, lambda _, value: describe(value))
        page.text(x + w / 2, top - 0.05, part.label, SMALL, ha="center", va="bottom",
                  color=page.look.muted)  # fmt: skip
        block_ticks(axes, part, cell, shown=xlabel is not None)
        row_ticks(axes, grid.rows, row, shown=labels and len(drawn) == 1)
    if xlabel is not None and any(part.columns != ("",) for part in grid.parts):
        page.text(left + width / 2, top + height + 0.22, xlabel, SMALL, ha="center",
                  color=page.look.muted)  # fmt: skip
    return drawn


def cell_width(texts: Iterable[str]) -> float:
    """Inches that a cell needs for the widest of these texts."""
    return max((width_of(text, _IN_CELL) for text in set(texts)), default=0.0) + 0.06


def part_boxes(
    grid: Grid, left: float, width: float, needed: Sequence[float] = ()
) -> list[tuple[float, float]]:
    """(left, width) of each part: in proportion to its columns, but room for its label.

    Args:
        needed: inches that a cell of each part would like to have. If there is not enough room for
            all of them, parts of one or two columns get them.
    """
    free = width - _GAP * (len(grid.parts) - 1)
    total = sum(len(part.columns) for part in grid.parts)
    widths = [free * len(part.columns) / total for part in grid.parts]
    least = _least_widths(grid, needed)
    if sum(least) > free:
        few = [each if len(part.columns) <= 2 else 0.0 for part, each in _each(grid, needed)]
        least = _least_widths(grid, few)
    lacking = [max(0.0, need - have) for need, have in zip(least, widths, strict=True)]
    spare = [max(0.0, have - need) for need, have in zip(least, widths, strict=True)]
    share = min(1.0, sum(lacking) / sum(spare)) if sum(spare) else 0.0
    boxes = []
    for have, more, less in zip(widths, lacking, spare, strict=True):
        boxes.append((left, have + more - share * less))
        left += boxes[-1][1] + _GAP
    return boxes


def _least_widths(grid: Grid, needed: Sequence[float] = ()) -> list[float]:
    """Inches that each part needs for its label, and for cells of these widths."""
    labels = [
        width_of(part.label, SMALL) + 0.04 if len(grid.parts) > 1 else 0.0 for part in grid.parts
    ]
    return [
        max(label, len(part.columns) * cell)
        for label, (part, cell) in zip(labels, _each(grid, needed), strict=True)
    ]


def wanted_width(grid: Grid, needed: Sequence[float]) -> float:
    """Inches of all parts side by side, with cells of these widths."""
    return sum(_least_widths(grid, needed)) + _GAP * (len(grid.parts) - 1)


def _each(grid: Grid, needed: Sequence[float]) -> list[tuple[Part, float]]:
    """Each part, and the width that its cells need, 0 for none."""
    return list(zip(grid.parts, needed or [0.0] * len(grid.parts), strict=True))


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
        for start, end in runs(line):
            axes.add_patch(
                Rectangle((start - 0.5, row - 0.5), end - start, 1, **hatched(page.look, state))
            )


def runs(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(start, end) of neighbours that are true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    for start, end in edges.reshape(-1, 2).tolist():  # noqa: UP028 - lists
        yield start, end


def has_room(grid: Grid, width: float, row: float) -> bool:
    """Whether there is room for a number in each cell."""
    boxes = zip(grid.parts, part_boxes(grid, 0.0, width), strict=True)
    return row >= _LEAST_ROW and all(w / len(part.columns) >= 0.44 for part, (_, w) in boxes)


def _luminance(colour: Sequence[float]) -> float:
    """The relative luminance of a colour in sRGB, as WCAG 2 defines it (w3.org/TR/WCAG21)."""
    parts = np.asarray(colour)
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _text_at(texts: NDArray[np.str_], place: tuple[int, int], _value: float) -> str:
    return str(texts[place])


def _write(
    axes: Axes,
    part: Part,
    cmap: Colormap,
    norm: Normalize,
    text_of: Callable[[tuple[int, int], float], str],
) -> None:
    """Write into each cell that has a value, in black or in white, the text of (place, value)."""
    for (row, column), value in np.ndenumerate(part.values):
        if not np.isfinite(value):
            continue
        light = _luminance(cmap(norm(value))[:3]) > _MIDDLE
        axes.text(
            column,
            row,
            text_of((row, column), float(value)),
            size=_IN_CELL,
            ha="center",
            va="center_baseline",
            color="#000000" if light else "#ffffff",
        )


def block_ticks(axes: Axes, part: Part, cell: float, *, shown: bool) -> None:
    """The numbers of the blocks below an axes whose columns are `cell` inches wide."""
    if part.columns == ("",) or not shown:
        axes.set_xticks([])
        return
    room = max(width_of(label, SMALL) for label in part.columns) + 0.08
    step = step_of(room / cell)
    at = list(range(0, len(part.columns), step))
    axes.set_xticks(at, [part.columns[n] for n in at])


def row_ticks(axes: Axes, rows: Sequence[str], row: float, *, shown: bool) -> None:
    """The names of the rows, which are `row` inches high, left of an axes."""
    if not shown:
        axes.set_yticks([])
        return
    at = list(range(0, len(rows), step_of(0.15 / row)))
    axes.set_yticks(at, [clean(rows[n], 34) for n in at])


def value_scale(
    values: NDArray[np.float64], quantity: Quantity, style: Style
) -> tuple[Colormap, Normalize]:
    """The colours of a statistic: logarithmic, or between its limits."""
    from matplotlib.colors import Normalize

    if quantity.log:
        return log_scale(values, style)
    assert quantity.limits is not None
    low, high = quantity.limits
    return colour_map(style), Normalize(low, high)
