"""What is thin: experts and weights with few rows, and channels that outweigh the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import THIN
from imatrix.matrix.experts import ExpertCoverage, coverage_of, expert_rows
from imatrix.pictures.numbers import STATISTICS, profile
from imatrix.report.parts import ExpertBlock, Heavy, Part
from imatrix.report.subject import Subject

__all__ = ["Thin"]


@dataclass(frozen=True, eq=False)
class Thin:
    """Which experts and weights saw few rows, and which channels outweigh the others."""

    subject: Subject

    @cached_property
    def experts(self) -> ExpertCoverage | None:
        """Rows of the experts, THIN wanted of each; None without experts."""
        return coverage_of(
            {name: entry.counts for name, entry in self.subject.matrix.items()}, THIN
        )

    @property
    def more_text(self) -> str:
        """What it would take for every expert to have THIN rows; "" if all have."""
        coverage = self.experts
        if coverage is None or coverage.reached:
            return ""
        if not self.subject.tokens:
            return "How much text it would take cannot be told: the tokens are not known."
        needed = coverage.tokens_needed(self.subject.tokens)
        if needed is None:
            return (
                f"No text reached {coverage.n_unseen:,} of them in {self.subject.tokens:,} tokens; more of "
                "the same may not either. Add text of another kind: code, other languages, chats."
            )
        return (
            f"About {needed:,} tokens of such text would do, {needed - self.subject.tokens:,} more; text "
            "of another kind may reach the thin ones sooner."
        )

    @cached_property
    def _expert_rows(self) -> dict[int, NDArray[np.int64]]:
        return expert_rows(self.subject.matrix)

    @cached_property
    def expert_blocks(self) -> list[ExpertBlock]:
        """Rows of the experts by block."""
        return [
            ExpertBlock(
                block=block,
                part=self.subject.part_of_block(block),
                n_experts=len(rows),
                unseen=int(np.count_nonzero(rows == 0)),
                few=int(np.count_nonzero((rows > 0) & (rows < THIN))),
                fewest=int(rows.min()),
                median=float(np.median(rows)),
                most=int(rows.max()),
            )
            for block, rows in self._expert_rows.items()
        ]

    @cached_property
    def thinnest(self) -> list[tuple[int, Part, int, int]]:
        """(block, part, expert, rows), the fewest rows first."""
        found = [
            (int(n), block, expert)
            for block, rows in self._expert_rows.items()
            for expert, n in enumerate(rows)
        ]
        found.sort()
        return [(block, self.subject.part_of_block(block), expert, n) for n, block, expert in found]

    @cached_property
    def blind(self) -> list[str]:
        """Weights of experts with one count for all of them."""
        return [
            name
            for name, entry in self.subject.matrix.items()
            if "_exps." in name and entry.n_counts == 1
        ]

    @cached_property
    def without_rows(self) -> list[str]:
        """Weights that saw no row."""
        return [name for name, entry in self.subject.matrix.items() if not entry.counts.any()]

    @cached_property
    def few_rows(self) -> list[tuple[str, int]]:
        """(weight, rows) of those without experts that saw some, but fewer than THIN."""
        return [
            (name, int(entry.counts[0]))
            for name, entry in self.subject.matrix.items()
            if entry.n_counts == 1 and 0 < entry.counts[0] < THIN
        ]

    @cached_property
    def heavy(self) -> list[Heavy]:
        """The weights by their heaviest channel, the heaviest first."""
        found = []
        for name, entry in self.subject.matrix.items():
            pooled = profile(entry)
            if pooled is None or not (order := pooled.heaviest(1)):
                continue
            found.append(
                Heavy(
                    name=name,
                    part=self.subject.part_of(name),
                    channel=order[0],
                    share=float(pooled.shares[order[0]]),
                    top=STATISTICS["top"].of(entry),
                    peak=STATISTICS["peak"].of(entry),
                    constant=pooled.constant(order[0]),
                )
            )
        return sorted(found, key=lambda each: -each.peak)
