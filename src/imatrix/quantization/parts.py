"""The parts that a quantized model gets if it keeps the split of its source."""

from __future__ import annotations

import os
from pathlib import Path

from imatrix.errors import ModelError
from imatrix.model.header import EnginePart, ModelFile
from imatrix.model.parts import named_parts

__all__ = ["kept_parts"]


def kept_parts(dst: str | os.PathLike[str], model: ModelFile) -> list[Path]:
    """The files that are written, by the names that llama-quantize gives them (--keep-split).

    A tensor stays in its part. Parts behind the last one with a tensor are left out, as the engine
    does (llama_model_quantize_impl in src/llama-quant.cpp), and a model in one file becomes a part
    1 of 1.

    Raises:
        ValueError: `dst` is the name of a part.
        ModelError: a part has no tensor, which the engine cannot write.
    """
    filled = [bool(EnginePart.read(path).shapes) for path, _ in model.parts]
    while len(filled) > 1 and not filled[-1]:
        filled.pop()
    for (path, _), full in list(zip(model.parts, filled, strict=False))[1:]:
        if not full:  # the first one has the metadata
            raise ModelError(
                f"{path}: it has no tensors, and the engine writes no such part; leave out "
                "keep_split, so that the result is one file"
            )
    return named_parts(dst, len(filled))
