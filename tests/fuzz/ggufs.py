"""GGUF files in pieces, so that a mutation can reach one piece and keep the rest in order.

It is independent of the readers under test: it may pack nonsense on purpose.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
# values per block and bytes per block of the types that mutations give to tensors
TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 6: (32, 22), 8: (32, 34), 10: (256, 84), 12: (256, 144),
    14: (256, 210), 16: (256, 66), 24: (1, 1), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2),
}  # fmt: skip


@dataclass
class Key:
    """A metadata value; if `value` is a list, `kind` is the type of its elements."""

    name: bytes
    kind: int
    value: Any

    def packed(self) -> bytes:
        if isinstance(self.value, list):
            head = struct.pack("<IIQ", ARRAY, self.kind, len(self.value))
            return _text(self.name) + head + b"".join(_scalar(self.kind, v) for v in self.value)
        return _text(self.name) + struct.pack("<I", self.kind) + _scalar(self.kind, self.value)


@dataclass
class Tensor:
    """`data` lies at the offset; if `offset` is None, right after the tensor before."""

    name: bytes
    dims: list[int]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass
class File:
    version: int = 3
    keys: list[Key] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    alignment: int = 32
    n_keys: int | None = None  # the header's claim, None for the truth
    n_tensors: int | None = None

    def key(self, name: bytes) -> Key | None:
        return next((key for key in self.keys if key.name == name), None)

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        out = [b"GGUF" + struct.pack("<IQQ", self.version & 0xFFFFFFFF, n_tensors, n_keys)]
        out += [key.packed() for key in self.keys]
        offset = 0
        for tensor in self.tensors:
            where = offset if tensor.offset is None else tensor.offset
            dims = b"".join(_scalar(10, d) for d in tensor.dims)
            out.append(_text(tensor.name) + struct.pack("<I", len(tensor.dims)) + dims)
            out.append(struct.pack("<I", tensor.kind & 0xFFFFFFFF) + _scalar(10, where))
            offset += _padded(len(tensor.data), self.alignment)
        return b"".join(out)

    def packed(self) -> bytes:
        head = self.header()
        if not self.tensors:
            return head
        parts = [head, bytes(_padded(len(head), self.alignment) - len(head))]
        for tensor in self.tensors:
            parts.append(tensor.data)
            parts.append(bytes(_padded(len(tensor.data), self.alignment) - len(tensor.data)))
        return b"".join(parts)


def parsed(data: bytes) -> File:
    """The pieces of a well-formed file."""
    at = 4
    version, n_tensors, n_keys = struct.unpack_from("<IQQ", data, at)
    at += 20

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def text() -> bytes:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at]

    def value(kind: int) -> Any:
        return text() if kind == STRING else take(SCALARS[kind])

    out = File(version)
    for _ in range(n_keys):
        name, kind = text(), take("I")
        if kind == ARRAY:
            kind, count = take("I"), take("Q")
            out.keys.append(Key(name, kind, [value(kind) for _ in range(count)]))
        else:
            out.keys.append(Key(name, kind, value(kind)))
    if found := out.key(b"general.alignment"):
        if not 0 < found.value <= 4096:  # a file is padded up to it
            raise ValueError(f"an alignment of {found.value}")
        out.alignment = found.value
    infos = []
    for _ in range(n_tensors):
        name = text()
        dims = [take("Q") for _ in range(take("I"))]
        infos.append((name, dims, take("I"), take("Q")))
    start = _padded(at, out.alignment)
    for name, dims, kind, offset in infos:
        size = size_of(dims, kind)
        out.tensors.append(Tensor(name, dims, kind, data[start + offset : start + offset + size]))
    return out


def size_of(dims: list[int], kind: int) -> int:
    """Bytes of a tensor; 0 if the table above lacks its type."""
    values, size = TYPES.get(kind, (1, 0))
    count = 1
    for dim in dims:
        count *= dim
    return count // values * size


def _scalar(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    code = SCALARS.get(kind, "I")
    if code in "fd":
        return struct.pack("<" + code, float(value))
    bits = 8 * struct.calcsize(code)
    return (int(value) & ((1 << bits) - 1)).to_bytes(bits // 8, "little")


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _padded(size: int, alignment: int) -> int:
    return -(-size // max(1, alignment)) * max(1, alignment)
