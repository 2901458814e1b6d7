"""Every architecture whose MTP graph the engine knows is forged, loaded, and collected from.

Each has a process of its own, because the engine ends the process if one of its assertions fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.forge_any import ARCHS, MTP_ARCHS, AnyModel, EngineRefused, make_any

N_CTX = 160  # more than a block of deepseek4's longest compression, 128
N_CHUNKS = 2

_COLLECT = """
import json, sys
import numpy as np
from imatrix import Collector

path, n_ctx, n_chunks, mtp = sys.argv[1], *map(int, sys.argv[2:])
tokens = np.random.default_rng(0).integers(0, 250, (n_chunks, n_ctx)).tolist()
with Collector(path, n_ctx=n_ctx, n_ubatch=96, n_threads=1, mtp=bool(mtp)) as collector:
    matrix = collector.run(tokens, mtp=bool(mtp))
    entries = {
        name: [e.counts.tolist(), bool(np.isfinite(e.sums).all()), bool(e.sums.any())]
        for name, e in matrix.items()
    }
    print(json.dumps([collector.n_trunk, collector.n_nextn, entries]))
"""

# Matrices in blocks that no matrix multiplication reads: convolutions, norms with two dimensions,
# tables, and the head's lookup.
EH_PROJ = "nextn.eh_proj.weight"
NEVER_MULTIPLIED = (
    "*.ssm_conv1d*.weight", "*.ssm_norm.weight", "*.ssm_[ad]", "*_compressor_ape.weight",
    "*.ple_conv1d.weight",
    "*.ffn_gate_tid2eid.weight", "*.nextn.embed_tokens.weight",
)  # fmt: skip
# Weights of the head that the engine loads and its MTP graph leaves out.
NOT_RUN = {"deepseek32": ("indexer.*",), "glm-dsa": ("indexer.*",)}


def collect(path: Path, *, mtp: bool) -> tuple[int, int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", _COLLECT, os.fspath(path), *map(str, (N_CTX, N_CHUNKS, int(mtp)))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    n_trunk, n_nextn, entries = json.loads(done.stdout)
    return n_trunk, n_nextn, entries


def check(model: AnyModel, entries: dict[str, Any], blocks: range) -> None:
    """Every weight of these blocks has finite sums, and rows for every token."""
    wanted = {
        name
        for name, shape in model.shapes.items()
        if len(shape) > 1
        and name.startswith(tuple(f"blk.{il}." for il in blocks))
        and not any(fnmatchcase(name, pattern) for pattern in NEVER_MULTIPLIED)
        and not (
            name.startswith(tuple(f"blk.{il}." for il in range(model.n_layer, blocks.stop)))
            and any(fnmatchcase(name, f"*.{p}") for p in NOT_RUN.get(model.arch, ()))
        )
    }
    assert wanted <= entries.keys()
    assert entries.keys() <= model.shapes.keys()
    for name, (counts, finite, any_) in entries.items():
        assert finite, name
        assert any_, name
        # no draft begins at slot 0 of a chunk, so that head d has its first turn at slot d+1
        block = int(name.split(".")[1]) if name.startswith("blk.") else 0
        rows = N_CHUNKS * (N_CTX - max(0, block - model.n_layer + 1))
        if "exps" in name:
            used = model.keys[f"{model.arch}.expert_used_count"]
            assert sum(counts) == rows * used, name
        elif model.arch == "deepseek4":
            # its state is four rows wide, and some of its weights see compressed rows only
            assert counts[0] > 0, name
        else:
            # the four rows of a token that qwen4exp's hyper-connections carry to its head
            each = 4 if (model.arch, name.split(".", 2)[-1]) == ("qwen4exp", EH_PROJ) else 1
            assert counts == [rows * each], name


@pytest.mark.parametrize("arch", MTP_ARCHS)
def test_trunk_and_head_run(arch: str, tmp_path: Path) -> None:
    model = make_any(tmp_path / "model.gguf", arch)
    n_trunk, n_nextn, entries = collect(model.path, mtp=True)
    assert (n_trunk, n_nextn) == (model.n_layer, 1)
    check(model, entries, range(model.n_layer + 1))


@pytest.mark.parametrize("arch", [arch for arch in MTP_ARCHS if ARCHS[arch].max_nextn > 1])
def test_several_heads_run(arch: str, tmp_path: Path) -> None:
    model = make_any(tmp_path / "model.gguf", arch, n_nextn=3, shared_head_head=True)
    n_trunk, n_nextn, entries = collect(model.path, mtp=True)
    assert (n_trunk, n_nextn) == (model.n_layer, 3)
    check(model, entries, range(model.n_layer + 3))


def test_gemma4_runs(tmp_path: Path) -> None:
    model = make_any(tmp_path / "model.gguf", "gemma4")
    n_trunk, n_nextn, entries = collect(model.path, mtp=False)
    assert (n_trunk, n_nextn) == (model.n_layer, 0)
    check(model, entries, range(model.n_layer))


def test_gemma4_assistant_loads(tmp_path: Path) -> None:
    """It needs the context of its gemma4 to run: here the loader only confirms that the file is
    complete."""
    model = make_any(tmp_path / "model.gguf", "gemma4-assistant", n_nextn=2)
    load = (
        "import sys; from imatrix.native import engine as _session;"
        "m = _session.Model(sys.argv[1], mtp=True, n_gpu_layers=0, use_mmap=True, check_tensors=True);"
        "assert m.n_nextn == 2"
    )
    done = subprocess.run(
        [sys.executable, "-c", load, os.fspath(model.path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    one = make_any(tmp_path / "one.gguf", "step35", seed=3)
    two = make_any(tmp_path / "two.gguf", "step35", seed=3)
    other = make_any(tmp_path / "other.gguf", "step35", seed=4)
    assert one.path.read_bytes() == two.path.read_bytes() != other.path.read_bytes()


def test_options(tmp_path: Path) -> None:
    model = make_any(
        tmp_path / "model.gguf",
        "cohere2moe",
        dtype="BF16",
        tied=True,
        embed_tokens=True,
        shared_head_head=True,
        shared_head_norm=False,
        fuse_gate_up=True,
        drop="blk.0.*",
    )
    tensors = {t.name: t for t in gguf.GGUFReader(model.path).tensors}
    assert tensors.keys() == model.shapes.keys()
    assert "output.weight" not in tensors
    assert "blk.2.nextn.shared_head_norm.weight" not in tensors
    assert "blk.2.ffn_gate_exps.weight" not in tensors
    assert not any(name.startswith("blk.0.") for name in tensors)
    assert tensors["blk.2.nextn.shared_head_head.weight"].tensor_type.name == "BF16"
    assert tensors["blk.2.nextn.enorm.weight"].tensor_type.name == "F32"
    rows = [shape[-1] for name, shape in model.shapes.items() if len(shape) > 1]
    assert not np.any(np.array(rows) % 256)


def test_keys_that_the_engine_refuses(tmp_path: Path) -> None:
    with pytest.raises(EngineRefused, match="sqrtsoftplus"):
        make_any(tmp_path / "model.gguf", "deepseek4", metadata={"expert_gating_func": 1})
