"""A run in a process of its own, so that somebody is left to tell what ended it.

The engine ends its process on what it holds for impossible (ggml_abort), and the system ends one
that takes too much memory. Neither can be caught in that process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from imatrix._terminal import Terminal, duration
from imatrix.formats import FormatError
from imatrix.formats.checkpoint import read

__all__ = ["isolated"]


def isolated(argv: Sequence[str], checkpoint: Path, terminal: Terminal) -> int:
    """Run `imatrix` with these arguments in a child process.

    Args:
        argv: without the program's name.
        checkpoint: what the child keeps.

    Returns:
        The exit status of the child; 1 if a signal killed it, which is told on the terminal.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "imatrix", *argv],
        # ggml_abort would start a debugger for a backtrace where there is one
        env={"GGML_NO_BACKTRACE": "1", **os.environ},
    ) as child:
        status = _outlived(child)
    if status >= 0:
        return status
    if -status == signal.SIGKILL:
        cause = "killed (SIGKILL), as the system does where memory runs out"
    else:
        cause = f"ended by {signal.Signals(-status).name}; what the engine said is above"
    terminal.error(f"the run was {cause}. {_what_is_left(checkpoint)}")
    return 1


def _outlived(child: subprocess.Popen[bytes]) -> int:
    """Wait for the child; it gets the signals that are meant for both."""
    if threading.current_thread() is not threading.main_thread():
        return child.wait()
    before = {
        # the terminal sends this one to both, so that it must only not end us first
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: child.terminate()),
    }
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _what_is_left(checkpoint: Path) -> str:
    try:
        found = read(checkpoint)
        age = max(0.0, time.time() - checkpoint.stat().st_mtime)
    except (OSError, FormatError):
        return "It left no checkpoint: nothing is there to go on from."
    return (
        f"{checkpoint} holds {found.done} chunk(s) and is {duration(age)} old: run the same "
        "command again to go on from it. If it ends at the same place again, give the chunks "
        "before it and after it as two runs (--chunk, --chunks) and combine them with --in-file."
    )
