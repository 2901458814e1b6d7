"""Compares the head with llama-imatrix --nextn, as far as that program can serve as a reference.

The program of 0.6.0 ends on every model with --nextn. The build makes a copy of it in which two
calls hand over the head's state as the engine demands it (vendor/engine.cmake), and these tests run
that copy. The copy leaves slot 0 out of the head's cache, so that behind the head's attention it
agrees with this package only if the package leaves slot 0 out too (FirstSlot::absent in
ext/session.h).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.forge import Arch
from helpers.forge_any import make_any
from helpers.parity import PARITY, differences
from helpers.running import EngineTool, Forged, run_tool

import imatrix
from imatrix import Collector, ImportanceMatrix
from imatrix.cli.program import main
from imatrix.native import engine

N_CTX = 128
N_CHUNKS = 3

# Router margins: another expert may be chosen if two scores are as close as the rounding. With
# these seeds no two are, on the text of conftest.py.
HEADS: dict[Arch, int] = {"glm4moe": 11, "qwen35": 2, "qwen35moe": 27, "deepseek2": 4}

Theirs = Callable[..., ImportanceMatrix]


@pytest.fixture
def theirs(engine_tool: EngineTool, prose_file: Path, tmp_path: Path) -> Theirs:
    """Runs llama-imatrix on the test's text."""

    def run(model: Path, *options: str | Path) -> ImportanceMatrix:
        out = tmp_path / "theirs.gguf"
        # fmt: off
        run_tool(
            engine_tool("llama-imatrix-nextn"), "-m", model, "-f", prose_file, "-o", out,
            "--no-ppl", "-t", "1", "-c", str(N_CTX), "-b", str(N_CTX), "-ub", str(N_CTX),
            "--chunks", str(N_CHUNKS), *options,
        )
        # fmt: on
        return ImportanceMatrix.load(out)

    return run


def ours(
    model: Path, text: Path, mtp_model: Path | None = None, **options: Any
) -> ImportanceMatrix:
    with Collector(model, mtp_model=mtp_model, n_ctx=N_CTX, n_threads=1) as made:
        return made.run(text, mtp=True, max_chunks=N_CHUNKS, **options)


@pytest.fixture
def without_slot_0(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session(engine.Session):
        def open(self, **settings: Any) -> None:
            super().open(**settings, first_slot="absent")

    monkeypatch.setattr(engine, "Session", Session)


def assert_same_counts(got: ImportanceMatrix, want: ImportanceMatrix) -> None:
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name].counts, want[name].counts, err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("without_slot_0")
def test_process_output_counts_the_trunks_rows(
    tied: bool, forged: Forged, theirs: Theirs, prose_file: Path
) -> None:
    """The head, which uses the trunk's LM head when it drafts, adds nothing to it: llama-imatrix
    asks it for no logits."""
    spec = forged("glm4moe", seed=HEADS["glm4moe"], n_nextn=1, tied=tied)
    want = theirs(spec.path, "--nextn", "--process-output")
    got = ours(spec.path, prose_file, process_output=True)
    assert_same_counts(got, want)
    name = "token_embd.weight" if tied else "output.weight"
    assert got[name].counts.tolist() == [N_CHUNKS * N_CTX]
    assert max(differences(got, want).values()) <= PARITY


@pytest.mark.parametrize("arch", HEADS)
@pytest.mark.usefixtures("without_slot_0")
def test_without_slot_0_all_is_theirs(
    arch: Arch, forged: Forged, theirs: Theirs, prose_file: Path
) -> None:
    spec = forged(arch, seed=HEADS[arch], n_nextn=1)
    got, want = ours(spec.path, prose_file), theirs(spec.path, "--nextn")
    assert got["blk.2.nextn.eh_proj.weight"].counts.tolist() == [N_CHUNKS * (N_CTX - 1)]
    assert_same_counts(got, want)
    # llama-imatrix adds in float32, see test_trunk_parity.py
    assert {name: d for name, d in differences(got, want).items() if not d <= PARITY} == {}


@pytest.mark.parametrize("arch", HEADS)
def test_with_slot_0_in_the_cache_the_counts_and_what_comes_before_attention_are_theirs(
    arch: Arch, forged: Forged, theirs: Theirs, prose_file: Path
) -> None:
    """Behind attention slot 0 has an effect: there the oracle is the reference
    (test_head_oracle.py)."""
    spec = forged(arch, seed=HEADS[arch], n_nextn=1)
    got, want = ours(spec.path, prose_file), theirs(spec.path, "--nextn")
    assert set(got) == set(want)
    dense = [name for name in want if "_exps." not in name]  # the two may choose different experts
    for name in dense:
        np.testing.assert_array_equal(got[name].counts, want[name].counts, err_msg=name)
    worst = differences(got, want)
    before = ("nextn.eh_proj", "attn_q", "attn_k", "attn_v", "attn_q_a", "attn_kv_a_mqa")
    names = [f"blk.2.{kind}.weight" for kind in before if f"blk.2.{kind}.weight" in want]
    assert len(names) >= 3
    assert {name: worst[name] for name in names if not worst[name] <= PARITY} == {}
    # float16 roundings, see GATE in test_head_oracle.py; slot 0 moves it by more
    assert worst["blk.2.attn_output.weight"] > 1e-3


