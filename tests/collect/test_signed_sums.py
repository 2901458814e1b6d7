"""Sums of the activations themselves: from a run into a file, and through whatever changes
files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.forge import ModelSpec
from helpers.running import EngineTool, Forged, Run, run_tool

import imatrix
from imatrix import CheckpointError, Collector, Entry, ImportanceMatrix
from imatrix.formats import FormatError, checkpoint

N_CTX = 64


@pytest.fixture(scope="module")
def spec(forged: Forged) -> ModelSpec:
    return forged("glm4moe", seed=2, n_nextn=1)  # experts and a head


@pytest.fixture(scope="module")
def both(spec: ModelSpec, prose_file: Path) -> tuple[ImportanceMatrix, ImportanceMatrix]:
    """With signed sums and without."""
    with Collector(spec.path, n_ctx=N_CTX, n_threads=1) as collector:
        first, second = (
            collector.run(prose_file, mtp=True, max_chunks=3, signed_sums=on)
            for on in (True, False)
        )
    return first, second


@pytest.fixture
def saved(both: tuple[ImportanceMatrix, ImportanceMatrix], tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "with.gguf", tmp_path / "without.gguf"
    for matrix, path in zip(both, paths, strict=True):
        matrix.save(path)
    return paths


def suffixes(path: Path) -> set[str]:
    return {tensor.name.rsplit(".", 1)[1] for tensor in gguf.GGUFReader(path).tensors}


def test_left_out_they_leave_the_rest_as_it_is(
    both: tuple[ImportanceMatrix, ImportanceMatrix], saved: tuple[Path, Path]
) -> None:
    with_them, without = both
    assert set(with_them) == set(without)
    assert with_them.without_signed_sums == ()
    assert without.without_signed_sums == tuple(without)
    for name, entry in with_them.items():
        assert without[name].signed_sums is None
        assert without[name].means is None
        np.testing.assert_array_equal(entry.sums, without[name].sums)
        np.testing.assert_array_equal(entry.counts, without[name].counts)
        # |mean| is at most the root mean square; float32 partial sums, see ext/add_rows.cpp
        assert (np.abs(entry.means) <= np.sqrt(entry.importance) * (1 + 1e-4)).all()
    assert suffixes(saved[0]) == {"in_sum2", "counts", "in_sum", "stats"}
    assert suffixes(saved[1]) == {"in_sum2", "counts"}  # as it was before signed sums existed
    assert "imatrix.stats_schema" not in gguf.GGUFReader(saved[1]).fields
    assert ImportanceMatrix.load(saved[0]).without_signed_sums == ()


def test_in_a_process_of_its_own(
    both: tuple[ImportanceMatrix, ImportanceMatrix], spec: ModelSpec, prose_file: Path
) -> None:
    for matrix, on in zip(both, (True, False), strict=True):
        with Collector(spec.path, n_ctx=N_CTX, n_threads=1, isolate=True) as collector:
            assert collector.run(prose_file, mtp=True, max_chunks=3, signed_sums=on) == matrix


def test_a_quantizer_does_not_see_them(
    spec: ModelSpec, saved: tuple[Path, Path], engine_tool: EngineTool, tmp_path: Path
) -> None:
    out = []
    for path in saved:
        out.append(tmp_path / f"{path.stem}-quantized.gguf")
        # the name of the matrix stands in the model's metadata
        matrix = path.rename(tmp_path / "matrix.gguf")
        run_tool(engine_tool("llama-quantize"), "--imatrix", matrix, spec.path, out[-1], "Q4_K_M")
        matrix.rename(path)
    tensors = [
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
        for path in out
    ]
    assert tensors[0] == tensors[1]


def test_the_commands(spec: ModelSpec, prose_file: Path, run: Run, tmp_path: Path) -> None:
    out, plain = tmp_path / "a.gguf", tmp_path / "b.gguf"
    collect = ("collect", "-m", spec.path, "-f", prose_file, "-c", N_CTX, "--chunks", 2, "--no-ppl")
    assert run(*collect, "-o", out).status == 0
    assert run(*collect, "-o", plain, "--no-signed-sums").status == 0
    a, b = (ImportanceMatrix.load(path) for path in (out, plain))
    assert (a.without_signed_sums, b.without_signed_sums) == ((), tuple(b))
    # show says so
    assert "sums of the activations themselves, of all weights" in run("show", out).out
    assert "sums of the activations" not in run("show", plain).out
    assert {
        row["signed_sums"] for row in json.loads(run("show", out, "--json").out)["weights"]
    } == {True}
    # diff says so too; for a quantizer there is no difference
    done = run("diff", out, plain, "--exit-code")
    assert done.status == 0
    assert "signed sums only in A: all weights in both" in done.out
    data = json.loads(run("diff", out, out, "--json").out)
    assert {(row["mean_distance"], row["signed_sums"]) for row in data["weights"]} == {
        (0.0, "both")
    }
    # merge warns about what is lost, and keeps the rest
    merged = tmp_path / "merged.gguf"
    done = run("merge", out, plain, "-o", merged)
    assert done.status == 0
    assert f"no signed sums any more of {len(a)} weights" in done.err
    assert ImportanceMatrix.load(merged).without_signed_sums == tuple(a)
    done = run("merge", out, out, "-o", merged)
    assert "signed sums" not in done.err
    for name, entry in ImportanceMatrix.load(merged).items():
        np.testing.assert_array_equal(entry.signed_sums, 2 * a[name].signed_sums)
    # and --in-file does what merge does
    done = run(*collect, "--chunk", 2, "--in-file", plain, "-o", merged)
    assert done.status == 0
    assert f"no signed sums any more of {len(a)} weights" in done.err
    assert run(*collect, "--chunk", 2, "--in-file", out, "-o", merged).status == 0
    assert ImportanceMatrix.load(merged).without_signed_sums == ()
    done = run("collect", "--in-file", out, "--in-file", plain, "-o", merged)
    assert f"no signed sums any more of {len(a)} weights" in done.err
    # .dat has no place for them
    done = run("convert", out, tmp_path / "m.dat")
    assert "left out: the signed sums, for which .dat has no place" in done.err
    assert "signed" not in run("convert", plain, tmp_path / "m.dat").err
    assert run("convert", out, tmp_path / "again.gguf").status == 0
    assert ImportanceMatrix.load(tmp_path / "again.gguf") == a


def test_adapt_keeps_them(both: tuple[ImportanceMatrix, ImportanceMatrix], spec: ModelSpec) -> None:
    with_them, _ = both
    adapted = imatrix.adapt(with_them, spec.path).matrix
    assert adapted.without_signed_sums == ()
    assert adapted.head_blocks == with_them.head_blocks
    # separate experts, as in a model of another converter, become one weight
    stacked = "blk.1.ffn_down_exps.weight"
    entry = with_them[stacked]
    apart = {name: each for name, each in with_them.items() if name != stacked}
    for expert in range(entry.n_mat):
        apart[f"blk.1.ffn_down.{expert}.weight"] = Entry(
            entry.sums[expert : expert + 1],
            entry.counts[expert : expert + 1],
            signed_sums=entry.signed_sums[expert : expert + 1],
        )
    found = imatrix.adapt(ImportanceMatrix(apart), spec.path).matrix
    assert found[stacked] == entry
    lacking = {**apart, "blk.1.ffn_down.0.weight": Entry(entry.sums[:1], entry.counts[:1])}
    found = imatrix.adapt(ImportanceMatrix(lacking), spec.path).matrix
    assert found[stacked].signed_sums is None
    assert found.without_signed_sums == (stacked,)


# --- merging ---------------------------------------------------------------------------------------


def test_merging_is_exact() -> None:
    rng = np.random.default_rng(0)
    parts = [
        ImportanceMatrix(
            {
                "w": Entry(
                    rng.random((2, 3)),
                    [3, 4],
                    signed_sums=rng.standard_normal((2, 3)) * 10.0 ** rng.integers(-12, 12, (2, 3)),
                )
            }
        )
        for _ in range(5)
    ]
    import math

    want = np.array(
        [[math.fsum(p["w"].signed_sums[i, j] for p in parts) for j in range(3)] for i in range(2)]
    )
    for order in (parts, parts[::-1]):
        merged = order[0].merge(*order[1:])
        np.testing.assert_array_equal(merged["w"].signed_sums, want)


def test_a_part_without_rows_takes_nothing_away() -> None:
    seen = ImportanceMatrix({"w": Entry([[2.0, 4.0]], [2], signed_sums=[[1.0, -1.0]])})
    unseen = ImportanceMatrix({"w": Entry([[0.0, 0.0]], [0])})
    plain = ImportanceMatrix({"w": Entry([[2.0, 4.0]], [2])})
    for merged in (seen + unseen, unseen + seen):
        assert merged["w"].means.tolist() == [[0.5, -0.5]]
    for merged in (seen + plain, plain + seen, unseen + plain):
        assert merged["w"].signed_sums is None


def test_flattened_entries_go_together() -> None:
    """As llama-imatrix writes a 3-D weight."""
    signed = np.arange(6.0) - 3
    flat = Entry(np.ones((1, 6)), [2], signed_sums=signed[np.newaxis])
    cut = Entry(np.ones((2, 3)), [2], signed_sums=signed.reshape(2, 3))
    merged = ImportanceMatrix({"w": flat}) + ImportanceMatrix({"w": cut})
    assert merged["w"].signed_sums.tolist() == (2 * signed.reshape(2, 3)).tolist()


# --- bad input -------------------------------------------------------------------------------------


def test_entries_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match=r"'w': signed sums \[1, 3\] and sums of squares \[1, 2\]"):
        Entry([[1.0, 2.0]], [1], signed_sums=[[1.0, 2.0, 3.0]], name="w")
    with pytest.raises(ValueError, match="signed sums must be finite, found a NaN"):
        Entry([[1.0]], [1], signed_sums=[[np.nan]])
    with pytest.raises(ValueError, match="signed sums must be real numbers"):
        Entry([[1.0]], [1], signed_sums=[["a"]])
    assert Entry([[1.0]], [0], signed_sums=[[-5.0]]).means.tolist() == [[0.0]]


def write(path: Path, tensors: dict[str, np.ndarray], **keys: int) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    for key, value in keys.items():
        writer.add_uint32(f"imatrix.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_that_make_no_sense(tmp_path: Path) -> None:
    good = {"w.in_sum2": np.ones((2, 2)), "w.counts": np.ones((2, 1))}
    for extra, told in (
        ({"w.in_sum": np.ones(3)}, r"'w\.in_sum' holds 3 values, 'w\.in_sum2' 4"),
        ({"v.in_sum": np.ones(3)}, r"'v' has 'v\.in_sum' but no 'v\.in_sum2'"),
        ({"w.in_sum": np.full(4, np.nan)}, "'w': signed sums must be finite"),
    ):
        path = write(tmp_path / "m.gguf", {**good, **extra})
        with pytest.raises(FormatError, match=told):
            ImportanceMatrix.load(path)
    # in one row, as llama.cpp accepts it, whatever the shape
    path = write(tmp_path / "m.gguf", {**good, "w.in_sum": np.arange(4.0) - 2})
    assert ImportanceMatrix.load(path)["w"].signed_sums.tolist() == [[-2, -1], [0, 1]]


def test_heads_that_only_the_key_tells(tmp_path: Path) -> None:
    """llama-imatrix may have no data for any nextn weight of a head (it counts a matmul of 16 rows
    or more)."""
    tensors = {}
    for block in range(3):
        tensors[f"blk.{block}.attn_q.weight.in_sum2"] = np.ones((1, 2))
        tensors[f"blk.{block}.attn_q.weight.counts"] = np.ones((1, 1))
    path = write(tmp_path / "m.gguf", tensors, n_layer_nextn=1)
    matrix = ImportanceMatrix.load(path)
    assert matrix.head_blocks == {2}
    assert set(matrix.head) == {"blk.2.attn_q.weight"}
    again = tmp_path / "again.gguf"
    for change in (lambda m: m, lambda m: m + m, lambda m: m.head):
        change(matrix).save(again)
        assert ImportanceMatrix.load(again).head_blocks == {2}
        key = gguf.GGUFReader(again).fields["imatrix.n_layer_nextn"]
        assert key.contents() == 1
    # the trunk alone has no head, although its blocks are then the last ones
    matrix.trunk.save(again)
    assert ImportanceMatrix.load(again).head_blocks == frozenset()
    assert "imatrix.n_layer_nextn" not in gguf.GGUFReader(again).fields
    assert ImportanceMatrix.load(write(path, tensors)).head_blocks == frozenset()


# --- checkpoints -----------------------------------------------------------------------------------


class Enough(Exception):
    pass


@pytest.fixture
def interrupted(spec: ModelSpec, prose_file: Path, tmp_path: Path) -> Path:
    """The checkpoint of a run that ended after two chunks."""

    def stop(progress: imatrix.Progress) -> None:
        if progress.chunks == 2:
            raise Enough

    path = tmp_path / "run.checkpoint"
    with Collector(spec.path, n_ctx=N_CTX, n_threads=1) as collector, pytest.raises(Enough):
        collector.run(prose_file, mtp=True, max_chunks=3, checkpoint=path, progress=stop)
    return path


def test_a_run_goes_on(
    both: tuple[ImportanceMatrix, ImportanceMatrix],
    spec: ModelSpec,
    prose_file: Path,
    interrupted: Path,
) -> None:
    options = {"mtp": True, "max_chunks": 3, "checkpoint": interrupted}
    with Collector(spec.path, n_ctx=N_CTX, n_threads=1) as collector:
        with pytest.raises(CheckpointError, match="signed_sums is True there and False here"):
            collector.run(prose_file, signed_sums=False, **options)
        assert collector.run(prose_file, **options) == both[0]


def test_a_checkpoint_of_version_1(
    both: tuple[ImportanceMatrix, ImportanceMatrix],
    spec: ModelSpec,
    prose_file: Path,
    interrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An imatrix that did not know signed sums wrote it."""
    found = checkpoint.read(interrupted)
    settings = {name: value for name, value in found.settings.items() if name != "signed_sums"}
    groups = [(names, sums, counts, None) for names, sums, counts, _ in found.groups]
    with monkeypatch.context() as old:
        old.setattr(checkpoint, "_VERSION", 1)
        checkpoint.write(replace(found, settings=settings, groups=groups), interrupted)
    contents = interrupted.read_bytes()
    options = {"mtp": True, "max_chunks": 3, "checkpoint": interrupted}
    with Collector(spec.path, n_ctx=N_CTX, n_threads=1) as collector:
        with pytest.raises(
            CheckpointError, match=r"holds no signed sums .* Pass signed_sums=False \(--no-signed-"
        ):
            collector.run(prose_file, **options)
        assert interrupted.read_bytes() == contents
        assert collector.run(prose_file, signed_sums=False, **options) == both[1]
