"""Quantizing a model with the engine's own quantizer."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imatrix.engine.background import NativeThread, ended_at_exit
from imatrix.engine.cores import physical_cores
from imatrix.engine.quantizing import Choice, Quantizer, open_quantizer
from imatrix.engine.rehearsal import rehearse_load
from imatrix.errors import EngineDiedError, EngineError
from imatrix.files import atomic
from imatrix.files.outputs import Output, check_files
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.architectures import check_whole, loads_alone
from imatrix.model.header import ModelFile
from imatrix.model.parts import model_inputs, part_path
from imatrix.quantization.coverage import Coverage, examine
from imatrix.quantization.keys import Overrides, matrix_keys
from imatrix.quantization.options import Options
from imatrix.quantization.parts import kept_parts
from imatrix.quantization.recipe import Recipe
from imatrix.quantization.refusals import check_unasked, explained, refuse_early
from imatrix.quantization.rehearsal import rehearse_quantize
from imatrix.quantization.rules import RuleUse, TensorTypes, request

__all__ = ["Quantized", "quantize"]

_log = logging.getLogger("imatrix")


@dataclass(frozen=True)
class Quantized:
    """A quantized model.

    Attributes:
        path: where it is; the first part with keep_split.
        bytes: size of the file, or of all parts.
        bits_per_weight: of its tensors' data, metadata not counted.
        rules: what came of each of `tensor_types`, in order.
        parts: the files, in order; one without keep_split.
    """

    path: Path
    bytes: int
    bits_per_weight: float
    rules: tuple[RuleUse, ...] = ()
    parts: tuple[Path, ...] = ()


def quantize(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    ftype: str | None = None,
    *,
    imatrix: ImportanceMatrix | str | os.PathLike[str] | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    tensor_types: TensorTypes | None = None,
    n_threads: int | None = None,
    allow_requantize: bool = False,
    pure: bool = False,
    quantize_output: bool = True,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    override_kv: Overrides | None = None,
    keep_split: bool = False,
    isolate: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Quantized:
    """Quantize a GGUF model, as llama-quantize does.

    Given the same importance matrix file and options the tensors come out the same, to the bit.
    An existing `dst` is replaced in one step, and only by a whole model. For what would become of
    each tensor, without a file, see imatrix.coverage.

    Args:
        src: the model, or the first part of a multi-part one (the result is one file, unless
            keep_split is true).
        dst: where to write.
        ftype: one of llama-quantize's names, such as "IQ2_XXS" or "Q4_K_M", in any case. With a
            recipe it is the general.file_type that is written, and None stands for the recipe's.
        imatrix: importance data: a matrix, or the path of a file that holds one. A matrix of
            one expert or dense weight that saw no rows weighs every column the same.
        recipe: what gives every tensor its type, or the path of a file that holds it. tensor_types,
            output_tensor_type, token_embedding_type, pure and quantize_output=False do not go with
            it. If it cannot be followed for every tensor, nothing is written.
        tensor_types: exceptions: regular expression (std::regex, searched for in the weights'
            names, the first that matches counts) -> ggml type, such as "q8_0"; or pairs of both.
            Unlike llama-quantize this heeds them for F32, F16 and BF16 too. One that matches no
            tensor, or none that the quantizer changes, is warned of (UserWarning).
        n_threads: threads to compute with; None for the physical cores.
        allow_requantize: go on from weights that are already quantized, at a loss.
        pure: give every weight the type's own format instead of its mixture.
        quantize_output: False leaves output.weight as it is.
        output_tensor_type: ggml type of output.weight, such as "q6_k". It counts before
            `tensor_types`.
        token_embedding_type: ggml type of token_embd.weight, which counts before `tensor_types`, and
            of per_layer_token_embd.weight unless one of `tensor_types` matches that.
        override_kv: metadata to write: key -> int, float, bool or str, written as uint32, float32,
            bool and string. The engine reads the model by them too.
        keep_split: write a multi-part model in the same parts: with `dst` "out.gguf" these are
            out-00001-of-0000N.gguf and so on, also for a model in one file (N is 1 then). They get
            their names once all of them are whole.
        isolate: run the engine's quantizer in a process of its own. Should the engine or the system
            end that one, this one stays: an EngineDiedError names the tensor, and nothing is
            written. The file is the same to the bit.
        progress: called with (tensors done, tensors in all) several times a second, in this
            thread. An exception that it raises ends the work.

    Raises:
        ValueError: an unknown type, or one whose blocks do not fit the rows that it is named for, a
            key that the engine cannot take, a bad number, `dst` is one of the files that are read,
            a matrix that names no weight of this model, a type that the engine cannot give a weight
            without data, or a recipe for another model.
        ModelError (a ValueError): `src` is not a model.
        FormatError (a ValueError): `imatrix` is not an importance matrix, or `recipe` no recipe.
        OSError: a file cannot be read or written.
        EngineError: the engine refused, or would (the preflight runs first, imatrix.coverage);
            its reason is in the message.
        EngineDiedError: with isolate=True, the process that ran the engine is gone.
        MemoryError: out of memory.
        KeyboardInterrupt: Ctrl-C; the work ends after the tensor at hand, with isolate=True at once.
    """
    options = Options.read(
        ftype,
        tensor_types=tensor_types,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        override_kv=override_kv,
        recipe=recipe,
        has_matrix=imatrix is not None,
        allow_requantize=allow_requantize,
        pure=pure,
        quantize_output=quantize_output,
        keep_split=keep_split,
    )
    threads = physical_cores() if n_threads is None else n_threads
    if threads < 1:
        raise ValueError(f"n_threads must be 1 or more, got {n_threads}")
    model = ModelFile.read(src)
    check_whole(model)
    options.check_rows(model.tensors)
    if options.recipe is not None:
        options.recipe.check_model(model)
    targets = kept_parts(dst, model) if keep_split else [Path(dst)]
    rehearse_quantize(model, options)
    read = [given for given in (imatrix, recipe) if isinstance(given, (str, os.PathLike))]
    check_files(
        [Output(os.fspath(target), os.fspath(dst) if keep_split else "") for target in targets],
        [*model_inputs(model.path), *read],
    )
    matrix = imatrix
    if isinstance(matrix, (str, os.PathLike)):
        matrix = ImportanceMatrix.load(matrix)
    if matrix is not None and not any(weight in model.tensors for weight in matrix):
        raise ValueError(
            f"the importance matrix names no weight of {model.path}: its first is "
            f"{next(iter(matrix), 'missing')!r}. Was it collected from another model?"
        )
    source = imatrix if isinstance(imatrix, (str, os.PathLike)) else None
    with open_quantizer(isolate) as quantizer, _outlived(dst):
        found = examine(quantizer, model.path, matrix, options, matrix_name=source)
        _warn(found)
        check_unasked(found, options)
        if matrix is not None:
            refuse_early(found, model, matrix, dst)
        choice = options.choice(metadata=[] if matrix is None else matrix_keys(matrix, source))
        # its own files go before the interpreter does, too
        with ended_at_exit("quantization") as work, _written(targets, choice) as written:
            # In a second thread, so that Ctrl-C reaches this one.
            with NativeThread() as thread:
                running = thread.submit(
                    quantizer.quantize,
                    os.fspath(model.path),
                    os.fspath(written.name),
                    choice,
                    n_threads=threads,
                    allow_requantize=allow_requantize,
                    matrix=[] if matrix is None else _data(matrix),
                    unsaid=_unsaid(options),
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
                        f"{error.args[0]}, while it quantized {model.path} to {options.ftype}"
                        + _describe_place(*quantizer.progress, found),
                    )
                    raise
                except RuntimeError as error:
                    raise explained(str(error), model, dst, options.ftype) from None
            if progress is not None:
                progress(*quantizer.progress)
            bits_per_weight = _bits_per_weight(quantizer, written, model)
            first = written.files[0]
            if loads_alone(model) and (why := rehearse_load(first, mtp=model.n_nextn > 0)):
                raise EngineError(
                    f"{model.path}: nothing was written to {os.fspath(dst)}, because the engine "
                    f"would not load it: {why}"
                )
    size = sum(target.stat().st_size for target in targets)
    return Quantized(targets[0], size, bits_per_weight, found.rules, tuple(targets))


def _unsaid(options: Options) -> str:
    """Lines of the engine's log to leave out: of rules that nobody gave."""
    if options.recipe is not None:
        return "applying manual override"
    return request(options.ftype, options.rules).unsaid


