"""The engine's quantizer for one model, in this process or in one of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from imatrix.engine import process
from imatrix.native import engine, quantizer

__all__ = ["Choice", "HereQuantizer", "IsolatedQuantizer", "Quantizer", "open_quantizer"]

_log = logging.getLogger("imatrix.engine")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the engine's quantizer chooses the types by, and what it writes beside the tensors.

    Attributes:
        ftype: number of the file type (enum llama_ftype in include/llama.h).
        pure: give every weight the type's own format instead of its mixture.
        quantize_output: False leaves output.weight as it is.
        output_tensor_type, token_embedding_type: numbers of the ggml types of output.weight and
            of the token embeddings; None for what the file type gives them.
        keep_split: write as many parts as the model has.
        tensor_types: (pattern, number of the ggml type), the first that matches counts.
        metadata: keys to write, the last one of a name counts. The engine reads the model by them.
    """

    ftype: int
    pure: bool = False
    quantize_output: bool = True
    output_tensor_type: int | None = None
    token_embedding_type: int | None = None
    keep_split: bool = False
    tensor_types: tuple[tuple[str, int], ...] = ()
    metadata: tuple[tuple[str, bool | int | float | str], ...] = ()


class Quantizer(Protocol):
    """What imatrix.native.quantizer does with a model. Paths are str, as Python names files."""

    @property
    def progress(self) -> tuple[int, int]:
        """Tensors that quantize() has done, and tensors in all; 0 until it knows."""

    def dry_run(
        self,
        src: str,
        choice: Choice,
        *,
        has_matrix: bool,
    ) -> list[tuple[str, str, str]]:
        """Name, type, and type that it would get of every tensor, in the order of quantize().

        Raises:
            RuntimeError: the engine refused.
        """

    def quantize(
        self,
        src: str,
        dst: str,
        choice: Choice,
        *,
        n_threads: int,
        allow_requantize: bool,
        matrix: Sequence[tuple[str, NDArray[np.float32]]],
        unsaid: str,
    ) -> None:
        """Write the quantized model.

        Raises:
            RuntimeError: the engine refused, or cancel() was called.
        """

    def cancel(self) -> None:
        """End quantize(), in another thread, as soon as can be."""

    def tensor_totals(self, path: str) -> tuple[int, int]:
        """Bytes of tensor data and values of a GGUF file.

        Raises:
            RuntimeError: it cannot be read.
        """


class HereQuantizer:
    """The quantizer in this process. cancel() waits for the tensor at hand."""

    def __init__(self) -> None:
        self._watch = quantizer.Watch()

    @property
    def progress(self) -> tuple[int, int]:
        return self._watch.progress

    def dry_run(
        self,
        src: str,
        choice: Choice,
        *,
        has_matrix: bool,
    ) -> list[tuple[str, str, str]]:
        engine.set_log_level()  # so that the binding finds the package's log to hand on to
        return quantizer.dry_run(os.fsencode(src), **asdict(choice), has_matrix=has_matrix)

    def quantize(
        self,
        src: str,
        dst: str,
        choice: Choice,
        *,
        n_threads: int,
        allow_requantize: bool,
        matrix: Sequence[tuple[str, NDArray[np.float32]]],
        unsaid: str,
    ) -> None:
        engine.set_log_level()  # logging.getLogger("imatrix.engine") may want more by now
        quantizer.quantize(
            self._watch,
            os.fsencode(src),
            os.fsencode(dst),
            **asdict(choice),
            n_threads=n_threads,
            allow_requantize=allow_requantize,
            matrix=matrix,
            unsaid=unsaid,
        )

    def cancel(self) -> None:
        self._watch.cancel()

    def tensor_totals(self, path: str) -> tuple[int, int]:
        return quantizer.tensor_totals(os.fsencode(path))


class IsolatedQuantizer:
    """The quantizer in a process of its own, which cancel() ends.

    Raises (from its methods, beside those of Quantizer):
        EngineDiedError: that process is gone. `progress` tells the tensor that it was at.
    """

    def __init__(self, engine: process.Engine) -> None:
        self._engine = engine
        self._progress = (0, 0)

    @property
    def progress(self) -> tuple[int, int]:
        return self._progress

    def dry_run(
        self,
        src: str,
        choice: Choice,
        *,
        has_matrix: bool,
    ) -> list[tuple[str, str, str]]:
        found, _ = self._engine.ask(
            "dry_run",
            src=src,
            options={**asdict(choice), "has_matrix": has_matrix},
            log_level=_log.getEffectiveLevel(),
        )
        return [(name, source, target) for name, source, target in found["tensors"]]

    def quantize(
        self,
        src: str,
        dst: str,
        choice: Choice,
        *,
        n_threads: int,
        allow_requantize: bool,
        matrix: Sequence[tuple[str, NDArray[np.float32]]],
        unsaid: str,
    ) -> None:
        found, _ = self._engine.ask(
            "quantize",
            [importance for _, importance in matrix],
            on_progress=self._take,
            src=src,
            dst=dst,
            names=[name for name, _ in matrix],
            options={
                **asdict(choice),
                "n_threads": n_threads,
                "allow_requantize": allow_requantize,
                "unsaid": unsaid,
            },
            log_level=_log.getEffectiveLevel(),
        )
        self._take(found["progress"])

    def cancel(self) -> None:
        self._engine.close()

    def tensor_totals(self, path: str) -> tuple[int, int]:
        found, _ = self._engine.ask("tensor_totals", path=path)
        n_bytes, n_values = found["totals"]
        return n_bytes, n_values

    def _take(self, progress: list[int]) -> None:
        done, total = progress
        self._progress = (done, total)


@contextmanager
def open_quantizer(isolate: bool) -> Iterator[Quantizer]:
    """The engine's quantizer, here or in a process of its own, which ends with the context."""
    if not isolate:
        yield HereQuantizer()
        return
    engine = process.Engine()
    try:
        yield IsolatedQuantizer(engine)
    finally:
        engine.close()
