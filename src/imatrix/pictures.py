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

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from imatrix import atomic
from imatrix._picture_data import (
    DIFFERENCES,
    STATISTICS,
    Contrast,
    Grid,
    Part,
    Profile,
    Quantity,
    State,
    compared,
    expert_grid,
    expert_rows,
    heaviest_count,
    layer_grid,
    profile,
)
from imatrix._picture_page import (
    LOOKS,
    MARGIN,
    SMALL,
    TEXT,
    TITLE,
    Look,
    Page,
    Style,
    add_scale,
    clean,
    colour_map,
    drawing,
    fitted,
    labels_width,
    log_scale,
    number_ticks,
    percent,
    plural,
    short,
    step_of,
    width_of,
    within,
    wrapped,
)
from imatrix.matrix import THIN, Entry, ImportanceMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
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

DPI = 144
"""Pixels an inch of a PNG, where nothing is said."""

FORMATS = (".png", ".svg")
"""What the name of a picture may end in."""

_ROW = 0.21
_LEAST_PLOT = 1.2
_WIDE = 8.0  # panels stand side by side from this width on

# Beyond these a picture is no picture any more (and Agg ends at 65,536 pixels).
_MOST_KINDS = 300
_MOST_WEIGHTS = 16
_LIMITS = (3.0, 40.0)

