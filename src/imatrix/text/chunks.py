"""Tokens to chunks: cut as llama-imatrix cuts them, or document by document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import Texts, found_in
from imatrix.text.mixtures import Mixture
from imatrix.text.sources import Source
from imatrix.text.tokens import Packing, Pieces, Reading, Render, SourceTally, Tokenizer

__all__ = ["Chunk", "Chunks", "Read", "chunks"]


class Read(NamedTuple):
    """What was read of a source up to one chunk.

    Attributes:
        documents: documents begun.
        dropped: tokens that are in no chunk.
        empty: documents without a text.
        skipped: records that could not be used.
    """

    documents: int = 0
    dropped: int = 0
    empty: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Chunk:
    """Tokens that the engine runs together, from an empty memory.

    Attributes:
        tokens: [n] int32, 2 <= n <= n_ctx.
        parts: (number of the source in the mixture, how many tokens) for each source that the
            tokens come from; a BOS counts for the source of the token beside it.
        start: how many tokens all chunks before this one have, skipped chunks included.
        read: what had been read of each source when this chunk was full.
    """

    tokens: NDArray[np.int32]
    parts: tuple[tuple[int, int], ...]
    start: int = 0
    read: tuple[Read, ...] = ()


class Chunks:
    """Texts, cut into chunks, lazily: an iterator of Chunk.

    See `chunks` for the other arguments and for the errors.

    Args:
        render: makes text of a Chat; None if chats are not expected.
        on_bad_record: "skip" to leave out, and count, the records that cannot be used.

    Attributes:
        tallies: one for each source, as far as the text has been read.
        ended: the number of the source that ended the text; None while the text has not ended,
            and if the sources follow one another.
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
            self._names, weights, found = texts.names, texts.weights, texts.found()
        else:
            self._names, weights = ("",), None
            found = [((0, each) for each in found_in(texts))]
        self.tallies = [SourceTally() for _ in self._names]
        reading = Reading(tokenizer, parse_special, packing, render, self.tallies, on_bad_record)
        streams = [cut(reading.tokens(each), n_ctx, self._bos, self.tallies) for each in found]
        together = streams[0] if weights is None else self._interleaved(streams, weights)
        self._chunks = self._limited(together, skip_chunks, max_chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    @property
    def read(self) -> tuple[Read, ...]:
        """What was read of each source so far."""
        return tuple(
            Read(each.documents, each.dropped, each.empty, each.skipped) for each in self.tallies
        )

    @property
    def first_skipped(self) -> tuple[str, ...]:
        """What was wrong with the first skipped record of each source; "" if none was."""
        return tuple(each.first_skipped for each in self.tallies)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources; one "" for a text that is no source."""
        return self._names

    def _interleaved(
        self, streams: list[Iterator[Chunk]], weights: Sequence[float]
    ) -> Iterator[Chunk]:
        """The streams mixed: each next chunk comes from the source that is furthest behind its
        share, or from the first of several. The mix ends when that source has no more."""
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
                break  # a short stream has this one short chunk, and only full ones are skipped
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

    As a stream: all texts make one stream of tokens. It is cut every ``n_ctx`` tokens, and the
    tail that does not fill a chunk is dropped. If the model wants a BOS, it replaces the first
    token of every chunk (compute_imatrix in tools/imatrix/imatrix.cpp). Two things differ from
    llama-imatrix: one full chunk is enough (llama-imatrix demands two), and a stream shorter than
    ``n_ctx`` is not refused but becomes one short chunk. If the tokenizer ends a text with a token
    of its own (add_eos_token, or the SEP of a BERT), every text ends with that token; the
    tokenizer's BOS stands in front of the first text only.

    By documents: a chunk holds tokens of one document. A document longer than ``n_ctx`` is cut,
    and the rest of it becomes a shorter chunk. If the model wants a BOS, it stands in front of
    every chunk, in addition to the document's tokens unless they begin with it, and replaces none
    of them. A chunk of a single token is dropped.

    At most one item of ``texts`` and one chunk are held at a time, and an item is read only when a
    chunk needs it.

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
            - a Source or a Mixture (imatrix.text.sources, imatrix.text.mixtures).

            Each of the first three is one document, and so is each item of an iterable.
        tokenizer: turns str into tokens and names the BOS.
        n_ctx: tokens in a chunk, 2 or more.
        packing: "stream" or "document".
        parse_special: read control tokens spelled out in the text as such.
        skip_chunks: chunks to leave out at the start (`--chunk`).
        max_chunks: chunks to stop after (`--chunks`); None for all.

    Yields:
        A new array [n_ctx] int32 for each chunk; [n] with 2 <= n < n_ctx for a short one.

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
    """The token that stands in front of every chunk; None if the model wants none."""
    if not tokenizer.add_bos:
        return None
    if tokenizer.bos < 0:
        raise ValueError(
            f"the tokenizer asks for a BOS token (add_bos) but names none (bos is {tokenizer.bos}); "
            "the model's tokenizer.ggml metadata contradict each other"
        )
    return tokenizer.bos


def _cut(
    stream: Pieces, n_ctx: int, bos: int | None, tallies: Sequence[SourceTally]
) -> Iterator[Chunk]:
    """Chunks of n_ctx tokens across documents; one short chunk if there is no full one."""
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
    documents: Pieces, n_ctx: int, bos: int | None, tallies: Sequence[SourceTally]
) -> Iterator[Chunk]:
    """Chunks that hold one document each, up to n_ctx tokens long."""
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
