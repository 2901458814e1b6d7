"""Makes small random GGUF models that the engine loads and the NumPy oracle (oracle.py)
understands.

A model is a pure function of its arguments: every tensor has a generator of its own, seeded by
``(seed, tensor name)``, so that leaving one tensor out (``drop=``) changes no other, and the two
halves of a split model hold the same numbers as the whole one.

Names and shapes come from the engine's ``load_arch_tensors`` (src/models/<arch>.cpp), keys from
src/llama-arch.cpp. NumPy shapes read in the opposite order: the engine's ``{n_in, n_out,
n_expert}`` is ``(n_expert, n_out, n_in)`` here.
"""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

F32 = NDArray[np.float32]
Arch = Literal["llama", "glm4moe", "qwen35", "qwen35moe", "deepseek2", "hy_v3"]
Drop = Callable[[str], bool] | Collection[str]

ARCHS: tuple[Arch, ...] = ("llama", "glm4moe", "qwen35", "qwen35moe", "deepseek2", "hy_v3")
VOCABS = Path(__file__).resolve().parents[2] / "vendor" / "llama.cpp" / "models"

# general.file_type, as llama_ftype numbers them (include/llama.h)
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
# llama_expert_gating_func_type (src/llama-hparams.h)
_GATING = {"softmax": 1, "sigmoid": 2}


@dataclass(frozen=True)
class Hparams:
    """The numbers that shape a model. Every field can be given to make_model by name."""

    n_layer: int = 2  # of the trunk; the file's block_count is n_layer + n_nextn
    n_nextn: int = 0
    n_embd: int = 256
    n_ff: int = 512
    n_vocab: int = 0
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_rot: int = 64
    rope_base: float = 10000.0
    eps: float = 1e-5
    n_ctx_train: int = 4096
    qkv_bias: bool = False
    qk_norm: bool = False
    # experts
    n_expert: int = 0
    n_expert_used: int = 0
    n_expert_shared: int = 0
    n_ff_exp: int = 0
    n_ff_shexp: int = 0
    n_layer_dense: int = 0  # leading layers without experts
    gating: Literal["softmax", "sigmoid"] = "softmax"
    expert_norm: bool = True
    expert_scale: float = 1.0
    expert_bias: bool = False  # exp_probs_b: it affects only the choice of experts
    starved: tuple[int, ...] = ()  # experts that exp_probs_b excludes from every choice
    # gated delta net
    full_attention_interval: int = 0
    ssm_conv: int = 0
    ssm_state: int = 0  # the size of a head, the same for keys and values
    ssm_k_heads: int = 0
    ssm_v_heads: int = 0
    # multi-head latent attention
    q_lora: int = 0
    kv_lora: int = 0
    qk_nope: int = 0
    v_head: int = 0

    def is_recurrent(self, il: int) -> bool:
        """qwen35: every layer of the trunk except each n-th; never the head
        (src/models/qwen35.cpp)."""
        interval = self.full_attention_interval
        return bool(interval) and il < self.n_layer and (il + 1) % interval != 0

    def has_experts(self, il: int) -> bool:
        return self.n_expert > 0 and il >= self.n_layer_dense

    @property
    def ssm_k_dim(self) -> int:
        return self.ssm_state * self.ssm_k_heads

    @property
    def ssm_v_dim(self) -> int:
        return self.ssm_state * self.ssm_v_heads


