"""`imatrix convert` and `imatrix merge`: files of importance matrices into others."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np

from imatrix import _show
from imatrix._arguments import Commands, add_verbose, at_least
from imatrix._output import check_output
from imatrix._terminal import Terminal
from imatrix.conversion import convert, format_of, merge
from imatrix.formats import Format
from imatrix.matrix import ImportanceMatrix

__all__ = ["add_chunk_size", "add_format", "add_parser", "tell_losses", "tell_unsigned"]


def add_parser(commands: Commands) -> None:
    """Add the commands to the parser's."""
    command = commands.add_parser(
        "convert",
        help="an importance matrix from GGUF to .dat, or back",
        description="Read an importance matrix in either format and write it in the other. "
        "llama-quantize reads both; ik_llama.cpp reads .dat only.",
        allow_abbrev=False,
    )
    command.set_defaults(run=_convert)
    command.add_argument("src", metavar="IN", help="importance matrix, GGUF or .dat")
    command.add_argument("dst", metavar="OUT", help="what to write")
    add_format(command)
    add_chunk_size(command)
    add_verbose(command)

    command = commands.add_parser(
        "merge",
        help="several importance matrices of one model into one",
        description="Add up importance matrices of one model, as if their texts had been "
        "collected in one run. The order of the files does not matter, to the bit.",
        allow_abbrev=False,
    )
    command.set_defaults(run=_merge)
    command.add_argument("files", metavar="FILE", nargs="+", help="importance matrices")
    command.add_argument("-o", "--output", metavar="OUT", required=True, help="what to write")
    add_format(command)
    add_chunk_size(command)
    add_verbose(command)


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


def _convert(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.dst)
    form: Format = args.output_format or format_of(args.dst)
    matrix = convert(args.src, args.dst, format=form, chunk_size=args.ctx_size)
    terminal.note(f"wrote {args.dst}: {form}, {_show.weights_told(matrix)}")
    tell_losses(matrix, form, terminal)
    return 0


def _merge(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.output)
    form: Format = args.output_format or format_of(args.output)
    parts = [ImportanceMatrix.load(path, chunk_size=args.ctx_size) for path in args.files]
    matrix = merge(*parts)
    matrix.save(args.output, format=form)
    terminal.note(
        f"wrote {args.output}: {form}, {len(args.files)} file(s), {_show.weights_told(matrix)}; "
        f"{matrix.chunk_count} chunks"
    )
    tell_unsigned(parts, matrix, terminal)
    tell_losses(matrix, form, terminal)
    return 0


def tell_unsigned(
    parts: Iterable[ImportanceMatrix], merged: ImportanceMatrix, terminal: Terminal
) -> None:
    """Warn of signed sums that some of the files have and their sum has not."""
    known = {
        name for part in parts for name, entry in part.items() if entry.signed_sums is not None
    }
    lost = [name for name in merged.without_signed_sums if name in known]
    if lost:
        few = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        terminal.warn(
            f"no signed sums any more of {_show.plural(len(lost), 'weight')}, since some of the "
            f"files have none of them, and a mean needs all rows: {few}"
        )


def tell_losses(matrix: ImportanceMatrix, form: Format, terminal: Terminal) -> None:
    """Warn of what a .dat file says otherwise than the matrix."""
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
