"""The statistics behind --legacy: digit for digit those of llama-imatrix 0.5.0, and those of NumPy
in float64."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forge import Arch
from helpers.running import Forged, Run

import imatrix
from imatrix import Collector, Entry, ImportanceMatrix, statistics

N_CTX = 64
Cells = list[tuple[str, ...]]


@pytest.fixture
def run(run: Run) -> Run:
    """Run `imatrix stats --legacy` in this process."""
    return lambda *argv: run("stats", "--legacy", *argv)


# --- the figures of llama-imatrix 0.5.0 ---------------------------------------------------------------------


@dataclass
class Printed:
    """Cells of the two tables, as printed."""

    weights: Cells
    layers: Cells


def theirs(name: str) -> Printed:
    """What llama-imatrix 0.5.0 printed for a file that a test here makes. It is recorded, because
    the program has had other columns since 0.6.0."""
    path = Path(__file__).parent / "legacy_statistics.json"
    found = json.loads(path.read_text(encoding="utf-8"))[name]
    return Printed(*([tuple(row) for row in found[table]] for table in ("weights", "layers")))


def ours(out: str) -> Printed:
    """What `imatrix stats` printed with room for all columns."""
    weights: Cells = []
    layers: Cells = []
    into: Cells | None = None
    for line in out.splitlines():
        cells = line.split()
        if cells[:1] == ["Layer"]:
            into = weights if cells[1] == "Tensor" else layers
        elif into is not None and cells and set(line) != {"─"}:
            # the columns after llama-imatrix's are ours
            into.append(tuple(cells[: 13 if into is weights else 4]))
        elif not cells:
            into = None
    return Printed(weights, layers)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


COLLECTED: list[tuple[Arch, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen35", {"n_nextn": 1}),  # a recurrent layer and one with attention
    ("glm4moe", {"n_nextn": 1}),
    ("deepseek2", {"n_nextn": 1}),  # 3-D weights
    ("hy_v3", {"n_nextn": 2}),  # a head of two blocks
]


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("arch", "options"), COLLECTED, ids=[arch for arch, _ in COLLECTED])
def test_a_collected_matrix(
    arch: Arch,
    options: dict[str, Any],
    forged: Forged,
    prose_file: Path,
    run: Run,
    tmp_path: Path,
) -> None:
    """The expected figures are reference()'s in float64, within the error of float32 sums: recorded
    ones would hold for one machine's kernels only. The tests below compare the same arithmetic to
    the digit."""
    path = tmp_path / "m.gguf"
    head = bool(options)
    with Collector(forged(arch, seed=2, **options).path, n_ctx=N_CTX, n_threads=1) as collector:
        matrix = collector.run(prose_file, mtp=head, process_output=True, max_chunks=2)
    matrix.save(path)
    done = run(path)
    assert (done.status, done.err) == (0, "")
    printed = ours(done.out)
    assert len(printed.weights) == len(matrix)
    saved = ImportanceMatrix.load(path)
    found = statistics(saved)
    for each in found.weights:
        entry = saved[each.name]
        seen = np.broadcast_to(entry.counts > 0, entry.n_mat)
        counts = np.broadcast_to(entry.counts, entry.n_mat)[seen, np.newaxis]
        want = reference((entry.sums[seen] / counts).ravel())
        # up to 1e5 additions of float32 values, all rounded in the same direction beside a large
        # sum
        assert {key: getattr(each, key) for key in want} == pytest.approx(want, rel=1e-3), each.name
    assert {each.name for each in found.head.weights} == set(matrix.head)
    assert {each.block for each in found.head.layers} == matrix.head_blocks
    # the weight outside the blocks has a line, but no layer
    assert ("-", "output") in {row[:2] for row in printed.weights}
    assert ([each.part for each in found.parts] == ["trunk", "head"]) == head
    if head:
        # the head's first block is compared with the trunk's last
        first = min(matrix.head_blocks)
        compared = {each.name: each.previous for each in found.weights}
        name = f"blk.{first}.attn_output.weight"
        assert name in compared
        if f"blk.{first - 1}.attn_output.weight" in matrix:
            assert compared[name] == f"blk.{first - 1}.attn_output.weight"


def drawn(seed: int, n_mat: int, n_in: int, counts: Any, sigma: float = 1.5) -> Entry:
    """Random sums as they occur: a few channels far above the others."""
    rng = np.random.default_rng(seed)
    mean = rng.lognormal(0.0, sigma, (n_mat, n_in)).astype(np.float32)
    rows = np.broadcast_to(np.asarray(counts), n_mat)
    return Entry(mean * rows[:, np.newaxis], counts)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes of real models, and everything that is a case of its own."""
    some = np.arange(64) % 5 * 100  # every fifth expert saw nothing
    entries = {
        "blk.0.ffn_up_exps.weight": drawn(1, 64, 2048, some, 2.0),
        "blk.1.ffn_up_exps.weight": drawn(2, 64, 2048, some[::-1], 2.0),
        "blk.0.attn_q.weight": drawn(3, 1, 16384, [512], 3.0),
        "blk.1.attn_q.weight": drawn(4, 1, 16384, [300], 3.0),
        "blk.1.attn_k_b.weight": drawn(5, 4, 32, [512]),  # 3-D, with one count
        "blk.2.nextn.eh_proj.weight": drawn(6, 1, 512, [512]),
        "blk.2.attn_q.weight": drawn(7, 1, 16384, [512], 3.0),
        "output.weight": drawn(8, 1, 4096, [512]),
        "blk.0.attn_q.bias": drawn(9, 1, 64, [512]),  # no "weight" in it
        "v.blk.0.attn_qkv.weight": drawn(10, 1, 64, [512]),  # a prefix
        "v.blk.1.attn_qkv.weight": drawn(11, 1, 64, [512]),
        "blk.first.odd.weight": drawn(12, 1, 64, [512]),  # no number
        "weight": drawn(13, 1, 64, [512]),
        "blk.3.zero.weight": Entry(np.zeros((1, 64)), [8]),
        "blk.4.zero.weight": Entry(np.zeros((1, 64)), [8]),  # no cosine
        "blk.4.one.weight": Entry([[2.5]], [8]),  # no normalized entropy
        "blk.4.even.weight": Entry(np.full((1, 64), 3.0), [8]),
        "blk.4.faint.weight": Entry(np.linspace(0, 2e-4, 64)[np.newaxis], [8]),  # about 1e-5
        "blk.4.many.weight": Entry(np.linspace(1, 9e8, 64)[np.newaxis], [2**26 + 1]),
        "blk.5.huge.weight": Entry(np.full((1, 64), 1e30), [8]),  # squares beyond float32
        "blk.6.huge.weight": Entry(np.full((1, 64), 1e30), [8]),
        "blk.6.unseen_exps.weight": Entry(np.ones((3, 64)), [0, 0, 0]),
    }
    path = tmp_path_factory.mktemp("stats") / "hostile.gguf"
    ImportanceMatrix(entries, chunk_count=1, chunk_size=512).save(path)
    return path


