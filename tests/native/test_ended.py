"""Graphs that end after the last wanted weight, although logits were asked for, if nobody reads
them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from helpers.forge import ModelSpec
from helpers.running import NO_GPU, Forged, RpcServer

from imatrix import backends
from imatrix.native import engine

N_CTX = 96
needs_rpc = pytest.mark.skipif(
    "RPC" not in backends().built, reason="the engine was built without GGML_RPC=ON"
)


def collected(
    spec: ModelSpec, *, n_seq: int = 1, n_ubatch: int = 64, **options: Any
) -> tuple[dict[str, Any], dict[str, int]]:
    """The result of three chunks, and the counters."""
    model = engine.Model(
        str(spec.path), mtp=False, n_gpu_layers=0, use_mmap=True, check_tensors=False
    )
    session = engine.Session(model, None)
    given = {"process_output": False, "perplexity": False, "mtp": False, **options}
    session.open(
        n_ctx=N_CTX, n_batch=N_CTX * n_seq, n_ubatch=n_ubatch, n_seq=n_seq, n_threads=1, **given
    )
    tokens = np.random.default_rng(1).integers(0, model.n_vocab, (3, N_CTX), dtype=np.int32)
    for first in range(0, 3, n_seq):
        group = tokens[first : first + n_seq]
        session.step(group.ravel(), np.full(len(group), N_CTX, dtype=np.int32))
    return session.snapshot(), session.counters


def assert_same_bits(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, data in want.items():
        for one, other in zip(got[name], data, strict=True):  # sums, counts, signed sums
            np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("n_seq", [1, 3])
@pytest.mark.parametrize("n_ubatch", [32, 64, 288])
@pytest.mark.parametrize("arch", ["llama", "deepseek2"])
def test_the_sums_are_those_of_whole_graphs(
    arch: Any, n_ubatch: int, n_seq: int, forged: Forged
) -> None:
    spec = forged(arch, seed=2)
    got, counters = collected(spec, n_seq=n_seq, n_ubatch=n_ubatch)
    want, whole = collected(spec, n_seq=n_seq, n_ubatch=n_ubatch, leave_out_logits=False)
    assert whole["ended"] == 0
    if arch == "llama":  # crops its last layer to the rows whose logits are asked for
        graphs = -(-N_CTX * n_seq // n_ubatch) * (3 // n_seq)
        assert counters["ended"] >= graphs  # more if n_seq does not divide a ubatch
    assert counters["stops"] == whole["stops"]
    assert_same_bits(got, want)


@pytest.mark.parametrize("option", ["perplexity", "process_output"])
def test_who_reads_logits_gets_whole_graphs(option: str, forged: Forged) -> None:
    spec = forged("llama", seed=2)
    _, counters = collected(spec, **{option: True})
    assert counters["ended"] == 0


def test_perplexity_does_not_move_the_sums(forged: Forged) -> None:
    spec = forged("llama", seed=2)
    got, _ = collected(spec)
    want, _ = collected(spec, perplexity=True)
    assert_same_bits(got, want)


# A process of its own: a server that was added once is a device for every later model too.
ON_DEVICES = """
import json, sys
import numpy as np
import imatrix
from imatrix.native import engine
path, endpoints, layers, n_ctx, n_ubatch = json.loads(sys.argv[1])
for endpoint in endpoints:
    imatrix.add_rpc_server(endpoint)
assert len(imatrix.backends().devices) == 1 + len(endpoints)
runs = []
for leave_out in (False, True):
    model = engine.Model(
        path, mtp=False, n_gpu_layers=layers, use_mmap=True, check_tensors=False
    )
    session = engine.Session(model, None)
    session.open(n_ctx=n_ctx, n_batch=n_ctx, n_ubatch=n_ubatch, n_seq=1, n_threads=1, mtp=False,
                 process_output=False, perplexity=False, leave_out_logits=leave_out)
    tokens = np.random.default_rng(1).integers(0, model.n_vocab, (3, n_ctx), dtype=np.int32)
    for chunk in tokens:
        session.step(chunk, np.array([n_ctx], dtype=np.int32))
    runs.append((session.snapshot(), session.counters))
(whole, before), (left, after) = runs
assert whole.keys() == left.keys()
differing = [name for name in whole
             if not all(np.array_equal(a, b) for a, b in zip(whole[name], left[name]))]
memory = [use["device"] for use in session.memory if use["model"]]
print(json.dumps([differing, before, after, len(whole), memory]))
"""


@needs_rpc
@pytest.mark.parametrize(
    ("n_servers", "layers", "n_used"),
    [
        (1, -1, 1),  # all on the device
        (1, 3, 1),  # two layers and the LM head on the device, two here
        (1, 1, 1),  # only the LM head there: a split after the last wanted one
        (1, 0, 0),  # all here, beside an unused device
        (2, -1, 2),  # on two devices
        (2, 3, 2),
    ],
)
def test_graphs_in_several_splits(
    n_servers: int, layers: int, n_used: int, rpc_server: RpcServer, forged: Forged
) -> None:
    """The scheduler leaves only the split that holds the last wanted weight: the splits after it
    run on what was never computed, and nothing of that may reach the sums, now or in a later
    graph."""
    spec = forged("llama", seed=2, n_layer=4)
    endpoints = [rpc_server(n) for n in range(n_servers)]
    work = json.dumps([str(spec.path), endpoints, layers, N_CTX, 64])
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES, work],
        env={**os.environ, **NO_GPU}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    differing, whole, left, n_weights, memory = json.loads(done.stdout.splitlines()[-1])
    # q, k, v, output, gate, up and down of every layer
    assert n_weights == 4 * 7
    assert differing == []  # to the bit
    assert whole["ended"] == 0
    assert left["ended"] == 3 * 2  # graphs of 64 and 32 tokens a chunk
    assert left["stops"] == whole["stops"]
    assert len({device for device in memory if device != "CPU"}) == n_used
