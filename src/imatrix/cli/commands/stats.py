"""`imatrix stats`: llama-imatrix's --show-statistics, trunk and head apart; with --legacy the one
that llama.cpp had before 0.6.0."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from imatrix.cli.command import Command
from imatrix.cli.data import write_csv, write_json
from imatrix.cli.flags.common import add_verbose
from imatrix.cli.flags.hub import Parser
from imatrix.cli.flags.matrices import add_chunk_size
from imatrix.cli.flags.values import at_least
from imatrix.cli.outputs import Files
from imatrix.cli.stats_tables import (
    EXPERTS,
    FIELDS,
    LAYERS,
    LEGACY_LAYERS,
    LEGACY_LEGEND,
    LEGACY_WEIGHTS,
    LEGEND,
    MEANS,
    UNSIGNED,
    WEIGHTS,
    choose_rows,
    find_sort_key,
    print_table,
)
from imatrix.cli.status import OK
from imatrix.cli.terminal import Console, Terminal, Text
from imatrix.entries import Part
from imatrix.formats import detected
from imatrix.matrix.activations import (
    LayerActivations,
    MatrixActivations,
    activation_statistics,
)
from imatrix.matrix.experts import describe_experts
from imatrix.matrix.experts import experts as expert_coverage
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.matrix.statistics import (
    LayerStatistics,
    PartStatistics,
    Statistics,
    expert_statistics,
    statistics,
)
from imatrix.matrix.summary import describe_weights
from imatrix.matrix.weight_activations import ActivationStatistics
from imatrix.matrix.weight_statistics import ExpertStatistics, WeightStatistics
from imatrix.words import plural

__all__ = ["COMMAND"]

_Row = TypeVar("_Row")

_PARTS: tuple[Part, Part] = ("trunk", "head")


def _add_arguments(command: Parser) -> None:
    add = command.add_argument
    add("file", metavar="MATRIX", help="importance matrix, GGUF or .dat")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--layers", action="store_true", help="the layers only")
    what.add_argument(
        "--experts",
        action="store_true",
        help="a line an expert instead, fewest rows first, with the columns of --legacy",
    )
    add(
        "--legacy",
        action="store_true",
        help="the columns that llama-imatrix had before: Min, Max, %% Active, ZD and others, all "
        "of the squared activations",
    )
    add("--part", choices=_PARTS, help="the trunk only, or the head only")
    add(
        "--sort",
        metavar="COLUMN",
        help="by this column: a heading or a field's name in --json; numbers the largest first "
        "(default: as llama-imatrix, by layer and name; with --legacy by tensor, then the largest "
        "Σ(Act²))",
    )
    add("--reverse", action="store_true", help="the order turned round")
    add("--top", metavar="N", type=at_least(1), help="the first N lines, of trunk and head each")
    add(
        "--exact",
        action="store_true",
        help="compute in float64 throughout; llama-imatrix rounds to float32, and so does this by "
        "default",
    )
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON: weights, layers and parts")
    form.add_argument(
        "--csv", action="store_true", help="as CSV: the weights, or the layers or experts"
    )
    add_chunk_size(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    legacy = args.legacy or args.experts
    kind: type = WeightStatistics if legacy else ActivationStatistics
    if args.experts:
        kind = ExpertStatistics
    elif args.layers:
        kind = LayerStatistics if legacy else LayerActivations
    key = None if args.sort is None else find_sort_key(args.sort, kind)
    matrix = ImportanceMatrix.load(args.file, chunk_size=args.ctx_size)

    def chosen(rows: Sequence[_Row]) -> list[_Row]:
        return choose_rows(rows, key, reverse=args.reverse, top=args.top)

    parts: tuple[Part, ...] = (args.part,) if args.part else _PARTS
    experts = sorted(expert_statistics(matrix), key=lambda each: each.rows) if args.experts else []
    old = statistics(matrix, exact=args.exact) if legacy else None
    new = None if legacy else activation_statistics(matrix, exact=args.exact)
    if args.json or args.csv:
        head = set(matrix.head)
        # one list of both parts, which `part` tells apart
        data: dict[str, Any] = {
            "file": args.file,
            "format": detected(args.file),
            "exact": args.exact,
            "legacy": legacy,
            "head_blocks": sorted(matrix.head_blocks),
        }
        if old is not None:
            data["parts"] = [each for each in old.parts if each.part in parts]
        found: Any = old or new
        data["layers"] = [each for each in found.layers if each.part in parts]
        data["weights"] = [each for each in found.weights if each.part in parts]
        for field_name in ("without_rows", *(["without_signed_sums"] if new is not None else [])):
            data[field_name] = [
                name
                for name in getattr(found, field_name)
                if ("head" if name in head else "trunk") in parts
            ]
        name = "experts" if args.experts else "layers" if args.layers else "weights"
        if args.experts:
            data["experts"] = [each for each in experts if each.part in parts]
        data[name] = chosen(data[name])
        if args.csv:
            write_csv(
                FIELDS[kind], [[getattr(row, key) for key in FIELDS[kind]] for row in data[name]]
            )
        else:
            write_json(_plain(data), allow_nan=False)
    else:
        out = terminal.out
        title = f": {describe_weights(matrix)}; {_collected(matrix)}"
        out.print(Text(args.file, "bold") + Text(title), soft_wrap=True)
        for part in parts:
            of_part = matrix.trunk if part == "trunk" else matrix.head
            if old is not None:
                one = old.trunk if part == "trunk" else old.head
                _print_legacy_part(out, one, part, of_part, args, chosen)
            elif new is not None:
                _print_part(out, new.part(part), part, of_part, args, chosen)
            if args.experts:
                print_table(out, EXPERTS, chosen([e for e in experts if e.part == part]), keys=3)
        out.print()
        out.print(Text(LEGACY_LEGEND if legacy else LEGEND, "dim"))
    return OK


def _print_part(
    out: Console,
    found: MatrixActivations,
    part: Part,
    matrix: ImportanceMatrix,
    args: argparse.Namespace,
    chosen: Callable[[Sequence[Any]], list[Any]],
) -> None:
    """A part's heading and facts, and its tables."""
    out.print()
    if not matrix:
        out.print(Text(part, "bold") + Text(": no weights"))
        return
    summary = f": {len(matrix)} weights, none saw a row"
    if found.weights:
        elements = sum(each.elements for each in found.weights)
        summary = f": {plural(len(found.weights), 'weight')}, N {elements}"
    out.print(Text(part, "bold") + Text(summary), soft_wrap=True)
    if experts := describe_experts(expert_coverage(matrix)):
        out.print(f"  experts: {experts}", markup=False, soft_wrap=True)
    for heading, names in (
        ("without rows: ", [name for name in found.without_rows if name in matrix]),
        (UNSIGNED, [each.name for each in found.weights if not each.signed]),
    ):
        if names:
            all_of_them = heading == UNSIGNED and len(names) == len(found.weights) > 3
            listed = "all weights" if all_of_them else ", ".join(names)
            out.print(Text(f"  {heading}", "yellow") + Text(listed), soft_wrap=True)
    if not args.layers:
        print_table(out, WEIGHTS, chosen(found.weights), keys=2)
    layers = chosen(found.layers) if args.layers else found.layers
    print_table(out, LAYERS, layers, keys=1)


