"""Pictures: what is drawn is compared with NumPy on the raw sums and counts, as gguf-py reads
them."""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import gguf
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from imatrix import Entry, ImportanceMatrix, pictures
from imatrix.cli.program import main

Raw = dict[str, tuple[np.ndarray, np.ndarray]]

N_EXPERTS = 6
HEAD = 3

# GGUF keeps sums in float32, and the values below are made from these too: only the order of the
# float64 operations differs.
EXACT = 1e-12


def made(seed: int = 0) -> ImportanceMatrix:
    """Three trunk blocks and a head; experts from block 1 on, and an example of every case."""
    rng = np.random.default_rng(seed)
    entries = {}

    def add(name: str, n_in: int, counts: list[int], n_mat: int = 1) -> None:
        mean = np.exp(rng.normal(0, 1.5, (n_mat, n_in)))
        rows = np.asarray(counts)
        entries[name] = Entry((mean * rows[:, None]).astype(np.float32), rows, name=name)

    for block in range(4):
        for kind in ("attn_q", "attn_k"):
            add(f"blk.{block}.{kind}.weight", 48, [900 + block])
        if block == 0:
            add("blk.0.ffn_down.weight", 130, [900])
        else:
            rows = [40 * block + 3, 700, 0 if block == 1 else 9, 500, 50, 90]
            add(f"blk.{block}.ffn_down_exps.weight", 32, rows, N_EXPERTS)
            # the weights of a block may disagree, since files are merged
            add(f"blk.{block}.ffn_up_exps.weight", 48, [*rows[:-1], rows[-1] + 5], N_EXPERTS)
    add("blk.3.nextn.eh_proj.weight", 96, [903])
    add("output.weight", 48, [77])
    entries["blk.2.attn_k.weight"] = Entry(np.zeros((1, 48)), [0])
    entries["blk.1.attn_k.weight"] = Entry(np.zeros((1, 48)), [30])
    return ImportanceMatrix(entries, chunk_count=2, chunk_size=512)


