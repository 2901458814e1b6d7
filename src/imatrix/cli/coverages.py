"""What a quantization would do, as data: `check --json` and `quantize --dry-run --json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from imatrix.quantization.coverage import Coverage

__all__ = ["as_data"]


def as_data(found: Coverage, imatrix: str | None) -> dict[str, Any]:
    """Everything there is.

    Args:
        found: what was found.
        imatrix: the path of the matrix, if there is one.
    """
    return {
        "model": str(found.model),
        "imatrix": imatrix,
        "architecture": found.architecture,
        "type": found.ftype,
        "ready": found.ready,
        "failing": [tensor.name for tensor in found.failing],
        "source_bytes": found.source_bytes,
        "target_bytes": found.target_bytes,
        "bits_per_weight": found.bits_per_weight,
        "unused": list(found.unused),
        "fixes": list(found.fixes),
        "overrides": dict(found.overrides),
        "rules": [asdict(use) for use in found.rules],
        "warnings": list(found.warnings),
        "tensors": [asdict(tensor) for tensor in found.tensors],
    }
