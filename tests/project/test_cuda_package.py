"""vendor/cuda, the distribution imatrix-cuda: what can be said of it without compiling CUDA. What
is in a wheel of it is checked where it is made (tests/wheel/check_dist.py), and how the package
takes its module is in tests/native/test_backends.py."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import build.util
import pytest
from helpers.engine_tools import tomllib

import imatrix

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "vendor/cuda"
CUDA_NEEDS: set[str] = runpy.run_path(str(ROOT / "tests/wheel/check_dist.py"))["CUDA_NEEDS"]
PROJECT = tomllib.loads((CUDA / "pyproject.toml").read_text("utf-8"))


@pytest.mark.engine("ggml/src/ggml-cuda", "which functions of the driver it calls")
def test_the_library_that_stands_for_the_driver_has_what_the_engine_calls() -> None:
    source = ROOT / "vendor/llama.cpp/ggml/src/ggml-cuda"
    calls = {
        name
        for pattern in ("*.cu", "*.cuh")
        for path in source.glob(pattern)
        for name in re.findall(r"\b(cu[A-Z][a-z]\w+)\(", path.read_text("utf-8"))
    }
    stubs = re.findall(r"^FROM_THE_DRIVER\((\w+)\)$", (CUDA / "driver_symbols.c").read_text(), re.M)
    assert calls == set(stubs)


def test_it_asks_for_its_own_version_of_imatrix() -> None:
    metadata = build.util.project_wheel_metadata(CUDA, isolated=False)
    assert metadata["Name"] == "imatrix-cuda"
    assert metadata["Version"] == imatrix.__version__
    assert f"imatrix=={imatrix.__version__}" in metadata.get_all("Requires-Dist")


def test_one_cuda_is_built_with_and_asked_for() -> None:
    versions = {
        requirement.split("==")[1]
        for requirement in PROJECT["build-system"]["requires"]
        if requirement.startswith("nvidia-")
    }
    assert len(versions) == 1
    major = int(versions.pop().split(".")[0])
    asked = PROJECT["tool"]["scikit-build"]["metadata"]["dependencies"]["result"]
    assert f"nvidia-cuda-runtime>={major},<{major + 1}" in asked
    assert f"nvidia-cublas>={major},<{major + 1}" in asked
    assert {f"libcudart.so.{major}", f"libcublas.so.{major}"} <= CUDA_NEEDS
    assert f"nvidia/cu{major}" in (CUDA / "CMakeLists.txt").read_text("utf-8")


def test_what_others_bring_is_left_out_of_the_wheel() -> None:
    repair = PROJECT["tool"]["cibuildwheel"]["repair-wheel-command"]
    assert set(re.findall(r"--exclude (\S+)", repair)) == CUDA_NEEDS
    rule = (ROOT / "Makefile").read_text("utf-8").split("\ndist-cuda:")[1].split("\n\n")[0]
    listed = re.search(r"foreach l,([^,]+),--exclude", rule)
    assert listed is not None
    assert set(listed[1].split()) == CUDA_NEEDS
