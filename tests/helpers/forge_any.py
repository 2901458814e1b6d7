"""Makes small random GGUF models of any architecture whose MTP graph the engine knows.

Unlike forge.py this module knows no shapes, only each architecture's key-values (load_arch_hparams
in src/models/<arch>.cpp). The engine itself says which tensors it wants for them, including
optional ones, through the test-only module's tensor_shapes(); tensors that a real converter would
not write are dropped again. There is no oracle for these models: they show what the engine does
with an architecture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from helpers.forge import Drop, Tokenizer, _add_key, copied_tokenizer, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
Shape = tuple[int, ...]  # NumPy's order


class EngineRefused(RuntimeError):
    """The engine made no model from the keys; the text ends with its log."""


# --- what the architectures ask for --------------------------------------------------------------


@dataclass(frozen=True)
class _Arch:
    keys: Callable[[_Sizes], dict[str, Any]]
    n_layer: int = 2  # the trunk's layers, at least
    max_nextn: int = 1
    drop: tuple[str, ...] = ()  # optional tensors that a converter would not write
    flat: tuple[str, ...] = ()  # tensors of one dimension in the file, which the loader reshapes
    # left out by the engine if it knows no file (n_nextn is read off the tensors there)
    extra: Callable[[_Sizes, int], Iterable[tuple[str, Shape]]] | None = None
    norm_alias: str = "nextn.shared_head_norm"  # the name of the head's last norm


@dataclass(frozen=True)
class _Sizes:
    n_layer: int
    n_nextn: int
    n_embd: int
    n_vocab: int

    @property
    def n_all(self) -> int:
        return self.n_layer + self.n_nextn

    def each(self, *trunk: Any, head: Any) -> list[Any]:
        """An array with one value for each block: `trunk` over and over, then the head's."""
        return [trunk[i % len(trunk)] for i in range(self.n_layer)] + [head] * self.n_nextn


_MLA = {"q_lora": 256, "kv_lora": 512, "rot": 32, "nope": 256, "v": 128}


def _common(s: _Sizes) -> dict[str, Any]:
    return {
        "block_count": s.n_all,
        "nextn_predict_layers": s.n_nextn,
        "context_length": 4096,
        "embedding_length": s.n_embd,
        "feed_forward_length": 512,
        "vocab_size": s.n_vocab,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 64,
        "rope.freq_base": 10000.0,
    }


def _experts(gating: int = 2) -> dict[str, Any]:  # llama_expert_gating_func_type
    return {
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_feed_forward_length": 256,
        "expert_shared_feed_forward_length": 256,
        "expert_shared_count": 1,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.5,
        "expert_gating_func": gating,
        "leading_dense_block_count": 1,
    }


def _latent_attention() -> dict[str, Any]:
    m = _MLA
    return {
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": m["kv_lora"] + m["rot"],
        "attention.value_length": m["kv_lora"],
        "attention.key_length_mla": m["nope"] + m["rot"],
        "attention.value_length_mla": m["v"],
        "attention.q_lora_rank": m["q_lora"],
        "attention.kv_lora_rank": m["kv_lora"],
        "rope.dimension_count": m["rot"],
    }


def _delta_net() -> dict[str, Any]:
    return {
        "full_attention_interval": 2,
        "rope.dimension_count": 32,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 256,
        "ssm.state_size": 64,
        "ssm.time_step_rank": 4,
        "ssm.group_count": 2,
    }


def _indexer() -> dict[str, Any]:
    # fewer than the tokens of a chunk, so that the choice leaves some out
    return {
        "attention.indexer.head_count": 4,
        "attention.indexer.key_length": 128,
        "attention.indexer.top_k": 24,
    }


def _glm4moe(s: _Sizes) -> dict[str, Any]:
    return {**_common(s), **_experts(), "rope.dimension_count": 32}


def _qwen35(s: _Sizes) -> dict[str, Any]:
    return {**_common(s), **_delta_net(), "rope.dimension_sections": [6, 5, 5, 0]}


def _qwen35moe(s: _Sizes) -> dict[str, Any]:
    return {**_qwen35(s), **_experts(1)}


def _qwen3next(s: _Sizes) -> dict[str, Any]:
    return {**_common(s), **_delta_net(), **_experts(1)}


def _deepseek2(s: _Sizes) -> dict[str, Any]:
    return {**_common(s), **_experts(), **_latent_attention()}


