"""Tables of `imatrix stats`: their columns, the order of their lines, and how they are printed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from rich import box
from rich.table import Table

from imatrix.cli.terminal import Console, Text
from imatrix.matrix.activations import LayerActivations
from imatrix.matrix.statistics import LayerStatistics
from imatrix.matrix.weight_activations import ActivationStatistics
from imatrix.matrix.weight_statistics import ExpertStatistics, WeightStatistics

__all__ = [
    "EXPERTS",
    "FIELDS",
    "LAYERS",
    "LEGACY_LAYERS",
    "LEGACY_LEGEND",
    "LEGACY_WEIGHTS",
    "LEGEND",
    "MEANS",
    "UNSIGNED",
    "WEIGHTS",
    "Column",
    "choose_rows",
    "find_sort_key",
    "print_table",
]

_Row = TypeVar("_Row")

LEGEND = (
    "A: a channel's activation. Mean, StdDev, Skew, Kurt: of the channels' means E[A]; H Norm: "
    "entropy of their shares of ∑ E[A²], of log2 N, 100 % where all are alike. Beside the same "
    "weight of the nearest earlier block: Gain, the ratio of the root mean squares; L2 Dist, "
    "CosSim, PCC (correlation), Cov, of the means."
)
UNSIGNED = "without signed sums, Mean to Kurt and what follows Gain are of E[A²]: "
LEGACY_LEGEND = (
    "Act²: a channel's squared activation, on average. μ, σ: mean and standard deviation of these. "
    "% Active: above 1e-5. N: how many. Entropy: of their shares, in bits; E (norm): of log2 N, "
    "100 % where all are alike. ZD: more than σ above μ. CosSim: with the same weight of the block "
    "before; 0 where there is none."
)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: the field it shows and --sort names.
        heading: llama-imatrix's, if it has the column.
        describe: gives the cell, with llama-imatrix's digits.
        left: whether it stands at the left.
    """

    key: str
    heading: str
    describe: Callable[[Any], str]
    left: bool = False


def _digits(n: int) -> Callable[[float], str]:
    return lambda value: "" if value is None else f"{value:.{n}f}"


def _percent(n: int) -> Callable[[float], str]:
    # show_statistics in tools/imatrix/imatrix.cpp multiplies in float32
    return lambda value: f"{float(np.float32(100.0 * value)):.{n}f}%"


_BLOCK = Column("block", "Layer", lambda block: "-" if block is None else str(block))
_TENSOR = Column("tensor", "Tensor", str, left=True)
_TOTAL = Column("total", "Σ(Act²)", _digits(2))
_FIGURES = (
    Column("minimum", "Min", _digits(4)),
    Column("maximum", "Max", _digits(4)),
    Column("mean", "μ", _digits(2)),
    Column("stddev", "σ", _digits(2)),
    Column("active", "% Active", _percent(2)),
)
_ENTROPY = (
    Column("entropy", "Entropy", _digits(4)),
    Column("entropy_norm", "E (norm)", _percent(2)),
    Column("zd", "ZD", _percent(2)),
)
_UNSEEN = Column("unseen", "no rows", lambda n: str(n or ""))
_ROWS = (
    Column("n_experts", "experts", lambda n: str(n or "")),
    _UNSEEN,
    Column("rows_min", "fewest rows", str),
    Column("rows_max", "most rows", str),
)
LEGACY_WEIGHTS = (
    *(_BLOCK, _TENSOR, _TOTAL, *_FIGURES, Column("elements", "N", str), *_ENTROPY),
    *(Column("cossim", "CosSim", _digits(4)), _UNSEEN),
)
MEANS = (
    Column("mean_total", "μΣ(Act²)", _digits(2)),
    Column("mean_zd", "μZD", _percent(4)),
    Column("mean_cossim", "μCosSim", _digits(4)),
    Column("n_weights", "weights", str),
    Column("elements", "N", str),
)
LEGACY_LAYERS = (_BLOCK, *MEANS, *_ROWS)

_LABEL = Column("label", "Layer", str)
_ENERGY = Column("total", "∑ E[A²]", _digits(4))
_GAIN = Column("gain", "Gain", _digits(2))
_L2 = Column("l2_dist", "L2 Dist", _digits(4))
_COSSIM = Column("cossim", "CosSim", _digits(4))
_BETWEEN = (Column("pearson", "PCC", _digits(4)), Column("covariance", "Cov", _digits(4)))
WEIGHTS = (
    *(_LABEL, Column("name", "Tensor", str, left=True)),
    *(Column("mean", "Mean", _digits(4)), Column("stddev", "StdDev", _digits(4))),
    *(Column("skewness", "Skew", _digits(4)), Column("kurtosis", "Kurt", _digits(4))),
    *(Column("entropy_norm", "H Norm", _percent(2)), _ENERGY, _GAIN, _L2, *_BETWEEN),
    *(Column("elements", "N", str),),
)
LAYERS = (_LABEL, _ENERGY, _GAIN, _L2, _COSSIM, *_BETWEEN, *_ROWS)
EXPERTS = (
    *(_BLOCK, _TENSOR, Column("expert", "Expert", str), Column("rows", "Rows", str)),
    *(Column("share", "Share", _percent(2)), _TOTAL, *_FIGURES, *_ENTROPY),
)

# of each kind of line: what it can be sorted by, and the fields of a CSV file
FIELDS: Mapping[type, tuple[str, ...]] = {
    kind: tuple(field.name for field in fields(kind))
    for kind in (WeightStatistics, LayerStatistics, ExpertStatistics)
} | {
    kind: tuple(field.name for field in fields(kind) if field.repr)
    for kind in (ActivationStatistics, LayerActivations)
}
_COLUMNS_OF: Mapping[type, tuple[Column, ...]] = {
    ActivationStatistics: WEIGHTS,
    LayerActivations: LAYERS,
    WeightStatistics: LEGACY_WEIGHTS,
    LayerStatistics: LEGACY_LAYERS,
    ExpertStatistics: EXPERTS,
}


def find_sort_key(name: str, kind: type) -> str:
    """The field that a heading or a field's name means.

    Raises:
        ValueError: there is no such column.
    """
    known = {column.heading.lower(): column.key for column in _COLUMNS_OF[kind]}
    if "label" in FIELDS[kind]:
        known["layer"] = "block"  # by number, not by its letters
    known |= {key: key for key in FIELDS[kind]}
    try:
        return known[name.lower()]
    except KeyError:
        raise ValueError(
            f"there is no column {name!r} to sort by; there are: {', '.join(FIELDS[kind])}"
        ) from None


def choose_rows(
    rows: Sequence[_Row], key: str | None, *, reverse: bool, top: int | None
) -> list[_Row]:
    """The rows sorted by that field: quantities from the largest, text and the numbers of blocks and
    experts in ascending order; rows without a value last."""
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


def print_table(
    out: Console, columns: Sequence[Column], rows: Sequence[object], *, keys: int
) -> None:
    """A table, or several that repeat the first `keys` columns if one would be too wide."""
    if not rows:
        return
    cells = {
        column.key: [column.describe(getattr(row, column.key)) for row in rows]
        for column in columns
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
    columns: Sequence[Column], cells: Mapping[str, Sequence[str]], keys: int, width: int
) -> Iterator[tuple[list[Column], int]]:
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
