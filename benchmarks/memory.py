"""What a run reads from the disk and how much memory it takes: benchmarks/results/memory.md.

    python benchmarks/memory.py [--part disk|text] [--limit-of FRACTION]

Two parts:

- disk: a model twice as large as the memory, in a memory control group of its own (version 1 or
  2; making one needs root, or `systemd-run --user --scope -p Delegate=yes`). Each setting runs in
  a process of its own, and the kernel says what that process had read from the disk
  (/proc/self/io). Before, the model's pages are removed from the page cache: pages in the cache
  would not be read again.
- text: peak memory with a text and with one ten times as long.

Nothing is timed, so a busy machine does not matter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models

RESULTS = Path(__file__).parent / "results"
PARTS = ("disk", "text")
ROUNDS = 2  # decodes that are measured, after a first one

# name, tokens a chunk, with the head, n_batch, n_ubatch, n_seq
SETTINGS: list[tuple[str, int, bool, int | str | None, int | None, int]] = [
    ("trunk, -c 512 -b 512", 512, False, 512, 512, 1),
    ("trunk, -c 512 -b 2048 -ub 512", 512, False, 2048, 512, 4),
    ("trunk, -c 512 -b auto", 512, False, "auto", None, 1),
    ("trunk + head, -c 512 -b 512", 512, True, 512, 512, 1),
    ("trunk + head, -c 4096 -b 4096 -ub 512", 4096, True, 4096, 512, 1),
    ("trunk + head, -c 4096 -b auto", 4096, True, "auto", None, 1),
]


# --- the process that is measured ---------------------------------------------------------------


def status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def read_bytes() -> int:
    """How many bytes the kernel fetched from the disk for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def inside(work: dict[str, Any]) -> None:
    """Run chunks of random tokens, and print what that took."""
    if work["group"] is not None:
        (Path(work["group"]) / "cgroup.procs").write_text("0")
    import numpy as np

    from imatrix import Collector

    started = read_bytes()
    seen: list[tuple[int, int]] = []
    anonymous = 0

    def look(progress: Any) -> None:
        nonlocal anonymous
        seen.append((progress.tokens, read_bytes() - started))
        anonymous = max(anonymous, status("RssAnon"))

    rng = np.random.default_rng(0)
    n_ctx = work["collector"]["n_ctx"]

    with Collector(work["model"], **work["collector"]) as collector:
        n_vocab = collector.n_vocab
        loaded = read_bytes() - started

        def texts() -> Iterator[list[int]]:
            for n in range(work["chunks"] or 10**6):
                if not work["chunks"] and n > 0 and len(seen) > ROUNDS:
                    return  # a first decode, then ROUNDS
                yield rng.integers(0, n_vocab, n_ctx).tolist()

        collector.run(texts(), mtp=work["mtp"], progress=look)
        batch = collector.batch
    print(
        json.dumps(
            {
                "batch": [batch.n_seq, batch.n_batch, batch.n_ubatch],
                "loaded": loaded,
                "seen": seen,
                "anonymous": anonymous,
                "peak": status("VmHWM"),
            }
        )
    )


def run(work: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--inside", json.dumps(work)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- a limit -------------------------------------------------------------------------------------


@contextmanager
def limited(size: int) -> Iterator[Path]:
    """A memory control group of `size` bytes, below that of this process."""
    root = Path("/sys/fs/cgroup")
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {name: path for _, names, path in lines for name in names.split(",")}
    one = "memory" in own
    parent = root / "memory" if one else root / own.get("", "/").lstrip("/")
    group = parent / f"imatrix-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if one else "memory.max")).write_text(str(size))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        sys.exit(
            f"no memory control group can be made: {error}. Run this as root, or under `systemd-run "
            "--user --scope -p Delegate=yes`."
        )
    try:
        yield group
    finally:
        group.rmdir()


def drop_from_cache(path: Path) -> None:
    """Remove a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- tables --------------------------------------------------------------------------------------


def disk(fraction: float) -> list[str]:
    path = models.model("large")
    size = path.stat().st_size
    limit = int(size * fraction)
    lines = [
        "## A model larger than memory",
        "",
        f"{size / 1e9:.2f} GB of weights (F16, mapped), in a control group of {limit / 1e9:.2f} GB. "
        f"Bytes read: over {ROUNDS} decodes after a first one, by /proc/self/io.",
        "",
        "| | chunks a decode | tokens a graph | read a graph, of the file | read a token, MB "
        "| of the first row | peak anonymous memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    first = None
    for name, n_ctx, mtp, n_batch, n_ubatch, n_seq in SETTINGS:
        drop_from_cache(path)
        with limited(limit) as group:
            found = run(
                {
                    "model": str(path),
                    "group": str(group),
                    "mtp": mtp,
                    "chunks": None,
                    "collector": {
                        "n_threads": 1, "n_ctx": n_ctx, "n_batch": n_batch, "n_ubatch": n_ubatch, "n_seq": n_seq,
                    },
                }
            )  # fmt: skip
        (tokens0, bytes0), *_, (tokens, bytes_) = found["seen"]
        each = (bytes_ - bytes0) / (tokens - tokens0)
        first = each if first is None else first
        side, _, graph = found["batch"]
        graph = min(graph, side * n_ctx)
        lines.append(
            f"| {name} | {side} | {graph} | {each * graph / size:.2f} | {each / 1e6:.3f} "
            f"| {each / first:.3f} | {found['anonymous'] / 1e9:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def text() -> list[str]:
    path = models.model("small")
    size = path.stat().st_size
    lines = [
        "## A text ten times as long",
        "",
        f"A model of {size / 1e9:.2f} GB, trunk and head, chunks of 512 tokens, no limit. Peak "
        "resident memory has the model's mapped pages in it; the rest is contexts and sums.",
        "",
        "| chunks | tokens | peak resident, MB | of it anonymous, MB |",
        "|---|---|---|---|",
    ]
    for chunks in (4, 40):
        found = run(
            {
                "model": str(path),
                "group": None,
                "mtp": True,
                "chunks": chunks,
                "collector": {"n_ctx": 512, "n_threads": 1},
            }
        )
        lines.append(
            f"| {chunks} | {found['seen'][-1][0]} | {found['peak'] / 1e6:.1f} "
            f"| {found['anonymous'] / 1e6:.1f} |"
        )
        print(lines[-1], flush=True)
    return lines


def part_of(text: str) -> str:
    return "disk" if text.startswith("A model") else "text"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default: both")
    parser.add_argument(
        "--limit-of", type=float, default=0.5, help="memory, of the model's size (default: 0.5)"
    )
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        inside(json.loads(args.inside))
        return 0
    kept = RESULTS / "memory.md"
    before = kept.read_text().split("\n## ")[1:] if kept.is_file() else []
    sections = {part_of(section): section for section in before}
    for part in args.part or PARTS:
        lines = disk(args.limit_of) if part == "disk" else text()
        sections[part] = "\n".join(lines).removeprefix("## ") + "\n"
        write(sections)
    return 0


def write(sections: dict[str, str]) -> None:
    title = (
        "# Memory and the disk\n\n"
        f"{datetime.date.today()}, Linux {os.uname().release}. Made by benchmarks/memory.py; "
        "docs/memory.md says what follows from it.\n"
    )
    (RESULTS / "memory.md").write_text(
        "\n## ".join([title, *(sections[p] for p in PARTS if p in sections)])
    )


if __name__ == "__main__":
    sys.exit(main())
