"""compare_matrices and `imatrix diff`, compared with SciPy and with cases whose figures are
known."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.spatial.distance import cosine as cosine_distance
from scipy.stats import ConstantInputWarning, spearmanr

import imatrix
from imatrix import Entry, ImportanceMatrix, cli, compare_matrices

# Both sides compute in float64, in different orders: a few roundings of 2^-53 for each of n_in
# values.
EXACT = 1e-12

Q = "blk.0.attn_q.weight"


def one(entry: Entry) -> ImportanceMatrix:
    return ImportanceMatrix({Q: entry})


def means(values: Any, rows: int = 1) -> Entry:
    array = np.atleast_2d(np.asarray(values, np.float64))
    return Entry(array * rows, [rows])


class TestFigures:
    @given(
        st.integers(2, 12).flatmap(
            lambda n: st.tuples(
                *[
                    arrays(
                        np.float64,
                        (3, n),
                        # few values, so that there are ties
                        elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0, 40.0, 1e-3]),
                    )
                ]
                * 2
            )
        )
    )
    def test_as_scipy(self, pair: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
        a, b = pair
        found = compare_matrices(one(Entry(a * 4, [4] * 3)), one(Entry(b * 2, [2] * 3)))[Q]
        for e in range(3):
            if a[e].any() and b[e].any():
                expected = 1 - cosine_distance(a[e], b[e])
            else:
                expected = float(not a[e].any() and not b[e].any())
            assert found.cosine[e] == pytest.approx(expected, abs=EXACT)
            with np.errstate(divide="ignore", invalid="ignore"):
                away = np.linalg.norm(a[e] - b[e]) / np.linalg.norm(a[e])
            expected = 0.0 if np.isnan(away) else away
            assert found.relative_l2[e] == pytest.approx(expected, rel=EXACT, abs=EXACT)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConstantInputWarning)
                rank = spearmanr(a[e], b[e]).statistic
            assert found.rank_correlation[e] == pytest.approx(rank, abs=EXACT, nan_ok=True)

    def test_many_channels(self) -> None:
        rng = np.random.default_rng(3)
        a = rng.gamma(0.3, size=(5, 4096))
        b = a * np.exp(0.2 * rng.standard_normal(a.shape))
        found = compare_matrices(one(means(a)), one(means(b, rows=8)))[Q]
        for e in range(5):
            assert found.cosine[e] == pytest.approx(1 - cosine_distance(a[e], b[e]), abs=EXACT)
            assert found.rank_correlation[e] == pytest.approx(
                spearmanr(a[e], b[e]).statistic, abs=EXACT
            )

    def test_the_same(self) -> None:
        values = np.random.default_rng(0).gamma(1.0, size=100)
        found = compare_matrices(one(means(values)), one(means(values)))
        weight = found[Q]
        assert (weight.worst_cosine, weight.worst_relative_l2) == (1.0, 0.0)
        assert weight.worst_rank_correlation == pytest.approx(1.0, abs=EXACT)
        assert found.same()
        # twice the text, the same means
        assert compare_matrices(one(means(values)), one(means(values, rows=2))).same()

    @pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
    def test_scaled_and_permuted(self, size: float) -> None:
        values = np.array([1.0, 2.0, 3.0, 4.0]) * size
        scaled = compare_matrices(one(means(values)), one(means(values * 3)))[Q]
        assert scaled.worst_cosine == pytest.approx(1.0, abs=EXACT)
        assert scaled.worst_relative_l2 == pytest.approx(2.0)
        assert scaled.worst_rank_correlation == pytest.approx(1.0, abs=EXACT)
        turned = compare_matrices(one(means(values)), one(means(values[::-1])))[Q]
        assert turned.worst_cosine == pytest.approx(20 / 30)  # 4 + 6 + 6 + 4 of 1 + 4 + 9 + 16
        assert turned.worst_relative_l2 == pytest.approx((20 / 30) ** 0.5)  # 9 + 1 + 1 + 9
        assert turned.worst_rank_correlation == pytest.approx(-1.0)

    def test_all_zero_and_all_equal(self) -> None:
        zero, some, flat = ([0.0, 0.0], [1.0, 2.0], [5.0, 5.0])
        for a, b, expected in (
            (zero, zero, (1.0, 0.0, None)),
            (some, zero, (0.0, 1.0, None)),
            (zero, some, (0.0, np.inf, None)),
            (flat, some, (15 / np.sqrt(50 * 5), 5 / np.sqrt(50), None)),
            ([7.0], [7.0], (1.0, 0.0, None)),
        ):
            found = compare_matrices(one(means(a)), one(means(b)))[Q]
            assert found.worst_cosine == pytest.approx(expected[0])
            assert found.worst_relative_l2 == pytest.approx(expected[1])
            assert found.worst_rank_correlation is expected[2]


class TestExperts:
    A = Entry([[2.0, 4.0], [3.0, 3.0], [0.0, 0.0], [8.0, 0.0]], [2, 3, 0, 4])
    B = Entry([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 6.0]], [1, 0, 0, 2])

    def test_those_with_data_in_both(self) -> None:
        found = compare_matrices(one(self.A), one(self.B))
        weight = found[Q]
        assert weight.cosine.tolist() == pytest.approx([1.0, np.nan, np.nan, 0.0], nan_ok=True)
        assert (weight.rows_a, weight.rows_b) == (9, 3)
        assert (weight.unseen_a, weight.unseen_b, weight.n_compared) == (1, 2, 2)
        assert weight.worst_matrix == 3
        assert weight.worst_relative_l2 == pytest.approx(np.sqrt(2**2 + 3**2) / 2)
        assert not found.same(tolerance=1e9)  # expert 1 has data in one matrix only
        with pytest.raises(ValueError, match="read-only"):
            weight.cosine[0] = 0.0

    def test_nothing_to_compare(self) -> None:
        nothing = Entry([[0.0, 0.0]], [0])
        found = compare_matrices(one(means([1.0, 2.0])), one(nothing))[Q]
        assert (found.n_compared, found.worst_cosine, found.worst_matrix) == (0, None, None)
        assert compare_matrices(one(nothing), one(nothing)).same()

    def test_one_count_for_all_slices(self) -> None:
        a = Entry([[2.0, 4.0], [6.0, 2.0]], [2])
        b = Entry([[2.0, 4.0], [6.0, 2.0]], [2, 2])
        assert compare_matrices(one(a), one(b)).same()

    def test_the_old_format_beside_gguf(self, tmp_path: Path) -> None:
        for form in ("gguf", "dat"):
            matrix = one(Entry([[2.0, 4.0], [6.0, 3.0]], [512, 1024]))
            matrix.save(tmp_path / f"m.{form}", format=form)  # type: ignore[arg-type]
        found = compare_matrices(tmp_path / "m.gguf", tmp_path / "m.dat")
        assert found.same(tolerance=2**-22)  # means are multiplied and divided in float32
        assert (found[Q].n_mat, found[Q].n_in) == (2, 2)
        turned = compare_matrices(tmp_path / "m.dat", tmp_path / "m.gguf")
        assert (turned[Q].n_mat, turned[Q].n_in) == (2, 2)


def matrix(**kinds: Entry) -> ImportanceMatrix:
    """A trunk of one block and a head in block 1."""
    head = {"blk.1.nextn.eh_proj.weight": means([1.0, 1.0])}
    return ImportanceMatrix({f"blk.0.{kind}.weight": e for kind, e in kinds.items()} | head)


A = matrix(
    attn_q=means([1.0, 2.0]),
    attn_k=means([1.0, 2.0]),
    ffn_up=means([1.0, 2.0, 3.0]),
    ffn_down=means([1.0, 2.0]),
    ffn_up_exps=Entry([[1.0, 1.0], [1.0, 3.0]], [1, 1]),
)
B = matrix(
    attn_q=means([1.0, 2.0]),
    attn_k=means([2.0, 1.0]),
    ffn_up=means([1.0, 2.0]),
    ffn_gate=means([1.0, 2.0]),
    ffn_up_exps=Entry([[1.0, 1.0], [0.0, 0.0]], [1, 0]),
)


def test_the_worst_first_and_what_is_in_one_only() -> None:
    found = compare_matrices(A, B)
    assert [weight.name for weight in found.weights] == [
        "blk.0.attn_k.weight",
        "blk.0.attn_q.weight",
        "blk.0.ffn_up_exps.weight",
        "blk.1.nextn.eh_proj.weight",
    ]
    assert [weight.name for weight in found.head] == ["blk.1.nextn.eh_proj.weight"]
    assert len(found.trunk) == 3
    assert found.only_a == ("blk.0.ffn_down.weight",)
    assert found.only_b == ("blk.0.ffn_gate.weight",)
    assert found.mismatched == {"blk.0.ffn_up.weight": ((1, 3), (1, 2))}
    assert not found.same(tolerance=1e9)
    with pytest.raises(KeyError):
        found["blk.0.ffn_up.weight"]


class TestCommand:
    Main = Callable[..., tuple[int, str, str]]

    @pytest.fixture
    @staticmethod
    def main(capsys: pytest.CaptureFixture[str]) -> TestCommand.Main:
        def run(*args: Any) -> tuple[int, str, str]:
            status = cli.main(["diff", *map(str, args)])
            done = capsys.readouterr()
            return status, done.out, done.err

        return run

    @pytest.fixture
    @staticmethod
    def files(tmp_path: Path) -> tuple[Path, Path]:
        for name, each in (("a", A), ("b", B)):
            each.save(tmp_path / f"{name}.gguf")
        return tmp_path / "a.gguf", tmp_path / "b.gguf"

    def test_tables(self, files: tuple[Path, Path], main: Main) -> None:
        status, out, err = main(*files)
        assert (status, err) == (0, "")
        lines = [line.split() for line in out.splitlines()]
        # 4 of 5 in the cosine, 2 of 5 in the distance squared, ranks turned round
        assert ["blk.0.attn_k.weight", "0.8000", "0.632", "-1.0000", "1", "1"] in lines
        # B knows nothing about its second expert, and the first has no ranks
        assert ["blk.0.ffn_up_exps.weight", "1.0000", "0", "0", "2", "1", "1"] in lines
        assert "trunk: 3 weights in both, 2 differ; cosine 0.8000 at worst" in out
        assert "head: 1 weight in both, 0 differ" in out
        assert "attn_q" not in out  # the same in both
        for told in (
            "only in A: 1 weight\n  blk.0.ffn_down.weight",
            "only in B: 1 weight\n  blk.0.ffn_gate.weight",
            "of different sizes: 1 weight\n  blk.0.ffn_up.weight [1, 3] and [1, 2]",
        ):
            assert told in out
        assert "attn_q" in main(*files, "--all")[1]

    def test_json(self, files: tuple[Path, Path], main: Main) -> None:
        data = json.loads(main(*files, "--json")[1])
        assert (data["same"], data["only_a"]) == (False, ["blk.0.ffn_down.weight"])
        assert data["mismatched"] == {"blk.0.ffn_up.weight": {"a": [1, 3], "b": [1, 2]}}
        by_name = {weight["name"]: weight for weight in data["weights"]}
        assert by_name["blk.0.attn_k.weight"]["cosine"] == pytest.approx(0.8)
        assert by_name["blk.0.ffn_up_exps.weight"]["matrices"]["cosine"] == [1.0, None]
        assert by_name["blk.1.nextn.eh_proj.weight"]["part"] == "head"

    def test_csv(self, files: tuple[Path, Path], main: Main) -> None:
        rows = list(csv.DictReader(io.StringIO(main(*files, "--csv")[1])))
        assert [(row["name"], row["note"]) for row in rows[-3:]] == [
            ("blk.0.ffn_down.weight", "only in a"),
            ("blk.0.ffn_gate.weight", "only in b"),
            ("blk.0.ffn_up.weight", "different size"),
        ]
        assert float(rows[0]["cosine"]) == pytest.approx(0.8)
        assert (rows[0]["name"], rows[0]["part"]) == ("blk.0.attn_k.weight", "trunk")

    def test_exit_status(self, files: tuple[Path, Path], main: Main, tmp_path: Path) -> None:
        a, b = files
        assert main(a, b, "--exit-code")[0] == 1
        status, out, _ = main(a, a, "--exit-code")
        assert (status, out.splitlines()[-1]) == (0, "the same to a quantizer")
        imatrix.convert(a, old := tmp_path / "a.dat")
        assert main(a, old, "--exit-code", "--tolerance", "1e-6")[0] == 0
        for arguments in ((a,), (a, tmp_path / "none"), (a, __file__), (a, b, "--tolerance", "x")):
            assert main(*arguments)[0] == 2
