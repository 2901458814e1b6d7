"""What is collected for a weight, where it came from, and what a file of them holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["THIN", "Contents", "Entry", "LeftOut", "Part", "Provenance", "TextSource"]

# Rows below which a mean is called thin. The mean square of n normal values is off by sqrt(2/n)
# of itself on average: 25 % at 32 rows, where a quantizer, which only weighs columns against one
# another, starts to follow the noise. A share of the other experts' rows would say nothing: with
# enough text a rarely chosen expert has all the data that it needs.
THIN = 32

# Of a model: the MTP/NextN head, and the rest.
Part: TypeAlias = Literal["trunk", "head"]

_Scalar = TypeVar("_Scalar", bound=np.generic)


class Entry:
    """What was collected for one weight.

    Args:
        sums: [n_mat, n_in], sums of squared activations, one row a matrix (one for a plain
            weight, one an expert, one a slice of a 3-D weight). Converted to float64, C-contiguous.
        counts: [n_counts], how many activation rows went into the sums. n_mat of them for a
            weight with experts (MUL_MAT_ID); one for a dense weight, 3-D ones included, as
            llama-imatrix counts it (tools/imatrix/imatrix.cpp). Converted to int64.
        signed_sums: [n_mat, n_in], sums of the activations themselves over the same rows, for
            their mean; None if they are not known. Converted as `sums` is.
        name: the weight's name, only for the error messages.

    Arrays that already have the right type and layout are not copied; the entry's view of them
    is read-only.

    Raises:
        ValueError: the shapes do not fit, a sum is not finite, one of squares is negative, or a
            count is negative or not a whole number.
    """

    __slots__ = ("_counts", "_signed_sums", "_sums")

    def __init__(
        self,
        sums: ArrayLike,
        counts: ArrayLike,
        *,
        signed_sums: ArrayLike | None = None,
        name: str | None = None,
    ) -> None:
        label = "an entry" if name is None else repr(name)
        self._sums = _checked_sums(sums, label)
        self._counts = _checked_counts(counts, label)
        if self.n_counts not in (1, self.n_mat):
            raise ValueError(
                f"{label}: sums {self._sums.shape} have {self.n_mat} matrices but there are "
                f"{self.n_counts} counts; expected 1 (a dense weight) or {self.n_mat} (one an "
                "expert)"
            )
        self._signed_sums = (
            None if signed_sums is None else _finite(signed_sums, label, "signed sums")
        )
        if self._signed_sums is not None and self._signed_sums.shape != self._sums.shape:
            raise ValueError(
                f"{label}: signed sums {list(self._signed_sums.shape)} and sums of squares "
                f"{list(self._sums.shape)} must be of one shape"
            )

    @property
    def sums(self) -> NDArray[np.float64]:
        """[n_mat, n_in] float64, read-only: sums of squared activations."""
        return self._sums

    @property
    def counts(self) -> NDArray[np.int64]:
        """[n_counts] int64, read-only: activation rows summed; n_counts is 1 or n_mat."""
        return self._counts

    @property
    def signed_sums(self) -> NDArray[np.float64] | None:
        """[n_mat, n_in] float64, read-only: sums of the activations; None if they are not known."""
        return self._signed_sums

    @property
    def means(self) -> NDArray[np.float64] | None:
        """[n_mat, n_in] float64: signed sums / counts, and 0.0 if the count is 0; None without
        signed sums."""
        if self._signed_sums is None:
            return None
        counts = self._counts[:, np.newaxis]
        mean = np.zeros_like(self._signed_sums)
        np.divide(self._signed_sums, counts, out=mean, where=counts > 0)
        return mean

    @property
    def n_mat(self) -> int:
        """How many matrices the weight holds: experts, or slices of a dense 3-D weight."""
        return int(self._sums.shape[0])

    @property
    def n_in(self) -> int:
        """Length of a row of the weight, in values."""
        return int(self._sums.shape[1])

    @property
    def n_counts(self) -> int:
        """How many counts there are: 1 for a dense weight, n_mat for experts."""
        return int(self._counts.shape[0])

    @property
    def importance(self) -> NDArray[np.float64]:
        """[n_mat, n_in] float64: sums / counts, and 1.0 if the count is 0.

        The 1.0 is what llama-quantize takes if there is no data (load_imatrix in
        tools/quantize/quantize.cpp): every column of such a matrix then weighs the same.
        """
        counts = self._counts[:, np.newaxis]
        mean = np.ones_like(self._sums)
        np.divide(self._sums, counts, out=mean, where=counts > 0)
        return mean

    def reshaped(self, n_mat: int, n_in: int, *, name: str | None = None) -> Entry:
        """The same values as [n_mat, n_in], for those that a file holds flattened.

        Raises:
            ValueError: there are more values or fewer, or the counts do not fit.
        """
        signed = self._signed_sums
        return Entry(
            self._sums.reshape(n_mat, n_in),
            self._counts,
            signed_sums=None if signed is None else signed.reshape(n_mat, n_in),
            name=name,
        )

    @property
    def covered(self) -> float:
        """Fraction of the counts, in [0, 1], that are above 0."""
        return float(np.count_nonzero(self._counts)) / self.n_counts

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Entry):
            return NotImplemented
        if self._signed_sums is None or other._signed_sums is None:
            same = self._signed_sums is other._signed_sums
        else:
            same = np.array_equal(self._signed_sums, other._signed_sums)
        return (
            same
            and np.array_equal(self._sums, other._sums)
            and np.array_equal(self._counts, other._counts)
        )

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    def __reduce__(self) -> tuple[Any, tuple[Any, Any, Any]]:
        return _entry, (self._sums, self._counts, self._signed_sums)

    def __repr__(self) -> str:
        signed = "" if self._signed_sums is None else ", signed sums"
        return f"Entry(sums={list(self._sums.shape)}, counts={list(self._counts.shape)}{signed})"


def _entry(sums: Any, counts: Any, signed_sums: Any) -> Entry:
    """An entry, from what its __reduce__ gave."""
    return Entry(sums, counts, signed_sums=signed_sums)


@dataclass(frozen=True)
class LeftOut:
    """A chunk that a run left out because a NaN or infinite activation came up in it.

    Attributes:
        chunk: its number in the text, from 0, chunks skipped at the start counted.
        token: where it starts in the text, in tokens.
        weight: the weight that the activation reached.
    """

    chunk: int
    token: int
    weight: str


@dataclass(frozen=True)
class TextSource:
    """What a run took from one source of its text.

    Attributes:
        name: what it was called; "" for a text without a name.
        documents: documents begun.
        tokens: tokens of the chunks that count, a BOS in front of a chunk among them.
        dropped: tokens that were read and fit into no chunk.
        weight: its share against the others', None if the sources followed one another.
        empty: documents without a text, beside those begun.
        skipped: records that could not be used and were left out, beside those begun.
    """

    name: str
    documents: int
    tokens: int
    dropped: int = 0
    weight: float | None = None
    empty: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Provenance:
    """How a matrix was made. Every field but the tuples may be None: not known.

    Attributes:
        collector: the program that collected it, such as "imatrix 0.2.0".
        engine: what ran the model, such as "llama.cpp 0.6.0 (build 11549)".
        mtp: whether the MTP/NextN head was collected.
        n_ctx: tokens in a chunk.
        dataset_digest: SHA-256 of the tokens that count, in hexadecimal.
        left_out: chunks that do not count, in the order of the text.
        tokens: tokens that count.
        packing: "stream", all texts one stream cut every n_ctx tokens; "document", no chunk with
            tokens of two documents, so that chunks may be shorter than n_ctx.
        seed: of the order of the documents; None for the order of the sources too.
        sources: where the text came from.
    """

    collector: str | None = None
    engine: str | None = None
    mtp: bool | None = None
    n_ctx: int | None = None
    dataset_digest: str | None = None
    left_out: tuple[LeftOut, ...] = ()
    tokens: int | None = None
    packing: str | None = None
    seed: int | None = None
    sources: tuple[TextSource, ...] = ()


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file of an importance matrix holds.

    Attributes:
        entries: the entries by weight name.
        datasets: names of the calibration texts, in the order in which they were read.
        chunk_count: chunks collected.
        chunk_size: tokens in a chunk; 0 if not known.
        provenance: how the matrix was made; None if not known.
        head_blocks: numbers of blocks that the file says are an MTP/NextN head.
        stats_schema: what the numbers in `stats` are, in their order; empty without any.
        stats: [len(stats_schema)] float32 by weight name, for programs that show them without
            reading the sums. They are written, and not read.

    Raises:
        ValueError: a name is empty, or chunk_count or chunk_size is negative.
        TypeError: a value is not an Entry, or datasets is one string.
    """

    entries: Mapping[str, Entry]
    datasets: Sequence[str] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    provenance: Provenance | None = None
    head_blocks: frozenset[int] = frozenset()
    stats_schema: tuple[str, ...] = ()
    stats: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, entry in self.entries.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"a weight's name must be a non-empty str, not {name!r}")
            if not isinstance(entry, Entry):
                raise TypeError(f"{name!r}: expected an Entry, got {type(entry).__name__}")
        if isinstance(self.datasets, str):
            raise TypeError(f"datasets is a sequence of names; write [{self.datasets!r}]")
        for label in ("chunk_count", "chunk_size"):
            if (value := getattr(self, label)) < 0:
                raise ValueError(f"{label} must be 0 or more, got {value}")


