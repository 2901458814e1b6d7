"""Numbers laid out for a heat map: weight kinds, or experts, against blocks.

Nothing here draws, so that none of it needs matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from imatrix.matrix.comparison import same_shapes
from imatrix.matrix.experts import expert_rows
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.pictures.numbers import Contrast, Quantity
from imatrix.tensors import block_of, kind_of

__all__ = [
    "Grid",
    "Part",
    "State",
    "difference_grid",
    "expert_grid",
    "layer_grid",
    "weight_grid",
]

# Kinds in the order in which a block runs them, the engine's names (LLM_TENSOR_NAMES in
# src/llama-arch.cpp); others follow their first letters, alphabetically.
_ORDER = [
    "attn_norm",
    "attn_qkv",
    "attn_q",
    "attn_q_a",
    "attn_q_b",
    "attn_k",
    "attn_v",
    "attn_kv_a_mqa",
    "attn_kv_b",
    "attn_k_b",
    "attn_v_b",
    "attn_gate",
    "attn_output",
    "attn",
    "ssm_in",
    "ssm_alpha",
    "ssm_beta",
    "ssm_ba",
    "ssm_x",
    "ssm_dt",
    "ssm_out",
    "ssm",
    "ffn_gate_inp",
    "ffn_gate_inp_shexp",
    "ffn_gate_up",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
    "ffn_gate_up_exps",
    "ffn_gate_exps",
    "ffn_up_exps",
    "ffn_down_exps",
    "ffn_gate_shexp",
    "ffn_up_shexp",
    "ffn_down_shexp",
    "ffn",
    "nextn",
]


# Blocks that a matrix skips are shown, so that a gap is seen; not with numbers beyond reason.
_MOST_GAPS = 32


class State(IntEnum):
    """What a cell of a grid is."""

    ABSENT = 0
    """Not in the matrix."""
    VALUE = 1
    NO_ROWS = 2
    """In the matrix, without a row."""
    ZERO = 3
    """Rows of nothing but zeros."""
    FIRST = 4
    """In the first of two matrices only."""
    SECOND = 5
    """In the second of two matrices only."""
    SHAPE = 6
    """In both, with other shapes."""
    NONE = 7
    """In both, with nothing to compare: zeros, or no expert with rows in both."""


@dataclass(frozen=True)
class Part:
    """The trunk's, the head's or the other weights' columns of a grid.

    Attributes:
        label: "trunk", "head", or "no block" for weights outside the blocks.
        columns: block numbers, as text; "" for the one column of the weights outside the blocks.
        values: [n_rows, n_columns] float64, NaN where the state is not VALUE.
        states: [n_rows, n_columns] int8, of State.
    """

    label: str
    columns: tuple[str, ...]
    values: NDArray[np.float64]
    states: NDArray[np.int8]


@dataclass(frozen=True)
class Grid:
    """Rows (weight kinds, or experts) against blocks."""

    rows: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def values(self) -> NDArray[np.float64]:
        """The values of all cells that have one, in one row."""
        all_: NDArray[np.float64] = np.concatenate([part.values.ravel() for part in self.parts])
        return all_[np.isfinite(all_)]

    @property
    def states(self) -> frozenset[State]:
        """The states that come up."""
        return frozenset(State(each) for part in self.parts for each in np.unique(part.states))


def layer_grid(
    matrix: ImportanceMatrix,
    statistic: Quantity,
    names: Iterable[str] | None = None,
    head_blocks: frozenset[int] | None = None,
) -> Grid:
    """A statistic by weight.

    Args:
        names: the weights to lay out, those that the matrix has not among them; None for its own.
        head_blocks: None for the matrix's own.
    """

    def cell(name: str) -> tuple[State, float]:
        if name not in matrix:
            return State.ABSENT, np.nan
        entry = matrix[name]
        if not entry.counts.any():
            return State.NO_ROWS, np.nan
        value = statistic.of(entry)
        return (State.VALUE, value) if value > 0 else (State.ZERO, np.nan)

    return weight_grid(
        matrix if names is None else names,
        matrix.head_blocks if head_blocks is None else head_blocks,
        cell,
    )


def difference_grid(first: ImportanceMatrix, second: ImportanceMatrix, contrast: Contrast) -> Grid:
    """What two matrices differ in, by weight; weights of only one are marked."""

    def cell(name: str) -> tuple[State, float]:
        have = [matrix.get(name) for matrix in (first, second)]
        one, other = (entry if entry is not None and entry.counts.any() else None for entry in have)
        if one is None or other is None:
            if one is not None:
                return State.FIRST, np.nan
            return (State.SECOND if other is not None else State.NO_ROWS), np.nan
        pair = same_shapes(one, other)
        if pair is None:
            return State.SHAPE, np.nan
        value = contrast.of(*pair)
        if value is None:
            return State.NONE, np.nan
        return State.VALUE, value if contrast.centred else max(value, contrast.least)

    return weight_grid({**first, **second}, first.head_blocks | second.head_blocks, cell)


def expert_grid(matrix: ImportanceMatrix) -> Grid:
    """Rows that each expert saw: experts against blocks, blocks without experts left out."""
    rows = expert_rows(matrix)
    n_experts = max(map(len, rows.values()), default=0)
    parts = []
    for label, blocks in (
        ("trunk", [block for block in rows if block not in matrix.head_blocks]),
        ("head", [block for block in rows if block in matrix.head_blocks]),
    ):
        if not blocks:
            continue
        values = np.full((n_experts, len(blocks)), np.nan)
        states = np.full(values.shape, State.ABSENT, np.int8)
        for column, block in enumerate(blocks):
            seen = rows[block]
            states[: len(seen), column] = np.where(seen > 0, State.VALUE, State.NO_ROWS)
            values[: len(seen), column] = np.where(seen > 0, seen, np.nan)
        parts.append(Part(label, tuple(map(str, blocks)), values, states))
    return Grid(tuple(map(str, range(n_experts))), tuple(parts))


def weight_grid(
    names: Iterable[str],
    head_blocks: frozenset[int],
    cell: Callable[[str], tuple[State, float]],
) -> Grid:
    """A grid of weights: kinds against blocks.

    Args:
        names: the weights.
        head_blocks: which blocks are the head's.
        cell: state and value of a weight.
    """
    places = {name: _place(name) for name in names}
    inside = {name: (block, kind) for name, (block, kind) in places.items() if block is not None}
    outside = [name for name in places if name not in inside]
    kinds = [
        *sorted({kind for _, kind in inside.values()}, key=_kind_key),
        *sorted(set(outside) - {kind for _, kind in inside.values()}),
    ]
    row = {kind: n for n, kind in enumerate(kinds)}
    blocks = {block for block, _ in inside.values()}
    parts = []
    for label, columns in (
        ("trunk", _with_gaps(blocks - head_blocks)),
        ("head", sorted(blocks & head_blocks)),
    ):
        if not columns:
            continue
        column = {block: n for n, block in enumerate(columns)}
        members = [
            (row[kind], column[block], name)
            for name, (block, kind) in inside.items()
            if block in column
        ]
        parts.append(_part(label, tuple(map(str, columns)), len(kinds), members, cell))
    if outside:
        members = [(row[name], 0, name) for name in outside]
        parts.append(_part("no block", ("",), len(kinds), members, cell))
    return Grid(_kind_labels(kinds), tuple(parts))


def _place(name: str) -> tuple[int | None, str]:
    """(block, kind) of a weight; a name without a kind after its block is outside the blocks, since
    a row of the grid needs a label."""
    kind = kind_of(name)
    return (block_of(name), kind) if kind else (None, name)


def _kind_key(kind: str) -> tuple[int, str]:
    stem = kind.removesuffix(".weight")
    while stem and stem not in _ORDER:
        stem = re.sub(r"([._]?[^._]*)$", "", stem) if re.search(r"[._]", stem) else ""
    return (_ORDER.index(stem) if stem else len(_ORDER), kind)


def _kind_labels(kinds: Sequence[str]) -> tuple[str, ...]:
    """Without `.weight`, unless that would give two kinds one label."""
    short = [kind.removesuffix(".weight") for kind in kinds]
    return tuple(
        kind if short.count(each) > 1 else each for kind, each in zip(kinds, short, strict=True)
    )


def _with_gaps(blocks: set[int]) -> list[int]:
    if blocks and max(blocks) < 2 * len(blocks) + _MOST_GAPS:
        return list(range(max(blocks) + 1))
    return sorted(blocks)


def _part(
    label: str,
    columns: tuple[str, ...],
    n_rows: int,
    members: Iterable[tuple[int, int, str]],
    cell: Callable[[str], tuple[State, float]],
) -> Part:
    values = np.full((n_rows, len(columns)), np.nan)
    states = np.full(values.shape, State.ABSENT, np.int8)
    for row, column, name in members:
        state, value = cell(name)
        states[row, column] = state
        if state == State.VALUE:
            values[row, column] = value
    return Part(label, columns, values, states)
