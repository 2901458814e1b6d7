"""Checkpoints of a run in GGUF: all that it takes to go on as if it had not been interrupted.

Sums and counts are as exact as they are in memory. The layout, shapes in ggml's order, the row
length first; S stands for `imatrix.checkpoint`:

    general.type           string "imatrix-checkpoint"
    S.version              u32, 2; 1 had no signed sums
    S.done                 u64, chunks dealt with, from the first that the run was to collect
    S.tokens               u64, tokens of the chunks that count
    S.seconds              f64, time spent on chunks
    S.nll, S.nll_sq        f64, negative log-likelihood of the tokens scored, in nats, and the sum
                           of its squares
    S.scored               u64, tokens scored; 0 without perplexity
    S.text_digest          string, SHA-256 of the tokens of the chunks dealt with (int32, little
                           endian), in hexadecimal
    S.setting.<name>       string, i64 or bool, what has to be the same to go on
    S.output               string, SHA-256 of the file that the run was about to write last; only
                           if that is one of its inputs too, and would be added to twice
    S.shared.weights       array of string, weights that are fed by the same rows as another ...
    S.shared.with          array of string, ... and that other weight, whose data are theirs too
    <weight>.in_sum2       F64 [n_in, n_mat]    sums of squared activations
    <weight>.counts        I64 [1, n_counts]    activation rows; n_counts is 1 or n_mat
    <weight>.in_sum        F64 [n_in, n_mat]    sums of the activations; absent if not collected

Chunks left out for a NaN are in the keys `imatrix.collector.left_out.*` of a matrix file (see
imatrix.formats.gguf); they are among the chunks dealt with. The weights of a gemma4-assistant head
have `mtp:` in front of their names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, ReaderTensor
from numpy.typing import NDArray

from imatrix.entries import Entry, LeftOut
from imatrix.errors import FormatError
from imatrix.files import atomic
from imatrix.formats import container
from imatrix.formats.gguf import add_left_out, left_out_from

__all__ = ["Checkpoint", "Group", "Setting", "read", "write"]

Setting = str | int | bool

# Weights fed by the same rows, their sums [n_mat, n_in], their counts [n_counts], and their signed
# sums [n_mat, n_in] if those are collected.
Group = tuple[list[str], NDArray[np.float64], NDArray[np.int64], NDArray[np.float64] | None]

_TYPE = "general.type"
_KIND = "imatrix-checkpoint"
_KEY = "imatrix.checkpoint."
_SETTING = f"{_KEY}setting."
_LEFT_OUT = "imatrix.collector.left_out."
_VERSION = 2
_READ = (1, 2)

_SUMS = ".in_sum2"
_SIGNED = ".in_sum"
_COUNTS = ".counts"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where a run stood.

    Attributes:
        done: chunks dealt with, those left out among them.
        tokens: tokens of the chunks that count.
        seconds: spent on chunks.
        nll, nll_sq: negative log-likelihood of the tokens scored, in nats, and the sum of its
            squares.
        scored: tokens scored; 0 without perplexity.
        text_digest: SHA-256 of the tokens of the chunks dealt with, in hexadecimal.
        settings: what has to be the same to go on, by name.
        left_out: the chunks that do not count.
        groups: what was collected, by weights that were fed by the same rows.
        output: SHA-256, in hexadecimal, of the file that the run was about to write; "" for none.
    """

    done: int
    tokens: int
    seconds: float
    nll: float
    nll_sq: float
    scored: int
    text_digest: str
    settings: Mapping[str, Setting]
    left_out: tuple[LeftOut, ...] = ()
    groups: list[Group] = field(default_factory=list)
    output: str = ""


