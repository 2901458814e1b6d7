"""Runs the engine's own programs, and the command line in this process: for all tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import imatrix
from helpers import engine_tools
from helpers.forge import ModelSpec

# The text that comes with the package.
TEXT = resources.files("imatrix").joinpath("data/calibration.txt").read_text(encoding="utf-8")
EngineTool = Callable[[str], Path]
Forged = Callable[..., ModelSpec]
RpcServer = Callable[[int], str]

# Hides the GPUs of a build that has their backends from a child process: the engine multiplies a
# large batch on a GPU even if no layer is there.
NO_GPU = {"GGML_VK_VISIBLE_DEVICES": "", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}


def until_printed(line: str, run: Callable[[], str]) -> str:
    """Run one of the engine's programs until its output has `line`: if run_tool cannot make it wait
    (engine_tools.environment), it may exit before its logger's thread has written everything
    (common/log.cpp), above all on a busy machine."""
    for _ in range(40):
        log = run()
        if line in log:
            break
    return log


def run_tool(*command: str | os.PathLike[str], timeout: float = 120, ok: bool = True) -> str:
    """Run a program; returns what it wrote, stdout then stderr.

    ok: whether it has to succeed (True) or has to fail by itself (False); a crash is neither.
    """
    done = subprocess.run(
        [os.fspath(part) for part in command],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
        env=engine_tools.environment(),
    )
    log = done.stdout + done.stderr
    assert done.returncode >= 0, f"{command} died of signal {-done.returncode}:\n{log}"
    assert (done.returncode == 0) == ok, f"{command} exited with {done.returncode}:\n{log}"
    return log


def trained_models() -> list[Path]:
    """The models with a trained head that ship with the package."""
    return sorted((Path(imatrix.__file__).parent / "data").glob("*.gguf"))


@dataclass
class Done:
    """A command that has ended: its status and its output."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]
