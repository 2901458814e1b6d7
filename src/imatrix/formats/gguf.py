"""Importance matrices in GGUF, as llama-imatrix writes and llama-quantize reads them.

The layout (save_imatrix in tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp), shapes in
ggml's order, the row length first:

    general.type           string "imatrix"
    imatrix.datasets       array of string, may be empty
    imatrix.chunk_count    u32
    imatrix.chunk_size     u32
    <weight>.in_sum2       F32 [n_in, n_mat]    sums of squared activations
    <weight>.counts        F32 [1, n_counts]    activation rows; n_counts is 1 or n_mat

and, since llama.cpp 0.6.0:

    imatrix.n_layer_nextn  u32, how many of the last blocks are an MTP/NextN head; absent for none
    imatrix.stats_schema   array of string, what the numbers of <weight>.stats are
    <weight>.in_sum        F32 [n_in, n_mat]    sums of the activations; absent if not collected
    <weight>.stats         F32 [12]             statistics of the weight

The statistics follow from the sums: whoever writes a file with signed sums computes them anew
(imatrix.matrix.weight_activations.schema_figures), and they are passed over when one is read.

The loader asks for keys and tensors by name, so it passes over the ones we add:

    imatrix.collector.version          string
    imatrix.collector.engine           string
    imatrix.collector.mtp              bool
    imatrix.collector.n_ctx            u32
    imatrix.collector.dataset_digest   string

and, if chunks were left out for a NaN or infinite activation, one element a chunk:

    imatrix.collector.left_out.chunks  array of u64, numbers in the text
    imatrix.collector.left_out.tokens  array of u64, where they start in the text
    imatrix.collector.left_out.weights array of string, what the activation reached

and of the text, if it is known, one element a source in the arrays:

    imatrix.collector.tokens             u64, tokens that count
    imatrix.collector.packing            string, "stream" or "document"
    imatrix.collector.seed               i64, of the order of the documents
    imatrix.collector.sources.names      array of string
    imatrix.collector.sources.documents  array of u64, documents begun
    imatrix.collector.sources.tokens     array of u64, tokens that count
    imatrix.collector.sources.dropped    array of u64, tokens that fit into no chunk
    imatrix.collector.sources.weights    array of f64, shares of the tokens; 0 for none
    imatrix.collector.sources.empty      array of u64, documents without a text
    imatrix.collector.sources.skipped    array of u64, records that could not be used

The last two are there only if a number in them is not 0.

With packing "document" a chunk may be shorter than imatrix.chunk_size, so that chunk_count *
chunk_size is more than the tokens there were.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    ReaderTensor,
)
from numpy.typing import NDArray

from imatrix.entries import Contents, Entry, LeftOut, Provenance, TextSource
from imatrix.errors import FormatError
from imatrix.files import atomic
from imatrix.files.names import encoded
from imatrix.formats.container import TYPE, Reader, Writer, opened
from imatrix.formats.single import scaled_counts, stored
from imatrix.tensors import block_of

__all__ = ["read", "write"]

_DATASETS = "imatrix.datasets"
_CHUNK_COUNT = "imatrix.chunk_count"
_CHUNK_SIZE = "imatrix.chunk_size"
_VERSION = "imatrix.collector.version"
_ENGINE = "imatrix.collector.engine"
_MTP = "imatrix.collector.mtp"
_N_NEXTN = "imatrix.n_layer_nextn"
_SCHEMA = "imatrix.stats_schema"
_N_CTX = "imatrix.collector.n_ctx"
_DIGEST = "imatrix.collector.dataset_digest"
_LEFT_CHUNKS = "imatrix.collector.left_out.chunks"
_LEFT_TOKENS = "imatrix.collector.left_out.tokens"
_LEFT_WEIGHTS = "imatrix.collector.left_out.weights"
_TOKENS = "imatrix.collector.tokens"
_PACKING = "imatrix.collector.packing"
_SEED = "imatrix.collector.seed"
_SOURCES = "imatrix.collector.sources."
_SOURCE_LISTS: dict[str, tuple[GGUFValueType, type]] = {
    "names": (GGUFValueType.STRING, str),
    "documents": (GGUFValueType.UINT64, int),
    "tokens": (GGUFValueType.UINT64, int),
    "dropped": (GGUFValueType.UINT64, int),
    "weights": (GGUFValueType.FLOAT64, float),
}
# each absent if it would hold zeros only
_SOURCE_COUNTS: dict[str, tuple[GGUFValueType, type]] = {
    "empty": (GGUFValueType.UINT64, int),
    "skipped": (GGUFValueType.UINT64, int),
}

_KNOWN = frozenset(
    (
        *(_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE, _VERSION, _ENGINE, _MTP, _N_CTX, _DIGEST),
        *(_N_NEXTN, _LEFT_CHUNKS, _LEFT_TOKENS, _LEFT_WEIGHTS),
        *(_TOKENS, _PACKING, _SEED),
        *(_SOURCES + name for name in (*_SOURCE_LISTS, *_SOURCE_COUNTS)),
    )
)

_SUMS = ".in_sum2"
_COUNTS = ".counts"
_SIGNED = ".in_sum"
_STATS = ".stats"

# GGML_MAX_NAME in ggml.h with its final zero; a longer tensor name fails the whole file
# (ggml/src/gguf.cpp).
_MAX_TENSOR_NAME = 63

_U32_MAX = 2**32 - 1


def write(contents: Contents, path: str | os.PathLike[str]) -> None:
    """Write ``contents`` to ``path``, replacing a file there in one step.

    The file holds float32, the matrix float64 and int64. A count above 2^24 or a sum beyond
    float32 has no exact place, so that weight is scaled down as a whole. sums / counts, which is
    all that a quantizer uses, then comes back within float32's precision.

    Raises:
        ValueError: the matrix is empty (llama.cpp refuses such a file), a weight's name is too
            long for ggml, a mean is beyond float32, or a number is beyond 32 bits.
        OSError: the file cannot be written.
    """
    entries = contents.entries
    if not entries:
        raise ValueError(
            f"nothing to write to {os.fspath(path)!r}: the matrix has no entries, and llama.cpp "
            "does not read a file without any"
        )
    names = sorted(entries)
    scaled = {name: scaled_counts(name, entries[name]) for name in names}
    _check_names(names)
    with atomic.replacing(path) as temporary:
        writer = Writer(temporary, "imatrix")
        try:
            _add_metadata(writer, contents)
            for name in names:
                entry, n_counts = entries[name], len(scaled[name])
                single = np.dtype(np.float32)
                n_bytes = entry.sums.size * 4
                writer.add_tensor_info(name + _SUMS, entry.sums.shape, single, n_bytes)
                writer.add_tensor_info(name + _COUNTS, (n_counts, 1), single, n_counts * 4)
                if entry.signed_sums is not None:
                    writer.add_tensor_info(name + _SIGNED, entry.sums.shape, single, n_bytes)
                if (stats := contents.stats.get(name)) is not None:
                    writer.add_tensor_info(name + _STATS, stats.shape, single, stats.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in names:  # one at a time, so that one copy at most exists in float32
                as_stored = stored(entries[name], scaled[name])
                writer.write_tensor_data(as_stored.sums)
                writer.write_tensor_data(scaled[name].astype(np.float32)[:, np.newaxis])
                if as_stored.signed_sums is not None:
                    writer.write_tensor_data(as_stored.signed_sums)
                if (stats := contents.stats.get(name)) is not None:
                    writer.write_tensor_data(stats)
        finally:
            writer.close()


def read(path: str | os.PathLike[str]) -> Contents:
    """Read what this package or llama-imatrix wrote.

    Sums may be F32 or F64 (llama.cpp itself reads F32 only). Like common/imatrix-loader.cpp it
    rounds counts to whole numbers, takes absent metadata as empty, and passes over tensors and
    keys it does not know. Unlike it, it keeps the shape of the sums.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is not GGUF, is cut short, is another kind of GGUF file, or its
            contents make no sense as an importance matrix.
        OSError: the file cannot be read.
    """
    reader, fields = opened(path, Reader, _KNOWN.__contains__)
    try:
        return _contents_from(reader, fields)
    except (ValueError, TypeError) as error:
        raise FormatError(path, str(error)) from None


def _contents_from(reader: GGUFReader, fields: Mapping[str, Any]) -> Contents:
    sums: dict[str, ReaderTensor] = {}
    counts: dict[str, ReaderTensor] = {}
    signed: dict[str, ReaderTensor] = {}
    for tensor in reader.tensors:
        for suffix, found in ((_SUMS, sums), (_COUNTS, counts), (_SIGNED, signed)):
            if tensor.name.endswith(suffix):
                found[tensor.name.removesuffix(suffix)] = tensor
    for name in sorted(sums.keys() ^ counts.keys()):
        have, lack = (_SUMS, _COUNTS) if name in sums else (_COUNTS, _SUMS)
        raise ValueError(f"{name!r} has {name + have!r} but no {name + lack!r}")
    for name in sorted(signed.keys() - sums.keys()):
        raise ValueError(f"{name!r} has {name + _SIGNED!r} but no {name + _SUMS!r}")
    if not sums:
        raise ValueError(f"it has no sums: no tensor is named <weight>{_SUMS}")
    datasets = fields.get(_DATASETS, [])
    if not isinstance(datasets, list) or not all(isinstance(item, str) for item in datasets):
        raise ValueError(f"{_DATASETS} must be an array of strings")
    entries = {name: _entry_from(name, sums[name], counts[name], signed.get(name)) for name in sums}
    return Contents(
        entries,
        datasets=tuple(datasets),
        chunk_count=_field(fields, _CHUNK_COUNT, int) or 0,
        chunk_size=_field(fields, _CHUNK_SIZE, int) or 0,
        provenance=Provenance(
            collector=_field(fields, _VERSION, str),
            engine=_field(fields, _ENGINE, str),
            mtp=_field(fields, _MTP, bool),
            n_ctx=_field(fields, _N_CTX, int),
            dataset_digest=_field(fields, _DIGEST, str),
            left_out=left_out_from(fields),
            tokens=_field(fields, _TOKENS, int),
            packing=_field(fields, _PACKING, str),
            seed=_field(fields, _SEED, int),
            sources=_sources_from(fields),
        ),
        head_blocks=_last_blocks(entries, _field(fields, _N_NEXTN, int) or 0),
    )


def _last_blocks(names: Iterable[str], n: int) -> frozenset[int]:
    """The last n blocks that have an entry, as nextn_layer_start in tools/imatrix/imatrix.cpp
    counts them."""
    end = 1 + max((block for name in names if (block := block_of(name)) is not None), default=-1)
    return frozenset(range(max(0, end - n), end))


def _sources_from(fields: Mapping[str, Any]) -> tuple[TextSource, ...]:
    kinds = {**_SOURCE_LISTS, **_SOURCE_COUNTS}
    lists = [fields.get(_SOURCES + name, []) for name in _SOURCE_LISTS]
    n_sources = len(lists[0]) if isinstance(lists[0], list) else 0
    lists += [fields.get(_SOURCES + name, [0] * n_sources) for name in _SOURCE_COUNTS]
    if not all(isinstance(values, list) for values in lists) or len(set(map(len, lists))) != 1:
        raise ValueError(f"{_SOURCES}* must be arrays of one length")
    for values, (name, (_, kind)) in zip(lists, kinds.items(), strict=True):
        if not all(type(value) is kind for value in values):
            raise ValueError(f"{_SOURCES}{name} must hold values of type {kind.__name__}")
    return tuple(
        TextSource(name, documents, tokens, dropped, weight or None, empty, skipped)
        for name, documents, tokens, dropped, weight, empty, skipped in zip(*lists, strict=True)
    )


def _add_sources(writer: GGUFWriter, sources: tuple[TextSource, ...]) -> None:
    if not sources:
        return
    columns: dict[str, list[Any]] = {
        "names": [each.name for each in sources],
        "documents": [each.documents for each in sources],
        "tokens": [each.tokens for each in sources],
        "dropped": [each.dropped for each in sources],
        "weights": [float(each.weight or 0.0) for each in sources],
        "empty": [each.empty for each in sources],
        "skipped": [each.skipped for each in sources],
    }
    for name, (kind, _) in {**_SOURCE_LISTS, **_SOURCE_COUNTS}.items():
        if name in _SOURCE_LISTS or any(columns[name]):
            writer.add_key_value(_SOURCES + name, columns[name], GGUFValueType.ARRAY, kind)


def left_out_from(fields: Mapping[str, Any]) -> tuple[LeftOut, ...]:
    """The chunks left out, from decoded keys; none if the keys are absent.

    Raises:
        ValueError: the keys are of the wrong type, or of different lengths.
    """
    lists = [fields.get(key, []) for key in (_LEFT_CHUNKS, _LEFT_TOKENS, _LEFT_WEIGHTS)]
    if not all(isinstance(values, list) for values in lists) or len(set(map(len, lists))) != 1:
        raise ValueError(f"{_LEFT_CHUNKS}, .tokens and .weights must be arrays of one length")
    for chunk, token, weight in zip(*lists, strict=True):
        if not isinstance(chunk, int) or not isinstance(token, int) or not isinstance(weight, str):
            raise ValueError(f"{_LEFT_CHUNKS} and .tokens must hold integers, .weights strings")
    return tuple(LeftOut(*values) for values in zip(*lists, strict=True))


def add_left_out(writer: GGUFWriter, left_out: tuple[LeftOut, ...]) -> None:
    """Write the keys that left_out_from() reads; none of them if nothing was left out."""
    if not left_out:
        return
    for key, kind, values in (
        (_LEFT_CHUNKS, GGUFValueType.UINT64, [one.chunk for one in left_out]),
        (_LEFT_TOKENS, GGUFValueType.UINT64, [one.token for one in left_out]),
        (_LEFT_WEIGHTS, GGUFValueType.STRING, [one.weight for one in left_out]),
    ):
        writer.add_key_value(key, values, GGUFValueType.ARRAY, kind)


def _field(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    value = fields.get(key)
    if value is not None and type(value) is not kind:
        raise ValueError(f"{key} must be of type {kind.__name__}, it is {value!r}")
    return value


def _entry_from(
    name: str,
    sums_tensor: ReaderTensor,
    counts_tensor: ReaderTensor,
    signed_tensor: ReaderTensor | None,
) -> Entry:
    sums = _floats(sums_tensor)
    counts = _floats(counts_tensor).reshape(-1)
    sums = sums.reshape(-1, sums.shape[-1])
    if not np.isfinite(counts).all():
        raise ValueError(f"{name!r}: a count is NaN or infinite")
    # Half away from zero, as std::lround does in common/imatrix-loader.cpp.
    counts = np.trunc(counts + np.copysign(0.5, counts))
    if len(sums) == 1 and sums.size % len(counts) == 0:
        # llama.cpp ignores the shape and cuts the sums into as many rows as there are counts.
        sums = sums.reshape(len(counts), -1)
    signed = None
    if signed_tensor is not None:
        signed = _floats(signed_tensor)
        if signed.size != sums.size:
            raise ValueError(
                f"{name + _SIGNED!r} holds {signed.size} values, {name + _SUMS!r} {sums.size}; "
                "expected as many"
            )
        signed = signed.reshape(sums.shape)
    return Entry(sums, counts, signed_sums=signed, name=name)


def _floats(tensor: ReaderTensor) -> NDArray[np.float64]:
    if tensor.tensor_type not in (GGMLQuantizationType.F32, GGMLQuantizationType.F64):
        raise ValueError(f"{tensor.name!r} must be F32, it is {tensor.tensor_type.name}")
    if tensor.data.size == 0 or tensor.data.ndim == 0:
        raise ValueError(f"{tensor.name!r} holds no values")
    # A copy always: the reader maps the file, which may be replaced while the matrix lives.
    return np.array(tensor.data, dtype=np.float64, order="C", subok=False)


def _add_metadata(writer: GGUFWriter, contents: Contents) -> None:
    writer.add_string(TYPE, "imatrix")
    writer.add_key_value(
        _DATASETS, list(contents.datasets), GGUFValueType.ARRAY, GGUFValueType.STRING
    )
    writer.add_uint32(_CHUNK_COUNT, _u32(_CHUNK_COUNT, contents.chunk_count))
    writer.add_uint32(_CHUNK_SIZE, _u32(_CHUNK_SIZE, contents.chunk_size))
    if n_nextn := _n_last(contents):
        writer.add_uint32(_N_NEXTN, n_nextn)
    if contents.stats_schema:
        writer.add_key_value(
            _SCHEMA, list(contents.stats_schema), GGUFValueType.ARRAY, GGUFValueType.STRING
        )
    if (made := contents.provenance) is None:
        return
    for key, text in (
        (_VERSION, made.collector),
        (_ENGINE, made.engine),
        (_DIGEST, made.dataset_digest),
        (_PACKING, made.packing),
    ):
        if text is not None:
            writer.add_key_value(key, text, GGUFValueType.STRING)
    if made.mtp is not None:
        writer.add_bool(_MTP, made.mtp)
    if made.n_ctx is not None:
        writer.add_uint32(_N_CTX, _u32(_N_CTX, made.n_ctx))
    if made.tokens is not None:
        writer.add_uint64(_TOKENS, made.tokens)
    if made.seed is not None:
        writer.add_key_value(_SEED, made.seed, GGUFValueType.INT64)
    _add_sources(writer, made.sources)
    add_left_out(writer, made.left_out)


def _n_last(contents: Contents) -> int:
    """How many of the last blocks are the head's; 0 if others come after them."""
    head = contents.head_blocks
    return len(head) if head == _last_blocks(contents.entries, len(head)) else 0


def _u32(key: str, value: int) -> int:
    if not 0 <= value <= _U32_MAX:
        raise ValueError(f"{key} must be in [0, {_U32_MAX}], got {value}")
    return value


def _check_names(names: list[str]) -> None:
    limit = _MAX_TENSOR_NAME - len(_SUMS)
    for name in names:
        if (size := len(encoded(name))) > limit:
            raise ValueError(
                f"{name!r}: the name is {size} bytes long; llama.cpp reads at most "
                f"{limit}, as the file adds {_SUMS!r} to it"
            )