# Channels that are drawn each by itself; of more, neighbours share a column.
_MOST_COLUMNS = 800


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
        cmap, norm = _scale(grid.values, chosen, style)
        n_columns = sum(len(part.columns) for part in grid.parts)
        labels = labels_width(grid.rows)
        title, notes = f"{chosen.title} by block and weight", [_about(matrix, name)]
        wanted = 2 * MARGIN + labels + within(0.26 * n_columns + 0.4, 3.4, 8.4)
        page = Page(style, width or max(wanted, _heading_width(title, notes)), title, notes)
        plot = max(page.width - 2 * MARGIN - labels, _LEAST_PLOT)
        left = page.width - MARGIN - plot
        height = len(grid.rows) * _ROW
        top = page.take(0.2 + height + 0.42) + 0.2
        page.add(lambda: _draw_grid(page, grid, (left, top, plot, height), cmap, norm, "block"))
        add_scale(page, (left, min(plot, 4.2)), cmap, norm, chosen.label)
        _add_legend(page, left, grid.states)
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
        words = _spread_words(page.look, plot)[1] + 0.14
        below = page.take(words + 1.1 + 0.42) + words

        def draw() -> None:
            box = (left, top, plot, height)
            axes = _draw_grid(page, grid, box, cmap, norm, None, told=lambda rows: f"{rows:.0f}")
            _mark_experts(grid, axes, plot, height)
            axes[0].set_ylabel("expert", size=SMALL, color=page.look.muted)
            _draw_spread(page, grid, (left, below, plot, 1.1))

        page.add(draw)
        marks = [_UNSEEN] if State.NO_ROWS in grid.states else []
        if State.VALUE in grid.states:
            add_scale(page, (left, min(plot, 4.2)), cmap, norm, "rows (log scale)")
            marks.append(_THINNEST)
        _add_legend(
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
                _add_expert_profiles(page, each, entry, heaviest, style)
            else:
                one = expert if isinstance(expert, int) and entry.n_mat > 1 else None
                _add_profile(page, each, entry, one, heaviest)
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
        cmap, norm = _scale(both, chosen, style)
        cmap2, norm2 = _contrast_scale(third.values, contrast, style)
        n_columns = sum(len(part.columns) for part in third.parts)
        labels = labels_width(third.rows)
        one = within(0.2 * n_columns + 0.4, 2.3, 4.0)
        page = Page(
            style,
            width or max(_WIDE, 2 * MARGIN + labels + 3 * one + 2 * 0.2),
            f"{chosen.title} and difference by block and weight",
            [_about(first, names[0]), _about(second, names[1]), _differences(third, names)],
        )
        titles = (*names, contrast.title)
        label = contrast.label.format(*names)
        height = len(third.rows) * _ROW
        wide = page.width >= _WIDE
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
            _draw_grid(
                page,
                grid,
                box,
                map_,
                norm_,
                "block",
                prefix=prefix,
                labels=n == 0 or not wide,
                told=_signed if n == 2 and contrast.centred else short,
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
        _add_legend(page, left, states, texts=only)
        return page.finish()


# --- writing -----------------------------------------------------------------


def svg(figure: Figure, *, prefix: str = "", background: bool = True) -> str:
    """An `<svg>` element, to be put into a page as it is.

    It has a `<title>` and a `viewBox`; its width and height are points, and a page may set others.
    The same figure gives the same text.

    Args:
        prefix: put in front of all its ids. Give each picture of a page another one, for ids must
            be unique there.
        background: False for a transparent one.

    Raises:
        ValueError: the prefix is not made of letters, digits, "-" and "_", a letter first.
    """
    if prefix and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", prefix):
        raise ValueError(
            f"prefix must be letters, digits, '-' and '_', a letter first, got {prefix!r}"
        )
    out = io.BytesIO()
    with drawing():
        figure.savefig(
            out,
            format="svg",
            facecolor="auto" if background else "none",
            # matplotlib's defaults: the time and its version among them
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = out.getvalue().decode("utf-8")
    text = text[text.index("<svg") :].rstrip("\n")
    # a <style> inside a page is for all of the page
    text = re.sub(r"\s*<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", text, count=1)
    root, rest = text.split(">", 1)
    root += ' role="img" style="stroke-linejoin: round; stroke-linecap: butt"'
    # A hundredth of a point is enough; it takes a third of the bytes away.
    rest = re.sub(r'(?<=\sd=")[^"]*', lambda path: _TOO_FINE.sub("", path[0]), rest)
    text = f"{root}>\n <title>{escape(clean(str(figure.get_label())))}</title>{rest}"
    # Only inside tags: matplotlib escapes < and > everywhere else.
    return re.sub(r"<[^<>]*>", lambda tag: _prefixed(tag[0], prefix), text) if prefix else text


_TOO_FINE = re.compile(r"(?<=\.\d\d)\d+")


def _prefixed(tag: str, prefix: str) -> str:
    tag = re.sub(r'(\sid=")', rf"\g<1>{prefix}-", tag)
    tag = re.sub(r'(href="#)', rf"\g<1>{prefix}-", tag)
    return re.sub(r"(url\(#)", rf"\g<1>{prefix}-", tag)


def png(figure: Figure, *, dpi: float = DPI) -> bytes:
    """A PNG file's bytes; the same figure gives the same bytes.

    Args:
        dpi: pixels an inch.
    """
    out = io.BytesIO()
    with drawing():
        figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: float = DPI) -> None:
    """Write a file, PNG or SVG as its name ends, replacing one there in one step.

    Args:
        dpi: pixels an inch of a PNG.

    Raises:
        ValueError: the name ends in something else.
        OSError: it cannot be written.
    """
    form = Path(path).suffix.lower()
    if form not in FORMATS:
        raise ValueError(
            f"cannot write {os.fspath(path)!r}: a picture's name ends in {' or '.join(FORMATS)}"
        )
    if form == ".png":
        data = png(figure, dpi=dpi)
    else:
        data = f'<?xml version="1.0" encoding="utf-8"?>\n{svg(figure)}\n'.encode()
    with atomic.replacing(path) as temporary:
        temporary.write_bytes(data)


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
_UNSEEN = "unseen"
_THINNEST = "thinnest"


def _hatched(look: Look, state: State) -> dict[str, Any]:
    colour = {State.FIRST: look.first, State.SECOND: look.second}.get(state, look.muted)
    return {"facecolor": look.paper, "edgecolor": colour, "hatch": _HATCHES[state], "lw": 0}


def _draw_grid(
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
        _row_ticks(axes, grid.rows, row, shown=labels and len(drawn) == 1)
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


def _row_ticks(axes: Axes, rows: Sequence[str], row: float, *, shown: bool) -> None:
    if not shown:
        axes.set_yticks([])
        return
    at = list(range(0, len(rows), step_of(0.15 / row)))
    axes.set_yticks(at, [clean(rows[n], 34) for n in at])


def _mark_experts(grid: Grid, axes: Sequence[Axes], width: float, height: float) -> None:
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
        each.plot(columns, unseen, linestyle="", label="unseen", **_mark(_UNSEEN, row))
        circles = [
            (column - aside, expert)
            for column, block in enumerate(part.columns)
            for expert in range(len(grid.rows))
            if (int(block), expert) in thinnest
        ]
        if circles:
            each.plot(*zip(*circles, strict=True), linestyle="", clip_on=False, label="thinnest",
                      **_mark(_THINNEST, row))  # fmt: skip


# Points: cells below this would lose a dot, or be lost themselves.
_LOW = 4.0
_WHITE: dict[str, Any] = {"facecolor": "#ffffff", "edgecolor": "#000000", "lw": 0.6}


def _mark(which: str, row: float) -> dict[str, Any]:
    """How a marker looks where cells are `row` points high."""
    if which == _THINNEST:
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
    for text, colour, (x, y) in _spread_words(page.look, width)[0]:
        page.text(left + x, top - 0.2 - y, text, SMALL, color=colour)
    page.text(left + width / 2, top + height + 0.22, "block", SMALL, ha="center",
              color=page.look.muted)  # fmt: skip


def _add_legend(
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
    items += [(mark, {_UNSEEN: "no rows", _THINNEST: "fewest rows"}[mark]) for mark in marks]
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
                if item == _UNSEEN and row >= _LOW:
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


# --- channels ----------------------------------------------------------------


def _add_profile(page: Page, name: str, entry: Entry, expert: int | None, heaviest: int) -> None:
    found = profile(entry, expert)
    whose = ""
    if entry.n_mat > 1:
        whose = f"all {entry.n_mat} matrices (experts) pooled" if expert is None else ""
        whose = whose or f"expert {expert} of {entry.n_mat}"
    _add_heading(page, name, entry.n_in, found, whose)
    if found is None or not found.values.any():
        page.take(0.12)
        return
    wide = page.width >= _WIDE
    left = MARGIN + 0.55
    free = page.width - left - MARGIN
    first = 0.66 * free - 0.1 if wide else free
    second = 0.34 * free - 0.1 if wide else free
    top = page.take(0.44 + 1.7 + 0.46) + 0.44
    other = top if wide else page.take(0.1 + 1.5 + 0.46) + 0.1
    page.add(lambda: _draw_channels(page, name, found, (left, top, first, 1.7), heaviest))
    box = (left + first + 0.2, other, second, 1.7) if wide else (left, other, second, 1.5)
    page.add(lambda: _draw_sorted(page, name, found, box, heaviest, labels=not wide))


def _add_heading(
    page: Page, name: str, n_in: int, found: Profile | None, whose: str, *, pooled: bool = False
) -> None:
    room = page.width - 2 * MARGIN
    for line in wrapped(clean(name, 80), room, TEXT, bold=True):
        page.line(line, TEXT, 0.18, weight="bold")
    facts = [f"{n_in} channels"] + ([whose] if whose else [])
    if found is None:
        facts.append("no rows: there is nothing to draw")
    elif not found.values.any():
        facts.append(f"{plural(found.rows, 'row')} of zeros: there is nothing to draw")
    else:
        facts.append(f"{'pooled, they have ' if pooled else ''}{plural(found.rows, 'row')}")
        k = heaviest_count(n_in)
        share = float(np.sort(found.shares)[-k:].sum())
        of = f"the heaviest 1 % ({plural(k, 'channel')}) " if n_in >= 100 else "the heaviest one "
        facts.append(f"{of}{'hold' if k > 1 else 'holds'} {percent(share)} of the sum")
        if zeros := int(np.count_nonzero(found.values == 0)):
            facts.append(f"{zeros} always 0, not drawn")
    for line in wrapped("; ".join(facts), room, SMALL):
        page.line(line, SMALL, 0.16, color=page.look.muted)


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    some = values[values > 0]
    return float(some.min()) / 1.6, float(some.max()) * 1.6


def _draw_channels(
    page: Page,
    name: str,
    found: Profile,
    box: tuple[float, float, float, float],
    heaviest: int,
) -> None:
    axes = page.axes(box, f"{name} channels")
    axes.set_facecolor(page.look.paper)
    values = found.values
    low, high = _limits(values)
    axes.set_yscale("log")
    n = len(values)
    per = -(-n // _MOST_COLUMNS)
    if per == 1:
        axes.plot(np.arange(n), np.where(values > 0, values, np.nan), color=page.look.line, lw=0.7)
        what = "channel"
    else:
        starts = np.arange(0, n, per)
        least = np.maximum(np.minimum.reduceat(values, starts), low)
        most = np.maximum(np.maximum.reduceat(values, starts), low)
        axes.fill_between(starts, least, most, color=page.look.line, lw=0.4)
        what = f"channel (a column: the least to the largest of {per})"
    axes.set(xlim=(-0.01 * n - 0.5, 1.01 * n - 0.5), ylim=(low, high))
    number_ticks(axes, low, high, box[3], axis="y", shown=True)
    axes.set_ylabel("mean square", size=SMALL, color=page.look.muted)
    axes.set_xlabel(fitted(what, box[2], SMALL), size=SMALL, color=page.look.muted)
    _channel_ticks(axes, n, box[2])
    _name_channels(page, axes, found, heaviest, box)


def _channel_ticks(axes: Axes, n: int, width: float) -> None:
    from matplotlib.ticker import MaxNLocator

    most = int(within(width / 0.7, 2, 9))
    ticks = [t for t in MaxNLocator(most, integer=True).tick_values(0, n - 1) if 0 <= t < n]
    axes.set_xticks(ticks, [f"{int(tick)}" for tick in ticks])


def _name_channels(
    page: Page,
    axes: Axes,
    found: Profile,
    heaviest: int,
    box: tuple[float, float, float, float],
    *,
    mark: bool = True,
) -> None:
    """Numbers and shares of the heaviest channels above the axes, each with a line to its own."""
    left, top, width, _ = box
    slot = 0.58
    named = sorted(found.heaviest(min(heaviest, int(width / slot))))
    low, high = axes.get_xlim()
    at = [(channel - low) / (high - low) * width for channel in named]
    for channel, place, label in zip(named, at, _spread(at, slot, width), strict=True):
        page.text(left + label, top - 0.42, f"#{channel}", SMALL, ha="center", weight="bold")
        page.text(left + label, top - 0.28, percent(float(found.shares[channel])), SMALL,
                  ha="center", color=page.look.muted)  # fmt: skip
        page.add_line((left + label, top - 0.13), (left + place, top))
    if mark and named:
        axes.plot(
            named, found.values[named], linestyle="", marker="o", markersize=4.5,
            markerfacecolor="none", markeredgecolor=page.look.second, markeredgewidth=1.3,
            label="heaviest",
        )  # fmt: skip


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    return "0.00" if text[1:] == "0.00" else text


def _spread(at: Sequence[float], slot: float, width: float) -> list[float]:
    """Places for labels `slot` wide, in order, as near to `at` as they fit into `width`."""
    # Neighbours that would overlap move together, centred on what they belong to.
    groups: list[tuple[list[float], float]] = []
    for place in at:
        group, centre = [place], within(place, slot / 2, width - slot / 2)
        while groups and groups[-1][1] + (len(groups[-1][0]) + len(group)) * slot / 2 > centre:
            group = groups.pop()[0] + group
            half = len(group) * slot / 2
            centre = within(sum(group) / len(group), half, width - half)
        groups.append((group, centre))
    return [
        centre + (n - (len(group) - 1) / 2) * slot
        for group, centre in groups
        for n in range(len(group))
    ]


def _draw_sorted(
    page: Page,
    name: str,
    found: Profile,
    box: tuple[float, float, float, float],
    heaviest: int,
    *,
    labels: bool,
) -> None:
    axes = page.axes(box, f"{name} sorted")
    axes.set_facecolor(page.look.paper)
    ordered = np.sort(found.values[found.values > 0])[::-1]
    n = len(ordered)
    rank = np.unique(np.geomspace(1, n, 400).round().astype(np.int64))
    low, high = _limits(found.values)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(float(found.values.mean()), color=page.look.muted, lw=0.9, linestyle=(0, (4, 2)))
    axes.plot(rank, ordered[rank - 1], color=page.look.line, lw=1.4)
    k = min(heaviest, n)
    axes.plot(
        np.arange(1, k + 1), ordered[:k], linestyle="", marker="o", markersize=4.5,
        markerfacecolor="none", markeredgecolor=page.look.second, markeredgewidth=1.3,
        label="heaviest",
    )  # fmt: skip
    axes.set(xlim=(0.8, len(found.values) * 1.25), ylim=(low, high))
    number_ticks(axes, low, high, box[3], axis="y", shown=labels)
    number_ticks(axes, *axes.get_xlim(), box[2], axis="x", shown=True)
    if labels:
        axes.set_ylabel("mean square", size=SMALL, color=page.look.muted)
    axes.set_xlabel("rank (dashed: mean)", size=SMALL, color=page.look.muted)


def _add_expert_profiles(page: Page, name: str, entry: Entry, heaviest: int, style: Style) -> None:
    """A map of experts against channels."""
    found = profile(entry)
    unseen = int(np.count_nonzero(np.broadcast_to(entry.counts == 0, entry.n_mat)))
    whose = f"{entry.n_mat} matrices (experts)"
    if unseen:
        whose += f", {unseen} without rows"
    _add_heading(page, name, entry.n_in, found, whose, pooled=True)
    if found is None or not found.values.any():
        page.take(0.12)
        return
    seen = np.broadcast_to(entry.counts > 0, entry.n_mat)
    per = -(-entry.n_in // _MOST_COLUMNS)
    starts = np.arange(0, entry.n_in, per)
    values = np.maximum.reduceat(entry.importance, starts, axis=1)
    values = np.where(seen[:, np.newaxis] & (values > 0), values, np.nan)
    cmap, norm = log_scale(values[np.isfinite(values)], style)
    left = MARGIN + 0.55
    width = page.width - left - MARGIN
    height = within(0.05 * entry.n_mat, 1.4, 5.0)
    box = (left, page.take(0.44 + height + 0.46) + 0.44, width, height)

    def draw() -> None:
        axes = page.axes(box, f"{name} experts")
        axes.imshow(
            values,
            cmap=cmap,
            norm=norm,
            aspect="auto",
            interpolation="none",
            extent=(-0.5, len(starts) * per - 0.5, entry.n_mat - 0.5, -0.5),
        )
        axes.set_xlim(-0.5, entry.n_in - 0.5)
        _channel_ticks(axes, entry.n_in, width)
        _row_ticks(axes, [str(n) for n in range(entry.n_mat)], height / entry.n_mat, shown=True)
        axes.set_ylabel("expert", size=SMALL, color=page.look.muted)
        what = "channel" + (f" (a column: the largest of {per})" if per > 1 else "")
        axes.set_xlabel(fitted(what, width, SMALL), size=SMALL, color=page.look.muted)
        _name_channels(page, axes, found, heaviest, box, mark=False)

    page.add(draw)
    label = "mean squared activation (log scale); plain: no rows, or only zeros"
    add_scale(page, (left, min(width, 4.2)), cmap, norm, label)
    page.take(0.16)


# --- scales, texts -----------------------------------------------------------


def _scale(
    values: NDArray[np.float64], quantity: Quantity, style: Style
) -> tuple[Colormap, Normalize]:
    from matplotlib.colors import Normalize

    if quantity.log:
        return log_scale(values, style)
    assert quantity.limits is not None
    low, high = quantity.limits
    return colour_map(style), Normalize(low, high)


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
        few = ", ".join(f"blk.{block} expert {expert}" for _, block, expert in unseen[:3])
        more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
        text += f"{len(unseen)} saw no rows ({few}{more}), "
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
