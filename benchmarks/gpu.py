"""Tokens per second on a GPU: plain prefill, imatrix, and llama-imatrix.

    python benchmarks/gpu.py [--models dense,experts] [--chunks 512,2048] [--passes 3]

Makes random models of 4 to 6 billion weights with an MTP head, F16, on the spot, and writes
benchmarks/results/gpu.{json,md}. benchmarks/gpu.sh builds the engine with CUDA without a network
and then runs this. So far only `--size tiny --backend cpu` was tried (tests/benchmarks/test_gpu_benchmark.py
does so): no GPU was available.

These take turns in every pass:

- plain prefill: a session of imatrix with its hook off, without the LM head, trunk and trunk + head
- imatrix, device sums: rows are squared and added on the device, sums are fetched once for each chunk
- imatrix, staging: rows are copied to the host and added there
- llama-imatrix --no-ppl, with all layers on the device: run with 1 + N chunks and with 1, and the
  difference is divided by N
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import models
from sessions import Sessions
from store import machine

from imatrix import backends
from imatrix.engine.cores import physical_cores

HERE = Path(__file__).parent
TEXT = models.ROOT / "src/imatrix/data/calibration.txt"

# variant -> with the head, device sums, hook
OURS = {
    "plain prefill, trunk": (False, True, "off"),
    "imatrix, trunk, device sums": (False, True, "on"),
    "imatrix, trunk, staging": (False, False, "on"),
    "plain prefill, trunk + head": (True, True, "off"),
    "imatrix, trunk + head, device sums": (True, True, "on"),
    "imatrix, trunk + head, staging": (True, False, "on"),
}
THEIRS = "llama-imatrix --no-ppl"


def llama_imatrix(tool: Path, work: dict[str, Any], out: Path) -> float:
    """Seconds a chunk."""
    n = work["n_chunks"]
    text = out.with_suffix(".txt")
    # llama-imatrix wants more tokens than it has to run; the text has 4.5 characters per token
    times = -(-8 * (2 + n) * work["n_ctx"] // TEXT.stat().st_size) + 1
    text.write_text(TEXT.read_text() * times)

    def seconds(n_chunks: int) -> float:
        started = time.perf_counter()
        done = subprocess.run(
            [
                tool, "-m", work["model"], "-f", text, "-o", out, "-c", str(work["n_ctx"]),
                "-b", str(work["n_ctx"]), "-ub", str(min(work["n_ctx"], work["n_ubatch"])),
                "-t", str(work["n_threads"]), "-ngl", str(max(0, work["n_gpu_layers"])),
                "--chunks", str(n_chunks), "--no-ppl",
            ],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        if done.returncode != 0:
            sys.exit(f"llama-imatrix failed:\n{done.stderr[-2000:]}")
        return time.perf_counter() - started

    return (seconds(1 + n) - seconds(1)) / n


def table(kept: dict[str, Any]) -> str:
    lines = [
        "# Tokens a second on a GPU",
        "",
        f"{kept['date']}, {kept['device']} ({kept['backend']}); host: {kept['machine']}; "
        f"{kept['engine']}. Median [lowest, highest] of {kept['passes']} passes that take turns, "
        f"graphs of {kept['n_ubatch']} tokens. Made by benchmarks/gpu.py.",
    ]
    for grid in kept["grids"]:
        lines += [
            "",
            f"## {grid['model']}, chunks of {grid['n_ctx']}",
            "",
            f"{grid['arch']}, {grid['gigabytes']:.2f} GB F16",
            "",
            "| variant | tokens/s | of plain prefill | of llama-imatrix | fetched a chunk, MB "
            "| stops a chunk |",
            "|---|---|---|---|---|---|",
        ]
        speeds = {
            variant: [grid["n_ctx"] / s for s in found["seconds"]]
            for variant, found in grid["variants"].items()
        }
        middle = {variant: statistics.median(values) for variant, values in speeds.items()}
        for variant, found in grid["variants"].items():
            plain = "plain prefill, trunk" + (" + head" if "head" in variant else "")
            values = speeds[variant]
            fetched = f"{found['fetched_bytes'] / 1e6:.2f}" if "fetched_bytes" in found else ""
            lines.append(
                f"| {variant} | {middle[variant]:.0f} [{min(values):.0f}, {max(values):.0f}] "
                f"| {middle[variant] / middle[plain]:.3f} "
                f"| {middle[variant] / middle[THEIRS]:.2f} "
                f"| {fetched} | {found.get('stops', '')} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="dense,experts")
    parser.add_argument("--chunks", default="512,2048", help="tokens a chunk")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32768, help="timed in one measurement")
    parser.add_argument("--n-ubatch", type=int, default=2048, help="tokens a graph")
    parser.add_argument("--size", choices=list(models.GPU), default="full")
    parser.add_argument("--backend", default="CUDA", help="as imatrix --version names it")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder")
    args = parser.parse_args()
    on_cpu = args.backend.upper() == "CPU"
    devices = [
        device
        for device in backends().devices
        if device.backend.upper() == args.backend.upper() and (device.gpu or on_cpu)
    ]
    if not devices:
        sys.exit(f"this build or machine has no {args.backend} device: {backends()}")
    tool = models.tool("llama-imatrix")
    kept: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "device": devices[0].description,
        "backend": args.backend, "machine": machine(), "engine": backends().engine,
        "passes": args.passes, "n_ubatch": args.n_ubatch, "grids": [],
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "gpu.json"
    if path.is_file():  # a call may measure one model only: earlier results of this machine stay
        before = json.loads(path.read_text())
        if all(before[name] == kept[name] for name in ("device", "machine", "engine", "n_ubatch")):
            kept["grids"] = before["grids"]
    for name in args.models.split(","):
        model = models.gpu_model(name, args.size)
        for n_ctx in map(int, args.chunks.split(",")):
            work = {
                "model": str(model), "text": str(TEXT), "n_ctx": n_ctx,
                "n_chunks": max(1, args.tokens // n_ctx), "n_ubatch": args.n_ubatch,
                "n_threads": args.threads, "n_gpu_layers": 0 if on_cpu else 999,
            }  # fmt: skip
            variants: dict[str, dict[str, Any]] = {}
            workers = Sessions(work)
            for number in range(args.passes):
                for variant, how in OURS.items():
                    mtp, device_sums, hook = how
                    answer = workers.run(hook, mtp=mtp, device_sums=device_sums, perplexity=False)
                    found = variants.setdefault(variant, {"seconds": []})
                    found["seconds"].append(answer["seconds"])
                    found["fetched_bytes"] = answer["fetched_bytes"]
                    found["stops"] = answer["stops"]
                    print(f"{name} {n_ctx} pass {number + 1} {variant}: "
                          f"{n_ctx / answer['seconds']:.0f} tokens/s", flush=True)  # fmt: skip
                seconds = llama_imatrix(tool, work, args.out / f"theirs-{os.getpid()}.gguf")
                variants.setdefault(THEIRS, {"seconds": []})["seconds"].append(seconds)
                print(f"{name} {n_ctx} pass {number + 1} {THEIRS}: {n_ctx / seconds:.0f} tokens/s",
                      flush=True)  # fmt: skip
            workers.close()
            for left in args.out.glob(f"theirs-{os.getpid()}.*"):
                left.unlink()
            grid = {
                "model": name, "n_ctx": n_ctx, "arch": models.GPU[args.size][name]["arch"],
                "gigabytes": model.stat().st_size / 1e9, "variants": variants,
            }  # fmt: skip
            kept["grids"] = [
                each for each in kept["grids"] if (each["model"], each["n_ctx"]) != (name, n_ctx)
            ] + [grid]
            path.write_text(json.dumps(kept, indent=1) + "\n")
            (args.out / "gpu.md").write_text(table(kept))
    print(table(kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
