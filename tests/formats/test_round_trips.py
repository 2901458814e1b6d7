"""Files that one of the engine's programs reads and writes again."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.running import EngineTool, Forged, run_tool

from imatrix import Collector, Entry, ImportanceMatrix

pytestmark = [
    pytest.mark.engine(
        "tools/imatrix/imatrix.cpp", "llama-imatrix reads and writes the same GGUF files"
    ),
]

N_CTX = 64
PARTS = ("in_sum2", "counts", "in_sum", "stats")


@pytest.fixture(scope="module")
def model(forged: Forged) -> Path:
    return forged("deepseek2", seed=2, n_nextn=1).path  # experts, 3-D weights and a head


@pytest.fixture(scope="module")
def halves(model: Path, prose_file: Path) -> tuple[ImportanceMatrix, ImportanceMatrix]:
    """Two matrices of one model, from different parts of a text."""
    with Collector(model, n_ctx=N_CTX, n_threads=1) as collector:
        first = collector.run(prose_file, mtp=True, max_chunks=3)
        second = collector.run(prose_file, mtp=True, skip_chunks=3, max_chunks=4)
    return first, second


@pytest.fixture
def through(engine_tool: EngineTool, model: Path, tmp_path: Path):
    """llama-imatrix combines the files that go in; returns the file that comes out."""
    tool = engine_tool("llama-imatrix")

    def combine(*files: Path) -> Path:
        out = tmp_path / "theirs.gguf"
        # it computes the number of chunks from the counts and -c; it stores no size of its own
        inputs = [part for file in files for part in ("--in-file", file)]
        run_tool(tool, "-m", model, *inputs, "-o", out, "-c", str(N_CTX), "-b", str(N_CTX))
        return out

    return combine


def stored(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, by gguf-py's reader."""
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def test_theirs_reads_ours_and_gives_it_back(halves, through, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    halves[0].save(ours)
    theirs = through(ours)
    mine, back = stored(ours), stored(theirs)
    assert set(mine) == set(back)
    for name in mine:
        if name.endswith(".stats"):
            # Both compute them from the same float32 sums, in float64, and round to float32 (6e-8);
            # skewness and kurtosis are differences of larger numbers, 1e-9 of them.
            np.testing.assert_allclose(
                mine[name], back[name], rtol=1e-7, atol=1e-9, equal_nan=True, err_msg=name
            )
            continue
        # float32 is read, added to zero and written: no bit may change
        np.testing.assert_array_equal(mine[name].ravel(), back[name].ravel(), err_msg=name)
    weights = set(halves[0])
    assert {f"{name}.{part}" for name in weights for part in PARTS} == set(mine)
    for key in (
        *("general.type", "imatrix.chunk_count", "imatrix.chunk_size", "imatrix.datasets"),
        *("imatrix.stats_schema", "imatrix.n_layer_nextn"),
    ):
        a, b = (gguf.GGUFReader(path).fields[key].contents() for path in (ours, theirs))
        assert a == b, key


def test_ours_reads_what_theirs_gave_back(halves, through, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    halves[0].save(ours)
    back = ImportanceMatrix.load(through(ours))
    assert set(back) == set(halves[0])
    assert (back.chunk_count, back.chunk_size) == (3, N_CTX)
    assert back.head_blocks == halves[0].head_blocks == {2}
    for name, entry in halves[0].items():
        np.testing.assert_array_equal(back[name].counts, entry.counts)
        # files hold float32
        np.testing.assert_array_equal(
            back[name].sums.ravel(), entry.sums.astype(np.float32).ravel(), err_msg=name
        )
        assert entry.signed_sums is not None
        np.testing.assert_array_equal(
            back[name].signed_sums.ravel(), entry.signed_sums.astype(np.float32).ravel()
        )


def test_their_own_file_is_read(
    engine_tool: EngineTool, model: Path, prose_file: Path, tmp_path: Path
) -> None:
    """The entries, as gguf-py sees them in the file."""
    out = tmp_path / "theirs.gguf"
    run_tool(
        engine_tool("llama-imatrix"),
        *("-m", model, "-f", prose_file, "-o", out, "--no-ppl", "-c", str(N_CTX)),
        *("--chunks", "2", "-b", str(N_CTX), "-t", "1"),
    )
    matrix = ImportanceMatrix.load(out)
    raw = stored(out)
    assert {f"{name}.{part}" for name in matrix for part in PARTS} == set(raw)
    for name, entry in matrix.items():
        np.testing.assert_array_equal(entry.sums.ravel(), raw[f"{name}.in_sum2"].ravel())
        np.testing.assert_array_equal(entry.counts.ravel(), raw[f"{name}.counts"].ravel())
        np.testing.assert_array_equal(entry.signed_sums.ravel(), raw[f"{name}.in_sum"].ravel())
    assert (matrix.chunk_count, matrix.chunk_size) == (2, N_CTX)
    assert matrix.datasets == (str(prose_file),)


def test_merging_is_what_theirs_does(halves, through, tmp_path: Path) -> None:
    paths = [tmp_path / "first.gguf", tmp_path / "second.gguf"]
    for half, path in zip(halves, paths, strict=True):
        half.save(path)
    theirs = ImportanceMatrix.load(through(*paths))
    merged = halves[0].merge(halves[1])
    assert set(merged) == set(theirs)
    assert merged.chunk_count == theirs.chunk_count == 7
    for name, entry in merged.items():
        np.testing.assert_array_equal(entry.counts, theirs[name].counts)
        # llama-imatrix adds two float32 numbers, this package two float64 ones: there each of the
        # two and their sum are rounded to float32, 6e-8 each
        np.testing.assert_allclose(
            theirs[name].sums.ravel(), entry.sums.ravel(), rtol=2e-7, err_msg=name
        )
        parts = [half[name].signed_sums for half in halves]
        away = np.abs(theirs[name].signed_sums.ravel() - entry.signed_sums.ravel())
        assert (away <= 2e-7 * np.abs(parts).sum(axis=0).ravel()).all(), name


def test_signed_sums_that_one_of_two_lacks(halves, through, tmp_path: Path) -> None:
    """llama-imatrix drops them weight by weight, and so does this package; a weight that only one
    file has keeps its own."""
    lacking = ImportanceMatrix(
        {
            name: Entry(entry.sums, entry.counts, signed_sums=entry.signed_sums if keep else None)
            for number, (name, entry) in enumerate(halves[1].items())
            if (keep := number % 3) != 1
        },
        chunk_count=4,
        chunk_size=N_CTX,
    )
    paths = [tmp_path / "first.gguf", tmp_path / "second.gguf"]
    for matrix, path in zip((halves[0], lacking), paths, strict=True):
        matrix.save(path)
    merged = halves[0].merge(lacking)
    for order in (paths, paths[::-1]):
        theirs = ImportanceMatrix.load(through(*order))
        assert merged.without_signed_sums == theirs.without_signed_sums
    kept = [name for name in merged if merged[name].signed_sums is not None]
    assert set(merged.without_signed_sums) == set(lacking.without_signed_sums)
    assert len(kept) + len(merged.without_signed_sums) == len(halves[0])
    alone = next(name for name in halves[0] if name not in lacking)
    np.testing.assert_array_equal(merged[alone].signed_sums, halves[0][alone].signed_sums)


def test_merging_is_what_one_run_gives(halves, model: Path, prose_file: Path) -> None:
    with Collector(model, n_ctx=N_CTX, n_threads=1) as collector:
        whole = collector.run(prose_file, mtp=True, max_chunks=7)
    merged = halves[0] + halves[1]
    assert set(merged) == set(whole)
    for name, entry in whole.items():
        np.testing.assert_array_equal(merged[name].counts, entry.counts)
        # float64 sums of the same seven float32 chunks, added in another order
        np.testing.assert_allclose(merged[name].sums, entry.sums, rtol=1e-14, err_msg=name)
        # the values have both signs: relative to the root of rows times squares, which no sum
        # exceeds
        most = np.sqrt(entry.sums * entry.counts[:, np.newaxis])
        assert (np.abs(merged[name].signed_sums - entry.signed_sums) <= 1e-14 * most).all(), name