@pytest.mark.usefixtures("wide")
def test_large_and_odd_weights(hostile: Path, run: Run) -> None:
    want = theirs("hostile")
    got = ours(run(hostile).out)
    # it prints the text that stands in the number's place, we print that there is none
    alike = [("-" if row[0] == "first" else row[0], *row[1:]) for row in want.weights]
    assert sorted(got.weights) == sorted(alike)
    assert sorted(got.layers, key=lambda row: int(row[0])) == want.layers
    assert len(want.weights) == 21
    # the weight whose experts saw nothing is left out
    assert "unseen_exps" not in {row[1] for row in want.weights}
    found = statistics(ImportanceMatrix.load(hostile))
    assert found.without_rows == ("blk.6.unseen_exps.weight",)


def test_float64_would_print_other_digits(hostile: Path) -> None:
    """This is why the arithmetic is llama-imatrix's: its sums of many float32 values are
    inexact."""
    printed = {row[:2]: row for row in theirs("hostile").weights}
    entry = ImportanceMatrix.load(hostile)["blk.0.ffn_up_exps.weight"]
    total = (entry.sums[entry.counts > 0] / entry.counts[entry.counts > 0, np.newaxis]).sum()
    row = printed["0", "ffn_up_exps"]
    assert f"{total:.2f}" != row[2]
    # 105 thousand additions; a random walk of roundings of 6e-8 would stay below 2e-5, but small
    # values beside a large sum are all rounded in the same direction
    assert total == pytest.approx(float(row[2]), rel=1e-3)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("chunk_size", [512, 500])
