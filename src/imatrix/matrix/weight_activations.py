"""Statistics of the activations of single weights: those of llama-imatrix's --show-statistics since
llama.cpp 0.6.0, which it writes into its files too.

The formulas are those of compute_vector_statistics and compute_tensor_statistics in
tools/imatrix/imatrix.cpp, and so is the rounding: to float32 where those round. `exact` leaves the
rounding out.

v of a channel is its mean activation, signed sum / count, and e its mean squared activation, sum /
count; of all experts that saw a row, one after the other. A weight without signed sums has e for v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Entry, Part
from imatrix.formats.single import Stored, stored
from imatrix.tensors import block_of, kind_of

__all__ = [
    "SCHEMA",
    "ActivationStatistics",
    "compared_together",
    "of_weights",
    "rounding",
    "schema_figures",
]

# What the numbers of <weight>.stats are, in their order (save_imatrix in tools/imatrix/imatrix.cpp).
SCHEMA = (
    *("sum_sq", "mean", "elements", "std_deviation", "skewness", "kurtosis"),
    *("gain", "h_norm", "l2_dist", "cossim", "pearson", "covariance"),
)

# compute_vector_statistics: shares up to here add nothing to the entropy, and a deviation up to here
# has neither skewness nor kurtosis; compute_tensor_statistics: no gain over so little.
_LEAST = 1e-10

_F64: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of one weight that saw rows. v, e: see the module.

    Attributes:
        name: the weight's name.
        block: number of its block; None for a weight outside the blocks.
        label: the block as llama-imatrix's column "Layer" has it: "3", "mtp0" for the head's first
            block, "-" outside the blocks.
        part: "head" for a block of the MTP/NextN head, else "trunk".
        n_mat: matrices: experts, or slices of a dense 3-D weight.
        n_in: channels, the length of a row.
        elements: how many v: n_in times the matrices, unseen experts left out.
        signed: whether there are signed sums; if not, v is e.
        mean, stddev: of v, in activations (squared ones without signed sums); the deviation
            divides by the number of elements.
        skewness: third central moment of v over stddev³.
        kurtosis: fourth over stddev⁴, minus 3.
        entropy: of the shares e / total, in bits.
        entropy_norm: entropy / log2(elements), in [0, 1]; column "H Norm" in percent. NaN for a
            single element.
        total: the sum of e, column "∑ E[A²]".
        gain: root of the mean e over that of `previous`; NaN without one. What follows is between
            the v of both, or the e of both if one has no signed sums:
        l2_dist: Euclidean distance.
        cossim: cosine similarity, in [-1, 1].
        pearson: correlation, in [-1, 1]; column "PCC".
        covariance: column "Cov".
        previous: the weight of the same name and size in the nearest earlier block that has it, of
            the same part. None if there is none.
    """

    name: str
    block: int | None
    label: str
    part: Part
    n_mat: int
    n_in: int
    elements: int
    signed: bool
    mean: float
    stddev: float
    skewness: float
    kurtosis: float
    entropy: float
    entropy_norm: float
    total: float
    gain: float = math.nan
    l2_dist: float = math.nan
    cossim: float = math.nan
    pearson: float = math.nan
    covariance: float = math.nan
    previous: str | None = None
    _pair: _Pair | None = field(default=None, repr=False, compare=False)


def schema_figures(
    entries: Mapping[str, Entry], head_blocks: Collection[int]
) -> dict[str, NDArray[np.float32]]:
    """[12] float32 by weight, in the order of SCHEMA: what a file holds as <weight>.stats. Zeros for
    a weight that saw no row, as llama-imatrix writes them."""
    figures = {name: np.zeros(len(SCHEMA), np.float32) for name in entries}
    for each in of_weights(entries, head_blocks, exact=False):
        with np.errstate(over="ignore"):  # a sum of squares beyond float32 is infinite there
            figures[each.name][:] = (
                *(each.total, each.mean, each.elements, each.stddev),
                *(each.skewness, each.kurtosis, each.gain, _percent(each.entropy_norm)),
                *(each.l2_dist, each.cossim, each.pearson, each.covariance),
            )
    return figures


def _percent(share: float) -> np.float32:
    return np.float32(100) * np.float32(share)


