"""What a model's output loses at each size: the curve that a recipe was chosen from.

A recipe's file keeps it under "frontier", for pictures and for who would choose another size. It is
a record, of numbers that were found elsewhere; nothing is computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

__all__ = ["NORMAL_95", "FrontierCurve", "FrontierPoint"]

NORMAL_95 = 1.96
"""Of a normal distribution this many standard errors to each side of the mean hold 95 %."""

# Points of the curve that a file keeps. The choice may have thousands of steps; a picture of a
# thousand pixels shows no more than this.
_MOST_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """What was measured of one quantized model.

    Attributes:
        bytes: of the whole file.
        kl: mean KL divergence from the unchanged model, nats a token; not negative.
        error: standard error of `kl`; NaN if there is none.
        name: "Q3_K_M" for a mixture of the quantizer's; "" for a recipe.
    """

    bytes: int
    kl: float
    error: float = math.nan
    name: str = ""

    def __post_init__(self) -> None:
        if self.bytes <= 0 or not (math.isfinite(self.kl) and self.kl >= 0):
            raise ValueError(
                f"a point of a frontier has bytes above 0 and a KL of 0 or more, got {self.bytes} "
                f"and {self.kl}"
            )
        if math.isinf(self.error) or self.error < 0:
            raise ValueError(f"a standard error is 0 or more, got {self.error}")

    def as_data(self) -> dict[str, Any]:
        """As a recipe's file has it."""
        error = None if math.isnan(self.error) else self.error
        return {"bytes": self.bytes, "kl": self.kl, "error": error} | (
            {"name": self.name} if self.name else {}
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FrontierCurve:
    """The least KL that is expected at each size, and what was measured.

    Attributes:
        bytes: [n] int64, of the whole file, ascending.
        kl: [n] float64, predicted for the best choice of that size, nats a token; 0 where nothing
            is quantized.
        measured: recipes that were measured as a whole, those that were chosen among them.
        mixtures: the quantizer's own mixtures, measured on the same text, by their names.
        chosen: bytes of the sizes that were chosen.
    """

    bytes: NDArray[np.int64]
    kl: NDArray[np.float64]
    measured: tuple[FrontierPoint, ...] = ()
    mixtures: tuple[FrontierPoint, ...] = ()
    chosen: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.bytes.ndim != 1 or self.bytes.shape != self.kl.shape:
            raise ValueError(
                "a frontier has one KL for each size, got arrays of the shapes "
                f"{self.bytes.shape} and {self.kl.shape}"
            )
        if (self.bytes[:1] <= 0).any() or (np.diff(self.bytes) <= 0).any():
            raise ValueError("the sizes of a frontier must be above 0 and ascend")
        if not (np.isfinite(self.kl) & (self.kl >= 0)).all():
            raise ValueError("the KL of a frontier must be numbers of 0 or more")
        if any(size <= 0 for size in self.chosen):
            raise ValueError(f"a chosen size has more than 0 bytes, got {self.chosen}")

    def as_data(self) -> dict[str, Any]:
        """As a recipe's file has it; of a curve with many points every k-th, and both ends."""
        n = len(self.bytes)
        kept = np.unique(np.linspace(0, n - 1, min(n, _MOST_POINTS)).round().astype(np.int64))
        return {
            "predicted": {"bytes": self.bytes[kept].tolist(), "kl": self.kl[kept].tolist()},
            "measured": [point.as_data() for point in self.measured],
            "mixtures": [point.as_data() for point in self.mixtures],
            "chosen": list(self.chosen),
        }

    @classmethod
    def of_data(cls, data: object, where: str) -> FrontierCurve:
        """The curve that `as_data` told.

        Args:
            data: from the JSON file.
            where: the file, for messages.

        Raises:
            ValueError: it is none.
        """
        try:
            return _curve(data)
        except ValueError as error:
            raise ValueError(f'{where}: its "frontier" is damaged: {error}') from None


def _curve(data: object) -> FrontierCurve:
    found = _object(data, "the frontier")
    predicted = _object(found.get("predicted"), '"predicted"')
    return FrontierCurve(
        bytes=np.array([_whole(each) for each in _list(predicted, "bytes")], np.int64),
        kl=np.array([_number(each) for each in _list(predicted, "kl")], np.float64),
        measured=_points(found, "measured"),
        mixtures=_points(found, "mixtures"),
        chosen=tuple(_whole(each) for each in _list(found, "chosen")),
    )


def _points(found: dict[str, Any], key: str) -> tuple[FrontierPoint, ...]:
    points = []
    for each in _list(found, key):
        point = _object(each, f'an item of "{key}"')
        error, name = point.get("error"), point.get("name", "")
        if not isinstance(name, str):
            _refuse(name, "a name")
        points.append(
            FrontierPoint(
                bytes=_whole(point.get("bytes")),
                kl=_number(point.get("kl")),
                error=math.nan if error is None else _number(error),
                name=name,
            )
        )
    return tuple(points)


def _object(data: object, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        _refuse(data, f"{what} as an object")
    return data


def _list(found: dict[str, Any], key: str) -> Sequence[object]:
    value = found.get(key)
    if not isinstance(value, list):
        _refuse(value, f'"{key}" as a list')
    return value


def _whole(value: object) -> int:
    # 2^53: what every reader of JSON holds exactly; no model is larger
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**53:
        _refuse(value, "a number of bytes")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        _refuse(value, "a number")
    return float(value)


def _refuse(value: object, wanted: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    raise ValueError(f"expected {wanted}, got {shown}")
