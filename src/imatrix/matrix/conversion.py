"""Files of importance matrices from one format into another, and several into one."""

from __future__ import annotations

import os
from pathlib import Path

from imatrix.files.outputs import check_files
from imatrix.formats import Format
from imatrix.matrix.importance import ImportanceMatrix

__all__ = ["convert", "format_of", "merge"]


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    format: Format | None = None,
    chunk_size: int = 512,
) -> ImportanceMatrix:
    """Read a matrix in either format and write it in either.

    Args:
        src: GGUF or .dat, which its contents decide.
        dst: what to write; replaced in one step.
        format: "gguf" or "dat"; None: "dat" if dst ends so, else "gguf".
        chunk_size: tokens a chunk of a .dat file, see imatrix.formats.dat.read.

    Returns:
        What was read: .dat keeps less, see imatrix.formats.dat.

    Raises:
        ValueError: the format is unknown, or cannot hold the matrix; or dst is src.
        FormatError (a ValueError): src is not an importance matrix.
        OSError: a file cannot be read or written.
    """
    check_files([dst], [src])
    matrix = ImportanceMatrix.load(src, chunk_size=chunk_size)
    matrix.save(dst, format=format_of(dst) if format is None else format)
    return matrix


def format_of(path: str | os.PathLike[str]) -> Format:
    """The format to write under a name."""
    return "dat" if Path(path).suffix.lower() == ".dat" else "gguf"


def merge(
    *matrices: ImportanceMatrix | str | os.PathLike[str], chunk_size: int = 512
) -> ImportanceMatrix:
    """The matrix that collecting all of them at once would have given, whatever their order.

    This is ImportanceMatrix.merge in an order that the matrices themselves decide, so that the
    metadata do not depend on the order of the arguments: the largest chunk size counts, and the
    texts come in the order of the matrices' chunk sizes, then of their names.

    Args:
        matrices: one or more, or the paths of files.
        chunk_size: tokens a chunk of .dat files, see imatrix.formats.dat.read.

    Raises:
        ValueError: there is none, or the shapes of a weight do not fit together.
        FormatError (a ValueError): a file is not an importance matrix.
        OSError: a file cannot be read.
    """
    if not matrices:
        raise ValueError("nothing to merge: give one matrix or more")
    loaded = [
        each
        if isinstance(each, ImportanceMatrix)
        else ImportanceMatrix.load(each, chunk_size=chunk_size)
        for each in matrices
    ]
    # All of the result's metadata that the order decides; the rest, and every sum and count, is
    # the same in any order.
    first, *others = sorted(loaded, key=_metadata)
    return first.merge(*others)


def _metadata(matrix: ImportanceMatrix) -> tuple[int, tuple[str, ...], list[tuple[int, int, str]]]:
    made = matrix.provenance
    left_out = [] if made is None else [(one.chunk, one.token, one.weight) for one in made.left_out]
    return -matrix.chunk_size, matrix.datasets, left_out
