"""The blocks of a run on their way: sent to the workers, waited for, handed on in order."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from imatrix.cluster.schedulers import AND_NOW, asking_scheduler, import_distributed, scheduler_gone
from imatrix.cluster.work import Block, Work, add_parts, topic
from imatrix.cluster.worker import collect_block
from imatrix.errors import ClusterError, EngineDiedError
from imatrix.text.chunks import Chunk

__all__ = ["BlockQueue", "ClusterUse"]

# Blocks that a worker has or that wait for it. Two hide the way there and back; the others keep
# workers busy while the block that has to be added next is late, because its worker is slow or was
# lost. More would be more sums that wait in the workers' memory.
_AHEAD = 4
_LOOK = 1.0  # seconds between two looks around while a block is waited for
_LONELY = 30.0  # seconds without a worker before that is a warning


@dataclass(frozen=True)
class ClusterUse:
    """How a cluster fared in a run.

    Attributes:
        blocks: blocks that were added.
        nbytes: bytes of sums and counts that came over the network for them.
        seconds: that workers spent on their chunks, together.
        loading: that workers spent on loading the model, together.
        waited: that this process waited for a block to come.
        adding: that this process spent on adding them, checkpoints and progress included.
    """

    blocks: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    loading: float = 0.0
    waited: float = 0.0
    adding: float = 0.0


@dataclass(frozen=True)
class _Sent:
    """A block that is under way."""

    chunks: list[Chunk]
    first: int  # number of its first chunk, skipped ones counted
    future: Any
    n_parts: int

    def __str__(self) -> str:
        return f"the block of chunks {self.first} to {self.first + len(self.chunks) - 1}"


class BlockQueue:
    """Sends blocks to the workers of a cluster, and hands them on in the order of the text.

    Args:
        client: a distributed.Client.
        attempts: how often a block is tried if the engine's process ends.

    Attributes:
        owner: whose the blocks are: no other queue has this name.
        use: how the current run fares, or else the last one did.
    """

    def __init__(self, client: Any, attempts: int) -> None:
        self.owner = uuid.uuid4().hex
        self.use = ClusterUse()
        self._client = client
        self._attempts = attempts
        self._numbers = itertools.count()
        self._machine = ""  # of the first block
        self._seen, self._seen_at = 0, -math.inf  # workers, and when they were counted
        self._heard: dict[int, int] = {}  # chunks collected, by number of the first of their part

    def n_workers(self) -> int:
        """Workers that are there now.

        Raises:
            ClusterError: the scheduler does not answer.
        """
        with asking_scheduler():
            return len(self._client.nthreads())

    def recent_n_workers(self) -> int:
        """n_workers(), as it was a moment ago: asking takes a millisecond, and so may a block."""
        if time.monotonic() - self._seen_at >= _LOOK:
            self._seen, self._seen_at = self.n_workers(), time.monotonic()
        return self._seen

    @contextmanager
    def collecting(
        self,
        work: Work,
        blocks: Iterator[list[Chunk]],
        *,
        part: int,
        first: int,
        look: Callable[[int], None],
    ) -> Iterator[Iterator[tuple[list[Chunk], Block]]]:
        """Have blocks collected: an iterator of each with what came of it, in their order.

        Args:
            blocks: chunks of each; taken as workers come free, so that no more of the text is
                held than is worked on.
            part: chunks of the parts that a block is cut into.
            first: number of the first chunk, for messages.
            look: called about once a second while a block is waited for, with the number of
                chunks that are collected and wait for their turn; what it raises ends the run.

        The iterator raises:
            ClusterError: a worker cannot take part, a block ended one engine or one worker after
                the other, or the scheduler is gone.
        """
        self.use = ClusterUse()
        self._heard.clear()
        waiting: deque[_Sent] = deque()
        about = topic(self.owner)
        with asking_scheduler():
            self._client.subscribe_topic(about, self._hear)
        try:
            yield self._in_order(work, blocks, part, first, look, waiting)
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                if waiting:
                    self._client.cancel([sent.future for sent in waiting])
                self._client.unsubscribe_topic(about)

    def _hear(self, event: tuple[float, list[int]]) -> None:
        """A worker tells how far it is; in Dask's thread."""
        first, n_chunks = event[1]
        self._heard[first] = n_chunks

    def _ahead(self, waiting: Iterable[_Sent]) -> int:
        """Chunks that are collected, of blocks whose turn has not come."""
        heard = self._heard.copy()  # Dask's thread adds to it
        n = 0
        for sent in waiting:
            size = len(sent.chunks)
            if sent.future.status == "finished":
                n += size
            else:
                n += sum(heard.get(at, 0) for at in range(sent.first, sent.first + size))
        return n

    def _in_order(
        self,
        work: Work,
        blocks: Iterator[list[Chunk]],
        part: int,
        first: int,
        look: Callable[[int], None],
        waiting: deque[_Sent],
    ) -> Iterator[tuple[list[Chunk], Block]]:
        while True:
            wanted = _AHEAD * max(1, self.recent_n_workers())
            under_way = sum(sent.n_parts for sent in waiting)
            # parts that workers still add keep no engine busy: at least so many blocks are sent
            while under_way < wanted or len(waiting) < _AHEAD:
                if (chunks := next(blocks, None)) is None:
                    break
                waiting.append(self._send(work, chunks, part, first))
                under_way += waiting[-1].n_parts
                first += len(chunks)
            if not waiting:
                return
            started = time.monotonic()
            block = self._result(waiting[0], waiting, look)
            sent = waiting.popleft()
            for at in range(sent.first, sent.first + len(sent.chunks)):
                self._heard.pop(at, None)
            self.check_machines(block)
            came = time.monotonic()
            yield sent.chunks, block
            self.use = replace(
                self.use,
                blocks=self.use.blocks + 1,
                nbytes=self.use.nbytes + block.nbytes,
                seconds=self.use.seconds + block.seconds,
                loading=self.use.loading + block.loading,
                waited=self.use.waited + came - started,
                adding=self.use.adding + time.monotonic() - came,
            )

    def _send(self, work: Work, chunks: list[Chunk], size: int, first: int) -> _Sent:
        """Submit a block in parts of this size."""
        number = next(self._numbers)
        options = {"pure": False, "priority": -number}  # what is added first is done first
        with asking_scheduler():
            parts = [
                self._client.submit(
                    collect_block,
                    work,
                    np.concatenate([chunk.tokens for chunk in part]),
                    np.array([len(chunk.tokens) for chunk in part], np.int32),
                    first + at,
                    key=f"imatrix-block-{self.owner}-{number}-{at}",
                    retries=self._attempts - 1,
                    **options,
                )
                for at in range(0, len(chunks), size)
                if (part := chunks[at : at + size])
            ]
            n_parts = len(parts)
            while len(parts) > 1:  # neighbours, whatever comes first
                pairs = zip(parts[::2], parts[1::2], strict=False)
                added = [
                    self._client.submit(
                        add_parts,
                        *pair,
                        # a name of its own: Dask schedules tasks of one name alike
                        key=f"imatrix-add-{self.owner}-{number}-{len(parts)}-{at}",
                        retries=self._attempts - 1,
                        **options,
                    )
                    for at, pair in enumerate(pairs)
                ]
                parts = added + parts[2 * len(added) :]
        return _Sent(chunks, first, parts[0], n_parts)

    def _result(self, sent: _Sent, waiting: deque[_Sent], look: Callable[[int], None]) -> Block:
        distributed = import_distributed()
        lonely = 0.0
        while True:
            try:
                # not result(): sums that take longer than this to come would never come
                with asking_scheduler(distributed.TimeoutError):
                    error = sent.future.exception(timeout=_LOOK)
                break
            except distributed.TimeoutError:
                pass
            look(self._ahead(waiting))
            lonely = 0.0 if self.recent_n_workers() else lonely + _LOOK
            if lonely == _LONELY:
                warnings.warn(
                    f"the cluster has had no worker for {lonely:.0f} s; the run waits for one. "
                    "Start one with `dask worker ADDRESS --nthreads 1`",
                    stacklevel=2,
                )
        if error is not None:
            raise self._explained(error, sent) from error
        with asking_scheduler():
            block: Block = sent.future.result()
        sent.future.release()
        if block.refusal is not None:
            raise ClusterError(
                f"a worker could not collect {sent}: {_describe(block.refusal)}"
            ) from block.refusal
        return block

    def _explained(self, error: BaseException, sent: _Sent) -> BaseException:
        distributed = import_distributed()
        if isinstance(error, EngineDiedError):
            where = (
                "while it loaded the model" if error.chunk is None else f"in chunk {error.chunk}"
            )
            return ClusterError(
                f"the engine's process ended {self._attempts} time(s) on {sent}, the last time "
                f"{where}: {error.cause}. {AND_NOW}"
            )
        if isinstance(error, distributed.KilledWorker):
            return ClusterError(f"{sent} ended one worker after the other: {error} {AND_NOW}")
        if isinstance(error, distributed.CancelledError):
            return scheduler_gone(error)
        if isinstance(error, MemoryError):
            return ClusterError(f"no memory on a worker for {sent}: {error}. {AND_NOW}")
        return ClusterError(
            f"a worker could not collect {sent}: {_describe(error)}. Is the same imatrix installed "
            f"on the scheduler's machine and on all workers? {AND_NOW}"
        )

    def check_machines(self, block: Block) -> None:
        """Warn if a worker computes with something else than those before it."""
        for machine in block.machines:
            if self._machine and machine != self._machine:
                warnings.warn(
                    "the workers are not alike: the last bits of the sums depend on which of them "
                    f"took which block. One computes with {self._machine}; another with {machine}",
                    stacklevel=2,
                )
            self._machine = machine


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
