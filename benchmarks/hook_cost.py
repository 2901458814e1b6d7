"""What collecting costs over the bare forward pass, to a fraction of a percent.

    python benchmarks/hook_cost.py [--size half] [--pairs 16]

In one session of one process, chunks with the hook off and on take turns: off, on, on, off, and
so on, so that a machine that speeds up or slows down does so for both. Two neighbours make a pair.
The result is the median of the pairs' ratios, with the 95 % interval of a bootstrap over the pairs.
It is written to results/hook-cost.{json,md} after every session.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import models
import numpy as np
from sessions import Sessions
from store import RESULTS, machine
from test_collect import run, sessions

NAMES = ("dense", "small-vocabulary", "experts")
CHUNKS = (512, 2048)


def pairs_of(of: Sessions, kind: str, n_pairs: int) -> list[tuple[float, float]]:
    """Seconds for a chunk without the hook and with it, pair by pair."""
    found = []
    for i in range(n_pairs):
        order = ("off", "on") if i % 2 == 0 else ("on", "off")
        seconds = {hook: run(of, kind, hook)["seconds"] for hook in order}
        found.append((seconds["off"], seconds["on"]))
    return found


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median, and the 95 % interval of a bootstrap over the pairs."""
    values = np.array(ratios)
    draws = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def table(kept: dict[str, Any]) -> str:
    lines = [
        "# What collecting costs over the bare forward pass",
        "",
        f"{kept['date']}, {kept['machine']}, load average before {kept['load']:.1f}. Pairs of "
        "neighbouring chunks, with the hook and without, in one process; median of their ratios "
        "[95 % interval]. Made by benchmarks/hook_cost.py.",
        "",
        "| model | tokens a chunk | what runs | pairs | s/chunk, bare | with the hook, of it |",
        "|---|---|---|---|---|---|",
    ]
    for name, n_ctx, kind, pairs in kept["cells"]:
        middle, low, high = interval([on / off for off, on in pairs])
        bare = float(np.median([off for off, _ in pairs]))
        what = "trunk + head" if kind == "head" else "trunk"
        lines.append(
            f"| {name} | {n_ctx} | {what} | {len(pairs)} | {bare:.2f} "
            f"| {middle:.3f} [{low:.3f}, {high:.3f}] |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("full", "half"), default="full")
    parser.add_argument("--pairs", type=int, default=16, help="of 512 tokens; longer ones have 3/8")
    parser.add_argument("--models", default=",".join(NAMES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    kept: dict[str, Any] = {
        "size": args.size,
        "machine": machine(),
        "date": str(datetime.date.today()),
        "load": os.getloadavg()[0],
        "cells": [],
    }
    for name in args.models.split(","):
        for n_ctx in CHUNKS:
            of = sessions(models.model(name, args.size), n_ctx, n_chunks=1)
            try:
                for kind in ("trunk", "head"):
                    n_pairs = max(2, args.pairs if n_ctx <= 512 else args.pairs * 3 // 8)
                    pairs = pairs_of(of, kind, n_pairs)
                    kept["cells"].append([name, n_ctx, kind, pairs])
                    (args.out / "hook-cost.json").write_text(json.dumps(kept, indent=1) + "\n")
                    (args.out / "hook-cost.md").write_text(table(kept))
                    print(*table(kept).splitlines()[-1:], file=sys.stderr, flush=True)
            finally:
                of.close()


if __name__ == "__main__":
    main()
