"""Interleaved measuring with pytest-benchmark, and the results as a table of ratios.

Every variant is a test; the tests run in passes (pass 1 of every variant, then pass 2, ...), so
that a machine that warms up or is shared drifts over all variants alike. Medians over the
passes are compared, never times from different runs.
"""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
import models
import pytest

PASSES = int(os.environ.get("IMATRIX_BENCH_PASSES", "3"))
RESULTS = Path(__file__).parent / "results"

Times = dict[tuple[str, str], list[float]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measuring_pass" in metafunc.fixturenames:
        metafunc.parametrize("measuring_pass", range(1, PASSES + 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def key(item: pytest.Item) -> tuple[str, int]:
        parameters = getattr(item, "callspec", None)
        values = parameters.params if parameters is not None else {}
        return str(values.get("model_name", "")), int(values.get("measuring_pass", 0))

    items.sort(key=key)  # stable: variants keep their order within a pass


@pytest.fixture(scope="session")
def times() -> Iterator[Times]:
    """Seconds a chunk by (model, variant); written to results/ at the end."""
    collected: Times = {}
    yield collected
    if collected:
        _write(collected)


@pytest.fixture(scope="session")
def engine_tool() -> Callable[[str], Path]:
    return models.engine_tools.find


@pytest.fixture
def measure(
    benchmark: Callable[..., object], times: Times, request: pytest.FixtureRequest
) -> Callable[[str, str, Callable[[], float]], None]:
    """measure(model, variant, run): `run` does the work and returns seconds a chunk."""

    def record(model_name: str, variant: str, run: Callable[[], float]) -> None:
        seconds = benchmark.pedantic(run, rounds=1, iterations=1)  # type: ignore[attr-defined]
        benchmark.extra_info["seconds_per_chunk"] = seconds  # type: ignore[attr-defined]
        times.setdefault((model_name, variant), []).append(seconds)

    return record


def _write(times: Times) -> None:
    lines = [
        "# Seconds per chunk",
        "",
        f"{datetime.date.today()}, {machine.told()}, {PASSES} interleaved passes in one run; median "
        "[lowest, highest]. Made by `make bench`.",
    ]
    for name in dict.fromkeys(model for model, _ in times):
        rows = {variant: values for (model, variant), values in times.items() if model == name}
        medians = {variant: statistics.median(values) for variant, values in rows.items()}
        size = models.model(name).stat().st_size / 1e9
        lines += ["", f"## {name} ({models.MODELS[name]['arch']}, {size:.2f} GB F16)", ""]
        lines += ["| variant | s/chunk | of llama-imatrix | of the bare forward pass |"]
        lines += ["|---|---|---|---|"]
        for variant, values in rows.items():
            lines.append(
                f"| {variant} | {medians[variant]:.2f} [{min(values):.2f}, {max(values):.2f}] | "
                f"{_ratio(medians, variant, 'llama-imatrix --no-ppl')} | "
                f"{_ratio(medians, variant, 'bare forward pass, trunk')} |"
            )
        both = ("bare forward pass, trunk + head", "imatrix, trunk + head")
        if all(variant in medians for variant in both):
            lines += [
                "",
                f"imatrix, trunk + head, of the bare forward pass of trunk and head: "
                f"{medians[both[1]] / medians[both[0]]:.3f}",
            ]
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "collect.md").write_text(text)
    print("\n" + text)


def _ratio(medians: dict[str, float], variant: str, base: str) -> str:
    return f"{medians[variant] / medians[base]:.3f}" if base in medians else ""
