"""Importance matrices as plain data: sums and counts per weight, and what follows from them."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import pandas

__all__ = ["Entry", "ImportanceMatrix", "LeftOut", "Provenance", "TextSource"]

# Rows below which a mean is called thin. The mean square of n normal values is off by sqrt(2/n)
# of itself on average: 25 % at 32 rows, where a quantizer, which only weighs columns against one
# another, starts to follow the noise. A share of the other experts' rows would not tell: with
# enough text a rarely chosen expert has all the data it needs.
THIN = 32

_BLOCK = re.compile(r"blk\.([0-9]+)\.")
_HEAD_BLOCK = re.compile(r"blk\.([0-9]+)\.nextn\.")

_T = TypeVar("_T")
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
        """[n_mat, n_in] float64: signed sums / counts, and 0.0 where the count is 0; None without
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
        """[n_mat, n_in] float64: sums / counts, and 1.0 where the count is 0.

        The 1.0 is what llama-quantize puts where there is no data (load_imatrix in
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
        told = "" if self._signed_sums is None else ", signed sums"
        return f"Entry(sums={list(self._sums.shape)}, counts={list(self._counts.shape)}{told})"


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
        weight: its share against the others', None where the sources followed one another.
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
        collector: the program that collected it, such as "imatrix 0.1.0".
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


class ImportanceMatrix(Mapping[str, Entry]):
    """Entries by weight name, and where they came from. Immutable.

    It iterates in natural order: by block number, then by name, weights outside a block last.

    Args:
        entries: the entries by weight name.
        datasets: names of the calibration texts, in the order they were read.
        chunk_count: chunks collected.
        chunk_size: tokens in a chunk; 0 if not known.
        provenance: how the matrix was made; None if not known.
        head_blocks: numbers of blocks that are known to be an MTP/NextN head, beside those that
            have a `blk.N.nextn.*` entry. Those without an entry are passed over.

    Raises:
        ValueError: a name is empty, or chunk_count or chunk_size is negative.
        TypeError: a value is not an Entry, or datasets is one string.
    """

    __slots__ = (
        *("_chunk_count", "_chunk_size", "_datasets", "_entries"),
        *("_head_blocks", "_provenance"),
    )

    def __init__(
        self,
        entries: Mapping[str, Entry],
        *,
        datasets: Sequence[str] = (),
        chunk_count: int = 0,
        chunk_size: int = 0,
        provenance: Provenance | None = None,
        head_blocks: Iterable[int] = (),
    ) -> None:
        for name, entry in entries.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"a weight's name must be a non-empty str, not {name!r}")
            if not isinstance(entry, Entry):
                raise TypeError(f"{name!r}: expected an Entry, got {type(entry).__name__}")
        if isinstance(datasets, str):
            raise TypeError(f"datasets is a sequence of names; write [{datasets!r}]")
        for label, value in (("chunk_count", chunk_count), ("chunk_size", chunk_size)):
            if value < 0:
                raise ValueError(f"{label} must be 0 or more, got {value}")
        self._entries = {name: entries[name] for name in sorted(entries, key=_natural)}
        self._datasets = tuple(datasets)
        self._chunk_count = int(chunk_count)
        self._chunk_size = int(chunk_size)
        matches = (_HEAD_BLOCK.match(name) for name in self._entries)
        named = {int(match[1]) for match in matches if match}
        there = {block_of(name) for name in self._entries}
        self._head_blocks = frozenset(named | (set(head_blocks) & there))
        # One spelling for "nothing known", so that equality does not tell two apart.
        self._provenance = None if provenance == Provenance() else provenance

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the calibration texts."""
        return self._datasets

    @property
    def chunk_count(self) -> int:
        """Chunks collected."""
        return self._chunk_count

    @property
    def chunk_size(self) -> int:
        """Tokens in a chunk; 0 if not known."""
        return self._chunk_size

    @property
    def provenance(self) -> Provenance | None:
        """How the matrix was made; None if not known."""
        return self._provenance

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise _UnknownWeight(name, tuple(self._entries)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def importance(self, name: str) -> NDArray[np.float64]:
        """Importance of one weight: [n_mat, n_in] float64, see Entry.importance.

        Raises:
            KeyError: there is no such weight; the message names the nearest ones.
        """
        return self[name].importance

    @property
    def head_blocks(self) -> frozenset[int]:
        """Numbers of the blocks that are an MTP/NextN head: those with a `blk.N.nextn.*` entry,
        and those that whoever made the matrix knew to be one."""
        return self._head_blocks

    @property
    def without_signed_sums(self) -> tuple[str, ...]:
        """Weights that saw rows and have no signed sums, in the order of the matrix."""
        return tuple(
            name
            for name, entry in self._entries.items()
            if entry.signed_sums is None and entry.counts.any()
        )

    @property
    def head(self) -> ImportanceMatrix:
        """The entries of the head blocks, the attention and feed-forward ones among them."""
        blocks = self.head_blocks
        return self._only(name for name in self._entries if block_of(name) in blocks)

    @property
    def trunk(self) -> ImportanceMatrix:
        """The entries outside the head blocks."""
        blocks = self.head_blocks
        return self._only(name for name in self._entries if block_of(name) not in blocks)

    def to_frame(self, *, experts: bool = False, exact: bool = False) -> pandas.DataFrame:
        """Statistics as a pandas DataFrame, one row a weight, in the order of the matrix.

        Columns are the fields of imatrix.WeightStatistics, with its units: `rows_min` and
        `rows_max` in activation rows; `total`, `minimum`, `maximum`, `mean` and `stddev` in squared
        activations; `entropy` in bits; `active`, `entropy_norm` and `zd` in [0, 1]; `cossim` in
        [0, 1]. The index is the weight's name. A weight that saw no row is there too, with
        elements 0 and NaN in its figures.

        Args:
            experts: one row an expert instead, of the weights that have a count an expert; columns
                of imatrix.ExpertStatistics, indexed by the weight's name and the expert's number,
                computed in float64.
            exact: compute in float64, see imatrix.statistics.

        Raises:
            ImportError: pandas is not installed; it comes with the extra `pandas`.
        """
        from imatrix.weight_stats import to_frame

        return to_frame(self, experts=experts, exact=exact)

    def _only(self, names: Iterable[str]) -> ImportanceMatrix:
        return ImportanceMatrix(
            {name: self._entries[name] for name in names},
            datasets=self._datasets,
            chunk_count=self._chunk_count,
            chunk_size=self._chunk_size,
            provenance=self._provenance,
            head_blocks=self._head_blocks,
        )

    def merge(self, *others: ImportanceMatrix) -> ImportanceMatrix:
        """The matrix that collecting all of them at once would have given.

        Counts are added in int64, and each sum is the exact sum of the parts, rounded once to
        float64: neither depends on the order of the matrices, to the bit. (Merging step by step
        rounds at every step, to float64 in memory and to float32 in a file.) A weight that only
        some have is taken over.

        A dense 3-D weight comes in three spellings: one count for all of it; older files with an
        equal count a slice; and, as llama-imatrix writes it, flattened to [1, n_mat * n_in] (see
        collect_imatrix and save_imatrix in tools/imatrix/imatrix.cpp). They go together: the
        result has [n_mat, n_in] and one count. A weight of experts that an old file flattened so
        is added with its one count for each expert, as llama-imatrix adds it.

        Signed sums of a weight are kept if all entries that saw rows of it have them. If one has
        none the sum has none, as llama-imatrix does it: a mean over all rows cannot be had from
        some of them. The property `without_signed_sums` tells which.

        Dataset names are joined, each once. The chunk size is the first one known; chunks of
        another size are converted to it by their tokens, rounded to the nearest whole chunk.
        Provenance keeps what all agree on; mtp is true if one of them has the head, left_out
        lists the chunks of all, sources what each took from them, and the digest goes, since the sum is not the work of one stream
        of tokens.

        Raises:
            ValueError: the shapes of a weight do not fit together.
            TypeError: one of the others is not an ImportanceMatrix.
        """
        for other in others:
            if not isinstance(other, ImportanceMatrix):
                raise TypeError(f"can only merge ImportanceMatrix, got {type(other).__name__}")
        if not others:
            return self
        parts = (self, *others)
        found: dict[str, list[Entry]] = {}
        for part in parts:
            for name, entry in part._entries.items():
                found.setdefault(name, []).append(entry)
        chunk_size = next((part._chunk_size for part in parts if part._chunk_size), 0)
        return ImportanceMatrix(
            {name: _added(name, entries) for name, entries in found.items()},
            datasets=tuple(dict.fromkeys(name for part in parts for name in part._datasets)),
            chunk_count=_chunks_of(parts, chunk_size),
            chunk_size=chunk_size,
            provenance=_merged_provenance([part._provenance or Provenance() for part in parts]),
            head_blocks=frozenset().union(*(part._head_blocks for part in parts)),
        )

    def __add__(self, other: ImportanceMatrix) -> ImportanceMatrix:
        if not isinstance(other, ImportanceMatrix):
            return NotImplemented
        return self.merge(other)

    def save(
        self, path: str | os.PathLike[str], *, format: Literal["gguf", "dat"] = "gguf"
    ) -> None:
        """Write a file of that format, whatever its name says.

        The file is replaced in one step: a failure leaves an earlier one as it was.

        Args:
            format: "gguf", see imatrix.formats.gguf.write, or "dat" for programs that read
                nothing else, which keeps less, see imatrix.formats.dat.write.

        Raises:
            ValueError: there is no entry, or one that the format cannot hold, or the format is
                another one.
            OSError: the file cannot be written.
        """
        from imatrix.formats import dat, gguf

        writers = {"gguf": gguf.write, "dat": dat.write}
        if format not in writers:
            raise ValueError(f"format must be 'gguf' or 'dat', got {format!r}")
        writers[format](self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, chunk_size: int = 512) -> ImportanceMatrix:
        """Read a file made by this package or by llama-imatrix, GGUF or the old .dat format.

        Args:
            chunk_size: tokens a chunk of a .dat file, which does not tell; see
                imatrix.formats.dat.read.

        Raises:
            FileNotFoundError: there is no such file.
            imatrix.formats.FormatError: the file is not an importance matrix, or is damaged.
        """
        from imatrix.formats import dat, detected, gguf

        if detected(path) == "dat":
            return dat.read(path, chunk_size=chunk_size)
        return gguf.read(path)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImportanceMatrix):
            return NotImplemented
        return (
            self._entries == other._entries
            and self._datasets == other._datasets
            and self._chunk_count == other._chunk_count
            and self._chunk_size == other._chunk_size
            and self._provenance == other._provenance
            and self._head_blocks == other._head_blocks
        )

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    def __repr__(self) -> str:
        text = f"{len(self)} weights, {self._chunk_count} chunks of {self._chunk_size} tokens"
        if blocks := self.head_blocks:
            text += f", head in block {', '.join(map(str, sorted(blocks)))}"
        return f"<ImportanceMatrix: {text}>"


