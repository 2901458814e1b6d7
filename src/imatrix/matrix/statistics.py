"""Statistics of an importance matrix: those that llama-imatrix's --show-statistics prints.

The formulas are those of compute_statistics, compute_cossim and show_statistics in
tools/imatrix/imatrix.cpp, and so is the arithmetic: float32, one value after the other. Sums of a
hundred thousand values differ between that and float64 in digits that llama-imatrix prints, so
figures that are to equal its own have to be rounded where it rounds. `exact=True` computes in
float64 instead.

A figure describes the *activations* of a weight: the mean squared activation of each channel,
sums / counts, of all experts that saw a row, one expert after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Entry
from imatrix.matrix.experts import layer_rows
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.tensors import listed_place, name_in_block, parsed_name

if TYPE_CHECKING:
    import pandas

__all__ = [
    "ExpertStatistics",
    "LayerStatistics",
    "Part",
    "PartStatistics",
    "Statistics",
    "WeightStatistics",
    "expert_statistics",
    "statistics",
    "to_frame",
]

Part: TypeAlias = Literal["trunk", "head"]

_F32: TypeAlias = NDArray[np.float32]
_F64: TypeAlias = NDArray[np.float64]

# A channel with a mean squared activation up to here counts as inactive (compute_statistics).
_INACTIVE = 1e-5


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
            0 where there is none, NaN where either is zero everywhere.
        previous: the weight of the same name in the block before, the head's first block
            following on the trunk's last. None where that block has no such weight, or one of
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
class LayerStatistics:
    """Statistics of a block: means over its weights, each weighted by its elements.

    Attributes:
        block: the block's number.
        part: "trunk" or "head".
        n_weights: weights that saw rows.
        elements: their activations.
        mean_total, mean_zd, mean_cossim: weighted means of WeightStatistics.total, .zd and
            .cossim, llama-imatrix's columns "μΣ(Act²)", "μZD" (there in percent) and "μCosSim".
        n_experts: experts of the block; 0 for a dense one.
        unseen: those that saw no row in one of the block's weights.
        rows_min, rows_max: rows that an expert saw, fewest and most; without experts, a weight.
    """

    block: int
    part: Part
    n_weights: int
    elements: int
    mean_total: float
    mean_zd: float
    mean_cossim: float
    n_experts: int
    unseen: int
    rows_min: int
    rows_max: int


@dataclass(frozen=True)
class PartStatistics:
    """The trunk's or the head's figures as a whole; weights outside the blocks are the trunk's.

    Attributes:
        part: "trunk" or "head".
        blocks: numbers of its blocks.
        n_weights, elements, mean_total, mean_zd, mean_cossim: as LayerStatistics has them, over
            all weights of the part.
        n_experts, unseen: sums over the blocks.
        rows_min, rows_max: rows that an expert or a weight saw, fewest and most.
    """

    part: Part
    blocks: tuple[int, ...]
    n_weights: int
    elements: int
    mean_total: float
    mean_zd: float
    mean_cossim: float
    n_experts: int
    unseen: int
    rows_min: int
    rows_max: int


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


@dataclass(frozen=True)
class Statistics:
    """Statistics of a matrix.

    Attributes:
        weights: weights that saw rows, in llama-imatrix's order: by kind, the largest total first.
        layers: blocks that have such a weight, in order.
        parts: the trunk and the head, those that have such a weight.
        without_rows: weights that saw no row; they have no statistics.
        head_blocks: numbers of the blocks that are an MTP/NextN head.
        exact: whether float64 computed them.
    """

    weights: tuple[WeightStatistics, ...]
    layers: tuple[LayerStatistics, ...]
    parts: tuple[PartStatistics, ...]
    without_rows: tuple[str, ...]
    head_blocks: frozenset[int] = frozenset()
    exact: bool = False

    @property
    def trunk(self) -> Statistics:
        """Those of the trunk."""
        return self._only("trunk")

    @property
    def head(self) -> Statistics:
        """Those of the MTP/NextN head."""
        return self._only("head")

    def _only(self, part: Part) -> Statistics:
        return replace(
            self,
            weights=tuple(each for each in self.weights if each.part == part),
            layers=tuple(each for each in self.layers if each.part == part),
            parts=tuple(each for each in self.parts if each.part == part),
            without_rows=tuple(
                name
                for name in self.without_rows
                if (listed_place(name)[0] in self.head_blocks) == (part == "head")
            ),
        )


def statistics(matrix: ImportanceMatrix, *, exact: bool = False) -> Statistics:
    """The figures that llama-imatrix prints for a file (--show-statistics), and some more.

    They equal its own in all digits it prints, but for two things. It compares a weight with the
    one of the block before whatever their sizes, reading past the end of the shorter one; here
    there is no cosine similarity between different sizes (0, and no `previous`). And it passes
    over weights of a .dat file that have no calls, whose values ImportanceMatrix.load takes as
    means. A build of llama-imatrix whose compiler fuses multiplications with additions (ARM)
    rounds less often than the one on x86-64 that this follows.

    Args:
        exact: compute in float64 rather than as llama-imatrix does. Its sums of many values are
            somewhat too small or too large: see docs/stats.md.
    """
    head = set(matrix.head)
    found = [
        _of_weight(name, entry, "head" if name in head else "trunk", exact)
        for name, entry in matrix.items()
        if entry.counts.any()
    ]
    found = _with_cossim(found, matrix, exact)
    # show_statistics sorts so; what it adds up over a layer, it adds in this order
    found.sort(key=lambda each: (each.tensor.encode(), -each.total))
    parts: tuple[Part, ...] = ("trunk", "head")
    return Statistics(
        weights=tuple(found),
        layers=_layers(found, matrix, exact),
        parts=tuple(
            _of_part(part, weights, matrix, exact)
            for part in parts
            if (weights := [each for each in found if each.part == part])
        ),
        without_rows=tuple(name for name, entry in matrix.items() if not entry.counts.any()),
        head_blocks=matrix.head_blocks,
        exact=exact,
    )


def expert_statistics(matrix: ImportanceMatrix) -> tuple[ExpertStatistics, ...]:
    """Statistics of every expert, in the order of the matrix: one an expert of each weight that
    has a count an expert. Files in the .dat format do not tell experts apart and have none."""
    head = set(matrix.head)
    found = []
    for name, entry in matrix.items():
        if entry.n_counts == 1:
            continue
        part: Part = "head" if name in head else "trunk"
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


def to_frame(
    matrix: ImportanceMatrix, *, experts: bool = False, exact: bool = False
) -> pandas.DataFrame:
    """See ImportanceMatrix.to_frame."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            "ImportanceMatrix.to_frame needs the library pandas: pip install 'imatrix[pandas]'"
        ) from error
    records: list[dict[str, Any]]
    if experts:
        kind: type = ExpertStatistics
        records = [asdict(each) for each in expert_statistics(matrix)]
        index = ["name", "expert"]
    else:
        kind = WeightStatistics
        by_name = {each.name: asdict(each) for each in statistics(matrix, exact=exact).weights}
        head = set(matrix.head)
        records = [
            by_name.get(name) or _without_figures(name, entry, "head" if name in head else "trunk")
            for name, entry in matrix.items()
        ]
        index = ["name"]
    columns = [field.name for field in fields(kind)]
    types = {
        "int": "int64",
        "int | None": "Int64",  # pandas' own, which has a missing value
        "float": "float64",
    }
    frame = pandas.DataFrame.from_records(records, columns=columns)
    frame = frame.astype({each.name: types.get(str(each.type), "object") for each in fields(kind)})
    return frame.set_index(index)


