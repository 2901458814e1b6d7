"""What a recipe is asked for, and what the efforts mean."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from imatrix.engine.cores import physical_cores
from imatrix.engine.placement import Placement
from imatrix.engine.settings import ModelOptions, SessionSettings, usual
from imatrix.text.chats import ChatOptions
from imatrix.text.documents import OnBadRecord
from imatrix.text.tokens import Packing

__all__ = [
    "EFFORTS",
    "MIN_CHUNKS",
    "Effort",
    "EffortPlan",
    "RecipeOptions",
    "Target",
    "parse_size",
    "targets_of",
]

Effort = Literal["quick", "standard", "thorough"]
"""How much is measured."""

MIN_CHUNKS = 2
"""Chunks of text without which no error of a figure can be told."""

_SIZE = re.compile(r"(\d+\.?\d*|\.\d+)\s*(?:([KMGT])(i?B)?|B)?", re.IGNORECASE)
_UNITS = "KMGT"


@dataclass(frozen=True, kw_only=True)
class EffortPlan:
    """What an effort comes to.

    Attributes:
        chunks: of text.
        apart: each tensor alone; otherwise those that multiply the same rows go together.
        measured: types that each group is measured with; if a group cannot have one of them, the
            nearest in bytes that it can.
        rounds: how often the recipe is measured as a whole and chosen again, at most.
        neighbours: recipes beside the first one that are measured as a whole, at most.
    """

    chunks: int
    apart: bool
    measured: tuple[str, ...]
    rounds: int
    neighbours: int


EFFORTS: Mapping[Effort, EffortPlan] = {
    "quick": EffortPlan(chunks=8, apart=False, measured=("q3_k",), rounds=1, neighbours=0),
    "standard": EffortPlan(
        chunks=16, apart=True, measured=("q2_k", "q4_k"), rounds=2, neighbours=4
    ),
    "thorough": EffortPlan(
        chunks=48, apart=True, measured=("iq2_xxs", "q2_k", "q3_k", "q5_k"), rounds=4, neighbours=12
    ),
}
"""What each effort comes to; documented in docs/measuring-recipes.md."""


@dataclass(frozen=True)
class Target:
    """What a recipe has to keep to.

    Attributes:
        kind: "size": the file has at most so many bytes. "bpw": all tensors together have at most so
            many bits a weight. "kl": the KL divergence to the unchanged model is at most that, in
            nats a token.
        value: how much.

    Raises:
        ValueError: the value is not a number above 0.
    """

    kind: Literal["size", "bpw", "kl"]
    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"{self.kind} must be a number above 0, got {self.value}")

    def __str__(self) -> str:
        return {
            "size": f"{self.value:.0f} bytes",
            "bpw": f"{self.value:g} bits per weight",
            "kl": f"a KL divergence of {self.value:g}",
        }[self.kind]


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The arguments of recipe(), checked as far as they can be before a file is read.

    Attributes:
        targets: what each recipe has to keep to, in order.
        types: that may be used, in lower case.
        n_chunks: of text; None for the effort's.
        measured: file to keep what was measured; None for none.
        model, effort, head, n_ctx, skip_chunks, parse_special, packing, chat, on_bad_record,
        placement, n_gpu_layers, n_threads, rehearse, restart: as recipe() takes them.

    Raises:
        ValueError: an unknown effort, or a number that is too small.
    """

    model: str | os.PathLike[str]
    targets: tuple[Target, ...]
    effort: Effort = "standard"
    types: tuple[str, ...] = ()
    head: str = "auto"
    n_ctx: int = 512
    n_chunks: int | None = None
    skip_chunks: int = 0
    parse_special: bool = False
    packing: Packing = "stream"
    chat: ChatOptions | None = None
    on_bad_record: OnBadRecord = "stop"
    placement: Placement
    n_gpu_layers: int | Literal["auto"] = "auto"
    n_threads: int | None = None
    rehearse: bool = True
    measured: str | os.PathLike[str] | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS:
            raise ValueError(
                f"effort must be one of {', '.join(get_args(Effort))}, got {self.effort!r}"
            )
        for name, value, least in (
            ("n_ctx", self.n_ctx, 4),
            ("skip_chunks", self.skip_chunks, 0),
            ("max_chunks", MIN_CHUNKS if self.n_chunks is None else self.n_chunks, MIN_CHUNKS),
            ("n_threads", 1 if self.n_threads is None else self.n_threads, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")

    @property
    def plan(self) -> EffortPlan:
        """What the effort comes to."""
        return EFFORTS[self.effort]

    @property
    def chunks(self) -> int:
        """Chunks of text that are wanted."""
        return self.plan.chunks if self.n_chunks is None else self.n_chunks

    @property
    def threads(self) -> int:
        """Threads to compute with."""
        return physical_cores() if self.n_threads is None else self.n_threads

    @property
    def loading(self) -> ModelOptions:
        """How the model is loaded: read, since its weights are changed, and in this process."""
        return ModelOptions(
            model=self.model,
            placement=self.placement,
            n_gpu_layers=self.n_gpu_layers,
            use_mmap=False,
            rehearse=self.rehearse,
            changeable=True,
        )

    @property
    def session(self) -> SessionSettings:
        """Settings like those that the passes run with, for the rehearsal."""
        return SessionSettings(
            n_ctx=self.n_ctx,
            batch=usual(self.n_ctx),
            n_threads=self.threads,
            perplexity=True,
            device_sums=False,
        )


def targets_of(
    size: int | str | Sequence[int | str] | None,
    bpw: float | Sequence[float] | None,
    kl: float | Sequence[float] | None,
) -> tuple[Target, ...]:
    """The targets that recipe() was given, sizes first.

    Raises:
        ValueError: none, or one that is no such number.
    """
    sizes = [size] if isinstance(size, (int, str)) else size or ()
    found = [Target("size", parse_size(each)) for each in sizes]
    for kind, given in (("bpw", bpw), ("kl", kl)):
        values = [given] if isinstance(given, (int, float)) else given or ()
        found += [Target(kind, float(value)) for value in values]  # type: ignore[arg-type]
    if not found:
        raise ValueError("nothing to choose for: give size, bpw or kl (--size, --bpw, --kl)")
    return tuple(dict.fromkeys(found))


def parse_size(given: int | str) -> int:
    """Bytes of "12G": K, M, G and T are powers of 1024, as KiB, MiB, GiB and TiB are; KB, MB, GB and
    TB are powers of 1000. A plain number is bytes.

    Raises:
        ValueError: it is no size.
    """
    if isinstance(given, int):
        return given
    match = _SIZE.fullmatch(given.strip())
    if match is None:
        raise ValueError(f"expected a size, as 12G, 12.5GiB, 900M or 12000000000, got {given!r}")
    number, unit, suffix = match.groups()
    if unit is None:
        return int(float(number))
    base = 1000 if suffix is not None and suffix.upper() == "B" else 1024
    return int(float(number) * base ** (1 + _UNITS.index(unit.upper())))
