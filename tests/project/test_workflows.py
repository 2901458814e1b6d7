"""The workflows of .github/: what they run is there, and agrees with pyproject.toml. They run at
GitHub only; `make workflows` lints them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from helpers.engine_tools import tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text("utf-8"))
    for path in sorted((ROOT / ".github/workflows").glob("*.yml"))
}


def steps() -> list[dict[str, Any]]:
    return [
        step
        for flow in WORKFLOWS.values()
        for job in flow["jobs"].values()
        for step in job["steps"]
    ]


def test_what_is_run_is_there() -> None:
    runs = [step["run"] for step in steps() if "run" in step]
    assert any(".ci/run" in run for run in runs)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for run in runs:
        for path in re.findall(r"(?<![\w./])(?:\.ci|tests|benchmarks)/[\w./]+", run):
            assert (ROOT / path).is_file(), run
        for target in re.findall(r"\bmake (\w+)", run):
            assert re.search(rf"^{target}:", makefile, re.M), run
        for group in re.findall(r"--group (\w+)", run):
            assert group in PROJECT["dependency-groups"], run


def test_actions_are_pinned_by_commit() -> None:
    for step in steps():
        if "uses" in step:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]), step["uses"]


def test_nothing_may_write_but_what_publishes() -> None:
    for flow in WORKFLOWS.values():
        assert flow["permissions"] == {"contents": "read"}
        for name, job in flow["jobs"].items():
            assert "permissions" not in job or name == "publish"
    publish = WORKFLOWS["wheels.yml"]["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert publish["needs"] == ["check"]


def test_the_pythons_that_wheels_are_made_for() -> None:
    matrix = WORKFLOWS["wheels.yml"]["jobs"]["wheels"]["strategy"]["matrix"]
    assert PROJECT["tool"]["cibuildwheel"]["build"] == [f"{tag}-*" for tag in matrix["python"]]
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=3.")
    assert matrix["python"][0] == f"cp3{oldest}"


def test_the_wheels_are_portable_and_tried() -> None:
    build = PROJECT["tool"]["cibuildwheel"]
    assert build["config-settings"] == {"cmake.define.IMATRIX_PORTABLE": "ON"}
    (suite,) = build["test-sources"]
    assert (ROOT / suite).is_file()
    assert suite in build["test-command"]
