"""What a matrix becomes in a file of float32: sums and counts that divide to the same means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Entry

__all__ = ["MAX_COUNT", "Stored", "scaled_counts", "stored"]

# float32 holds every whole number up to here, and not the one after.
MAX_COUNT = 2**24


@dataclass(frozen=True, eq=False)
class Stored:
    """An entry as a file holds it.

    Attributes:
        sums: [n_mat, n_in] float32, sums of squared activations.
        counts: [n_counts] int64, whole numbers that float32 holds.
        signed_sums: [n_mat, n_in] float32, sums of the activations; None without.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.int64]
    signed_sums: NDArray[np.float32] | None


def stored(entry: Entry, scaled: NDArray[np.int64] | None = None, *, name: str = "") -> Stored:
    """The entry in float32. `scaled`: what scaled_counts() gave for it, if that is known.

    Raises:
        ValueError: a mean is beyond float32.
    """
    if scaled is None:
        scaled = scaled_counts(name, entry)
    signed = entry.signed_sums
    return Stored(
        _scaled_sums(entry.sums, entry.counts, scaled),
        scaled,
        None if signed is None else _scaled_sums(signed, entry.counts, scaled),
    )


def scaled_counts(name: str, entry: Entry) -> NDArray[np.int64]:
    """[n_counts] int64: the counts as the file will hold them.

    A count above 2^24 would be rounded in float32, and a sum above 3.4e38 would become infinite.
    Quantizers divide one by the other, so both are scaled alike: all counts of a weight by one
    power of two, which keeps their proportions (merging weighs by them), then rounded to whole
    numbers, since the loader rounds them, and to 1 at least, since 0 means no data. The sums
    then follow the rounded counts exactly (see _scaled_sums).

    Raises:
        ValueError: a mean is beyond float32.
    """
    counts = entry.counts
    peaks = entry.sums.max(axis=1)
    if entry.signed_sums is not None:
        peaks = np.maximum(peaks, np.abs(entry.signed_sums).max(axis=1))
    if len(counts) == 1:
        peaks = peaks.max(keepdims=True)
    for shift in range(64):
        scaled = counts >> shift
        if shift:
            scaled += (counts >> (shift - 1)) & 1  # round half up
            np.maximum(scaled, 1, out=scaled, where=counts > 0)
        if scaled.max() <= MAX_COUNT and _fits_float32(peaks * _factors(counts, scaled)):
            return scaled
    raise ValueError(
        f"{name!r}: the largest sum, {peaks.max():g}, belongs to too few activation rows: even "
        "their mean is beyond float32 (3.4e38); the activations have overflowed, so check the model"
    )


def _factors(counts: NDArray[np.int64], scaled: NDArray[np.int64]) -> NDArray[np.float64]:
    """[n_counts] float64: what to multiply the sums by; 1.0 if the count is 0."""
    factors = np.ones(len(counts))
    np.divide(scaled, counts, out=factors, where=counts > 0)
    return factors


def _fits_float32(values: NDArray[np.float64]) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float32)).all())


def _scaled_sums(
    sums: NDArray[np.float64], counts: NDArray[np.int64], scaled: NDArray[np.int64]
) -> NDArray[np.float32]:
    """[n_mat, n_in] float32: the sums, such that sums / scaled counts is the mean it was."""
    if np.array_equal(counts, scaled):
        return sums.astype(np.float32)
    return (sums * _factors(counts, scaled)[:, np.newaxis]).astype(np.float32)
