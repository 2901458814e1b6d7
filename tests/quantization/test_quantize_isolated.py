"""The quantizer in a process of its own: the same files, and an error message if that process
dies."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.running import Run

import imatrix
from imatrix import EngineDiedError, ImportanceMatrix, quantize
from imatrix.cli.progress import StepProgress
from imatrix.engine import process
from imatrix.entries import Entry
from imatrix.quantization import quantizer

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def engines() -> list[int]:
    """The processes that run an engine for this process."""
    return [engine.pid for engine in process._engines]


def kill_engine(number: int) -> Any:
    """A progress function that ends the engine's process."""

    def kill(_done: int, _total: int) -> None:
        for pid in engines():
            os.kill(pid, number)

    return kill


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets through what the engine is known to abort on (quantization/refusals.py)."""
    monkeypatch.setattr(quantizer, "check_unasked", lambda *_: None)
    monkeypatch.setattr(quantizer, "refuse_early", lambda *_: None)


# --- as in this process --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ftype", "options"),
    [
        ("IQ2_XXS", {}),
        ("Q4_K_M", {"imatrix": None}),
        ("Q3_K_M", {"quantize_output": False, "n_threads": 2}),
        ("Q4_0", {"pure": True}),
        ("IQ2_XXS", {"tensor_types": {"attn_(q|k)": "q8_0", "ffn_down": "q3_K"}}),
        ("F16", {"tensor_types": {"attn_q": "q8_0"}}),  # this package sets general.file_type
    ],
)
def test_the_same_file(
    ftype: str, options: dict[str, Any], model: Path, head_matrix: Path, tmp_path: Path
) -> None:
    options = {"imatrix": head_matrix, "n_threads": 1, **options}
    told: list[list[tuple[int, int]]] = []
    found = []
    for isolate in (False, True):
        told.append([])
        done = quantize(
            model,
            tmp_path / f"{isolate}.gguf",
            ftype,
            isolate=isolate,
            progress=lambda *now: told[-1].append(now),
            **options,
        )
        found.append((done.bytes, done.bits_per_weight, done.rules))
        assert engines() == []
    assert found[0] == found[1]
    assert (tmp_path / "True.gguf").read_bytes() == (tmp_path / "False.gguf").read_bytes()
    assert told[0][-1] == told[1][-1]
    assert told[1] == sorted(told[1])
    assert {path.name for path in tmp_path.iterdir()} == {"True.gguf", "False.gguf"}


def test_a_matrix_in_memory_and_a_name_that_is_not_utf8(
    model: Path, head_matrix: Path, tmp_path: Path
) -> None:
    matrix = ImportanceMatrix.load(head_matrix)
    matrix = ImportanceMatrix(matrix, datasets=[os.fsdecode(b"caf\xe9.txt")])
    for isolate in (False, True):
        folder = tmp_path / f"{isolate}"
        folder.mkdir()
        target = folder / os.fsdecode(b"q\xe9.gguf")
        quantize(model, target, "IQ2_XXS", imatrix=matrix, isolate=isolate)
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


def test_the_same_errors_and_warnings(
    model: Path, head_matrix: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = ImportanceMatrix.load(head_matrix)
    huge = ImportanceMatrix({"blk.0.attn_q.weight": Entry(np.full((1, 256), 1e300), [1])})
    cases: list[tuple[str, dict[str, Any]]] = [
        ("IQ2_XXS", {}),  # the engine refuses it at its start
        ("IQ2_XXS", {"imatrix": matrix.trunk}),  # this package refuses it in the engine's words
        ("Q4_0", {"imatrix": huge}),  # the engine refuses it at the tensor
        ("IQ2_XXS", {"imatrix": matrix, "pure": True}),  # the engine would abort
        ("Q4_0", {"tensor_types": {"no_such": "q8_0"}}),  # a warning
    ]
    found: list[list[Any]] = []
    for isolate in (False, True):
        found.append([])
        for ftype, options in cases:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    quantize(model, tmp_path / "q.gguf", ftype, isolate=isolate, **options)
                except (ValueError, RuntimeError) as error:
                    found[-1].append((type(error), str(error)))
            # the warning points at a line of this file
            found[-1] += [(str(each.message), each.filename) for each in caught]
        found[-1] += [(each.name, each.levelno, each.getMessage()) for each in caplog.records]
        caplog.clear()
    assert found[0] == found[1]
    assert [kind for kind, *_ in found[0][:4]] == [imatrix.EngineError] * 3 + [ValueError]
    assert "matches no tensor" in found[0][4][0]


def test_the_engines_log_comes_over(
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    lines = []
    for isolate in (False, True):
        for level in (logging.WARNING, logging.INFO):
            caplog.clear()
            caplog.set_level(level, "imatrix.engine")
            quantize(model, tmp_path / "q.gguf", "Q4_0", n_threads=1, isolate=isolate)
            told = [each.getMessage() for each in caplog.records]
            # except for the times
            lines.append([re.sub(r"[\d.]+ ms", "ms", each) for each in told])
    assert lines[0] == lines[2] == []
    assert lines[1] == lines[3]
    assert any("blk.0.attn_q.weight" in line for line in lines[1])
    assert capfd.readouterr() == ("", "")


# --- when it dies --------------------------------------------------------------------------------


@posix
def test_the_engine_aborts(unasked: None, model: Path, head_matrix: Path, tmp_path: Path) -> None:
    """ggml asserts that IQ2_XXS gets data (ggml_quantize_chunk in ggml.c), which nobody demands for
    the token embedding; the matrix has none."""
    target = tmp_path / "q.gguf"
    target.write_text("old")
    inputs = (model.read_bytes(), head_matrix.read_bytes())
    with pytest.raises(EngineDiedError) as caught:
        quantize(
            model,
            target,
            "IQ2_XXS",
            imatrix=head_matrix,
            pure=True,
            quantize_output=False,  # that tensor comes first
            isolate=True,
        )
    found = re.fullmatch(
        r"the process that ran the engine is gone: SIGABRT: src/ggml\.c:\d+: (.*), while it quantized "
        r"(.*) to IQ2_XXS, at tensor (\d+) of (\d+), (.*)\. Nothing was written to (.*)\.",
        str(caught.value),
    )
    assert found is not None, str(caught.value)
    assert "GGML_ASSERT(imatrix != NULL) failed" in found[1]
    assert (found[2], found[5], found[6]) == (str(model), "token_embd.weight", str(target))
    assert caught.value.cause.startswith("SIGABRT: ")
    assert "GGML_ASSERT" in caught.value.log
    assert contents(tmp_path) == {"q.gguf": b"old"}
    assert (model.read_bytes(), head_matrix.read_bytes()) == inputs
    assert engines() == []
    # this process continues
    quantize(model, target, "Q4_0", isolate=True)
    assert target.stat().st_size > 3


@posix
def test_the_system_kills_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineDiedError, match=r"killed \(SIGKILL\), as the system does") as caught:
        quantize(
            model, tmp_path / "q.gguf", "Q4_0", isolate=True, progress=kill_engine(signal.SIGKILL)
        )
    # a fast machine may have done all tensors before `progress` is called at all
    at = (
        rf"while it (quantized {re.escape(str(model))} to Q4_0, at tensor|read what it had written)"
    )
    assert re.search(at, str(caught.value))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("dies_at", "words"),
    [
        ("dry_run", ", while its quantizer looked through {}. Nothing was written to "),
        ("tensor_totals", ", while it read what it had written. Nothing was written to "),
    ],
)
def test_it_dies_before_or_after(
    dies_at: str, words: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = process.Engine.ask

    def ask(self: process.Engine, do: str, *args: Any, **request: Any) -> Any:
        if do == dies_at:
            self._process.kill()
        return real(self, do, *args, **request)

    monkeypatch.setattr(process.Engine, "ask", ask)
    with pytest.raises(EngineDiedError, match=re.escape(words.format(model))):
        quantize(model, tmp_path / "q.gguf", "Q4_0", isolate=True)
    assert contents(tmp_path) == {}


@posix
def test_an_interrupt_ends_it_at_once(model: Path, tmp_path: Path) -> None:
    """The process does not finish its tensor: it is stopped, and would not get anywhere."""
    pids: list[int] = []

    def interrupt(_done: int, _total: int) -> None:
        pids.extend(engines())
        os.kill(pids[0], signal.SIGSTOP)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "q.gguf", "Q4_0", isolate=True, progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert contents(tmp_path) == {}


# --- on the command line -------------------------------------------------------------------------


@posix
def test_the_command(
    unasked: None, model: Path, head_matrix: Path, tmp_path: Path, run: Run
) -> None:
    target = tmp_path / "q.gguf"
    target.write_text("old")
    command = ("quantize", model, target, "IQ2_XXS", "--imatrix", head_matrix, "--pure")
    done = run(*command, "--leave-output-tensor")
    assert done.status == 1
    assert done.err.count("error:") == 1
    assert "error: the process that ran the engine is gone: SIGABRT: src/ggml.c:" in done.err
    assert "token_embd.weight. Nothing was written to" in " ".join(done.err.split())
    assert contents(tmp_path) == {"q.gguf": b"old"}
    same = []
    for flag in ("--isolate", "--no-isolate"):
        done = run("quantize", model, target, "Q4_K_M", "--imatrix", head_matrix, flag)
        assert done.status == 0, done.err
        same.append((done.err, contents(tmp_path)))
    assert same[0] == same[1]


@posix
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_on_the_command_line(
    number: int,
    status: int,
    model: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pids: list[int] = []

    def interrupt(_self: StepProgress, _done: int, _total: int) -> None:
        pids.extend(engines())
        os.kill(pids[0], signal.SIGSTOP)
        signal.raise_signal(number)

    monkeypatch.setattr(StepProgress, "__call__", interrupt)
    done = run("quantize", model, tmp_path / "q.gguf", "Q4_0")
    assert done.status == status
    assert contents(tmp_path) == {}
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
