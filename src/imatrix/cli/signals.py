"""TODO."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from imatrix.cli.terminal import Terminal

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM came; treated as Ctrl-C is."""


class Stopped(Exception):
    """The command cannot go on. The message is for the user, the status for the shell."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def describe_error(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    return str(error) or type(error).__name__


@contextmanager
def signals(terminal: Terminal) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the run in good order, the second one at once.

    Signals that were ignored stay so, as under nohup.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if seen:
            # files are replaced in one step, so that nothing half written is left in their place
            terminal.err.show_cursor(True)
            os._exit(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
        seen.append(number)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    taken = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler in (signal.default_int_handler, signal.SIG_DFL):
            taken[number] = handler
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
