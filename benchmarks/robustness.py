"""Kills `imatrix collect` over and over and sees that nothing is lost, torn or counted twice.

    python benchmarks/robustness.py --kills 1000 --steps 0

Two ways to die, both by SIGKILL, which no program can catch:

- at random moments, again and again until the run is through (--kills in all);
- at every call that opens, writes, syncs, renames or removes a file, one run a call (--steps: how
  many of them, spread evenly; 0 for all).

After every death each file that is there must be whole: OUT a matrix of some of the chunks,
OUT.checkpoint a checkpoint. And in the end OUT must be, to the bit, the file of a run that nobody
killed. A process that is killed does not take with it what the system holds in memory for it:
power cuts are not tried here (see imatrix.atomic for what is done about them).

Runs are forks of this process, which imports everything once and never starts the engine itself.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import imatrix
from imatrix import cli, collector
from imatrix.formats import checkpoint as checkpoint_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from random_model import make_random_model

N_CHUNKS = 12
CALLS = {
    "open", "write", "pwrite", "flush", "truncate", "ftruncate", "fsync", "close", "chmod",
    "rename", "replace", "unlink", "remove", "flock",
}  # fmt: skip


class Failed(Exception):
    """What must not happen has happened."""


class Ground:
    """A model, a text, and folders to run in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model.gguf"
        self.text = folder / "text.txt"
        text = resources.files("imatrix").joinpath("data/calibration.txt").read_text("utf-8")
        self.text.write_text(text[:6000], encoding="utf-8")
        make_random_model(self.model)
        self.work = folder / "work"
        self.clean()
        started = time.monotonic()
        if wait(self.start()) != 0:
            raise Failed(f"the run that nobody kills failed: {self.log()}")
        self.seconds = time.monotonic() - started
        self.expected = (self.work / "out.gguf").read_bytes()
        self.clean()

    def clean(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def start(self, prepare: Callable[[], None] = lambda: None) -> int:
        """Start a run, and give its process id."""
        out = self.work / "out.gguf"
        pid = os.fork()
        if pid:
            return pid
        status = 99
        try:
            log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 2)
            # a process of its own a run, and no part of what is tried here
            collector.rehearse_in_child = lambda *_: None
            prepare()
            argv = f"collect -c 64 -b 64 -t 1 --mtp -ofreq 1 --chunks {N_CHUNKS}".split()
            argv += ["-m", str(self.model), "-f", str(self.text), "-o", str(out)]
            status = cli.main(argv)
        finally:
            os._exit(status)

    def log(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    def check(self) -> None:
        """Every file is whole, whatever happened."""
        out, checkpoint = self.work / "out.gguf", self.work / "out.gguf.checkpoint"
        if out.exists() and not 1 <= imatrix.ImportanceMatrix.load(out).chunk_count <= N_CHUNKS:
            raise Failed(f"{out} is no part of the run")
        if checkpoint.exists() and not 1 <= checkpoint_file.read(checkpoint).done <= N_CHUNKS:
            raise Failed(f"{checkpoint} is no part of the run")
        if out.exists() and not checkpoint.exists() and out.read_bytes() != self.expected:
            raise Failed(f"{out} is not the whole run, and there is no checkpoint to go on from")

    def check_end(self) -> None:
        """The file is the one it should be, and it is alone."""
        if (self.work / "out.gguf").read_bytes() != self.expected:
            raise Failed("the file differs from that of a run that was not killed")
        left = sorted(path.name for path in self.work.iterdir())
        if left != ["out.gguf"]:
            raise Failed(f"files are left over: {left}")


def wait(pid: int) -> int:
    """The exit status of a child, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_random(ground: Ground, kills: int, rng: random.Random) -> int:
    """Kill until it has been done so often; gives the number of whole runs in between."""
    done = runs = 0
    while done < kills:
        ground.clean()
        for _ in range(kills - done):
            pid = ground.start()
            time.sleep(rng.uniform(0, ground.seconds))
            os.kill(pid, signal.SIGKILL)
            if (status := wait(pid)) == 0:
                break
            if status != -signal.SIGKILL:
                raise Failed(f"exit status {status}: {ground.log()}")
            done += 1
            ground.check()
        else:
            if (status := wait(ground.start())) != 0:
                raise Failed(f"exit status {status}: {ground.log()}")
        ground.check_end()
        runs += 1
    return runs


def kill_at_call(number: int, folder: Path, count_into: int | None = None) -> Callable[[], None]:
    """Makes a run die at its number-th call of CALLS; or counts them all, into a descriptor."""
    seen = 0

    def look(_frame: object, event: str, function: Any) -> None:
        nonlocal seen
        if event != "c_call" or function.__name__ not in CALLS:
            return
        owner = getattr(function, "__self__", None)
        name = getattr(owner, "name", None)
        if isinstance(name, (str, int)) and str(folder) not in str(name):
            return  # a stream: the progress that is told
        seen += 1
        if count_into is not None:
            os.lseek(count_into, 0, os.SEEK_SET)
            os.write(count_into, str(seen).encode())
        elif seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.setprofile(look)


def kill_at_calls(ground: Ground, steps: int) -> tuple[int, int]:
    """One run a call; gives how many calls were tried, and how many there are."""
    ground.clean()
    tally = os.open(ground.folder / "calls", os.O_RDWR | os.O_CREAT)
    wait(ground.start(kill_at_call(0, ground.work, tally)))
    n_calls = int(os.pread(tally, 32, 0))
    ground.check_end()
    steps = min(steps or n_calls, n_calls)
    for step in range(steps):
        number = 1 + step * n_calls // steps
        ground.clean()
        if (status := wait(ground.start(kill_at_call(number, ground.work)))) != -signal.SIGKILL:
            raise Failed(f"call {number} did not come; exit status {status}: {ground.log()}")
        ground.check()
        if (status := wait(ground.start())) != 0:
            raise Failed(f"after a death at call {number}: exit status {status}: {ground.log()}")
        ground.check_end()
    return steps, n_calls


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill imatrix collect, and see what is left.")
    parser.add_argument("--kills", type=int, default=1000, help="at random (default: 1000)")
    parser.add_argument("--steps", type=int, default=0, help="at calls (default: 0, each of them)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            ground = Ground(Path(folder))
            steps, n_calls = kill_at_calls(ground, args.steps)
            print(f"killed at {steps} of {n_calls} file calls: to the bit", flush=True)
            runs = kill_at_random(ground, args.kills, random.Random(args.seed))
            print(f"killed {args.kills} times in {runs} runs: to the bit", flush=True)
        except Failed as error:
            print(f"FAILED: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
