"""Runs of a Collector that tests begin, stop, and compare; models with NaN in their weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from helpers.forge import ModelSpec
from imatrix import ImportanceMatrix
from imatrix.text.progress import Progress

N_CTX = 32
SEED = 2


def token_chunks(spec: ModelSpec, n: int, n_ctx: int = N_CTX, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, spec.hparams.n_vocab, (n, n_ctx)).tolist()


def assert_same_data(a: ImportanceMatrix, b: ImportanceMatrix) -> None:
    assert dict(a) == dict(b)
    assert a.chunk_count == b.chunk_count


# --- activations that are not numbers ------------------------------------------------------------


def poisoned(spec: ModelSpec, folder: Path, name: str, *at: int, value: float = np.nan) -> Path:
    """A copy of the model with one row of a tensor made NaN."""
    path = folder / "poisoned.gguf"
    shutil.copy(spec.path, path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path, "r+").tensors}
    tensors[name].data[at] = value
    tensors[name].data.flush()
    return path


class Enough(Exception):
    """Ends a run from its progress function."""


def stop_at(chunks: int) -> Any:
    def stop(at: Progress) -> None:
        if at.chunks >= chunks:
            raise Enough

    return stop


def saved(matrix: ImportanceMatrix, folder: Path) -> bytes:
    """The bytes of the file that would be written."""
    path = folder / "saved.gguf"
    matrix.save(path)
    return path.read_bytes()
