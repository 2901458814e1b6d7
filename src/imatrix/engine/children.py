"""Starting the engine's child process (imatrix.engine.child), and what it leaves when it ends."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from imatrix.engine import frames
from imatrix.errors import ModelError
from imatrix.files import processes

__all__ = ["ABORTED", "SECONDS", "last_words", "run_child", "run_on_model", "start_child"]

# exit codes of a process that ended itself, if the system has no signals: abort(), and the status
# codes of Windows for a fast fail, an access violation and a division by zero
ABORTED = frozenset({3, 0xC0000409, 0xC0000005, 0xC0000094})

# Far more than a model of a thousand gigabytes takes: a header is read, and graphs are built.
SECONDS = 600

# no card is needed to build a graph, and none may be taken from whoever uses it
_NO_CARDS = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "",
}
_ASSERTION = re.compile(r"\S*?([\w-]+/[\w-]+\.(?:cpp|c|h|cu|m)):(\d+): (.*)")
_EXCEPTION = re.compile(r"\s*what\(\):\s*(.*)")


def start_child(*, cards: bool = True) -> subprocess.Popen[bytes]:
    """Start a process that reads one request from its standard input, and does it.

    Args:
        cards: whether it may see graphics cards.

    Raises:
        OSError: it cannot be started.
    """
    # ggml_abort would start a debugger for a backtrace if there is one
    environment = {"GGML_NO_BACKTRACE": "1", **({} if cards else _NO_CARDS)}
    return processes.start("imatrix.engine.child", environment=environment)


def run_child(
    request: dict[str, Any], *, cards: bool = False, timeout: float = SECONDS
) -> tuple[int, str, str]:
    """Have a child process do something, and wait for its end.

    Args:
        request: what to do ("do"), and with what: see imatrix.engine.child.
        cards: whether it may see graphics cards.
        timeout: seconds that it may take.

    Returns:
        Its exit status, negative for a signal, and its standard output and standard error.

    Raises:
        subprocess.TimeoutExpired: it took longer.
        OSError: it cannot be started.
    """
    with start_child(cards=cards) as child:
        # the input stays open meanwhile: its end would end the child
        requests, child.stdin = child.stdin, None
        assert requests is not None
        try:
            with contextlib.suppress(OSError):  # it has ended already
                frames.send(requests, request)
            stdout, stderr = child.communicate(timeout=timeout)
        except BaseException:
            child.kill()
            raise
        finally:
            with contextlib.suppress(OSError):  # what could not be sent
                requests.close()

    def text(output: bytes) -> str:
        return output.decode("utf-8", "surrogateescape")  # a path may be any bytes

    return child.returncode, text(stdout), text(stderr)


def run_on_model(
    request: dict[str, Any], path: Path, *, cards: bool = False
) -> tuple[int, str, str]:
    """As run_child(), for what only a model can end.

    Args:
        path: the model, for the message.

    Raises:
        ModelError: the engine ended the child, or the child came to no end.
    """
    try:
        status, stdout, stderr = run_child(request, cards=cards)
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
