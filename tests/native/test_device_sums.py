"""Rows in a device's memory are summed there: whole models on every device that exists.

A ggml-rpc-server on the loopback stands in for a GPU: its buffers are not host memory. It computes
with the same CPU kernels, so that the same model gives the same activations on both. The other
devices of the build and the machine (docs/backends.md) compute in their own way: sums made on such
a device are compared with those of the same rows, copied to the host, and llama-imatrix shows
whether the rows are right.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forge import Arch
from helpers.running import NO_GPU, TEXT, EngineTool, Forged, RpcServer

import imatrix
from imatrix import EngineError, ImportanceMatrix

pytestmark = [
    pytest.mark.engine(
        "ggml/src/ggml-backend.cpp", "rows may be read on their device until the callback returns"
    ),
]

needs_rpc = pytest.mark.skipif(
    "RPC" not in imatrix.backends().built, reason="the engine was built without GGML_RPC=ON"
)

N_CTX = 96
# the size of the smallest vocabulary
TOKENS: list[int] = np.random.default_rng(3).integers(0, 256, 3 * N_CTX).tolist()
SETTINGS: dict[str, Any] = {"n_ctx": N_CTX, "n_batch": 64, "n_ubatch": 64, "n_threads": 1}
# Both sides have the same activations. Sums are float32 over at most a chunk, 96 rows: each
# addition that rounds is off by some 2^-24, 6e-6 in total if all 96 are off in the same direction.
TOLERANCE = 1e-5

MODELS: list[tuple[Arch, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen35", {"n_nextn": 1}),  # a recurrent layer and one with attention
    ("glm4moe", {"n_nextn": 1}),  # experts
    ("qwen35moe", {"n_nextn": 1}),  # both
    ("deepseek2", {"n_nextn": 1}),  # 3-D weights
]

# The engine's Vulkan backend never finishes its own graph of the small deepseek2, in llama-imatrix
# either (docs/backends.md).
ON_GPUS = [model for model in MODELS if model[0] != "deepseek2"]

# Layers that are not on the device are not computed on it either (offload_op in ggml-vulkan.cpp).
KEPT_HERE = {"GGML_OP_OFFLOAD_MIN_BATCH": "1000000"}


@dataclass
class Place:
    """What makes a child process compute there."""

    endpoint: str | None = None  # host:port of a ggml-rpc-server
    environment: dict[str, str] = field(default_factory=dict)


HOST = Place(environment=NO_GPU)


@pytest.fixture(scope="module")
def remote(rpc_server: RpcServer) -> Place:
    return Place(rpc_server(0), NO_GPU)


# A process of its own: a server that was added once is a device for every later model too.
RUN = """
import json, sys
import imatrix
model, endpoint, text, out, collector, run = json.loads(sys.argv[1])
if endpoint is not None:
    imatrix.add_rpc_server(endpoint)
    assert any(device.backend == "RPC" and device.gpu for device in imatrix.backends().devices)
with imatrix.Collector(model, **collector) as made:
    made.run([text], **run).save(out)
    print(json.dumps(dict(made.counters)))
