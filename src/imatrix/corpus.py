"""Calibration text to token chunks, cut the way llama-imatrix cuts them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["TextFile", "Texts", "Tokenizer", "chunks", "pieces"]


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

        ``add_special`` adds BOS where the model wants it; ``parse_special`` reads the spelling of
        a control token in the text as that token.
        """


@runtime_checkable
class TextFile(Protocol):
    """An open file, in text or binary mode."""

    def read(self) -> str | bytes:
        """All that is left of the file."""


TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer]"
Texts: TypeAlias = "str | os.PathLike[str] | TextFile | Iterable[str] | Iterable[TokenIds]"


def chunks(
    texts: Texts,
    tokenizer: Tokenizer,
    n_ctx: int,
    *,
    parse_special: bool = False,
    skip_chunks: int = 0,
    max_chunks: int | None = None,
) -> Iterator[NDArray[np.int32]]:
    """Cut texts into chunks of tokens, lazily.

    All texts make one stream of tokens. It is cut every ``n_ctx`` tokens, the tail that does not
    fill a chunk is dropped, and where the model wants a BOS it replaces the first token of every
    chunk (compute_imatrix in tools/imatrix/imatrix.cpp). Two things differ from llama-imatrix:
    one full chunk is enough, where it demands two; and a stream shorter than ``n_ctx`` is not
    refused but becomes one short chunk.

    At most one item of ``texts`` and one chunk are held at a time, and no item is taken that no
    chunk needs.

    Args:
        texts: one of

            - a str: the text itself;
            - a path (os.PathLike): a UTF-8 file; as with `llama-imatrix -f`, one newline at the
              end is not part of the text (common/arg.cpp);
            - an open file: read whole and treated likewise, binary content as UTF-8;
            - an iterable of str: each tokenized by itself, special tokens added to the first only;
            - an iterable of token lists: sequences or arrays of ints, taken as they are.
        tokenizer: turns str into tokens and names the BOS.
        n_ctx: tokens in a chunk, 2 or more.
        parse_special: read control tokens spelled out in the text as such.
        skip_chunks: chunks to leave out at the start (`--chunk`).
        max_chunks: chunks to stop after (`--chunks`); None for all.

    Yields:
        [n_ctx] int32, a new array each; [n] with 2 <= n < n_ctx for the one short chunk.

    Raises:
        ValueError: at the call, for a bad number; while iterating, if there are no tokens, one
            only, or none left after ``skip_chunks``, if a token id is out of range, or a file is
            not UTF-8.
        TypeError: ``texts`` or an item is none of the above, or the items are of mixed kinds.
        OSError: a file cannot be read.
    """
    if n_ctx < 2:
        raise ValueError(f"n_ctx must be 2 or more, got {n_ctx}")
    if skip_chunks < 0:
        raise ValueError(f"skip_chunks must be 0 or more, got {skip_chunks}")
    if max_chunks is not None and max_chunks < 1:
        raise ValueError(f"max_chunks must be 1 or more, or None for all, got {max_chunks}")
    bos = _bos(tokenizer)
    return _cut(pieces(texts, tokenizer, parse_special), n_ctx, bos, skip_chunks, max_chunks)


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


def _cut(
    stream: Iterator[NDArray[np.int32]],
    n_ctx: int,
    bos: int | None,
    skip_chunks: int,
    max_chunks: int | None,
) -> Iterator[NDArray[np.int32]]:
    chunk = np.empty(n_ctx, dtype=np.int32)
    filled = 0
    n_full = 0
    for piece in stream:
        start = 0
        while start < len(piece):
            taken = min(n_ctx - filled, len(piece) - start)
            chunk[filled : filled + taken] = piece[start : start + taken]
            filled += taken
            start += taken
            if filled < n_ctx:
                continue
            filled = 0
            n_full += 1
            if n_full > skip_chunks:
                yield _with_bos(chunk, bos)
                if max_chunks is not None and n_full - skip_chunks == max_chunks:
                    return
    n_tokens = n_full * n_ctx + filled
    if n_tokens == 0:
        raise ValueError(
            "no tokens: the texts are empty (if it was an open file or an iterator, was it read "
            "before?)"
        )
    if n_tokens == 1:
        raise ValueError("the texts make 1 token only; a chunk needs at least 2, so give more text")
    if skip_chunks and n_full <= skip_chunks:
        raise ValueError(
            f"nothing is left after skipping {skip_chunks} chunks of {n_ctx} tokens "
            f"({skip_chunks * n_ctx} tokens): the texts make {n_tokens} tokens, {n_full} full "
            "chunks; skip fewer or give more text"
        )
    if n_full == 0:
        yield _with_bos(chunk[:filled], bos)


def _with_bos(tokens: NDArray[np.int32], bos: int | None) -> NDArray[np.int32]:
    chunk: NDArray[np.int32] = tokens.copy()
    if bos is not None:
        chunk[0] = bos
    return chunk


