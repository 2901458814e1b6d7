"""What the page tells of a recipe: its size and KL, what each kind of tensor gets, and the head."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imatrix.matrix.importance import ImportanceMatrix
from imatrix.quantization.frontier import NORMAL_95
from imatrix.report.parts import Fact
from imatrix.report.words import count
from imatrix.tensors import block_of, kind_of
from imatrix.words import size

if TYPE_CHECKING:
    from imatrix.quantization.recipe import Recipe

__all__ = ["RecipeKind", "RecipeView", "check_matrix", "load_recipe", "recipe_view"]

# (kind, part) of the tensors that no recipe chooses for
_REST = ("norms, biases and others that stay F32", "")


@dataclass(frozen=True)
class RecipeKind:
    """The tensors of one kind in one part of the model.

    Attributes:
        kind: the name without its block.
        part: "trunk", "head", or "no block".
        by_type: bytes of their data by type, of the types that come up.
        tensors: how many there are.
    """

    kind: str
    part: str
    by_type: Mapping[str, int]
    tensors: int

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(self.by_type.values())


@dataclass(frozen=True)
class RecipeView:
    """A recipe as the template shows it.

    Attributes:
        name: of its file, or what to call it.
        recipe: the recipe.
        facts: the recipe in labels and values.
        types: the types that come up, the fewest bits a weight first.
        kinds: by kind and part, the most bytes first; what stays F32 is one line at the end.
        totals: bytes by type, of all tensors.
    """

    name: str
    recipe: Recipe
    facts: Sequence[Fact]
    types: Sequence[str]
    kinds: Sequence[RecipeKind]
    totals: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Of all tensors' data."""
        return sum(self.totals.values())


def load_recipe(recipe: Recipe | str | os.PathLike[str]) -> tuple[Recipe, str]:
    """A recipe and what to call it.

    Raises:
        ValueError: the file is no recipe.
        OSError: it cannot be read.
    """
    from imatrix.quantization.recipe import Recipe  # here: it needs the native part

    if isinstance(recipe, Recipe):
        return recipe, "the recipe"
    return Recipe.load(recipe), Path(recipe).name


def check_matrix(recipe: Recipe, called: str, matrix: ImportanceMatrix, name: str) -> None:
    """Refuse a recipe that has nothing in common with the matrix.

    Raises:
        ValueError: no tensor of the recipe has an entry in the matrix.
    """
    if not any(each in matrix for each in recipe.source):
        raise ValueError(
            f"{called} is for another model than {name}: of the {len(recipe.source)} tensors of "
            f"{recipe.model} none has an entry in the matrix"
        )


def recipe_view(recipe: Recipe, called: str) -> RecipeView:
    """The recipe with its sums.

    Raises:
        ValueError: a type is none of the engine's, or does not fit its tensor.
    """
    from imatrix.quantization.source import data_bytes  # here: it needs the native part

    heads = frozenset(recipe.head_blocks)
    kinds: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    bits, totals = {}, defaultdict[str, int](int)
    for name, tensor in recipe.source.items():
        kind = recipe.types.get(name, tensor.type).upper()
        try:
            n_bytes = data_bytes(tensor.shape, kind)
        except ValueError as error:
            raise ValueError(f"{called}: {name}: {error}") from None
        place = (kind_of(name).removesuffix(".weight"), _part(name, heads))
        if kind == "F32" and name not in recipe.types:
            place = _REST
        kinds[place][kind].append(n_bytes)
        totals[kind] += n_bytes
        bits[kind] = n_bytes / tensor.values
    lines = [
        RecipeKind(*place, {each: sum(sizes) for each, sizes in by_type.items()},
                   sum(map(len, by_type.values())))
        for place, by_type in kinds.items()
    ]  # fmt: skip
    lines.sort(key=lambda line: (line.part == "", -line.bytes))
    types = sorted(totals, key=lambda kind: (bits[kind], kind))
    return RecipeView(called, recipe, _facts(recipe), types, lines, totals)


def _part(name: str, heads: frozenset[int]) -> str:
    block = block_of(name)
    if block is None:
        return "no block"
    return "head" if block in heads else "trunk"


def _facts(recipe: Recipe) -> list[Fact]:
    predicted = recipe.predicted_kl
    return [
        Fact("Model", recipe.model, recipe.architecture),
        Fact("Size", size(recipe.bytes), f"{recipe.bytes:,} bytes, the whole file"),
        Fact("Bits a weight", f"{recipe.bits_per_weight:.2f}"),
        _measured(recipe),
        Fact(
            "KL divergence, predicted",
            "" if predicted is None else f"{predicted:.4g} nats a token",
            "the sum of what the tensors cost alone, fitted to what was measured",
        ),
        Fact(
            "Measured on",
            recipe.text,
            f"{count(recipe.chunks, 'chunk')} of {recipe.n_ctx:,} tokens" if recipe.chunks else "",
        ),
        *_head_facts(recipe),
    ]


def _measured(recipe: Recipe) -> Fact:
    label, measured = "KL divergence, measured", recipe.measured_kl
    if measured is None:
        return Fact(label, "", "the recipe was not measured as a whole")
    note = count(measured.positions, "position")
    if not math.isnan(measured.error):
        note = f"± {NORMAL_95 * measured.error:.2g} (95 %), {note}"
    return Fact(label, f"{measured.value:.4g} nats a token", note)


def _head_facts(recipe: Recipe) -> list[Fact]:
    head = recipe.head
    if head is None:
        if recipe.head_blocks:
            return [Fact("Head", "not chosen for", "it has the types that the table tells")]
        return [Fact("Head", "none", "the model has no MTP/NextN head")]
    found = [Fact("Head", head.label, size(head.bytes) if head.bytes else "")]
    if not math.isnan(head.accepted):
        note = f"of {head.depth} drafted"
        if not math.isnan(head.accepted_low):
            note += f"; {head.accepted_low:.3f} to {head.accepted_high:.3f} (95 %)"
        found.append(Fact("Accepted a draft", f"{head.accepted:.3f}", note))
    if not math.isnan(head.speed_up):
        found.append(
            Fact(
                "Speed-up of decoding",
                f"{head.speed_up:.2f}",
                "expected where reading weights takes the time, beside the trunk alone",
            )
        )
    return found
