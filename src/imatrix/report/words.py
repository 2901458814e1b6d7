"""Numbers with their nouns, as the page has them."""

from __future__ import annotations

__all__ = ["count"]


def count(n: int, noun: str, plural: str | None = None) -> str:
    """As imatrix.words.plural, with digits in groups, as the page has all of its numbers."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"
