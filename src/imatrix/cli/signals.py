"""SIGINT and SIGTERM as exceptions, so that a run can save what it has before it ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from imatrix.cli.status import INTERRUPTED, TERMINATED
from imatrix.cli.terminal import Terminal

__all__ = ["Terminated", "catch_signals"]


class Terminated(KeyboardInterrupt):
    """SIGTERM came; it is treated as Ctrl-C is."""


@contextmanager
def catch_signals(terminal: Terminal) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the run in good order, the second one at once.

    A signal that was ignored stays ignored, as under nohup.
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
