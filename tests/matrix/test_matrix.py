"""ImportanceMatrix and Entry, compared with values worked out by hand or with plain NumPy."""

from __future__ import annotations

import math
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from imatrix.entries import Entry, Provenance, TextSource
from imatrix.matrix.importance import ImportanceMatrix


def dense(*values: float, count: int = 1) -> Entry:
    return Entry([list(values)], [count])


class TestEntry:
    def test_importance_is_the_mean_square(self) -> None:
        entry = Entry([[2.0, 6.0], [1.0, 10.0]], [4, 2])
        assert entry.importance.tolist() == [[0.5, 1.5], [0.5, 5.0]]
        assert (entry.n_mat, entry.n_in, entry.n_counts) == (2, 2, 2)

    def test_importance_is_one_where_nothing_was_counted(self) -> None:
        entry = Entry([[3.0, 9.0], [0.0, 0.0]], [3, 0])
        assert entry.importance.tolist() == [[1.0, 3.0], [1.0, 1.0]]
        assert entry.covered == 0.5

    def test_one_count_stands_for_all_slices_of_a_dense_weight(self) -> None:
        entry = Entry([[2.0, 4.0], [6.0, 8.0]], [2])
        assert entry.importance.tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert Entry([[0.0, 0.0], [0.0, 0.0]], [0]).importance.tolist() == [[1, 1], [1, 1]]

    def test_converts_types_and_layout(self) -> None:
        sums = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
        entry = Entry(sums, np.array([7.0], dtype=np.float32))
        assert entry.sums.dtype == np.float64
        assert entry.sums.flags.c_contiguous
        assert entry.sums.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert entry.counts.dtype == np.int64
        assert entry.counts.tolist() == [7]

    def test_is_read_only_and_leaves_the_caller_array_writable(self) -> None:
        sums = np.ones((1, 2))
        entry = Entry(sums, [1])
        with pytest.raises(ValueError, match="read-only"):
            entry.sums[0, 0] = 5.0
        with pytest.raises(ValueError, match="read-only"):
            entry.counts[0] = 5
        sums[0, 0] = 2.0  # does not raise
        assert np.shares_memory(sums, entry.sums)

    @pytest.mark.parametrize(
        ("sums", "counts", "told"),
        [
            ([1.0, 2.0], [1], r"\[n_mat, n_in\], got \[2\]"),
            (np.empty((2, 0)), [1], r"\[n_mat, n_in\], got \[2, 0\]"),
            ([[1.0, np.nan]], [1], "finite"),
            ([[1.0, np.inf]], [1], "finite"),
            ([[1.0, -0.5]], [1], "negative, found -0.5"),
            ([["a"]], [1], "real numbers"),
            ([[1.0 + 2j]], [1], "real numbers"),
            ([[1.0]], [-1], "negative, found -1"),
            ([[1.0]], [0.5], "whole numbers"),
            ([[1.0]], [np.nan], "whole numbers"),
            ([[1.0]], [1e19], "below 2\\^63"),
            ([[1.0]], np.array([2**64 - 1], dtype=np.uint64), "below 2\\^63"),
            ([[1.0]], [[1]], r"\[n_counts\], got \[1, 1\]"),
            ([[1.0]], [], r"\[n_counts\], got \[0\]"),
            ([[1.0], [2.0], [3.0]], [1, 2], "3 matrices but there are 2 counts"),
        ],
    )
    def test_refuses_and_names_the_weight(self, sums: object, counts: object, told: str) -> None:
        with pytest.raises(ValueError, match=rf"^'blk\.3\.attn_q\.weight': .*{told}"):
            Entry(sums, counts, name="blk.3.attn_q.weight")  # type: ignore[arg-type]

    def test_equality(self) -> None:
        assert dense(1.0, 2.0) == dense(1.0, 2.0)
        assert dense(1.0, 2.0) != dense(1.0, 3.0)
        assert dense(1.0, 2.0) != dense(1.0, 2.0, count=2)
        assert Entry([[1.0], [2.0]], [1]) != Entry([[1.0, 2.0]], [1])
        assert dense(1.0) != 1.0
        with pytest.raises(TypeError, match="unhashable"):
            hash(dense(1.0))


