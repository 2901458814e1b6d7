"""evaluate() with the engine in a process of its own: the same figures, and an error message if
that process dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forge import ModelSpec
from helpers.forge_any import make_any
from helpers.running import NO_GPU, Forged, RpcServer, Run
from helpers.runs import poisoned, token_chunks

import imatrix
from imatrix import Chat, ChatOptions, EngineDiedError, Evaluation, NonFiniteError
from imatrix.cli.progress import CollectProgress
from imatrix.engine import process
from imatrix.native import engine as native
from imatrix.text.progress import Progress

N_CTX = 32

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def headed(forged: Forged) -> ModelSpec:
    return forged("glm4moe", seed=2, n_nextn=1)


@pytest.fixture(scope="module")
def quantized(headed: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "q.gguf"
    imatrix.quantize(headed.path, path, "Q4_0", n_threads=1)
    return path


def evaluate(model: Path, texts: Any, **options: Any) -> Evaluation:
    """Without the rehearsal, which has a process of its own anyway."""
    options = {"n_ctx": N_CTX, "n_threads": 1, "rehearse": False, **options}
    return imatrix.evaluate(model, texts, **options)


def engines() -> list[int]:
    """The processes that run an engine for this process."""
    return [engine.pid for engine in process._engines]


def kill_at(chunks: int, number: int) -> Any:
    """Ends the engine's process after so many chunks."""

    def kill(at: Progress) -> None:
        if at.chunks == chunks:
            (pid,) = engines()  # one process for all the models
            os.kill(pid, number)

    return kill


def assert_same_bits(got: Evaluation, want: Evaluation) -> None:
    for field in fields(Evaluation):
        mine, other = getattr(got, field.name), getattr(want, field.name)
        if isinstance(other, imatrix.Predictions):
            for name, array in vars(other).items():
                assert type(array) is type(getattr(mine, name)), name
                np.testing.assert_array_equal(getattr(mine, name), array, strict=True)
        elif isinstance(other, np.ndarray):
            np.testing.assert_array_equal(mine, other, strict=True)
        else:
            assert mine == other, field.name


# --- as in this process --------------------------------------------------------------------------


def test_the_same_to_the_bit(headed: ModelSpec, quantized: Path, prose: str) -> None:
    """With a reference and both heads; progress is the same too, except for the time."""
    before = native.live_objects()
    found, told = [], []
    for isolate in (False, True):
        at: list[Progress] = []
        found.append(
            evaluate(
                quantized,
                prose,
                reference=headed.path,
                max_chunks=4,
                skip_chunks=1,
                isolate=isolate,
                progress=at.append,
            )
        )
        told.append([(each.chunks, each.total, each.tokens, each.perplexity) for each in at])
        assert engines() == []
    assert found[0].head is not None
    assert_same_bits(found[1], found[0])
    assert len(told[0]) == 4
    assert told[0] == told[1]
    assert native.live_objects() == before


def test_other_models_and_texts(tmp_path: Path, forged: Forged) -> None:
    """A head of another architecture in its own file, a model whose tokens see later ones, and a
    chat, with the rehearsal."""
    trunk = make_any(tmp_path / "gemma4.gguf", "gemma4", n_nextn=0, seed=1, n_embd=512).path
    head = make_any(tmp_path / "head.gguf", "gemma4-assistant", n_nextn=2, seed=2).path
    tokens = np.random.default_rng(1).integers(0, 64, (3, N_CTX)).tolist()
    whole = make_any(tmp_path / "dream.gguf", "dream", n_nextn=0, seed=1).path
    chat = [Chat([{"role": "user", "content": "the cat sat on the mat and the dog slept"}])]
    template = ChatOptions(text="{% for m in messages %}{{ m.content }}{% endfor %}")
    headed = forged("glm4moe", seed=11, n_nextn=1).path
    for model, texts, options in (
        (trunk, tokens, {"mtp_model": head}),
        (whole, tokens, {"reference": whole}),
        (headed, chat, {"chat": template, "n_ctx": 8, "mtp": False, "rehearse": True}),
    ):
        found = [evaluate(model, texts, isolate=isolate, **options) for isolate in (False, True)]
        assert_same_bits(found[1], found[0])


