"""Collects blocks of chunks, or parts of one, from zero: what a worker of a cluster runs. See
imatrix.cluster.

The scheduler imports this module too, to unpack what it passes on: nothing native is imported
before a block runs.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from imatrix._version import __version__
from imatrix.cluster.work import Block, Work, topic
from imatrix.engine.cores import physical_cores
from imatrix.engine.settings import ModelOptions
from imatrix.errors import ClusterError, EngineDiedError, ModelError, NonFiniteError

if TYPE_CHECKING:
    from imatrix.engine.interface import NativeSession
    from imatrix.engine.models import Models

__all__ = ["collect_block", "release"]

_TELL = 2.0  # seconds between two messages of a worker; a hundred of them shall not be many


class _Loaded:
    """The model that this process has loaded, and a session on it."""

    def __init__(self) -> None:
        self.turn = threading.Lock()  # one block at a time, whatever threads Dask has
        self.owner = ""
        self.work: Work | None = None
        self.models: Models | None = None
        self.session: NativeSession | None = None
        self.machine = ""

    def take(self, work: Work) -> NativeSession:
        """A session for this work, on a model that is loaded unless it is."""
        if self.session is not None and self.models is not None and self.work == work:
            return self.session
        self.drop()
        self.owner = work.owner
        wanted = dict(work.identity)
        here = f"imatrix {__version__}"
        if wanted["collector"] != here:  # before its settings, which may be others
            raise ClusterError(
                f"{here} is installed there, the run was started with {wanted['collector']}"
            )
        from imatrix.engine.identity import describe_differences_of_work, identity_of_work
        from imatrix.engine.models import Models

        models = Models(_here(work), n_ctx=work.session.n_ctx)
        self.models = models  # for release(), while it loads
        try:
            found = identity_of_work(models, work.session)
            if differences := describe_differences_of_work(found, wanted):
                raise ModelError(
                    f"{models.trunk_file.path} is not what the run was started with: {differences}"
                )
            threads = physical_cores() if work.n_threads is None else work.n_threads
            settings = replace(work.session, n_threads=threads)
            models.check(settings.mtp)
            models.load(settings)
            self.session = models.open(settings)
            self.machine = models.machine
            if self.models is not models:
                raise ClusterError("the cluster was closed while the model was loaded")
        except BaseException:
            self.drop()
            models.free()  # release() may have taken it from here
            raise
        self.work = work
        return self.session

    def drop(self) -> None:
        """Free it."""
        models, self.models = self.models, None
        self.work = self.session = None
        if models is not None:
            models.free()


def _here(work: Work) -> ModelOptions:
    """Its options with this worker's environment in the paths."""
    model, mtp_model = (
        None if path is None else os.path.expandvars(path)
        for path in (work.model.model, work.model.mtp_model)
    )
    assert model is not None
    return replace(work.model, model=model, mtp_model=mtp_model)


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
            session = _loaded.take(work)
            loading = time.monotonic() - started
            block = _collect(session, work, tokens, lengths, first)
            block.machines = (_loaded.machine,)
            block.loading, block.seconds = loading, time.monotonic() - started - loading
            return block
        except FileNotFoundError as error:
            return Block(refusal=error)
        except (EngineDiedError, MemoryError, OSError):
            _loaded.drop()  # from zero the next time
            raise
        except Exception as error:
            _loaded.drop()
            return Block(refusal=error)


def _collect(
    session: NativeSession,
    work: Work,
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int32],
    first: int,
) -> Block:
    session.clear_sums()
    n_seq = work.session.batch.n_seq
    chunks = np.split(tokens, np.cumsum(lengths)[:-1])
    block = Block()
    last = time.monotonic()
    for at in range(0, len(chunks), n_seq):
        try:
            _step(session, chunks[at : at + n_seq], at, block)
        except EngineDiedError as error:
            error.chunk = first + at
            raise
        if time.monotonic() - last >= _TELL:
            last = time.monotonic()
            _tell(work.owner, first, len(block.scores))
    block.groups = session.groups()
    return block


def _tell(owner: str, first: int, n_chunks: int) -> None:
    """Say how far this worker is, for the progress where the run was started."""
    from distributed import get_worker

    get_worker().log_event(topic(owner), [first, n_chunks])


def _step(session: NativeSession, group: list[NDArray[np.int32]], at: int, block: Block) -> None:
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
    # not in turn: it shall not wait for the block, nor, as free() would, for its step
    if _loaded.owner == owner:
        session, models = _loaded.session, _loaded.models
        _loaded.models = None
        if session is not None:
            session.cancel()
        if models is not None:
            models.free()