"""


@dataclass
class Collected:
    matrix: ImportanceMatrix
    counters: dict[str, int]


def collect(
    place: Place,
    model: Path,
    text: list[int] | str,
    out: Path,
    run: dict[str, Any],
    **collector: Any,
) -> Collected:
    work = [str(model), place.endpoint, text, str(out), {**SETTINGS, **collector}, run]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(work)],
        env={**os.environ, **place.environment},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Collected(ImportanceMatrix.load(out), json.loads(done.stdout.splitlines()[-1]))


def differences(got: ImportanceMatrix, want: ImportanceMatrix) -> dict[str, float]:
    """For each weight the largest difference over its largest sum, and for the signed sums over the
    largest possible value."""
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name].counts, want[name].counts, err_msg=name)
    found = {}
    for name, entry in want.items():
        signed, expected = got[name].signed_sums, entry.signed_sums
        most = np.sqrt(entry.sums * entry.counts[:, np.newaxis]).max()
        found[name] = float(np.abs(got[name].sums - entry.sums).max() / entry.sums.max())
        found[f"{name}, signed"] = float(np.abs(signed - expected).max() / most)
    return found


def both_ways(
    place: Place, model: Path, folder: Path, mtp: bool, layers: int
) -> tuple[Collected, Collected]:
    """With sums made there, and with rows copied here."""
    run = {"mtp": mtp, "max_chunks": 3}
    there, copied = (
        collect(
            place, model, TOKENS, folder / f"{on}.gguf", run, n_gpu_layers=layers, device_sums=on
        )
        for on in (True, False)
    )
    # the same rows were seen, and most of the copying was unnecessary
    assert there.counters["stops"] == copied.counters["stops"]
    assert there.counters["squared_elements"] == copied.counters["squared_elements"]
    assert 0 < 4 * there.counters["fetched_bytes"] < copied.counters["fetched_bytes"]
    return there, copied


def beyond(tolerance: float, got: ImportanceMatrix, want: ImportanceMatrix) -> dict[str, float]:
    return {name: d for name, d in differences(got, want).items() if not d <= tolerance}


@needs_rpc
@pytest.mark.parametrize("layers", [-1, 2])
@pytest.mark.parametrize(("arch", "options"), MODELS, ids=[arch for arch, _ in MODELS])
def test_sums_made_there_are_those_made_here(
    arch: Arch, options: dict[str, Any], layers: int, remote: Place, forged: Forged, tmp_path: Path
) -> None:
    model = forged(arch, seed=2, **options).path
    mtp = "n_nextn" in options
    there, copied = both_ways(remote, model, tmp_path, mtp, layers)
    want = collect(HOST, model, TOKENS, tmp_path / "here.gguf", {"mtp": mtp, "max_chunks": 3})
    assert want.counters["fetched_bytes"] == 0
    for run in (there, copied):
        assert beyond(TOLERANCE, run.matrix, want.matrix) == {}


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("arch", "options"), ON_GPUS, ids=[arch for arch, _ in ON_GPUS])
def test_sums_made_on_a_gpu(
    arch: Arch, options: dict[str, Any], whole: bool, forged: Forged, tmp_path: Path
) -> None:
    model = forged(arch, seed=2, **options).path
    mtp = "n_nextn" in options
    layers = -1 if whole else 2 + mtp  # the output matrix, the head, and a layer of the trunk
    there, copied = both_ways(Place(environment=KEPT_HERE), model, tmp_path, mtp, layers)
    assert beyond(TOLERANCE, there.matrix, copied.matrix) == {}


@pytest.mark.needs("gpu")
@pytest.mark.parametrize(("arch", "options"), ON_GPUS, ids=[arch for arch, _ in ON_GPUS])
def test_a_gpus_rows_are_llama_imatrix_s(
    arch: Arch, options: dict[str, Any], forged: Forged, engine_tool: EngineTool, tmp_path: Path
) -> None:
    model = forged(arch, seed=2, **options).path
    text, theirs = tmp_path / "text.txt", tmp_path / "theirs.gguf"
    text.write_text(TEXT[:6000])
    # graphs of whole chunks on both sides, because in shorter ones the device may add in another
    # order
    n = 64
    command = [engine_tool("llama-imatrix"), "-m", model, "-f", text, "-o", theirs, "--no-ppl"]
    command += ["-c", str(n), "-b", str(n), "-ub", str(n), "--chunks", "4", "-ngl", "99"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=600)
    ours = collect(
        Place(), model, TEXT[:6000], tmp_path / "ours.gguf", {"max_chunks": 4},
        n_ctx=n, n_batch=n, n_gpu_layers=-1,
    )  # fmt: skip
    assert beyond(TOLERANCE, ours.matrix, ImportanceMatrix.load(theirs)) == {}


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


@pytest.mark.needs("no rpc")
def test_a_build_without_rpc_says_so() -> None:
    with pytest.raises(EngineError, match="GGML_RPC=ON"):
        imatrix.add_rpc_server("127.0.0.1:50052")
