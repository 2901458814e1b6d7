"""Statistics of the activations of a matrix, by weight and by block: those of llama-imatrix's
--show-statistics since llama.cpp 0.6.0.

The formulas for blocks are those of compute_layer_statistics in tools/imatrix/imatrix.cpp; for those
of a weight, and for v and e, see imatrix.matrix.weight_activations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from imatrix.entries import Part
from imatrix.matrix.experts import layer_rows
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.matrix.weight_activations import (
    ActivationStatistics,
    compared_together,
    of_weights,
    rounding,
)
from imatrix.tensors import kind_of

__all__ = ["LayerActivations", "MatrixActivations", "activation_statistics"]


@dataclass(frozen=True)
class LayerActivations:
    """Statistics of a block: those of its weights' channels taken together.

    Attributes:
        block, label, part: as ActivationStatistics has them. block is None for the weights outside
            the blocks that have "output" in their name, which llama-imatrix gives a line too.
        n_weights: weights that saw rows.
        elements: their activations.
        total: the sum of e over all of them.
        gain, l2_dist, cossim, pearson, covariance: as ActivationStatistics has them, over all
            weights of the block that have an earlier one; NaN if none has.
        n_experts: experts of the block; 0 for a dense one.
        unseen: those that saw no row in one of the block's weights.
        rows_min, rows_max: rows that an expert saw, fewest and most; without experts, a weight.
    """

    block: int | None
    label: str
    part: Part
    n_weights: int
    elements: int
    total: float
    gain: float
    l2_dist: float
    cossim: float
    pearson: float
    covariance: float
    n_experts: int
    unseen: int
    rows_min: int
    rows_max: int


@dataclass(frozen=True)
class MatrixActivations:
    """Statistics of a matrix.

    Attributes:
        weights: weights that saw rows, in llama-imatrix's order: by block, then by name.
        layers: blocks that have such a weight, in order.
        without_rows: weights that saw no row; they have no statistics.
        without_signed_sums: weights that saw rows and have no signed sums.
        exact: whether nothing was rounded to float32.
    """

    weights: tuple[ActivationStatistics, ...]
    layers: tuple[LayerActivations, ...]
    without_rows: tuple[str, ...]
    without_signed_sums: tuple[str, ...]
    exact: bool = False

    def part(self, part: Part) -> MatrixActivations:
        """Those of the trunk, or of the head."""
        return replace(
            self,
            weights=tuple(each for each in self.weights if each.part == part),
            layers=tuple(each for each in self.layers if each.part == part),
        )


def activation_statistics(matrix: ImportanceMatrix, *, exact: bool = False) -> MatrixActivations:
    """The figures that llama-imatrix of llama.cpp 0.6.0 prints for a file (--show-statistics), in
    all digits that it prints.

    It shows no layers if numbers are missing between the trunk's first block and its last; here
    they are shown.

    Args:
        exact: compute in float64 from sums that no file has rounded, and round nothing.
    """
    found = sorted(of_weights(matrix, matrix.head_blocks, exact), key=_order)
    return MatrixActivations(
        weights=tuple(found),
        layers=_layers(found, matrix, exact),
        without_rows=tuple(name for name, entry in matrix.items() if not entry.counts.any()),
        without_signed_sums=matrix.without_signed_sums,
        exact=exact,
    )


def _order(each: ActivationStatistics) -> tuple[float, bytes]:
    """The order of show_statistics: by block, then by name. Weights outside the blocks come last, and
    those of the output after them. The block is not a part of the name if more than one item
    follows its number (process_tensor_name)."""
    block: float = math.inf
    if each.block is not None:
        block = each.block
    elif "output" not in each.name:
        block = 2**31 - 2  # INT_MAX - 1
    kind = kind_of(each.name).removesuffix(".weight")
    shortened = kind != kind_of(each.name) and "." in kind[1:-1] and each.block is not None
    return block, (kind if shortened else each.name).encode()


# --- layers ------------------------------------------------------------------


def _layers(
    found: Sequence[ActivationStatistics], matrix: ImportanceMatrix, exact: bool
) -> tuple[LayerActivations, ...]:
    by_block: dict[int | None, list[ActivationStatistics]] = {}
    for each in found:
        if each.block is not None or "output" in each.name:
            by_block.setdefault(each.block, []).append(each)
    return tuple(_of_layer(weights, matrix, exact) for weights in by_block.values())


def _of_layer(
    weights: Sequence[ActivationStatistics], matrix: ImportanceMatrix, exact: bool
) -> LayerActivations:
    single = rounding(exact)
    total = 0.0
    for each in weights:  # show_statistics keeps this sum in float32
        total = single(total + each.total)
    first = weights[0]
    return LayerActivations(
        block=first.block,
        label=first.label,
        part=first.part,
        n_weights=len(weights),
        elements=sum(each.elements for each in weights),
        total=total,
        **compared_together(weights, exact),
        **layer_rows([each.name for each in weights], matrix),
    )