def _deepseek32(s: _Sizes) -> dict[str, Any]:
    return {**_deepseek2(s), **_indexer()}


def _bailingmoe3(s: _Sizes) -> dict[str, Any]:
    keys = {**_common(s), **_experts(), **_latent_attention()}
    return keys | {
        # a layer without key-value heads is a recurrent one
        "attention.head_count_kv": s.each(0, 1, head=1),
        "ssm.conv_kernel": 4,
        "kda.head_dim": 128,
        "kda.safe_gate": True,
        "kda.gate_lower_bound": -5.0,
    }


def _cohere2moe(s: _Sizes) -> dict[str, Any]:
    return {
        **_common(s),
        **_experts(),
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": None,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": s.each(True, False, head=False),
        "logit_scale": 0.25,
    }


def _hy_v3(s: _Sizes) -> dict[str, Any]:
    return {**_common(s), **_experts()}


def _mimo2(s: _Sizes) -> dict[str, Any]:
    return {
        **_common(s),
        **_experts(),
        "attention.head_count_kv": s.each(2, 1, head=2),
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": s.each(False, True, head=True),
        "attention.value_scale": 0.7,
        "rope.dimension_count": 32,
        "rope.freq_base_swa": 5000.0,
    }


def _step35(s: _Sizes) -> dict[str, Any]:
    return {
        **_common(s),
        **_experts(),
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": s.each(False, True, head=True),
        "rope.freq_base_swa": 5000.0,
    }


def _nemotron_h_moe(s: _Sizes) -> dict[str, Any]:
    # in turn a state-space, an attention and an expert layer (is_recr_impl in nemotron-h.cpp)
    return {
        **_common(s),
        **_experts(),
        "attention.head_count_kv": s.each(0, 2, 0, head=2),
        "feed_forward_length": s.each(0, 0, 512, head=512),
        "attention.layer_norm_epsilon": 1e-5,
        "moe_latent_size": 256,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": 512,
        "ssm.state_size": 64,
        "ssm.time_step_rank": 8,
        "ssm.group_count": 2,
    }


def _deepseek4(s: _Sizes) -> dict[str, Any]:
    return {
        **_common(s),
        **_experts(4),
        **_indexer(),
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        # not the indexer's key_length: the engine takes a cache with such heads for the indexer's,
        # and divides by zero in the head's empty one (attn_rot_k in llama-kv-cache.cpp)
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.q_lora_rank": 256,
        "attention.sliding_window": 32,
        "attention.output_group_count": 2,
        "attention.output_lora_rank": 128,
        "attention.compress_rope_freq_base": 40000.0,
        "attention.compress_ratios": s.each(0, 4, 128, head=0),
        "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 4,
        "hyper_connection.epsilon": 1e-6,
        "hash_layer_count": 1,
        "swiglu_clamp_exp": [10.0] * s.n_all,
        "rope.dimension_count": 64,
    }


def _glm5_next(s: _Sizes) -> dict[str, Any]:
    m = _MLA
    return {
        **_common(s),
        **_experts(),
        **_indexer(),
        "attention.head_count": 2,
        # a layer without key-value heads is a recurrent one
        "attention.head_count_kv": s.each(0, 1, head=1),
        "attention.key_length": m["kv_lora"],
        "attention.value_length": m["kv_lora"],
        "attention.key_length_mla": m["nope"],
        "attention.value_length_mla": m["v"],
        "attention.q_lora_rank": m["q_lora"],
        "attention.kv_lora_rank": m["kv_lora"],
        "attention.layer_norm_epsilon": 1e-6,
        "attention.indexer.kpool": 4,
        "attention.indexer.kpool_select_tail": True,
        "attention.indexer.types": [True] * s.n_layer,
        "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 4,
        "hyper_connection.epsilon": 1e-6,
        "kda.head_dim": 128,
        "kda.gate_lower_bound": -5.0,
        "rope.dimension_count": 0,
        "ssm.conv_kernel": 4,
        "swiglu_clamp_exp": [10.0] * s.n_all,
    }


