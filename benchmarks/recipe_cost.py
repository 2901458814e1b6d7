"""What a recipe costs: the stages of `imatrix recipe` by effort, and the quantizer by type.

    python benchmarks/recipe_cost.py    # writes benchmarks/results/recipe-cost.{json,md}; ten minutes

On the model that comes with the package, on a machine that does nothing else: the figures are times.
Each effort and each type has a process of its own, since the engine makes the tables of the IQ types
once a process, when a type is first used. `--types q4_k,q8_0 --bpw 6 --efforts quick --chunks 2` is a
quick try, and `--out DIR` keeps it from the results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from store import machine

import imatrix
from imatrix import demo
from imatrix.engine.placement import Placement
from imatrix.files import atomic
from imatrix.recipes.groups import OFFERED, wanted_types
from imatrix.recipes.measuring import Bench, RecipeProgress
from imatrix.recipes.options import EFFORTS, RecipeOptions, Target

T = TypeVar("T")

RESULTS = Path(__file__).parent / "results"
BEFORE, ERRORS = "loading and rehearsing", "errors of all types"
# Tables are made for the IQ types alone (iq2xs_init_impl and iq3xs_init_impl in
# ggml/src/ggml-quants.c); of the other types the first row takes no longer than any other.
TABLES = "iq"
# Rows of a type are converted until it has taken so long, by processor time.
SECONDS = 2.0


def collect(path: Path) -> None:
    """The matrix of the shipped model and its calibration text, head included."""
    with imatrix.Collector(demo.MODEL) as collector:
        collector.run(demo.CALIBRATION, mtp=True).save(path)


class Stages:
    """Seconds by stage, and what the errors of the types take of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage = BEFORE
        self._began = time.monotonic()

    def progress(self, told: RecipeProgress) -> None:
        """As imatrix.recipe calls it."""
        if told.what != self._stage:
            self.next(told.what, told.seconds)

    def next(self, stage: str, ago: float = 0.0) -> None:
        """A stage begins, or began so many seconds ago: one is told of when its first trial is done."""
        now = max(self._began, time.monotonic() - ago)
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._began
        self._stage, self._began = stage, now

    def errors_apart(self) -> None:
        """Count the errors of the types as a stage of their own, from now on in this process."""
        of_bench: Callable[[Bench, str, str], float] = Bench.error

        def timed(bench: Bench, name: str, kind: str) -> float:
            stage = self._stage
            self.next(ERRORS)
            try:
                return of_bench(bench, name, kind)
            finally:
                self.next(stage)

        Bench.error = timed  # type: ignore[method-assign]


def cost_of_effort(
    matrix: Path, effort: str, types: Sequence[str], bpw: float, chunks: int | None
) -> Any:
    """One recipe, from nothing: seconds by stage, and processor seconds in all."""
    stages = Stages()
    stages.errors_apart()
    began, used = time.monotonic(), time.process_time()
    [recipe] = imatrix.recipe(
        demo.MODEL,
        matrix,
        demo.HELD_OUT,
        bpw=bpw,
        effort=effort,  # type: ignore[arg-type]
        types=types,
        max_chunks=chunks,
        progress=stages.progress,
    )
    stages.next("")
    return {
        "stages": stages.seconds,
        "seconds": time.monotonic() - began,
        "processor_seconds": time.process_time() - used,
        "bytes": recipe.bytes,
    }


def cost_of_type(matrix: Path, kind: str) -> Any:
    """The first row of a type, with the tables; then values a second of one thread.

    What is counted is what `imatrix recipe` does: a value is converted, and compared with what it was.
    """
    options = RecipeOptions(
        model=demo.MODEL, targets=(Target("bpw", 4.0),), types=(kind,), n_threads=1,
        placement=Placement(), rehearse=False,
    )  # fmt: skip
    with Bench(options, imatrix.ImportanceMatrix.load(matrix)) as bench:
        bench.load(with_head=False)
        tensors = [
            t for t in bench.source.all()
            if t.name in bench.loaded_names() and len(t.shape) > 1 and t.shape[0] % 256 == 0
            and bench.importance_of(t.name) is not None
        ]  # fmt: skip
        tensors.sort(key=lambda t: int(np.prod(t.shape)))
        began = time.process_time()
        bench.error(tensors[0].name, kind)
        first = time.process_time() - began
        began = time.process_time()
        bench.error(tensors[0].name, kind)
        again = time.process_time() - began
        began, n_values = time.process_time(), 0
        while True:
            for tensor in tensors:
                bench.error(tensor.name, kind)
                n_values += bench.values_of_error(tensor.name)
            if (seconds := time.process_time() - began) >= SECONDS:
                break
    return {
        "tables": first - again if kind.startswith(TABLES) else 0.0,
        "values_a_second": n_values / seconds,
    }