def raw(path: Path) -> Raw:
    """Sums [n_mat, n_in] and counts [n] by weight, read with gguf-py."""
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    return {
        name.removesuffix(".in_sum2"): (
            data.astype(np.float64),
            tensors[name.removesuffix("in_sum2") + "counts"].astype(np.float64).reshape(-1),
        )
        for name, data in tensors.items()
        if name.endswith(".in_sum2")
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two matrices; the second one lacks the head and one weight, and has another shape of one
    weight."""
    folder = tmp_path_factory.mktemp("plot")
    made().save(folder / "one.gguf")
    other = dict(made(seed=1))
    other = {
        name: entry
        for name, entry in other.items()
        if not name.startswith("blk.3.") and name != "blk.0.attn_q.weight"
    }
    other["blk.0.attn_k.weight"] = Entry(np.ones((1, 64)), [5])
    other["token_embd.weight"] = Entry(np.ones((1, 8)), [5])
    ImportanceMatrix(other).save(folder / "two.gguf")
    return folder / "one.gguf", folder / "two.gguf"


@pytest.fixture(scope="module")
def matrix(files: tuple[Path, Path]) -> ImportanceMatrix:
    return ImportanceMatrix.load(files[0])


@pytest.fixture(scope="module")
def data(files: tuple[Path, Path]) -> Raw:
    return raw(files[0])


def axes_of(figure: Figure, label: str) -> Axes:
    (found,) = [axes for axes in figure.axes if axes.get_label() == label]
    return found


def labels_of(axes: Axes, axis: str) -> dict[str, int]:
    """Position on the axis, by tick label."""
    ticks = axes.get_xticks() if axis == "x" else axes.get_yticks()
    texts = axes.get_xticklabels() if axis == "x" else axes.get_yticklabels()
    return {text.get_text(): int(at) for at, text in zip(ticks, texts, strict=True)}


def cells(figure: Figure, prefix: str = "") -> dict[str, float]:
    """The values of a heat map, by the weight that the labels name."""
    found: dict[str, float] = {}
    parts = [
        axes
        for axes in figure.axes
        if axes.get_label() in {prefix + part for part in ("trunk", "head", "no block")}
    ]
    rows: dict[str, int] = {}
    for axes in figure.axes:  # labels are at the leftmost of the axes in one row
        rows = rows or labels_of(axes, "y")
    for axes in parts:
        array = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
        columns = labels_of(axes, "x") or {"": 0}
        for (kind, row), (block, column) in itertools.product(rows.items(), columns.items()):
            if np.isfinite(array[row, column]):
                stem = f"blk.{block}.{kind}" if block else kind
                found[f"{stem}.weight"] = float(array[row, column])
    return found


def hatched(figure: Figure, prefix: str = "") -> dict[str, str]:
    """The hatch of each hatched cell, by weight."""
    rows: dict[str, int] = {}
    for axes in figure.axes:
        rows = rows or labels_of(axes, "y")
    names = {row: kind for kind, row in rows.items()}
    found = {}
    for axes in figure.axes:
        if not re.fullmatch(prefix + "(trunk|head|no block)", str(axes.get_label())):
            continue
        columns = {column: block for block, column in labels_of(axes, "x").items()} or {0: ""}
        for patch in axes.patches:
            if not patch.get_hatch():
                continue
            x, y = patch.get_xy()
            for n in range(round(patch.get_width())):
                block = columns[round(x + 0.5) + n]
                kind = names[round(y + 0.5)]
                stem = f"blk.{block}.{kind}" if block else kind
                found[f"{stem}.weight"] = patch.get_hatch()[0]
    return found


def importance(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[matrices that have rows, n_in]"""
    seen = np.broadcast_to(counts, len(sums)) > 0
    return sums[seen] / np.broadcast_to(counts, len(sums))[seen, None]


def top(mean: np.ndarray) -> float:
    k = int(np.ceil(mean.shape[1] / 100))
    return float(np.mean([np.sort(row)[::-1][:k].sum() / row.sum() for row in mean]))


EXPECTED = {
    "mean": lambda sums, counts: importance(sums, counts).mean(),
    "top": lambda sums, counts: top(importance(sums, counts)),
    "peak": lambda sums, counts: max(
        row.max() / row.mean() for row in importance(sums, counts) if row.any()
    ),
    "coverage": lambda sums, counts: 100 * np.mean(counts > 0),
    "rows": lambda sums, counts: counts[counts > 0].min(),
}


class TestLayers:
    @pytest.mark.parametrize("statistic", EXPECTED)
    def test_values(self, matrix: ImportanceMatrix, data: Raw, statistic: str) -> None:
        figure = pictures.layers(matrix, statistic=statistic)
        without = {"blk.2.attn_k.weight"}
        if statistic not in ("coverage", "rows"):
            without |= {"blk.1.attn_k.weight"}
        expected = {
            name: EXPECTED[statistic](*found) for name, found in data.items() if name not in without
        }
        assert cells(figure) == pytest.approx(expected, rel=EXACT)
        assert set(hatched(figure)) == without
        assert hatched(figure)["blk.2.attn_k.weight"] == "x"  # no rows
        assert hatched(figure).get("blk.1.attn_k.weight", ".") == "."  # zeros

    def test_order(self, matrix: ImportanceMatrix) -> None:
        """Kinds are in the order in which a block runs them, and the head's blocks are apart from
        the trunk's."""
        figure = pictures.layers(matrix)
        assert list(labels_of(axes_of(figure, "trunk"), "y")) == [
            "attn_q",
            "attn_k",
            "ffn_down",
            "ffn_up_exps",
            "ffn_down_exps",
            "nextn.eh_proj",
            "output",
        ]
        trunk, head, rest = (axes_of(figure, label) for label in ("trunk", "head", "no block"))
        assert list(labels_of(trunk, "x")) == ["0", "1", "2"]
        assert list(labels_of(head, "x")) == ["3"]
        assert trunk.get_position().x1 < head.get_position().x0
        assert head.get_position().x1 < rest.get_position().x0

    def test_one_scale(self, matrix: ImportanceMatrix, data: Raw) -> None:
        """All parts have the same colours, from the least to the largest value, or over a power of
        ten if these are nearer to each other."""
        figure = pictures.layers(matrix)
        norms = {id(axes_of(figure, part).images[0].norm) for part in ("trunk", "head", "no block")}
        assert len(norms) == 1
        norm = axes_of(figure, "trunk").images[0].norm
        means = [
            importance(*found).mean()
            for found in data.values()
            if found[1].any() and found[0].any()
        ]
        wider = max(1.0, 10 * min(means) / max(means)) ** 0.5
        assert norm.vmin == pytest.approx(min(means) / wider)
        assert norm.vmax == pytest.approx(max(means) * wider)

    def test_skipped_block(self) -> None:
        """A block that the matrix lacks is a gap; it is not missing from the axis."""
        entry = Entry(np.ones((1, 4)), [1])
        matrix = ImportanceMatrix({f"blk.{n}.attn_q.weight": entry for n in (0, 2, 3)})
        figure = pictures.layers(matrix)
        assert list(labels_of(axes_of(figure, "trunk"), "x")) == ["0", "1", "2", "3"]
        assert "blk.1.attn_q.weight" not in cells(figure)

    def test_names_that_differ_in_their_ending(self) -> None:
        entry, other = Entry(np.ones((1, 4)), [1]), Entry(np.full((1, 4), 3.0), [1])
        matrix = ImportanceMatrix({"blk.0.attn_q.weight": entry, "blk.0.attn_q": other})
        axes = axes_of(pictures.layers(matrix), "trunk")
        rows = labels_of(axes, "y")
        array = axes.images[0].get_array()
        assert array[rows["attn_q.weight"], 0] == 1
        assert array[rows["attn_q"], 0] == 3


class TestExperts:
    def rows(self, data: Raw) -> np.ndarray:
        """[n_experts, n_blocks]: the fewest rows of the block's weights."""
        return np.stack(
            [
                np.minimum(
                    data[f"blk.{block}.ffn_down_exps.weight"][1],
                    data[f"blk.{block}.ffn_up_exps.weight"][1],
                )
                for block in (1, 2, HEAD)
            ],
            axis=1,
        )

    def test_values(self, matrix: ImportanceMatrix, data: Raw) -> None:
        figure = pictures.experts(matrix)
        trunk, head = axes_of(figure, "trunk"), axes_of(figure, "head")
        drawn = np.ma.concatenate([trunk.images[0].get_array(), head.images[0].get_array()], axis=1)
        expected = self.rows(data)
        np.testing.assert_array_equal(np.ma.filled(drawn, 0), expected)
        (unseen,) = [line for line in trunk.lines if line.get_label() == "unseen"]
        assert list(zip(*unseen.get_data(), strict=True)) == [(0, 2)]  # block 1, expert 2
        assert [text.get_text() for text in head.texts] == [f"{n:.0f}" for n in expected[:, 2]]

    def test_thinnest(self, matrix: ImportanceMatrix) -> None:
        """The experts with 9 rows in block 2 and the head, then the one with 43 in block 1."""
        figure = pictures.experts(matrix)
        said = " ".join(text.get_text() for text in figure.texts)
        assert "18 experts in 3 blocks: 1 saw no rows (blk.1 expert 2), 2 saw fewer" in said
        assert "Fewest: blk.2 expert 2 (9), blk.3 expert 2 (9), blk.1 expert 0 (43)" in said
        circles = {
            part: [
                (round(x), round(y))
                for line in axes_of(figure, part).lines
                if line.get_label() == "thinnest"
                for x, y in zip(*line.get_data(), strict=True)
            ]
            for part in ("trunk", "head")
        }
        assert circles == {"trunk": [(0, 0), (1, 2)], "head": [(0, 2)]}

    def test_spread(self, matrix: ImportanceMatrix, data: Raw) -> None:
        figure = pictures.experts(matrix)
        axes = axes_of(figure, "trunk rows")
        drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
        seen = [column[column > 0] for column in self.rows(data)[:, :2].T]
        np.testing.assert_array_equal(drawn["fewest"], [each.min() for each in seen])
        np.testing.assert_array_equal(drawn["median"], [np.median(each) for each in seen])
        np.testing.assert_array_equal(drawn["most"], [each.max() for each in seen])

    def test_no_expert_is_lost(self) -> None:
        """512 experts get less than two pixels each; an expert without rows is still visible."""
        rng = np.random.default_rng(0)
        counts = rng.integers(1, 100, (2, 512))
        counts[1, 300] = 0
        entries = {
            f"blk.{block}.ffn_up_exps.weight": Entry(np.ones((512, 4)) * c[:, None], c)
            for block, c in enumerate(counts)
        }
        figure = pictures.experts(ImportanceMatrix(entries))
        # 100 pixels per inch, at which Figure works
        picture = np.asarray(Image.open(io.BytesIO(pictures.png(figure, dpi=100))).convert("RGB"))
        axes = axes_of(figure, "trunk")
        x, y = axes.transData.transform((1, 300))
        found = picture[picture.shape[0] - round(y) - 2 : picture.shape[0] - round(y) + 2]
        found = found[:, round(x) - 2 : round(x) + 3]
        assert (found.min(axis=2) > 200).any(), "nothing white where the expert is"

    def test_of_other_numbers(self) -> None:
        """A block with fewer experts shows none at the places of the others."""
        entries = {
            f"blk.{n}.ffn_up_exps.weight": Entry(np.ones((k, 4)), np.arange(1, k + 1))
            for n, k in enumerate((2, 4))
        }
        figure = pictures.experts(ImportanceMatrix(entries))
        drawn = np.ma.filled(axes_of(figure, "trunk").images[0].get_array(), 0)
        np.testing.assert_array_equal(drawn, [[1, 1], [2, 2], [0, 3], [0, 4]])
        assert "no such expert" in [text.get_text() for text in figure.texts]

    def test_none(self) -> None:
        matrix = ImportanceMatrix({"blk.0.attn_q.weight": Entry(np.ones((1, 4)), [1])})
        with pytest.raises(ValueError, match=r"no experts to draw.*\.dat file"):
            pictures.experts(matrix)


class TestChannels:
    def test_dense(self, matrix: ImportanceMatrix, data: Raw) -> None:
        name = "blk.0.ffn_down.weight"
        figure = pictures.channels(matrix, "blk.0.ffn_down", heaviest=3)
        mean = importance(*data[name])[0]
        axes = axes_of(figure, f"{name} channels")
        x, y = axes.lines[0].get_data()
        np.testing.assert_array_equal(x, np.arange(130))
        np.testing.assert_allclose(y, mean, rtol=EXACT)
        order = np.argsort(-mean)
        marks = axes.lines[1].get_xdata()
        assert set(marks) == set(order[:3])
        texts = [text.get_text() for text in figure.texts]
        for channel in order[:3]:
            at = texts.index(f"#{channel}")
            percent = float(texts[at + 1].split()[0])
            # given with two digits
            assert percent == pytest.approx(100 * mean[channel] / mean.sum(), rel=0.06)
        assert not any(f"#{channel}" in texts for channel in order[3:])
        share = 100 * np.sort(mean)[-2:].sum() / mean.sum()
        assert any(f"heaviest 1 % (2 channels) hold {share:.0f} % of the sum" in t for t in texts)

    def test_sorted(self, matrix: ImportanceMatrix, data: Raw) -> None:
        name = "blk.0.ffn_down.weight"
        axes = axes_of(pictures.channels(matrix, name), f"{name} sorted")
        rank, value = axes.lines[1].get_data()
        ordered = np.sort(importance(*data[name])[0])[::-1]
        np.testing.assert_allclose(value, ordered[rank - 1], rtol=EXACT)
        assert (rank[0], rank[-1]) == (1, 130)
        assert axes.lines[0].get_ydata()[0] == pytest.approx(ordered.mean())

    def test_experts(self, matrix: ImportanceMatrix, data: Raw) -> None:
        """The pooled values, one expert, and a map of all experts."""
        name = "blk.1.ffn_down_exps.weight"
        sums, counts = data[name]
        pooled = axes_of(pictures.channels(matrix, name), f"{name} channels")
        np.testing.assert_allclose(
            pooled.lines[0].get_ydata(), sums.sum(axis=0) / counts.sum(), rtol=EXACT
        )
        one = axes_of(pictures.channels(matrix, name, expert=4), f"{name} channels")
        np.testing.assert_allclose(one.lines[0].get_ydata(), sums[4] / counts[4], rtol=EXACT)
        each = axes_of(pictures.channels(matrix, name, expert="each"), f"{name} experts")
        drawn = np.ma.filled(each.images[0].get_array(), np.nan)
        assert np.isnan(drawn[2]).all()
        seen = counts > 0
        np.testing.assert_allclose(drawn[seen], sums[seen] / counts[seen, None], rtol=EXACT)

    def test_many_channels(self) -> None:
        """Of 2000 channels three share a column: it shows the least and the largest, so that none
        is lost."""
        rng = np.random.default_rng(3)
        values = np.exp(rng.normal(0, 2, (4, 2000)))
        matrix = ImportanceMatrix(
            {
                "a.weight": Entry(values[:1] * 7, [7]),
                "b.weight": Entry(values * 7, np.full(4, 7)),
            }
        )
        figure = pictures.channels(matrix, ["a", "b"], expert="each")
        (area,) = axes_of(figure, "a.weight channels").collections
        points = area.get_paths()[0].vertices
        for start in range(0, 2000, 3):
            at = points[points[:, 0] == start, 1]
            group = values[0, start : start + 3]
            assert at.min() == pytest.approx(group.min())
            assert at.max() == pytest.approx(group.max())
        image = axes_of(figure, "b.weight experts").images[0].get_array()
        expected = [[row[start : start + 3].max() for start in range(0, 2000, 3)] for row in values]
        np.testing.assert_allclose(image, expected, rtol=EXACT)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("blk.2.attn_k", "48 channels; no rows: there is nothing to draw"),
            ("blk.1.attn_k", "48 channels; 30 rows of zeros: there is nothing to draw"),
        ],
    )
    def test_nothing(self, matrix: ImportanceMatrix, name: str, said: str) -> None:
        figure = pictures.channels(matrix, name)
        assert said in [text.get_text() for text in figure.texts]
        assert not figure.axes

    def test_errors(self, matrix: ImportanceMatrix) -> None:
        with pytest.raises(KeyError, match=r"near: blk\.0\.ffn_down\.weight"):
            pictures.channels(matrix, "blk.0.ffn_dwn.weight")
        with pytest.raises(IndexError, match="has experts 0 to 5, not 6"):
            pictures.channels(matrix, "blk.1.ffn_down_exps", expert=6)
        with pytest.raises(ValueError, match="1 to 16 names, got 17"):
            pictures.channels(matrix, ["output"] * 17)
        with pytest.raises(ValueError, match="'pooled' or 'each', got 'all'"):
            pictures.channels(matrix, "output", expert="all")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def both(files: tuple[Path, Path]) -> tuple[ImportanceMatrix, ImportanceMatrix]:
    return ImportanceMatrix.load(files[0]), ImportanceMatrix.load(files[1])


