"""Keys of the metadata that a quantized model gets beside, or instead of, those of its source.

They are llama-quantize's (--override-kv). The engine takes them through a struct with room for 127
bytes of a key and as many of a text (llama_model_kv_override in include/llama.h), writes every
whole number as uint32 and every other number as float32 (llama_model_quantize_impl in
src/llama-quant.cpp), and reads the model by them too.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

from imatrix.files.names import cut
from imatrix.matrix.importance import ImportanceMatrix

__all__ = [
    "MAX_BYTES",
    "Override",
    "Overrides",
    "matrix_keys",
    "overrides_of",
    "parse_override",
    "spelled",
]

Override = bool | int | float | str
"""The value of a key: its Python type gives the type of the key."""

Overrides = Mapping[str, Override]
"""Key -> value."""

MAX_BYTES = 127
"""Bytes of a key, and of a text, at most."""

_MAX_WHOLE = 2**32 - 1
_MAX_REAL = (2 - 2**-23) * 2.0**127  # the largest float32

# The quantizer pads the data to 32 bytes (GGUF_DEFAULT_ALIGNMENT), whatever this key says; and it
# takes the others from the parts that it reads and writes.
_REFUSED = {
    "general.alignment": "the quantizer always aligns to 32 bytes",
    "split.no": "it follows from the parts that are written",
    "split.count": "it follows from the parts that are written",
    "split.tensors.count": "it follows from the parts that are written",
}

_FORM = "expected KEY=TYPE:VALUE with a TYPE of int, float, bool or str"


def overrides_of(given: Overrides | None, *, has_matrix: bool) -> tuple[tuple[str, Override], ...]:
    """Keys as the engine takes them, in the order given.

    Args:
        given: the keys; None for none.
        has_matrix: whether there is a matrix, which sets keys of its own.

    Raises:
        ValueError: a key or a value that the engine cannot take.
    """
    found = []
    for key, value in (given or {}).items():
        _check_key(key, has_matrix=has_matrix)
        _check_value(key, value)
        found.append((key, value))
    return tuple(found)


def _check_key(key: str, *, has_matrix: bool) -> None:
    if not isinstance(key, str) or not key:
        raise ValueError(f"override_kv takes keys as text that is not empty, got {key!r}")
    _check_text(f"the key {key!r}", key)
    if key in _REFUSED:
        raise ValueError(f"override_kv cannot set {key}: {_REFUSED[key]}")
    if has_matrix and key.startswith("quantize.imatrix."):
        raise ValueError(f"override_kv cannot set {key}: it follows from the importance matrix")


def _check_value(key: str, value: Override) -> None:
    if isinstance(value, str):
        _check_text(f"the text for {key}", value)
    elif isinstance(value, bool):
        pass
    elif isinstance(value, int):
        if not 0 <= value <= _MAX_WHOLE:
            raise ValueError(
                f"override_kv: {value} for {key} is outside 0 to {_MAX_WHOLE}; the engine writes "
                "whole numbers as uint32"
            )
    elif isinstance(value, float):
        if not math.isfinite(value) or abs(value) > _MAX_REAL:
            raise ValueError(
                f"override_kv: {value} for {key} is no finite float32, which the engine writes "
                "numbers as"
            )
    else:
        raise ValueError(
            f"override_kv takes int, float, bool or str, got {type(value).__name__} for {key}"
        )


def _check_text(what: str, text: str) -> None:
    if "\0" in text:
        raise ValueError(f"override_kv: {what} holds a zero byte, where the engine ends it")
    try:
        length = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"override_kv: {what} is not UTF-8") from None
    if length > MAX_BYTES:
        raise ValueError(
            f"override_kv: {what} has {length} bytes; the engine takes {MAX_BYTES} at most"
        )


def parse_override(text: str) -> tuple[str, Override]:
    """(key, value) of KEY=TYPE:VALUE, as llama-quantize takes it.

    llama-quantize reads numbers with atol and atof (string_parse_kv_override in common/common.cpp),
    which take "12x" for 12 and "x" for 0. Here these are errors.

    Raises:
        ValueError: it is not of that form.
    """
    key, equals, typed = text.partition("=")
    kind, colon, value = typed.partition(":")
    if not key or not equals or not colon:
        raise ValueError(f"{_FORM}, got {text!r}")
    if kind == "str":
        return key, value
    if kind == "bool":
        if value not in ("true", "false"):
            raise ValueError(f"expected true or false for {key}, got {value!r}")
        return key, value == "true"
    if kind == "int":
        if not re.fullmatch(r"[+-]?[0-9]+", value):
            raise ValueError(f"expected a whole number for {key}, got {value!r}")
        return key, int(value)
    if kind == "float":
        try:
            return key, float(value)
        except ValueError:
            raise ValueError(f"expected a number for {key}, got {value!r}") from None
    raise ValueError(f"unknown type {kind!r} for {key}; {_FORM}")


def spelled(key: str, value: Override) -> str:
    """KEY=TYPE:VALUE, which parse_override() reads."""
    if isinstance(value, bool):
        return f"{key}=bool:{str(value).lower()}"
    return f"{key}={type(value).__name__}:{value}"


def matrix_keys(
    matrix: ImportanceMatrix, source: str | os.PathLike[str] | None
) -> list[tuple[str, int | str]]:
    """The keys that llama-quantize writes beside what a matrix was used for.

    Args:
        matrix: the matrix.
        source: its file, by the name that it is given by; None for a matrix from memory, of which
            no name is written.
    """
    keys: list[tuple[str, int | str]] = []
    if source is not None:
        keys.append(("quantize.imatrix.file", cut(os.fspath(source), MAX_BYTES)))
    if matrix.datasets:
        keys.append(("quantize.imatrix.dataset", cut(matrix.datasets[0], MAX_BYTES)))
    keys.append(("quantize.imatrix.entries_count", len(matrix)))
    if matrix.chunk_count:
        keys.append(("quantize.imatrix.chunks_count", matrix.chunk_count))
    return keys
