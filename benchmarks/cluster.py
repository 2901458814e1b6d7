"""One and two workers of a Dask cluster: their efficiency, what a block costs in addition to its
chunks, and what follows for many machines. The results are in benchmarks/results/cluster.md.

    python benchmarks/cluster.py [--part efficiency|costs] [--passes 3] [--blocks 6]

Every engine has one thread, so that a machine with two cores has room for two engines. These take
turns in every pass:

- one process, without a cluster
- two such processes without a cluster, each with half of the text: how much two engines slow each
  other down
- a cluster of one worker, and one of two workers

Models are loaded before the clock starts. The second part measures blocks whose chunks take no time,
with sums of several sizes: the time of the scheduler, of the transfer to this process and of the
adding. Only the last table is computed, from these figures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import psutil
from store import machine

from imatrix import Cluster, Collector
from imatrix.cluster import blocks as blocks_module
from imatrix.cluster.work import Block, Work
from imatrix.engine.settings import Batch, ModelOptions, SessionSettings
from imatrix.engine.sums import BlockSums
from imatrix.text.chunks import Chunk

RESULTS = Path(__file__).parent / "results"
N_CTX = 512
BLOCK = 8
TWO = "two processes, no cluster"
VARIANTS = ("one process, no cluster", TWO, "cluster, 1 worker", "cluster, 2 workers")
MODELS = (("small", "full"), ("experts", "half"))
PARTS = ("efficiency", "costs")
SIZES = (0, 1, 10, 100)  # MB of sums in a block

# --- efficiency ----------------------------------------------------------------------------------


def texts(path: Path, n_chunks: int) -> list[list[int]]:
    with Collector(path, rehearse=False) as made:
        n_vocab = made.n_vocab
    return np.random.default_rng(0).integers(0, n_vocab, (n_chunks, N_CTX)).tolist()


def collector(path: Path) -> Collector:
    return Collector(path, n_ctx=N_CTX, n_threads=1)


def half(path: Path, chunks: list[list[int]], ready: Any) -> None:
    with collector(path) as made:
        made.run(chunks[:1], mtp=True)
        ready.wait()
        made.run(chunks, mtp=True)
        ready.wait()


def processor() -> tuple[float, float]:
    """Processor time so far in seconds: of the engines, and of everything else (scheduler, workers,
    this process)."""
    me = psutil.Process()
    engines = rest = 0.0
    for each in (me, *me.children(recursive=True)):
        times = each.cpu_times()
        if "imatrix.engine.child" in " ".join(each.cmdline()):
            engines += times.user + times.system
        else:
            rest += times.user + times.system
    return engines, rest


def seconds(variant: str, path: Path, chunks: list[list[int]]) -> tuple[float, float]:
    """The seconds of a run over all chunks, and the share of the processor time that the engines did
    not use; that share is 0 without a cluster."""
    if variant == TWO:
        context = multiprocessing.get_context("spawn")
        ready = context.Barrier(3)
        middle = len(chunks) // 2
        parts = (chunks[:middle], chunks[middle:])
        running = [context.Process(target=half, args=(path, part, ready)) for part in parts]
        for each in running:
            each.start()
        ready.wait()
        started = time.perf_counter()
        ready.wait()
        took = time.perf_counter() - started
        for each in running:
            each.join()
        return took, 0.0
    with collector(path) as made:
        if variant == VARIANTS[0]:
            made.run(chunks[:1], mtp=True)
            started = time.perf_counter()
            made.run(chunks, mtp=True)
            return time.perf_counter() - started, 0.0
        n = 1 if variant == VARIANTS[2] else 2
        with Cluster(f"local:{n}", block=1) as some:
            made.run(
                chunks[: 4 * n], mtp=True, cluster=some
            )  # so that every worker loads the model
            some._block = BLOCK
            before = processor()
            started = time.perf_counter()
            made.run(chunks, mtp=True, cluster=some)
            took = time.perf_counter() - started
            engines, rest = (b - a for a, b in zip(before, processor(), strict=True))
            return took, rest / (engines + rest)


def efficiency(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds of a run by model and variant, and the share that seconds() gives."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, size in MODELS:
        path = models.model(name, size)
        chunks = texts(path, args.blocks * BLOCK)
        rows = found.setdefault(f"{name}, {path.stat().st_size / 1e9:.2f} GB", {})
        for measuring in range(args.passes):
            for variant in VARIANTS:
                took, share = seconds(variant, path, chunks)
                rows.setdefault(variant, []).append(took)
                if variant == VARIANTS[3]:
                    rows.setdefault("share", []).append(share)
                text = f"{variant}: {took:.2f} s, {share:.2%} not the engines'"
                print(f"{name}, pass {measuring + 1}: {text}", flush=True)
    return {
        model: {variant: statistics.median(each) for variant, each in rows.items()}
        for model, rows in found.items()
    }


# --- what a block costs beside its chunks --------------------------------------------------------


def no_chunks(n: int, _work: Work, _tokens: Any, lengths: Any, _first: int) -> Block:
    """Stands in for collect_block: gives `n` sums at once. A worker keeps them for the next blocks."""
    if not hasattr(Block, "kept"):
        Block.kept = [(["w"], np.ones((1, n)), np.ones(1, np.int64), None)] if n else []  # type: ignore[attr-defined]
    return Block(groups=Block.kept, scores=[(0.0, 0.0, 0)] * len(lengths))  # type: ignore[attr-defined]


def a_block(megabytes: int, n_blocks: int) -> dict[str, float]:
    """Milliseconds for a block with so many MB of sums: in all, for the adding, and as processor time
    of this process, in which the scheduler runs too."""
    blocks_module.collect_block = partial(no_chunks, megabytes * 1_000_000 // 8)
    tokens = np.zeros(N_CTX, np.int32)
    blocks = iter([[Chunk(tokens, ())] * BLOCK for _ in range(n_blocks + 4)])
    work = Work(
        owner="benchmark",
        model=ModelOptions(model=""),
        session=SessionSettings(n_ctx=N_CTX, batch=Batch(1, N_CTX, N_CTX), n_threads=1),
        n_threads=1,
        identity=(),
    )
    sums = BlockSums()
    adding = 0.0
    with Cluster("local:1") as one:
        with one._queue.collecting(
            work, blocks, part=BLOCK, first=0, look=lambda _: None
        ) as collected:
            for i, (_, block) in enumerate(collected):
                if i == 4:
                    started, busy = time.perf_counter(), time.process_time()
                    adding = 0.0
                before = time.perf_counter()
                sums.add(block.groups)
                adding += time.perf_counter() - before
                del block
        took, busy = time.perf_counter() - started, time.process_time() - busy
    return {
        name: 1e3 * each / n_blocks
        for name, each in (("all", took), ("here", busy), ("adding", adding))
    }


def costs(passes: int) -> dict[int, dict[str, float]]:
    """The medians of a_block() by MB of sums."""
    found = {}
    for megabytes in SIZES:
        n_blocks = 300 if megabytes < 10 else 40 if megabytes < 100 else 12
        each = [a_block(megabytes, n_blocks) for _ in range(passes)]
        found[megabytes] = {
            name: statistics.median(one[name] for one in each) for name in ("all", "here", "adding")
        }
        print(f"{megabytes} MB: {found[megabytes]}", flush=True)
    return found


# --- on paper ------------------------------------------------------------------------------------

N_WORKERS, N_TOKENS = 100, 100e6
NETWORK = 1.25e9  # bytes a second: 10 Gbit/s into the machine where the run was started

# Bytes of the float64 sums. q, k and v share their sums, and so do gate and up.
PAPER = {
    # layers x (attention in, out; gate/up; down)
    "dense, 8B (32 layers of 4096, 14336)": (32 * (3 * 4096 + 14336) * 8, 10e3),
    # layers x (attention in 2048, out 4096, router; 128 experts of 2048 in, 768 down)
    "experts, 30B (48 layers, 128 of 2048 and 768)": (
        48 * (2 * 2048 + 4096 + 128 * (2048 + 768)) * 8, 10e3,
    ),
    # layers x (attention and router, 256 experts of 7168 in, 2048 down)
    "experts, 671B (58 layers, 256 of 7168 and 2048)": (
        58 * (7168 + 16384 + 1536 + 7168 + 256 * (7168 + 2048)) * 8, 2e3,
    ),
}  # fmt: skip


def power_of_two(least: float) -> int:
    return int(2 ** max(4, np.ceil(np.log2(least))))


def on_paper(cost: dict[int, dict[str, float]]) -> list[str]:
    task = cost[0]["here"] / 1e3
    most = max(cost)
    measured = (cost[most]["here"] / 1e3 - task) / (most * 1e6)
    a_byte = max(measured, 1 / NETWORK)
    lines = [
        f"Measured: {1e3 * task:.2f} ms of processor time a task and {1e9 * measured:.2f} ns a byte "
        "of sums, scheduler and adding in one process; a network of 10 Gbit/s takes "
        f"{1e9 / NETWORK:.2f} ns a byte, so {1e9 * a_byte:.2f} are reckoned. {N_WORKERS} workers, chunks of {N_CTX}. How "
        "many tokens a second a worker runs is assumed, not measured. Parts are such that the "
        "scheduler is busy a quarter of the time at most, blocks such that the process where the "
        "run was started is, with what comes to it, half of it.",
        "",
        "| model | sums | tokens/s a worker (assumed) | the chunks take | --dask-part | --dask-block "
        "| busy here, blocks of one part | busy here, with parts | scheduler busy | way between "
        "workers | idle at the end, at most |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (nbytes, rate) in PAPER.items():
        whole = N_TOKENS / (N_WORKERS * rate)
        here = task + nbytes * a_byte
        part = power_of_two(N_TOKENS / N_CTX * 2 * task / (0.25 * whole))
        block = max(part, power_of_two(N_TOKENS / N_CTX * here / (0.5 * whole)))
        parts, blocks = (N_TOKENS / (N_CTX * size) for size in (part, block))
        way = parts * nbytes * a_byte / N_WORKERS
        # the last part, and then the sums of its block on their way up the tree
        tail = part * N_CTX / rate + np.log2(block / part) * nbytes * a_byte
        shares = (parts * here, blocks * here, 2 * parts * task, way, tail)
        row = " | ".join(f"{share / whole:.0%}" for share in shares)
        lines.append(
            f"| {name} | {nbytes / 1e6:.0f} MB | {rate:.0f} | {whole:.0f} s | {part} | {block} | {row} |"
        )
    return lines


# --- the file ------------------------------------------------------------------------------------


def describe_run(about: dict[str, Any]) -> str:
    return (
        f"{about['date']}, {about['machine']}, {about['passes']} pass(es), the median; load "
        f"{about['load']:.1f} when it began."
    )


def written(found: dict[str, Any]) -> str:
    lines = [
        "# A Dask cluster",
        "",
        "Made by benchmarks/cluster.py; docs/clusters.md says what follows from it.",
        "",
    ]
    if (part := found.get("efficiency")) is not None:
        lines += [
            "## Two workers beside one",
            "",
            f"{describe_run(part['about'])} Trunk and head, chunks of {N_CTX}, one thread an engine, "
            f"{part['about']['blocks']} blocks of {BLOCK} chunks, seconds. Efficiency: the time of "
            "one process without a cluster over twice that of two. Last: of the processor time of the "
            "run with two workers, what was not the engines' (scheduler, workers, adding).",
            "",
            f"| | {' | '.join(VARIANTS)} | efficiency, no cluster | efficiency, cluster | of that "
            "| not the engines' |",
            f"|---|{'---|' * (len(VARIANTS) + 4)}",
        ]
        for model, times in part["measured"].items():
            alone = times[VARIANTS[0]]
            plain, dask = (alone / (2 * times[each]) for each in (TWO, VARIANTS[3]))
            row = " | ".join(f"{times[each]:.2f}" for each in VARIANTS)
            lines.append(
                f"| {model} | {row} | {plain:.3f} | {dask:.3f} | {dask / plain:.3f} | {times['share']:.2%} |"
            )
        lines.append("")
    if (part := found.get("costs")) is not None:
        cost = {int(size): each for size, each in part["measured"].items()}
        lines += [
            "## What a block costs beside its chunks",
            "",
            f"{describe_run(part['about'])} One worker, blocks that are there at once: the scheduler, the "
            "way to this process, and the adding. Milliseconds a block. Where chunks take their "
            "time, the first two are hidden behind them as long as this process is not busy: the "
            "processor time, which a busy machine changes least, is that of the process where the "
            "run was started, with the scheduler in it.",
            "",
            "| sums a block, MB | in all | of it adding | processor time here |",
            "|---|---|---|---|",
            *(
                f"| {size} | {each['all']:.2f} | {each['adding']:.2f} | {each['here']:.2f} |"
                for size, each in cost.items()
            ),
            "",
            f"## On paper: {N_WORKERS} workers, {N_TOKENS / 1e6:.0f} million tokens",
            "",
            *on_paper(cost),
        ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--part", choices=PARTS, help="one part only, the other stays")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    kept = args.out / "cluster.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for part in PARTS:
        if args.part in (None, part):
            about = {
                "date": str(datetime.date.today()),
                "machine": machine(),
                "load": os.getloadavg()[0],
                "passes": args.passes,
                "blocks": args.blocks,
            }
            measured = efficiency(args) if part == "efficiency" else costs(args.passes)
            found[part] = {"about": about, "measured": measured}
            kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (args.out / "cluster.md").write_text(written(found), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
