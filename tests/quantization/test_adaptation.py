"""adapt: what the engine collects from one conversion of a model is compared with what it collects
from another conversion of the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers import reconvert
from helpers.forge import tiny_tokenizer
from helpers.forge_any import AnyModel, make_any
from helpers.running import EngineTool, Forged, run_tool

import imatrix
from imatrix import Collector, Entry, ImportanceMatrix, cli
from imatrix.model.header import ModelFile
from imatrix.quantization.adaptation import takes_data

N_CTX = 64

# One matmul of all rows, or several of some of them: the sums in a dot product may have another
# order, and the values behind the weight move by some float32 roundings. (Here they are the same to
# the bit.) Wrong rows would be off by tens of percent.
RTOL = 1e-4


def collected(path: Path, text: Path, *, mtp: bool) -> ImportanceMatrix:
    with Collector(path, n_ctx=N_CTX, n_threads=1) as collector:
        return collector.run(text, mtp=mtp, max_chunks=3)


def check_same(ours: ImportanceMatrix, engines: ImportanceMatrix) -> None:
    assert set(ours) == set(engines)
    for name, entry in engines.items():
        assert ours[name].sums.shape == entry.sums.shape, name
        assert np.array_equal(ours[name].counts, entry.counts), name
        assert np.allclose(ours[name].sums, entry.sums, rtol=RTOL, atol=0), name


def both_gated(tensors: reconvert.Tensors) -> reconvert.Tensors:
    return reconvert.fuse_gate_up(reconvert.fuse_qkv(tensors))


@pytest.fixture(scope="module")
def pair(
    request: pytest.FixtureRequest, prose_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Path], list[ImportanceMatrix]]:
    """A model with separate weights and one with fused weights, and what the engine collects from
    each."""
    folder = tmp_path_factory.mktemp("pair")
    arch, fuse = request.param
    if arch == "dense":  # Phi-3 as its own architecture, and as a Qwen2
        paths = [
            reconvert.dense_model(folder, name, tiny_tokenizer(), change, 1)
            for name, change in (("qwen2", dict), ("phi3", fuse))
        ]
    else:
        model = make_any(folder / "apart.gguf", arch)
        fused = fuse(reconvert.tensors_of(model.path))
        paths = [model.path, reconvert.write(folder / "fused.gguf", arch, model.keys, fused)]
    return paths, [collected(path, prose_file, mtp=arch != "dense") for path in paths]


def dense_fused(tensors: reconvert.Tensors) -> reconvert.Tensors:
    return reconvert.fuse_dense_into_up(reconvert.fuse_qkv(tensors))


@pytest.mark.parametrize(
    ("pair", "fused", "split"),
    [
        # those of the head too
        pytest.param(
            ("cohere2moe", both_gated),
            {"attn_qkv": "fused", "ffn_gate_up_exps": "fused"},
            dict.fromkeys(("attn_q", "attn_k", "attn_v", "ffn_gate_exps", "ffn_up_exps"), "split"),
            id="cohere2moe",
        ),
        # recurrent layers have an attn_qkv of their own, which stays as it is
        pytest.param(
            ("qwen35moe", reconvert.fuse_gate_up),
            {"ffn_gate_up_exps": "fused"},
            dict.fromkeys(("ffn_gate_exps", "ffn_up_exps"), "split"),
            id="qwen35moe",
        ),
        pytest.param(
            ("qwen3next", lambda tensors: reconvert.fuse_ssm_in(tensors, 2, 64)),
            {"ssm_in": "fused"},
            dict.fromkeys(("attn_qkv", "attn_gate"), "split"),
            id="qwen3next",
        ),
        pytest.param(
            ("dense", dense_fused),
            {"attn_qkv": "fused"},
            {**dict.fromkeys(("attn_q", "attn_k", "attn_v"), "split"), "ffn_gate": "shared"},
            id="dense",
        ),
    ],
    indirect=["pair"],
)
def test_fused_and_apart(
    pair: tuple[list[Path], list[ImportanceMatrix]], fused: dict[str, str], split: dict[str, str]
) -> None:
    (apart_model, fused_model), (apart, together) = pair
    for source, target, expected, steps in (
        (apart, fused_model, together, fused),
        (together, apart_model, apart, split),
    ):
        found = imatrix.adapt(source, target)
        check_same(found.matrix, expected)
        assert found.matrix.datasets == source.datasets
        assert found.matrix.provenance == source.provenance
        assert {p.name.split(".")[2]: p.steps for p in found.changed} == {
            kind: (step,) for kind, step in steps.items()
        }
        assert [p.sources for p in found.placed if not p.steps] == [
            (p.name,) for p in found.placed if not p.steps
        ]
        assert found.missing == {}
        if "ffn_gate" in split and target == fused_model:  # one of two weights with the same data
            assert set(found.unplaced) == {f"blk.{il}.ffn_gate.weight" for il in range(2)}
        else:
            assert found.unplaced == {}


class TestExpertsApart:
    """The engine no longer runs such a model, but its quantizer accepts it."""

    @pytest.fixture(scope="class")
    @staticmethod
    def merged(tmp_path_factory: pytest.TempPathFactory) -> AnyModel:
        return make_any(tmp_path_factory.mktemp("moe") / "merged.gguf", "glm4moe")

    @pytest.fixture(scope="class")
    @staticmethod
    def apart(merged: AnyModel) -> Path:
        tensors = reconvert.experts_apart(reconvert.tensors_of(merged.path))
        return reconvert.write(
            merged.path.with_name("apart.gguf"), merged.arch, merged.keys, tensors
        )

    @pytest.fixture(scope="class")
    @staticmethod
    def matrix(merged: AnyModel, prose_file: Path) -> ImportanceMatrix:
        return collected(merged.path, prose_file, mtp=True)

    @pytest.mark.parametrize("form", ["gguf", "dat"])
    def test_quantizing_both_gives_the_same_bytes(
        self,
        form: str,
        merged: AnyModel,
        apart: Path,
        matrix: ImportanceMatrix,
        engine_tool: EngineTool,
        tmp_path: Path,
    ) -> None:
        old = tmp_path / f"merged.{form}"
        matrix.save(old, format=form)  # type: ignore[arg-type]
        found = imatrix.adapt(old, apart, chunk_size=N_CTX)
        assert {p.steps for p in found.placed} == {(), ("cut",)}
        assert (found.missing, found.unplaced) == ({}, {})
        new = tmp_path / "apart.gguf"
        found.matrix.save(new)
        tensors = []
        for model, data in ((merged.path, old), (apart, new)):
            out = tmp_path / "q.gguf"
            run_tool(
                engine_tool("llama-quantize"),
                # weights without data get a type that needs none
                *("--pure", "--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"),
                *("--imatrix", data, model, out, "IQ2_XXS", "2"),
            )
            tensors.append({t.name: t.data.copy() for t in gguf.GGUFReader(out).tensors})
        whole, parts = tensors
        compared = 0
        for name in [name for name in whole if "_exps" in name]:
            for expert, data in enumerate(whole[name]):
                part = name.replace("_exps", f".{expert}")
                assert np.array_equal(data, parts[part]), part
                compared += 1
        assert compared == 2 * 3 * 8
        for name in whole.keys() & parts.keys():
            assert np.array_equal(whole[name], parts[name]), name

    def test_and_back(
        self, merged: AnyModel, apart: Path, matrix: ImportanceMatrix, tmp_path: Path
    ) -> None:
        old = imatrix.adapt(matrix, apart).matrix
        found = imatrix.adapt(old, merged.path)
        check_same(found.matrix, matrix)
        assert {p.steps for p in found.placed} == {(), ("stacked",)}
        # on the way back they are fused
        fused = reconvert.write(
            tmp_path / "fused.gguf",
            merged.arch,
            merged.keys,
            reconvert.fuse_gate_up(reconvert.tensors_of(merged.path)),
        )
        found = imatrix.adapt(old, fused)
        assert found.matrix["blk.1.ffn_gate_up_exps.weight"] == matrix["blk.1.ffn_up_exps.weight"]
        assert {p.steps for p in found.changed} == {("stacked",), ("stacked", "fused")}
        found = imatrix.adapt(found.matrix, apart)
        assert {p.steps for p in found.changed} == {("cut",), ("split", "cut")}
        check_same(found.matrix, old)

    def test_an_expert_that_saw_nothing_has_no_data_either_way(
        self, merged: AnyModel, apart: Path, matrix: ImportanceMatrix
    ) -> None:
        old = dict(imatrix.adapt(matrix, apart).matrix)
        for kind in ("gate", "down"):
            gone = [name for name in old if f".ffn_{kind}.3." in name]
            rest = ImportanceMatrix({name: old[name] for name in old if name not in gone})
            found = imatrix.adapt(rest, merged.path)
            name = f"blk.1.ffn_{kind}_exps.weight"
            expected = matrix[name].counts.copy()
            expected[3] = 0
            assert found.matrix[name].counts.tolist() == expected.tolist()
            assert {p.name: p.unseen for p in found.placed}[name] == 1
            # the other experts do not replace it; its own ffn_up does so for its ffn_gate
            found = imatrix.adapt(rest, apart)
            if kind == "down":
                assert set(found.missing) == set(gone)
            else:
                check_same(found.matrix, ImportanceMatrix(old))
                assert {p.name: p.sources for p in found.changed} == {
                    name: (name.replace("gate", "up"),) for name in gone
                }


class TestLatentAttention:
    """attn_kv_b compared with attn_k_b and attn_v_b: the same weights, but other rows."""

    @pytest.fixture(scope="class")
    @staticmethod
    def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("mla")
        absorbed = make_any(folder / "absorbed.gguf", "deepseek2", n_nextn=0)
        keys = {key: v for key, v in absorbed.keys.items() if not key.endswith("_mla")}
        # without absorption every head has keys and values of its own (models/deepseek2.cpp)
        keys |= {
            f"deepseek2.attention.{key}": value
            for key, value in (("head_count_kv", 2), ("key_length", 288), ("value_length", 128))
        }
        plain = reconvert.fuse_kv_b(reconvert.tensors_of(absorbed.path))
        return absorbed.path, reconvert.write(folder / "plain.gguf", "deepseek2", keys, plain)

    def test_refused_for_a_reason(self, models: tuple[Path, Path], prose_file: Path) -> None:
        absorbed, plain = (collected(path, prose_file, mtp=False) for path in models)
        # the models compute the same: 0.3 % comes from the F16 of the two kinds of key-value cache
        for name in absorbed.keys() & plain.keys():
            assert np.array_equal(absorbed[name].counts, plain[name].counts), name
            a, b = absorbed.importance(name), plain.importance(name)
            assert np.linalg.norm(a - b) < 3e-3 * np.linalg.norm(a), name
        for il in range(2):
            before = plain.importance(f"blk.{il}.attn_kv_b.weight")[0]
            for head in absorbed.importance(f"blk.{il}.attn_v_b.weight"):
                assert np.linalg.norm(before - head) > 0.3 * np.linalg.norm(before)

        for matrix, path, missing in (
            (absorbed, models[1], ("attn_kv_b",)),
            (plain, models[0], ("attn_k_b", "attn_v_b")),
        ):
            found = imatrix.adapt(matrix, path)
            assert set(found.missing) == {
                f"blk.{il}.{kind}.weight" for il in range(2) for kind in missing
            }
            assert all("multiplies" in why for why in found.missing.values())
            assert len(found.unplaced) == 6 - len(found.missing)
            assert all("multiplies" in why for why in found.unplaced.values())

    def test_one_mean_of_all_heads(self, models: tuple[Path, Path], prose_file: Path) -> None:
        """llama-imatrix made such data before it knew dense 3-D weights."""
        matrix = collected(models[0], prose_file, mtp=False)
        old = {
            name: Entry(entry.sums.sum(axis=0, keepdims=True), entry.counts)
            if name.endswith("_b.weight") and entry.n_mat == 2
            else entry
            for name, entry in matrix.items()
        }
        found = imatrix.adapt(ImportanceMatrix(old), models[0])
        assert len(found.unplaced) == 4
        assert found.unplaced == found.missing
        assert "one mean of all 2 heads" in found.missing["blk.0.attn_k_b.weight"]


class TestRefusals:
    @pytest.fixture(scope="class")
    @staticmethod
    def model(forged: Forged) -> Path:
        return forged("glm4moe", seed=1, n_nextn=1).path

    def entries(self, model: Path, n_layer: int = 2) -> dict[str, Entry]:
        names = [f"blk.{il}.attn_{x}.weight" for il in range(n_layer) for x in "qkv"]
        return {name: Entry(np.ones((1, 256)), [4]) for name in names}

    def test_another_width(self, model: Path) -> None:
        matrix = ImportanceMatrix(
            {**self.entries(model), "blk.1.attn_q.weight": Entry(np.ones((1, 320)), [4])}
        )
        with pytest.raises(ValueError, match="is of another model") as caught:
            imatrix.adapt(matrix, model)
        told = "blk.1.attn_q.weight has rows of 320 in the matrix, rows of 256 in the model"
        assert told in str(caught.value)

    def test_another_number_of_experts(self, model: Path) -> None:
        for name, entry in (
            ("blk.1.ffn_up_exps.weight", Entry(np.ones((4, 256)), [1] * 4)),
            ("blk.1.ffn_gate_up_exps.weight", Entry(np.ones((9, 256)), [1] * 9)),
            ("blk.1.ffn_up.8.weight", Entry(np.ones((1, 256)), [1])),
        ):
            with pytest.raises(ValueError, match=r"another model.*blk\.1\.ffn_"):
                imatrix.adapt(ImportanceMatrix({**self.entries(model), name: entry}), model)

    @pytest.mark.parametrize("n_layer", [1, 3, 7])
    def test_another_depth(self, model: Path, n_layer: int) -> None:
        entries = self.entries(model, n_layer)
        if n_layer == 3:  # block 2 is the model's head: a trunk that deep cannot be told from it
            entries |= self.entries(model, 4)
        with pytest.raises(ValueError, match=r"its trunk has \d blocks?, the model's 2"):
            imatrix.adapt(ImportanceMatrix(entries), model)

    def test_nothing_in_common(self, model: Path) -> None:
        matrix = ImportanceMatrix({"blk.1.mixer.weight": Entry([[1.0]], [1])})
        with pytest.raises(ValueError, match=r"no entry .* its first is 'blk.1.mixer.weight'"):
            imatrix.adapt(matrix, model)

    def test_parts_that_contradict_each_other(self, model: Path, tmp_path: Path) -> None:
        fused = reconvert.fuse_qkv(reconvert.tensors_of(model))
        path = reconvert.write(
            tmp_path / "m.gguf",
            "glm4moe",
            {"glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1},
            fused,
        )
        entries = self.entries(model)
        entries["blk.1.attn_v.weight"] = Entry(np.full((1, 256), 1.001), [4])
        found = imatrix.adapt(ImportanceMatrix(entries), path)
        assert "blk.0.attn_qkv.weight" in found.matrix
        assert found.missing["blk.1.attn_qkv.weight"].startswith(
            "blk.1.attn_q.weight and blk.1.attn_v.weight were not fed the same rows"
        )

    def test_a_matmul_of_gate_and_up_that_reported_up(self, model: Path, prose_file: Path) -> None:
        """ik_llama.cpp's fused matmuls do so."""
        matrix = collected(model, prose_file, mtp=True)
        rest = {name: entry for name, entry in matrix.items() if ".ffn_gate" not in name}
        assert len(rest) == len(matrix) - 7  # with the experts' ffn_gate_inp of two blocks
        found = imatrix.adapt(ImportanceMatrix(rest), model)
        assert {place.steps for place in found.changed} == {("shared",)}
        assert set(found.matrix) == {name for name in matrix if "ffn_gate_inp" not in name}
        for place in found.changed:
            assert found.matrix[place.name] == matrix[place.name]

    def test_a_head_without_a_place(self, forged: Forged, prose_file: Path) -> None:
        with_head = forged("glm4moe", seed=1, n_nextn=1).path
        trunk = forged("glm4moe", seed=1).path
        found = imatrix.adapt(collected(with_head, prose_file, mtp=True), trunk)
        assert not found.changed
        assert set(found.unplaced.values()) == {"the model has no block 2"}
        found = imatrix.adapt(collected(trunk, prose_file, mtp=False), with_head)
        assert found.missing
        assert all(name.startswith("blk.2.") for name in found.missing)


