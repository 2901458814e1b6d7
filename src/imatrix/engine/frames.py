"""Messages between a process and its child: JSON, and arrays as they are.

A message is a length (4 bytes, little endian), so many bytes of JSON, and the bytes of the arrays
that its "arrays" names by dtype and shape. Nothing in it is executed, as a pickle's content is.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["receive", "send"]

_LENGTH = struct.Struct("<I")
_DTYPES = frozenset({"|i1", "<i4", "<i8", "<f4", "<f8"})


def send(stream: IO[bytes], message: dict[str, Any], arrays: Sequence[NDArray[Any]] = ()) -> None:
    """Write a message, and flush.

    Raises:
        OSError: nobody reads any more.
    """
    plain = [np.ascontiguousarray(array) for array in arrays]
    described = [[array.dtype.str, array.shape] for array in plain]
    text = json.dumps({**message, "arrays": described}).encode("ascii")
    stream.write(_LENGTH.pack(len(text)))
    stream.write(text)
    for array in plain:
        if array.size:
            stream.write(array.data.cast("B"))
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """Read a message.

    Raises:
        EOFError: the other end is gone.
        OSError: reading failed.
    """
    (length,) = _LENGTH.unpack(_exactly(stream, bytearray(_LENGTH.size)))
    message: dict[str, Any] = json.loads(_exactly(stream, bytearray(length)))
    arrays = []
    for dtype, shape in message.pop("arrays"):
        if dtype not in _DTYPES:
            raise ValueError(f"an array of {dtype}")
        array = np.empty(shape, dtype=dtype)
        if array.size:
            _exactly(stream, array.data.cast("B"))
        arrays.append(array)
    return message, arrays


def _exactly(stream: IO[bytes], into: Any) -> Any:
    view = memoryview(into)
    done = 0
    while done < len(view):
        n = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not n:
            raise EOFError
        done += n
    return into
