"""Would the model quantize: what the page tells of a check beside its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imatrix.report.parts import Fix

if TYPE_CHECKING:
    from imatrix.quantization.coverage import Coverage
    from imatrix.quantization.verdicts import TensorCoverage

__all__ = ["describe_stop", "fixes", "has_details", "without_data"]

# Lines of a fix to paste. More of them, for a matrix of another model, help nobody.
_FIX_LINES = 64


def describe_stop(tensor: TensorCoverage, check: Coverage) -> str:
    """Why a tensor stops the quantizer."""
    from imatrix.quantization import coverage

    return coverage.describe_stop(tensor, check)


def without_data(check: Coverage) -> list[TensorCoverage]:
    """Tensors that would be quantized without the data that they would have used; but for
    embeddings, for which no run collects any: rows are looked up in them."""
    from imatrix.quantization.types import UNASKED

    return [
        tensor
        for tensor in check.without_data
        if tensor.uses_data and tensor.name not in UNASKED[:2]
    ]


def has_details(check: Coverage) -> bool:
    """Whether there is more to tell than the verdict."""
    return bool(check.failing or check.partial or check.fixes or without_data(check))


def fixes(check: Coverage) -> list[Fix]:
    """What to do, the cure first."""
    found = []
    for fix in check.fixes:
        words, _, paste = fix.partition("\n")
        if not paste and ": imatrix " in words:
            words, _, command = words.rpartition(": imatrix ")
            words, paste = f"{words}:", f"imatrix {command}"
        pasted = paste.splitlines()
        found.append(Fix(words, "\n".join(pasted[:_FIX_LINES]), max(0, len(pasted) - _FIX_LINES)))
    return found
