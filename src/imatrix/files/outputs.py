"""Outputs held against inputs, before anything is written: nothing that is read may be replaced."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from imatrix.files import atomic

__all__ = ["Input", "Output", "check_files"]

PathLike = str | os.PathLike[str]

_HUB_FOLDER = re.compile(r"(?:models|datasets|spaces)--.+")


@dataclass(frozen=True)
class Input:
    """A file that is read.

    Attributes:
        path: where it is; "-" for standard input.
        of: what it is a part of, "" for nothing: "part of the model a-00001-of-00002.gguf".
    """

    path: str
    of: str = ""

    def __str__(self) -> str:
        name = "standard input" if self.path == "-" else self.path
        return f"{name} ({self.of})" if self.of else name


@dataclass(frozen=True)
class Output:
    """A file that is written.

    Attributes:
        path: where it will be.
        of: the output that was asked for, if this one's name is made from it; "" otherwise.
        replaces: inputs that it may replace, by their paths.
    """

    path: str
    of: str = ""
    replaces: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path} (for the output {self.of})" if self.of else self.path


def check_files(outputs: Iterable[Output | PathLike], inputs: Iterable[Input | PathLike]) -> None:
    """Refuse outputs that are an input, and two outputs that are one file.

    Names are not enough: links, and names that differ in case only, may lead to one file.

    Raises:
        ValueError: one would replace an input, two are one file, or one leads into the Hub's cache.
    """
    wanted = [each if isinstance(each, Output) else Output(os.fspath(each)) for each in outputs]
    given = [each if isinstance(each, Input) else Input(os.fspath(each)) for each in inputs]
    found = [(each, each.path, _stat(each.path)) for each in wanted]
    for number, (output, path, status) in enumerate(found):
        _check_cache(output)
        for other, other_path, other_status in found[:number]:
            if _place(path) == _place(other_path) or _same(status, other_status):
                raise ValueError(f"the outputs {other} and {output} are one file; name two")
    there = {
        (status.st_dev, status.st_ino): output for output, _, status in found if status is not None
    }
    # A run removes what an earlier one left of atomic.replacing, so an input must not be that.
    leftovers = [(output, atomic.leftovers_of(output.path)) for output in wanted]
    for each in given:
        status = _stat(each.path)
        if status is None:
            continue  # reading it will say that it is missing
        real = os.path.realpath(each.path)
        hit = there.get((status.st_dev, status.st_ino)) or next(
            (one for one, pattern in leftovers if pattern.fullmatch(real)), None
        )
        if hit is not None and each.path not in hit.replaces:
            raise ValueError(f"the output {hit} would replace the input {each}{_why(hit, each)}")


def _why(output: Output, given: Input) -> str:
    if Path(output.path).absolute() == Path(given.path).absolute():
        return "; name another file"
    return ": both names are of one file; name another"


def _stat(path: str) -> os.stat_result | None:
    """The status by which a file is known, whatever its name; None if there is no such file, or if
    standard input is closed."""
    try:
        if path == "-":
            return os.fstat(sys.stdin.fileno())
        return Path(path).stat()
    except (OSError, ValueError):
        return None


def _same(one: os.stat_result | None, other: os.stat_result | None) -> bool:
    return one is not None and other is not None and os.path.samestat(one, other)


def _place(path: str) -> str:
    """Where a file is or would be, such that two paths of one place are equal."""
    place = os.path.normcase(os.path.realpath(path))
    return place.casefold() if sys.platform == "darwin" else place


def _check_cache(output: Output) -> None:
    """Refuse a link into the Hub's cache: a file there is named by its content, and links of other
    revisions lead to it too."""
    real = Path(os.path.realpath(output.path))
    if real.parent.name == "blobs" and _HUB_FOLDER.fullmatch(real.parent.parent.name):
        raise ValueError(
            f"the output {output} is {real}, a file of the Hub's cache, which is named by its "
            "content; name another file"
        )
