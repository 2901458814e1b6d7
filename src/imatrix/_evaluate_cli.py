"""`imatrix evaluate`: how well a model and its head predict a text."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from rich import box
from rich.table import Table

import imatrix
from imatrix._arguments import (
    Commands,
    add_threads,
    add_verbose,
    at_least,
    chunks,
    gpu_layers,
)
from imatrix._terminal import CollectProgress, Terminal

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "evaluate",
        help="how well a model and its MTP head predict a text",
        description="Score a text with a model and its MTP head: perplexity, the head's loss, how "
        "often the trunk accepts what the head drafts and, with a reference, how far both stray "
        "from it. Take other text than the calibration's.",
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    add = command.add_argument
    add("model", metavar="MODEL", help="GGUF model; the first part of a multi-part one")
    add("-f", "--file", metavar="TEXT", required=True, help="text to score, UTF-8")
    add("--reference", metavar="REF", help="model to measure against: before quantization")
    add("--mtp-model", metavar="FILE", help="the head's own file, where it is not in MODEL")
    add("--reference-mtp-model", metavar="FILE", help="the same for REF")
    add("--no-mtp", action="store_true", help="leave the head out")
    add(
        "--depth",
        metavar="N",
        type=at_least(1),
        default=3,
        help="tokens the head drafts (default: 3)",
    )
    add(
        "-c",
        "--ctx-size",
        metavar="N",
        type=at_least(4),
        default=512,
        help="tokens a chunk (default: 512)",
    )
    add("-b", "--batch-size", metavar="N", type=at_least(1), help="tokens a decode (default: -c)")
    add(
        "-ub",
        "--ubatch-size",
        metavar="N",
        type=at_least(1),
        default=512,
        help="tokens a graph (default: 512)",
    )
    add_threads(command)
    add(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        metavar="N",
        type=gpu_layers,
        default=-1,
        help="layers on the GPU, a number, 'auto' or 'all' (default: all)",
    )
    add(
        "--chunk",
        "--from-chunk",
        metavar="N",
        type=at_least(0),
        default=0,
        help="start with chunk N of the text (default: 0)",
    )
    add("--chunks", metavar="N", type=chunks, help="chunks to score at most (default: -1, all)")
    add(
        "--parse-special",
        action="store_true",
        help="read special tokens that the text spells out as such",
    )
    add("--json", action="store_true", help="the figures as JSON")
    add_verbose(command)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command.

    Returns:
        0; a dead head is told, not an error.
    """
    with Path(args.file).open("rb"):  # now, not when the models are loaded
        text = Path(args.file)
    with CollectProgress(terminal, "evaluating", every=10) as bar:
        found = imatrix.evaluate(
            args.model,
            text,
            mtp_model=args.mtp_model,
            reference=args.reference,
            reference_mtp_model=args.reference_mtp_model,
            mtp=False if args.no_mtp else None,
            depth=args.depth,
            n_ctx=args.ctx_size,
            n_batch=args.batch_size,
            n_ubatch=args.ubatch_size,
            max_chunks=args.chunks,
            skip_chunks=args.chunk,
            parse_special=args.parse_special,
            n_gpu_layers=args.gpu_layers,
            n_threads=args.threads,
            progress=bar,
        )
    if args.json:
        json.dump(found.as_data(), sys.stdout, indent=2)
        sys.stdout.write("\n")
        sys.stdout.flush()
    else:
        _render(found, terminal)
    if found.verdict is not None:
        terminal.warn(found.verdict)
    return 0


def _render(found: imatrix.Evaluation, terminal: Terminal) -> None:
    out = terminal.out
    out.print(
        f"{found.model}: {len(found.chunk)} positions of {found.n_chunks} chunk(s) of "
        f"{found.n_ctx} tokens",
        markup=False,
        soft_wrap=True,
    )
    if found.reference is not None:
        out.print(f"against {found.reference}", markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "value", "± error", "95 % interval", "positions"):
        table.add_column(name, justify="left" if name == "" else "right")

    def add(name: str, figure: imatrix.Estimate | None, share: bool = False) -> None:
        if figure is None:
            return
        told = [
            "-" if math.isnan(v) else f"{100 * v:.2f} %" if share else f"{v:.5f}"
            for v in (figure.value, figure.error, figure.low, figure.high)
        ]
        interval = "-" if told[2] == "-" else f"{told[2]} to {told[3]}"
        table.add_row(name, told[0], told[1], interval, str(figure.n))

    add("trunk: perplexity", found.perplexity)
    add("trunk: NLL (nats)", found.nll)
    add("trunk: KL to the reference", found.kl)
    add("trunk: same top token", found.top1, share=True)
    add("head: NLL (nats)", found.head_nll)
    add("head: KL to the reference's", found.head_kl)
    add("head: same top token", found.head_top1, share=True)
    for depth, agreement in enumerate(found.draft, 1):
        add(f"draft: agreement at depth {depth}", agreement, share=True)
    add("draft: accepted tokens", found.accepted_length)
    out.print(table)
