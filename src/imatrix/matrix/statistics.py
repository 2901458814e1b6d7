"""Statistics of an importance matrix: those that llama-imatrix's --show-statistics prints, by
weight, by block, and by part of the model.

The formulas for blocks are those of show_statistics in tools/imatrix/imatrix.cpp; for those of a
weight, and for what `exact` means, see imatrix.matrix.weight_statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from imatrix.entries import Part
from imatrix.matrix.experts import layer_rows
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.matrix.weight_statistics import (
    ExpertStatistics,
    WeightStatistics,
    in_turn,
    of_experts,
    of_weights,
)
from imatrix.tensors import listed_place

__all__ = [
    "LayerStatistics",
    "PartStatistics",
    "Statistics",
    "expert_statistics",
    "statistics",
]


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

    They equal its own in all digits that it prints, with two exceptions. It compares a weight
    with the one of the block before even if their sizes differ, and reads past the end of the
    shorter one; here there is no cosine similarity between different sizes (0, and no
    `previous`). And it passes over weights of a .dat file that have no calls, whose values
    ImportanceMatrix.load takes as means. A build of llama-imatrix whose compiler fuses multiplications with additions (ARM)
    rounds less often than the one on x86-64 that this follows.

    Args:
        exact: compute in float64 rather than as llama-imatrix does. Its sums of many values are
            somewhat too small or too large: see docs/stats.md.
    """
    found = of_weights(matrix, matrix.head_blocks, exact)
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
    return of_experts(matrix, matrix.head_blocks)


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
                means[f"mean_{key}"] = float(in_turn(products) / np.float32(elements))
    return {"elements": elements, **means}


def _rows(weights: Sequence[WeightStatistics], matrix: ImportanceMatrix) -> dict[str, int]:
    return layer_rows([each.name for each in weights], matrix)
