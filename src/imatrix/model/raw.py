"""Any GGUF file as the bytes that it is: read without decoding it, copied without rewriting it.

gguf-py's reader decodes every word of a vocabulary, its writer rewrites every key, and neither
streams. Here what does not change is copied as it lies in the file. Tensors are copied in blocks
of a few MB, so that memory follows the header's size, and types that no library here knows come
through. Nothing is taken on trust: every length is compared with the bytes that are there before
it is used.

What the header means (parts, trunk, head) is not decided here: see imatrix.model.header.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from imatrix.errors import ModelError
from imatrix.files.names import decoded, encoded
from imatrix.tensors import block_of

__all__ = ["STRING", "Files", "Meter", "Part", "Progress", "Tensor", "Value", "write"]

Progress = Callable[[int, int], None]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # one layout; the engine refuses version 1 (ggml/src/gguf.cpp)
_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT in gguf.h, where general.alignment is absent
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NAME = (
    65535  # of a key, in the format's description (docs/gguf.md in ggml); a tensor's is less
)
_BUFFER = 4 << 20

STRING, _ARRAY = 8, 9
# gguf_type in gguf.h
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)


class _DamagedError(Exception):
    """The bytes are no GGUF; the message says why, without the file's name."""


@dataclass(frozen=True)
class Value:
    """A metadata value as it lies in the file.

    Attributes:
        kind: type of the value, or of an array's elements (gguf_type in gguf.h).
        is_array: whether it is an array.
        count: elements of the array, else 1.
        raw: the bytes that follow the key: type, an array's count, and the value.
    """

    kind: int
    is_array: bool
    count: int
    raw: bytes

    @property
    def _data(self) -> bytes:
        return self.raw[16:] if self.is_array else self.raw[4:]

    def decoded(self) -> Any:
        """Decode it: a number, a bool, a str, or a list of numbers; an array of strings as bytes."""
        if self.kind == STRING:
            return self._data if self.is_array else self._data[8:].decode("utf-8", "replace")
        values = list(struct.unpack(f"<{self.count}{_SCALARS[self.kind]}", self._data))
        return values if self.is_array else values[0]

    def with_scalar(self, value: int) -> Value:
        """Another number, of the same type."""
        raw = struct.pack(f"<I{_SCALARS[self.kind]}", self.kind, value)
        return Value(self.kind, False, 1, raw)

    def first(self, count: int) -> Value:
        """The array's first entries."""
        size = struct.calcsize(f"<{_SCALARS[self.kind]}")
        return self._array(count, self._data[: count * size])

    def extended(self, value: Any, count: int) -> Value:
        """The array and ``count`` times ``value`` after it."""
        more = struct.pack(f"<{count}{_SCALARS[self.kind]}", *[value] * count)
        return self._array(self.count + count, self._data + more)

    def _array(self, count: int, data: bytes) -> Value:
        return Value(self.kind, True, count, struct.pack("<IIQ", _ARRAY, self.kind, count) + data)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        name: its name.
        shape: in ggml order, the row length first.
        kind: ggml_type.
        size: bytes, without padding.
        path, start: the file, and the byte in it where the data start.
        granule: the size may be too large by less than this; 1 if it is exact.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    size: int
    path: Path
    start: int
    granule: int

    @property
    def block(self) -> int | None:
        """The number in `blk.<number>.`; None for a tensor outside the blocks."""
        return block_of(self.name)


