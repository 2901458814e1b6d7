"""Importance matrices in the old format, the only one that ik_llama.cpp reads.

llama-imatrix writes it with `--output-format dat` (save_imatrix_legacy in
tools/imatrix/imatrix.cpp), llama.cpp's programs read it (common/imatrix-loader.cpp). All numbers
are little endian, nothing is aligned, and strings have no final zero:

    int32      n_entries
    n_entries times:
      int32      length of the name in bytes
      bytes      name of the weight
      int32      n_call, calls that the entry stands for
      int32      n_val, values: n_in, or n_mat * n_in, one matrix after the other
      float32    n_val values: the mean of the squared activations, times n_call
    int32      calls of the whole run          } old files end
    int32      length of a text's name         } before these
    bytes      name of the text

A call is a chunk in llama-imatrix (counts / chunk size, rounded up), and a graph's evaluation in
ik_llama.cpp. Readers divide by n_call, or take the values as they are if it is 0.

What the format has no place for: how many rows an expert saw (one without any gets the value 1
everywhere, as if it had data), the number of matrices of a weight, the size of a chunk, texts but
one, and how the matrix was made.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Contents, Entry
from imatrix.errors import FormatError
from imatrix.files import atomic
from imatrix.files.names import decoded, encoded

__all__ = ["CHUNK_SIZE", "looks_like", "read", "write"]

CHUNK_SIZE = 512
"""Tokens a chunk if they are not known: llama-imatrix's own default (tools/imatrix/imatrix.cpp)."""

_INT32 = struct.Struct("<i")
_INT32_MAX = 2**31 - 1

# Of a name in a file that is taken for one of this format. ggml's names are shorter
# (GGML_MAX_NAME in ggml.h).
_MAX_NAME = 512


def write(contents: Contents, path: str | os.PathLike[str]) -> None:
    """Write ``contents`` to ``path``, replacing a file there in one step.

    The bytes are llama-imatrix's: it divides and multiplies in float32, and so does this. Weights
    without any row are left out. The last of the datasets is named.

    Raises:
        ValueError: no entry has data, or a number is beyond what the format can hold.
        OSError: the file cannot be written.
    """
    entries, datasets = contents.entries, contents.datasets
    chunk_size = contents.chunk_size or CHUNK_SIZE
    # by bytes, as std::sort orders std::string
    names = sorted((name for name in entries if entries[name].counts.any()), key=encoded)
    if not names:
        raise ValueError(
            f"nothing to write to {os.fspath(path)!r}: no entry of the matrix has data, and "
            "llama.cpp does not read a file without any"
        )
    most = max(int(entries[name].counts.max()) for name in names)
    last = encoded(datasets[-1]) if datasets else b""
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_int32("the number of entries", len(names)))
        for name in names:
            _write_entry(file, name, entries[name], chunk_size)
        file.write(_int32("chunk_count", contents.chunk_count or most // chunk_size))
        file.write(_int32("the length of a dataset's name", len(last)) + last)


def _write_entry(file: BinaryIO, name: str, entry: Entry, chunk_size: int) -> None:
    raw = encoded(name)
    # rounded up, since a call count of 0 means something else
    n_call = -(-int(entry.counts.max()) // chunk_size)
    file.write(_int32(f"the length of {name!r}", len(raw)) + raw)
    file.write(_int32(f"{name!r}: its calls", n_call))
    file.write(_int32(f"{name!r}: its number of values", entry.sums.size))
    values = _means(entry) * np.float32(n_call)
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name!r}: the mean of the squared activations, {entry.importance.max():g}, times "
            f"{n_call} calls is beyond float32 (3.4e38); write GGUF, and check the model"
        )
    file.write(values.astype("<f4").tobytes())


def _means(entry: Entry) -> NDArray[np.float32]:
    """[n_mat, n_in] float32: sums / counts, 1 if nothing was counted."""
    with np.errstate(over="ignore"):
        sums = entry.sums.astype(np.float32)
        if not np.isfinite(sums).all():  # the sum has no place in float32, but the mean may
            return entry.importance.astype(np.float32)
    counts = entry.counts.astype(np.float32)[:, np.newaxis]
    means = np.ones_like(sums)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def _int32(label: str, value: int) -> bytes:
    if not 0 <= value <= _INT32_MAX:
        raise ValueError(f"{label} must be in [0, {_INT32_MAX}] in this format, got {value}")
    return _INT32.pack(value)


def looks_like(path: str | os.PathLike[str]) -> bool:
    """Whether a file may be of this format: it has no magic number, but its start has a shape.

    Raises:
        FileNotFoundError, OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return False
        n_entries, length = _INT32.unpack_from(start)[0], _INT32.unpack_from(start, 4)[0]
        size = os.fstat(file.fileno()).st_size
        # an entry has 16 bytes and a name at the least
        if not 0 < length <= _MAX_NAME or not 0 < n_entries <= size // 17:
            return False
        name = file.read(length)
    return len(name) == length and name.rstrip(b"\0").decode("ascii", "replace").isprintable()


def read(path: str | os.PathLike[str], *, chunk_size: int = CHUNK_SIZE) -> Contents:
    """Read what this package, llama-imatrix or ik_llama.cpp's imatrix wrote.

    Like common/imatrix-loader.cpp it reads files without the part after the entries, ignores that
    part if it is damaged, and takes the later of two entries of one name. A weight comes as one
    row of all its values, [1, n_mat * n_in], with one count: the format does not tell experts
    apart. `ImportanceMatrix.merge` and the quantizers can use it so.

    Args:
        chunk_size: tokens a chunk. The file does not hold them; llama-imatrix takes its own `-c` when
            it reads one. Means do not depend on it, but it is how much the file weighs when it
            is merged with another: n_call * chunk_size rows a weight.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is cut short, or its contents make no sense as an importance matrix.
        ValueError: chunk_size is not 1 or more.
        OSError: the file cannot be read.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}")
    reader = _Reader(Path(path).read_bytes())
    try:
        n_entries = reader.int32("the number of entries")
        if n_entries < 1:
            raise ValueError(f"the number of entries is {n_entries}, expected 1 or more")
        entries = dict(reader.entry(number, chunk_size) for number in range(1, n_entries + 1))
        chunk_count, datasets = reader.end()
        return Contents(entries, datasets=datasets, chunk_count=chunk_count, chunk_size=chunk_size)
    except (ValueError, TypeError) as error:
        raise FormatError(path, str(error)) from None


