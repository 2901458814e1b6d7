"""`imatrix merge`: several importance matrices of one model into one."""

from __future__ import annotations

import argparse

from imatrix.cli.command import Command
from imatrix.cli.flags.common import add_output, add_verbose
from imatrix.cli.flags.hub import Parser
from imatrix.cli.flags.matrices import (
    add_chunk_size,
    add_format,
    warn_of_losses,
    warn_of_lost_signed_sums,
)
from imatrix.cli.outputs import Files, check_output, named_outputs
from imatrix.cli.status import OK
from imatrix.cli.terminal import Terminal
from imatrix.formats import Format
from imatrix.matrix.conversion import format_of, merge
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.matrix.summary import describe_weights

__all__ = ["COMMAND"]


def _add_arguments(command: Parser) -> None:
    command.add_argument("files", metavar="FILE", nargs="+", help="importance matrices")
    add_output(command)
    add_format(command)
    add_chunk_size(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.output)
    form: Format = args.output_format or format_of(args.output)
    parts = [ImportanceMatrix.load(path, chunk_size=args.ctx_size) for path in args.files]
    matrix = merge(*parts)
    matrix.save(args.output, format=form)
    terminal.note(
        f"wrote {args.output}: {form}, {len(args.files)} file(s), {describe_weights(matrix)}; "
        f"{matrix.chunk_count} chunks"
    )
    warn_of_lost_signed_sums(parts, matrix, terminal)
    warn_of_losses(matrix, form, terminal)
    return OK


COMMAND = Command(
    name="merge",
    help="several importance matrices of one model into one",
    description="Add up importance matrices of one model, as if their texts had been "
    "collected in one run. The order of the files does not matter, to the bit.",
    add_arguments=_add_arguments,
    files=Files(files=("files",), outputs=named_outputs("output")),
    run=_run,
)