class _UnknownWeight(KeyError):
    """A KeyError that looks for near names only when it is shown.

    Looking costs milliseconds on a large model, and `Mapping.get` raises this and drops it.
    """

    def __init__(self, name: object, known: tuple[str, ...]) -> None:
        super().__init__(name, known)

    def __str__(self) -> str:
        name, known = self.args
        near = difflib.get_close_matches(name, known, n=3) if isinstance(name, str) else []
        hint = f"; near: {', '.join(near)}" if near else f" among {len(known)} weights"
        return f"no entry {name!r}{hint}"


def _natural(name: str) -> tuple[bool, int, str]:
    block = block_of(name)
    return (block is None, block or 0, name)


def block_of(name: str) -> int | None:
    """Number of the block that a weight belongs to; None for one outside the blocks."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


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
    # The extremes tell it all (NaN passes through both) without an array of flags.
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


def _added(name: str, parts: Sequence[Entry]) -> Entry:
    """The sum of the entries of one weight, their spellings reconciled."""
    if len(parts) == 1:
        return parts[0]
    spelling = _common_spelling(parts)
    if spelling is None:
        spellings = dict.fromkeys((tuple(part.sums.shape), part.n_counts) for part in parts)
        told = " and ".join(f"sums {list(shape)} with {n} counts" for shape, n in spellings)
        raise ValueError(f"{name!r}: cannot merge {told}; are the matrices from the same model?")
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

    So it does not depend on their order. Sums and their rounding errors are added separately,
    each by Knuth's two-sum (The Art of Computer Programming 2, 4.2.2), whose error is exact; only
    where the sum of the errors was itself rounded is math.fsum needed.
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


def _chunks_of(parts: Sequence[ImportanceMatrix], chunk_size: int) -> int:
    """Chunks in all parts, in chunks of `chunk_size`; a part of unknown size counts as it is."""
    if chunk_size == 0:
        return sum(part.chunk_count for part in parts)
    tokens = sum(part.chunk_count * (part.chunk_size or chunk_size) for part in parts)
    return (tokens + chunk_size // 2) // chunk_size


def _merged_provenance(parts: Sequence[Provenance]) -> Provenance:
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
    return values[0] if all(value == values[0] for value in values) else None
