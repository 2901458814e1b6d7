"""Importance matrices as plain data: sums and counts per weight, and what follows from them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Contents, Entry, Provenance
from imatrix.matrix.merging import add_entries, chunks_of, merged_provenance
from imatrix.tensors import block_of, marks_head, natural_order

if TYPE_CHECKING:
    import pandas

__all__ = ["ImportanceMatrix"]


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
        Contents(entries, datasets, chunk_count, chunk_size)  # refuses what makes no sense
        self._entries = {name: entries[name] for name in sorted(entries, key=natural_order)}
        self._datasets = tuple(datasets)
        self._chunk_count = int(chunk_count)
        self._chunk_size = int(chunk_size)
        known = frozenset(head_blocks)
        self._head_blocks = frozenset(
            block
            for name in self._entries
            if (block := block_of(name)) is not None and (block in known or marks_head(name))
        )
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
        and those that were known to be one when the matrix was made."""
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
        from imatrix.matrix.frame import to_frame

        return to_frame(self, self._head_blocks, experts=experts, exact=exact)

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
        none, the sum has none, as in llama-imatrix: a mean over all rows cannot be computed from
        some of them. The property `without_signed_sums` lists these weights.

        Dataset names are joined, each once. The chunk size is the first one known; chunks of
        another size are converted to it by their tokens, rounded to the nearest whole chunk.
        Provenance keeps what all agree on. mtp is true if one of them has the head, left_out lists
        the chunks of all, and sources lists what each took from them. The digest is dropped, since
        the sum is not the work of one stream of tokens.

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
            {name: add_entries(name, entries) for name, entries in found.items()},
            datasets=tuple(dict.fromkeys(name for part in parts for name in part._datasets)),
            chunk_count=chunks_of(
                [(part.chunk_count, part.chunk_size) for part in parts], chunk_size
            ),
            chunk_size=chunk_size,
            provenance=merged_provenance([part._provenance or Provenance() for part in parts]),
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
        if format == "gguf":
            from imatrix.formats import gguf

            gguf.write(self._contents(with_stats=True), path)
        elif format == "dat":
            from imatrix.formats import dat

            dat.write(self._contents(), path)
        else:
            raise ValueError(f"format must be 'gguf' or 'dat', got {format!r}")

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, chunk_size: int = 512) -> ImportanceMatrix:
        """Read a file made by this package or by llama-imatrix, GGUF or the old .dat format.

        Args:
            chunk_size: tokens a chunk of a .dat file, which does not hold them; see
                imatrix.formats.dat.read.

        Raises:
            FileNotFoundError: there is no such file.
            imatrix.formats.FormatError: the file is not an importance matrix, or is damaged.
        """
        from imatrix.formats import dat, detected, gguf

        if detected(path) == "dat":
            found = dat.read(path, chunk_size=chunk_size)
        else:
            found = gguf.read(path)
        return cls(
            found.entries,
            datasets=found.datasets,
            chunk_count=found.chunk_count,
            chunk_size=found.chunk_size,
            provenance=found.provenance,
            head_blocks=found.head_blocks,
        )

    def _contents(self, *, with_stats: bool = False) -> Contents:
        """What a file of this matrix holds. `with_stats`: the engine's statistics too, if there are
        signed sums; without them a file is what it was before llama.cpp 0.6.0."""
        schema: tuple[str, ...] = ()
        stats: Mapping[str, NDArray[np.float32]] = {}
        if with_stats and any(entry.signed_sums is not None for entry in self._entries.values()):
            from imatrix.matrix.weight_activations import SCHEMA, schema_figures

            schema, stats = SCHEMA, schema_figures(self._entries, self._head_blocks)
        return Contents(
            self._entries,
            datasets=self._datasets,
            chunk_count=self._chunk_count,
            chunk_size=self._chunk_size,
            provenance=self._provenance,
            head_blocks=self._head_blocks,
            stats_schema=schema,
            stats=stats,
        )

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
