"""Files whose metadata and tensors disagree about a head, and other files that are no complete
model.

The engine says what each of them is: its loader, and its count of the trunk's blocks.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.forge_any import AnyModel, make_any
from helpers.running import EngineTool, run_tool
from numpy.typing import NDArray

import imatrix
from imatrix import Collector, ModelError, ModelFile, coverage, drop_mtp, graft_mtp
from imatrix.cli.program import main
from imatrix.model.fit import check_fit
from imatrix.native import engine as native

# The engine asks blk.<n_trunk>.nextn.eh_proj whether there is a head.
PROBED = ["qwen35", "qwen35moe", "qwen3next", "nemotron_h_moe", "glm4moe", "deepseek2", "step35"]


def engine(path: Path, *, mtp: bool = False) -> tuple[int, int]:
    """Blocks of the trunk and of the head, as the engine counts them after it has loaded a file."""
    model = native.Model(
        str(path), mtp=mtp, n_gpu_layers=0, use_mmap=True, check_tensors=False, no_alloc=False
    )
    return model.n_trunk, model.n_nextn


def rewrite(
    source: Path,
    out: Path,
    *,
    keys: dict[str, int | None] | None = None,
    more: dict[str, NDArray[Any]] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """The model with changed whole-number keys (None drops one), and with tensors added and left
    out."""
    keys, reader = keys or {}, gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", *keys):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for key, value in keys.items():
        if value is not None:
            writer.add_uint32(key, value)
    for tensor in reader.tensors:
        if not tensor.name.startswith(without or ("\0",)):
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def contents(path: Path) -> dict[str, bytes]:
    return {t.name: np.array(t.data).tobytes() for t in gguf.GGUFReader(path).tensors}


def head_blocks(model: AnyModel) -> tuple[str, ...]:
    return tuple(f"blk.{model.n_layer + k}." for k in range(model.n_nextn))


def claim(model: AnyModel) -> str:
    return f"{model.arch}.nextn_predict_layers"


def refused(path: Path, *words: str) -> None:
    """Everything that opens a model refuses the file; nothing is written."""
    folder = path.parent
    out = folder / "refused.gguf"
    (folder / "text.txt").write_text("some words to run, and some more\n" * 50)
    commands = [
        ["check", path, "--type", "Q4_K"],
        ["quantize", path, out, "Q4_K"],
        ["collect", "-m", path, "-f", folder / "text.txt", "-o", out, "-c", "32"],
        ["evaluate", path, "-f", folder / "text.txt", "-c", "32"],
    ]
    for command in commands:
        status = main(list(map(str, command)))
        assert status == 2, command
        assert not out.exists()
    for act in (
        lambda: coverage(path, None, "Q4_K"),
        lambda: imatrix.quantize(path, out, "Q4_K"),
        lambda: Collector(path),
    ):
        with pytest.raises(ModelError) as error:
            act()
        for word in words:
            assert word in str(error.value)


# --- a head that is only claimed -----------------------------------------------------------------


@pytest.mark.parametrize("arch", PROBED)
def test_a_trunk_that_claims_a_head_is_a_trunk(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_any(tmp_path / "whole.gguf", arch)
    path = rewrite(whole.path, tmp_path / "m.gguf", without=head_blocks(whole))
    file = ModelFile.read(path)
    assert (file.n_trunk, file.n_nextn, file.claimed_nextn) == (whole.n_layer, 0, whole.n_nextn)
    assert engine(path)[0] == file.n_trunk
    found = coverage(path, None, "Q8_0")
    assert found.ready
    assert found.head == ()
    imatrix.quantize(path, tmp_path / "q.gguf", "Q8_0")
    assert engine(tmp_path / "q.gguf", mtp=True)[0] == file.n_trunk
    # the collected data have nothing of a head, and mtp=True says why
    says = r"claim \d MTP head block.*eh_proj.weight is missing"
    with Collector(path, n_ctx=32, n_threads=1) as collector:
        assert not collector.run([list(range(5, 37))]).head_blocks
        with pytest.raises(ModelError, match=f"{says}.*graft-mtp.*drop-mtp"):
            collector.run([list(range(5, 37))], mtp=True)
    with pytest.raises(ModelError, match=rf"{says} \(mtp=True\)"):
        imatrix.evaluate(path, [list(range(5, 37))], mtp=True, n_ctx=32)
    assert main(["drop-mtp", str(path), "-o", str(tmp_path / "d.gguf")]) == 0
    assert "with all tensors, without the claim of a head" in capsys.readouterr().err
    dropped = gguf.GGUFReader(tmp_path / "d.gguf")
    assert claim(whole) not in dropped.fields
    assert dropped.fields[f"{arch}.block_count"].contents() == whole.n_layer
    assert contents(tmp_path / "d.gguf") == contents(path)


def test_deepseek4_that_claims_a_head_counts_its_last_block_with_the_trunk(tmp_path: Path) -> None:
    """ik_llama.cpp #2256: the key is there, block_count counts the trunk alone."""
    whole = make_any(tmp_path / "whole.gguf", "deepseek4")
    trunk = drop_mtp(whole.path, tmp_path / "trunk.gguf")
    assert trunk.n_trunk == whole.n_layer
    path = rewrite(trunk.model, tmp_path / "m.gguf", keys={claim(whole): 1})
    file = ModelFile.read(path)
    assert (file.n_trunk, file.n_nextn) == engine(path) == (whole.n_layer, 0)
    found = coverage(path, None, "Q8_0")
    assert found.head == ()
    imatrix.quantize(path, tmp_path / "q.gguf", "Q8_0")
    assert engine(tmp_path / "q.gguf") == (whole.n_layer, 0)


