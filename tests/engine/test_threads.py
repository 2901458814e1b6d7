"""Rows added by several threads: the bits are the same for any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.running import Forged
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from imatrix import Collector
from imatrix.native.engine import RowAdder

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
THREADS = (1, 2, 3, 7, 16)
ADDERS = {n: RowAdder(n) for n in THREADS}


def drawn(n_rows: list[int], n: int, seed: int = 0) -> list[F32]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((rows, n)).astype(np.float32) for rows in n_rows]


def added(n_threads: int, blocks: list[F32], start: float = 0.5) -> list[F64]:
    """[2, n] for each block: sums of squares, and of the values."""
    sums = [np.full((2, block.shape[1]), start) for block in blocks]
    assert ADDERS[n_threads].add(blocks, [a for a, _ in sums], [b for _, b in sums]) is None
    alone = [np.full(block.shape[1], start) for block in blocks]
    assert ADDERS[n_threads].add(blocks, alone) is None
    for both, squares in zip(sums, alone, strict=True):
        np.testing.assert_array_equal(both[0], squares)
    return sums


# Shapes above and below the size from which threads share the work (kWorthSharing in
# ext/add_rows.cpp): columns that end in the middle of a vector, more rows than one float32 sum
# takes, blocks without rows.
@given(
    n=st.sampled_from([1, 63, 64, 65, 130, 1000, 2049, 5000]),
    n_rows=st.lists(st.sampled_from([0, 1, 7, 8, 100, 513]), min_size=1, max_size=9),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_the_number_of_threads_changes_no_bit(n: int, n_rows: list[int], seed: int) -> None:
    blocks = drawn(n_rows, n, seed)
    alone = added(1, blocks)
    for got, block in zip(alone, blocks, strict=True):
        exact = block.astype(np.float64)
        # float32 over at most 512 rows; each square and each addition is rounded once
        np.testing.assert_allclose(got[0], 0.5 + (exact**2).sum(axis=0), rtol=513 * 2.0**-24)
        away = np.abs(got[1] - (0.5 + exact.sum(axis=0)))
        assert (away <= 512 * 2.0**-24 * (0.5 + np.abs(exact).sum(axis=0))).all()
    for n_threads in THREADS[1:]:
        for got, want in zip(added(n_threads, blocks), alone, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("n_threads", THREADS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_the_first_that_is_not_finite_is_named(n_threads: int, value: float) -> None:
    blocks = drawn([40, 0, 40, 40], 2500)
    blocks[3][0, 7] = value
    blocks[2][39, 2400] = value
    blocks[2][3, 2300] = value
    sums = [np.zeros(2500) for _ in blocks]
    assert ADDERS[n_threads].add(blocks, sums) == (2, 2300)


def test_threads_are_used_again_and_again() -> None:
    block = drawn([64], 4096)
    (want,) = added(1, block)
    for _ in range(300):
        (got,) = added(7, block)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("arch", ["llama", "glm4moe"])
def test_a_model_collected_with_any_number(arch: str, forged: Forged) -> None:
    options = {"n_nextn": 1} if arch == "glm4moe" else {}
    spec = forged(arch, seed=2, n_embd=256, **options)
    text = np.random.default_rng(3).integers(0, spec.tokenizer.n_vocab, 512).tolist()
    runs = []
    for n_threads in (1, 2, 3):
        with Collector(spec.path, n_ctx=512, n_threads=n_threads) as collector:
            runs.append(collector.run([text], mtp=bool(options)))
    for run in runs[1:]:
        assert set(run) == set(runs[0])
        for name in run:
            np.testing.assert_array_equal(run[name].sums, runs[0][name].sums, err_msg=name)
            np.testing.assert_array_equal(run[name].counts, runs[0][name].counts, err_msg=name)
            np.testing.assert_array_equal(run[name].means, runs[0][name].means, err_msg=name)
            assert run[name].means is not None
