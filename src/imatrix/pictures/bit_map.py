"""The map of a recipe: bits a weight by block and kind, as a part of a page."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from imatrix.pictures.arguments import check_kinds
from imatrix.pictures.bit_grid import bit_grid
from imatrix.pictures.grids import State
from imatrix.pictures.heatmaps import ROW, cell_width, draw_grid, wanted_width
from imatrix.pictures.looks import LOOKS, Style
from imatrix.pictures.marks import add_items, draw_swatch
from imatrix.pictures.page import LEAST_PLOT, Page, within
from imatrix.pictures.scales import colour_map, number
from imatrix.pictures.texts import SMALL, labels_width
from imatrix.quantization.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize

__all__ = ["BitMap"]

# Bits a weight where the colours begin and end, the same in all pictures, so that two of them may
# be compared: below IQ1_S, above Q8_0. What has more has the colour "whole".
_LIMITS = (1.5, 9.0)


class BitMap:
    """Blocks across, kinds of tensors down; the colour is bits a weight, the text the type.

    Attributes:
        height: of its cells, in inches.

    Raises:
        ValueError: the recipe has no tensor to draw, or more kinds than there is room for.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._found = bit_grid(recipe)
        if not self._found.grid.parts:
            raise ValueError("there is nothing to draw: the recipe has a type for no tensor")
        check_kinds(self._found.grid)
        self._labels = labels_width(self._found.grid.rows)
        self.height = len(self._found.grid.rows) * ROW

    def wanted(self) -> float:
        """Inches that it would like to have: with room for the types' names if there are few blocks."""
        needed = [cell_width(texts.ravel()) for texts in self._found.texts]
        named = wanted_width(self._found.grid, needed)
        if named <= 7.0:
            return self._labels + max(named, 2.6)
        n_columns = sum(len(part.columns) for part in self._found.grid.parts)
        return self._labels + within(0.26 * n_columns + 0.4, 3.4, 8.4)

    def add(self, page: Page, left: float, width: float) -> None:
        """Draw it on the page, next from the top."""
        grid, texts = self._found.grid, self._found.texts
        cmap, norm = _colours(page.style)
        plot = max(width - self._labels, LEAST_PLOT)
        start = left + width - plot
        box = (start, page.take(0.2 + self.height + 0.42) + 0.2, plot, self.height)
        page.add(lambda: draw_grid(page, grid, box, cmap, norm, "block", texts=texts))
        items = []
        for bits, names in self._found.types:
            swatch = {"facecolor": cmap(norm(bits)), "edgecolor": page.look.frame, "lw": 0.4}
            words = f"{', '.join(names)}: {number(bits, 4)}"
            items.append((partial(draw_swatch, page, how=swatch), words))
        if State.ABSENT in grid.states:
            swatch = {"facecolor": page.look.absent, "lw": 0}
            items.append((partial(draw_swatch, page, how=swatch), "no such tensor"))
        top = page.take(0.1)
        page.add(lambda: page.text(left, top, "bits a weight", SMALL, color=page.look.muted))
        add_items(page, left, left + width, items)


def _colours(style: Style) -> tuple[Colormap, Normalize]:
    from matplotlib.colors import LogNorm

    return colour_map(style).with_extremes(
        bad=LOOKS[style].absent, over=LOOKS[style].whole
    ), LogNorm(*_LIMITS)
