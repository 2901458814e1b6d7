"""`layers`: weight kinds against blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imatrix.matrix.importance import ImportanceMatrix
from imatrix.pictures.arguments import (
    check_kinds,
    check_matrix,
    choose,
    describe_matrix,
    heading_width,
)
from imatrix.pictures.grids import layer_grid
from imatrix.pictures.heatmaps import ROW, draw_grid, value_scale
from imatrix.pictures.looks import Style
from imatrix.pictures.marks import add_legend
from imatrix.pictures.numbers import STATISTICS, Statistic
from imatrix.pictures.page import LEAST_PLOT, MARGIN, Page, drawing, within
from imatrix.pictures.scales import add_scale
from imatrix.pictures.texts import labels_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "layers",
]


def layers(
    matrix: ImportanceMatrix,
    *,
    statistic: Statistic = "mean",
    name: str = "",
    style: Style = "light",
    width: float | None = None,
) -> Figure:
    """A heat map: weight kinds against blocks, the trunk, the head and other weights apart.

    Args:
        statistic: what the colour is. The matrices of a weight are its experts, or one; those
            without rows count only for "coverage".

            - "mean": mean squared activation, over channels, then over matrices; logarithmic.
            - "top": share of the sum over the channels that the heaviest 1 % of them (rounded up)
              hold, mean over the matrices. 0.01 if all are equal.
            - "peak": heaviest channel / mean of its matrix, the largest there is; logarithmic.
            - "coverage": percentage of the matrices that have rows.
            - "rows": rows of the matrix that has the fewest; logarithmic.

        name: what to call the matrix in the heading, such as its file's name.
        style: "light" or "dark".
        width: of the picture in inches, 3 to 40; None for what the matrix needs. 4.5 suits a phone.

    Returns:
        A figure with an axes for each part ("trunk", "head", "no block" by their `get_label()`),
        whose image holds the values, NaN where there is none: cells that the matrix lacks are
        plain, those without rows or with nothing but zeros hatched.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
        ValueError: the matrix is empty or has too many kinds to draw, or an argument is not one
            of those above.
    """
    chosen = choose("statistic", statistic, STATISTICS)
    check_matrix(matrix, style, width)
    grid = layer_grid(matrix, chosen)
    check_kinds(grid)
    with drawing():
        cmap, norm = value_scale(grid.values, chosen, style)
        n_columns = sum(len(part.columns) for part in grid.parts)
        labels = labels_width(grid.rows)
        title, notes = f"{chosen.title} by block and weight", [describe_matrix(matrix, name)]
        wanted = 2 * MARGIN + labels + within(0.26 * n_columns + 0.4, 3.4, 8.4)
        page = Page(style, width or max(wanted, heading_width(title, notes)), title, notes)
        plot = max(page.width - 2 * MARGIN - labels, LEAST_PLOT)
        left = page.width - MARGIN - plot
        height = len(grid.rows) * ROW
        top = page.take(0.2 + height + 0.42) + 0.2
        page.add(lambda: draw_grid(page, grid, (left, top, plot, height), cmap, norm, "block"))
        add_scale(page, (left, min(plot, 4.2)), cmap, norm, chosen.label)
        add_legend(page, left, grid.states)
        return page.finish()
