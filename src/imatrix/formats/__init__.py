"""File formats of importance matrices: reading and writing, nothing else."""

from __future__ import annotations

import os

__all__ = ["FormatError"]


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
