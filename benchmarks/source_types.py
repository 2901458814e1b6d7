"""From which type to collect: speed, and what the type does to the sums.

    python benchmarks/source_types.py [--models dense,experts] [--size full] [--rounds 8] [--chunks 4]

The same weights as F32, F16, BF16 and Q8_0, which `imatrix quantize` makes of the F32 ones. Written to
results/source-types.{json,md} after every model:

- seconds for a chunk of 512 tokens, trunk, without perplexity: a session for each type, in a process
  of its own, and the types take turns chunk by chunk, in another order each round, so that a machine
  that speeds up or slows down does so for all of them. Ratios are of the same round.
- what the probe of `imatrix collect` foretells (imatrix.engine.products): the engine's products timed
  for less than a second, and from them and F16's own seconds those of the other types.
- how far the sums are from those of F32, trunk and head: of each weight the sum of the absolute
  differences over the sum. For comparison, F32 on other text of the same length.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import models
import numpy as np
from sessions import Sessions
from store import RESULTS, machine
from test_collect import TEXT, run, sessions

import imatrix
from imatrix.collect.advice import foretold_time, products_of
from imatrix.engine.cores import physical_cores
from imatrix.engine.products import measure
from imatrix.quantization.source import source_tensors

TYPES = ("F32", "F16", "BF16", "Q8_0")
N_CTX = 512
OTHER = "F32, other text"


def source(name: str, size: str, kind: str) -> Path:
    """The model with weights of a type; made of the F32 one if it is not there yet."""
    full = models.model(name, size, dtype="F32")
    if kind == "F32":
        return full
    path = full.with_name(f"{full.stem.removesuffix('-F32')}-of-F32-{kind}.gguf")
    if not path.is_file():
        imatrix.quantize(full, path, kind)
    return path


def seconds_of(paths: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Seconds for a chunk, by type, a value a round."""
    running: dict[str, Sessions] = {
        kind: sessions(path, N_CTX, n_chunks=1) for kind, path in paths.items()
    }
    found: dict[str, list[float]] = {kind: [] for kind in paths}
    try:
        for kind in paths:
            run(running[kind], "trunk", "on")  # what is made at first is not measured
        for number in range(rounds):
            order = list(paths)
            order = order[number % len(order) :] + order[: number % len(order)]
            for kind in order if number % 2 == 0 else reversed(order):
                found[kind].append(run(running[kind], "trunk", "on")["seconds"])
    finally:
        for each in running.values():
            each.close()
    return found


def collected(path: Path, n_chunks: int, skip: int = 0) -> tuple[imatrix.ImportanceMatrix, Any]:
    """The matrix of trunk and head, and what `collect` would advise."""
    with imatrix.Collector(path, n_ctx=N_CTX) as collector:
        matrix = collector.run(TEXT, mtp=True, max_chunks=n_chunks, skip_chunks=skip)
        return matrix, collector.source_advice()


def difference(entry: imatrix.Entry, of: imatrix.Entry) -> float:
    """How far the sums of a weight are from others, over those."""
    return float(np.abs(entry.sums - of.sums).sum() / of.sums.sum())


def moved_rows(matrix: imatrix.ImportanceMatrix, of: imatrix.ImportanceMatrix) -> float:
    """The part of the rows of experts that went to another one; 0 without experts."""
    pairs = [(matrix[name].counts, of[name].counts) for name in of if len(of[name].counts) > 1]
    total = sum(int(b.sum()) for _, b in pairs)
    return sum(int(np.abs(a - b).sum()) for a, b in pairs) / 2 / total if total else 0.0


def differences(
    matrix: imatrix.ImportanceMatrix, of: imatrix.ImportanceMatrix
) -> dict[str, tuple[float, float, str]]:
    """Of trunk and head: the median over the weights, the largest, and which weight has that."""
    assert set(matrix) == set(of)
    found = {}
    for part in ("trunk", "head"):
        entries = getattr(of, part)
        each = {name: difference(matrix[name], of[name]) for name in entries}
        worst = max(each, key=lambda name: each[name])
        found[part] = (statistics.median(each.values()), each[worst], worst)
    return found


def foretold(path: Path, matrix: imatrix.ImportanceMatrix, seconds: float) -> dict[str, Any]:
    """What a probe says of an F16 model: GFLOP/s of its products by type, and how much of its time
    a chunk of the trunk would take in each type."""
    products = products_of(
        source_tensors(imatrix.ModelFile.read(path)),
        {name: entry.counts for name, entry in matrix.trunk.items()},
        "f16",
        chunks=matrix.chunk_count,
        tokens=matrix.chunk_count * N_CTX,
        n_ubatch=N_CTX,
    )
    kinds = [kind.lower() for kind in TYPES]
    timed = measure([each.shape for each in products], kinds, n_threads=physical_cores())
    if timed is None:
        return {}

    return {
        kind: {
            "speeds": [4e-9 / (t[kind.lower()].first + t[kind.lower()].second) for t in timed],
            "time": foretold_time(products, timed, "f16", kind.lower(), seconds),
        }
        for kind in TYPES
    }


