"""Which format a file of an importance matrix has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from imatrix.formats import dat

__all__ = ["Format", "detected"]

Format = Literal["gguf", "dat"]


def detected(path: str | os.PathLike[str]) -> Format:
    """The format that a file looks like; "gguf" for one that looks like neither, whose reader
    then says what it expected.

    Raises:
        FileNotFoundError, OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        magic = file.read(4)
    return "dat" if magic != b"GGUF" and dat.looks_like(path) else "gguf"