def of_weights(
    entries: Mapping[str, Entry], head_blocks: Collection[int], exact: bool
) -> list[ActivationStatistics]:
    """Statistics of the weights that saw rows, in the order of the entries, each compared with an
    earlier weight."""
    start = min(head_blocks, default=None)

    def data(name: str) -> _Data:
        # made anew each time, since all of them together are as large as a file
        return _data(name, entries[name], exact)

    found = {
        name: _of_weight(name, data(name), start, exact)
        for name, entry in entries.items()
        if entry.counts.any()
    }
    for name, each in found.items():
        before = _earlier(name, found, start)
        if before is not None and entries[before].sums.size == entries[name].sums.size:
            found[name] = _compared(each, found[before], data(name), data(before), exact)
    return list(found.values())


# --- one weight --------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """An entry as it is computed with: float32, as a file has it, or float64."""

    sums: NDArray[Any]
    counts: NDArray[np.int64]
    signed: NDArray[Any] | None

    def means(self, use_signed: bool) -> NDArray[Any]:
        """[n_mat, n_in]: of the activations, or of their squares; NaN if no row was seen."""
        source = self.signed if use_signed else self.sums
        assert source is not None
        scale = np.full(len(self.counts), np.nan, source.dtype)
        one = source.dtype.type(1)
        seen = self.counts > 0
        scale[seen] = one / self.counts[seen].astype(source.dtype)
        with np.errstate(over="ignore", under="ignore"):
            means: NDArray[Any] = source * scale[:, np.newaxis]
        return means


def _data(name: str, entry: Entry, exact: bool) -> _Data:
    if exact:
        return _Data(entry.sums, entry.counts, entry.signed_sums)
    kept: Stored = stored(entry, name=name)
    return _Data(kept.sums, kept.counts, kept.signed_sums)


def _of_weight(name: str, data: _Data, start: int | None, exact: bool) -> ActivationStatistics:
    seen = np.broadcast_to(data.counts > 0, len(data.sums))
    inverse = 1.0 / np.broadcast_to(data.counts, len(data.sums))[seen, np.newaxis]
    e = (data.sums[seen] * inverse).reshape(-1)
    v = e if data.signed is None else (data.signed[seen] * inverse).reshape(-1)
    n = v.size
    single = rounding(exact)
    total = _in_turn(e)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        mean = float(v.mean())
        away = v - mean
        square = away * away
        m2 = float(square.mean())
        m3 = float((square * away).mean())
        m4 = float((square * square).mean())
        stddev = float(np.sqrt(m2)) if exact else float(np.sqrt(np.float32(m2)))
        entropy = 0.0
        if total > 0:
            p = e / total
            p = p[p > _LEAST]
            entropy = single(-float((p * np.log2(p)).sum()) + 0.0)
    spread = stddev > _LEAST and m2 > 0
    bits = math.log2(n) if exact else float(np.float32(math.log2(n)))
    block = block_of(name)
    return ActivationStatistics(
        name=name,
        block=block,
        label=_label(block, start),
        part=_part(block, start),
        n_mat=len(data.sums),
        n_in=data.sums.shape[1],
        elements=n,
        signed=data.signed is not None,
        mean=single(mean),
        stddev=stddev,
        skewness=single(m3 / (m2 * math.sqrt(m2))) if spread else 0.0,
        kurtosis=single(m4 / (m2 * m2) - 3.0) if spread else 0.0,
        entropy=entropy,
        entropy_norm=single(entropy / bits) if n > 1 else math.nan,
        total=total,
    )


def rounding(exact: bool) -> Callable[[float], float]:
    """What rounds a figure to float32; nothing does if it is to be exact."""
    return _as_is if exact else _single


def _single(value: float) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(value))


def _as_is(value: float) -> float:
    return value


def _in_turn(values: _F64) -> float:
    """The sum of values, one added after the other: llama-imatrix prints this one in double."""
    return float(np.add.accumulate(values)[-1])


def _part(block: int | None, start: int | None) -> Part:
    return "head" if block is not None and start is not None and block >= start else "trunk"


def _label(block: int | None, start: int | None) -> str:
    if block is None:
        return "-"
    return f"mtp{block - start}" if start is not None and block >= start else str(block)


