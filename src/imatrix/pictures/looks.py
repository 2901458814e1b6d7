"""The colours of a picture, on light and on dark paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "LOOKS",
    "Look",
    "Style",
]

Style = Literal["light", "dark"]


@dataclass(frozen=True)
class Look:
    """Colours. Those of the lines are of Okabe and Ito's set, which colour-blind people tell
    apart (jfly.uni-koeln.de/color), the vermilion darker on white, for text."""

    paper: str
    ink: str
    muted: str
    frame: str
    absent: str
    whole: str
    first: str
    second: str
    line: str
    colours: str
    diverging: tuple[str, ...]


LOOKS = {
    "light": Look(
        paper="#ffffff",
        ink="#1a1d21",
        muted="#555c64",
        frame="#aab1b9",
        absent="#d8dce1",
        whole="#fbe9d0",
        first="#0072b2",
        second="#b34700",
        line="#0072b2",
        colours="viridis",
        diverging=("#08519c", "#6baed6", "#fafafa", "#f4a261", "#b35806"),
    ),
    "dark": Look(
        paper="#14171c",
        ink="#eceff2",
        muted="#a9b0b9",
        frame="#505862",
        absent="#2a2f36",
        whole="#fbe9d0",
        first="#56b4e9",
        second="#e69f00",
        line="#56b4e9",
        colours="viridis",
        diverging=("#8fd0ff", "#3f8ac6", "#5d6570", "#c98332", "#ffc078"),
    ),
}
