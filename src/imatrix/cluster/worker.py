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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imatrix._version import __version__
from imatrix.cluster.work import Block, Work, topic
from imatrix.errors import ClusterError, EngineDiedError, NonFiniteError

if TYPE_CHECKING:
    from imatrix.collect.collector import Collector

__all__ = ["collect_block", "release"]

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
        from imatrix.collect.collector import Collector

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
