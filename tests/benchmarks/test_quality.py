"""benchmarks/quality.py: which data it calls borrowed and flat, and a study of one type."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.running import TEXT, EngineTool, run_tool

import imatrix
from imatrix.entries import Entry
from imatrix.matrix.importance import ImportanceMatrix

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import quality_cells
import quality_report
from quality_cells import Cell, Study, Text

HEAD = {
    "blk.2.attn_q.weight": (1, 4),
    "blk.2.ffn_up_exps.weight": (3, 4),
    "blk.2.ffn_down_exps.weight": (3, 2),
    "blk.2.nextn.eh_proj.weight": (1, 8),
}
TRUNK = {
    "blk.0.attn_q.weight": (1, 4),
    "blk.0.ffn_down.weight": (1, 2),
    "blk.1.attn_q.weight": (1, 4),
    "blk.1.ffn_up_exps.weight": (3, 4),
    "blk.1.ffn_down_exps.weight": (2, 2),  # the trunk's experts differ from the head's
    "output.weight": (1, 4),
}


@pytest.fixture
def matrix() -> ImportanceMatrix:
    rng = np.random.default_rng(3)
    return ImportanceMatrix(
        {
            name: Entry(rng.uniform(1, 9, shape), rng.integers(1, 9, shape[0]))
            for name, shape in {**TRUNK, **HEAD}.items()
        }
    )


@pytest.mark.parametrize("data", ["ours", "flat", "borrowed", "none"])
def test_the_trunk_keeps_its_data(data: str, matrix: ImportanceMatrix) -> None:
    found = quality_cells.head_data(matrix, data)
    assert {name: found[name] for name in TRUNK} == {name: matrix[name] for name in TRUNK}
    assert set(found) == set(TRUNK if data == "none" else {**TRUNK, **HEAD})


def test_flat_data_weigh_every_column_the_same(matrix: ImportanceMatrix) -> None:
    found = quality_cells.flat(matrix)
    for name, shape in HEAD.items():
        assert found.importance(name).tolist() == np.ones(shape).tolist()


def test_borrowed_data_are_the_last_trunk_blocks(matrix: ImportanceMatrix) -> None:
    found = quality_cells.borrowed(matrix)
    assert found["blk.2.attn_q.weight"] == matrix["blk.1.attn_q.weight"]
    assert found["blk.2.ffn_up_exps.weight"] == matrix["blk.1.ffn_up_exps.weight"]
    # no entry there has that shape
    assert found.importance("blk.2.nextn.eh_proj.weight").tolist() == [[1] * 8]
    assert found.importance("blk.2.ffn_down_exps.weight").tolist() == [[1, 1]] * 3


def test_a_gain_is_above_zero_where_collecting_is_better() -> None:
    def made(head_nll: float, kl: float, accepted: list[int]) -> imatrix.Evaluation:
        n = len(accepted)
        rows = imatrix.Predictions(
            np.full(n, head_nll),
            np.zeros(n, np.int32),
            np.ones(n),
            np.zeros(n, np.int32),
            np.full(n, kl),
        )
        return imatrix.Evaluation(
            model="m", mtp_model=None, reference="r", n_ctx=8, n_vocab=10, digest="",
            chunk=np.repeat(np.arange(2, dtype=np.int32), n // 2),
            position=np.tile(np.arange(n // 2, dtype=np.int32), 2), trunk=rows, head=rows, depth=1,
            known=np.ones(n, np.int8), accepted=np.array(accepted, np.int8),
        )  # fmt: skip

    found = quality_report.gains(made(2.0, 0.1, [1, 1, 1, 1]), made(2.5, 0.3, [1, 0, 1, 0]))
    assert {key: each.value for key, each in found.items()} == pytest.approx(
        {"nll": 0.5, "kl": 0.2, "agreement 1": 0.5, "accepted": 0.5}
    )
    assert [quality_report.verdict(each) for each in found.values()] == ["better"] * 4


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.2, "open"), (0, 0.1, "open"),
     (0, 0, "same")],
)  # fmt: skip
def test_verdicts(low: float, high: float, expected: str) -> None:
    estimate = imatrix.Estimate((low + high) / 2, 0.1, low, high, 10)
    assert quality_report.verdict(estimate) == expected


@pytest.mark.slow
def test_a_study_of_one_type(model: Path, engine_tool: EngineTool, tmp_path: Path) -> None:
    study = Study(
        model=model,
        calibration=(Text("package", TEXT[:20_000]),),
        sizes=(1, 3),
        held_out=(Text("in-domain", TEXT[20_000:28_000], 2), Text("other", TEXT[30_000:], 2)),
        types=("IQ2_XXS",),
        calibrated=("IQ2_XXS",),
        parts=("head",),
    )
    folder, out = tmp_path / "cache", tmp_path / "out"
    out.mkdir()
    wanted = quality_cells.cells(study)
    made, references = quality_cells.run(study, wanted, folder, workers=1)
    quality_report.write(study, made, references, out)

    # the engine's own programs and the public API give the same figures
    with imatrix.Collector(model, n_threads=1) as collector:
        collector.run(TEXT[:20_000], mtp=True, max_chunks=3).save(tmp_path / "matrix.gguf")
    run_tool(
        engine_tool("llama-quantize"), "--imatrix", tmp_path / "matrix.gguf",
        "--tensor-type", r"^blk\.3\.=iq2_xxs", model, tmp_path / "q.gguf", "Q8_0",
    )  # fmt: skip
    expected = imatrix.evaluate(
        tmp_path / "q.gguf", TEXT[20_000:28_000], reference=model, max_chunks=2, n_threads=1
    )
    data = json.loads((out / "quality.json").read_text("utf-8"))
    rows = {
        (row["data"], row["calibration_tokens"], row.get("held_out")): row
        for row in data["cells"]
        if row["part"] == "head"
    }
    # collected data of two sizes and flat data on both texts, borrowed data on the first, and no
    # data
    assert len(rows) == 4 + 2 + 1 + 1
    assert expected.head_nll is not None
    assert expected.head_kl is not None
    ours = rows["ours", 3 * 512, "in-domain"]
    assert ours["bits"] == pytest.approx(2.0625)  # 66 bytes a block of 256 (block_iq2_xxs)
    assert ours["figures"]["nll"][0] == pytest.approx(expected.head_nll.value, rel=1e-5)
    assert ours["figures"]["kl"][0] == pytest.approx(expected.head_kl.value, rel=1e-4)
    assert ours["gain_of_collected"]["kl"] == [0, 0, 0]
    flat = rows["flat", 3 * 512, "in-domain"]
    assert flat["gain_of_collected"]["nll"][0] == pytest.approx(
        flat["figures"]["nll"][0] - ours["figures"]["nll"][0], abs=1e-4
    )
    assert rows["none", 3 * 512, None]["refused"].startswith(
        "random.gguf: cannot quantize to Q8_0: Missing importance matrix for tensor blk.3."
    )

    report = (out / "quality.md").read_text("utf-8")
    assert f"| IQ2_XXS | 2.06 | collected | {expected.head_nll.value:.4f} |" in report
    assert "| IQ2_XXS | 2.06 | none | refused |" in report
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")

    # the second time everything is there already
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    again, _ = quality_cells.run(study, wanted, folder, workers=1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == before
    cell = Cell("head", "IQ2_XXS", "ours", "package", 3)
    assert np.array_equal(
        again[cell].evaluations["other"].known, made[cell].evaluations["other"].known
    )
