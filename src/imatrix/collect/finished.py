"""An output that is one of the run's inputs too: it must not be added to a second time.

If a run is killed between writing such an output and removing its checkpoint, the output holds the
new data and the checkpoint looks like that of an unfinished run. The checkpoint therefore says,
before the output is put in place, which file the output will be.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from imatrix.formats import FormatError, checkpoint

__all__ = ["is_finished", "mark_output"]


def mark_output(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Write into a checkpoint which file is about to become the output.

    Args:
        path: the checkpoint.
        output: the file that will be put in the output's place.

    Raises:
        OSError: the checkpoint is not there (FileNotFoundError), or cannot be written.
    """
    checkpoint.write(replace(checkpoint.read(path), output=_digest(output)), path)


def is_finished(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is of a run that had written this output, and with it all it had to."""
    try:
        marked = checkpoint.read(path).output
        return bool(marked) and _digest(output) == marked
    except (OSError, FormatError):
        return False  # the run itself tells what is wrong with it


def _digest(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