@pytest.mark.parametrize("arch", ["cohere2moe", "deepseek4", "nemotron_h_moe", "qwen3next"])
def test_whattakes_data_is_what_the_quantizer_converts(arch: str, tmp_path: Path) -> None:
    path = make_any(tmp_path / "m.gguf", arch).path
    tensors = imatrix.coverage(path, None, "Q4_0", pure=True).tensors
    unasked = ("token_embd.weight", "output.weight")
    expected = {t.name for t in tensors if t.uses_data and t.name not in unasked}
    assert set(takes_data(ModelFile.read(path))) == expected


class TestCommand:
    Main = Callable[..., tuple[int, str, str]]

    @pytest.fixture
    @staticmethod
    def main(capsys: pytest.CaptureFixture[str]) -> TestCommand.Main:
        def run(*args: Any) -> tuple[int, str, str]:
            status = cli.main([str(arg) for arg in args])
            done = capsys.readouterr()
            return status, done.out, done.err

        return run

    @pytest.fixture(scope="class")
    @staticmethod
    def files(
        prose_file: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Path, Path, Path]:
        folder = tmp_path_factory.mktemp("adapt")
        model = make_any(folder / "apart.gguf", "cohere2moe")
        fused = both_gated(reconvert.tensors_of(model.path))
        to = reconvert.write(folder / "fused.gguf", "cohere2moe", model.keys, fused)
        matrix = collected(model.path, prose_file, mtp=True)
        entries = dict(matrix) | {"blk.0.mixer.weight": Entry([[1.0]], [1])}
        del entries["blk.0.ffn_down.weight"]
        for name, given in (("matrix.gguf", entries), ("whole.gguf", dict(matrix))):
            ImportanceMatrix(given, chunk_count=3, chunk_size=N_CTX).save(folder / name)
        return folder / "matrix.gguf", to, folder / "whole.gguf"

    def test_tells_and_writes(
        self, files: tuple[Path, Path, Path], main: Main, tmp_path: Path
    ) -> None:
        matrix, model, _ = files
        out = tmp_path / "out.gguf"
        status, told, err = main("adapt", matrix, "--to", model, "-o", out)
        assert status == 0
        assert told.splitlines() == [
            "5 weights adapted, 16 as they were",
            "  blk.0-2.attn_qkv.weight          fused: from attn_q.weight, attn_k.weight, attn_v.weight",
            "  blk.1-2.ffn_gate_up_exps.weight  fused: from ffn_gate_exps.weight, ffn_up_exps.weight",
            "in the model, without data: 1",
            "  blk.0.ffn_down.weight",
            "in the matrix, without a place: 1",
            "  blk.0.mixer.weight: the model has no such weight",
        ]
        assert err.splitlines() == [f"wrote {out}: gguf, 21 weights: 12 trunk, 9 head (block 2)"]
        check_same(ImportanceMatrix.load(out), imatrix.adapt(matrix, model).matrix)
        told = main("adapt", matrix, "--to", model, "--all")[1]
        assert (
            "  blk.2.attn_qkv.weight          fused: from blk.2.attn_q.weight, "
            "blk.2.attn_k.weight, blk.2.attn_v.weight\n" in told
        )

    def test_without_an_output_it_only_tells(
        self, files: tuple[Path, Path, Path], main: Main, tmp_path: Path
    ) -> None:
        matrix, model, _ = files
        status, told, err = main("adapt", matrix, "--to", model, "--json")
        assert (status, err) == (0, "nothing written: name a file with -o\n")
        data = json.loads(told)
        assert data["missing"] == {"blk.0.ffn_down.weight": ""}
        assert data["unplaced"] == {"blk.0.mixer.weight": "the model has no such weight"}
        (place,) = [each for each in data["placed"] if each["name"] == "blk.1.attn_qkv.weight"]
        assert place == {
            "name": "blk.1.attn_qkv.weight",
            "sources": [f"blk.1.attn_{x}.weight" for x in "qkv"],
            "steps": ["fused"],
            "unseen": 0,
        }

    def test_it_then_quantizes(
        self, files: tuple[Path, Path, Path], main: Main, tmp_path: Path
    ) -> None:
        _, model, whole = files
        out = tmp_path / "out.dat"
        assert main("adapt", whole, "--to", model, "-o", out)[0] == 0
        assert not imatrix.coverage(model, whole, "IQ2_XXS").ready
        assert imatrix.coverage(model, out, "IQ2_XXS").ready
        imatrix.quantize(model, tmp_path / "q.gguf", "IQ2_XXS", imatrix=out)

    def test_bad_input(self, files: tuple[Path, Path, Path], main: Main, tmp_path: Path) -> None:
        matrix, model, _ = files
        for arguments, told in (
            ((matrix, "--to", matrix), "not a model"),
            ((model, "--to", model), "it has no sums"),
            ((matrix,), "--to"),
            ((matrix, "--to", model, "-o", matrix), "would replace the input"),
        ):
            status, _, err = main("adapt", *arguments)
            assert (status, told in err) == (2, True), err
