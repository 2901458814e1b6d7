"""Statistics of activations: digit for digit those of llama-imatrix, and those of NumPy in
float64."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forge import Arch
from helpers.running import EngineTool, Forged, Run, run_tool

from imatrix import Collector, Entry, ImportanceMatrix
from imatrix.matrix.activations import activation_statistics
from imatrix.matrix.weight_activations import SCHEMA, schema_figures

N_CTX = 64
Cells = dict[str, tuple[str, ...]]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `imatrix stats` in this process, with room for all columns."""
    monkeypatch.setenv("COLUMNS", "400")
    return lambda *argv: run("stats", *argv)


@dataclass
class Printed:
    """Cells of the two tables, by the end of the weight's name and by the layer's label."""

    weights: Cells
    layers: Cells


def cells_of(text: str, *, ends: int) -> Printed:
    """The cells that either program printed. `ends`: characters at the end of a name that are
    compared, because llama-imatrix cuts off longer names."""
    found = Printed({}, {})
    into: Cells | None = None
    for line in text.replace("-nan", "nan").splitlines():
        cells = [cell for cell in line.split() if cell != "|"]
        if cells[:1] == ["Layer"]:
            into = found.weights if cells[1] == "Tensor" else found.layers
        elif not cells and into:
            into = None  # behind the last row; llama-imatrix also leaves a line before the first
        elif into is not None and set(line) - set("-─"):
            if into is found.weights:
                into[f"{cells[0]} {cells[1][-ends:]}"] = tuple(cells[2:])
            else:
                into[cells[0]] = tuple(cells[1:])
    return found


def theirs(tool: Path, path: Path, *options: object) -> Printed:
    """What llama-imatrix prints for a file. It requires a model's name, but does not open the
    model."""
    log = run_tool(tool, "-m", "none", "--show-statistics", "--in-file", path, *map(str, options))
    # if a number fills a column, it touches the next one
    return cells_of(re.sub(r"(\.[0-9]{4})(?=[-0-9])", r"\1 ", log), ends=38)


def check_same(tool: Path, run: Run, path: Path, *options: object, legacy: bool = False) -> Printed:
    """Both programs print the same for a file."""
    want = theirs(tool, path, *options)
    done = run(path, *options)
    assert (done.status, done.err) == (0, "")
    got = cells_of(done.out, ends=38)
    if legacy:  # its table then has no L2 Dist
        got.weights = {key: (*row[:7], *row[8:]) for key, row in got.weights.items()}
        got.layers = {key: (*row[:2], *row[3:]) for key, row in got.layers.items()}
    n_weights, n_layers = (9, 5) if legacy else (10, 6)
    # the columns after llama-imatrix's are ours
    assert {key: row[:n_weights] for key, row in got.weights.items()} == want.weights
    assert {key: row[:n_layers] for key, row in got.layers.items()} == want.layers
    assert len(want.weights) > 0
    return want


