"""Importance matrices: made, merged, compared, described, and converted."""

from __future__ import annotations

from imatrix.entries import THIN, Entry, LeftOut, Provenance, TextSource
from imatrix.matrix.importance import ImportanceMatrix

__all__ = ["THIN", "Entry", "ImportanceMatrix", "LeftOut", "Provenance", "TextSource"]
