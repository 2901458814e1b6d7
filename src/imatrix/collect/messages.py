"""What a run says of chunks that failed: with a NaN, or as the engine's process ended."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

from imatrix.entries import LeftOut
from imatrix.errors import EngineDiedError, NonFiniteError
from imatrix.words import few

__all__ = ["describe_left_out", "explain_death", "explain_nonfinite"]


def explain_nonfinite(error: NonFiniteError, kept: int, what: str = "That chunk was") -> None:
    """Say in the error which chunk it was, and what is kept.

    Args:
        error: its `chunk` is known.
        kept: chunks before it that count.
        what: what was discarded, as the start of a sentence.
    """
    where = f"channel {error.channel}"
    if error.expert is not None:
        where = f"expert {error.expert}, {where}"
    error.args = (
        f"{error.args[0]} in chunk {error.chunk} ({where}). {what} discarded; the {kept} "
        "before it are kept in Collector.matrix. on_nonfinite='skip' (--on-nonfinite skip) leaves "
        "such chunks out and goes on.",
    )


def explain_death(
    error: EngineDiedError,
    *,
    next_chunk: int,
    done: int,
    n_seq: int,
    checkpoint: Path | None,
    saved: int | None,
) -> None:
    """Say in the error where the run was, and what there is to go on from.

    Args:
        error: its `chunk` is None if the engine was in none, say while its sums were fetched.
        next_chunk: number of the first chunk that is not done, skipped ones counted.
        done: chunks that are done.
        n_seq: chunks side by side.
        checkpoint: path of the run's checkpoint; None without one.
        saved: chunks that the checkpoint holds; None if there is none to go on from.
    """
    if error.chunk is None:
        ran = f", before chunk {next_chunk}" if done else ""
    elif n_seq > 1:
        ran = f", in one of the chunks {error.chunk} to {error.chunk + n_seq - 1}"
    else:
        ran = f", in chunk {error.chunk}"
    if saved is not None and checkpoint is not None:
        error.checkpoint = checkpoint
        seconds = max(0, round(time.time() - checkpoint.stat().st_mtime))
        left = (
            f"{checkpoint} holds {saved} chunk(s) and is {datetime.timedelta(seconds=seconds)} old "
            "(h:mm:ss): run the same again to go on from it. If it ends at the same chunk again, "
            "collect those before it (max_chunks, --chunks) and those after it (skip_chunks, "
            "--chunk) by themselves, and add the matrices (+, --in-file)."
        )
    elif done:
        cure = ": give run() one (checkpoint=)." if checkpoint is None else "."
        left = f"There is no checkpoint to go on from, {done} chunk(s) are lost{cure}"
    else:
        left = "No chunk was finished."
    error.args = (f"{error.args[0]}{ran}. {left}",)


def describe_left_out(left_out: list[LeftOut]) -> str:
    """The warning about chunks that do not count."""
    first = few(
        [f"chunk {one.chunk} (from token {one.token}, at {one.weight})" for one in left_out], 3
    )
    return f"left out for NaN or infinite activations: {first}"