class TestCompare:
    def test_sides(
        self, both: tuple[ImportanceMatrix, ImportanceMatrix], files: tuple[Path, Path]
    ) -> None:
        """Each side is drawn as `layers` draws it, on one scale, with the same rows and columns."""
        figure = pictures.compare(*both)
        for prefix, path in zip(("first ", "second "), files, strict=True):
            expected = {
                name: importance(*found).mean()
                for name, found in raw(path).items()
                if found[1].any() and found[0].any()
            }
            assert cells(figure, prefix) == pytest.approx(expected, rel=EXACT)
        norms = [axes_of(figure, f"{side} trunk").images[0].norm for side in ("first", "second")]
        assert norms[0] is norms[1]

    def test_ratio(
        self, both: tuple[ImportanceMatrix, ImportanceMatrix], files: tuple[Path, Path]
    ) -> None:
        figure = pictures.compare(*both, names=("one", "two"))
        one, two = (raw(path) for path in files)
        expected = {}
        for name in one:
            if name in two and one[name][0].shape == two[name][0].shape and one[name][0].any():
                means = [importance(*side[name]).mean() for side in (one, two)]
                expected[name] = np.log2(means[1] / means[0])
        # there the logarithms are subtracted: a few roundings of values below 10
        assert cells(figure, "difference ") == pytest.approx(expected, rel=1e-9, abs=1e-14)
        marks = hatched(figure, "difference ")
        head = {name for name in one if name.startswith("blk.3.")}
        assert {name for name, hatch in marks.items() if hatch == "\\"} == {
            *head,
            "blk.0.attn_q.weight",
        }
        assert {name for name, hatch in marks.items() if hatch == "/"} == {"token_embd.weight"}
        assert {name for name, hatch in marks.items() if hatch == "+"} == {"blk.0.attn_k.weight"}
        assert {name: hatch for name, hatch in marks.items() if hatch in "xo"} == {
            "blk.1.attn_k.weight": "o",  # zeros
            "blk.2.attn_k.weight": "x",  # no rows
        }
        said = " ".join(text.get_text() for text in figure.texts)
        assert f"{len(head) + 1} weights with rows only in one; 1 weight with rows only in" in said
        norm = axes_of(figure, "difference trunk").images[0].norm
        assert norm.vmin == -norm.vmax

    def test_cosine(
        self, both: tuple[ImportanceMatrix, ImportanceMatrix], files: tuple[Path, Path]
    ) -> None:
        figure = pictures.compare(*both, difference="cosine")
        one, two = (raw(path) for path in files)

        def distance(name: str) -> float:
            (s, c), (t, d) = one[name], two[name]
            seen = [n for n in range(len(s)) if c[n] > 0 and d[n] > 0]
            return float(
                np.max(
                    [
                        1 - s[n] @ t[n] / np.sqrt((s[n] @ s[n]) * (t[n] @ t[n]))  # counts cancel
                        for n in seen
                    ]
                )
            )

        expected = {
            name: distance(name)
            for name in one
            if name in two and one[name][0].shape == two[name][0].shape and one[name][0].any()
        }
        expected["blk.1.attn_k.weight"] = 1e-6  # zeros in both
        # here 1 - cosine loses digits, there it does not: 2^-53 of 1 each
        assert cells(figure, "difference ") == pytest.approx(expected, rel=1e-9, abs=1e-14)

    def test_flattened(self) -> None:
        """llama-imatrix writes a dense 3-D weight flattened; its values are the same."""
        sums = np.exp(np.random.default_rng(5).normal(0, 1, (3, 8)))
        one = ImportanceMatrix({"blk.0.attn_k_b.weight": Entry(sums, [7])})
        two = ImportanceMatrix({"blk.0.attn_k_b.weight": Entry(sums.reshape(1, -1), [7])})
        for matrices in ((one, two), (two, one)):
            figure = pictures.compare(*matrices, difference="cosine")
            assert cells(figure, "difference ") == {"blk.0.attn_k_b.weight": 1e-6}

    def test_equal(self, both: tuple[ImportanceMatrix, ImportanceMatrix]) -> None:
        """Equal matrices have no ratio, and the lowest colour for the cosine."""
        ratio = pictures.compare(both[0], both[0])
        assert set(cells(ratio, "difference ").values()) == {0.0}
        assert axes_of(ratio, "difference trunk").images[0].norm.vmax == 0.1
        cosine = pictures.compare(both[0], both[0], difference="cosine")
        assert set(cells(cosine, "difference ").values()) == {1e-6}
        assert axes_of(cosine, "difference trunk").images[0].norm(1e-6) == 0


