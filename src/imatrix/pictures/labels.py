"""Where names stand beside their marks, so that they cover neither each other nor other marks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from imatrix.pictures.texts import SMALL, width_of

__all__ = ["Label", "place_labels"]

_HEIGHT = 0.13
_APART = 0.07
# Half of the side of a mark, and of a place along a line.
_MARK, _LINE = 0.05, 0.02
# Square inches that a text may cover for being one step nearer to its mark.
_NEAR = 0.006

_Box = tuple[float, float, float, float]


class Label(NamedTuple):
    """A text and the mark that it belongs to, in inches from the top left."""

    text: str
    x: float
    y: float


def place_labels(
    labels: Sequence[Label],
    marks: Sequence[tuple[float, float]],
    lines: Sequence[tuple[float, float]],
    room: tuple[float, float],
) -> list[tuple[float, float]]:
    """The top left corner of each text.

    One after the other takes, of the places around its mark, the one that covers the least; to be
    near counts a little, too. A text that would reach out of the room moves in.

    Args:
        labels: the texts.
        marks: where there are marks, which should not be covered.
        lines: places along lines, which should not be covered either, some 0.04 inches apart.
        room: (width, height) that the texts stay in.
    """
    boxes: list[_Box] = [
        (x - half, y - half, x + half, y + half)
        for half, places in ((_MARK, marks), (_LINE, lines))
        for x, y in places
    ]
    found = []
    for label in labels:
        width = width_of(label.text, SMALL)
        choices = []
        for step, (x, y) in _around(label, width):
            x = max(0.02, min(x, room[0] - width))
            y = max(0.02, min(y, room[1] - _HEIGHT))
            box = (x, y, x + width, y + _HEIGHT)
            choices.append((_covered(box, boxes) + step * _NEAR, box))
        _, best = min(choices, key=lambda choice: choice[0])
        found.append(best[:2])
        boxes.append(best)
    return found


def _around(label: Label, width: float) -> Iterator[tuple[int, tuple[float, float]]]:
    """Places for a text around its mark, each with how many steps it is away."""
    middle, level = label.x - width / 2, label.y - _HEIGHT / 2
    for step in range(3):
        apart = (1 + step) * _APART
        left, right = label.x - apart - width, label.x + apart
        above, below = label.y - apart - _HEIGHT, label.y + apart
        for place in (
            *((right, above), (right, level), (middle, above), (right, below)),
            *((left, above), (left, level), (middle, below), (left, below)),
        ):
            yield step, place


def _covered(box: _Box, boxes: Sequence[_Box]) -> float:
    """The area of the boxes that this one covers."""
    area = 0.0
    for other in boxes:
        across = min(box[2], other[2]) - max(box[0], other[0])
        down = min(box[3], other[3]) - max(box[1], other[1])
        if across > 0 and down > 0:
            area += across * down
    return area
