"""Seconds per chunk: the bare forward pass, ours, and llama-imatrix, beside each other.

`make bench` runs it and writes benchmarks/results/collect.md. IMATRIX_BENCH_MODELS (default
"dense") names the models of models.py, comma-separated; IMATRIX_BENCH_PASSES the passes.

A chunk is n_ctx = n_batch = n_ubatch = 512 tokens for all of them. What a program does once
(loading, tokenizing, its first graph) is left out: ours starts after a warm-up chunk,
llama-imatrix is run with 1 + N chunks and with 1, and the difference is divided by N.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest

from imatrix import ImportanceMatrix, _session
from imatrix._threads import physical_cores

N_CTX = 512
N_CHUNKS = 3
TEXT = models.ROOT / "src/imatrix/data/calibration.txt"
NAMES = os.environ.get("IMATRIX_BENCH_MODELS", "dense").split(",")

Measure = Callable[[str, str, Callable[[], float]], None]


@pytest.fixture(scope="module", params=NAMES)
def model_name(request: pytest.FixtureRequest) -> str:
    models.model(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def native(model_name: str) -> _session.Model:
    return _session.Model(
        str(models.model(model_name)), mtp=True, n_gpu_layers=-1, use_mmap=True, check_tensors=False
    )


def ours(
    native: _session.Model, *, mtp: bool, hook: bool, perplexity: bool = False
) -> tuple[float, _session.Session]:
    """Seconds a chunk, and the session with what it collected."""
    tokens = native.tokenize(TEXT.read_text(), add_special=True, parse_special=False)
    chunks = tokens[: (1 + N_CHUNKS) * N_CTX].reshape(1 + N_CHUNKS, N_CTX)
    session = _session.Session(native, native)
    session.open(
        n_ctx=N_CTX,
        n_batch=N_CTX,
        n_ubatch=N_CTX,
        n_seq=1,
        n_threads=physical_cores(),
        mtp=mtp,
        process_output=False,
        perplexity=perplexity,
    )
    session.set_hook_enabled(hook)
    lengths = np.array([N_CTX], np.int32)
    session.step(np.ascontiguousarray(chunks[0]), lengths)
    start = time.perf_counter()
    for chunk in chunks[1:]:
        session.step(np.ascontiguousarray(chunk), lengths)
    return (time.perf_counter() - start) / N_CHUNKS, session


def llama_imatrix(model_name: str, tool: Path, out: Path, *options: str) -> float:
    """Seconds a chunk."""

    def seconds(n_chunks: int) -> float:
        start = time.perf_counter()
        subprocess.run(
            [
                tool, "-m", models.model(model_name), "-f", TEXT, "-o", out, "-c", str(N_CTX),
                "-b", str(N_CTX), "-ub", str(N_CTX), "-t", str(physical_cores()),
                "--chunks", str(n_chunks), *options,
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip
        return time.perf_counter() - start

    return (seconds(1 + N_CHUNKS) - seconds(1)) / N_CHUNKS


def test_bare_forward_pass_of_the_trunk(
    measure: Measure, native: _session.Model, model_name: str, measuring_pass: int
) -> None:
    measure(model_name, "bare forward pass, trunk", lambda: ours(native, mtp=False, hook=False)[0])


def test_bare_forward_pass_of_trunk_and_head(
    measure: Measure, native: _session.Model, model_name: str, measuring_pass: int
) -> None:
    measure(
        model_name, "bare forward pass, trunk + head", lambda: ours(native, mtp=True, hook=False)[0]
    )


def test_imatrix_trunk(
    measure: Measure, native: _session.Model, model_name: str, measuring_pass: int
) -> None:
    measure(model_name, "imatrix, trunk", lambda: ours(native, mtp=False, hook=True)[0])


def test_imatrix_trunk_and_head(
    measure: Measure,
    native: _session.Model,
    model_name: str,
    measuring_pass: int,
    engine_tool: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    sessions: list[_session.Session] = []

    def run() -> float:
        seconds, session = ours(native, mtp=True, hook=True)
        sessions.append(session)
        return seconds

    measure(model_name, "imatrix, trunk + head", run)
    # what was timed is right: every trunk weight has the rows of all chunks
    collected = sessions[-1].snapshot()
    assert any(".nextn.eh_proj." in name for name in collected)
    _, counts = collected["blk.0.ffn_up.weight"]
    assert counts.tolist() == [(1 + N_CHUNKS) * N_CTX]


def test_llama_imatrix_without_perplexity(
    measure: Measure,
    model_name: str,
    measuring_pass: int,
    engine_tool: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "theirs.gguf"
    tool = engine_tool("llama-imatrix")
    measure(
        model_name,
        "llama-imatrix --no-ppl",
        lambda: llama_imatrix(model_name, tool, out, "--no-ppl"),
    )
    assert not ImportanceMatrix.load(out).head_blocks


def test_imatrix_trunk_with_perplexity(
    measure: Measure, native: _session.Model, model_name: str, measuring_pass: int
) -> None:
    measure(
        model_name,
        "imatrix, trunk, with perplexity",
        lambda: ours(native, mtp=False, hook=True, perplexity=True)[0],
    )


def test_llama_imatrix_with_perplexity(
    measure: Measure,
    model_name: str,
    measuring_pass: int,
    engine_tool: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    tool = engine_tool("llama-imatrix")
    out = tmp_path / "theirs.gguf"
    measure(
        model_name,
        "llama-imatrix, with perplexity",
        lambda: llama_imatrix(model_name, tool, out),
    )