def _checked_sums(sums: ArrayLike, label: str) -> NDArray[np.float64]:
    array = _finite(sums, label, "sums")
    if (low := float(array.min())) < 0:
        raise ValueError(f"{label}: sums of squares cannot be negative, found {low:g}")
    return array


def _finite(values: ArrayLike, label: str, what: str) -> NDArray[np.float64]:
    """[n_mat, n_in], C-contiguous, read-only."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{label}: {what} must be real numbers, got dtype {array.dtype}")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{label}: {what} must have shape [n_mat, n_in], got {list(array.shape)}")
    array = np.ascontiguousarray(array, dtype=np.float64)
    # NaN passes through both extremes, so they are enough, and need no array of flags.
    if not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise ValueError(f"{label}: {what} must be finite, found a NaN or an infinity")
    return _read_only(array)


def _checked_counts(counts: ArrayLike, label: str) -> NDArray[np.int64]:
    array = np.asarray(counts)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{label}: counts must be whole numbers, got dtype {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{label}: counts must have shape [n_counts], got {list(array.shape)}")
    if array.dtype.kind == "f" and not np.array_equal(array, np.trunc(array)):
        raise ValueError(f"{label}: counts must be whole numbers, found a fraction or a NaN")
    low, high = array.min(), array.max()
    if low < 0:
        raise ValueError(f"{label}: counts cannot be negative, found {low:g}")
    # Converted blindly, a larger value would wrap around.
    if array.dtype.kind != "i" and float(high) >= 2.0**63:
        raise ValueError(f"{label}: counts must be below 2^63, found {high:g}")
    return _read_only(np.ascontiguousarray(array, dtype=np.int64))


def _read_only(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    view: NDArray[_Scalar] = array.view()
    view.flags.writeable = False
    return view