def test_deepseek4_whose_head_is_gone_is_not_loaded(tmp_path: Path) -> None:
    whole = make_any(tmp_path / "whole.gguf", "deepseek4")
    path = rewrite(whole.path, tmp_path / "m.gguf", without=head_blocks(whole))
    with pytest.raises(ModelError, match="could not load"):
        engine(path)
    refused(path, "claim 1 MTP head block(s)", "imatrix graft-mtp", "imatrix drop-mtp")
    drop_mtp(path, tmp_path / "d.gguf")
    assert engine(tmp_path / "d.gguf") == (whole.n_layer, 0)
    graft_mtp(path, whole.path, tmp_path / "g.gguf")
    assert contents(tmp_path / "g.gguf") == contents(whole.path)


@pytest.mark.parametrize("arch", ["qwen35", "glm4moe"])
def test_a_claim_that_turns_the_last_block_into_a_head(arch: str, tmp_path: Path) -> None:
    """The engine would load such a file, but without its last block."""
    whole = make_any(tmp_path / "whole.gguf", arch)
    trunk = drop_mtp(whole.path, tmp_path / "trunk.gguf")
    path = rewrite(trunk.model, tmp_path / "m.gguf", keys={claim(whole): 1})
    assert engine(path)[0] == whole.n_layer - 1
    refused(path, "leaves them out", "they are the trunk's", "imatrix drop-mtp")
    report = drop_mtp(path, tmp_path / "d.gguf")
    assert report.dropped == ()
    assert (tmp_path / "d.gguf").read_bytes() == trunk.model.read_bytes()


@pytest.mark.parametrize("arch", ["qwen35", "nemotron_h_moe", "deepseek4"])
def test_tensors_of_a_head_that_nothing_claims(arch: str, tmp_path: Path) -> None:
    whole = make_any(tmp_path / "whole.gguf", arch)
    trunk = drop_mtp(whole.path, tmp_path / "trunk.gguf")
    block_count = f"{arch}.block_count"
    for number, keys in enumerate(
        ({claim(whole): None}, {claim(whole): 0}, {claim(whole): 0, block_count: whole.n_layer})
    ):
        path = rewrite(whole.path, tmp_path / f"m{number}.gguf", keys=dict(keys))
        with pytest.raises(ModelError, match="could not load"):
            engine(path)
        refused(path, "is absent or 0", "imatrix drop-mtp")
        drop_mtp(path, tmp_path / "d.gguf")
        assert contents(tmp_path / "d.gguf") == contents(trunk.model)
        assert engine(tmp_path / "d.gguf") == (whole.n_layer, 0)


