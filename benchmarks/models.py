"""The models that are measured: random weights, real shapes, made on the spot.

Speed depends on shapes and types, not on what a model has learnt. They are kept in
build/benchmarks/ (0.8 to 1.3 GB each) and never committed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import engine_tools  # noqa: E402, F401 -- for conftest.py
import forge  # noqa: E402

# 0.6B: the widths of Qwen3-0.6B, the layers of Qwen3.5 (three recurrent ones to one of attention),
# a vocabulary of 152k
DENSE: dict[str, Any] = {
    "arch": "qwen35", "dtype": "F16", "tokenizer": "qwen35", "n_layer": 24, "n_nextn": 1,
    "n_embd": 1024, "n_ff": 3072, "n_head": 8, "n_head_kv": 2, "head_dim": 256, "n_rot": 64,
    "full_attention_interval": 4, "ssm_state": 128, "ssm_k_heads": 16, "ssm_v_heads": 16,
    "tied": True,
}  # fmt: skip
# the same trunk with a vocabulary of 4k: skipping the LM head gains little here
SMALL_VOCABULARY: dict[str, Any] = DENSE | {"n_vocab": 4096}
# a mixture of experts: 64 of them, 6 used, one shared
EXPERTS: dict[str, Any] = {
    "arch": "glm4moe", "dtype": "F16", "tokenizer": "qwen35", "n_vocab": 32768, "n_layer": 10,
    "n_nextn": 1, "n_embd": 1024, "n_ff": 4096, "n_ff_exp": 256, "n_ff_shexp": 256, "n_head": 8,
    "n_head_kv": 4, "head_dim": 128, "n_rot": 64, "n_expert": 64, "n_expert_used": 6,
    "n_expert_shared": 1, "n_layer_dense": 1, "tied": True,
}  # fmt: skip

# for memory.py: every graph reads all of it, and computes little
LARGE: dict[str, Any] = EXPERTS | {
    "n_vocab": 4096, "n_layer": 11, "n_expert": 128, "n_expert_used": 4,
}  # fmt: skip
# and one that runs fast
SMALL: dict[str, Any] = SMALL_VOCABULARY | {"n_layer": 8, "n_embd": 512, "n_ff": 1024}

MODELS = {
    "dense": DENSE, "small-vocabulary": SMALL_VOCABULARY, "experts": EXPERTS,
    "large": LARGE, "small": SMALL,
}  # fmt: skip


def options(name: str, size: str = "full") -> dict[str, Any]:
    """What forge.make_model is given for one of MODELS; "half" has half the layers."""
    found = dict(MODELS[name])
    if size == "half":
        found["n_layer"] //= 2
    elif size != "full":
        raise ValueError(f"a size is full or half, not {size!r}")
    return found


def model(name: str, size: str = "full") -> Path:
    """The GGUF file of one of MODELS, made where it is not there yet."""
    given = options(name, size)
    stem = name if size == "full" else f"{name}-{size}"
    path = ROOT / "build" / "benchmarks" / f"{stem}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        forge.make_model(part, given.pop("arch"), **given)
        part.replace(path)
    return path
