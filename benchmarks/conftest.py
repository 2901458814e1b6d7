"""Interleaved measuring with pytest-benchmark.

Every variant is a test. The tests run in passes (pass 1 of every variant, then pass 2, ...), so
that all variants see the same drift of a machine that warms up or is shared. Only medians over the
passes are compared, never times of different runs.
"""

from __future__ import annotations

import os

import pytest

PASSES = int(os.environ.get("IMATRIX_BENCH_PASSES", "3"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measuring_pass" in metafunc.fixturenames:
        metafunc.parametrize("measuring_pass", range(1, PASSES + 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def key(item: pytest.Item) -> tuple[str, str, int, int]:
        parameters = getattr(item, "callspec", None)
        values = parameters.params if parameters is not None else {}
        return (
            item.path.name,
            str(values.get("model_name", "")),
            int(values.get("n_ctx", 0)),
            int(values.get("measuring_pass", 0)),
        )

    items.sort(key=key)  # stable: variants keep their order within a pass
