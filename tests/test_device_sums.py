"""Rows that lie in a device's memory are summed there: whole models over the RPC backend.

A ggml-rpc-server on the loopback stands in for a GPU: its buffers are no host memory. It computes
with the same CPU kernels, so that the same model gives the same activations here and there.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Forged, RpcServer
from forge import Arch

import imatrix
from imatrix import Collector, EngineError, ImportanceMatrix

needs_rpc = pytest.mark.skipif(
    "RPC" not in imatrix.backends().built, reason="the engine was built without GGML_RPC=ON"
)

N_CTX = 96
SETTINGS: dict[str, Any] = {"n_ctx": N_CTX, "n_batch": 64, "n_ubatch": 64, "n_threads": 1}
# On both sides the same activations. Sums are float32 over at most a chunk, 96 rows: each is off
# by some 2^-24 for each addition that rounds, 6e-6 if all 96 did so the same way.
TOLERANCE = 1e-5

MODELS: list[tuple[Arch, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen35", {"n_nextn": 1}),  # a recurrent layer and one with attention
    ("glm4moe", {"n_nextn": 1}),  # experts
    ("deepseek2", {"n_nextn": 1}),  # 3-D weights
]


@pytest.fixture(scope="module")
def server(rpc_server: RpcServer) -> str:
    """host:port of a running ggml-rpc-server."""
    return rpc_server(0)


# A process of its own: a server that was added once is a device for every later model too.
RUN = """
import json, sys
import imatrix
model, endpoint, text, out, collector, mtp = json.loads(sys.argv[1])
imatrix.add_rpc_server(endpoint)
assert any(device.backend == "RPC" and device.gpu for device in imatrix.backends().devices)
with imatrix.Collector(model, **collector) as made:
    made.run([text], mtp=mtp, max_chunks=3).save(out)
    print(json.dumps(dict(made.counters)))
"""


@dataclass
class Remote:
    matrix: ImportanceMatrix
    counters: dict[str, int]


def remote(
    server: str, model: Path, text: list[int], out: Path, mtp: bool, **collector: Any
) -> Remote:
    given = json.dumps([str(model), server, text, str(out), {**SETTINGS, **collector}, mtp])
    done = subprocess.run(
        [sys.executable, "-c", RUN, given], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return Remote(ImportanceMatrix.load(out), json.loads(done.stdout.splitlines()[-1]))


def differences(got: ImportanceMatrix, want: ImportanceMatrix) -> dict[str, float]:
    """For each weight the largest difference over its largest sum."""
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name].counts, want[name].counts, err_msg=name)
    return {
        name: float(np.abs(got[name].sums - want[name].sums).max() / want[name].sums.max())
        for name in want
    }


@needs_rpc
@pytest.mark.parametrize("layers", [-1, 2])
@pytest.mark.parametrize(("arch", "options"), MODELS, ids=[arch for arch, _ in MODELS])
def test_sums_made_there_are_those_made_here(
    arch: Arch, options: dict[str, Any], layers: int, server: str, forged: Forged, tmp_path: Path
) -> None:
    spec = forged(arch, seed=2, **options)
    mtp = "n_nextn" in options
    text = np.random.default_rng(3).integers(0, spec.tokenizer.n_vocab, 3 * N_CTX).tolist()
    with Collector(spec.path, n_gpu_layers=0, **SETTINGS) as collector:
        want = collector.run([text], mtp=mtp, max_chunks=3)

    there = remote(server, spec.path, text, tmp_path / "there.gguf", mtp, n_gpu_layers=layers)
    copied = remote(
        server, spec.path, text, tmp_path / "copied.gguf", mtp,
        n_gpu_layers=layers, device_sums=False,
    )  # fmt: skip
    for run in (there, copied):
        worst = differences(run.matrix, want)
        assert {name: d for name, d in worst.items() if not d <= TOLERANCE} == {}
    # the same rows were looked at, and most of what was copied was not needed
    assert there.counters["stops"] == copied.counters["stops"]
    assert there.counters["squared_elements"] == copied.counters["squared_elements"]
    assert 0 < 4 * there.counters["fetched_bytes"] < copied.counters["fetched_bytes"]


@needs_rpc
def test_a_server_that_is_not_there() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it meanwhile
        with pytest.raises(OSError, match="no RPC server at 127"):
            imatrix.add_rpc_server(f"127.0.0.1:{closed.getsockname()[1]}")


@pytest.mark.parametrize(
    "bad", ["", "localhost", "localhost:", ":1", "h:x", "h:0", "h:65536", "h:1,"]
)
def test_what_is_no_endpoint(bad: str) -> None:
    with pytest.raises((ValueError, OSError)):
        imatrix.add_rpc_server(bad)


@pytest.mark.skipif("RPC" in imatrix.backends().built, reason="the engine has the RPC backend")
def test_a_build_without_rpc_says_so() -> None:
    with pytest.raises(EngineError, match="GGML_RPC=ON"):
        imatrix.add_rpc_server("127.0.0.1:50052")
