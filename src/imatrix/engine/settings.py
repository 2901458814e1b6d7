"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["ALL", "Batch", "Layers", "Wanted", "session_settings", "usual", "whole"]

# Sequences that one context can have (LLAMA_MAX_SEQ in src/llama-cparams.h)
MAX_SEQ = 256

# Tokens a graph below which no one would go: what llama.cpp takes by default.
USUAL_UBATCH = 512


@dataclass(frozen=True)
class Batch:
    """Chunks side by side, tokens a decode, tokens a graph."""

    n_seq: int
    n_batch: int
    n_ubatch: int


@dataclass(frozen=True)
class Wanted:
    """What was asked for: chunks side by side, and tokens a decode and a graph, None where they
    are left to us."""

    n_seq: int
    n_batch: int | None
    n_ubatch: int | None

    def of_causal(self, n_ctx: int) -> Batch:
        """The batch for chunks of n_ctx tokens where a token sees only those before it."""
        tokens = n_ctx * self.n_seq
        # a larger batch than a group of chunks is never filled
        return Batch(
            self.n_seq,
            tokens if self.n_batch is None else min(self.n_batch, tokens),
            USUAL_UBATCH if self.n_ubatch is None else self.n_ubatch,
        )

    def of_whole(self, n_ctx: int, model: str) -> Batch:
        """The batch for chunks of n_ctx tokens that all see each other: each in one decode and one
        graph. As many of the n_seq side by side as there is room for in n_batch and n_ubatch, which
        is the usual graph where none is given.

        Args:
            model: for the message.

        Raises:
            ValueError: not even one chunk goes into what was given.
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


def whole(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A session's settings with all its chunks in one decode and one graph."""
    tokens = settings["n_ctx"] * settings["n_seq"]
    return {**settings, **{n: max(settings[n], tokens) for n in ("n_batch", "n_ubatch")}}


def usual(n_ctx: int) -> Batch:
    """One chunk a decode, in graphs of the usual size."""
    return Batch(1, n_ctx, min(n_ctx, USUAL_UBATCH))


@dataclass(frozen=True)
class Layers:
    """What lies on the devices.

    Attributes:
        n_gpu_layers: blocks, the last ones of the model, and its output, which counts as one more;
            -1 for all. 0 where there is no device.
        cpu_experts: blocks whose experts stay on the CPU all the same, by their numbers.
    """

    n_gpu_layers: int
    cpu_experts: tuple[int, ...] = ()

    def told(self, n_blocks: int) -> str:
        """In words, of a model with so many blocks, its head's included."""
        n_layers = "all" if self.n_gpu_layers == -1 else self.n_gpu_layers
        told = f"{n_layers} of {n_blocks + 1} layers on the GPU"
        if self.cpu_experts:
            told += f", the experts of {len(self.cpu_experts)} blocks on the CPU"
        return told


ALL = Layers(-1)


def session_settings(
    n_ctx: int,
    batch: Batch,
    n_threads: int,
    *,
    mtp: bool = False,
    process_output: bool = False,
    perplexity: bool = False,
    signed_sums: bool = True,
    device_sums: bool = True,
) -> dict[str, Any]:
    """What _session.Session.open takes."""
    return {
        "n_ctx": n_ctx,
        **asdict(batch),
        "n_threads": n_threads,
        "mtp": mtp,
        "process_output": process_output,
        "perplexity": perplexity,
        "signed_sums": signed_sums,
        "device_sums": device_sums,
    }
