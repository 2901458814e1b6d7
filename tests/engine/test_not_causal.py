"""Models whose tokens also see later tokens: a chunk is one decode and one graph, whatever the
batch, and requests that need a next token are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forge_any import AnyModel, make_any
from helpers.parity import PARITY, differences
from helpers.running import EngineTool, Run, run_tool
from helpers.uses import MB, need

import imatrix
from imatrix import Cluster, Collector, ImportanceMatrix, ModelError, evaluate
from imatrix.engine.batch import Room, choose
from imatrix.engine.settings import Batch

N_CTX = 64
# These have no causal mask, by their architecture (src/models/dream.cpp and so on) or by the
# metadata. The last three have a memory: one of keys and values, one with windows beside it, and
# one of states. The others have none, so that every decode is an encode.
OPTIONS: dict[str, dict[str, Any]] = {
    "dream": {},
    "llada": {},
    "llada-moe": {},
    "rnd1": {},
    "modern-bert": {},  # no logits, and windows
    "gemma-embedding": {"n_layer": 6},  # the sixth block is the first without a window
    "llama": {"metadata": {"attention.causal": False}},
    "gemma3": {},
    "lfm2": {},
}
Forge = Callable[[str], AnyModel]


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Forge:
    folder = tmp_path_factory.mktemp("not-causal")
    made: dict[str, AnyModel] = {}

    def model(arch: str) -> AnyModel:
        if arch not in made:
            made[arch] = make_any(folder / f"{arch}.gguf", arch, **OPTIONS[arch])
        return made[arch]

    return model


def collect(model: AnyModel, texts: Any, *, packing: Any = "stream", **options: Any) -> Any:
    given = {"n_ctx": N_CTX, "n_threads": 1, **options}
    with Collector(model.path, **given) as collector:
        return collector.run(texts, max_chunks=4, packing=packing)


def theirs(tool: Path, model: AnyModel, text: Path, out: Path, n_ctx: int = N_CTX) -> Any:
    batch = ("-c", str(n_ctx), "-b", str(n_ctx), "-ub", str(n_ctx), "--chunks", "4")
    run_tool(tool, "-m", model.path, "-f", text, "-o", out, "-t", "1", "--no-ppl", *batch)
    return ImportanceMatrix.load(out)


def assert_same(got: Any, want: Any, tolerance: float = PARITY) -> None:
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name].counts, want[name].counts, err_msg=name)
    assert {n: d for n, d in differences(got, want).items() if not d <= tolerance} == {}


# --- the sums ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", OPTIONS)
def test_sums_are_llama_imatrixs_whatever_the_batch(
    arch: str, forge: Forge, engine_tool: EngineTool, prose_file: Path, tmp_path: Path
) -> None:
    model = forge(arch)
    want = theirs(engine_tool("llama-imatrix"), model, prose_file, tmp_path / "theirs.gguf")
    assert len(want) > 0
    # chosen; one chunk by hand; more than needed; several chunks at once, chosen and by hand
    for options in (
        {},
        {"n_batch": 64, "n_ubatch": 64},
        {"n_batch": 100, "n_ubatch": 2000},
        {"n_seq": 3},
        {"n_seq": 4, "n_batch": 128, "n_ubatch": 128},
    ):
        assert_same(collect(model, prose_file, **options), want)


def test_defaults_of_the_command(
    forge: Forge, engine_tool: EngineTool, prose_file: Path, tmp_path: Path, run: Run
) -> None:
    model = forge("dream")
    want = theirs(engine_tool("llama-imatrix"), model, prose_file, tmp_path / "theirs.gguf", 512)
    out = tmp_path / "ours.gguf"
    common = ("collect", "-m", model.path, "-f", prose_file, "-o", out, "--chunks", 4, "-t", 1)
    for flags in ((), ("--no-isolate",), ("-b", "512", "-ub", "512"), ("-b", 1024, "-ub", 1100)):
        done = run(*common, "-c", 512, *flags)
        assert done.status == 0, done.err
        assert_same(ImportanceMatrix.load(out), want)
        assert "no perplexity: the tokens of dream see those after them" in done.err


def test_a_chunk_longer_than_the_usual_batch(
    forge: Forge, prose_file: Path, tmp_path: Path, run: Run
) -> None:
    """-b is 2048 if it is not given; the user did not ask for it, so it gives way."""
    model, out = forge("dream"), tmp_path / "ours.gguf"
    common = ("collect", "-m", model.path, "-f", prose_file, "-o", out, "--chunks", 1)
    done = run(*common, "-c", 2304)
    assert done.status == 0, done.err
    by_hand = collect(model, prose_file, n_ctx=2304, n_batch=2304, n_ubatch=2304)
    assert ImportanceMatrix.load(out)["blk.1.ffn_down.weight"].counts[0] == 2304
    assert by_hand["blk.1.ffn_down.weight"].counts[0] % 2304 == 0
    done = run(*common, "-c", 2304, "-b", 2048)
    assert done.status == 2
    assert "give n_batch=2304 (-b 2304)" in done.err


@pytest.mark.parametrize("arch", ["dream", "llama", "gemma3", "lfm2"])
def test_chunks_of_many_lengths_side_by_side(arch: str, forge: Forge) -> None:
    """A model with a memory would divide them at the end of the shortest."""
    model = forge(arch)
    rng = np.random.default_rng(3)
    documents = [list(map(int, rng.integers(10, 200, n))) for n in (64, 23, 41, 64)]
    one = collect(model, documents, packing="document")
    three = collect(model, documents, packing="document", n_seq=3)
    assert_same(three, one)
    assert one["blk.0.ffn_down.weight"].counts[0] == 64 + 23 + 41 + 64


def test_batches_are_reported(forge: Forge) -> None:
    for options, expected in (
        ({}, Batch(1, 64, 64)),
        ({"n_seq": 3}, Batch(3, 192, 192)),
        ({"n_seq": 99}, Batch(8, 512, 512)),  # the usual graph
        ({"n_seq": 4, "n_batch": 130}, Batch(2, 128, 128)),
        ({"n_seq": 4, "n_ubatch": 200}, Batch(3, 192, 192)),
        ({"n_ctx": 600}, Batch(1, 600, 600)),
        ({"n_batch": "auto"}, Batch(1, 64, 64)),
        ({"rehearse": False}, Batch(1, 64, 64)),
        ({"isolate": True, "rehearse": False}, Batch(1, 64, 64)),
    ):
        with Collector(forge("dream").path, **{"n_ctx": N_CTX, **options}) as collector:
            collector.run([range(10, 70)], packing="document")
            assert collector.batch == expected
            assert collector.causal is False


def test_causality_is_the_engines(forge: Forge, tmp_path: Path) -> None:
    for arch in OPTIONS:
        with Collector(forge(arch).path, n_ctx=N_CTX) as collector:
            assert collector.causal is False, arch
    # dream.cpp says no after the metadata said yes; a model without a memory is encoded without a
    # causal mask, whatever the metadata say (llama-context.cpp, encode)
    for arch, causal, expected in (
        ("dream", True, False),
        ("modern-bert", True, False),
        ("llama", True, True),
        ("llama", None, True),
    ):
        path = tmp_path / f"{arch}-{causal}.gguf"
        model = make_any(path, arch, metadata={"attention.causal": causal})
        with Collector(model.path, n_ctx=N_CTX) as collector:
            assert collector.causal is expected, (arch, causal)


def test_no_part_of_a_chunk_is_planned() -> None:
    model = need(9000 * MB, 8 * MB, MB // 10)
    # if a chunk could be divided, these would be 1366 and 512 tokens, see test_batch.py
    for room in (340, 100):
        found = choose(4096, model, Room(room * MB, {}), mapped=True, most=9, causal=False)
        assert found == Batch(1, 4096, 4096)
    model = need(9000 * MB, 1 * MB, MB // 10)
    found = choose(512, model, Room(2000 * MB, {}), mapped=True, most=99, causal=False)
    assert found == Batch(19, 19 * 512, 19 * 512)  # 1000 // 52.2


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_workers_of_a_cluster_choose_alike(forge: Forge, prose_file: Path) -> None:
    model = forge("llama")
    with Cluster("local:1", block=2) as cluster, Collector(model.path, n_ctx=N_CTX) as collector:
        matrix = collector.run(prose_file, max_chunks=4, cluster=cluster)
    assert_same(matrix, collect(model, prose_file))


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolate", [False, True])
def test_a_smaller_batch_by_hand(forge: Forge, prose_file: Path, isolate: bool) -> None:
    path = forge("dream").path
    for name, flag in (("n_batch", "-b"), ("n_ubatch", "-ub")):
        told = rf"{name}=63 \({flag}\).*dream.gguf \(dream\).*give {name}=64 \({flag} 64\)"
        with (
            Collector(path, n_ctx=N_CTX, isolate=isolate, **{name: 63}) as collector,  # type: ignore[arg-type]
            pytest.raises(ValueError, match=told),
        ):
            collector.run(prose_file)
        with (
            Collector(path, n_ctx=N_CTX, **{name: 63}) as collector,  # type: ignore[arg-type]
            pytest.raises(ValueError, match=told),
        ):
            collector.plan()
        with pytest.raises(ValueError, match=told):
            evaluate(path, prose_file, n_ctx=N_CTX, **{name: 63})  # type: ignore[arg-type]


def test_a_smaller_batch_on_the_command_line(
    forge: Forge, prose_file: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "none.gguf"
    for flag in ("-b", "-ub"):
        path = forge("dream").path
        common = ("-f", prose_file, flag, 256, "-c", 512)
        for done in (
            run("collect", "-m", path, *common, "-o", out),
            run("evaluate", path, *common),
        ):
            assert done.status == 2
            assert f"({flag} 512)" in done.err
    assert not out.exists()


def test_nothing_comes_next(forge: Forge, prose_file: Path, tmp_path: Path, run: Run) -> None:
    path = forge("dream").path
    with Collector(path, n_ctx=N_CTX) as collector:
        with pytest.raises(ValueError, match=r"perplexity=True.*no next token to predict"):
            collector.run(prose_file, perplexity=True)
        collector.run(prose_file, perplexity=None, max_chunks=1)
        assert collector.perplexity is None
    out = tmp_path / "out.gguf"
    done = run("collect", "-m", path, "-f", prose_file, "-o", out, "--ppl")
    assert done.status == 2
    assert "--no-ppl" in done.err
    headed = make_any(
        tmp_path / "headed.gguf", "glm4moe", metadata={"attention.causal": False}
    ).path
    with Collector(headed, n_ctx=N_CTX) as collector:
        with pytest.raises(ValueError, match=r"mtp=True.*leave the head out"):
            collector.run(prose_file, mtp=True)
        assert len(collector.run(prose_file, max_chunks=1)) > 0
    with pytest.raises(ValueError, match=r"a head to score.*--no-mtp"):
        evaluate(headed, prose_file, n_ctx=N_CTX)
    assert evaluate(headed, prose_file, n_ctx=N_CTX, mtp=False, max_chunks=1).head is None


def test_what_decodes_no_text_by_itself(tmp_path: Path, prose_file: Path) -> None:
    path = make_any(tmp_path / "t5.gguf", "t5").path
    with pytest.raises(ModelError, match=r"t5.gguf: t5 has an encoder"):
        Collector(path)
    with pytest.raises(ModelError, match=r"t5.gguf: t5 has an encoder"):
        evaluate(path, prose_file)


def test_no_more_tokens_than_positions(tmp_path: Path, prose_file: Path, run: Run) -> None:
    path = make_any(tmp_path / "gpt2.gguf", "gpt2").path
    with Collector(path, n_ctx=96) as collector:
        matrix = collector.run(prose_file, max_chunks=1)
    assert matrix["blk.0.attn_qkv.weight"].counts[0] == 96
    told = r"n_ctx=97 \(-c\), but gpt2.gguf \(gpt2\) has a table of 96 positions.*give n_ctx=96"
    with Collector(path, n_ctx=97) as collector:
        for call in (collector.plan, lambda: collector.run(prose_file)):
            with pytest.raises(ValueError, match=told):
                call()
    with pytest.raises(ValueError, match=told):
        evaluate(path, prose_file, n_ctx=97)
    done = run("collect", "-m", path, "-f", prose_file, "-o", tmp_path / "o.gguf", "-c", 97)
    assert done.status == 2
    assert "-c 96" in done.err


# --- evaluate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["dream", "llama"])
def test_scores_are_llama_perplexitys(
    arch: str, forge: Forge, engine_tool: EngineTool, prose_file: Path
) -> None:
    model = forge(arch)
    # fmt: off
    log = run_tool(
        engine_tool("llama-perplexity"), "-m", model.path, "-f", prose_file, "-t", "1",
        "-c", "64", "-b", "64", "-ub", "64", "--chunks", "3",
    )
    # fmt: on
    printed = float(log.split("Final estimate: PPL = ")[1].split()[0])
    for options in ({}, {"n_batch": 64, "n_ubatch": 999}):
        found = evaluate(
            model.path, prose_file, n_ctx=N_CTX, max_chunks=3, reference=model.path, **options
        )
        # llama-perplexity prints four decimals
        assert abs(found.perplexity.value - printed) < 1e-4 * printed
        assert found.causal is False
        assert found.kl is not None
        assert found.kl.value == 0.0


def test_what_counts_is_reported(forge: Forge, prose_file: Path, run: Run) -> None:
    common = ("evaluate", forge("dream").path, "-f", prose_file, "-c", 64, "--chunks", 1)
    done = run(*common)
    assert done.status == 0
    assert "has seen the tokens that NLL and perplexity are about" in " ".join(done.err.split())
    assert json.loads(run(*common, "--json").out)["causal"] is False


def test_nothing_to_score(forge: Forge, prose_file: Path) -> None:
    with pytest.raises(ModelError, match=r"modern-bert.gguf: .*gives no logits"):
        evaluate(forge("modern-bert").path, prose_file, n_ctx=N_CTX)


# --- the rehearsal -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fatal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gemma-embedding without a block that has no window: the engine still makes a mask for such
    blocks, which no graph allocates, and asserts when it fills it."""
    path = tmp_path_factory.mktemp("fatal") / "fatal.gguf"
    return make_any(path, "gemma-embedding", n_layer=2).path


