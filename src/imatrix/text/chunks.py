"""Calibration text to token chunks: cut the way llama-imatrix cuts them, or by documents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from imatrix.errors import EngineError, ModelError, TemplateError
from imatrix.text.plain import BOM, decoded, repaired
from imatrix.text.records import check_messages, is_empty_chat
from imatrix.text.sources import Chat, Found, Mixture, OnBadRecord, Source
from imatrix.text.tokens import Packing, Render, TextFile, Texts, Tokenizer

__all__ = ["Chunk", "Chunks", "Read", "Tally", "chunks", "pieces"]


class Read(NamedTuple):
    """What was read of a source.

    Attributes:
        documents: documents begun.
        dropped: tokens that no chunk will have.
        empty: documents without a text.
        skipped: records that could not be used.
    """

    documents: int = 0
    dropped: int = 0
    empty: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Chunk:
    """Tokens that are run in one memory.

    Attributes:
        tokens: [n] int32, 2 <= n <= n_ctx.
        parts: (source, tokens) of each source that the tokens come from, by its number in the
            mixture; a BOS counts with what stands beside it.
        start: tokens of all chunks before this one, those that were skipped too.
        read: of each source, when this chunk was full.
    """

    tokens: NDArray[np.int32]
    parts: tuple[tuple[int, int], ...]
    start: int = 0
    read: tuple[Read, ...] = ()


@dataclass
class Tally:
    """What became of one source so far.

    Attributes:
        documents: documents read, but for the empty ones.
        tokens: tokens that were put into a chunk, or dropped.
        dropped: tokens that no chunk will have: the end of a stream that does not fill a chunk;
            with document packing a document, or the end of one, of a single token.
        empty: documents without a text: null, "", or a chat in which no message says anything.
        skipped: records that could not be used and were left out.
        first_skipped: what was wrong with the first of them; "" for none.
    """

    documents: int = 0
    tokens: int = 0
    dropped: int = 0
    empty: int = 0
    skipped: int = 0
    first_skipped: str = ""


class Chunks:
    """Texts, cut into chunks, lazily: an iterator of Chunk.

    See `chunks` for the arguments and for what it raises. One more:

    Args:
        render: makes text of a Chat; None where no chat can be.
        on_bad_record: "skip" to leave out, and count, the records that cannot be used.

    Attributes:
        tallies: one a source, as far as the text has been read.
        ended: the number of the source that ended the text; None while it has not ended, or
            where the sources follow one another.
    """

    def __init__(
        self,
        texts: Texts,
        tokenizer: Tokenizer,
        n_ctx: int,
        *,
        packing: Packing = "stream",
        parse_special: bool = False,
        skip_chunks: int = 0,
        max_chunks: int | None = None,
        render: Render | None = None,
        on_bad_record: OnBadRecord = "stop",
    ) -> None:
        if n_ctx < 2:
            raise ValueError(f"n_ctx must be 2 or more, got {n_ctx}")
        if skip_chunks < 0:
            raise ValueError(f"skip_chunks must be 0 or more, got {skip_chunks}")
        if max_chunks is not None and max_chunks < 1:
            raise ValueError(f"max_chunks must be 1 or more, or None for all, got {max_chunks}")
        if packing not in ("stream", "document"):
            raise ValueError(f"packing must be 'stream' or 'document', got {packing!r}")
        if on_bad_record not in ("stop", "skip"):
            raise ValueError(f"on_bad_record must be 'stop' or 'skip', got {on_bad_record!r}")
        self._n_ctx = n_ctx
        self._packing = packing
        self._bos = _bos(tokenizer)
        self.ended: int | None = None
        cut = _cut if packing == "stream" else _cut_documents
        if isinstance(texts, Source):
            texts = Mixture([texts])
        if isinstance(texts, Mixture):
            self._names = texts.names
            self.tallies = [Tally() for _ in texts.sources]
            reading = _Reading(
                tokenizer, parse_special, packing, render, self.tallies, on_bad_record
            )
            streams = [reading.tokens(stream) for stream in texts.found()]
            weights = texts.weights
        else:
            self._names = ("",)
            self.tallies = [Tally()]
            reading = _Reading(
                tokenizer, parse_special, packing, render, self.tallies, on_bad_record
            )
            streams = [reading.tokens((0, found) for found in _found_in(texts))]
            weights = None
        made = [cut(stream, n_ctx, self._bos, self.tallies) for stream in streams]
        together = made[0] if weights is None else self._interleaved(made, weights)
        self._chunks = self._limited(together, skip_chunks, max_chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    @property
    def read(self) -> tuple[Read, ...]:
        """What was read so far, of each source."""
        return tuple(
            Read(each.documents, each.dropped, each.empty, each.skipped) for each in self.tallies
        )

    @property
    def first_skipped(self) -> tuple[str, ...]:
        """What was wrong with the first record skipped, of each source; "" for none."""
        return tuple(each.first_skipped for each in self.tallies)

    @property
    def names(self) -> tuple[str, ...]:
        """The sources' names; one "" for a text that is no source."""
        return self._names

    def _interleaved(
        self, streams: list[Iterator[Chunk]], weights: Sequence[float]
    ) -> Iterator[Chunk]:
        """The next chunk from the source furthest behind its share, the first of several; until
        that one has no more."""
        tokens = [0] * len(streams)
        while True:
            index = min(range(len(streams)), key=lambda each: (tokens[each] / weights[each], each))
            chunk = next(streams[index], None)
            if chunk is None:
                if not tokens[index]:
                    raise ValueError(
                        f"{self._names[index]}: no tokens to take a share of; is it empty?"
                    )
                self.ended = index
                return
            tokens[index] += len(chunk.tokens)
            yield chunk

    def _limited(
        self, found: Iterator[Chunk], skip_chunks: int, max_chunks: int | None
    ) -> Iterator[Chunk]:
        n = 0
        start = 0
        for chunk in found:
            if skip_chunks and len(chunk.tokens) < self._n_ctx and self._packing == "stream":
                break  # the one short chunk of a short stream, which is no full one to skip
            n += 1
            if n > skip_chunks:
                yield replace(chunk, start=start, read=self.read)
                if max_chunks is not None and n - skip_chunks == max_chunks:
                    return
            start += len(chunk.tokens)
        tokens = sum(each.tokens for each in self.tallies)
        if tokens == 0:
            empty = sum(each.empty for each in self.tallies)
            skipped = sum(each.skipped for each in self.tallies)
            counted = (
                f"; {empty} document(s) are empty and {skipped} record(s) could not be used"
                if empty + skipped > 1 or skipped
                else ""
            )
            raise ValueError(
                "no tokens: the texts are empty (if it was an open file or an iterator, was it "
                f"read before?){counted}"
            )
        if n == 0 and not skip_chunks:
            raise ValueError(
                "the texts make 1 token only; a chunk needs at least 2, so give more text"
                if tokens == 1
                else f"none of the {sum(each.documents for each in self.tallies)} documents has "
                "2 tokens, which a chunk needs; pack them as a stream"
            )
        if n <= skip_chunks and skip_chunks:
            what = f"{n} full chunks" if self._packing == "stream" else f"{n} chunks"
            raise ValueError(
                f"nothing is left after skipping {skip_chunks} chunks of {self._n_ctx} tokens "
                f"({skip_chunks * self._n_ctx} tokens): the texts make {tokens} tokens, {what}; "
                "skip fewer or give more text"
            )


