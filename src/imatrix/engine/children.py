"""TODO."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from imatrix.errors import ModelError

# exit codes of a process that ended itself, where there are no signals: abort(), and the status
# codes of Windows for a fast fail, an access violation and a division by zero
ABORTED = frozenset({3, 0xC0000409, 0xC0000005, 0xC0000094})


# no card is needed to build a graph, and none may be taken from whoever uses it
_NO_CARDS = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "",
}
_ASSERTION = re.compile(r"\S*?([\w-]+/[\w-]+\.(?:cpp|c|h|cu|m)):(\d+): (.*)")
_EXCEPTION = re.compile(r"\s*what\(\):\s*(.*)")
# Far more than a model of a thousand gigabytes takes: a header is read, and graphs are built.
SECONDS = 600


def module_command(module: str, *argv: str) -> list[str]:
    """Runs a module of ours as a program, by this interpreter.

    `python -m` would look for modules in the current folder first, where anybody's files may be.
    """
    start = "import sys; sys.path[:] = filter(None, sys.path); import runpy; "
    start += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=False)"
    return [sys.executable, "-c", start, *argv]


def in_child(
    module: str, work: dict[str, Any], path: Path, *, cards: bool = False
) -> tuple[int, str, str]:
    """Run a module with `work` as its argument, in JSON.

    Args:
        path: the model, for the message.
        cards: whether it may see graphics cards.

    Returns:
        Its exit status, standard output and standard error.

    Raises:
        ModelError: the engine ended the child, or it came to no end.
    """
    try:
        status, stdout, stderr = child_process(work, module, cards=cards)
    except subprocess.TimeoutExpired:
        words = f"it came to no end within {SECONDS} seconds"
    else:
        if status >= 0 and status not in ABORTED:
            return status, stdout, stderr
        words = last_words(stderr, status)
    raise ModelError(
        f"{path}: the engine ends the process on this model while it builds the graphs: {words}. "
        "Its metadata and its tensors do not go together; convert it again, or report it with the "
        "output of `imatrix --version`."
    )


def child_process(
    work: Any,
    module: str = "imatrix.engine.child",
    *,
    cards: bool = False,
    timeout: float = SECONDS,
) -> tuple[int, str, str]:
    """A module of ours in a process of its own: its exit status, negative for a signal, and its
    output."""
    child = subprocess.run(
        module_command(module, json.dumps(work)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",  # a path may be any bytes
        timeout=timeout,
        # ggml_abort would start a debugger for a backtrace where there is one
        env={
            **os.environ,
            **({} if cards else _NO_CARDS),
            "GGML_NO_BACKTRACE": "1",
            "PYTHONIOENCODING": "utf-8:surrogateescape",
        },
    )
    return child.returncode, child.stdout, child.stderr


def last_words(stderr: str, status: int) -> str:
    """What ended a process: the engine's assertion if there is one, else the signal."""
    for line in reversed(stderr.splitlines()):
        if found := _ASSERTION.match(line.strip()):
            return f"{found[1]}:{found[2]}: {found[3]}"
        if found := _EXCEPTION.match(line):
            return found[1]
    if status < 0:
        try:
            return signal.Signals(-status).name
        except ValueError:
            pass
    return f"status {status}"
