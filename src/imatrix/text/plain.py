"""Bytes to text, JSON to values, and texts that are repaired so that they can be encoded again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "BOM",
    "decoded",
    "not_text",
    "parsed_json",
    "read_json",
    "read_text",
    "repaired",
    "repaired_value",
]

BOM = "\ufeff"
"""Byte order mark: some editors write it at the head of a file. It is no part of the text."""

# Halves of UTF-16 pairs: JSON can spell one alone, but no encoding can write it.
_SURROGATE = re.compile("[\ud800-\udfff]")


def repaired(text: str) -> str:
    """The text with U+FFFD in place of each surrogate."""
    return _SURROGATE.sub("\ufffd", text)


def repaired_value(value: Any) -> Any:
    """A value made of mappings, lists and texts, with all its texts repaired, keys too."""
    if isinstance(value, str):
        return repaired(value)
    if isinstance(value, Mapping):
        return {repaired_value(key): repaired_value(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [repaired_value(each) for each in value]
    return value


def decoded(content: bytes, where: str) -> str:
    """Content in UTF-8 as text, without the BOM at its head.

    Raises:
        ValueError: it is not UTF-8; the message begins with `where`.
    """
    try:
        return content.decode("utf-8").removeprefix(BOM)
    except UnicodeDecodeError as error:
        raise not_text(where, error) from error


def not_text(where: str, error: UnicodeDecodeError) -> ValueError:
    """The error for content that is not the text it should be: where, which byte, what to do."""
    return ValueError(
        f"{where}: not {error.encoding} text: byte 0x{error.object[error.start]:02x} at offset "
        f"{error.start} ({error.reason}); convert the file to UTF-8"
    )


def read_text(path: str | os.PathLike[str]) -> str:
    """A UTF-8 file as text, without the BOM at its head; line ends as \\n.

    Raises:
        ValueError: it is not UTF-8; the message has the path.
        OSError: it cannot be read.
    """
    text = decoded(Path(path).read_bytes(), os.fspath(path))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parsed_json(text: str, where: str, hint: str = "", *, field: bool = False) -> Any:
    """The value that a JSON text spells.

    Args:
        text: the JSON.
        where: what to call the text in an error.
        hint: the end of the message if the text is not JSON.
        field: `where` names a field of a record, not a file or a line.

    Raises:
        ValueError: it is not JSON, or it is nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        column = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        said = "is not" if field else "not"
        joint = " " if field else ": "
        raise ValueError(f"{where}{joint}{said} JSON: {error.msg} at {column}{hint}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except ValueError as error:  # a number with more digits than Python converts
        raise ValueError(f"{where}: {error}") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a file of JSON.

    Raises:
        ValueError: it is not UTF-8, not JSON, or nested too deeply; the message has the path.
        OSError: it cannot be read.
    """
    return repaired_value(parsed_json(read_text(path), os.fspath(path)))
