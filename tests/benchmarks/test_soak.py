"""A shorter run of benchmarks/soak.py: nothing grows, and the sums are the oracle's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.mark.parametrize("isolate", [False, True])
def test_two_hundred_chunks(isolate: bool, tmp_path: Path) -> None:
    looks, error = soak.soak(tmp_path, 200, isolate=isolate)
    assert len(looks) >= 8
    assert error < 1e-12
