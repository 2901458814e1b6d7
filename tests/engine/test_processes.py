"""Several Collectors, several threads, forks, and the end of the interpreter."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.forge import ModelSpec
from helpers.running import Forged
from helpers.runs import N_CTX, SEED, token_chunks

import imatrix
from imatrix import Collector, ImportanceMatrix, LockedError, evaluate
from imatrix.files.lock import locked
from imatrix.native import engine
from imatrix.text.progress import Progress

N_CHUNKS = 6

forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")


@pytest.fixture(scope="module")
def headed(forged: Forged) -> ModelSpec:
    return forged("glm4moe", seed=SEED, n_nextn=1)


@pytest.fixture(scope="module")
def plain(forged: Forged) -> ModelSpec:
    return forged("llama", seed=SEED)


@pytest.fixture(autouse=True)
def _nothing_is_left_over() -> Iterator[None]:
    gc.collect()
    before = engine.live_objects()
    yield
    gc.collect()
    assert engine.live_objects() == before


def collector(spec: ModelSpec, **options: Any) -> Collector:
    return Collector(spec.path, **{"n_ctx": N_CTX, "n_threads": 1, "rehearse": False, **options})


def in_thread(function: Any) -> tuple[threading.Thread, list[Any]]:
    """Runs in a thread; its result or its exception goes into the list."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, found


# --- native objects are counted ------------------------------------------------------------------


def test_native_objects_are_counted(headed: ModelSpec) -> None:
    none = dict.fromkeys(
        ("models", "contexts", "sessions", "sums", "evaluators", "weights", "trials"), 0
    )

    def since(before: dict[str, int]) -> dict[str, int]:
        return {kind: n - before[kind] for kind, n in engine.live_objects().items()}

    before = engine.live_objects()
    with collector(headed) as made:
        made.run(token_chunks(headed, 1), mtp=True)
        # the trunk's context and the head's
        assert since(before) == none | {"models": 1, "contexts": 2, "sessions": 1, "sums": 1}
        made.run(token_chunks(headed, 1))  # those of the earlier model are gone
        assert since(before) == none | {"models": 1, "contexts": 1, "sessions": 1, "sums": 1}
        made.plan(mtp=True)
    assert since(before) == none
    evaluate(headed.path, token_chunks(headed, 2), n_ctx=N_CTX, n_threads=1)
    gc.collect()
    assert since(before) == none


# --- several Collectors --------------------------------------------------------------------------


def test_two_taking_turns(headed: ModelSpec, plain: ModelSpec) -> None:
    """One runs inside the other's steps: its text comes out of the other's progress function."""
    ours, theirs = token_chunks(headed, N_CHUNKS), token_chunks(plain, N_CHUNKS, seed=1)
    with collector(headed) as a, collector(plain) as b:
        whole, inner = a.run(ours, mtp=True), b.run(theirs)
        found: list[ImportanceMatrix] = []

        def other(at: Progress) -> None:
            found.append(b.run(theirs, max_chunks=at.chunks))

        assert a.run(ours, mtp=True, progress=other) == whole
        assert found[-1] == inner
        assert [each.chunk_count for each in found] == list(range(1, N_CHUNKS + 1))


@pytest.mark.parametrize("isolate", [False, True])
def test_two_in_threads(isolate: bool, headed: ModelSpec, plain: ModelSpec) -> None:
    ours, theirs = token_chunks(headed, 40), token_chunks(plain, 40, seed=1)
    with collector(headed) as a, collector(plain) as b:
        expected = [a.run(ours, mtp=True), b.run(theirs)]
    # made in this thread, used in another, with engine threads of its own
    with collector(headed, isolate=isolate) as a, collector(plain, isolate=isolate) as b:
        started = [in_thread(lambda: a.run(ours, mtp=True)), in_thread(lambda: b.run(theirs))]
        for thread, _ in started:
            thread.join()
        assert [found[0] for _, found in started] == expected


def test_one_of_another_thread(headed: ModelSpec) -> None:
    """The matrix can be looked at while another thread runs: it holds whole chunks. A second run is
    refused."""
    chunks = token_chunks(headed, 30)
    with collector(headed) as made:
        parts = [made.run(chunks, max_chunks=n + 1, mtp=True) for n in range(len(chunks))]
        ready = threading.Event()
        done = threading.Event()

        def told(at: Progress) -> None:
            ready.set()
            if at.chunks == len(chunks) - 1:  # the run waits until it has been looked at
                done.wait(60)

        thread, found = in_thread(lambda: made.run(chunks, mtp=True, progress=told))
        ready.wait()
        seen: list[ImportanceMatrix] = []
        while thread.is_alive():
            seen.append(made.matrix)
            if len(seen) == 1:
                with pytest.raises(RuntimeError, match="in another thread"):
                    made.run(chunks)
            done.set()
        thread.join()
        assert found == [parts[-1]]
        assert seen
        assert all(matrix == parts[matrix.chunk_count - 1] for matrix in seen)

        def again(_at: Progress) -> None:
            made.run(chunks)

        with pytest.raises(RuntimeError, match="in this thread"):
            made.run(chunks, progress=again)
        assert made.run(chunks, mtp=True) == parts[-1]


