"""n_batch="auto": which batch is chosen, for which memory, and that it only saves reading."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.forge import ModelSpec
from helpers.running import Forged
from helpers.uses import MB, need

from imatrix import Collector, ImportanceMatrix, cli
from imatrix.engine import batch as _batch
from imatrix.engine.batch import Room, choose
from imatrix.engine.memory import available_memory
from imatrix.engine.settings import Batch
from imatrix.native import engine

pytestmark = [
    pytest.mark.engine("src/llama-batch.cpp", "how tokens of several chunks share a batch"),
]


N_CTX = 128


@pytest.mark.parametrize(
    ("room", "weights", "fixed", "expected"),
    [
        # 0.9 * 1000 MB: 849 + 51.2 for a graph of 512 tokens + 1 for the chunk is too much
        (1000, 840, 0, (1, 512)),
        (1000, 849, 0, (9, 9 * 512)),  # half of 1000 MB: 500 // (51.2 + 1) = 9
        (2000, 9000, 0, (19, 19 * 512)),  # 1000 // 52.2
        (2000, 9000, 400, (19, 19 * 512)),  # unmapped weights have taken their memory already
        (60, 9000, 0, (1, 512)),  # there is not even room for one: the smallest batch
        (10**6, 10**7, 0, (256, 256 * 512)),  # LLAMA_MAX_SEQ
    ],
)
def test_chunks_side_by_side(
    room: int, weights: int, fixed: int, expected: tuple[int, int]
) -> None:
    model = need(weights * MB, 1 * MB, MB // 10, fixed * MB)
    found = choose(512, model, Room(room * MB, {}), mapped=True, most=1000)
    assert (found.n_seq, found.n_ubatch) == expected
    assert found.n_batch == found.n_seq * 512


def test_no_more_chunks_than_there_are() -> None:
    model = need(9000 * MB, 1 * MB, MB // 10)
    assert choose(512, model, Room(2000 * MB, {}), mapped=True, most=7).n_seq == 7


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (1700, (4096, 4096)),  # 850 - 8 for the chunk leaves room for 8420 tokens
        (800, (2048, 2048)),  # room for 3920: two parts, each in a decode of its own
        (340, (1366, 1366)),  # room for 1620: three parts
        (100, (4096, 512)),  # room for 420, which is less than the usual graph: it stays
    ],
)
def test_a_long_chunk_with_a_head(room: int, expected: tuple[int, int]) -> None:
    model = need(9000 * MB, 8 * MB, MB // 10)
    found = choose(4096, model, Room(room * MB, {}), mapped=True, most=1)
    assert found == Batch(1, *expected)


def test_without_a_map_nothing_is_read_again() -> None:
    model = need(600 * MB, 1 * MB, MB // 10)
    # 0.9 * 1000 holds the weights and one chunk; half of 640 is left to the weights
    for mapped in (True, False):
        assert choose(512, model, Room(1000 * MB, {}), mapped=mapped, most=99).n_seq == 1
    assert choose(512, model, Room(640 * MB, {}), mapped=True, most=99).n_seq == 6  # 320 // 52.2
    assert choose(512, model, Room(640 * MB, {}), mapped=False, most=99).n_seq == 1


def test_a_device_has_its_own_limit() -> None:
    model = need(9000 * MB, 1 * MB, MB // 10, device=MB // 5, on_device=700 * MB)
    room = Room(2000 * MB, {"GPU0": 800 * MB})
    # 0.9 * 800 // 102.4: the memory that the weights take there is subtracted already
    assert choose(512, model, room, mapped=True, most=99).n_seq == 7


def test_contexts_that_cannot_be_made() -> None:
    assert choose(512, lambda _: None, Room(MB, {}), mapped=True, most=9) == Batch(1, 512, 512)
    model = need(9000 * MB, 1 * MB, MB // 10)
    found = choose(
        512, lambda b: model(b) if b.n_seq <= 5 else None, Room(2000 * MB, {}), mapped=True, most=99
    )
    assert found.n_seq == 5


# --- the memory that a batch takes ---------------------------------------------------------------


def planned(spec: ModelSpec, batch: Batch, **options: Any) -> list[engine.MemoryUse]:
    model = engine.Model(
        str(spec.path), mtp=False, n_gpu_layers=0, use_mmap=False, check_tensors=False,
        no_alloc=True,
    )  # fmt: skip
    session = engine.Session(model)
    given = {"n_ctx": N_CTX, "n_threads": 1, "mtp": False, "process_output": False}
    session.open(
        **{**given, "perplexity": False, **options},
        n_seq=batch.n_seq, n_batch=batch.n_batch, n_ubatch=batch.n_ubatch,
    )  # fmt: skip
    return session.memory


def test_weights_and_keys_and_values(forged: Forged) -> None:
    spec = forged("llama", seed=2)
    (use,) = planned(spec, Batch(3, 3 * N_CTX, 3 * N_CTX))
    assert (use["device"], use["host"], use["plain"]) == ("CPU", True, True)
    tensors = gguf.GGUFReader(spec.path).tensors
    # tensors start at multiples of 32 bytes
    assert 0 <= use["model"] - sum(t.n_bytes for t in tensors) < 32 * len(tensors)
    h = spec.hparams
    # F16 keys and values of each layer; a sequence's cells are allocated in 256s
    # (llama-context.cpp)
    cells = 3 * 256
    assert use["context"] == h.n_layer * 2 * h.n_head_kv * h.head_dim * cells * 2


def test_logits_are_counted(forged: Forged) -> None:
    spec = forged("qwen35", seed=2)  # a context asks for none by itself
    batch = Batch(1, N_CTX, N_CTX)
    (without,), (with_,) = planned(spec, batch), planned(spec, batch, perplexity=True)
    logits = N_CTX * spec.hparams.n_vocab * 4
    # the rows that are kept, in place of the one row that every context has room for
    assert with_["compute"] - without["compute"] >= logits - spec.hparams.n_vocab * 4


# --- the memory that is free ---------------------------------------------------------------------


def kernel_files(folder: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  16000 kB\nMemAvailable:    8000 kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = cgroups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, cgroups


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the Linux kernel's files")
@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, 8000 * 1024),
        ("0::/\n", {}, 8000 * 1024),
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "max\n", "a/b/memory.current": "1\n", "a/b/memory.stat": "anon 1\n",
                "a/memory.max": "5000000\n", "a/memory.current": "3000000\n",
                "a/memory.stat": "anon 5\ninactive_file 400000\nactive_file 100000\n",
            },
            2_500_000,
        ),
        (  # the host's path, as a container sees it
            "4:memory:/docker/1\n3:cpuset:/\n",
            {
                "memory/memory.limit_in_bytes": "4000000\n",
                "memory/memory.usage_in_bytes": "3900000\n",
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 1000000\n",
            },
            1_100_000,
        ),
        (  # a limit above the available memory
            "4:memory:/\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "1\n",
                "memory/memory.stat": "total_cache 1\n",
            },
            8000 * 1024,
        ),
    ],
)  # fmt: skip
def test_available_memory(
    cgroup: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert available_memory(*kernel_files(tmp_path, cgroup, files)) == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the Linux kernel's files")
def test_available_memory_here() -> None:
    assert 0 < available_memory() <= 2**48


# --- whole runs ----------------------------------------------------------------------------------

# enough layers for the weights to outweigh the activations of a chunk
DEEP: dict[str, Any] = {"seed": 2, "n_nextn": 1, "n_layer": 8}


def collector(spec: ModelSpec, **options: Any) -> Collector:
    return Collector(spec.path, **{"n_ctx": N_CTX, "n_threads": 1, **options})


def chunks(spec: ModelSpec, n: int, n_ctx: int = N_CTX) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, spec.hparams.n_vocab, (n, n_ctx)).tolist()


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(_batch, "available_memory", lambda: size)


def assert_close(got: ImportanceMatrix, want: ImportanceMatrix) -> None:
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name].counts, want[name].counts, err_msg=name)
        # float32 over other groups of rows, and the same for the engine's own sums
        scale = want[name].sums.max()
        assert np.abs(got[name].sums - want[name].sums).max() < 1e-5 * scale, name


def test_a_model_that_does_not_fit(forged: Forged, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = forged("qwen35", **DEEP)
    free(monkeypatch, spec.path.stat().st_size)  # room for no more than the weights
    with collector(spec, n_batch="auto") as made:
        assert made.batch == Batch(1, N_CTX, N_CTX)  # nothing was chosen before
        got = made.run(chunks(spec, 8), perplexity=True)
        chosen, perplexity = made.batch, made.perplexity
        assert chosen.n_seq > 1
        assert chosen.n_batch == chosen.n_ubatch == chosen.n_seq * N_CTX
        # the engine takes no more than the half that it may take
        use = planned(spec, chosen, perplexity=True)
        assert sum(u["context"] + u["compute"] for u in use) <= spec.path.stat().st_size / 2
        with_head = made.run(chunks(spec, 2), mtp=True)
        assert made.batch.n_seq == 1
    with collector(spec) as made:
        assert_close(got, made.run(chunks(spec, 8), perplexity=True))
        assert made.perplexity is not None
        assert perplexity is not None
        assert perplexity.value == pytest.approx(made.perplexity.value, rel=1e-5)
        assert_close(with_head, made.run(chunks(spec, 2), mtp=True))


def test_a_model_that_fits(forged: Forged, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = forged("llama", seed=2)
    free(monkeypatch, 2**40)
    with collector(spec, n_batch="auto") as made:
        got = made.run(chunks(spec, 3))
        assert made.batch == Batch(1, N_CTX, N_CTX)
    with collector(spec) as made:
        assert dict(got) == dict(made.run(chunks(spec, 3)))


def test_a_run_that_goes_on_keeps_its_batch(
    forged: Forged, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = forged("qwen35", **DEEP)
    text = chunks(spec, 9)

    class Enough(Exception):
        pass

    def stop(_: object) -> None:
        raise Enough

    free(monkeypatch, spec.path.stat().st_size)
    with collector(spec, n_batch="auto") as made:
        want = made.run(text)
        chosen = made.batch
        with pytest.raises(Enough):
            made.run(text, checkpoint=tmp_path / "c", progress=stop)
    free(monkeypatch, 2**40)
    with collector(spec, n_batch="auto") as made:
        got = made.run(text, checkpoint=tmp_path / "c")
        assert made.batch == chosen
        assert dict(got) == dict(want)  # to the bit
        made.run(text, checkpoint=tmp_path / "c", restart=True)
        assert made.batch.n_seq == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_batch": "most"}, "n_batch must be a number, 'auto' or None, got 'most'"),
        ({"n_batch": "auto", "n_ubatch": 64}, "chooses n_ubatch and n_seq too"),
        ({"n_batch": "auto", "n_seq": 2}, "chooses n_ubatch and n_seq too"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str, forged: Forged) -> None:
    with pytest.raises(ValueError, match=message):
        collector(forged("llama", seed=2), **options)


def test_on_the_command_line(
    forged: Forged,
    prose_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    spec = forged("qwen35", **DEEP)
    free(monkeypatch, spec.path.stat().st_size)
    start = ["collect", "-m", str(spec.path), "-f", str(prose_file), "-c", str(N_CTX), "-t", "1"]
    start += ["--chunks", "6", "--no-ppl"]
    assert cli.main([*start, "-b", "auto", "-o", str(tmp_path / "auto.gguf")]) == 0
    assert "-b auto: " in (told := capsys.readouterr().err)
    assert " chunks side by side, " in told
    assert cli.main([*start, "-b", str(N_CTX), "-o", str(tmp_path / "one.gguf")]) == 0
    assert_close(
        ImportanceMatrix.load(tmp_path / "auto.gguf"), ImportanceMatrix.load(tmp_path / "one.gguf")
    )
    capsys.readouterr()
    assert cli.main([*start, "-b", "auto", "-ub", "64", "-o", str(tmp_path / "x.gguf")]) == 2
    assert "leave -ub out" in capsys.readouterr().err
