"""A dress rehearsal in a process of its own: would the engine survive this model?

The engine asserts a great deal while it reads a model's metadata and builds its graphs, and an
assertion ends the process, with hours of somebody else's work in it. So the graphs are built once
in a child process first, from the header alone (llama_model_params.no_alloc: no weights are read
and no memory is taken for them). What ends the child is refused in the parent, in the engine's
own last words.

It cannot see what would end the process only while a graph runs.
"""

from __future__ import annotations

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
    child = in_child(__name__, work, mtp_model or model)
    if child.returncode != 0:
        _log.warning("no rehearsal of %s: %s", model, child.stderr.strip()[-500:])


def in_child(
    module: str, work: dict[str, Any], path: Path, *, cards: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a module with `work` as its argument, in JSON.

    Args:
        path: the model, for the message.
        cards: whether it may see graphics cards.

    Raises:
        ModelError: the engine ended the child.
    """
    child = subprocess.run(
        [sys.executable, "-m", module, json.dumps(work)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        # ggml_abort would start a debugger for a backtrace where there is one
        env={**os.environ, **({} if cards else _NO_CARDS), "GGML_NO_BACKTRACE": "1"},
    )
    if child.returncode >= 0 and child.returncode not in _ABORTED:
        return child
    raise ModelError(
        f"{path}: the engine ends the process on this model while it builds the graphs: "
        f"{_last_words(child.stderr, child.returncode)}. Its metadata and its tensors do not go "
        "together; convert it again, or report it with the output of `imatrix --version`."
    )


def _last_words(stderr: str, status: int) -> str:
    for line in reversed(stderr.splitlines()):
        if found := _ASSERTION.match(line.strip()):
            return f"{found[1]}:{found[2]}: {found[3]}"
    if status < 0:
        try:
            return signal.Signals(-status).name
        except ValueError:
            pass
    return f"status {status}"


def _main() -> None:
    from imatrix import _session

    work = json.loads(sys.argv[1])
    settings = work["settings"]

    def load(path: str, mtp: bool) -> _session.Model:
        return _session.Model(
            path, mtp=mtp, n_gpu_layers=0, use_mmap=False, check_tensors=False, no_alloc=True
        )

    try:
        separate = work["mtp_model"]
        model = load(work["model"], settings["mtp"] and separate is None)
        head = None
        if settings["mtp"]:
            head = model if separate is None else load(separate, True)
        _session.Session(model, head).open(**settings)
    except Exception:
        # not what is looked for here: the run itself will meet it, and raise it
        return


if __name__ == "__main__":
    _main()
