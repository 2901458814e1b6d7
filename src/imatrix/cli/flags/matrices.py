"""Flags of commands that read and write matrices, and what a written file loses."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np

from imatrix.cli.flags.values import at_least
from imatrix.cli.terminal import Terminal
from imatrix.formats import Format
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.words import few, plural

__all__ = ["add_chunk_size", "add_format", "warn_of_losses", "warn_of_lost_signed_sums"]


def add_format(command: argparse.ArgumentParser) -> None:
    """--output-format, into `args.output_format`."""
    command.add_argument(
        "--output-format",
        choices=("gguf", "dat"),
        help="what to write (default: dat if OUT ends in .dat, else gguf)",
    )


def add_chunk_size(command: argparse.ArgumentParser) -> None:
    """-c, into `args.ctx_size`."""
    command.add_argument(
        "-c",
        "--ctx-size",
        metavar="N",
        type=at_least(1),
        default=512,
        help="tokens a chunk of .dat files, which do not tell (default: 512)",
    )


def warn_of_lost_signed_sums(
    parts: Iterable[ImportanceMatrix], merged: ImportanceMatrix, terminal: Terminal
) -> None:
    """Warn of signed sums that some of the files have and their sum does not."""
    known = {
        name for part in parts for name, entry in part.items() if entry.signed_sums is not None
    }
    lost = [name for name in merged.without_signed_sums if name in known]
    if lost:
        terminal.warn(
            f"no signed sums any more of {plural(len(lost), 'weight')}, since some of the "
            f"files have none of them, and a mean needs all rows: {few(lost, 3)}"
        )


def warn_of_losses(matrix: ImportanceMatrix, form: Format, terminal: Terminal) -> None:
    """Warn of what a .dat file does not say, or says differently from the matrix."""
    if form != "dat":
        return
    empty = [name for name, entry in matrix.items() if not entry.counts.any()]
    if empty:
        terminal.warn(f"left out, having seen no rows: {', '.join(empty)}")
    partial = [
        int(np.count_nonzero(entry.counts == 0)) for entry in matrix.values() if entry.counts.any()
    ]
    if any(entry.signed_sums is not None for entry in matrix.values()):
        terminal.note("left out: the signed sums, for which .dat has no place; GGUF has")
    if any(partial):
        terminal.warn(
            f"{sum(partial)} experts of {sum(map(bool, partial))} weights saw no rows; .dat cannot "
            "say so and gives them 1 everywhere"
        )
