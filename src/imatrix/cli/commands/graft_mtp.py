"""`imatrix graft-mtp`: put a head into a trunk, one bundled model."""

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
    command.add_argument("trunk", metavar="TRUNK", help="GGUF model without a head")
    hub.add_to_positional(command)
    command.add_argument("mtp_model", metavar="MTP", help="the head's file, or a bundled model")
    add_output(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.output)
    args.trunk, _ = hub.fetch(args.trunk, args, terminal)
    args.mtp_model, _ = hub.fetch(args.mtp_model, args, terminal, first=False)
    with StepProgress(terminal, "grafting", describe_bytes) as bar:
        report = imatrix.graft_mtp(args.trunk, args.mtp_model, args.output, progress=bar)
    terminal.note(
        f"wrote {report.model}: {size(report.model_bytes)}, {report.n_trunk} trunk and "
        f"{report.n_nextn} head block(s)"
    )
    terminal.note(
        f"{report.shared_bytes} bytes ({size(report.shared_bytes)}) less than the two files: "
        f"{', '.join(report.shared)} are in it once"
    )
    return OK


COMMAND = Command(
    name="graft-mtp",
    help="put a head into a trunk, one bundled model",
    add_arguments=_add_arguments,
    files=Files(models=("trunk", "mtp_model"), outputs=named_outputs("output")),
    run=_run,
)
