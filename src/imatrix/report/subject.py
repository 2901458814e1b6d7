"""The matrix that a page is about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from imatrix.entries import Provenance
from imatrix.formats import Format
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.report.parts import Part

__all__ = ["Subject"]

_FORMATS: dict[Format | None, str] = {"gguf": "GGUF", "dat": ".dat", None: ""}


@dataclass(frozen=True, eq=False)
class Subject:
    """A matrix, and what is known of it beside its data.

    Attributes:
        matrix: the matrix.
        name: what to call it.
        form: the format of its file; None for a matrix that comes from no file.
    """

    matrix: ImportanceMatrix
    name: str
    form: Format | None

    @property
    def format(self) -> str:
        """The format as it is written; "" for none."""
        return _FORMATS[self.form]

    @property
    def made(self) -> Provenance:
        """How it was made; nothing is known if the file does not tell."""
        return self.matrix.provenance or Provenance()

    @property
    def tokens(self) -> int:
        """Tokens that count, 0 if not known."""
        if self.made.tokens is not None:
            return self.made.tokens
        return self.matrix.chunk_count * self.matrix.chunk_size

    @cached_property
    def _head(self) -> frozenset[str]:
        return frozenset(self.matrix.head)

    @cached_property
    def _head_blocks(self) -> frozenset[int]:
        return self.matrix.head_blocks

    def part_of(self, name: str) -> Part:
        """The part of the model that a weight belongs to."""
        return "head" if name in self._head else "trunk"

    def part_of_block(self, block: int) -> Part:
        """The part of the model that a block belongs to."""
        return "head" if block in self._head_blocks else "trunk"
