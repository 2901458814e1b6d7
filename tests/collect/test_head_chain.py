"""Models with several head layers: each layer sees what it sees when the engine drafts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from helpers import oracle
from helpers.forge import ModelSpec
from helpers.running import Forged
from numpy.typing import NDArray

from imatrix import Collector, ImportanceMatrix

pytestmark = [
    pytest.mark.engine(
        "common/speculative.cpp",
        "draft() gives head k the row that head k-1 gave for the slot before",
    ),
]

F64 = NDArray[np.float64]
Chunks = list[list[int]]

N_CTX = 96
# Found by trying: with these chunks no router comes nearer than 9e-4 to choosing another expert.
SEED = 285
# The largest difference of sums over the largest sum, for any tensor. The difference comes from the
# rounding in attention. If a decode has 64 rows or more, the engine adds values up in F32 (the
# tiles of ggml_compute_forward_flash_attn_ext, ggml/src/ggml-cpu/ops.cpp): at most 3e-4 here, and
# 9e-4 with other seeds.
TOLERANCE = 1e-3
# With fewer rows it adds them up in F16: at most 1.3e-3 here, and 2.2e-3 with other seeds.
TOLERANCE_FEW_ROWS = 4e-3
# A head that is fed wrongly is off by at least this much.
WRONG = 0.05


@pytest.fixture
def three_heads(forged: Forged) -> ModelSpec:
    return forged("hy_v3", n_nextn=3, seed=SEED)


def chunks_of(spec: ModelSpec) -> tuple[Chunks, Chunks]:
    """Two full chunks and a short one. The short one is a run of its own: in one stream of tokens
    with the others it would be the tail that is dropped."""
    rng = np.random.default_rng(20)
    first, second, short = (
        rng.integers(0, spec.hparams.n_vocab, size).tolist() for size in (N_CTX, N_CTX, 20)
    )
    return [first, second], [short]


def collect(
    spec: ModelSpec, chunks: Chunks, *, mtp: bool = True, **options: int
) -> ImportanceMatrix:
    with Collector(spec.path, n_ctx=N_CTX, **options) as collector:
        return collector.run(chunks, mtp=mtp)


def expected(spec: ModelSpec, chunks: Chunks, feeding: oracle.Feeding = "draft") -> oracle.Result:
    result = oracle.run(spec, chunks, feeding=feeding, kv_dtype=np.float16)
    if feeding == "draft":
        # an expert's count is certain only if the rounding cannot change the choice
        assert min(result.margins.values()) > 5e-4
    return result


def differences(matrix: ImportanceMatrix, result: oracle.Result) -> dict[str, float]:
    assert set(matrix) == set(result.entries)
    return oracle.compare({name: matrix[name].sums for name in matrix}, result.entries)


def layer(name: str) -> int:
    return int(name.split(".")[1])


def assert_agrees(matrix: ImportanceMatrix, result: oracle.Result, tolerance: float) -> None:
    worst = differences(matrix, result)
    assert {name: diff for name, diff in worst.items() if diff > tolerance} == {}
    for name, entry in result.entries.items():
        assert matrix[name].counts.tolist() == entry.counts.tolist(), name


@pytest.mark.parametrize("n_nextn", [1, 2, 3])
def test_agrees_with_the_oracle(forged: Forged, n_nextn: int) -> None:
    spec = forged("hy_v3", n_nextn=n_nextn, seed=SEED)
    chunks, short = chunks_of(spec)
    matrix = collect(spec, chunks)
    assert_agrees(matrix, expected(spec, chunks), TOLERANCE)
    assert_agrees(collect(spec, short), expected(spec, short), TOLERANCE_FEW_ROWS)

    for head in range(n_nextn):
        blk = f"blk.{spec.hparams.n_layer + head}."
        # One row per slot, however many rows ran to make its keys and values. No draft begins at
        # slot 0, so that head 0 has its first turn at slot 1, head 1 at slot 2, ...
        rows = 2 * (N_CTX - 1 - head)
        assert matrix[blk + "nextn.eh_proj.weight"].counts.tolist() == [rows]
        assert matrix[blk + "attn_k.weight"].counts.tolist() == [rows]
        routed = matrix[blk + "ffn_up_exps.weight"].counts.sum()
        assert routed == rows * spec.hparams.n_expert_used


def test_a_chunk_too_short_for_the_last_heads(three_heads: ModelSpec) -> None:
    """Of three tokens head 0 has slots 1 and 2, head 1 has slot 2, head 2 has none."""
    tokens = [[5, 6, 7]]
    matrix = collect(three_heads, tokens)
    rows = {
        head: matrix[f"blk.{three_heads.hparams.n_layer + head}.nextn.eh_proj.weight"].counts
        for head in range(2)
    }
    assert {head: counts.tolist() for head, counts in rows.items()} == {0: [2], 1: [1]}
    last = f"blk.{three_heads.hparams.n_layer + 2}."
    assert not [n for n, entry in matrix.items() if n.startswith(last) and entry.counts.any()]


def test_later_heads_do_not_get_the_rows_of_the_trunk(three_heads: ModelSpec) -> None:
    chunks, _ = chunks_of(three_heads)
    worst = differences(collect(three_heads, chunks), expected(three_heads, chunks, "trunk"))
    second_head = three_heads.hparams.n_layer + 1
    assert max(diff for name, diff in worst.items() if layer(name) < second_head) < TOLERANCE
    assert min(diff for name, diff in worst.items() if layer(name) >= second_head) > WRONG


@pytest.mark.parametrize("later", ["trunk's rows", "rows of the head before"])
def test_keys_and_values_before_the_draft_are_told_apart(
    three_heads: ModelSpec, later: str
) -> None:
    """The last head's own rows are fed correctly; all other rows come from one depth."""
    chunks, _ = chunks_of(three_heads)
    matrix = collect(three_heads, chunks)
    result = oracle.Result()
    for chunk in chunks:
        forward, tokens, states = states_of(three_heads, chunk)
        forward.result = result
        other = states[0] if later == "trunk's rows" else states[2]
        forward.head(2, tokens, [other, other, states[2]], False)
    attended = f"blk.{three_heads.hparams.n_layer + 2}.attn_output.weight"
    worst = oracle.compare({attended: matrix[attended].sums}, result.entries)
    assert worst[attended] > 10 * TOLERANCE


