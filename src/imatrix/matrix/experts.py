"""TODO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imatrix.matrix.importance import ImportanceMatrix
from imatrix.tensors import REPORTED_BLOCK, SHOWN_BLOCK, pictured_block_of
from imatrix.words import plural

__all__ = ["ExpertCoverage", "coverage_of"]

# --- experts -----------------------------------------------------------------


def expert_rows(matrix: ImportanceMatrix) -> dict[int, NDArray[np.int64]]:
    """[n_expert] by block: rows that each expert saw, of its weight (gate, up, down) with the
    fewest. Blocks without experts are left out."""
    rows: dict[int, NDArray[np.int64]] = {}
    for name, entry in matrix.items():
        block = pictured_block_of(name)
        if block is None or entry.n_counts == 1:
            continue
        have = rows.get(block)
        if have is None or len(have) < entry.n_counts:
            rows[block] = entry.counts
        elif len(have) == entry.n_counts:
            rows[block] = np.minimum(have, entry.counts)
    return dict(sorted(rows.items()))


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


def experts(matrix: ImportanceMatrix) -> Experts:
    """Rows of the experts, the weights of one block (gate, up, down) taken together."""
    counts: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = {}
    for name, entry in matrix.items():
        block = SHOWN_BLOCK.match(name)
        if block is None or entry.n_counts == 1:
            continue
        have = counts.get(int(block[1]))
        if have is None or len(have) != entry.n_counts:
            counts[int(block[1])] = entry.counts
        else:
            counts[int(block[1])] = np.minimum(have, entry.counts)
    rows = [
        (int(n), block, expert)
        for block, seen in sorted(counts.items())
        for expert, n in enumerate(seen)
    ]
    thinnest = min((row for row in rows if row[0] > 0), default=None)
    return Experts(
        n_experts=len(rows),
        n_blocks=len(counts),
        unseen=tuple((block, expert) for n, block, expert in rows if n == 0),
        thinnest=None if thinnest is None else (thinnest[1], thinnest[2], thinnest[0]),
    )


def describe_experts(found: Experts) -> str:
    """Experts in a line; "" for a matrix without any."""
    if not found.n_experts:
        return ""
    text = f"{found.n_experts} in {plural(found.n_blocks, 'block')}: "
    if found.unseen:
        few = ", ".join(f"blk.{block} expert {expert}" for block, expert in found.unseen[:4])
        more = len(found.unseen) - 4
        text += f"{len(found.unseen)} saw no rows ({few}"
        text += f" and {more} more)" if more > 0 else ")"
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
        wanted: rows that each shall have; 1 where nothing was said.
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
        """Tokens of the same kind of text that it would take for every expert to have the rows
        that were wanted, were rows in proportion to tokens.

        Args:
            tokens: tokens that have been run.

        Returns:
            Tokens in all; None where an expert saw none, so that there is no proportion.
        """
        rows = self.thinnest[2]
        return None if rows == 0 else max(tokens, math.ceil(tokens * self.wanted / rows))

    def told(self) -> str:
        """In a line: "23 of 24 experts have 50 rows or more; thinnest: blk.1 expert 1, 40 rows"."""
        block, expert, rows = self.thinnest
        return (
            f"{self.n_reached} of {self.n_experts} experts have {self.wanted} row"
            f"{'' if self.wanted == 1 else 's'} or more; thinnest: {block} expert {expert}, "
            f"{rows} row{'' if rows == 1 else 's'}"
        )


def coverage_of(counts: Mapping[str, NDArray[np.int64]], wanted: int) -> ExpertCoverage | None:
    """Coverage, from the counts by weight.

    Args:
        counts: [n_counts] by weight; weights with one count are no experts.
        wanted: rows that each expert shall have.

    Returns:
        None where no weight has experts.
    """
    blocks: dict[str, NDArray[np.int64]] = {}
    for name, found in counts.items():
        block = REPORTED_BLOCK.match(name)
        if block is None or len(found) == 1:
            continue
        # a block has one set of experts (and another width would be another set, unheard of)
        have = blocks.get(block[0])
        blocks[block[0]] = found if have is None else np.minimum(have, found)
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
