"""`compare`: two matrices on one scale, and what they differ in."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from imatrix.matrix.importance import ImportanceMatrix
from imatrix.pictures.arguments import check_kinds, check_matrix, choose, describe_matrix
from imatrix.pictures.grids import Grid, State, difference_grid, layer_grid
from imatrix.pictures.heatmaps import ROW, draw_grid, value_scale
from imatrix.pictures.looks import LOOKS, Style
from imatrix.pictures.marks import add_legend
from imatrix.pictures.numbers import DIFFERENCES, STATISTICS, Contrast, Difference, Statistic
from imatrix.pictures.page import LEAST_PLOT, MARGIN, WIDE, Page, drawing, within
from imatrix.pictures.scales import add_scale, log_scale, short
from imatrix.pictures.texts import TEXT, fitted, labels_width
from imatrix.words import plural

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

__all__ = [
    "compare",
]


def compare(
    first: ImportanceMatrix,
    second: ImportanceMatrix,
    *,
    names: tuple[str, str] = ("first", "second"),
    statistic: Statistic = "mean",
    difference: Difference = "ratio",
    style: Style = "light",
    width: float | None = None,
) -> Figure:
    """Two matrices side by side on one scale, and what they differ in, weight by weight.

    Args:
        names: what to call them.
        statistic: what the first two maps show, as for `layers`.
        difference: what the third shows. "ratio": log2 of the second's mean squared activation
            over the first's; the scale reaches to 0.1 (7 %) at least. "cosine": 1 - cosine
            similarity of the importance by channel, of the matrix (expert) with rows in both that
            is the least alike, as `compare_matrices` has it; logarithmic, from 1e-6. It does not
            see a common factor, and neither does a quantizer.
        style: "light" or "dark".
        width: as for `layers`; below 8 inches the maps stand one above the other.

    Returns:
        A figure with the axes "first trunk", "second head", "difference trunk", ..., whose images
        hold the values. Weights that only one has are hatched in the third map, and so are those
        whose shapes differ.

    Raises:
        ImportError, ValueError: as for `layers`.
    """
    chosen = choose("statistic", statistic, STATISTICS)
    contrast = choose("difference", difference, DIFFERENCES)
    for matrix in (first, second):
        check_matrix(matrix, style, width)
    heads = first.head_blocks | second.head_blocks
    union = {**first, **second}
    grids = [layer_grid(matrix, chosen, union, heads) for matrix in (first, second)]
    third = difference_grid(first, second, contrast)
    check_kinds(third)
    with drawing():
        both = np.concatenate([grid.values for grid in grids])
        cmap, norm = value_scale(both, chosen, style)
        cmap2, norm2 = _contrast_scale(third.values, contrast, style)
        n_columns = sum(len(part.columns) for part in third.parts)
        labels = labels_width(third.rows)
        one = within(0.2 * n_columns + 0.4, 2.3, 4.0)
        page = Page(
            style,
            width or max(WIDE, 2 * MARGIN + labels + 3 * one + 2 * 0.2),
            f"{chosen.title} and difference by block and weight",
            [
                describe_matrix(first, names[0]),
                describe_matrix(second, names[1]),
                _describe_differences(third, names),
            ],
        )
        titles = (*names, contrast.title)
        label = contrast.label.format(*names)
        height = len(third.rows) * ROW
        wide = page.width >= WIDE
        free = page.width - 2 * MARGIN - labels
        plot = max((free - 2 * 0.2) / 3 if wide else free, LEAST_PLOT)
        left = page.width - MARGIN - (3 * plot + 2 * 0.2 if wide else plot)
        lefts = [left + n * (plot + 0.2) for n in range(3)] if wide else [left] * 3

        def panel(n: int, top: float) -> None:
            grid, map_, norm_ = (grids[n], cmap, norm) if n < 2 else (third, cmap2, norm2)
            page.text(
                lefts[n], top, fitted(titles[n], plot - 0.1, TEXT, bold=True), TEXT, weight="bold"
            )
            box = (lefts[n], top + 0.42, plot, height)
            prefix = ("first ", "second ", "difference ")[n]
            draw_grid(
                page,
                grid,
                box,
                map_,
                norm_,
                "block",
                prefix=prefix,
                labels=n == 0 or not wide,
                describe=_signed if n == 2 and contrast.centred else short,
            )

        space = 0.42 + height + (0.42 if wide else 0.56)
        tops = [page.take(space)] * 3 if wide else [page.take(space), page.take(space), 0.0]
        if wide:
            scales = page.y
            add_scale(page, (left, min(2 * plot, 4.2)), cmap, norm, chosen.label)
            below, page.y = page.y, scales
            add_scale(page, (lefts[2], plot), cmap2, norm2, label)
            page.y = max(below, page.y)
        else:
            add_scale(page, (left, plot), cmap, norm, chosen.label)
            page.take(0.14)
            tops[2] = page.take(space)
            add_scale(page, (left, plot), cmap2, norm2, label)
        for n, top in enumerate(tops):
            page.add(partial(panel, n, top))
        states = third.states | {s for grid in grids for s in grid.states}
        only = dict(zip(("FIRST", "SECOND"), (f"only in {each}" for each in names), strict=True))
        add_legend(page, left, states, texts=only)
        return page.finish()


def _describe_differences(grid: Grid, names: tuple[str, str]) -> str:
    def count(state: State) -> int:
        return sum(int(np.count_nonzero(part.states == state)) for part in grid.parts)

    facts = [
        f"{plural(n, 'weight')} with rows only in {name}"
        for name, state in zip(names, (State.FIRST, State.SECOND), strict=True)
        if (n := count(state))
    ]
    if n := count(State.SHAPE):
        facts.append(f"{plural(n, 'weight')} of another shape")
    return "; ".join(facts)


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    return "0.00" if text[1:] == "0.00" else text


def _contrast_scale(
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
