"""An installed wheel, by what a user does with it: the steps of the README on the model that it
brings, `imatrix --version`, and the backends that it carries as modules.

The release runs this file on each wheel (cibuildwheel, tests/wheel/try_dist.py) with nothing of the
tree beside it, so it imports pytest and the package alone. In the tree's own tests it runs on the
build there; what only a build with modules can show is marked, and left out of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import imatrix
from imatrix.demo import CALIBRATION, MODEL
from imatrix.native import engine

LIB = Path(engine.__file__).parents[1] / "lib"


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "imatrix", *map(str, command)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **variables},
        timeout=600,
    )


def test_collect_check_quantize(tmp_path: Path) -> None:
    text = CALIBRATION.read_text(encoding="utf-8")[:6000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    done = run("collect", "-m", MODEL, "-f", "text.txt", "-o", "m.gguf", "--mtp", "-c", 64,
               "--chunks", 4, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    matrix = imatrix.ImportanceMatrix.load(tmp_path / "m.gguf")
    assert len(matrix) == 44
    # every dense weight of the trunk saw every token
    assert matrix["blk.0.attn_q.weight"].counts.tolist() == [4 * 64]
    done = run("check", MODEL, "m.gguf", "--type", "Q2_K", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run("quantize", MODEL, "q.gguf", "Q2_K", "--imatrix", "m.gguf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # and the result runs: quantized products are other code than those of F16
    done = run("evaluate", "q.gguf", "-f", "text.txt", "-c", 64, "--chunks", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_version(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"imatrix {imatrix.__version__}\n")
    assert "device      CPU: " in done.stdout
    assert "unusable" not in done.stdout


def test_the_same_sums_by_every_row_kernel(tmp_path: Path) -> None:
    """Within rounding: 16 chunks of 64 rows in float32 partial sums of 512 rows at most, each
    addition rounded once, 512 * 2^-24 in the worst case."""
    (tmp_path / "text.txt").write_text(CALIBRATION.read_text(encoding="utf-8")[:6000], "utf-8")
    first = None
    for kernel in imatrix.backends().row_kernels:
        done = run("collect", "-m", MODEL, "-f", "text.txt", "-o", f"{kernel}.gguf", "-c", 64,
                   "--chunks", 2, "--no-ppl", cwd=tmp_path, IMATRIX_KERNEL=kernel)  # fmt: skip
        assert done.returncode == 0, done.stderr
        matrix = imatrix.ImportanceMatrix.load(tmp_path / f"{kernel}.gguf")
        first = first or matrix
        for name, entry in matrix.items():
            assert entry.counts.tolist() == first[name].counts.tolist()
            assert entry.sums == pytest.approx(first[name].sums, rel=512 * 2.0**-24)


# --- modules ----------------------------------------------------------------------------------------

modules = pytest.mark.needs("modules")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the installed package and the libraries bundled with it."""
    site = Path(imatrix.__file__).parents[1]
    for name in ("imatrix", "imatrix.libs"):
        if (site / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(site / name, tmp_path / name, ignore=ignored)
    return tmp_path


def run_copy(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    paths = [str(folder), sysconfig.get_paths()["purelib"]]
    code = (
        f"import sys; sys.path[:0] = {paths}; import imatrix.cli\n"
        f"raise SystemExit(imatrix.cli.main({[str(part) for part in command]}))"
    )
    return subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=folder, timeout=120
    )


def cpu_modules(lib: Path) -> list[Path]:
    return sorted(
        path for path in lib.iterdir() if path.name.startswith(("libggml-cpu", "ggml-cpu"))
    )


@modules
def test_there_are_variants_and_one_was_chosen() -> None:
    found = [path.name for path in cpu_modules(LIB)]
    assert len(found) > 1
    chosen = imatrix.backends().cpu_variant
    assert chosen is not None
    assert any(f"ggml-cpu-{chosen}." in name for name in found)


@modules
def test_without_a_backend_for_the_cpu(package: Path) -> None:
    for path in cpu_modules(package / "imatrix/lib"):
        path.unlink()
    done = run_copy(package, "--version")
    assert done.returncode == 1
    words = " ".join(done.stderr.split())
    assert "the engine has no backend for the CPU: " in words
    assert "holds no " in words
    assert "pip install --force-reinstall imatrix" in words
    (package / "text.txt").write_text("one two three four five six seven " * 60)
    done = run_copy(package, "collect", "-m", MODEL, "-f", "text.txt", "-o", "m.gguf", "-c", 64)
    assert done.returncode == 1
    assert "the engine has no backend for the CPU: " in " ".join(done.stderr.split())
    assert not (package / "m.gguf").exists()


@modules
def test_a_processor_that_no_variant_serves(package: Path) -> None:
    """As if it were so: what is left cannot be loaded."""
    first, *others = cpu_modules(package / "imatrix/lib")
    for path in others:
        path.unlink()
    first.write_bytes(b"\x7fELF of no use")
    done = run_copy(package, "--version")
    assert done.returncode == 1
    words = " ".join(done.stderr.split())
    assert "of 1 in " in words
    assert "none can be used here. " + first.name in words


@modules
def test_a_damaged_variant_is_listed_and_another_is_taken(package: Path) -> None:
    chosen = imatrix.backends().cpu_variant
    for path in cpu_modules(package / "imatrix/lib"):
        if f"ggml-cpu-{chosen}." in path.name:
            path.write_bytes(b"\x7fELF of no use")
            damaged = path.name
    done = run_copy(package, "--version")
    assert done.returncode == 0, done.stderr
    assert f"unusable    {damaged}: " in done.stdout
    assert f"CPU variant {chosen}\n" not in done.stdout
    assert "CPU variant " in done.stdout