# --- one weight --------------------------------------------------------------

_FIGURES = (
    *("total", "minimum", "maximum", "mean", "stddev"),
    *("active", "entropy", "entropy_norm", "zd"),
)


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


def _without_figures(name: str, entry: Entry, part: Part) -> dict[str, Any]:
    """What a frame says of a weight that saw no row."""
    figures = dict.fromkeys((*_FIGURES, "cossim"), math.nan)
    return {**_described(name, entry, part), "elements": 0, **figures, "previous": None}


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


def _in_turn(values: _F32) -> np.float32:
    """The sum of values, one added after the other in float32, as std::accumulate does."""
    return np.float32(np.add.accumulate(values, dtype=np.float32)[-1])


def _engine_figures(values: _F32) -> dict[str, float]:
    """Figures of [elements] float32, each rounded where compute_statistics rounds it."""
    n = np.float32(values.size)
    # values beyond 1.8e19 have infinite squares, here and there
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        total = _in_turn(values)
        mean = total / n
        variance = _in_turn(values * values) / n - mean * mean
        # std::max(0, NaN) is 0
        stddev = np.sqrt(variance) if variance > 0 else np.float32(0)
        inactive = np.count_nonzero(np.abs(values) <= np.float32(_INACTIVE))
        entropy = np.float32(0)
        if total > 0:
            p = values / total
            p = p[p > 0]
            # The C library's log2f is right but for rare last bits; NumPy's float32 one is not.
            logs = np.log2(p.astype(np.float64)).astype(np.float32)
            entropy = entropy + _in_turn(-(p * logs)) if p.size else entropy
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
    found: Iterable[WeightStatistics], matrix: ImportanceMatrix, exact: bool
) -> list[WeightStatistics]:
    weights = {each.name: each for each in found}
    cosine = _exact_cosine if exact else _engine_cosine
    compared = []
    for name, each in weights.items():
        before = _before(name)
        if (
            before is not None
            and before in weights
            and matrix[before].sums.size == matrix[name].sums.size
        ):
            value = cosine(matrix[name].sums.reshape(-1), matrix[before].sums.reshape(-1))
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
        size = np.sqrt(_in_turn(x * x)) * np.sqrt(_in_turn(y * y))
        return float(_in_turn(x * y) / size)