def test_the_same_errors(headed: ModelSpec, forged: Forged, tmp_path: Path) -> None:
    chunks = [[token if token != 77 else 78 for token in one] for one in token_chunks(headed, 3)]
    chunks[1][20] = 77
    path = poisoned(headed, tmp_path, "token_embd.weight", 77, 41)
    broken = tmp_path / "broken.gguf"
    shutil.copy(headed.path, broken)
    os.truncate(broken, broken.stat().st_size - 4000)
    other = forged("llama", seed=1).path
    cases: list[tuple[Path, Any, dict[str, Any]]] = [
        (path, chunks, {}),
        (headed.path, [[1, 99999999, 3, 4]], {}),
        (broken, chunks, {}),
        (headed.path, chunks, {"reference": other}),
        (headed.path, chunks, {"devices": ["NONE0"]}),
        (headed.path, chunks, {"n_batch": 2}),
    ]
    found: list[list[Any]] = []
    for isolate in (False, True):
        found.append([])
        for model, texts, options in cases:
            with pytest.raises((ValueError, ArithmeticError)) as caught:
                evaluate(model, texts, isolate=isolate, **options)
            data = {
                name: value for name, value in vars(caught.value).items() if name != "__notes__"
            }
            found[-1].append((caught.type, str(caught.value), data))
            assert engines() == []
    assert found[0] == found[1]
    assert found[0][0][0] is NonFiniteError
    assert all(issubclass(kind, ValueError) for kind, *_ in found[0][1:])


# --- when it dies --------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGABRT, "is gone: SIGABRT, in chunk 3. Nothing was written"),
        (signal.SIGKILL, "killed (SIGKILL), as the system does where memory runs out, in chunk 3."),
    ],
)
def test_it_dies_in_a_chunk(number: int, says: str, headed: ModelSpec, quantized: Path) -> None:
    chunks = token_chunks(headed, 5)
    options: dict[str, Any] = {"reference": headed.path, "skip_chunks": 1}
    with pytest.raises(EngineDiedError) as caught:
        evaluate(quantized, chunks, isolate=True, progress=kill_at(2, number), **options)
    assert says in str(caught.value)
    assert "(max_chunks, --chunks)" in str(caught.value)
    assert caught.value.chunk == 3
    assert engines() == []
    # this process continues with another one
    again = evaluate(quantized, chunks, isolate=True, **options)
    assert_same_bits(again, evaluate(quantized, chunks, **options))


def test_the_engines_last_words(tmp_path: Path) -> None:
    """A glm4moe whose head is dense by its metadata, as in test_rehearsal.py."""
    path = make_any(
        tmp_path / "fatal.gguf", "glm4moe", metadata={"leading_dense_block_count": 3}
    ).path
    good = make_any(tmp_path / "good.gguf", "glm4moe").path
    # whichever of the two models it is
    for model, reference in ((path, None), (good, path)):
        with pytest.raises(EngineDiedError) as caught:
            evaluate(model, [range(N_CTX)], reference=reference, isolate=True)
        words = r"glm4-moe\.cpp:\d+: GGML_ASSERT\(layer\.ffn_gate_inp"
        assert re.search(words, str(caught.value))
        assert caught.value.chunk is None
        assert "GGML_ASSERT" in caught.value.log


@posix
def test_an_interrupt_ends_it_at_once(headed: ModelSpec) -> None:
    """The process is stopped, and would not come to the end of a step."""
    pids: list[int] = []

    def interrupt(_at: Progress) -> None:
        pids.extend(engines())
        os.kill(pids[0], signal.SIGSTOP)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(headed.path, token_chunks(headed, 3), isolate=True, progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


# --- on the command line -------------------------------------------------------------------------


@posix
def test_the_command(
    headed: ModelSpec,
    quantized: Path,
    prose_file: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("evaluate", quantized, "-f", prose_file, "-c", N_CTX, "-t", 1, "--chunks", 3)
    same = []
    for flag in ("--isolate", "--no-isolate"):
        done = run(*command, "--reference", headed.path, "--json", flag)
        assert done.status == 0, done.err
        # except for the speed, and the time that is left
        same.append((json.loads(done.out), re.sub(r"\d+ tokens/s(, ETA [\d:]*)?", "", done.err)))
    assert same[0] == same[1]

    def kill(_self: CollectProgress, at: Progress) -> None:
        kill_at(1, signal.SIGKILL)(at)

    monkeypatch.setattr(CollectProgress, "__call__", kill)
    done = run(*command)  # by default
    assert done.status == 1
    assert done.out == ""
    told = " ".join(done.err.split())
    assert "error: the process that ran the engine is gone: killed (SIGKILL)" in told
    assert "in chunk 1. Nothing was written" in told


@pytest.mark.skipif("RPC" not in imatrix.backends().built, reason="built without GGML_RPC=ON")
def test_a_server_is_used_by_the_engines_process(
    headed: ModelSpec, prose_file: Path, rpc_server: RpcServer
) -> None:
    endpoint = rpc_server(0)
    command = [sys.executable, "-m", "imatrix", "evaluate", str(headed.path), "-f", str(prose_file)]
    command += ["-c", str(N_CTX), "-t", "1", "--chunks", "2", "--json"]
    command += ["--rpc", endpoint, "-dev", "RPC0", "-ngl", "all"]
    told = []
    for flag in ("--isolate", "--no-isolate"):
        done = subprocess.run(
            [*command, flag],
            env={**os.environ, **NO_GPU},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "there is no GPU" not in done.stderr
        told.append(json.loads(done.stdout))
    assert told[0] == told[1]
