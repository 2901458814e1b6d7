"""`imatrix drop-mtp`: a model without its head, or without the claim of one that it lacks."""

from __future__ import annotations

import argparse

import imatrix
from imatrix.cli.command import Command
from imatrix.cli.flags import hub
from imatrix.cli.flags.common import add_output, add_verbose
from imatrix.cli.outputs import Files, check_output, named_outputs
from imatrix.cli.progress import StepProgress, describe_bytes
from imatrix.cli.status import OK
from imatrix.cli.terminal import Terminal
from imatrix.words import size

__all__ = ["COMMAND"]


def _add_arguments(command: hub.Parser) -> None:
    command.add_argument("model", metavar="MODEL", help="GGUF model")
    hub.add_to_positional(command)
    add_output(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.output)
    args.model, _ = hub.fetch(args.model, args, terminal)
    with StepProgress(terminal, "writing", describe_bytes) as bar:
        report = imatrix.drop_mtp(args.model, args.output, progress=bar)
    what = (
        f"without {len(report.dropped)} tensor(s) of the head"
        if report.dropped
        else "with all tensors, without the claim of a head"
    )
    terminal.note(
        f"wrote {report.model}: {size(report.model_bytes)}, {report.n_trunk} trunk blocks, {what}"
    )
    return OK


COMMAND = Command(
    name="drop-mtp",
    help="write a model without its head, or without the claim of one that it lacks",
    add_arguments=_add_arguments,
    files=Files(models=("model",), outputs=named_outputs("output")),
    run=_run,
)
