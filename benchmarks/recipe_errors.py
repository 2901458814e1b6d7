"""Recipes by the error of the weights alone: what llama.cpp's pull request 15550 goes by.

Nothing runs through the model here. Each tensor is quantized to each type, and an error is made of
what the weights lose. Then types are chosen, by the same chooser as recipes are, that minimize the sum
of these errors at the bytes given.

Three errors, from the plain one to the one that is nearest to the pull request (as its branch was in
2026; https://github.com/ggml-org/llama.cpp/pull/15550):

- "squared": the importance-weighted squared error, sum over values of importance * (w - q)^2.
- "relative": of each row, the same over the importance-weighted square of the row; the mean over the
  rows, the largest and smallest hundredth left out, times the number of rows; summed over experts.
- "pull request": "relative" with what that does beside it. The mean activations of the matrix add the
  square of the shift that a row's output gets; of queries and keys it is the weighted angle between
  the row and what becomes of it; and tensors have factors by their kind, which are set by hand.

Left out are the pull request's sampling of rows, its limits on outliers, the factors from statistics
and condition numbers of the weights, and its corrections to the choice made.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

import imatrix
from imatrix.quantization.types import ASKING, UNASKED

F64 = NDArray[np.float64]

ERRORS = ("squared", "relative", "pull request")
Errors = dict[str, dict[str, dict[str, float]]]  # tensor -> type -> kind of error -> value

_TRIMMED = 0.01  # of the rows, at each end
_TRIMMED_FROM = 100  # rows
_LOW = 2.2  # bits a weight of the whole model below which some factors change


def errors(
    model: Path,
    matrix: imatrix.ImportanceMatrix,
    tensors: Sequence[str],
    types: Sequence[str],
    folder: Path,
) -> Errors:
    """The errors of each tensor in each type, by the engine's quantizer.

    Args:
        model: F32, F16 or BF16.
        tensors: those that are chosen types for; their rows are a multiple of 256 values.
        types: ggml types in lower case.
        folder: for the temporary files.
    """
    sources = {each.name: each for each in gguf.GGUFReader(model).tensors}
    found: Errors = {name: {} for name in tensors}
    # embeddings and output often have no data, which some types need
    bare = [name for name in UNASKED if name in sources and name not in matrix]
    for type_ in types:
        left = bare if type_ in ASKING else []
        with tempfile.TemporaryDirectory(dir=folder) as place:
            target = Path(place) / "quantized.gguf"
            imatrix.quantize(
                model,
                target,
                "Q8_0",
                imatrix=matrix,
                tensor_types=[*((f"^{name}$", "q8_0") for name in left), (".", type_)],
                n_threads=1,
            )
            for each in gguf.GGUFReader(target).tensors:
                if each.name not in found or each.name in left:
                    continue
                if each.tensor_type.name.lower() != type_:
                    raise ValueError(f"{each.name} became {each.tensor_type.name}, not {type_}")
                weights = _values(sources[each.name])
                lost = weights - _values(each)
                importance, mean = _data(matrix, each.name, weights.shape)
                by_angle = mean is not None and re.search(r"attn_(q|k|qkv)\.weight", each.name)
                found[each.name][type_] = {
                    "squared": float((importance * lost**2).sum()),
                    "relative": relative(weights, lost, importance),
                    "pull request": angle(weights, weights - lost, importance)
                    if by_angle
                    else relative(weights, lost, importance, mean),
                }
    return found


def relative(weights: F64, lost: F64, importance: F64, mean: F64 | None = None) -> float:
    """The error of rows, relative to them.

    Args:
        weights, lost: [experts, rows, values]; the weights, and what quantizing takes from them.
        importance, mean: [experts, 1, values]; of the squared activations and of themselves the
            means. None for mean: without the shift.
    """
    errors_ = (importance * lost**2).sum(2)
    if mean is None:
        squares = (importance * weights**2).sum(2)
    else:
        errors_ += (mean * lost).sum(2) ** 2
        variance = np.maximum(importance - mean**2, 0)
        squares = (variance * weights**2).sum(2) + (mean * weights).sum(2) ** 2
    rows = np.divide(errors_, squares, out=np.zeros_like(errors_), where=squares > 1e-12)
    total = 0.0
    for each in rows:
        cut = int(len(each) * _TRIMMED) if len(each) >= _TRIMMED_FROM else 0
        kept = np.sort(each)[cut : len(each) - cut]
        total += float(kept.mean()) * len(each)
    return total


def angle(weights: F64, quantized: F64, importance: F64) -> float:
    """One minus the importance-weighted cosine between each row and what becomes of it, summed."""
    dot = (importance * weights * quantized).sum(2)
    squares = (importance * weights**2).sum(2) * (importance * quantized**2).sum(2)
    cosine = np.divide(dot, np.sqrt(squares), out=np.zeros_like(dot), where=squares > 1e-12)
    return float((1 - np.clip(cosine, -1, 1)).sum())


def by_kind(found: Errors, bits: Mapping[str, float], whole: float, tied: float | None) -> Errors:
    """With the factors of kinds in the third error.

    Args:
        bits: a weight, by type.
        whole: bits a weight of the whole model, as they are to be.
        tied: the share of the weights that embeddings have which are the output too; None if they
            are not.
    """
    out: Errors = {}
    for name, types in found.items():
        out[name] = {}
        for type_, values in types.items():
            error = values["pull request"]
            if any(part in name for part in ("attn_q", "attn_k", "attn_o", "attn_v")):
                error *= 1 + 0.5 * 2 ** (3 - bits[type_])
            error *= _factor(name, bits[type_], whole, tied)
            out[name][type_] = {**values, "pull request": error}
    return out


def _factor(name: str, bits: float, whole: float, tied: float | None) -> float:
    if "ffn_down.weight" in name:
        return 6.0 if whole >= _LOW else 1 + 2 ** (3 - bits)
    if name == "output.weight":
        return 3.0
    if "attn_v" in name:
        return 1.25
    if name == "token_embd.weight" and tied is not None and whole >= _LOW:
        return 2.5 if tied <= 0.1 else max(1.25, 2.5 * (1 - 3 * (tied - 0.1)))
    return 1.0


def _values(tensor: gguf.ReaderTensor) -> F64:
    """[experts, rows, values]."""
    shape = tuple(int(n) for n in reversed(tensor.shape))
    values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return values.astype(np.float64).reshape((-1, *shape[-2:]))


def _data(
    matrix: imatrix.ImportanceMatrix, name: str, shape: tuple[int, ...]
) -> tuple[F64, F64 | None]:
    """Importance and mean activation, [experts, 1, values]; ones and None without data."""
    entry = matrix.get(name)
    if entry is None:
        return np.ones((1, 1, shape[2])), None
    importance = entry.importance.reshape(-1, 1, shape[2])
    if entry.signed_sums is None:
        return importance, None
    counts = np.maximum(np.asarray(entry.counts, np.float64), 1).reshape(-1, 1, 1)
    return importance, entry.signed_sums.reshape(-1, 1, shape[2]) / counts
