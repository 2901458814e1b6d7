#!/usr/bin/env python3
"""Install a release's files as a user would, in empty environments, and try them.

    python tests/wheel/try_dist.py dist [--only wheel|cuda|sdist] [--demo]

wheel: the wheel for this interpreter is installed where no compiler is on the path; then run: the commands
of the README's first block on the model that the package brings, and tests/wheel/test_installed.py.

With --demo, `imatrix demo` runs there as well, which takes a minute.

cuda: the wheel of imatrix-cuda, if there is one, is installed beside it, and NVIDIA's packages from the
index; a card is a device then, or what keeps it from being one is told, and the same commands run.

sdist: it is installed by a pip that reaches no network (Linux: a network namespace with nothing in
it), given what pyproject.toml says the build requires. It compiles the engine.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEST = ROOT / "tests/wheel/test_installed.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheel and the sdist are")
    parser.add_argument("--only", choices=("wheel", "cuda", "sdist"), help="one of them")
    parser.add_argument("--demo", action="store_true", help="run imatrix demo too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        if args.only in (None, "wheel"):
            wheel = only_one(args.folder, f"imatrix-*-{tag}-*.whl")
            try_wheel(wheel, Path(folder) / "wheel", demo=args.demo)
        if args.only == "cuda" or (args.only is None and [*args.folder.glob("imatrix_cuda-*.whl")]):
            wheel = only_one(args.folder, f"imatrix-*-{tag}-*.whl")
            cuda = only_one(args.folder, "imatrix_cuda-*.whl")
            try_cuda(wheel, cuda, Path(folder) / "cuda")
        if args.only in (None, "sdist"):
            try_sdist(only_one(args.folder, "imatrix-*.tar.gz"), Path(folder) / "sdist")
    print("tried, and all went well")
    return 0


def only_one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.resolve().glob(pattern))
    if len(found) != 1:
        sys.exit(f"{folder} holds {len(found)} files {pattern}, expected 1: make dist")
    return found[0]


def run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, env=env, check=True)


def environment(folder: Path) -> Path:
    """An empty one; its interpreter."""
    folder.mkdir()
    venv.create(folder / "venv", with_pip=True)
    return folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def try_wheel(wheel: Path, folder: Path, *, demo: bool) -> None:
    python = environment(folder)
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=folder)
    env = alone(python)
    assert shutil.which("c++", path=env["PATH"]) is None
    work = run_readme(python, folder)
    if demo:
        run(python.parent / "imatrix", "demo", cwd=work, env=env)

    run(python, "-m", "pip", "install", "--quiet", "pytest", cwd=folder)
    # a copy, away from the tree's own conftest.py
    shutil.copy(TEST, work)
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", TEST.name, cwd=work, env=env)


def try_cuda(wheel: Path, cuda: Path, folder: Path) -> None:
    python = environment(folder)
    run(python, "-m", "pip", "install", "--quiet", wheel, cuda, cwd=folder)
    told = subprocess.run(
        [python.parent / "imatrix", "--version"],
        check=True, capture_output=True, text=True, env=alone(python),
    ).stdout  # fmt: skip
    print(told)
    card = re.search(r"^device +CUDA0: ", told, re.M)
    driver = "libggml-cuda.so: libcuda.so.1: cannot open shared object file"
    if card is None and driver not in told and "CUDA" not in told:
        sys.exit("there is no card, and nothing says what keeps CUDA from being used")
    run_readme(python, folder)


def alone(python: Path) -> dict[str, str]:
    """Only what the environment brings, and the system's shell."""
    env = {**os.environ, "PATH": str(python.parent)}
    env.pop("PYTHONPATH", None)
    return env


def run_readme(python: Path, folder: Path) -> Path:
    """Run the commands of the main job on the package's own model; the folder in which they ran."""
    env = alone(python)
    work = folder / "work"
    work.mkdir()
    run(python.parent / "imatrix", "--version", cwd=work, env=env)
    data = "import imatrix.demo as d; print(d.MODEL); print(d.CALIBRATION); print(d.HELD_OUT)"
    files = subprocess.run(
        [python, "-c", data], check=True, capture_output=True, text=True, cwd=work
    ).stdout.splitlines()
    names = ("model-BF16.gguf", "calibration.txt", "held-out.txt")
    for file, name in zip(files, names, strict=True):
        shutil.copy(file, work / name)
    for command in readme_commands():
        run(python.parent / command[0], *command[1:], cwd=work, env=env)
    return work


def readme_commands() -> list[list[str]]:
    """The three commands of the main job."""
    page = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    block = next(b for b in blocks if b.startswith("imatrix collect"))
    return [line.split() for line in block.splitlines() if line]


def try_sdist(sdist: Path, folder: Path) -> None:
    python = environment(folder)
    needed = (ROOT / "pyproject.toml").read_text("utf-8")
    requires = re.findall(r'"(.+?)"', needed.split("requires = [")[1].split("]")[0])
    dependencies = re.findall(r'"(.+?)"', needed.split("\ndependencies = [")[1].split("]")[0])
    run(python, "-m", "pip", "install", "--quiet", *requires, *dependencies, "cmake>=3.21", "ninja",
        cwd=folder)  # fmt: skip
    offline = ["unshare", "--net"] if shutil.which("unshare") else []
    if offline and os.geteuid() != 0:
        offline.insert(1, "--map-root-user")
    env = {
        **os.environ,
        "IMATRIX_CACHE": str(folder / "no-cache"),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    run(*offline, python, "-m", "pip", "install", "--no-index", "--no-build-isolation", sdist,
        cwd=folder, env=env)  # fmt: skip
    run(python.parent / "imatrix", "--version", cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
