"""`imatrix stats`: llama-imatrix's --show-statistics, trunk and head apart; with --legacy the one
that llama.cpp had before 0.6.0."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np
from rich import box
from rich.table import Table

from imatrix.cli.flags.common import Commands, add_verbose, at_least
from imatrix.cli.flags.matrices import add_chunk_size
from imatrix.cli.terminal import Console, DataOut, Terminal, Text, write_json
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

__all__ = ["add_parser"]

_Row = TypeVar("_Row")

_PARTS: tuple[Part, Part] = ("trunk", "head")

_LEGEND = (
    "A: a channel's activation. Mean, StdDev, Skew, Kurt: of the channels' means E[A]; H Norm: "
    "entropy of their shares of ∑ E[A²], of log2 N, 100 % where all are alike. Beside the same "
    "weight of the nearest earlier block: Gain, the ratio of the root mean squares; L2 Dist, "
    "CosSim, PCC (correlation), Cov, of the means."
)
_UNSIGNED = "without signed sums, Mean to Kurt and what follows Gain are of E[A²]: "
_LEGACY_LEGEND = (
    "Act²: a channel's squared activation, on average. μ, σ: mean and standard deviation of these. "
    "% Active: above 1e-5. N: how many. Entropy: of their shares, in bits; E (norm): of log2 N, "
    "100 % where all are alike. ZD: more than σ above μ. CosSim: with the same weight of the block "
    "before; 0 where there is none."
)


@dataclass(frozen=True)
class _Column:
    """A column of a table.

    Attributes:
        key: the field it shows and --sort names.
        heading: llama-imatrix's, where it has the column.
        told: the cell, with llama-imatrix's digits.
        left: whether it stands at the left.
    """

    key: str
    heading: str
    told: Callable[[Any], str]
    left: bool = False


def _digits(n: int) -> Callable[[float], str]:
    return lambda value: "" if value is None else f"{value:.{n}f}"


def _percent(n: int) -> Callable[[float], str]:
    # show_statistics in tools/imatrix/imatrix.cpp multiplies in float32
    return lambda value: f"{float(np.float32(100.0 * value)):.{n}f}%"


_BLOCK = _Column("block", "Layer", lambda block: "-" if block is None else str(block))
_TENSOR = _Column("tensor", "Tensor", str, left=True)
_TOTAL = _Column("total", "Σ(Act²)", _digits(2))
_FIGURES = (
    _Column("minimum", "Min", _digits(4)),
    _Column("maximum", "Max", _digits(4)),
    _Column("mean", "μ", _digits(2)),
    _Column("stddev", "σ", _digits(2)),
    _Column("active", "% Active", _percent(2)),
)
_ENTROPY = (
    _Column("entropy", "Entropy", _digits(4)),
    _Column("entropy_norm", "E (norm)", _percent(2)),
    _Column("zd", "ZD", _percent(2)),
)
_UNSEEN = _Column("unseen", "no rows", lambda n: str(n or ""))
_ROWS = (
    _Column("n_experts", "experts", lambda n: str(n or "")),
    _UNSEEN,
    _Column("rows_min", "fewest rows", str),
    _Column("rows_max", "most rows", str),
)
_LEGACY_WEIGHTS = (
    *(_BLOCK, _TENSOR, _TOTAL, *_FIGURES, _Column("elements", "N", str), *_ENTROPY),
    *(_Column("cossim", "CosSim", _digits(4)), _UNSEEN),
)
_MEANS = (
    _Column("mean_total", "μΣ(Act²)", _digits(2)),
    _Column("mean_zd", "μZD", _percent(4)),
    _Column("mean_cossim", "μCosSim", _digits(4)),
    _Column("n_weights", "weights", str),
    _Column("elements", "N", str),
)
_LEGACY_LAYERS = (_BLOCK, *_MEANS, *_ROWS)

_LABEL = _Column("label", "Layer", str)
_ENERGY = _Column("total", "∑ E[A²]", _digits(4))
_GAIN = _Column("gain", "Gain", _digits(2))
_L2 = _Column("l2_dist", "L2 Dist", _digits(4))
_COSSIM = _Column("cossim", "CosSim", _digits(4))
_BETWEEN = (_Column("pearson", "PCC", _digits(4)), _Column("covariance", "Cov", _digits(4)))
_WEIGHTS = (
    *(_LABEL, _Column("name", "Tensor", str, left=True)),
    *(_Column("mean", "Mean", _digits(4)), _Column("stddev", "StdDev", _digits(4))),
    *(_Column("skewness", "Skew", _digits(4)), _Column("kurtosis", "Kurt", _digits(4))),
    *(_Column("entropy_norm", "H Norm", _percent(2)), _ENERGY, _GAIN, _L2, *_BETWEEN),
    *(_Column("elements", "N", str),),
)
_LAYERS = (_LABEL, _ENERGY, _GAIN, _L2, _COSSIM, *_BETWEEN, *_ROWS)
_EXPERTS = (
    *(_BLOCK, _TENSOR, _Column("expert", "Expert", str), _Column("rows", "Rows", str)),
    *(_Column("share", "Share", _percent(2)), _TOTAL, *_FIGURES, *_ENTROPY),
)

# what can be sorted by, and the fields of a CSV file
_KINDS: Mapping[type, tuple[str, ...]] = {
    kind: tuple(field.name for field in fields(kind))
    for kind in (WeightStatistics, LayerStatistics, ExpertStatistics)
} | {
    kind: tuple(field.name for field in fields(kind) if field.repr)
    for kind in (ActivationStatistics, LayerActivations)
}
_COLUMNS_OF: Mapping[type, tuple[_Column, ...]] = {
    ActivationStatistics: _WEIGHTS,
    LayerActivations: _LAYERS,
    WeightStatistics: _LEGACY_WEIGHTS,
    LayerStatistics: _LEGACY_LAYERS,
    ExpertStatistics: _EXPERTS,
}


def add_parser(commands: Commands) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "stats",
        help="the statistics that llama-imatrix --show-statistics prints, the head apart",
        description="Statistics of an importance matrix: a line a weight, then a line a layer, the "
        "trunk and the head apart. The figures are those of llama-imatrix in llama.cpp 0.6.0.",
        allow_abbrev=False,
    )
    command.set_defaults(run=_stats)
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


def _stats(args: argparse.Namespace, terminal: Terminal) -> int:
    legacy = args.legacy or args.experts
    kind: type = WeightStatistics if legacy else ActivationStatistics
    if args.experts:
        kind = ExpertStatistics
    elif args.layers:
        kind = LayerStatistics if legacy else LayerActivations
    key = None if args.sort is None else _sort_key(args.sort, kind)
    matrix = ImportanceMatrix.load(args.file, chunk_size=args.ctx_size)

    def chosen(rows: Sequence[_Row]) -> list[_Row]:
        return _chosen(rows, key, reverse=args.reverse, top=args.top)

    parts: tuple[Part, ...] = (args.part,) if args.part else _PARTS
    experts = _thinnest_first(expert_statistics(matrix)) if args.experts else []
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
            _write_csv(kind, data[name])
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
                _render(out, one, part, of_part, args, chosen)
            elif new is not None:
                _render_new(out, new.part(part), part, of_part, args, chosen)
            if args.experts:
                _print_table(out, _EXPERTS, chosen([e for e in experts if e.part == part]), keys=3)
        out.print()
        out.print(Text(_LEGACY_LEGEND if legacy else _LEGEND, "dim"))
    sys.stdout.flush()  # here, where a closed pipe is expected
    return 0


def _render_new(
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
    told = f": {len(matrix)} weights, none saw a row"
    if found.weights:
        elements = sum(each.elements for each in found.weights)
        told = f": {plural(len(found.weights), 'weight')}, N {elements}"
    out.print(Text(part, "bold") + Text(told), soft_wrap=True)
    if experts := describe_experts(expert_coverage(matrix)):
        out.print(f"  experts: {experts}", markup=False, soft_wrap=True)
    for heading, names in (
        ("without rows: ", [name for name in found.without_rows if name in matrix]),
        (_UNSIGNED, [each.name for each in found.weights if not each.signed]),
    ):
        if names:
            all_of_them = heading == _UNSIGNED and len(names) == len(found.weights) > 3
            listed = "all weights" if all_of_them else ", ".join(names)
            out.print(Text(f"  {heading}", "yellow") + Text(listed), soft_wrap=True)
    if not args.layers:
        _print_table(out, _WEIGHTS, chosen(found.weights), keys=2)
    layers = chosen(found.layers) if args.layers else found.layers
    _print_table(out, _LAYERS, layers, keys=1)


def _collected(matrix: ImportanceMatrix) -> str:
    text = plural(matrix.chunk_count, "chunk")
    return f"{text} of {matrix.chunk_size} tokens" if matrix.chunk_size else text


def _render(
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
    if told := describe_experts(expert_coverage(matrix)):
        out.print(f"  experts: {told}", soft_wrap=True)
    if found.without_rows:
        told = ", ".join(found.without_rows)
        out.print(Text("  without rows: ", "yellow") + Text(told), soft_wrap=True)
    if not args.layers and not args.experts:
        _print_table(out, _LEGACY_WEIGHTS, chosen(found.weights), keys=2)
    if not args.experts:
        layers = chosen(found.layers) if args.layers else found.layers
        _print_table(out, _LEGACY_LAYERS, layers, keys=1)


def _describe_whole(whole: PartStatistics) -> str:
    """A part in a line: "12 weights, N 5632: μΣ(Act²) 1530.12, μZD 9.6058%, μCosSim 0.7077"."""
    means = ", ".join(f"{c.heading} {c.told(getattr(whole, c.key))}" for c in _MEANS[:3])
    return f"{plural(whole.n_weights, 'weight')}, N {whole.elements}: {means}"


# --- rows --------------------------------------------------------------------


def _sort_key(name: str, kind: type) -> str:
    """The field that a heading or a field's name means.

    Raises:
        ValueError: there is no such column.
    """
    known = {column.heading.lower(): column.key for column in _COLUMNS_OF[kind]}
    if "label" in _KINDS[kind]:
        known["layer"] = "block"  # by number, not by its letters
    known |= {key: key for key in _KINDS[kind]}
    try:
        return known[name.lower()]
    except KeyError:
        raise ValueError(
            f"there is no column {name!r} to sort by; there are: {', '.join(_KINDS[kind])}"
        ) from None


def _chosen(rows: Sequence[_Row], key: str | None, *, reverse: bool, top: int | None) -> list[_Row]:
    """The rows by that field: numbers the largest first, text and numbers of things by order;
    what is missing last."""
    found = list(rows)
    if key is not None:
        ascending = key in (
            "block",
            "expert",
            "thinnest",
            "name",
            "label",
            "tensor",
            "part",
            "previous",
        )
        present = [row for row in found if not _missing(getattr(row, key))]
        down = ascending if reverse else not ascending
        present.sort(key=lambda row: getattr(row, key), reverse=down)
        found = present + [row for row in found if _missing(getattr(row, key))]
    elif reverse:
        found.reverse()
    return found[:top]


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _thinnest_first(found: Sequence[ExpertStatistics]) -> list[ExpertStatistics]:
    return sorted(found, key=lambda each: each.rows)


# --- output ------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Dataclasses as JSON has them; a number that is none becomes null."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if (names := _KINDS.get(type(value))) is not None:
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, PartStatistics):
        return _plain(asdict(value))
    return value


def _write_csv(kind: type, rows: Sequence[Any]) -> None:
    """A heading and a line a row; None is empty, and a float is written so that it comes back."""
    writer = csv.writer(DataOut(), lineterminator="\n")
    writer.writerow(_KINDS[kind])
    for row in rows:
        writer.writerow([getattr(row, key) for key in _KINDS[kind]])


def _print_table(
    out: Console, columns: Sequence[_Column], rows: Sequence[object], *, keys: int
) -> None:
    """A table, or several that repeat the first `keys` columns where one would be too wide."""
    if not rows:
        return
    cells = {
        column.key: [column.told(getattr(row, column.key)) for row in rows] for column in columns
    }
    # a column that says nothing for any row
    shown = [c for c in columns if c in columns[:keys] or any(cells[c.key])]
    for group, gap in _groups(shown, cells, keys, out.width):
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, gap - 1, 0, 0)
        )
        for column in group:
            table.add_column(
                column.heading,
                justify="left" if column.left else "right",
                no_wrap=True,
                overflow="ellipsis",
            )
        for number in range(len(rows)):
            table.add_row(*(Text(cells[column.key][number]) for column in group))
        out.print()
        out.print(table)


def _groups(
    columns: Sequence[_Column], cells: Mapping[str, Sequence[str]], keys: int, width: int
) -> Iterator[tuple[list[_Column], int]]:
    """(columns, blanks between them) of each table that fits into the width."""
    need = {c.key: max(map(len, (c.heading, *cells[c.key]))) for c in columns}
    for gap in (2, 1):
        if sum(need.values()) + gap * (len(columns) - 1) <= width:
            yield list(columns), gap
            return
    first = list(columns[:keys])
    group = list(first)
    for column in columns[keys:]:
        used = sum(need[c.key] for c in group) + 2 * len(group)
        if len(group) > keys and used + need[column.key] > width:
            yield group, 2
            group = list(first)
        group.append(column)
    yield group, 2