# --- weights of two blocks ---------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """What two weights have between them, to be added up over a block."""

    n: int
    dot: float
    norm: float  # squared, of the later one ...
    norm_before: float  # ... and of the earlier one; likewise the variations
    distance: float  # squared
    co: float
    variation: float
    variation_before: float
    # (total, elements) of both; None if the earlier one has hardly any
    energy: tuple[float, int, float, int] | None


def _earlier(name: str, known: Mapping[str, Any], start: int | None) -> str | None:
    """The weight's name in the nearest earlier block that has it; the head's blocks and the trunk's
    are not compared with one another."""
    block = block_of(name)
    if block is None:
        return None
    first = start if start is not None and block >= start else 0
    kind = kind_of(name)
    names = (f"blk.{number}.{kind}" for number in range(block - 1, first - 1, -1))
    return next((each for each in names if each in known), None)


def _compared(
    later: ActivationStatistics, earlier: ActivationStatistics, a: _Data, b: _Data, exact: bool
) -> ActivationStatistics:
    """The later of two weights of one size, with what it has of the earlier one."""
    signed = later.signed and earlier.signed
    x = a.means(signed).reshape(-1).astype(np.float64)
    y = b.means(signed).reshape(-1).astype(np.float64)
    there = np.isfinite(x) & np.isfinite(y)
    if not there.any():
        return later  # no expert saw rows in both
    x, y = x[there], y[there]
    n = x.size
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        dx, dy, apart = x - x.mean(), y - y.mean(), x - y
        pair = _Pair(
            n=n,
            dot=float(x @ y),
            norm=float(x @ x),
            norm_before=float(y @ y),
            distance=float(apart @ apart),
            co=float(dx @ dy),
            variation=float(dx @ dx),
            variation_before=float(dy @ dy),
            energy=None,
        )
    single = rounding(exact)
    gain = 1.0 if later.total <= _LEAST else math.nan
    if earlier.total > _LEAST:
        energy = (later.total, later.elements, earlier.total, earlier.elements)
        pair = replace(pair, energy=energy)
        gain = _root_ratio(*energy)
    return replace(
        later,
        gain=single(gain),
        l2_dist=single(math.sqrt(pair.distance)),
        cossim=single(_cosine(pair.dot, pair.norm, pair.norm_before)),
        pearson=single(_cosine(pair.co, pair.variation, pair.variation_before)),
        covariance=single(pair.co / n) if n > 1 else math.nan,
        previous=earlier.name,
        _pair=pair,
    )


def compared_together(weights: Sequence[ActivationStatistics], exact: bool) -> dict[str, Any]:
    """gain, l2_dist, cossim, pearson and covariance of all weights of a block, as one vector, with
    their earlier ones; NaN if none has an earlier one."""
    pairs = [each._pair for each in weights if each._pair is not None]
    # compute_layer_statistics passes over pairs of nothing with nothing
    pairs = [pair for pair in pairs if pair.norm or pair.norm_before or pair.distance]
    energies = [pair.energy for pair in pairs if pair.energy is not None]
    gain = l2_dist = cossim = pearson = covariance = math.nan
    if energies:
        now, n, before, n_before = (sum(column) for column in zip(*energies, strict=True))
        gain = _root_ratio(now, int(n), before, int(n_before))
    if pairs:

        def added(name: str) -> float:
            return float(sum(getattr(pair, name) for pair in pairs))

        l2_dist = math.sqrt(added("distance"))
        cossim = _cosine(added("dot"), added("norm"), added("norm_before"))
        pearson = _cosine(added("co"), added("variation"), added("variation_before"))
        covariance = added("co") / added("n")
    single = rounding(exact)
    return {
        "gain": single(gain),
        "l2_dist": single(l2_dist),
        "cossim": single(cossim),
        "pearson": single(pearson),
        "covariance": single(covariance),
    }


def _root_ratio(total: float, n: int, total_before: float, n_before: int) -> float:
    return math.sqrt(total / n) / math.sqrt(total_before / n_before)


def _cosine(product: float, a: float, b: float) -> float:
    """product / √(a b), in [-1, 1]; 0 if one of a and b is 0, NaN if both are."""
    if a > 0 and b > 0:
        return min(1.0, max(-1.0, product / (math.sqrt(a) * math.sqrt(b))))
    return math.nan if a == b else 0.0
