"""The fields of a recipe's file, read strictly: each is there, and of its kind."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from imatrix.formats import FormatError

__all__ = ["Fields"]

_MOST = 2**53  # what every reader of JSON holds exactly


@dataclass(frozen=True)
class Fields:
    """An object of a JSON file.

    Attributes:
        path: the file, for messages.
        data: the object.
        place: what stands before the name of a field in messages.

    Raises (from its methods):
        FormatError: a field is missing, or of another kind.
    """

    path: str
    data: Mapping[str, Any]
    place: str = ""

    @classmethod
    def of_file(cls, path: str | os.PathLike[str], format_: str, version: int) -> Fields:
        """Read a file.

        Args:
            path: the file.
            format_: what its "format" must be.
            version: what its "version" must be.

        Raises:
            FormatError: it is none.
            OSError: it cannot be read.
        """
        where = os.fspath(path)
        data = _parsed(where, Path(path).read_bytes())
        if not isinstance(data, dict) or data.get("format") != format_:
            raise FormatError(
                where,
                f'this is no recipe: it lacks "format": "{format_}"; `imatrix recipe` writes one',
            )
        found = data.get("version")
        if found != version:
            raise FormatError(
                where,
                f"a recipe of version {json.dumps(found)}; this imatrix reads version {version}. Use "
                "the imatrix that made it, or make it again with this one",
            )
        return cls(where, data)

    def text(self, name: str) -> str:
        """A text."""
        value = self._get(name)
        return value if isinstance(value, str) else self._refuse(name, "a text", value)

    def whole(self, name: str) -> int:
        """A whole number, 0 or more."""
        value = self._get(name)
        return value if _is_whole(value) else self._refuse(name, "a whole number", value)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._get(name)
        return float(value) if _is_number(value) else self._refuse(name, "a number", value)

    def number_or_none(self, name: str) -> float | None:
        """A finite number, or null."""
        return None if self._get(name) is None else self.number(name)

    def number_or_nan(self, name: str) -> float:
        """A finite number, or null for NaN."""
        return math.nan if self._get(name) is None else self.number(name)

    def wholes(self, name: str) -> list[int]:
        """A list of whole numbers."""
        value = self._get(name)
        if isinstance(value, list) and all(map(_is_whole, value)):
            return value
        return self._refuse(name, "a list of whole numbers", value)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object."""
        value = self._get(name)
        return value if isinstance(value, dict) else self._refuse(name, "an object", value)

    def texts(self, name: str) -> dict[str, str]:
        """An object of texts."""
        for key, value in self.mapping(name).items():
            if not isinstance(value, str):
                self._refuse(f"{name}.{key}", "a text", value)
        return self.mapping(name)

    def inside(self, name: str) -> Fields | None:
        """An object with fields of its own; None for null."""
        if self._get(name) is None:
            return None
        return Fields(self.path, self.mapping(name), f"{self.place}{name}.")

    def tensor(self, name: str, value: Any) -> tuple[str, tuple[int, ...]]:
        """Type and shape of an item of "source"."""
        if (
            isinstance(value, list)
            and len(value) == 2
            and isinstance(value[0], str)
            and isinstance(value[1], list)
            and value[1]
            and all(_is_whole(length) and length > 0 for length in value[1])
        ):
            return value[0], tuple(value[1])
        return self._refuse(f"source.{name}", "a type and a shape", value)

    def _get(self, name: str) -> Any:
        if name not in self.data:
            raise FormatError(
                self.path, f'the recipe is damaged: "{self.place}{name}" is missing; make it again'
            )
        return self.data[name]

    def _refuse(self, name: str, wanted: str, value: object) -> NoReturn:
        shown = json.dumps(value)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        raise FormatError(
            self.path,
            f'the recipe is damaged: "{self.place}{name}" is {shown}, expected {wanted}; make it '
            "again",
        )


def _parsed(path: str, content: bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise FormatError(path, f"the recipe is damaged: {json.dumps(twice)} is there twice")
        return found

    try:
        return json.loads(content, object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(
            path, f"this is no recipe: not JSON ({error}); `imatrix recipe` writes one"
        ) from None


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e300  # not so for NaN
    )
