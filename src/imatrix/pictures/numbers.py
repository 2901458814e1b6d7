"""What the pictures show, as numbers: weights by block and kind, rows by expert, channels.

Nothing here draws, so that none of it needs matplotlib.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Entry
from imatrix.matrix.comparison import same_shapes
from imatrix.matrix.experts import expert_rows
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.tensors import block_of, kind_of

__all__ = [
    "DIFFERENCES",
    "STATISTICS",
    "Grid",
    "Part",
    "Profile",
    "Quantity",
    "State",
    "compared",
    "expert_grid",
    "layer_grid",
    "profile",
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


@dataclass(frozen=True)
class Quantity:
    """A number by weight.

    Attributes:
        title: what it is, to begin a title with.
        label: the same with its unit, for a scale.
        of: the number of an entry that has rows; 0 only where these are all zeros.
        log: whether its scale is logarithmic.
        limits: (least, most) of its scale, None where the values say.
    """

    title: str
    label: str
    of: Callable[[Entry], float]
    log: bool = True
    limits: tuple[float, float] | None = None


def _seen(entry: Entry) -> NDArray[np.bool_]:
    """[n_mat]: which matrices have rows; one count may stand for several matrices."""
    return np.broadcast_to(entry.counts > 0, entry.n_mat)


def _mean(entry: Entry) -> float:
    return float(entry.importance[_seen(entry)].mean())


def _peak(entry: Entry) -> float:
    found = entry.importance[_seen(entry)]
    mean = found.mean(axis=1)
    return float((found.max(axis=1)[mean > 0] / mean[mean > 0]).max(initial=0.0))


def heaviest_share(importance: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n_mat]: share of each row's sum that its heaviest 1 % of channels (one at least) hold;
    rows of zeros left out."""
    found: NDArray[np.float64] = importance[importance.any(axis=1)]
    k = heaviest_count(found.shape[1])
    # scaled first: the sum of many large float64 might not be one
    found = found / found.max(axis=1, keepdims=True)
    top = np.partition(found, found.shape[1] - k, axis=1)[:, -k:]
    share: NDArray[np.float64] = top.sum(axis=1) / found.sum(axis=1)
    return share


