"""The tensors that a quantization starts from: their types and shapes, and the bytes of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

from gguf import GGMLQuantizationType

from imatrix.files.names import encoded
from imatrix.model.header import ModelFile
from imatrix.model.parts import read_parts
from imatrix.model.raw import Part, Tensor
from imatrix.native import quantizer
from imatrix.tensors import n_values

__all__ = [
    "SourceTensor",
    "block_of_type",
    "bytes_as",
    "data_bytes",
    "described",
    "source_tensors",
    "tensors_digest",
    "type_name",
]


class SourceTensor(NamedTuple):
    """A tensor of a model's file.

    Attributes:
        type: its ggml type, in lower case.
        shape: in ggml's order, the row length first.
    """

    type: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """How many values it has."""
        return n_values(self.shape)


def source_tensors(model: ModelFile) -> dict[str, SourceTensor]:
    """Every tensor of a model by its name, in the order of its parts.

    Raises:
        ModelError: a part is damaged.
        OSError: a part cannot be read.
    """
    return described(
        tensor for part in read_parts(model.path, Part.read) for tensor in part.tensors.values()
    )


def described(tensors: Iterable[Tensor]) -> dict[str, SourceTensor]:
    """The same of tensors whose headers were read."""
    return {
        tensor.name: SourceTensor(type_name(tensor.kind), _trimmed(tensor.shape))
        for tensor in tensors
    }


def tensors_digest(source: Mapping[str, SourceTensor]) -> str:
    """SHA-256 over the names, types and shapes of all tensors, in hexadecimal.

    A line a tensor, sorted by name: the name, a tab, the type, and each length behind a space.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(source.items()):
        lengths = "".join(f" {length}" for length in tensor.shape)
        digest.update(encoded(f"{name}\t{tensor.type}{lengths}\n"))
    return digest.hexdigest()


def type_name(number: int) -> str:
    """The name of a ggml type in lower case; "type 99" if neither the engine nor gguf-py knows it."""
    found = _names().get(number)
    if found is not None:
        return found
    try:
        return GGMLQuantizationType(number).name.lower()
    except ValueError:
        return f"type {number}"


def block_of_type(type_: str) -> tuple[int, int]:
    """How many values a block of a ggml type has, and how many bytes it takes.

    Args:
        type_: a ggml type, in any case.

    Raises:
        ValueError: the engine has no such type.
    """
    found = _blocks().get(type_.lower())
    if found is None:
        raise ValueError(f"this engine has no tensor type {type_!r}")
    return found


def bytes_as(tensor: Tensor, types: Mapping[str, str]) -> int:
    """Bytes of a tensor's data with the type that `types` gives it, or its own if that has none.

    Args:
        tensor: of a model's file.
        types: tensor -> ggml type, in any case.

    Raises:
        ValueError: as data_bytes.
    """
    if tensor.name not in types:
        return tensor.size
    return data_bytes(tensor.shape, types[tensor.name])


def data_bytes(shape: tuple[int, ...], type_: str) -> int:
    """Bytes of a tensor's data, without padding.

    Args:
        shape: in ggml's order.
        type_: a ggml type, in any case.

    Raises:
        ValueError: the engine has no such type, or its blocks do not fit the rows.
    """
    block, size = block_of_type(type_)
    if shape[0] % block:
        raise ValueError(
            f"rows of {shape[0]} values are no multiple of the {block} of a block of {type_}"
        )
    return n_values(shape) // block * size


@cache
def _names() -> dict[int, str]:
    return {number: name.lower() for name, (number, _) in quantizer.tensor_types().items()}


@cache
def _blocks() -> dict[str, tuple[int, int]]:
    return {name.lower(): block for name, block in quantizer.type_blocks().items()}


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without dimensions of 1 at the end, which a file may leave out."""
    shape = shape or (1,)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
