"""docs/formats.md is enough to read and write the formats: readers and writers made from the page
alone, without the package or gguf-py, are compared with those of the package and of the engine."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from helpers.running import EngineTool, Forged, run_tool
from numpy.typing import NDArray

import imatrix
from imatrix import Collector, Entry, ImportanceMatrix, LeftOut, Provenance, TextSource

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text("utf-8")
N_CTX = 64

# --- readers and writers by the page -------------------------------------------------------------

KEYS = {"u32": 4, "bool": 7, "string": 8, "array": 9, "u64": 10, "i64": 11, "f64": 12}
PACKED = {4: "<I", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
TENSORS = {0: np.dtype("<f4"), 27: np.dtype("<i8"), 28: np.dtype("<f8")}

Value = tuple[str, Any]  # the type as text ("u32", "array of string", ...) and the value
Tensors = dict[str, NDArray[Any]]  # in NumPy's order: the row length is last


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, form: str) -> Any:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values[0]

    def raw(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]

    def string(self) -> str:
        return self.raw(self.take("<Q")).decode()


def read_gguf(data: bytes) -> tuple[dict[str, Value], Tensors]:
    names = {number: name for name, number in KEYS.items()}
    file = Bytes(data)
    assert file.raw(4) == b"GGUF"
    assert file.take("<I") == 3
    n_tensors, n_keys = file.take("<Q"), file.take("<Q")

    def value(kind: int) -> Any:
        return file.string() if kind == KEYS["string"] else file.take(PACKED[kind])

    keys: dict[str, Value] = {}
    for _ in range(n_keys):
        name, kind = file.string(), file.take("<I")
        if kind == KEYS["array"]:
            inner, n = file.take("<I"), file.take("<Q")
            keys[name] = f"array of {names[inner]}", [value(inner) for _ in range(n)]
        else:
            keys[name] = names[kind], value(kind)
    found = []
    for _ in range(n_tensors):
        name = file.string()
        shape = [file.take("<Q") for _ in range(file.take("<I"))]
        found.append((name, shape[::-1], file.take("<I"), file.take("<Q")))
    start = -(-file.at // 32) * 32
    tensors = {}
    for name, shape, kind, at in found:
        assert at % 32 == 0
        flat = np.frombuffer(data, TENSORS[kind], math.prod(shape), start + at)
        tensors[name] = flat.reshape(shape)
    return keys, tensors


def write_gguf(keys: Mapping[str, Value], tensors: Tensors) -> bytes:
    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def packed(kind: str, value: Any) -> bytes:
        return string(value) if kind == "string" else struct.pack(PACKED[KEYS[kind]], value)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, (kind, value) in keys.items():
        head += string(name)
        if kind.startswith("array of "):
            inner = kind.removeprefix("array of ")
            head += struct.pack("<IIQ", KEYS["array"], KEYS[inner], len(value))
            head += b"".join(packed(inner, item) for item in value)
        else:
            head += struct.pack("<I", KEYS[kind]) + packed(kind, value)
    data = b""
    numbers = {dtype: number for number, dtype in TENSORS.items()}
    for name, values in tensors.items():
        head += string(name) + struct.pack("<I", values.ndim)
        head += struct.pack(f"<{values.ndim}Q", *values.shape[::-1])
        head += struct.pack("<IQ", numbers[values.dtype], len(data))
        data += values.tobytes() + bytes(-values.nbytes % 32)
    return head + bytes(-len(head) % 32) + data


def importance(sums: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.float64]:
    """n_mat rows of n_in values, as the page defines them."""
    counts = counts.reshape(-1, 1).astype(np.float64)
    sums = sums.reshape(-1, sums.shape[-1]).astype(np.float64)
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)


def read_dat(data: bytes) -> tuple[dict[str, NDArray[np.float32]], int | None, str | None]:
    """Importance by weight, the calls of the run, and the name of the text."""
    file = Bytes(data)
    found = {}
    for _ in range(file.take("<i")):
        name = file.raw(file.take("<i")).decode()
        calls, n = file.take("<i"), file.take("<i")
        values = np.frombuffer(file.raw(4 * n), "<f4")
        found[name] = values / np.float32(calls) if calls else values
    if file.at == len(data):
        return found, None, None
    calls = file.take("<i")
    text = file.raw(file.take("<i")).decode()
    assert file.at == len(data)
    return found, calls, text


def write_dat(
    weights: Mapping[str, tuple[NDArray[Any], int]], end: tuple[int, str] | None
) -> bytes:
    """weights: the importance and the calls of each."""
    data = struct.pack("<i", len(weights))
    for name, (means, calls) in weights.items():
        values = np.ravel(means).astype("<f4") * np.float32(calls or 1)
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, values.size) + values.astype("<f4").tobytes()
    if end is not None:
        data += struct.pack("<ii", end[0], len(end[1])) + end[1].encode()
    return data


# --- the page itself -----------------------------------------------------------------------------


def section(title: str) -> str:
    return re.split(r"^##+ .*$", PAGE.partition(f"\n## {title}\n")[2], flags=re.M)[0]


def example(title: str) -> bytes:
    """The bytes in the table with offsets."""
    data = b""
    for at, cell in re.findall(r"^\| (\d+) \| (.*?) \| .*\|$", section(title), re.M):
        assert int(at) == len(data)
        for text, zeros, raw in re.findall(r'`"(.*?)"`|`00` times (\d+)|`([0-9a-f ]+)`', cell):
            data += bytes(int(zeros)) if zeros else text.encode() or bytes.fromhex(raw)
    return data


def key_types() -> dict[str, str]:
    rows = re.findall(r"^\| `([a-z_.<>*0-9]+)` \| ([a-zA-Z0-9 ,]*) \|", PAGE, re.M)
    return {key: kind for key, kind in rows if kind}


class TestExamples:
    def test_gguf(self, tmp_path: Path) -> None:
        data = example("Importance matrix, GGUF")
        keys, tensors = read_gguf(data)
        assert keys == {
            "general.type": ("string", "imatrix"),
            "imatrix.datasets": ("array of string", ["wiki.txt"]),
            "imatrix.chunk_count": ("u32", 3),
            "imatrix.chunk_size": ("u32", 8),
        }
        assert {name: values.tolist() for name, values in tensors.items()} == {
            "blk.0.ffn_up_exps.weight.in_sum2": [[8.0, 2.0], [0.0, 0.0]],
            "blk.0.ffn_up_exps.weight.counts": [[4.0], [0.0]],
        }
        assert write_gguf(keys, tensors) == data
        matrix = ImportanceMatrix(
            {"blk.0.ffn_up_exps.weight": Entry([[8.0, 2.0], [0.0, 0.0]], [4, 0])},
            datasets=["wiki.txt"],
            chunk_count=3,
            chunk_size=8,
        )
        matrix.save(path := tmp_path / "m.gguf")
        assert path.read_bytes() == data

    def test_dat(self, tmp_path: Path) -> None:
        data = example("Importance matrix, .dat")
        means, calls, text = read_dat(data)
        assert {name: values.tolist() for name, values in means.items()} == {
            "blk.0.attn_q.weight": [0.5, 2.0]
        }
        assert (calls, text) == (3, "wiki.txt")
        matrix = ImportanceMatrix(
            {"blk.0.attn_q.weight": Entry([[12.0, 48.0]], [24])},
            datasets=["wiki.txt"],
            chunk_count=3,
            chunk_size=8,
        )
        matrix.save(path := tmp_path / "m.dat", format="dat")
        assert path.read_bytes() == data


# --- files of the package and of the engine ------------------------------------------------------

FULL = ImportanceMatrix(
    {
        "blk.0.attn_k_b.weight": Entry([[1.0, 2.0, 4.0], [3.0, 0.0, 5.0]], [7]),
        "blk.0.ffn_up_exps.weight": Entry([[8.0, 2.0], [0.0, 0.0], [1.0, 9.0]], [4, 0, 3]),
        # beyond the whole numbers and the range of float32
        "blk.1.attn_q.weight": Entry([[6e12, 3e12]], [3 * 10**9]),
        "blk.1.attn_v.weight": Entry([[3e38 * 1000, 3e38]], [5000]),
    },
    datasets=["wiki.txt", "größe.txt"],
    chunk_count=12,
    chunk_size=512,
    provenance=Provenance(
        collector="imatrix 0.1.0",
        engine="llama.cpp 0.5.0",
        mtp=True,
        n_ctx=512,
        dataset_digest="0f" * 32,
        left_out=(LeftOut(3, 1536, "blk.1.attn_q.weight"),),
        tokens=5632,
        packing="stream",
        seed=-1,
        sources=(
            TextSource("wiki.txt", 3, 5000, 12, 0.75, 2),
            TextSource("b", 1, 632, 0, 0.25, 0, 4),
        ),
    ),
)


def test_a_matrix_of_ours_by_the_page(tmp_path: Path) -> None:
    FULL.save(path := tmp_path / "m.gguf")
    keys, tensors = read_gguf(path.read_bytes())
    types = key_types()
    assert {key: kind for key, (kind, _) in keys.items()} == {key: types[key] for key in keys}
    ours = {key for key in types if key.startswith("imatrix.collector.") and "*" not in key}
    assert ours <= keys.keys()  # the page names no key that does not exist
    told = {key.removeprefix("imatrix.collector."): value for key, (_, value) in keys.items()}
    assert told["sources.weights"] == [0.75, 0.25]
    assert (told["sources.empty"], told["sources.skipped"]) == ([2, 0], [0, 4])
    assert (told["left_out.chunks"], told["left_out.tokens"]) == ([3], [1536])
    assert list(tensors) == [f"{name}.{x}" for name in sorted(FULL) for x in ("in_sum2", "counts")]
    for name, entry in FULL.items():
        sums, counts = (tensors[f"{name}.{x}"] for x in ("in_sum2", "counts"))
        assert sums.shape == (entry.n_mat, entry.n_in)
        assert counts.shape == (entry.n_counts, 1)
        assert sums.dtype == counts.dtype == np.dtype("<f4")
        assert (counts == np.round(counts)).all()
        expected = importance(entry.sums, entry.counts)
        # one rounding to float32
        assert np.allclose(importance(sums, counts), expected, rtol=2**-24, atol=0)


def test_a_matrix_by_the_page_into_ours_and_the_engines(
    engine_tool: EngineTool, tmp_path: Path
) -> None:
    q, up = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"
    tensors = {
        f"{q}.in_sum2": np.array([[12.0, 48.0, 3.0]], "<f4"),
        f"{q}.counts": np.array([[24.0]], "<f4"),
        f"{up}.in_sum2": np.array([[8.0, 2.0], [0.0, 0.0]], "<f4"),
        f"{up}.counts": np.array([[4.0], [0.0]], "<f4"),
    }
    keys: dict[str, Value] = {
        "imatrix.chunk_size": ("u32", 8),
        "imatrix.datasets": ("array of string", []),
        "imatrix.chunk_count": ("u32", 3),
        "general.type": ("string", "imatrix"),
        "other.program": ("f64", 0.5),
    }
    path, again = tmp_path / "m.gguf", tmp_path / "again.gguf"
    path.write_bytes(write_gguf(keys, tensors))
    matrix = ImportanceMatrix.load(path)
    assert dict(matrix) == {
        q: Entry([[12.0, 48.0, 3.0]], [24]),
        up: Entry([[8.0, 2.0], [0.0, 0.0]], [4, 0]),
    }
    assert (matrix.chunk_count, matrix.chunk_size, matrix.datasets) == (3, 8, ())
    run_tool(
        engine_tool("llama-imatrix"), *("-m", "none", "--in-file", path, "-o", again, "-c", "8")
    )
    theirs = read_gguf(again.read_bytes())
    assert theirs[0]["imatrix.chunk_count"] == ("u32", 3)
    for name, values in tensors.items():
        assert np.array_equal(theirs[1][name].ravel(), values.ravel()), name


@pytest.fixture(scope="module")
def model(forged: Forged) -> Path:
    return forged("glm4moe", seed=3, n_nextn=1).path


@pytest.fixture(scope="module")
def collected(model: Path, prose_file: Path) -> ImportanceMatrix:
    with Collector(model, n_ctx=N_CTX, n_threads=1) as collector:
        return collector.run(prose_file, mtp=True, max_chunks=4)


def test_the_old_format_by_the_page(
    collected: ImportanceMatrix, engine_tool: EngineTool, tmp_path: Path
) -> None:
    collected.save(tmp_path / "m.gguf")
    collected.save(tmp_path / "ours.dat", format="dat")
    run_tool(
        engine_tool("llama-imatrix"),
        *("-m", "none", "--in-file", tmp_path / "m.gguf", "-o", tmp_path / "theirs.dat"),
        *("--output-format", "dat", "-c", str(N_CTX)),
    )
    for name in ("ours.dat", "theirs.dat"):
        means, calls, _ = read_dat((tmp_path / name).read_bytes())
        assert calls == 4
        assert means.keys() == collected.keys()
        for weight, values in means.items():
            expected = importance(collected[weight].sums, collected[weight].counts).ravel()
            # float32 sums, a division, a multiplication and a division
            assert np.allclose(values, expected, rtol=4 * 2**-24, atol=0), weight


@pytest.fixture(scope="module")
def means(collected: ImportanceMatrix) -> dict[str, NDArray[np.float32]]:
    return {
        name: importance(entry.sums, entry.counts).astype(np.float32)
        for name, entry in collected.items()
    }


def quantized(model: Path, matrix: Path, tool: Path) -> str:
    """A digest of the tensors that llama-quantize makes."""
    out = matrix.with_suffix(".out")
    run_tool(tool, "--imatrix", matrix, model, out, "IQ2_XXS", "2")
    return hashlib.sha256(out.read_bytes()[imatrix.ModelFile.read(out).parts[0][1] :]).hexdigest()


@pytest.fixture(scope="module")
def expected(
    means: dict[str, NDArray[np.float32]],
    model: Path,
    engine_tool: EngineTool,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    path = tmp_path_factory.mktemp("means") / "means.gguf"
    ImportanceMatrix({name: Entry(m, [1] * len(m)) for name, m in means.items()}).save(path)
    return quantized(model, path, engine_tool("llama-quantize"))


@pytest.mark.parametrize(
    ("calls", "end"),
    [
        # llama-imatrix's format, and earlier ones without the name of the text, and without the
        # calls
        ((4, 4), (4, "wiki.txt")),
        ((4, 4), (4, "")),
        ((4, 4), None),
        # files from before calls existed: the values are the means
        ((0, 0), None),
        # ik_llama.cpp: each weight has its own number of evaluations; one may hold several chunks,
        # or less than one
        ((2, 8), (8, "wiki.txt")),
    ],
)
def test_old_files_are_read_as_the_engine_reads_them(
    calls: tuple[int, int],
    end: tuple[int, str] | None,
    means: dict[str, NDArray[np.float32]],
    expected: str,
    model: Path,
    engine_tool: EngineTool,
    tmp_path: Path,
) -> None:
    # the calls are powers of two: multiplying and dividing by them rounds no mean
    weights = {name: (m, calls[len(m) > 1]) for name, m in means.items()}
    path = tmp_path / "old.dat"
    path.write_bytes(write_dat(weights, end))
    assert quantized(model, path, engine_tool("llama-quantize")) == expected
    matrix = ImportanceMatrix.load(path, chunk_size=N_CTX)
    assert matrix.chunk_count == (end[0] if end else 0)
    assert matrix.datasets == ((end[1],) if end and end[1] else ())
    for name, m in means.items():
        assert np.array_equal(matrix.importance(name), m.reshape(1, -1)), name


def test_a_checkpoint_by_the_page(model: Path, prose_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.checkpoint"
    with Collector(model, n_ctx=N_CTX, n_threads=1) as collector:
        matrix = collector.run(prose_file, mtp=True, max_chunks=4, perplexity=True, checkpoint=path)
    keys, tensors = read_gguf(path.read_bytes())
    types = key_types()
    for key, (kind, _) in keys.items():
        if key.startswith("imatrix.checkpoint.setting."):
            assert kind in types["imatrix.checkpoint.setting.<name>"].replace(" or", ",").split(
                ", "
            )
        else:
            assert kind == types[key], key
    assert keys["general.type"][1] == "imatrix-checkpoint"
    assert keys["imatrix.checkpoint.version"][1] == 2
    assert keys["imatrix.checkpoint.done"][1] == 4
    assert keys["imatrix.checkpoint.tokens"][1] == 4 * N_CTX
    assert keys["imatrix.checkpoint.setting.n_ctx"] == ("i64", N_CTX)
    entries = {
        name.removesuffix(".in_sum2"): (tensors[name], tensors[name[:-8] + ".counts"])
        for name in tensors
        if name.endswith(".in_sum2")
    }
    shared = keys["imatrix.checkpoint.shared.weights"][1]
    entries |= {
        weight: entries[other]
        for weight, other in zip(shared, keys["imatrix.checkpoint.shared.with"][1], strict=True)
    }
    assert "blk.0.attn_k.weight" in shared or "blk.0.attn_q.weight" in shared
    assert entries.keys() == matrix.keys()
    for name, (sums, counts) in entries.items():
        assert (sums.dtype, counts.dtype) == (np.dtype("<f8"), np.dtype("<i8"))
        assert np.array_equal(sums, matrix[name].sums)
        assert np.array_equal(counts.ravel(), matrix[name].counts)


def test_a_recipe_by_the_page(model: Path, tmp_path: Path) -> None:
    """The keys that the page names are those of the file, and one made by the page alone is read."""
    told = [
        re.findall(r"^\| (`.+?`(?:, `.+?`)*) \|", table, re.MULTILINE) for table in tables("Recipe")
    ]
    keys, of_head, of_frontier = [re.findall("`([a-z_]+)`", " ".join(rows)) for rows in told]
    shapes = {t.name: [int(n) for n in t.shape] for t in GGUFReader(model).tensors}
    kinds = {t.name: t.tensor_type.name.lower() for t in GGUFReader(model).tensors}
    lines = [
        f"{name}\t{kinds[name]}{''.join(f' {n}' for n in shapes[name])}\n"
        for name in sorted(shapes)
    ]
    curve = {"predicted": {"bytes": [5, 9], "kl": [0.2, 0.1]}, "measured": [], "mixtures": [],
             "chosen": [9]}  # fmt: skip
    head = {"label": "Q4_K", "bytes": 3, "accepted": 1.5, "accepted_low": 1.25, "depth": 3,
            "accepted_high": 1.75, "speed_up": None}  # fmt: skip
    data = {
        "format": "imatrix-recipe", "version": 1, "architecture": "glm4moe", "model": "m.gguf",
        "tensors_digest": hashlib.sha256("".join(lines).encode()).hexdigest(),
        "source": {name: [kinds[name], shapes[name]] for name in shapes}, "head_blocks": [3],
        "types": {name: "q8_0" for name in shapes if is_changed(name, shapes[name])},
        "ftype": "Q8_0", "bytes": 9, "bits_per_weight": 8.5, "predicted_kl": None,
        "measured_kl": {"value": 0.1, "error": None, "positions": 64}, "head": head,
        "text": "a.txt", "chunks": 2, "n_ctx": 64, "frontier": curve,
    }  # fmt: skip
    assert set(keys) == set(data)
    assert set(of_head) == set(head) - {"accepted_low", "accepted_high"}
    assert set(of_frontier) == set(curve)

    path, again = tmp_path / "r.json", tmp_path / "again.json"
    path.write_text(json.dumps(data), encoding="ascii")
    recipe = imatrix.Recipe.load(path)
    recipe.save(again)
    assert json.loads(again.read_text("ascii")) == data
    imatrix.quantize(model, tmp_path / "q.gguf", recipe=path, n_threads=1)
    types = {t.name: t.tensor_type.name.lower() for t in GGUFReader(tmp_path / "q.gguf").tensors}
    assert types == {**kinds, **data["types"]}

    # as rules
    recipe.write_rules(tmp_path / "rules.txt")
    rules = (tmp_path / "rules.txt").read_text("ascii")
    assert r"^blk\.0\.attn_q\.weight$=q8_0" in rules.splitlines()


def is_changed(name: str, shape: list[int]) -> bool:
    """Neither norms, biases nor routers (tensor_allows_quantization in src/llama-quant.cpp)."""
    return len(shape) > 1 and "norm" not in name and "ffn_gate_inp" not in name


def tables(title: str) -> list[str]:
    """The tables of a section, as text."""
    found = section(title).split("\n\n")
    return [paragraph for paragraph in found if paragraph.startswith("|")]