def apart(what: Callable[..., T], *given: Any) -> T:
    """The same in a process of its own, which has none of the engine's tables yet."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(what, *given).result()


def written(found: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# What a recipe costs",
        "",
        f"{found['date']}, {found['machine']}; load {found['load']:.1f} when it began. The model that comes "
        "with the package, its matrix of trunk and head, and its held-out text. Made by "
        "benchmarks/recipe_cost.py, one process an effort and one a type.",
        "",
        "## By effort",
        "",
        "Seconds by the clock, all cores. The tables of the IQ types fall into the stage in which a "
        f"type is first used. A recipe of {found['bpw']:g} bits a weight. Types: "
        f"{', '.join(found['types'])}. Chunks: "
        f"{found['chunks'] or 'what the effort takes'}.",
        "",
    ]
    efforts = found["efforts"]
    stages = list(dict.fromkeys(name for each in efforts.values() for name in each["stages"]))
    lines += ["| | " + " | ".join(efforts) + " |", "|---|" + "---|" * len(efforts)]
    rows = {name: [each["stages"].get(name) for each in efforts.values()] for name in stages}
    rows["**together**"] = [each["seconds"] for each in efforts.values()]
    rows["processor seconds"] = [each["processor_seconds"] for each in efforts.values()]
    for name, seconds in rows.items():
        cells = ["" if each is None else f"{each:.1f}" for each in seconds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "## By type",
        "",
        "Processor seconds of one thread. Values: millions a second that are converted and compared "
        "with what they were. Tables: what the first use of the type takes longer than the second.",
        "",
        "| type | values | tables |",
        "|---|---|---|",
    ]
    for kind, each in found["by_type"].items():
        tables = f"{each['tables']:.1f}" if kind.startswith(TABLES) else ""
        lines.append(f"| `{kind}` | {each['values_a_second'] / 1e6:.1f} | {tables} |")
    together = sum(1e6 / each["values_a_second"] for each in found["by_type"].values())
    tables = sum(each["tables"] for each in found["by_type"].values())
    lines += [
        "",
        f"All of them together: {together:.1f} seconds for a million values, and {tables:.1f} seconds for "
        "the tables.",
    ]
    return "\n".join(lines) + "\n"


def measure(
    types: Sequence[str], efforts: Sequence[str], bpw: float, chunks: int | None
) -> dict[str, Any]:
    """Everything, one process after the other."""
    found: dict[str, Any] = {
        "date": str(date.today()),
        "machine": machine(),
        "load": os.getloadavg()[0],
        "types": list(types),
        "bpw": bpw,
        "chunks": chunks,
        "efforts": {},
        "by_type": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        matrix = Path(folder) / "imatrix.gguf"
        apart(collect, matrix)
        for effort in efforts:
            found["efforts"][effort] = apart(cost_of_effort, matrix, effort, types, bpw, chunks)
            print(effort, f"{found['efforts'][effort]['seconds']:.1f} s", flush=True)
        for kind in types:
            found["by_type"][kind] = apart(cost_of_type, matrix, kind)
            print(kind, found["by_type"][kind], flush=True)
    return found


def words(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--types", type=words, default=list(OFFERED), help="default: all")
    parser.add_argument("--efforts", type=words, default=list(EFFORTS), help="default: all")
    parser.add_argument("--bpw", type=float, default=4.0, help="of the recipe; default: 4")
    parser.add_argument("--chunks", type=int, help="default: the effort's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results")
    given = parser.parse_args()
    types = wanted_types(given.types)
    for effort in given.efforts:
        if effort not in EFFORTS:
            parser.error(
                f"--efforts: unknown effort {effort!r}, expected some of {', '.join(EFFORTS)}"
            )
    found = measure(types, given.efforts, given.bpw, given.chunks)
    for name, content in (
        ("recipe-cost.json", json.dumps(found, indent=1) + "\n"),
        ("recipe-cost.md", written(found)),
    ):
        with atomic.replacing(given.out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
