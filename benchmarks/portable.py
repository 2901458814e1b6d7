"""The portable wheel: as other processors than this one, on arm64, and its speed beside a build for
this machine.

    python benchmarks/portable.py processors dist/imatrix-*.whl    # qemu-x86_64 (Debian: qemu-user)
    python benchmarks/portable.py arm64                            # and g++-aarch64-linux-gnu
    python benchmarks/portable.py beside dist/imatrix-*.whl        # compiles llama-cpp-python
    python benchmarks/portable.py speed dist/imatrix-*.whl         # on a quiet machine

Each puts its part into results/portable.json, of which results/portable.md is made again.

processors: the wheel is installed in an environment of its own, and the package's small model is
collected, checked and quantized there under qemu as processors with fewer and fewer instructions.
Expected: the variant that is made for the processor, the counts of this machine's run, and its sums
within the rounding of a forward pass.

arm64: the native core's own tests, cross-compiled, run under qemu-aarch64: the row kernels by
themselves, then, unless --rows-only is given, the hook and whole sessions with the engine.

beside: the wheel and llama-cpp-python, built from its source distribution, in one process (beside.py).

speed: sessions of the wheel and of this interpreter's imatrix, which has to be a build for this
machine (make dev), take turns chunk by chunk; the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import beside
import numpy as np

import imatrix
from imatrix.demo import CALIBRATION, MODEL
from imatrix.engine.cores import physical_cores

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"

# As qemu 7.2 knows them, with the variant of the engine's backend that each must get. Its emulation
# has no AVX-512.
PROCESSORS = {
    "core2duo": "x64",
    "Nehalem": "sse42",
    "SandyBridge": "sandybridge",
    "IvyBridge": "ivybridge",
    "Opteron_G5": "piledriver",
    "Haswell": "haswell",
    "EPYC": "haswell",
}
# NumPy's newer wheels need SSE4.2; the first processor gets one from before that.
OLD_NUMPY = "numpy==2.2.6"
# What separates two processors' forward passes: products of F16 weights and float32 rows, summed in
# another order, through 5 blocks; where an expert's choice is close, one row may go to another.
# Of an entry's sums, the median and the largest difference relative to the entry's largest sum.
MOST_APART = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("processors", "beside", "speed"):
        parts.add_parser(name).add_argument("wheel", type=Path)
    parts.choices["processors"].add_argument("--only", help="some processors, a comma between")
    parts.choices["speed"].add_argument("--pairs", type=int, default=16)
    parts.choices["speed"].add_argument("--size", choices=("full", "half"), default="full")
    parts.add_parser("arm64").add_argument(
        "--rows-only",
        action="store_true",
        help="without the engine, which takes its time to compile",
    )
    args = parser.parse_args()
    kept = RESULTS / "portable.json"

    def keep(part: dict[str, Any]) -> None:
        """Put what was found into the file and on the page."""
        results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
        before = results.get(args.part, {})
        # --only: other processors stay
        if args.part == "processors" and before.get("wheel") == part["wheel"]:
            rows = {row["name"]: row for row in [*before["rows"], *part["rows"]]}
            order = ["this machine", *PROCESSORS]
            part = {**part, "rows": sorted(rows.values(), key=lambda row: order.index(row["name"]))}
        results[args.part] = {**part, "date": str(datetime.date.today())}
        kept.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "portable.md").write_text(page(results))

    if args.part == "processors":
        try_processors(args.wheel.resolve(), args.only, keep)
    elif args.part == "beside":
        keep(try_beside(args.wheel.resolve()))
    elif args.part == "speed":
        keep(measure(args.wheel.resolve(), args.pairs, args.size))
    else:
        keep(try_arm64(whole=not args.rows_only))
    print((RESULTS / "portable.md").read_text())


def installed(wheel: Path, folder: Path, *others: str) -> Path:
    """The interpreter of a new environment with the wheel, and what else is asked for."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel, *others], check=True)
    return python


# --- other processors -------------------------------------------------------------------------------


