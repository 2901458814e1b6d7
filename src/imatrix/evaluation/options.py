"""What evaluate() was asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from imatrix.engine.cores import physical_cores
from imatrix.engine.placement import Placement
from imatrix.engine.settings import ModelOptions, Wanted
from imatrix.text.chats import ChatOptions
from imatrix.text.documents import OnBadRecord
from imatrix.text.tokens import Packing

__all__ = ["EvaluateOptions"]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The arguments of evaluate(), checked as far as they can be before a file is read.

    Raises:
        ValueError: a number is too small, or there is a head for a reference that there is not.
    """

    model: str | os.PathLike[str]
    mtp_model: str | os.PathLike[str] | None
    reference: str | os.PathLike[str] | None
    reference_mtp_model: str | os.PathLike[str] | None
    mtp: bool | None
    depth: int
    n_ctx: int
    n_batch: int | None
    n_ubatch: int | None
    max_chunks: int | None
    skip_chunks: int
    parse_special: bool
    packing: Packing
    chat: ChatOptions | None
    on_bad_record: OnBadRecord
    placement: Placement
    n_gpu_layers: int | Literal["auto"]
    n_threads: int | None
    use_mmap: bool
    rehearse: bool
    isolate: bool

    def __post_init__(self) -> None:
        for name, value, least in (
            ("depth", self.depth, 1),
            ("n_ctx", self.n_ctx, 4),
            ("n_ubatch", 1 if self.n_ubatch is None else self.n_ubatch, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if self.n_threads is not None and self.n_threads < 1:
            raise ValueError(f"n_threads must be 1 or more, got {self.n_threads}")
        if (n_batch := self.wanted.of_causal(self.n_ctx).n_batch) < self.depth:
            raise ValueError(f"n_batch must be depth ({self.depth}) or more, got {n_batch}")
        if self.reference_mtp_model is not None and self.reference is None:
            raise ValueError("reference_mtp_model was given without a reference")

    @property
    def wanted(self) -> Wanted:
        """The batch, before it is known what the models can run. Chunks run one by one."""
        return Wanted(1, self.n_batch, self.n_ubatch)

    @property
    def threads(self) -> int:
        """Threads to compute with."""
        return physical_cores() if self.n_threads is None else self.n_threads

    @property
    def own_model(self) -> ModelOptions:
        """How the model that is evaluated is loaded."""
        return self._loaded(self.model, self.mtp_model)

    @property
    def reference_model(self) -> ModelOptions | None:
        """How the reference is loaded, in the same way; None without one."""
        if self.reference is None:
            return None
        return self._loaded(self.reference, self.reference_mtp_model)

    def _loaded(
        self, model: str | os.PathLike[str], mtp_model: str | os.PathLike[str] | None
    ) -> ModelOptions:
        return ModelOptions(
            model=model,
            mtp_model=mtp_model,
            placement=self.placement,
            n_gpu_layers=self.n_gpu_layers,
            use_mmap=self.use_mmap,
            rehearse=self.rehearse,
            isolate=self.isolate,
        )
