"""The command that runs first after the engine's pin has moved (engine_check.py)."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import engine_check, engine_tools
from helpers.engine_check import ENGINE, RECORD, ROOT, Assumptions, changed, digest, record, report


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source of two files, neither of which is recorded yet."""
    (tmp_path / "src" / "models").mkdir(parents=True)
    (tmp_path / "src" / "graph.cpp").write_text("a")
    (tmp_path / "src" / "models" / "m.cpp").write_text("b")
    monkeypatch.setattr(engine_check, "ENGINE", tmp_path)
    monkeypatch.setattr(engine_check, "RECORD", tmp_path / "record.json")
    return tmp_path


def found() -> Assumptions:
    made = Assumptions()
    made.tests = {
        "test_a.py::test_one": [("src/graph.cpp", "it adds"), ("src/models", "they run")],
        "test_a.py::test_two": [("src/graph.cpp", "it adds")],
    }
    return made


def test_a_failing_test_is_named_with_what_it_rests_on(engine: Path) -> None:
    made = found()
    record(made.files)
    made.failed = ["test_a.py::test_one"]
    lines = report(made).splitlines()
    at = lines.index("  test_a.py::test_one")
    assert lines[at + 1 :] == ["    src/graph.cpp: it adds", "    src/models: they run"]
    assert "test_two" not in report(made)


def test_files_that_differ_are_named_though_all_passes(engine: Path) -> None:
    made = found()
    assert changed(made.files) == ["src/graph.cpp", "src/models"]  # nothing recorded
    record(made.files)
    assert changed(made.files) == []
    assert "All as assumed" in report(made)
    (engine / "src" / "models" / "m.cpp").write_text("c")
    assert changed(made.files) == ["src/models"]
    assert "  src/models\n    they run" in report(made)
    (engine / "src" / "graph.cpp").unlink()
    assert "  src/graph.cpp (it is not there)\n    it adds" in report(made)


def test_a_file_of_another_name_is_another_folder(engine: Path) -> None:
    before = digest("src/models")
    (engine / "src" / "models" / "m.cpp").rename(engine / "src" / "models" / "n.cpp")
    assert digest("src/models") != before


@pytest.mark.slow
def test_every_mark_names_a_file_of_the_engine_and_is_recorded() -> None:
    """For the whole suite: `make engine-check ENGINE_ARGS=--record` makes the record again."""
    if not ENGINE.is_dir():
        pytest.skip("the engine's source is not here")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "engine_check.py"), "--list"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    listed = [line for line, after in itertools.pairwise(lines)
              if not line.startswith(" ") and after.startswith("    ")]  # fmt: skip
    assert "src/llama-graph.cpp" in listed
    assert [file for file in listed if not (ENGINE / file).exists()] == []
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    assert recorded["archive"] == engine_tools.pin()["sha256"]
    assert recorded["files"] == {file: digest(file) for file in listed}
