"""benchmarks/recipes.py: the errors of the weights, the choice by them, and a study of two mixtures."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from helpers.running import TEXT

import imatrix

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import recipe_cells
import recipe_errors
import recipe_report
from recipe_cells import MIXTURE, Made, Results, Study, Text, Way


def test_errors_relative_to_rows() -> None:
    rng = np.random.default_rng(5)
    weights, lost = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4)) / 9
    importance, mean = rng.uniform(1, 2, (2, 1, 4)), rng.normal(size=(2, 1, 4)) / 2
    plain = shifted = cosine = 0.0
    for expert in range(2):
        of, a = importance[expert, 0], mean[expert, 0]
        for row in range(3):
            w, e = weights[expert, row], lost[expert, row]
            plain += sum(of * e * e) / sum(of * w * w)
            spread = np.maximum(of - a * a, 0)
            shifted += (sum(of * e * e) + sum(a * e) ** 2) / (sum(spread * w * w) + sum(a * w) ** 2)
            q = w - e
            cosine += 1 - sum(of * w * q) / math.sqrt(sum(of * w * w) * sum(of * q * q))
    assert recipe_errors.relative(weights, lost, importance) == pytest.approx(plain)
    assert recipe_errors.relative(weights, lost, importance, mean) == pytest.approx(shifted)
    assert recipe_errors.angle(weights, weights - lost, importance) == pytest.approx(cosine)


def test_a_hundredth_of_many_rows_is_left_out() -> None:
    weights = np.ones((1, 200, 1))
    lost = np.sqrt(np.arange(200.0)).reshape(1, 200, 1)  # of row n the relative error is n
    found = recipe_errors.relative(weights, lost, np.ones((1, 1, 1)))
    assert found == pytest.approx(np.arange(2, 198).mean() * 200)


def test_factors_by_kind() -> None:
    found = recipe_errors.by_kind(
        {
            name: {"q4_k": {"squared": 7.0, "relative": 3.0, "pull request": 2.0}}
            for name in ("blk.0.ffn_down.weight", "blk.0.attn_v.weight", "blk.0.ffn_up.weight")
        },
        {"q4_k": 4.5},
        whole=3.0,
        tied=None,
    )
    kept = {"squared": 7.0, "relative": 3.0}
    low = 1 + 0.5 * 2 ** (3 - 4.5)
    assert found["blk.0.ffn_down.weight"]["q4_k"] == {**kept, "pull request": 12.0}
    assert found["blk.0.attn_v.weight"]["q4_k"] == {**kept, "pull request": 2 * 1.25 * low}
    assert found["blk.0.ffn_up.weight"]["q4_k"] == {**kept, "pull request": 2.0}


def test_errors_of_a_model(model: Path, head_matrix: Path, tmp_path: Path) -> None:
    matrix = imatrix.ImportanceMatrix.load(head_matrix)
    names = ["blk.0.ffn_down.weight", "token_embd.weight", "output.weight"]
    found = recipe_errors.errors(model, matrix, names, ["q4_k", "iq2_xxs"], tmp_path)
    # embeddings and output have no data, without which that type cannot be
    assert {name: list(types) for name, types in found.items()} == {
        "blk.0.ffn_down.weight": ["q4_k", "iq2_xxs"],
        "token_embd.weight": ["q4_k"],
        "output.weight": ["q4_k"],
    }
    imatrix.quantize(model, tmp_path / "q.gguf", "Q4_K_S", imatrix=matrix, pure=True)
    values = {}
    for path in (model, tmp_path / "q.gguf"):
        [tensor] = [t for t in gguf.GGUFReader(path).tensors if t.name == names[0]]
        values[path] = dequantize(tensor.data, tensor.tensor_type)
    apart = values[model].astype(np.float64) - values[tmp_path / "q.gguf"]
    expected = (matrix.importance(names[0]) * apart**2).sum()
    assert found[names[0]]["q4_k"]["squared"] == pytest.approx(expected)


def evaluation(kl: list[float], model: str) -> imatrix.Evaluation:
    """Of 8 chunks with the KL divergences given, two positions each."""
    rows = imatrix.Predictions(
        np.ones(16), np.zeros(16, np.int32), np.ones(16), np.zeros(16, np.int32), np.repeat(kl, 2)
    )
    return imatrix.Evaluation(
        model=model, mtp_model=None, reference="r", n_ctx=8, n_vocab=10, digest="",
        chunk=np.repeat(np.arange(8, dtype=np.int32), 2),
        position=np.tile(np.arange(2, dtype=np.int32), 8), trunk=rows, head=None, depth=0,
        known=np.empty(0, np.int8), accepted=np.empty(0, np.int8),
    )  # fmt: skip


def test_bytes_at_equal_kl_goals_and_losses() -> None:
    text = Text("in-domain", "")
    study = Study(
        model=Path("m"), calibration="", measured="", tests=(text,), mixtures=("A", "B"),
        seeds=(1,), efforts=("quick", "standard"), baselines=(),
    )  # fmt: skip
    kl = {
        (MIXTURE, "A"): (1000, 0.4), (MIXTURE, "B"): (2000, 0.1),
        (Way("recipe", "standard", 1), "A"): (1000, 0.2),
        (Way("recipe", "standard", 1), "B"): (2000, 0.05),
        (Way("recipe", "quick", 1), "A"): (1000, 0.5),
        (Way("recipe", "quick", 1), "B"): (2000, 0.1),
    }  # fmt: skip
    noise = np.array([0.9, 1.1] * 4)
    made = {
        key: Made(*key, {}, size, {"in-domain": evaluation(list(value * noise), "q")})
        for key, (size, value) in kl.items()
    }
    view = recipe_report.View(study, Results(made, {}, {}), text)
    assert view.main == "standard"
    # 0.1 lies at half of the way from 0.2 to 0.05 on a logarithmic scale: 1500 of 2000 bytes
    assert view.saved("B") == pytest.approx(0.25)
    assert view.saved("A") is None
    assert recipe_report.goal(view) == (
        "- in-domain: median 0.50 (reached: at most 0.60), largest 0.50 (reached: at most 0.85); "
        "smallest 0.50."
    )
    assert recipe_report.losses(view) == [
        "- in-domain, quick, seed 1: worse than A, 1.25 [1.25, 1.25].",
        "- in-domain, quick, seed 1: no better for sure than B, 1.00 [1.00, 1.00].",
    ]


@pytest.mark.slow
def test_a_study(model: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "cache", tmp_path / "out"
    out.mkdir()
    trunk = tmp_path / "trunk.gguf"
    imatrix.drop_mtp(model, trunk)
    study = Study(
        model=trunk,
        calibration=TEXT[:4_000],
        measured=TEXT[20_000:24_000],
        tests=(Text("in-domain", TEXT[8_000:12_000], 2), Text("out-of-domain", TEXT[30_000:], 2)),
        mixtures=("Q4_K_M",),
        types=("q3_k", "q4_k", "q6_k"),
        seeds=(4,),
        efforts=("quick",),
        baselines=("squared",),
        n_ctx=64,
    )
    said: list[str] = []
    results = recipe_cells.run(study, folder, workers=1, told=said.append)
    recipe_report.write([("shipped", study, results)], out)

    # what the public functions give
    with imatrix.Collector(trunk, n_ctx=64, n_threads=1) as collector:
        collector.run(study.calibration).save(tmp_path / "matrix.gguf")
    done = imatrix.quantize(trunk, tmp_path / "q.gguf", "Q4_K_M", imatrix=tmp_path / "matrix.gguf")
    expected = imatrix.evaluate(
        done.path, study.tests[0].content, reference=trunk, n_ctx=64, max_chunks=2, n_threads=1
    )
    assert expected.kl is not None
    data = json.loads((out / "recipes.json").read_text("utf-8"))["shipped"]
    rows = {(row["way"], row["mixture"]): row for row in data["made"] if row["text"] == "in-domain"}
    assert len(rows) == 3
    assert rows["mixture", "Q4_K_M"]["kl"]["value"] == pytest.approx(expected.kl.value, rel=1e-4)
    for way, mixture in rows:
        assert rows[way, mixture]["bytes"] <= rows["mixture", mixture]["bytes"]
    report = (out / "recipes.md").read_text("utf-8")
    assert re.search(r"^\| Q4_K_M \| \d\.\d\d \| ", report, re.MULTILINE)
    assert (out / "recipes.png").read_bytes().startswith(b"\x89PNG")

    # the second time everything is there already
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}
    recipe_cells.run(study, folder, workers=1, told=said.append)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == before
