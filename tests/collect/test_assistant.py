"""gemma4 with gemma4-assistant: a head of another architecture, which reads its trunk's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.forge_any import make_any
from helpers.running import run_tool

from imatrix import Collector, ImportanceMatrix, ModelError
from imatrix.cli.program import main

pytestmark = [
    pytest.mark.engine(
        "src/models/gemma4-assistant.cpp",
        "the head reads its trunk's memory and drafts at the position of the first token",
    ),
]

WIDTH = 512  # the trunk's architecture; the forge makes an assistant for it


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma4") / "gemma4.gguf"
    return make_any(path, "gemma4", n_nextn=0, seed=1, n_embd=WIDTH).path


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("assistant") / "gemma4-assistant.gguf"
    return make_any(path, "gemma4-assistant", n_nextn=2, seed=2).path


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 250, 160, dtype=np.int32)


def test_every_weight_of_the_assistant_gets_every_slot_but_the_first(
    trunk: Path, assistant: Path, tokens: np.ndarray
) -> None:
    with Collector(trunk, mtp_model=assistant, n_ctx=160) as collector:
        assert collector.n_nextn == 2
        matrix = collector.run([tokens], mtp=True)
        head = collector.mtp_matrix
    assert head is not None
    kinds = ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = {f"blk.{il}.{kind}.weight" for il in (0, 1) for kind in kinds}
    names |= {"nextn.pre_projection.weight", "nextn.post_projection.weight"}
    assert set(head) == names
    # the engine never drafts at slot 0: the trunk's memory holds nothing to read yet
    assert {name: entry.counts.tolist() for name, entry in head.items()} == {
        key: [159] for key in names
    }
    assert {entry.counts.tolist()[0] for entry in matrix.values()} == {160}


def test_the_trunk_is_the_same_to_the_bit(trunk: Path, assistant: Path, tokens: np.ndarray) -> None:
    with Collector(trunk, n_ctx=160) as collector:
        alone = collector.run([tokens])
    with Collector(trunk, mtp_model=assistant, n_ctx=160) as collector:
        both = collector.run([tokens], mtp=True)
        again = collector.run([tokens])
        assert collector.mtp_matrix is None
    assert dict(alone) == dict(both) == dict(again)


def test_the_tokens_half_of_its_input_is_the_trunks_scaled_embedding(
    trunk: Path, assistant: Path, tokens: np.ndarray
) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(trunk).tensors}
    embedding = np.asarray(tensors["token_embd.weight"].data, dtype=np.float64)
    with Collector(trunk, mtp_model=assistant, n_ctx=160, n_batch=64) as collector:
        collector.run([tokens], mtp=True)
        head = collector.mtp_matrix
    assert head is not None
    # slot p takes token p, so every token but the first (src/models/gemma4-assistant.cpp)
    expected = (WIDTH * embedding[tokens[1:]] ** 2).sum(axis=0)
    got = head["nextn.pre_projection.weight"].sums[0, :WIDTH]
    # float32 sums over at most 64 rows
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_slot_sees_the_trunk_before_it_and_not_at_it(trunk: Path, assistant: Path) -> None:
    """With two tokens slot 1 has one cell to read, that of slot 0, so that its attention cannot
    depend on its own token. If its own cell were visible too, it would depend on it."""

    def attended(second: int) -> np.ndarray:
        with Collector(trunk, mtp_model=assistant, n_ctx=2) as collector:
            collector.run([[17, second]], mtp=True)
            head = collector.mtp_matrix
        assert head is not None
        assert head["blk.0.attn_output.weight"].counts.tolist() == [1]
        return head["blk.0.attn_output.weight"].sums

    np.testing.assert_array_equal(attended(40), attended(90))


def test_its_matrix_lets_it_be_quantized(
    trunk: Path,
    assistant: Path,
    tokens: np.ndarray,
    engine_tool: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    with Collector(trunk, mtp_model=assistant, n_ctx=160) as collector:
        collector.run([tokens], mtp=True)
        assert collector.mtp_matrix is not None
        collector.mtp_matrix.save(tmp_path / "head.gguf")
    log = run_tool(
        engine_tool("llama-quantize"), "--imatrix", tmp_path / "head.gguf", assistant,
        tmp_path / "quantized.gguf", "IQ2_XXS",
    )  # fmt: skip
    missing = [line for line in log.splitlines() if "did not find weights" in line]
    assert not [line for line in missing if "token_embd" not in line]


def test_the_command_writes_two_files(
    trunk: Path, assistant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gemma.gguf"
    text = "the quick brown fox jumps over the lazy dog. " * 12
    status = main(
        ["collect", "-m", str(trunk), "--mtp-model", str(assistant), "-p", text, "-c", "64",
         "-o", str(out), "--no-ppl"]
    )  # fmt: skip
    told = capsys.readouterr().err
    assert status == 0, told
    assert f"wrote {tmp_path / 'gemma-mtp.gguf'}" in told
    assert "blk.0.attn_k.weight" in ImportanceMatrix.load(out)
    assert "nextn.pre_projection.weight" in ImportanceMatrix.load(tmp_path / "gemma-mtp.gguf")


def test_an_assistant_that_does_not_fit_is_refused(
    trunk: Path, assistant: Path, tmp_path: Path
) -> None:
    narrow = make_any(tmp_path / "narrow.gguf", "gemma4", n_nextn=0, n_embd=256).path
    with pytest.raises(ModelError, match=r"takes rows of 512 values .* gives rows of 256"):
        Collector(narrow, mtp_model=assistant)
    other = make_any(tmp_path / "other.gguf", "glm4moe", n_nextn=0).path
    with pytest.raises(ModelError, match=r"drafts for gemma4; the model other.gguf is glm4moe"):
        Collector(other, mtp_model=assistant)
    with pytest.raises(ModelError, match=r"not a model of its own; give the gemma4 model"):
        Collector(assistant)
