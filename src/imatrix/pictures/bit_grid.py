"""A recipe laid out for its map: which type each tensor gets, and how many bits a weight that is.

Nothing here draws, so that none of it needs matplotlib.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imatrix.pictures.grids import Grid, State, weight_grid
from imatrix.quantization.recipe import Recipe
from imatrix.quantization.source import data_bytes

__all__ = ["BitGrid", "bit_grid"]


@dataclass(frozen=True)
class BitGrid:
    """Bits a weight, by block and kind.

    Attributes:
        grid: its values are bits a weight.
        texts: the types' names [n_rows, n_columns], an array for each part of the grid; "" where
            there is no tensor.
        types: (bits a weight, the names of the types that have as many), the fewest bits first.
    """

    grid: Grid
    texts: tuple[NDArray[np.str_], ...]
    types: tuple[tuple[float, tuple[str, ...]], ...]


def bit_grid(recipe: Recipe) -> BitGrid:
    """The tensors that the recipe has a type for, and those that stay in another type than F32.

    What stays F32 is norms, biases and routers: no recipe chooses for them.

    Raises:
        ValueError: a tensor that stays as it is has a type that the engine lacks.
    """
    shown = {
        name: recipe.types.get(name, tensor.type).upper()
        for name, tensor in recipe.source.items()
        if name in recipe.types or tensor.type != "f32"
    }
    bits = {
        kind: 8 * data_bytes(recipe.source[name].shape, kind) / recipe.source[name].values
        for name, kind in shown.items()
    }
    names = sorted(bits)
    heads = frozenset(recipe.head_blocks)
    grid = weight_grid(shown, heads, lambda name: (State.VALUE, bits[shown[name]]))
    # the same cells with the number of their type's name instead of its bits
    numbers = weight_grid(shown, heads, lambda name: (State.VALUE, names.index(shown[name])))
    texts = tuple(
        np.array([*names, ""])[np.nan_to_num(part.values, nan=-1).astype(np.int64)]
        for part in numbers.parts
    )
    alike = defaultdict(list)
    for kind in names:
        alike[bits[kind]].append(kind)
    return BitGrid(grid, texts, tuple((each, tuple(alike[each])) for each in sorted(alike)))