COLLECTED: list[tuple[Arch, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen35", {"n_nextn": 1}),  # a recurrent layer and one with attention
    ("glm4moe", {"n_nextn": 1}),
    ("deepseek2", {"n_nextn": 1}),  # 3-D weights
    ("hy_v3", {"n_nextn": 2}),  # a head of two blocks
]


@pytest.mark.parametrize(("arch", "options"), COLLECTED, ids=[arch for arch, _ in COLLECTED])
def test_a_collected_matrix(
    arch: Arch,
    options: dict[str, Any],
    forged: Forged,
    prose_file: Path,
    engine_tool: EngineTool,
    run: Run,
    tmp_path: Path,
) -> None:
    path = tmp_path / "m.gguf"
    with Collector(forged(arch, seed=2, **options).path, n_ctx=N_CTX, n_threads=1) as collector:
        matrix = collector.run(prose_file, mtp=bool(options), process_output=True, max_chunks=2)
    matrix.save(path)
    printed = check_same(engine_tool("llama-imatrix"), run, path)
    assert len(printed.weights) == len(matrix)
    labels = {f"mtp{k}" for k in range(options.get("n_nextn", 0))}
    assert {label for label in printed.layers if label.startswith("mtp")} == labels
    # the output has a line among the layers
    assert "-" in printed.layers
    for part in ("trunk", "head"):
        rows = json.loads(run(path, "--json", "--part", part).out)["weights"]
        assert {row["name"] for row in rows} == set(getattr(matrix, part))


def drawn(
    seed: int, n_mat: int, n_in: int, counts: Any, sigma: float = 1.5, *, signed: bool = True
) -> Entry:
    """Random sums as they occur: a few channels far above the others, and means that are a share of
    the root mean squares."""
    rng = np.random.default_rng(seed)
    mean_square = rng.lognormal(0.0, sigma, (n_mat, n_in)).astype(np.float32)
    rows = np.broadcast_to(np.asarray(counts), n_mat)[:, np.newaxis]
    means = np.sqrt(mean_square) * rng.uniform(-0.9, 0.9, (n_mat, n_in))
    return Entry(mean_square * rows, counts, signed_sums=means * rows if signed else None)


def odd_entries(*, signed: bool) -> dict[str, Entry]:
    """Sizes of real models, and everything that is a case of its own."""
    some = np.arange(64) % 5 * 100  # every fifth expert saw nothing

    def one(seed: int, *shape: Any) -> Entry:
        return drawn(seed, *shape, signed=signed)

    def even(value: float, mean: float | None = None) -> Entry:
        sums = np.full((1, 64), value)
        means = np.full((1, 64), 0.0 if mean is None else mean)
        return Entry(sums, [8], signed_sums=means if signed else None)

    return {
        "blk.0.ffn_up_exps.weight": one(1, 64, 2048, some, 2.0),
        "blk.1.ffn_up_exps.weight": one(2, 64, 2048, some[::-1], 2.0),
        "blk.0.attn_q.weight": one(3, 1, 16384, [512], 3.0),
        "blk.1.attn_q.weight": one(4, 1, 16384, [300], 3.0),
        "blk.2.attn_q.weight": one(5, 1, 16384, [512], 3.0),
        "blk.1.attn_k_b.weight": one(6, 4, 32, [512]),  # 3-D, with one count
        "blk.3.attn_k_b.weight": one(7, 4, 32, [512]),  # compared across a gap
        "blk.0.ffn_down.weight": one(8, 1, 80, [512]),
        "blk.1.ffn_down.weight": one(9, 1, 64, [512]),  # of another size: not compared
        "blk.2.ffn_down.weight": one(10, 1, 64, [512]),
        "blk.2.one.weight": Entry([[2.5]], [8], signed_sums=[[-4.0]] if signed else None),
        "blk.3.one.weight": Entry([[2.5]], [8], signed_sums=[[-3.0]] if signed else None),
        "blk.2.even.weight": even(3.0, 2.0),  # no deviation
        "blk.3.even.weight": even(3.0, 2.0),
        "blk.2.zero.weight": even(0.0),
        "blk.3.zero.weight": even(0.0),
        "blk.4.zero.weight": one(11, 1, 64, [8]),  # after a layer of zeros
        "blk.5.zero.weight": even(0.0),  # zeros after a layer that has data
        "blk.4.a.b.weight": one(12, 1, 64, [8]),  # a name of two parts
        "blk.5.many.weight": one(13, 1, 64, [2**26 + 1]),
        "blk.5.unseen_exps.weight": Entry(
            np.ones((3, 64)), [0, 0, 0], signed_sums=np.ones((3, 64)) if signed else None
        ),
        "blk.6.attn_q.weight": one(14, 1, 16384, [512], 3.0),
        "blk.6.nextn.eh_proj.weight": one(15, 1, 512, [512]),
        "blk.7.attn_q.weight": one(16, 1, 16384, [512], 3.0),  # a second head, beside the first
        "output.weight": one(17, 1, 4096, [512]),
        "head_output.weight": one(18, 1, 64, [512]),
        "weight": one(19, 1, 64, [512]),
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "odd.gguf"
    entries = odd_entries(signed=True)
    ImportanceMatrix(entries, chunk_count=1, chunk_size=512, head_blocks=[6, 7]).save(path)
    return path


def test_large_and_odd_weights(odd: Path, engine_tool: EngineTool, run: Run) -> None:
    want = check_same(engine_tool("llama-imatrix"), run, odd)
    # the weight whose experts saw nothing is left out
    assert len(want.weights) == len(odd_entries(signed=True)) - 1
    found = activation_statistics(ImportanceMatrix.load(odd))
    assert found.without_rows == ("blk.5.unseen_exps.weight",)
    by_name = {each.name: each for each in found.weights}
    previous = {name: each.previous for name, each in by_name.items()}
    assert previous["blk.3.attn_k_b.weight"] == "blk.1.attn_k_b.weight"
    assert previous["blk.1.ffn_down.weight"] is None
    assert previous["blk.6.attn_q.weight"] is None  # the head is not compared with the trunk
    assert previous["blk.7.attn_q.weight"] == "blk.6.attn_q.weight"
    assert by_name["blk.7.attn_q.weight"].label == "mtp1"


def test_the_order_is_theirs(odd: Path, engine_tool: EngineTool) -> None:
    printed = theirs(engine_tool("llama-imatrix"), odd)
    found = activation_statistics(ImportanceMatrix.load(odd))
    assert [f"{each.label} {each.name[-38:]}" for each in found.weights] == list(printed.weights)


def test_without_signed_sums(engine_tool: EngineTool, run: Run, tmp_path: Path) -> None:
    """All figures are then made from the squares, in GGUF and in the old format."""
    matrix = ImportanceMatrix(odd_entries(signed=False), chunk_count=1, chunk_size=512)
    tool = engine_tool("llama-imatrix")
    matrix.save(tmp_path / "m.gguf")
    check_same(tool, run, tmp_path / "m.gguf", legacy=True)
    matrix.save(tmp_path / "m.dat", format="dat")
    for chunk_size in (512, 500):
        check_same(tool, run, tmp_path / "m.dat", "-c", chunk_size, legacy=True)
    done = run(tmp_path / "m.gguf")
    assert "without signed sums, Mean to Kurt and what follows Gain are of E[A²]: all" in done.out


def test_some_without_signed_sums(engine_tool: EngineTool, run: Run, tmp_path: Path) -> None:
    """Two weights are compared by their squares if one of them lacks the signed sums."""
    signed, plain = odd_entries(signed=True), odd_entries(signed=False)
    lacking = {"blk.1.attn_q.weight", "blk.3.attn_k_b.weight", "blk.0.ffn_up_exps.weight"}
    entries = {name: plain[name] if name in lacking else signed[name] for name in signed}
    path = tmp_path / "m.gguf"
    ImportanceMatrix(entries, chunk_count=1, chunk_size=512).save(path)
    check_same(engine_tool("llama-imatrix"), run, path, legacy=True)
    found = activation_statistics(ImportanceMatrix.load(path))
    assert set(found.without_signed_sums) == lacking
    assert {each.name for each in found.weights if not each.signed} == lacking
    told = run(path).out
    assert "of E[A²]: blk.0.ffn_up_exps.weight, blk.1.attn_q.weight, blk.3.attn_k_b" in told


def test_a_file_of_theirs(
    engine_tool: EngineTool, forged: Forged, prose_file: Path, run: Run, tmp_path: Path
) -> None:
    out, tool = tmp_path / "theirs.gguf", engine_tool("llama-imatrix")
    run_tool(
        *(tool, "-m", forged("glm4moe", seed=2).path, "-f", prose_file, "-o", out, "--no-ppl"),
        *("-c", str(N_CTX), "--chunks", "2", "-b", str(N_CTX), "-t", "1"),
    )
    check_same(tool, run, out)


def test_the_figures_in_a_file_are_theirs(
    odd: Path, engine_tool: EngineTool, tmp_path: Path
) -> None:
    """llama-imatrix computes them again for the file that it writes."""
    import gguf

    out = tmp_path / "theirs.gguf"
    run_tool(engine_tool("llama-imatrix"), "-m", "none", "--in-file", odd, "-o", out)
    mine, want = (
        {
            t.name: np.array(t.data)
            for t in gguf.GGUFReader(path).tensors
            if t.name.endswith(".stats")
        }
        for path in (odd, out)
    )
    assert set(mine) == set(want)
    for name in want:
        # float32 of figures that both compute in float64; skewness and kurtosis are differences of
        # larger numbers
        np.testing.assert_allclose(
            mine[name], want[name], rtol=1.2e-7, atol=1e-9, equal_nan=True, err_msg=name
        )
    fields = [gguf.GGUFReader(path).fields for path in (odd, out)]
    assert [each["imatrix.stats_schema"].contents() for each in fields] == [list(SCHEMA)] * 2
    assert [each["imatrix.n_layer_nextn"].contents() for each in fields] == [2, 2]
    matrix = ImportanceMatrix.load(odd)
    figures = schema_figures(matrix, matrix.head_blocks)
    assert not figures["blk.5.unseen_exps.weight"].any()


# --- figures by hand and by NumPy ----------------------------------------------------------------


def test_figures_by_hand() -> None:
    matrix = ImportanceMatrix(
        {
            "blk.0.a.weight": Entry([[2.0, 2.0, 2.0, 2.0]], [2], signed_sums=[[2.0, 0, 0, -2.0]]),
            "blk.2.a.weight": Entry([[4.0, 4.0, 4.0, 4.0]], [4], signed_sums=[[0, 0, 0, 4.0]]),
            "blk.2.b_exps.weight": Entry(
                [[9.0, 9.0], [4.0, 12.0]], [0, 4], signed_sums=[[7.0, 7.0], [4.0, -4.0]]
            ),
        }
    )
    found = activation_statistics(matrix)
    first, second, experts = found.weights
    # v: [1, 0, 0, -1], e: all 1
    assert (first.mean, first.stddev, first.skewness) == (0, float(np.float32(math.sqrt(0.5))), 0)
    assert first.kurtosis == pytest.approx(0.5 / 0.25 - 3)
    assert (first.total, first.entropy, first.entropy_norm, first.elements) == (4, 2, 1, 4)
    assert math.isnan(first.gain)
    assert first.previous is None
    # v: [0, 0, 0, 1]: mean 1/4, variance 3/16, third moment 3/32, fourth 21/256
    assert (second.mean, second.previous) == (0.25, "blk.0.a.weight")
    assert second.skewness == pytest.approx(3 / 32 / (3 / 16) ** 1.5, rel=1e-7)
    assert second.kurtosis == pytest.approx(21 / 256 / (3 / 16) ** 2 - 3, rel=1e-6)
    assert second.gain == 1
    assert second.l2_dist == pytest.approx(math.sqrt(1 + 4), rel=1e-7)
    assert second.cossim == pytest.approx(-1 / math.sqrt(2), rel=1e-7)
    assert second.covariance == pytest.approx(-0.25)
    assert second.pearson == pytest.approx(-0.25 / math.sqrt(0.5 * 3 / 16), rel=1e-7)
    # the first expert is left out: v [1, -1], e [1, 3]
    assert (experts.elements, experts.total, experts.mean, experts.stddev) == (2, 4, 0, 1)
    layer = found.layers[1]
    assert (layer.total, layer.gain, layer.n_experts, layer.unseen) == (8, 1, 2, 1)
    assert layer.pearson == second.pearson  # only one of them has a layer before it


def reference(v: Any, e: Any) -> dict[str, float]:
    """The figures, written as their definitions."""
    p = e[e > 0] / e.sum()
    away = v - v.mean()
    return {
        "mean": v.mean(),
        "stddev": v.std(),
        "skewness": (away**3).mean() / v.std() ** 3 if v.std() else 0.0,
        "kurtosis": (away**4).mean() / v.std() ** 4 - 3 if v.std() else 0.0,
        "total": e.sum(),
        "entropy_norm": -(p * np.log2(p)).sum() / np.log2(e.size),
    }


def test_exact_figures_are_numpys(odd: Path) -> None:
    whole = ImportanceMatrix.load(odd)
    matrix = ImportanceMatrix(
        {n: whole[n] for n in whole if not any(word in n for word in ("zero", "one", "even"))},
        head_blocks=[6, 7],
    )
    found = activation_statistics(matrix, exact=True)
    assert found.exact

    def seen(name: str) -> tuple[Any, Any, Any]:
        entry = matrix[name]
        rows = np.broadcast_to(entry.counts, entry.n_mat)
        with np.errstate(divide="ignore", invalid="ignore"):
            return rows > 0, entry.signed_sums / rows[:, None], entry.sums / rows[:, None]

    for each in found.weights:
        there, v, e = seen(each.name)
        want = reference(v[there].ravel(), e[there].ravel())
        # The order of additions differs over 1e5 values; shares up to 1e-10 are left out of the
        # entropy, so at most that many times 1e-10
        assert {key: getattr(each, key) for key in want} == pytest.approx(want, rel=1e-6, abs=1e-9)
        if each.previous:
            there_before, before, e_before = seen(each.previous)
            both = there & there_before
            x, y = v[both].ravel(), before[both].ravel()
            assert each.l2_dist == pytest.approx(np.linalg.norm(x - y), rel=1e-11)
            assert each.pearson == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9, abs=1e-12)
            assert each.covariance == pytest.approx(np.cov(x, y, bias=True)[0, 1], rel=1e-9)
            cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            assert each.cossim == pytest.approx(cosine, rel=1e-9)
            gain = math.sqrt(e[there].mean() / e_before[there_before].mean())
            assert each.gain == pytest.approx(gain, rel=1e-11)


def test_small_matrices() -> None:
    nothing = activation_statistics(ImportanceMatrix({}))
    assert (nothing.weights, nothing.layers) == ((), ())
    unseen = ImportanceMatrix({"blk.2.nextn.eh_proj.weight": Entry([[1.0]], [0])})
    found = activation_statistics(unseen)
    assert (found.weights, found.without_rows) == ((), ("blk.2.nextn.eh_proj.weight",))
    assert found.without_signed_sums == ()  # no row lacks them


def test_sums_that_float32_cannot_hold() -> None:
    """In a file they would be scaled so that the means, which float32 can hold, stay the same."""
    entry = Entry([[4e40, 8e40]], [10**4], signed_sums=[[2e22, -1e22]])
    (found,) = activation_statistics(ImportanceMatrix({"blk.0.a.weight": entry})).weights
    assert found.total == pytest.approx(1.2e37, rel=1e-7)
    assert found.mean == pytest.approx(5e17, rel=1e-7)


# --- the command ---------------------------------------------------------------------------------


def test_json_and_csv_hold_all_of_it(odd: Path, run: Run) -> None:
    import csv

    data = json.loads(run(odd, "--json").out, parse_constant=pytest.fail)
    found = activation_statistics(ImportanceMatrix.load(odd))
    assert (data["legacy"], data["exact"], data["head_blocks"]) == (False, False, [6, 7])
    assert data["without_rows"] == ["blk.5.unseen_exps.weight"]
    for what, flags in (("weights", []), ("layers", ["--layers"])):
        rows = list(csv.DictReader(run(odd, "--csv", *flags).out.splitlines()))
        want = getattr(found, what)
        assert len(data[what]) == len(rows) == len(want)
        for in_json, in_csv, each in zip(data[what], rows, want, strict=True):
            assert set(in_json) == set(in_csv)
            for key in in_csv:
                value = getattr(each, key)
                if isinstance(value, float) and math.isnan(value):
                    assert (in_json[key], in_csv[key]) == (None, "nan")
                else:
                    assert in_json[key] == value
                    assert in_csv[key] == ("" if value is None else str(value))


def test_order_and_parts(odd: Path, run: Run) -> None:
    def names(*flags: object) -> list[str]:
        return [each["name"] for each in json.loads(run(odd, "--json", *flags).out)["weights"]]

    entries = odd_entries(signed=True)
    total = {
        name: entries[name].importance.sum() for name in names("--sort", "∑ E[A²]", "--top", 5)
    }
    assert sorted(total.values(), reverse=True) == list(total.values())
    assert names("--sort", "PCC")[0] == names("--sort", "pearson")[0]
    assert names("--sort", "Layer", "--part", "head") == names("--part", "head")
    assert names("--reverse") == names()[::-1]
    done = run(odd, "--sort", "ZD")
    assert done.status == 2
    assert "there is no column 'ZD' to sort by; there are: name, block, label" in done.err
