"""Pictures of importance matrices: layers, experts, channels, two matrices side by side.

from imatrix import ImportanceMatrix, pictures

matrix = ImportanceMatrix.load("imatrix.gguf")
pictures.save(pictures.layers(matrix), "layers.png")

Every function gives a `matplotlib.figure.Figure`. Nothing goes through pyplot, and no window opens.
Figures are built and written one at a time, with matplotlib's own defaults in place of the user's
(`rcParams` are put back after), so that the same matrix gives the same bytes. Text in an SVG stays
text. matplotlib is the extra `plot`, and is imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from imatrix.entries import THIN
from imatrix.matrix.experts import expert_rows
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.pictures.heatmaps import (
    THINNEST,
    UNSEEN,
    add_legend,
    contrast_scale,
    draw_grid,
    draw_spread,
    mark_experts,
    signed,
    spread_words,
    value_scale,
)
from imatrix.pictures.numbers import (
    DIFFERENCES,
    STATISTICS,
    Grid,
    State,
    compared,
    expert_grid,
    layer_grid,
)
from imatrix.pictures.page import (
    LOOKS,
    MARGIN,
    SMALL,
    TEXT,
    TITLE,
    WIDE,
    Page,
    Style,
    clean,
    drawing,
    fitted,
    labels_width,
    width_of,
    within,
)
from imatrix.pictures.profiles import add_expert_profiles, add_profile
from imatrix.pictures.scales import add_scale, log_scale, short
from imatrix.pictures.writing import DPI, FORMATS, png, save, svg
from imatrix.words import few, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "DPI",
    "FORMATS",
    "Difference",
    "Statistic",
    "Style",
    "channels",
    "compare",
    "experts",
    "layers",
    "png",
    "save",
    "svg",
]

Statistic = Literal["mean", "top", "peak", "coverage", "rows"]
Difference = Literal["ratio", "cosine"]
_ROW = 0.21
_LEAST_PLOT = 1.2


# Beyond these a picture is no picture any more (and Agg ends at 65,536 pixels).
_MOST_KINDS = 300
_MOST_WEIGHTS = 16
_LIMITS = (3.0, 40.0)


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
              hold, mean over the matrices. 0.01 where all are equal.
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
    chosen = _one_of("statistic", statistic, STATISTICS)
    _check(matrix, style, width)
    grid = layer_grid(matrix, chosen)
    _check_kinds(grid)
    with drawing():
        cmap, norm = value_scale(grid.values, chosen, style)
        n_columns = sum(len(part.columns) for part in grid.parts)
        labels = labels_width(grid.rows)
        title, notes = f"{chosen.title} by block and weight", [_about(matrix, name)]
        wanted = 2 * MARGIN + labels + within(0.26 * n_columns + 0.4, 3.4, 8.4)
        page = Page(style, width or max(wanted, _heading_width(title, notes)), title, notes)
        plot = max(page.width - 2 * MARGIN - labels, _LEAST_PLOT)
        left = page.width - MARGIN - plot
        height = len(grid.rows) * _ROW
        top = page.take(0.2 + height + 0.42) + 0.2
        page.add(lambda: draw_grid(page, grid, (left, top, plot, height), cmap, norm, "block"))
        add_scale(page, (left, min(plot, 4.2)), cmap, norm, chosen.label)
        add_legend(page, left, grid.states)
        return page.finish()


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
    _check(matrix, style, width)
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
        title, notes = "Rows each expert saw", [_about(matrix, name), _experts(matrix)]
        page = Page(style, width or max(wanted, _heading_width(title, notes)), title, notes)
        plot = max(page.width - 2 * MARGIN - labels, _LEAST_PLOT)
        left = page.width - MARGIN - plot
        height = within(0.16 * len(grid.rows), 1.4, 6.6)
        top = page.take(0.2 + height) + 0.2
        words = spread_words(page.look, plot)[1] + 0.14
        below = page.take(words + 1.1 + 0.42) + words

        def draw() -> None:
            box = (left, top, plot, height)
            axes = draw_grid(page, grid, box, cmap, norm, None, told=lambda rows: f"{rows:.0f}")
            mark_experts(grid, axes, plot, height)
            axes[0].set_ylabel("expert", size=SMALL, color=page.look.muted)
            draw_spread(page, grid, (left, below, plot, 1.1))

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


def channels(
    matrix: ImportanceMatrix,
    weights: str | Sequence[str],
    *,
    expert: int | Literal["pooled", "each"] = "pooled",
    heaviest: int = 5,
    name: str = "",
    style: Style = "light",
    width: float | None = None,
) -> Figure:
    """Profiles: mean squared activation by channel, in their order and sorted.

    The heaviest channels are named by their number, from 0, and their share of the sum over all
    channels. Of more than 800 channels neighbours share a column: from their least to their
    largest.

    Args:
        weights: names of one weight or of up to 16; `.weight` may be left out.
        expert: of a weight with several matrices (experts), "pooled" for all together (sums over
            rows, so that an expert weighs as much as the rows it saw), the number of one, or
            "each" for a map of experts against channels, where of more than 800 channels the
            largest of neighbours is shown. Weights of one matrix have nothing to choose.
        heaviest: how many channels to name, 0 to 20; fewer where there is no room.
        name, style, width: as for `layers`.

    Returns:
        A figure with, for each weight, the axes "<weight> channels" and "<weight> sorted", or
        "<weight> experts" for the map.

    Raises:
        ImportError, ValueError: as for `layers`.
        KeyError: there is no such weight; the message names the nearest ones.
        IndexError: there is no such expert.
    """
    _check(matrix, style, width)
    names = [_found(matrix, each) for each in ([weights] if isinstance(weights, str) else weights)]
    if not 1 <= len(names) <= _MOST_WEIGHTS:
        raise ValueError(f"weights must be 1 to {_MOST_WEIGHTS} names, got {len(names)}")
    if not 0 <= heaviest <= 20:
        raise ValueError(f"heaviest must be 0 to 20, got {heaviest}")
    if isinstance(expert, str) and expert not in ("pooled", "each"):
        raise ValueError(f"expert must be a number, 'pooled' or 'each', got {expert!r}")
    for each in names:
        n_mat = matrix[each].n_mat
        if not isinstance(expert, str) and n_mat > 1 and not 0 <= expert < n_mat:
            raise IndexError(f"{each} has experts 0 to {n_mat - 1}, not {expert}")
    with drawing():
        page = Page(
            style,
            width or 9.0,
            "Mean squared activation by channel",
            [_about(matrix, name)],
        )
        for each in names:
            entry = matrix[each]
            if expert == "each" and entry.n_mat > 1:
                add_expert_profiles(page, each, entry, heaviest, style)
            else:
                one = expert if isinstance(expert, int) and entry.n_mat > 1 else None
                add_profile(page, each, entry, one, heaviest)
        return page.finish()


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
    chosen = _one_of("statistic", statistic, STATISTICS)
    contrast = _one_of("difference", difference, DIFFERENCES)
    for matrix in (first, second):
        _check(matrix, style, width)
    heads = first.head_blocks | second.head_blocks
    union = {**first, **second}
    grids = [layer_grid(matrix, chosen, union, heads) for matrix in (first, second)]
    third = compared(first, second, contrast)
    _check_kinds(third)
    with drawing():
        both = np.concatenate([grid.values for grid in grids])
        cmap, norm = value_scale(both, chosen, style)
        cmap2, norm2 = contrast_scale(third.values, contrast, style)
        n_columns = sum(len(part.columns) for part in third.parts)
        labels = labels_width(third.rows)
        one = within(0.2 * n_columns + 0.4, 2.3, 4.0)
        page = Page(
            style,
            width or max(WIDE, 2 * MARGIN + labels + 3 * one + 2 * 0.2),
            f"{chosen.title} and difference by block and weight",
            [_about(first, names[0]), _about(second, names[1]), _differences(third, names)],
        )
        titles = (*names, contrast.title)
        label = contrast.label.format(*names)
        height = len(third.rows) * _ROW
        wide = page.width >= WIDE
        free = page.width - 2 * MARGIN - labels
        plot = max((free - 2 * 0.2) / 3 if wide else free, _LEAST_PLOT)
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
                told=signed if n == 2 and contrast.centred else short,
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


def _heading_width(title: str, notes: Sequence[str]) -> float:
    """A width at which the heading has few lines."""
    wanted = [
        width_of(clean(title), TITLE, bold=True),
        *(width_of(clean(note), SMALL) for note in notes),
    ]
    return 2 * MARGIN + 0.05 + min(max(wanted), 5.6)


def _about(matrix: ImportanceMatrix, name: str) -> str:
    text = f"{len(matrix)} weights: {len(matrix.trunk)} trunk, {len(matrix.head)} head"
    if blocks := sorted(matrix.head_blocks):
        text += f" (block {', '.join(map(str, blocks))})"
    if matrix.chunk_count:
        text += f"; {plural(matrix.chunk_count, 'chunk')}"
        text += f" of {matrix.chunk_size} tokens" if matrix.chunk_size else ""
    return f"{name}: {text}" if name else text


def _experts(matrix: ImportanceMatrix) -> str:
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
        told = ", ".join(f"blk.{block} expert {expert} ({n})" for n, block, expert in least)
        text += f" Fewest: {told}"
    return text


def _differences(grid: Grid, names: tuple[str, str]) -> str:
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


# --- arguments ---------------------------------------------------------------


def _one_of(label: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        raise ValueError(f"{label} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def _check(matrix: ImportanceMatrix, style: str, width: float | None) -> None:
    if not len(matrix):
        raise ValueError("there is nothing to draw: the matrix is empty")
    _one_of("style", style, LOOKS)
    if width is not None and not _LIMITS[0] <= width <= _LIMITS[1]:
        low, high = _LIMITS
        raise ValueError(f"width must be {low:g} to {high:g} inches, got {width:g}")


def _check_kinds(grid: Grid) -> None:
    if len(grid.rows) > _MOST_KINDS:
        raise ValueError(
            f"there are {len(grid.rows)} kinds of weights, more than the {_MOST_KINDS} that can be "
            "drawn: is this an importance matrix of a model with blk.N.* names?"
        )


def _found(matrix: ImportanceMatrix, name: str) -> str:
    if name not in matrix and f"{name}.weight" in matrix:
        return f"{name}.weight"
    matrix[name]  # the error, where there is no such one
    return name
