"""What decides how a model is loaded and how a session on it runs.

Values that are frozen and that refuse what cannot be when they are made. Only at the borders do
they become plain data: `SessionSettings.as_data()` is for the native engine and for the JSON that a
child process is given. Nothing here imports the native engine: the scheduler of a cluster unpacks
these values too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from imatrix.engine.placement import Placement

if TYPE_CHECKING:
    from imatrix.native.engine import SessionData

__all__ = [
    "ALL",
    "Batch",
    "Layers",
    "ModelOptions",
    "SessionSettings",
    "Wanted",
    "check_head_runs_alone",
    "usual",
]

# Sequences that one context can have (LLAMA_MAX_SEQ in src/llama-cparams.h)
MAX_SEQ = 256

# Tokens a graph that llama.cpp takes by default; fewer are never chosen for a model.
USUAL_UBATCH = 512


@dataclass(frozen=True)
class Batch:
    """Chunks side by side, tokens a decode, tokens a graph."""

    n_seq: int
    n_batch: int
    n_ubatch: int


@dataclass(frozen=True)
class Wanted:
    """What was asked for: chunks side by side, and tokens a decode and a graph, which are None if
    they are to be chosen."""

    n_seq: int
    n_batch: int | None
    n_ubatch: int | None

    def of_causal(self, n_ctx: int) -> Batch:
        """The batch for chunks of n_ctx tokens if a token sees only those before it."""
        tokens = n_ctx * self.n_seq
        # a larger batch than a group of chunks is never filled
        return Batch(
            self.n_seq,
            tokens if self.n_batch is None else min(self.n_batch, tokens),
            USUAL_UBATCH if self.n_ubatch is None else self.n_ubatch,
        )

    def of_whole(self, n_ctx: int, model: str) -> Batch:
        """The batch for chunks of n_ctx tokens that all see each other: each chunk needs one decode
        and one graph. As many of the n_seq run side by side as there is room for in n_batch and in
        n_ubatch, which is that of the usual graph if none was given.

        Args:
            n_ctx: tokens a chunk.
            model: name of the model for the message.

        Raises:
            ValueError: not even one chunk fits into the numbers that were given.
        """
        for name, flag, value in (
            ("n_batch", "-b", self.n_batch),
            ("n_ubatch", "-ub", self.n_ubatch),
        ):
            if value is not None and value < n_ctx:
                raise ValueError(
                    f"{name}={value} ({flag}) is less than a chunk of {n_ctx} tokens, but the "
                    f"tokens of {model} see those after them too, so that a chunk has to be "
                    f"decoded in one piece: give {name}={n_ctx} ({flag} {n_ctx}), or leave it out"
                )
        graph = max(n_ctx, USUAL_UBATCH) if self.n_ubatch is None else self.n_ubatch
        room = graph if self.n_batch is None else min(graph, self.n_batch)
        n_seq = min(self.n_seq, room // n_ctx)
        return Batch(n_seq, n_seq * n_ctx, n_seq * n_ctx)


def usual(n_ctx: int) -> Batch:
    """One chunk a decode, in graphs of the usual size."""
    return Batch(1, n_ctx, min(n_ctx, USUAL_UBATCH))


@dataclass(frozen=True)
class Layers:
    """What lies on the devices.

    Attributes:
        n_gpu_layers: blocks, the last ones of the model, and its output, which counts as one more;
            -1 for all, 0 if there is no device.
        cpu_experts: numbers of the blocks on the devices whose experts stay on the CPU.
    """

    n_gpu_layers: int
    cpu_experts: tuple[int, ...] = ()

    def describe(self, n_blocks: int) -> str:
        """The same in words, for a model that has n_blocks blocks, its head's included."""
        n_layers = "all" if self.n_gpu_layers == -1 else self.n_gpu_layers
        words = f"{n_layers} of {n_blocks + 1} layers on the GPU"
        if self.cpu_experts:
            words += f", the experts of {len(self.cpu_experts)} blocks on the CPU"
        return words


