"""What the pictures show of a weight, as numbers.

Nothing here draws, so that none of it needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Entry

__all__ = [
    "DIFFERENCES",
    "STATISTICS",
    "Contrast",
    "Difference",
    "Profile",
    "Quantity",
    "Statistic",
    "heaviest_count",
    "profile",
]

Statistic = Literal["mean", "top", "peak", "coverage", "rows"]
Difference = Literal["ratio", "cosine"]


@dataclass(frozen=True)
class Quantity:
    """A number by weight.

    Attributes:
        title: what it is, to begin a title with.
        label: the same with its unit, for a scale.
        of: gives the number of an entry that has rows; 0 only if its sums are all zeros.
        log: whether its scale is logarithmic.
        limits: (least, most) of its scale; None if its scale depends on the values.
    """

    title: str
    label: str
    of: Callable[[Entry], float]
    log: bool = True
    limits: tuple[float, float] | None = None


def _mean(entry: Entry) -> float:
    return float(entry.importance[_seen(entry)].mean())


def _top(entry: Entry) -> float:
    shares = heaviest_share(entry.importance[_seen(entry)])
    return float(shares.mean()) if shares.size else 0.0


def heaviest_share(importance: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n_mat]: share of each row's sum that its heaviest 1 % of channels (one at least) hold;
    rows of zeros left out."""
    found: NDArray[np.float64] = importance[importance.any(axis=1)]
    k = heaviest_count(found.shape[1])
    # scaled first: the sum of many large float64 might not be one
    found = found / found.max(axis=1, keepdims=True)
    top = np.partition(found, found.shape[1] - k, axis=1)[:, -k:]
    share: NDArray[np.float64] = top.sum(axis=1) / found.sum(axis=1)
    return share


def heaviest_count(n_in: int) -> int:
    """Channels in the heaviest 1 %, rounded up."""
    return max(1, -(-n_in // 100))


def _peak(entry: Entry) -> float:
    found = entry.importance[_seen(entry)]
    mean = found.mean(axis=1)
    return float((found.max(axis=1)[mean > 0] / mean[mean > 0]).max(initial=0.0))


def _coverage(entry: Entry) -> float:
    return 100 * entry.covered


def _rows(entry: Entry) -> float:
    return float(entry.counts[entry.counts > 0].min())


STATISTICS: dict[str, Quantity] = {
    "mean": Quantity("Mean squared activation", "mean squared activation (log scale)", _mean),
    "top": Quantity(
        "Share of the heaviest 1 % of channels",
        "share of the sum that the heaviest 1 % of channels hold",
        _top,
        log=False,
        limits=(0.0, 1.0),
    ),
    "peak": Quantity(
        "Heaviest channel", "heaviest channel / mean of its matrix (log scale)", _peak
    ),
    "coverage": Quantity(
        "Matrices with data",
        "matrices (experts) with rows, %",
        _coverage,
        log=False,
        limits=(0.0, 100.0),
    ),
    "rows": Quantity("Rows", "fewest rows of a matrix (expert) that has any (log scale)", _rows),
}


def _seen(entry: Entry) -> NDArray[np.bool_]:
    """[n_mat]: which matrices have rows; one count may stand for several matrices."""
    return np.broadcast_to(entry.counts > 0, entry.n_mat)


# --- two matrices ------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """A number that two entries of one weight give.

    Attributes:
        title: what it is, to begin a title with.
        label: the same with its unit, for a scale; {0} and {1} are the matrices' names.
        of: gives the number of two entries that have rows; None if there is none.
        centred: whether 0 is in the middle of its scale; else the scale is logarithmic.
        least: what smaller values are taken for, of a logarithmic scale; of a centred one what
            it reaches to at least, so that rounding does not look like a difference.
    """

    title: str
    label: str
    of: Callable[[Entry, Entry], float | None]
    centred: bool
    least: float


def _log_ratio(first: Entry, second: Entry) -> float | None:
    one, other = _mean(first), _mean(second)
    return float(np.log2(other) - np.log2(one)) if one > 0 and other > 0 else None


def _cosine_distance(first: Entry, second: Entry) -> float | None:
    both = _seen(first) & _seen(second)
    if not both.any():
        return None
    one, other = first.importance[both], second.importance[both]
    zero = ~one.any(axis=1), ~other.any(axis=1)
    one, other = _unit(one), _unit(other)
    # 1 - cosine as half the squared distance of the unit vectors: exact down to 0, where the
    # subtraction would leave nothing but rounding
    distance = np.where(zero[0] ^ zero[1], 1.0, 0.5 * ((one - other) ** 2).sum(axis=1))
    return float(distance.max())


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row divided by its length; rows of zeros as they are."""
    most = rows.max(axis=1, keepdims=True)
    rows = rows / np.where(most > 0, most, 1.0)  # squares of large values might overflow
    unit: NDArray[np.float64] = rows / np.maximum(
        np.sqrt((rows**2).sum(axis=1, keepdims=True)), 1.0
    )
    return unit


DIFFERENCES: dict[str, Contrast] = {
    "ratio": Contrast(
        "Ratio of the means",
        "log2 (mean squared activation of {1} / of {0})",
        _log_ratio,
        centred=True,
        least=0.1,
    ),
    "cosine": Contrast(
        "Cosine distance",
        "1 - cosine similarity of the importance, worst expert (log scale)",
        _cosine_distance,
        centred=False,
        least=1e-6,
    ),
}


# --- channels ----------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Mean squared activation by channel, of one matrix or of several pooled.

    Attributes:
        values: [n_in] float64.
        rows: activation rows that went into it.
        means: [n_in] float64, of the activations themselves; None without signed sums.
    """

    values: NDArray[np.float64]
    rows: int
    means: NDArray[np.float64] | None = None

    def constant(self, channel: int) -> float | None:
        """Share of a channel's mean squared activation that its mean alone makes, in [0, 1]: 1 if
        it always has one value, 0 if it swings about 0. None without signed sums."""
        if self.means is None or self.values[channel] <= 0:
            return None
        return min(1.0, float(self.means[channel] / self.values[channel] * self.means[channel]))

    @property
    def shares(self) -> NDArray[np.float64]:
        """[n_in]: each channel's share of the sum over all channels; zeros for a profile of
        zeros."""
        most = self.values.max()
        if most <= 0:
            return np.zeros_like(self.values)
        scaled = self.values / most
        shares: NDArray[np.float64] = scaled / scaled.sum()
        return shares

    def heaviest(self, n: int) -> list[int]:
        """The heaviest channels, the heaviest first, those of zeros left out; of equals the one
        with the lower number first."""
        order = np.argsort(-self.values, kind="stable")[:n]
        return [int(channel) for channel in order if self.values[channel] > 0]


def profile(entry: Entry, expert: int | None = None) -> Profile | None:
    """The profile of one matrix, or of all pooled: their sums over their rows, so that an expert
    weighs as much as the rows it saw. None if there are no rows."""
    counts = np.broadcast_to(entry.counts, entry.n_mat)
    sums, signed = entry.sums, entry.signed_sums
    if expert is not None:
        counts, sums = counts[expert : expert + 1], sums[expert : expert + 1]
        signed = None if signed is None else signed[expert : expert + 1]
    rows = int(counts.sum())
    if not rows:
        return None
    means = None if signed is None else signed.sum(axis=0) / rows
    return Profile(sums.sum(axis=0) / rows, rows, means)