def heaviest_count(n_in: int) -> int:
    """Channels in the heaviest 1 %, rounded up."""
    return max(1, -(-n_in // 100))


def _top(entry: Entry) -> float:
    shares = heaviest_share(entry.importance[_seen(entry)])
    return float(shares.mean()) if shares.size else 0.0


def _coverage(entry: Entry) -> float:
    return 100 * entry.covered


def _rows(entry: Entry) -> float:
    return float(entry.counts[entry.counts > 0].min())


STATISTICS: dict[str, Quantity] = {
    "mean": Quantity("Mean squared activation", "mean squared activation (log scale)", _mean),
    "top": Quantity(
        "Share of the heaviest 1 % of channels",
        "share of the sum that the heaviest 1 % of channels hold",
        _top,
        log=False,
        limits=(0.0, 1.0),
    ),
    "peak": Quantity(
        "Heaviest channel", "heaviest channel / mean of its matrix (log scale)", _peak
    ),
    "coverage": Quantity(
        "Matrices with data",
        "matrices (experts) with rows, %",
        _coverage,
        log=False,
        limits=(0.0, 100.0),
    ),
    "rows": Quantity("Rows", "fewest rows of a matrix (expert) that has any (log scale)", _rows),
}


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


# --- two matrices ------------------------------------------------------------


@dataclass(frozen=True)
class Contrast:
    """A number that two entries of one weight give.

    Attributes:
        title: what it is, to begin a title with.
        label: the same with its unit, for a scale; {0} and {1} are the matrices' names.
        of: the number of two entries that have rows; None where there is none.
        centred: whether 0 is in the middle of its scale; else the scale is logarithmic.
        least: what smaller values are taken for, of a logarithmic scale; of a centred one what
            it reaches to at least, so that rounding does not look like a difference.
    """

    title: str
    label: str
    of: Callable[[Entry, Entry], float | None]
    centred: bool
    least: float


def _log_ratio(first: Entry, second: Entry) -> float | None:
    one, other = _mean(first), _mean(second)
    return float(np.log2(other) - np.log2(one)) if one > 0 and other > 0 else None


def _cosine_distance(first: Entry, second: Entry) -> float | None:
    both = _seen(first) & _seen(second)
    if not both.any():
        return None
    one, other = first.importance[both], second.importance[both]
    zero = ~one.any(axis=1), ~other.any(axis=1)
    one, other = _unit(one), _unit(other)
    # 1 - cosine as half the squared distance of the unit vectors: exact down to 0, where the
    # subtraction would leave nothing but rounding
    distance = np.where(zero[0] ^ zero[1], 1.0, 0.5 * ((one - other) ** 2).sum(axis=1))
    return float(distance.max())


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row divided by its length; rows of zeros as they are."""
    most = rows.max(axis=1, keepdims=True)
    rows = rows / np.where(most > 0, most, 1.0)  # squares of large values might overflow
    unit: NDArray[np.float64] = rows / np.maximum(
        np.sqrt((rows**2).sum(axis=1, keepdims=True)), 1.0
    )
    return unit


DIFFERENCES: dict[str, Contrast] = {
    "ratio": Contrast(
        "Ratio of the means",
        "log2 (mean squared activation of {1} / of {0})",
        _log_ratio,
        centred=True,
        least=0.1,
    ),
    "cosine": Contrast(
        "Cosine distance",
        "1 - cosine similarity of the importance, worst expert (log scale)",
        _cosine_distance,
        centred=False,
        least=1e-6,
    ),
}


def compared(first: ImportanceMatrix, second: ImportanceMatrix, contrast: Contrast) -> Grid:
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


# --- channels ----------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Mean squared activation by channel, of one matrix or of several pooled.

    Attributes:
        values: [n_in] float64.
        rows: activation rows that went into it.
        means: [n_in] float64, of the activations themselves; None without signed sums.
    """

    values: NDArray[np.float64]
    rows: int
    means: NDArray[np.float64] | None = None

    def constant(self, channel: int) -> float | None:
        """Share of a channel's mean squared activation that its mean alone makes, in [0, 1]: 1 where
        it always has one value, 0 where it swings about 0. None without signed sums."""
        if self.means is None or self.values[channel] <= 0:
            return None
        return min(1.0, float(self.means[channel] / self.values[channel] * self.means[channel]))

    @property
    def shares(self) -> NDArray[np.float64]:
        """[n_in]: each channel's share of the sum over all channels; zeros for a profile of
        zeros."""
        most = self.values.max()
        if most <= 0:
            return np.zeros_like(self.values)
        scaled = self.values / most
        shares: NDArray[np.float64] = scaled / scaled.sum()
        return shares

    def heaviest(self, n: int) -> list[int]:
        """The heaviest channels, the heaviest first, those of zeros left out; of equals the one
        with the lower number first."""
        order = np.argsort(-self.values, kind="stable")[:n]
        return [int(channel) for channel in order if self.values[channel] > 0]


def profile(entry: Entry, expert: int | None = None) -> Profile | None:
    """The profile of one matrix, or of all pooled: their sums over their rows, so that an expert
    weighs as much as the rows it saw. None where there are no rows."""
    counts = np.broadcast_to(entry.counts, entry.n_mat)
    sums, signed = entry.sums, entry.signed_sums
    if expert is not None:
        counts, sums = counts[expert : expert + 1], sums[expert : expert + 1]
        signed = None if signed is None else signed[expert : expert + 1]
    rows = int(counts.sum())
    if not rows:
        return None
    means = None if signed is None else signed.sum(axis=0) / rows
    return Profile(sums.sum(axis=0) / rows, rows, means)