def try_processors(wheel: Path, only: str | None, keep: Callable[[dict[str, Any]], None]) -> None:
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        sys.exit("there is no qemu-x86_64: apt-get install qemu-user")
    version = subprocess.run([qemu, "--version"], capture_output=True, text=True).stdout.split()[2]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = installed(wheel, folder / "venv")
        (folder / "text.txt").write_text(CALIBRATION.read_text("utf-8")[:4000], "utf-8")
        first = steps(python, folder, "this machine", [])
        rows = [first[0]]
        for name, variant in PROCESSORS.items():
            if only is None or name in only.split(","):
                chosen = python
                if name == "core2duo":
                    chosen = installed(wheel, folder / "old", OLD_NUMPY)
                row, matrix = steps(chosen, folder, name, [qemu, "-cpu", name])
                compare(row, matrix, first[1])
                assert row["variant"] == variant, (name, row["variant"], variant)
                rows.append(row)
                keep({"wheel": wheel.name, "qemu": version, "rows": rows})


def steps(
    python: Path, folder: Path, name: str, emulator: list[str]
) -> tuple[dict[str, Any], imatrix.ImportanceMatrix]:
    """Collect, check and quantize; what was chosen, and the matrix."""
    # The engine runs in children, which are started by sys.executable: under the emulator too.
    place = folder / name.replace(" ", "-")
    place.mkdir()
    start = place / "python"
    start.write_text("#!/bin/sh\nexec " + " ".join([*emulator, str(python)]) + ' "$@"\n')
    start.chmod(0o755)
    (place / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(start)!r}\n")
    env = {**os.environ, "PYTHONPATH": str(place), "OPENBLAS_NUM_THREADS": "1"}

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [start, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=place
        )
        if done.returncode != 0:
            sys.exit(f"{name}: {arguments}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def command(*arguments: object) -> str:
        return run("-m", "imatrix", *arguments)

    # asked in a child, as the engine is
    code = "import subprocess, sys; print(subprocess.check_output([sys.executable, '-m', 'imatrix', '--version'], text=True))"
    told = run("-c", code)
    # one thread: several wait for each other in loops, which an emulator on a busy machine runs for
    # as long as it lets them
    command("collect", "-m", MODEL, "-f", "../text.txt", "-o", "m.gguf", "--mtp", "-c", 64,
            "--chunks", 2, "-t", 1)  # fmt: skip
    command("check", MODEL, "m.gguf", "--type", "IQ3_S")
    command("quantize", MODEL, "q.gguf", "IQ3_S", "--imatrix", "m.gguf")
    row = {
        "name": name,
        "variant": find(r"^CPU variant (.+)$", told),
        "kernel": find(r"^row kernel  (\S+)", told),
        "quantized": (place / "q.gguf").stat().st_size,
    }
    print(row, file=sys.stderr, flush=True)
    return row, imatrix.ImportanceMatrix.load(place / "m.gguf")


def find(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.M)
    assert found is not None, (pattern, text)
    return found[1]


def compare(
    row: dict[str, Any], matrix: imatrix.ImportanceMatrix, first: imatrix.ImportanceMatrix
) -> None:
    """Adds to the row how far the matrix is from this machine's."""
    assert list(matrix) == list(first)
    apart = []
    moved = 0
    rows = 0
    for name, entry in matrix.items():
        other = first[name]
        rows += int(other.counts.sum())
        moved += int(np.abs(entry.counts - other.counts).sum()) // 2
        if len(entry.counts) == 1:
            assert entry.counts.tolist() == other.counts.tolist(), name
        difference = np.abs(np.asarray(entry.sums) - np.asarray(other.sums))
        apart.append(float(difference.max() / np.asarray(other.sums).max()))
    row["moved"], row["rows"] = moved, rows
    row["apart"] = [float(np.median(apart)), max(apart)]
    assert max(apart) <= MOST_APART, row


# --- arm64 ------------------------------------------------------------------------------------------

TOOLCHAIN = """set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
"""


def try_arm64(*, whole: bool) -> dict[str, Any]:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None or shutil.which("qemu-aarch64") is None:
        sys.exit("it takes aarch64-linux-gnu-g++ and qemu-aarch64: apt-get install "
                 "g++-aarch64-linux-gnu qemu-user")  # fmt: skip
    folder = ROOT / "build/arm64"
    folder.mkdir(parents=True, exist_ok=True)
    tests = folder / "row-tests"
    sources = [ROOT / "tests/native/row_tests.cpp", *(
        ROOT / f"ext/{name}.cpp" for name in ("row_kernels", "add_rows", "parallel")
    )]  # fmt: skip
    subprocess.run(
        [compiler, "-std=c++17", "-O3", "-DNDEBUG", "-I", ROOT / "ext", *sources, "-pthread",
         "-o", tests],
        check=True,
    )  # fmt: skip
    programs: list[tuple[str, list[Path]]] = [("rows", [tests])]
    if whole:
        programs.append(("core", core_tests(folder)))
    rows = []
    for cpu in ("cortex-a72", "max"):
        for what, command in programs:
            said = emulated(cpu, command)
            rows.append({"cpu": cpu, "what": what, "said": said})
            print(rows[-1], file=sys.stderr, flush=True)
            assert said[-1] == "ok", said
            assert what != "rows" or said[:-1] == ["kernel neon", "kernel plain"], said
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True).stdout
    return {"compiler": version.strip(), "rows": rows}


