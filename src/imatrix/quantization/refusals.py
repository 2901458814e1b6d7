"""Says early, and in words with a cure, what the engine would say late or by ending the process."""

from __future__ import annotations

import os
import re

from imatrix.errors import EngineError
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.header import ModelFile
from imatrix.quantization.coverage import Coverage
from imatrix.quantization.options import Options
from imatrix.quantization.types import UNASKED
from imatrix.quantization.verdicts import TensorCoverage
from imatrix.tensors import block_of

__all__ = ["check_unasked", "explained", "refuse_early"]

_OFFENDING = re.compile(r"offending tensor: (\S+)\s+- target type: (\S+)")


def check_unasked(found: Coverage, options: Options) -> None:
    """Refuse what ggml would answer by ending the process (ggml_quantize_chunk in ggml.c).

    Raises:
        ValueError: a tensor that would get a type that needs data, and has none.
    """
    for tensor in sorted(found.missing, key=lambda t: t.name in UNASKED and UNASKED.index(t.name)):
        if tensor.name in UNASKED:
            if (named := options.named(tensor.name)) is not None:
                raise ValueError(
                    f"{named[0]}: {tensor.name} would get {named[1].name}, which needs importance "
                    "data, and there are none for it. Name a type that needs none, such as 'q4_K'"
                    + (
                        " (or collect with process_output)."
                        if tensor.cure == "collect the output"
                        else "."
                    )
                )
            if options.recipe is not None:
                raise ValueError(
                    f"the recipe wants {tensor.target_type} for {tensor.name}, which needs importance "
                    "data, and there are none for it; make the recipe again with this matrix"
                )
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


def refuse_early(
    found: Coverage, model: ModelFile, matrix: ImportanceMatrix, dst: str | os.PathLike[str]
) -> None:
    """Refuse now, in the engine's words, what it would refuse at a tensor that may be an hour away.

    What the engine says at its start (no matrix at all, weights that are quantized already) is left
    to it.

    Raises:
        EngineError: the first tensor that stops the quantizer, and what to do.
    """
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
    error = explained(f"failed to quantize: {words}", model, dst, found.ftype, cure)
    more = len(found.failing) - 1
    error.args = (
        f"{error.args[0]}"
        + (f" {more} more tensor(s) would fail; see imatrix check." if more else ""),
    )
    raise error


def explained(
    log: str,
    model: ModelFile,
    dst: str | os.PathLike[str],
    ftype: str,
    cure: str = "",
) -> Exception:
    """Make the exception for what the engine logged as errors before it gave up.

    Args:
        log: the engine's lines.
        model: the model that it read.
        dst: the file that it wrote.
        ftype: the type asked for.
        cure: what to do, if it is known; else it is taken from the engine's reason.
    """
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
        block = block_of(tensor.name)
        place = "nextn" if block is None else block
        return (
            f"Block {place} is the model's MTP head, which the importance matrix does not "
            "cover: collect it with mtp (imatrix collect --mtp)."
        )
    fixes = found.fixes
    if tensor.cure in ("another type", "find out"):  # these name their tensors
        fixes = tuple(fix for fix in fixes if tensor.name in fix) or fixes
    return f"The importance matrix has no entry for it. {' '.join(fixes[:1])}"
