"""Gives malformed models to the public functions that open models: none may end the process.

A process that never ran the engine forks one process for each input, and that one forks its
rehearsal instead of starting an interpreter for it: this is 20 times faster and runs the same code.
The rehearsal's process may end (a ModelError); if the process around it ends, that is a finding.

    python tests/fuzz/engine.py FOLDER [--runs N] [--first N] [--seconds N] [--model NAME]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["GGML_NO_BACKTRACE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from fuzz_models import make_models
from mutations import mutated_bytes, mutated_gguf

import imatrix
from imatrix import Collector, Entry, ImatrixError, ImportanceMatrix, ModelFile
from imatrix.engine import child as engine_child
from imatrix.engine import rehearsal

N_CTX = 32
TEXT = (
    "The of\n a\tin it 'll 123 <s></s> <|endoftext|> \u00e9\u4e2d\U0001f600 the the \x00 on an er"
    * 3
)
SECONDS = 20  # seconds of processor time; a case that takes longer hangs
MEMORY = 6 << 30
# a caller is promised an ImatrixError, or a built-in exception for a bad argument or for no memory
ALLOWED = (ImatrixError, ValueError, MemoryError)
_ASSERTION = re.compile(r"([\w-]+\.(?:cpp|c|h)):(\d+): (.{0,120})")

OK, REFUSED, WRONG = 0, 10, 11

os.fsync = lambda fd: None  # no file here has to outlive a power cut


def _limit(seconds: int) -> None:
    """End this process after so many seconds of processor time, however busy the machine is."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    signal.alarm(40 * seconds)


def _forked_rehearsal(request: dict[str, Any]) -> tuple[int, str, str]:
    """Takes the place of rehearsal.run_child()."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout = os.fdopen(1, "w", encoding="utf-8")
            _limit(SECONDS // 2)
            try:
                engine_child.perform(request)
                sys.stdout.flush()
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == -signal.SIGXCPU:
            raise subprocess.TimeoutExpired("rehearsal", SECONDS // 2)
        out.seek(0)
        err.seek(0)
        return status, out.read().decode(errors="replace"), err.read().decode(errors="replace")


def _collect(path: Path, rng: random.Random) -> None:
    head = None
    with Collector(path, n_ctx=N_CTX, n_threads=1, mtp_model=head) as collector:
        what = rng.randrange(6)
        if what == 0:
            collector.tokenize(TEXT, parse_special=True)
        elif what == 1:
            _ = collector.n_vocab
        elif what == 2:
            collector.plan(mtp=True)
        else:
            text: Any = TEXT if what < 5 else [[i % 200 for i in range(2 * N_CTX)]]
            collector.run(
                text,
                mtp=rng.random() < 0.7,
                max_chunks=2,
                process_output=rng.random() < 0.3,
                perplexity=rng.random() < 0.3,
                parse_special=rng.random() < 0.5,
            )


def _quantize(path: Path, rng: random.Random) -> None:
    ftype = rng.choice(("Q2_K", "IQ2_XXS", "Q4_K_M", "Q8_0"))
    matrix = None
    if rng.random() < 0.6:
        matrix = ImportanceMatrix(
            {
                name: _entry(shape, rng)
                for name, shape in ModelFile.read(path).tensors.items()
                if 2 <= len(shape) <= 3 and shape[0] * shape[-1] < 2**20
            }
        )
    if rng.random() < 0.3:
        imatrix.coverage(path, matrix, ftype)
    else:
        imatrix.quantize(path, path.with_suffix(".out"), ftype, imatrix=matrix, n_threads=1)


def _entry(shape: tuple[int, ...], rng: random.Random) -> Entry:
    """Data for a weight, as extreme as a file may hold."""
    n_mat = shape[2] if len(shape) == 3 else 1
    scale = rng.choice((0.0, 1e-30, 1.0, 1.0, 1.0, 1e30, 3e38))
    sums = np.random.default_rng(rng.randrange(2**32)).random((n_mat, shape[0])) * scale
    return Entry(sums, np.full(n_mat, rng.choice((0, 1, 1, 1000))))


def _evaluate(path: Path, rng: random.Random) -> None:
    imatrix.evaluate(path, TEXT, n_ctx=N_CTX, n_threads=1, max_chunks=1)


def case(path: Path, number: int, seeds: dict[str, bytes]) -> tuple[str, Callable[[], None]]:
    """Write the input of this number, and give what is to be done with it."""
    rng = random.Random(number)
    name = rng.choice(list(seeds))
    data = seeds[name]
    by_pieces = rng.random() < 0.9
    data = mutated_gguf(data, rng) if by_pieces else mutated_bytes(data, rng, [], 20000)
    path.unlink(missing_ok=True)  # see targets.tried()
    path.write_bytes(data)
    work = rng.choice((_collect, _collect, _collect, _collect, _quantize, _evaluate))
    return f"{name} {work.__name__}", lambda: work(path, rng)


def _child(work: Callable[[], None], log: Path) -> int:
    """Try one input in this process, which ends with it."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    _limit(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except ALLOWED as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return REFUSED
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return WRONG
    return OK