def test_the_old_format(chunk_size: int, hostile: Path, run: Run, tmp_path: Path) -> None:
    """llama-imatrix multiplies by its chunk size and divides by it again: 500 is no power of 2."""
    whole = ImportanceMatrix.load(hostile)
    names = [name for name in whole if "first" not in name]
    old = ImportanceMatrix({name: whole[name] for name in names}, chunk_count=1, chunk_size=512)
    old.save(tmp_path / "m.dat", format="dat")
    want = theirs(f"old format, -c {chunk_size}")
    got = ours(run(tmp_path / "m.dat", "-c", chunk_size).out)
    assert sorted(got.weights) == sorted(want.weights)
    assert sorted(got.layers, key=lambda row: int(row[0])) == want.layers


@pytest.mark.usefixtures("wide")
def test_blocks_whose_weights_differ_in_size(run: Run, tmp_path: Path) -> None:
    """llama-imatrix multiplies 80 values by 64 and reads beyond them for the cosine: all else is
    the same."""
    entries = {
        f"blk.{n}.ffn_down.weight": drawn(n, 1, size, [512]) for n, size in enumerate([64, 80, 80])
    }
    path = tmp_path / "m.gguf"
    ImportanceMatrix(entries, chunk_count=1, chunk_size=512).save(path)
    want = theirs("blocks of several sizes")
    got = ours(run(path).out)
    assert [row[:-1] for row in got.weights] == [row[:-1] for row in want.weights]
    by_layer = {row[0]: row[-1] for row in got.weights}
    assert by_layer["1"] == "0.0000"
    assert by_layer["2"] == {row[0]: row[-1] for row in want.weights}["2"]
    found = {each.block: each.previous for each in statistics(ImportanceMatrix.load(path)).weights}
    assert found == {0: None, 1: None, 2: "blk.1.ffn_down.weight"}


# --- figures by hand and by NumPy ----------------------------------------------------------------


def test_figures_by_hand() -> None:
    matrix = ImportanceMatrix(
        {
            "blk.0.a.weight": Entry([[2.0, 2.0, 2.0, 2.0]], [2]),
            "blk.1.a.weight": Entry([[0.0, 0.0, 0.0, 8.0]], [4]),
            "blk.1.b_exps.weight": Entry([[9.0, 9.0], [4.0, 12.0], [1.0, 1.0]], [0, 4, 1]),
        }
    )
    found = statistics(matrix)
    by_name = {each.name: each for each in found.weights}
    even, one, experts = (by_name[name] for name in matrix)
    assert (even.total, even.minimum, even.maximum, even.mean, even.stddev) == (4, 1, 1, 1, 0)
    assert (even.entropy, even.entropy_norm, even.active, even.zd) == (2, 1, 1, 0)
    assert (even.cossim, even.previous) == (0, None)
    # [0, 0, 0, 2]: mean 1/2, mean square 1, variance 3/4; the last is 1.7 deviations above
    assert (one.total, one.mean, one.active, one.entropy, one.zd) == (2, 0.5, 0.25, 0, 0.25)
    assert one.stddev == pytest.approx(math.sqrt(0.75), rel=1e-7)
    assert one.cossim == pytest.approx(0.5, rel=1e-7)  # (2, 2, 2, 2) and (0, 0, 0, 8)
    assert one.previous == "blk.0.a.weight"
    # the first expert is left out: [1, 3, 1, 1]
    assert (experts.elements, experts.total, experts.maximum, experts.unseen) == (4, 6, 3, 1)
    assert (experts.rows_min, experts.rows_max, experts.thinnest) == (0, 4, 2)
    assert experts.entropy == pytest.approx(0.5 + 3 * math.log2(6) / 6, rel=1e-6)
    layer = found.layers[1]
    assert (layer.elements, layer.n_weights, layer.n_experts, layer.unseen) == (8, 2, 3, 1)
    assert layer.mean_total == (4 * 2 + 4 * 6) / 8
    assert (layer.rows_min, layer.rows_max) == (0, 4)  # not the dense weight's
    (trunk,) = found.parts
    assert (trunk.part, trunk.blocks, trunk.elements) == ("trunk", (0, 1), 12)
    assert trunk.mean_total == pytest.approx((4 * 4 + 4 * 2 + 4 * 6) / 12, rel=1e-7)


