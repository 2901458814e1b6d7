"""The engine in a process of its own: the same matrices, and an error message if that process
dies."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from helpers.forge import ModelSpec
from helpers.forge_any import make_any
from helpers.running import Forged
from helpers.runs import N_CTX, SEED, Enough, poisoned, stop_at, token_chunks

from imatrix import Collector, EngineDiedError, ModelError, NonFiniteError
from imatrix.formats import checkpoint as file
from imatrix.native import engine as native
from imatrix.text.progress import Progress

N_CHUNKS = 5

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(scope="module")
def headed(forged: Forged) -> ModelSpec:
    return forged("glm4moe", seed=SEED, n_nextn=1)


def collector(spec: ModelSpec | Path, **options: Any) -> Collector:
    path = spec.path if isinstance(spec, ModelSpec) else spec
    return Collector(path, **{"n_ctx": N_CTX, "n_threads": 1, "rehearse": False, **options})


def isolated(spec: ModelSpec | Path, **options: Any) -> Collector:
    return collector(spec, **{"isolate": True, **options})


def engine_of(made: Collector) -> int:
    """The process that runs the engine."""
    assert made._models.engine is not None
    return made._models.engine.pid


def kill_at(made: Collector, chunks: int, number: int) -> Any:
    """Ends the engine's process when so many chunks are done."""

    def kill(at: Progress) -> None:
        if at.chunks == chunks:
            os.kill(engine_of(made), number)

    return kill


# --- as in this process --------------------------------------------------------------------------


def test_the_same_to_the_bit(headed: ModelSpec, prose: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"mtp": True, "perplexity": True, "max_chunks": N_CHUNKS}
    with collector(headed) as here, isolated(headed, rehearse=True) as there:
        assert there.tokenize(prose).tolist() == here.tokenize(prose).tolist()
        assert there.n_vocab == here.n_vocab
        assert there.plan(mtp=True) == here.plan(mtp=True)
        gc.collect()  # what tests before this one have left, in tracebacks above all
        before = native.live_objects()
        reports: tuple[list[Progress], list[Progress]] = ([], [])
        whole = here.run(prose, progress=reports[0].append, **options)
        assert there.run(prose, progress=reports[1].append, **options) == whole
        assert there.perplexity == here.perplexity
        told = [[(at.chunks, at.total, at.perplexity) for at in each] for each in reports]
        assert told[0] == told[1]
        # a stream, interrupted in one process and then in the other
        stream = token_chunks(headed, N_CHUNKS)
        whole = here.run(stream, mtp=True)
        path = tmp_path / "checkpoint"
        with pytest.raises(Enough):
            there.run(iter(stream), mtp=True, checkpoint=path, progress=stop_at(2))
        assert there.matrix.chunk_count == 2
        # and either continues from the other's checkpoint
        assert there.run(iter(stream), mtp=True, checkpoint=path) == whole
        path.unlink()
        with pytest.raises(Enough):
            there.run(iter(stream), mtp=True, checkpoint=path, progress=stop_at(3))
        assert here.run(iter(stream), mtp=True, checkpoint=path) == whole
        # nothing of it is in this process
        assert native.live_objects()["models"] == before["models"]
        process = engine_of(there)
    assert not Path(f"/proc/{process}").exists()


def test_chunks_side_by_side_and_a_head_of_its_own_kind(headed: ModelSpec, tmp_path: Path) -> None:
    chunks = token_chunks(headed, 7)
    options: dict[str, Any] = {"process_output": True}
    with collector(headed, n_seq=3) as here, isolated(headed, n_seq=3) as there:
        assert there.run(chunks, **options) == here.run(chunks, **options)
    trunk = make_any(tmp_path / "gemma4.gguf", "gemma4", n_nextn=0, seed=1, n_embd=512).path
    head = make_any(tmp_path / "head.gguf", "gemma4-assistant", n_nextn=2, seed=2).path
    tokens = [[token % 64 for token in chunk] for chunk in chunks]
    with collector(trunk, mtp_model=head) as here, isolated(trunk, mtp_model=head) as there:
        assert there.run(tokens, mtp=True) == here.run(tokens, mtp=True)
        assert there.mtp_matrix == here.mtp_matrix