@dataclass(frozen=True)
class _Written:
    """Where the engine writes.

    Attributes:
        name: what it is told.
        files: what it makes of that, in order.
    """

    name: Path
    files: tuple[Path, ...]


@contextmanager
def _written(targets: Sequence[Path], choice: Choice) -> Iterator[_Written]:
    """Give temporary files, which get the names of the targets if the block succeeds."""
    with atomic.replacing_together(targets) as temporaries:
        if not choice.keep_split:
            yield _Written(temporaries[0], temporaries)
            return
        # the engine makes the names of parts, and finds the others by that of the first
        name = temporaries[0].with_suffix(".parts")
        files = tuple(
            part_path(os.fspath(name), number, len(targets))
            for number in range(1, len(targets) + 1)
        )
        try:
            yield _Written(name, files)
            for file, temporary in zip(files, temporaries, strict=True):
                file.replace(temporary)
        except BaseException:
            for file in files:
                file.unlink(missing_ok=True)
            raise


def _bits_per_weight(quantizer: Quantizer, written: _Written, model: ModelFile) -> float:
    """Of the data of all tensors written.

    Raises:
        EngineError, EngineDiedError: a file cannot be read again.
    """
    try:
        totals = [quantizer.tensor_totals(os.fspath(file)) for file in written.files]
    except EngineDiedError as error:
        error.args = (f"{error.args[0]}, while it read what it had written",)
        raise
    except RuntimeError:
        raise EngineError(
            f"{model.path}: the engine's quantizer wrote a file that it cannot read again; "
            "the model's metadata and its tensors do not go together"
        ) from None
    return 8 * sum(n_bytes for n_bytes, _ in totals) / sum(n_values for _, n_values in totals)


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
