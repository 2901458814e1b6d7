"""Runs that are killed: some dozens of deaths here, thousands by benchmarks/robustness.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "robustness.py"


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_killed_at_any_moment() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "20", "--steps", "14"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed at 14 of " in done.stdout
    assert "killed 20 times in " in done.stdout
