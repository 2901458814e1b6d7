"""A loaded model as the tokenizer of a run's text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from imatrix.engine.interface import NativeModel

__all__ = ["ModelTokenizer"]


class ModelTokenizer:
    """Tokenizes by the model's own tokenizer, and refuses text if there is none that can be used.

    Args:
        model: the trunk, with or without its weights.
        check: raises the ModelError that any text would.
    """

    def __init__(self, model: NativeModel, check: Callable[[], None]) -> None:
        self._model = model
        self.check = check
        self.add_bos = model.add_bos
        self.bos = model.bos
        self.n_vocab = model.n_vocab

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        """Tokens of a text, [n] int32.

        Raises:
            ModelError: text cannot be tokenized.
        """
        self.check()
        return self._model.tokenize(text, add_special=add_special, parse_special=parse_special)
