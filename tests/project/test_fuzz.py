"""Every reader, and everything that opens a model, is given malformed files.

There are some thousands of inputs, the same ones each time (tests/fuzz). They run in processes of
their own, so that an input with which the native part ends one is noticed. `make fuzz` tries many
more, guided by coverage.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
sys.path.insert(0, str(FUZZ))

from targets import TARGETS  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork, resource")


# each input that is taken is cut into two files and joined again
RUNS = {"mtp": "150"}


def ran(script: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, FUZZ / script, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        cwd=arguments[0] if script == "engine.py" else None,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_reader(target: str) -> None:
    assert ", 0 failures" in ran("run.py", target, "--plain", "--runs", RUNS.get(target, "700"))


@pytest.mark.slow
def test_what_opens_models(tmp_path: Path) -> None:
    """They raise, or they work; none ends the process."""
    out = ran("engine.py", tmp_path, "--runs", "200")
    assert '"worked"' in out
    assert '"refused"' in out
