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
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

Style = Literal["light", "dark"]
Statistic = Literal["mean", "top", "peak", "coverage", "rows"]
Difference = Literal["ratio", "cosine"]

DPI = 144
"""Pixels an inch of a PNG, where nothing is said."""

FORMATS = (".png", ".svg")
"""What the name of a picture may end in."""

# Inches. Text sizes are points, 72 an inch.
_MARGIN = 0.14
_ROW = 0.21
_LEAST_PLOT = 1.2
_WIDE = 8.0  # panels stand side by side from this width on
_TITLE, _TEXT, _SMALL = 12.0, 9.0, 8.0

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
    with _drawing():
        cmap, norm = _scale(grid.values, chosen, style)
        n_columns = sum(len(part.columns) for part in grid.parts)
        labels = _labels_width(grid.rows)
        wanted = 2 * _MARGIN + labels + _within(0.26 * n_columns + 0.4, 3.4, 8.4)
        page = _Page(
            style,
            width or wanted,
            f"{chosen.title} by block and weight",
            [_about(matrix, name)],
        )
        plot = max(page.width - 2 * _MARGIN - labels, _LEAST_PLOT)
        left = page.width - _MARGIN - plot
        height = len(grid.rows) * _ROW
        top = page.take(0.2 + height + 0.42) + 0.2
        page.add(lambda: _draw_grid(page, grid, (left, top, plot, height), cmap, norm, "block"))
        _add_scale(page, (left, min(plot, 4.2)), cmap, norm, chosen.label)
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
    with _drawing():
        cmap, norm = _log_scale(grid.values, style)
        n_columns = sum(len(part.columns) for part in grid.parts)
        labels = max(_labels_width(grid.rows), _labels_width(["10000"])) + 0.2
        wanted = 2 * _MARGIN + labels + _within(0.22 * n_columns + 0.4, 3.6, 8.4)
        page = _Page(
            style, width or wanted, "Rows each expert saw", [_about(matrix, name), _experts(matrix)]
        )
        plot = max(page.width - 2 * _MARGIN - labels, _LEAST_PLOT)
        left = page.width - _MARGIN - plot
        height = _within(0.16 * len(grid.rows), 1.4, 6.6)
        top = page.take(0.2 + height) + 0.2
        below = page.take(0.4 + 1.1 + 0.42) + 0.4

        def draw() -> None:
            axes = _draw_grid(page, grid, (left, top, plot, height), cmap, norm, None)
            _mark_experts(page, grid, axes, height)
            axes[0].set_ylabel("expert", size=_SMALL, color=page.look.muted)
            _draw_spread(page, grid, (left, below, plot, 1.1))

        page.add(draw)
        _add_scale(page, (left, min(plot, 4.2)), cmap, norm, "rows (log scale)")
        marks = [_UNSEEN, _THINNEST] if State.NO_ROWS in grid.states else [_THINNEST]
        _add_legend(page, left, grid.states & {State.ABSENT}, marks, ABSENT="no such expert")
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
    with _drawing():
        page = _Page(
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
            over the first's. "cosine": 1 - cosine similarity of the importance by channel, of each
            matrix (expert) that has rows in both, and the mean of them; logarithmic. It does not
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
    with _drawing():
        both = np.concatenate([grid.values for grid in grids])
        cmap, norm = _scale(both, chosen, style)
        cmap2, norm2 = _contrast_scale(third.values, contrast, style)
        n_columns = sum(len(part.columns) for part in third.parts)
        labels = _labels_width(third.rows)
        one = _within(0.2 * n_columns + 0.4, 2.3, 4.0)
        page = _Page(
            style,
            width or max(_WIDE, 2 * _MARGIN + labels + 3 * one + 2 * 0.2),
            f"{chosen.title} and difference by block and weight",
            [_about(first, names[0]), _about(second, names[1]), _differences(third, names)],
        )
        titles = (*names, f"{contrast.title}: {names[1]} / {names[0]}")
        if not contrast.centred:
            titles = (*names, contrast.title)
        height = len(third.rows) * _ROW
        wide = page.width >= _WIDE
        free = page.width - 2 * _MARGIN - labels
        plot = max((free - 2 * 0.2) / 3 if wide else free, _LEAST_PLOT)
        left = page.width - _MARGIN - (3 * plot + 2 * 0.2 if wide else plot)
        lefts = [left + n * (plot + 0.2) for n in range(3)] if wide else [left] * 3

        def panel(n: int, top: float) -> None:
            grid, map_, norm_ = (grids[n], cmap, norm) if n < 2 else (third, cmap2, norm2)
            page.text(
                lefts[n], top, _fitted(titles[n], plot, _TEXT, bold=True), _TEXT, weight="bold"
            )
            box = (lefts[n], top + 0.42, plot, height)
            prefix = ("first ", "second ", "difference ")[n]
            with_labels = n == 0 or not wide
            _draw_grid(page, grid, box, map_, norm_, "block", prefix=prefix, labels=with_labels)

        space = 0.42 + height + 0.42
        tops = [page.take(space)] * 3 if wide else [page.take(space), page.take(space), 0.0]
        if wide:
            scales = page.y
            _add_scale(page, (left, min(2 * plot, 4.2)), cmap, norm, chosen.label)
            page.y = scales
            _add_scale(page, (lefts[2], plot), cmap2, norm2, contrast.label)
        else:
            _add_scale(page, (left, plot), cmap, norm, chosen.label)
            tops[2] = page.take(space)
            _add_scale(page, (left, plot), cmap2, norm2, contrast.label)
        for n, top in enumerate(tops):
            page.add(partial(panel, n, top))
        states = third.states | {s for grid in grids for s in grid.states}
        only = dict(zip(("FIRST", "SECOND"), (f"only in {each}" for each in names), strict=True))
        _add_legend(page, left, states, **only)
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
    with _drawing():
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
    text = f"{root}>\n <title>{escape(_clean(str(figure.get_label())))}</title>{rest}"
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
    with _drawing():
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


# --- matplotlib --------------------------------------------------------------

_LOCK = threading.RLock()

# what of matplotlib's settings may show in a picture
_GROUPS = [
    "axes",
    "font",
    "figure",
    "grid",
    "hatch",
    "image",
    "legend",
    "lines",
    "mathtext",
    "patch",
    "path",
    "savefig",
    "scatter",
    "svg",
    "text",
    "xtick",
    "ytick",
    "agg",
]


@contextmanager
def _drawing() -> Iterator[None]:
    """matplotlib with its defaults instead of the user's settings, which belong to the process:
    hence one at a time."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'imatrix[plot]' (or pip install matplotlib)"
        ) from error
    ours = {key: value for key, value in mpl.rcParamsDefault.items() if _shows(key)}
    ours |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "imatrix",
        "text.parse_math": False,  # a weight's name is not a formula
        "hatch.linewidth": 0.7,
        "font.size": _TEXT,
    }
    with _LOCK, mpl.rc_context(ours), warnings.catch_warnings():
        # names may be in any script; what the font lacks is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _shows(key: str) -> bool:
    return key.split(".")[0] in _GROUPS and key != "figure.hooks"


@dataclass(frozen=True)
class _Look:
    """Colours. Those of the lines are of Okabe and Ito's set, which colour-blind people tell
    apart (jfly.uni-koeln.de/color)."""

    paper: str
    ink: str
    muted: str
    frame: str
    absent: str
    first: str
    second: str
    line: str
    colours: str
    diverging: tuple[str, ...]


_LOOKS = {
    "light": _Look(
        paper="#ffffff",
        ink="#1a1d21",
        muted="#555c64",
        frame="#aab1b9",
        absent="#e9ebee",
        first="#0072b2",
        second="#d55e00",
        line="#0072b2",
        colours="viridis",
        diverging=("#08519c", "#6baed6", "#f7f7f7", "#f4a261", "#b35806"),
    ),
    "dark": _Look(
        paper="#14171c",
        ink="#eceff2",
        muted="#a9b0b9",
        frame="#505862",
        absent="#2a2f36",
        first="#56b4e9",
        second="#e69f00",
        line="#56b4e9",
        colours="viridis",
        diverging=("#8fd0ff", "#2f78b3", "#3a4048", "#b8701f", "#ffc078"),
    ),
}


class _Page:
    """A figure that is filled from the top, in inches; made when its height is known."""

    def __init__(self, style: Style, width: float, title: str, notes: Sequence[str]) -> None:
        self.look = _LOOKS[style]
        self.width = width
        self.title = title
        self.y = _MARGIN
        self._steps: list[Callable[[], object]] = []
        self._figure: Figure | None = None
        room = width - 2 * _MARGIN
        for line in _wrapped(title, room, _TITLE, bold=True):
            self.line(line, _TITLE, 0.22, weight="bold")
        for note in notes:
            for line in _wrapped(note, room, _SMALL):
                self.line(line, _SMALL, 0.16, color=self.look.muted)
        self.y += 0.1

    @property
    def figure(self) -> Figure:
        assert self._figure is not None, "the page is not finished"
        return self._figure

    def take(self, height: float) -> float:
        """Reserve a strip and give its top."""
        top = self.y
        self.y += height
        return top

    def add(self, step: Callable[[], object]) -> None:
        """Something to draw once there is a figure."""
        self._steps.append(step)

    def line(self, text: str, size: float, height: float, **how: Any) -> None:
        top = self.take(height)
        self.add(lambda: self.text(_MARGIN, top, text, size, **how))

    def finish(self) -> Figure:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.y += _MARGIN
        self._figure = Figure(figsize=(self.width, self.y), facecolor=self.look.paper)
        FigureCanvasAgg(self._figure)
        self._figure.set_label(self.title)
        for step in self._steps:
            step()
        return self._figure

    def text(self, left: float, top: float, text: str, size: float, **how: Any) -> None:
        """Text whose top left corner is there (or what `ha` and `va` say)."""
        how = {"color": self.look.ink, "va": "top", "ha": "left"} | how
        self.figure.text(left / self.width, 1 - top / self.y, text, size=size, **how)

    def add_line(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """A thin line from one place to another, in inches from the top left."""
        from matplotlib.lines import Line2D

        self.figure.add_artist(
            Line2D(
                [start[0], end[0]],
                [self.y - start[1], self.y - end[1]],
                transform=self.figure.dpi_scale_trans,
                color=self.look.frame,
                linewidth=0.8,
            )
        )

    def axes(self, box: tuple[float, float, float, float], label: str) -> Axes:
        """Axes at (left, top, width, height)."""
        left, top, width, height = box
        axes = self.figure.add_axes(
            (
                left / self.width,
                1 - (top + height) / self.y,
                width / self.width,
                height / self.y,
            ),
            label=label,
            facecolor=self.look.absent,
        )
        # said here, for ticks are made when they are drawn, by then with the user's settings
        axes.tick_params(
            which="both",
            labelsize=_SMALL,
            labelcolor=self.look.ink,
            color=self.look.frame,
            length=2.5,
            width=0.8,
            pad=2.5,
        )
        axes.minorticks_off()
        for spine in axes.spines.values():
            spine.set(color=self.look.frame, linewidth=0.8)
        return axes


# --- the pieces --------------------------------------------------------------

_HATCHES = {
    State.NO_ROWS: "xxxxx",
    State.ZERO: ".....",
    State.FIRST: "\\\\\\\\\\",
    State.SECOND: "/////",
    State.SHAPE: "+++++",
}
_WORDS = {
    State.ABSENT: "not in the matrix",
    State.NO_ROWS: "no rows",
    State.ZERO: "only zeros",
    State.FIRST: "in the first only",
    State.SECOND: "in the second only",
    State.SHAPE: "shapes differ",
}
_UNSEEN = "unseen"
_THINNEST = "thinnest"


def _hatched(look: _Look, state: State) -> dict[str, Any]:
    colour = {State.FIRST: look.first, State.SECOND: look.second}.get(state, look.muted)
    return {"facecolor": look.paper, "edgecolor": colour, "hatch": _HATCHES[state], "lw": 0}


def _draw_grid(
    page: _Page,
    grid: Grid,
    box: tuple[float, float, float, float],
    cmap: Colormap,
    norm: Normalize,
    xlabel: str | None,
    *,
    prefix: str = "",
    labels: bool = True,
) -> list[Axes]:
    """A heat map, an axes a part. xlabel: None for no ticks and no label below."""
    left, top, width, height = box
    row = height / len(grid.rows)
    drawn = []
    boxes = _part_boxes(grid, left, width)
    roomy = row >= 0.18 and all(
        w / len(part.columns) >= 0.44 for part, (_, w) in zip(grid.parts, boxes, strict=True)
    )
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
            _write_values(axes, part, cmap, norm)
        page.text(x + w / 2, top - 0.05, part.label, _SMALL, ha="center", va="bottom",
                  color=page.look.muted)  # fmt: skip
        _block_ticks(axes, part, cell, shown=xlabel is not None)
        _row_ticks(axes, grid.rows, row, shown=labels and len(drawn) == 1)
    if xlabel is not None and any(part.columns != ("",) for part in grid.parts):
        page.text(left + width / 2, top + height + 0.22, xlabel, _SMALL, ha="center",
                  color=page.look.muted)  # fmt: skip
    return drawn


def _part_boxes(grid: Grid, left: float, width: float) -> list[tuple[float, float]]:
    """(left, width) of each part: in proportion to its columns, but room for its label."""
    gap = 0.09
    free = width - gap * (len(grid.parts) - 1)
    total = sum(len(part.columns) for part in grid.parts)
    widths = [free * len(part.columns) / total for part in grid.parts]
    least = [
        _width_of(part.label, _SMALL) + 0.04 if len(grid.parts) > 1 else 0.0 for part in grid.parts
    ]
    short = [max(0.0, need - have) for need, have in zip(least, widths, strict=True)]
    spare = [max(0.0, have - need) for need, have in zip(least, widths, strict=True)]
    share = min(1.0, sum(short) / sum(spare)) if sum(spare) else 0.0
    boxes = []
    for have, more, less in zip(widths, short, spare, strict=True):
        boxes.append((left, have + more - share * less))
        left += boxes[-1][1] + gap
    return boxes


def _rule(page: _Page, axes: Axes, part: Part, cell: float, row: float) -> None:
    """Thin lines between cells that are large enough for them."""
    n_rows, n_columns = part.values.shape
    look: dict[str, Any] = {"colors": page.look.paper, "linewidth": 0.6}
    if row >= 0.12:
        axes.hlines(np.arange(n_rows - 1) + 0.5, -0.5, n_columns - 0.5, **look)
    if cell >= 0.12:
        axes.vlines(np.arange(n_columns - 1) + 0.5, -0.5, n_rows - 0.5, **look)
    axes.set(xlim=(-0.5, n_columns - 0.5), ylim=(n_rows - 0.5, -0.5))


def _hatch(page: _Page, axes: Axes, part: Part, state: State) -> None:
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


def _write_values(axes: Axes, part: Part, cmap: Colormap, norm: Normalize) -> None:
    for (row, column), value in np.ndenumerate(part.values):
        if not np.isfinite(value):
            continue
        red, green, blue, _ = cmap(norm(value))
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        axes.text(
            column,
            row,
            _number(float(value), 2),
            size=7,
            ha="center",
            va="center_baseline",
            color="#000000" if light else "#ffffff",
        )


def _block_ticks(axes: Axes, part: Part, cell: float, *, shown: bool) -> None:
    if part.columns == ("",) or not shown:
        axes.set_xticks([])
        return
    room = max(_width_of(label, _SMALL) for label in part.columns) + 0.08
    step = _step(room / cell)
    at = list(range(0, len(part.columns), step))
    axes.set_xticks(at, [part.columns[n] for n in at])


def _row_ticks(axes: Axes, rows: Sequence[str], row: float, *, shown: bool) -> None:
    if not shown:
        axes.set_yticks([])
        return
    at = list(range(0, len(rows), _step(0.15 / row)))
    axes.set_yticks(at, [_clean(rows[n], 34) for n in at])


def _step(least: float) -> int:
    """1, 2, 5, 10, 20, ...: the first that is as large."""
    for power in range(9):
        for digit in (1, 2, 5):
            if digit * 10**power >= least:
                return int(digit * 10**power)
    return 10**9


def _mark_experts(page: _Page, grid: Grid, axes: Sequence[Axes], height: float) -> None:
    """White cells with a dot for experts without rows, circles for the thinnest."""
    from matplotlib.patches import Rectangle

    row = height / len(grid.rows) * 72  # points
    thinnest = set(_thinnest(grid))
    for part, each in zip(grid.parts, axes, strict=True):
        for column, line in enumerate((part.states == State.NO_ROWS).T):
            for start, end in _runs(line):
                each.add_patch(
                    Rectangle(
                        (column - 0.5, start - 0.5), 1, end - start, facecolor="#ffffff",
                        edgecolor="#000000", lw=0.6,
                    )
                )  # fmt: skip
        unseen, columns = np.nonzero(part.states == State.NO_ROWS)
        # low cells might get lost: the dots are never smaller than this
        each.plot(
            columns, unseen, linestyle="", label="unseen", **_mark(_UNSEEN, _within(row, 3.6, 7.0))
        )
        circles = [
            (column, expert)
            for column, block in enumerate(part.columns)
            for expert in range(len(grid.rows))
            if (int(block), expert) in thinnest
        ]
        if circles:
            each.plot(*zip(*circles, strict=True), linestyle="", clip_on=False, label="thinnest",
                      **_mark(_THINNEST, _within(row, 7.0, 10.0)))  # fmt: skip


def _mark(which: str, size: float) -> dict[str, Any]:
    if which == _UNSEEN:
        return {"marker": ".", "markersize": 0.7 * size, "color": "#000000"}
    return {
        "marker": "o",
        "markersize": size,
        "markerfacecolor": "none",
        "markeredgecolor": "#ff3d7f",
        "markeredgewidth": 1.6,
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


def _draw_spread(page: _Page, grid: Grid, box: tuple[float, float, float, float]) -> None:
    """Most, median and fewest rows of the experts of each block."""
    left, top, width, height = box
    values = grid.values
    low, high = min(values.min(), THIN) / 1.5, max(values.max(), THIN) * 1.5
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
        _number_ticks(axes, low, high, 4, shown=n == 0)
    page.text(left, top - 0.3, "rows of a block's experts: ", _SMALL, color=page.look.muted)
    at = left + _width_of("rows of a block's experts:  ", _SMALL)
    for text, colour in (
        ("fewest to most", page.look.line),
        ("median", page.look.second),
        (f"dashed: {THIN}, thin below", page.look.muted),
    ):
        page.text(at, top - 0.3, text, _SMALL, color=colour)
        at += _width_of(text + "   ", _SMALL)
    page.text(left + width / 2, top + height + 0.22, "block", _SMALL, ha="center",
              color=page.look.muted)  # fmt: skip


def _number_ticks(
    axes: Axes, low: float, high: float, most: int, *, shown: bool, axis: str = "y"
) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    ticks = _log_ticks(low, high, most)
    one = axes.yaxis if axis == "y" else axes.xaxis
    one.set_minor_locator(NullLocator())
    one.set_minor_formatter(NullFormatter())
    one.set_ticks(ticks, [_number(tick) if shown else "" for tick in ticks])
    if not shown:
        axes.tick_params(axis="y", length=0)


def _add_scale(
    page: _Page,
    place: tuple[float, float],
    cmap: Colormap,
    norm: Normalize,
    label: str,
) -> None:
    """A colour bar with its label above it; place: (left, width)."""
    left, width = place
    lines = _wrapped(label, width, _SMALL)
    top = page.take(0.1 + 0.16 * len(lines) + 0.13 + 0.22) + 0.1

    def draw() -> None:
        from matplotlib.colors import LogNorm

        for n, line in enumerate(lines):
            page.text(left, top + 0.16 * n, line, _SMALL, color=page.look.muted)
        axes = page.axes((left, top + 0.16 * len(lines) + 0.02, width, 0.13), f"scale {label}")
        axes.imshow(
            np.linspace(0, 1, 256)[np.newaxis],
            cmap=cmap,
            aspect="auto",
            extent=(0, 1, 0, 1),
            interpolation="none",
        )
        axes.set_yticks([])
        most = int(width / 0.48)
        ticks = _even_ticks(norm, most)
        if isinstance(norm, LogNorm):
            ticks = _log_ticks(float(norm.vmin or 1), float(norm.vmax or 1), most)
        axes.set_xticks([float(norm(tick)) for tick in ticks], [_number(tick) for tick in ticks])

    page.add(draw)


def _add_legend(
    page: _Page,
    start: float,
    states: frozenset[State],
    marks: Sequence[str] = (),
    **texts: str,
) -> None:
    """What the cells without a colour are. texts: other words for a state, by its name."""
    items: list[tuple[State | str, str]] = [
        (state, texts.get(state.name, text)) for state, text in _WORDS.items() if state in states
    ]
    items += [(mark, {_UNSEEN: "no rows", _THINNEST: "fewest rows"}[mark]) for mark in marks]
    if not items:
        return
    places = []
    left, top = start, page.take(0.3) + 0.1
    for item, text in items:
        text = _fitted(text, page.width - _MARGIN - start - 0.3, _SMALL)
        width = 0.3 + _width_of(text, _SMALL) + 0.2
        if left + width - 0.2 > page.width - _MARGIN and left > start:
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
                if item == _UNSEEN:
                    how = {"facecolor": "#ffffff", "edgecolor": "#000000", "lw": 0.6}
                    page.figure.add_artist(
                        Rectangle((x, page.y - y - 0.12), 0.24, 0.13, transform=inches, **how)
                    )
                page.figure.add_artist(
                    Line2D(
                        [x + 0.12], [page.y - y - 0.055], transform=inches, linestyle="",
                        **_mark(item, 7.0),
                    )
                )  # fmt: skip
            page.text(x + 0.3, y, text, _SMALL, color=page.look.muted)

    page.add(draw)


# --- channels ----------------------------------------------------------------


def _add_profile(page: _Page, name: str, entry: Entry, expert: int | None, heaviest: int) -> None:
    found = profile(entry, expert)
    whose = ""
    if entry.n_mat > 1:
        whose = f"all {entry.n_mat} matrices (experts) pooled" if expert is None else ""
        whose = whose or f"expert {expert} of {entry.n_mat}"
    _add_heading(page, name, entry.n_in, found, whose)
    if found is None or not found.values.any():
        return
    wide = page.width >= _WIDE
    left = _MARGIN + 0.55
    free = page.width - left - _MARGIN
    first = 0.66 * free - 0.1 if wide else free
    second = 0.34 * free - 0.1 if wide else free
    top = page.take(0.44 + 1.7 + 0.46) + 0.44
    other = top if wide else page.take(0.1 + 1.5 + 0.46) + 0.1
    page.add(lambda: _draw_channels(page, name, found, (left, top, first, 1.7), heaviest))
    box = (left + first + 0.2, other, second, 1.7) if wide else (left, other, second, 1.5)
    page.add(lambda: _draw_sorted(page, name, found, box, heaviest, labels=not wide))


def _add_heading(page: _Page, name: str, n_in: int, found: Profile | None, whose: str) -> None:
    room = page.width - 2 * _MARGIN
    for line in _wrapped(_clean(name, 80), room, _TEXT, bold=True):
        page.line(line, _TEXT, 0.18, weight="bold")
    facts = [f"{n_in} channels"] + ([whose] if whose else [])
    if found is None:
        facts.append("no rows: there is nothing to draw")
    elif not found.values.any():
        facts.append(f"{_plural(found.rows, 'row')} of zeros: there is nothing to draw")
    else:
        facts.append(_plural(found.rows, "row"))
        k = heaviest_count(n_in)
        share = float(np.sort(found.shares)[-k:].sum())
        of = f"the heaviest 1 % ({_plural(k, 'channel')}) " if n_in >= 100 else "the heaviest one "
        facts.append(f"{of}{'hold' if k > 1 else 'holds'} {_percent(share)} of the sum")
        if zeros := int(np.count_nonzero(found.values == 0)):
            facts.append(f"{zeros} always 0, not drawn")
    for line in _wrapped("; ".join(facts), room, _SMALL):
        page.line(line, _SMALL, 0.16, color=page.look.muted)


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    some = values[values > 0]
    return float(some.min()) / 1.6, float(some.max()) * 1.6


def _draw_channels(
    page: _Page,
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
    _number_ticks(axes, low, high, 6, shown=True)
    axes.set_ylabel("mean square", size=_SMALL, color=page.look.muted)
    axes.set_xlabel(_fitted(what, box[2], _SMALL), size=_SMALL, color=page.look.muted)
    _channel_ticks(axes, n, box[2])
    _name_channels(page, axes, found, heaviest, box)


def _channel_ticks(axes: Axes, n: int, width: float) -> None:
    from matplotlib.ticker import MaxNLocator

    most = int(_within(width / 0.7, 2, 9))
    ticks = [t for t in MaxNLocator(most, integer=True).tick_values(0, n - 1) if 0 <= t < n]
    axes.set_xticks(ticks, [f"{int(tick)}" for tick in ticks])


def _name_channels(
    page: _Page,
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
        page.text(left + label, top - 0.42, f"#{channel}", _SMALL, ha="center", weight="bold")
        page.text(left + label, top - 0.28, _percent(float(found.shares[channel])), _SMALL,
                  ha="center", color=page.look.muted)  # fmt: skip
        page.add_line((left + label, top - 0.13), (left + place, top))
    if mark and named:
        axes.plot(
            named, found.values[named], linestyle="", marker="o", markersize=4.5,
            markerfacecolor="none", markeredgecolor=page.look.second, markeredgewidth=1.3,
            label="heaviest",
        )  # fmt: skip


def _spread(at: Sequence[float], slot: float, width: float) -> list[float]:
    """Places for labels `slot` wide, in order, as near to `at` as they fit into `width`."""
    # Neighbours that would overlap move together, centred on what they belong to.
    groups: list[tuple[list[float], float]] = []
    for place in at:
        group, centre = [place], _within(place, slot / 2, width - slot / 2)
        while groups and groups[-1][1] + (len(groups[-1][0]) + len(group)) * slot / 2 > centre:
            group = groups.pop()[0] + group
            half = len(group) * slot / 2
            centre = _within(sum(group) / len(group), half, width - half)
        groups.append((group, centre))
    return [
        centre + (n - (len(group) - 1) / 2) * slot
        for group, centre in groups
        for n in range(len(group))
    ]


def _draw_sorted(
    page: _Page,
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
    _number_ticks(axes, low, high, 6, shown=labels)
    _number_ticks(axes, 0.8, n * 1.25, 5, shown=True, axis="x")
    if labels:
        axes.set_ylabel("mean square", size=_SMALL, color=page.look.muted)
    axes.set_xlabel("rank (dashed: mean)", size=_SMALL, color=page.look.muted)


def _add_expert_profiles(page: _Page, name: str, entry: Entry, heaviest: int, style: Style) -> None:
    """A map of experts against channels."""
    found = profile(entry)
    unseen = int(np.count_nonzero(np.broadcast_to(entry.counts == 0, entry.n_mat)))
    whose = f"{entry.n_mat} matrices (experts)"
    if unseen:
        whose += f", {unseen} without rows"
    _add_heading(page, name, entry.n_in, found, whose + "; pooled")
    if found is None or not found.values.any():
        return
    seen = np.broadcast_to(entry.counts > 0, entry.n_mat)
    per = -(-entry.n_in // _MOST_COLUMNS)
    starts = np.arange(0, entry.n_in, per)
    values = np.maximum.reduceat(entry.importance, starts, axis=1)
    values = np.where(seen[:, np.newaxis] & (values > 0), values, np.nan)
    cmap, norm = _log_scale(values[np.isfinite(values)], style)
    left = _MARGIN + 0.55
    width = page.width - left - _MARGIN
    height = _within(0.05 * entry.n_mat, 1.4, 5.0)
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
        axes.set_ylabel("expert", size=_SMALL, color=page.look.muted)
        what = "channel" + (f" (a column: the largest of {per})" if per > 1 else "")
        axes.set_xlabel(_fitted(what, width, _SMALL), size=_SMALL, color=page.look.muted)
        _name_channels(page, axes, found, heaviest, box, mark=False)

    page.add(draw)
    label = "mean squared activation (log scale); plain: no rows, or only zeros"
    _add_scale(page, (left, min(width, 4.2)), cmap, norm, label)


# --- scales, texts -----------------------------------------------------------


def _scale(
    values: NDArray[np.float64], quantity: Quantity, style: Style
) -> tuple[Colormap, Normalize]:
    from matplotlib.colors import Normalize

    if quantity.log:
        return _log_scale(values, style)
    assert quantity.limits is not None
    low, high = quantity.limits
    return _map(style), Normalize(low, high)


def _log_scale(
    values: NDArray[np.float64], style: Style, name: str | None = None
) -> tuple[Colormap, Normalize]:
    from matplotlib.colors import LogNorm

    low, high = (float(values.min()), float(values.max())) if values.size else (1.0, 1.0)
    if low == high:  # one value is no scale
        low, high = low / 2, high * 2
    return _map(style, name), LogNorm(low, high)


def _contrast_scale(
    values: NDArray[np.float64], contrast: Contrast, style: Style
) -> tuple[Colormap, Normalize]:
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    if not contrast.centred:
        # below it there is nothing but rounding (2^-53), and equal matrices have 0
        return _log_scale(np.maximum(values, 1e-16), style, "cividis")
    look = _LOOKS[style]
    most = float(np.abs(values).max(initial=0.0)) or 1.0
    cmap = LinearSegmentedColormap.from_list("difference", look.diverging)
    return cmap.with_extremes(bad=look.absent), Normalize(-most, most)


def _map(style: Style, name: str | None = None) -> Colormap:
    import matplotlib as mpl

    look = _LOOKS[style]
    return mpl.colormaps[name or look.colours].with_extremes(bad=look.absent)


def _even_ticks(norm: Normalize, most: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    low, high = float(norm.vmin or 0), float(norm.vmax or 0)
    ticks = MaxNLocator(min(most, 6), steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    slack = 1e-9 * (high - low)
    return [float(tick) for tick in ticks if low - slack <= tick <= high + slack]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """1, 2, 5 times powers of ten if these are no more than `most`, or the powers, or some."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in (range(1, 10), (1, 2, 5), (1,)):
        ticks = [
            digit * 10.0**power
            for power in range(first, last + 1)
            for digit in digits
            if low <= digit * 10.0**power <= high
        ]
        if len(ticks) <= most:
            break
    if len(ticks) < 2:
        return [low, high]
    return ticks[:: -(-len(ticks) // most)]


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _number(value: float, digits: int = 3) -> str:
    """Short, and without a formula's markup: 0.02, 1500, 3 times 10 to the -5 in superscripts."""
    size = abs(value)
    sign = "\N{MINUS SIGN}" if value < 0 else ""
    if size == 0:
        return "0"
    if 1e-3 <= size < 1e5:
        text = f"{size:.{digits}g}"
        return sign + (f"{float(text):.0f}" if "e" in text else text)
    mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return sign + (power if mantissa == "1" else f"{mantissa}\N{MULTIPLICATION SIGN}{power}")


def _percent(share: float) -> str:
    percent = 100 * share
    if percent >= 99.95:
        return "100 %" if share == 1 else ">99.9 %"
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _clean(text: str, most: int = 400) -> str:
    """A text from a file as it may be shown: nothing that XML forbids, and not without end."""
    text = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def _width_of(text: str, size: float, *, bold: bool = False) -> float:
    """Inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width) / 72


def _labels_width(labels: Sequence[str]) -> float:
    """Room for labels left of an axes, in inches."""
    return max(_width_of(_clean(label, 34), _SMALL) for label in labels) + 0.12


def _fitted(text: str, room: float, size: float, *, bold: bool = False) -> str:
    """Shortened in the middle until it fits."""
    text = _clean(text)
    most = len(text)
    while most > 5 and _width_of(text, size, bold=bold) > room:
        most -= 1
        text = _clean(text, most) if len(text) > most else text
    return text


def _wrapped(text: str, room: float, size: float, *, bold: bool = False) -> list[str]:
    """Lines that fit; "" gives none."""
    lines: list[str] = []
    for word in _clean(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _width_of(longer, size, bold=bold) <= room:
            lines[-1] = longer
        else:
            lines.append(_fitted(word, room, size, bold=bold))
    return lines


def _about(matrix: ImportanceMatrix, name: str) -> str:
    text = f"{len(matrix)} weights: {len(matrix.trunk)} trunk, {len(matrix.head)} head"
    if blocks := sorted(matrix.head_blocks):
        text += f" (block {', '.join(map(str, blocks))})"
    if matrix.chunk_count:
        text += f"; {_plural(matrix.chunk_count, 'chunk')}"
        text += f" of {matrix.chunk_size} tokens" if matrix.chunk_size else ""
    return f"{name}: {text}" if name else text


def _experts(matrix: ImportanceMatrix) -> str:
    rows = expert_rows(matrix)
    places = [
        (int(n), block, expert) for block, seen in rows.items() for expert, n in enumerate(seen)
    ]
    unseen = [place for place in places if place[0] == 0]
    thin = sum(0 < n < THIN for n, _, _ in places)
    text = f"{_plural(len(places), 'expert')} in {_plural(len(rows), 'block')}: "
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
        f"{_plural(n, 'weight')} with rows only in {name}"
        for name, state in zip(names, (State.FIRST, State.SECOND), strict=True)
        if (n := count(state))
    ]
    if n := count(State.SHAPE):
        facts.append(f"{_plural(n, 'weight')} of another shape")
    return "; ".join(facts)


# --- arguments ---------------------------------------------------------------


def _one_of(label: str, value: str, known: dict[str, Any]) -> Any:
    if value not in known:
        raise ValueError(f"{label} must be one of {', '.join(known)}, got {value!r}")
    return known[value]


def _check(matrix: ImportanceMatrix, style: str, width: float | None) -> None:
    if not len(matrix):
        raise ValueError("there is nothing to draw: the matrix is empty")
    _one_of("style", style, _LOOKS)
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
