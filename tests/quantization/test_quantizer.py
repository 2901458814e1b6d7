"""llama-quantize with this package's files, which is what they are made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from helpers.forge import Arch, ModelSpec
from helpers.running import EngineTool, Forged, run_tool

from imatrix import Collector, ImportanceMatrix

pytestmark = [
    pytest.mark.engine(
        "src/llama-quant.cpp", "which tensors get which type, and which types demand data"
    ),
]

HEADS: list[Arch] = ["qwen35", "glm4moe", "qwen35moe"]
N_CTX = 128
# IQ2_XXS takes seconds for a million weights
SMALL: dict[str, Any] = {"n_nextn": 1, "shared_head_head": True, "n_ff": 256}
EXPERTS: dict[str, Any] = {"n_expert": 3, "n_expert_used": 2}


def collected(spec: ModelSpec, text: Path, *, mtp: bool) -> ImportanceMatrix:
    with Collector(spec.path, n_ctx=N_CTX, n_threads=1) as collector:
        return collector.run(text, mtp=mtp, max_chunks=8)


def head_matmuls(spec: ModelSpec) -> set[str]:
    """Matrices in the head's block, except for the embedding, which is looked up."""
    block = f"blk.{spec.hparams.n_layer}."
    return {
        name
        for name, tensor in spec.tensors.items()
        if name.startswith(block) and tensor.ndim > 1 and "embed_tokens" not in name
    }


@pytest.mark.parametrize("arch", HEADS)
def test_very_low_bits_need_the_head(
    arch: Arch, forged: Forged, prose_file: Path, engine_tool: EngineTool, tmp_path: Path
) -> None:
    quantize = engine_tool("llama-quantize")
    spec = forged(arch, seed=2, **SMALL, **(EXPERTS if "moe" in arch else {}))
    matrix = collected(spec, prose_file, mtp=True)
    ours, trunk = tmp_path / "ours.gguf", tmp_path / "trunk.gguf"
    matrix.save(ours)
    matrix.trunk.save(trunk)

    log = run_tool(
        quantize, "--imatrix", trunk, spec.path, tmp_path / "no.gguf", "IQ2_XXS", "2", ok=False
    )
    assert f"Missing importance matrix for tensor blk.{spec.hparams.n_layer}." in log
    assert "in a very low-bit quantization" in log

    out = tmp_path / "small.gguf"
    log = run_tool(quantize, "--imatrix", ours, spec.path, out, "IQ2_XXS", "2")
    for name in head_matmuls(spec):
        assert f"did not find weights for {name}" not in log
    assert head_matmuls(spec) <= set(matrix)

    # and the file holds them as low-bit weights
    written = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(out).tensors}
    assert set(written) == set(spec.tensors)
    assert any(written[name].name.startswith("IQ2") for name in head_matmuls(spec))
    assert written[f"blk.{spec.hparams.n_layer}.nextn.eh_proj.weight"].name != "F32"


def test_the_quantized_model_runs(
    forged: Forged, prose_file: Path, engine_tool: EngineTool, tmp_path: Path
) -> None:
    """The head is included: the names and counts are those of the model that it was made from."""
    spec = forged("qwen35", seed=2, **SMALL)
    matrix = collected(spec, prose_file, mtp=True)
    matrix.save(tmp_path / "ours.gguf")
    out = tmp_path / "small.gguf"
    run_tool(
        engine_tool("llama-quantize"),
        *("--imatrix", tmp_path / "ours.gguf", spec.path, out, "IQ2_XXS", "2"),
    )
    with Collector(out, n_ctx=N_CTX, n_threads=1) as collector:
        again = collector.run(prose_file, mtp=True, max_chunks=8)
    assert {name: entry.counts.tolist() for name, entry in again.items()} == {
        name: entry.counts.tolist() for name, entry in matrix.items()
    }