def big(n_blocks: int, n_experts: int) -> ImportanceMatrix:
    """A model of that size with short rows: the drawing does not depend on their length."""
    rng = np.random.default_rng(n_blocks)
    entries = {}
    for block in range(n_blocks):
        for kind in ("attn_q", "attn_output", "ffn_gate_inp", "ffn_down_shexp"):
            entries[f"blk.{block}.{kind}.weight"] = Entry(np.exp(rng.normal(0, 2, (1, 40))), [512])
        counts = rng.integers(0, 3000, n_experts)
        for kind in ("ffn_gate_exps", "ffn_down_exps"):
            sums = np.exp(rng.normal(0, 2, (n_experts, 40))) * counts[:, None]
            entries[f"blk.{block}.{kind}.weight"] = Entry(sums, counts)
    entries[f"blk.{n_blocks - 1}.nextn.shared_head_head.weight"] = Entry(np.ones((1, 40)), [512])
    entries["output.weight"] = Entry(np.ones((1, 40)), [512])
    return ImportanceMatrix(entries, chunk_count=2, chunk_size=512)


def drawn(matrix: ImportanceMatrix, width: float | None) -> Iterator[Figure]:
    """Every kind of picture."""
    weights = ["blk.1.ffn_down_exps.weight", "output"]
    name = "a-model-of-a-long-name-with-all-that-belongs-to-it-imatrix.gguf"
    yield pictures.layers(matrix, name=name, width=width)
    yield pictures.experts(matrix, name=name, width=width)
    yield pictures.channels(matrix, weights, heaviest=8, name=name, width=width)
    yield pictures.channels(matrix, weights, expert="each", name=name, width=width)
    yield pictures.compare(matrix, matrix, names=(name, "other.gguf"), width=width)
    yield pictures.compare(matrix, matrix, difference="cosine", style="dark", width=width)