class _Cursor:
    """Reads forward through a file's bytes, and never past their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def skip(self, count: int, what: str) -> int:
        """Step over ``count`` bytes, and return where they start."""
        start, end = self.at, self.at + count
        if end > len(self.data):
            raise _DamagedError(
                f"cut short or damaged: {what} would end at byte {end}, the file has "
                f"{len(self.data)}"
            )
        self.at = end
        return start

    def u32(self, what: str) -> int:
        return int(struct.unpack_from("<I", self.data, self.skip(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack_from("<Q", self.data, self.skip(8, what))[0])

    def text(self, what: str) -> str:
        size = self.u64(what)
        start = self.skip(size, what)
        if size > _MAX_NAME:
            raise _DamagedError(f"damaged: {what} is {size} bytes long")
        return decoded(self.data[start : start + size])

    def value(self, key: str) -> Value:
        start = self.at
        kind = self.u32(key)
        is_array, count = kind == _ARRAY, 1
        if is_array:
            kind = self.u32(key)
            count = self.u64(key)
        if kind == STRING:
            for _ in range(count):
                self.skip(self.u64(key), key)
        elif kind in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"), key)
        else:
            raise _DamagedError(f"damaged: the key {key!r} has the unknown type {kind}")
        return Value(kind, is_array, count, self.data[start : self.at])


@dataclass(frozen=True)
class Part:
    """One GGUF file. A parts.PartHeader.

    Attributes:
        path: the file.
        version: of the format, 2 or 3.
        alignment: general.alignment.
        keys: metadata by key, in the file's order.
        tensors: tensors by name, in the file's order.
        file_bytes: size of the file.
        architecture, integers, split_count, split_no, split_tensors: see parts.PartHeader.
    """

    path: Path
    version: int
    alignment: int
    keys: Mapping[str, Value]
    tensors: Mapping[str, Tensor]
    file_bytes: int
    architecture: str
    integers: Mapping[str, int]
    split_count: int
    split_no: int
    split_tensors: int

    @classmethod
    def read(cls, path: Path) -> Part:
        """Read the header of one file.

        Raises:
            ModelError: not GGUF, or damaged.
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != _MAGIC:
                start = f"it starts with {magic!r}" if magic else "it is empty"
                raise ModelError(f"{path}: not a GGUF file: {start}, expected {_MAGIC!r}")
            try:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return cls._parsed(path, _Cursor(data))
            except _DamagedError as error:
                raise ModelError(f"{path}: {error}") from None

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by tensor name, ggml order."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @classmethod
    def _parsed(cls, path: Path, cursor: _Cursor) -> Part:
        cursor.skip(4, "the magic")
        version = cursor.u32("the version")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                raise _DamagedError("big-endian GGUF, which is not supported")
            raise _DamagedError(f"GGUF version {version}; 2 and 3 are supported")
        n_tensors, n_keys = cursor.u64("the tensor count"), cursor.u64("the key count")
        keys: dict[str, Value] = {}
        for i in range(n_keys):
            key = cursor.text(f"the name of key {i}")
            if key in keys:
                raise _DamagedError(f"damaged: the key {key!r} is there twice")
            keys[key] = cursor.value(key)
        alignment = _integer(keys, "general.alignment", _ALIGNMENT)
        if alignment < 1 or alignment & (alignment - 1):
            raise _DamagedError(f"general.alignment is {alignment}, no power of two")
        infos = [cls._tensor_info(cursor, i) for i in range(n_tensors)]
        data = _padded(cursor.at, alignment)
        tensors: dict[str, Tensor] = {}
        for tensor in _placed(path, infos, data, len(cursor.data), alignment):
            if tensor.name in tensors:
                raise _DamagedError(f"damaged: the tensor {tensor.name} is there twice")
            tensors[tensor.name] = tensor
        named = keys.get("general.architecture")
        is_name = named is not None and named.kind == STRING and not named.is_array
        architecture = named.decoded() if named is not None and is_name else ""
        return cls(
            path=path,
            version=version,
            alignment=alignment,
            keys=keys,
            tensors=tensors,
            file_bytes=len(cursor.data),
            architecture=architecture,
            integers=_integers(keys, f"{architecture}."),
            split_count=_integer(keys, "split.count", 0),
            split_no=_integer(keys, "split.no", -1),
            split_tensors=_integer(keys, "split.tensors.count", -1),
        )

    @staticmethod
    def _tensor_info(cursor: _Cursor, i: int) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.text(f"the name of tensor {i}")
        n_dims = cursor.u32(name)
        if n_dims > _MAX_DIMS:
            raise _DamagedError(f"damaged: the tensor {name!r} has {n_dims} dimensions")
        shape = tuple(cursor.u64(name) for _ in range(n_dims))
        return name, shape, cursor.u32(name), cursor.u64(name)


def _placed(
    path: Path,
    infos: list[tuple[str, tuple[int, ...], int, int]],
    data: int,
    file_bytes: int,
    alignment: int,
) -> list[Tensor]:
    """Give tensors with their sizes, which the file does not tell: they follow from the types."""
    ends = sorted({data + offset for *_, offset in infos} | {file_bytes})
    following = dict(itertools.pairwise(ends))
    tensors = []
    for name, shape, kind, offset in infos:
        start = data + offset
        if start > file_bytes:
            raise _DamagedError(f"cut short: {name} starts at byte {start}, it has {file_bytes}")
        # A type that gguf-py does not know (a fork's, a newer one) reaches to the next tensor.
        # The padding that may come along does no harm, since the output pads alike.
        size = following.get(start, file_bytes) - start
        if (known := _size(shape, kind)) is not None:
            if start + known > file_bytes:
                raise _DamagedError(
                    f"cut short: {name} ends at byte {start + known}, the file has {file_bytes}"
                )
            if known > size:
                raise _DamagedError(f"damaged: the data of {name} overlap another tensor's")
            size = known
        granule = alignment if known is None else 1
        tensors.append(Tensor(name, shape, kind, size, path, start, granule))
    return tensors


