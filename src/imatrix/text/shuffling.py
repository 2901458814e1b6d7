"""The order of documents: shuffles that one seed makes the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path

from imatrix.text.documents import Chat, Found, Item

__all__ = ["permute", "shuffled"]

# A shuffle holds this much at most, whichever limit is reached first; but always one document.
_HELD_DOCUMENTS = 10_000
_HELD_CHARACTERS = 64 * 2**20


def shuffled(
    items: Iterator[tuple[int, Found]], rng: random.Random | None
) -> Iterator[tuple[int, Found]]:
    """The items, each with the number of its source, in an order drawn from `rng`; in their own
    order if that is None. Items without a document pass at once and take no draw."""
    if rng is None:
        yield from items
        return
    held: list[tuple[int, Found]] = []
    characters = 0
    for item in items:
        if item[1].item is None:
            yield item
            continue
        held.append(item)
        characters += _size(item[1].item)
        while len(held) >= _HELD_DOCUMENTS or characters >= _HELD_CHARACTERS:
            taken = _drawn(held, rng)
            characters -= _size(taken[1].item)
            yield taken
    while held:
        yield _drawn(held, rng)


def _drawn(held: list[tuple[int, Found]], rng: random.Random) -> tuple[int, Found]:
    index = _below(len(held), rng)
    held[index], held[-1] = held[-1], held[index]
    return held.pop()


def permute(items: list[Path], rng: random.Random) -> None:
    """Put the items into an order drawn from `rng`, in place."""
    for last in range(len(items) - 1, 0, -1):
        index = _below(last + 1, rng)
        items[index], items[last] = items[last], items[index]


def _below(n: int, rng: random.Random) -> int:
    # Python promises the same numbers in later versions for random() only (docs of `random`)
    return int(rng.random() * n)


def _size(item: Item | None) -> int:
    """How many characters or token ids a document has, about."""
    if isinstance(item, Chat):
        return sum(
            len(str(value))
            for message in item.messages
            if isinstance(message, Mapping)
            for value in message.values()
        )
    return len(item) if isinstance(item, Sized) else 0
