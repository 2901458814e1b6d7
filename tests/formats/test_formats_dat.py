"""The old format: this package's bytes compared with llama-imatrix's, files built by hand, and both
quantized."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.running import EngineTool, Forged, run_tool
from hypothesis import given
from hypothesis import strategies as st

import imatrix
from imatrix import Collector, Entry, ImportanceMatrix
from imatrix.formats import FormatError, dat, detected

pytestmark = [
    pytest.mark.engine(
        "tools/imatrix/imatrix.cpp", "llama-imatrix reads and writes the same .dat files"
    ),
]

N_CTX = 64


def packed(*parts: object) -> bytes:
    """int32 for int, a length and its bytes for bytes, float32 for a list."""
    out = b""
    for part in parts:
        if isinstance(part, int):
            out += struct.pack("<i", part)
        elif isinstance(part, bytes):
            out += struct.pack("<i", len(part)) + part
        else:
            out += struct.pack(f"<i{len(part)}f", len(part), *part)
    return out


# one weight with 3 calls, and experts of which the second saw nothing
TWO = packed(
    *(2, b"blk.0.attn_q.weight", 3, [1.5, 6.0], b"blk.0.ffn_up_exps.weight", 2, [4.0, 2.0]),
    *(3, b"wiki.txt"),
)


class TestReading:
    def test_every_field(self, tmp_path: Path) -> None:
        path = tmp_path / "two.dat"
        path.write_bytes(TWO)
        assert detected(path) == "dat"
        matrix = ImportanceMatrix.load(path, chunk_size=8)
        assert (matrix.datasets, matrix.chunk_count, matrix.chunk_size) == (("wiki.txt",), 3, 8)
        assert matrix["blk.0.attn_q.weight"] == Entry([[12.0, 48.0]], [24])
        assert matrix.importance("blk.0.attn_q.weight").tolist() == [[0.5, 2.0]]
        assert matrix["blk.0.ffn_up_exps.weight"] == Entry([[32.0, 16.0]], [16])

    @pytest.mark.parametrize(
        ("end", "chunks", "datasets"),
        [
            (b"", 0, ()),  # a file from before the text's name existed
            (packed(3), 3, ()),
            (packed(3, 0), 3, ()),
            (packed(3) + b"\x00\x00", 3, ()),
            (packed(3, b"wiki.txt"), 3, ("wiki.txt",)),
            (packed(3, b"wiki.txt\0rubbish"), 3, ("wiki.txt",)),
            (packed(3, b"gr\xf6\xdfe.txt"), 3, ("gr\udcf6\udcdfe.txt",)),
        ],
    )
    def test_old_ends(
        self, end: bytes, chunks: int, datasets: tuple[str, ...], tmp_path: Path
    ) -> None:
        path = tmp_path / "old"  # the name makes no difference
        path.write_bytes(packed(1, b"blk.0.attn_q.weight", 3, [1.5, 6.0]) + end)
        matrix = ImportanceMatrix.load(path)
        assert (matrix.chunk_count, matrix.datasets) == (chunks, datasets)
        assert matrix.importance("blk.0.attn_q.weight").tolist() == [[0.5, 2.0]]

    def test_without_calls_the_values_are_the_means(self, tmp_path: Path) -> None:
        path = tmp_path / "m.dat"
        path.write_bytes(packed(1, b"blk.0.attn_q.weight", 0, [1.5, 6.0]))
        assert ImportanceMatrix.load(path).importance("blk.0.attn_q.weight").tolist() == [
            [1.5, 6.0]
        ]

    @given(cut=st.integers(9, len(TWO) - 1))
    def test_cut_short(self, cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("cut") / "m.dat"
        path.write_bytes(TWO[:cut])
        end = len(TWO) - len(packed(3, b"wiki.txt"))
        if cut < end:
            with pytest.raises(FormatError, match=r"cut short|not a GGUF file"):
                ImportanceMatrix.load(path)
        else:
            assert len(ImportanceMatrix.load(path)) == 2

    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (packed(1, b"blk.0.w", 3, [float("nan")]), "'blk.0.w': sums must be finite"),
            (packed(1, b"blk.0.w", 3, [-1.0]), "'blk.0.w': sums of squares cannot be negative"),
            (packed(1, b"blk.0.w", 3, []), "'blk.0.w' has 0 values, expected 1 or more"),
            (packed(1, b"blk.0.w", 3, 2**30), "cut short: the values of 'blk.0.w' would end at"),
            (packed(1, b"\0\0\0", 3, [1.0]), "a weight's name must be a non-empty str"),
            # neither format: the reader of the usual format says so
            (b"some text, as it happens", "not a GGUF file: it starts with b'some'"),
            (packed(0, 0, 0), "not a GGUF file"),
        ],
    )
    def test_damage_is_reported(self, data: bytes, told: str, tmp_path: Path) -> None:
        path = tmp_path / "m.dat"
        path.write_bytes(data)
        with pytest.raises(FormatError) as caught:
            ImportanceMatrix.load(path)
        assert told in str(caught.value)


class TestWriting:
    def test_every_field(self, tmp_path: Path) -> None:
        matrix = ImportanceMatrix(
            {
                "blk.0.ffn_up_exps.weight": Entry([[16.0], [7.0]], [9, 0]),
                "blk.0.attn_q.weight": Entry([[12.0, 48.0]], [24]),
                "blk.0.nothing.weight": Entry([[0.0]], [0]),
            },
            datasets=["old.txt", "wiki.txt"],
            chunk_count=3,
            chunk_size=8,
        )
        path = tmp_path / "m.dat"
        matrix.save(path, format="dat")
        mean = np.float32(16.0) / np.float32(9.0)
        assert path.read_bytes() == packed(
            *(2, b"blk.0.attn_q.weight", 3, [1.5, 6.0]),
            *(b"blk.0.ffn_up_exps.weight", 2, [float(mean * np.float32(2)), 2.0]),
            *(3, b"wiki.txt"),
        )

    @pytest.mark.parametrize(
        ("entry", "told"),
        [
            (Entry([[1.0]], [0]), "no entry of the matrix has data"),
            (Entry([[1e300]], [5]), "'w': the mean of the squared activations, 2e+299, times 1"),
        ],
    )
    def test_refuses(self, entry: Entry, told: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no entry|beyond float32") as caught:
            ImportanceMatrix({"w": entry}).save(tmp_path / "m.dat", format="dat")
        assert told in str(caught.value)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError, match="format must be 'gguf' or 'dat', got 'npz'"):
            ImportanceMatrix({"w": entry}).save(tmp_path / "m", format="npz")  # type: ignore[arg-type]

    def test_a_sum_beyond_float32_with_a_mean_inside(self, tmp_path: Path) -> None:
        path = tmp_path / "m.dat"
        ImportanceMatrix({"w": Entry([[2.0**130]], [2**40])}, chunk_size=2**40).save(
            path, format="dat"
        )
        assert path.read_bytes()[:17] == packed(1, b"w", 1, 1)[:17]
        assert struct.unpack_from("<f", path.read_bytes(), 17) == (2.0**90,)


@pytest.fixture(scope="module")
def model(forged: Forged) -> Path:
    # experts, dense 3-D weights and a head; rows that low-bit types can store
    return forged("deepseek2", seed=2, n_nextn=1, n_embd=256, n_ff=256, n_ff_exp=256).path


@pytest.fixture(scope="module")
def collected(model: Path, prose_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with float32 sums, which all programs read alike."""
    path = tmp_path_factory.mktemp("dat") / "ours.gguf"
    with Collector(model, n_ctx=N_CTX, n_threads=1) as collector:
        # 3 chunks: a power of two would hide the order of division and multiplication
        collector.run(prose_file, mtp=True, max_chunks=3).save(path)
    return path


