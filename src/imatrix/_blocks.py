"""Blocks of chunks, or parts of one, collected from zero by the workers of a cluster: see
imatrix.cluster.

What a worker runs, and how what comes back is added. Imported by the scheduler too, which unpacks
what it passes on: nothing native is imported before a block runs.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imatrix._version import __version__
from imatrix.errors import ClusterError, EngineDiedError, NonFiniteError
from imatrix.formats.checkpoint import Group, Setting

if TYPE_CHECKING:
    from imatrix.collector import Collector

# Sums, counts and signed sums, as a Group has them.
Data = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64] | None]

__all__ = [
    "Block",
    "BlockSums",
    "Work",
    "add_parts",
    "collect_block",
    "differing",
    "release",
    "topic",
]


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


class BlockSums:
    """Sums and counts by weight, added block by block or kept from a checkpoint; to the rest of a
    run, a session."""

    def __init__(self) -> None:
        # by the weights that share them; arrays are our own
        self._groups: dict[tuple[str, ...], Data] = {}
        self._group_of: dict[str, tuple[str, ...]] = {}

    def add(self, groups: list[Group]) -> None:
        """Add a block's: all of it or, after an error, nothing. Weights that share their rows in
        one block and do not in another get sums of their own.

        Raises:
            ClusterError: it has other shapes than the blocks before it.
            MemoryError: no room for weights that those did not have.
        """
        for names, sums, counts, signed in groups:
            self._check(names, (sums, counts, signed))
        for names, sums, counts, signed in groups:
            self._make_room(tuple(names), (sums, counts, signed))
        for names, sums, counts, signed in groups:  # from here on nothing can fail
            key = tuple(names)
            for each in (key,) if key in self._groups else [(name,) for name in names]:
                have_sums, have_counts, have_signed = self._groups[each]
                have_sums += sums
                have_counts += counts
                if have_signed is not None and signed is not None:
                    have_signed += signed

    def _check(self, names: list[str], data: Data) -> None:
        for name in names:
            if (key := self._group_of.get(name)) is None:
                continue
            have = _shapes_told(self._groups[key])
            if have != (sent := _shapes_told(data)):
                raise ClusterError(f"{name}: a worker sent {sent}, the blocks before it had {have}")

    def _make_room(self, key: tuple[str, ...], data: Data) -> None:
        """Zeros for weights that are new, and each by itself where they do not share as here."""
        if key in self._groups:
            return
        if not any(name in self._group_of for name in key):
            self._put(key, _zeros(data))
            return
        for name in key:
            together = self._group_of.get(name, ())
            if not together:
                self._put((name,), _zeros(data))
            elif len(together) > 1:
                have = self._groups.pop(together)
                for each in together:
                    self._put((each,), _copy(have))

    def _put(self, key: tuple[str, ...], data: Data) -> None:
        self._groups[key] = data
        self._group_of.update(dict.fromkeys(key, key))

    def restore(
        self,
        names: list[str],
        sums: NDArray[np.float64],
        counts: NDArray[np.int64],
        signed_sums: NDArray[np.float64] | None = None,
    ) -> None:
        """As _session.Session.restore."""
        self._put(tuple(names), _copy((sums, counts, signed_sums)))

    def taken(self) -> list[Group]:
        """groups(), the arrays themselves: nothing can be added any more."""
        return [(list(names), *data) for names, data in self._groups.items() if data[1].any()]

    def groups(self) -> list[Group]:
        """As _session.Session.groups."""
        return [
            (list(names), *_copy(data)) for names, data in self._groups.items() if data[1].any()
        ]

    def snapshot(self) -> dict[str, Data]:
        """As _session.Session.snapshot."""
        return {
            name: _copy(data)
            for names, data in self._groups.items()
            if data[1].any()
            for name in names
        }

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """As _session.Session.counts."""
        return {
            name: counts.copy() for names, (_, counts, _) in self._groups.items() for name in names
        }


def _zeros(data: Data) -> Data:
    sums, counts, signed = data
    return (
        np.zeros_like(sums),
        np.zeros_like(counts),
        None if signed is None else np.zeros_like(signed),
    )


def _copy(data: Data) -> Data:
    sums, counts, signed = data
    return sums.copy(), counts.copy(), None if signed is None else signed.copy()


def _shapes_told(data: Data) -> str:
    sums, counts, signed = data
    told = "no signed sums" if signed is None else f"signed sums {signed.shape}"
    return f"sums {sums.shape}, counts {counts.shape} and {told}"


# --- on a worker ---------------------------------------------------------------------------------


class _Loaded:
    """The model that this process has loaded."""

    def __init__(self) -> None:
        self.turn = threading.Lock()  # one block at a time, whatever threads Dask has
        self.owner = ""
        self.work: Work | None = None
        self.collector: Collector | None = None
        self.session: Any = None
        self.machine = ""

    def take(self, work: Work) -> None:
        """Load what this work needs, unless it is loaded."""
        if self.work == work and self.collector is not None:
            return
        self.drop()
        self.owner = work.owner
        wanted = dict(work.identity)
        here = f"imatrix {__version__}"
        if wanted["collector"] != here:  # before its arguments, which may be others
            raise ClusterError(
                f"{here} is installed there, the run was started with {wanted['collector']}"
            )
        from imatrix.collector import Collector

        arguments = dict(work.collector)
        for name in ("model", "mtp_model"):
            if arguments[name] is not None:
                arguments[name] = os.path.expandvars(arguments[name])
        collector = Collector(**arguments)
        self.collector = collector  # for release(), while it loads
        try:
            self.session = collector._block_session(
                wanted,
                mtp=work.mtp,
                process_output=work.process_output,
                signed_sums=work.signed_sums,
                perplexity=work.perplexity,
            )
            self.machine = collector._models.machine
        except BaseException:
            self.drop()
            raise
        self.work = work

    def drop(self) -> None:
        """Free it."""
        collector, self.collector = self.collector, None
        self.work = self.session = None
        if collector is not None:
            collector.close()


_TELL = 2.0  # seconds between two messages of a worker; a hundred of them shall not be many

_loaded = _Loaded()
atexit.register(_loaded.drop)


def collect_block(
    work: Work, tokens: NDArray[np.int32], lengths: NDArray[np.int32], first: int
) -> Block:
    """Collect chunks from zero; what a worker runs.

    Args:
        tokens: [sum of lengths] int32, one chunk behind the other.
        lengths: [n chunks] int32.
        first: number of the first chunk in the text.

    Raises:
        EngineDiedError, MemoryError, OSError: may not happen again, or not on another machine.
            Of an EngineDiedError `chunk` is the number of the (first) chunk that ran.
    """
    with _loaded.turn:
        started = time.monotonic()
        try:
            _loaded.take(work)
            loading = time.monotonic() - started
            block = _collect(work, tokens, lengths, first)
            return _finished(block, loading, time.monotonic() - started - loading)
        except FileNotFoundError as error:
            return Block(refusal=error)
        except (EngineDiedError, MemoryError, OSError):
            _loaded.drop()  # from zero the next time
            raise
        except Exception as error:
            _loaded.drop()
            return Block(refusal=error)


def _finished(block: Block, loading: float, seconds: float) -> Block:
    block.machines = (_loaded.machine,)
    block.loading, block.seconds = loading, seconds
    return block


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


def _collect(
    work: Work, tokens: NDArray[np.int32], lengths: NDArray[np.int32], first: int
) -> Block:
    session = _loaded.session
    session.clear_sums()
    n_seq = dict(work.collector)["n_seq"]
    chunks = np.split(tokens, np.cumsum(lengths)[:-1])
    block = Block()
    told = time.monotonic()
    for at in range(0, len(chunks), n_seq):
        try:
            _step(session, chunks[at : at + n_seq], at, block)
        except EngineDiedError as error:
            error.chunk = first + at
            raise
        if time.monotonic() - told >= _TELL:
            told = time.monotonic()
            _tell(work.owner, first, len(block.scores))
    block.groups = session.groups()
    return block


def _tell(owner: str, first: int, n_chunks: int) -> None:
    """Say how far this worker is, for the progress where the run was started."""
    from distributed import get_worker

    get_worker().log_event(topic(owner), [first, n_chunks])


def topic(owner: str) -> str:
    """What Dask's events of an owner's workers are about: [number of the first chunk of a block or
    part, chunks of it that are collected]."""
    return f"imatrix-{owner}"


def _step(session: Any, group: list[NDArray[np.int32]], at: int, block: Block) -> None:
    lengths = np.array([len(chunk) for chunk in group], dtype=np.int32)
    try:
        block.scores += session.step(np.concatenate(group), lengths)
    except NonFiniteError as error:
        if len(group) > 1:  # which of them it was shows when each runs by itself
            for i, chunk in enumerate(group):
                _step(session, [chunk], at + i, block)
            return
        block.nonfinite[at] = error
        block.scores.append(None)


def release(owner: str) -> None:
    """Free what is loaded for an owner. A block that is on its way ends with an error."""
    # not in turn: it shall not wait for the block
    if _loaded.owner == owner:
        collector, _loaded.collector = _loaded.collector, None
        if collector is not None:
            collector.close()  # the engine's process ends at once


def differing(wanted: Mapping[str, Setting], found: Mapping[str, Setting]) -> str:
    """What of `wanted` is otherwise in `found`, in words; "" for nothing."""
    return "; ".join(
        f"{name} is {found.get(name, 'absent')} there and {value} here"
        for name, value in wanted.items()
        if found.get(name) != value
    )