def _collected(matrix: ImportanceMatrix) -> str:
    text = plural(matrix.chunk_count, "chunk")
    return f"{text} of {matrix.chunk_size} tokens" if matrix.chunk_size else text


def _print_legacy_part(
    out: Console,
    found: Statistics,
    part: Part,
    matrix: ImportanceMatrix,
    args: argparse.Namespace,
    chosen: Callable[[Sequence[Any]], list[Any]],
) -> None:
    """A part's heading and facts, and its tables but for the experts'."""
    if not matrix:
        out.print()
        out.print(Text(part, "bold") + Text(": no weights"))
        return
    out.print()
    for whole in found.parts:
        out.print(Text(part, "bold") + Text(f": {_describe_whole(whole)}"), soft_wrap=True)
    if not found.parts:
        out.print(Text(part, "bold") + Text(f": {len(matrix)} weights, none saw a row"))
    if rows := describe_experts(expert_coverage(matrix)):
        out.print(f"  experts: {rows}", soft_wrap=True)
    if found.without_rows:
        names = ", ".join(found.without_rows)
        out.print(Text("  without rows: ", "yellow") + Text(names), soft_wrap=True)
    if not args.layers and not args.experts:
        print_table(out, LEGACY_WEIGHTS, chosen(found.weights), keys=2)
    if not args.experts:
        layers = chosen(found.layers) if args.layers else found.layers
        print_table(out, LEGACY_LAYERS, layers, keys=1)


def _describe_whole(whole: PartStatistics) -> str:
    """A part in a line: "12 weights, N 5632: μΣ(Act²) 1530.12, μZD 9.6058%, μCosSim 0.7077"."""
    means = ", ".join(f"{c.heading} {c.describe(getattr(whole, c.key))}" for c in MEANS[:3])
    return f"{plural(whole.n_weights, 'weight')}, N {whole.elements}: {means}"


def _plain(value: Any) -> Any:
    """Dataclasses as JSON objects; NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if (names := FIELDS.get(type(value))) is not None:
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, PartStatistics):
        return _plain(asdict(value))
    return value


COMMAND = Command(
    name="stats",
    help="the statistics that llama-imatrix --show-statistics prints, the head apart",
    description="Statistics of an importance matrix: a line a weight, then a line a layer, the "
    "trunk and the head apart. The figures are those of llama-imatrix in llama.cpp 0.6.0.",
    add_arguments=_add_arguments,
    files=Files(files=("file",)),
    run=_run,
)