def measured(name: str, size: str, rounds: int, n_chunks: int) -> dict[str, Any]:
    """All about one model."""
    paths = {kind: source(name, size, kind) for kind in TYPES}
    cell: dict[str, Any] = {
        "bytes": {kind: path.stat().st_size for kind, path in paths.items()},
        "seconds": seconds_of(paths, rounds),
        "chunks": n_chunks,
        "differences": {},
        "moved": {},
        "advice": {},
    }
    runs = {kind: collected(path, n_chunks) for kind, path in paths.items()}
    for kind, (_, advice) in runs.items():
        cell["advice"][kind] = None if advice is None else [advice.target, round(advice.time, 3)]
    exact = runs.pop("F32")[0]
    runs[OTHER] = collected(paths["F32"], n_chunks, skip=n_chunks)
    for kind, (matrix, _) in runs.items():
        cell["differences"][kind] = differences(matrix, exact)
        cell["moved"][kind] = moved_rows(matrix, exact)
    middle = statistics.median(cell["seconds"]["F16"])
    cell["foretold"] = foretold(paths["F16"], runs["F16"][0], middle)
    return cell


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def table(kept: dict[str, Any]) -> str:
    rounds = max(len(cell["seconds"]["F16"]) for cell in kept["cells"].values())
    lines = [
        "# From which type to collect",
        "",
        f"{kept['date']}, {kept['machine']}, load average before {kept['load']:.1f}. The same "
        f"weights in four types, chunks of {N_CTX} tokens, without perplexity. The types take turns "
        f"chunk by chunk, {rounds} rounds; median [lowest, highest] of the ratios of the same round. "
        "Made by benchmarks/source_types.py.",
        "",
        "## Speed",
        "",
        "Trunk. `foretold`: by the probe of `imatrix collect`, from F16's seconds; `products`: what "
        "it found, with dense weights and with experts. `collect` says: of a model in this type.",
        "",
        "| model | source | GB | s/chunk | of F16 | foretold | products, GFLOP/s | `collect` says |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in kept["cells"].items():
        base = cell["seconds"]["F16"]
        for kind in TYPES:
            seconds = cell["seconds"][kind]
            ratios = [a / b for a, b in zip(seconds, base, strict=True)]
            probe = cell["foretold"].get(kind)
            share = f"{probe['time']:.2f}" if probe else ""
            speeds = " / ".join(f"{each:.0f}" for each in probe["speeds"]) if probe else "too slow"
            advice = cell["advice"][kind]
            says = "nothing" if advice is None else f"{advice[0]}: {advice[1]:.2f} of the time"
            lines.append(
                f"| {name} | {kind} | {cell['bytes'][kind] / 1e9:.2f} "
                f"| {statistics.median(seconds):.2f} | {spread(ratios)} "
                f"| {share} | {speeds} | {says} |"
            )
    lines += [
        "",
        "## Sums",
        "",
        "How far the sums of a weight are from those of the F32 source: the sum of the absolute "
        "differences, over the sum; median and largest over the weights. `moved`: rows of experts "
        "that another expert got. The last line of each model is F32 on the text that follows.",
        "",
        "| model | source | chunks | trunk, median | trunk, largest | head, median "
        "| head, largest | moved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in kept["cells"].items():
        for kind, found in cell["differences"].items():
            (trunk, trunk_most, _), (head, head_most, _) = found["trunk"], found["head"]
            lines.append(
                f"| {name} | {kind} | {cell['chunks']} | {trunk:.1e} | {trunk_most:.1e} "
                f"| {head:.1e} | {head_most:.1e} | {cell['moved'][kind]:.2%} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="dense,experts", help="of models.py")
    parser.add_argument("--size", choices=("full", "half"), default="full")
    parser.add_argument("--rounds", type=int, default=8, help="chunks of each type")
    parser.add_argument("--chunks", type=int, default=4, help="for the sums")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    kept: dict[str, Any] = {
        "size": args.size,
        "machine": machine(),
        "date": str(datetime.date.today()),
        "load": os.getloadavg()[0],
        "cells": {},
    }
    for name in args.models.split(","):
        kept["cells"][name] = measured(name, args.size, args.rounds, args.chunks)
        (args.out / "source-types.json").write_text(json.dumps(kept, indent=1) + "\n")
        (args.out / "source-types.md").write_text(table(kept))
        print(name, file=sys.stderr, flush=True)
    print(table(kept))


if __name__ == "__main__":
    main()
