"""Reads and rewrites GGUF files with gguf-py, for tests that change models or read them
independently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader


def rewritten(
    source: Path,
    out: Path,
    *,
    order: Callable[[list[str]], list[str]] = list,
    alignment: int | None = None,
    split: int = 0,
) -> Path:
    """The same model as gguf-py's writer stores it: in another order, with another alignment, or in
    parts."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(
        out, reader.fields["general.architecture"].contents(), split_max_tensors=split
    )
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name in order(list(found)):
        tensor = found[name]
        writer.add_tensor(name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


def keys_of(path: Path) -> dict[str, Any]:
    return {
        key: field.contents()
        for key, field in GGUFReader(path).fields.items()
        if not key.startswith(("GGUF.", "tokenizer."))
    }


def hollowed(path: Path) -> None:
    """Make all weights of a model zero: low-bit types skip zeros, for which they would otherwise
    search for seconds."""
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        tensor.data[...] = 0
