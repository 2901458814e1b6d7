"""Converts a model's weights otherwise: the same numbers under other names and shapes, for tests of
adapt.

What converters do is restated here from the engine's graphs, independently of
imatrix.quantization.counterparts: the engine runs both conversions, and what it collects from one
is compared with the other. Shapes are NumPy's: (n_out, n_in), (n_expert, n_out, n_in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from helpers.forge import Tokenizer, _add_key

Tensors = dict[str, NDArray[Any]]


def write(path: Path, arch: str, keys: Mapping[str, Any], tensors: Tensors) -> Path:
    """A GGUF model of these tensors, F32."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        _add_key(writer, key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(path: Path) -> Tensors:
    """Every tensor of an F32 model."""
    return {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors}


def _groups(tensors: Tensors, *kinds: str) -> list[tuple[str, list[NDArray[Any]]]]:
    """Blocks that have weights of all these kinds: ("blk.3.", the weights), which are taken out."""
    prefixes = sorted({name[: name.index(".", 4) + 1] for name in tensors if name[:4] == "blk."})
    found = []
    for prefix in prefixes:
        names = [f"{prefix}{kind}.weight" for kind in kinds]
        if all(name in tensors for name in names):
            found.append((prefix, [tensors.pop(name) for name in names]))
    return found


def fuse_qkv(tensors: Tensors) -> Tensors:
    """build_qkv in llama-graph.cpp: first the rows of q, then k's, then v's."""
    out = dict(tensors)
    for prefix, parts in _groups(out, "attn_q", "attn_k", "attn_v"):
        out[f"{prefix}attn_qkv.weight"] = np.concatenate(parts)
        biases = [out.pop(f"{prefix}attn_{x}.bias", None) for x in "qkv"]
        if biases[0] is not None:
            out[f"{prefix}attn_qkv.bias"] = np.concatenate(biases)
    return out


def fuse_gate_up(tensors: Tensors) -> Tensors:
    """build_moe_ffn in llama-graph.cpp: in each expert first the rows of gate."""
    out = dict(tensors)
    for prefix, parts in _groups(out, "ffn_gate_exps", "ffn_up_exps"):
        out[f"{prefix}ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
    return out


def fuse_ssm_in(tensors: Tensors, n_k_head: int, head: int) -> Tensors:
    """build_qkvz in models/qwen3next.cpp: in each key head its rows of q, k, v and z."""
    out = dict(tensors)
    for prefix, (qkv, z) in _groups(out, "attn_qkv", "attn_gate"):
        n_in = qkv.shape[1]
        q, k, v = np.split(qkv, [n_k_head * head, 2 * n_k_head * head])
        by_head = [part.reshape(n_k_head, -1, n_in) for part in (q, k, v, z)]
        out[f"{prefix}ssm_in.weight"] = np.concatenate(by_head, axis=1).reshape(-1, n_in)
    return out


def fuse_dense_into_up(tensors: Tensors) -> Tensors:
    """ggml_swiglu in models/phi3.cpp: first the rows of gate, under the name of up."""
    out = dict(tensors)
    for prefix, parts in _groups(out, "ffn_gate", "ffn_up"):
        out[f"{prefix}ffn_up.weight"] = np.concatenate(parts)
    return out


def fuse_kv_b(tensors: Tensors) -> Tensors:
    """models/deepseek2.cpp: in each head first the rows of k, which attn_k_b holds transposed."""
    out = dict(tensors)
    for prefix, (k_b, v_b) in _groups(out, "attn_k_b", "attn_v_b"):
        kv_b = np.concatenate([k_b.transpose(0, 2, 1), v_b], axis=1)
        out[f"{prefix}attn_kv_b.weight"] = kv_b.reshape(-1, kv_b.shape[-1])
    return out


def experts_apart(tensors: Tensors) -> Tensors:
    """From the time before the experts of a block were one tensor: blk.0.ffn_gate.3.weight."""
    out = dict(tensors)
    for kind in ("ffn_gate", "ffn_up", "ffn_down"):
        for prefix, (experts,) in _groups(out, f"{kind}_exps"):
            for number, values in enumerate(experts):
                out[f"{prefix}{kind}.{number}.weight"] = values
    return out


def dense_model(
    folder: Path, arch: str, tokenizer: Tokenizer, change: Callable[[Tensors], Tensors], seed: int
) -> Path:
    """Two blocks of attention and a dense gated feed-forward, with the same numbers for any
    arch."""
    rng = np.random.default_rng(seed)
    n, ff, kv = 256, 512, 128

    def matrix(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    def norm() -> NDArray[np.float32]:
        return np.exp(0.3 * rng.standard_normal(n)).astype(np.float32)

    tensors: Tensors = {"token_embd.weight": matrix(tokenizer.n_vocab, n) * 16}
    for il in range(2):
        block = {"attn_norm": norm(), "attn_q": matrix(n, n), "attn_k": matrix(kv, n)}
        block |= {"attn_v": matrix(kv, n), "attn_output": matrix(n, n), "ffn_norm": norm()}
        block |= {"ffn_gate": matrix(ff, n), "ffn_up": matrix(ff, n), "ffn_down": matrix(n, ff)}
        tensors |= {f"blk.{il}.{kind}.weight": values for kind, values in block.items()}
    tensors |= {"output_norm.weight": norm(), "output.weight": matrix(tokenizer.n_vocab, n)}
    keys = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": n,
        "feed_forward_length": ff,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 64,
        "rope.freq_base": 10000.0,
    }
    return write(
        folder / f"{arch}.gguf",
        arch,
        {**{f"{arch}.{key}": value for key, value in keys.items()}, **tokenizer.keys},
        change(tensors),
    )