_EXPERTS: dict[str, Any] = {"n_expert": 8, "n_expert_used": 2, "n_ff_exp": 256, "n_ff_shexp": 256}
_QWEN35: dict[str, Any] = {
    "n_rot": 32,
    "qk_norm": True,
    "full_attention_interval": 2,
    "ssm_conv": 4,
    "ssm_state": 64,
    "ssm_k_heads": 2,
    "ssm_v_heads": 4,
}
# Every matmul row is a multiple of 256 long, as the smallest quantized types require. Sizes that
# could be mistaken for one another differ if the architecture allows it.
_DEFAULTS: dict[Arch, dict[str, Any]] = {
    "llama": {},
    "glm4moe": {
        **_EXPERTS,
        "n_rot": 32,
        "qkv_bias": True,
        "qk_norm": True,
        "n_expert_shared": 1,
        "n_layer_dense": 1,
        "gating": "sigmoid",
        "expert_scale": 1.5,
        "expert_bias": True,
    },
    "qwen35": _QWEN35,
    "qwen35moe": {**_QWEN35, **_EXPERTS},
    "deepseek2": {
        **_EXPERTS,
        "n_head": 2,
        "n_head_kv": 1,
        "n_rot": 32,
        "n_expert_shared": 1,
        "n_layer_dense": 1,
        "gating": "sigmoid",
        "expert_scale": 2.5,
        "expert_bias": True,
        "q_lora": 256,
        "kv_lora": 512,
        "qk_nope": 256,
        "v_head": 128,
    },
    "hy_v3": {
        **_EXPERTS,
        "n_ff": 768,
        "n_ff_shexp": 512,
        "qk_norm": True,
        "n_layer_dense": 1,
        "gating": "sigmoid",
        "expert_scale": 2.5,
        "expert_bias": True,
    },
}


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer.* keys of a file, and what a test needs to know about them."""

    keys: Mapping[str, Any]
    n_vocab: int
    bos: int | None
    add_bos: bool
    merges: tuple[tuple[str, str], ...] = ()
    ids: Mapping[str, int] | None = None  # the tiny tokenizer only

    def encode(self, text: str) -> list[int]:
        """The tiny tokenizer's ids for ASCII text, by definition: split, then merge by rank."""
        if self.ids is None:
            raise ValueError("only the tiny tokenizer can be run here")
        if not text.isascii():
            raise ValueError("the splitter below knows ASCII letters and digits only")
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        out: list[int] = []
        for word in _GPT2_SPLIT.findall(text):
            parts = [_BYTES[b] for b in word.encode()]
            while len(parts) > 1:
                pairs = list(itertools.pairwise(parts))
                best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
                if best not in ranks:
                    break
                at = pairs.index(best)
                parts[at : at + 2] = ["".join(best)]
            out += [self.ids[part] for part in parts]
        return out


@dataclass(frozen=True)
class ModelSpec:
    """A model and the file that holds it."""

    path: Path
    arch: Arch
    hparams: Hparams
    tensors: dict[str, F32]  # by name, after rounding to the type in which they are stored
    types: dict[str, GgmlType]
    tokenizer: Tokenizer | None

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer")
        return self.tokenizer.encode(text)

    def chunks(self, text: str, n_ctx: int, n_chunks: int | None = None) -> list[list[int]]:
        """Chunks as llama-imatrix cuts them: one stream, the tail dropped, BOS over each first token.

        tools/imatrix/imatrix.cpp: the stream itself begins with BOS as well.
        """
        tokens = self.encode(text)
        tok = self.tokenizer
        bos = [tok.bos] if tok is not None and tok.add_bos and tok.bos is not None else []
        tokens = bos + tokens
        full = len(tokens) // n_ctx
        n = full if n_chunks is None else min(full, n_chunks)
        return [bos + tokens[i * n_ctx + len(bos) : (i + 1) * n_ctx] for i in range(n)]


