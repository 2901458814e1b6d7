"""Rows of the experts of a matrix: what each of them saw, and which of them saw little."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Entry
from imatrix.tensors import block_label, block_of
from imatrix.words import few, plural

__all__ = [
    "ExpertCoverage",
    "Experts",
    "coverage_of",
    "describe_experts",
    "expert_rows",
    "experts",
    "fewest_rows",
    "layer_rows",
]

_Block = TypeVar("_Block", bound=Hashable)


def fewest_rows(
    counts: Iterable[tuple[_Block, NDArray[np.int64]]],
) -> dict[_Block, NDArray[np.int64]]:
    """Rows that the experts of each block saw.

    An expert has several weights (gate, up, down). Its rows are those of the weight that saw the
    fewest of them, since that is the one whose mean is the least certain.

    If the weights of a block have different numbers of experts, those of the largest number are
    the block's experts, and weights with fewer are left aside: expert 5 of 64 is another one than
    expert 5 of 128. GroveMoE has such blocks: each of its chunk experts (ffn_up_chexps) stands for
    a group of the others, and sees the rows of that group (src/models/grovemoe.cpp).

    Args:
        counts: (block, [n_counts]) of each weight; one with a single count has no experts.

    Returns:
        [n_expert] by block, in the order in which the blocks come up; without those that have no
        experts.
    """
    rows: dict[_Block, NDArray[np.int64]] = {}
    for block, found in counts:
        if len(found) == 1:
            continue
        have = rows.get(block)
        if have is None or len(have) < len(found):
            rows[block] = found
        elif len(have) == len(found):
            rows[block] = np.minimum(have, found)
    return rows


def expert_rows(matrix: Mapping[str, Entry]) -> dict[int, NDArray[np.int64]]:
    """[n_expert] by block, in the order of the blocks, see fewest_rows; weights outside the blocks
    are left out."""
    rows = fewest_rows(
        (block, entry.counts)
        for name, entry in matrix.items()
        if (block := block_of(name)) is not None
    )
    return dict(sorted(rows.items()))


def layer_rows(names: Sequence[str], matrix: Mapping[str, Entry]) -> dict[str, int]:
    """Rows of the experts of one block, or of its weights if it has no experts.

    Args:
        names: the weights of the block.

    Returns:
        n_experts: experts of the block; 0 without.
        unseen: experts without a row.
        rows_min, rows_max: rows of an expert in a weight, the fewest and the most; of a weight if
            the block has no experts.
    """
    of_experts = [name for name in names if matrix[name].n_counts > 1]
    rows = fewest_rows(("", matrix[name].counts) for name in of_experts).get("")
    counted = [matrix[name].counts for name in of_experts or names]
    return {
        "n_experts": 0 if rows is None else len(rows),
        "unseen": 0 if rows is None else int(np.count_nonzero(rows == 0)),
        "rows_min": min(int(counts.min()) for counts in counted),
        "rows_max": max(int(counts.max()) for counts in counted),
    }


@dataclass(frozen=True)
class Experts:
    """Which experts saw how much.

    Attributes:
        n_experts: experts, those of all blocks together.
        n_blocks: blocks that have any.
        unseen: (block, expert) of those without a row.
        thinnest: (block, expert, rows) of the one with the fewest, those without any left out.
    """

    n_experts: int
    n_blocks: int
    unseen: tuple[tuple[int, int], ...]
    thinnest: tuple[int, int, int] | None


def experts(matrix: Mapping[str, Entry]) -> Experts:
    """Rows of the experts, the weights of one block taken together, see fewest_rows."""
    by_block = expert_rows(matrix)
    rows = [
        (int(n), block, expert) for block, seen in by_block.items() for expert, n in enumerate(seen)
    ]
    thinnest = min((row for row in rows if row[0] > 0), default=None)
    return Experts(
        n_experts=len(rows),
        n_blocks=len(by_block),
        unseen=tuple((block, expert) for n, block, expert in rows if n == 0),
        thinnest=None if thinnest is None else (thinnest[1], thinnest[2], thinnest[0]),
    )


def describe_experts(found: Experts) -> str:
    """Experts in a line; "" for a matrix without any."""
    if not found.n_experts:
        return ""
    text = f"{found.n_experts} in {plural(found.n_blocks, 'block')}: "
    if found.unseen:
        first = few([f"blk.{block} expert {expert}" for block, expert in found.unseen], 4)
        text += f"{len(found.unseen)} saw no rows ({first})"
    else:
        text += "all saw rows"
    if found.thinnest is not None:
        block, expert, rows = found.thinnest
        text += f"; thinnest: blk.{block} expert {expert}, {plural(rows, 'row')}"
    return text


@dataclass(frozen=True)
class ExpertCoverage:
    """Activation rows of the experts so far; an expert has those of its weight with the fewest.

    Attributes:
        n_experts: experts, those of all blocks together, the head's too.
        n_reached: experts with `wanted` rows or more.
        n_unseen: experts without a row.
        wanted: rows that each is to have; 1 if no number was given.
        thinnest: (block, expert, rows) of the expert with the fewest rows, as ("blk.3", 17, 40),
            the first of several.
    """

    n_experts: int
    n_reached: int
    n_unseen: int
    wanted: int
    thinnest: tuple[str, int, int]

    @property
    def reached(self) -> bool:
        """Whether every expert has the rows that were wanted."""
        return self.n_reached == self.n_experts

    def tokens_needed(self, tokens: int) -> int | None:
        """Tokens of the same kind of text after which every expert would have the rows that were
        wanted, if rows grow in proportion to tokens.

        Args:
            tokens: tokens that have been run.

        Returns:
            Tokens in all; None if an expert saw no row, since there is no proportion then.
        """
        rows = self.thinnest[2]
        return None if rows == 0 else max(tokens, math.ceil(tokens * self.wanted / rows))

    def told(self) -> str:
        """In a line: "23 of 24 experts have 50 rows or more; thinnest: blk.1 expert 1, 40 rows"."""
        block, expert, rows = self.thinnest
        return (
            f"{self.n_reached} of {self.n_experts} experts have {plural(self.wanted, 'row')} or "
            f"more; thinnest: {block} expert {expert}, {plural(rows, 'row')}"
        )


def coverage_of(counts: Mapping[str, NDArray[np.int64]], wanted: int) -> ExpertCoverage | None:
    """Coverage, from the counts by weight.

    Args:
        counts: [n_counts] by weight; weights with one count are no experts.
        wanted: rows that each expert is to have.

    Returns:
        None if no weight has experts.
    """
    blocks = fewest_rows(
        (block, found) for name, found in counts.items() if (block := block_label(name)) is not None
    )
    if not blocks:
        return None
    rows = [
        (int(n), block, expert) for block, all_ in blocks.items() for expert, n in enumerate(all_)
    ]
    least = min(rows, key=lambda each: each[0])
    return ExpertCoverage(
        n_experts=len(rows),
        n_reached=sum(n >= wanted for n, _, _ in rows),
        n_unseen=sum(n == 0 for n, _, _ in rows),
        wanted=wanted,
        thinnest=(least[1], least[2], least[0]),
    )
