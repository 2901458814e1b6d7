"""Names as a file holds them: bytes, UTF-8 for the most part.

A path may be any bytes, and llama-imatrix writes it into its file as it is. Python holds the bytes
that are not UTF-8 as halves of surrogate pairs (surrogateescape), which only this can write.
"""

from __future__ import annotations

import re

__all__ = ["cut", "decoded", "encoded"]

_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


def encoded(name: str) -> bytes:
    """The bytes of a name. Half of a surrogate pair that stands for no byte becomes U+FFFD."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return _NO_BYTE.sub("\N{REPLACEMENT CHARACTER}", name).encode("utf-8", "surrogateescape")


def decoded(raw: bytes) -> str:
    """The name in some bytes."""
    return raw.decode("utf-8", "surrogateescape")


def cut(name: str, most: int) -> str:
    """As much of the name as fits into so many bytes, whole characters."""
    name = decoded(encoded(name))
    size = 0
    for at, character in enumerate(name):
        size += len(encoded(character))
        if size > most:
            return name[:at]
    return name