class _Reader:
    """A position in the file's bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def int32(self, label: str) -> int:
        return int(_INT32.unpack(self._take(4, label))[0])

    def entry(self, number: int, chunk_size: int) -> tuple[str, Entry]:
        length = self.int32(f"the length of the name of entry {number}")
        if length < 0:
            raise ValueError(f"the name of entry {number} has {length} bytes")
        # ggml's names are ASCII, and GGUF readers take no others
        raw = self._take(length, f"the name of entry {number}")
        name = raw.partition(b"\0")[0].decode("utf-8", "replace")
        n_call = self.int32(f"the calls of {name!r}")
        n_val = self.int32(f"the number of values of {name!r}")
        if n_val < 1:
            raise ValueError(f"{name!r} has {n_val} values, expected 1 or more")
        values = np.frombuffer(self._take(4 * n_val, f"the values of {name!r}"), "<f4")
        # without calls the values are the means (load_imatrix in tools/quantize/quantize.cpp)
        rows = n_call * chunk_size if n_call > 0 else 1
        sums = values.astype(np.float64) * (chunk_size if n_call > 0 else 1)
        return name, Entry(sums[np.newaxis], [rows], name=name)

    def end(self) -> tuple[int, tuple[str, ...]]:
        """(chunks, datasets); 0 and none if the file has no such part."""
        try:
            chunks = max(0, self.int32("the number of calls"))
        except ValueError:
            return 0, ()
        try:
            length = self.int32("the length of the dataset's name")
            name = _text(self._take(length, "the dataset's name")) if length > 0 else ""
        except ValueError:
            name = ""
        return chunks, (name,) if name else ()

    def _take(self, n: int, label: str) -> bytes:
        end = self._at + n
        if end > len(self._data):
            raise ValueError(
                f"cut short: {label} would end at byte {end}, the file has {len(self._data)}"
            )
        taken = self._data[self._at : end]
        self._at = end
        return taken


def _text(raw: bytes) -> str:
    """Up to a zero, as C++ takes it; paths are in whatever encoding their system had."""
    return decoded(raw.partition(b"\0")[0])