def chunks(
    texts: Texts,
    tokenizer: Tokenizer,
    n_ctx: int,
    *,
    packing: Packing = "stream",
    parse_special: bool = False,
    skip_chunks: int = 0,
    max_chunks: int | None = None,
) -> Iterator[NDArray[np.int32]]:
    """Cut texts into chunks of tokens, lazily.

    As a stream: all texts make one stream of tokens. It is cut every ``n_ctx`` tokens, the tail
    that does not fill a chunk is dropped, and where the model wants a BOS it replaces the first
    token of every chunk (compute_imatrix in tools/imatrix/imatrix.cpp). Two things differ from
    llama-imatrix: one full chunk is enough, where it demands two; and a stream shorter than
    ``n_ctx`` is not refused but becomes one short chunk. Where the tokenizer ends a text with a
    token of its own (add_eos_token, or the SEP of a BERT), every text ends with it, not the last or
    the first only; the tokenizer's BOS stands in front of the first text only.

    By documents: a chunk holds tokens of one document. A document longer than ``n_ctx`` is cut,
    and what is left of it is a chunk too, a shorter one. Where the model wants a BOS it stands in
    front of every chunk, in addition to the document's tokens unless they begin with it, and
    replaces none. A chunk of a single token is dropped.

    At most one item of ``texts`` and one chunk are held at a time, and no item is taken that no
    chunk needs.

    Args:
        texts: one of

            - a str: the text itself;
            - a path (os.PathLike): a UTF-8 file; as with `llama-imatrix -f`, one newline at the
              end is not part of the text (common/arg.cpp);
            - an open file: read whole and treated likewise, binary content as UTF-8;
            - an iterable of str: each tokenized by itself; in a stream only the first gets a BOS,
              and each gets the EOS;
            - an iterable of token lists: sequences or arrays of ints, taken as they are: no BOS
              and no EOS is added between them;
            - a Source or a Mixture of them (imatrix.text.sources).

            Each of the first three is one document, each item of an iterable is.
        tokenizer: turns str into tokens and names the BOS.
        n_ctx: tokens in a chunk, 2 or more.
        packing: "stream" or "document".
        parse_special: read control tokens spelled out in the text as such.
        skip_chunks: chunks to leave out at the start (`--chunk`).
        max_chunks: chunks to stop after (`--chunks`); None for all.

    Yields:
        [n_ctx] int32, a new array each; [n] with 2 <= n < n_ctx for a short chunk.

    Raises:
        ValueError: at the call, for a bad number; while iterating, if there are no tokens, one
            only, or none left after ``skip_chunks``, if a token id is out of range, or a file is
            not UTF-8.
        TypeError: ``texts`` or an item is none of the above, or the items are of mixed kinds.
        OSError: a file cannot be read.
    """
    found = Chunks(
        texts,
        tokenizer,
        n_ctx,
        packing=packing,
        parse_special=parse_special,
        skip_chunks=skip_chunks,
        max_chunks=max_chunks,
    )
    return (chunk.tokens for chunk in found)


