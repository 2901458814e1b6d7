"""`imatrix evaluate`: how well a model and its head predict a text."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import imatrix
from imatrix.cli.command import Command
from imatrix.cli.data import write_json
from imatrix.cli.flags import hub, placement, sources
from imatrix.cli.flags.common import (
    add_isolate,
    add_parse_special,
    add_skipped_chunks,
    add_threads,
    add_verbose,
)
from imatrix.cli.flags.values import at_least, chunks
from imatrix.cli.outputs import Files
from imatrix.cli.progress import CollectProgress
from imatrix.cli.status import OK
from imatrix.cli.terminal import Terminal

__all__ = ["COMMAND"]


def _add_arguments(command: hub.Parser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="GGUF model; the first part of a multi-part one")
    hub.add_to_positional(command)
    sources.add_arguments(command, kind="text to score", required=True)
    add("--reference", metavar="REF", help="model to measure against: before quantization")
    add("--mtp-model", metavar="FILE", help="the head's own file, where it is not in MODEL")
    add("--reference-mtp-model", metavar="FILE", help="the same for REF")
    add(
        "--against",
        metavar="OTHER",
        action="append",
        default=[],
        help="compare MODEL with this one, position by position of the same text; may be repeated",
    )
    add(
        "--against-mtp-model",
        metavar="FILE",
        action="append",
        default=[],
        help="the head's own file of each OTHER, in their order",
    )
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
        help="tokens a graph (default: 512; all of -c, of a model whose tokens see those after "
        "them)",
    )
    add_threads(command)
    add_isolate(command)
    placement.add_arguments(command)
    add_skipped_chunks(command)
    add("--chunks", metavar="N", type=chunks, help="chunks to score at most (default: -1, all)")
    add_parse_special(command)
    add("--json", action="store_true", help="the figures as JSON")
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    if args.against_mtp_model and len(args.against_mtp_model) != len(args.against):
        raise ValueError(
            f"{len(args.against)} models in --against, but {len(args.against_mtp_model)} files in "
            "--against-mtp-model: give one for each, in the same order, or none"
        )
    # now, not when the models are loaded
    text = sources.texts(args, again=bool(args.against))
    if text is None:
        raise ValueError("-p: there is no text in it to score")
    text_arguments = sources.run_arguments(args)
    _fetch(args, terminal)
    for path in (args.model, *args.against):  # nor when the first of them is done
        with Path(path).open("rb"):
            pass

    placement.use_servers(args, isolate=args.isolate)
    placed = placement.arguments(args)
    placement.warn_of_no_device(
        args,
        terminal,
        # with --isolate the servers of --rpc are not among this process's devices
        lambda: args.rpc is not None or any(each.gpu for each in imatrix.backends().devices),
    )

    def evaluated(model: str, mtp_model: str | None) -> imatrix.Evaluation:
        name = f"evaluating {Path(model).name}" if args.against else "evaluating"
        with CollectProgress(terminal, name, every=10) as bar:
            return imatrix.evaluate(
                model,
                text,
                mtp_model=mtp_model,
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
                **text_arguments,
                **placed,
                n_threads=args.threads,
                isolate=args.isolate,
                progress=bar,
            )

    found = evaluated(args.model, args.mtp_model)
    others = [evaluated(*other) for other in zip(args.against, args.against_mtp_model, strict=True)]
    differences = [found.compare(other) for other in others]
    if args.json:
        data = found.as_data()
        if others:
            data["against"] = [
                {**other.as_data(), "difference": difference.as_data()}
                for other, difference in zip(others, differences, strict=True)
            ]
        write_json(data)
    else:
        for one in (found, *others):
            _render(one, terminal)
        for other, difference in zip(others, differences, strict=True):
            _render_difference(found, other, difference, terminal)
    for one in (found, *others):
        if one.verdict is not None:
            # a dead head is no error
            terminal.warn(f"{one.model}: {one.verdict}" if others else one.verdict)
    return OK


def _fetch(args: argparse.Namespace, terminal: Terminal) -> None:
    """Fetch the models that the Hub has, with the heads beside them."""

    def fetched(
        model: str, mtp_model: str | None, *, first: bool = False
    ) -> tuple[str, str | None]:
        head = not args.no_mtp and mtp_model is None
        path, beside = hub.fetch(model, args, terminal, first=first, head=head)
        return path, mtp_model if beside is None else beside

    args.model, args.mtp_model = fetched(args.model, args.mtp_model, first=True)
    if args.reference is not None:
        args.reference, args.reference_mtp_model = fetched(args.reference, args.reference_mtp_model)
    heads = args.against_mtp_model or [None] * len(args.against)
    pairs = [fetched(*other) for other in zip(args.against, heads, strict=True)]
    args.against = [path for path, _ in pairs]
    args.against_mtp_model = [head for _, head in pairs]


def _render(found: imatrix.Evaluation, terminal: Terminal) -> None:
    out = terminal.out
    out.print(
        f"{found.model}: {len(found.chunk)} positions of {found.n_chunks} chunk(s) of "
        f"{found.n_ctx} tokens",
        soft_wrap=True,
    )
    if found.reference is not None:
        out.print(f"reference: {found.reference}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "value", "± error", "95 % interval", "positions"):
        table.add_column(name, justify="left" if name == "" else "right")

    def add(name: str, figure: imatrix.Estimate | None, share: bool = False) -> None:
        if figure is None:
            return
        texts = [
            "-" if math.isnan(v) else f"{100 * v:.2f} %" if share else f"{v:.5f}"
            for v in (figure.value, figure.error, figure.low, figure.high)
        ]
        interval = "-" if texts[2] == "-" else f"{texts[2]} to {texts[3]}"
        table.add_row(name, texts[0], texts[1], interval, str(figure.n))

    add("trunk: perplexity", found.perplexity)
    for name, figure, share in _figures(found):
        add(name, figure, share)
    out.print(table)
    if not found.causal:
        terminal.warn(
            f"{found.model}: its tokens see those after them, so that it has seen the tokens that "
            "NLL and perplexity are about: only what is said of it against a reference counts"
        )


def _render_difference(
    found: imatrix.Evaluation,
    other: imatrix.Evaluation,
    difference: imatrix.Comparison,
    terminal: Terminal,
) -> None:
    out = terminal.out
    out.print(f"{_named(found)} minus {_named(other)}", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "difference", "95 % interval"):
        table.add_column(name, justify="left" if name == "" else "right")
    table.add_column("the first is")

    def add(name: str, figure: imatrix.Difference | None, points: bool = False) -> None:
        if figure is None:
            return
        value, low, high = (
            f"{100 * v:+.2f}" if points else f"{v:+.5f}"
            for v in (figure.value, figure.low, figure.high)
        )
        interval = "-" if math.isnan(figure.low) else f"{low} to {high}"
        name += " (percentage points)" if points else ""
        table.add_row(name, value, interval, figure.verdict)

    for name, figure, points in _figures(difference):
        add(name, figure, points)
    out.print(table)


def _figures(
    found: imatrix.Evaluation | imatrix.Comparison,
) -> Iterator[tuple[str, Any, bool]]:
    """What both have, in the order of a table: name, figure, whether it is a share."""
    yield "trunk: NLL (nats)", found.nll, False
    yield "trunk: KL to the reference", found.kl, False
    yield "trunk: same top token", found.top1, True
    yield "head: NLL (nats)", found.head_nll, False
    yield "head: KL to the reference's", found.head_kl, False
    yield "head: same top token", found.head_top1, True
    for depth, agreement in enumerate(found.draft, 1):
        yield f"draft: agreement at depth {depth}", agreement, True
    yield "draft: accepted tokens", found.accepted_length, False


def _named(found: imatrix.Evaluation) -> str:
    return found.model if found.mtp_model is None else f"{found.model} with {found.mtp_model}"


COMMAND = Command(
    name="evaluate",
    help="how well a model and its MTP head predict a text",
    description="Score a text with a model and its MTP head: perplexity, the head's loss, how "
    "often the trunk accepts what the head drafts and, with a reference, how far both stray "
    "from it. With --against, score other models on the same text and say which is better. "
    "Take other text than the calibration's.",
    add_arguments=_add_arguments,
    files=Files(
        models=(
            *("model", "mtp_model", "reference", "reference_mtp_model"),
            *("against", "against_mtp_model"),
        ),
        texts=("file",),
        files=("chat_template_file", "chat_tools"),
    ),
    run=_run,
)
