"""`imatrix convert` and `imatrix merge`: files of importance matrices into others."""

from __future__ import annotations

import argparse

from imatrix.cli.flags.common import Commands, add_verbose
from imatrix.cli.flags.matrices import add_chunk_size, add_format, tell_losses, tell_unsigned
from imatrix.cli.outputs import check_output
from imatrix.cli.terminal import Terminal
from imatrix.formats import Format
from imatrix.matrix.conversion import convert, format_of, merge
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.matrix.summary import describe_weights

__all__ = ["add_parser"]


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


def _convert(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.dst)
    form: Format = args.output_format or format_of(args.dst)
    matrix = convert(args.src, args.dst, format=form, chunk_size=args.ctx_size)
    terminal.note(f"wrote {args.dst}: {form}, {describe_weights(matrix)}")
    tell_losses(matrix, form, terminal)
    return 0


def _merge(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.output)
    form: Format = args.output_format or format_of(args.output)
    parts = [ImportanceMatrix.load(path, chunk_size=args.ctx_size) for path in args.files]
    matrix = merge(*parts)
    matrix.save(args.output, format=form)
    terminal.note(
        f"wrote {args.output}: {form}, {len(args.files)} file(s), {describe_weights(matrix)}; "
        f"{matrix.chunk_count} chunks"
    )
    tell_unsigned(parts, matrix, terminal)
    tell_losses(matrix, form, terminal)
    return 0
