"""A long run on a small model, to see whether anything grows and whether the sums stay right.

    python benchmarks/soak.py --chunks 10000 --write

One run collects the same few chunks again and again, trunk and head, and sometimes writes a
checkpoint. Meanwhile memory, file descriptors, threads and native objects are counted. At the end
the sums must be those of the few chunks times the number of rounds (up to float64's rounding), and
the sums of one round must be those of the NumPy oracle (tests/helpers/oracle.py).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import oracle  # noqa: E402
from helpers.forge import ModelSpec, make_model  # noqa: E402

import imatrix  # noqa: E402
from imatrix import (  # noqa: E402
    Collector,
    ImportanceMatrix,
)
from imatrix.native import engine  # noqa: E402

N_CTX = 64
ROUND = 8  # chunks
# The tolerance, relative to the largest sum of a weight, and the least distance between two experts.
# tests/collect/test_head_oracle.py has the same numbers and gives the reasons.
GATE, CLEAR = 1e-3, 1e-4
RESULTS = ROOT / "benchmarks" / "results" / "robustness.md"


class Failed(Exception):
    """Something grew, or the sums are wrong."""


@dataclass(frozen=True)
class Look:
    """What a process holds at one moment.

    Attributes:
        chunk: chunks collected.
        rss: resident memory, KiB.
        descriptors, threads: how many there are.
        objects: how many native objects there are, of all kinds.
    """

    chunk: int
    rss: int
    descriptors: int
    threads: int
    objects: int

    @classmethod
    def now(cls, chunk: int, process: int | str = "self") -> Look:
        gc.collect()
        status = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
        )
        return cls(
            chunk,
            int(status["VmRSS"].split()[0]),
            len(list(Path(f"/proc/{process}/fd").iterdir())),
            int(status["Threads"]),
            sum(engine.live_objects().values()),
        )


def soak(folder: Path, n_chunks: int, *, isolate: bool = False) -> tuple[list[Look], float]:
    """Run, and check that all is right.

    Returns:
        Ten looks during the run, and the largest error of the sums, relative to the largest sum of
        their weight.
    """
    spec = make_model(folder / "model.gguf", "glm4moe", seed=11, n_nextn=1)
    rng = np.random.default_rng(2)  # with this seed no two experts are too close, see CLEAR
    chunks = rng.integers(0, spec.hparams.n_vocab, (ROUND, N_CTX)).tolist()
    n_chunks -= n_chunks % ROUND
    looks: list[Look] = []
    every = max(1, n_chunks // 11)
    options = {"n_ctx": N_CTX, "n_threads": 1, "isolate": isolate}

    def look(at: imatrix.Progress) -> None:
        if at.chunks % every == 0 and len(looks) < 10:
            looks.append(
                Look.now(at.chunks, made._models.engine.pid if made._models.engine else "self")
            )

    with Collector(spec.path, **options) as made:
        once = made.run(chunks, mtp=True)
        _check_oracle(once, spec, chunks)
        many = made.run(
            itertools.islice(itertools.cycle(chunks), n_chunks),
            mtp=True,
            checkpoint=folder / "checkpoint",
            checkpoint_every=max(1, every // 2),
            progress=look,
        )
    # after a while nothing may grow any more; the allocator may still give memory back
    first, last = looks[1], looks[-1]
    if (last.descriptors, last.objects) != (first.descriptors, first.objects):
        raise Failed(f"something grows: {looks}")
    # the engine's own process makes its second thread when it gets two requests at once
    if last.threads > first.threads + isolate:
        raise Failed(f"threads grow: {looks}")
    if last.rss > first.rss * 1.02 + 1024:
        raise Failed(f"memory grows: {[each.rss for each in looks]} KiB")
    return looks, _check_many(once, many, n_chunks // ROUND)


def _check_oracle(found: ImportanceMatrix, spec: ModelSpec, chunks: list[list[int]]) -> None:
    expected = oracle.run(spec, chunks, kv_dtype=np.float16, round_inputs=True)
    if narrow := {name: at for name, at in expected.margins.items() if at < CLEAR}:
        raise Failed(f"two experts are too close to tell: {narrow}; take another seed")
    if set(found) != set(expected.entries):
        raise Failed(f"other weights: {sorted(set(found) ^ set(expected.entries))}")
    for name, entry in expected.entries.items():
        if found[name].counts.tolist() != entry.counts.tolist():
            raise Failed(f"{name}: other counts than the oracle's")
        error = np.abs(found[name].sums - entry.sums).max() / entry.sums.max()
        if error > GATE:
            raise Failed(f"{name} differs from the oracle's by {error:.1e} of its largest sum")


def _check_many(once: ImportanceMatrix, many: ImportanceMatrix, times: int) -> float:
    worst = 0.0
    for name, entry in once.items():
        if not np.array_equal(many[name].counts, entry.counts * times):
            raise Failed(f"{name}: counts are not those of {times} rounds")
        # each addition rounds by half a unit at most, and there is one for each chunk
        limit = times * ROUND * np.finfo(np.float64).eps
        error = np.abs(many[name].sums - entry.sums * times).max() / (entry.sums.max() * times)
        if error > limit:
            raise Failed(f"{name}: off by {error:.1e} of its largest sum, at most {limit:.1e}")
        worst = max(worst, float(error))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run on a small model.")
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--isolate", action="store_true", help="look at the engine's own process")
    parser.add_argument("--write", action="store_true", help=f"figures into {RESULTS.name}")
    args = parser.parse_args()
    if sys.platform != "linux":
        parser.error("needs /proc")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            looks, error = soak(Path(folder), args.chunks, isolate=args.isolate)
        except Failed as failed:
            print(f"FAILED: {failed}")
            return 1
    lines = ["| chunks | resident, MiB | descriptors | threads | native objects |",
             "|---|---|---|---|---|"]  # fmt: skip
    for each in looks:
        lines.append(
            f"| {each.chunk} | {each.rss / 1024:.1f} | {each.descriptors} | {each.threads} | "
            f"{each.objects} |"
        )
    minutes = (time.monotonic() - started) / 60
    text = (
        f"{args.chunks - args.chunks % ROUND} chunks of {N_CTX} tokens, trunk and head, in "
        f"{minutes:.0f} min. The sums are those of {ROUND} chunks times as many, but for {error:.1e} "
        "of the largest of a weight; the counts are the same."
    )
    print("\n".join([*lines, "", text]))
    if args.write:
        write([*lines, "", text])
    return 0


def write(lines: list[str]) -> None:
    """Put the figures between the marks in the results."""
    from robustness import machine

    begin, end = "<!-- soak -->\n", "<!-- /soak -->\n"
    text = RESULTS.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    date = datetime.date.today().isoformat()
    body = f"{date}, {machine()}, imatrix {imatrix.__version__}.\n\n" + "\n".join(lines) + "\n"
    RESULTS.write_text(head + begin + body + end + tail, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