def test_a_decode_that_ends_the_engine_is_found_before(fatal: Path, run: Run) -> None:
    told = r"fatal.gguf: the engine ends the process on this model when it decodes a chunk: .*GGML_ASSERT\(buffer\)"
    with Collector(fatal, n_ctx=N_CTX) as collector:
        for call in (collector.plan, lambda: collector.run([range(64)])):
            with pytest.raises(ModelError, match=told):
                call()
    with pytest.raises(ModelError, match=told):
        evaluate(fatal, [range(64)], n_ctx=N_CTX)


def test_without_a_rehearsal_that_decode_would_end_the_process(fatal: Path) -> None:
    """Otherwise the test above would show nothing."""
    code = (
        "import sys; from imatrix import Collector\n"
        "Collector(sys.argv[1], n_ctx=64, rehearse=False).run([range(64)])\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, os.fspath(fatal)],
        capture_output=True,
        text=True,
        env={"GGML_NO_BACKTRACE": "1", "PATH": ""},
    )
    assert child.returncode < 0
    assert "GGML_ASSERT(buffer) failed" in child.stderr


def test_the_native_session_refuses_by_itself(forge: Forge) -> None:
    """Whoever opens a session: no smaller batch gets as far as the engine's assertion."""
    model = imatrix.native.engine.Model(
        str(forge("llama").path), mtp=False, n_gpu_layers=0, use_mmap=False, check_tensors=False
    )
    session = imatrix.native.engine.Session(model)
    settings = {
        "n_ctx": 64, "n_seq": 2, "n_threads": 1, "mtp": False, "process_output": False,
        "perplexity": False,
    }  # fmt: skip
    for n_batch, n_ubatch in ((64, 64), (128, 64), (64, 128)):
        with pytest.raises(ValueError, match="must be 128 or more"):
            session.open(**settings, n_batch=n_batch, n_ubatch=n_ubatch)  # type: ignore[arg-type]
    session.open(**settings, n_batch=128, n_ubatch=128)  # type: ignore[arg-type]