@pytest.fixture(scope="module")
def thin(collected: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same matrix, but one expert of every weight saw nothing."""
    path = tmp_path_factory.mktemp("dat") / "thin.gguf"
    matrix = ImportanceMatrix.load(collected)
    entries = dict(matrix)
    for name, entry in matrix.items():
        if entry.n_counts > 1:
            seen = np.arange(entry.n_counts) != 1
            entries[name] = Entry(entry.sums * seen[:, np.newaxis], entry.counts * seen)
    ImportanceMatrix(entries, datasets=["a.txt", "b.txt"], chunk_count=3, chunk_size=N_CTX).save(
        path
    )
    return path


@pytest.mark.parametrize("which", ["collected", "thin"])
def test_the_bytes_are_llama_imatrixs(
    which: str, request: pytest.FixtureRequest, engine_tool: EngineTool, tmp_path: Path
) -> None:
    source = request.getfixturevalue(which)
    ours, theirs = tmp_path / "ours.dat", tmp_path / "theirs.dat"
    imatrix.convert(source, ours)
    run_tool(
        engine_tool("llama-imatrix"),
        *("-m", "none", "--in-file", source, "-o", theirs),
        *("--output-format", "dat", "-c", str(N_CTX)),
    )
    assert ours.read_bytes() == theirs.read_bytes()
    # and back: the sums are n_call * mean of the old format, times -c
    for name, source in (("ours.gguf", ours), ("theirs.gguf", theirs)):
        out = tmp_path / name
        if name == "ours.gguf":
            imatrix.convert(source, out, chunk_size=N_CTX)
        else:
            run_tool(
                engine_tool("llama-imatrix"),
                *("-m", "none", "--in-file", source, "-o", out, "-c", str(N_CTX)),
            )
    a, b = (
        {
            t.name: t.data.tobytes()
            for t in gguf.GGUFReader(tmp_path / name).tensors
            if not t.name.endswith(".stats")  # figures, which ours do not hold
        }
        for name in ("ours.gguf", "theirs.gguf")
    )
    assert a == b
    again = tmp_path / "again.dat"
    imatrix.convert(tmp_path / "theirs.gguf", again)
    assert ImportanceMatrix.load(again).datasets == ImportanceMatrix.load(ours).datasets


def test_what_they_collect_in_that_format(
    model: Path, prose_file: Path, engine_tool: EngineTool, tmp_path: Path
) -> None:
    tool = engine_tool("llama-imatrix")
    common = ["-m", model, "-f", prose_file, "-c", str(N_CTX), "-b", str(N_CTX), "-t", "1"]
    common += ["--chunks", "3", "--no-ppl"]
    theirs, as_gguf, ours = (tmp_path / name for name in ("t.dat", "t.gguf", "o.dat"))
    run_tool(tool, *common, "-o", theirs, "--output-format", "dat")
    run_tool(tool, *common, "-o", as_gguf)
    imatrix.convert(as_gguf, ours)
    assert ours.read_bytes() == theirs.read_bytes()


def test_merging_with_a_gguf_file_of_experts(
    collected: Path, thin: Path, engine_tool: EngineTool, tmp_path: Path
) -> None:
    old = tmp_path / "old.dat"
    imatrix.convert(thin, old)
    theirs = tmp_path / "theirs.gguf"
    run_tool(
        engine_tool("llama-imatrix"),
        *("-m", "none", "--in-file", collected, "--in-file", old, "-o", theirs, "-c", str(N_CTX)),
    )
    ours = imatrix.merge(old, collected, chunk_size=N_CTX)
    expected = ImportanceMatrix.load(theirs)
    assert set(ours) == set(expected)
    for name, entry in expected.items():
        assert np.array_equal(ours[name].counts, entry.counts), name
        # llama-imatrix adds in float32: one rounding
        assert np.allclose(ours[name].sums.ravel(), entry.sums.ravel(), rtol=2**-23, atol=0), name


@pytest.mark.parametrize("which", ["collected", "thin"])
def test_both_formats_quantize_alike(
    which: str,
    request: pytest.FixtureRequest,
    model: Path,
    engine_tool: EngineTool,
    tmp_path: Path,
) -> None:
    # 4 calls: dividing by 4 is exact, so that both files give the quantizer the same means
    matrix = ImportanceMatrix.load(request.getfixturevalue(which))
    four = ImportanceMatrix(
        {
            name: Entry(e.sums, e.counts * 0 + 4 * N_CTX * (e.counts > 0))
            for name, e in matrix.items()
        },
        chunk_count=4,
        chunk_size=N_CTX,
    )
    results = []
    for form in ("gguf", "dat"):
        four.save(tmp_path / f"m.{form}", format=form)
        out = tmp_path / f"{form}.gguf"
        run_tool(
            engine_tool("llama-quantize"),
            *("--imatrix", tmp_path / f"m.{form}", model, out, "IQ2_XXS", "2"),
        )
        results.append({t.name: t.data.tobytes() for t in gguf.GGUFReader(out).tensors})
    assert results[0] == results[1]


def test_looks_like_needs_a_whole_start(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for n in range(0, 12):
        path.write_bytes(TWO[:n])
        assert not dat.looks_like(path)
