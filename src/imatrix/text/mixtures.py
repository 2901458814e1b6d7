"""Several sources as one text: one after the other, or interleaved by their shares."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

from imatrix.text.documents import Found, Item
from imatrix.text.shuffling import shuffled
from imatrix.text.sources import Source

__all__ = ["Mixture"]


class Mixture:
    """Several sources as one text.

    Without weights the sources follow one another. With weights they are interleaved chunk by
    chunk: the next chunk comes from the source that is furthest behind its share of the tokens,
    so that every beginning of the text has the shares, to within a chunk. No chunk holds text of
    two sources. The text ends as soon as one source ends.

    With a seed documents are shuffled: without weights those of all sources together, with weights
    those of each source by themselves. A shuffle holds 10,000 documents or 64 Mi characters,
    whichever is less, gives one of them at random and takes in the next; it also reads a folder's
    files in random order. One seed gives one order, on every machine.

    Args:
        sources: Sources, or what Source() takes.
        seed: None for the order of the sources.

    Raises:
        ValueError: no source, or some have a weight and some have none.
    """

    def __init__(
        self,
        sources: Iterable[Source | str | os.PathLike[str] | Iterable[Any]],
        *,
        seed: int | None = None,
    ) -> None:
        if isinstance(sources, (str, os.PathLike, Source)):
            sources = [sources]
        self.sources = tuple(each if isinstance(each, Source) else Source(each) for each in sources)
        self.seed = seed
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {seed}")
        if not self.sources:
            raise ValueError("a mixture needs one source at least")
        given = [each.weight is not None for each in self.sources]
        if any(given) and not all(given):
            raise ValueError(
                f"{self.sources[given.index(False)].name or 'a source'} has no weight and "
                f"{self.sources[given.index(True)].name or 'another'} has one; give every source a "
                "weight, or none"
            )

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weights; None if the sources follow one another."""
        found = [each.weight for each in self.sources if each.weight is not None]
        return tuple(found) if len(found) > 1 else None

    @property
    def names(self) -> tuple[str, ...]:
        """The sources' names."""
        return tuple(each.name for each in self.sources)

    def check(self) -> None:
        """Find out now whether there is something to read; see Source.check."""
        for each in self.sources:
            each.check()

    def streams(self) -> list[Iterator[tuple[int, Item]]]:
        """Streams of documents, each document with the number of its source. With weights there is
        a stream for each source, without weights one for all. Documents whose text is null are
        left out.

        Raises (when iterated): as Source.documents does.
        """
        return [_usable(stream) for stream in self.found()]

    def found(self) -> list[Iterator[tuple[int, Found]]]:
        """The same streams of what Source.found gives. A shuffle lets errors and nulls pass at
        once, so that they do not change the order of the documents."""
        if self.weights is None:
            rng = self._rng("")
            together = itertools.chain.from_iterable(
                _numbered(index, each, rng) for index, each in enumerate(self.sources)
            )
            return [shuffled(together, rng)]
        return [
            shuffled(_numbered(index, each, rng), rng)
            for index, each in enumerate(self.sources)
            for rng in [self._rng(str(index))]
        ]

    def _rng(self, stream: str) -> random.Random | None:
        return None if self.seed is None else random.Random(f"{self.seed}/{stream}")

    def __repr__(self) -> str:
        seed = "" if self.seed is None else f", seed={self.seed}"
        return f"Mixture({list(self.sources)}{seed})"


def _usable(stream: Iterator[tuple[int, Found]]) -> Iterator[tuple[int, Item]]:
    """The documents of a stream; raises its first error."""
    for index, found in stream:
        if found.error is not None:
            raise found.error
        if found.item is not None:
            yield index, found.item


def _numbered(index: int, source: Source, rng: random.Random | None) -> Iterator[tuple[int, Found]]:
    """What a source has, with the source's number."""
    for found in source.found(rng):
        yield index, found
