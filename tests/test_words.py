"""Numbers and lists in words, compared with literals."""

from __future__ import annotations

import pytest

from imatrix.words import duration, few, plural, ranged, size


def test_plural() -> None:
    assert [plural(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], ""),
        (["a"], "a"),
        (["a", "b"], "a, b"),
        (["a", "b", "c"], "a, b and 1 more"),
        ((1, 2, 3, 4), "1, 2 and 2 more"),
    ],
)
def test_few(values: list[object], text: str) -> None:
    assert few(values, 2) == text


def test_ranged() -> None:
    assert ranged((3, 3)) == "3"
    assert ranged((3, 8)) == "3-8"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (6.2, "0:07"), (60, "1:00"), (3599.5, "1:00:00"), (7509, "2:05:09")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        *[(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (14_365_491, "13.7 MiB")],
        *[(2**30, "1.0 GiB"), (5 * 2**50, "5120.0 TiB")],
    ],
)
def test_size(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text