def _exact_cosine(a: _F64, b: _F64) -> float:
    # scaled, so that squares neither overflow nor vanish
    high = a.max(), b.max()
    if not all(high):
        return math.nan
    x, y = a / high[0], b / high[1]
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


# --- layers and parts --------------------------------------------------------


def _layers(
    found: Sequence[WeightStatistics], matrix: ImportanceMatrix, exact: bool
) -> tuple[LayerStatistics, ...]:
    by_block: dict[int, list[WeightStatistics]] = {}
    for each in found:
        if each.block is not None:
            by_block.setdefault(each.block, []).append(each)
    heads = matrix.head_blocks
    return tuple(
        LayerStatistics(
            block=block,
            part="head" if block in heads else "trunk",
            n_weights=len(weights),
            **_weighted(weights, exact),
            **_rows(weights, matrix),
        )
        for block, weights in sorted(by_block.items())
    )


def _of_part(
    part: Part, weights: Sequence[WeightStatistics], matrix: ImportanceMatrix, exact: bool
) -> PartStatistics:
    blocks = tuple(sorted({each.block for each in weights if each.block is not None}))
    rows = [
        _rows([each for each in weights if each.block == block], matrix)
        for block in {each.block for each in weights}
    ]
    return PartStatistics(
        part=part,
        blocks=blocks,
        n_weights=len(weights),
        **_weighted(weights, exact),
        n_experts=sum(each["n_experts"] for each in rows),
        unseen=sum(each["unseen"] for each in rows),
        rows_min=min(each["rows_min"] for each in rows),
        rows_max=max(each["rows_max"] for each in rows),
    )


def _weighted(weights: Sequence[WeightStatistics], exact: bool) -> dict[str, Any]:
    """Elements, and the means weighted by them, in the order of the weights."""
    elements = sum(each.elements for each in weights)
    means = {}
    for key in ("total", "zd", "cossim"):
        values = [getattr(each, key) for each in weights]
        if exact:
            terms = (each.elements * value for each, value in zip(weights, values, strict=True))
            means[f"mean_{key}"] = sum(terms) / elements
        else:
            n = np.asarray([each.elements for each in weights], np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                products = n * np.asarray(values, np.float32)
                means[f"mean_{key}"] = float(_in_turn(products) / np.float32(elements))
    return {"elements": elements, **means}


def _rows(weights: Sequence[WeightStatistics], matrix: ImportanceMatrix) -> dict[str, int]:
    return layer_rows([each.name for each in weights], matrix)