@pytest.mark.usefixtures("without_slot_0")
def test_a_head_in_its_own_file(
    forged: Forged, theirs: Theirs, prose_file: Path, tmp_path: Path
) -> None:
    spec = forged("glm4moe", seed=HEADS["glm4moe"], n_nextn=1)
    head, trunk = tmp_path / "head.gguf", tmp_path / "trunk.gguf"
    imatrix.extract_mtp(spec.path, head, trunk_out=trunk)
    got, want = ours(trunk, prose_file, head), theirs(trunk, "-md", head)
    assert_same_counts(got, want)
    assert {name: d for name, d in differences(got, want).items() if not d <= PARITY} == {}


# --- weights that llama-imatrix leaves without data ----------------------------------------------

# Weights of the head that have no entry in its file, and weights whose entry has no rows.
LACKS = {
    "qwen3next": (5, 3),
    "nemotron_h_moe": (5, 2),
    "deepseek4": (1, 0),
    "qwen4exp": (3, 0),
}
# These heads, because llama-imatrix counts a matmul only if it has 16 rows or more, and one token's
# 4 rows are a matrix of their own in them.
FEW_ROWS = {
    "deepseek4": {"nextn.eh_proj"},
    "qwen4exp": {"nextn.eh_proj", "nextn.hc_head_down", "nextn.hc_head_up"},
}


@pytest.mark.parametrize("arch", LACKS)
def test_ours_has_data_that_theirs_lacks(
    arch: str, theirs: Theirs, prose_file: Path, tmp_path: Path
) -> None:
    model = make_any(tmp_path / f"{arch}.gguf", arch)
    got, want = ours(model.path, prose_file), theirs(model.path, "--nextn")
    blocks = [name for name in got if name.startswith("blk.")]
    head = {name for name in blocks if int(name.split(".")[1]) >= model.n_layer}
    shapes = {tensor.name for tensor in gguf.GGUFReader(model.path).tensors}
    assert head <= shapes
    absent = {name for name in head if name not in want}
    empty = {name for name in head - absent if not want[name].counts.any()}
    assert (len(absent), len(empty)) == LACKS[arch]
    if arch in FEW_ROWS:
        assert absent == {f"blk.{model.n_layer}.{kind}.weight" for kind in FEW_ROWS[arch]}
    for name in absent | empty:
        assert got[name].counts.all() or "_exps." in name, name
        assert got[name].sums.any(), name


@pytest.mark.parametrize("arch", HEADS)
def test_the_program_as_shipped_ends_on_a_head(
    arch: Arch, engine_tool: EngineTool, forged: Forged, prose_file: Path, tmp_path: Path
) -> None:
    """README and docs say so. If this test fails, the engine has repaired the program, and both
    have to be changed."""
    spec = forged(arch, seed=HEADS[arch], n_nextn=1)
    with pytest.raises(AssertionError, match="requires a state embedding"):
        run_tool(
            engine_tool("llama-imatrix"), "-m", spec.path, "-f", prose_file, "-o",
            tmp_path / "out.gguf", "--no-ppl", "-c", "128", "-b", "128", "--nextn",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("n_nextn", "options", "words"),
    [
        (1, ("-b", "2048"), "need a single sequence per batch"),
        (2, ("-b", "128"), "multi-layer NextN drafts are not supported"),
    ],
)
def test_what_the_mended_program_refuses(
    n_nextn: int,
    options: tuple[str, ...],
    words: str,
    engine_tool: EngineTool,
    prose_file: Path,
    tmp_path: Path,
) -> None:
    """The page says so; this package accepts both by the same flags."""
    model = make_any(tmp_path / "model.gguf", "step35", n_nextn=n_nextn).path
    out, mine = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    flags = ["-m", model, "-f", prose_file, "--no-ppl", "-c", "128", *options, "--nextn"]
    log = run_tool(engine_tool("llama-imatrix-nextn"), *flags, "-o", out, ok=False)
    assert words in log
    assert not out.exists()
    argv = ["collect", *map(str, flags), "--chunks", "1", "-o", str(mine)]
    assert main(argv) == 0
    assert len(ImportanceMatrix.load(mine).head) > 0


def test_a_draft_model_is_the_heads_file(
    forged: Forged, prose_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """-md and its other spellings mean --mtp-model: the file is the same to the byte."""
    spec = forged("glm4moe", seed=HEADS["glm4moe"], n_nextn=1)
    head, trunk = tmp_path / "head.gguf", tmp_path / "trunk.gguf"
    imatrix.extract_mtp(spec.path, head, trunk_out=trunk)
    written = set()
    for flag in ("--mtp-model", "-md", "--model-draft", "--spec-draft-model"):
        out = tmp_path / "out.gguf"
        # fmt: off
        status = main([
            "collect", "-m", str(trunk), flag, str(head), "-f", str(prose_file), "-c", "64",
            "--chunks", "1", "--no-ppl", "-t", "1", "-o", str(out),
        ])
        # fmt: on
        assert status == 0, capfd.readouterr().err
        written.add(out.read_bytes())
        assert ImportanceMatrix.load(out).provenance.mtp  # type: ignore[union-attr]
    assert len(written) == 1
