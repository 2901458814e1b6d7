"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from imatrix.engine.sums import BlockSums
from imatrix.errors import NonFiniteError
from imatrix.formats.checkpoint import Group, Setting

__all__ = ["Block", "Work", "add_parts", "topic"]


@dataclass(frozen=True)
class Work:
    """What a worker has to know to collect a block. One is loaded in a process at a time.

    Attributes:
        owner: whose it is, for release().
        collector: arguments of Collector; paths may hold environment variables.
        mtp, process_output, signed_sums, perplexity: as in Collector.run.
        identity: what decides the numbers, and so must be the same everywhere, by name.
    """

    owner: str
    collector: tuple[tuple[str, Any], ...]
    mtp: bool
    process_output: bool
    signed_sums: bool
    perplexity: bool
    identity: tuple[tuple[str, Setting], ...]


@dataclass
class Block:
    """What came of a block, or of a part of one.

    Attributes:
        groups: its sums and counts, by weights that were fed by the same rows.
        scores: (nll, nll_sq, n_scored) of each chunk; None for one that had a NaN, whose sums do
            not count.
        nonfinite: of those chunks, by their place in the block: the error.
        refusal: why this worker cannot take part; all else is empty then.
        machines: what the workers compute with, in words, each once.
        seconds: that the chunks took there.
        loading: seconds that it took to load the model, 0 where it was loaded.
    """

    groups: list[Group] = field(default_factory=list)
    scores: list[tuple[float, float, int] | None] = field(default_factory=list)
    nonfinite: dict[int, NonFiniteError] = field(default_factory=dict)
    refusal: Exception | None = None
    machines: tuple[str, ...] = ()
    seconds: float = 0.0
    loading: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the sums and counts."""
        return sum(
            sums.nbytes + counts.nbytes + (0 if signed is None else signed.nbytes)
            for _, sums, counts, signed in self.groups
        )


def add_parts(a: Block, b: Block) -> Block:
    """Two parts of a block that follow each other, as one; what a worker runs."""
    if (refusal := a.refusal or b.refusal) is not None:
        return Block(refusal=refusal)
    sums = BlockSums()
    sums.add(a.groups)
    sums.add(b.groups)
    n = len(a.scores)
    return Block(
        groups=sums.taken(),
        scores=a.scores + b.scores,
        nonfinite={**a.nonfinite, **{n + at: error for at, error in b.nonfinite.items()}},
        machines=tuple(dict.fromkeys(a.machines + b.machines)),
        seconds=a.seconds + b.seconds,
        loading=a.loading + b.loading,
    )


def topic(owner: str) -> str:
    """What Dask's events of an owner's workers are about: [number of the first chunk of a block or
    part, chunks of it that are collected]."""
    return f"imatrix-{owner}"
