"""Sums of importance matrices: of entries, of numbers of chunks, and of what is known of their origin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Entry, Provenance, TextSource

__all__ = ["add_entries", "chunks_of", "exact_sum", "merged_provenance"]

_T = TypeVar("_T")


def add_entries(name: str, parts: Sequence[Entry]) -> Entry:
    """The sum of the entries of one weight, whose shapes may differ in spelling, see
    ImportanceMatrix.merge.

    Raises:
        ValueError: the shapes do not fit together.
    """
    if len(parts) == 1:
        return parts[0]
    spelling = _common_spelling(parts)
    if spelling is None:
        spellings = dict.fromkeys((tuple(part.sums.shape), part.n_counts) for part in parts)
        shown = " and ".join(f"sums {list(shape)} with {n} counts" for shape, n in spellings)
        raise ValueError(f"{name!r}: cannot merge {shown}; are the matrices from the same model?")
    shape, n_counts = spelling
    counts = np.zeros(n_counts, np.int64)
    for part in parts:
        counts += part.counts if part.n_counts <= n_counts else part.counts[:1]
    # an entry without rows adds nothing to a mean, whatever it lacks
    known = [part.signed_sums for part in parts if part.counts.any()]
    signed = [each.reshape(shape) for each in known if each is not None]
    return Entry(
        exact_sum([part.sums.reshape(shape) for part in parts]),
        counts,
        signed_sums=exact_sum(signed) if signed and len(signed) == len(known) else None,
        name=name,
    )


def _common_spelling(parts: Sequence[Entry]) -> tuple[tuple[int, int], int] | None:
    """((n_mat, n_in), n_counts) that all can be brought to; None if there is none."""
    size = parts[0].sums.size
    shapes = {(part.n_mat, part.n_in) for part in parts if part.n_mat > 1}
    if len(shapes) > 1 or any(part.sums.size != size for part in parts):
        return None
    shape = shapes.pop() if shapes else (1, size)
    if len({part.n_counts for part in parts}) == 1:
        return shape, parts[0].n_counts
    if all(_is_uniform(part) for part in parts):
        return shape, 1  # a dense weight
    # experts: only a flattened entry may stand for all of them with its one count
    flat = all(part.n_counts > 1 or part.n_mat == 1 for part in parts)
    return (shape, shape[0]) if flat else None


def exact_sum(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The sum of arrays of one shape, element by element, exact but for one rounding at the end.

    The result does not depend on their order. Sums and their rounding errors are added separately,
    each by Knuth's two-sum (The Art of Computer Programming 2, 4.2.2), whose error is exact.
    math.fsum is needed only if the sum of the errors was rounded itself.
    """
    total = parts[0]
    if len(parts) == 2:
        return total + parts[1]  # one addition is rounded right
    errors = np.zeros_like(total)
    rounded = np.zeros(total.shape, np.bool_)
    for part in parts[1:]:
        total, lost = _two_sum(total, part)
        errors, again = _two_sum(errors, lost)
        rounded |= again != 0
    result: NDArray[np.float64] = total + errors
    for place in zip(*np.nonzero(rounded & np.isfinite(total)), strict=True):
        result[place] = math.fsum(float(part[place]) for part in parts)
    return result


def _two_sum(
    a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(a + b rounded, what the rounding took away)."""
    with np.errstate(invalid="ignore", over="ignore"):  # an infinite sum is refused by Entry
        total = a + b
        rest = total - a
        return total, (a - (total - rest)) + (b - rest)


def _is_uniform(entry: Entry) -> bool:
    """Whether one count can stand for all: the mark of a dense weight."""
    return bool((entry.counts == entry.counts[0]).all())


def chunks_of(parts: Sequence[tuple[int, int]], chunk_size: int) -> int:
    """Chunks in all parts, in chunks of `chunk_size`.

    Args:
        parts: chunks and tokens a chunk of each; a part of unknown size (0) counts as it is.
    """
    if chunk_size == 0:
        return sum(n_chunks for n_chunks, _ in parts)
    tokens = sum(n_chunks * (size or chunk_size) for n_chunks, size in parts)
    return (tokens + chunk_size // 2) // chunk_size


def merged_provenance(parts: Sequence[Provenance]) -> Provenance:
    """What is known of the origin of a sum, see ImportanceMatrix.merge."""
    mtp = [part.mtp for part in parts]
    return Provenance(
        collector=_agreed([part.collector for part in parts]),
        engine=_agreed([part.engine for part in parts]),
        mtp=True if True in mtp else _agreed(mtp),
        n_ctx=_agreed([part.n_ctx for part in parts]),
        dataset_digest=None,
        left_out=tuple(chunk for part in parts for chunk in part.left_out),
        tokens=_total([part.tokens for part in parts]),
        packing=_agreed([part.packing for part in parts]),
        seed=_agreed([part.seed for part in parts]),
        sources=_merged_sources([each for part in parts for each in part.sources]),
    )


def _total(values: Sequence[int | None]) -> int | None:
    """The sum; None if one of the values is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _merged_sources(sources: Sequence[TextSource]) -> tuple[TextSource, ...]:
    """Sources of one name and weight taken together, in the order they come up."""
    found: dict[tuple[str, float | None], TextSource] = {}
    for each in sources:
        key = (each.name, each.weight)
        have = found.get(key, TextSource(each.name, 0, 0, 0, each.weight))
        found[key] = TextSource(
            each.name,
            have.documents + each.documents,
            have.tokens + each.tokens,
            have.dropped + each.dropped,
            each.weight,
            have.empty + each.empty,
            have.skipped + each.skipped,
        )
    return tuple(found.values())


def _agreed(values: Sequence[_T | None]) -> _T | None:
    """The value that all have; None if they differ."""
    return values[0] if all(value == values[0] for value in values) else None