def reference(values: Any) -> dict[str, float]:
    """The figures, written as their definitions."""
    p = values / values.sum()
    return {
        "total": values.sum(),
        "minimum": values.min(),
        "maximum": values.max(),
        "mean": values.mean(),
        "stddev": values.std(),
        "active": (values > 1e-5).mean(),
        "entropy": -(p[p > 0] * np.log2(p[p > 0])).sum(),
        "entropy_norm": -(p[p > 0] * np.log2(p[p > 0])).sum() / np.log2(values.size),
        "zd": (values > values.mean() + values.std()).mean(),
    }


def test_exact_figures_are_numpys(hostile: Path) -> None:
    whole = ImportanceMatrix.load(hostile)
    # in float64 the mean of 1e30 is inexact too, so that there is a deviation
    matrix = ImportanceMatrix({n: whole[n] for n in whole if not re.search("huge|zero|one", n)})
    found = statistics(matrix, exact=True)
    assert found.exact
    for each in found.weights:
        entry = matrix[each.name]
        seen = np.broadcast_to(entry.counts > 0, entry.n_mat)
        counts = np.broadcast_to(entry.counts, entry.n_mat)[seen, np.newaxis]
        want = reference((entry.sums[seen] / counts).ravel())
        # orders of addition differ; 1e5 values
        assert {key: getattr(each, key) for key in want} == pytest.approx(want, rel=1e-11)
        if each.previous:
            a, b = entry.sums.ravel(), matrix[each.previous].sums.ravel()
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert each.cossim == pytest.approx(cosine, rel=1e-11)
    for layer in found.layers:
        weights = [each for each in found.weights if each.block == layer.block]
        n = [each.elements for each in weights]
        for key in ("total", "zd", "cossim"):
            mean = np.average([getattr(each, key) for each in weights], weights=n)
            assert getattr(layer, f"mean_{key}") == pytest.approx(mean, rel=1e-11)


def test_every_expert(hostile: Path) -> None:
    matrix = ImportanceMatrix.load(hostile)
    found = imatrix.expert_statistics(matrix)
    assert {each.name for each in found} == {n for n in matrix if n.endswith("exps.weight")}
    for each in found:
        entry = matrix[each.name]
        rows = int(entry.counts[each.expert])
        assert each.rows == rows
        if rows:
            want = reference(entry.sums[each.expert] / rows)
            assert {key: getattr(each, key) for key in want} == pytest.approx(want, rel=1e-11)
            assert each.share == pytest.approx(rows / entry.counts.sum())
        else:
            assert math.isnan(each.total)


def test_small_matrices() -> None:
    nothing = statistics(ImportanceMatrix({}))
    assert (nothing.weights, nothing.layers, nothing.parts) == ((), (), ())
    unseen = ImportanceMatrix({"blk.2.nextn.eh_proj.weight": Entry([[1.0]], [0])})
    found = statistics(unseen)
    assert (found.weights, found.without_rows) == ((), ("blk.2.nextn.eh_proj.weight",))
    assert found.head.without_rows == found.without_rows
    assert found.trunk.without_rows == ()
    (only,) = statistics(ImportanceMatrix({"output.weight": Entry([[3.0, 1.0]], [2])})).weights
    assert (only.block, only.tensor, only.part, only.total) == (None, "output", "trunk", 2)


