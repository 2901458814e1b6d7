"""`imatrix check`: what a quantization would do, before it is done."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich import box
from rich.table import Table

from imatrix.cli.command import Command
from imatrix.cli.coverages import as_data
from imatrix.cli.data import write_json
from imatrix.cli.flags import hub, quantizing, tensor_types
from imatrix.cli.flags.common import add_verbose
from imatrix.cli.outputs import Files
from imatrix.cli.terminal import Console, Terminal, Text
from imatrix.collect.collector import Collector
from imatrix.engine.plan import Plan
from imatrix.entries import THIN
from imatrix.errors import ModelError
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.quantization.coverage import Coverage, coverage, describe_stop
from imatrix.quantization.verdicts import TensorCoverage
from imatrix.words import plural, size

__all__ = ["COMMAND"]

READY, WOULD_FAIL = 0, 1

_ROWS = 12  # of a table, unless all are asked for


def _add_arguments(command: hub.Parser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="GGUF model; the first part of a multi-part one")
    add("imatrix", metavar="IMATRIX", nargs="?", help="importance matrix (default: none)")
    hub.add_to_positional(command)
    add(
        "--type",
        metavar="TYPE",
        help="what to quantize to: IQ2_XXS, Q4_K_M, ...; may be left out with --recipe",
    )
    quantizing.add_arguments(command)
    add(
        "--plan",
        action="store_true",
        help="load the model too, to tell which weights no text can reach",
    )
    add("--all", action="store_true", help="every row of every table")
    add("--json", action="store_true", help="as JSON, every tensor")
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    if args.type is None and args.recipe is None:
        raise ValueError("the following arguments are required: --type, or --recipe")
    matrix = None if args.imatrix is None else ImportanceMatrix.load(args.imatrix)
    options = quantizing.options(args)
    args.model, _ = hub.fetch(args.model, args, terminal)
    plan = _plan(args.model) if args.plan else None
    found = coverage(
        args.model,
        matrix,
        args.type,
        **options,
        plan=plan,
        matrix_name=args.imatrix,
    )
    for text in found.warnings:
        terminal.warn(text)
    if args.json:
        write_json(as_data(found, args.imatrix))
    else:
        _render(terminal.out, found, args.imatrix, plan=plan, limit=None if args.all else _ROWS)
    return READY if found.ready else WOULD_FAIL


def _plan(model: str) -> Plan:
    """What a run would collect, with the head if the engine can run it."""
    with Collector(model) as collector:
        if collector.n_nextn:
            try:
                return collector.plan(mtp=True)
            except ModelError:
                pass  # `coverage` tells why
        return collector.plan()


def _render(
    console: Console,
    found: Coverage,
    imatrix: str | None,
    *,
    plan: Plan | None = None,
    limit: int | None = _ROWS,
) -> None:
    """Print the verdict, a summary of trunk and head, what is wrong, and what to do.

    Args:
        limit: rows of a table at most; None for all.
    """
    _verdict(console, found)
    console.print(_summary(found))
    unused_types = _unused_types(found)
    without = [t for t in found.without_data if t.uses_data]
    _table(console, "would stop the quantizer", [_stop(t, found) for t in found.failing], limit)
    if found.has_matrix:
        _table(
            console,
            "quantized without data",
            [(t.name, t.target_type, t.detail) for t in without],
            limit,
        )
        if unused_types:
            console.print(Text(f"  ({unused_types})", "dim"), soft_wrap=True)
    elif without:
        console.print()
        console.print(
            f"without a matrix all of it is quantized without data: {_counted(without)}",
            soft_wrap=True,
        )
    _partial(console, found, limit)
    _table(
        console,
        "entries of the matrix that belong to no tensor",
        [(name,) for name in found.unused],
        limit,
    )
    if plan is not None:
        _reach(console, found, limit)
    for number, fix in enumerate(found.fixes, 1):
        words, _, paste = fix.partition("\n")
        if number == 1:
            console.print()
        console.print(Text(f"{number}. ", "bold") + Text(words), soft_wrap=True)
        for line in paste.split("\n") if paste else ():
            console.print(f"   {line}", soft_wrap=True)


def _verdict(console: Console, found: Coverage) -> None:
    becomes = (
        f"{found.model} ({found.architecture}) -> {found.ftype}: {size(found.source_bytes)} -> "
        f"{size(found.target_bytes)}, {found.bits_per_weight:.2f} bits per weight"
    )
    if found.ready:
        notes = [
            f"{len([t for t in found.without_data if t.uses_data])} without data",
            f"{len(found.partial)} with partial data",
        ]
        gaps = ", ".join(note for note in notes if not note.startswith("0 "))
        console.print(
            Text("ready", "bold green") + Text(f": {gaps}" if gaps else ""), soft_wrap=True
        )
    else:
        first = found.failing[0]
        heads = sum(tensor.in_head for tensor in found.failing)
        where = {0: "in the trunk", len(found.failing): "in the head"}.get(
            heads, f"{heads} of them in the head"
        )
        why = _stop(first, found)[2]
        if first.status == "missing":
            why = f"{first.target_type} needs importance data: {why}"
        console.print(
            Text("would fail", "bold red") + Text(f" at {first.name}: {why}"), soft_wrap=True
        )
        console.print(f"{plural(len(found.failing), 'tensor')} would fail, {where}", soft_wrap=True)
    console.print(Text(becomes, "dim"), soft_wrap=True)
    console.print()


def _stop(tensor: TensorCoverage, found: Coverage) -> tuple[str, str, str]:
    """(name, type, why) of a tensor that stops the quantizer."""
    return (
        tensor.name,
        f"{tensor.source_type} -> {tensor.target_type}",
        describe_stop(tensor, found),
    )


def _summary(found: Coverage) -> Table:
    """A line a type, trunk and head apart."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("", "type"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tensors", "size", "with data", "partial", "without", "would fail"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part, tensors in (("trunk", found.trunk), ("head", found.head)):
        for kept in (False, True):
            kinds: dict[str, list[TensorCoverage]] = {}
            for tensor in tensors:
                if (tensor.status == "kept") == kept:
                    kinds.setdefault(tensor.target_type, []).append(tensor)
            for kind, those in sorted(kinds.items(), key=lambda item: -_bytes(item[1])):
                states = [tensor.status for tensor in those]
                failing = len([t for t in those if t in found.failing])
                table.add_row(
                    part,
                    kind + (" (kept)" if kept else ""),
                    str(len(those)),
                    size(_bytes(those)),
                    *(
                        str(states.count(status) or "")
                        for status in ("ready", "partial", "without data")
                    ),
                    Text(str(failing or ""), "red"),
                )
                part = ""
    return table


