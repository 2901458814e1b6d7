"""`imatrix diff`: where two importance matrices differ, the worst first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from imatrix.cli.command import Command
from imatrix.cli.data import write_csv, write_json
from imatrix.cli.flags.common import add_verbose
from imatrix.cli.flags.hub import Parser
from imatrix.cli.flags.matrices import add_chunk_size
from imatrix.cli.outputs import Files
from imatrix.cli.terminal import Console, Terminal, Text
from imatrix.matrix.comparison import MatrixComparison, WeightComparison, compare_matrices
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.matrix.summary import describe_weights
from imatrix.words import plural

__all__ = ["COMMAND"]

SAME, DIFFERENT = 0, 1

_ROWS = 12  # of a table, unless all are asked for

_LEGEND = (
    "distance: relative L2, from A; rank: Spearman's; means: their distance; of a weight with "
    "experts the worst one's"
)


def _add_arguments(command: Parser) -> None:
    add = command.add_argument
    add("a", metavar="A", help="importance matrix, GGUF or .dat")
    add("b", metavar="B", help="the one to compare with it")
    add("--all", action="store_true", help="every weight, not only the least alike")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON, every weight and expert")
    form.add_argument("--csv", action="store_true", help="as CSV, a line a weight")
    add("--exit-code", action="store_true", help="exit status 1 if they differ")
    add(
        "--tolerance",
        metavar="X",
        type=_distance,
        default=0.0,
        help="distance (relative L2) up to which a weight is the same (default: 0; files round "
        "to about 1e-7)",
    )
    add_chunk_size(command)
    add_verbose(command)


def _distance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number, 0 or more, got {text!r}")
    return value


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    matrices = [ImportanceMatrix.load(each, chunk_size=args.ctx_size) for each in (args.a, args.b)]
    found = compare_matrices(*matrices)
    same = found.same(args.tolerance)
    if args.json:
        data = {
            "a": args.a,
            "b": args.b,
            "tolerance": args.tolerance,
            "same": same,
            "weights": [_with_matrices(weight) for weight in found.weights],
            "only_a": list(found.only_a),
            "only_b": list(found.only_b),
            "mismatched": {
                name: {"a": list(a), "b": list(b)} for name, (a, b) in found.mismatched.items()
            },
        }
        write_json(data, allow_nan=False)
    elif args.csv:
        _write_csv(found)
    else:
        for label, path, matrix in zip("AB", (args.a, args.b), matrices, strict=True):
            text = f"{label}  {path}: {describe_weights(matrix)}; {matrix.chunk_count} chunks"
            terminal.out.print(Text(text), soft_wrap=True)
        _render(terminal.out, found, same, args.tolerance, None if args.all else _ROWS)
    return DIFFERENT if args.exit_code and not same else SAME


def _as_data(weight: WeightComparison) -> dict[str, Any]:
    """A line of CSV; None if a figure is undefined or infinite."""
    return {
        "name": weight.name,
        "part": weight.part,
        "n_in": weight.n_in,
        "n_mat": weight.n_mat,
        "compared": weight.n_compared,
        "cosine": weight.worst_cosine,
        "relative_l2": _finite(weight.worst_relative_l2),
        "rank_correlation": weight.worst_rank_correlation,
        "mean_distance": _finite(weight.worst_mean_distance),
        "signed_sums": {(True, True): "both", (True, False): "a", (False, True): "b"}.get(
            (weight.signed_a, weight.signed_b)
        ),
        "worst_matrix": weight.worst_matrix,
        "rows_a": weight.rows_a,
        "rows_b": weight.rows_b,
        "unseen_a": weight.unseen_a,
        "unseen_b": weight.unseen_b,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def _with_matrices(weight: WeightComparison) -> dict[str, Any]:
    """A weight with the figures of every matrix, if there are several."""
    data = _as_data(weight)
    if weight.n_mat > 1:
        data["matrices"] = {
            key: [_finite(value) for value in values.tolist()]
            for key, values in (
                ("cosine", weight.cosine),
                ("relative_l2", weight.relative_l2),
                ("rank_correlation", weight.rank_correlation),
                ("mean_distance", weight.mean_distance),
            )
        }
    return data


def _write_csv(found: MatrixComparison) -> None:
    rows = [{**_as_data(weight), "note": ""} for weight in found.weights]
    head = found.head_names
    for note, names in (
        ("only in a", found.only_a),
        ("only in b", found.only_b),
        ("different size", found.mismatched),
    ):
        for name in names:
            rows.append({"name": name, "part": "head" if name in head else "trunk", "note": note})
    columns = [*_COLUMNS, "note"]
    write_csv(columns, [[row.get(column, "") for column in columns] for row in rows])


_COLUMNS = (
    *("name", "part", "n_in", "n_mat", "compared", "cosine", "relative_l2", "rank_correlation"),
    *("mean_distance", "signed_sums", "worst_matrix", "rows_a", "rows_b", "unseen_a", "unseen_b"),
)


def _render(
    console: Console, found: MatrixComparison, same: bool, tolerance: float, limit: int | None
) -> None:
    for part, weights in (("trunk", found.trunk), ("head", found.head)):
        if weights:
            console.print()
            console.print(Text(f"{part}: {_summary(weights, tolerance)}"), soft_wrap=True)
            differing = [weight for weight in weights if not weight.within(tolerance)]
            shown = weights if limit is None else differing[:limit]
            if shown:
                console.print(_table(part, shown))
            if len(differing) > len(shown):
                more = f"{len(differing) - len(shown)} more that differ: --all"
                console.print(Text(more, "dim"))
    for label, names in (("only in A", found.only_a), ("only in B", found.only_b)):
        _list(console, label, list(names), found.head_names, limit)
    for label, alone in (
        ("signed sums only in A", [w.name for w in found.weights if w.signed_a > w.signed_b]),
        ("signed sums only in B", [w.name for w in found.weights if w.signed_b > w.signed_a]),
    ):
        if alone and len(alone) == len(found.weights):
            console.print()
            console.print(Text(f"{label}: all weights in both"))
        else:
            _list(console, label, alone, found.head_names, limit)
    _list(
        console,
        "of different sizes",
        [f"{name} {_shape(a)} and {_shape(b)}" for name, (a, b) in found.mismatched.items()],
        found.head_names,
        limit,
    )
    console.print()
    if same:
        near = f" within {tolerance:g}" if tolerance else ""
        console.print(Text(f"the same to a quantizer{near}"))
    elif found.weights:
        console.print(Text(_LEGEND, "dim"))


def _summary(weights: Sequence[WeightComparison], tolerance: float) -> str:
    differing = sum(not weight.within(tolerance) for weight in weights)
    cosines = [w.worst_cosine for w in weights if w.worst_cosine is not None]
    text = f"{plural(len(weights), 'weight')} in both, {differing} differ"
    if cosines:
        text += f"; cosine {_cosine(min(cosines))} at worst, {_cosine(_median(cosines))} the median"
    return text


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _table(part: str, weights: Sequence[WeightComparison]) -> Table:
    experts = any(weight.n_mat > 1 for weight in weights)
    gaps = any(weight.unseen_a or weight.unseen_b for weight in weights)
    means = any(weight.worst_mean_distance is not None for weight in weights)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(part, no_wrap=True, overflow="ellipsis", min_width=24)
    headings = ["cosine", "distance", "rank", *(["means"] if means else [])]
    headings += [*(["expert"] if experts else []), "rows A", "rows B"]
    for heading in (*headings, *(["no rows A", "no rows B"] if gaps else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for weight in weights:
        several = weight.n_mat > 1 and weight.worst_matrix is not None
        table.add_row(
            Text(weight.name),
            "" if weight.worst_cosine is None else _cosine(weight.worst_cosine),
            "" if weight.worst_relative_l2 is None else f"{weight.worst_relative_l2:.3g}",
            "" if weight.worst_rank_correlation is None else f"{weight.worst_rank_correlation:.4f}",
            *(
                ["" if (away := weight.worst_mean_distance) is None else f"{away:.3g}"]
                if means
                else []
            ),
            *([str(weight.worst_matrix) if several else ""] if experts else []),
            str(weight.rows_a),
            str(weight.rows_b),
            *(_gaps(weight) if gaps else []),
        )
    return table


def _gaps(weight: WeightComparison) -> list[Text]:
    return [Text(str(unseen or ""), "yellow") for unseen in (weight.unseen_a, weight.unseen_b)]


def _cosine(value: float) -> str:
    """Not rounded up to 1, which would say that nothing differs in shape."""
    away = 1 - value
    return f"1 - {away:.0e}" if 1e-12 < away < 5e-5 else f"{value:.4f}"  # below: float64's rounding


def _list(
    console: Console, label: str, names: list[str], head: frozenset[str], limit: int | None
) -> None:
    if not names:
        return
    n_head = sum(name.split(" ")[0] in head for name in names)
    counted = plural(len(names), "weight")
    heading = f"{label}: {counted}" + (f", {n_head} of the head" if n_head else "")
    console.print()
    console.print(Text(heading))
    for name in names[:limit]:
        console.print(Text(f"  {name}"), soft_wrap=True)
    if limit is not None and len(names) > limit:
        console.print(Text(f"  {len(names) - limit} more: --all", "dim"))


def _shape(shape: tuple[int, int]) -> str:
    return f"[{shape[0]}, {shape[1]}]"


COMMAND = Command(
    name="diff",
    help="where two importance matrices differ, the worst first",
    description="Compare two importance matrices of one model, weight by weight, the least "
    "alike first. Exit status: 0; with --exit-code 1 if they differ; 2 wrong usage or bad "
    "input.",
    add_arguments=_add_arguments,
    files=Files(files=("a", "b")),
    run=_run,
)
