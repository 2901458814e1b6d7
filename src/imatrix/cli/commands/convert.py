"""`imatrix convert`: an importance matrix from GGUF to .dat, or back."""

from __future__ import annotations

import argparse

from imatrix.cli.command import Command
from imatrix.cli.flags.common import add_verbose
from imatrix.cli.flags.hub import Parser
from imatrix.cli.flags.matrices import add_chunk_size, add_format, warn_of_losses
from imatrix.cli.outputs import Files, check_output, named_outputs
from imatrix.cli.status import OK
from imatrix.cli.terminal import Terminal
from imatrix.formats import Format
from imatrix.matrix.conversion import convert, format_of
from imatrix.matrix.summary import describe_weights

__all__ = ["COMMAND"]


def _add_arguments(command: Parser) -> None:
    command.add_argument("src", metavar="IN", help="importance matrix, GGUF or .dat")
    command.add_argument("dst", metavar="OUT", help="what to write")
    add_format(command)
    add_chunk_size(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.dst)
    form: Format = args.output_format or format_of(args.dst)
    matrix = convert(args.src, args.dst, format=form, chunk_size=args.ctx_size)
    terminal.note(f"wrote {args.dst}: {form}, {describe_weights(matrix)}")
    warn_of_losses(matrix, form, terminal)
    return OK


COMMAND = Command(
    name="convert",
    help="an importance matrix from GGUF to .dat, or back",
    description="Read an importance matrix in either format and write it in the other. "
    "llama-quantize reads both; ik_llama.cpp reads .dat only.",
    add_arguments=_add_arguments,
    files=Files(files=("src",), outputs=named_outputs("dst")),
    run=_run,
)
