"""The models of an evaluation, and their way through the text chunk by chunk."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from imatrix.engine import process
from imatrix.engine.background import NativeThread, Work
from imatrix.engine.loading import Loader
from imatrix.engine.models import Models
from imatrix.engine.placement import advise_on_devices
from imatrix.engine.settings import Batch, ModelOptions, SessionSettings
from imatrix.errors import EngineDiedError, EngineError, ModelError
from imatrix.evaluation.options import EvaluateOptions
from imatrix.evaluation.results import Predictions
from imatrix.native import engine
from imatrix.text.progress import Perplexity, Progress

__all__ = ["Scored", "Side", "check_reference", "drive", "joined", "open_evaluator"]

# Here, or in a process of its own.
NativeEvaluator: TypeAlias = "engine.Evaluator | process.Evaluator"


class Side:
    """One of the two that are compared, the model or the reference: a trunk, and maybe its head.
    A context that frees both.

    Args:
        loader: of the other one, so that one process of the engine has both; None for the first.

    Attributes:
        models: their files, and what is loaded of them.
        batch: as the model needs it; set by load().
    """

    def __init__(
        self, options: EvaluateOptions, which: ModelOptions, loader: Loader | None = None
    ) -> None:
        self._options = options
        self.models = Models(which, n_ctx=options.n_ctx, loader=loader)
        self.batch: Batch | None = None

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.models.free()

    def load(self, with_head: bool, beside: Mapping[str, int]) -> None:
        """Check, rehearse and load.

        Args:
            beside: bytes on each device to leave to something else.
        """
        options, models = self._options, self.models
        models.check(with_head)
        # the evaluator reads logits, and sums nothing
        settings = SessionSettings(
            n_ctx=options.n_ctx,
            batch=options.wanted.of_causal(options.n_ctx),
            n_threads=options.threads,
            mtp=with_head,
            perplexity=True,
            device_sums=False,
        )
        models.rehearse(settings)
        if with_head:
            models.check_predicts("there is a head to score", "leave it out (mtp=False, --no-mtp)")
        self.batch = models.batch(options.wanted)
        models.load(replace(settings, batch=self.batch), beside)


@dataclass(frozen=True)
class Scored:
    """What was found, by chunk.

    Attributes:
        chunks: what the engine made of each.
        lengths: tokens of each.
        digest: SHA-256 of all these tokens.
    """

    chunks: list[engine.ChunkEvaluation]
    lengths: list[int]
    digest: str


def check_reference(ours: Models, theirs: Models, with_head: bool, path: str) -> None:
    """That the reference can be one.

    Raises:
        ValueError: it is of another architecture, or it has no head to compare with.
    """
    if ours.trunk_file.architecture != theirs.trunk_file.architecture:
        raise ValueError(
            f"{path} is {theirs.trunk_file.architecture}, the model is "
            f"{ours.trunk_file.architecture}: a reference is the same model before it was quantized"
        )
    if with_head and theirs.head_file.n_nextn == 0:
        raise ValueError(
            f"{path} has no MTP head to measure the model's against; give its head's file, or "
            "mtp=False to leave the heads out"
        )
    if with_head and ours.head_file.architecture != theirs.head_file.architecture:
        raise ValueError(
            f"the head is {ours.head_file.architecture}, the reference's is "
            f"{theirs.head_file.architecture}"
        )


def open_evaluator(options: EvaluateOptions, ours: Side, theirs: Side | None) -> NativeEvaluator:
    """An evaluator of what is loaded, with its contexts.

    Raises:
        ModelError, ValueError, MemoryError: the engine makes no such contexts.
        EngineDiedError: the engine's process is gone.
    """
    evaluator: NativeEvaluator
    sides = [ours] if theirs is None else [ours, theirs]
    models = [model for side in sides for model in (side.models.loaded(), side.models.head)]
    if ours.models.engine is None:
        evaluator = engine.Evaluator(*models)  # type: ignore[arg-type]
    else:
        evaluator = process.Evaluator(*models)  # type: ignore[arg-type]
    batches = [side.batch for side in sides if side.batch is not None]
    try:
        evaluator.open(
            n_ctx=options.n_ctx,
            # the larger one, if only one of the two needs its chunks whole
            n_batch=max(batch.n_batch for batch in batches),
            n_ubatch=max(batch.n_ubatch for batch in batches),
            n_threads=options.threads,
            depth=options.depth,
        )
    except ModelError as error:
        raise ModelError(f"{os.fspath(options.model)}: {error}") from None
    except EngineDiedError as error:
        error.args = (f"{error.args[0]}, while it made the contexts",)
        raise
    except (EngineError, MemoryError) as error:
        advise_on_devices(error)
        raise
    return evaluator


def drive(
    work: Work,
    evaluator: NativeEvaluator,
    end: Callable[[], object],
    first: NDArray[np.int32],
    rest: Iterator[NDArray[np.int32]],
    *,
    skipped: int,
    total: int | None,
    progress: Callable[[Progress], object] | None,
) -> Scored:
    """Score the chunks. Native steps run in a second thread, so that Ctrl-C reaches this one.

    Args:
        end: ends a step that nobody wants any more.
        skipped: chunks of the text before the first one.
        total: chunks in all; None if that is not known.
    """
    found: list[engine.ChunkEvaluation] = []
    lengths: list[int] = []
    digest = hashlib.sha256()
    n_tokens = n_scored = 0
    nll = nll_sq = 0.0
    started = time.monotonic()
    work.cancel = evaluator.cancel
    with NativeThread() as native:
        try:
            chunk: NDArray[np.int32] | None = first
            while chunk is not None:
                work.check()
                running = native.submit(evaluator.step, chunk)
                following = next(rest, None)
                done = running.result()
                found.append(done)
                lengths.append(len(chunk))
                digest.update(len(chunk).to_bytes(8, "little") + chunk.astype("<i4").tobytes())
                n_tokens += len(chunk)
                n_scored += len(done["trunk"]["nll"])
                nll += float(done["trunk"]["nll"].sum())
                nll_sq += float(np.square(done["trunk"]["nll"]).sum())
                if progress is not None:
                    seconds = time.monotonic() - started
                    so_far = _so_far(nll, nll_sq, n_scored)
                    progress(Progress(len(found), total, n_tokens, seconds, so_far))
                chunk = following
        except BaseException as error:
            end()
            if isinstance(error, (InterruptedError, EngineDiedError)):
                work.check()
            if isinstance(error, EngineDiedError):
                _tell_death(error, skipped + len(found))
            raise
    return Scored(found, lengths, digest.hexdigest())


def _tell_death(error: EngineDiedError, chunk: int) -> None:
    """Say in the error where the evaluation was, and what can be done."""
    error.chunk = chunk
    error.args = (
        f"{error.args[0]}, in chunk {chunk}. Nothing was written, and an evaluation keeps nothing to "
        "go on from. If it ends at the same chunk again, evaluate those before it (max_chunks, "
        "--chunks) and those after it (skip_chunks, --chunk) by themselves.",
    )


def _so_far(nll: float, nll_sq: float, n: int) -> Perplexity | None:
    """The perplexity of n positions, with sums over them of the NLL and of its square."""
    if n == 0:
        return None
    mean = nll / n
    value = math.exp(mean) if mean < 700 else math.inf
    variance = max(0.0, nll_sq / n - mean * mean)
    return Perplexity(value, value * math.sqrt(variance / (n - 1)) if n > 1 else 0.0, n)


def joined(rows: list[engine.ChunkPredictions], with_reference: bool) -> Predictions:
    """The predictions of all chunks, one after the other."""
    nll = np.concatenate([row["nll"] for row in rows])
    top = np.concatenate([row["top"] for row in rows])
    if not with_reference:
        return Predictions(nll, top, None, None, None)
    return Predictions(
        nll,
        top,
        np.concatenate([row["reference_nll"] for row in rows]),
        np.concatenate([row["reference_top"] for row in rows]),
        np.concatenate([row["kl"] for row in rows]),
    )
