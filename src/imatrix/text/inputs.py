"""What a caller may give as a text, and the documents in it if it is no source."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from imatrix.files.outputs import Input
from imatrix.text.documents import Chat, Found
from imatrix.text.mixtures import Mixture
from imatrix.text.plain import BOM, decoded, not_text
from imatrix.text.sources import Source

__all__ = ["TextFile", "Texts", "TokenIds", "found_in", "text_inputs"]


@runtime_checkable
class TextFile(Protocol):
    """An open file, in text or binary mode."""

    def read(self) -> str | bytes:
        """All that is left of the file."""


TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer]"
Texts: TypeAlias = (
    "str | os.PathLike[str] | TextFile | Iterable[str | Chat] | Iterable[TokenIds] | Source "
    "| Mixture"
)


def text_inputs(texts: object) -> Iterator[Input]:
    """The files that a text is read from; none for a text that is no file.

    Args:
        texts: what Collector.run takes, or a part of it.
    """
    sources: Sequence[object] = texts.sources if isinstance(texts, Mixture) else [texts]
    for each in sources:
        if isinstance(each, Source):
            # an error here is left to the caller who reads the source, since it occurs there again
            with contextlib.suppress(OSError, ValueError):
                for path in each.files():
                    if path is None:
                        yield Input("-")
                    else:
                        own = os.fspath(path) == each.at
                        yield Input(os.fspath(path), "" if own else f"a text of {each.at}")
        elif isinstance(each, os.PathLike):
            yield Input(os.fspath(each))
        elif isinstance(name := getattr(each, "name", None), str) and hasattr(each, "read"):
            yield Input(name)


def found_in(texts: Texts) -> Iterator[Found]:
    """The items of texts that are no sources. Nothing is read before the first item is needed."""
    if isinstance(texts, str):
        return iter([Found("", texts)])
    if isinstance(texts, (bytes, bytearray, memoryview)):
        raise TypeError(f"texts is {type(texts).__name__}; decode it first, with .decode('utf-8')")
    if isinstance(texts, os.PathLike):
        return _path_text(texts)
    if isinstance(texts, TextFile):
        return _file_text(texts)
    if isinstance(texts, Iterable) and not isinstance(texts, Mapping):
        return _items(texts)
    raise TypeError(
        "texts must be a str, a path, an open file, or an iterable of str or of token lists, not "
        f"{type(texts).__name__}"
    )


# These two are generators so that nothing is read before the first item is needed.
def _path_text(path: os.PathLike[str]) -> Iterator[Found]:
    yield Found(os.fspath(path), _text_of(Path(path).read_bytes(), os.fspath(path)))


def _file_text(file: TextFile) -> Iterator[Found]:
    name = str(getattr(file, "name", "the file"))
    try:
        content = file.read()
    except UnicodeDecodeError as error:
        raise not_text(name, error) from error
    yield Found(name, _text_of(content, name))


def _text_of(content: str | bytes, name: str) -> str:
    if isinstance(content, bytes):
        content = decoded(content, name)
    elif not isinstance(content, str):
        raise TypeError(f"{name}: read() gave {type(content).__name__}, expected str or bytes")
    return content.removeprefix(BOM).removesuffix("\n")


def _items(texts: Iterable[object]) -> Iterator[Found]:
    """The items of an iterable. All are str (or chats) or all are token lists, as the first is."""
    of_text: bool | None = None
    for index, item in enumerate(texts):
        where = f"texts[{index}]"
        is_text = isinstance(item, (str, Chat))
        of_text = is_text if of_text is None else of_text
        if item is None:  # from a source None is a null text, here it is a mistake
            message = f"{where} is NoneType, expected a str or a list of token ids"
            yield Found(where, error=TypeError(message))
        elif is_text == of_text:
            yield Found(where, item)  # type: ignore[arg-type]  # Reading checks it
        elif of_text:
            message = (
                f"{where} is {type(item).__name__}, the items before it are str; give all str or "
                "all token lists"
            )
            yield Found(where, error=TypeError(message))
        else:
            message = (
                f"{where} is str, the items before it are token lists; give all str or all token "
                "lists"
            )
            yield Found(where, error=TypeError(message))
