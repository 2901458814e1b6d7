"""The files of a multi-part model, by the names that tools/gguf-split/gguf-split.cpp gives them.

The engine finds the parts by name too (llama_split_path in src/llama-model-loader.cpp). Nothing
in a file names another one: the names come from that of the first part, in its folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from imatrix.errors import ModelError
from imatrix.files.outputs import Input, PathLike

__all__ = [
    "check_part",
    "check_tensor_count",
    "model_inputs",
    "other_parts",
    "present_parts",
    "without_part",
]

# --- what there is to read ---------------------------------------------------


def model_inputs(*paths: PathLike | None) -> Iterator[Input]:
    """Models with all their parts, those that are there; None is passed over."""
    for path in paths:
        if path is None:
            continue
        name = os.fspath(path)
        yield Input(name)
        for part in present_parts(Path(name)):
            yield Input(os.fspath(part), f"part of the model {name}")


_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.ASCII)


def other_parts(first: Path, count: int) -> Iterator[Path]:
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
    stem = first.name[: match.start()]
    for number in range(2, count + 1):
        part = first.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise ModelError(f"{part} is missing: {first.name} is the first of {count} parts")
        yield part


def present_parts(path: Path) -> list[Path]:
    """All parts that lie beside a part, by their names, itself included; none of other files."""
    match = _PART.search(path.name)
    if match is None:
        return []
    stem = path.name[: match.start()]
    like = re.compile(re.escape(stem) + rf"-\d{{5}}-of-{match[2]}\.gguf", re.ASCII)
    try:
        return sorted(each for each in path.parent.iterdir() if like.fullmatch(each.name))
    except OSError:
        return []


def check_part(part: Path, number: int, count: int, said_number: int, said_count: int) -> None:
    """Refuse a file that says of itself that it is another part, or of another model.

    Args:
        number, count: which part it is by its name, from 0, and of how many.
        said_number, said_count: its split.no and split.count.

    Raises:
        ModelError: they differ.
    """
    if said_number != number or said_count != count:
        raise ModelError(
            f"{part}: by its name it is part {number + 1} of {count}, by its metadata part "
            f"{said_number + 1} of {said_count} (split.no, split.count); the parts are mixed up"
        )


def check_tensor_count(first: Path, found: int, expected: int) -> None:
    """Refuse parts that do not make up the model.

    Args:
        found: tensors of all parts together.
        expected: split.tensors.count of the first, negative where it says nothing.

    Raises:
        ModelError: they differ.
    """
    if 0 <= expected != found:
        raise ModelError(
            f"{first}: its parts have {found} tensors, {expected} expected (split.tensors.count); "
            "is one of them from another model?"
        )


def without_part(name: str) -> str:
    """A file name without the part's number."""
    return _PART.sub(".gguf", name)
