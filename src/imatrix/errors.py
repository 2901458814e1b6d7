"""What can go wrong, as types. Everything derives from a built-in exception, so that
`except ValueError` does what a person expects without importing this module."""

from __future__ import annotations

import copyreg
import os
from pathlib import Path
from typing import Any


class ImatrixError(Exception):
    """Base of the errors that this package defines."""

    def __reduce__(self) -> tuple[Any, ...]:
        # By default pickle calls the class with `args` alone, which those with keywords refuse.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ModelError(ImatrixError, ValueError):
    """A model file that cannot be used: not GGUF, truncated, or at odds with its metadata."""


class EngineError(ImatrixError, RuntimeError):
    """The engine failed; the message carries the last error line of its log."""


class EngineDiedError(EngineError):
    """The process that ran the engine is gone: the engine ended it, or the system did.

    What a run of a Collector had collected since its checkpoint went with it. evaluate() has nothing
    to go on from, and quantize() has written nothing.

    Attributes:
        cause: what ended it, such as "SIGABRT: ggml/ggml.c:123: GGML_ASSERT(n > 0) failed".
        log: the last of what it wrote to its standard error, at most 64 KiB.
        cure: what can be done about the cause, the end of the message; "" if that is not known.
        chunk: number of the (first) chunk that it ran, skipped chunks counted; None before one.
        checkpoint: the file to go on from, None where there is none.
    """

    def __init__(self, message: str, *, cause: str, log: str = "", cure: str = "") -> None:
        super().__init__(message)
        self.cause = cause
        self.log = log
        self.cure = cure
        self.chunk: int | None = None
        self.checkpoint: Path | None = None

    def __str__(self) -> str:
        # callers add to the message where the run was, and the cure comes after that
        text = super().__str__()
        return f"{text.rstrip('.')}. {self.cure}." if self.cure else text


class LockedError(ImatrixError, RuntimeError):
    """Another run is writing that file. The message names its process."""


class RowsMissingError(EngineError):
    """A weight that the graph multiplies did not see every row of a chunk."""


class CheckpointError(ImatrixError, ValueError):
    """A checkpoint that a run cannot go on from: of another run, or damaged."""


class NonFiniteError(ImatrixError, ArithmeticError):
    """A NaN or infinite activation reached a weight. What was collected before stays usable.

    weight: name of the weight. channel: input channel. expert: expert or matrix, or None.
    chunk: number of the chunk in the text, from 0, skipped chunks counted; None if unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        weight: str,
        channel: int,
        expert: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(message)
        self.weight = weight
        self.channel = channel
        self.expert = expert
        self.chunk = chunk


class TemplateError(ImatrixError, ValueError):
    """A chat template that cannot be rendered: it has an error, raised one, or took too much.

    Attributes:
        line: the template's line, from 1; None if unknown.
        for_all: whether no chat can be rendered, as there is no such template or it has a syntax
            error; False if it may be the chat.
    """

    def __init__(self, message: str, *, line: int | None = None, for_all: bool = False) -> None:
        super().__init__(message)
        self.line = line
        self.for_all = for_all


class ClusterError(ImatrixError, RuntimeError):
    """The machines of a cluster cannot do the work: none answers, one is not like the others, or
    one after the other ended with the same chunks."""


class FormatError(ValueError):
    """A file is not what its format promises.

    Attributes:
        path: the file, as it was given.
        reason: what is wrong with it and, if there is one, the way out.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"