def _size(shape: tuple[int, ...], kind: int) -> int | None:
    """Bytes of a tensor; None if the type is unknown."""
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return None
    count = 1
    for length in shape:
        count *= length
    return count // block * block_bytes


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _integers(keys: Mapping[str, Value], prefix: str) -> dict[str, int]:
    """The whole-number keys under a prefix, without it."""
    for field in ("block_count", "nextn_predict_layers"):
        _integer(keys, prefix + field, 0)  # nothing can be decided without these
    return {
        key.removeprefix(prefix): int(value.decoded())
        for key, value in keys.items()
        if key.startswith(prefix) and _is_integer(value)
    }


def _integer(keys: Mapping[str, Value], key: str, default: int) -> int:
    value = keys.get(key)
    if value is None:
        return default
    if not _is_integer(value):
        raise _DamagedError(f"{key} is not an integer")
    return int(value.decoded())


def _is_integer(value: Value) -> bool:
    return not value.is_array and value.kind in _INTEGERS


# --- writing -------------------------------------------------------------------------------------


class Meter:
    """Counts written bytes and reports them.

    Args:
        progress: called with the bytes written so far and the bytes to write; None for nobody.
        total: bytes to write.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        """Count bytes that were written."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


class Files(ExitStack):
    """The inputs of a work: each is opened once, and read in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[Path, FileIO] = {}

    def blocks(self, tensor: Tensor) -> Iterator[memoryview]:
        """Read the tensor's bytes in equal blocks and a rest; each overwrites the one before."""
        if tensor.path not in self._open:
            # Unbuffered: a block goes into our buffer without a copy in between.
            self._open[tensor.path] = self.enter_context(tensor.path.open("rb", buffering=0))
        file = self._open[tensor.path]
        buffer = memoryview(bytearray(min(_BUFFER, tensor.size)))
        for done in range(0, tensor.size, _BUFFER):
            block = buffer[: tensor.size - done]
            file.seek(tensor.start + done)
            filled = 0
            while filled < len(block):
                got = file.readinto(block[filled:])
                if not got:
                    raise OSError(errno.EIO, f"it ended inside {tensor.name}", str(tensor.path))
                filled += got
            yield block

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors are alike in type and bytes."""
        if (one.kind, one.size) != (other.kind, other.size):
            return False
        pairs = zip(self.blocks(one), self.blocks(other), strict=True)
        # bytearray, since two views are compared an item at a time
        return all(bytearray(ours) == theirs for ours, theirs in pairs)


def write(
    path: Path,
    version: int,
    alignment: int,
    keys: Mapping[str, Value],
    tensors: list[Tensor],
    meter: Meter,
) -> int:
    """Write a GGUF file of these keys and tensors, in their order, and return its size in bytes.

    Args:
        path: a file there is replaced.
        version, alignment: the output's, for its head and its general.alignment.
        meter: told of every block written.

    Raises:
        ModelError: a tensor of unknown size and the output's alignment do not go together.
        OSError: reading or writing failed.
    """
    with path.open("wb") as file, Files() as files:
        file.write(_MAGIC + struct.pack("<IQQ", version, len(tensors), len(keys)))
        for key, value in keys.items():
            file.write(_text(key) + value.raw)
        offset = 0
        for tensor in tensors:
            if tensor.granule > alignment:
                raise ModelError(
                    f"{tensor.path}: the size of {tensor.name} is not known (ggml type "
                    f"{tensor.kind}), and its file is aligned to {tensor.granule} bytes, the output "
                    f"to {alignment}; give files of the same general.alignment"
                )
            dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            file.write(_text(tensor.name) + dims + struct.pack("<IQ", tensor.kind, offset))
            offset += _padded(tensor.size, alignment)
        _pad(file, alignment)
        for tensor in tensors:
            for block in files.blocks(tensor):
                file.write(block)
                meter.add(len(block))
            _pad(file, alignment)
        return file.tell()


def _text(value: str) -> bytes:
    data = encoded(value)
    return struct.pack("<Q", len(data)) + data


def _pad(file: BinaryIO, alignment: int) -> None:
    at = file.tell()
    file.write(bytes(_padded(at, alignment) - at))
