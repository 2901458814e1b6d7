"""`imatrix extract-mtp`: take the head out of a bundled model, into a file of its own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import imatrix
from imatrix.cli.command import Command
from imatrix.cli.flags import hub
from imatrix.cli.flags.common import add_verbose
from imatrix.cli.outputs import Files
from imatrix.cli.progress import StepProgress, describe_bytes
from imatrix.cli.status import OK
from imatrix.cli.terminal import Terminal
from imatrix.files.outputs import Output
from imatrix.words import size

__all__ = ["COMMAND"]


def _add_arguments(command: hub.Parser) -> None:
    command.add_argument("model", metavar="MODEL", help="GGUF model with a head")
    hub.add_to_positional(command)
    command.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="the head's file, or a folder for it (default: mtp-<name>.gguf beside MODEL, here for "
        "one from the Hub)",
    )
    command.add_argument("--trunk-out", metavar="TRUNK", help="write the rest as well")
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    # beside the model, but not among the files of the Hub's cache
    folder = "." if hub.is_hub(args.model) else str(Path(args.model).parent)
    args.model, _ = hub.fetch(args.model, args, terminal)
    out = args.output or folder
    with StepProgress(terminal, "extracting", describe_bytes) as bar:
        report = imatrix.extract_mtp(args.model, out, trunk_out=args.trunk_out, progress=bar)
    terminal.note(
        f"wrote {report.head}: {size(report.head_bytes)}, {report.n_nextn} head block(s) from "
        f"block {report.n_trunk} on"
    )
    if report.trunk is not None and report.trunk_bytes is not None:
        terminal.note(f"wrote {report.trunk}: {size(report.trunk_bytes)}, {report.n_trunk} blocks")
    shared = ", ".join(report.shared)
    terminal.note(
        f"the split form costs {report.shared_bytes} bytes ({size(report.shared_bytes)}): {shared} "
        "are in both files"
    )
    return OK


def _outputs(args: argparse.Namespace) -> Iterator[Output]:
    from imatrix.heads.extract import mtp_name  # here: it needs the native part

    folder = Path(args.model).parent if args.output is None else Path(args.output)
    yield Output(str(folder / mtp_name(args.model) if folder.is_dir() else folder))
    if args.trunk_out is not None:
        yield Output(args.trunk_out)


COMMAND = Command(
    name="extract-mtp",
    help="take the head out of a bundled model, into a file of its own",
    add_arguments=_add_arguments,
    files=Files(models=("model",), outputs=_outputs),
    run=_run,
)