def _qwen4exp(s: _Sizes) -> dict[str, Any]:
    return {
        **_common(s),
        **_experts(1),
        **_delta_net(),
        **_indexer(),
        "attention.compress_ratios": s.each(0, 4, head=4),
        "hyper_connection.count": 4,
        "hyper_connection.low_rank": 64,
        "rope.dimension_sections": [6, 5, 5, 0],
        # rows of a table by the hash of the last tokens, in a linear layer
        "ple.layers": [0],
        "ple.ngram_size": 3,
        "ple.heads_per_ngram": 2,
        "ple.conv_kernel": 4,
        "ple.eos_token_id": 2,
        "ple.layer_multipliers": [np.uint64(m) for m in (2654435761, 40503, 2246822519)],
        "ple.head_offsets": [np.uint64(64 * h) for h in range(4)],
        "ple.head_vocab_sizes": [np.uint64(64)] * 4,
        "embedding_length_per_layer_input": s.n_embd // 4,
    }


def _deepseek4_head(s: _Sizes, il: int) -> Iterable[tuple[str, Shape]]:
    n, blk = s.n_embd, f"blk.{il}."
    yield blk + "nextn.eh_proj.weight", (n, 2 * n)
    yield blk + "nextn.enorm.weight", (n,)
    yield blk + "nextn.hnorm.weight", (n,)
    yield blk + "nextn.embed_tokens.weight", (s.n_vocab, n)
    yield blk + "nextn.shared_head_head.weight", (s.n_vocab, n)
    yield blk + "nextn.shared_head_norm.weight", (n,)


def _gemma(s: _Sizes) -> dict[str, Any]:
    return {
        **_common(s),
        "attention.key_length": 128,
        "attention.value_length": 128,
        "attention.key_length_swa": 64,
        "attention.value_length_swa": 64,
        "attention.sliding_window": 32,
        "rope.dimension_count": 128,
        "rope.dimension_count_swa": 64,
        "rope.freq_base_swa": 5000.0,
    }


def _gemma4(s: _Sizes) -> dict[str, Any]:
    return {
        **_gemma(s),
        "nextn_predict_layers": None,
        "attention.sliding_window_pattern": s.each(True, False, head=False),
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 256,
        "final_logit_softcapping": 30.0,
    }


def _gemma4_assistant(s: _Sizes) -> dict[str, Any]:
    # all of its blocks are head blocks; embedding_length_out is the width of its gemma4
    return {
        **_gemma(s),
        "attention.sliding_window_pattern": [i % 2 == 0 for i in range(s.n_all)],
        "embedding_length_out": 2 * s.n_embd,
    }


def _two_ways(s: _Sizes) -> dict[str, Any]:
    """dream, llada: tokens see each other because of the architecture alone."""
    return {**_common(s), "nextn_predict_layers": None}


def _two_ways_moe(s: _Sizes) -> dict[str, Any]:
    return {**_two_ways(s), **_experts(), "leading_dense_block_count": None}


def _modern_bert(s: _Sizes) -> dict[str, Any]:
    # the heads are as wide as the engine assumes, n_embd / head_count
    return {
        **_two_ways(s),
        "attention.head_count_kv": 4,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.causal": False,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": s.each(False, True, True, head=False),
        "rope.freq_base_swa": 5000.0,
    }


def _gemma_embedding(s: _Sizes) -> dict[str, Any]:
    return {**_two_ways(s), "attention.sliding_window": 32, "rope.freq_base_swa": 5000.0}


def _gemma3(s: _Sizes) -> dict[str, Any]:
    return {**_two_ways(s), "attention.sliding_window": 32, "attention.causal": False}


def _lfm2(s: _Sizes) -> dict[str, Any]:
    return {
        **_two_ways(s),
        "attention.head_count_kv": s.each(0, 2, head=2),
        "attention.causal": False,
        "shortconv.l_cache": 3,
    }


def _gpt2(s: _Sizes) -> dict[str, Any]:
    # a table of as many positions as context_length says
    return {
        **_two_ways(s),
        "attention.head_count_kv": 4,
        "attention.layer_norm_epsilon": 1e-5,
        "context_length": 96,
    }


def _t5(s: _Sizes) -> dict[str, Any]:
    return {**_two_ways(s), "attention.relative_buckets_count": 32, "decoder_start_token_id": 0}


