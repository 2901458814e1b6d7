"""The frontier of a recipe: size against KL divergence, as a part of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from imatrix.pictures.labels import Label, place_labels
from imatrix.pictures.marks import add_items, draw_line
from imatrix.pictures.page import Page, within
from imatrix.pictures.scales import number, number_ticks
from imatrix.pictures.texts import SMALL, clean, width_of
from imatrix.quantization.frontier import NORMAL_95, FrontierPoint
from imatrix.quantization.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SizeCurve"]

# How far the axis reaches beyond the sizes that have a mark, as a factor, and the least factor from
# its start to its end.
_BEYOND, _SPAN = 1.15, 2.2
# An interval that reaches down to 0 or below ends at this share of the value: a logarithmic axis
# has no place for it.
_LOWEST = 0.1
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class SizeCurve:
    """The curve that was predicted, recipes and mixtures that were measured, the sizes chosen.

    Raises:
        ValueError: the recipe has no frontier, or none with a KL above 0.
    """

    def __init__(self, recipe: Recipe) -> None:
        if recipe.frontier is None:
            raise ValueError(
                "there is no frontier to draw: the recipe's file does not keep one; its types "
                "can be drawn all the same"
            )
        # The axis has no place for the KL of 0 that an unchanged model has, either.
        some = recipe.frontier.kl > 0
        self._sizes = recipe.frontier.bytes[some].astype(np.float64)
        self._kl = recipe.frontier.kl[some]
        self._measured = [point for point in recipe.frontier.measured if point.kl > 0]
        self._mixtures = [point for point in recipe.frontier.mixtures if point.kl > 0]
        self._chosen = recipe.frontier.chosen
        self._own = _own_point(recipe)
        if not self._sizes.size and not self._measured and not self._mixtures:
            raise ValueError("there is no frontier to draw: it has no point with a KL above 0")
        self._x, self._y = self._limits()

    def _limits(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(least, most) of the sizes and of the KL that are shown."""
        points = [*self._measured, *self._mixtures, *([self._own] if self._own else [])]
        marked = [*(float(point.bytes) for point in points), *map(float, self._chosen)]
        low, high = 0.0, math.inf
        if marked:
            low, high = min(marked) / _BEYOND, max(marked) * _BEYOND
            more = math.sqrt(max(1.0, _SPAN * low / high))
            low, high = low / more, high * more
        inside = (self._sizes >= low) & (self._sizes <= high)
        sizes = [*self._sizes[inside].tolist(), *marked]
        values = [*self._kl[inside].tolist(), *(end for each in points for end in _interval(each))]
        # of a curve that lies all outside, and a chosen size alone, nothing is left but the size
        values = values or self._kl.tolist()
        least, most = min(sizes), max(sizes)
        margin = 0.03 * (most - least) or 0.1 * most
        return (least - margin, most + margin), (min(values) / 1.3, max(values) * 1.3)

    def add(self, page: Page, left: float, width: float, height: float | None = None) -> None:
        """Draw it on the page, next from the top.

        Args:
            left, width: its place, in inches.
            height: of the axes; None for what suits the width.
        """
        high = height or within(0.6 * width, 2.6, 4.0)
        aside = 0.62
        over = 0.2
        top = page.take(over + high + 0.42) + over
        box = (left + aside, top, width - aside - 0.05, high)
        page.add(partial(self._draw, page, box))
        add_items(
            page,
            left,
            left + width,
            [(partial(draw_line, page, how=how), words) for words, how in self._keys(page)],
        )

    def _keys(self, page: Page) -> list[tuple[str, dict[str, Any]]]:
        """What the marks are, in words, and how each is drawn."""
        look = page.look
        found: list[tuple[str, dict[str, Any]]] = []
        if self._sizes.size:
            found.append(("recipes, predicted", {"color": look.line, "lw": 1.6}))
        if self._measured:
            found.append(
                ("recipes, measured", {"linestyle": "", "marker": "o", "markersize": 5.0,
                 "color": look.line})
            )  # fmt: skip
        if self._mixtures:
            found.append(
                ("mixtures, measured", {"linestyle": "", "marker": "s", "markersize": 5.0,
                 "color": look.second})
            )  # fmt: skip
        if self._own is not None:
            found.append(
                ("this recipe", {"linestyle": "", "marker": "o", "markersize": 10.0,
                 "markerfacecolor": "none", "markeredgecolor": look.ink, "markeredgewidth": 1.4})
            )  # fmt: skip
        if self._chosen:
            found.append(
                ("sizes chosen", {"color": look.muted, "lw": 0.9, "linestyle": (0, (4, 2))})
            )
        return found

    def _draw(self, page: Page, box: tuple[float, float, float, float]) -> None:
        _, _, width, height = box
        look = page.look
        how = dict(self._keys(page))
        axes = page.axes(box, "frontier")
        axes.set_facecolor(look.paper)
        axes.set_yscale("log")
        axes.set(xlim=self._x, ylim=self._y)
        self._draw_chosen(page, axes, box, how)
        if self._sizes.size:
            axes.plot(self._sizes, self._kl, label="predicted", **how["recipes, predicted"])
        for label, key, points in (
            ("mixtures", "mixtures, measured", self._mixtures),
            ("measured", "recipes, measured", self._measured),
        ):
            if points:
                axes.plot(
                    [point.bytes for point in points],
                    [point.kl for point in points],
                    label=label,
                    **how[key],
                )
                _draw_intervals(axes, f"{label} intervals", points, how[key]["color"])
        if self._own is not None:
            axes.plot([self._own.bytes], [self._own.kl], label="recipe", **how["this recipe"])
        number_ticks(axes, *self._y, height, axis="y", shown=True)
        axes.set_ylabel("KL divergence, nats a token", size=SMALL, color=look.muted)
        unit = _size_ticks(axes, self._x, width)
        axes.set_xlabel(f"size of the file, {unit}", size=SMALL, color=look.muted)
        self._name_mixtures(page, box)

    def _draw_chosen(
        self, page: Page, axes: Axes, box: tuple[float, float, float, float], how: dict[str, Any]
    ) -> None:
        """A line for each size chosen, and above the axes its number, as far as there is room."""
        left, top, width, _ = box
        end = -math.inf
        for size in sorted(set(self._chosen)):
            axes.axvline(size, label="chosen", **how["sizes chosen"])
            text = _in_unit(size, _unit_of(self._x[1]))
            place = width * (size - self._x[0]) / (self._x[1] - self._x[0])
            half = width_of(text, SMALL) / 2
            if place - half > end:
                page.text(left + place, top - 0.04, text, SMALL, ha="center", va="bottom",
                          color=page.look.muted)  # fmt: skip
                end = place + half + 0.06

    def _name_mixtures(self, page: Page, box: tuple[float, float, float, float]) -> None:
        """The names of the mixtures, each beside its mark where it covers the least."""
        left, top, width, height = box

        def at(size: float, kl: float) -> tuple[float, float]:
            """Inches from the top left corner of the axes."""
            (x0, x1), (y0, y1) = self._x, self._y
            return (
                width * (size - x0) / (x1 - x0),
                height * (1 - math.log(kl / y0) / math.log(y1 / y0)),
            )

        marks = [*self._mixtures, *self._measured]
        near = [at(point.bytes, point.kl) for point in marks]
        lines = [at(*each) for each in self._along(int(25 * width))]
        down = np.arange(0, height, 0.04).tolist()
        lines += [(at(size, 1.0)[0], y) for size in self._chosen for y in down]
        labels = [
            Label(clean(point.name, 24), *at(point.bytes, point.kl))
            for point in self._mixtures
            if point.name
        ]
        places = place_labels(labels, near, lines, (width, height))
        for label, (x, y) in zip(labels, places, strict=True):
            page.text(left + x, top + y, label.text, SMALL, color=page.look.second)

    def _along(self, n: int) -> list[tuple[float, float]]:
        """Points (bytes, KL) along the curve, as far as it is shown."""
        if self._sizes.size < 2:
            return []
        low, high = max(self._x[0], self._sizes[0]), min(self._x[1], self._sizes[-1])
        sizes = np.linspace(low, high, n)
        return list(zip(sizes.tolist(), np.interp(sizes, self._sizes, self._kl), strict=True))


