"""Writes a small model with an MTP head and random weights, for tests of the command and of files.

Its text is nonsense, but it is complete: a tokenizer, a trunk with dense and mixture-of-experts
    blocks, and a NextN draft head. The engine loads it in a moment, and every low-bit type can
    store every matmul weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from helpers import bpe

__all__ = ["make_random_model"]

# Low-bit types need rows that are multiples of 256 (QK_K in ggml-common.h), so every width that
# is a row somewhere is one: n_embd, n_head * head_dim, n_ff, n_ff_exp.
_N_EMBD = 256
_N_HEAD = 4
_N_HEAD_KV = 2
_HEAD_DIM = 64
_N_FF = 512
_N_FF_EXP = 256
_N_EXPERT = 8
_N_EXPERT_USED = 2
_N_EXPERT_SHARED = 1
_N_LAYER = 3
_N_LAYER_DENSE = 1
_N_VOCAB = 1024
_N_CTX_TRAIN = 4096

# What a block adds to the residual stream, relative to an embedding of 1. It is small, because
# otherwise three blocks would drown the token and no head could agree with the trunk.
_BRANCH = 0.2

_BOS, _EOS, _PAD = _SPECIALS = ("<|begin|>", "<|endoftext|>", "<|pad|>")

_Array = npt.NDArray[np.float16] | npt.NDArray[np.float32]


def make_random_model(
    path: str | os.PathLike[str],
    *,
    seed: int = 20,
    mtp: bool = True,
    shared_head_head: bool = False,
) -> None:
    """Write a small random ``glm4moe`` model to `path` as GGUF, about 14 MB.

    Three trunk blocks (the first dense, the others with 8 experts, of which 2 are used, and
    a shared one) and, as the last block, one NextN head. The tokenizer is learnt from the
    calibration text that comes with the package. The head is made to agree with the trunk
    at some places and not at others, so that draft agreement has something to measure.

    The same arguments give the same bytes, and `path` never holds half a file.

    Args:
        path: Where to write. An existing file is replaced.
        seed: Chooses the weights.
        mtp: Whether to write the head. The trunk is the same either way.
        shared_head_head: Whether the head gets an LM head of its own
            (``nextn.shared_head_head``), as some checkpoints have. It adds a weight that is
            run only on output rows.

    Raises:
        ValueError: `shared_head_head` without `mtp`.
        OSError: The file cannot be written.
    """
    if shared_head_head and not mtp:
        raise ValueError("shared_head_head is part of the head: it needs mtp=True")
    path = Path(path)
    # Beside the target, so that the replacement stays within one file system.
    part = path.with_name(path.name + ".part")
    try:
        writer = gguf.GGUFWriter(part, "glm4moe")
        try:
            _add_hparams(writer, n_layer_nextn=int(mtp))
            _add_vocab(writer)
            for name, tensor in _Weights(seed).tensors(mtp, shared_head_head):
                writer.add_tensor(name, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _add_hparams(writer: gguf.GGUFWriter, *, n_layer_nextn: int) -> None:
    # Keys that load_hparams (llama-model.cpp) and glm4-moe.cpp read. rope.dimension_sections
    # stays out: a value of zeros selects a rope that the engine then refuses by aborting.
    writer.add_name("random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(_N_CTX_TRAIN)
    writer.add_embedding_length(_N_EMBD)
    writer.add_block_count(_N_LAYER + n_layer_nextn)  # the head's blocks included
    if n_layer_nextn:
        # Added by its name: the oldest gguf that the package allows has no method for it.
        writer.add_uint32("glm4moe.nextn_predict_layers", n_layer_nextn)
    writer.add_feed_forward_length(_N_FF)
    writer.add_head_count(_N_HEAD)
    writer.add_head_count_kv(_N_HEAD_KV)
    writer.add_key_length(_HEAD_DIM)
    writer.add_value_length(_HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_HEAD_DIM // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_leading_dense_block_count(_N_LAYER_DENSE)
    writer.add_expert_count(_N_EXPERT)
    writer.add_expert_used_count(_N_EXPERT_USED)
    writer.add_expert_shared_count(_N_EXPERT_SHARED)
    writer.add_expert_feed_forward_length(_N_FF_EXP)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(1.0)


def _add_vocab(writer: gguf.GGUFWriter) -> None:
    text = resources.files("imatrix").joinpath("data/calibration.txt").read_text(encoding="utf-8")
    vocab = bpe.train(text, _N_VOCAB, specials=_SPECIALS)
    n_plain = len(vocab.tokens) - len(vocab.specials)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(bpe.PRE_TYPE)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(
        [gguf.TokenType.NORMAL] * n_plain + [gguf.TokenType.CONTROL] * len(vocab.specials)
    )
    writer.add_token_merges([f"{left} {right}" for left, right in vocab.merges])
    writer.add_bos_token_id(vocab.tokens.index(_BOS))
    writer.add_eos_token_id(vocab.tokens.index(_EOS))
    writer.add_pad_token_id(vocab.tokens.index(_PAD))
    writer.add_add_bos_token(True)


class _Weights:
    """Draws the tensors, in file order. Shapes are NumPy's: rows last, reversed in GGUF."""

    def __init__(self, seed: int) -> None:
        # RandomState, because its stream is frozen; default_rng's may change with NumPy.
        self._rng = np.random.RandomState(seed)

    def tensors(self, mtp: bool, shared_head_head: bool) -> Iterator[tuple[str, _Array]]:
        yield "token_embd.weight", self._matrix(_N_VOCAB, _N_EMBD, scale=_N_EMBD**0.5)
        output_norm = self._norm()
        yield "output_norm.weight", output_norm
        yield "output.weight", self._matrix(_N_VOCAB, _N_EMBD)
        for il in range(_N_LAYER):
            yield from self._block(il)
        if mtp:
            yield from self._block(_N_LAYER)
            yield from self._nextn(_N_LAYER, output_norm, shared_head_head)

    def _block(self, il: int) -> Iterator[tuple[str, _Array]]:
        n_q, n_kv = _N_HEAD * _HEAD_DIM, _N_HEAD_KV * _HEAD_DIM
        yield f"blk.{il}.attn_norm.weight", self._norm()
        yield f"blk.{il}.attn_q.weight", self._matrix(n_q, _N_EMBD)
        yield f"blk.{il}.attn_k.weight", self._matrix(n_kv, _N_EMBD)
        yield f"blk.{il}.attn_v.weight", self._matrix(n_kv, _N_EMBD)
        yield f"blk.{il}.attn_output.weight", self._matrix(_N_EMBD, n_q, scale=_BRANCH)
        yield f"blk.{il}.post_attention_norm.weight", self._norm()
        if il < _N_LAYER_DENSE:
            yield from self._ffn(il, "", _N_FF)
            return
        # The router and its bias stay F32: the quantizer leaves them alone (llama-quant.cpp).
        router = self._rng.standard_normal((_N_EXPERT, _N_EMBD)) * 2.0 * _N_EMBD**-0.5
        yield f"blk.{il}.ffn_gate_inp.weight", router.astype(np.float32)
        bias = self._rng.standard_normal(_N_EXPERT) * 0.1
        yield f"blk.{il}.exp_probs_b.bias", bias.astype(np.float32)
        yield from self._ffn(il, "_exps", _N_FF_EXP, _N_EXPERT)
        yield from self._ffn(il, "_shexp", _N_FF_EXP * _N_EXPERT_SHARED)

    def _ffn(self, il: int, kind: str, n_ff: int, *n_mat: int) -> Iterator[tuple[str, _Array]]:
        yield f"blk.{il}.ffn_gate{kind}.weight", self._matrix(*n_mat, n_ff, _N_EMBD)
        yield f"blk.{il}.ffn_up{kind}.weight", self._matrix(*n_mat, n_ff, _N_EMBD)
        yield f"blk.{il}.ffn_down{kind}.weight", self._matrix(*n_mat, _N_EMBD, n_ff, scale=_BRANCH)

    def _nextn(
        self, il: int, output_norm: npt.NDArray[np.float32], shared_head_head: bool
    ) -> Iterator[tuple[str, _Array]]:
        enorm, hnorm = self._norm(), self._norm()
        # The row of eh_proj is [token, state] (the concat in graph_mtp, glm4-moe.cpp). Its token
        # half undoes enorm, with noise: the head then works on nearly the embedding that the
        # trunk's residual stream carries, and the two choose the same next token at about a
        # third of places (seed 20, the text that comes with the package).
        noise = self._rng.standard_normal((_N_EMBD, 2 * _N_EMBD)) * 0.15 * _N_EMBD**-0.5
        token_half = np.diag(1.0 / enorm.astype(np.float64))
        eh_proj = noise + np.hstack([token_half, np.zeros_like(token_half)])
        yield f"blk.{il}.nextn.eh_proj.weight", eh_proj.astype(np.float16)
        yield f"blk.{il}.nextn.enorm.weight", enorm
        yield f"blk.{il}.nextn.hnorm.weight", hnorm
        yield f"blk.{il}.nextn.shared_head_norm.weight", output_norm
        if shared_head_head:
            yield f"blk.{il}.nextn.shared_head_head.weight", self._matrix(_N_VOCAB, _N_EMBD)

    def _matrix(self, *shape: int, scale: float = 1.0) -> npt.NDArray[np.float16]:
        """Rows of about unit length times `scale`, so that inputs of O(1) stay O(1). Rows differ in
        length, which makes the channels of the next activation uneven."""
        weights = self._rng.standard_normal(shape) * (scale * shape[-1] ** -0.5)
        weights *= self._rng.lognormal(-0.5 * 0.4**2, 0.4, (*shape[:-1], 1))
        return np.asarray(weights, dtype=np.float16)

    def _norm(self) -> npt.NDArray[np.float32]:
        """Norm weights whose channels differ as a trained model's do: a few carry much."""
        return np.asarray(self._rng.lognormal(-0.5 * 0.6**2, 0.6, _N_EMBD), dtype=np.float32)