def _gemma4_assistant_shapes(s: _Sizes) -> Iterable[tuple[str, Shape]]:
    """From gemma4-assistant.cpp: the engine cannot be asked without a file, because it trips over
    an optional tensor that has no shape (masked_embd_centroids)."""
    n, ff, target = s.n_embd, 512, 2 * s.n_embd
    yield "token_embd.weight", (s.n_vocab, n)
    yield "output_norm.weight", (n,)
    yield "nextn.pre_projection.weight", (n, 2 * target)
    yield "nextn.post_projection.weight", (target, n)
    if s.n_all > 1:  # only blocks without a window use it for their rope
        yield "rope_freqs.weight", (64,)
    for il in range(s.n_all):
        head = 64 if il % 2 == 0 else 128
        block: dict[str, Shape] = {
            "attn_norm.weight": (n,),
            "attn_q.weight": (4 * head, n),
            "attn_output.weight": (n, 4 * head),
            "attn_q_norm.weight": (head,),
            "post_attention_norm.weight": (n,),
            "layer_output_scale.weight": (1,),
            "ffn_norm.weight": (n,),
            "ffn_gate.weight": (ff, n),
            "ffn_up.weight": (ff, n),
            "ffn_down.weight": (n, ff),
            "post_ffw_norm.weight": (n,),
        }
        yield from ((f"blk.{il}.{name}", shape) for name, shape in block.items())


_BIASES = ("*.attn_[qkv].bias", "*.attn_qkv.bias", "*.attn_output.bias")
_DENSE = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
_MOE = ("ffn_gate_inp.weight", "ffn_*_exps.weight", "ffn_*_shexp.weight", "exp_probs_b*")

ARCHS: dict[str, _Arch] = {
    "bailingmoe3": _Arch(_bailingmoe3, drop=_BIASES, norm_alias="layer_output_norm"),
    "cohere2moe": _Arch(_cohere2moe, drop=_BIASES),
    "deepseek2": _Arch(_deepseek2, drop=(*_BIASES, "*.attn_kv_b.weight")),
    "deepseek32": _Arch(_deepseek32, drop=_BIASES),
    "deepseek4": _Arch(_deepseek4, n_layer=3, drop=("*.exp_probs_b_vl*",), extra=_deepseek4_head),
    "glm-dsa": _Arch(_deepseek32, drop=_BIASES),
    "glm4moe": _Arch(_glm4moe),
    "hy_v3": _Arch(_hy_v3, max_nextn=3, drop=_BIASES),
    "mimo2": _Arch(_mimo2, max_nextn=3, drop=(*_BIASES, "*.layer_output_norm.weight")),
    "nemotron_h_moe": _Arch(_nemotron_h_moe, n_layer=3, drop=_BIASES),
    "qwen35": _Arch(_qwen35, drop=(*_BIASES, "cls.output.weight")),
    "qwen35moe": _Arch(_qwen35moe, drop=_BIASES),
    "qwen3next": _Arch(_qwen3next, drop=(*_BIASES, "*.ssm_in.weight")),
    "step35": _Arch(_step35, max_nextn=3, drop=(*_BIASES, "rope_freqs.weight")),
    "glm5-next": _Arch(_glm5_next, drop=_BIASES),
    "qwen4exp": _Arch(
        _qwen4exp,
        drop=_BIASES,
        # TENSOR_ALLOW_RESHAPE in qwen4exp.cpp: the scales of four streams in one row
        flat=("*hc_*norm.weight", "*.ple_norm_*.weight", "*.nextn.hnorm.weight"),
    ),
    "gemma4": _Arch(_gemma4, max_nextn=0),
    "gemma4-assistant": _Arch(_gemma4_assistant, n_layer=0, max_nextn=4),
    "dream": _Arch(_two_ways, max_nextn=0, drop=_BIASES),
    "gemma3": _Arch(_gemma3, n_layer=6, max_nextn=0, drop=_BIASES),
    "gemma-embedding": _Arch(_gemma_embedding, max_nextn=0, drop=_BIASES),
    "gpt2": _Arch(_gpt2, max_nextn=0),
    "lfm2": _Arch(_lfm2, max_nextn=0, drop=_BIASES),
    "llada": _Arch(_two_ways, max_nextn=0, drop=_BIASES),
    "llada-moe": _Arch(_two_ways_moe, max_nextn=0, drop=_BIASES),
    "llama": _Arch(_two_ways, max_nextn=0, drop=(*_BIASES, "rope_freqs.weight")),
    "modern-bert": _Arch(_modern_bert, n_layer=4, max_nextn=0),
    "rnd1": _Arch(_two_ways_moe, max_nextn=0, drop=_BIASES),
    "t5": _Arch(_t5, max_nextn=0),
}
MTP_ARCHS = tuple(arch for arch, about in ARCHS.items() if about.max_nextn and "gemma4" not in arch)