def finding(status: int, log: str) -> str | None:
    """The outcome of a case in one word that tells findings apart; None if there is no finding."""
    if status in (OK, REFUSED):
        return None
    if status == WRONG:
        return log.strip().splitlines()[-1][:160]
    words = _ASSERTION.findall(log)
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    if words:
        return f"{name} {words[-1][0]}:{words[-1][1]}: {words[-1][2]}"
    last = log.strip().splitlines()
    return f"{name} {last[-1][:160] if last else ''}"


def run(
    folder: Path, first: int, runs: int, seconds: float, only: str | None = None
) -> tuple[Counter[str], dict[str, list[int]]]:
    """Try inputs; gives how often each outcome came, and the numbers of the inputs of each
    finding."""
    rehearsal.run_child = _forked_rehearsal
    seeds = {name: path.read_bytes() for name, path in make_models(folder / "models").items()}
    if only is not None:
        seeds = {name: data for name, data in seeds.items() if only in name}
    path, log = folder / f"case-{os.getpid()}.gguf", folder / f"log-{os.getpid()}.txt"
    outcomes: Counter[str] = Counter()
    findings: dict[str, list[int]] = {}
    end = time.monotonic() + seconds
    for number in range(first, first + runs):
        if time.monotonic() > end:
            break
        about, work = case(path, number, seeds)
        child = os.fork()
        if child == 0:
            os._exit(_child(work, log))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcomes[{OK: "worked", REFUSED: "refused"}.get(status, "finding")] += 1
        told = log.read_text(errors="replace")
        if status == REFUSED and "ends the process" in told:
            outcomes["refused by the rehearsal"] += 1
        if found := finding(status, told):
            findings.setdefault(f"{found}", []).append(number)
            if len(findings[found]) == 1:
                print(f"{number} {about}: {found}", flush=True)
    for left in (path, log, path.with_suffix(".out")):
        left.unlink(missing_ok=True)
    return outcomes, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--model")
    parser.add_argument("--here", action="store_true", help="the input of --first, in this process")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.here:
        seeds = {
            name: path.read_bytes() for name, path in make_models(args.folder / "models").items()
        }
        if args.model:
            seeds = {name: data for name, data in seeds.items() if args.model in name}
        about, work = case(args.folder / "kept.gguf", args.first, seeds)
        print(about, flush=True)
        work()
        return 0
    started = time.monotonic()
    outcomes, findings = run(args.folder, args.first, args.runs, args.seconds, args.model)
    print(json.dumps({"outcomes": outcomes, "seconds": round(time.monotonic() - started)}))
    for found, numbers in sorted(findings.items(), key=lambda item: -len(item[1])):
        print(f"{len(numbers):6} {found}   first: {numbers[:4]}")
    return 1 if findings else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