def _bytes(tensors: Sequence[TensorCoverage]) -> int:
    return sum(tensor.target_bytes for tensor in tensors)


def _partial(console: Console, found: Coverage, limit: int | None) -> None:
    rows = []
    for t in sorted(found.partial, key=lambda t: (-t.n_empty / t.n_counts, -t.n_thin)):
        share = f"{t.n_empty} of {t.n_counts} ({100 * t.n_empty / t.n_counts:.0f} %)"
        least = "" if t.thinnest is None else f"expert {t.thinnest[0]}: {t.thinnest[1]}"
        if t.n_counts == 1 and t.thinnest is not None:
            least = str(t.thinnest[1])
        rows.append((t.name, t.target_type, share if t.n_empty else "", str(t.n_thin or ""), least))
    headings = ("type", "no rows", f"under {THIN} rows", "fewest rows")
    _table(console, "partial data", rows, limit, headings)


def _reach(console: Console, found: Coverage, limit: int | None) -> None:
    """What a run could collect of what would be quantized."""
    wanted = [t for t in found.tensors if t.status != "kept"]
    never = [t for t in wanted if t.collectable is False]
    console.print()
    console.print(
        f"a run would collect {len([t for t in wanted if t.collectable])} of the "
        f"{len(wanted)} tensors that are quantized",
        soft_wrap=True,
    )
    _table(
        console, "never: no graph multiplies them", [(t.name, t.target_type) for t in never], limit
    )


def _unused_types(found: Coverage) -> str:
    idle = [t for t in found.without_data if not t.uses_data]
    return f"and {_counted(idle)}, which use none" if idle else ""


def _counted(tensors: Sequence[TensorCoverage]) -> str:
    """ "3 q8_0, 1 f16"."""
    kinds: dict[str, int] = {}
    for tensor in tensors:
        kinds[tensor.target_type] = kinds.get(tensor.target_type, 0) + 1
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: -item[1]))


def _table(
    console: Console,
    title: str,
    rows: Sequence[tuple[str, ...]],
    limit: int | None,
    headings: Sequence[str] = (),
) -> None:
    """A table under a title; nothing without rows."""
    if not rows:
        return
    shown = rows if limit is None else rows[:limit]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(f"{title}: {len(rows)}", no_wrap=True, overflow="ellipsis")
    for column in range(1, len(rows[0])):
        table.add_column(headings[column - 1] if headings else "", overflow="fold")
    for row in shown:
        table.add_row(*(Text(cell) for cell in row))
    console.print()
    console.print(table)
    if len(rows) > len(shown):
        console.print(Text(f"... and {len(rows) - len(shown)} more (--all)", "dim"))


COMMAND = Command(
    name="check",
    help="would this model, with this matrix, quantize to that type?",
    description="Tell what a quantization would do to every tensor, without doing it: which "
    "tensors stop it, which are quantized without data, and what to do about them. Exit "
    "status: 0 ready, 1 it would fail, 2 wrong usage or bad input.",
    add_arguments=_add_arguments,
    files=Files(models=("model",), files=("imatrix", "recipe"), reads=tensor_types.rule_files),
    run=_run,
)
