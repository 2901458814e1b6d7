"""A dress rehearsal in a process of its own: would the engine survive this model?

The engine asserts a great deal while it reads a model's metadata and builds its graphs, and an
assertion ends the process, with hours of somebody else's work in it. So the graphs are built once
in a child process first, from the header alone (llama_model_params.no_alloc: no weights are read
and no memory is taken for them). What ends the child is refused in the parent, in the engine's
own last words.

It cannot see what would end the process only while a graph runs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from imatrix.errors import ModelError

_log = logging.getLogger("imatrix")

# exit codes of a process that ended itself, where there are no signals: abort(), and the status
# codes of Windows for a fast fail, an access violation and a division by zero
_ABORTED = frozenset({3, 0xC0000409, 0xC0000005, 0xC0000094})
# no card is needed to build a graph, and none may be taken from whoever uses it
_NO_CARDS = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "",
}
_ASSERTION = re.compile(r"\S*?([\w-]+/[\w-]+\.(?:cpp|c|h|cu|m)):(\d+): (.*)")


def module_command(module: str, *argv: str) -> list[str]:
    """Runs a module of ours as a program, by this interpreter.

    `python -m` would look for modules in the current folder first, where anybody's files may be.
    """
    start = "import sys; sys.path[:] = filter(None, sys.path); import runpy; "
    start += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=False)"
    return [sys.executable, "-c", start, *argv]


def rehearse(model: Path, mtp_model: Path | None, settings: dict[str, Any]) -> None:
    """Build the graphs of a run in a child process.

    Args:
        model: the trunk's file.
        mtp_model: the head's own file, None where the head is bundled or not wanted.
        settings: what _session.Session.open takes.

    Raises:
        ModelError: the engine ended the child; the message has its assertion or the signal.
    """
    if not sys.executable:
        _log.warning("no rehearsal of %s: this interpreter does not know its own executable", model)
        return
    work = {"model": str(model), "mtp_model": mtp_model and str(mtp_model), "settings": settings}
    child = subprocess.run(
        module_command("imatrix._rehearsal", json.dumps(work)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # ggml_abort would start a debugger for a backtrace where there is one
        env={**os.environ, **_NO_CARDS, "GGML_NO_BACKTRACE": "1"},
    )
    if child.returncode >= 0 and child.returncode not in _ABORTED:
        if child.returncode != 0:
            _log.warning("no rehearsal of %s: %s", model, child.stderr.strip()[-500:])
        return
    raise refusal(mtp_model or model, last_words(child.stderr, child.returncode))


def refusal(path: Path | str, cause: str) -> ModelError:
    """The error for a model that ended a process which only built its graphs."""
    return ModelError(
        f"{path}: the engine ends the process on this model while it builds the graphs: {cause}. "
        "Its metadata and its tensors do not go together; convert it again, or report it with the "
        "output of `imatrix --version`."
    )


def last_words(stderr: str, status: int) -> str:
    """What ended a process: the engine's assertion if there is one, else the signal."""
    name = f"status {status}"
    if status < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-status).name
    for line in reversed(stderr.splitlines()):
        if found := _ASSERTION.match(line.strip()):
            return f"{found[1]}:{found[2]}: {found[3]}"
    return name


def build(model: str, mtp_model: str | None, settings: dict[str, Any]) -> None:
    """Build the graphs of a run, from the header alone, in this process."""
    from imatrix import _session

    def load(path: str, mtp: bool) -> _session.Model:
        return _session.Model(
            path, mtp=mtp, n_gpu_layers=0, use_mmap=False, check_tensors=False, no_alloc=True
        )

    # what raises is not what is looked for here: the run itself will meet it, and raise it
    with contextlib.suppress(Exception):
        trunk = load(model, settings["mtp"] and mtp_model is None)
        head = None
        if settings["mtp"]:
            head = trunk if mtp_model is None else load(mtp_model, True)
        _session.Session(trunk, head).open(**settings)


if __name__ == "__main__":
    work = json.loads(sys.argv[1])
    build(work["model"], work["mtp_model"], work["settings"])
