"""The earlier matrices of --in-file, which `collect` adds to."""

from __future__ import annotations

from collections.abc import Sequence

import imatrix
from imatrix.cli.status import USAGE, Stopped
from imatrix.matrix.importance import ImportanceMatrix

__all__ = ["add_earlier", "check_same_model", "chunks_before", "merge_earlier"]


def check_same_model(earlier: Sequence[ImportanceMatrix], paths: Sequence[str], model: str) -> None:
    """Refuse earlier files of another model now, not when the work is done."""
    tensors = imatrix.ModelFile.read(model).tensors
    for matrix, path in zip(earlier, paths, strict=True):
        if not any(name in tensors for name in matrix):
            raise Stopped(
                f"{path} names no weight of {model} (its first is {next(iter(matrix))}); was "
                "it collected from another model?",
                USAGE,
            )
        for name, entry in matrix.items():
            n_in, _, *n_mat = (*tensors.get(name, (entry.sums.size, 1)), 1, 1)[:4]
            if entry.sums.size != n_in * n_mat[0] * n_mat[1]:
                raise Stopped(
                    f"{path}: {name} has {entry.sums.size} sums, in {model} it has "
                    f"{n_in * n_mat[0] * n_mat[1]}; was it collected from another model?",
                    USAGE,
                )


def merge_earlier(earlier: Sequence[ImportanceMatrix]) -> ImportanceMatrix | None:
    """The earlier matrices as one; None if there are none."""
    return earlier[0].merge(*earlier[1:]) if earlier else None


def chunks_before(earlier: ImportanceMatrix | None, n_ctx: int) -> int:
    """Chunks of the earlier files, in chunks of this run's size."""
    if earlier is None:
        return 0
    return round(earlier.chunk_count * (earlier.chunk_size or n_ctx) / n_ctx)


def add_earlier(own: ImportanceMatrix, earlier: ImportanceMatrix | None) -> ImportanceMatrix:
    """What a run collected, and the earlier data."""
    if earlier is None:
        return own
    # Own first, for its chunk size; the names of the texts in the order they were read.
    both = own.merge(earlier)
    return ImportanceMatrix(
        both,
        datasets=tuple(dict.fromkeys((*earlier.datasets, *own.datasets))),
        chunk_count=both.chunk_count,
        chunk_size=both.chunk_size,
        provenance=both.provenance,
        head_blocks=both.head_blocks,
    )