def test_errors_come_over(headed: ModelSpec, forged: Forged, tmp_path: Path) -> None:
    path = poisoned(headed, tmp_path, "token_embd.weight", 77, 41)
    chunks = [[token if token != 77 else 78 for token in one] for one in token_chunks(headed, 4)]
    chunks[2][20] = 77
    found = []
    for isolate in (False, True):
        with collector(path, isolate=isolate) as made:
            with pytest.raises(NonFiniteError) as caught:
                made.run(chunks, mtp=True)
            error = caught.value
            found.append((str(error), error.weight, error.channel, error.expert, error.chunk))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(made.run(chunks, mtp=True, on_nonfinite="skip"))
            with pytest.raises(ValueError, match="token id 99999999 is out of range"):
                made.run([[1, 99999999]])
            if isolate:
                engine_of(made)  # the errors have not ended the process
    assert found[:2] == found[2:]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(headed.path.read_bytes()[:-4000])
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        isolated(broken, mtp=True)


def test_the_engines_log_comes_over(
    headed: ModelSpec, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with isolated(headed) as made:
        made.run(token_chunks(headed, 1))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    caplog.set_level(logging.INFO, "imatrix.engine")
    with isolated(headed) as made:
        made.run(token_chunks(headed, 1))
    assert any("llama_model_loader" in record.getMessage() for record in caplog.records)


@posix
def test_ctrl_c_at_any_moment(headed: ModelSpec) -> None:
    chunk = token_chunks(headed, 1)[0]
    main = threading.main_thread().ident
    assert main is not None
    timers: list[threading.Timer] = []

    def start_timer(at: Progress) -> None:
        if at.chunks == 1:
            timers.append(threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)))
            timers[0].start()

    with isolated(headed) as made:
        with pytest.raises(KeyboardInterrupt):
            made.run(itertools.repeat(chunk), mtp=True, progress=start_timer)
        timers[0].join()
        kept = made.matrix
        assert kept.chunk_count >= 1
        again = made.run(itertools.repeat(chunk), mtp=True, max_chunks=kept.chunk_count)
        assert dict(again) == dict(kept)


# --- when it dies --------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGABRT, "is gone: SIGABRT, in chunk 4"),
        (signal.SIGKILL, "killed (SIGKILL), as the system does where memory runs out, in chunk 4"),
    ],
)
def test_it_dies_and_the_run_goes_on(
    number: int, says: str, headed: ModelSpec, tmp_path: Path
) -> None:
    chunks = token_chunks(headed, N_CHUNKS + 1)
    options: dict[str, Any] = {"mtp": True, "skip_chunks": 1, "checkpoint_every": 2}
    with collector(headed) as made:
        whole = made.run(chunks, mtp=True, skip_chunks=1)
        two = made.run(chunks, mtp=True, skip_chunks=1, max_chunks=2)
    path = tmp_path / "checkpoint"
    with isolated(headed) as made:
        with pytest.raises(EngineDiedError) as caught:
            made.run(chunks, checkpoint=path, progress=kill_at(made, 3, number), **options)
        error = caught.value
        assert says in str(error)
        assert f"{path} holds 2 chunk(s) and is 0:00:0" in str(error)
        assert "run the same again to go on from it" in str(error)
        assert (error.chunk, error.checkpoint) == (4, path)
        # the checkpoint's data, with the digest of its text
        assert made.matrix == two
        assert made._models.engine is None
        assert file.read(path).done == 2
        # the same Collector continues, with another process
        assert made.run(chunks, checkpoint=path, **options) == whole


