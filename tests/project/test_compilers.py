"""What a build from source says on a machine without a compiler for it (vendor/compilers.cmake)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))  # the CMake and ninja that pip has installed
CURE = (
    "A build from source needs a C compiler and one for C++17",
    "apt-get install g++",
    "pip install --only-binary imatrix imatrix",
)
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the compilers here are shell scripts")


def configure(folder: Path, **variables: str) -> str:
    """What CMake writes if it cannot configure, in one line."""
    done = subprocess.run(
        [SCRIPTS / "cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja",
         f"-DPython_EXECUTABLE={sys.executable}"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode != 0, done.stdout
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(("variable", "language"), [("CC", "C"), ("CXX", "C++")])
def test_none(variable: str, language: str, tmp_path: Path) -> None:
    told = configure(tmp_path, **{variable: "/nonexistent"})
    assert (
        f"imatrix: no {language} compiler that works was found ({variable}=/nonexistent)." in told
    )
    for words in CURE:
        assert words in told


def test_none_on_the_path(tmp_path: Path) -> None:
    """As on a machine that has none: only ninja is found."""
    (tmp_path / "ninja").symlink_to(SCRIPTS / "ninja")
    told = configure(tmp_path, PATH=str(tmp_path))
    assert "imatrix: no C compiler that works was found. " in told
    for words in CURE:
        assert words in told


def test_one_that_is_too_old(tmp_path: Path) -> None:
    """It compiles C++, without <filesystem>, as GCC 7 does."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'for each; do case "$each" in\n'
        '  *.cxx) if grep -q filesystem "$each"; then echo no such file >&2; exit 1; fi;;\n'
        "esac; done\n"
        f'exec {shutil.which("c++")} "$@"\n'
    )
    compiler.chmod(0o755)
    told = configure(tmp_path, CXX=str(compiler))
    assert f"imatrix: {compiler} (GNU " in told or f"imatrix: {compiler} (Clang " in told
    assert "does not compile C++17 with <filesystem>." in told
    for words in CURE:
        assert words in told


def test_what_pip_ends_with(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir",
         tmp_path, "-C", f"build-dir={tmp_path / 'build'}", ROOT],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CXX": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == 1
    told = " ".join((done.stdout + done.stderr).split())
    for words in CURE:
        assert words in told
