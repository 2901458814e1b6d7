"""Files of text as bytes: which there are, how to read each by its name, and unpacking.

The libraries that read Parquet, Zstandard and data sets are imported here, on first use.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

__all__ = [
    "KINDS",
    "PACKED",
    "STDIN",
    "Kind",
    "dataset_of",
    "describe_path",
    "files_in",
    "import_datasets",
    "import_zstandard",
    "kind_of",
    "open_parquet",
    "opened",
    "rows_of",
    "unpacked_name",
]

Kind = Literal["text", "jsonl", "parquet", "hf"]
"""How a source is read; "hf" is a data set of the datasets library."""

KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
"""Suffixes of the files that are read in a folder."""

PACKED = (".gz", ".zst")
"""Suffixes of files that are unpacked while they are read."""

STDIN = "-"
"""What names standard input."""

_DATASET = re.compile(r"([^/:]+(?:/[^/:]+)?)(?::([^/:]*))?(?:/([^/:]+))?")
_LOCAL_DATASET = re.compile(r"((?:[./~]|[A-Za-z]:[\\/]).*?)(?::([^/:\\]*)(?:/([^/:]+))?)?")


# --- files ---------------------------------------------------------------------------------------


def files_in(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, in no order; hidden ones are left out."""
    # links to folders are not followed: they may lead back to where they start
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def unpacked_name(path: Path) -> Path:
    """The path without the suffix of its compression."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def kind_of(path: Path) -> Kind:
    """How to read a file, by its name.

    Raises:
        ValueError: it is Parquet that was compressed once more.
    """
    kind = KINDS.get(unpacked_name(path).suffix.lower(), "text")
    if kind == "parquet" and path.suffix.lower() in PACKED:
        raise ValueError(f"{path}: Parquet has compression of its own; unpack the file")
    return kind


def describe_path(path: Path | None) -> str:
    """What to call a file in an error; None is standard input."""
    return "standard input" if path is None else os.fspath(path)


@contextmanager
def opened(path: Path | None) -> Iterator[IO[bytes]]:
    """The file, unpacked while it is read; standard input for None.

    Raises:
        ValueError: it is damaged or cut short.
        OSError: it cannot be read.
    """
    if path is None:
        yield sys.stdin.buffer
        return
    with path.open("rb") as file:
        suffix = path.suffix.lower()
        try:
            if suffix == ".gz":
                with gzip.open(file) as unpacked:
                    yield unpacked  # type: ignore[misc]
            elif suffix == ".zst":
                with io.BufferedReader(_Zstd(file, path), 2**17) as buffered:
                    yield buffered
            else:
                yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged or cut short: {error}") from error


class _Zstd(io.RawIOBase):
    """Unpacks frames of Zstandard. It raises EOFError if the last frame is cut short, which the
    library's own stream_reader takes for the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._library = import_zstandard(path)
        self._file = file
        self._path = path
        self._frame: Any = None
        self._rest = b""  # not unpacked yet
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._rest or self._file.read(2**16)
            self._rest = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a Zstandard frame")
                return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(packed)
            except self._library.ZstdError as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n


# --- libraries -----------------------------------------------------------------------------------


def open_parquet(path: Path) -> Any:
    """The file as a pyarrow.parquet.ParquetFile."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _missing(os.fspath(path), "pyarrow", "parquet") from error
    try:
        name = os.fspath(path)
        # pyarrow encodes a name as UTF-8, and takes bytes as they are
        raw = name != name.encode("utf-8", "replace").decode("utf-8")
        return parquet.ParquetFile(pyarrow.OSFile(os.fsencode(path)) if raw else path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error


def import_zstandard(path: Path) -> Any:
    """The library zstandard, which `path` needs."""
    try:
        import zstandard
    except ImportError as error:
        raise _missing(os.fspath(path), "zstandard", "zstd") from error
    return zstandard


def import_datasets() -> Any:
    """The library datasets."""
    try:
        import datasets
    except ImportError as error:
        raise _missing("hf:", "datasets", "datasets") from error
    return datasets


def _missing(what: str, library: str, extra: str) -> ImportError:
    return ImportError(
        f"{what}: reading it needs the library {library}, which is not installed: "
        f"pip install 'imatrix[{extra}]'"
    )


def rows_of(batch: Any) -> Iterator[Any]:
    """The rows of a pyarrow.RecordBatch as mappings. A row that cannot be one, for example because
    a text in it is not UTF-8, is a ValueError instead; it is yielded, not raised."""
    try:
        yield from batch.to_pylist()
        return
    except ValueError:
        pass
    for row in range(batch.num_rows):
        try:
            (found,) = batch.slice(row, 1).to_pylist()
        except ValueError as error:
            found = error
        yield found


def dataset_of(text: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of a data set, from what stands after "hf:".

    Raises:
        ValueError: the text names no data set.
    """
    found = _LOCAL_DATASET.fullmatch(text) or _DATASET.fullmatch(text)
    if found is None:
        raise ValueError(
            f"hf:{text}: expected hf:NAME[:CONFIG][/SPLIT], as hf:user/dataset or "
            "hf:wikitext:wikitext-2-raw-v1/test"
        )
    name = str(Path(found[1]).expanduser()) if found[1].startswith("~") else found[1]
    return name, found[2] or None, found[3] or "train"
