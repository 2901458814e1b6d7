"""What a run was asked: the arguments of Collector.run, checked once when they arrive."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from imatrix.cluster.cluster import Cluster
from imatrix.files.outputs import Output, check_files
from imatrix.model.header import ModelFile
from imatrix.text.chats import ChatOptions
from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import Texts, text_inputs
from imatrix.text.progress import Progress
from imatrix.text.tokens import Packing

__all__ = ["RunOptions", "checkpoint_interval"]


def checkpoint_interval(asked: int | None, *, on_cluster: bool) -> int:
    """Chunks between two checkpoints, if so many were asked for; 0 for every three minutes only.

    Blocks of a cluster may come several times a second, and their sums be large: there the default
    is 0.
    """
    if asked is None:
        return 0 if on_cluster else 10
    return asked


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The arguments of Collector.run but for the texts; they are described there.

    Raises:
        ValueError: a bad number or word.
    """

    mtp: bool = False
    max_chunks: int | None = None
    skip_chunks: int = 0
    process_output: bool = False
    signed_sums: bool = True
    parse_special: bool = False
    packing: Packing = "stream"
    chat: ChatOptions | None = None
    min_expert_rows: int | None = None
    perplexity: bool | None = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    on_bad_record: OnBadRecord = "stop"
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_every: int | None = None
    restart: bool = False
    progress: Callable[[Progress], object] | None = None
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("on_nonfinite", self.on_nonfinite),
            ("on_bad_record", self.on_bad_record),
        ):
            if value not in ("stop", "skip"):
                raise ValueError(f"{name} must be 'stop' or 'skip', got {value!r}")
        if self.interval < 0:
            raise ValueError(f"checkpoint_every must be 0 or more, got {self.interval}")
        if self.min_expert_rows is not None and self.min_expert_rows < 1:
            raise ValueError(f"min_expert_rows must be 1 or more, got {self.min_expert_rows}")

    @property
    def interval(self) -> int:
        """Chunks between two checkpoints; 0 for every three minutes only."""
        return checkpoint_interval(self.checkpoint_every, on_cluster=self.cluster is not None)

    def check(
        self, texts: Texts, trunk: ModelFile, head: ModelFile, *, batch_by_memory: bool
    ) -> None:
        """That the options suit these texts and this model; no more of it is read than its headers.

        Args:
            trunk, head: the files of the model; the same if there is one.
            batch_by_memory: whether the batch is chosen by the memory that is free.

        Raises:
            ValueError: they do not.
        """
        if self.min_expert_rows is not None and trunk.integers.get("expert_count", 0) < 2:
            raise ValueError(
                f"min_expert_rows={self.min_expert_rows}, but {trunk.path.name} "
                f"({trunk.architecture}) has no experts; leave it out"
            )
        if self.cluster is not None and batch_by_memory:
            raise ValueError(
                "n_batch='auto' (-b auto) goes by the memory of one machine, and the sums by the "
                "batch: for a cluster give n_batch (-b) as a number"
            )
        if self.checkpoint is not None:
            # neither it nor its lock file may be something that the run reads
            checkpoint = os.fspath(self.checkpoint)
            parts = dict.fromkeys(path for each in (trunk, head) for path, _ in each.parts)
            lock = Output(f"{os.path.realpath(checkpoint)}.lock", checkpoint)
            check_files([checkpoint, lock], [*map(os.fspath, parts), *text_inputs(texts)])
