"""Decides when a run writes its checkpoint, and whether a checkpoint that is there is of the same
run."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from imatrix.engine.identity import describe_differences_of_runs, differences_of_runs
from imatrix.engine.settings import Batch
from imatrix.errors import CheckpointError
from imatrix.formats import FormatError, checkpoint
from imatrix.formats.checkpoint import Checkpoint, Setting

__all__ = ["OTHER_RUN", "Keeper", "batch_in"]

OTHER_RUN = (
    "Give what that run was given to go on from it, another checkpoint, or restart=True "
    "(--restart) to start from zero."
)

# A power cut may cost so much, however long a chunk takes.
_SECONDS = 180.0


class Keeper:
    """Writes the checkpoint of a run as it grows.

    Args:
        path: the checkpoint.
        every: chunks between two; 0 for every three minutes only.
        state: gives the state to write. Called between two steps.
    """

    def __init__(
        self, path: str | os.PathLike[str], every: int, state: Callable[[], Checkpoint]
    ) -> None:
        self.path = Path(path)
        self._every = every
        self._state = state
        self.saved = 0  # chunks in the file
        self._saved_at = time.monotonic()

    def load(self, settings: Mapping[str, Setting]) -> Checkpoint | None:
        """The checkpoint, if there is one.

        Raises:
            CheckpointError: it is damaged, or of a run with other settings.
            OSError: it cannot be read.
        """
        try:
            found = checkpoint.read(self.path)
        except FileNotFoundError:
            return None
        except FormatError as error:
            raise CheckpointError(
                f"cannot go on from {error}. Pass restart=True (--restart) to start from zero."
            ) from error
        names = differences_of_runs(found.settings, settings)
        if names == ["signed_sums"] and settings["signed_sums"]:
            raise CheckpointError(
                f"{self.path} holds no signed sums (sums of the activations themselves), so that "
                "those of the whole run cannot be had from it. Pass signed_sums=False "
                "(--no-signed-sums) to go on from it without, or restart=True (--restart) to start "
                "from zero."
            )
        if names:
            differences = describe_differences_of_runs(names, found.settings, settings)
            raise CheckpointError(f"{self.path} is of another run: {differences}. {OTHER_RUN}")
        self.saved = found.done
        return found

    def step(self, done: int) -> None:
        """After a step: write what is due, with `done` chunks dealt with."""
        due = self._every > 0 and done // self._every > self.saved // self._every
        if due or time.monotonic() - self._saved_at >= _SECONDS:
            self.save(done)

    def save(self, done: int) -> None:
        """Write the checkpoint unless it is there. A failure is a warning: the run is worth more,
        and the disk may have room again the next time."""
        if done == self.saved:
            return
        try:
            checkpoint.write(self._state(), self.path)
        except (OSError, MemoryError) as error:
            warnings.warn(f"cannot write the checkpoint {self.path}: {error}", stacklevel=3)
            return
        finally:
            self._saved_at = time.monotonic()
        self.saved = done


def batch_in(path: str | os.PathLike[str]) -> Batch | None:
    """The batch of the run that wrote a checkpoint; None if there is none that can be
    read."""
    try:
        settings = checkpoint.read(path).settings
    except (OSError, FormatError):
        return None
    n_seq, n_batch, n_ubatch = (settings.get(name) for name in ("n_seq", "n_batch", "n_ubatch"))
    if not (isinstance(n_seq, int) and isinstance(n_batch, int) and isinstance(n_ubatch, int)):
        return None
    return Batch(n_seq, n_batch, n_ubatch) if 0 < n_seq <= n_batch and n_ubatch > 0 else None
