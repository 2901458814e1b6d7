"""A text spread over the processes of a Dask cluster gives the same file whatever happens to
them."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import dask
import distributed
import numpy as np
import pytest
from helpers import cluster_hooks as hooks
from helpers.forge import ModelSpec
from helpers.forge_any import make_any
from helpers.running import Forged
from helpers.runs import N_CTX, SEED, Enough, poisoned, saved, stop_at, token_chunks

import imatrix
from imatrix import (
    Cluster,
    ClusterError,
    Collector,
    EngineDiedError,
    ImportanceMatrix,
    NonFiniteError,
    TemplateError,
)
from imatrix.cli.program import main
from imatrix.cluster import blocks, schedulers
from imatrix.cluster.work import Block
from imatrix.engine.sums import BlockSums
from imatrix.formats import FormatError
from imatrix.formats import checkpoint as file
from imatrix.text.progress import Progress

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")

BLOCK = 3
N_CHUNKS = 11  # three blocks and a shorter one


@pytest.fixture(scope="module")
def headed(forged: Forged) -> ModelSpec:
    return forged("glm4moe", seed=SEED, n_nextn=1)


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    """The client of two workers, which stay alive."""
    with Cluster("local:2") as two:
        yield two.client


@pytest.fixture
def cluster(workers: Any) -> Iterator[Cluster]:
    with Cluster(workers, block=BLOCK) as made:
        yield made
    workers.run(hooks.as_it_was)


def collector(spec: ModelSpec | Path, **options: Any) -> Collector:
    path = spec.path if isinstance(spec, ModelSpec) else spec
    return Collector(path, **{"n_ctx": N_CTX, "n_threads": 1, "rehearse": False, **options})


def by_hand(made: Collector, chunks: list[list[int]], **options: Any) -> dict[str, Any]:
    """Each block is a run of its own on one machine, and NumPy adds the blocks in their order."""
    added: dict[str, Any] = {}
    for first in range(0, len(chunks), BLOCK):
        for name, entry in made.run(chunks[first : first + BLOCK], **options).items():
            sums, counts = added.get(name, (0.0, 0))
            added[name] = (sums + entry.sums, counts + entry.counts)
    return added


def assert_is(matrix: ImportanceMatrix, expected: dict[str, Any]) -> None:
    assert set(matrix) == set(expected)
    for name, (sums, counts) in expected.items():
        assert np.array_equal(matrix[name].sums, sums), name
        assert np.array_equal(matrix[name].counts, counts), name


def assert_within_rounding(a: ImportanceMatrix, b: ImportanceMatrix, n_chunks: int) -> None:
    assert set(a) == set(b)
    for name, entry in a.items():
        assert np.array_equal(entry.counts, b[name].counts), name
        # n - 1 additions of numbers of one sign, in whatever order: on each side every addition is
        # off by at most 2^-53 of its result
        assert np.allclose(entry.sums, b[name].sums, rtol=2 * n_chunks * 2**-53, atol=0), name


# --- to the bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_however_many_workers(headed: ModelSpec, tmp_path: Path, n: int) -> None:
    chunks = token_chunks(headed, N_CHUNKS)
    options: dict[str, Any] = {"mtp": True, "perplexity": True, "process_output": True}
    with collector(headed) as here:
        expected = by_hand(here, chunks, **options)
        whole = here.run(chunks, **options)
        perplexity, report = here.perplexity, here.report
    reports: list[Progress] = []
    # the cores are divided among the workers, so that each has another number of threads, as by
    # default
    with Cluster(f"local:{n}", block=BLOCK) as some, collector(headed, n_threads=None) as made:
        matrix = made.run(iter(chunks), cluster=some, progress=reports.append, **options)
        assert made.perplexity == perplexity  # scores are added chunk by chunk
        assert made.report == report
        assert made.counters == {}
        assert some.use.blocks == 4
        assert some.use.nbytes > 4 * sum(entry.sums.nbytes for entry in matrix.values()) / 3
    assert_is(matrix, expected)
    assert_within_rounding(matrix, whole, N_CHUNKS)
    assert matrix.provenance == whole.provenance
    done = [at.chunks for at in reports]
    assert sorted(set(done)) == sorted({0, 3, 6, 9, 11} if 0 in done else {3, 6, 9, 11})
    assert done == sorted(done)
    assert {at.workers for at in reports} == {n}


def test_a_worker_that_is_killed(headed: ModelSpec, cluster: Cluster, tmp_path: Path) -> None:
    chunks = token_chunks(headed, N_CHUNKS)
    with collector(headed) as made:
        expected = by_hand(made, chunks, mtp=True)
        before = set(cluster.client.run(os.getpid).values())
        cluster.client.run(hooks.worker_dies_once, str(tmp_path / "died"))
        matrix = made.run(chunks, mtp=True, cluster=cluster)
        assert (tmp_path / "died").exists()
    assert_is(matrix, expected)
    assert matrix.chunk_count == N_CHUNKS
    cluster.client.wait_for_workers(2)
    assert set(cluster.client.run(os.getpid).values()) != before


def test_parts_that_workers_add(
    headed: ModelSpec, workers: Any, cluster: Cluster, tmp_path: Path
) -> None:
    """Neighbours are added first, (0 + 1) + (2 + 3), on whichever worker has them, while one worker
    is killed. Scores, a skipped NaN and a run that continues from a checkpoint give what whole
    blocks give."""
    path = poisoned(headed, tmp_path, "token_embd.weight", 77, 41)
    chunks = [[token if token != 77 else 78 for token in one] for one in token_chunks(headed, 13)]
    chunks[9][20] = 77
    options: dict[str, Any] = {"mtp": True, "perplexity": True, "on_nonfinite": "skip"}

    with warnings.catch_warnings(), collector(path) as made:
        warnings.simplefilter("ignore", UserWarning)  # a warning says what is left out
        parts = [made.run(chunks[at : at + 2], **options) for at in range(0, 13, 2)]
        expected = {}
        for name in parts[0]:
            a, b, c, d, e, f, g = (part[name].sums for part in parts)
            # the first block has 8 chunks, the second one the other 5
            expected[name] = (
                ((a + b) + (c + d)) + ((e + f) + g),
                sum(part[name].counts for part in parts),
            )
        whole = made.run(chunks, **options)
        perplexity = made.perplexity
        workers.run(hooks.worker_dies_once, str(tmp_path / "died"))
        with Cluster(workers, block=8, part=2) as some:
            checkpoint = tmp_path / "checkpoint"
            with pytest.raises(Enough):
                made.run(
                    chunks, cluster=some, checkpoint=checkpoint, progress=stop_at(8), **options
                )
            assert (tmp_path / "died").exists()
            assert file.read(checkpoint).done == 8
            found = made.run(chunks, cluster=some, checkpoint=checkpoint, **options)
            assert some.use.blocks == 1
        assert made.perplexity == perplexity
        with Cluster(workers, block=8, part=4) as other:
            with pytest.raises(imatrix.CheckpointError, match="part is 2 there and 4 here"):
                made.run(chunks, cluster=other, checkpoint=checkpoint, **options)
            workers.wait_for_workers(2)  # the replacement of the killed worker among them
            workers.run(hooks.engine_dies, chunks[5], None)
            with pytest.raises(ClusterError, match=r"chunks 0 to 7, the last time in chunk 5: SIG"):
                made.run(chunks, cluster=other, **options)
    assert_is(found, expected)
    assert found.provenance == whole.provenance


def test_an_engine_that_ends_once(headed: ModelSpec, cluster: Cluster, tmp_path: Path) -> None:
    chunks = token_chunks(headed, N_CHUNKS)
    with collector(headed) as made:
        expected = by_hand(made, chunks)
        before = set(cluster.client.run(os.getpid).values())
        cluster.client.run(hooks.engine_dies, chunks[4], str(tmp_path / "died"))
        assert_is(made.run(chunks, cluster=cluster), expected)
    assert (tmp_path / "died").exists()
    # the worker itself does not end
    assert set(cluster.client.run(os.getpid).values()) == before


def test_an_engine_that_ends_again_and_again(
    headed: ModelSpec, cluster: Cluster, tmp_path: Path
) -> None:
    chunks = token_chunks(headed, N_CHUNKS)
    path = tmp_path / "checkpoint"
    with collector(headed) as made:
        expected = by_hand(made, chunks)
        cluster.client.run(hooks.engine_dies, chunks[7], None)
        with pytest.raises(
            ClusterError,
            match=r"3 time\(s\) on the block of chunks 6 to 8, the last time in chunk 7: SIGABRT",
        ) as caught:
            made.run(chunks, cluster=cluster, checkpoint=path)
        assert isinstance(caught.value.__cause__, EngineDiedError)
        assert made.matrix.chunk_count == file.read(path).done == 6
        cluster.client.run(hooks.as_it_was)
        reports: list[Progress] = []
        matrix = made.run(chunks, cluster=cluster, checkpoint=path, progress=reports.append)
    assert {at.resumed for at in reports} == {6}
    assert_is(matrix, expected)


def test_going_on_with_other_workers(headed: ModelSpec, cluster: Cluster, tmp_path: Path) -> None:
    chunks = token_chunks(headed, N_CHUNKS)
    path = tmp_path / "checkpoint"
    options: dict[str, Any] = {"mtp": True, "perplexity": True, "checkpoint": path}
    with collector(headed) as made:
        whole = made.run(chunks, cluster=cluster, mtp=True, perplexity=True)
        expected, perplexity = saved(whole, tmp_path), made.perplexity
        with pytest.raises(Enough):
            made.run(iter(chunks), cluster=cluster, progress=stop_at(3), **options)
    assert file.read(path).done == 3
    with Cluster("local:1", block=BLOCK) as one, collector(headed) as made:
        assert saved(made.run(iter(chunks), cluster=one, **options), tmp_path) == expected
        assert made.perplexity == perplexity
        # a run that is done gives its matrix again
        assert saved(made.run(iter(chunks), cluster=one, **options), tmp_path) == expected
    with Cluster(cluster.client, block=2) as other, collector(headed) as made:
        with pytest.raises(imatrix.CheckpointError, match="block is 3 there and 2 here"):
            made.run(chunks, cluster=other, **options)
        with pytest.raises(imatrix.CheckpointError, match="block is 3 there and absent here"):
            made.run(chunks, **options)


RUN = """
import os, psutil, sys
from imatrix import Cluster, Collector

