"""How this package starts a process of its own, whatever runs in it: the command, the signals, and
how the process learns that nobody waits for it any more.

The engine's child is started here (imatrix.engine.child), and the one that renders a chat template
(imatrix.text.template_child).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["start"]

# `python -m` would look for modules in the current folder first, where anybody's files may be.
# Signals are for the process that the child works for, though some are sent to all there are (a
# service that is stopped): that process ends the child in good order, or the child ends with it.
_START = """\
import sys
sys.path[:] = filter(None, sys.path)
import json, runpy, signal
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
if hasattr(signal, "pthread_sigmask"):
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # held back until here
paths, program = sys.argv[1:]
sys.path[:] = json.loads(paths)
run = runpy.run_path if program.endswith(".py") else runpy.run_module
run(program, run_name="__main__")
"""


def start(
    program: str | Path,
    *,
    environment: Mapping[str, str] | None = None,
    stderr: int = subprocess.PIPE,
    bufsize: int = -1,
) -> subprocess.Popen[bytes]:
    """Start a program of ours, by this interpreter and with its module paths.

    Pipes lead to the program's standard input and from its standard output. SIGINT, SIGTERM and
    SIGHUP do not reach it, nor does Ctrl-C at the terminal: the caller kills it. The program should
    end if its standard input does: the caller may be gone.

    Args:
        program: name of a module, or path of a Python file that is run without the package.
        environment: variables in addition to those of this process.
        stderr: where its standard error goes, as subprocess.Popen takes it.
        bufsize: of the pipes, as subprocess.Popen takes it.

    Raises:
        OSError: it cannot be started.
    """
    paths = [path for path in sys.path if path]
    command = [sys.executable, "-c", _START, json.dumps(paths), os.fspath(program)]
    held = hasattr(signal, "pthread_sigmask")
    if held:  # the child inherits this until it ignores them
        mask = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        )
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            bufsize=bufsize,
            env={**os.environ, **(environment or {})},
            start_new_session=os.name == "posix",
        )
    finally:
        if held:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