class TestMapping:
    def test_natural_order(self) -> None:
        names = ["output.weight", "blk.10.a", "blk.2.b", "blk.2.a", "a.weight", "blk.x.a"]
        matrix = ImportanceMatrix({name: dense(1.0) for name in names})
        assert list(matrix) == [
            "blk.2.a",
            "blk.2.b",
            "blk.10.a",
            "a.weight",
            "blk.x.a",
            "output.weight",
        ]
        assert len(matrix) == 6

    def test_unknown_name_suggests_near_ones(self) -> None:
        matrix = ImportanceMatrix(
            {f"blk.{n}.{kind}.weight": dense(1.0) for n in range(3) for kind in ("attn_q", "ssm_a")}
        )
        with pytest.raises(KeyError) as caught:
            matrix["blk.1.attn_k.weight"]
        assert "'blk.1.attn_k.weight'; near: " in str(caught.value)
        assert "blk.1.attn_q.weight" in str(caught.value)
        with pytest.raises(KeyError, match="no entry 'zzz' among 6 weights"):
            matrix.importance("zzz")
        with pytest.raises(KeyError, match="no entry 5 among"):
            matrix[5]  # type: ignore[index]

    def test_in_and_get(self) -> None:
        matrix = ImportanceMatrix({"blk.0.a": dense(4.0, count=2)})
        assert "blk.0.a" in matrix
        assert "blk.0.b" not in matrix
        assert matrix.get("blk.0.b") is None
        assert matrix.importance("blk.0.a").tolist() == [[2.0]]

    def test_does_not_follow_changes_of_the_mapping_it_was_given(self) -> None:
        entries = {"a": dense(1.0)}
        matrix = ImportanceMatrix(entries)
        entries["b"] = dense(2.0)
        assert list(matrix) == ["a"]

    def test_refuses_nonsense(self) -> None:
        with pytest.raises(ValueError, match="non-empty str, not ''"):
            ImportanceMatrix({"": dense(1.0)})
        with pytest.raises(TypeError, match="'a': expected an Entry, got list"):
            ImportanceMatrix({"a": [1.0]})  # type: ignore[dict-item]
        with pytest.raises(TypeError, match=r"write \['x.txt'\]"):
            ImportanceMatrix({}, datasets="x.txt")
        with pytest.raises(ValueError, match="chunk_count must be 0 or more, got -1"):
            ImportanceMatrix({}, chunk_count=-1)
        with pytest.raises(ValueError, match="chunk_size must be 0 or more, got -2"):
            ImportanceMatrix({}, chunk_size=-2)

    def test_equality_looks_at_everything(self) -> None:
        def make(**changes: object) -> ImportanceMatrix:
            settings = {
                "datasets": ["x"],
                "chunk_count": 2,
                "chunk_size": 512,
                "provenance": Provenance(mtp=True),
            }
            return ImportanceMatrix({"a": dense(1.0)}, **(settings | changes))  # type: ignore[arg-type]

        assert make() == make()
        assert make(datasets=["y"]) != make()
        assert make(chunk_count=3) != make()
        assert make(chunk_size=256) != make()
        assert make(provenance=None) != make()
        assert make(provenance=Provenance()) == make(provenance=None)
        assert make() != {"a": dense(1.0)}

    def test_pickles(self) -> None:
        matrix = ImportanceMatrix(
            {"blk.0.a": Entry([[1.0], [2.0]], [3, 4])}, datasets=["x"], chunk_count=1, chunk_size=9
        )
        assert pickle.loads(pickle.dumps(matrix)) == matrix

    def test_repr_is_short(self) -> None:
        matrix = ImportanceMatrix(
            {"blk.24.nextn.eh_proj.weight": dense(1.0), "blk.0.a": dense(1.0)},
            chunk_count=3,
            chunk_size=512,
        )
        assert (
            repr(matrix)
            == "<ImportanceMatrix: 2 weights, 3 chunks of 512 tokens, head in block 24>"
        )
        assert repr(Entry([[1.0], [2.0]], [3, 4])) == "Entry(sums=[2, 1], counts=[2])"


class TestHead:
    NAMES = (
        "blk.0.attn_q.weight",
        "blk.1.attn_q.weight",
        "blk.10.attn_q.weight",
        "blk.10.nextn.eh_proj.weight",
        "blk.100.attn_q.weight",
        "output.weight",
    )

    def test_head_is_the_whole_block(self) -> None:
        matrix = ImportanceMatrix(
            {name: dense(1.0) for name in self.NAMES}, datasets=["x"], chunk_count=2, chunk_size=8
        )
        assert matrix.head_blocks == {10}
        assert list(matrix.head) == ["blk.10.attn_q.weight", "blk.10.nextn.eh_proj.weight"]
        assert list(matrix.trunk) == [
            "blk.0.attn_q.weight",
            "blk.1.attn_q.weight",
            "blk.100.attn_q.weight",
            "output.weight",
        ]
        assert matrix.head.datasets == matrix.trunk.datasets == ("x",)
        assert (matrix.trunk.chunk_count, matrix.trunk.chunk_size) == (2, 8)

    def test_without_a_head(self) -> None:
        matrix = ImportanceMatrix({"blk.0.attn_q.weight": dense(1.0), "output.weight": dense(1.0)})
        assert matrix.head_blocks == frozenset()
        assert len(matrix.head) == 0
        assert matrix.trunk == matrix