def _own_point(recipe: Recipe) -> FrontierPoint | None:
    """Where the recipe itself is: as it was measured, or else as it was predicted."""
    if recipe.measured_kl is not None:
        found = recipe.measured_kl.value
    elif recipe.predicted_kl is not None:
        found = recipe.predicted_kl
    else:
        return None
    return FrontierPoint(bytes=recipe.bytes, kl=found) if found > 0 else None


def _interval(point: FrontierPoint) -> tuple[float, float]:
    """The 95 % interval of a point; the point itself if it has none."""
    if math.isnan(point.error):
        return point.kl, point.kl
    reach = NORMAL_95 * point.error
    return max(point.kl - reach, _LOWEST * point.kl), point.kl + reach


def _draw_intervals(axes: Axes, label: str, points: Sequence[FrontierPoint], colour: str) -> None:
    ends = [_interval(point) for point in points]
    axes.vlines(
        [point.bytes for point in points],
        [low for low, _ in ends],
        [high for _, high in ends],
        colors=colour,
        linewidth=1.4,
        label=label,
    )


def _unit_of(size: float) -> int:
    """Number of the unit in which a size is written: 2 for MiB."""
    return int(within(math.log2(size) // 10, 0, len(_UNITS) - 1))


def _in_unit(size: float, unit: int) -> str:
    return number(size / 1024**unit, 3)


def _size_ticks(axes: Axes, limits: tuple[float, float], width: float) -> str:
    """Ticks at round sizes, as many as there is room for; gives their unit."""
    from matplotlib.ticker import MaxNLocator

    unit = _unit_of(limits[1])
    low, high = (limit / 1024**unit for limit in limits)
    most = int(within(width / 0.55, 2, 9))
    ticks = [
        tick
        for tick in MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= tick <= high
    ]
    axes.set_xticks([tick * 1024**unit for tick in ticks], [number(tick, 4) for tick in ticks])
    return _UNITS[unit]
