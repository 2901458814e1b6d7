"""The engine's log, the package's own, and Python's warnings, as plain lines on stderr."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from imatrix.cli.terminal import Terminal
from imatrix.words import printable

__all__ = ["show_logs"]


@contextmanager
def show_logs(terminal: Terminal) -> Iterator[None]:
    """Show Python's warnings and the engine's log as plain lines, until the block ends."""

    def show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
        terminal.warn(str(message))

    engine, engine_handler = logging.getLogger("imatrix.engine"), _EngineLog(terminal)
    package, package_handler = logging.getLogger("imatrix"), _PackageLog(terminal)
    level, propagate = engine.level, engine.propagate
    engine.addHandler(engine_handler)
    package.addHandler(package_handler)
    engine.setLevel(logging.INFO if terminal.verbose else logging.WARNING)
    engine.propagate = False
    # whatever handler a library has for what it logs
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_printable_records(factory))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show_warning
            yield
    finally:
        package.removeHandler(package_handler)
        engine.removeHandler(engine_handler)
        engine.setLevel(level)
        engine.propagate = propagate
        logging.setLogRecordFactory(factory)


# Warnings of the engine that tell the user nothing. The head's tensors are unused whenever the trunk
# runs alone. Contexts get somewhat more room than chunks need, in multiples of 256 (llama_context),
# which may be more than the model was trained on: Collector warns if the chunks themselves are
# longer than that. Overrides are what the user asked for (llama-quant.cpp). With tensors on the CPU
# the engine recommends a flag of its own; here it is --no-mmap (docs/backends.md).
_KNOWN = (
    "unused tensor",
    "n_ctx is not divisible by n_seq_max",
    "possible training context overflow",
    "applying manual override",
    "tensor overrides to CPU are used with mmap",
)


class _EngineLog(logging.Handler):
    """The engine's log on stderr.

    Unless the terminal is verbose, it shows only warnings that are news. Errors are left out: they
    come back as exceptions.
    """

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if self._terminal.verbose:
            self._terminal.note(line)
        elif record.levelno == logging.WARNING and not any(known in line for known in _KNOWN):
            self._terminal.warn(f"engine: {line.strip()}")


class _PackageLog(logging.Handler):
    """The warnings of the package itself, on stderr."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.warn(record.getMessage())


def _printable_records(make: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    """A maker of log records of which nothing acts on the terminal."""

    def made(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        try:
            record.msg, record.args = printable(record.getMessage(), "\t"), None
        except Exception:
            return record  # its handler says that the message and its arguments do not fit
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            record.exc_text = printable(trace, "\n\t")
        return record

    return made
