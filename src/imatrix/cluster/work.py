"""What goes to a worker, and what comes back. The scheduler unpacks both, to pass them on: nothing
native is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field

from imatrix.engine.settings import ModelOptions, SessionSettings
from imatrix.engine.sums import BlockSums
from imatrix.errors import NonFiniteError
from imatrix.formats.checkpoint import Group, Setting

__all__ = ["Block", "BlockSize", "Work", "add_parts", "topic"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker has to know to collect a block. One is loaded in a process at a time.

    Attributes:
        owner: whose it is, for release().
        model: how the model is loaded; its paths may hold environment variables of the worker.
        session: settings of the session, the same on all workers but for the threads.
        n_threads: threads to compute with; None for the worker's physical cores.
        identity: what decides the numbers, and so must be the same everywhere, by name.
    """

    owner: str
    model: ModelOptions
    session: SessionSettings
    n_threads: int | None
    identity: tuple[tuple[str, Setting], ...]


@dataclass(frozen=True)
class BlockSize:
    """Chunks of a block, and of a part of it, which one worker collects; both decide the last bits of
    the sums."""

    block: int
    part: int


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
        loading: seconds that it took to load the model, 0 if it was loaded.
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
    """Names the events by which an owner's workers tell Dask how far they are. Each is [number of
    the first chunk of a block or part, chunks of it that are collected]."""
    return f"imatrix-{owner}"
