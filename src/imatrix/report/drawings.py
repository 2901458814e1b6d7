"""The pictures of the page."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from imatrix import pictures
from imatrix.report.parts import Drawing, Part, Picture
from imatrix.report.subject import Subject
from imatrix.report.thin import Thin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from imatrix.quantization.recipe import Recipe

__all__ = ["draw_pictures", "draw_recipe"]

_STYLES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
_PARTS: tuple[Part, ...] = ("trunk", "head")

# Inches, and up to which width of the screen the narrow drawing is the one to show.
_PHONE = 3.6
_NARROW = "(max-width: 40rem)"

# CSS pixels an inch: text of 8 points is then as large as it is in the tables' notes.
_PIXELS = 112

_NUMBERS = "The tables have the numbers."


def draw_pictures(
    subject: Subject, thin: Thin, other: Subject | None = None
) -> Mapping[str, Picture]:
    """The pictures, by the names that the template has for them.

    Args:
        other: the matrix to compare with; None for none.
    """
    matrix = subject.matrix
    found: dict[str, Picture] = {}
    found["layers"] = _draw(
        partial(pictures.layers, matrix),
        "Heat map: mean squared activation of each weight, kinds of weights against blocks. "
        + _NUMBERS,
        "Mean squared activation, on a logarithmic scale. Hatched: in the file, without a row.",
    )
    found["concentration"] = _draw(
        partial(pictures.layers, matrix, statistic="peak"),
        "Heat map: the heaviest channel of each weight divided by the mean of its matrix, "
        f"kinds of weights against blocks. {_NUMBERS}",
        "How many times the mean the heaviest channel of a weight is, on a logarithmic scale.",
    )
    if coverage := thin.experts:
        block, expert, rows = coverage.thinnest
        found["experts"] = _draw(
            partial(pictures.experts, matrix),
            f"Map of the rows that each of {coverage.n_experts:,} experts saw, experts against "
            f"blocks. {coverage.n_unseen:,} saw none; the fewest has {block} expert {expert}: "
            f"{rows:,}. {_NUMBERS}",
            "Rows of each expert, on a logarithmic scale. A dot: no row. A circle: the fewest.",
        )
    if chosen := _profiled(thin):
        found["channels"] = _draw(
            partial(pictures.channels, matrix, chosen),
            "Profiles: mean squared activation by channel, of the weights with the heaviest "
            f"ones: {', '.join(chosen)}. {_NUMBERS}",
            "Left, or above: channels in their order, the heaviest named with their share of "
            "the sum. Right, or below: sorted.",
        )
    if other is not None:
        found["against"] = _draw(
            partial(
                pictures.compare,
                matrix,
                other.matrix,
                names=(subject.name, other.name),
                difference="cosine",
            ),
            "Three heat maps, kinds of weights against blocks: mean squared activation in this "
            f"matrix and in the other, and how far apart they are. {_NUMBERS}",
            "1 - cosine similarity of the channels' importance, on a logarithmic scale: 0.01 "
            "is close, 1 is nothing in common.",
        )
    return found


def draw_recipe(recipe: Recipe) -> Mapping[str, Picture]:
    """The pictures of a recipe, by the names that the template has for them."""
    found = {
        "bits": _draw(
            partial(pictures.bits, recipe),
            "Map: the type that each tensor gets, coloured by bits a weight, kinds of tensors "
            f"against blocks. {_NUMBERS}",
            "Types by block and kind, coloured by bits a weight, on a scale that is the same in all "
            "pictures.",
        )
    }
    if recipe.frontier is not None:
        found["frontier"] = _draw(
            partial(pictures.frontier, recipe),
            "Curve: the KL divergence from the unchanged model at each size of the file, as "
            "predicted for the best recipe, with the recipes and mixtures that were measured.",
            "KL divergence by size, on a logarithmic scale. Lines through points: 95 % intervals. "
            "Dashed: the sizes that were chosen.",
        )
    return found


def _profiled(thin: Thin) -> list[str]:
    """The weights whose channels are drawn: in the trunk and the head, those with the heaviest ones."""
    found = {part: [each for each in thin.heavy if each.part == part] for part in _PARTS}
    n_head = min(2, len(found["head"]))
    chosen = found["trunk"][: 4 - n_head] + found["head"][:n_head]
    return [each.name for each in chosen]


def _draw(make: Callable[..., Figure], alt: str, caption: str) -> Picture:
    """A picture for phones and for larger screens, in light and in dark."""
    drawings = []
    for narrow in (True, False):
        for style in _STYLES:
            query = [_NARROW] if narrow else []
            if style == "dark":
                query.append("(prefers-color-scheme: dark)")
            try:
                figure = make(style=style, width=_PHONE if narrow else None)
            except ValueError as error:  # too many kinds, names that are no blocks
                return Picture(alt, caption, refusal=str(error))
            drawings.append(_drawing(figure, " and ".join(query)))
    # the most particular query first
    drawings.sort(key=lambda each: -each.media.count("("))
    return Picture(alt, caption, tuple(drawings))


def _drawing(figure: Figure, media: str) -> Drawing:
    text = pictures.svg(figure, background=False)
    width, height = figure.get_size_inches()
    return Drawing(
        media,
        "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode(),
        round(float(width) * _PIXELS),
        round(float(height) * _PIXELS),
    )
