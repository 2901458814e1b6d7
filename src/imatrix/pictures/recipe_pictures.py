"""`bits`, `frontier` and `recipe`: a recipe's types by block and kind, and what a size costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from imatrix.pictures.arguments import check_look, heading_width
from imatrix.pictures.bit_map import BitMap
from imatrix.pictures.looks import Style
from imatrix.pictures.page import MARGIN, WIDE, Page, drawing
from imatrix.pictures.size_curve import SizeCurve
from imatrix.quantization.frontier import NORMAL_95
from imatrix.quantization.recipe import Recipe
from imatrix.words import plural, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bits", "frontier", "recipe"]

# inches: between curve and map, and what a curve is high at least
_BETWEEN = 0.3
_LEAST_CURVE = 2.4


def bits(recipe: Recipe, *, style: Style = "light", width: float | None = None) -> Figure:
    """The map of a recipe: blocks across, kinds of tensors down, coloured by bits a weight.

    The head's blocks, and what is in no block (output and embeddings), stand apart. The type's name
    is in the cell if there is room. What stays F32 (norms, biases, routers) is left out; what stays
    in another type is shown with it.

    Args:
        recipe: the recipe.
        style, width: as for `layers`.

    Returns:
        A figure with an axes for each part ("trunk", "head", "no block"), whose image holds the
        bits a weight, NaN where there is no tensor.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
        ValueError: the recipe has nothing to draw, or an argument is not one of those above.
    """
    check_look(style, width)
    with drawing():
        map_ = BitMap(recipe)
        title, notes = "Types by block and kind", _describe(recipe)
        wide = width or max(2 * MARGIN + map_.wanted(), heading_width(title, notes))
        page = Page(style, wide, title, notes)
        map_.add(page, MARGIN, page.width - 2 * MARGIN)
        return page.finish()


def frontier(recipe: Recipe, *, style: Style = "light", width: float | None = None) -> Figure:
    """Size against KL divergence: what is predicted for the best recipe of each size, and what was
    measured.

    The recipe's file keeps these. KL is on a logarithmic axis; points measured have their 95 %
    intervals. Of the curve that part is shown where something is marked.

    Args:
        recipe: a recipe with a frontier.
        style, width: as for `layers`.

    Returns:
        A figure with the axes "frontier". Its lines are in bytes and nats a token: "predicted",
        "measured", "mixtures", "recipe" (this one); "chosen" stands at each size chosen.

    Raises:
        ImportError, ValueError: as for `bits`.
        ValueError: the recipe has no frontier.
    """
    check_look(style, width)
    with drawing():
        curve = SizeCurve(recipe)
        page = Page(style, width or 7.0, "KL divergence by size", _describe(recipe))
        curve.add(page, MARGIN, page.width - 2 * MARGIN)
        return page.finish()


def recipe(recipe: Recipe, *, style: Style = "light", width: float | None = None) -> Figure:
    """Both pictures, side by side or one above the other; the map alone if there is no frontier.

    Args:
        recipe: the recipe.
        style: "light" or "dark".
        width: as for `layers`; below 8 inches the pictures stand one above the other.

    Returns:
        A figure with the axes of `frontier` and of `bits`.

    Raises:
        ImportError, ValueError: as for `bits`.
    """
    if recipe.frontier is None:
        return bits(recipe, style=style, width=width)
    check_look(style, width)
    with drawing():
        curve, map_ = SizeCurve(recipe), BitMap(recipe)
        notes = _describe(recipe)
        wanted = map_.wanted()
        title = "Recipe: KL divergence by size, types by block and kind"
        wide = width or max(WIDE, 2 * MARGIN + wanted + 4.4 + _BETWEEN)
        page = Page(style, wide, title, notes)
        free = page.width - 2 * MARGIN
        if page.width < WIDE:
            curve.add(page, MARGIN, free)
            page.take(_BETWEEN)
            map_.add(page, MARGIN, free)
            return page.finish()
        share = min(wanted, 0.6 * free)
        start = page.y
        map_.add(page, MARGIN + free - share, share)
        below, page.y = page.y, start
        curve.add(page, MARGIN, free - share - _BETWEEN, max(map_.height, _LEAST_CURVE))
        page.y = max(below, page.y)
        return page.finish()


def _describe(recipe: Recipe) -> list[str]:
    """The recipe in lines of a heading."""
    found = f"{recipe.model}: {size(recipe.bytes)}, {recipe.bits_per_weight:.2f} bits a weight"
    if recipe.head_blocks:
        found += f"; head: block {', '.join(map(str, recipe.head_blocks))}"
    told = []
    if (measured := recipe.measured_kl) is not None:
        told.append(f"KL {measured.value:.4g}")
        if not math.isnan(measured.error):
            told[0] += f" ± {NORMAL_95 * measured.error:.2g}"
        told[0] += " measured"
    if recipe.predicted_kl is not None:
        told.append(f"{'' if told else 'KL '}{recipe.predicted_kl:.4g} predicted")
    if not told:
        return [found]
    words = f"{', '.join(told)}; nats a token"
    if recipe.chunks:
        words += f", {plural(recipe.chunks, 'chunk')} of {recipe.n_ctx} tokens"
    return [found, f"{words}, {recipe.text}" if recipe.text else words]