def emulated(cpu: str, command: list[Path]) -> list[str]:
    """What a program for arm64 prints, line by line."""
    done = subprocess.run(
        ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu, *command],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{command[0]} as {cpu}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.splitlines()


def core_tests(folder: Path) -> list[Path]:
    """The core's tests with the engine, compiled, and the models that they run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.forge import make_model

    folder = folder / "engine"  # deeper than where the tests look for programs of this machine
    folder.mkdir(exist_ok=True)
    toolchain = folder / "toolchain.cmake"
    toolchain.write_text(TOOLCHAIN)
    configure = [
        "-S", ROOT, "-B", folder, f"-DCMAKE_TOOLCHAIN_FILE={toolchain}",
        f"-DPython_EXECUTABLE={sys.executable}", "-DIMATRIX_BUILD_TOOLS=ON", "-DGGML_NATIVE=OFF",
        # the build asks Python for things, which is this machine's: CMake wants to hear how it runs
        "-DCMAKE_CROSSCOMPILING_EMULATOR=/usr/bin/env",
    ]  # fmt: skip
    subprocess.run(["cmake", "-G", "Ninja", *map(str, configure)], check=True)
    subprocess.run(["cmake", "--build", folder, "--target", "imatrix-core-tests"], check=True)
    models = [folder / "dense.gguf", folder / "head.gguf"]
    make_model(models[0], "llama")
    make_model(models[1], "qwen35moe", n_nextn=1)
    return [find_one(folder, "imatrix-core-tests"), *models]


def find_one(folder: Path, name: str) -> Path:
    return next(path for path in folder.rglob(name) if path.is_file())


# --- beside another llama.cpp -----------------------------------------------------------------------


def try_beside(wheel: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = installed(wheel, folder / "venv")
        # the libraries alone: no pictures, no GPUs
        env = {**os.environ, "CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--no-binary", beside.PACKAGE,
             f"{beside.PACKAGE}=={beside.VERSION}"],
            check=True,
            env=env,
        )  # fmt: skip
        work = folder / "work"
        work.mkdir()
        return {"wheel": wheel.name, **beside.compare(python, work)}


# --- speed ------------------------------------------------------------------------------------------


def measure(wheel: Path, n_pairs: int, size: str) -> dict[str, Any]:
    import models
    from hook_cost import interval
    from store import machine

    if imatrix.backends().cpu_variant is not None:
        sys.exit(
            "this interpreter's imatrix is portable itself: run it in a build for this machine"
        )
    cells = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        pythons = {"native": Path(sys.executable), "wheel": installed(wheel, Path(temporary) / "v")}
        told = subprocess.run(
            [pythons["wheel"], "-m", "imatrix", "--version"], capture_output=True, text=True
        ).stdout
        for dtype in ("F16", "BF16"):
            work = {
                "model": str(models.model("dense", size, dtype=dtype)),
                "text": str(CALIBRATION),
                "n_ctx": 512,
                "n_ubatch": 512,
                "n_chunks": 1,
                "n_threads": physical_cores(),
                "mtp": True,
                "perplexity": False,
            }
            running = {name: Worker(python, work) for name, python in pythons.items()}
            pairs = []
            for i in range(n_pairs):
                order = ("native", "wheel") if i % 2 == 0 else ("wheel", "native")
                seconds = {name: running[name].chunk() for name in order}
                pairs.append((seconds["native"], seconds["wheel"]))
            for worker in running.values():
                worker.close()
            ratio = interval([wheel / native for native, wheel in pairs])
            native = float(np.median([native for native, _ in pairs]))
            cells.append({"dtype": dtype, "pairs": n_pairs, "native": native, "ratio": ratio})
            print(cells[-1], file=sys.stderr, flush=True)
    variant = find(r"^CPU variant (.+)$", told)
    return {"machine": machine(), "load": load, "variant": variant, "size": size, "cells": cells}


class Worker:
    """A session of worker.py in a given interpreter."""

    def __init__(self, python: Path, work: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [python, Path(__file__).parent / "worker.py", json.dumps(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def chunk(self) -> float:
        """Seconds for a chunk, with the hook."""
        assert self._process.stdin is not None
        print("on", file=self._process.stdin, flush=True)
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a session ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.communicate()


# --- the page ---------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    lines = ["# The portable wheel", "", "Made by benchmarks/portable.py."]
    if found := results.get("processors"):
        lines += [
            "", "## As other processors", "",
            f"{found['date']}, {found['wheel']} under qemu-x86_64 {found['qemu']}: the package's "
            "small model, 2 chunks of 64 tokens, trunk and head, then check and quantize to IQ3_S. "
            "Every dense weight has the same count. Rows of experts that go to another expert than "
            "on this machine are counted as moved. Apart: the largest difference of a weight's sums, "
            "relative to its largest sum; median and largest of the weights. qemu 7.2 emulates no "
            "AVX-512, which the first row stands for, and nothing of XOP and FMA4, which no variant "
            f"uses. core2duo has {OLD_NUMPY} beside it: those since 2.4 need SSE4.2 and end there with "
            "an illegal instruction, before anything of imatrix is loaded.",
            "",
            "| processor | variant | row kernel | rows moved | sums apart, median | largest |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in found["rows"]:
            apart = ["", "", ""]
            if "apart" in row:
                apart = [f"{row['moved']} of {row['rows']}", *(f"{a:.1e}" for a in row["apart"])]
            lines.append(
                f"| {row['name']} | {row['variant']} | {row['kernel']} | "
                + " | ".join(apart)
                + " |"
            )
    if found := results.get("arm64"):
        lines += [
            "", "## arm64", "",
            f"{found['date']}, cross-compiled by GCC {found['compiler']}, run under qemu-aarch64. "
            "rows: tests/native/row_tests.cpp, every row kernel against sums in double, and the "
            "threads that share rows. core: tests/native/core_tests.cpp with the engine, the hook "
            "against a naive reference, and whole sessions of a dense model and of one with experts "
            "and a head.",
            "",
            "| processor | tests | what they say |",
            "|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {row['cpu']} | {row['what']} | {', '.join(row['said'])} |" for row in found["rows"]
        ]
    if found := results.get("beside"):
        lines += [
            "", "## Beside llama-cpp-python", "",
            f"{found['date']}, {found['wheel']} and {beside.PACKAGE} {found['version']}, built from its "
            "source distribution, in one process. The package's small model is loaded by both. 4 chunks "
            "of 64 tokens, trunk and head, are collected before it generates text, between two texts, "
            "while a thread generates one, and after that; sums and counts are compared with those of a "
            "process that has imatrix alone, and the texts with those of a process that has "
            f"{beside.PACKAGE} alone. Libraries in the process: {', '.join(found['libraries'])}.",
            "",
            "| imported | collected | weights | equal to the bit |",
            "|---|---|---|---|",
        ]  # fmt: skip
        lines += [
            f"| {row['order']} | {row['moment']} | {row['weights']} | all |"
            for row in found["rows"]
        ]
    if found := results.get("speed"):
        lines += [
            "", "## Speed beside a build for the machine", "",
            f"{found['date']}, {found['machine']}, load average before {found['load']:.1f}, variant "
            f"{found['variant']}. The dense model of benchmarks/models.py ({found['size']}), trunk "
            "and head, chunks of 512 tokens that take turns; median of the pairs' ratios [95 % "
            "interval].",
            "",
            "| source | pairs | s/chunk, native | wheel, of it |",
            "|---|---|---|---|",
        ]  # fmt: skip
        for cell in found["cells"]:
            middle, low, high = cell["ratio"]
            lines.append(
                f"| {cell['dtype']} | {cell['pairs']} | {cell['native']:.2f} "
                f"| {middle:.3f} [{low:.3f}, {high:.3f}] |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
