"""Seconds per chunk: the bare forward pass, imatrix, and llama-imatrix.

`make bench` runs it and writes benchmarks/results/collect.{json,md,png}. The environment chooses what
runs:

    IMATRIX_BENCH_MODELS   of models.py, with commas between them (default: dense)
    IMATRIX_BENCH_CHUNKS   tokens in a chunk (default: 512)
    IMATRIX_BENCH_SIZE     full, or half: half the layers, for half the time (default: full)
    IMATRIX_BENCH_PASSES   (default: 3)
    IMATRIX_BENCH_TOKENS   tokens in a measurement (default: 4096, 8 chunks of 512 or 2 of 2048)
    IMATRIX_BENCH_RESUME   1: keep what collect.json has of these settings, measure the rest

The whole grid:

    IMATRIX_BENCH_MODELS=dense,wide-vocabulary,small-vocabulary,experts \
        IMATRIX_BENCH_CHUNKS=512,2048 make bench

(results/collect.md has dense and experts in chunks of 512; the whole grid was last measured with the
previous engine, in collect-0.5.0.md.)

For all of them a decode is one chunk, and a graph has 512 tokens at most. What a program does once
(loading, tokenizing, its first graph) is left out. A session of imatrix stays open from pass to pass,
in a process of its own (worker.py), and chunks with the hook and without it take turns in it.
llama-imatrix is run with 1 + N chunks and with 1, and the difference is divided by N.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from sessions import Sessions
from store import Cell, Store

from imatrix import ImportanceMatrix
from imatrix.engine.cores import physical_cores

TEXT = models.ROOT / "src/imatrix/data/calibration.txt"
NAMES = os.environ.get("IMATRIX_BENCH_MODELS", "dense").split(",")
CHUNKS = [int(n) for n in os.environ.get("IMATRIX_BENCH_CHUNKS", "512").split(",")]
SIZE = os.environ.get("IMATRIX_BENCH_SIZE", "full")
TOKENS = int(os.environ.get("IMATRIX_BENCH_TOKENS", "4096"))
N_UBATCH = 512

# variant -> the session that runs it, and whether its hook is on
OURS = {
    "bare forward pass, trunk": ("trunk", "off"),
    "imatrix, trunk": ("trunk", "on"),
    "bare forward pass, trunk + head": ("head", "off"),
    "imatrix, trunk + head": ("head", "on"),
    "imatrix, trunk, with perplexity": ("perplexity", "on"),
}
# variant -> the program and its options. With --nextn the program as shipped ends on every model;
# this one is built with two of its calls replaced (vendor/engine.cmake).
THEIRS = {
    "llama-imatrix --no-ppl": ("llama-imatrix", ["--no-ppl"]),
    "llama-imatrix, with perplexity": ("llama-imatrix", []),
    "llama-imatrix --no-ppl --nextn, mended": ("llama-imatrix-nextn", ["--no-ppl", "--nextn"]),
}


def n_timed(n_ctx: int) -> int:
    """Chunks in one measurement."""
    return max(1, TOKENS // n_ctx)


def sessions(path: Path, n_ctx: int, n_chunks: int | None = None) -> Sessions:
    """Of one model and chunk size."""
    return Sessions(
        {
            "model": str(path),
            "text": str(TEXT),
            "n_ctx": n_ctx,
            "n_chunks": n_timed(n_ctx) if n_chunks is None else n_chunks,
            "n_ubatch": N_UBATCH,
            "n_threads": physical_cores(),
        }
    )


def run(of: Sessions, kind: str, hook: str) -> dict[str, Any]:
    """Chunks of the session "trunk", "head" (with the trunk) or "perplexity"."""
    return of.run(hook, mtp=kind == "head", perplexity=kind == "perplexity")


@pytest.fixture(scope="module")
def workers() -> Iterator[Callable[[str, int], Sessions]]:
    """Workers of the model and chunk size that is measured now; the previous workers are ended."""
    current: dict[tuple[str, int], Sessions] = {}

    def of(name: str, n_ctx: int) -> Sessions:
        if (name, n_ctx) not in current:
            for old in current.values():
                old.close()
            current.clear()
            current[name, n_ctx] = sessions(models.model(name, SIZE), n_ctx)
        return current[name, n_ctx]

    yield of
    for old in current.values():
        old.close()


@pytest.fixture(scope="module")
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    resume = os.environ.get("IMATRIX_BENCH_RESUME") == "1"
    kept = Store.open(SIZE, resume=resume)
    yield kept
    kept.draw()


# The kernel charges a process with the peak of the process that it was forked from
# (setmax_mm_hiwater_rss in exec). The process that made the models has used gigabytes, so a small
# process starts the program.
PEAK_OF_CHILD = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
unit = 1 if sys.platform == "darwin" else 1024  # kilobytes, on macOS bytes
print(json.dumps({"seconds": seconds, "peak": used.ru_maxrss * unit}))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def llama_imatrix(name: str, n_ctx: int, out: Path, program: str, options: list[str]) -> Cell:
    tool = models.tool(program)

    def run(n_chunks: int) -> tuple[float, int]:
        done = subprocess.run(
            [
                sys.executable, "-c", PEAK_OF_CHILD,
                tool, "-m", models.model(name, SIZE), "-f", text(name, n_ctx), "-o", out,
                "-c", str(n_ctx), "-b", str(n_ctx), "-ub", str(min(n_ctx, N_UBATCH)),
                "-t", str(physical_cores()), "--chunks", str(n_chunks), *options,
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )  # fmt: skip
        answer = json.loads(done.stdout)
        return answer["seconds"], answer["peak"]

    n = n_timed(n_ctx)
    longer, peak = run(1 + n)
    shorter, _ = run(1)
    return Cell((longer - shorter) / n, peak)


def text(name: str, n_ctx: int) -> Path:
    """The calibration text, repeated: llama-imatrix wants two chunks more than it has to run."""
    path = models.ROOT / "build" / "benchmarks" / f"{name}-{n_ctx}.txt"
    # at least two characters per token; the text has 4.5
    times = -(-2 * (2 + n_timed(n_ctx)) * n_ctx // TEXT.stat().st_size) + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEXT.read_text() * times)
    return path


@pytest.mark.parametrize("variant", [*OURS, *THEIRS])
@pytest.mark.parametrize("n_ctx", CHUNKS)
@pytest.mark.parametrize("model_name", NAMES)
def test_seconds_a_chunk(
    benchmark: Any,
    store: Store,
    workers: Callable[[str, int], Sessions],
    model_name: str,
    n_ctx: int,
    variant: str,
    measuring_pass: int,
    tmp_path: Path,
) -> None:
    key = (model_name, n_ctx, variant)
    if store.has(key, measuring_pass):
        pytest.skip("measured before")

    def measured() -> Cell:
        if variant in THEIRS:
            out = tmp_path / "theirs.gguf"
            program, given = THEIRS[variant]
            cell = llama_imatrix(model_name, n_ctx, out, program, given)
            assert bool(ImportanceMatrix.load(out).head_blocks) == ("--nextn" in given)
            return cell
        answer = run(workers(model_name, n_ctx), *OURS[variant])
        return Cell(answer["seconds"], answer["peak"])

    cell = benchmark.pedantic(measured, rounds=1, iterations=1)
    benchmark.extra_info["seconds_per_chunk"] = cell.seconds
    store.add(key, cell)
