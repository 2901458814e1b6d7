"""A figure as SVG or PNG, in a file or not."""

from __future__ import annotations

import io
import os
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from imatrix.files import atomic
from imatrix.pictures.page import drawing
from imatrix.pictures.texts import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DPI", "FORMATS", "png", "save", "svg"]

DPI = 144
"""Pixels an inch of a PNG, if nothing else is asked for."""

FORMATS = (".png", ".svg")
"""What the name of a picture may end in."""


def svg(figure: Figure, *, prefix: str = "", background: bool = True) -> str:
    """An `<svg>` element, to be put into a page as it is.

    It has a `<title>` and a `viewBox`; its width and height are points, and a page may set others.
    The same figure gives the same text.

    Args:
        prefix: put in front of all its ids. Give each picture of a page another one, for ids must
            be unique there.
        background: False for a transparent one.

    Raises:
        ValueError: the prefix is not made of letters, digits, "-" and "_", a letter first.
    """
    if prefix and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", prefix):
        raise ValueError(
            f"prefix must be letters, digits, '-' and '_', a letter first, got {prefix!r}"
        )
    out = io.BytesIO()
    with drawing():
        figure.savefig(
            out,
            format="svg",
            facecolor="auto" if background else "none",
            # matplotlib's defaults: the time and its version among them
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = out.getvalue().decode("utf-8")
    text = text[text.index("<svg") :].rstrip("\n")
    # a <style> inside a page is for all of the page
    text = re.sub(r"\s*<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", text, count=1)
    root, rest = text.split(">", 1)
    root += ' role="img" style="stroke-linejoin: round; stroke-linecap: butt"'
    # A hundredth of a point is enough; it takes a third of the bytes away.
    rest = re.sub(r'(?<=\sd=")[^"]*', lambda path: _TOO_FINE.sub("", path[0]), rest)
    text = f"{root}>\n <title>{escape(clean(str(figure.get_label())))}</title>{rest}"
    # Only inside tags: matplotlib escapes < and > everywhere else.
    return re.sub(r"<[^<>]*>", lambda tag: _prefixed(tag[0], prefix), text) if prefix else text


_TOO_FINE = re.compile(r"(?<=\.\d\d)\d+")


def _prefixed(tag: str, prefix: str) -> str:
    tag = re.sub(r'(\sid=")', rf"\g<1>{prefix}-", tag)
    tag = re.sub(r'(href="#)', rf"\g<1>{prefix}-", tag)
    return re.sub(r"(url\(#)", rf"\g<1>{prefix}-", tag)


def png(figure: Figure, *, dpi: float = DPI) -> bytes:
    """A PNG file's bytes; the same figure gives the same bytes.

    Args:
        dpi: pixels an inch.
    """
    out = io.BytesIO()
    with drawing():
        figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: float = DPI) -> None:
    """Write a file, PNG or SVG as its name ends, replacing one there in one step.

    Args:
        dpi: pixels an inch of a PNG.

    Raises:
        ValueError: the name ends in something else.
        OSError: it cannot be written.
    """
    form = Path(path).suffix.lower()
    if form not in FORMATS:
        raise ValueError(
            f"cannot write {os.fspath(path)!r}: a picture's name ends in {' or '.join(FORMATS)}"
        )
    if form == ".png":
        data = png(figure, dpi=dpi)
    else:
        data = f'<?xml version="1.0" encoding="utf-8"?>\n{svg(figure)}\n'.encode()
    with atomic.replacing(path) as temporary:
        temporary.write_bytes(data)
