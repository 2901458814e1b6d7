"""Finding out before the work whether its result can be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["check_output"]


def check_output(path: str, inputs: Sequence[str | None]) -> None:
    """Find out whether a file can be written.

    Raises:
        ValueError: it cannot, or would replace an input.
    """
    target = Path(path)
    for name in inputs:
        if name is None or not target.exists() or not Path(name).exists():
            continue
        if target.samefile(name):
            raise ValueError(f"the output {path} would replace the input {name}")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {folder}; create it first")
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise ValueError(f"cannot write {path}: it is {kind}")
    try:
        # the only sure way to know: permission bits say nothing of read-only file systems
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {folder}: {error.strerror}") from error