if __name__ == "__main__":
    where, model, text, out, number = sys.argv[1:]

    def end(at):
        if at.chunks >= 6 and number != "0":
            # workers and engines
            print(*(each.pid for each in psutil.Process().children(recursive=True)), flush=True)
            os.kill(os.getpid(), int(number))

    with Cluster(where, block=3) as cluster, Collector(model, n_ctx=32, n_threads=1) as made:
        run = {"checkpoint": f"{out}.checkpoint", "checkpoint_every": 3, "progress": end}
        made.run(open(text), max_chunks=20, mtp=True, cluster=cluster, **run).save(out)
"""


@pytest.mark.slow
def test_where_it_was_started_it_is_ended(
    headed: ModelSpec, prose_file: Path, tmp_path: Path
) -> None:
    """The run ends by Ctrl-C or by SIGKILL; the same command continues it, and no worker stayed
    behind."""
    script = tmp_path / "run.py"
    script.write_text(RUN, encoding="utf-8")

    def run(where: str, out: str, number: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, script, where, headed.path, prose_file, tmp_path / out, str(number)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    done = run("local:1", "whole.gguf", 0)
    assert done.returncode == 0, done.stderr
    expected = (tmp_path / "whole.gguf").read_bytes()
    for number in (signal.SIGINT, signal.SIGKILL):
        out = f"{number.name}.gguf"
        done = run("local:2", out, number)
        assert done.returncode == -number, done.stderr
        pids = [int(pid) for pid in done.stdout.split()]
        assert len(pids) >= 4
        until_gone(pids)
        assert not (tmp_path / out).exists()
        # saved at once if possible, or every 3 chunks
        assert file.read(tmp_path / f"{out}.checkpoint").done == 6
        done = run("local:2", out, 0)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / out).read_bytes() == expected


# --- what decides the chunks, and how models are found -------------------------------------------


def test_documents_and_experts(
    forged: Forged, headed: ModelSpec, prose: str, cluster: Cluster
) -> None:
    """The text is cut as on one machine, and the run stops at the end of a block if the experts
    have enough."""
    documents = [part + "." for part in prose[:4000].split(".\n")]
    options: dict[str, Any] = {"packing": "document", "mtp": True}
    with collector(headed) as made:
        whole = made.run(documents, **options)
        found = made.run(documents, cluster=cluster, **options)
        assert_within_rounding(found, whole, whole.chunk_count)
        assert found.provenance == whole.provenance
        assert found.chunk_count > 2 * BLOCK
        # rows after each block on one machine, until all experts have enough
        chunks = token_chunks(headed, 30)
        enough = next(
            n
            for n in range(BLOCK, 30, BLOCK)
            if all(
                (entry.counts >= 6).all()
                for entry in made.run(chunks[:n], mtp=True).values()
                if len(entry.counts) > 1
            )
        )
        assert enough < 30 - BLOCK
        found = made.run(chunks, mtp=True, min_expert_rows=6, cluster=cluster)
        assert made.report.ended == "min_expert_rows"
        assert found.chunk_count == enough
        assert_is(found, by_hand(made, chunks[:enough], mtp=True))


def test_chunks_side_by_side_at_another_path(
    headed: ModelSpec, workers: Any, tmp_path: Path
) -> None:
    """The workers find the model at another path, and their environment counts."""
    chunks = token_chunks(headed, 8)
    (tmp_path / "there.gguf").write_bytes(headed.path.read_bytes())
    workers.run(hooks.set_variable, "IMATRIX_TEST_MODELS", str(tmp_path))
    with collector(headed, n_seq=2) as made:
        whole = made.run(chunks)
        with Cluster(workers, model="$IMATRIX_TEST_MODELS/there.gguf", block=4) as there:
            assert_within_rounding(made.run(chunks, cluster=there), whole, 8)
            assert there.use.blocks == 2
        with (
            Cluster(workers, block=3) as odd,
            pytest.raises(ValueError, match=r"block=3 is no multiple of n_seq=2.* Give 4"),
        ):
            made.run(chunks, cluster=odd)


def test_a_head_of_its_own_kind_in_a_file_of_its_own(workers: Any, tmp_path: Path) -> None:
    """gemma4-assistant: its names say whose they are, and both files have another path on the
    workers."""
    trunk = make_any(tmp_path / "gemma4.gguf", "gemma4", n_nextn=0, seed=1, n_embd=512).path
    head = make_any(tmp_path / "head.gguf", "gemma4-assistant", n_nextn=2, seed=2).path
    (tmp_path / "there").mkdir()
    for path in (trunk, head):
        (tmp_path / "there" / path.name).write_bytes(path.read_bytes())
    chunks = np.random.default_rng(0).integers(0, 64, (5, N_CTX)).tolist()
    with collector(trunk, mtp_model=head) as made:
        whole = made.run(chunks, mtp=True)
        whole_head = made.mtp_matrix
        assert whole_head
        with Cluster(
            workers,
            model=tmp_path / "there" / trunk.name,
            mtp_model=tmp_path / "there" / head.name,
            block=2,
        ) as some:
            assert_within_rounding(made.run(chunks, mtp=True, cluster=some), whole, 5)
            assert made.mtp_matrix is not None
            assert_within_rounding(made.mtp_matrix, whole_head, 5)


def test_a_nan(headed: ModelSpec, cluster: Cluster, tmp_path: Path) -> None:
    path = poisoned(headed, tmp_path, "token_embd.weight", 77, 41)
    chunks = [[token if token != 77 else 78 for token in one] for one in token_chunks(headed, 8)]
    chunks[4][20] = 77
    checkpoint = tmp_path / "checkpoint"
    with collector(path) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a warning says what is left out
        whole = made.run(chunks, mtp=True, on_nonfinite="skip")
        with pytest.raises(
            NonFiniteError, match=r"in chunk 4 .*Its block was discarded; the 3 "
        ) as e:
            made.run(chunks, mtp=True, cluster=cluster, checkpoint=checkpoint)
        assert (e.value.chunk, made.matrix.chunk_count) == (4, 3)
        found = made.run(
            chunks, mtp=True, cluster=cluster, checkpoint=checkpoint, on_nonfinite="skip"
        )
    assert_within_rounding(found, whole, 8)
    assert found.provenance == whole.provenance
    assert found.provenance is not None
    assert [one.chunk for one in found.provenance.left_out] == [4]


# --- what is refused -----------------------------------------------------------------------------


def test_other_workers_are_refused(
    headed: ModelSpec, forged: Forged, workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = token_chunks(headed, 4)
    other = forged("glm4moe", seed=SEED + 1, n_nextn=1)
    with collector(headed) as made:
        with (
            Cluster(workers, model=tmp_path / "none.gguf") as some,
            pytest.raises(ClusterError, match=r"FileNotFoundError: .*none\.gguf"),
        ):
            made.run(chunks, cluster=some)
        with (
            Cluster(workers, model=other.path) as some,
            pytest.raises(ClusterError, match=r"model_fingerprint is \w+ there and \w+ here"),
        ):
            made.run(chunks, cluster=some)
        monkeypatch.setattr("imatrix.engine.identity.__version__", "0.0.7")
        with (
            Cluster(workers) as some,
            pytest.raises(ClusterError, match=r"is installed there, .* with imatrix 0\.0\.7"),
        ):
            made.run(chunks, cluster=some)


def test_bad_arguments(headed: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("local", "local:0", "local:two", "nobody:3", "host:8786"):
        with pytest.raises(ValueError, match=rf"tcp://host:8786, local:N, .*got '{where}'"):
            Cluster(where)
    with pytest.raises(ValueError, match="block must be 1 or more, got 0"):
        Cluster("local:1", block=0)
    for block, part in ((None, 2), (3, 2)):
        with pytest.raises(ValueError, match=f"block={block} is no multiple of part={part}"):
            Cluster("local:1", block=block, part=part)
    with pytest.raises(ValueError, match=r"a distributed\.Client, got 3"):
        Cluster(3)
    with pytest.raises(ValueError, match=r"certificates, .* distributed\.comm\.tls\.ca-file"):
        Cluster("tls://127.0.0.1:9")
    monkeypatch.setattr(schedulers, "_CONNECT", "1s")
    with pytest.raises(ClusterError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        Cluster("tcp://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install 'imatrix\[dask\]'"):
        Cluster("local:1")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ImportError, match=r"pip install 'imatrix\[jobqueue\]'"):
        Cluster("slurm:2")


def test_a_batch_that_goes_by_memory_is_refused(headed: ModelSpec, cluster: Cluster) -> None:
    with (
        collector(headed, n_batch="auto") as made,
        pytest.raises(ValueError, match="for a cluster give n_batch"),
    ):
        made.run(token_chunks(headed, 2), cluster=cluster)


def test_workers_that_are_not_alike(workers: Any) -> None:
    with Cluster(workers) as some:
        some._queue.check_machines(Block(machines=("AVX2 = 1",)))
        with pytest.warns(UserWarning, match="not alike: .* AVX2 = 1; another with AVX512 = 1"):
            some._queue.check_machines(Block(machines=("AVX512 = 1",)))


def test_a_cluster_without_workers_is_waited_for(
    headed: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_LONELY", 2.0)
    chunks = token_chunks(headed, 2)
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address="127.0.0.1:0") as empty,
        distributed.Client(empty, set_as_default=False) as client,
        Cluster(client) as some,
        collector(headed) as made,
    ):
        looks = itertools.count()

        def on_progress(_: Progress) -> None:
            if next(looks) == 2:
                empty.scale(1)

        with pytest.warns(UserWarning, match="has had no worker for 2 s"):
            matrix = made.run(chunks, cluster=some, progress=on_progress)
    assert matrix.chunk_count == 2


def test_a_block_that_ends_every_worker(headed: ModelSpec, tmp_path: Path) -> None:
    chunks = token_chunks(headed, N_CHUNKS)
    path = tmp_path / "checkpoint"
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), collector(headed) as made:
        with Cluster("local:1", block=BLOCK) as one:
            one.client.register_plugin(hooks.Deadly(chunks[7]))
            with pytest.raises(ClusterError, match="chunks 6 to 8 ended one worker after the oth"):
                made.run(chunks, cluster=one, checkpoint=path)
        assert file.read(path).done == 6


QUEUE = """#!{python}
import os, shutil, signal, subprocess, sys
if sys.argv[0].endswith("scancel"):
    os.killpg(int(sys.argv[1]), signal.SIGTERM)
