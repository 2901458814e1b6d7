"""Runs the native core's own tests (tests/native/core_tests.cpp, row_tests.cpp), without the sanitizers of
tests/native/sanitize.sh."""

from __future__ import annotations

from helpers.running import EngineTool, Forged, run_tool

from imatrix.native import engine


def test_the_native_core(engine_tool: EngineTool, forged: Forged) -> None:
    """The models have no head, one head, and a chain of three."""
    models = (
        forged("llama").path,
        forged("qwen35moe", n_nextn=1).path,
        forged("hy_v3", n_nextn=3).path,
    )
    assert "ok\n" in run_tool(engine_tool("imatrix-core-tests"), *models)


def test_the_rows(engine_tool: EngineTool) -> None:
    """Every row kernel of this processor, and the threads that share rows."""
    said = run_tool(engine_tool("imatrix-row-tests")).splitlines()
    assert said == [*(f"kernel {name}" for name in engine.row_kernel_names()), "ok"]
