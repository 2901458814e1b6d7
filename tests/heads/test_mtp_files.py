"""The two halves of a model with a head, compared with gguf-py's reader, with models that were
forged as such halves from the start, and with what the engine's programs make of them."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.forge import ModelSpec, make_model
from helpers.forge_any import make_any
from helpers.ggufs import rewritten
from helpers.running import EngineTool, Forged, run_tool

from imatrix import ModelError, ModelFile
from imatrix.heads.extract import extract_mtp, mtp_name
from imatrix.heads.graft import graft_mtp
from imatrix.model.fit import check_fit

ARCHS = ["glm4moe", "qwen35", "qwen35moe", "deepseek2"]
TRUNK_BLOCKS = ("blk.0.*", "blk.1.*")
HEAD_BLOCK = "blk.2.*"
SHARED = ["token_embd.weight", "output_norm.weight", "output.weight"]


def contents(path: Path) -> dict[str, tuple[Any, ...]]:
    """Every key with its types and value, as gguf-py reads it."""
    fields = gguf.GGUFReader(path).fields
    return {
        key: (tuple(field.types), field.contents())
        for key, field in fields.items()
        if not key.startswith("GGUF.")
    }


def tensors(path: Path) -> dict[str, tuple[Any, ...]]:
    """Every tensor with its type, shape and bytes, as gguf-py reads it."""
    return {
        tensor.name: (tensor.tensor_type, tuple(tensor.shape.tolist()), tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


def split_and_joined(model: Path, folder: Path) -> tuple[Path, Path, Path]:
    head, trunk, again = folder / "mtp-m.gguf", folder / "trunk.gguf", folder / "again.gguf"
    extract_mtp(model, head, trunk_out=trunk)
    graft_mtp(trunk, head, again)
    return head, trunk, again


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("arch", ARCHS)
class TestHalves:
    """A forged model is a pure function of its arguments, so that extracting must give, to the
    byte, the half that is forged directly."""

    def test_head_is_the_model_without_the_blocks_of_the_trunk(
        self, arch: Any, dtype: str, forged: Forged, tmp_path: Path
    ) -> None:
        model = forged(arch, n_nextn=1, dtype=dtype)
        expected = forged(arch, n_nextn=1, dtype=dtype, drop=TRUNK_BLOCKS)
        head, _, _ = split_and_joined(model.path, tmp_path)
        assert head.read_bytes() == expected.path.read_bytes()
        assert contents(head) == contents(model.path)
        assert [n for n in tensors(head) if not n.startswith("blk.2.")] == SHARED

    def test_trunk_is_a_model_that_never_had_a_head(
        self, arch: Any, dtype: str, forged: Forged, tmp_path: Path
    ) -> None:
        model = forged(arch, n_nextn=1, dtype=dtype)
        expected = forged(arch, n_nextn=0, dtype=dtype)
        _, trunk, _ = split_and_joined(model.path, tmp_path)
        assert trunk.read_bytes() == expected.path.read_bytes()
        assert contents(trunk)[f"{arch}.block_count"][1] == 2
        assert f"{arch}.nextn_predict_layers" not in contents(trunk)

    def test_grafting_gives_the_model_back(
        self, arch: Any, dtype: str, forged: Forged, tmp_path: Path
    ) -> None:
        model = forged(arch, n_nextn=1, dtype=dtype)
        _, _, again = split_and_joined(model.path, tmp_path)
        assert contents(again) == contents(model.path)
        assert tensors(again) == tensors(model.path)
        assert again.read_bytes() == model.path.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"tied": True},
        {"embed_tokens": True, "shared_head_head": True},
        {"shared_head_norm": False},
        {"tokenizer": None},
        {"n_nextn": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_variants_come_back(options: dict[str, Any], forged: Forged, tmp_path: Path) -> None:
    model = forged("glm4moe", **{"n_nextn": 1, "dtype": "F16", **options})
    head, trunk, again = split_and_joined(model.path, tmp_path)
    assert again.read_bytes() == model.path.read_bytes()
    assert not [n for n in tensors(trunk) if n.startswith(("blk.2.", "blk.3."))]
    assert not [n for n in tensors(head) if n.startswith(("blk.0.", "blk.1."))]


def test_order_of_converted_files_comes_back(forged: Forged, tmp_path: Path) -> None:
    # a converted checkpoint begins with the embeddings and ends with norm and output; the blocks
    # are between
    def order(names: list[str]) -> list[str]:
        return ["token_embd.weight", *sorted(set(names) - set(SHARED)), *SHARED[1:]]

    source = forged("glm4moe", n_nextn=1).path
    model = rewritten(source, tmp_path / "model.gguf", order=order)
    _, _, again = split_and_joined(model, tmp_path)
    assert again.read_bytes() == model.read_bytes()


def test_per_layer_arrays_follow_the_blocks(tmp_path: Path) -> None:
    arrays = {
        "glm4moe.attention.head_count_kv": [2, 2, 2, 4],
        "glm4moe.attention.sliding_window_pattern": [True, False, True, False],
        "glm4moe.swiglu_clamp_exp": [0.0, 7.0, 7.5, 0.0],
        # as long as the model has blocks, but not per layer
        "glm4moe.rope.dimension_sections": [6, 5, 5, 0],
        # one value for each trunk block, as in glm-dsa
        "glm4moe.attention.indexer.types": [True, False, True],
    }
    model = tmp_path / "model.gguf"
    make_model(model, "glm4moe", n_layer=3, n_nextn=1, metadata=arrays)
    head, trunk, again = split_and_joined(model, tmp_path)
    assert contents(head) == contents(model)
    found = {key: value for key, (_, value) in contents(trunk).items() if key in arrays}
    assert found == {
        "glm4moe.attention.head_count_kv": [2, 2, 2],
        "glm4moe.attention.sliding_window_pattern": [True, False, True],
        "glm4moe.swiglu_clamp_exp": [0.0, 7.0, 7.5],
        "glm4moe.rope.dimension_sections": [6, 5, 5, 0],
        "glm4moe.attention.indexer.types": [True, False, True],
    }
    assert again.read_bytes() == model.read_bytes()


def test_what_only_the_trunk_of_qwen4exp_uses_stays_there(tmp_path: Path) -> None:
    """Its table of n-grams is larger than the rest of the model: the head's file goes without it,
    as the converter's does (conversion/qwen4exp.py, mtp_only), and the engine's loader, which asks
    for the table if the keys mention one, accepts the file (test_split_files.py)."""
    model = make_any(tmp_path / "m.gguf", "qwen4exp")
    outside = ["token_embd", "output_hc_norm", "output_hc_down", "output_hc_up", "output",
               "per_layer_token_embd"]  # fmt: skip
    assert [n for n in tensors(model.path) if not n.startswith("blk.")] == [
        f"{name}.weight" for name in outside
    ]
    head, trunk, again = split_and_joined(model.path, tmp_path)  # warnings are errors
    assert [n for n in tensors(head) if not n.startswith("blk.2.")] == [
        "token_embd.weight", "output.weight"
    ]  # fmt: skip
    gone = [
        "embedding_length_per_layer_input",
        *(f"ple.{key}" for key in ("layers", "ngram_size", "heads_per_ngram", "conv_kernel")),
        *(f"ple.{key}" for key in ("eos_token_id", "layer_multipliers", "head_offsets")),
        "ple.head_vocab_sizes",
    ]
    assert set(contents(model.path)) - set(contents(head)) == {f"qwen4exp.{key}" for key in gone}
    assert set(contents(model.path)) - set(contents(trunk)) == {"qwen4exp.nextn_predict_layers"}
    assert again.read_bytes() == model.path.read_bytes()


def test_array_in_one_file_and_one_value_in_the_other(tmp_path: Path) -> None:
    key = "glm4moe.attention.head_count_kv"
    both = {"n_layer": 2, "n_head_kv": 2}
    one = make_model(tmp_path / "one.gguf", "glm4moe", **both).path
    many = make_model(tmp_path / "many.gguf", "glm4moe", metadata={key: [2, 2]}, **both).path
    head_one = make_model(tmp_path / "h1.gguf", "glm4moe", n_nextn=1, **both).path
    head_many = make_model(
        tmp_path / "h2.gguf", "glm4moe", n_nextn=1, metadata={key: [2, 2, 1]}, **both
    ).path
    graft_mtp(one, head_many, tmp_path / "a.gguf")
    assert contents(tmp_path / "a.gguf")[key][1] == [2, 2, 1]
    graft_mtp(many, head_one, tmp_path / "b.gguf")
    assert contents(tmp_path / "b.gguf")[key][1] == [2, 2, 2]
    graft_mtp(many, head_many, tmp_path / "c.gguf")
    assert contents(tmp_path / "c.gguf")[key][1] == [2, 2, 1]


def test_parts_are_read_and_one_file_is_written(forged: Forged, tmp_path: Path) -> None:
    source = forged("qwen35", n_nextn=1, dtype="Q8_0")
    rewritten(source.path, tmp_path / "m.gguf", split=9)
    first = min(tmp_path.glob("m-00001-of-*.gguf"))
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    assert mtp_name(first) == "mtp-m.gguf"
    report = extract_mtp(first, tmp_path, trunk_out=tmp_path / "trunk.gguf")
    assert report.head == tmp_path / "mtp-m.gguf"
    assert report.model_bytes == sum(part.stat().st_size for part in parts)
    graft_mtp(tmp_path / "trunk.gguf", report.head, tmp_path / "again.gguf")
    assert contents(tmp_path / "again.gguf") == contents(source.path)
    assert tensors(tmp_path / "again.gguf") == tensors(source.path)

    with pytest.raises(ModelError, match="give the first part"):
        extract_mtp(parts[1], tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="would replace the input"):
        extract_mtp(first, parts[1])
    third = parts[2].rename(tmp_path / "aside")
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(ModelError, match=r"m-00003-of-\d+.gguf: by its name it is part 3"):
        extract_mtp(first, tmp_path / "x.gguf")
    third.rename(parts[2])
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"m-00002-of-\d+.gguf is missing"):
        extract_mtp(first, tmp_path / "x.gguf")


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment_is_kept(alignment: int, forged: Forged, tmp_path: Path) -> None:
    source = forged("qwen35", n_nextn=1, dtype="Q8_0").path
    model = rewritten(source, tmp_path / "model.gguf", alignment=alignment)
    head, trunk, again = split_and_joined(model, tmp_path)
    for path in (head, trunk):
        reader = gguf.GGUFReader(path)
        assert reader.alignment == alignment
        assert all(tensor.data_offset % alignment == 0 for tensor in reader.tensors)
        of_model = tensors(model)
        assert all(of_model[name] == tensor for name, tensor in tensors(path).items())
    assert again.read_bytes() == model.read_bytes()


def test_files_of_different_alignment_are_joined(forged: Forged, tmp_path: Path) -> None:
    source = forged("qwen35", n_nextn=1, dtype="Q8_0").path
    head, trunk, _ = split_and_joined(source, tmp_path)
    head = rewritten(head, tmp_path / "h.gguf", alignment=256)
    graft_mtp(trunk, head, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == source.read_bytes()


def test_unknown_tensor_type_comes_through(forged: Forged, tmp_path: Path) -> None:
    # the type of a fork: gguf-py gives it no size
    source = forged("glm4moe", n_nextn=1, dtype="F16").path
    model = tmp_path / "model.gguf"
    data = bytearray(source.read_bytes())
    for name in (b"blk.2.nextn.eh_proj.weight", b"blk.0.attn_q.weight"):
        at = data.index(name) + len(name) + 4 + 16
        assert struct.unpack_from("<I", data, at)[0] == 1  # F16
        struct.pack_into("<I", data, at, 139)
    model.write_bytes(data)
    _, _, again = split_and_joined(model, tmp_path)
    assert again.read_bytes() == data


def test_unknown_type_of_another_alignment_is_refused(forged: Forged, tmp_path: Path) -> None:
    # its size is known only up to the padding
    head, trunk, _ = split_and_joined(forged("glm4moe", n_nextn=1, dtype="F16").path, tmp_path)
    head = rewritten(head, tmp_path / "h.gguf", alignment=256)
    data = bytearray(head.read_bytes())
    name = b"blk.2.nextn.eh_proj.weight"
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 16, 139)
    head.write_bytes(data)
    with pytest.raises(ModelError, match=r"ggml type 139.*aligned to 256 bytes, the output to 32"):
        graft_mtp(trunk, head, tmp_path / "out.gguf")


def test_version_2_is_kept(forged: Forged, tmp_path: Path) -> None:
    data = forged("glm4moe", n_nextn=1).path.read_bytes()
    (tmp_path / "v2.gguf").write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    head, _, again = split_and_joined(tmp_path / "v2.gguf", tmp_path)
    assert head.read_bytes()[4:8] == struct.pack("<I", 2)
    assert again.read_bytes()[8:] == data[8:]


def test_reports_count_bytes(forged: Forged, tmp_path: Path) -> None:
    model = forged("qwen35", n_nextn=1, dtype="Q8_0").path
    head, trunk, again = (tmp_path / f"{name}.gguf" for name in ("h", "t", "m"))
    seen: list[tuple[int, int]] = []
    taken = extract_mtp(model, head, trunk_out=trunk, progress=lambda *at: seen.append(at))
    expected = {t.name: t.n_bytes for t in gguf.GGUFReader(model).tensors if t.name in SHARED}
    assert taken.shared == expected
    assert taken.shared_bytes == sum(expected.values())
    assert (taken.head_bytes, taken.trunk_bytes) == (head.stat().st_size, trunk.stat().st_size)
    assert taken.model_bytes == model.stat().st_size
    assert (taken.n_trunk, taken.n_nextn) == (2, 1)
    total = sum(t.n_bytes for path in (head, trunk) for t in gguf.GGUFReader(path).tensors)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)

    joined = graft_mtp(trunk, head, again)
    assert joined.shared == expected
    assert joined.differing == ()
    assert joined.model_bytes == again.stat().st_size
    assert (joined.trunk_bytes, joined.head_bytes) == (taken.trunk_bytes, taken.head_bytes)
    assert (joined.n_trunk, joined.n_nextn) == (2, 1)

    alone = extract_mtp(model, tmp_path / "alone.gguf")
    assert (alone.trunk, alone.trunk_bytes) == (None, None)
    assert (tmp_path / "alone.gguf").read_bytes() == head.read_bytes()


class TestOtherTensors:
    """Halves that do not come from one file."""

    def test_head_of_another_precision(self, forged: Forged, tmp_path: Path) -> None:
        trunk = forged("qwen35", n_nextn=0, dtype="Q8_0").path
        donor = forged("qwen35", n_nextn=1, dtype="F16").path
        out = tmp_path / "mixed.gguf"
        with pytest.warns(UserWarning, match=r"token_embd.weight, output.weight differ") as told:
            report = graft_mtp(trunk, donor, out)
        assert len(told) == 1
        assert report.differing == ("token_embd.weight", "output.weight")
        of_trunk, of_donor, found = tensors(trunk), tensors(donor), tensors(out)
        assert found == of_trunk | {k: v for k, v in of_donor.items() if k.startswith("blk.2.")}

    def test_one_other_byte_in_the_embeddings(self, forged: Forged, tmp_path: Path) -> None:
        model = forged("glm4moe", n_nextn=1).path
        head, trunk, _ = split_and_joined(model, tmp_path)
        reader = gguf.GGUFReader(head)
        at = next(t.data_offset + t.n_bytes - 1 for t in reader.tensors if t.name == SHARED[0])
        del reader
        data = bytearray(head.read_bytes())
        data[at] ^= 1
        head.write_bytes(data)
        with pytest.warns(UserWarning, match=r"mtp-m.gguf and trunk.gguf: token_embd.weight diff"):
            report = graft_mtp(trunk, head, tmp_path / "again.gguf")
        assert report.differing == ("token_embd.weight",)
        assert (tmp_path / "again.gguf").read_bytes() == model.read_bytes()

    def test_output_only_in_the_head_stays_out(self, forged: Forged, tmp_path: Path) -> None:
        # with it, a trunk that multiplies with its embeddings would become another model
        trunk = forged("glm4moe", n_nextn=0, tied=True).path
        donor = forged("glm4moe", n_nextn=1).path
        with pytest.warns(UserWarning, match=r"output.weight lie only in the head's file"):
            graft_mtp(trunk, donor, tmp_path / "out.gguf")
        assert "output.weight" not in tensors(tmp_path / "out.gguf")

    def test_trunk_that_claims_its_head_gets_it(self, forged: Forged, tmp_path: Path) -> None:
        model = forged("glm4moe", n_nextn=1)
        claims = forged("glm4moe", n_nextn=1, drop=HEAD_BLOCK)
        graft_mtp(claims.path, model.path, tmp_path / "out.gguf")
        assert (tmp_path / "out.gguf").read_bytes() == model.path.read_bytes()

    def test_hyper_connections_of_two_outputs_are_refused(
        self, forged: Forged, tmp_path: Path
    ) -> None:
        # the file of deepseek4's head has its own hc_head_* under the trunk's names
        paths = []
        for n_nextn in (0, 1):
            source = forged("glm4moe", n_nextn=n_nextn).path
            writer_out = tmp_path / f"{n_nextn}.gguf"
            reader = gguf.GGUFReader(source)
            writer = gguf.GGUFWriter(writer_out, "glm4moe")
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
            for tensor in reader.tensors:
                writer.add_tensor(tensor.name, np.array(tensor.data))
            writer.add_tensor("hc_head_base.weight", np.full(4, n_nextn, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            paths.append(writer_out)
        with pytest.raises(ModelError, match=r"hc_head_base.weight .*Keep this model as two files"):
            graft_mtp(*paths, tmp_path / "out.gguf")


class TestFit:
    """A head of another trunk is refused with the two values that differ."""

    def refused(self, trunk: ModelSpec, head: ModelSpec, tmp_path: Path, *values: str) -> None:
        for attempt in (
            lambda: graft_mtp(trunk.path, head.path, tmp_path / "out.gguf"),
            lambda: check_fit(ModelFile.read(trunk.path), ModelFile.read(head.path)),
        ):
            with pytest.raises(ModelError) as caught:
                attempt()
            for value in values:
                assert value in str(caught.value)
        assert not (tmp_path / "out.gguf").exists()

    def test_fitting_pairs_are_accepted(self, forged: Forged) -> None:
        for arch in ARCHS:
            head = ModelFile.read(forged(arch, n_nextn=1, drop=TRUNK_BLOCKS).path)
            check_fit(ModelFile.read(forged(arch).path), head)
            check_fit(ModelFile.read(forged(arch, n_nextn=1).path), head)

    def test_architecture(self, forged: Forged, tmp_path: Path) -> None:
        self.refused(
            forged("qwen35"), forged("glm4moe", n_nextn=1), tmp_path, "qwen35 in", "glm4moe in"
        )

    def test_block_count(self, forged: Forged, tmp_path: Path) -> None:
        trunk, head = forged("glm4moe", n_layer=3), forged("glm4moe", n_nextn=1)
        self.refused(trunk, head, tmp_path, "trunk blocks is 3 in", "2 in the head's")

    def test_number_of_heads(self, forged: Forged, tmp_path: Path) -> None:
        trunk = forged("glm4moe", n_nextn=2, drop=("blk.2.*", "blk.3.*"))
        head = forged("glm4moe", n_nextn=1)
        self.refused(trunk, head, tmp_path, "nextn_predict_layers is 2 in", "1 in the head's")

    def test_width(self, forged: Forged, tmp_path: Path) -> None:
        trunk, head = forged("glm4moe", n_embd=512), forged("glm4moe", n_nextn=1)
        self.refused(trunk, head, tmp_path, "n_embd", "512 in", "256 in")

    def test_vocabulary(self, forged: Forged, tmp_path: Path) -> None:
        trunk, head = forged("glm4moe", n_vocab=300), forged("glm4moe", n_nextn=1, n_vocab=320)
        self.refused(trunk, head, tmp_path, "vocabulary", "300 in", "320 in")

    def test_embeddings_missing(self, forged: Forged, tmp_path: Path) -> None:
        trunk = forged("glm4moe", drop="token_embd.weight")
        self.refused(trunk, forged("glm4moe", n_nextn=1), tmp_path, "token_embd.weight is missing")

    def test_no_head(self, forged: Forged, tmp_path: Path) -> None:
        self.refused(forged("glm4moe"), forged("glm4moe"), tmp_path, "no MTP head")
        claims = forged("glm4moe", n_nextn=1, drop="blk.2.nextn.hnorm.weight")
        self.refused(forged("glm4moe"), claims, tmp_path, "blk.2.nextn.hnorm.weight is missing")
        claims = forged("glm4moe", n_nextn=1, drop=("blk.2.[!n]*"))
        self.refused(forged("glm4moe"), claims, tmp_path, "but blk.2.attn_* is missing")

    @pytest.mark.parametrize(
        ("key", "ours", "theirs"),
        [
            ("attention.head_count", 4, 8),
            ("attention.head_count_kv", 2, 4),
            ("expert_gating_func", 2, 1),
            ("expert_weights_scale", 1.5, 2.5),
        ],
    )
    def test_keys_that_shape_the_weights(
        self, key: str, ours: float, theirs: float, forged: Forged, tmp_path: Path
    ) -> None:
        head = forged("glm4moe", n_nextn=1, metadata={f"glm4moe.{key}": theirs}).path
        with pytest.raises(ModelError, match=rf"glm4moe.{key} is {ours} in the trunk, {theirs} in"):
            graft_mtp(forged("glm4moe").path, head, tmp_path / "out.gguf")

    def test_entry_of_a_block(self, forged: Forged, tmp_path: Path) -> None:
        key = "glm4moe.attention.head_count_kv"
        head = forged("glm4moe", n_nextn=1, metadata={key: [2, 4, 2]}).path
        with pytest.raises(ModelError, match=rf"{key} of block 1 is 2 in the trunk, 4 in"):
            graft_mtp(forged("glm4moe").path, head, tmp_path / "out.gguf")

    def test_number_of_words(self, forged: Forged, tmp_path: Path) -> None:
        tokens = [f"<{i}>" for i in range(7)]
        head = forged("glm4moe", n_nextn=1, metadata={"tokenizer.ggml.tokens": tokens}).path
        with pytest.raises(ModelError, match=r"tokenizer.ggml.tokens is \d+ in the trunk, 7 in"):
            graft_mtp(forged("glm4moe").path, head, tmp_path / "out.gguf")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("glm4moe.context_length", 99, "context_length is 4096 in the trunk, 99 in"),
            ("glm4moe.rope.freq_base", 5.0, "rope.freq_base is 10000.0 in the trunk, 5.0 in"),
            ("glm4moe.new_key", 1, "glm4moe.new_key is only in the head's file"),
            ("general.tensor_extra.name", ["a"], "options of the head's own tensors are lost"),
        ],
    )
    def test_what_may_differ_is_reported(
        self, key: str, value: Any, message: str, forged: Forged, tmp_path: Path
    ) -> None:
        trunk = forged("glm4moe")
        head = forged("glm4moe", n_nextn=1, metadata={key: value}).path
        with pytest.warns(UserWarning, match=message):
            graft_mtp(trunk.path, head, tmp_path / "out.gguf")
        bundled = contents(forged("glm4moe", n_nextn=1).path)
        assert contents(tmp_path / "out.gguf") == bundled

    def test_trunk_with_a_head(self, forged: Forged, tmp_path: Path) -> None:
        model = forged("glm4moe", n_nextn=1).path
        head, trunk, _ = split_and_joined(model, tmp_path)
        with pytest.raises(ModelError, match="it has a head already"):
            graft_mtp(model, head, tmp_path / "out.gguf")
        with pytest.raises(ModelError, match="no trunk block; give the trunk first"):
            graft_mtp(head, trunk, tmp_path / "out.gguf")


class TestRefusals:
    def test_nothing_to_extract(self, forged: Forged, tmp_path: Path) -> None:
        out = tmp_path / "out.gguf"
        with pytest.raises(ModelError, match=r"no MTP head .*--no-mtp"):
            extract_mtp(forged("glm4moe").path, out)
        with pytest.raises(
            ModelError, match=r"claim 1 MTP head .*blk.2.nextn.eh_proj.weight is missing"
        ):
            extract_mtp(forged("glm4moe", n_nextn=1, drop=HEAD_BLOCK).path, out)
        with pytest.raises(ModelError, match="head-only file already"):
            extract_mtp(forged("glm4moe", n_nextn=1, drop=TRUNK_BLOCKS).path, out)
        assert not out.exists()

    def test_paths(self, forged: Forged, tmp_path: Path) -> None:
        model = tmp_path / "model.gguf"
        model.write_bytes(forged("glm4moe", n_nextn=1).path.read_bytes())
        out = tmp_path / "out.gguf"
        with pytest.raises(FileNotFoundError, match="no such model file"):
            extract_mtp(tmp_path / "absent.gguf", out)
        with pytest.raises(IsADirectoryError):
            extract_mtp(tmp_path, out)
        with pytest.raises(IsADirectoryError):
            extract_mtp(model, out, trunk_out=tmp_path)
        (tmp_path / "link.gguf").symlink_to(model)
        (tmp_path / "hard.gguf").hardlink_to(model)
        for same in ("model.gguf", "link.gguf", "hard.gguf"):
            with pytest.raises(ValueError, match="would replace the input"):
                extract_mtp(model, tmp_path / same)
            with pytest.raises(ValueError, match="would replace the input"):
                extract_mtp(model, out, trunk_out=tmp_path / same)
        with pytest.raises(ValueError, match="are one file"):
            extract_mtp(model, out, trunk_out=out)
        head, trunk, _ = split_and_joined(model, tmp_path)
        for same in (head, trunk):
            with pytest.raises(ValueError, match="would replace the input"):
                graft_mtp(trunk, head, same)
        assert model.read_bytes() == forged("glm4moe", n_nextn=1).path.read_bytes()

    def test_neither_output_is_replaced_when_one_cannot_be_written(
        self, forged: Forged, tmp_path: Path
    ) -> None:
        out = tmp_path / "out.gguf"
        out.write_text("old")
        model = forged("glm4moe", n_nextn=1).path
        with pytest.raises(FileNotFoundError, match="does not exist"):
            extract_mtp(model, out, trunk_out=tmp_path / "absent" / "trunk.gguf")

        def stop(done: int, total: int) -> None:
            if done == total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            extract_mtp(model, out, trunk_out=tmp_path / "trunk.gguf", progress=stop)
        assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
        assert out.read_text() == "old"
        extract_mtp(model, out)
        assert out.read_bytes()[:4] == b"GGUF"

    def test_other_files(self, tmp_path: Path) -> None:
        bad, out = tmp_path / "bad.gguf", tmp_path / "out.gguf"
        for data, message in [
            (b"", "it is empty"),
            (b"PK\x03\x04 and more", "it starts with b'PK"),
            (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1; 2 and 3 are supported"),
            (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "no general.architecture"),
            (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "cut short or damaged"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "cut short or damaged"),
        ]:
            bad.write_bytes(data)
            with pytest.raises(ModelError, match=message):
                extract_mtp(bad, out)

    def test_every_cut_is_noticed(self, forged: Forged, tmp_path: Path) -> None:
        data = forged("glm4moe", n_nextn=1, dtype="Q8_0").path.read_bytes()
        bad = tmp_path / "bad.gguf"
        rng = np.random.default_rng(3)
        header = gguf.GGUFReader(forged("glm4moe", n_nextn=1, dtype="Q8_0").path).data_offset
        ends = [*rng.integers(0, header, 100), *rng.integers(header, len(data) - 32, 20)]
        for end in map(int, ends):
            bad.write_bytes(data[:end])
            with pytest.raises(ModelError, match=r"cut short|not a GGUF|empty"):
                extract_mtp(bad, tmp_path / "out.gguf")

    @pytest.mark.slow
    def test_damage_gives_a_file_or_an_error_that_says_so(
        self, forged: Forged, tmp_path: Path
    ) -> None:
        path = forged("glm4moe", n_nextn=1, dtype="Q8_0").path
        data, header = path.read_bytes(), int(gguf.GGUFReader(path).data_offset)
        bad, out = tmp_path / "bad.gguf", tmp_path / "out.gguf"
        rng = np.random.default_rng(4)
        outcomes = {True: 0, False: 0}
        for case in range(150):  # make fuzz tries as many as one likes
            damaged = bytearray(data)
            for at in rng.integers(4, header, 1 + case % 3):
                damaged[at] = rng.integers(0, 256)
            bad.write_bytes(damaged)
            tracemalloc.start()
            try:
                extract_mtp(bad, out)
                outcomes[True] += 1
            except ModelError:
                outcomes[False] += 1
            assert tracemalloc.get_traced_memory()[1] < 64 << 20
            tracemalloc.stop()
        assert min(outcomes.values()) > 10


def big_model(path: Path, n_vocab: int) -> None:
    """A skeleton of a model with embeddings of 1 KB for each word."""
    writer = gguf.GGUFWriter(path, "glm4moe")
    writer.add_block_count(2)
    writer.add_nextn_predict_layers(1)
    writer.add_tensor("token_embd.weight", np.zeros((n_vocab, 256), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.ones((n_vocab, 256), np.float32))
    for name in ("attn_norm", "nextn.enorm", "nextn.hnorm"):
        writer.add_tensor(f"blk.1.{name}.weight", np.ones(256, np.float32))
    writer.add_tensor("blk.1.nextn.eh_proj.weight", np.ones((256, 512), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_memory_does_not_follow_the_model(tmp_path: Path) -> None:
    big_model(tmp_path / "big.gguf", n_vocab=64 << 10)  # 128 MB
    script = """
