"""GB/s of rows squared and added, with one thread and with all, beside a plain read of the same
memory. `make bench` runs it and writes benchmarks/results/kernels.md.

The rows are blocks of 512 x 4096 float32, as in the graph of a prompt. There are several blocks, so
that no cache holds them from one pass to the next. In a session the matrix multiplication has just
read the rows, so they come from the cache if they fit: the benchmark measures the worse case.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from store import RESULTS, machine

from imatrix.engine.cores import physical_cores
from imatrix.native import engine
from imatrix.native.engine import RowAdder

N_ROWS, N_IN, N_BLOCKS = 512, 4096, 32
THREADS = physical_cores()
KERNELS = engine.row_kernel_names()


class Work:
    """The blocks, and a function for each variant that goes over all of them."""

    def __init__(self) -> None:
        block = np.random.default_rng(0).standard_normal((N_ROWS, N_IN)).astype(np.float32)
        self.blocks = [block + np.float32(i) for i in range(N_BLOCKS)]
        self.sums = [np.zeros(N_IN) for _ in self.blocks]
        self.gigabytes = N_BLOCKS * block.nbytes / 1e9
        self.adders = {n: RowAdder(n) for n in (1, THREADS)}
        self.pool = ThreadPoolExecutor(THREADS)
        self.variants: dict[str, Callable[[], object]] = {
            "plain read (NumPy's max), 1 thread": lambda: [b.max() for b in self.blocks],
            f"plain read (NumPy's max), {THREADS} threads": lambda: list(
                self.pool.map(np.max, self.blocks)
            ),
            "squared and added, 1 thread": lambda: self.add(1),
            f"squared and added, {THREADS} threads": lambda: self.add(THREADS),
        }
        for kernel in KERNELS:
            self.variants[f"kernel {kernel} alone, 1 thread"] = lambda k=kernel: self.run(k)

    def add(self, n_threads: int) -> None:
        for block, sums in zip(self.blocks, self.sums, strict=True):  # one stop of the hook each
            self.adders[n_threads].add([block], [sums])

    def run(self, kernel: str) -> None:
        acc = np.zeros(N_IN, dtype=np.float32)
        for block in self.blocks:
            engine.add_squares(kernel, block, acc)


WORK = Work()


@pytest.fixture(scope="module")
def speeds() -> Iterator[dict[str, list[float]]]:
    collected: dict[str, list[float]] = {}
    load = os.getloadavg()[0]
    yield collected
    lines = [
        "# Gigabytes a second",
        "",
        f"{datetime.date.today()}, {machine()}; {N_BLOCKS} blocks of {N_ROWS} x {N_IN} float32, "
        "out of the cache. Interleaved passes in one run; median [lowest, highest]. "
        "Made by `make bench`.",
        "",
        f"Load average of the minute before: {load:.1f}"
        + (": other programs had the processors too." if load > 0.5 else "."),
        "",
        "| variant | GB/s | of the plain read |",
        "|---|---|---|",
    ]
    for variant, values in collected.items():
        middle = statistics.median(values)
        reads = [v for k, v in collected.items() if k.startswith("plain read")]
        read = statistics.median(reads[1 if variant.endswith("s") and THREADS > 1 else 0])
        lines.append(
            f"| {variant} | {middle:.2f} [{min(values):.2f}, {max(values):.2f}] "
            f"| {middle / read:.2f} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kernels.md").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("variant", list(WORK.variants))
def test_speed(
    benchmark: Any, measuring_pass: int, variant: str, speeds: dict[str, list[float]]
) -> None:
    def run() -> None:
        started = time.perf_counter()
        WORK.variants[variant]()
        seconds = time.perf_counter() - started
        speeds.setdefault(variant, []).append(WORK.gigabytes / seconds)

    benchmark.pedantic(run, rounds=3, iterations=1, warmup_rounds=0)
