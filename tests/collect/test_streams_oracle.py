"""Compares qwen4exp, trunk and head, with an independent forward pass in NumPy (oracle_streams.py).

Nothing else can check this head: llama-imatrix leaves out its eh_proj, and its sums of the other
weights come from the same engine.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers import oracle, oracle_streams
from helpers.forge_any import AnyModel, make_any

from imatrix import Collector, ImportanceMatrix

pytestmark = [
    pytest.mark.engine(
        "src/models/qwen4exp.cpp",
        "four streams reach the head, each multiplied with nextn.eh_proj, and the indexer chooses whole blocks",
    ),
]

# Relative to the largest sum of a tensor; test_head_oracle.py gives the reasons.
GATE = 1e-3
WRONG = 1e-1
CLEAR = 1e-4
N_CTX = 64
SEED = 1  # found by trying: its margins between experts and between blocks are above CLEAR


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AnyModel:
    # with so many heads no block has the score 0, which two blocks would share
    heads = {"attention.indexer.head_count": 16}
    return make_any(
        tmp_path_factory.mktemp("streams") / "m.gguf", "qwen4exp", seed=SEED, metadata=heads
    )


@pytest.fixture(scope="module")
def chunks() -> list[list[int]]:
    tokens = np.random.default_rng(0).integers(3, 250, (2, N_CTX))
    tokens[:, [20, 21, 40]] = 2  # ends of text, after which n-grams start anew
    return [[int(token) for token in chunk] for chunk in tokens]


@pytest.fixture(scope="module")
def collected(model: AnyModel, chunks: list[list[int]]) -> ImportanceMatrix:
    with Collector(model.path, n_ctx=N_CTX, n_threads=1) as collector:
        return collector.run(chunks, mtp=True)


def differences(got: ImportanceMatrix, want: oracle.Result) -> dict[str, float]:
    return oracle.compare({name: entry.sums for name, entry in got.items()}, want.entries)


def test_every_sum_and_count(
    model: AnyModel, chunks: list[list[int]], collected: ImportanceMatrix
) -> None:
    want = oracle_streams.run(model, chunks, kv_dtype=np.float16)
    close = {name: gap for name, gap in want.margins.items() if gap < CLEAR}
    assert not close, f"too close to call; take another seed: {close}"
    assert set(collected) == set(want.entries)
    for name, entry in want.entries.items():
        np.testing.assert_array_equal(collected[name].counts, entry.counts, err_msg=name)
    worst = differences(collected, want)
    assert {name: d for name, d in worst.items() if not d <= GATE} == {}
    # four streams per token, and no draft begins at slot 0
    eh_proj = collected["blk.2.nextn.eh_proj.weight"]
    assert eh_proj.counts.tolist() == [4 * len(chunks) * (N_CTX - 1)]


@pytest.mark.parametrize("pairing", ["unshifted", "shifted2"])
def test_a_wrong_pairing_shows(
    pairing: oracle.Pairing,
    model: AnyModel,
    chunks: list[list[int]],
    collected: ImportanceMatrix,
) -> None:
    want = oracle_streams.run(model, chunks, pairing=pairing, kv_dtype=np.float16)
    head = {n: d for n, d in differences(collected, want).items() if n.startswith("blk.2.")}
    assert max(head.values()) > WRONG


def test_the_indexer_leaves_blocks_out(model: AnyModel, chunks: list[list[int]]) -> None:
    """Otherwise the comparison above would not have checked the choice."""
    forward = oracle_streams._Streams(model, None)
    x = np.random.default_rng(1).standard_normal((N_CTX, 256))
    seen = forward.chosen("blk.2.", x)
    assert seen.sum(axis=1).max() == 24 + 3  # top_k blocks, and the block that is not complete
    assert not seen[:, :].all()
    assert not np.triu(seen, k=1).any()
