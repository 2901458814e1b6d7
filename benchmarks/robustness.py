"""Kills `imatrix collect` again and again, makes its files fail, and checks that nothing is lost,
torn or counted twice.

    python benchmarks/robustness.py --kills 1000 --isolated 100 --write

- calls: a run dies by SIGKILL, which no program can catch, before every system call that opens,
  writes, syncs, renames, removes, changes or locks a file in the output's folder, and after half
  of every write; each call gets a run of its own (--steps: how many calls, spread evenly; 0 for all,
  -1 for none). This is done with a plain run, and with one whose output is its --in-file too.
- errors: every such call fails, once or from then on, with ENOSPC, EIO or EROFS.
- moments: a run is killed at random moments until it is complete (--kills in all).
- isolated: the same with the engine in a process of its own; the run's process, the engine's, or
  both are killed (--isolated in all).

After every death each file that is there must be whole: OUT is a matrix of some of the chunks, and
OUT.checkpoint a checkpoint. In the end OUT must be the same, to the bit, as that of a run that was not
killed, and no other file may be left. Killing a process does not lose what the system holds in memory
for it, so power cuts are not tried here (see imatrix.files.atomic for how the package handles them).

Runs are forks of this process, which imports everything once and never starts the engine itself.
"""

from __future__ import annotations

import argparse
import datetime
import errno
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import faults  # noqa: E402
from helpers.random_model import make_random_model  # noqa: E402

import imatrix  # noqa: E402
from imatrix import cli  # noqa: E402
from imatrix.engine import models  # noqa: E402
from imatrix.formats import checkpoint as checkpoint_file  # noqa: E402

LONG, SHORT = 12, 2  # chunks of a run that is killed at random moments, or at each call
ERRORS_OF = {
    faults.OPEN: (errno.ENOSPC, errno.EROFS),
    faults.WRITE: (errno.ENOSPC, errno.EIO),
    faults.SYNC: (errno.ENOSPC, errno.EIO),
}
RESULTS = ROOT / "benchmarks" / "results" / "robustness.md"


class Failed(Exception):
    """Something happened that must not happen."""


