"""Are the sums that a device makes the sums of its rows? Writes benchmarks/results/BACKEND.md.

    python benchmarks/devices.py --backend Vulkan

Small random models, trunk and head, run wholly and partly on the device, each run in a process of
its own. Sums made on the device are compared with sums of rows that are copied to the host, with
llama-imatrix on the same device (trunk), and with the CPU. llama-imatrix on the device is also
compared with itself on the CPU: that difference comes from the device's arithmetic. Nothing is timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import models  # puts tests/ on the path
import numpy as np
from helpers.forge import make_model
from helpers.running import NO_GPU, TEXT
from store import machine

from imatrix import ImportanceMatrix, backends

N_CTX = 64
CHUNKS = 4
# So that layers outside the device are not computed on it either (offload_op in ggml-vulkan.cpp).
KEPT_HERE = {"GGML_OP_OFFLOAD_MIN_BATCH": "1000000"}
ARCHS: dict[str, tuple[str, int]] = {
    "llama": ("dense", 0),
    "qwen35": ("recurrent hybrid", 1),
    "glm4moe": ("experts", 1),
    "qwen35moe": ("both", 1),
}

RUN = """
import json, sys
from imatrix import Collector
model, text, out, mtp, collector = json.loads(sys.argv[1])
with Collector(model, n_ctx=64, n_batch=64, n_ubatch=64, n_threads=1, **collector) as made:
    made.run([text], mtp=mtp, max_chunks=4).save(out)
    print(json.dumps(dict(made.counters)))
"""


def ours(
    model: Path, folder: Path, mtp: bool, environment: dict[str, str], **collector: Any
) -> tuple[ImportanceMatrix, dict[str, int]]:
    out = folder / "ours.gguf"
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([str(model), TEXT, str(out), mtp, collector])],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return ImportanceMatrix.load(out), json.loads(done.stdout.splitlines()[-1])


def theirs(model: Path, folder: Path, environment: dict[str, str], layers: int) -> ImportanceMatrix:
    text, out = folder / "text.txt", folder / "theirs.gguf"
    text.write_text(TEXT)
    command = [models.tool("llama-imatrix"), "-m", model, "-f", text, "-o", out]
    command += ["-c", N_CTX, "-b", N_CTX, "-ub", N_CTX, "-t", 1, "--chunks", CHUNKS, "--no-ppl"]
    subprocess.run(
        [str(part) for part in (*command, "-ngl", layers)],
        env={**os.environ, **environment},
        capture_output=True,
        check=True,
    )
    return ImportanceMatrix.load(out)


def apart(got: ImportanceMatrix, want: ImportanceMatrix) -> str:
    """Over the weights of `want`: the largest difference of a weight's sums divided by its largest sum,
    and how many rows went to other experts."""
    sums = max(np.abs(got[n].sums - want[n].sums).max() / want[n].sums.max() for n in want)
    moved = sum(int(np.abs(got[n].counts - want[n].counts).sum()) // 2 for n in want)
    return f"{sums:.1e}" + (f" ({moved} moved)" if moved else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="Vulkan", help="as imatrix --version names it")
    parser.add_argument("--driver", default="", help="its name and version, for the table")
    args = parser.parse_args()
    devices = [d for d in backends().devices if d.gpu]
    if [d.backend.upper() for d in devices] != [args.backend.upper()]:
        sys.exit(f"one device, of {args.backend}, is wanted; this build and machine: {backends()}")
    lines = [
        f"# Sums made on a device: {args.backend}",
        "",
        f"{datetime.date.today()}, {devices[0].description}{args.driver and ', ' + args.driver}; "
        f"{machine()}; {backends().engine}. Made by benchmarks/devices.py: {CHUNKS} chunks of "
        f"{N_CTX} tokens, random models. Differences are of a weight's sums, the largest over the "
        "largest sum; moved: rows that went to another expert, which is what a device's own "
        "rounding does where two are close.",
        "",
        "| model | layers on the device | device sums and copied rows | and llama-imatrix there "
        "| and the CPU | llama-imatrix there and on the CPU | copied, kB | device sums, kB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for arch, (kind, n_nextn) in ARCHS.items():
            options: dict[str, Any] = {"n_nextn": n_nextn} if n_nextn else {}
            model = folder / f"{arch}.gguf"
            make_model(model, arch, seed=2, **options)  # type: ignore[arg-type]
            mtp = n_nextn > 0
            host, _ = ours(model, folder, mtp, NO_GPU)
            host_theirs = theirs(model, folder, NO_GPU, 0)
            # one trunk layer on the device, with the head and the output matrix, and one on the host
            for layers in (-1, 2 + n_nextn):
                place = {} if layers < 0 else KEPT_HERE
                there, counted = ours(model, folder, mtp, place, n_gpu_layers=layers)
                copied, fetched = ours(
                    model, folder, mtp, place, n_gpu_layers=layers, device_sums=False
                )
                reference = theirs(model, folder, place, 99 if layers < 0 else layers)
                lines.append(
                    f"| {arch} ({kind}){', trunk and head' if mtp else ''} "
                    f"| {'all' if layers < 0 else layers} | {apart(there, copied)} "
                    f"| {apart(there, reference)} | {apart(there, host)} "
                    f"| {apart(reference, host_theirs)} "
                    f"| {fetched['fetched_bytes'] / 1e3:.0f} | {counted['fetched_bytes'] / 1e3:.0f} |"
                )
                print(lines[-1], flush=True)
    out = models.ROOT / "benchmarks/results" / f"{args.backend.lower()}.md"
    out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
