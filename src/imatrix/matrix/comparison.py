"""Two importance matrices side by side: how alike, and where they differ most."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Entry, Part
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.tensors import block_of

__all__ = ["MatrixComparison", "WeightComparison", "compare_matrices"]

_Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class WeightComparison:
    """One weight in two matrices, a and b.

    What is compared is the importance, float64: per matrix of the weight (expert, slice of a 3-D
    weight; one for a plain weight) the vector of n_in means of the squared activations, a_e and
    b_e. A matrix without a row in either is left out: the 1.0 that stands for its means is not
    data. The arrays have a value for each matrix, NaN if there is none.

    Attributes:
        name: the weight.
        part: "trunk" or "head", the MTP/NextN head.
        n_in: length of a row.
        n_mat: matrices.
        cosine: [n_mat] float64: a_e . b_e / (|a_e| |b_e|), in [0, 1]; 1.0 if both are all zero,
            0.0 if one is. Blind to a common factor, as quantizers are; the largest means decide.
        relative_l2: [n_mat] float64: |a_e - b_e| / |a_e|, with the Euclidean norm; 0.0 if both
            are all zero, inf if only a is.
        rank_correlation: [n_mat] float64: Spearman's, the Pearson correlation of the ranks of the
            n_in means, ties given their average rank; in [-1, 1]. Every channel counts the same.
            NaN if all means of a_e or of b_e are equal, which leaves no ranks.
        mean_distance: [n_mat] float64: |m_a - m_b| / |r_a|, between the means of the activations
            themselves (Entry.means), in units of a's root mean squares r_a = √a_e, since means of
            both signs may all be near 0; inf if only r_a is zero everywhere. NaN if one of the
            two has no signed sums.
        rows_a, rows_b: activation rows, those of all experts together.
        unseen_a, unseen_b: matrices without a row.
        signed_a, signed_b: whether there are signed sums, and so means.
    """

    name: str
    part: Part
    n_in: int
    n_mat: int
    cosine: _Floats = field(repr=False)
    relative_l2: _Floats = field(repr=False)
    rank_correlation: _Floats = field(repr=False)
    mean_distance: _Floats = field(repr=False)
    rows_a: int
    rows_b: int
    unseen_a: int
    unseen_b: int
    signed_a: bool
    signed_b: bool

    @property
    def n_compared(self) -> int:
        """Matrices that have data in both."""
        return int(np.count_nonzero(~np.isnan(self.cosine)))

    @property
    def worst_cosine(self) -> float | None:
        """The least cosine; None if nothing could be compared."""
        return _least(self.cosine)

    @property
    def worst_relative_l2(self) -> float | None:
        """The largest relative L2 distance; None if nothing could be compared."""
        least = _least(-self.relative_l2)
        return None if least is None else -least

    @property
    def worst_rank_correlation(self) -> float | None:
        """The least rank correlation; None if there is none."""
        return _least(self.rank_correlation)

    @property
    def worst_mean_distance(self) -> float | None:
        """The largest distance of means; None if there is none."""
        least = _least(-self.mean_distance)
        return None if least is None else -least

    @property
    def worst_matrix(self) -> int | None:
        """Number of the matrix (expert) with the least cosine, then the largest distance."""
        if not self.n_compared:
            return None
        return int(np.lexsort((-self.relative_l2, self.cosine))[0])  # NaN comes last

    @property
    def same_coverage(self) -> bool:
        """Whether both have data for as many of its matrices."""
        return self.unseen_a == self.unseen_b == self.n_mat - self.n_compared

    def within(self, tolerance: float) -> bool:
        """Whether every matrix that has data in one has data in the other, no further away than
        `tolerance` in relative L2."""
        return self.same_coverage and (self.worst_relative_l2 or 0.0) <= tolerance


@dataclass(frozen=True)
class MatrixComparison:
    """Two importance matrices, a and b, weight by weight.

    Attributes:
        weights: the weights in both, the least alike first: those with nothing to compare, then by
            their worst cosine, then by their worst relative L2 distance.
        only_a, only_b: weights in one of them.
        mismatched: weights of different sizes: name -> ([n_mat, n_in] in a, the same in b).
        head_names: every weight in either that belongs to the MTP/NextN head.
    """

    weights: tuple[WeightComparison, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
    head_names: frozenset[str] = field(repr=False, default=frozenset())

    @property
    def trunk(self) -> tuple[WeightComparison, ...]:
        """The weights outside the MTP head."""
        return tuple(weight for weight in self.weights if weight.part == "trunk")

    @property
    def head(self) -> tuple[WeightComparison, ...]:
        """The weights of the MTP head."""
        return tuple(weight for weight in self.weights if weight.part == "head")

    def __getitem__(self, name: str) -> WeightComparison:
        """The comparison of one weight.

        Raises:
            KeyError: it is not in both, or of different sizes.
        """
        for weight in self.weights:
            if weight.name == name:
                return weight
        raise KeyError(name)

    def same(self, tolerance: float = 0.0) -> bool:
        """Whether a quantizer gets the same from both: the same weights, the same experts with
        data, and means no further apart than `tolerance`, as a relative L2 distance.

        Counts may differ: twice the text may give the same means. 1e-6 lets the float32 of files
        pass. Signed sums do not count: no quantizer reads them.
        """
        alike = not self.only_a and not self.only_b and not self.mismatched
        return alike and all(weight.within(tolerance) for weight in self.weights)


def compare_matrices(
    a: ImportanceMatrix | str | os.PathLike[str],
    b: ImportanceMatrix | str | os.PathLike[str],
    *,
    chunk_size: int = 512,
) -> MatrixComparison:
    """Compare two importance matrices of one model.

    A weight of experts that one of them holds flattened, [1, n_mat * n_in] with one count, as .dat
    files do, is cut as the other one has it.

    Args:
        a, b: the matrices, or the paths of files; distances are relative to a.
        chunk_size: tokens a chunk of .dat files, see imatrix.formats.dat.read.

    Raises:
        FormatError (a ValueError): a file is not an importance matrix.
        OSError: a file cannot be read.
    """
    first, second = (
        each
        if isinstance(each, ImportanceMatrix)
        else ImportanceMatrix.load(each, chunk_size=chunk_size)
        for each in (a, b)
    )
    blocks = first.head_blocks | second.head_blocks
    head = frozenset(name for name in (*first, *second) if block_of(name) in blocks)
    weights, mismatched = [], {}
    for name in (name for name in first if name in second):
        pair = same_shapes(first[name], second[name])
        if pair is None:
            mismatched[name] = (_shape(first[name]), _shape(second[name]))
        else:
            weights.append(_compared(name, "head" if name in head else "trunk", *pair))
    return MatrixComparison(
        weights=tuple(sorted(weights, key=_worst_first)),
        only_a=tuple(name for name in first if name not in second),
        only_b=tuple(name for name in second if name not in first),
        mismatched=mismatched,
        head_names=head,
    )


def _shape(entry: Entry) -> tuple[int, int]:
    return entry.n_mat, entry.n_in


def same_shapes(a: Entry, b: Entry) -> tuple[Entry, Entry] | None:
    """Both with the same [n_mat, n_in]; None if that cannot be."""
    if _shape(a) == _shape(b):
        return a, b
    if a.sums.size == b.sums.size and a.n_mat == 1:
        return a.reshaped(*_shape(b)), b
    if a.sums.size == b.sums.size and b.n_mat == 1:
        return a, b.reshaped(*_shape(a))
    return None


def _compared(name: str, part: Part, a: Entry, b: Entry) -> WeightComparison:
    seen_a, seen_b = (np.broadcast_to(entry.counts > 0, entry.n_mat) for entry in (a, b))
    both = seen_a & seen_b
    figures = {
        key: np.full(a.n_mat, np.nan)
        for key in ("cosine", "relative_l2", "rank_correlation", "mean_distance")
    }
    if both.any():
        x, y = a.importance[both], b.importance[both]
        figures["cosine"][both] = _cosine(x, y)
        figures["relative_l2"][both] = _relative_l2(x, y)
        figures["rank_correlation"][both] = _spearman(x, y)
        if (means_a := a.means) is not None and (means_b := b.means) is not None:
            figures["mean_distance"][both] = _in_units(means_a[both] - means_b[both], np.sqrt(x))
    for values in figures.values():
        values.flags.writeable = False
    return WeightComparison(
        name=name,
        part=part,
        n_in=a.n_in,
        n_mat=a.n_mat,
        rows_a=int(a.counts.sum()),
        rows_b=int(b.counts.sum()),
        unseen_a=int(np.count_nonzero(~seen_a)),
        unseen_b=int(np.count_nonzero(~seen_b)),
        signed_a=a.signed_sums is not None,
        signed_b=b.signed_sums is not None,
        **figures,
    )


def _worst_first(weight: WeightComparison) -> tuple[float, float]:
    cosine, distance = weight.worst_cosine, weight.worst_relative_l2
    return (-1.0 if cosine is None else cosine, 0.0 if distance is None else -distance)


def _least(values: _Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.min()) if known.size else None


def _cosine(x: _Floats, y: _Floats) -> _Floats:
    """[n] of rows [n, n_in]."""
    # by the largest value: squares of large means would overflow, those of small ones vanish
    peaks = [values.max(axis=1, keepdims=True) for values in (x, y)]
    x, y = (v / np.where(p > 0, p, 1.0) for v, p in zip((x, y), peaks, strict=True))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    zero = [(peak == 0)[:, 0] for peak in peaks]
    cosine = np.ones(len(x))
    np.divide(np.einsum("ij,ij->i", x, y), norms, out=cosine, where=norms > 0)
    cosine[zero[0] ^ zero[1]] = 0.0
    cosine[(x == y).all(axis=1)] = 1.0  # and not one rounding less
    limited: _Floats = np.minimum(cosine, 1.0)
    return limited


def _relative_l2(x: _Floats, y: _Floats) -> _Floats:
    peak = np.maximum(x.max(axis=1, keepdims=True), y.max(axis=1, keepdims=True))
    scale = np.where(peak > 0, peak, 1.0)
    away = np.linalg.norm((x - y) / scale, axis=1)
    norm = np.linalg.norm(x / scale, axis=1)
    return _over(away, norm)


def _in_units(away: _Floats, unit: _Floats) -> _Floats:
    """[n] of rows [n, n_in]: |away| / |unit|."""
    return _over(np.linalg.norm(away, axis=1), np.linalg.norm(unit, axis=1))


def _over(away: _Floats, norm: _Floats) -> _Floats:
    """away / norm, 0 for nothing over nothing."""
    relative = np.where(away > 0, np.inf, 0.0)
    np.divide(away, norm, out=relative, where=norm > 0)
    return relative


def _spearman(x: _Floats, y: _Floats) -> _Floats:
    ranks = [_centred_ranks(values) for values in (x, y)]
    norms = np.linalg.norm(ranks[0], axis=1) * np.linalg.norm(ranks[1], axis=1)
    found = np.full(len(x), np.nan)
    np.divide(np.einsum("ij,ij->i", *ranks), norms, out=found, where=norms > 0)
    clipped: _Floats = np.clip(found, -1.0, 1.0)
    return clipped


def _centred_ranks(values: _Floats) -> _Floats:
    """[n, n_in]: ranks in each row less their mean, equal values at the average of theirs."""
    n, n_in = values.shape
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    ranks = np.broadcast_to(np.arange(n_in, dtype=np.float64), values.shape).copy()
    new = np.ones((n, n_in), np.bool_)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    for row in np.flatnonzero(~new.all(axis=1)):  # with ties
        starts = np.flatnonzero(new[row])
        lengths = np.diff(np.append(starts, n_in))
        ranks[row] = np.repeat(starts + (lengths - 1) / 2, lengths)
    found = np.empty_like(ranks)
    np.put_along_axis(found, order, ranks - (n_in - 1) / 2, axis=1)
    return found
