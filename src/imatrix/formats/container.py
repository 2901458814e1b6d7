"""GGUF files that are no models: read without trust, written as llama-imatrix writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, ReaderField
from numpy.typing import NDArray

from imatrix.errors import FormatError
from imatrix.files.names import decoded, encoded

__all__ = ["TYPE", "Reader", "Writer", "opened"]

TYPE = "general.type"
"""The key that tells what kind of file it is."""


def opened(
    path: str | os.PathLike[str], kind: type[Reader], wanted: Callable[[str], bool]
) -> tuple[Reader, dict[str, Any]]:
    """The file by a reader of its kind, and its wanted keys as Python values.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is not GGUF, is cut short, or is another kind of GGUF file.
        OSError: the file cannot be read.
    """
    _check_magic(path)
    try:
        # An offset that overflows would wrap around to some other place in the file.
        with np.errstate(over="raise"):
            reader = kind(path)
        return reader, {
            key: _contents(field) for key, field in reader.fields.items() if wanted(key)
        }
    except _WrongKindError as error:
        raise FormatError(path, str(error)) from None
    except OSError:
        raise
    except Exception as error:
        # The reader trusts the file, so what a damaged one raises is not its contract: besides
        # ValueError there are IndexError, KeyError, OverflowError, RecursionError, and others.
        raise FormatError(
            path,
            f"damaged or cut short, GGUF structure unreadable ({type(error).__name__}: {error})",
        ) from error


class Writer(GGUFWriter):
    """GGUFWriter for a file that is no model."""

    def write_tensor_data(self, tensor: NDArray[Any], tensor_endianess: Any = None) -> None:
        super().write_tensor_data(tensor.view(_Written), tensor_endianess)

    def add_architecture(self) -> None:
        """Nothing: an importance matrix has none, and llama-imatrix writes none."""

    def _pack_val(
        self,
        val: Any,
        vtype: GGUFValueType,
        add_vtype: bool,
        sub_type: GGUFValueType | None = None,
    ) -> bytes:
        # llama-quantize demands the datasets key, and llama-imatrix writes an empty array when
        # it knows no dataset; the base class refuses empty arrays though their type is known.
        if vtype == GGUFValueType.ARRAY and sub_type is not None and len(val) == 0:
            head = self._pack("I", vtype) if add_vtype else b""
            return head + self._pack("I", sub_type) + self._pack("Q", 0)
        if vtype == GGUFValueType.STRING and isinstance(val, str):
            val = encoded(val)
        return super()._pack_val(val, vtype, add_vtype, sub_type)


class Reader(GGUFReader):
    """GGUFReader with bounds.

    The base class slices past the end of the file and gets less than it asked for. A damaged
    array length then makes it append empty values until memory is gone.
    """

    kind = "imatrix"  # general.type
    advice = "give an importance matrix, not a model"

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> NDArray[Any]:
        offset, count = int(offset), int(count)
        end = offset + count * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"expected data up to byte {end}, the file has {len(self.data)}")
        return super()._get(offset, dtype, count, override_order)

    def _push_field(self, field: ReaderField, skip_sum: bool = False) -> int:
        # The kind stands at the front. Told here, a model given by mistake is refused at once,
        # before its vocabulary is read a word at a time.
        if field.name == TYPE and (kind := _contents(field)) != self.kind:
            raise _WrongKindError(
                f"expected a GGUF file with general.type {self.kind!r}, this one has {kind!r}; "
                f"{self.advice}"
            )
        return int(super()._push_field(field, skip_sum))


def _check_magic(path: str | os.PathLike[str]) -> None:
    with Path(path).open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        start = f"it starts with {magic!r}" if magic else "it is empty"
        raise FormatError(path, f"not a GGUF file: {start}, expected b'GGUF'")


def _contents(field: ReaderField) -> Any:
    """As the field's own, which takes strings for UTF-8; llama-imatrix writes a path as it is."""
    if GGUFValueType.STRING not in field.types:
        return field.contents()
    texts = [decoded(field.parts[at].tobytes()) for at in field.data]
    return texts if field.types[0] == GGUFValueType.ARRAY else texts[0]


class _Written(np.ndarray[Any, Any]):
    """An array whose writing fails as a file's does: ndarray.tofile says how many values were
    written, and not that the disk is full."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(np.ascontiguousarray(self).data)


class _WrongKindError(Exception):
    """The file is GGUF, but of another kind."""