def write(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint, replacing an earlier one in one step.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic.replacing(path) as temporary:
        writer = container.Writer(temporary, "imatrix")
        try:
            _add_metadata(writer, checkpoint)
            for names, sums, counts, signed in checkpoint.groups:
                writer.add_tensor_info(names[0] + _SUMS, sums.shape, sums.dtype, sums.nbytes)
                shape = (len(counts), 1)
                writer.add_tensor_info(names[0] + _COUNTS, shape, counts.dtype, counts.nbytes)
                if signed is not None:
                    writer.add_tensor_info(
                        names[0] + _SIGNED, signed.shape, signed.dtype, signed.nbytes
                    )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, sums, counts, signed in checkpoint.groups:
                writer.write_tensor_data(sums)
                writer.write_tensor_data(counts[:, np.newaxis])
                if signed is not None:
                    writer.write_tensor_data(signed)
        finally:
            writer.close()


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is not a checkpoint, is damaged, or of a later version.
        OSError: the file cannot be read.
    """
    reader, fields = container.opened(
        path, _Reader, lambda key: key.startswith((_KEY, _LEFT_OUT)) or key == _TYPE
    )
    try:
        return _checkpoint_from(reader, fields)
    except (ValueError, TypeError) as error:
        raise FormatError(path, str(error)) from None


class _Reader(container.Reader):
    kind = _KIND
    advice = "give a checkpoint"


def _add_metadata(writer: container.Writer, checkpoint: Checkpoint) -> None:
    writer.add_string(_TYPE, _KIND)
    writer.add_uint32(f"{_KEY}version", _VERSION)
    for name in ("done", "tokens", "scored"):
        writer.add_uint64(_KEY + name, getattr(checkpoint, name))
    for name in ("seconds", "nll", "nll_sq"):
        writer.add_float64(_KEY + name, getattr(checkpoint, name))
    writer.add_key_value(f"{_KEY}text_digest", checkpoint.text_digest, GGUFValueType.STRING)
    if checkpoint.output:
        writer.add_key_value(f"{_KEY}output", checkpoint.output, GGUFValueType.STRING)
    for name, value in checkpoint.settings.items():
        if isinstance(value, bool):
            kind = GGUFValueType.BOOL
        else:
            kind = GGUFValueType.INT64 if isinstance(value, int) else GGUFValueType.STRING
        writer.add_key_value(_SETTING + name, value, kind)
    shared = [(name, names[0]) for names, *_ in checkpoint.groups for name in names[1:]]
    for key, column in (("shared.weights", 0), ("shared.with", 1)):
        names = [pair[column] for pair in shared]
        writer.add_key_value(_KEY + key, names, GGUFValueType.ARRAY, GGUFValueType.STRING)
    add_left_out(writer, checkpoint.left_out)


def _checkpoint_from(reader: container.Reader, fields: Mapping[str, Any]) -> Checkpoint:
    def value(name: str, kind: type) -> Any:
        found = fields.get(_KEY + name)
        if type(found) is not kind:
            raise ValueError(f"{_KEY}{name} must be of type {kind.__name__}, it is {found!r}")
        return found

    if fields.get(_TYPE) != _KIND:
        raise ValueError(f"it has no {_TYPE}; give a checkpoint")
    if (version := value("version", int)) not in _READ:
        raise ValueError(
            f"a checkpoint of version {version}; this imatrix knows {_READ[0]} to {_READ[-1]}: go "
            "on with the one that wrote it"
        )
    return Checkpoint(
        done=value("done", int),
        tokens=value("tokens", int),
        seconds=value("seconds", float),
        nll=value("nll", float),
        nll_sq=value("nll_sq", float),
        scored=value("scored", int),
        text_digest=value("text_digest", str),
        settings={
            **({} if version > 1 else {"signed_sums": False}),  # nobody collected them then
            **{
                key.removeprefix(_SETTING): setting
                for key, setting in fields.items()
                if key.startswith(_SETTING)
            },
        },
        left_out=left_out_from(fields),
        output=value("output", str) if f"{_KEY}output" in fields else "",
        groups=_groups_from(reader, value("shared.weights", list), value("shared.with", list)),
    )


def _groups_from(reader: container.Reader, weights: list[str], others: list[str]) -> list[Group]:
    if len(weights) != len(others):
        raise ValueError(f"{_KEY}shared.weights and .with must be of one length")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    firsts = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    names = {first: [first] for first in firsts}
    for weight, other in zip(weights, others, strict=True):
        if other not in names or weight in names:
            raise ValueError(f"{weight!r} cannot share the data of {other!r}")
        names[other].append(weight)
    with_signed = {first for first in firsts if first + _SIGNED in tensors}
    if len(tensors) != 2 * len(firsts) + len(with_signed):
        raise ValueError(
            f"it must have a tensor <weight>{_COUNTS} for each <weight>{_SUMS}, and may have a "
            f"<weight>{_SIGNED}, but no other"
        )
    groups: list[Group] = []
    for first in firsts:
        sums = _array(tensors[first + _SUMS], GGMLQuantizationType.F64)
        counts = _array(tensors.get(first + _COUNTS), GGMLQuantizationType.I64).reshape(-1)
        sums = sums.reshape(-1, sums.shape[-1])
        signed = None
        if first in with_signed:
            signed = _array(tensors[first + _SIGNED], GGMLQuantizationType.F64)
            signed = signed.reshape(-1, signed.shape[-1])
        Entry(sums, counts, signed_sums=signed, name=first)  # refuses what makes no sense
        groups.append((names[first], sums, counts, signed))
    return groups


def _array(tensor: ReaderTensor | None, kind: GGMLQuantizationType) -> NDArray[Any]:
    if tensor is None or tensor.tensor_type != kind:
        found = "absent" if tensor is None else f"{tensor.name!r} of {tensor.tensor_type.name}"
        raise ValueError(f"a tensor of sums or counts is {found}, expected {kind.name}")
    if tensor.data.ndim == 0 or tensor.data.size == 0:
        raise ValueError(f"{tensor.name!r} holds no values")
    # A copy: the reader maps the file, which will be replaced while the run goes on.
    return np.array(tensor.data, order="C", subok=False)
