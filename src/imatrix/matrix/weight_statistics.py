"""Statistics of single weights and experts: those that llama-imatrix's --show-statistics prints.

The formulas are those of compute_statistics and compute_cossim in tools/imatrix/imatrix.cpp, and so
is the arithmetic: float32, one value after the other. Sums of a hundred thousand values differ
between that and float64 in digits that llama-imatrix prints, so figures that are to equal its own
have to be rounded where it rounds. `exact` computes in float64 instead.

A figure describes the *activations* of a weight: the mean squared activation of each channel,
sums / counts, of all experts that saw a row, one expert after the other.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Entry, Part
from imatrix.tensors import block_of, listed_place, name_in_block, parsed_name

__all__ = [
    "ExpertStatistics",
    "WeightStatistics",
    "in_turn",
    "of_experts",
    "of_weights",
    "without_figures",
]

_F32: TypeAlias = NDArray[np.float32]
_F64: TypeAlias = NDArray[np.float64]

# A channel with a mean squared activation up to here counts as inactive (compute_statistics).
_INACTIVE = 1e-5

_FIGURES = (
    *("total", "minimum", "maximum", "mean", "stddev"),
    *("active", "entropy", "entropy_norm", "zd"),
)


@dataclass(frozen=True)
class WeightStatistics:
    """Statistics of one weight that saw rows. Activations: see the module.

    Attributes:
        name: the weight's name.
        block: number of its block; None for a weight outside the blocks.
        tensor: its kind, llama-imatrix's column "Tensor": "attn_q" of "blk.0.attn_q.weight".
        part: "head" for a block of the MTP/NextN head, else "trunk".
        n_mat: matrices: experts, or slices of a dense 3-D weight.
        n_in: channels, the length of a row.
        n_counts: counts: n_mat for a weight with experts, 1 for a dense one.
        rows_min, rows_max: activation rows that an expert (or the weight) saw, fewest and most.
        unseen: experts that saw no row.
        thinnest: the expert that saw the fewest rows, but some; None for a dense weight.
        elements: activations, column "N": n_in times the matrices, unseen experts left out.
        total: their sum, column "Σ(Act²)".
        minimum, maximum, mean, stddev: of the activations, columns "Min", "Max", "μ", "σ"; the
            standard deviation divides by N.
        active: share of activations above 1e-5, in [0, 1]; column "% Active" in percent.
        entropy: of the activations divided by their sum, in bits.
        entropy_norm: entropy / log2(elements), in [0, 1]; column "E (norm)" in percent. 1: all
            channels weigh the same. NaN for a single element.
        zd: share of activations more than one standard deviation above the mean, in [0, 1];
            column "ZD" (z-score distribution) in percent.
        cossim: cosine similarity of the sums (not divided by the counts) with those of `previous`;
            0 if there is none, NaN if either is zero everywhere.
        previous: the weight of the same name in the block before, the head's first block
            following on the trunk's last. None if that block has no such weight, or one of
            another size.
    """

    name: str
    block: int | None
    tensor: str
    part: Part
    n_mat: int
    n_in: int
    n_counts: int
    rows_min: int
    rows_max: int
    unseen: int
    thinnest: int | None
    elements: int
    total: float
    minimum: float
    maximum: float
    mean: float
    stddev: float
    active: float
    entropy: float
    entropy_norm: float
    zd: float
    cossim: float
    previous: str | None


@dataclass(frozen=True)
class ExpertStatistics:
    """Statistics of one expert of a weight, in float64; all figures NaN if it saw no row.

    Attributes:
        name, block, tensor, part: of the weight, as WeightStatistics has them.
        expert: number of the expert, from 0.
        rows: activation rows it saw.
        share: its share of the rows of all experts of the weight, in [0, 1].
        total, minimum, maximum, mean, stddev, active, entropy, entropy_norm, zd: as
            WeightStatistics has them, of this expert's n_in activations.
    """

    name: str
    block: int | None
    tensor: str
    part: Part
    expert: int
    rows: int
    share: float
    total: float
    minimum: float
    maximum: float
    mean: float
    stddev: float
    active: float
    entropy: float
    entropy_norm: float
    zd: float


def of_weights(
    entries: Mapping[str, Entry], head_blocks: Collection[int], exact: bool
) -> list[WeightStatistics]:
    """Statistics of the weights that saw rows, in the order of the entries, each compared with the
    weight of the block before.

    Args:
        head_blocks: numbers of the blocks that are an MTP/NextN head.
        exact: compute in float64.
    """
    found = [
        _of_weight(name, entry, _part(name, head_blocks), exact)
        for name, entry in entries.items()
        if entry.counts.any()
    ]
    return _with_cossim(found, entries, exact)


def of_experts(
    entries: Mapping[str, Entry], head_blocks: Collection[int]
) -> tuple[ExpertStatistics, ...]:
    """Statistics of every expert of the weights that have a count for each, in the order of the
    entries."""
    found = []
    for name, entry in entries.items():
        if entry.n_counts == 1:
            continue
        part = _part(name, head_blocks)
        block, tensor = listed_place(name)
        seen = entry.counts > 0
        figures = _exact_figures(entry.importance[seen])
        table = np.full((entry.n_counts, len(_FIGURES)), np.nan)
        table[seen] = np.stack([figures[key] for key in _FIGURES], axis=1)
        total = int(entry.counts.sum())
        for expert, (rows, values) in enumerate(zip(entry.counts.tolist(), table, strict=True)):
            share = rows / total if total else math.nan
            found.append(
                ExpertStatistics(name, block, tensor, part, expert, rows, share, *values.tolist())
            )
    return tuple(found)


def without_figures(name: str, entry: Entry, head_blocks: Collection[int]) -> dict[str, Any]:
    """The fields of WeightStatistics for a weight that saw no row, NaN for each figure."""
    figures = dict.fromkeys((*_FIGURES, "cossim"), math.nan)
    return {
        **_described(name, entry, _part(name, head_blocks)),
        "elements": 0,
        **figures,
        "previous": None,
    }


def _part(name: str, head_blocks: Collection[int]) -> Part:
    return "head" if block_of(name) in head_blocks else "trunk"


# --- one weight --------------------------------------------------------------


def _of_weight(name: str, entry: Entry, part: Part, exact: bool) -> WeightStatistics:
    figures: dict[str, Any]
    if exact:
        values = entry.importance[np.broadcast_to(entry.counts > 0, entry.n_mat)]
        found = _exact_figures(values.reshape(1, -1))
        figures = {key: float(found[key][0]) for key in _FIGURES}
        elements = values.size
    else:
        activations = _activations(entry)
        figures = _engine_figures(activations)
        elements = activations.size
    return WeightStatistics(
        **_described(name, entry, part), elements=elements, **figures, cossim=0.0, previous=None
    )


def _described(name: str, entry: Entry, part: Part) -> dict[str, Any]:
    counts = entry.counts
    block, tensor = listed_place(name)
    seen = np.flatnonzero(counts)
    return {
        "name": name,
        "block": block,
        "tensor": tensor,
        "part": part,
        "n_mat": entry.n_mat,
        "n_in": entry.n_in,
        "n_counts": entry.n_counts,
        "rows_min": int(counts.min()),
        "rows_max": int(counts.max()),
        "unseen": int(np.count_nonzero(counts == 0)),
        "thinnest": int(seen[counts[seen].argmin()]) if len(counts) > 1 and len(seen) else None,
    }


def _activations(entry: Entry) -> _F32:
    """[elements] float32: sums / counts in float32, experts without a row left out."""
    with np.errstate(over="ignore"):
        sums = entry.sums.astype(np.float32)
        if not np.isfinite(sums).all():
            # A file would hold smaller sums and counts (imatrix.formats.gguf).
            mean = entry.importance.astype(np.float32)
        else:
            counts = entry.counts.astype(np.float32)[:, np.newaxis]
            mean = np.ones_like(sums)
            np.divide(sums, counts, out=mean, where=counts > 0)
    seen = np.broadcast_to(entry.counts > 0, entry.n_mat)
    return np.ascontiguousarray(mean[seen]).reshape(-1)


def in_turn(values: _F32) -> np.float32:
    """The sum of values, one added after the other in float32, as std::accumulate does."""
    return np.float32(np.add.accumulate(values, dtype=np.float32)[-1])


def _engine_figures(values: _F32) -> dict[str, float]:
    """Figures of [elements] float32, each rounded where compute_statistics rounds it."""
    n = np.float32(values.size)
    # values beyond 1.8e19 have infinite squares, here and there
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        total = in_turn(values)
        mean = total / n
        variance = in_turn(values * values) / n - mean * mean
        # std::max(0, NaN) is 0
        stddev = np.sqrt(variance) if variance > 0 else np.float32(0)
        inactive = np.count_nonzero(np.abs(values) <= np.float32(_INACTIVE))
        entropy = np.float32(0)
        if total > 0:
            p = values / total
            p = p[p > 0]
            # The C library's log2f is right but for rare last bits; NumPy's float32 one is not.
            logs = np.log2(p.astype(np.float64)).astype(np.float32)
            entropy = entropy + in_turn(-(p * logs)) if p.size else entropy
        above = np.count_nonzero((values - mean) / stddev > 1) if stddev > 0 else 0
    bits = math.log2(values.size)
    return {
        "total": float(total),
        "minimum": float(values.min()),
        "maximum": float(values.max()),
        "mean": float(mean),
        "stddev": float(stddev),
        "active": float(np.float32(1) - np.float32(inactive) / n),
        "entropy": float(entropy),
        "entropy_norm": float(entropy) / bits if bits else math.nan,
        "zd": float(np.float32(above) / n),
    }


def _exact_figures(values: _F64) -> dict[str, _F64]:
    """The same in float64, of [k, elements] for each of the k: arrays [k]."""
    n = values.shape[1]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        total = values.sum(axis=1)
        mean = total / n
        away = values - mean[:, np.newaxis]
        stddev = np.sqrt(np.square(away).sum(axis=1) / n)
        p = values / np.where(total > 0, total, 1.0)[:, np.newaxis]
        entropy = -(p * np.log2(p, out=np.zeros_like(p), where=p > 0)).sum(axis=1)
        z = away / np.where(stddev > 0, stddev, np.inf)[:, np.newaxis]
    bits = math.log2(n)
    return {
        "total": total,
        "minimum": values.min(axis=1),
        "maximum": values.max(axis=1),
        "mean": mean,
        "stddev": stddev,
        "active": np.count_nonzero(values > _INACTIVE, axis=1) / n,
        "entropy": entropy + 0.0,  # no -0
        "entropy_norm": (entropy + 0.0) / bits if bits else np.full(len(values), np.nan),
        "zd": np.count_nonzero(z > 1, axis=1) / n,
    }


# --- weights of neighbouring blocks ------------------------------------------


def _with_cossim(
    found: Iterable[WeightStatistics], entries: Mapping[str, Entry], exact: bool
) -> list[WeightStatistics]:
    weights = {each.name: each for each in found}
    cosine = _exact_cosine if exact else _engine_cosine
    compared = []
    for name, each in weights.items():
        before = _before(name)
        if (
            before is not None
            and before in weights
            and entries[before].sums.size == entries[name].sums.size
        ):
            value = cosine(entries[name].sums.reshape(-1), entries[before].sums.reshape(-1))
            each = replace(each, cossim=value, previous=before)
        compared.append(each)
    return compared


def _before(name: str) -> str | None:
    """The weight's name in the block before. compute_cossim looks for the number anywhere in it."""
    found = parsed_name(name)
    return None if found is None else name_in_block(name, found.block - 1)


def _engine_cosine(a: _F64, b: _F64) -> float:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        x, y = a.astype(np.float32), b.astype(np.float32)
        size = np.sqrt(in_turn(x * x)) * np.sqrt(in_turn(y * y))
        return float(in_turn(x * y) / size)


def _exact_cosine(a: _F64, b: _F64) -> float:
    # scaled, so that squares neither overflow nor vanish
    high = a.max(), b.max()
    if not all(high):
        return math.nan
    x, y = a / high[0], b / high[1]
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))
