"""benchmarks/gpu.py runs: on the CPU, with models of some millions of weights. Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def test_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--backend", "cpu", "--passes", "1"]
    command += ["--chunks", "128", "--tokens", "256", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert [(grid["model"], grid["n_ctx"]) for grid in kept["grids"]] == [
        ("dense", 128),
        ("experts", 128),
    ]
    # distinct activations of a layer: attention's input and output, then those of the MLP; the
    # router shares its input with gate and up, and so does the shared expert
    dense = kept["grids"][0]["variants"]
    # three recurrent layers (qkv, gate, beta and alpha share; out), one of attention (q, k and v;
    # out), and 2 for each MLP
    assert dense["imatrix, trunk, device sums"]["stops"] == 4 * 2 + 4 * 2
    # eh_proj, attention, MLP
    assert dense["imatrix, trunk + head, device sums"]["stops"] == 4 * 4 + 1 + 2 + 2
    for grid in kept["grids"]:
        assert len(grid["variants"]) == 7
        for variant, found in grid["variants"].items():
            assert len(found["seconds"]) == 1
            if variant.startswith("plain"):
                assert found["stops"] == 0
            if variant.startswith("imatrix"):
                assert found["stops"] > 0
                assert found["fetched_bytes"] == 0  # everything is in the host's memory
    told = (tmp_path / "gpu.md").read_text()
    assert told.count("| llama-imatrix --no-ppl |") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