def test_a_claim_of_more_blocks_than_there_are(tmp_path: Path) -> None:
    whole = make_any(tmp_path / "whole.gguf", "qwen35")
    trunk = drop_mtp(whole.path, tmp_path / "trunk.gguf")
    path = rewrite(trunk.model, tmp_path / "m.gguf", keys={claim(whole): 9})
    refused(path, "nextn_predict_layers is 9", "imatrix drop-mtp")
    drop_mtp(path, tmp_path / "d.gguf")
    assert (tmp_path / "d.gguf").read_bytes() == trunk.model.read_bytes()


def test_part_of_a_head_is_missing(tmp_path: Path) -> None:
    whole = make_any(tmp_path / "whole.gguf", "glm4moe")
    for number, name in enumerate(("attn_q.weight", "nextn.eh_proj.weight")):
        path = rewrite(
            whole.path, tmp_path / f"m{number}.gguf", without=(f"blk.{whole.n_layer}.{name}",)
        )
        with pytest.raises(ModelError, match=r"attn_q|eh_proj"):
            imatrix.quantize(path, tmp_path / "q.gguf", "Q8_0")
        assert not (tmp_path / "q.gguf").exists()
        assert main(["check", str(path), "--type", "Q8_0"]) == 2
        drop_mtp(path, tmp_path / "d.gguf")
        assert engine(tmp_path / "d.gguf") == (whole.n_layer, 0)


def test_dropping_what_is_not_there(tmp_path: Path) -> None:
    whole = make_any(tmp_path / "whole.gguf", "glm4moe")
    trunk = drop_mtp(whole.path, tmp_path / "trunk.gguf")
    assert set(trunk.dropped) == {n for n in whole.shapes if n.startswith(head_blocks(whole))}
    with pytest.raises(ModelError, match="no MTP head, and its metadata claim none"):
        drop_mtp(trunk.model, tmp_path / "again.gguf")
    report = imatrix.extract_mtp(whole.path, tmp_path / "head.gguf")
    with pytest.raises(ModelError, match="nothing would be left"):
        drop_mtp(report.head, tmp_path / "again.gguf")
    with pytest.raises(ValueError, match="would replace the input"):
        drop_mtp(whole.path, whole.path)


# --- heads that are blocks alone, or have another vocabulary -------------------------------------


def test_a_head_of_blocks_alone_is_grafted_and_not_run(tmp_path: Path) -> None:
    """llama.cpp #28243."""
    whole = make_any(tmp_path / "whole.gguf", "glm4moe")
    trunk, head = tmp_path / "trunk.gguf", tmp_path / "head.gguf"
    imatrix.extract_mtp(whole.path, head, trunk_out=trunk)
    blocks = rewrite(
        head, tmp_path / "blocks.gguf", without=("token_embd", "output_norm", "output.")
    )
    assert set(contents(blocks)) == {n for n in whole.shapes if n.startswith(head_blocks(whole))}
    with pytest.raises(ModelError, match=r"token_embd.weight is missing.*imatrix graft-mtp"):
        Collector(trunk, mtp_model=blocks)
    graft_mtp(trunk, blocks, tmp_path / "again.gguf")
    assert contents(tmp_path / "again.gguf") == contents(whole.path)
    assert engine(tmp_path / "again.gguf", mtp=True) == (whole.n_layer, 1)


