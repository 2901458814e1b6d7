"""TODO."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from imatrix.text.sources import Chat, Mixture, Source

__all__ = ["Packing", "TextFile", "Texts", "Tokenizer"]

Packing = Literal["stream", "document"]

Render: TypeAlias = Callable[[Chat], str]


class Tokenizer(Protocol):
    """What this module needs of a tokenizer.

    One that also has an int attribute ``n_vocab`` gets token ids below it only.
    """

    @property
    def add_bos(self) -> bool:
        """Whether the model wants a BOS token in front (llama_vocab_get_add_bos)."""

    @property
    def bos(self) -> int:
        """The BOS token; only used where add_bos is true."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        """Tokens of ``text``: [n] int32.

        ``add_special`` adds BOS in front and EOS (or SEP) at the end, each where the model wants
        it, and gives these alone for an empty text; ``parse_special`` reads the spelling of a
        control token in the text as that token.
        """


@runtime_checkable
class TextFile(Protocol):
    """An open file, in text or binary mode."""

    def read(self) -> str | bytes:
        """All that is left of the file."""


TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer]"
Texts: TypeAlias = (
    "str | os.PathLike[str] | TextFile | Iterable[str | Chat] | Iterable[TokenIds] | Source "
    "| Mixture"
)
