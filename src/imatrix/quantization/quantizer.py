"""Quantizing a model with the engine's own quantizer."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imatrix.engine import process
from imatrix.engine.background import NativeThread, ended_at_exit
from imatrix.engine.cores import physical_cores
from imatrix.engine.quantizing import HereQuantizer, IsolatedQuantizer, Quantizer
from imatrix.engine.rehearsal import rehearse_load
from imatrix.errors import EngineDiedError, EngineError
from imatrix.files import atomic
from imatrix.files.names import cut
from imatrix.files.outputs import check_files
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.architectures import check_whole, loads_alone
from imatrix.model.header import ModelFile
from imatrix.model.parts import model_inputs
from imatrix.quantization.coverage import Coverage, examine
from imatrix.quantization.refusals import check_unasked, explained, refuse_early
from imatrix.quantization.rehearsal import rehearse_quantize
from imatrix.quantization.rules import RuleUse, TensorTypes, near, request, rules_of
from imatrix.quantization.types import FTYPES

__all__ = ["Quantized", "quantize"]

_log = logging.getLogger("imatrix")

# llama_model_kv_override.val_str holds 128 bytes with its final zero (include/llama.h).
_MAX_TEXT = 127


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
    isolate: bool = False,
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
        isolate: run the engine's quantizer in a process of its own. Should the engine or the system
            end that one, this one stays: an EngineDiedError names the tensor, and nothing is
            written. The file is the same to the bit.
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
        EngineDiedError: with isolate=True, the process that ran the engine is gone.
        MemoryError: out of memory.
        KeyboardInterrupt: Ctrl-C; the work ends after the tensor at hand, with isolate=True at once.
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
    source = imatrix if isinstance(imatrix, (str, os.PathLike)) else None
    with _quantizer(isolate) as quantizer, _outlived(dst):
        found = examine(
            quantizer,
            model.path,
            matrix,
            name,
            tensor_types=[(rule.pattern, rule.type) for rule in rules],
            allow_requantize=allow_requantize,
            pure=pure,
            quantize_output=quantize_output,
            matrix_name=source,
        )
        _warn(found)
        check_unasked(found)
        if matrix is not None:
            refuse_early(found, model, matrix, dst)
        asked = request(name, rules)
        metadata = [] if matrix is None else _metadata(matrix, source)
        if asked.rewritten:
            metadata.append(("general.file_type", FTYPES[name]))
        # its own file goes before the interpreter does, too
        with ended_at_exit("quantization") as work, atomic.replacing(dst) as temporary:
            # In a second thread, so that Ctrl-C reaches this one.
            with NativeThread() as thread:
                running = thread.submit(
                    quantizer.quantize,
                    os.fspath(model.path),
                    os.fspath(temporary),
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
                            progress(*quantizer.progress)
                except BaseException:
                    quantizer.cancel()
                    running.exception()  # wait for it; what it says no longer matters
                    raise
                try:
                    running.result()
                except EngineDiedError as error:
                    error.args = (
                        f"{error.args[0]}, while it quantized {model.path} to {name}"
                        + _describe_place(*quantizer.progress, found),
                    )
                    raise
                except RuntimeError as error:
                    raise explained(str(error), model, dst, name) from None
            if progress is not None:
                progress(*quantizer.progress)
            try:
                bytes_, values = quantizer.tensor_totals(os.fspath(temporary))
            except EngineDiedError as error:
                error.args = (f"{error.args[0]}, while it read what it had written",)
                raise
            except RuntimeError:
                raise EngineError(
                    f"{model.path}: the engine's quantizer wrote a file that it cannot read again; "
                    "the model's metadata and its tensors do not go together"
                ) from None
            if loads_alone(model) and (why := rehearse_load(temporary, mtp=model.n_nextn > 0)):
                raise EngineError(
                    f"{model.path}: nothing was written to {os.fspath(dst)}, because the engine "
                    f"would not load it: {why}"
                )
    return Quantized(Path(dst), Path(dst).stat().st_size, 8 * bytes_ / values, found.rules)


@contextmanager
def _quantizer(isolate: bool) -> Iterator[Quantizer]:
    """The engine's quantizer, here or in a process of its own, which ends with the context."""
    if not isolate:
        yield HereQuantizer()
        return
    engine = process.Engine()
    try:
        yield IsolatedQuantizer(engine)
    finally:
        engine.close()


@contextmanager
def _outlived(dst: str | os.PathLike[str]) -> Iterator[None]:
    """Say in the error of an engine that died what is left."""
    try:
        yield
    except EngineDiedError as error:
        error.args = (f"{error.args[0]}. Nothing was written to {os.fspath(dst)}.",)
        raise


def _describe_place(done: int, total: int, found: Coverage) -> str:
    """Where the quantizer was, in words, when so many tensors were done."""
    if not 0 <= done < total:
        return ""
    # a dry run goes through the tensors in the same order
    name = f", {found.tensors[done].name}" if len(found.tensors) == total else ""
    return f", at tensor {done + 1} of {total}{name}"


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
    """The keys that llama-quantize writes; no file name if the matrix came from memory."""
    keys: list[tuple[str, int | str]] = []
    if source is not None:
        keys.append(("quantize.imatrix.file", cut(os.fspath(source), _MAX_TEXT)))
    if matrix.datasets:
        keys.append(("quantize.imatrix.dataset", cut(matrix.datasets[0], _MAX_TEXT)))
    keys.append(("quantize.imatrix.entries_count", len(matrix)))
    if matrix.chunk_count:
        keys.append(("quantize.imatrix.chunks_count", matrix.chunk_count))
    return keys