else:
    script = shutil.copy(sys.argv[1], sys.argv[0] + f".{{os.getpid()}}.job")
    job = subprocess.Popen(["sh", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           start_new_session=True)
    print("Submitted batch job", job.pid)
"""


def test_jobs_of_a_queue(
    headed: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dask-jobqueue with a queue that starts each job at once: each job runs one worker, whatever
    the configuration says about its cores (the last --nthreads counts), and all jobs end with the
    run."""
    config = {
        "jobqueue.slurm.cores": 16,
        "jobqueue.slurm.memory": "1GB",
        "jobqueue.slurm.interface": "lo",
        "jobqueue.slurm.worker-extra-args": ["--resources", "GPU=1"],
        "jobqueue.slurm.scheduler-options": {"dashboard_address": "127.0.0.1:0"},
    }
    with dask.config.set(config):
        with pytest.raises(ClusterError, match="submits jobs with sbatch, which is not on this"):
            Cluster("slurm:2")
        for name in ("sbatch", "scancel"):
            (tmp_path / name).write_text(QUEUE.format(python=sys.executable), encoding="utf-8")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        chunks = token_chunks(headed, N_CHUNKS)
        with Cluster("slurm:2", block=BLOCK) as jobs, collector(headed) as made:
            expected = by_hand(made, chunks)
            jobs.client.wait_for_workers(2, timeout=60)
            assert list(jobs.client.nthreads().values()) == [1, 1]
            assert_is(made.run(chunks, cluster=jobs), expected)
            pids = jobs.client.run(os.getpid).values()
    scripts = [path.read_text() for path in tmp_path.glob("*.job")]
    assert len(scripts) == 2
    assert all("#SBATCH --cpus-per-task=16" in script for script in scripts)
    assert all("--resources GPU=1" in script for script in scripts)
    until_gone(pids)


def test_ctrl_c_stays_what_it_was() -> None:
    """dask_jobqueue takes over SIGINT when it is imported, which only the main thread can do."""
    code = """
import signal, threading
from imatrix import Cluster
def start():
    try:
        Cluster("slurm:1")
    except Exception as error:
        print(type(error).__name__)
thread = threading.Thread(target=start)
thread.start()
thread.join()
start()
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    env = {**os.environ, "PATH": ""}  # no sbatch
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("ClusterError\nClusterError\nTrue\n", "")


def until_gone(pids: Iterable[int]) -> None:
    for _ in range(600):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.05)
    pytest.fail("a worker stayed")


# --- without workers -----------------------------------------------------------------------------


def test_blocks_that_share_otherwise() -> None:
    """Weights that share their rows in one block and not in another."""
    rng = np.random.default_rng(0)

    def group(*names: str) -> tuple[list[str], Any, Any, Any]:
        return list(names), rng.random((2, 4)), np.array([3]), rng.random((2, 4)) - 0.5

    blocks = [
        [group("q", "k", "v"), group("o")],
        [group("q", "k"), group("v"), group("o", "up")],
        [group("q", "k", "v"), group("o")],
    ]
    sums = BlockSums()
    for block in blocks:
        sums.add(block)
    found = sums.snapshot()
    for name in ("q", "k", "v", "o", "up"):
        parts = [data for names, *data in itertools.chain(*blocks) if name in names]
        for kind in range(3):
            assert np.array_equal(found[name][kind], sum(data[kind] for data in parts)), name
    # a block has all of them or none
    with pytest.raises(ClusterError, match=r"o: a worker sent sums \(3, 4\)"):
        sums.add([group("q"), (["o"], np.ones((3, 4)), np.array([3]), np.ones((3, 4)))])
    with pytest.raises(ClusterError, match=r"o: a worker sent .* and no signed sums, the blocks"):
        sums.add([group("q"), (["o"], np.ones((2, 4)), np.array([3]), None)])
    assert all(np.array_equal(found[name][0], each[0]) for name, each in sums.snapshot().items())


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteError("a", weight="blk.0.attn_q.weight", channel=3, expert=1, chunk=2),
        EngineDiedError("a", cause="SIGABRT", log="b"),
        TemplateError("a", line=2),
        FormatError("a.gguf", "b"),
        ClusterError("a"),
    ],
)
def test_errors_are_pickled(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def test_progress_within_blocks(headed: ModelSpec, workers: Any) -> None:
    """What the workers have collected before a block is done."""
    reports: list[Progress] = []
    workers.run(hooks.slow, 0.25)
    with Cluster(workers, block=12) as some, collector(headed) as made:
        made.run(token_chunks(headed, 12), cluster=some, progress=reports.append)
    workers.run(hooks.as_it_was)
    within = [at.ahead for at in reports if at.chunks == 0]
    assert any(0 < ahead < 12 for ahead in within)
    assert within == sorted(within)
    assert (reports[-1].chunks, reports[-1].ahead) == (12, 0)


def test_nothing_stays_loaded(headed: ModelSpec, workers: Any) -> None:
    """Workers that stay alive let go of the model even if a block is still on its way."""
    chunks = token_chunks(headed, 40)
    with Cluster(workers, block=2) as some, collector(headed) as made:
        workers.run(hooks.slow, 0.2)
        with pytest.raises(Enough):
            made.run(chunks, cluster=some, progress=stop_at(2))
        assert any(workers.run(hooks.engines).values())
    workers.run(hooks.as_it_was)
    assert not any(workers.run(hooks.engines).values())


# --- the command ---------------------------------------------------------------------------------


def test_the_command(
    headed: ModelSpec,
    prose_file: Path,
    workers: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.gguf"
    collect = ["collect", "-m", str(headed.path), "-f", str(prose_file), "-c", "32", "-t", "1"]
    collect += ["--mtp", "--chunks", "8", "-o", str(out)]
    address = workers.scheduler.address
    assert main([*collect, "--dask", address, "--dask-block", "3"]) == 0
    told = capsys.readouterr().err
    assert f"{address}: 2 worker(s)" in told
    assert "chunk 8/8, 2 workers" in told
    assert "3 block(s)" in told
    with collector(headed) as made, Cluster(workers, block=3) as some:
        made.run(prose_file, mtp=True, max_chunks=8, perplexity=True, cluster=some).save(
            tmp_path / "again.gguf"
        )
    assert out.read_bytes() == (tmp_path / "again.gguf").read_bytes()
    for flags, message in (
        (["--dask-block", "3"], "--dask-block is for a run with --dask"),
        (["--dask", "local:1", "--rpc", "a:1"], "give one of them"),
        (["--dask", "local:1", "--no-isolate"], "--no-isolate is not for --dask"),
        (["--dask", "somewhere"], "expected a scheduler's address"),
    ):
        assert main([*collect, *flags]) == 2
        assert message in capsys.readouterr().err