def test_sums_that_float32_cannot_hold() -> None:
    """In a file they would be scaled so that the mean, which float32 can hold, stays the same."""
    matrix = ImportanceMatrix({"blk.0.a.weight": Entry([[4e40, 8e40]], [10**4])})
    (found,) = statistics(matrix).weights
    assert found.maximum == pytest.approx(8e36, rel=1e-7)


# --- frames --------------------------------------------------------------------------------------


def test_a_frame_of_weights(hostile: Path) -> None:
    matrix = ImportanceMatrix.load(hostile)
    frame = matrix.to_frame()
    assert list(frame.index) == list(matrix)
    for each in statistics(matrix).weights:
        row = frame.loc[each.name]
        assert row["total"] == each.total
        assert row["entropy_norm"] == pytest.approx(each.entropy_norm, nan_ok=True)
        assert row["previous"] == each.previous or each.previous is None
    unseen = frame.loc["blk.6.unseen_exps.weight"]
    assert (unseen["elements"], unseen["unseen"], unseen["block"]) == (0, 3, 6)
    assert math.isnan(unseen["total"])
    assert str(frame.dtypes["block"]) == "Int64"
    assert frame["block"].isna().sum() == 3  # output.weight, weight, and the one without a number
    exact = matrix.to_frame(exact=True)
    entry = matrix["blk.1.attn_q.weight"]
    assert exact.loc["blk.1.attn_q.weight", "total"] == pytest.approx(entry.importance.sum())


def test_a_frame_of_experts(hostile: Path) -> None:
    matrix = ImportanceMatrix.load(hostile)
    frame = matrix.to_frame(experts=True)
    assert len(frame) == 64 + 64 + 3
    up = frame.loc["blk.1.ffn_up_exps.weight"]
    assert up["rows"].tolist() == matrix["blk.1.ffn_up_exps.weight"].counts.tolist()
    assert up["share"].sum() == pytest.approx(1.0)
    assert frame.loc[("blk.6.unseen_exps.weight", 0)].isna()["total"]
    assert len(ImportanceMatrix({}).to_frame()) == len(ImportanceMatrix({}).to_frame(experts=True))


def test_a_frame_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'imatrix\[pandas\]'"):
        ImportanceMatrix({}).to_frame()


# --- the command ---------------------------------------------------------------------------------


def test_json_holds_all_of_it(head_matrix: Path, run: Run) -> None:
    data = json.loads(run(head_matrix, "--json").out)
    found = statistics(ImportanceMatrix.load(head_matrix))
    assert data["weights"] == [asdict(each) for each in found.weights]
    assert data["layers"] == [asdict(each) for each in found.layers]
    assert data["parts"] == [{**asdict(each), "blocks": list(each.blocks)} for each in found.parts]
    assert (data["head_blocks"], data["format"], data["exact"]) == ([3], "gguf", False)
    assert "experts" not in data
    head = json.loads(run(head_matrix, "--json", "--part", "head", "--experts").out)
    assert {each["block"] for each in head["weights"] + head["experts"]} == {3}
    rows = [each["rows"] for each in head["experts"]]
    assert rows == sorted(rows)


def test_numbers_that_json_lacks(hostile: Path, run: Run) -> None:
    data = json.loads(run(hostile, "--json").out, parse_constant=pytest.fail)
    by_name = {each["name"]: each for each in data["weights"]}
    assert by_name["blk.4.zero.weight"]["cossim"] is None
    assert data["without_rows"] == ["blk.6.unseen_exps.weight"]