class TestMerge:
    def test_adds_sums_and_counts(self) -> None:
        a = ImportanceMatrix({"e": Entry([[1.0, 2.0], [3.0, 4.0]], [5, 0]), "only_a": dense(7.0)})
        b = ImportanceMatrix({"e": Entry([[10.0, 20.0], [0.5, 0.25]], [1, 2]), "z": dense(8.0)})
        total = a + b
        assert total["e"].sums.tolist() == [[11.0, 22.0], [3.5, 4.25]]
        assert total["e"].counts.tolist() == [6, 2]
        assert total["only_a"] == dense(7.0)
        assert total["z"] == dense(8.0)
        assert a["e"].sums.tolist() == [[1.0, 2.0], [3.0, 4.0]]  # the operands are unchanged

    def test_many_and_none(self) -> None:
        parts = [ImportanceMatrix({"a": dense(2.0**n, count=n)}) for n in range(4)]
        assert parts[0].merge(*parts[1:])["a"] == dense(15.0, count=6)
        assert parts[1].merge() == parts[1]

    @given(
        sums=hnp.arrays(np.float64, (2, 3, 4), elements=st.floats(0, 1e300, allow_subnormal=True)),
        counts=hnp.arrays(np.int64, (2, 3), elements=st.integers(0, 2**61)),
    )
    def test_two_commute_to_the_bit(self, sums: np.ndarray, counts: np.ndarray) -> None:
        a, b = (ImportanceMatrix({"e": Entry(sums[i], counts[i])}) for i in (0, 1))
        ab, ba = (a + b)["e"], (b + a)["e"]
        assert ab.sums.tobytes() == ba.sums.tobytes() == (sums[0] + sums[1]).tobytes()
        assert ab.counts.tolist() == ba.counts.tolist() == (counts[0] + counts[1]).tolist()

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize(
        ("a", "b"),
        [
            # one count, and an equal count for each slice
            (Entry([[1.0, 2.0], [3.0, 4.0]], [5]), Entry([[1.0, 1.0], [1.0, 1.0]], [7, 7])),
            # flattened, as llama-imatrix writes it
            (Entry([[1.0, 2.0, 3.0, 4.0]], [5]), Entry([[1.0, 1.0], [1.0, 1.0]], [7])),
            # both
            (Entry([[1.0, 2.0, 3.0, 4.0]], [5]), Entry([[1.0, 1.0], [1.0, 1.0]], [7, 7])),
        ],
    )
    def test_spellings_of_a_dense_3d_weight(self, a: Entry, b: Entry, flip: bool) -> None:
        if flip:
            a, b = b, a
        total = (ImportanceMatrix({"w": a}) + ImportanceMatrix({"w": b}))["w"]
        assert total == Entry([[2.0, 3.0], [4.0, 5.0]], [12])

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize(
        ("a", "b"),
        [
            (Entry(np.ones((2, 2)), [1]), Entry(np.ones((2, 3)), [1])),
            (Entry(np.ones((2, 6)), [1]), Entry(np.ones((3, 4)), [1])),
            (Entry(np.ones((2, 2)), [1]), Entry(np.ones((2, 2)), [1, 2])),
        ],
    )
    def test_refuses_what_does_not_fit(self, a: Entry, b: Entry, flip: bool) -> None:
        if flip:
            a, b = b, a
        with pytest.raises(ValueError, match=r"^'blk\.0\.w': cannot merge sums") as caught:
            ImportanceMatrix({"blk.0.w": a}) + ImportanceMatrix({"blk.0.w": b})
        assert str(list(a.sums.shape)) in str(caught.value)
        assert str(list(b.sums.shape)) in str(caught.value)

    @pytest.mark.parametrize("flip", [False, True])
    def test_experts_that_an_old_file_flattened(self, flip: bool) -> None:
        # as load_imatrix in tools/imatrix/imatrix.cpp does: its one count becomes that of every
        # expert
        a, b = Entry([[1.0, 2.0, 3.0, 4.0]], [5]), Entry([[1.0, 1.0], [1.0, 1.0]], [7, 0])
        parts = [ImportanceMatrix({"w": entry}) for entry in ((b, a) if flip else (a, b))]
        assert parts[0].merge(parts[1])["w"] == Entry([[2.0, 3.0], [4.0, 5.0]], [12, 5])

    @given(
        sums=st.integers(3, 7).flatmap(
            lambda n: hnp.arrays(
                np.float64, (n, 2, 3), elements=st.floats(0, 1e300, allow_subnormal=True)
            )
        ),
        order=st.randoms(use_true_random=False),
    )
    def test_many_are_added_exactly_in_any_order(
        self, sums: np.ndarray, order: random.Random
    ) -> None:
        parts = [ImportanceMatrix({"e": Entry(part, [1])}) for part in sums]
        order.shuffle(parts)
        found = parts[0].merge(*parts[1:])["e"].sums
        for place in np.ndindex(2, 3):
            # rounded once, by the standard library
            assert found[place] == math.fsum(sums[:, place[0], place[1]].tolist())

    def test_an_error_that_is_itself_rounded(self) -> None:
        # 1 + 2^-53 is a tie, which 2^-200 breaks upwards: two-sum alone loses that
        parts = [ImportanceMatrix({"e": Entry([[x]], [1])}) for x in (1.0, 2.0**-53, 2.0**-200)]
        assert parts[0].merge(*parts[1:])["e"].sums.tolist() == [[1.0 + 2.0**-52]]
        assert parts[2].merge(*parts[:2])["e"].sums.tolist() == [[1.0 + 2.0**-52]]

    def test_refuses_other_types(self) -> None:
        with pytest.raises(TypeError, match="can only merge ImportanceMatrix, got dict"):
            ImportanceMatrix({}).merge({})  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            ImportanceMatrix({}) + 1  # type: ignore[operator]

    def test_datasets_are_joined_once_each(self) -> None:
        a = ImportanceMatrix({}, datasets=["x", "y"])
        b = ImportanceMatrix({}, datasets=["y", "z", "x", "w"])
        assert a.merge(b).datasets == ("x", "y", "z", "w")

    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            ((3, 512), (4, 512), (7, 512)),
            ((3, 512), (5, 256), (6, 512)),  # 3 * 512 + 5 * 256 = 2816 tokens = 5.5 chunks
            ((3, 512), (4, 256), (5, 512)),
            ((3, 512), (1, 128), (3, 512)),  # 3.25
            ((1, 128), (3, 512), (13, 128)),
            ((3, 0), (4, 512), (7, 512)),  # an unknown size is assumed to be the other one
            ((3, 512), (4, 0), (7, 512)),
            ((3, 0), (4, 0), (7, 0)),
        ],
    )
    def test_chunks(
        self, first: tuple[int, int], second: tuple[int, int], expected: tuple[int, int]
    ) -> None:
        a, b = (
            ImportanceMatrix({}, chunk_count=count, chunk_size=size)
            for count, size in (first, second)
        )
        total = a + b
        assert (total.chunk_count, total.chunk_size) == expected

    def test_provenance_keeps_what_all_agree_on(self) -> None:
        a = Provenance("imatrix 0.1.0", "llama.cpp 1", True, 512, "aa")
        b = Provenance("imatrix 0.1.0", "llama.cpp 2", False, 512, "aa")
        total = ImportanceMatrix({}, provenance=a) + ImportanceMatrix({}, provenance=b)
        assert total.provenance == Provenance("imatrix 0.1.0", None, True, 512, None)
        books = TextSource("books", 2, 70, 5, 0.5)
        a = Provenance(tokens=100, packing="document", seed=1, sources=(books,))
        b = Provenance(tokens=40, packing="document", sources=(TextSource("web", 1, 40), books))
        total = ImportanceMatrix({}, provenance=a) + ImportanceMatrix({}, provenance=b)
        assert total.provenance == Provenance(
            tokens=140,
            packing="document",
            sources=(TextSource("books", 4, 140, 10, 0.5), TextSource("web", 1, 40)),
        )
        b = Provenance("imatrix 0.1.0", "llama.cpp 2", False, 512, "aa")
        nothing = ImportanceMatrix({}, provenance=b) + ImportanceMatrix({})
        assert nothing.provenance is None


def test_save_and_load(tmp_path: Path) -> None:
    matrix = ImportanceMatrix(
        {"blk.0.a": Entry([[1.5, 2.25]], [3]), "blk.1.exps": Entry([[1.0], [0.0]], [2, 0])},
        datasets=["ä.txt"],
        chunk_count=4,
        chunk_size=512,
        provenance=Provenance("imatrix 0.1.0", "llama.cpp 0.5.0", True, 512, "ab" * 32),
    )
    path = tmp_path / "any.name"
    matrix.save(path)
    assert ImportanceMatrix.load(path) == matrix
    assert ImportanceMatrix.load(str(path)) == matrix
