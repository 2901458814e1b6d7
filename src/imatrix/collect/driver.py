"""TODO."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager

from imatrix.engine.interface import NativeSession
from imatrix.files.lock import locked


def locked_checkpoint(checkpoint: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
    """One run a checkpoint. Where no lock can be written nothing else can: that is told when the
    checkpoint is due."""
    if checkpoint is None:
        return contextlib.nullcontext()
    try:
        return locked(checkpoint, "checkpoint")
    except OSError:
        return contextlib.nullcontext()


def settle(session: NativeSession | None, running: Future[None]) -> None:
    """End the running step, and wait until it has: its sums count or they do not. None where
    there is nothing to end early."""
    if session is not None:
        session.cancel()
    while not running.done():
        try:
            wait([running])
        except KeyboardInterrupt:
            continue  # on its way already
    if session is not None:
        session.clear_cancel()
