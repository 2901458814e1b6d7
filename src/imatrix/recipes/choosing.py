"""The choice: one type for each item, so that the bytes suffice and the sum of KL is least.

This is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, "Knapsack Problems",
2004, chapter 11). It knows only numbers: what an item is, and where its KL comes from, others say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imatrix.words import size

__all__ = ["Chosen", "Frontier", "Item", "Option"]

_CELLS = 200_000  # of the table, in bytes' direction; 8 bytes each, and one for each item
_POINTS = 1000  # of the frontier for a picture, at most


@dataclass(frozen=True)
class Option:
    """One type that an item may get.

    Attributes:
        type: its name.
        bytes: that the item then has.
        kl: what that costs, in nats a token; not negative.
    """

    type: str
    bytes: int
    kl: float


@dataclass(frozen=True)
class Item:
    """What gets one type: a tensor, or a group of them.

    Attributes:
        name: of it.
        options: what it may get, at least one.
    """

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Chosen:
    """A type for each item.

    Attributes:
        types: the item's name -> type, in the order of the items.
        bytes: of all items together.
        kl: the sum of their KL, in nats a token.
    """

    types: Mapping[str, str]
    bytes: int
    kl: float


@dataclass(frozen=True)
class _Steps:
    """The choices on the lower convex hulls, from the smallest, each one step from the one before.

    Attributes:
        items: int64 [n_steps]; which item changes.
        options: int64 [n_steps]; what it gets, a place among its options.
        bytes: int64 [n_steps + 1]; of all items before and after each step.
        kl: float64 [n_steps + 1]; the same of the sum.
    """

    items: NDArray[np.int64]
    options: NDArray[np.int64]
    bytes: NDArray[np.int64]
    kl: NDArray[np.float64]


class Frontier:
    """The best choices for all sizes, built once.

    Options that another one beats (no more bytes, no more KL) are left out first. Then a table is
    filled by dynamic programming: for each number of units of bytes, the least sum of KL.

    If all differences of bytes are multiples of a number of bytes so large that there are at most
    200000 of these between the smallest and the largest choice, then that is the unit, and every
    answer is exact: no choice is better, up to the rounding of sums (of equal ones, a smallest).

    Otherwise the unit is a 200000th of the way from the smallest to the largest choice, and bytes
    are rounded to the nearest unit in the table alone; what is answered has its true bytes. With
    `loss` = items * unit, at_most(n) costs no more than the best choice of n - loss bytes, and
    reaching(kl) takes at most `loss` bytes more than the fewest. Besides, at_most(n) exceeds `bound(n)`
    by the KL of one step of one item at most: it is never worse than the Lagrangian's choice, which
    takes steps along the items' convex hulls in the order of KL saved a byte, as long as they fit.
    What is left of the bytes is filled greedily.

    Attributes:
        exact: whether the answers are exact.
        unit: bytes of a cell of the table.
        loss: bytes that the answers may be off by, at most; 0 if they are exact.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        """Fill the table: at most 200000 cells * items * options steps.

        Raises:
            ValueError: no item, a name twice, an item without options or with a type twice, or a
                number that is negative or not finite.
        """
        _check(items)
        self._names = tuple(item.name for item in items)
        self._options = tuple(_undominated(item.options) for item in items)
        self._bytes = [np.array([o.bytes for o in found], np.int64) for found in self._options]
        self._kl = [np.array([o.kl for o in found], np.float64) for found in self._options]
        self._least = sum(int(own[0]) for own in self._bytes)
        self._most = sum(int(own[-1]) for own in self._bytes)
        unit = math.gcd(*(int(n) for own in self._bytes for n in own - own[0])) or 1
        self.exact = (self._most - self._least) // unit <= _CELLS
        self.unit = unit if self.exact else -(-(self._most - self._least) // _CELLS)
        self.loss = 0 if self.exact else len(items) * self.unit
        self._weights = [_rounded(own - own[0], self.unit) for own in self._bytes]
        self._steps = _steps(self._bytes, self._kl)
        self._fill_table()

    def _fill_table(self) -> None:
        """For each number of units: the least sum of KL, its true bytes, and each item's option."""
        # the narrow ones first: the table is only as long as the items so far can use
        self._order = sorted(range(len(self._weights)), key=lambda item: self._weights[item][-1])
        self._taken: list[NDArray[np.unsignedinteger]] = []
        best = np.zeros(1)
        true_bytes = np.zeros(1, np.int64)
        for item in self._order:
            weights, n_bytes, kl = self._weights[item], self._bytes[item], self._kl[item]
            best = np.pad(best, (0, weights[-1]), mode="edge")
            true_bytes = np.pad(true_bytes, (0, weights[-1]), mode="edge")
            taken = np.zeros(len(best), np.min_scalar_type(len(kl)))
            found = best + kl[0]
            for number in range(1, len(kl)):
                weight = int(weights[number])
                tried = best[: len(best) - weight] + kl[number]
                np.copyto(taken[weight:], number, where=tried < found[weight:])
                np.minimum(found[weight:], tried, out=found[weight:])
            true_bytes = true_bytes[np.arange(len(best)) - weights[taken]] + n_bytes[taken]
            best = found
            self._taken.append(taken)
        # More cells never cost more, but the same in more of them is no gain; and rounded bytes
        # are not in the order of true ones.
        better = np.concatenate(([True], best[1:] < best[:-1]))
        cells = np.flatnonzero(better)
        order = np.lexsort((best[cells], true_bytes[cells]))
        cells = cells[order]
        lowest = np.minimum.accumulate(best[cells])
        kept = np.concatenate(([True], lowest[1:] < lowest[:-1]))
        self._cells = cells[kept]
        self._cell_bytes = true_bytes[self._cells]
        self._cell_kl = best[self._cells]

    @property
    def smallest(self) -> Chosen:
        """The choice of the fewest bytes."""
        return self._chosen(np.zeros(len(self._names), np.int64))

    @property
    def largest(self) -> Chosen:
        """The choice of the least KL; more bytes than it has are of no use."""
        return self._chosen(np.array([len(found) - 1 for found in self._options]))

    def at_most(self, n_bytes: int) -> Chosen:
        """The least sum of KL within so many bytes of all items together.

        Bytes outside the items, such as metadata and tensors that stay as they are, are not known
        here: take them off before.

        Raises:
            ValueError: the smallest choice has more bytes; the message tells both ends.
        """
        if n_bytes < self._least:
            raise ValueError(
                f"no types are small enough for {_told(n_bytes)}: {self._describe_ends()}"
            )
        place = int(np.searchsorted(self._cell_bytes, n_bytes, side="right")) - 1
        if self.exact:
            return self._chosen(self._traced(place))
        tried = [self._lagrangian(n_bytes)]
        if place >= 0:
            tried.append(self._traced(place))
        return min(
            (self._chosen(self._filled(taken, n_bytes)) for taken in tried),
            key=lambda chosen: (chosen.kl, chosen.bytes),
        )

    def reaching(self, kl: float) -> Chosen:
        """The fewest bytes with which the sum of KL is at most `kl`, in nats a token.

        Raises:
            ValueError: no choice has so little KL, or `kl` is no number; the message tells both ends.
        """
        if not kl >= self.largest.kl:
            raise ValueError(f"no types reach a KL of {kl:.4g}: {self._describe_ends()}")
        # the table's sums are added in another order than the answer's, and so round otherwise
        place = int(np.searchsorted(-self._cell_kl, -kl * (1 + 1e-9), side="left"))
        tried = [self.largest]
        while place < len(self._cells):
            tried.append(self._chosen(self._traced(place)))
            if tried[-1].kl <= kl:
                break
            place += 1
        if not self.exact:
            step = int(np.searchsorted(-self._steps.kl, -kl, side="left"))
            tried += [
                self._chosen(self._after_steps(n))
                for n in range(step, min(step + 2, len(self._steps.kl)))
            ]
        return min(
            (chosen for chosen in tried if chosen.kl <= kl),
            key=lambda chosen: (chosen.bytes, chosen.kl),
        )

    def bound(self, n_bytes: int) -> float:
        """A sum of KL that no choice of so many bytes is below: the linear relaxation's.

        There an item may have two types in any shares. It is the best bound of the Lagrangian, too.

        Raises:
            ValueError: the smallest choice has more bytes; the message tells both ends.
        """
        if n_bytes < self._least:
            raise ValueError(
                f"no types are small enough for {_told(n_bytes)}: {self._describe_ends()}"
            )
        return float(np.interp(n_bytes, self._steps.bytes, self._steps.kl))

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """(bytes, KL) along the frontier for a picture, from the smallest choice: 1000 at most.

        Each is a choice that is possible. Bytes grow and KL falls from each to the next.
        """
        n_points = len(self._cells)
        places = np.unique(np.linspace(0, n_points - 1, min(n_points, _POINTS)).astype(np.int64))
        return tuple(
            (int(self._cell_bytes[place]), float(self._cell_kl[place])) for place in places
        )

    def _describe_ends(self) -> str:
        low, high = self.smallest, self.largest
        return (
            f"they take from {_told(low.bytes)} (with a KL of {low.kl:.4g} nats a token) to "
            f"{_told(high.bytes)} (with {high.kl:.4g})"
        )

    def _chosen(self, taken: NDArray[np.int64]) -> Chosen:
        options = [found[number] for found, number in zip(self._options, taken, strict=True)]
        return Chosen(
            types={n: o.type for n, o in zip(self._names, options, strict=True)},
            bytes=sum(option.bytes for option in options),
            kl=math.fsum(option.kl for option in options),
        )

    def _traced(self, place: int) -> NDArray[np.int64]:
        """Each item's option in a cell of the table."""
        cell = int(self._cells[place])
        taken = np.zeros(len(self._options), np.int64)
        for item, own in zip(reversed(self._order), reversed(self._taken), strict=True):
            taken[item] = own[cell]
            cell -= int(self._weights[item][taken[item]])
        return taken

    def _after_steps(self, n_steps: int) -> NDArray[np.int64]:
        taken = np.zeros(len(self._options), np.int64)
        # a later step of an item goes on from its earlier one
        taken[self._steps.items[:n_steps]] = self._steps.options[:n_steps]
        return taken

    def _lagrangian(self, n_bytes: int) -> NDArray[np.int64]:
        return self._after_steps(int(np.searchsorted(self._steps.bytes, n_bytes, side="right")) - 1)

    def _filled(self, taken: NDArray[np.int64], n_bytes: int) -> NDArray[np.int64]:
        """Use up what is left of the bytes, by the KL saved a byte."""
        taken = taken.copy()
        n_options = max(map(len, self._options))
        # absent options: no gain, so never taken
        wide_kl = np.stack(
            [np.pad(own, (0, n_options - len(own)), mode="edge") for own in self._kl]
        )
        wide_bytes = np.stack(
            [np.pad(own, (0, n_options - len(own)), mode="edge") for own in self._bytes]
        )
        rows = np.arange(len(taken))
        left = n_bytes - int(wide_bytes[rows, taken].sum())
        while True:
            more = wide_bytes - wide_bytes[rows, taken][:, None]
            gain = wide_kl[rows, taken][:, None] - wide_kl
            fits = (more > 0) & (more <= left) & (gain > 0)
            if not fits.any():
                return taken
            rate = np.where(fits, gain / np.where(fits, more, 1), -1.0)
            item, option = np.unravel_index(int(rate.argmax()), rate.shape)
            left -= int(more[item, option])
            taken[item] = option


def _told(n_bytes: int) -> str:
    """Bytes, to be read and to be given again."""
    return f"{n_bytes} bytes ({size(n_bytes)})" if abs(n_bytes) >= 1024 else f"{n_bytes} bytes"


def _check(items: Sequence[Item]) -> None:
    if not items:
        raise ValueError("there is nothing to choose types for: no items were given")
    seen = set()
    for item in items:
        if item.name in seen:
            raise ValueError(f"the item {item.name} is given twice")
        seen.add(item.name)
        if not item.options:
            raise ValueError(f"the item {item.name} has no options; expected at least one")
        types = [option.type for option in item.options]
        for option in item.options:
            if types.count(option.type) > 1:
                raise ValueError(f"the item {item.name} has the option {option.type} twice")
            if option.bytes < 0:
                raise ValueError(f"{item.name} as {option.type}: {option.bytes} bytes")
            if not (math.isfinite(option.kl) and option.kl >= 0):
                raise ValueError(
                    f"{item.name} as {option.type}: expected a KL of 0 or more, got {option.kl}"
                )


def _undominated(options: Sequence[Option]) -> tuple[Option, ...]:
    """Those that no other beats, by bytes: more bytes, less KL."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.kl)):
        if not kept or option.kl < kept[-1].kl:
            kept.append(option)
    return tuple(kept)


def _rounded(n_bytes: NDArray[np.int64], unit: int) -> NDArray[np.int64]:
    return (n_bytes + unit // 2) // unit


def _steps(n_bytes: Sequence[NDArray[np.int64]], kl: Sequence[NDArray[np.float64]]) -> _Steps:
    """The steps along the lower convex hull of each item, those that save most KL a byte first."""
    found: list[tuple[float, int, int, int, float]] = []
    for item, (own_bytes, own_kl) in enumerate(zip(n_bytes, kl, strict=True)):
        hull: list[int] = []
        for point in range(len(own_bytes)):
            # drop the last one while it is not below the line from the one before to this one
            while len(hull) > 1 and _slope(own_bytes, own_kl, hull[-2], hull[-1]) >= _slope(
                own_bytes, own_kl, hull[-1], point
            ):
                hull.pop()
            hull.append(point)
        for before, after in itertools.pairwise(hull):
            found.append(
                (
                    _slope(own_bytes, own_kl, before, after),
                    item,
                    after,
                    int(own_bytes[after] - own_bytes[before]),
                    float(own_kl[after] - own_kl[before]),
                )
            )
    found.sort(key=lambda step: step[:3])
    start = sum(int(own[0]) for own in n_bytes)
    end_kl = math.fsum(float(own[-1]) for own in kl)
    return _Steps(
        items=np.array([step[1] for step in found], np.int64),
        options=np.array([step[2] for step in found], np.int64),
        bytes=np.cumsum([start, *(step[3] for step in found)], dtype=np.int64),
        # from the small end: what remains of a difference of large sums would be roundings
        kl=np.cumsum([end_kl, *(-step[4] for step in reversed(found))])[::-1],
    )


def _slope(n_bytes: NDArray[np.int64], kl: NDArray[np.float64], before: int, after: int) -> float:
    return float((kl[after] - kl[before]) / (n_bytes[after] - n_bytes[before]))