def pieces(texts: Texts, tokenizer: Tokenizer, parse_special: bool) -> Iterator[NDArray[np.int32]]:
    """The stream of tokens before it is cut, lazily: an array [n] int32 an item of `texts`.

    See `chunks` for what `texts` may be and what it raises.
    """
    if isinstance(texts, str):
        return _tokenized([texts], tokenizer, parse_special)
    if isinstance(texts, (bytes, bytearray, memoryview)):
        raise TypeError(f"texts is {type(texts).__name__}; decode it first, with .decode('utf-8')")
    if isinstance(texts, os.PathLike):
        return _tokenized(_path_text(texts), tokenizer, parse_special)
    if isinstance(texts, TextFile):
        return _tokenized(_file_text(texts), tokenizer, parse_special)
    if isinstance(texts, Iterable) and not isinstance(texts, Mapping):
        return _items(texts, tokenizer, parse_special)
    raise TypeError(
        "texts must be a str, a path, an open file, or an iterable of str or of token lists, not "
        f"{type(texts).__name__}"
    )


def _tokenized(
    texts: Iterable[str], tokenizer: Tokenizer, parse_special: bool
) -> Iterator[NDArray[np.int32]]:
    first = True
    for text in texts:
        # An empty text is passed over: special tokens for it would hide that there is none.
        if text:
            tokens = tokenizer.tokenize(text, add_special=first, parse_special=parse_special)
            yield np.asarray(tokens, dtype=np.int32)
            first = False


# These two are generators so that nothing is read before the first chunk is asked for.
def _path_text(path: os.PathLike[str]) -> Iterator[str]:
    yield _text_of(Path(path).read_bytes(), os.fspath(path))


def _file_text(file: TextFile) -> Iterator[str]:
    name = str(getattr(file, "name", "the file"))
    try:
        content = file.read()
    except UnicodeDecodeError as error:
        raise _undecodable(name, error) from error
    yield _text_of(content, name)


def _text_of(content: str | bytes, name: str) -> str:
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _undecodable(name, error) from error
    elif not isinstance(content, str):
        raise TypeError(f"{name}: read() gave {type(content).__name__}, expected str or bytes")
    return content.removesuffix("\n")


def _undecodable(name: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{name}: not {error.encoding} text: byte 0x{error.object[error.start]:02x} at offset "
        f"{error.start} ({error.reason}); convert the file to UTF-8"
    )


def _items(
    texts: Iterable[object], tokenizer: Tokenizer, parse_special: bool
) -> Iterator[NDArray[np.int32]]:
    """Tokens of an iterable's items, all str or all token lists, as the first one says."""
    items = enumerate(texts)
    first = next(items, None)
    if first is None:
        return
    rest = _chained(first, items)
    if isinstance(first[1], str):
        yield from _tokenized(map(_str_item, rest), tokenizer, parse_special)
    else:
        n_vocab = getattr(tokenizer, "n_vocab", None)
        for index, item in rest:
            yield _token_item(index, item, n_vocab)


def _chained(
    first: tuple[int, object], rest: Iterator[tuple[int, object]]
) -> Iterator[tuple[int, object]]:
    yield first
    yield from rest


def _str_item(numbered: tuple[int, object]) -> str:
    index, item = numbered
    if not isinstance(item, str):
        raise TypeError(
            f"texts[{index}] is {type(item).__name__}, the items before it are str; give all str "
            "or all token lists"
        )
    return item


def _token_item(index: int, item: object, n_vocab: int | None) -> NDArray[np.int32]:
    if isinstance(item, str):
        raise TypeError(
            f"texts[{index}] is str, the items before it are token lists; give all str or all "
            "token lists"
        )
    if isinstance(item, (bytes, bytearray, memoryview)):
        raise TypeError(
            f"texts[{index}] is {type(item).__name__}; decode it first, with .decode('utf-8')"
        )
    if not isinstance(item, (np.ndarray, Sequence)):
        hint = "; wrap the ids in a list" if isinstance(item, (int, np.integer)) else ""
        raise TypeError(
            f"texts[{index}] is {type(item).__name__}, expected a str or a list of token ids{hint}"
        )
    try:
        tokens = np.asarray(item)
    except ValueError:  # lists of unequal lengths inside
        tokens = np.empty((0, 0))
    if tokens.ndim == 1 and tokens.size == 0:
        return np.empty(0, dtype=np.int32)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise TypeError(f"texts[{index}]: expected a flat list of int token ids")
    _check_range(index, tokens, n_vocab)
    return tokens.astype(np.int32, copy=False)


def _check_range(index: int, tokens: NDArray[np.integer], n_vocab: int | None) -> None:
    limit = 2**31 if n_vocab is None else n_vocab
    # int() first: a comparison inside a small integer type cannot take a large limit.
    if int(tokens.min()) >= 0 and int(tokens.max()) < limit:
        return
    position = next(i for i, token in enumerate(tokens) if not 0 <= int(token) < limit)
    raise ValueError(
        f"texts[{index}][{position}]: token id {int(tokens[position])} is out of range; the "
        f"vocabulary has ids 0 to {limit - 1}"
    )
