"""GGUF files: gguf-py's own reader reads ours, and we read files made with its own writer."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imatrix.entries import Entry, Provenance
from imatrix.files import atomic
from imatrix.formats import FormatError
from imatrix.matrix.importance import ImportanceMatrix

F32_MAX = float(np.finfo(np.float32).max)

FULL = ImportanceMatrix(
    {
        "output.weight": Entry([[0.5, 1.5, 2.5]], [6]),
        "blk.10.ffn_up_exps.weight": Entry([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]], [7, 8, 0]),
        "blk.2.wv_b.weight": Entry([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [9]),
    },
    datasets=["wiki.txt", "größe.txt"],
    chunk_count=12,
    chunk_size=512,
    provenance=Provenance("imatrix 0.1.0", "llama.cpp 0.5.0 (0c1e57098)", True, 512, "0f" * 32),
)


def make(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    kind: str | None = "imatrix",
    arch: str = "llama",
    **keys: int | str | bool | list[str] | list[int],
) -> Path:
    """A file written by gguf-py's writer alone; in keys, __ stands for a dot."""
    writer = gguf.GGUFWriter(path, arch)
    if kind is not None:
        writer.add_string("general.type", kind)
    for key, value in keys.items():
        name = key.replace("__", ".")
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def f32(*values: object) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def stored(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


class TestWriting:
    def test_layout(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        FULL.save(path)
        reader = gguf.GGUFReader(path)
        keys = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        assert keys == {
            "general.type": "imatrix",
            "imatrix.datasets": ["wiki.txt", "größe.txt"],
            "imatrix.chunk_count": 12,
            "imatrix.chunk_size": 512,
            "imatrix.collector.version": "imatrix 0.1.0",
            "imatrix.collector.engine": "llama.cpp 0.5.0 (0c1e57098)",
            "imatrix.collector.mtp": True,
            "imatrix.collector.n_ctx": 512,
            "imatrix.collector.dataset_digest": "0f" * 32,
        }
        for key in ("chunk_count", "chunk_size", "collector.n_ctx"):
            assert reader.fields[f"imatrix.{key}"].types == [gguf.GGUFValueType.UINT32]
        # ggml's order: the row length is first. Sorted by name, as llama-imatrix does.
        assert [(t.name, t.shape.tolist(), t.data.tolist()) for t in reader.tensors] == [
            ("blk.10.ffn_up_exps.weight.in_sum2", [2, 3], [[1, 2], [3, 4], [0, 0]]),
            ("blk.10.ffn_up_exps.weight.counts", [1, 3], [[7], [8], [0]]),
            ("blk.2.wv_b.weight.in_sum2", [3, 2], [[1, 2, 3], [4, 5, 6]]),
            ("blk.2.wv_b.weight.counts", [1, 1], [[9]]),
            ("output.weight.in_sum2", [3, 1], [[0.5, 1.5, 2.5]]),
            ("output.weight.counts", [1, 1], [[6]]),
        ]
        assert {t.tensor_type for t in reader.tensors} == {gguf.GGMLQuantizationType.F32}

    def test_without_metadata_the_three_keys_are_there(self, tmp_path: Path) -> None:
        # llama-quantize refuses a file that lacks one of them; an empty one is enough.
        path = tmp_path / "m.gguf"
        ImportanceMatrix({"a": Entry([[1.0]], [1])}).save(path)
        fields = gguf.GGUFReader(path).fields
        assert fields["imatrix.datasets"].contents() == []
        assert fields["imatrix.chunk_count"].contents() == 0
        assert fields["imatrix.chunk_size"].contents() == 0
        assert not [name for name in fields if "collector" in name or "architecture" in name]
        # An empty array of strings byte for byte: key, type 9 (array), type 8 (string), length 0.
        key = b"imatrix.datasets"
        expected = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 0)
        assert expected in path.read_bytes()
        assert ImportanceMatrix.load(path).datasets == ()

    def test_refuses_what_llama_cpp_would_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        with pytest.raises(ValueError, match="the matrix has no entries"):
            ImportanceMatrix({}).save(path)
        # GGML_MAX_NAME is 64 with the final zero; 55 bytes and ".in_sum2" are 63.
        with pytest.raises(ValueError, match=r"is 56 bytes long; llama\.cpp reads at most 55"):
            ImportanceMatrix({"x" * 54 + "é": Entry([[1.0]], [1])}).save(path)
        with pytest.raises(ValueError, match=r"imatrix\.chunk_count must be in .* got 4294967296"):
            ImportanceMatrix({"a": Entry([[1.0]], [1])}, chunk_count=2**32).save(path)
        assert list(tmp_path.iterdir()) == []
        ImportanceMatrix({"x" * 55: Entry([[1.0]], [1])}).save(path)
        assert list(stored(path)) == ["x" * 55 + ".in_sum2", "x" * 55 + ".counts"]


class TestScaling:
    def written(self, tmp_path: Path, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
        path = tmp_path / "m.gguf"
        ImportanceMatrix({"w": entry}).save(path)
        tensors = stored(path)
        return np.array(tensors["w.in_sum2"].data), np.array(tensors["w.counts"].data)[:, 0]

    def test_counts_up_to_2_24_stay(self, tmp_path: Path) -> None:
        sums, counts = self.written(tmp_path, Entry([[3.0], [5.0]], [2**24, 2**24 - 1]))
        assert counts.tolist() == [16777216, 16777215]
        assert sums.tolist() == [[3.0], [5.0]]

    def test_one_more_halves_both(self, tmp_path: Path) -> None:
        # 2^24 + 1 halves to 8388608.5, rounded up; the mean is 2 before and after.
        sums, counts = self.written(tmp_path, Entry([[2.0 * (2**24 + 1)]], [2**24 + 1]))
        assert counts.tolist() == [8388609]
        assert sums.tolist() == [[16777218.0]]

    def test_a_rare_expert_keeps_its_data(self, tmp_path: Path) -> None:
        # 2^30 needs a shift by 6; 1 and 31 would become 0, 32 becomes 0.5 and then 1, 96 1.5.
        counts = [2**30, 1, 31, 32, 96, 0]
        means = [2.0, 3.0, 5.0, 7.0, 11.0, 0.0]
        sums, stored_counts = self.written(
            tmp_path, Entry([[c * m] for c, m in zip(counts, means, strict=True)], counts)
        )
        assert stored_counts.tolist() == [2**24, 1, 1, 1, 2, 0]
        assert sums[:, 0].tolist() == [2.0**25, 3.0, 5.0, 7.0, 22.0, 0.0]

    def test_sums_beyond_float32(self, tmp_path: Path) -> None:
        # The mean, 2.5e38, fits; twice that does not, so one count is left.
        sums, counts = self.written(tmp_path, Entry([[1e39, 4.0]], [4]))
        assert counts.tolist() == [1]
        assert sums.tolist() == [[float(np.float32(2.5e38)), 1.0]]

    def test_largest_count_and_sum(self, tmp_path: Path) -> None:
        # 2^63 - 1 rounds to 2^24 at a shift by 39; the sum follows: 2^63 * 2 / 2^39 = 2^25.
        sums, counts = self.written(tmp_path, Entry([[2.0**64]], [2**63 - 1]))
        assert counts.tolist() == [2**24]
        assert sums.tolist() == [[2.0**25]]

    def test_a_dense_3d_weight_is_scaled_as_a_whole(self, tmp_path: Path) -> None:
        sums, counts = self.written(tmp_path, Entry([[2.0**26], [2.0**25]], [2**25]))
        assert counts.tolist() == [2**24]
        assert sums.tolist() == [[2.0**25], [2.0**24]]

    def test_refuses_a_mean_beyond_float32(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^'w': the largest sum, 1e\+39, .* beyond float32"):
            self.written(tmp_path, Entry([[1e39], [1.0]], [2, 5]))
        assert list(tmp_path.iterdir()) == []

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
    @given(
        counts=st.lists(st.integers(0, 40).map(lambda n: 2**n) | st.integers(0, 2**62), min_size=1),
        data=st.data(),
    )
    def test_means_survive(self, tmp_path: Path, counts: list[int], data: st.DataObject) -> None:
        means = data.draw(
            st.lists(st.floats(1e-20, 1e30), min_size=len(counts), max_size=len(counts))
        )
        sums, stored_counts = self.written(
            tmp_path,
            Entry([[c * m] for c, m in zip(counts, means, strict=True)], counts),
        )
        assert np.isfinite(sums).all()
        assert ((stored_counts == 0) == (np.array(counts) == 0)).all()
        assert (stored_counts == np.trunc(stored_counts)).all()
        assert stored_counts.max() <= 2**24
        for count, mean, row, scaled in zip(counts, means, sums[:, 0], stored_counts, strict=True):
            if count:
                # One rounding to float32 (2^-24) and a few to float64 (2^-53).
                assert math.isclose(float(row) / float(scaled), mean, rel_tol=2**-23)


class TestReading:
    def test_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        FULL.save(path)
        assert ImportanceMatrix.load(path) == FULL

    def test_as_llama_imatrix_writes_it(self, tmp_path: Path) -> None:
        # ggml drops trailing dimensions of 1, and llama-imatrix flattens a dense 3-D weight.
        path = make(
            tmp_path / "m.gguf",
            {
                "blk.0.attn_q.weight.in_sum2": f32(1, 2, 3),
                "blk.0.attn_q.weight.counts": f32(512),
                "blk.0.ffn_up_exps.weight.in_sum2": f32([1, 2], [3, 4]),
                "blk.0.ffn_up_exps.weight.counts": f32([5], [6]),
            },
            imatrix__datasets=["a.txt"],
            imatrix__chunk_count=3,
            imatrix__chunk_size=512,
        )
        matrix = ImportanceMatrix.load(path)
        assert dict(matrix) == {
            "blk.0.attn_q.weight": Entry([[1, 2, 3]], [512]),
            "blk.0.ffn_up_exps.weight": Entry([[1, 2], [3, 4]], [5, 6]),
        }
        assert matrix.datasets == ("a.txt",)
        assert (matrix.chunk_count, matrix.chunk_size) == (3, 512)
        assert matrix.provenance is None

    def test_other_shapes_and_types(self, tmp_path: Path) -> None:
        path = make(
            tmp_path / "m.gguf",
            {
                # Flat sums with several counts: the loader cuts them into rows.
                "flat.in_sum2": f32(1, 2, 3, 4),
                "flat.counts": f32(5, 6),
                "wide.in_sum2": np.arange(12, dtype=np.float64).reshape(2, 2, 3),
                "wide.counts": np.array([3.0]),
                "rounded.in_sum2": f32(1),
                "rounded.counts": f32(2.5),
                "x.counts.in_sum2": f32(1),
                "x.counts.counts": f32(1),
            },
        )
        assert dict(ImportanceMatrix.load(path)) == {
            "flat": Entry([[1, 2], [3, 4]], [5, 6]),
            "wide": Entry(np.arange(12.0).reshape(4, 3), [3]),
            "rounded": Entry([[1]], [3]),
            "x.counts": Entry([[1]], [1]),
        }

    def test_passes_over_what_it_does_not_know(self, tmp_path: Path) -> None:
        path = make(
            tmp_path / "m.gguf",
            {"w.in_sum2": f32(1), "w.counts": f32(1), "w.in_sum4": np.arange(3, dtype=np.int8)},
            kind=None,
            imatrix__datasets_digest="x",
            other__list=[1, 2, 3],
        )
        assert dict(ImportanceMatrix.load(path)) == {"w": Entry([[1]], [1])}

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_does_not_follow_changes_of_the_file(self, tmp_path: Path, dtype: type) -> None:
        tensors = {"w.in_sum2": np.array([2], dtype), "w.counts": np.array([3], dtype)}
        path = make(tmp_path / "m.gguf", tensors)
        matrix = ImportanceMatrix.load(path)
        with path.open("r+b") as file:  # the file is changed in place, which a map of it would show
            file.write(bytes(path.stat().st_size))
        assert dict(matrix) == {"w": Entry([[2]], [3])}


class TestRefusals:
    @pytest.mark.parametrize(
        ("tensors", "keys", "told"),
        [
            ({}, {}, "it has no sums"),
            ({"w.weight": f32(1)}, {}, "it has no sums"),
            ({"w.in_sum2": f32(1)}, {}, r"'w' has 'w\.in_sum2' but no 'w\.counts'"),
            ({"w.counts": f32(1)}, {}, r"'w' has 'w\.counts' but no 'w\.in_sum2'"),
            (
                {"w.in_sum2": np.float16([1]), "w.counts": f32(1)},
                {},
                r"'w\.in_sum2' must be F32, it is F16",
            ),
            (
                {"w.in_sum2": f32(1), "w.counts": np.array([1])},
                {},
                r"'w\.counts' must be F32, it is I64",
            ),
            ({"w.in_sum2": f32([1], [2], [3]), "w.counts": f32(1, 2)}, {}, "'w': .* 2 counts"),
            ({"w.in_sum2": f32(1, 2, 3), "w.counts": f32(1, 2)}, {}, "'w': .* 2 counts"),
            ({"w.in_sum2": f32(np.nan), "w.counts": f32(1)}, {}, "'w': sums must be finite"),
            ({"w.in_sum2": f32(-1), "w.counts": f32(1)}, {}, "'w': sums of squares cannot be neg"),
            ({"w.in_sum2": f32(1), "w.counts": f32(np.inf)}, {}, "'w': a count is NaN or inf"),
            ({"w.in_sum2": f32(1), "w.counts": f32(-1)}, {}, "'w': counts cannot be negative"),
            (
                {"w.in_sum2": np.empty((0, 2), np.float32), "w.counts": f32(1)},
                {},
                "holds no values",
            ),
            (
                {"w.in_sum2": f32(1), "w.counts": f32(1)},
                {"imatrix__datasets": "a.txt"},
                r"imatrix\.datasets must be an array of strings",
            ),
            (
                {"w.in_sum2": f32(1), "w.counts": f32(1)},
                {"imatrix__datasets": [1]},
                r"imatrix\.datasets must be an array of strings",
            ),
            (
                {"w.in_sum2": f32(1), "w.counts": f32(1)},
                {"imatrix__chunk_count": "7"},
                r"imatrix\.chunk_count must be of type int, it is '7'",
            ),
            (
                {"w.in_sum2": f32(1), "w.counts": f32(1)},
                {"imatrix__collector__mtp": 1},
                r"imatrix\.collector\.mtp must be of type bool, it is 1",
            ),
            (
                {"w.in_sum2": f32(1), "w.counts": f32(1)},
                {"imatrix__collector__sources__names": ["a.txt"]},
                r"imatrix\.collector\.sources\.\* must be arrays of one length",
            ),
            (
                {"w.in_sum2": f32(1), "w.counts": f32(1)},
                {
                    f"imatrix__collector__sources__{name}": ["1"]
                    for name in ("names", "documents", "tokens", "dropped", "weights")
                },
                r"imatrix\.collector\.sources\.documents must hold values of type int",
            ),
        ],
    )
    def test_contents(
        self, tmp_path: Path, tensors: dict[str, np.ndarray], keys: dict[str, int], told: str
    ) -> None:
        path = make(tmp_path / "m.gguf", tensors, **keys)
        with pytest.raises(FormatError, match=told) as caught:
            ImportanceMatrix.load(path)
        assert caught.value.path == str(path)
        assert str(caught.value) == f"{path}: {caught.value.reason}"

    def test_a_model(self, tmp_path: Path) -> None:
        path = make(tmp_path / "m.gguf", {"w": f32(1)}, kind="model")
        with pytest.raises(FormatError, match="this one has 'model'; give an importance matrix"):
            ImportanceMatrix.load(path)

    def test_not_gguf(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        with pytest.raises(FileNotFoundError):
            ImportanceMatrix.load(path)
        path.write_bytes(b"")
        with pytest.raises(FormatError, match="not a GGUF file: it is empty"):
            ImportanceMatrix.load(path)
        path.write_bytes(b"\x02\x00\x00\x00 and so on")
        with pytest.raises(FormatError, match="not a GGUF file: it starts with b'"):
            ImportanceMatrix.load(path)
        with pytest.raises(IsADirectoryError):
            ImportanceMatrix.load(tmp_path)

    def test_cut_short_anywhere(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        FULL.save(path)
        whole = path.read_bytes()
        last = gguf.GGUFReader(path).tensors[-1]
        end = int(last.data_offset + last.n_bytes)
        assert len(whole) - 32 < end <= len(whole)  # after that there is only padding
        short = tmp_path / "short.gguf"
        for length in range(end):
            short.write_bytes(whole[:length])
            with pytest.raises(FormatError):
                ImportanceMatrix.load(short)

    @pytest.mark.parametrize("item_type", [0, 4, 8, 9, 10])
    def test_an_array_longer_than_the_file(self, tmp_path: Path, item_type: int) -> None:
        # gguf-py's reader alone appends empty values up to the claimed length.
        key = b"k"
        path = tmp_path / "m.gguf"
        path.write_bytes(
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", len(key))
            + key
            + struct.pack("<IIQ", 9, item_type, 2**62)
            + bytes(64)
        )
        with pytest.raises(FormatError, match="damaged or cut short"):
            ImportanceMatrix.load(path)

    @pytest.mark.parametrize("offset", [2**64 - 32, 2**63, 2**40, 64])
    def test_a_tensor_outside_the_file(self, tmp_path: Path, offset: int) -> None:
        path = make(tmp_path / "m.gguf", {"w.in_sum2": f32(1), "w.counts": f32(1)})
        content = bytearray(path.read_bytes())
        # The offset is the last field of a tensor's description; the second tensor's is 32.
        at = content.index(b"w.counts") + len(b"w.counts")
        at = content.index(struct.pack("<Q", 32), at)
        content[at : at + 8] = struct.pack("<Q", offset)
        path.write_bytes(content)
        with pytest.raises(FormatError, match="damaged or cut short"):
            ImportanceMatrix.load(path)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
    @given(at=st.integers(0, 2000), values=st.binary(min_size=1, max_size=8))
    def test_damage_is_noticed_or_harmless(self, tmp_path: Path, at: int, values: bytes) -> None:
        path = tmp_path / "m.gguf"
        FULL.save(path)
        content = bytearray(path.read_bytes())
        at %= len(content)
        content[at : at + len(values)] = values
        path.write_bytes(content)
        try:
            matrix = ImportanceMatrix.load(path)
        except FormatError:
            return
        for entry in matrix.values():
            assert np.isfinite(entry.sums).all()
            assert entry.n_counts in (1, entry.n_mat)


class TestAtomic:
    def test_new_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        with atomic.replacing(path) as temporary:
            temporary.write_bytes(b"new")
            assert temporary.parent == tmp_path
            assert not path.exists()
        assert path.read_bytes() == b"new"
        assert list(tmp_path.iterdir()) == [path]

    def test_permissions(self, tmp_path: Path) -> None:
        new, old, plain = tmp_path / "new", tmp_path / "old", tmp_path / "plain"
        plain.touch()
        old.touch()
        old.chmod(0o640)
        for path in (new, old):
            with atomic.replacing(path) as temporary:
                temporary.write_bytes(b"x")
        assert new.stat().st_mode == plain.stat().st_mode
        assert old.stat().st_mode & 0o777 == 0o640

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_failure_inside_keeps_the_old_file(
        self, tmp_path: Path, error: type[BaseException]
    ) -> None:
        path = tmp_path / "a"
        path.write_bytes(b"old")

        def write_half() -> None:
            with atomic.replacing(path) as temporary:
                temporary.write_bytes(b"ne")
                raise error

        with pytest.raises(error):
            write_half()
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_failure_at_the_end_keeps_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        path = tmp_path / "a.gguf"
        path.write_bytes(b"old")

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
        with pytest.raises(OSError, match="No space left"):
            FULL.save(path)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_flushes_the_file_before_the_rename_and_the_folder_after(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a"
        done = []
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            is_folder = os.path.samestat(os.fstat(descriptor), tmp_path.stat())
            done.append(("folder" if is_folder else "file", path.exists()))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", noted)
        with atomic.replacing(path) as temporary:
            temporary.write_bytes(b"x")
        assert done == [("file", False), ("folder", True)]

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        target, link = tmp_path / "target", tmp_path / "link"
        target.write_bytes(b"old")
        link.symlink_to(target)
        with atomic.replacing(link) as temporary:
            temporary.write_bytes(b"new")
        assert link.is_symlink()
        assert target.read_bytes() == b"new"

    @pytest.mark.parametrize("name", ["x" * 255, "\N{GRINNING FACE}" * 63])
    def test_a_long_name(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        with atomic.replacing(path) as temporary:
            temporary.write_bytes(b"x")
        assert path.read_bytes() == b"x"

    def test_refuses_what_is_not_a_file(self, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        with pytest.raises(FileNotFoundError, match=r"the folder '.*none' does not exist"):
            FULL.save(tmp_path / "none" / "a")
        with pytest.raises(IsADirectoryError, match="it is a folder; name a file in it"):
            FULL.save(tmp_path)
        with pytest.raises(OSError, match="not a regular file"):
            FULL.save(fifo)
        assert fifo.is_fifo()