import resource, sys
from imatrix.heads import extract, graft
# no engine loads the tensors that make it big
extract.check_loads = graft.check_loads = lambda *paths: None
extract_mtp, graft_mtp = extract.extract_mtp, graft.graft_mtp
folder = sys.argv[1]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
extract_mtp(f"{folder}/big.gguf", f"{folder}/h.gguf", trunk_out=f"{folder}/t.gguf")
graft_mtp(f"{folder}/t.gguf", f"{folder}/h.gguf", f"{folder}/again.gguf")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux only")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 32 << 10
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "big.gguf").read_bytes()


class TestEngine:
    """The engine's own programs load the files and compute the same with them as with the whole
    model."""

    @pytest.mark.parametrize("arch", ARCHS)
    def test_trunk_collects_what_the_bundled_model_does(
        self, arch: Any, forged: Forged, engine_tool: EngineTool, prose_file: Path, tmp_path: Path
    ) -> None:
        model = forged(arch, n_nextn=1, dtype="F16").path
        _, trunk, _ = split_and_joined(model, tmp_path)
        sums = []
        for path in (model, trunk):
            out = tmp_path / f"{path.stem}.imatrix.gguf"
            common = ("--chunks", "2", "-c", "64", "-t", "1", "--no-ppl")
            run_tool(engine_tool("llama-imatrix"), "-m", path, "-f", prose_file, "-o", out, *common)
            sums.append(tensors(out))
        assert sums[0]
        assert sums[0] == sums[1]

    @pytest.mark.parametrize("arch", ARCHS)
    def test_every_file_can_be_quantized(
        self, arch: Any, forged: Forged, engine_tool: EngineTool, tmp_path: Path
    ) -> None:
        model = forged(arch, n_nextn=1, dtype="F16").path
        for path in split_and_joined(model, tmp_path):
            out = tmp_path / "quantized.gguf"
            run_tool(engine_tool("llama-quantize"), path, out, "Q8_0", "1")
            assert tensors(out).keys() == tensors(path).keys()

    def test_parts_of_two_precisions_load(
        self, forged: Forged, engine_tool: EngineTool, prose_file: Path, tmp_path: Path
    ) -> None:
        trunk, donor = forged("qwen35", dtype="Q8_0").path, forged("qwen35", n_nextn=1).path
        mixed, out = tmp_path / "mixed.gguf", tmp_path / "out.gguf"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graft_mtp(trunk, donor, mixed)
        common = ("-f", prose_file, "-o", out, "--chunks", "1", "-c", "64", "-t", "1", "--no-ppl")
        run_tool(engine_tool("llama-imatrix"), "-m", mixed, *common)
        assert tensors(out)
