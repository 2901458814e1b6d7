"""What the template shows, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Drawing",
    "ExpertBlock",
    "Fact",
    "Fix",
    "Heavy",
    "Level",
    "Part",
    "Picture",
    "Source",
    "Verdict",
]

Level = Literal["good", "warn", "bad", "note"]
Part = Literal["trunk", "head"]


@dataclass(frozen=True)
class Verdict:
    """A judgement in a word, and in a sentence."""

    level: Level
    word: str
    text: str


@dataclass(frozen=True)
class Fact:
    """What the file tells of something, or leaves open.

    Attributes:
        label: of what.
        value: "" if the file does not tell.
        note: what that means, or why it is not known.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Source:
    """A source of the text; None for what is not known."""

    name: str
    documents: int | None = None
    tokens: int | None = None
    share: float | None = None
    dropped: int | None = None
    weight: float | None = None


@dataclass(frozen=True)
class ExpertBlock:
    """Rows of the experts of one block.

    Attributes:
        few: experts with some rows, but fewer than THIN.
        fewest, median, most: rows of an expert.
    """

    block: int
    part: Part
    n_experts: int
    unseen: int
    few: int
    fewest: int
    median: float
    most: int


@dataclass(frozen=True)
class Heavy:
    """A weight and its heaviest channel.

    Attributes:
        channel: the heaviest one, all matrices pooled.
        share: that channel's share of the sum over all channels, in [0, 1].
        constant: share of its mean squared activation that its mean alone makes, in [0, 1]; None
            without signed sums.
        top: share that the heaviest 1 % of channels have, the mean over the matrices.
        peak: the heaviest channel of a matrix / the mean of that matrix, the largest there is.
    """

    name: str
    part: Part
    channel: int
    share: float
    top: float
    peak: float
    constant: float | None


@dataclass(frozen=True)
class Drawing:
    """One drawing of a picture.

    Attributes:
        media: when it is the one to show, a media query; "" for always.
        address: data:, an SVG file.
        width, height: in CSS pixels.
    """

    media: str
    address: str
    width: int
    height: int


@dataclass(frozen=True)
class Picture:
    """A picture, drawn for phones and for larger screens, in light and in dark.

    Attributes:
        alt: what it shows, for those who do not see it.
        caption: how to read it.
        drawings: the first whose query holds is shown; the last one has none.
        refusal: why there are no drawings; else "".
    """

    alt: str
    caption: str
    drawings: tuple[Drawing, ...] = ()
    refusal: str = ""


@dataclass(frozen=True)
class Fix:
    """What to do: words, and lines to paste.

    Attributes:
        more: how many lines were left out.
    """

    words: str
    paste: str
    more: int