def _unwritten(arch: str, s: _Sizes) -> list[str]:
    """Patterns of the tensors that the engine has room for and no converter writes."""
    # scales of NVFP4 weights, which everything has room for (load_tensors in llama-model.cpp)
    out = ["*.scale", "*.input_scale", *ARCHS[arch].drop]
    # the tensors in the file decide between a dense and an expert layer
    if arch in ("hy_v3", "mimo2", "step35"):
        for il in range(s.n_all):
            is_dense = il == 0 or (il >= s.n_layer and arch != "hy_v3")
            out += [f"blk.{il}.{name}" for name in (_MOE if is_dense else _DENSE)]
    if arch == "mimo2":
        out += [f"blk.{il}.attn_sinks.weight" for il in range(s.n_all) if il % 2 == 0]
        # the head wants one matrix for q, k and v; make_any puts it there
        out += [f"blk.{il}.attn_[qkv].weight" for il in range(s.n_layer, s.n_all)]
    return out


# --- forging -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnyModel:
    """A model and the file that holds it."""

    path: Path
    arch: str
    n_layer: int
    n_nextn: int
    shapes: dict[str, Shape]
    tokenizer: Tokenizer | None
    keys: dict[str, Any] = field(repr=False, default_factory=dict)


def make_any(
    path: Path | str,
    arch: str,
    *,
    n_nextn: int = 1,
    n_layer: int | None = None,
    seed: int = 0,
    n_embd: int = 256,
    dtype: str = "F32",
    tokenizer: str | None = "tiny",
    embed_tokens: bool = False,
    shared_head_head: bool = False,
    shared_head_norm: bool = True,
    tied: bool = False,
    fuse_gate_up: bool = False,
    drop: Drop = (),
    metadata: Mapping[str, Any] | None = None,
) -> AnyModel:
    """Write a random model to path.

    n_nextn: head blocks, up to ARCHS[arch].max_nextn. gemma4 has none; gemma4-assistant has nothing
        else.
    n_layer: blocks of the trunk; None means the fewest that show every kind of layer.
    tokenizer: as forge.make_model takes it.
    embed_tokens, shared_head_head, shared_head_norm: the head's optional tensors, if the
        architecture has room for them.
    tied: no output.weight, if the architecture can do without.
    fuse_gate_up: ffn_gate_up_exps instead of ffn_gate_exps and ffn_up_exps, if the architecture has
        room for it.
    drop: tensors left out of the file, as a predicate or as shell patterns of names.
    metadata: keys to add or replace, without "<arch>."; None takes a key out.

    Raises EngineRefused if the engine makes no model from the keys.
    """
    about = ARCHS[arch]
    n_nextn = min(n_nextn, about.max_nextn)
    layers = about.n_layer if n_layer is None else n_layer
    tok = None
    if tokenizer is not None:
        tok = tiny_tokenizer() if tokenizer == "tiny" else copied_tokenizer(tokenizer)
    sizes = _Sizes(layers, n_nextn, n_embd, tok.n_vocab if tok else 512)
    keys: dict[str, Any] = {
        "general.name": f"forged {arch} {seed}",
        "general.quantization_version": np.uint32(2),
        **{f"{arch}.{k}": v for k, v in {**about.keys(sizes), **(metadata or {})}.items()},
        **(tok.keys if tok else {"tokenizer.ggml.model": "no_vocab"}),
    }
    if arch == "gemma4-assistant":
        shapes = dict(_gemma4_assistant_shapes(sizes))
    else:
        shapes = _wanted(arch, keys)
    if not fuse_gate_up:
        parted: dict[str, Shape] = {}
        for name, shape in shapes.items():
            if name.endswith("ffn_gate_up_exps.weight"):
                n_expert, n_out, n_in = shape
                for part in ("gate", "up"):
                    parted[name.replace("gate_up", part)] = (n_expert, n_out // 2, n_in)
            else:
                parted.setdefault(name, shape)
        shapes = parted
    for name, shape in shapes.items():
        if any(fnmatchcase(name, pattern) for pattern in about.flat):
            shapes[name] = (int(np.prod(shape)),)
    if about.extra is not None:
        for il in range(layers, sizes.n_all):
            shapes.update(about.extra(sizes, il))
    if arch == "mimo2":
        for il in range(layers, sizes.n_all):
            qkv = [shapes[f"blk.{il}.attn_{x}.weight"] for x in "qkv"]
            shapes[f"blk.{il}.attn_qkv.weight"] = (sum(s[0] for s in qkv), qkv[0][1])

    unwritten = _unwritten(arch, sizes)
    if not embed_tokens:
        unwritten.append("*.nextn.embed_tokens.weight")
    if not shared_head_head:
        unwritten.append("*.nextn.shared_head_head.weight")
    if not shared_head_norm:
        unwritten.append(f"*.{about.norm_alias}.weight")
    if tied:
        unwritten.append("output.weight")
    if callable(drop):
        unwritten += [name for name in shapes if drop(name)]
    else:
        unwritten += [drop] if isinstance(drop, str) else drop
    for name in [n for n in shapes if any(fnmatchcase(n, pattern) for pattern in unwritten)]:
        del shapes[name]

    writer = gguf.GGUFWriter(Path(path), arch)
    for key, value in keys.items():
        _add_key(writer, key, value)
    for name, shape in shapes.items():
        values = _draw(arch, name, shape, seed, 8)
        if values.dtype == np.int32:
            writer.add_tensor(name, values)
            continue
        kind = GgmlType[dtype] if _follows_dtype(name, shape) else GgmlType.F32
        raw = None if kind in (GgmlType.F32, GgmlType.F16) else kind
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AnyModel(Path(path), arch, layers, n_nextn, shapes, tok, keys)


def _follows_dtype(name: str, shape: Shape) -> bool:
    kept = ("conv1d", "ffn_gate_inp.", "norm", "ssm_", "hc_", "_ape")
    return (len(shape) > 1 and not any(part in name for part in kept)) or "ssm_out" in name


def _draw(arch: str, name: str, shape: Shape, seed: int, n_expert: int) -> NDArray[Any]:
    """Values that keep activations near one in size (see forge.py)."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    kind = name.split(".", 2)[2] if name.startswith("blk.") else name
    if kind == "ffn_gate_tid2eid.weight":  # the experts of a token, each once
        order = rng.permuted(np.tile(np.arange(n_expert, dtype=np.int32), (shape[0], 1)), axis=1)
        return np.ascontiguousarray(order[:, : shape[1]])
    values = rng.standard_normal(shape)
    if kind == "ssm_a":  # the decay; bailingmoe3 puts the sign elsewhere
        values = np.exp(0.5 * values) * (1 if arch == "bailingmoe3" else -1)
    elif kind == "ssm_dt.bias":
        values -= 1.0
    elif (
        kind.endswith(".bias")
        or kind == "exp_probs_b"
        or "base" in kind
        or kind.endswith("ape.weight")
    ):
        values *= 0.1
    elif kind == "ffn_gate_inp_shexp.weight":
        values /= np.sqrt(shape[0])
    elif "norm" in kind or "scale" in kind or kind in ("rope_freqs.weight", "ssm_d"):
        values = np.exp(0.3 * values)
    elif "embd" in kind or "embed_tokens" in kind:
        values *= np.exp(0.4 * rng.standard_normal(shape[-1]))
    elif len(shape) > 1:
        values /= np.sqrt(shape[-1])
    return values.astype(np.float32)


# --- asking the engine ---------------------------------------------------------------------------

_ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import _imatrix_testing
print(json.dumps(_imatrix_testing.tensor_shapes(sys.argv[2])))
"""


def native_folder() -> Path:
    """The folder into which the build put _imatrix_testing for this interpreter (target
    imatrix-tools)."""
    name = "_imatrix_testing" + str(sysconfig.get_config_var("EXT_SUFFIX"))
    found = list(ROOT.glob(f"build/*/tests/native/{name}"))
    if not found:
        raise FileNotFoundError(f"{name} is not built: run `make tools` (`make test` does)")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _wanted(arch: str, keys: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes of the tensors that the engine has room for. It is asked in a process of its
    own, which it may end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.gguf"
        writer = gguf.GGUFWriter(path, arch)
        for key, value in keys.items():
            _add_key(writer, key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        done = subprocess.run(
            [sys.executable, "-c", _ASK, os.fspath(native_folder()), os.fspath(path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    if done.returncode != 0:
        raise EngineRefused(f"{arch}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return {name: tuple(reversed(ne)) for name, ne, _ in json.loads(done.stdout)}