def _bos(tokenizer: Tokenizer) -> int | None:
    """The token to put in front of every chunk; None for no such token."""
    if not tokenizer.add_bos:
        return None
    if tokenizer.bos < 0:
        raise ValueError(
            f"the tokenizer asks for a BOS token (add_bos) but names none (bos is {tokenizer.bos}); "
            "the model's tokenizer.ggml metadata contradict each other"
        )
    return tokenizer.bos


_Pieces: TypeAlias = "Iterator[tuple[int, NDArray[np.int32]]]"


def _cut(stream: _Pieces, n_ctx: int, bos: int | None, tallies: Sequence[Tally]) -> Iterator[Chunk]:
    """Chunks of n_ctx tokens, whoever's they are; one short chunk where there is no full one."""
    chunk = np.empty(n_ctx, dtype=np.int32)
    parts: list[tuple[int, int]] = []
    filled = 0
    n_full = 0
    for source, piece in stream:
        tallies[source].documents += 1
        start = 0
        while start < len(piece):
            taken = min(n_ctx - filled, len(piece) - start)
            chunk[filled : filled + taken] = piece[start : start + taken]
            filled += taken
            start += taken
            tallies[source].tokens += taken
            if parts and parts[-1][0] == source:
                parts[-1] = (source, parts[-1][1] + taken)
            else:
                parts.append((source, taken))
            if filled == n_ctx:
                yield Chunk(_with_bos(chunk, bos), tuple(parts))
                n_full += 1
                filled = 0
                parts = []
    if n_full == 0 and filled > 1:
        yield Chunk(_with_bos(chunk[:filled], bos), tuple(parts))
    else:
        for source, tokens in parts:
            tallies[source].dropped += tokens


def _with_bos(tokens: NDArray[np.int32], bos: int | None) -> NDArray[np.int32]:
    chunk: NDArray[np.int32] = tokens.copy()
    if bos is not None:
        chunk[0] = bos
    return chunk


def _cut_documents(
    documents: _Pieces, n_ctx: int, bos: int | None, tallies: Sequence[Tally]
) -> Iterator[Chunk]:
    """Chunks of one document each, up to n_ctx tokens long."""
    front = np.array([] if bos is None else [bos], dtype=np.int32)
    for source, tokens in documents:
        tally = tallies[source]
        tally.documents += 1
        start = 0
        while start < len(tokens):
            begins = bos is not None and start == 0 and tokens[0] == bos
            before = 0 if begins else len(front)
            piece = tokens[start : start + n_ctx - before]
            start += len(piece)
            tally.tokens += len(piece)
            if before + len(piece) < 2:
                tally.dropped += len(piece)
                continue
            whole = piece.copy() if before == 0 else np.concatenate([front, piece])
            yield Chunk(whole, ((source, len(whole)),))


# What can be wrong with one record, so that the next may do. A model without a tokenizer, a template
# that no chat can be rendered with, and an engine that is gone are wrong for all of them.
_OF_A_RECORD = (ValueError, TypeError, RecursionError, EngineError)


@dataclass(frozen=True)
class _Reading:
    """Documents to tokens, kinds mixed, counting what is empty or cannot be used."""

    tokenizer: Tokenizer
    parse_special: bool
    packing: Packing
    render: Render | None
    tallies: Sequence[Tally]
    on_bad_record: OnBadRecord

    @cached_property
    def end(self) -> NDArray[np.int32]:
        """What the tokenizer puts after a text, see _end."""
        return _end(self.tokenizer)

    def tokens(self, items: Iterable[tuple[int, Found]]) -> _Pieces:
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
        """Tokens of one; None for an empty one, which must not get special tokens, or they would
        hide that there is none."""
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
            # the template spells its special tokens out: the BOS, and what ends an answer
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
            return type(error) is EngineError  # not that its process is gone
        if isinstance(error, ModelError):
            # a vocabulary may lack what one text needs; or there is none
            check = getattr(self.tokenizer, "check", None)
            if check is None:
                return False
            check()
        return True