class TestReadable:
    @pytest.mark.parametrize("width", [None, 3.4])
    @pytest.mark.parametrize(("n_blocks", "n_experts"), [(2, 2), (41, 128), (94, 512)])
    def test_no_text_is_cut_or_covered(
        self, n_blocks: int, n_experts: int, width: float | None
    ) -> None:
        for figure in drawn(big(n_blocks, n_experts), width):
            canvas = figure.canvas
            assert isinstance(canvas, FigureCanvasAgg)
            canvas.draw()
            renderer = canvas.get_renderer()
            boxes = [
                (text.get_text(), text.get_window_extent(renderer))
                for text in figure.findobj(Text)
                if isinstance(text, Text) and text.get_visible() and text.get_text()
            ]
            right, top = figure.bbox.width, figure.bbox.height
            for text, box in boxes:
                assert box.x0 >= 0, text
                assert box.y0 >= 0, text
                assert box.x1 <= right, text
                assert box.y1 <= top, text
            for (text, one), (other, two) in itertools.combinations(boxes, 2):
                # boxes have room for the deepest letter, and lines may share one pixel of it
                apart = (
                    one.x1 <= two.x0 + 1
                    or two.x1 <= one.x0 + 1
                    or one.y1 <= two.y0 + 2.5
                    or two.y1 <= one.y0 + 2.5
                )
                assert apart, f"{text!r} and {other!r} overlap in {figure.get_label()}"


