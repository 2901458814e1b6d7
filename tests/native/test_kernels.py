"""Every row kernel that this processor can run, compared with NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from imatrix.native import engine

KERNELS = engine.row_kernel_names()
F32 = NDArray[np.float32]
TINY = float(np.finfo(np.float32).tiny)  # the smallest normal number
LARGEST = float(np.finfo(np.float32).max)


def added(kernel: str, rows: F32, start: float = 0.0) -> F32:
    """The kernel's sums of squares, between guards that it must not change."""
    return both_added(kernel, rows, start)[0]


def both_added(kernel: str, rows: F32, start: float = 0.0) -> tuple[F32, F32]:
    """The kernel's sums of squares and of values, between guards that it must not change."""
    n = rows.shape[1]
    alone, *held = np.full((3, n + 32), 7.0, dtype=np.float32)
    for sums in (alone, *held):
        sums[16 : 16 + n] = start
    engine.add_squares(kernel, rows, alone[16 : 16 + n])
    engine.add_squares(kernel, rows, *(sums[16 : 16 + n] for sums in held))
    for sums in (alone, *held):
        assert (sums[:16] == 7.0).all()
        assert (sums[16 + n :] == 7.0).all()
    # the sums of squares are the same if the others are not asked for
    np.testing.assert_array_equal(alone, held[0])
    return held[0][16 : 16 + n], held[1][16 : 16 + n]


def check(kernel: str, rows: F32, start: float = 0.0) -> None:
    with np.errstate(under="ignore"):
        want = start + (rows.astype(np.float64) ** 2).sum(axis=0)
    got, signed = (sums.astype(np.float64) for sums in both_added(kernel, rows, start))
    # A sum of n float32 terms of one sign, added in any order, each term and each addition rounded
    # once: n + 1 roundings of 2^-24 at most. Below the normal numbers an addition is exact, but a
    # square loses up to half a denormal step.
    tolerance = (len(rows) + 1) * (2.0**-24 * want + 2.0**-150)
    assert (np.abs(got - want) <= tolerance).all()
    # terms of both signs: as many roundings, each of a sum up to the sum of the magnitudes
    want = start + rows.astype(np.float64).sum(axis=0)
    magnitude = abs(start) + np.abs(rows.astype(np.float64)).sum(axis=0)
    assert (np.abs(signed - want) <= len(rows) * 2.0**-24 * magnitude).all()


@st.composite
def strided_rows(draw: st.DrawFn) -> F32:
    """Rows at any distance from each other, from any multiple of four bytes on, in a buffer of
    random numbers."""
    n = draw(st.integers(1, 70))
    n_rows = draw(st.integers(0, 20))
    stride = n + draw(st.sampled_from([0, 0, 1, 3, 16]))
    start = draw(st.integers(0, 17))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e6, 1e15, 1e-18, 1e-21, 1e-40]))
    buffer = (rng.standard_normal(start + n_rows * stride + n) * scale).astype(np.float32)
    rows = np.lib.stride_tricks.as_strided(buffer[start:], (n_rows, n), (4 * stride, 4))
    if n_rows and draw(st.booleans()):
        rows[draw(st.integers(0, n_rows - 1))] = 0.0
    return rows


def test_plain_is_the_last_resort() -> None:
    assert KERNELS[-1] == "plain"
    assert len(set(KERNELS)) == len(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
class TestKernel:
    @given(rows=strided_rows())
    @settings(deadline=None)
    def test_sums_the_squares_of_any_rows(self, kernel: str, rows: F32) -> None:
        check(kernel, rows)

    @given(rows=strided_rows(), start=st.sampled_from([1.0, 0.375, 1e20]))
    @settings(deadline=None)
    def test_adds_to_what_is_there(self, kernel: str, rows: F32, start: float) -> None:
        check(kernel, rows, float(np.float32(start)))

    @pytest.mark.parametrize("n", [*range(1, 36), 63, 64, 65, 255, 256, 257])
    def test_every_tail(self, kernel: str, n: int) -> None:
        rng = np.random.default_rng(n)
        for n_rows in (1, 7, 8, 9, 16, 17):
            check(kernel, rng.standard_normal((n_rows, n)).astype(np.float32))

    def test_as_many_rows_as_a_partial_sum_takes(self, kernel: str) -> None:
        check(kernel, np.random.default_rng(0).standard_normal((512, 40)).astype(np.float32))

    def test_the_same_row_several_times(self, kernel: str) -> None:
        row = np.random.default_rng(1).standard_normal(33).astype(np.float32)
        check(kernel, np.broadcast_to(row, (19, 33)))

    def test_no_rows_change_nothing(self, kernel: str) -> None:
        assert (added(kernel, np.empty((0, 5), dtype=np.float32), 3.0) == 3.0).all()

    def test_exact_numbers_stay_exact(self, kernel: str) -> None:
        rows = np.random.default_rng(2).integers(-50, 50, (100, 37)).astype(np.float32)
        squares, signed = both_added(kernel, rows)
        assert (squares == (rows.astype(np.int64) ** 2).sum(axis=0)).all()
        assert (signed == rows.astype(np.int64).sum(axis=0)).all()

    @pytest.mark.parametrize("at", [0, 5, 16, 31, 32, 40])
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, LARGEST, 1e20])
    @pytest.mark.parametrize("row", [0, 3, 8, 10])
    def test_what_is_not_finite_shows_in_its_own_channel(
        self, kernel: str, at: int, value: float, row: int
    ) -> None:
        rows = np.ones((11, 41), dtype=np.float32)
        rows[row, at] = value
        got = added(kernel, rows)
        assert not np.isfinite(got[at])
        assert (np.delete(got, at) == 11.0).all()

    def test_denormals(self, kernel: str) -> None:
        check(kernel, np.full((9, 19), TINY / 4, dtype=np.float32))  # squares vanish
        check(kernel, np.full((9, 19), 2.0**-70, dtype=np.float32))  # squares are denormal
