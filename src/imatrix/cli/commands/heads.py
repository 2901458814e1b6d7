"""TODO."""

from __future__ import annotations

import argparse
from pathlib import Path

import imatrix
from imatrix.cli.flags import hub
from imatrix.cli.flags.common import Commands, add_verbose
from imatrix.cli.outputs import check_output
from imatrix.cli.signals import OK
from imatrix.cli.terminal import StepProgress, Terminal, describe_bytes
from imatrix.words import size


def _extract(args: argparse.Namespace, terminal: Terminal) -> int:
    # beside the model, but not among the files of the Hub's cache
    folder = "." if hub.is_hub(args.model) else str(Path(args.model).parent)
    args.model, _ = hub.fetched(args.model, args, terminal)
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


def _graft(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.output)
    args.trunk, _ = hub.fetched(args.trunk, args, terminal)
    args.mtp_model, _ = hub.fetched(args.mtp_model, args, terminal, first=False)
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


def _drop(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.output)
    args.model, _ = hub.fetched(args.model, args, terminal)
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


def add_mtp_files(commands: Commands) -> None:
    extract = commands.add_parser(
        "extract-mtp",
        help="take the head out of a bundled model, into a file of its own",
        allow_abbrev=False,
    )
    extract.set_defaults(run=_extract)
    extract.add_argument("model", metavar="MODEL", help="GGUF model with a head")
    hub.add_to_positional(extract)
    extract.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="the head's file, or a folder for it (default: mtp-<name>.gguf beside MODEL, here for "
        "one from the Hub)",
    )
    extract.add_argument("--trunk-out", metavar="TRUNK", help="write the rest as well")
    add_verbose(extract)
    graft = commands.add_parser(
        "graft-mtp", help="put a head into a trunk, one bundled model", allow_abbrev=False
    )
    graft.set_defaults(run=_graft)
    graft.add_argument("trunk", metavar="TRUNK", help="GGUF model without a head")
    hub.add_to_positional(graft)
    graft.add_argument("mtp_model", metavar="MTP", help="the head's file, or a bundled model")
    graft.add_argument("-o", "--output", metavar="OUT", required=True, help="what to write")
    add_verbose(graft)
    drop = commands.add_parser(
        "drop-mtp",
        help="write a model without its head, or without the claim of one that it lacks",
        allow_abbrev=False,
    )
    drop.set_defaults(run=_drop)
    drop.add_argument("model", metavar="MODEL", help="GGUF model")
    hub.add_to_positional(drop)
    drop.add_argument("-o", "--output", metavar="OUT", required=True, help="what to write")
    add_verbose(drop)
