"""Documents to tokens, each document by itself, and what became of each source on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from imatrix.errors import EngineError, ModelError, TemplateError
from imatrix.text.documents import Chat, Found, OnBadRecord
from imatrix.text.inputs import Texts, found_in
from imatrix.text.plain import repaired
from imatrix.text.records import check_messages, is_empty_chat

__all__ = ["Packing", "Pieces", "Reading", "Render", "SourceTally", "Tokenizer", "pieces"]

Packing = Literal["stream", "document"]

Render: TypeAlias = Callable[[Chat], str]


class Tokenizer(Protocol):
    """What this module needs of a tokenizer.

    Two attributes are optional: if it has an int ``n_vocab``, token ids that are not below it are
    refused; if it has a method ``check()``, that raises a ModelError if no text can be tokenized.
    """

    @property
    def add_bos(self) -> bool:
        """Whether the model wants a BOS token in front (llama_vocab_get_add_bos)."""

    @property
    def bos(self) -> int:
        """The BOS token; only used if add_bos is true."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        """Tokens of ``text``: [n] int32.

        ``add_special`` adds BOS in front and EOS (or SEP) at the end, each if the model wants it;
        an empty text then gives these alone. ``parse_special`` reads the spelling of a control
        token in the text as that token.
        """


@dataclass
class SourceTally:
    """What became of one source so far.

    Attributes:
        documents: documents read, without the empty ones.
        tokens: tokens that were put into a chunk or dropped.
        dropped: tokens that are in no chunk: the end of a stream that does not fill a chunk; with
            document packing a single token that is a whole document or the end of one.
        empty: documents without a text: null, "", or a chat in which no message says anything.
        skipped: records that could not be used and were left out.
        first_skipped: what was wrong with the first of them; "" if none was skipped.
    """

    documents: int = 0
    tokens: int = 0
    dropped: int = 0
    empty: int = 0
    skipped: int = 0
    first_skipped: str = ""


Pieces: TypeAlias = "Iterator[tuple[int, NDArray[np.int32]]]"
"""The tokens of each document, [n] int32, with the number of its source."""


# Errors that may concern one record only, so that the next one may work. A model without a tokenizer,
# a template that can render no chat, and an engine that is gone concern all records.
_OF_A_RECORD = (ValueError, TypeError, RecursionError, EngineError)


@dataclass(frozen=True)
class Reading:
    """Turns documents of any kind into tokens, and counts those that are empty or unusable."""

    tokenizer: Tokenizer
    parse_special: bool
    packing: Packing
    render: Render | None
    tallies: Sequence[SourceTally]
    on_bad_record: OnBadRecord

    @cached_property
    def end(self) -> NDArray[np.int32]:
        """What the tokenizer puts after a text; see _end."""
        return _end(self.tokenizer)

    def tokens(self, items: Iterable[tuple[int, Found]]) -> Pieces:
        """Tokens of the documents, each with the number of its source."""
        first = True
        for source, found in items:
            try:
                tokens = self._tokens(found, add_special=first or self.packing == "document")
            except _OF_A_RECORD as error:
                if not self._is_of_a_record(error):
                    raise
                if self.on_bad_record == "skip":
                    tally = self.tallies[source]
                    tally.skipped += 1
                    tally.first_skipped = tally.first_skipped or str(_located(error, found.where))
                    continue
                raise _located(error, found.where) from error
            if tokens is None:
                self.tallies[source].empty += 1
                continue
            first = False
            yield source, tokens

    def _tokens(self, found: Found, *, add_special: bool) -> NDArray[np.int32] | None:
        """Tokens of one document; None for an empty one. An empty one gets no special tokens:
        they would hide that there is no text."""
        item = found.item
        if found.error is not None:
            raise found.error
        if item is None:
            return None
        parse_special, end = self.parse_special, False
        if isinstance(item, Chat):
            if self.render is None:
                raise ValueError("a chat among the texts, and no chat template to render it with")
            check_messages(item.messages)
            if item.messages and is_empty_chat(item.messages):
                return None
            # the template spells its special tokens out, the BOS and the end of an answer too
            item, add_special, parse_special = self.render(item), False, True
        elif isinstance(item, str):
            end = not add_special
        if isinstance(item, str):
            if not item:
                return None
            tokens = self.tokenizer.tokenize(
                repaired(item), add_special=add_special, parse_special=parse_special
            )
            tokens = np.asarray(tokens, dtype=np.int32)
            return np.concatenate([tokens, self.end]) if end and len(self.end) else tokens
        return _token_item(item, getattr(self.tokenizer, "n_vocab", None), found.where)

    def _is_of_a_record(self, error: Exception) -> bool:
        if isinstance(error, TemplateError):
            return not error.for_all
        if isinstance(error, EngineError):
            return type(error) is EngineError  # a subclass says that the process is gone
        if isinstance(error, ModelError):
            # a vocabulary may lack what one text needs, or the model has no vocabulary
            check = getattr(self.tokenizer, "check", None)
            if check is None:
                return False
            check()
        return True


def _end(tokenizer: Tokenizer) -> NDArray[np.int32]:
    """What the tokenizer puts after a text: EOS, SEP, or nothing; int32 [0] or [1].

    An empty text shows it, since it gets the special tokens alone. Wordpiece puts a token in front
    and one behind, whatever the model says about a BOS (llama_vocab::impl::tokenize in
    src/llama-vocab.cpp).
    """
    special = np.asarray(
        tokenizer.tokenize("", add_special=True, parse_special=False), dtype=np.int32
    )
    return special[1 if tokenizer.add_bos or len(special) > 1 else 0 :]


def _located(error: Exception, where: str) -> Exception:
    """The error with the place of its record in front."""
    message = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if where and not message.startswith(where):
        message = f"{where}: {message}"
    if isinstance(error, TemplateError):
        return TemplateError(message, line=error.line)
    for kind in (TypeError, EngineError, ModelError):
        if isinstance(error, kind):
            return kind(message)
    return ValueError(message)


def pieces(
    texts: Texts,
    tokenizer: Tokenizer,
    parse_special: bool,
    *,
    packing: Packing = "stream",
    render: Render | None = None,
) -> Iterator[NDArray[np.int32]]:
    """The tokens of each item of `texts` before they are cut, lazily: arrays [n] int32.

    See imatrix.text.chunks.chunks for what `texts` may be, except sources, and for the errors.
    """
    reading = Reading(tokenizer, parse_special, packing, render, [SourceTally()], "stop")
    numbered = ((0, found) for found in found_in(texts))
    return (piece for _, piece in reading.tokens(numbered))


def _token_item(item: object, n_vocab: int | None, where: str) -> NDArray[np.int32]:
    if isinstance(item, (bytes, bytearray, memoryview)):
        raise TypeError(f"{where} is {type(item).__name__}; decode it first, with .decode('utf-8')")
    if not isinstance(item, (np.ndarray, Sequence)):
        hint = "; wrap the ids in a list" if isinstance(item, (int, np.integer)) else ""
        raise TypeError(
            f"{where} is {type(item).__name__}, expected a str or a list of token ids{hint}"
        )
    try:
        tokens = np.asarray(item)
    except ValueError:  # lists of unequal lengths inside
        tokens = np.empty((0, 0))
    if tokens.ndim == 1 and tokens.size == 0:
        return np.empty(0, dtype=np.int32)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise TypeError(f"{where}: expected a flat list of int token ids")
    _check_range(tokens, n_vocab, where)
    return tokens.astype(np.int32, copy=False)


def _check_range(tokens: NDArray[np.integer], n_vocab: int | None, where: str) -> None:
    limit = 2**31 if n_vocab is None else n_vocab
    # int() first: a comparison inside a small integer type cannot take a large limit.
    if int(tokens.min()) >= 0 and int(tokens.max()) < limit:
        return
    position = next(i for i, token in enumerate(tokens) if not 0 <= int(token) < limit)
    raise ValueError(
        f"{where}[{position}]: token id {int(tokens[position])} is out of range; the "
        f"vocabulary has ids 0 to {limit - 1}"
    )
