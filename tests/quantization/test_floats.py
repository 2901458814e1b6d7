"""`quantize` from one float type to another: the command that `collect` advises. NumPy rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFReader
from helpers.forge import Arch
from helpers.running import Forged
from numpy.typing import NDArray

import imatrix

F32 = NDArray[np.float32]


def as_bf16(values: F32) -> NDArray[np.uint16]:
    """To the nearest of the upper halves of float32, of two as near to the even one."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def fields(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("qwen35", {"n_nextn": 1, "embed_tokens": True, "shared_head_head": True}),
        ("glm4moe", {"n_nextn": 1, "tied": True}),
        ("llama", {}),
    ],
)
@pytest.mark.parametrize(("source", "target"), [("F16", "BF16"), ("F32", "BF16"), ("F16", "F32")])
def test_every_matrix_gets_the_type_and_the_rest_stays(
    forged: Forged, tmp_path: Path, arch: Arch, options: Any, source: str, target: str
) -> None:
    spec = forged(arch, seed=5, dtype=source, **options)
    path = tmp_path / "converted.gguf"
    imatrix.quantize(spec.path, path, target, n_threads=1)
    before, after = GGUFReader(spec.path), GGUFReader(path)
    old = {tensor.name: tensor for tensor in before.tensors}
    new = {tensor.name: tensor for tensor in after.tensors}
    assert new.keys() == old.keys()
    if "n_nextn" in options:
        assert any(".nextn.eh_proj." in name for name in new)
    assert sum(each.tensor_type == GgmlType[target] for each in new.values()) > 10
    for name, tensor in new.items():
        values = spec.tensors[name]
        assert tensor.shape.tolist() == old[name].shape.tolist()
        if old[name].tensor_type != GgmlType[source] or values.ndim < 2:
            # norms, convolutions, and the routers of experts
            assert tensor.tensor_type == old[name].tensor_type, name
            assert tensor.data.tobytes() == old[name].data.tobytes(), name
            continue
        if tensor.tensor_type == GgmlType.F32 != GgmlType[target]:
            # of an F32 model what F16 models have in F32 too
            assert source == "F32", name
            assert name.endswith(("ssm_conv1d.weight", "ffn_gate_inp.weight")), name
            continue
        assert tensor.tensor_type == GgmlType[target], name
        if target == "BF16":
            found = np.frombuffer(tensor.data.tobytes(), np.uint16)
            assert found.tolist() == as_bf16(values.reshape(-1)).tolist(), name
        else:
            assert np.array_equal(tensor.data.reshape(-1), values.reshape(-1)), name
    kept, found = fields(before), fields(after)
    # how a file is made, where its keys are, and its type
    apart = {"GGUF.kv_count", "GGUF.tensor_count", "general.file_type"}
    assert {k: v for k, v in found.items() if k not in apart} == {
        k: v for k, v in kept.items() if k not in apart
    }
    assert found["general.file_type"] == {"BF16": 32, "F32": 0}[target]
