"""`imatrix report`: all about a matrix on one HTML page."""

from __future__ import annotations

import argparse

from imatrix.cli.command import Command
from imatrix.cli.flags.common import add_verbose
from imatrix.cli.flags.hub import Parser
from imatrix.cli.flags.matrices import add_chunk_size
from imatrix.cli.outputs import Files, check_output, named_outputs
from imatrix.cli.status import OK
from imatrix.cli.terminal import Terminal
from imatrix.files import atomic
from imatrix.words import size

__all__ = ["COMMAND"]


def _add_arguments(command: Parser) -> None:
    add = command.add_argument
    add("file", metavar="MATRIX", help="importance matrix, GGUF or .dat")
    add("-m", "--model", metavar="MODEL", help="its model: also tell whether it would quantize")
    add(
        "--type",
        metavar="TYPE",
        action="extend",
        nargs="+",
        default=[],
        help="what to quantize the model to (default: eleven common types, Q4_K_M to IQ1_S)",
    )
    add("--against", metavar="OTHER", help="another matrix of the model, to compare with")
    add(
        "--recipe",
        metavar="FILE",
        help="a recipe of the model: also show what each size costs, and which types the tensors "
        "get",
    )
    add(
        "-o",
        "--output",
        metavar="OUT",
        default="report.html",
        help="what to write (default: report.html)",
    )
    add("--no-pictures", action="store_true", help="tables only; needs no matplotlib")
    add_chunk_size(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    from imatrix.report.page import report_page  # here: Jinja takes a while to import

    check_output(args.output)
    page = report_page(
        args.file,
        model=args.model,
        types=args.type,
        against=args.against,
        recipe=args.recipe,
        pictures=not args.no_pictures,
        chunk_size=args.ctx_size,
    ).encode()
    with atomic.replacing(args.output) as temporary:
        temporary.write_bytes(page)
    terminal.note(f"wrote {args.output}: {size(len(page))}, loads nothing; open it in a browser")
    return OK


COMMAND = Command(
    name="report",
    help="all about a matrix on one HTML page",
    description="Write one HTML page that tells what a matrix holds, how and from what text it "
    "was collected, what is thin and, given the model, whether it would quantize. The page "
    "stands alone: it can be mailed, and read on a phone.",
    add_arguments=_add_arguments,
    files=Files(
        models=("model",), files=("file", "against", "recipe"), outputs=named_outputs("output")
    ),
    run=_run,
)