def _end(tokenizer: Tokenizer) -> NDArray[np.int32]:
    """What the tokenizer puts after a text: EOS, SEP, or nothing; int32 [0] or [1].

    Seen from an empty text, which gets the special tokens alone. Wordpiece has both, whatever the
    model says of a BOS (llama_vocab::impl::tokenize in src/llama-vocab.cpp).
    """
    special = np.asarray(
        tokenizer.tokenize("", add_special=True, parse_special=False), dtype=np.int32
    )
    return special[1 if tokenizer.add_bos or len(special) > 1 else 0 :]


def _located(error: Exception, where: str) -> Exception:
    """The error with the place of its record in front."""
    told = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if where and not told.startswith(where):
        told = f"{where}: {told}"
    if isinstance(error, TemplateError):
        return TemplateError(told, line=error.line)
    for kind in (TypeError, EngineError, ModelError):
        if isinstance(error, kind):
            return kind(told)
    return ValueError(told)


def pieces(
    texts: Texts,
    tokenizer: Tokenizer,
    parse_special: bool,
    *,
    packing: Packing = "stream",
    render: Render | None = None,
) -> Iterator[NDArray[np.int32]]:
    """The tokens before they are cut, lazily: an array [n] int32 an item of `texts`.

    See `chunks` for what `texts` may be and what it raises; sources are not among it here.
    """
    reading = _Reading(tokenizer, parse_special, packing, render, [Tally()], "stop")
    numbered = ((0, found) for found in _found_in(texts))
    return (piece for _, piece in reading.tokens(numbered))


def _found_in(texts: Texts) -> Iterator[Found]:
    """The items of texts that are no sources. Nothing is read before the first is asked for."""
    if isinstance(texts, str):
        return iter([Found("", texts)])
    if isinstance(texts, (bytes, bytearray, memoryview)):
        raise TypeError(f"texts is {type(texts).__name__}; decode it first, with .decode('utf-8')")
    if isinstance(texts, os.PathLike):
        return _path_text(texts)
    if isinstance(texts, TextFile):
        return _file_text(texts)
    if isinstance(texts, Iterable) and not isinstance(texts, Mapping):
        return _items(texts)
    raise TypeError(
        "texts must be a str, a path, an open file, or an iterable of str or of token lists, not "
        f"{type(texts).__name__}"
    )


# These two are generators so that nothing is read before the first chunk is asked for.
def _path_text(path: os.PathLike[str]) -> Iterator[Found]:
    yield Found(os.fspath(path), _text_of(Path(path).read_bytes(), os.fspath(path)))


def _file_text(file: TextFile) -> Iterator[Found]:
    name = str(getattr(file, "name", "the file"))
    try:
        content = file.read()
    except UnicodeDecodeError as error:
        raise _undecodable(name, error) from error
    yield Found(name, _text_of(content, name))


def _text_of(content: str | bytes, name: str) -> str:
    if isinstance(content, bytes):
        content = decoded(content, name)
    elif not isinstance(content, str):
        raise TypeError(f"{name}: read() gave {type(content).__name__}, expected str or bytes")
    return content.removeprefix(BOM).removesuffix("\n")


def _undecodable(name: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{name}: not {error.encoding} text: byte 0x{error.object[error.start]:02x} at offset "
        f"{error.start} ({error.reason}); convert the file to UTF-8"
    )


def _items(texts: Iterable[object]) -> Iterator[Found]:
    """An iterable's items, all str (or chats) or all token lists, as the first says."""
    of_text: bool | None = None
    for index, item in enumerate(texts):
        where = f"texts[{index}]"
        is_text = isinstance(item, (str, Chat))
        of_text = is_text if of_text is None else of_text
        if item is None:  # of a source it would be a null text; here it is a mistake
            told = f"{where} is NoneType, expected a str or a list of token ids"
            yield Found(where, error=TypeError(told))
        elif is_text == of_text:
            yield Found(where, item)  # type: ignore[arg-type]  # what else it is, is seen there
        elif of_text:
            told = (
                f"{where} is {type(item).__name__}, the items before it are str; give all str or "
                "all token lists"
            )
            yield Found(where, error=TypeError(told))
        else:
            told = (
                f"{where} is str, the items before it are token lists; give all str or all token "
                "lists"
            )
            yield Found(where, error=TypeError(told))


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