ALL = Layers(-1)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a model is loaded: what Collector, evaluate() and a worker of a cluster are given alike.

    Attributes:
        model: path of the trunk's file, or of its first part.
        mtp_model: path of the head's own file; None if the head is in the model's file.
        placement: on which devices both lie.
        n_gpu_layers: blocks on the devices, as Collector has it; "auto" for as many as there is
            room for.
        use_mmap, check_tensors, rehearse, isolate: as Collector has them.
        changeable: its weights can be changed in place (native.engine.Weights), so that the file is
            read and not mapped.

    Raises:
        ValueError: n_gpu_layers is another word than "auto".
    """

    model: str | os.PathLike[str]
    mtp_model: str | os.PathLike[str] | None = None
    placement: Placement = field(default_factory=Placement)
    n_gpu_layers: int | Literal["auto"] = -1
    use_mmap: bool = True
    check_tensors: bool = False
    rehearse: bool = True
    isolate: bool = False
    changeable: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.n_gpu_layers, str) and self.n_gpu_layers != "auto":
            raise ValueError(f"n_gpu_layers must be a number or 'auto', got {self.n_gpu_layers!r}")


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """How the contexts of a session are made, and what it sums.

    Attributes:
        n_ctx: tokens a chunk.
        batch: chunks side by side, tokens a decode, tokens a graph.
        n_threads: threads to compute with.
        mtp: run the head too.
        process_output: collect the weight that makes the logits.
        perplexity: score the text.
        signed_sums: sum the activations themselves beside their squares.
        device_sums: sum activations on the device that has them, if it can.

    Raises:
        ValueError: a number is too small, or there is a head and chunks run side by side.
    """

    n_ctx: int
    batch: Batch
    n_threads: int
    mtp: bool = False
    process_output: bool = False
    perplexity: bool = False
    signed_sums: bool = True
    device_sums: bool = True

    def __post_init__(self) -> None:
        for name, value, least in (
            ("n_ctx", self.n_ctx, 2),
            ("n_ubatch", self.batch.n_ubatch, 1),
            ("n_seq", self.batch.n_seq, 1),
            ("n_batch", self.batch.n_batch, self.batch.n_seq),
            ("n_threads", self.n_threads, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if self.mtp:
            check_head_runs_alone(self.batch.n_seq)

    def with_whole_chunks(self) -> SessionSettings:
        """The same with all its chunks in one decode and one graph, as a model needs it whose
        tokens all see each other."""
        tokens = self.n_ctx * self.batch.n_seq
        batch = Batch(
            self.batch.n_seq,
            max(self.batch.n_batch, tokens),
            max(self.batch.n_ubatch, tokens),
        )
        return replace(self, batch=batch)

    def as_data(self) -> SessionData:
        """What imatrix.native.engine.Session.open takes, also as JSON."""
        return {
            "n_ctx": self.n_ctx,
            "n_batch": self.batch.n_batch,
            "n_ubatch": self.batch.n_ubatch,
            "n_seq": self.batch.n_seq,
            "n_threads": self.n_threads,
            "mtp": self.mtp,
            "process_output": self.process_output,
            "perplexity": self.perplexity,
            "signed_sums": self.signed_sums,
            "device_sums": self.device_sums,
        }

    @classmethod
    def from_data(cls, data: SessionData) -> SessionSettings:
        """The settings of as_data(), for a child process that was given them."""
        return cls(
            n_ctx=data["n_ctx"],
            batch=Batch(data["n_seq"], data["n_batch"], data["n_ubatch"]),
            n_threads=data["n_threads"],
            mtp=data["mtp"],
            process_output=data["process_output"],
            perplexity=data["perplexity"],
            signed_sums=data["signed_sums"],
            device_sums=data["device_sums"],
        )


def check_head_runs_alone(n_seq: int) -> None:
    """That chunks do not run side by side in a session that runs the head.

    Raises:
        ValueError: they do.
    """
    if n_seq != 1:
        raise ValueError(
            f"mtp=True needs n_seq=1, this Collector has n_seq={n_seq}: the head is fed "
            "each token with the trunk's row of the token before it, and rows of chunks that "
            "run side by side would be paired across them. Set n_seq=1."
        )
