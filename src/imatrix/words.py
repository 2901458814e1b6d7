"""Numbers, lists and names as messages have them.

A few places have formats of their own: a page of the report groups digits ("1,024 rows"), a picture
shortens shares ("<0.01 %"), and `imatrix stats` rounds percentages as llama-imatrix does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

__all__ = ["duration", "few", "plural", "printable", "ranged", "size", "spelled"]

# What Unicode calls controls, C1 among them (Cc), formatting such as a turned direction or no width
# at all (Cf), halves of surrogate pairs (Cs), and line and paragraph ends (Zl, Zp). Letters of every
# script, blanks and marks stay.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff0-\ufffb"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e007f]"
)
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: str, keep: str = "") -> str:
    r"""Text from a file as a terminal may have it: what would act on the terminal is spelled out
    as Python would spell it.

    "\x1b" for an escape, "\u202e" for a right-to-left override, "\n" for a newline. A byte of a
    name that is not UTF-8, which Python holds as half of a surrogate pair (surrogateescape), is
    spelled as the byte: "caf\xe9.txt".

    Args:
        keep: characters that stay.
    """
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else spelled(found[0]), text)


def spelled(character: str) -> str:
    """One character as Python would spell it, see printable."""
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def plural(n: int, noun: str) -> str:
    """A number of things: "1 chunk", "2 chunks"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def few(values: Sequence[object], n: int) -> str:
    """The first n of several things, and how many more there are: "a, b, c and 2 more"."""
    more = f" and {len(values) - n} more" if len(values) > n else ""
    return ", ".join(map(str, values[:n])) + more


def ranged(values: tuple[int, int]) -> str:
    """The least and the most of something: "3-8", or "3" if they are one."""
    low, high = values
    return str(low) if low == high else f"{low}-{high}"


def duration(seconds: float) -> str:
    """Whole seconds, rounded up, as "0:07" or "2:05:09"."""
    whole = math.ceil(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    start = f"{hours}:{minutes:02d}" if hours else str(minutes)
    return f"{start}:{whole % 60:02d}"


def size(n_bytes: float) -> str:
    """Bytes in the largest unit that keeps a number above 1: "13.7 MiB"."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024 or unit == "TiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
