"""`imatrix show`: what an importance matrix holds, as tables or as plain data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from rich import box
from rich.table import Table

from imatrix.cli.command import Command
from imatrix.cli.data import write_json
from imatrix.cli.flags.common import add_verbose
from imatrix.cli.flags.hub import Parser
from imatrix.cli.outputs import Files
from imatrix.cli.status import OK
from imatrix.cli.terminal import Console, Terminal, Text
from imatrix.formats import Format, detected
from imatrix.matrix.experts import describe_experts, experts
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.matrix.summary import (
    Line,
    as_data,
    describe_left_out,
    describe_sources,
    describe_unused,
    describe_weights,
    lines,
)
from imatrix.words import plural, ranged

__all__ = ["COMMAND", "render"]

_FORMATS: Mapping[Format, str] = {"gguf": "GGUF", "dat": ".dat"}

_LEGEND = (
    "mean: squared activation of a channel, on average; peak: the strongest channel / the mean"
)


def _add_arguments(command: Parser) -> None:
    command.add_argument("file", metavar="FILE", help="importance matrix")
    command.add_argument(
        "--all", action="store_true", help="every weight by itself, not one line a kind"
    )
    command.add_argument("--json", action="store_true", help="as JSON, every weight")
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    matrix = ImportanceMatrix.load(args.file)
    form = detected(args.file)
    if args.json:
        write_json(as_data(matrix, args.file, form))
    else:
        render(terminal.out, matrix, args.file, form, every_weight=args.all)
    return OK


def render(
    console: Console,
    matrix: ImportanceMatrix,
    file: str,
    form: Format = "gguf",
    *,
    every_weight: bool = False,
) -> None:
    """Print a summary, then the trunk's and the head's weights in tables."""
    title = Text(file, "bold") + Text(
        f": {_FORMATS[form]} importance matrix, {describe_weights(matrix)}"
    )
    console.print(title, soft_wrap=True)
    for label, text in _facts(matrix).items():
        console.print(Text(f"  {label:<10} ", "dim") + Text(text), soft_wrap=True)
    parts: Mapping[str, ImportanceMatrix] = {"trunk": matrix.trunk, "head": matrix.head}
    for heading, part in parts.items():
        if part:
            console.print()
            console.print(_table(heading, lines(part, every_weight=every_weight)))
    console.print(Text(_LEGEND, "dim"))


def _facts(matrix: ImportanceMatrix) -> dict[str, str]:
    facts = {}
    if matrix.chunk_count:
        text = plural(matrix.chunk_count, "chunk")
        made = matrix.provenance
        if made is not None and made.packing == "document":
            text += f" of up to {matrix.chunk_size} tokens, no document beside another"
            text += "" if made.tokens is None else f"; {plural(made.tokens, 'token')}"
        elif matrix.chunk_size:
            text += f" of {matrix.chunk_size} tokens"
        facts["collected"] = text
    made = matrix.provenance
    if made is not None:
        by = ", ".join(part for part in (made.collector, made.engine) if part)
        if by:
            facts["by"] = by
    if made is not None and len(made.sources) > 1:
        facts["text"] = describe_sources(made.sources)
    elif matrix.datasets:
        facts["text"] = ", ".join(matrix.datasets)
    if made is not None and made.dataset_digest:
        facts["tokens"] = f"SHA-256 {made.dataset_digest[:16]}..."
    if made is not None and made.left_out:
        facts["left out"] = describe_left_out(made.left_out)
    if made is not None and (unused := describe_unused(made.sources)):
        facts["not used"] = unused
    if rows := describe_experts(experts(matrix)):
        facts["experts"] = rows
    if signed := sum(entry.signed_sums is not None for entry in matrix.values()):
        of = "all weights" if signed == len(matrix) else f"{signed} of {len(matrix)} weights"
        facts["signed"] = f"sums of the activations themselves, of {of}"
    return facts


def _table(part: str, found: list[Line]) -> Table:
    several = any(line.n_weights > 1 for line in found)
    gaps = any(line.unseen for line in found)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(part, no_wrap=True, overflow="ellipsis", min_width=24)
    if several:
        table.add_column("weights", justify="right")
    for heading in ("n_in", "n_mat", "rows", *(["no rows"] if gaps else []), "mean", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in found:
        table.add_row(
            Text(line.name),
            *([str(line.n_weights)] if several else []),
            ranged(line.n_in),
            ranged(line.n_mat),
            ranged(line.rows),
            *([Text(str(line.unseen or ""), "yellow")] if gaps else []),
            "" if line.mean is None else f"{line.mean:.4g}",
            "" if line.peak is None else f"{line.peak:.1f}",
        )
    return table


COMMAND = Command(
    name="show",
    help="what an importance matrix holds, the head apart",
    add_arguments=_add_arguments,
    files=Files(files=("file",)),
    run=_run,
)