@posix
def test_it_dies_without_a_checkpoint(headed: ModelSpec, tmp_path: Path) -> None:
    chunks = token_chunks(headed, 4)
    with isolated(headed) as made:
        with pytest.raises(EngineDiedError, match=r"2 chunk\(s\) are lost: give run\(\) one") as it:
            made.run(chunks, progress=kill_at(made, 2, signal.SIGKILL))
        assert it.value.checkpoint is None
        assert len(made.matrix) == 0
        # the checkpoint of another run, which was not to be resumed: it is not this run's
        path = tmp_path / "checkpoint"
        made.run(chunks, checkpoint=path, max_chunks=1)
        with pytest.raises(EngineDiedError, match=r"2 chunk\(s\) are lost\."):
            made.run(
                chunks,
                checkpoint=path,
                checkpoint_every=0,
                restart=True,
                progress=kill_at(made, 2, signal.SIGKILL),
            )
        assert len(made.matrix) == 0
        made.run(chunks)
        os.kill(engine_of(made), signal.SIGKILL)
        # the process is killed while nothing is asked of it
        deadline = time.monotonic() + 30
        while (
            made._models.engine is not None
            and made._models.engine.alive
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        assert made.run(chunks).chunk_count == 4


def test_its_last_words(tmp_path: Path) -> None:
    path = make_any(
        tmp_path / "fatal.gguf", "glm4moe", metadata={"leading_dense_block_count": 3}
    ).path
    with isolated(path, rehearse=True) as made:
        # found in the rehearsal: an error of the model, as without isolate
        with pytest.raises(ModelError, match=r"graphs: .*glm4-moe\.cpp:.*GGML_ASSERT\(layer\.ffn"):
            made.run([range(N_CTX)], mtp=True)
        assert len(made.run([range(N_CTX)])) > 0
    with isolated(path) as made:
        with pytest.raises(EngineDiedError) as caught:
            made.run([range(N_CTX)], mtp=True)
        assert re.search(r"glm4-moe\.cpp:\d+: GGML_ASSERT\(layer\.ffn_gate_inp", str(caught.value))
        assert f"while it loaded {path}" in str(caught.value)
        assert "No chunk was finished" in str(caught.value)
        assert "GGML_ASSERT" in caught.value.log


@posix
def test_it_ends_with_the_process_that_it_works_for(headed: ModelSpec) -> None:
    code = """
import itertools, sys
from imatrix import Collector
made = Collector(sys.argv[1], n_ctx=32, n_threads=1, isolate=True, rehearse=False)
first = lambda at: at.chunks == 1 and print(made._models.engine.pid, flush=True)
made.run(itertools.repeat(list(range(32))), progress=first)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, headed.path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        engine = int(process.stdout.readline())
        os.kill(engine, signal.SIGTERM)  # a stopped service sends it to all
        os.kill(engine, 0)
        process.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(engine, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("it is still there")


def test_files_in_the_current_folder_are_not_imported(headed: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    (tmp_path / "imatrix.py").write_text("raise SystemExit('imported')")
    code = """
import sys
sys.path[:] = filter(None, sys.path)
from imatrix import Collector
for isolate in (False, True):  # with the rehearsal
    with Collector(sys.argv[1], n_ctx=32, isolate=isolate) as made:
        print(made.run([range(32)]).chunk_count)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, headed.path], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("1\n1\n", "")


def test_no_interpreter_to_start(headed: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with isolated(headed) as made, pytest.raises(OSError, match=r"--no-isolate"):
        made.run([[1, 2]])


def test_frames() -> None:
    """Whatever an answer holds is data: arrays of three kinds, and JSON."""
    import io

    from imatrix.engine import frames

    stream = io.BytesIO(b'\x25\x00\x00\x00{"number": 1, "arrays": [["O", [2]]]}')
    with pytest.raises(ValueError, match="an array of O"):
        frames.receive(stream)
    with pytest.raises(EOFError):
        frames.receive(io.BytesIO(b"\x24\x00\x00\x00{"))