class Ground:
    """A model, a text, and a folder to run in.

    n_chunks: chunks of a run, which saves after each.
    twice: the output is an input too, and has data.
    """

    def __init__(self, folder: Path, n_chunks: int, *, twice: bool = False) -> None:
        folder.mkdir()
        self.folder = folder
        self.n_chunks = n_chunks
        self.twice = twice
        self.model = folder / "model.gguf"
        self.text = folder / "text.txt"
        self.tally = faults.Tally()
        text = resources.files("imatrix").joinpath("data/calibration.txt").read_text("utf-8")
        self.text.write_text(text[:6000], encoding="utf-8")
        make_random_model(self.model)
        self.work = folder / "work"
        self.earlier = folder / "earlier.gguf"
        self.out = self.work / "out.gguf"
        self.checkpoint = self.work / "out.gguf.checkpoint"
        if twice:
            self.twice = False
            self.clean()
            self.run()
            shutil.copy(self.out, self.earlier)
            self.twice = True
        self.clean()
        started = time.monotonic()
        self.run()
        self.seconds = time.monotonic() - started
        self.expected = self.out.read_bytes()

    def clean(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        if self.twice:
            shutil.copy(self.earlier, self.out)

    def start(self, prepare: Callable[[], None] = lambda: None, *, isolate: bool = False) -> int:
        """Start a run, and give its process id."""
        pid = os.fork()
        if pid:
            return pid
        status = 99
        try:
            log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 2)
            # a rehearsal would start a process for each run, and is not what is tried here
            models.rehearse_in_child = lambda *_: None
            prepare()
            argv = f"collect -c 64 -b 64 -t 1 --mtp -ofreq 1 --chunks {self.n_chunks}".split()
            argv += ["-m", str(self.model), "-f", str(self.text), "-o", str(self.out)]
            argv += ["--in-file", str(self.out)] if self.twice else []
            argv += ["--isolate" if isolate else "--no-isolate"]
            status = cli.main(argv)
        finally:
            os._exit(status)

    def run(self, *, isolate: bool = False) -> None:
        """Run, and check that the run succeeds."""
        if (status := wait(self.start(isolate=isolate))) != 0:
            raise Failed(f"exit status {status}: {self.log()}")

    def log(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    def check(self) -> None:
        """Check that every file is whole, whatever happened."""
        out, checkpoint = self.out, self.checkpoint
        limit = self.n_chunks * (2 if self.twice else 1)
        if out.exists() and not 1 <= imatrix.ImportanceMatrix.load(out).chunk_count <= limit:
            raise Failed(f"{out} is no part of the run")
        if checkpoint.exists() and not 1 <= checkpoint_file.read(checkpoint).done <= self.n_chunks:
            raise Failed(f"{checkpoint} is no part of the run")
        if self.twice:
            if out.read_bytes() not in (self.earlier.read_bytes(), self.expected):
                raise Failed(f"{out} is neither the old one nor the new one")
        elif out.exists() and not checkpoint.exists() and out.read_bytes() != self.expected:
            raise Failed(f"{out} is not the whole run, and there is no checkpoint to go on from")

    def finish(self, *, isolate: bool = False) -> None:
        """Check that the same command gives the right file, and leaves no other."""
        # if the output is an input too and is done, the same command would add to it once more
        if not (self.twice and not self.checkpoint.exists() and self.is_done()):
            self.run(isolate=isolate)
        self.check_end()

    def is_done(self) -> bool:
        return self.out.exists() and self.out.read_bytes() == self.expected

    def check_end(self) -> None:
        if not self.is_done():
            raise Failed("the file differs from that of a run that was not killed")
        # a killed process may leave files, but the next run takes them over
        left = {path.name for path in self.work.iterdir()} - {"out.gguf"}
        if not self.twice and left:
            raise Failed(f"files are left over: {sorted(left)}")


def wait(pid: int) -> int:
    """The exit status of a child, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watched(ground: Ground, action: Callable[[], None] = lambda: None) -> Callable[[], None]:
    def prepare() -> None:
        ground.tally.clear()
        faults.watch(ground.work, ground.tally)
        action()

    return prepare


def calls_of(ground: Ground) -> list[int]:
    """The kinds of all calls of an undisturbed run."""
    ground.clean()
    ground.tally.clear()
    if wait(ground.start(watched(ground))) != 0:
        raise Failed(ground.log())
    ground.check_end()
    return ground.tally.kinds


def kill_at_calls(ground: Ground, steps: int) -> str:
    """A run for each call, killed at that call."""
    kinds = calls_of(ground)
    summary = str(ground.tally)
    deaths = [(number, faults.KILL) for number in range(1, len(kinds) + 1)]
    deaths += [(n, faults.TEAR) for n, kind in enumerate(kinds, 1) if kind == faults.WRITE]
    tried = spread(deaths, steps)
    for number, action in tried:
        ground.clean()
        prepare = watched(ground, lambda number=number, action=action: faults.arm(number, action))
        if (status := wait(ground.start(prepare))) != -signal.SIGKILL:
            raise Failed(f"call {number} did not come; exit status {status}: {ground.log()}")
        try:
            ground.check()
            ground.finish()
        except Failed as error:
            raise Failed(f"after a death at call {number} ({action}): {error}") from None
    return f"{len(tried)} of {len(deaths)} deaths at {len(kinds)} calls ({summary})"


def fail_at_calls(ground: Ground, steps: int) -> str:
    """A run for each call, each error, and once or for the rest of the run."""
    kinds = calls_of(ground)
    cases = [
        (number, action, error)
        for number, kind in enumerate(kinds, 1)
        for action in (faults.FAIL, faults.FAIL_ON)
        for error in ERRORS_OF.get(kind, (errno.EIO,))
    ]
    tried = spread(cases, steps)
    ends: Counter[str] = Counter()
    for number, action, error in tried:
        ground.clean()
        # a full disk has no room, but other calls still work
        affected = faults.OPEN | faults.WRITE | faults.SYNC
        if error != errno.ENOSPC:
            affected = faults.ALL

        def arm(
            number: int = number, action: int = action, error: int = error, kinds: int = affected
        ) -> None:
            faults.arm(number, action, kinds=kinds, error=error)

        status = wait(ground.start(watched(ground, arm)))
        log = ground.log()
        where = f"{errno.errorcode[error]} at call {number} ({action}), exit status {status}"
        if status not in (0, 1, 2) or "Traceback" in log:
            raise Failed(f"{where}: {log}")
        # the run names the failure, unless it does not need the call: an optional one, or a lock
        if status != 0 and os.strerror(error) not in log:
            raise Failed(f"{where}, but it does not say why: {log}")
        ends["went well" if status == 0 else f"ended with {status}"] += 1
        try:
            ground.check()
            ground.finish()
        except Failed as failed:
            raise Failed(f"after {where}: {failed}; it said {log}") from None
    summary = ", ".join(f"{n} {how}" for how, n in ends.most_common())
    return f"{len(tried)} of {len(cases)} failures ({summary})"


def kill_at_random(ground: Ground, kills: int, rng: random.Random) -> str:
    """Kill runs at random moments, `kills` times in all."""
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
        ground.finish()
        runs += 1
    return f"{done} kills in {runs} runs"


def kill_isolated(ground: Ground, kills: int, rng: random.Random) -> str:
    """The same with the engine in a process of its own."""
    done = runs = 0
    victims: Counter[str] = Counter()
    ground.clean()
    started = time.monotonic()
    ground.run(isolate=True)
    seconds = time.monotonic() - started
    while done < kills:
        ground.clean()
        for _ in range(kills - done):
            pid = ground.start(isolate=True)
            time.sleep(rng.uniform(0, seconds))
            engine = child_of(pid)
            who = rng.choice(["the run", "the engine", "both"])
            if engine is None:
                who = "the run"
            if who != "the engine":
                os.kill(pid, signal.SIGKILL)
            if (
                who != "the run"
                and engine is not None
                and child_of(pid, or_orphan=engine) == engine
            ):
                try:
                    os.kill(engine, signal.SIGKILL)
                except ProcessLookupError:
                    who = "the run"
            if (status := wait(pid)) == 0:
                break
            log = ground.log()
            if status not in ((1, 2) if who == "the engine" else (-signal.SIGKILL,)):
                raise Failed(f"exit status {status} after {who}: {log}")
            if who == "the engine" and "SIGKILL" not in log:
                raise Failed(f"it does not say what ended the engine: {log}")
            done += 1
            victims[who] += 1
            ground.check()
        ground.finish(isolate=True)
        runs += 1
    summary = ", ".join(f"{n} of {who}" for who, n in sorted(victims.items()))
    return f"{done} kills in {runs} runs ({summary})"


def child_of(pid: int, or_orphan: int | None = None) -> int | None:
    if or_orphan is not None:
        return or_orphan
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return None
    return int(found[0]) if found else None


def spread(cases: list, steps: int) -> list:
    if steps < 0:
        return []
    steps = min(steps or len(cases), len(cases))
    return [cases[step * len(cases) // steps] for step in range(steps)]


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    name = platform.machine() if model is None else model[1]
    return f"{len(os.sched_getaffinity(0))} cores of {name}, Linux {platform.release()}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill imatrix collect, and see what is left.")
    parser.add_argument("--kills", type=int, default=1000, help="at random (default: 1000)")
    parser.add_argument("--isolated", type=int, default=100, help="with two processes")
    parser.add_argument("--steps", type=int, default=0, help="at calls (default: 0, each of them)")
    parser.add_argument("--errors", type=int, default=0, help="errors at calls (0: each)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"figures into {RESULTS.name}")
    args = parser.parse_args()
    if not faults.SUPPORTED:
        parser.error("Linux on x86-64 or aarch64 only")
    rng = random.Random(args.seed)
    lines: list[str] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:

        def tell(what: str, found: str) -> None:
            lines.append(f"| {what} | {found} |")
            print(f"{what}: {found}", flush=True)

        try:
            plain = Ground(Path(folder, "plain"), SHORT)
            tell("SIGKILL at every call of a run", kill_at_calls(plain, args.steps))
            tell("errors at every call of a run", fail_at_calls(plain, args.errors))
            twice = Ground(Path(folder, "twice"), SHORT, twice=True)
            tell("SIGKILL, output is an input too", kill_at_calls(twice, args.steps))
            tell("errors, output is an input too", fail_at_calls(twice, args.errors))
            long = Ground(Path(folder, "long"), LONG)
            if args.kills:
                tell("SIGKILL at random moments", kill_at_random(long, args.kills, rng))
            if args.isolated:
                tell("the same, two processes", kill_isolated(long, args.isolated, rng))
        except Failed as error:
            print(f"FAILED: {error}")
            return 1
    minutes = (time.monotonic() - started) / 60
    print(f"all to the bit, in {minutes:.0f} min")
    if args.write:
        write(lines, minutes, args.seed)
    return 0


def write(lines: list[str], minutes: float, seed: int) -> None:
    """Put the figures between the marks in the results."""
    begin, end = "<!-- kills -->\n", "<!-- /kills -->\n"
    text = RESULTS.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    date = datetime.date.today().isoformat()
    body = (
        f"{date}, {machine()}, imatrix {imatrix.__version__}, seed {seed}, {minutes:.0f} min; a "
        f"run has {SHORT} chunks ({LONG} where it is killed at random) and saves after each.\n\n| what | how often |\n|---|---|\n"
        + "\n".join(lines)
        + "\n\nAll of them: every file whole after each death, and the final file the same to the "
        "bit.\n"
    )
    RESULTS.write_text(head + begin + body + end + tail, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
