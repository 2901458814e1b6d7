"""The files of a multi-part model, by the names that tools/gguf-split/gguf-split.cpp gives them.

The engine finds the parts by name too (llama_split_path in src/llama-model-loader.cpp). Nothing
in a file names another one: the names come from that of the first part, in its folder.

Both parsers of headers (imatrix.model.header) read a model through read_parts, which holds the
parts against one another.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from imatrix.errors import ModelError
from imatrix.files.outputs import Input, PathLike

__all__ = [
    "PartHeader",
    "count_in_name",
    "model_inputs",
    "named_parts",
    "part_path",
    "present_parts",
    "read_parts",
    "without_part",
]

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.ASCII)


class PartHeader(Protocol):
    """What the header of one file says about its model, whichever parser has read it.

    Attributes:
        path: the file.
        architecture: general.architecture; "" if it is missing, as in every part but the first.
        integers: the architecture's own whole-number keys, without its name in front.
        split_count: split.count, 0 or 1 for a model in one file.
        split_no: split.no, which part this is, from 0; -1 if it is missing.
        split_tensors: split.tensors.count, of all parts together; -1 if it is missing.
        shapes: shape by tensor name, ggml order: the row length first.
    """

    @property
    def path(self) -> Path: ...
    @property
    def architecture(self) -> str: ...
    @property
    def integers(self) -> Mapping[str, int]: ...
    @property
    def split_count(self) -> int: ...
    @property
    def split_no(self) -> int: ...
    @property
    def split_tensors(self) -> int: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...


_Part = TypeVar("_Part", bound=PartHeader)


def read_parts(path: Path, parse: Callable[[Path], _Part]) -> list[_Part]:
    """Read the headers of a model's files, the first part first.

    Args:
        path: the model's file, or its first part.
        parse: reads one file.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        ModelError: a part is missing or is one of another model, or a tensor lies in two parts;
            or as `parse` raises it.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a GGUF model file", str(path))
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such model file", str(path))
    first = parse(path)
    count = first.split_count
    parts = [first, *map(parse, _other_parts(path, count))]
    names: set[str] = set()
    for number, part in enumerate(parts):
        if count > 1:
            _check_part(part, number, count)
        if twice := names & part.shapes.keys():
            raise ModelError(f"{part.path}: the tensor {min(twice)} is in an earlier part too")
        names |= part.shapes.keys()
    if count > 1 and 0 <= first.split_tensors != len(names):
        raise ModelError(
            f"{path}: its parts have {len(names)} tensors, {first.split_tensors} expected "
            "(split.tensors.count); is one of them from another model?"
        )
    return parts


def model_inputs(*paths: PathLike | None) -> Iterator[Input]:
    """Give models and those of their parts that are there; None is passed over."""
    for path in paths:
        if path is None:
            continue
        name = os.fspath(path)
        yield Input(name)
        for part in present_parts(Path(name)):
            yield Input(os.fspath(part), f"part of the model {name}")


def _other_parts(first: Path, count: int) -> Iterator[Path]:
    """The parts after the first, in order.

    Args:
        first: the file that was given.
        count: its split.count; 0 or 1 for a model in one file.

    Raises:
        ModelError: the file is not the first of so many by its name, or a part is missing.
    """
    if count <= 1:
        return
    match = _PART.search(first.name)
    if match is None or int(match[2]) != count:
        raise ModelError(
            f"{first}: part of a model in {count} parts, but not named "
            f"…-00001-of-{count:05d}.gguf; give the first part under its original name"
        )
    if int(match[1]) != 1:
        raise ModelError(f"{first}: part {int(match[1])} of {count}; give the first part")
    stem = os.fspath(first)[: -len(match[0])]
    for number in range(2, count + 1):
        part = part_path(stem, number, count)
        if not part.is_file():
            raise ModelError(f"{part} is missing: {first.name} is the first of {count} parts")
        yield part


def present_parts(path: Path) -> list[Path]:
    """Find the parts beside a part by their names, itself included; [] if it is no part."""
    match = _PART.search(path.name)
    if match is None:
        return []
    stem = path.name[: match.start()]
    like = re.compile(re.escape(stem) + rf"-\d{{5}}-of-{match[2]}\.gguf", re.ASCII)
    try:
        return sorted(each for each in path.parent.iterdir() if like.fullmatch(each.name))
    except OSError:
        return []


def _check_part(part: PartHeader, number: int, count: int) -> None:
    """Refuse a file that says of itself that it is another part, or of another model.

    Args:
        number, count: which part it is by its name, from 0, and of how many.

    Raises:
        ModelError: its split.no or split.count differs.
    """
    if part.split_no != number or part.split_count != count:
        raise ModelError(
            f"{part.path}: by its name it is part {number + 1} of {count}, by its metadata part "
            f"{part.split_no + 1} of {part.split_count} (split.no, split.count); the parts are "
            "mixed up"
        )


def part_path(stem: str, number: int, count: int) -> Path:
    """The path of a part, from 1, of so many (llama_split_path in src/llama-model-loader.cpp)."""
    return Path(f"{stem}-{number:05d}-of-{count:05d}.gguf")


def named_parts(dst: PathLike, count: int) -> list[Path]:
    """The parts of a model that is written as `dst`, by the names that llama-quantize gives them.

    Raises:
        ValueError: `dst` is the name of a part.
    """
    whole = Path(without_part(os.fspath(dst)))
    if os.fspath(whole) != os.fspath(dst):
        raise ValueError(
            f"keep_split makes the names of the parts: expected a name such as {whole}, got the "
            f"name of a part, {os.fspath(dst)}"
        )
    stem = os.fspath(dst).removesuffix(".gguf")
    return [part_path(stem, number, count) for number in range(1, count + 1)]


def count_in_name(path: PathLike) -> int:
    """How many parts a model has by the name of its first part; 1 for any other name."""
    match = _PART.search(os.fspath(path))
    return 1 if match is None else max(1, int(match[2]))


def without_part(name: str) -> str:
    """Take the part's number out of a file name."""
    return _PART.sub(".gguf", name)
