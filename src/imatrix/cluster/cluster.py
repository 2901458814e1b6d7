"""One text over many machines: blocks of chunks on the workers of a Dask cluster.

A block is a fixed number of chunks. A worker collects it from zero and sends its sums; here they
are added in the order of the blocks. Or several workers collect parts of it, which they add among
themselves, always in the same pairs, so that less has to come here. So the result does not depend,
to the bit, on how many workers there are, which of them took a block, and how often one was lost
and its block done again. See docs/clusters.md.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from imatrix.cluster.blocks import BlockQueue, ClusterUse
from imatrix.cluster.schedulers import connect
from imatrix.cluster.work import Block, BlockSize, Work
from imatrix.cluster.worker import release
from imatrix.engine.settings import ModelOptions, SessionSettings
from imatrix.formats.checkpoint import Setting
from imatrix.text.chunks import Chunk

__all__ = ["BLOCK", "Cluster", "ClusterUse"]

BLOCK = 16
"""Chunks a block, unless another number is asked for."""


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
        model, mtp_model: paths of the files on the workers, if they are not those that the
            Collector has. Environment variables ($SCRATCH) are those of the worker.
        block: chunks a block, a multiple of the Collector's n_seq; None for 16, or the next such
            multiple. Among what decides the last bits of the sums.
        part: chunks that a worker takes at a time, likewise, if blocks are large: their parts
            are added on the workers, so that the sums come here once a block. None for whole
            blocks.
        attempts: how often a block is tried if the engine's process ends, before the run does.

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
        if part is not None and (block is None or block % part):
            raise ValueError(
                f"block={block} is no multiple of part={part}: a block is cut into parts of one "
                "size"
            )
        self._model = model
        self._mtp_model = mtp_model
        self._block = block
        self._part = part
        self._open = ExitStack()
        try:
            self._client, self._threads = connect(where, self._open)
        except BaseException:
            self._open.close()
            raise
        self._queue = BlockQueue(self._client, attempts)
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
        return self._queue.use

    @property
    def n_workers(self) -> int:
        """Workers that are there now.

        Raises:
            ClusterError: the scheduler does not answer.
        """
        return self._queue.n_workers()

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
            self._client.run(release, self._queue.owner, on_error="ignore")

    # --- for Collector.run -------------------------------------------------

    def recent_n_workers(self) -> int:
        """n_workers, as it was a moment ago; for Collector.run."""
        return self._queue.recent_n_workers()

    def block_size(self, n_seq: int) -> BlockSize:
        """The size of the blocks if chunks run n_seq side by side; for Collector.run.

        Raises:
            ValueError: another size was asked for, which n_seq does not divide.
        """
        if self._block is None:
            block = -(-BLOCK // n_seq) * n_seq
            return BlockSize(block, block)
        name, value = ("block", self._block) if self._part is None else ("part", self._part)
        if value % n_seq:
            raise ValueError(
                f"{name}={value} is no multiple of n_seq={n_seq}: chunks run {n_seq} side by side. "
                f"Give {-(-value // n_seq) * n_seq}, or another n_seq (-b)"
            )
        return BlockSize(self._block, self._part or self._block)

    def collecting(
        self,
        blocks: Iterator[list[Chunk]],
        *,
        size: BlockSize,
        model: ModelOptions,
        session: SessionSettings,
        n_threads: int | None,
        identity: Mapping[str, Setting],
        first: int,
        look: Callable[[int], None],
    ) -> AbstractContextManager[Iterator[tuple[list[Chunk], Block]]]:
        """Have blocks collected; for Collector.run. See BlockQueue.collecting.

        Args:
            model, session, n_threads: as the Collector has them; None for each worker's cores.
            identity: what must be so on the workers.
        """
        work = Work(
            owner=self._queue.owner,
            model=self._on_workers(model),
            session=session,
            n_threads=self._threads if n_threads is None else n_threads,
            identity=tuple(identity.items()),
        )
        return self._queue.collecting(work, blocks, part=size.part, first=first, look=look)

    def _on_workers(self, model: ModelOptions) -> ModelOptions:
        """How a worker loads the model."""

        def there(own: str | os.PathLike[str], given: str | os.PathLike[str] | None) -> str:
            return os.fspath(Path(own).absolute() if given is None else given)

        head = model.mtp_model
        return replace(
            model,
            model=there(model.model, self._model),
            mtp_model=None if head is None else there(head, self._mtp_model),
            # the rehearsal was here; and the engine may end its process, but not Dask's
            rehearse=False,
            isolate=True,
        )
