"""File formats of importance matrices: reading and writing, nothing else."""

from __future__ import annotations

from imatrix.errors import FormatError
from imatrix.formats.detection import Format, detected

__all__ = ["Format", "FormatError", "detected"]
