"""Texts of a picture: what they may hold, how wide they are, and how they are made to fit."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "SMALL",
    "TEXT",
    "TITLE",
    "clean",
    "fitted",
    "labels_width",
    "percent",
    "width_of",
    "wrapped",
]

# points, 72 an inch
TITLE, TEXT, SMALL = 12.0, 9.0, 8.0


def percent(share: float) -> str:
    """A share in [0, 1] in two digits; ">99.9 %" if it is nearly all, "<0.01 %" if it is hardly any."""
    value = 100 * share
    if value >= 99.95:
        return "100 %" if share == 1 else ">99.9 %"
    if value < 0.01:
        return "<0.01 %"
    return f"{value:.0f} %" if value >= 9.95 else f"{value:#.2g} %"


def clean(text: str, most: int = 400) -> str:
    """A text from a file as it may be shown: without what XML forbids, and shortened in the middle to
    `most` characters."""
    text = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def width_of(text: str, size: float, *, bold: bool = False) -> float:
    """The width of a text in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    # Agg rounds each letter to whole pixels: at 100 an inch, a twentieth more in all
    return 1.06 * float(width) / 72


def labels_width(labels: Sequence[str]) -> float:
    """Room for labels left of an axes, in inches."""
    return max(width_of(clean(label, 34), SMALL) for label in labels) + 0.12


def fitted(text: str, room: float, size: float, *, bold: bool = False) -> str:
    """Shortened in the middle until it fits."""
    text = clean(text)
    most = len(text)
    while most > 5 and width_of(text, size, bold=bold) > room:
        most -= 1
        text = clean(text, most) if len(text) > most else text
    return text


def wrapped(text: str, room: float, size: float, *, bold: bool = False) -> list[str]:
    """Lines that fit; "" gives none."""
    lines: list[str] = []
    for word in clean(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size, bold=bold) <= room:
            lines[-1] = longer
        else:
            lines.append(fitted(word, room, size, bold=bold))
    return lines
