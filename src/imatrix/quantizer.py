"""Quantizing a model with the engine's own quantizer."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from imatrix import _quantize_pybind, _session, atomic
from imatrix._names import cut
from imatrix._native_thread import NativeThread, ended_at_exit
from imatrix._output import check_files, model_inputs
from imatrix._rehearsal import rehearse_load, rehearse_quantize
from imatrix._threads import physical_cores
from imatrix.architectures import check_whole, loads_alone
from imatrix.errors import EngineError
from imatrix.matrix import ImportanceMatrix
from imatrix.model_file import ModelFile
from imatrix.tensor_rules import RuleUse, TensorTypes, near, request, rules_of

if TYPE_CHECKING:
    from imatrix.preflight import Coverage, TensorCoverage

__all__ = ["FTYPES", "Quantized", "quantize"]

# llama-quantize's names (tools/quantize/quantize.cpp) -> enum llama_ftype (include/llama.h).
# COPY, which is no type, is left out.
FTYPES: Mapping[str, int] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K": 12,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K": 15,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K": 17,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4_MOE": 38,
    "Q1_0": 40,
    "Q2_0": 41,
}

# The engine asks for data for the other weights and reports their lack; for these it does not
# ask (tensor_requires_imatrix), and ggml then ends the process.
UNASKED = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")

_log = logging.getLogger("imatrix")

# llama_model_kv_override.val_str holds 128 bytes with its final zero (include/llama.h).
_MAX_TEXT = 127

_OFFENDING = re.compile(r"offending tensor: (\S+)\s+- target type: (\S+)")


@dataclass(frozen=True)
class Quantized:
    """A quantized model.

    Attributes:
        path: where it is.
        bytes: size of the file.
        bits_per_weight: of its tensors' data, metadata not counted.
        rules: what came of each of `tensor_types`, in order.
    """

    path: Path
    bytes: int
    bits_per_weight: float
    rules: tuple[RuleUse, ...] = ()


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    ftype: str,
    *,
    imatrix: ImportanceMatrix | str | os.PathLike[str] | None = None,
    tensor_types: TensorTypes | None = None,
    n_threads: int | None = None,
    allow_requantize: bool = False,
    pure: bool = False,
    quantize_output: bool = True,
    progress: Callable[[int, int], object] | None = None,
) -> Quantized:
    """Quantize a GGUF model, as llama-quantize does.

    Given the same importance matrix file and options the tensors come out the same, to the bit.
    An existing `dst` is replaced in one step, and only by a whole model.

    Args:
        src: the model, or the first part of a multi-part one (the result is one file).
        dst: where to write.
        ftype: one of llama-quantize's names, such as "IQ2_XXS" or "Q4_K_M", in any case.
        imatrix: importance data: a matrix, or the path of a file that holds one. A matrix of
            one expert or dense weight that saw no rows weighs every column the same.
        tensor_types: exceptions: regular expression (std::regex, searched for in the weights'
            names, the first that matches counts) -> ggml type, such as "q8_0"; or pairs of both.
            Unlike llama-quantize this heeds them for F32, F16 and BF16 too. One that matches no
            tensor, or none that the quantizer changes, is warned of (UserWarning).
        n_threads: threads to compute with; None for the physical cores.
        allow_requantize: go on from weights that are already quantized, at a loss.
        pure: give every weight the type's own format instead of its mixture.
        quantize_output: False leaves output.weight as it is.
        progress: called with (tensors done, tensors in all) several times a second, in this
            thread. An exception that it raises ends the work.

    Raises:
        ValueError: an unknown type, a bad number, `dst` is one of the files that are read, a matrix that names no weight of
            this model, or a type that the engine cannot give a weight without data.
        ModelError (a ValueError): `src` is not a model.
        FormatError (a ValueError): `imatrix` is not an importance matrix.
        OSError: a file cannot be read or written.
        EngineError: the engine refused, or would (the preflight runs first, imatrix.coverage);
            its reason is in the message.
        MemoryError: out of memory.
        KeyboardInterrupt: Ctrl-C; the work ends after the tensor at hand.
    """
    name = ftype.upper()
    if name not in FTYPES:
        raise ValueError(
            f"unknown type {ftype!r}{near(name, FTYPES)}. Types: {', '.join(sorted(FTYPES))}"
        )
    threads = physical_cores() if n_threads is None else n_threads
    if threads < 1:
        raise ValueError(f"n_threads must be 1 or more, got {n_threads}")
    rules = rules_of(tensor_types)
    model = ModelFile.read(src)
    check_whole(model)
    rehearse_quantize(model)
    read = [imatrix] if isinstance(imatrix, (str, os.PathLike)) else []
    check_files([dst], [*model_inputs(model.path), *read])
    matrix = imatrix
    if isinstance(matrix, (str, os.PathLike)):
        matrix = ImportanceMatrix.load(matrix)
    if matrix is not None and not any(weight in model.tensors for weight in matrix):
        raise ValueError(
            f"the importance matrix names no weight of {model.path}: its first is "
            f"{next(iter(matrix), 'missing')!r}. Was it collected from another model?"
        )
    from imatrix.preflight import coverage  # here: it uses this module's tables

    found = coverage(
        model.path,
        matrix,
        name,
        tensor_types=[(rule.pattern, rule.type) for rule in rules],
        allow_requantize=allow_requantize,
        pure=pure,
        quantize_output=quantize_output,
        matrix_name=imatrix if isinstance(imatrix, (str, os.PathLike)) else None,
    )
    _warn(found)
    _check_unasked(found)
    if matrix is not None:
        _refuse_early(found, model, matrix, dst)

    source = imatrix if isinstance(imatrix, (str, os.PathLike)) else None
    asked = request(name, rules)
    metadata = [] if matrix is None else _metadata(matrix, source)
    if asked.rewritten:
        metadata.append(("general.file_type", FTYPES[name]))
    # its own file goes before the interpreter does, too
    with ended_at_exit("quantization") as work, atomic.replacing(dst) as temporary:
        watch = _quantize_pybind.Watch()
        _session.set_log_level()  # logging.getLogger("imatrix.engine") may want more by now
        # In a second thread, so that Ctrl-C reaches this one.
        with NativeThread() as native:
            running = native.submit(
                _quantize_pybind.quantize,
                watch,
                os.fsencode(model.path),
                os.fsencode(temporary),
                ftype=FTYPES[asked.ftype],
                n_threads=threads,
                allow_requantize=allow_requantize,
                pure=pure,
                quantize_output=quantize_output,
                matrix=[] if matrix is None else _data(matrix),
                tensor_types=asked.rules,
                metadata=metadata,
                unsaid=asked.unsaid,
            )
            try:
                while wait([running], timeout=0.1).not_done:
                    work.check()
                    if progress is not None:
                        progress(*watch.progress)
            except BaseException:
                watch.cancel()
                running.exception()  # wait for it; what it says no longer matters
                raise
            try:
                running.result()
            except RuntimeError as error:
                raise _explained(str(error), model, dst, name) from None
        if progress is not None:
            progress(*watch.progress)
        try:
            bytes_, values = _quantize_pybind.tensor_totals(os.fsencode(temporary))
        except RuntimeError:
            raise EngineError(
                f"{model.path}: the engine's quantizer wrote a file that it cannot read again; "
                "the model's metadata and its tensors do not go together"
            ) from None
        if loads_alone(model) and (why := rehearse_load(temporary, mtp=model.n_nextn > 0)):
            raise EngineError(
                f"{model.path}: nothing was written to {os.fspath(dst)}, because the engine would "
                f"not load it: {why}"
            )
    return Quantized(Path(dst), Path(dst).stat().st_size, 8 * bytes_ / values, found.rules)


def _warn(found: Coverage) -> None:
    """Tell of options that do nothing."""
    told = {use.warning for use in found.rules if not use.idle}
    for text in found.warnings:
        if text not in told:
            warnings.warn(text, stacklevel=3)
    for use in found.rules:
        # of rows that a type does not fit the engine tells; a list of rules may well have a
        # general one behind those that it has left nothing to
        if use.shadowed:
            _log.warning(use.warning)


def _check_unasked(found: Coverage) -> None:
    """Refuse what ggml would answer by ending the process (ggml_quantize_chunk in ggml.c)."""
    for tensor in sorted(found.missing, key=lambda t: t.name in UNASKED and UNASKED.index(t.name)):
        if tensor.name in UNASKED:
            raise ValueError(
                f"{tensor.name} would get a type that needs importance data, and there are none "
                "for it. Leave out pure, or give it a type of its own, as in "
                f"tensor_types={{'^{tensor.name}$': 'q4_K'}}"
                + (
                    " (or collect with process_output)."
                    if tensor.cure == "collect the output"
                    else "."
                )
            )


def _data(matrix: ImportanceMatrix) -> list[tuple[str, NDArray[np.float32]]]:
    """What llama-quantize hands over (load_imatrix in tools/quantize/quantize.cpp).

    It divides in float32. Dividing in float64 and rounding gives the same bits for what a file
    holds (53 bits are enough to round twice: 2 * 24 + 2), and is right beyond.
    """
    with np.errstate(over="ignore"):  # the engine refuses an infinity
        return [
            (name, entry.importance.astype(np.float32).reshape(-1))
            for name, entry in matrix.items()
        ]


def _metadata(
    matrix: ImportanceMatrix, source: str | os.PathLike[str] | None
) -> list[tuple[str, int | str]]:
    """The keys that llama-quantize writes; no file name where the matrix came from memory."""
    keys: list[tuple[str, int | str]] = []
    if source is not None:
        keys.append(("quantize.imatrix.file", cut(os.fspath(source), _MAX_TEXT)))
    if matrix.datasets:
        keys.append(("quantize.imatrix.dataset", cut(matrix.datasets[0], _MAX_TEXT)))
    keys.append(("quantize.imatrix.entries_count", len(matrix)))
    if matrix.chunk_count:
        keys.append(("quantize.imatrix.chunks_count", matrix.chunk_count))
    return keys


def _refuse_early(
    found: Coverage, model: ModelFile, matrix: ImportanceMatrix, dst: str | os.PathLike[str]
) -> None:
    """Say now, in the engine's words, what it would come upon at a tensor that may be an hour
    away. What it says at its start (no matrix at all, weights that are quantized already) is
    left to it."""
    if found.ready:
        return
    first = found.failing[0]
    cure = ""
    if first.status == "missing":
        cure = _cure(first, found)
        words = f"Missing importance matrix for tensor {first.name} in a very low-bit quantization"
    elif first.status == "wrong size":
        n_in, _, n_mat = (*model.tensors[first.name], 1, 1)[:3]
        words = (
            f"imatrix size {matrix[first.name].sums.size} is different from tensor size "
            f"{n_in * n_mat} for {first.name}"
        )
    else:
        return
    error = _explained(f"failed to quantize: {words}", model, dst, found.ftype, cure)
    more = len(found.failing) - 1
    error.args = (
        f"{error.args[0]}"
        + (f" {more} more tensor(s) would fail; see imatrix check." if more else ""),
    )
    raise error


def _explained(
    log: str,
    model: ModelFile,
    dst: str | os.PathLike[str],
    ftype: str,
    cure: str = "",
) -> Exception:
    """The exception for what the engine logged as errors before it gave up."""
    reason = log.rpartition("failed to quantize: ")[2].strip() or "it gave no reason"
    if "bad_alloc" in reason:
        return MemoryError(f"{model.path}: no memory to quantize to {ftype}")
    if "iostream error" in reason:
        return OSError(f"cannot write {os.fspath(dst)!r}: the engine could not; is the disk full?")
    message = f"{model.path}: cannot quantize to {ftype}: {reason}"
    if cure:
        message += f". {cure}"
    elif (offending := _OFFENDING.search(log)) is not None:
        message += (
            f" {offending[1]} would become {offending[2]}, which needs importance data. Collect "
            "them (imatrix collect) and give them as imatrix, or choose a larger type."
        )
    elif "requantizing" in reason:
        message += (
            ". The model is quantized already: start from its F16 or BF16 file, or say "
            "allow_requantize to accept the loss."
        )
    return EngineError(message)


def _cure(tensor: TensorCoverage, found: Coverage) -> str:
    """What to do about a tensor that lacks data."""
    if tensor.cure == "collect the head":
        block = tensor.name.split(".")[1] if tensor.name.startswith("blk.") else "nextn"
        return (
            f"Block {block} is the model's MTP head, which the importance matrix does not "
            "cover: collect it with mtp (imatrix collect --mtp)."
        )
    fixes = found.fixes
    if tensor.cure in ("another type", "find out"):  # these name their tensors
        fixes = tuple(fix for fix in fixes if tensor.name in fix) or fixes
    return f"The importance matrix has no entry for it. {' '.join(fixes[:1])}"