@pytest.mark.parametrize("folder", ["plain", "my models", "it's $HOME"])
def test_the_command_that_is_named_can_be_pasted(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell takes each path as one word, and the command does what the message says."""
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    whole = make_any(tmp_path / folder / "whole.gguf", "glm4moe")
    trunk, head = tmp_path / folder / "trunk.gguf", tmp_path / folder / "head.gguf"
    imatrix.extract_mtp(whole.path, head, trunk_out=trunk)
    names = ("token_embd", "output_norm", "output.")
    blocks = rewrite(head, tmp_path / folder / "blocks.gguf", without=names)
    claiming = rewrite(trunk, tmp_path / folder / "claims.gguf", keys={claim(whole): 9})

    def words(error: BaseException) -> list[str]:
        return shlex.split(str(error).rpartition("imatrix ")[2])

    with pytest.raises(ModelError) as no_embedding:
        check_fit(ModelFile.read(trunk), ModelFile.read(blocks))
    graft = ["graft-mtp", str(trunk), str(blocks), "-o", "OUT.gguf"]
    assert words(no_embedding.value) == graft
    assert main(graft) == 0
    assert contents(Path("OUT.gguf")) == contents(whole.path)

    with pytest.raises(ModelError) as too_many:
        ModelFile.read(claiming)
    drop = ["drop-mtp", str(claiming), "-o", "OUT.gguf"]
    assert words(too_many.value) == drop
    assert main(drop) == 0
    assert contents(Path("OUT.gguf")) == contents(trunk)


def test_a_head_whose_output_stayed_in_the_trunk_is_not_run(tmp_path: Path) -> None:
    """The engine would silently take the token embedding instead."""
    whole = make_any(tmp_path / "whole.gguf", "glm4moe")
    trunk, head = tmp_path / "trunk.gguf", tmp_path / "head.gguf"
    imatrix.extract_mtp(whole.path, head, trunk_out=trunk)
    without = rewrite(head, tmp_path / "without.gguf", without=("output.",))
    assert engine(without, mtp=True)[1] == 1
    with pytest.raises(ModelError, match=r"has an output.weight, this file has none.*graft-mtp"):
        Collector(trunk, mtp_model=without)
    graft_mtp(trunk, without, tmp_path / "again.gguf")
    assert contents(tmp_path / "again.gguf") == contents(whole.path)


def test_a_head_with_a_vocabulary_of_its_own_is_refused(tmp_path: Path) -> None:
    """llama.cpp #29143."""
    whole = make_any(tmp_path / "whole.gguf", "glm4moe")
    trunk, head = tmp_path / "trunk.gguf", tmp_path / "head.gguf"
    imatrix.extract_mtp(whole.path, head, trunk_out=trunk)
    mapping = np.arange(100, dtype=np.int32)
    cases: list[dict[str, NDArray[Any]]] = [
        {"d2t": mapping},
        {f"blk.{whole.n_layer}.nextn.d2t.weight": mapping},
        {
            f"blk.{whole.n_layer}.nextn.shared_head_head.weight": np.zeros(
                (100, whole.shapes["token_embd.weight"][-1]), np.float32
            )
        },
    ]
    for number, more in enumerate(cases):
        compact = rewrite(head, tmp_path / f"compact{number}.gguf", more=more)
        with pytest.raises(ModelError, match="drafts from a part of the vocabulary"):
            Collector(trunk, mtp_model=compact)
        with pytest.raises(ModelError, match="drafts from a part of the vocabulary"):
            graft_mtp(trunk, compact, tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()


# --- all in one file -----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["v.blk.0.attn_q", "mm.0", "a.conv1d.1"])
def test_an_encoder_in_the_models_file(
    prefix: str, engine_tool: EngineTool, tmp_path: Path
) -> None:
    """llama.cpp #27349. llama-quantize takes such a file, and writes one that nothing loads."""
    whole = make_any(tmp_path / "whole.gguf", "qwen35")
    name = f"{prefix}.weight"
    path = rewrite(
        whole.path, tmp_path / "m.gguf", more={name: np.ones((64, 256), dtype=np.float32)}
    )
    run_tool(engine_tool("llama-quantize"), path, tmp_path / "theirs.gguf", "Q8_0")
    with pytest.raises(ModelError, match="could not load"):
        engine(tmp_path / "theirs.gguf")
    refused(path, name, "image or audio encoder", "mmproj")


def test_a_tensor_that_nobody_knows(tmp_path: Path) -> None:
    """Whatever is odd about a source, no file is written that the engine cannot load."""
    whole = make_any(tmp_path / "whole.gguf", "glm4moe")
    more = {"blk.0.attn_mystery.weight": np.ones((64, 256), dtype=np.float32)}
    path = rewrite(whole.path, tmp_path / "m.gguf", more=more)
    out = tmp_path / "out.gguf"
    with pytest.raises(ModelError, match="wrong number of tensors"):
        imatrix.quantize(path, out, "Q8_0")
    with pytest.raises(ModelError, match="would not load it"):
        imatrix.extract_mtp(path, tmp_path / "head.gguf", trunk_out=out)
    with pytest.raises(ModelError, match="would not load it"):
        drop_mtp(path, out)
    assert main(["check", str(path), "--type", "Q8_0"]) == 2
    assert not out.exists()
    assert not (tmp_path / "head.gguf").exists()