@pytest.mark.parametrize("what", ["weights", "layers", "experts"])
def test_csv_comes_back(what: str, head_matrix: Path, run: Run) -> None:
    flags = [] if what == "weights" else [f"--{what}"]
    rows = list(csv.DictReader(run(head_matrix, "--csv", *flags).out.splitlines()))
    matrix = ImportanceMatrix.load(head_matrix)
    if what == "experts":
        want: Any = sorted(imatrix.expert_statistics(matrix), key=lambda each: each.rows)
    else:
        want = getattr(statistics(matrix), what)
    assert len(rows) == len(want)
    for row, each in zip(rows, want, strict=True):
        expected = asdict(each)
        got = {
            key: (None if row[key] == "" else type(value)(row[key]))
            for key, value in expected.items()
            if value is not None
        }
        assert got == {key: value for key, value in expected.items() if value is not None}
        assert all(row[key] == "" for key, value in expected.items() if value is None)


def test_order(head_matrix: Path, run: Run) -> None:
    def names(*flags: object) -> list[str]:
        return [
            each["name"] for each in json.loads(run(head_matrix, "--json", *flags).out)["weights"]
        ]

    matrix = ImportanceMatrix.load(head_matrix)
    total = {name: float(matrix.importance(name).sum()) for name in matrix}
    # no two figures of different inputs are as close as float32 rounds
    assert [total[n] for n in names("--sort", "total")] == pytest.approx(
        sorted(total.values(), reverse=True), rel=1e-5
    )
    assert (
        names("--sort", "Σ(Act²)", "--reverse", "--top", 3)
        == names("--sort", "total", "--reverse")[:3]
    )
    by_layer = [matrix_block(name) for name in names("--sort", "Layer")]
    assert by_layer == sorted(by_layer)
    # weights without a value are last in either order
    experts = {name for name in matrix if matrix[name].n_counts > 1}
    for flags in ([], ["--reverse"]):
        assert set(names("--sort", "thinnest", *flags)[: len(experts)]) == experts
    assert names("--reverse") == names()[::-1]


def matrix_block(name: str) -> int:
    return int(name.split(".")[1])


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("flags", [[], ["--experts", "--top", "5"], ["--layers"]])
def test_tables_fit(
    width: int, flags: list[str], head_matrix: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # with this, rich takes the stream for a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(head_matrix, *flags).out)
    # the terminal breaks the facts about the file into words
    lines = [line for line in text.splitlines() if not line.startswith(("/", "  experts: "))]
    assert max(map(len, lines)) <= width
    assert "…" not in text
    headings = {word for line in lines if line.startswith("Layer") for word in line.split()}
    if not flags:
        assert {"Σ(Act²)", "Min", "Max", "μ", "σ", "Active", "N", "Entropy", "ZD", "CosSim"} <= (
            headings
        )
    # a table of the trunk's weights, one of the head's
    assert sum(line.startswith(("trunk: ", "head: ")) for line in lines) == 2


def test_what_is_thin_is_reported(hostile: Path, run: Run) -> None:
    text = run(hostile).out
    assert "without rows: blk.6.unseen_exps.weight" in text
    assert "blk.0 expert 0" in text
    assert "thinnest: blk.0 expert 1, 100 rows" in text
    assert "head: 2 weights, N 16896: " in text


def test_bad_input_is_refused(head_matrix: Path, run: Run, tmp_path: Path) -> None:
    done = run(head_matrix, "--sort", "sum")
    assert done.status == 2
    assert "no column 'sum' to sort by; there are: name, block, tensor" in done.err
    assert run(head_matrix, "--layers", "--sort", "rows").status == 2
    # neither program writes such a file; the reader refuses it
    path = tmp_path / "infinite.gguf"
    ImportanceMatrix({"blk.0.attn_q.weight": Entry([[12345.0]], [1])}).save(path)
    data = path.read_bytes()
    raw = np.float32(12345.0).tobytes()
    # the sum comes first, the figures made from it come after
    path.write_bytes(data.replace(raw, np.float32(np.inf).tobytes(), 1))
    done = run(path)
    assert done.status == 2
    assert "sums must be finite" in done.err
