"""From texts to the chunks of a run, and what tells one text from another."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from imatrix.formats.checkpoint import Setting
from imatrix.text.chats import ChatOptions, Renderer
from imatrix.text.chunks import Chunk, Chunks
from imatrix.text.chunks import chunks as cut_tokens
from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import TextFile, Texts
from imatrix.text.mixtures import Mixture
from imatrix.text.sources import Source
from imatrix.text.tokens import Packing, Tokenizer, pieces

__all__ = ["CheckedTokenizer", "Cut", "TextFacts", "cut", "in_groups", "tokens_of"]


class CheckedTokenizer(Tokenizer, Protocol):
    """A tokenizer that refuses any text if its model can tokenize none. Token ids still pass."""

    @property
    def n_vocab(self) -> int:
        """Token ids are below it."""

    def check(self) -> None:
        """That text can be tokenized.

        Raises:
            ModelError: it cannot.
        """


@dataclass(frozen=True)
class TextFacts:
    """What a caller's texts say of themselves before they are read.

    Attributes:
        datasets: what imatrix.datasets names in a file.
        names: of the sources; a text that is no source is called what its data set is, or "".
        weights: the share of each source, None if none was given.
        seed: of the shuffle, None without one.
    """

    datasets: tuple[str, ...]
    names: tuple[str, ...]
    weights: tuple[float | None, ...]
    seed: int | None

    @classmethod
    def of(cls, texts: Texts) -> TextFacts:
        """Read nothing, and say what is known."""
        if isinstance(texts, Mixture):
            datasets = tuple(dict.fromkeys(name for name in texts.names if name))
            weights = texts.weights or (None,) * len(texts.sources)
            return cls(datasets, texts.names, weights, texts.seed)
        if isinstance(texts, os.PathLike):
            name = os.fspath(texts)
            return cls((name,), (name,), (None,), None)
        named = getattr(texts, "name", None)  # a Source has one, and so may an open file
        name = named if isinstance(named, str) else ""
        is_named = bool(name) if isinstance(texts, Source) else isinstance(named, str)
        return cls((name,) if is_named else (), (name,), (None,), None)

    def settings(self) -> dict[str, Setting]:
        """What decides the chunks of several sources, if it is not the default."""
        found: dict[str, Setting] = {}
        if self.seed is not None:
            found["seed"] = self.seed
        shares = [repr(weight) for weight in self.weights if weight is not None]
        if shares:
            found["weights"] = " ".join(shares)
        return found


@dataclass(frozen=True)
class Cut:
    """A text that was cut into chunks.

    Attributes:
        chunks: to be read once.
        total: how many there will be; None if only reading the text can tell.
        settings: what decides the chunks: of the text itself as far as that can be known before it
            is read, and what is not the default.
    """

    chunks: Chunks
    total: int | None
    settings: Mapping[str, Setting]


def cut(
    texts: Texts,
    tokenizer: CheckedTokenizer,
    n_ctx: int,
    *,
    packing: Packing = "stream",
    chat: ChatOptions | None = None,
    render: Renderer | None = None,
    parse_special: bool,
    skip_chunks: int,
    max_chunks: int | None,
    on_bad_record: OnBadRecord = "stop",
) -> Cut:
    """Cut texts into chunks of n_ctx tokens. A text that is one string or one file is tokenized
    here, everything else as its chunks are read.

    Args:
        texts, packing, chat, parse_special, skip_chunks, max_chunks, on_bad_record: as
            Collector.run has them.
        render: renders chats as `chat` says.

    Raises:
        ModelError: it is one text, and the model cannot tokenize.
        ValueError: a bad number, or the text cannot be understood.
        OSError: the text cannot be read.
    """
    settings: dict[str, Setting] = {}
    if packing != "stream":
        settings["packing"] = packing
    if on_bad_record != "stop":
        settings["on_bad_record"] = on_bad_record
    settings |= TextFacts.of(texts).settings()
    if chat is not None:
        settings["chat"] = chat.digest()
    total = None
    if isinstance(texts, (str, os.PathLike, TextFile)):
        tokenizer.check()
        tokens = np.concatenate([np.empty(0, np.int32), *pieces(texts, tokenizer, parse_special)])
        texts = [tokens]
        settings["text_tokens"] = len(tokens)
        settings["text_digest"] = hashlib.sha256(tokens_of(tokens)).hexdigest()
        if packing == "stream":
            total = max(1, len(tokens) // n_ctx) - skip_chunks
        else:  # a single document; a BOS in front of each chunk takes a token's place
            total = sum(1 for _ in cut_tokens(texts, tokenizer, n_ctx, packing=packing))
            total -= skip_chunks
        total = total if max_chunks is None else min(total, max_chunks)
    chunks = Chunks(
        texts,
        tokenizer,
        n_ctx,
        packing=packing,
        parse_special=parse_special,
        skip_chunks=skip_chunks,
        max_chunks=max_chunks,
        render=render,
        on_bad_record=on_bad_record,
    )
    return Cut(chunks, total, settings)


def tokens_of(tokens: NDArray[np.int32]) -> bytes:
    """Token ids as digests take them: int32, little-endian."""
    return tokens.astype("<i4").tobytes()


def in_groups(chunks: Iterator[Chunk], n_seq: int, done: int) -> Iterator[list[Chunk]]:
    """Chunks in groups of n_seq, the last one shorter.

    If `done` ends inside a group, that group had a chunk with a NaN and ran chunk by chunk:
    so does the rest of it.
    """
    for chunk in itertools.islice(chunks, -done % n_seq):
        yield [chunk]
    group: list[Chunk] = []
    for chunk in chunks:
        group.append(chunk)
        if len(group) == n_seq:  # at once: nothing is taken from the text before its time
            yield group
            group = []
    if group:
        yield group
