"""The oracle's forward pass for qwen4exp: hyper-connections of several streams instead of a
residual, n-grams looked up by hash, attention to pooled blocks, and a head that is fed with all
streams.

As in oracle.py: float64, one obvious step after the other, without code of the engine. Streams are
[rows, streams, channels].
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import gguf
import numpy as np

from helpers.forge_any import AnyModel
from helpers.oracle import (
    F64,
    I64,
    Pairing,
    Result,
    _Forward,
    causal_conv,
    gated_delta_rule,
    pair,
    rope,
    sigmoid,
    silu,
    softmax,
    softplus,
)


def run(
    model: AnyModel,
    chunks: Sequence[Sequence[int]],
    *,
    pairing: Pairing = "shifted",
    kv_dtype: type[np.floating] | None = None,
) -> Result:
    """Sums over chunks, each a sequence of its own; see oracle.run()."""
    forward = _Streams(model, kv_dtype)
    for chunk in chunks:
        tokens = np.asarray(chunk, dtype=np.int64)
        streams = forward.trunk_streams(tokens)
        forward.result.h.append(streams.reshape(len(tokens), -1))
        forward.result.logits.append(forward.end("output_hc", streams))
        forward.result.head_logits.append(forward.head_streams(tokens, streams, pairing))
    return forward.result


class _Streams(_Forward):
    def __init__(self, model: AnyModel, kv_dtype: type[np.floating] | None) -> None:
        def key(name: str) -> int:
            return int(model.keys[f"qwen4exp.{name}"])

        self.keys = model.keys
        self.arch = "qwen35moe"  # its attention is that of qwen35, with gates and all
        self.kv_dtype = kv_dtype
        self.round_inputs = False
        self.first_row = 0
        self.observing = True
        self.result = Result()
        reader = gguf.GGUFReader(model.path)
        self.types = {t.name: t.tensor_type for t in reader.tensors}
        self.weights = {t.name: np.asarray(t.data, dtype=np.float64) for t in reader.tensors}
        self.n_layer = model.n_layer
        self.streams = key("hyper_connection.count")
        size = key("ssm.state_size")
        self.hp = SimpleNamespace(
            eps=float(model.keys["qwen4exp.attention.layer_norm_rms_epsilon"]),
            n_head=key("attention.head_count"),
            n_head_kv=key("attention.head_count_kv"),
            head_dim=key("attention.key_length"),
            n_rot=key("rope.dimension_count"),
            rope_base=float(model.keys["qwen4exp.rope.freq_base"]),
            ssm_state=size,
            ssm_k_heads=key("ssm.group_count"),
            ssm_v_heads=key("ssm.time_step_rank"),
            ssm_k_dim=size * key("ssm.group_count"),
            ssm_v_dim=size * key("ssm.time_step_rank"),
            n_expert=key("expert_count"),
            n_expert_used=key("expert_used_count"),
            gating="softmax",
            expert_norm=True,
            expert_scale=1.0,  # expert_weights_scale is not read (load_arch_hparams)
        )

    # trunk and head

    def trunk_streams(self, tokens: I64) -> F64:
        x = self.weights["token_embd.weight"][tokens]
        streams = np.repeat(x[:, None], self.streams, axis=1)  # all begin alike
        for il in range(self.n_layer):
            if il in self.keys["qwen4exp.ple.layers"]:
                streams = self.n_grams(f"blk.{il}.", tokens, streams)
            streams = self.layer(il, streams)
        return streams

    def head_streams(self, tokens: I64, trunk: F64, pairing: Pairing) -> F64:
        """Logits. Slot p gets x_p, the same for all streams, and the trunk's streams of slot p-1;
        the one projection multiplies each stream. Slot 0 is not observed (oracle.head)."""
        nextn = f"blk.{self.n_layer}.nextn."
        h = self.grouped_norm(nextn + "hnorm.weight", pair(trunk, pairing))
        e = self.norm(nextn + "enorm.weight", self.weights["token_embd.weight"][tokens])
        both = np.concatenate([np.repeat(e[:, None], self.streams, axis=1), h], axis=-1)
        self.first_row = self.streams
        x = self.matmul(nextn + "eh_proj.weight", both.reshape(-1, both.shape[-1]))
        self.first_row = 1
        streams = self.layer(self.n_layer, x.reshape(h.shape))
        logits = self.end(nextn + "hc_head", streams)
        self.first_row = 0
        return logits

    def end(self, name: str, streams: F64) -> F64:
        return np.asarray(self.mixed(name, streams)[0] @ self.weights["output.weight"].T)

    # hyper-connections

    def grouped_norm(self, name: str, streams: F64) -> F64:
        """Each stream by its own root mean square, with scales of its own."""
        scale = self.weights[name].reshape(streams.shape[1:])
        mean = np.mean(streams * streams, axis=-1, keepdims=True)
        return np.asarray(streams / np.sqrt(mean + self.hp.eps) * scale)

    def mixed(self, name: str, streams: F64) -> tuple[F64, F64]:
        """One row made of all streams, and the streams beside one another, as the gates saw
        them."""
        normed = self.grouped_norm(name + "_norm.weight", streams)
        wide = normed.reshape(len(streams), -1)
        low = silu(self.matmul(name + "_down.weight", wide) / self.streams)
        gates = sigmoid(self.matmul(name + "_up.weight", low)).reshape(normed.shape)
        return np.asarray((normed * gates).mean(axis=1)), wide

    def spread(self, name: str, wide: F64, streams: F64, out: F64) -> F64:
        """What a sublayer gives, added to every stream with a weight of its own, 1 on average."""
        share = 2.0 * sigmoid(self.matmul(name + "_inject.weight", wide) / self.streams)
        return np.asarray(streams + share[:, :, None] * out[:, None])

    def layer(self, il: int, streams: F64) -> F64:
        blk = f"blk.{il}."
        x, wide = self.mixed(blk + "hc_attn", streams)
        recurrent = blk + "ssm_out.weight" in self.weights
        out = self.delta_net(blk, x) if recurrent else self.attention(blk, x)
        streams = self.spread(blk + "hc_attn", wide, streams, out)
        x, wide = self.mixed(blk + "hc_ffn", streams)
        shared = self.feed_forward(blk, "_shexp", x)
        shared *= sigmoid(self.matmul(blk + "ffn_gate_inp_shexp.weight", x))
        return self.spread(blk + "hc_ffn", wide, streams, self.experts(blk, x) + shared)

    # sublayers

    def delta_net(self, blk: str, x: F64) -> F64:
        """qwen35's linear attention, with a sigmoid for its output gate (build_norm_gated)."""
        hp = self.hp
        rows, size = len(x), hp.ssm_state
        qkv = self.matmul(blk + "attn_qkv.weight", x)
        z = self.matmul(blk + "attn_gate.weight", x)
        beta = sigmoid(self.matmul(blk + "ssm_beta.weight", x))
        alpha = self.matmul(blk + "ssm_alpha.weight", x) + self.weights[blk + "ssm_dt.bias"]
        log_decay = self.weights[blk + "ssm_a"] * softplus(alpha)
        qkv = silu(causal_conv(qkv, self.weights[blk + "ssm_conv1d.weight"]))
        q, k, v = np.split(qkv, [hp.ssm_k_dim, 2 * hp.ssm_k_dim], axis=-1)
        q = self.unit(q.reshape(rows, hp.ssm_k_heads, size))
        k = self.unit(k.reshape(rows, hp.ssm_k_heads, size))
        v = v.reshape(rows, hp.ssm_v_heads, size)
        key_head = np.arange(hp.ssm_v_heads) % hp.ssm_k_heads
        out = gated_delta_rule(q[:, key_head], k[:, key_head], v, log_decay, beta)
        out = self.norm(blk + "ssm_norm.weight", out) * sigmoid(z.reshape(out.shape))
        return self.matmul(blk + "ssm_out.weight", out.reshape(rows, hp.ssm_v_dim))

    def attention(self, blk: str, x: F64, earlier: Sequence[F64] = ()) -> F64:
        """qwen35's attention over the cells that the indexer chose (build_qsa_sel)."""
        hp = self.hp
        rows, d = len(x), hp.head_dim
        seen = self.chosen(blk, x)
        both = self.matmul(blk + "attn_q.weight", x).reshape(rows, hp.n_head, 2, d)
        q = self.turned(blk + "attn_q_norm.weight", both[:, :, 0])
        k, v = self.keys_and_values(blk, x)
        out = np.empty_like(q)
        for head in range(hp.n_head):
            shared = head // (hp.n_head // hp.n_head_kv)
            scores = q[:, head] @ k[:, shared].T / np.sqrt(d)
            scores[~seen] = -np.inf
            out[:, head] = softmax(scores) @ v[:, shared]
        out *= sigmoid(both[:, :, 1])
        return self.matmul(blk + "attn_output.weight", out.reshape(rows, hp.n_head * d))

    def chosen(self, blk: str, x: F64) -> np.ndarray:
        """The slots that each slot attends to: the best of the complete blocks up to itself, and
        the slots after the last complete block. A block's key is the mean of its slots' keys."""
        hp, rows = self.hp, len(x)
        block = int(max(self.keys["qwen4exp.attention.compress_ratios"]))
        best = int(self.keys["qwen4exp.attention.indexer.top_k"]) // block
        size = int(self.keys["qwen4exp.attention.indexer.key_length"])
        keys = self.cached(self.matmul(blk + "indexer.k_proj.weight", x))
        n_blocks = rows // block
        pooled = keys[: n_blocks * block].reshape(n_blocks, block, size).mean(axis=1)
        pooled = self.norm(blk + "indexer.k_norm.weight", pooled)[:, None]
        # turned by the position of the block's first slot: in a row with one position for each slot
        places = np.zeros((max(1, n_blocks * block), 1, size))
        places[: n_blocks * block : block] = pooled
        places = rope(places, hp.n_rot, hp.rope_base, halves=True)
        pooled = self.cached(places[: n_blocks * block : block, 0])
        q = self.matmul(blk + "indexer.q_proj.weight", x).reshape(rows, -1, size)
        q = rope(self.norm(blk + "indexer.q_norm.weight", q), hp.n_rot, hp.rope_base, halves=True)
        seen = np.zeros((rows, rows), dtype=bool)
        for p in range(rows):
            whole = (p + 1) // block
            seen[p, whole * block : p + 1] = True
            score = np.maximum(q[p] @ pooled[:whole].T, 0.0).sum(axis=0) / np.sqrt(size)
            ranked = np.argsort(-score, kind="stable")
            for b in ranked[:best]:
                seen[p, b * block : (b + 1) * block] = True
            if whole > best:
                gap = float(score[ranked[best - 1]] - score[ranked[best]])
                name = blk + "indexer"
                self.result.margins[name] = min(gap, self.result.margins.get(name, np.inf))
        return seen

    def n_grams(self, blk: str, tokens: I64, streams: F64) -> F64:
        """Rows of a table by the hash of the last tokens, let in by a gate, and smoothed along the
        text (build_ple; the hash is set_input's of llm_graph_input_qwen4exp_ple)."""

        def key(name: str) -> list[int]:
            return [int(v) for v in np.atleast_1d(self.keys[f"qwen4exp.ple.{name}"])]

        (longest,), (each,), (end,) = key("ngram_size"), key("heads_per_ngram"), key("eos_token_id")
        factors, offsets, sizes = (
            key("layer_multipliers"),
            key("head_offsets"),
            key("head_vocab_sizes"),
        )
        table = self.weights["per_layer_token_embd.weight"]
        found = []
        for p, token in enumerate(tokens):
            gram = [int(token)]
            cut = False
            for back in range(1, longest):
                # before the text there is nothing, and no token before an end of text counts
                before = int(tokens[p - back]) if p >= back else end
                cut = cut or before == end
                gram.append(end if cut else before)
            rows = []
            for n in range(2, longest + 1):
                mixed = 0
                for j in range(n):
                    mixed ^= gram[j] * factors[j] % 2**64
                for g in range((n - 2) * each, (n - 1) * each):
                    rows.append(table[mixed % sizes[g] + offsets[g]])
            found.append(np.concatenate(rows))
        x = np.stack(found)
        asked = self.matmul(blk + "ple_key.weight", x).reshape(streams.shape)
        value = self.matmul(blk + "ple_value.weight", x)
        match = np.sum(
            self.grouped_norm(blk + "ple_norm_key.weight", asked)
            * self.grouped_norm(blk + "ple_norm_query.weight", streams),
            axis=-1,
        ) / np.sqrt(streams.shape[-1])
        gate = sigmoid(np.sign(match) * np.sqrt(np.maximum(np.abs(match), 1e-6)))
        gated = value[:, None] * gate[:, :, None]
        wide = self.grouped_norm(blk + "ple_norm_conv.weight", gated).reshape(len(x), -1)
        kernel = self.weights[blk + "ple_conv1d.weight"]
        taps = kernel.shape[1]
        apart = np.zeros((kernel.shape[0], (taps - 1) * longest + 1))
        apart[:, ::longest] = kernel  # one tap every so many slots
        smoothed = silu(causal_conv(wide, apart)).reshape(gated.shape)
        return np.asarray(streams + gated + smoothed)
