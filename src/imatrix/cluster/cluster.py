"""One text over many machines: blocks of chunks on the workers of a Dask cluster.

A block is a fixed number of chunks. A worker collects it from zero and sends its sums; here they
are added in the order of the blocks. Or several workers collect parts of it, which they add among
themselves, always in the same pairs, so that less has to come here. So the result does not depend, to the bit, on how many
workers there are, which of them took a block, and how often one was lost and its block done again.
See docs/clusters.md.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from imatrix.cluster.schedulers import (
    AND_NOW,
    CONNECT,
    JOBS,
    LOCAL,
    config,
    import_distributed,
    job_cluster,
    scheduler_gone,
    started_scheduler,
)
from imatrix.cluster.work import Block, Work, add_parts, topic
from imatrix.cluster.worker import collect_block, release
from imatrix.engine.cores import physical_cores
from imatrix.errors import ClusterError, EngineDiedError
from imatrix.text.chunks import Chunk

__all__ = ["BLOCK", "Cluster", "ClusterUse"]

BLOCK = 16
"""Chunks a block, unless another number is asked for."""

# Blocks that a worker has or that wait for it. Two hide the way there and back; the others keep
# workers busy while the block that has to be added next is late, because its worker is slow or was
# lost. More would be more sums that wait in the workers' memory.
_AHEAD = 4
_LOOK = 1.0  # seconds between two looks around while a block is waited for
_LONELY = 30.0  # seconds without a worker before that is told


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


class Cluster:
    """Workers of a Dask cluster, for Collector.run(cluster=).

    Args:
        where: one of

            - "tcp://host:8786" (or tls://, ...), the address of a scheduler that is there. Its
              workers are best started with `--nthreads 1`: the engine has threads of its own;
            - "local:N": N processes on this machine, which end with this object;
            - "slurm:N", "pbs:N", "sge:N", "lsf:N", "htcondor:N", "oar:N", "moab:N": N jobs of
              dask-jobqueue as its configuration says, which end with this object;
            - a distributed.Client, which stays open.
        model, mtp_model: paths of the files on the workers, where they are not those that the
            Collector has. Environment variables ($SCRATCH) are those of the worker.
        block: chunks a block, a multiple of the Collector's n_seq; None for 16, or the next such
            multiple. Among what decides the last bits of the sums.
        part: chunks that a worker takes at a time, likewise, where blocks are large: their parts
            are added on the workers, so that the sums come here once a block. None for whole
            blocks.
        attempts: how often a block is tried where the engine's process ends, before the run does.

    Dask sends functions and data by pickle: whoever can reach the scheduler can run programs on
    every machine of the cluster. See docs/clusters.md for TLS.

    Use it as a context manager, or call close(). With "local:N" a script needs the guard
    `if __name__ == "__main__":`, as all that starts processes does.

    Raises:
        ValueError: `where` is none of the above, or a bad number.
        ImportError: dask.distributed, or dask-jobqueue, is not installed.
        ClusterError: no scheduler answers there.
    """

    def __init__(
        self,
        where: Any,
        *,
        model: str | os.PathLike[str] | None = None,
        mtp_model: str | os.PathLike[str] | None = None,
        block: int | None = None,
        part: int | None = None,
        attempts: int = 3,
    ) -> None:
        for name, value in (("block", block), ("part", part), ("attempts", attempts)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self._model = None if model is None else os.fspath(model)
        self._mtp_model = None if mtp_model is None else os.fspath(mtp_model)
        if part is not None and (block is None or block % part):
            raise ValueError(
                f"block={block} is no multiple of part={part}: a block is cut into parts of one "
                "size"
            )
        self._block = block
        self._part = part
        self._attempts = attempts
        self._owner = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._machine = ""  # of the first block
        self._seen, self._seen_at = 0, -math.inf  # workers, and when they were counted
        self._use = ClusterUse()
        self._told: dict[int, int] = {}  # chunks collected, by number of the first of their part
        self._open = ExitStack()
        self._threads: int | None = None
        try:
            self._client = self._connected(where)
        except BaseException:
            self._open.close()
            raise
        self._open.callback(self._release)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model on the workers, and end what was started here. Safe to call twice."""
        self._open.close()

    @property
    def client(self) -> Any:
        """The distributed.Client."""
        return self._client

    @property
    def use(self) -> ClusterUse:
        """How it fared in the current run, or else the last one."""
        return self._use

    @property
    def n_workers(self) -> int:
        """Workers that are there now.

        Raises:
            ClusterError: the scheduler does not answer.
        """
        with started_scheduler():
            return len(self._client.nthreads())

    def _workers(self) -> int:
        """n_workers, as it was a moment ago: asking takes a millisecond, and so may a block."""
        if time.monotonic() - self._seen_at >= _LOOK:
            self._seen, self._seen_at = self.n_workers, time.monotonic()
        return self._seen

    # --- connecting --------------------------------------------------------

    def _connected(self, where: Any) -> Any:
        if not isinstance(where, str):
            distributed = import_distributed()
            if not isinstance(where, distributed.Client):
                raise ValueError(
                    "expected a scheduler's address, local:N, slurm:N or a distributed.Client, got "
                    f"{where!r}"
                )
            return where
        if where.startswith("tls://"):
            security = import_distributed().Security()
            if security.get_connection_args("client").get("ssl_context") is None:
                raise ValueError(
                    f"{where} needs certificates, and Dask's configuration names none: set "
                    "distributed.comm.tls.ca-file, .client.cert and .client.key, in a file or as "
                    "DASK_DISTRIBUTED__COMM__TLS__CA_FILE and so on"
                )
        if "://" in where:
            return self._client_of(import_distributed(), where, where)
        kind, _, number = where.partition(":")
        if kind not in ("local", *JOBS) or not number.isdigit() or int(number) < 1:
            raise ValueError(
                f"expected a scheduler's address as tcp://host:8786, local:N, or one of "
                f"{', '.join(f'{name}:N' for name in JOBS)}, got {where!r}"
            )
        distributed = import_distributed()
        if kind == "local":
            n = int(number)
            self._threads = max(1, physical_cores() // n)
            with config(LOCAL):
                cluster = distributed.LocalCluster(
                    n_workers=n,
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    # the model is in the engine's process, which Dask does not see
                    memory_limit=0,
                    preload="imatrix.cluster.preload",
                )
        else:
            cluster = job_cluster(kind)
            cluster.scale(jobs=int(number))
        self._open.enter_context(cluster)
        return self._client_of(distributed, cluster, where)

    def _client_of(self, distributed: Any, cluster: Any, where: str) -> Any:
        try:
            client = distributed.Client(cluster, timeout=CONNECT, set_as_default=False)
        except OSError as error:
            raise ClusterError(
                f"no Dask scheduler answers at {where}: {error}. Start one with `dask scheduler`, "
                "and workers with `dask worker ADDRESS --nthreads 1`"
            ) from error
        return self._open.enter_context(client)

    def _release(self) -> None:
        """Free what the workers have loaded for this object, as far as they answer."""
        if self._client.status != "running":
            return  # the scheduler is gone
        # in a thread, because a worker that is gone may leave it waiting
        thread = threading.Thread(target=self._tell_release, daemon=True)
        thread.start()
        thread.join(10)

    def _tell_release(self) -> None:
        with contextlib.suppress(Exception):
            self._client.run(release, self._owner, on_error="ignore")

    # --- for Collector -----------------------------------------------------

    def _sizes(self, n_seq: int) -> tuple[int, int]:
        """Chunks a block, and chunks a part, where chunks run n_seq side by side."""
        if self._block is None:
            block = -(-BLOCK // n_seq) * n_seq
            return block, block
        name, value = ("block", self._block) if self._part is None else ("part", self._part)
        if value % n_seq:
            raise ValueError(
                f"{name}={value} is no multiple of n_seq={n_seq}: chunks run {n_seq} side by side. "
                f"Give {-(-value // n_seq) * n_seq}, or another n_seq (-b)"
            )
        return self._block, self._part or self._block

    def _work(self, arguments: Mapping[str, Any], **rest: Any) -> Work:
        """For Collector's `arguments`."""
        arguments = {
            **arguments,
            "model": self._model or os.fspath(Path(arguments["model"]).absolute()),
            "n_threads": arguments["n_threads"] or self._threads,
            "mtp": None,
            # the rehearsal was here; and the engine may end its process, but not Dask's
            "rehearse": False,
            "isolate": True,
        }
        if arguments["mtp_model"] is not None:
            arguments["mtp_model"] = self._mtp_model or os.fspath(
                Path(arguments["mtp_model"]).absolute()
            )
        return Work(owner=self._owner, collector=tuple(arguments.items()), **rest)

    @contextmanager
    def _collecting(
        self,
        work: Work,
        blocks: Iterator[list[Chunk]],
        *,
        first: int,
        look: Callable[[int], None],
    ) -> Iterator[Iterator[tuple[list[Chunk], Block]]]:
        """Have blocks collected: an iterator of each with what came of it, in their order.

        Args:
            blocks: chunks of each; taken as workers come free, so that no more of the text is
                held than is worked on.
            first: number of the first chunk, for messages.
            look: called about once a second while a block is waited for, with the number of
                chunks that are collected and wait for their turn; what it raises ends the run.

        The iterator raises:
            ClusterError: a worker cannot take part, a block ended one engine or one worker after
                the other, or the scheduler is gone.
        """
        self._use = ClusterUse()
        self._told.clear()
        waiting: deque[_Sent] = deque()
        about = topic(self._owner)
        with started_scheduler():
            self._client.subscribe_topic(about, self._hear)
        try:
            yield self._in_order(work, blocks, first, look, waiting)
        finally:
            with contextlib.suppress(Exception):  # the scheduler may be gone
                if waiting:
                    self._client.cancel([sent.future for sent in waiting])
                self._client.unsubscribe_topic(about)

    def _hear(self, event: tuple[float, list[int]]) -> None:
        """A worker tells how far it is; in Dask's thread."""
        first, n_chunks = event[1]
        self._told[first] = n_chunks

    def _ahead(self, waiting: Iterable[_Sent]) -> int:
        """Chunks that are collected, of blocks whose turn has not come."""
        told = self._told.copy()
        n = 0
        for sent in waiting:
            size = len(sent.chunks)
            if sent.future.status == "finished":
                n += size
            else:
                n += sum(told.get(at, 0) for at in range(sent.first, sent.first + size))
        return n

    def _in_order(
        self,
        work: Work,
        blocks: Iterator[list[Chunk]],
        first: int,
        look: Callable[[int], None],
        waiting: deque[_Sent],
    ) -> Iterator[tuple[list[Chunk], Block]]:
        while True:
            wanted = _AHEAD * max(1, self._workers())
            under_way = sum(sent.n_parts for sent in waiting)
            # parts that workers still add keep nobody busy: never less than so many blocks
            while under_way < wanted or len(waiting) < _AHEAD:
                if (chunks := next(blocks, None)) is None:
                    break
                waiting.append(self._send(work, chunks, first))
                under_way += waiting[-1].n_parts
                first += len(chunks)
            if not waiting:
                return
            started = time.monotonic()
            block = self._result(waiting[0], waiting, look)
            sent = waiting.popleft()
            for at in range(sent.first, sent.first + len(sent.chunks)):
                self._told.pop(at, None)
            self._check(block)
            came = time.monotonic()
            yield sent.chunks, block
            self._use = replace(
                self._use,
                blocks=self._use.blocks + 1,
                nbytes=self._use.nbytes + block.nbytes,
                seconds=self._use.seconds + block.seconds,
                loading=self._use.loading + block.loading,
                waited=self._use.waited + came - started,
                adding=self._use.adding + time.monotonic() - came,
            )

    def _send(self, work: Work, chunks: list[Chunk], first: int) -> _Sent:
        size = self._part or len(chunks)
        number = next(self._numbers)
        options = {"pure": False, "priority": -number}  # what is added first is done first
        with started_scheduler():
            parts = [
                self._client.submit(
                    collect_block,
                    work,
                    np.concatenate([chunk.tokens for chunk in part]),
                    np.array([len(chunk.tokens) for chunk in part], np.int32),
                    first + at,
                    key=f"imatrix-block-{self._owner}-{number}-{at}",
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
                        key=f"imatrix-add-{self._owner}-{number}-{len(parts)}-{at}",
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
                # not result(): where sums take longer to come than this, they never would
                with started_scheduler(distributed.TimeoutError):
                    error = sent.future.exception(timeout=_LOOK)
                break
            except distributed.TimeoutError:
                pass
            look(self._ahead(waiting))
            lonely = 0.0 if self._workers() else lonely + _LOOK
            if lonely == _LONELY:
                warnings.warn(
                    f"the cluster has had no worker for {lonely:.0f} s; the run waits for one. "
                    "Start one with `dask worker ADDRESS --nthreads 1`",
                    stacklevel=2,
                )
        if error is not None:
            raise self._as_told(error, sent) from error
        with started_scheduler():
            block: Block = sent.future.result()
        sent.future.release()
        if block.refusal is not None:
            raise ClusterError(
                f"a worker could not collect {sent}: {_named(block.refusal)}"
            ) from block.refusal
        return block

    def _as_told(self, error: BaseException, sent: _Sent) -> BaseException:
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
            f"a worker could not collect {sent}: {_named(error)}. Is the same imatrix installed "
            f"on the scheduler's machine and on all workers? {AND_NOW}"
        )

    def _check(self, block: Block) -> None:
        for machine in block.machines:
            if self._machine and machine != self._machine:
                warnings.warn(
                    "the workers are not alike: the last bits of the sums depend on which of them "
                    f"took which block. One computes with {self._machine}; another with {machine}",
                    stacklevel=2,
                )
            self._machine = machine


@dataclass(frozen=True)
class _Sent:
    """A block that is under way."""

    chunks: list[Chunk]
    first: int  # number of its first chunk, skipped ones counted
    future: Any
    n_parts: int

    def __str__(self) -> str:
        return f"the block of chunks {self.first} to {self.first + len(self.chunks) - 1}"


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
