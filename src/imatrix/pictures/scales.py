"""Colour scales and logarithmic ticks, and numbers as they are written beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from imatrix.pictures.looks import LOOKS, Style
from imatrix.pictures.page import MARGIN, Page
from imatrix.pictures.texts import SMALL, width_of, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

__all__ = ["add_scale", "colour_map", "log_scale", "number", "number_ticks", "short", "step_of"]


def step_of(least: float) -> int:
    """1, 2, 5, 10, 20, ...: the first that is as large."""
    for power in range(9):
        for digit in (1, 2, 5):
            if digit * 10**power >= least:
                return int(digit * 10**power)
    return 10**9


def number_ticks(
    axes: Axes, low: float, high: float, length: float, *, axis: Literal["x", "y"], shown: bool
) -> None:
    """Ticks of a logarithmic axis that is `length` inches long, as many as their labels fit."""
    from matplotlib.ticker import NullLocator

    def fit(ticks: Sequence[float]) -> bool:
        inches = length / math.log10(high / low)
        places = [inches * math.log10(tick / low) for tick in ticks]
        if axis == "x":
            return _fit(places, ticks)
        return all(upper - lower >= 0.2 for lower, upper in pairwise(places))

    ticks = next(filter(fit, _log_choices(low, high)), [])
    one = axes.yaxis if axis == "y" else axes.xaxis
    one.set_minor_locator(NullLocator())
    one.set_ticks(ticks, [number(tick) if shown else "" for tick in ticks])
    if not shown:
        axes.tick_params(axis=axis, length=0)


def add_scale(
    page: Page,
    place: tuple[float, float],
    cmap: Colormap,
    norm: Normalize,
    label: str,
) -> None:
    """A colour bar with its label above it; place: (left, width)."""
    left, width = place
    # half of a label may stand right of the bar
    width = min(width, page.width - MARGIN - 0.12 - left)
    lines = wrapped(label, width, SMALL)
    top = page.take(0.1 + 0.16 * len(lines) + 0.13 + 0.22) + 0.1

    def draw() -> None:
        from matplotlib.colors import LogNorm

        for n, line in enumerate(lines):
            page.text(left, top + 0.16 * n, line, SMALL, color=page.look.muted)
        axes = page.axes((left, top + 0.16 * len(lines) + 0.02, width, 0.13), f"scale {label}")
        axes.imshow(
            np.linspace(0, 1, 256)[np.newaxis],
            cmap=cmap,
            aspect="auto",
            extent=(0, 1, 0, 1),
            interpolation="none",
        )
        axes.set_yticks([])
        low, high = float(norm.vmin or 0), float(norm.vmax or 0)
        choices = _log_choices(low, high) if isinstance(norm, LogNorm) else _even_choices(low, high)
        ticks = next(
            (each for each in choices if _fit([float(norm(tick)) * width for tick in each], each)),
            [],
        )
        axes.set_xlim(0, 1)
        axes.set_xticks([float(norm(tick)) for tick in ticks], [number(tick) for tick in ticks])

    page.add(draw)


def log_scale(
    values: NDArray[np.float64], style: Style, name: str | None = None
) -> tuple[Colormap, Normalize]:
    """Colours for these values on a logarithmic scale; name: matplotlib's, of other colours."""
    from matplotlib.colors import LogNorm

    low, high = (float(values.min()), float(values.max())) if values.size else (1.0, 1.0)
    # a power of ten at least, or little differences would look like large ones
    more = math.sqrt(max(1.0, 10 * low / high))
    low, high = low / more, high * more
    return colour_map(style, name), LogNorm(low, high)


def colour_map(style: Style, name: str | None = None) -> Colormap:
    """The colours of the style, or those of that name, with its own for cells without a value."""
    import matplotlib as mpl

    look = LOOKS[style]
    return mpl.colormaps[name or look.colours].with_extremes(bad=look.absent)


def _fit(places: Sequence[float], ticks: Sequence[float]) -> bool:
    """Whether the ticks' labels, centred on these places in inches, have room side by side."""
    halves = [width_of(number(tick), SMALL) / 2 for tick in ticks]
    rooms = [one + other + 0.06 for one, other in pairwise(halves)]
    return all(
        right - left >= room for (left, right), room in zip(pairwise(places), rooms, strict=True)
    )


def _even_choices(low: float, high: float) -> Iterator[list[float]]:
    """Round numbers, fewer each time."""
    from matplotlib.ticker import MaxNLocator

    slack = 1e-9 * (high - low)
    for most in (6, 5, 4, 3, 2, 1):
        ticks = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        yield [float(tick) for tick in ticks if low - slack <= tick <= high + slack]


def _log_choices(low: float, high: float) -> Iterator[list[float]]:
    """1 to 9 times powers of ten, then 1, 2, 5 times, the powers, every second, ..."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in (range(1, 10), (1, 2, 5), (1, 3), (1,)):
        ticks = [
            float(f"{digit}e{power}")
            for power in range(first, last + 1)
            for digit in digits
            if low <= float(f"{digit}e{power}") <= high
        ]
        if len(ticks) < 2:  # a narrow range
            yield [low, high]
            return
        yield ticks
    for step in range(2, len(ticks)):
        yield ticks[::step]


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
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


def short(value: float) -> str:
    """Two digits, for a cell."""
    size = abs(value)
    if not 1e-3 <= size < 1e5:
        return number(value, 1)
    sign = "\N{MINUS SIGN}" if value < 0 else ""
    return sign + (f"{size:.0f}" if size >= 9.95 else f"{size:#.2g}")
