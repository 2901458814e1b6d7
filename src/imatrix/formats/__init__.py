"""File formats of importance matrices: reading and writing, nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

__all__ = ["Format", "FormatError", "detected"]

Format = Literal["gguf", "dat"]


class FormatError(ValueError):
    """A file is not what its format promises.

    Attributes:
        path: the file, as it was given.
        reason: what is wrong with it and, where there is one, the way out.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def detected(path: str | os.PathLike[str]) -> Format:
    """The format that a file looks like; "gguf" for one that looks like neither, whose reader
    then says what it expected.

    Raises:
        FileNotFoundError, OSError: the file cannot be read.
    """
    from imatrix.formats import dat

    with Path(path).open("rb") as file:
        magic = file.read(4)
    return "dat" if magic != b"GGUF" and dat.looks_like(path) else "gguf"