@pytest.mark.parametrize("n_batch", [64, 7])
def test_any_batch_gives_the_same(three_heads: ModelSpec, n_batch: int) -> None:
    chunks, _ = chunks_of(three_heads)
    matrix = collect(three_heads, chunks, n_batch=n_batch)
    assert_agrees(matrix, expected(three_heads, chunks), TOLERANCE_FEW_ROWS)
    if n_batch < 64:  # with such batches every row meets the same attention kernel
        other = collect(three_heads, chunks, n_batch=40)
        for name in matrix:
            np.testing.assert_allclose(matrix[name].sums, other[name].sums, rtol=1e-4)


@pytest.mark.parametrize("n_nextn", [2, 3])
def test_trunk_is_the_same_without_the_heads(forged: Forged, n_nextn: int) -> None:
    spec = forged("hy_v3", n_nextn=n_nextn, seed=SEED)
    chunks, _ = chunks_of(spec)
    with_heads, without = collect(spec, chunks), collect(spec, chunks, mtp=False)
    assert set(without) == {name for name in with_heads if layer(name) < spec.hparams.n_layer}
    for name in without:
        assert with_heads[name].sums.tobytes() == without[name].sums.tobytes(), name
        assert with_heads[name].counts.tolist() == without[name].counts.tolist(), name


# --- the oracle itself ---------------------------------------------------------------------------


def states_of(
    spec: ModelSpec, chunk: Sequence[int], kv_dtype: type[np.floating] | None = np.float16
) -> tuple[oracle._Forward, NDArray[np.int64], list[F64]]:
    """A forward pass that has run, and the states at each depth."""
    forward = oracle._Forward(spec, kv_dtype, False)
    tokens = np.asarray(chunk, dtype=np.int64)
    h, _ = forward.trunk(tokens, False)
    rows, _ = forward.chain(tokens, h, "shifted", "draft", False)
    return forward, tokens, [oracle.pair(row, "shifted") for row in (h, *rows)]


def test_oracle_chain_is_the_engines_draft_step_by_step(three_heads: ModelSpec) -> None:
    """Follows draft() of draft-mtp (common/speculative.cpp) step by step, from every slot on.

    It begins with the trunk's row at a slot, runs the first head there, and then each next head
    over all slots since, with the rows that the heads before gave.
    """
    _, [chunk] = chunks_of(three_heads)
    # without the rounding of the cache, which may tip the last bit of a product
    result = oracle.run(three_heads, [chunk])
    forward, tokens, (trunk_states, *_) = states_of(three_heads, chunk, kv_dtype=None)
    for start in range(len(chunk)):
        drafted = [trunk_states[start]]
        for head in range(min(3, len(chunk) - start)):
            states = np.stack([*trunk_states[:start], *drafted])
            rows, _ = forward.head(head, tokens[: len(states)], [states], False)
            drafted.append(rows[-1])
            want = result.head_h[0][head][start + head]
            np.testing.assert_allclose(rows[-1], want, rtol=1e-9, atol=1e-9)


def test_oracle_chain_attention_of_equal_depths_is_causal_attention() -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((9, heads, 4)) for heads in (4, 2, 2))
    chained = oracle.chain_attention(q, [k] * 3, [v] * 3, 0.5)
    np.testing.assert_allclose(chained, oracle.causal_attention(q, k, v, 0.5))


def test_oracle_sees_each_head_once_a_slot(three_heads: ModelSpec) -> None:
    _, short = chunks_of(three_heads)
    draft, trunk = (expected(three_heads, short, feeding) for feeding in ("draft", "trunk"))
    assert draft.entries.keys() == trunk.entries.keys()
    for name, entry in draft.entries.items():
        assert entry.counts.sum() == trunk.entries[name].counts.sum(), name
    [rows], [other] = draft.head_h, trunk.head_h
    assert [row.shape for row in rows] == [(20, three_heads.hparams.n_embd)] * 3
    assert np.array_equal(rows[0], other[0])
    assert not np.allclose(rows[1], other[1])
    assert not np.allclose(rows[2], other[2])
