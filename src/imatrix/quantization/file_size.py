"""The size of a quantized file before it is written, to the byte.

The quantizer writes the keys of its source and some of its own, the names of all tensors, and their
data (llama_model_quantize_impl in src/llama-quant.cpp, gguf_write_out in ggml/src/gguf.cpp). The
page formats (docs/formats.md) has the layout.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from imatrix.files.names import encoded
from imatrix.model.header import ModelFile
from imatrix.model.parts import read_parts
from imatrix.model.raw import STRING, Part, Tensor, Value
from imatrix.quantization.keys import Override
from imatrix.quantization.source import data_bytes, described

__all__ = ["bytes_of", "padded", "quantized_bytes"]

_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT, whatever the source's general.alignment
_HEAD = 4 + 4 + 8 + 8  # magic, version, how many tensors and keys
_OWN = ("general.quantization_version", "general.file_type")
_PARTS = ("split.no", "split.count", "split.tensors.count")


def quantized_bytes(
    model: ModelFile,
    types: Mapping[str, str],
    keys: Iterable[tuple[str, Override]] = (),
) -> int:
    """Bytes of the file that imatrix.quantize writes, if it is one.

    Args:
        model: what is quantized.
        types: tensor -> ggml type, in any case; the others stay as they are.
        keys: that are written beside those of the model: of the matrix, see
            imatrix.quantization.keys.matrix_keys, and of override_kv. The name of the matrix's file
            is among them, so that its length counts.

    Raises:
        ValueError: a type that the engine lacks, or that does not fit the rows.
        ModelError: a part of the model is damaged.
        OSError: a part cannot be read.
    """
    parts = read_parts(model.path, Part.read)
    tensors = [tensor for part in parts for tensor in part.tensors.values()]
    return bytes_of(parts[0].keys, tensors, types, keys)


def bytes_of(
    own: Mapping[str, Value],
    tensors: Sequence[Tensor],
    types: Mapping[str, str],
    keys: Iterable[tuple[str, Override]] = (),
) -> int:
    """The same of a model that has these keys and tensors, whether there is a file of it or not.

    Raises:
        ValueError: as above.
    """
    found = {name: _text(name) + _value(value) for name, value in own.items()}
    for name in _OWN:
        found[name] = _text(name) + 8
    for name in _PARTS:
        found.pop(name, None)
    for name, given in keys:
        found[name] = _text(name) + _override(given)
    header = _HEAD + sum(found.values())
    sizes = {tensor.name: tensor.size for tensor in tensors}
    data = 0
    for name, tensor in described(tensors).items():
        header += _text(name) + 4 + 8 * len(tensor.shape) + 4 + 8
        kind = types.get(name, tensor.type)
        same = kind.lower() == tensor.type
        data += padded(sizes[name] if same else data_bytes(tensor.shape, kind))
    return padded(header) + data


def _text(text: str) -> int:
    return 8 + len(encoded(text))


def _override(value: Override) -> int:
    """As the engine writes a key of override_kv: a bool, uint32, float32 or text."""
    if isinstance(value, str):
        return 4 + _text(value)
    return 4 + (1 if isinstance(value, bool) else 4)


def _value(value: Value) -> int:
    """A key's type and value, as the engine copies them (gguf_set_kv in ggml/src/gguf.cpp).

    It hands texts on as C has them, so that they end at the first zero byte.
    """
    if value.kind != STRING:
        return len(value.raw)
    at = 16 if value.is_array else 4
    lost = 0
    for _ in range(value.count):
        (length,) = struct.unpack_from("<Q", value.raw, at)
        at += 8
        end = value.raw.find(b"\0", at, at + length)
        lost += at + length - end if end >= 0 else 0
        at += length
    return len(value.raw) - lost


def padded(size: int) -> int:
    """Bytes that a tensor's data, or all that is before it, takes in a quantized file."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
