"""Fuzzes one reader, guided by coverage (atheris) or with the mutations of this folder alone.

python tests/fuzz/run.py TARGET [--runs N] [--seconds N] [--plain]
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

os.fsync = lambda fd: None  # no file here has to outlive a power cut


def plain(name: str, runs: int, seconds: float, folder: Path) -> int:
    """Deterministic mutations of the corpus; every failure is printed, and none ends the run."""
    import targets

    words, inputs = targets.dictionary(), targets.corpus_of(name)
    taken, failures, started = 0, {}, time.monotonic()
    number = 0
    for number in range(runs):
        if time.monotonic() - started > seconds:
            break
        data = targets.mutated(name, inputs, number, words)
        try:
            taken += targets.tried(name, data, folder / "input")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            if failures.setdefault(key, number) == number:
                traceback.print_exc()
                Path(f"failure-{name}-{number}").write_bytes(data)
    took = time.monotonic() - started
    print(f"{name}: {number + 1} inputs in {took:.0f} s, {taken} taken, {len(failures)} failures")
    return 1 if failures else 0


def _instrument(members: Iterable[object], module: str, instrument: Callable[[Any], Any]) -> None:
    """Count the branches of a module's functions. atheris does so while a module is imported, but
    not through the loader of an editable install."""
    for member in list(members):
        if getattr(member, "__module__", None) != module:
            continue
        if isinstance(member, FunctionType):
            instrument(member)
        elif isinstance(member, (classmethod, staticmethod)):
            instrument(member.__func__)
        elif isinstance(member, property) and isinstance(member.fget, FunctionType):
            instrument(member.fget)
        elif isinstance(member, type):
            _instrument(vars(member).values(), module, instrument)


def guided(name: str, runs: int, seconds: float, folder: Path) -> None:
    """libFuzzer over the instrumented package; it ends the process, also at the first failure."""
    import atheris
    import targets

    for module, here in list(sys.modules.items()):
        if module.partition(".")[0] in ("imatrix", "gguf"):
            _instrument(vars(here).values(), module, atheris.instrument_func)

    def one(data: bytes) -> None:
        targets.tried(name, data, folder / "input")

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if targets.TARGETS[name].is_gguf and rng.random() < 0.5:
            try:
                return targets.mutated_gguf(data, rng)[:size]
            except Exception:
                pass  # no longer well-formed
        return atheris.Mutate(data, size)

    found = folder / "found"
    found.mkdir()
    limits = (
        [f"-runs={runs}", f"-max_total_time={int(seconds)}"] if seconds < 1e9 else [f"-runs={runs}"]
    )
    atheris.Setup(
        [sys.argv[0], *limits, f"-dict={targets.DICTIONARY}", "-max_len=16384", "-timeout=20",
         "-rss_limit_mb=4096", "-print_final_stats=1", str(found), str(targets.CORPUS / name)],
        one,
        custom_mutator=mutate,
    )  # fmt: skip
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="a reader, or 'list' to name them")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--plain", action="store_true", help="without atheris")
    args = parser.parse_args()
    if args.target == "list":
        import targets

        print(*targets.TARGETS)
        return 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if args.plain:
            return plain(args.target, args.runs, args.seconds, Path(folder))
        guided(args.target, args.runs, args.seconds, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
