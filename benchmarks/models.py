"""The models that are measured: they have random weights and real shapes, and are made when needed.

Speed depends on shapes and types, not on what a model has learnt. The files are kept in
build/benchmarks/ (0.8 to 1.3 GB each) and never committed.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import engine_tools, forge  # noqa: E402


def tool(name: str) -> Path:
    """A program of the engine that `make tools` builds, such as llama-imatrix."""
    return engine_tools.find(name)


# 0.6B: the widths of Qwen3-0.6B, the layers of Qwen3.5 (three recurrent layers for each one of
# attention), a vocabulary of 152k
DENSE: dict[str, Any] = {
    "arch": "qwen35", "dtype": "F16", "tokenizer": "qwen35", "n_layer": 24, "n_nextn": 1,
    "n_embd": 1024, "n_ff": 3072, "n_head": 8, "n_head_kv": 2, "head_dim": 256, "n_rot": 64,
    "full_attention_interval": 4, "ssm_state": 128, "ssm_k_heads": 16, "ssm_v_heads": 16,
    "tied": True,
}  # fmt: skip
# the same trunk with a vocabulary of 4k: leaving out the LM head gains little here
SMALL_VOCABULARY: dict[str, Any] = DENSE | {"n_vocab": 4096}
# and with the 248k of Qwen3.5, whose small models also share the embedding with the LM head
WIDE_VOCABULARY: dict[str, Any] = DENSE | {"n_vocab": 248320}
# a mixture of 64 experts, of which 6 are used and one is shared
EXPERTS: dict[str, Any] = {
    "arch": "glm4moe", "dtype": "F16", "tokenizer": "qwen35", "n_vocab": 32768, "n_layer": 10,
    "n_nextn": 1, "n_embd": 1024, "n_ff": 4096, "n_ff_exp": 256, "n_ff_shexp": 256, "n_head": 8,
    "n_head_kv": 4, "head_dim": 128, "n_rot": 64, "n_expert": 64, "n_expert_used": 6,
    "n_expert_shared": 1, "n_layer_dense": 1, "tied": True,
}  # fmt: skip

# for memory.py: every graph reads the whole model, and computes little
LARGE: dict[str, Any] = EXPERTS | {
    "n_vocab": 4096, "n_layer": 6, "n_expert": 128, "n_expert_used": 2, "n_head": 2,
    "n_head_kv": 1, "n_ff": 512,
}  # fmt: skip
# and a model that runs fast
SMALL: dict[str, Any] = SMALL_VOCABULARY | {"n_layer": 8, "n_embd": 512, "n_ff": 1024}

MODELS = {
    "dense": DENSE, "wide-vocabulary": WIDE_VOCABULARY, "small-vocabulary": SMALL_VOCABULARY,
    "experts": EXPERTS, "large": LARGE, "small": SMALL,
}  # fmt: skip


# for gpu.py: 4.2 billion weights, and 6.2 billion of which each token uses 1.2
GPU: dict[str, dict[str, dict[str, Any]]] = {
    "full": {
        "dense": DENSE | {
            "n_layer": 32, "n_embd": 2560, "n_ff": 9728, "n_head": 16, "n_head_kv": 4,
            "ssm_v_heads": 32,
        },
        "experts": EXPERTS | {
            "n_layer": 14, "n_embd": 2048, "n_ff": 8192, "n_ff_exp": 1024, "n_ff_shexp": 1024,
            "n_head": 16, "n_head_kv": 4, "n_vocab": 131072,
        },
    },
    # only to see that the benchmark runs
    "tiny": {
        "dense": DENSE | {
            "n_layer": 4, "n_embd": 256, "n_ff": 512, "n_head": 2, "n_head_kv": 1, "n_vocab": 2048,
            "ssm_state": 64, "ssm_k_heads": 2, "ssm_v_heads": 2,
        },
        "experts": EXPERTS | {
            "n_layer": 2, "n_embd": 256, "n_ff": 512, "n_ff_exp": 64, "n_ff_shexp": 64,
            "n_head": 2, "n_head_kv": 1, "n_expert": 8, "n_expert_used": 2, "n_vocab": 2048,
        },
    },
}  # fmt: skip


def write_streaming(path: Path, arch: forge.Arch, *, tokenizer: str, **given: Any) -> None:
    """A model as forge.make_model makes it, with one tensor in memory at a time. The rows of a large
    weight repeat after a while, which makes no difference to a matrix multiplication."""
    tied, n_vocab = given.pop("tied"), given.pop("n_vocab", None)
    kind = given.pop("dtype")
    words = forge.copied_tokenizer(tokenizer, n_vocab, False)
    hparams = replace(
        forge.Hparams(), **{**forge._DEFAULTS[arch], **given, "n_vocab": words.n_vocab}
    )
    writer = gguf.GGUFWriter(path, arch)
    keys = {
        "general.name": f"random {arch}",
        "general.file_type": np.uint32(forge._FILE_TYPES[kind]),
        **{f"{arch}.{key}": value for key, value in forge._keys(arch, hparams).items()},
        **words.keys,
    }
    for key, value in keys.items():
        forge._add_key(writer, key, value)
    shapes = list(forge._shapes(arch, hparams, tied, False, False, True))
    types = [np.float16 if forge._follows_dtype(*each) else np.float32 for each in shapes]
    for (name, shape), dtype in zip(shapes, types, strict=True):
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(name, shape, np.dtype(dtype), n_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (name, shape), dtype in zip(shapes, types, strict=True):
        few = shape
        if len(shape) > 1 and np.prod(shape) > 1 << 22:
            few = (max(1, (1 << 22) // shape[-1]), shape[-1])
        values = forge._draw(name, few, 0, hparams).astype(dtype)
        writer.write_tensor_data(np.resize(values, shape))
    writer.close()


def gpu_model(name: str, size: str) -> Path:
    """The GGUF file of one of GPU; it is made if it is not there yet."""
    path = ROOT / "build" / "benchmarks" / f"gpu-{name}-{size}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        given = dict(GPU[size][name])
        write_streaming(part, given.pop("arch"), **given)
        part.replace(path)
    return path


def options(name: str, size: str = "full") -> dict[str, Any]:
    """The arguments of forge.make_model for one of MODELS; "half" has half the layers."""
    found = dict(MODELS[name])
    if size == "half":
        found["n_layer"] //= 2
    elif size != "full":
        raise ValueError(f"a size is full or half, not {size!r}")
    return found


def model(name: str, size: str = "full", *, dtype: str = "F16") -> Path:
    """The GGUF file of one of MODELS, with weights of a type, made where it is not there yet."""
    given = {**options(name, size), "dtype": dtype}
    stem = name if size == "full" else f"{name}-{size}"
    stem += "" if dtype == "F16" else f"-{dtype}"
    path = ROOT / "build" / "benchmarks" / f"{stem}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        forge.make_model(part, given.pop("arch"), **given)
        part.replace(path)
    return path