def make_model(
    path: Path | str,
    arch: Arch,
    *,
    seed: int = 0,
    dtype: Literal["F32", "F16", "BF16", "Q8_0"] = "F32",
    tokenizer: str | None = "tiny",
    n_vocab: int | None = None,
    add_bos: bool = False,
    tied: bool = False,
    embed_tokens: bool = False,
    shared_head_head: bool = False,
    shared_head_norm: bool = True,
    drop: Drop = (),
    metadata: Mapping[str, Any] | None = None,
    **hparams: Any,
) -> ModelSpec:
    """Write a random model to path, and return what the oracle needs to follow it.

    tokenizer: "tiny" (byte-level, see Tokenizer.encode), the name of one of the engine's
        vocabularies ("qwen35": vendor/llama.cpp/models/ggml-vocab-qwen35.gguf), or None for a
        model that has only numbers. n_vocab pads a tokenizer or cuts it short.
    tied: no output.weight; the engine then takes token_embd.weight.
    embed_tokens, shared_head_head, shared_head_norm: the head's optional tensors.
    drop: tensors left out of the file, as a predicate or as shell patterns of names; the keys still
        claim them. A pattern "blk.2.*" makes a trunk-only file of a two-layer model.
    metadata: keys to add or replace; None takes a key out.
    hparams: fields of Hparams, over the architecture's defaults.
    """
    if tokenizer is None:
        tok = None
        vocab_size = n_vocab or 512
    else:
        tok = tiny_tokenizer(n_vocab, add_bos) if tokenizer == "tiny" else None
        tok = tok or copied_tokenizer(tokenizer, n_vocab, add_bos)
        vocab_size = tok.n_vocab
    hp = replace(Hparams(), **{**_DEFAULTS[arch], **hparams, "n_vocab": vocab_size})
    _check(arch, hp)

    dropped = drop if callable(drop) else _matcher(drop)
    shapes = _shapes(arch, hp, tied, embed_tokens, shared_head_head, shared_head_norm)

    keys: dict[str, Any] = {
        "general.name": f"forged {arch} {seed}",
        "general.file_type": np.uint32(_FILE_TYPES[dtype]),
        "general.quantization_version": np.uint32(2),
        **{f"{arch}.{key}": value for key, value in _keys(arch, hp).items()},
        **(tok.keys if tok else {"tokenizer.ggml.model": "no_vocab"}),
        **(metadata or {}),
    }

    out = Path(path)
    writer = gguf.GGUFWriter(out, arch)
    for key, value in keys.items():
        _add_key(writer, key, value)
    tensors: dict[str, F32] = {}
    types: dict[str, GgmlType] = {}
    for name, shape in shapes:
        if dropped(name):
            continue
        values = _draw(name, shape, seed, hp)
        types[name] = GgmlType[dtype] if _follows_dtype(name, shape) else GgmlType.F32
        stored = gguf.quantize(values, types[name])
        tensors[name] = gguf.dequantize(stored, types[name]).astype(np.float32).reshape(shape)
        # gguf-py infers F32 and F16 from the array, and the others from raw bytes plus a type
        raw = None if types[name] in (GgmlType.F32, GgmlType.F16) else types[name]
        writer.add_tensor(name, stored, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelSpec(out, arch, hp, tensors, types, tok)


# --- tensors -------------------------------------------------------------------------------------

Shape = tuple[int, ...]


def _shapes(
    arch: Arch,
    hp: Hparams,
    tied: bool,
    embed_tokens: bool,
    shared_head_head: bool,
    shared_head_norm: bool,
) -> Iterator[tuple[str, Shape]]:
    n = hp.n_embd
    yield "token_embd.weight", (hp.n_vocab, n)
    yield "output_norm.weight", (n,)
    if not tied:
        yield "output.weight", (hp.n_vocab, n)
    for il in range(hp.n_layer + hp.n_nextn):
        blk = f"blk.{il}."
        yield from ((blk + name, shape) for name, shape in _block_shapes(arch, hp, il))
        if il < hp.n_layer:
            continue
        yield blk + "nextn.eh_proj.weight", (n, 2 * n)
        yield blk + "nextn.enorm.weight", (n,)
        yield blk + "nextn.hnorm.weight", (n,)
        if embed_tokens:
            yield blk + "nextn.embed_tokens.weight", (hp.n_vocab, n)
        if shared_head_head:
            yield blk + "nextn.shared_head_head.weight", (hp.n_vocab, n)
        if shared_head_norm:
            yield blk + "nextn.shared_head_norm.weight", (n,)


def _block_shapes(arch: Arch, hp: Hparams, il: int) -> Iterator[tuple[str, Shape]]:
    n = hp.n_embd
    yield "attn_norm.weight", (n,)
    if hp.is_recurrent(il):
        yield from _delta_net_shapes(hp)
    elif arch == "deepseek2":
        yield from _latent_attention_shapes(hp)
    else:
        yield from _attention_shapes(hp, gated=arch in ("qwen35", "qwen35moe"))

    yield (
        "ffn_norm.weight"
        if arch in ("llama", "deepseek2", "hy_v3")
        else "post_attention_norm.weight",
        (n,),
    )
    if not hp.has_experts(il):
        yield "ffn_gate.weight", (hp.n_ff, n)
        yield "ffn_up.weight", (hp.n_ff, n)
        yield "ffn_down.weight", (n, hp.n_ff)
        return
    yield "ffn_gate_inp.weight", (hp.n_expert, n)
    if hp.expert_bias:
        # hy-v3.cpp asks for it without a suffix, and refuses a file that has it with one
        yield "exp_probs_b" if arch == "hy_v3" else "exp_probs_b.bias", (hp.n_expert,)
    yield "ffn_gate_exps.weight", (hp.n_expert, hp.n_ff_exp, n)
    yield "ffn_up_exps.weight", (hp.n_expert, hp.n_ff_exp, n)
    yield "ffn_down_exps.weight", (hp.n_expert, n, hp.n_ff_exp)
    if arch == "qwen35moe":  # the shared expert of these has a gate of its own
        yield "ffn_gate_inp_shexp.weight", (n,)
    if hp.n_ff_shexp:
        yield "ffn_gate_shexp.weight", (hp.n_ff_shexp, n)
        yield "ffn_up_shexp.weight", (hp.n_ff_shexp, n)
        yield "ffn_down_shexp.weight", (n, hp.n_ff_shexp)


def _attention_shapes(hp: Hparams, *, gated: bool) -> Iterator[tuple[str, Shape]]:
    n_q, n_kv = hp.n_head * hp.head_dim, hp.n_head_kv * hp.head_dim
    outputs = {"attn_q": 2 * n_q if gated else n_q, "attn_k": n_kv, "attn_v": n_kv}
    for name, n_out in outputs.items():
        yield f"{name}.weight", (n_out, hp.n_embd)
        if hp.qkv_bias:
            yield f"{name}.bias", (n_out,)
    yield "attn_output.weight", (hp.n_embd, n_q)
    if hp.qk_norm:
        yield "attn_q_norm.weight", (hp.head_dim,)
        yield "attn_k_norm.weight", (hp.head_dim,)


def _delta_net_shapes(hp: Hparams) -> Iterator[tuple[str, Shape]]:
    n_conv = 2 * hp.ssm_k_dim + hp.ssm_v_dim
    yield "attn_qkv.weight", (n_conv, hp.n_embd)
    yield "attn_gate.weight", (hp.ssm_v_dim, hp.n_embd)
    yield "ssm_conv1d.weight", (n_conv, hp.ssm_conv)
    yield "ssm_dt.bias", (hp.ssm_v_heads,)
    yield "ssm_a", (hp.ssm_v_heads,)
    yield "ssm_beta.weight", (hp.ssm_v_heads, hp.n_embd)
    yield "ssm_alpha.weight", (hp.ssm_v_heads, hp.n_embd)
    yield "ssm_norm.weight", (hp.ssm_state,)
    yield "ssm_out.weight", (hp.n_embd, hp.ssm_v_dim)


def _latent_attention_shapes(hp: Hparams) -> Iterator[tuple[str, Shape]]:
    yield "attn_q_a.weight", (hp.q_lora, hp.n_embd)
    yield "attn_q_a_norm.weight", (hp.q_lora,)
    yield "attn_q_b.weight", (hp.n_head * (hp.qk_nope + hp.n_rot), hp.q_lora)
    yield "attn_kv_a_mqa.weight", (hp.kv_lora + hp.n_rot, hp.n_embd)
    yield "attn_kv_a_norm.weight", (hp.kv_lora,)
    yield "attn_k_b.weight", (hp.n_head, hp.kv_lora, hp.qk_nope)
    yield "attn_v_b.weight", (hp.n_head, hp.v_head, hp.kv_lora)
    yield "attn_output.weight", (hp.n_embd, hp.n_head * hp.v_head)


def _follows_dtype(name: str, shape: Shape) -> bool:
    """Which tensors a converter would store in the model's type; the rest stay F32.

    The engine wants norms, the convolution (ggml_ssm_conv) and the biases in F32.
    """
    kept = ("ssm_conv1d.weight", "ffn_gate_inp.weight")
    return len(shape) > 1 and not name.endswith(kept)


def _draw(name: str, shape: Shape, seed: int, hp: Hparams) -> F32:
    """Values that keep activations near one in size, and make channels clearly different."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape)
    kind = name.split(".", 2)[2] if name.startswith("blk.") else name
    if kind == "ffn_gate_inp_shexp.weight":
        values /= np.sqrt(shape[0])
    elif kind in ("exp_probs_b.bias", "exp_probs_b"):
        values *= 0.1
        values[list(hp.starved)] = -100.0
    elif kind == "ssm_a":
        values = -np.exp(0.5 * values)  # log of the decay: negative, or the state would grow
    elif kind == "ssm_dt.bias":
        values -= 1.0
    elif kind.endswith(".bias"):
        values *= 0.1
    elif len(shape) == 1:
        values = np.exp(0.5 * values)
    elif kind in ("token_embd.weight", "nextn.embed_tokens.weight"):
        values *= np.exp(0.4 * rng.standard_normal(shape[-1]))
    else:
        values /= np.sqrt(shape[-1])
    return values.astype(np.float32)


def _matcher(patterns: Collection[str]) -> Callable[[str], bool]:
    each = [patterns] if isinstance(patterns, str) else list(patterns)
    return lambda name: any(fnmatchcase(name, pattern) for pattern in each)


def _check(arch: Arch, hp: Hparams) -> None:
    if arch == "llama" and (hp.n_rot != hp.head_dim or hp.n_nextn):
        raise ValueError("llama rotates whole heads and has no MTP graph")
    if arch in ("qwen35", "qwen35moe") and not any(map(hp.is_recurrent, range(hp.n_layer))):
        raise ValueError("the engine aborts on a qwen35 model without a recurrent layer")
    if arch == "hy_v3" and (hp.n_rot != hp.head_dim or not hp.n_ff_shexp):
        raise ValueError("hy_v3 rotates whole heads and always runs a shared expert")
    if arch in ("glm4moe", "deepseek2") and hp.n_ff_shexp != hp.n_ff_exp * hp.n_expert_shared:
        raise ValueError(f"{arch} has no key for the shared expert's size: it follows n_ff_exp")


# --- keys ----------------------------------------------------------------------------------------


def _keys(arch: Arch, hp: Hparams) -> dict[str, Any]:
    """The <arch>.* keys, without the prefix."""
    keys: dict[str, Any] = {
        "block_count": hp.n_layer + hp.n_nextn,
        "context_length": hp.n_ctx_train,
        "embedding_length": hp.n_embd,
        "feed_forward_length": hp.n_ff,
        "vocab_size": hp.n_vocab,
        "attention.head_count": hp.n_head,
        "attention.head_count_kv": hp.n_head_kv,
        "attention.key_length": hp.head_dim,
        "attention.value_length": hp.head_dim,
        "attention.layer_norm_rms_epsilon": hp.eps,
        "rope.dimension_count": hp.n_rot,
        "rope.freq_base": hp.rope_base,
    }
    if hp.n_nextn:
        keys["nextn_predict_layers"] = hp.n_nextn
    if hp.n_expert:
        keys["expert_count"] = hp.n_expert
        keys["expert_used_count"] = hp.n_expert_used
        keys["expert_feed_forward_length"] = hp.n_ff_exp
    if arch in ("glm4moe", "deepseek2"):
        keys["leading_dense_block_count"] = hp.n_layer_dense
        keys["expert_shared_count"] = hp.n_expert_shared
    if arch in ("glm4moe", "deepseek2", "hy_v3"):  # hy_v3 has no key for dense layers: no router
        keys["expert_weights_norm"] = hp.expert_norm
        keys["expert_weights_scale"] = hp.expert_scale
        keys["expert_gating_func"] = _GATING[hp.gating]
    if arch in ("qwen35moe", "hy_v3"):
        keys["expert_shared_feed_forward_length"] = hp.n_ff_shexp
    if arch in ("qwen35", "qwen35moe"):
        keys["full_attention_interval"] = hp.full_attention_interval
        keys["rope.dimension_sections"] = _rope_sections(hp.n_rot)
        keys["ssm.conv_kernel"] = hp.ssm_conv
        keys["ssm.inner_size"] = hp.ssm_v_dim
        keys["ssm.state_size"] = hp.ssm_state
        keys["ssm.time_step_rank"] = hp.ssm_v_heads
        keys["ssm.group_count"] = hp.ssm_k_heads
    if arch == "deepseek2":
        # the cache holds the latent rows (key_length); _mla gives the size of the heads that they
        # stand for
        keys["attention.key_length"] = hp.kv_lora + hp.n_rot
        keys["attention.value_length"] = hp.kv_lora
        keys["attention.key_length_mla"] = hp.qk_nope + hp.n_rot
        keys["attention.value_length_mla"] = hp.v_head
        keys["attention.q_lora_rank"] = hp.q_lora
        keys["attention.kv_lora_rank"] = hp.kv_lora
    return keys


def _rope_sections(n_rot: int) -> list[int]:
    """How many pairs turn with time, height and width, in the ratio of Qwen3.5's own [11, 11, 10,
    0] for 64.

    Pair i belongs to section i % 3 (ggml_mrope_cache_init in ggml/src/ggml-cpu/ops.cpp). A pair that
    no section covers would turn with the fourth position, which is 0 for text.
    """
    pairs = n_rot // 2
    return [len(range(k, pairs, 3)) for k in range(3)] + [0]


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float | np.floating):
        writer.add_float32(key, float(value))
    elif isinstance(value, int | np.integer):
        writer.add_uint32(key, int(value))
    elif isinstance(value[0], np.uint64):  # gguf-py would write int32
        kinds = gguf.GGUFValueType
        writer.add_key_value(key, [int(v) for v in value], kinds.ARRAY, sub_type=kinds.UINT64)
    else:
        writer.add_array(key, list(value))


# --- tokenizers ----------------------------------------------------------------------------------


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, which byte-level vocabularies are written in."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable}
    table.update({b: chr(256 + i) for i, b in enumerate(others)})
    return table


_BYTES = _byte_alphabet()
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # llama_token_type (include/llama.h)

# The "gpt-2" pre-tokenizer for ASCII (unicode_regex_split_custom_gpt2 in src/unicode.cpp).
_GPT2_SPLIT = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
)

_TINY_MERGES = (
    ("Ġ", "t"),
    ("h", "e"),
    ("Ġ", "a"),
    ("i", "n"),
    ("r", "e"),
    ("o", "n"),
    ("Ġt", "he"),
    ("e", "r"),
    ("Ġ", "s"),
    ("a", "t"),
    ("Ġ", "w"),
    ("Ġ", "o"),
    ("e", "n"),
    ("i", "t"),
    ("o", "r"),
    ("a", "n"),
    ("e", "s"),
    ("Ġ", "c"),
    ("i", "s"),
    ("Ġa", "n"),
    ("Ġan", "d"),
    ("in", "g"),
    ("o", "u"),
    ("Ġo", "f"),
)


@functools.cache
def tiny_tokenizer(n_vocab: int | None = None, add_bos: bool = False) -> Tokenizer:
    """Byte-level BPE with a few merges: 256 bytes, the merges, then the special tokens."""
    tokens = [_BYTES[b] for b in range(256)]
    tokens += ["".join(pair) for pair in _TINY_MERGES]
    kinds = [_NORMAL] * len(tokens)
    bos = len(tokens)
    # the engine recognizes the end of a text by this name (src/llama-vocab.cpp), and warns without
    # it
    tokens += ["<|begin|>", "<|endoftext|>"]
    kinds += [_CONTROL] * 2
    if n_vocab is not None:
        if n_vocab < len(tokens):
            raise ValueError(f"the tiny tokenizer has {len(tokens)} tokens")
        unused = range(len(tokens), n_vocab)
        tokens += [f"<|unused_{i}|>" for i in unused]
        kinds += [_UNUSED] * len(unused)
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _TINY_MERGES],
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": bos + 1,
        "tokenizer.ggml.add_bos_token": add_bos,
    }
    ids = {token: i for i, token in enumerate(tokens)}
    return Tokenizer(keys, len(tokens), bos, add_bos, _TINY_MERGES, ids)


@functools.cache
def copied_tokenizer(name: str, n_vocab: int | None = None, add_bos: bool = False) -> Tokenizer:
    """One of the engine's own vocabularies; real ones have 100 to 250 thousand tokens.

    With n_vocab: the first n_vocab - 1 tokens, the merges among them, and the end token; if the
    vocabulary has fewer tokens, unused ones follow.
    """
    reader = gguf.GGUFReader(VOCABS / f"ggml-vocab-{name}.gguf")
    prefix = "tokenizer."
    keys = {key: f.contents() for key, f in reader.fields.items() if key.startswith(prefix)}
    tokens: list[str] = keys["tokenizer.ggml.tokens"]
    eos: int = keys["tokenizer.ggml.eos_token_id"]
    if n_vocab is not None and n_vocab < len(tokens):
        kept = [*range(n_vocab - 1), eos] if eos >= n_vocab else list(range(n_vocab))
        new_id = {old: new for new, old in enumerate(kept)}
        kinds = keys["tokenizer.ggml.token_type"]
        keys["tokenizer.ggml.token_type"] = [kinds[i] for i in kept]
        keys["tokenizer.ggml.tokens"] = tokens = [tokens[i] for i in kept]
        known = set(tokens)
        keys["tokenizer.ggml.merges"] = [
            merge
            for merge in keys["tokenizer.ggml.merges"]
            if merge.replace(" ", "") in known and known.issuperset(merge.split(" "))
        ]
        for key in [k for k in keys if k.endswith("_token_id")]:
            keys[key] = new_id.get(keys[key], new_id[eos])
    if n_vocab is not None and n_vocab > len(tokens):
        more = range(len(tokens), n_vocab)
        keys["tokenizer.ggml.tokens"] = tokens = [*tokens, *(f"[PAD{i}]" for i in more)]
        keys["tokenizer.ggml.token_type"] += [gguf.TokenType.UNUSED.value] * len(more)
    keys["tokenizer.ggml.add_bos_token"] = add_bos
    return Tokenizer(keys, len(tokens), keys.get("tokenizer.ggml.bos_token_id"), add_bos)
