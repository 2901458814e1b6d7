"""From the template to HTML: what a value may hold, and how it is written."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from imatrix.words import size, spelled

__all__ = ["FOLDER", "content_hash", "make_environment", "plain"]

_DASH = "\N{EN DASH}"
FOLDER = Path(__file__).parent / "templates"


# What HTML forbids (controls, halves of surrogate pairs, noncharacters), and what would turn the
# direction of the text that follows, so that a name could pass for another.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufeff"
    + "".join(
        f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000)
    )
    + "]"
)


def plain(value: object) -> object:
    """Text with what a page must not hold, or what would turn its direction, spelled out.

    "\\x1b" for an escape, "\\u202e" for a right-to-left override; other text, right-to-left
    letters included, and what is no text, stays as it is.
    """
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNPRINTABLE.sub(lambda found: spelled(found[0]), value)
    return value


def _one_line(value: str) -> str:
    """A name in one line."""
    return value.replace("\n", "\\n").replace("\t", "\\t")


def _breaking(value: str) -> Markup:
    """A name in one line, which may break where its parts begin."""
    return Markup(re.sub(r"(?<=[._/-])(?=[^._/-])", "<wbr>", escape(plain(_one_line(value)))))


def _number(value: float | None) -> str:
    """Four digits; a dash for a value that is not there."""
    if value is None or math.isnan(value):
        return _DASH
    return f"{value:.4g}"


def _percent(value: float | None) -> str:
    """A share in percent; a dash for what is not there."""
    if value is None or math.isnan(value):
        return _DASH
    return f"{100 * value:.1f} %"


def _whole(value: float | None) -> str:
    return _DASH if value is None else f"{value:,.0f}"


def _ranged(values: tuple[int, int]) -> str:
    """As imatrix.words.ranged, with digits in groups and a real dash."""
    low, high = values
    return f"{low:,}" if low == high else f"{low:,}{_DASH}{high:,}"


def make_environment() -> Environment:
    """Jinja's, which escapes every value, refuses a name that is not there, and has our filters."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        finalize=plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        breaking=_breaking,
        bytes=size,
        number=_number,
        one_line=_one_line,
        percent=_percent,
        ranged=_ranged,
        whole=_whole,
    )
    return environment


def content_hash(text: str) -> str:
    """The hash of a script or style for the page's policy: the browser takes no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
