"""From texts to the chunks of a run, and what tells one text from another."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from imatrix.engine.interface import NativeModel
from imatrix.engine.models import Models
from imatrix.formats.checkpoint import Setting
from imatrix.text.chats import Renderer
from imatrix.text.chunks import Chunk, Chunks
from imatrix.text.chunks import chunks as cut_tokens
from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import TextFile, Texts
from imatrix.text.mixtures import Mixture
from imatrix.text.sources import Source
from imatrix.text.tokens import Packing, pieces

__all__ = ["cut", "dataset_names", "in_groups", "source_names", "tokens_of", "weights_of"]


def cut(
    models: Models,
    texts: Texts,
    n_ctx: int,
    *,
    packing: Packing = "stream",
    render: Renderer | None = None,
    parse_special: bool,
    skip_chunks: int,
    max_chunks: int | None,
    on_bad_record: OnBadRecord = "stop",
) -> tuple[Chunks, int | None, dict[str, Setting]]:
    """The chunks; how many there will be, and what tells the text from another, as far as that
    can be known before it is read. The model must be loaded."""
    total = None
    text: dict[str, Setting] = {}
    model = models.loaded()
    tokenizer = _Tokenizing(model, models.check_tokenizer)
    if isinstance(texts, (str, os.PathLike, TextFile)):
        models.check_tokenizer()
        tokens = np.concatenate([np.empty(0, np.int32), *pieces(texts, tokenizer, parse_special)])
        texts = [tokens]
        text["text_tokens"] = len(tokens)
        text["text_digest"] = hashlib.sha256(tokens_of(tokens)).hexdigest()
        if packing == "stream":
            total = max(1, len(tokens) // n_ctx) - skip_chunks
        else:  # a single document; a BOS in front of each chunk takes a token's place
            total = sum(1 for _ in cut_tokens(texts, model, n_ctx, packing=packing))
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
    return chunks, total, text


class _Tokenizing:
    """The model as a tokenizer that refuses text where there is none; token lists still pass."""

    def __init__(self, model: NativeModel, check: Callable[[], None]) -> None:
        self._model = model
        self._check = check
        self.add_bos = model.add_bos
        self.bos = model.bos
        self.n_vocab = model.n_vocab

    def check(self) -> None:
        """Raises the ModelError that any text would, if there is no tokenizer."""
        self._check()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        self._check()
        return self._model.tokenize(text, add_special=add_special, parse_special=parse_special)


def tokens_of(tokens: NDArray[np.int32]) -> bytes:
    """Token ids as digests take them: int32, little-endian."""
    return tokens.astype("<i4").tobytes()


def in_groups(chunks: Iterator[Chunk], n_seq: int, done: int) -> Iterator[list[Chunk]]:
    """Chunks in groups of n_seq, the last one shorter.

    Where `done` ends inside a group, that group had a chunk with a NaN and ran chunk by chunk:
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


def dataset_names(texts: Texts) -> list[str]:
    """What imatrix.datasets names in a file."""
    if isinstance(texts, Source):
        return [texts.name] if texts.name else []
    if isinstance(texts, Mixture):
        return list(dict.fromkeys(name for name in texts.names if name))
    if isinstance(texts, os.PathLike):
        return [os.fspath(texts)]
    name = getattr(texts, "name", None)
    return [name] if isinstance(name, str) else []


def source_names(texts: Texts, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the sources; a text that is no source is called what its data set is."""
    return names if isinstance(texts, (Source, Mixture)) else (*dataset_names(texts), "")[:1]


def weights_of(texts: Texts) -> tuple[float | None, ...]:
    """The share of each source, None where none was given."""
    if not isinstance(texts, Mixture):
        return (None,)
    return texts.weights or (None,) * len(texts.sources)
