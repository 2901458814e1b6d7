"""TODO."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from imatrix.cluster.cluster import Cluster
from imatrix.text.chats import ChatOptions
from imatrix.text.documents import OnBadRecord
from imatrix.text.progress import Progress
from imatrix.text.tokens import Packing


@dataclass(frozen=True)
class RunOptions:
    """The arguments of Collector.run but for the texts; what they mean is told there."""

    mtp: bool
    max_chunks: int | None
    skip_chunks: int
    process_output: bool
    signed_sums: bool
    parse_special: bool
    packing: Packing
    chat: ChatOptions | None
    min_expert_rows: int | None
    perplexity: bool | None
    on_nonfinite: Literal["stop", "skip"]
    on_bad_record: OnBadRecord
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int
    restart: bool
    progress: Callable[[Progress], object] | None
    cluster: Cluster | None
    block: int | None  # chunks of a cluster's block, and of a part of it
    part: int | None