class TestFiles:
    def test_svg(self, matrix: ImportanceMatrix) -> None:
        text = pictures.svg(pictures.layers(matrix, name="one.gguf"))
        root = ET.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        words = {(each.text or "").strip() for each in root.iter() if each.tag.endswith("text")}
        for word in ("attn_q", "ffn_down_exps", "nextn.eh_proj", "output", "trunk", "head", "3"):
            assert word in words
        assert root[0].tag.endswith("title")
        assert root[0].text == "Mean squared activation by block and weight"
        assert "<style" not in text  # it would apply to the page around it
        assert "<metadata" not in text

    def test_ids(self, matrix: ImportanceMatrix) -> None:
        """Pictures on one page have no id in common, and each finds the elements that it refers
        to."""
        seen: set[str] = set()
        figures = [
            pictures.layers(matrix),
            pictures.layers(matrix),
            pictures.experts(matrix),
            pictures.channels(matrix, "output"),
        ]
        for n, figure in enumerate(figures):
            text = pictures.svg(figure, prefix=f"p{n}")
            ids = re.findall(r'\sid="([^"]*)"', text)
            assert len(ids) == len(set(ids))
            assert not seen & set(ids)
            seen |= set(ids)
            refers = re.findall(r'(?:url\(#|href="#)([^")]*)', text)
            assert refers
            assert set(refers) <= set(ids)
            ET.fromstring(text)
        with pytest.raises(ValueError, match="prefix must be letters"):
            pictures.svg(figures[0], prefix='"><script>')

    def test_transparent(self, matrix: ImportanceMatrix) -> None:
        figure = pictures.layers(matrix, style="dark")
        paper = "#14171c"
        first = re.search(r'id="patch_1".*?style="([^"]*)"', pictures.svg(figure), re.DOTALL)
        assert first is not None
        assert paper in first[1]
        bare = pictures.svg(figure, background=False)
        first = re.search(r'id="patch_1".*?style="([^"]*)"', bare, re.DOTALL)
        assert first is not None
        assert "fill: none" in first[1]

    def test_png(self, matrix: ImportanceMatrix, tmp_path: Path) -> None:
        figure = pictures.layers(matrix, width=5)
        pictures.save(figure, tmp_path / "a.PNG", dpi=80)
        with Image.open(tmp_path / "a.PNG") as image:
            assert image.size == (400, int(80 * figure.get_figheight()))
            assert image.info.keys() <= {"dpi"}
        assert [each.name for each in tmp_path.iterdir()] == ["a.PNG"]

    @pytest.mark.parametrize("style", ["light", "dark"])
    def test_style(self, matrix: ImportanceMatrix, style: str) -> None:
        """Every corner has the paper's colour, and text stands out from it."""
        figures = [
            pictures.layers(matrix, style=style),
            pictures.experts(matrix, style=style),
            pictures.channels(matrix, "output", style=style),
            pictures.compare(matrix, matrix, style=style),
        ]
        for figure in figures:
            image = np.asarray(Image.open(io.BytesIO(pictures.png(figure))).convert("RGB"))
            corners = {tuple(image[y, x].tolist()) for y in (0, -1) for x in (0, -1)}
            assert corners == {(255, 255, 255) if style == "light" else (20, 23, 28)}
            paper = np.array(corners.pop()) / 255
            inside = {
                text
                for axes in figure.axes
                for text in axes.texts  # on coloured cells, each has its own background
            }
            for text in set(figure.findobj(Text)) - inside:
                assert isinstance(text, Text)
                if text.get_text():
                    assert contrast(np.array(to_rgb(text.get_color())), paper) >= 4.5, text

    def test_the_same_bytes(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        """In processes with other settings of the user, other hash seeds and other clocks."""
        (tmp_path / "matplotlibrc").write_text(
            "font.size: 20\nsvg.fonttype: path\nfigure.facecolor: red\naxes.grid: True\n"
            "xtick.labelsize: 30\naxes.facecolor: blue\nsavefig.bbox: tight\n"
        )
        program = (
            "import sys\nfrom imatrix import ImportanceMatrix, pictures as p\n"
            "m = ImportanceMatrix.load(sys.argv[1])\n"
            "figures = [p.layers(m), p.experts(m), p.channels(m, 'output'), p.compare(m, m)]\n"
            "for n, figure in enumerate(figures):\n"
            "    for form in p.FORMATS:\n        p.save(figure, f'{sys.argv[2]}/{n}{form}')\n"
        )
        folders = []
        for seed, more in (("1", {}), ("2", {"MATPLOTLIBRC": str(tmp_path)})):
            folders.append(tmp_path / seed)
            folders[-1].mkdir()
            env = os.environ | {"PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": seed} | more
            subprocess.run(
                [sys.executable, "-c", program, files[0], folders[-1]], env=env, check=True
            )
        names = sorted(each.name for each in folders[0].iterdir())
        assert len(names) == 8
        for name in names:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name

    def test_settings_are_put_back(self, matrix: ImportanceMatrix) -> None:
        before = mpl.rcParams.copy()
        pictures.svg(pictures.layers(matrix))
        assert mpl.rcParams.copy() == before

    def test_threads(self, matrix: ImportanceMatrix) -> None:
        expected = pictures.svg(pictures.layers(matrix)), pictures.svg(pictures.experts(matrix))
        found: list[tuple[str, str]] = []

        def work() -> None:
            for _ in range(2):
                found.append(
                    (
                        pictures.svg(pictures.layers(matrix)),
                        pictures.svg(pictures.experts(matrix)),
                    )
                )

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected] * 4

    def test_names_from_strangers(self, tmp_path: Path) -> None:
        """They are neither formulas nor markup, hold nothing that XML forbids, and are cut to a
        length."""
        entry = Entry(np.arange(1.0, 9)[None], [4])
        names = ["blk.0.$\\frac{a$", '<b>&"x\x01\n', "blk.1.漢字", "y" * 5000, "blk.2. "]
        matrix = ImportanceMatrix(dict.fromkeys(names, entry), datasets=["x"])
        for figure in (
            pictures.layers(matrix, name="</svg>\x00"),
            pictures.channels(matrix, names, name="</svg>\x00"),
            pictures.compare(matrix, matrix, names=("<i>{0}", "%s{}")),
        ):
            root = ET.fromstring(pictures.svg(figure, prefix="p"))
            words = " ".join("".join(each.itertext()) for each in root.iter())
            assert "$\\frac{a" in words
            assert '<b>&"x\N{REPLACEMENT CHARACTER}' in words
            assert "漢字" in words
            assert not any(each.tag.endswith(("}b", "}i")) for each in root.iter())
            pictures.png(figure)
            assert figure.get_figwidth() < 20

    def test_without_matplotlib(
        self, matrix: ImportanceMatrix, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ImportError, match=r"pip install 'imatrix\[plot\]'"):
            pictures.layers(matrix)

    def test_imports(self, files: tuple[Path, Path]) -> None:
        """matplotlib is imported when something is drawn, and pyplot, which holds global state,
        never."""
        program = (
            "import sys\nfrom imatrix import ImportanceMatrix, pictures as p\n"
            "assert 'matplotlib' not in sys.modules\n"
            "figure = p.layers(ImportanceMatrix.load(sys.argv[1]))\n"
            "p.png(figure), p.svg(figure)\n"
            "assert 'matplotlib.pyplot' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", program, files[0]], check=True)

    def test_bad_arguments(self, matrix: ImportanceMatrix, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="statistic must be one of mean, top"):
            pictures.layers(matrix, statistic="median")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="3 to 40 inches, got 2"):
            pictures.layers(matrix, width=2)
        with pytest.raises(ValueError, match="the matrix is empty"):
            pictures.layers(ImportanceMatrix({}))
        with pytest.raises(ValueError, match=r"ends in \.png or \.svg"):
            pictures.save(pictures.layers(matrix), tmp_path / "a.jpg")
        entry = Entry(np.ones((1, 4)), [1])
        with pytest.raises(ValueError, match="301 kinds of weights, more than the 300"):
            pictures.layers(ImportanceMatrix({f"w{n}": entry for n in range(301)}))


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """The ratio of two colours' luminances, as WCAG 2 defines it (w3.org/TR/WCAG21)."""

    def luminance(rgb: np.ndarray) -> float:
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


