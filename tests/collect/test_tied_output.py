"""A model without an LM head of its own: data for its token embedding, and what low-bit types do
with them. The sums are compared in test_trunk_parity.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from helpers.forge import ModelSpec
from helpers.ggufs import keys_of, tensors_of
from helpers.running import EngineTool, Forged, Run

from imatrix import Collector, coverage, quantize


@pytest.fixture(scope="module")
def tied(forged: Forged) -> ModelSpec:
    # rows of 256, which low-bit types can store
    return forged("llama", seed=2, tied=True, n_embd=256, n_ff=256)


@pytest.fixture(scope="module")
def matrices(
    tied: ModelSpec, prose_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Matrices without and with data for the embedding."""
    folder = tmp_path_factory.mktemp("tied")
    with Collector(tied.path, n_ctx=64, n_threads=1) as collector:
        for name, output in (("without", False), ("with", True)):
            found = collector.run(prose_file, max_chunks=4, process_output=output)
            assert ("token_embd.weight" in found) == output
            found.save(folder / name)
    return folder / "without", folder / "with"


def test_a_low_bit_embedding(
    tied: ModelSpec, matrices: tuple[Path, Path], engine_tool: EngineTool, tmp_path: Path
) -> None:
    without, data = matrices
    with pytest.raises(ValueError, match=r"token_embd\.weight would get .* \(or collect with pr"):
        quantize(tied.path, tmp_path / "no.gguf", "IQ2_XXS", imatrix=without, pure=True)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    quantize(tied.path, ours, "IQ2_XXS", imatrix=data, pure=True, n_threads=1)
    # fmt: off
    subprocess.run(
        [engine_tool("llama-quantize"), "--pure", "--imatrix", data, tied.path, theirs,
         "IQ2_XXS", "1"],
        check=True, capture_output=True,
    )
    # fmt: on
    assert tensors_of(ours) == tensors_of(theirs)
    assert keys_of(ours) == keys_of(theirs)
    assert tensors_of(ours)["token_embd.weight"][0] == "IQ2_XXS"


def test_the_check_says_how_to_get_them(
    tied: ModelSpec, matrices: tuple[Path, Path], forged: Forged, run: Run, prose_file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    without, data = matrices
    found = coverage(tied.path, without, "IQ2_XXS", pure=True)
    assert [each.name for each in found.failing] == ["token_embd.weight"]
    want = f"imatrix collect -m {tied.path} -f TEXT --process-output"
    assert f"Collect token_embd.weight too: {want}" in found.fixes
    assert coverage(tied.path, data, "IQ2_XXS", pure=True).ready
    # without any data, one run gives them all
    found = coverage(tied.path, None, "IQ2_XXS", pure=True)
    assert f"Collect the data: {want}" in found.fixes
    # the command that the message names gives them
    out = tmp_path / "again.gguf"
    words = want.split()[1:]
    words[words.index("TEXT")] = str(prose_file)
    assert run(*words, "-o", out, "-c", 64, "--chunks", 4, "--no-ppl").status == 0
    assert coverage(tied.path, out, "IQ2_XXS", pure=True).ready

    # if there is an output.weight, no run reaches the embedding
    untied = forged("llama", seed=2, n_embd=256, n_ff=256)
    with Collector(untied.path, n_ctx=64, n_threads=1) as collector:
        matrix = collector.run(prose_file, max_chunks=2, process_output=True)
    found = coverage(untied.path, matrix, "IQ2_XXS", pure=True)
    assert [each.name for each in found.failing] == ["token_embd.weight"]
    assert not any("--process-output" in fix for fix in found.fixes)
    with pytest.raises(ValueError, match=r"token_embd\.weight would get") as refused:
        quantize(untied.path, tmp_path / "no.gguf", "IQ2_XXS", imatrix=matrix, pure=True)
    assert "process_output" not in str(refused.value)