@pytest.mark.parametrize("isolate", [False, True])
def test_closed_while_it_runs(isolate: bool, headed: ModelSpec, tmp_path: Path) -> None:
    chunks = token_chunks(headed, 3)
    path = tmp_path / "checkpoint"
    made = collector(headed, isolate=isolate)
    ready = threading.Event()

    def stream() -> Iterator[list[int]]:
        while True:
            yield from chunks

    thread, found = in_thread(
        lambda: made.run(stream(), checkpoint=path, progress=lambda _: ready.set())
    )
    ready.wait()
    made.close()
    thread.join()
    assert isinstance(found[0], RuntimeError)
    assert "the run was ended: this Collector was closed" in str(found[0])
    assert path.exists()
    # it ends by itself, in the middle
    made = collector(headed, isolate=isolate)
    with pytest.raises(RuntimeError, match="this Collector was closed"):
        made.run(stream(), progress=lambda _: made.close())
    with pytest.raises(ValueError, match="is closed"):
        made.run(chunks)


def test_one_run_a_checkpoint(headed: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    chunks = token_chunks(headed, 3)
    with collector(headed) as made, collector(headed) as other:
        with locked(path), pytest.raises(LockedError, match=f"process {os.getpid()} is writing"):
            made.run(chunks, checkpoint=path)

        def second(_at: Progress) -> None:
            with pytest.raises(LockedError, match=r"or name another checkpoint$"):
                other.run(chunks, checkpoint=path)

        whole = made.run(chunks, checkpoint=path, progress=second)
        assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]
        assert other.run(chunks, checkpoint=path) == whole
    assert issubclass(LockedError, RuntimeError)


@forking
def test_another_process_has_the_checkpoint(headed: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    code = "import sys; from imatrix.files.lock import locked\n"
    code += "with locked(sys.argv[1], 'checkpoint'): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with (
            collector(headed) as made,
            pytest.raises(LockedError, match=f"process {holder.pid} is writing {path}"),
        ):
            made.run(token_chunks(headed, 2), checkpoint=path)
        holder.kill()
    with collector(headed) as made:
        assert made.run(token_chunks(headed, 2), checkpoint=path).chunk_count == 2


# --- forks ---------------------------------------------------------------------------------------

FORK = """
import gc, os, signal, sys, warnings
from imatrix import Collector
warnings.simplefilter("error")
signal.alarm(100)  # a deadlock is what this is about
isolate = sys.argv[2] == "isolate"
made = Collector(sys.argv[1], n_ctx=32, n_threads=2, isolate=isolate)
chunks = [[7 * i % 60 + j for j in range(32)] for i in range(4)]
whole = made.run(chunks)
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    for use in (
        lambda: made.run(chunks), lambda: made.matrix, lambda: made.tokenize("a"), made.plan,
        lambda: made.n_vocab,
    ):
        try:
            use()
        except RuntimeError as error:
            assert f"belongs to process {os.getppid()}" in str(error), error
        else:
            os._exit(1)
    # a new one, in this process: with threads that are not here; and in one of its own
    if not isolate:
        try:
            with Collector(sys.argv[1], n_ctx=32, rehearse=False) as other:
                other.run(chunks)
        except RuntimeError as error:
            assert "isolate=True" in str(error), error
        else:
            os._exit(2)
    with Collector(sys.argv[1], n_ctx=32, n_threads=2, isolate=True) as other:
        if other.run(chunks) != whole:
            os._exit(3)
    made.close()
    del made
    gc.collect()
    sys.exit(0)  # all of the interpreter's end
_, status = os.waitpid(pid, 0)
assert made.run(chunks) == whole
made.close()
print("status", os.waitstatus_to_exitcode(status))
"""


@forking
@pytest.mark.parametrize("isolate", ["isolate", "not"])
def test_fork_after_loading(isolate: str, plain: ModelSpec) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, plain.path, isolate],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("status 0\n", "", 0)


@forking
def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "file"
    held = locked(path)
    with held:
        context = multiprocessing.get_context("fork")
        waiting = context.Event()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks while threads run
            child = context.Process(target=waiting.wait)
            child.start()
    try:
        with locked(path):
            pass
    finally:
        waiting.set()
        child.join()


# --- the end of the interpreter ------------------------------------------------------------------

EXIT = """
import itertools, sys, threading
from imatrix import Collector
made = Collector(sys.argv[1], n_ctx=32, n_threads=2, isolate=sys.argv[3] == "isolate")
chunk = list(range(32))
ready = threading.Event()
def run():
    n = 8 if sys.argv[2] == "waits" else None
    matrix = made.run(itertools.repeat(chunk), max_chunks=n, checkpoint=sys.argv[4],
                      checkpoint_every=0, progress=lambda at: ready.set())
    print("done", matrix.chunk_count, flush=True)
    made.close()
threading.Thread(target=run, daemon=sys.argv[2] == "daemon").start()
ready.wait()
"""


@pytest.mark.parametrize("isolate", ["isolate", "not"])
@pytest.mark.parametrize("how", ["waits", "daemon"])
def test_the_interpreter_exits(how: str, isolate: str, plain: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    done = subprocess.run(
        [sys.executable, "-c", EXIT, plain.path, how, isolate, path],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    if how == "waits":  # the interpreter waits for the thread: the run goes on to its end
        assert (done.stdout, done.stderr) == ("done 8\n", "")
    else:  # the run is ended in good order; how much of that Python still prints is up to Python
        assert done.stdout == ""
        assert "Fatal" not in done.stderr
    assert imatrix.formats.checkpoint.read(path).done >= 1
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]