class TestCommand:
    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            ([], "Mean squared activation by block and weight"),
            (["--statistic", "peak", "--style", "dark"], "Heaviest channel by block and weight"),
            (["--kind", "experts"], "Rows each expert saw"),
            (["--weight", "output", "--weight", "blk.1.ffn_up_exps"], "activation by channel"),
            (["--weight", "blk.1.ffn_up_exps", "--expert", "each"], "activation by channel"),
            (["--with", "{two}", "--difference", "cosine"], "activation and difference"),
        ],
    )
    def test_kinds(
        self,
        files: tuple[Path, Path],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        flags: list[str],
        says: str,
    ) -> None:
        flags = [flag.format(two=files[1]) for flag in flags]
        out = tmp_path / "out.svg"
        assert main(["plot", str(files[0]), "-o", str(out), *flags]) == 0
        assert says in capsys.readouterr().err
        title = ET.parse(out).getroot()[0].text
        assert title is not None
        assert says in title
        assert "one.gguf" in out.read_text()

    def test_png_size(self, files: tuple[Path, Path], tmp_path: Path) -> None:
        out = tmp_path / "out.png"
        assert main(["plot", str(files[0]), "-o", str(out), "--width", "5", "--dpi", "50"]) == 0
        with Image.open(out) as image:
            assert image.width == 250

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (["-o", "out.jpg"], "ends in .png or .svg"),
            (["-o", "no/such/out.png"], "there is no folder"),
            (["-o", "{one}.svg/x.png"], "there is no folder"),
            (["-o", "out.png", "--kind", "compare"], "--with OTHER"),
            (["-o", "out.png", "--kind", "channels"], "imatrix show"),
            (["-o", "out.png", "--weight", "blk.0.ffn_dwn.weight"], "near: blk.0.ffn_down.weight"),
            (["-o", "out.png", "--weight", "blk.1.ffn_up_exps", "--expert", "6"], "experts 0 to 5"),
            (["-o", "out.png", "--kind", "experts", "--heaviest", "3"], "no use for --heaviest"),
            (["-o", "out.png", "--width", "100"], "3 to 40 inches"),
            (["-o", "out.png", "--dpi", "5"], "must be 36 or more"),
            (["-o", "out.png", "--with", "missing.gguf"], "missing.gguf"),
        ],
    )
    def test_errors(
        self,
        files: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        flags: list[str],
        says: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        flags = [flag.format(one=files[0]) for flag in flags]
        assert main(["plot", str(files[0]), *flags]) == 2
        assert says in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_dat_has_no_experts(
        self, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ImportanceMatrix.load(files[0]).save(tmp_path / "a.dat", format="dat")
        out = tmp_path / "out.svg"
        assert main(["plot", str(tmp_path / "a.dat"), "-o", str(out), "--kind", "experts"]) == 2
        assert ".dat file does not keep" in capsys.readouterr().err
        assert main(["plot", str(tmp_path / "a.dat"), "-o", str(out)]) == 0
