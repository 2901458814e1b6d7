"""Compares a trunk with llama-imatrix's file: what differs, and how much may differ."""

from __future__ import annotations

import numpy as np

from imatrix import ImportanceMatrix

# llama-imatrix adds row after row in float32, at most 6e-8 each: 1e-6 is seen for the some hundred
# rows here, and 1e-5 after some 5000, so that tests use few rows. Everything before the sums is the
# same graph of the same engine. If one row is missing, the difference is some 1e-3.
PARITY = 1e-5


def differences(got: ImportanceMatrix, want: ImportanceMatrix) -> dict[str, float]:
    """For each weight the largest difference over its largest sum, and for the signed sums over the
    largest possible value. llama-imatrix writes a 3-D weight's sums in one row."""
    worst = {}
    for name in want:
        a, b = got[name].sums.ravel(), want[name].sums.ravel()
        assert a.shape == b.shape, name
        worst[name] = float(np.abs(a - b).max() / b.max())
        signed, expected = got[name].signed_sums, want[name].signed_sums
        most = np.sqrt(got[name].sums * got[name].counts[:, np.newaxis]).max()
        away = np.abs(signed.ravel() - expected.ravel()).max()
        worst[f"{name}, signed"] = float(away / most)
    return worst


def assert_same_trunk(
    got: ImportanceMatrix, want: ImportanceMatrix, tolerance: float = PARITY
) -> None:
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name].counts, want[name].counts, err_msg=name)
    worst = differences(got, want)
    assert {name: d for name, d in worst.items() if not d <= tolerance} == {}
