"""An independent reference: the sums and counts of every weight, from a forward pass that a reader
can check.

Written from the architectures, in float64, one chunk at a time and one obvious step after the
other. It shares no code with the engine; comments name the engine file that fixes a choice the
architecture leaves open. Rows are tokens: activations are [rows, channels], weights [n_out, n_in].

It can follow two of the engine's roundings, for close comparisons. The engine's KV cache keeps F16
by default: kv_dtype=np.float16. Its CPU matmul rounds the input to the weight's type unless that is
F32: round_inputs=True. The sums are of the rows before that rounding, in the engine and here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from numpy.typing import NDArray

from helpers.forge import Hparams, ModelSpec

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Pairing = Literal["shifted", "unshifted", "shifted2"]
Feeding = Literal["draft", "trunk"]


class Entry(NamedTuple):
    """What a matrix holds for one weight."""

    sums: F64  # [n_mat, n_in], of squares
    counts: I64  # [1] for a dense weight, however many matrices it has; [n_expert] for experts
    signed: F64  # [n_mat, n_in], of the rows themselves


@dataclass
class Result:
    entries: dict[str, Entry] = field(default_factory=dict)
    # one array a chunk
    h: list[F64] = field(default_factory=list)  # the trunk's rows, as the head receives them
    logits: list[F64] = field(default_factory=list)
    head_logits: list[F64] = field(default_factory=list)  # the first head's; empty without a head
    # each head's rows, as the next head receives them: for each head a list of one array a chunk
    head_h: list[list[F64]] = field(default_factory=list)
    # The narrowest margin between the last expert chosen and the first one not chosen, by router.
    # If it is near the engine's rounding (1e-5 with flash attention over 64 rows or more, some 1e-4
    # with fewer or without), an expert's count may rightly differ by one, and every later row with
    # it.
    margins: dict[str, float] = field(default_factory=dict)


def run(
    spec: ModelSpec,
    chunks: Sequence[Sequence[int]],
    *,
    pairing: Pairing = "shifted",
    feeding: Feeding = "draft",
    process_output: bool = False,
    head_lm_head: bool = False,
    kv_dtype: type[np.floating] | None = None,
    round_inputs: bool = False,
) -> Result:
    """Sums over chunks; each chunk is a sequence of its own that begins at position 0.

    pairing: which of the trunk's rows meets token x_p in the head. "shifted" is right; the others
        exist to be told apart from it.
    feeding: the state of the heads after the first. "draft": the rows of the head before, as when
        the engine drafts (see _Forward.chain). "trunk": the trunk's rows, all of them, as when the
        engine only reads a text; it exists to be told apart. With one head both are the same.
    process_output: also the rows that the trunk's LM head reads, under output.weight.
    head_lm_head: also the rows that the head's LM head reads, under nextn.shared_head_head, or
        under output.weight if the head has none of its own.
    """
    forward = _Forward(spec, kv_dtype, round_inputs)
    for chunk in chunks:
        tokens = np.asarray(chunk, dtype=np.int64)
        h, logits = forward.trunk(tokens, process_output)
        forward.result.h.append(h)
        forward.result.logits.append(logits)
        if spec.hparams.n_nextn:
            rows, head_logits = forward.chain(tokens, h, pairing, feeding, head_lm_head)
            forward.result.head_h.append(rows)
            forward.result.head_logits.append(head_logits)
    return forward.result


def pair(h: F64, pairing: Pairing) -> F64:
    """The state that each slot of the head gets beside its token.

    Slot p holds x_p and the row that predicted it, h[p-1]; slot 0 has none and gets zeros
    (process() of draft-mtp in common/speculative.cpp).
    """
    shift = {"unshifted": 0, "shifted": 1, "shifted2": 2}[pairing]
    states = np.zeros_like(h)
    states[shift:] = h[: len(h) - shift]
    return states


def nll(logits: F64, tokens: Sequence[int], ahead: int = 1) -> F64:
    """-log p of the token `ahead` places later, for every row that has such a token.

    The trunk's row p predicts x_{p+1}. The head's slot p holds x_p and also predicts x_{p+1}.
    """
    targets = np.asarray(tokens, dtype=np.int64)[ahead:]
    rows = logits[: len(targets)]
    top = rows.max(axis=-1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(rows - top).sum(axis=-1))
    return np.asarray(log_sum - rows[np.arange(len(targets)), targets])


def compare(
    engine: Mapping[str, NDArray[np.floating]], oracle: Mapping[str, Entry]
) -> dict[str, float]:
    """For each weight that both have: the largest difference of sums over the largest sum.

    engine: name -> sums, of any shape that holds [n_mat, n_in] in order. oracle: Result.entries.
    """
    worst = {}
    for name in sorted(engine.keys() & oracle.keys()):
        want = oracle[name].sums
        got = np.asarray(engine[name], dtype=np.float64).reshape(want.shape)
        worst[name] = float(np.abs(got - want).max() / np.abs(want).max())
    return worst


def compare_signed(
    engine: Mapping[str, NDArray[np.floating]], oracle: Mapping[str, Entry]
) -> dict[str, float]:
    """The same for the signed sums, relative to the largest possible value: √(count · sum of
    squares). The signed sums themselves may all be near 0."""
    worst = {}
    for name in sorted(engine.keys() & oracle.keys()):
        want = oracle[name]
        got = np.asarray(engine[name], dtype=np.float64).reshape(want.signed.shape)
        most = np.sqrt(want.counts[:, np.newaxis] * want.sums).max()
        worst[name] = float(np.abs(got - want.signed).max() / most)
    return worst


# --- the pieces ----------------------------------------------------------------------------------


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight)


def sigmoid(x: F64) -> F64:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def silu(x: F64) -> F64:
    return np.asarray(x * sigmoid(x))


def softplus(x: F64) -> F64:
    return np.asarray(np.logaddexp(0.0, x))


def softmax(x: F64) -> F64:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def rope(x: F64, n_rot: int, base: float, *, halves: bool) -> F64:
    """Turn the first n_rot channels of x [rows, heads, channels] by the row's position.

    Pair i turns by position * base^(-2i / n_rot). If `halves`, a pair is channels (i, i + n_rot/2)
    (the engine's NEOX), else channels (2i, 2i + 1) (its NORM); llama_model_rope_type in
    src/llama-model.cpp says which. The interleaved multi-dimensional kind of qwen35 (IMROPE) pairs
    like NEOX, and for text its time, height and width positions are all the row's.
    """
    pairs = n_rot // 2
    speed = np.power(base, -2.0 * np.arange(pairs) / n_rot)
    angle = np.arange(len(x))[:, None] * speed
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first = np.arange(pairs) if halves else 2 * np.arange(pairs)
    second = first + (pairs if halves else 1)
    out: F64 = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def causal_attention(q: F64, k: F64, v: F64, scale: float) -> F64:
    """q [rows, n_head, d], k and v [rows, n_head_kv, d]; query heads share key heads in groups."""
    rows, n_head, _ = q.shape
    group = n_head // k.shape[1]
    future = np.triu(np.ones((rows, rows), dtype=bool), k=1)
    out = np.empty((rows, n_head, v.shape[2]))
    for head in range(n_head):
        scores = scale * q[:, head] @ k[:, head // group].T
        scores[future] = -np.inf
        out[:, head] = softmax(scores) @ v[:, head // group]
    return out


def chain_attention(q: F64, keys: Sequence[F64], values: Sequence[F64], scale: float) -> F64:
    """causal_attention in which each row sees the rows before it at depths of its own.

    keys and values: those of all rows, by depth. The row of slot p is at the last depth, slot p-1
        one depth below it, and so on down to depth 0, where all earlier slots are.
    """
    by_depth, last = (np.stack(keys), np.stack(values)), len(keys) - 1
    out = np.empty((*q.shape[:2], values[0].shape[2]))
    for p in range(len(q)):
        slot = np.arange(p + 1)
        k, v = (all_depths[np.maximum(0, last - (p - slot)), slot] for all_depths in by_depth)
        for head in range(q.shape[1]):
            shared = head // (q.shape[1] // k.shape[1])
            out[p, head] = softmax(scale * k[:, shared] @ q[p, head]) @ v[:, shared]
    return out


def causal_conv(x: F64, kernel: F64) -> F64:
    """Each channel's own kernel over its last taps; x [rows, channels], kernel [channels, taps]."""
    taps = kernel.shape[1]
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    return np.asarray(sum(padded[i : i + len(x)] * kernel[:, i] for i in range(taps)))


def gated_delta_rule(q: F64, k: F64, v: F64, log_decay: F64, beta: F64) -> F64:
    """Linear attention with a state of one [value, key] matrix a head; all [rows, heads, size].

    The state fades, is then corrected towards giving v for k, and is then read with q.
    """
    rows, heads, size = v.shape
    state = np.zeros((heads, size, size))
    out = np.empty_like(v)
    for t in range(rows):
        state *= np.exp(log_decay[t])[:, None, None]
        recalled = np.einsum("hvk,hk->hv", state, k[t])
        correction = beta[t][:, None] * (v[t] - recalled)
        state += correction[:, :, None] * k[t][:, None, :]
        out[t] = np.einsum("hvk,hk->hv", state, q[t]) / np.sqrt(size)
    return out


# --- the model -----------------------------------------------------------------------------------


class _Forward:
    def __init__(
        self,
        spec: ModelSpec,
        kv_dtype: type[np.floating] | None,
        round_inputs: bool,
    ) -> None:
        self.arch: str = spec.arch
        self.hp: Hparams = spec.hparams
        self.types = spec.types
        self.weights: dict[str, F64] = {
            name: tensor.astype(np.float64) for name, tensor in spec.tensors.items()
        }
        self.kv_dtype = kv_dtype
        self.round_inputs = round_inputs
        self.observing = True
        self.first_row = 0  # the first row that the matrix sees of the current pass
        self.result = Result()

    # what the matrix sees

    def matmul(self, name: str, x: F64) -> F64:
        """x @ weight.T for a plain weight; the input x is noted."""
        seen = x[self.first_row :]
        self.note(name, np.sum(seen * seen, axis=0)[None], len(seen), np.sum(seen, axis=0)[None])
        return np.asarray(self.rounded(name, x) @ np.atleast_2d(self.weights[name]).T)

    def matmul_heads(self, name: str, x: F64) -> F64:
        """The same if each head has a matrix of its own; x [rows, heads, n_in]."""
        seen = x[self.first_row :]
        self.note(name, np.sum(seen * seen, axis=0), len(seen), np.sum(seen, axis=0))
        return np.asarray(np.einsum("rhi,hoi->rho", self.rounded(name, x), self.weights[name]))

    def matmul_expert(self, name: str, expert: int, x: F64, rows: I64) -> F64:
        """The same for the rows that were routed to one expert; notes their number too."""
        n_expert, _, n_in = self.weights[name].shape
        sums, signed = np.zeros((2, n_expert, n_in))
        counts = np.zeros(n_expert, dtype=np.int64)
        seen = x[rows >= self.first_row]
        sums[expert], signed[expert] = np.sum(seen * seen, axis=0), np.sum(seen, axis=0)
        counts[expert] = len(seen)
        self.note(name, sums, counts, signed)
        return np.asarray(self.rounded(name, x) @ self.weights[name][expert].T)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """The matrix does not see the rows that run here."""
        self.observing = False
        yield
        self.observing = True

    def note(self, name: str, sums: F64, counts: int | I64, signed: F64) -> None:
        if not self.observing:
            return
        new = Entry(sums, np.atleast_1d(np.asarray(counts, dtype=np.int64)), signed)
        old = self.result.entries.get(name)
        if old is not None:
            new = Entry(old.sums + new.sums, old.counts + new.counts, old.signed + new.signed)
        self.result.entries[name] = new

    def rounded(self, name: str, x: F64) -> F64:
        kind = self.types[name]
        if not self.round_inputs or kind == GgmlType.F32 or not x.size:
            return x
        stored = gguf.quantize(np.ascontiguousarray(x, dtype=np.float32), kind)
        return gguf.dequantize(stored, kind).reshape(x.shape).astype(np.float64)

    def cached(self, x: F64) -> F64:
        return x if self.kv_dtype is None else x.astype(self.kv_dtype).astype(np.float64)

    # trunk and head

    def trunk(self, tokens: I64, process_output: bool) -> tuple[F64, F64]:
        x = self.weights["token_embd.weight"][tokens]
        for il in range(self.hp.n_layer):
            x = self.block(il, x)
        # The head is fed the row after the final norm: t_h_nextn in src/models/<arch>.cpp.
        h = self.norm("output_norm.weight", x)
        return h, self.lm_head(self.output_name(), h, process_output)

    def chain(
        self, tokens: I64, h: F64, pairing: Pairing, feeding: Feeding, note_lm_head: bool
    ) -> tuple[list[F64], F64]:
        """Each head's rows, and the first head's logits.

        As the engine drafts (draft() of draft-mtp in common/speculative.cpp), with the text's own
        tokens for drafted ones: head k has its turn at slot p in the draft that began at slot p-k.
        That slot's state is the trunk's row; each slot after it has the row that the head before
        gave at the slot before, in the same draft. Slots before the draft have the trunk's rows
        (process(), the same file). So head k observes slot p at depth k of the states, and sees
        slot p-1 at depth k-1, and so on down to depth 0.
        """
        states = [pair(h, pairing)]
        rows: list[F64] = []
        first_logits = None
        for k in range(self.hp.n_nextn):
            row, logits = self.head(k, tokens, states, note_lm_head)
            rows.append(row)
            first_logits = logits if first_logits is None else first_logits
            if feeding == "draft":
                states.append(pair(row, pairing))
        assert first_logits is not None
        return rows, first_logits

    def head(
        self, k: int, tokens: I64, states: Sequence[F64], note_lm_head: bool
    ) -> tuple[F64, F64]:
        """Head k's rows and logits; states by depth, of which the last one's rows are observed.

        The rows of the first slots are not observed: the engine fills its cache with slot 0, but no
            draft begins there (process() and draft() of draft-mtp), so that head k's first turn is
            at slot k+1.
        """
        il = self.hp.n_layer + k
        self.first_row = k + 1
        nextn = f"blk.{il}.nextn."
        with self.unobserved():
            earlier = [self.head_input(nextn, tokens, state) for state in states[:-1]]
        x = self.block(il, self.head_input(nextn, tokens, states[-1]), earlier)
        own_norm = nextn + "shared_head_norm.weight"
        x = self.norm(own_norm if own_norm in self.weights else "output_norm.weight", x)
        own_output = nextn + "shared_head_head.weight"
        output = own_output if own_output in self.weights else self.output_name()
        logits = self.lm_head(output, x, note_lm_head)
        self.first_row = 0
        return x, logits

    def head_input(self, nextn: str, tokens: I64, states: F64) -> F64:
        own_embedding = nextn + "embed_tokens.weight"
        embedding = own_embedding if own_embedding in self.weights else "token_embd.weight"
        e = self.norm(nextn + "enorm.weight", self.weights[embedding][tokens])
        h = self.norm(nextn + "hnorm.weight", states)
        return self.matmul(nextn + "eh_proj.weight", np.concatenate([e, h], axis=-1))

    def output_name(self) -> str:
        return "output.weight" if "output.weight" in self.weights else "token_embd.weight"

    def lm_head(self, name: str, x: F64, note: bool) -> F64:
        # With tied embeddings the matmul is known as token_embd.weight, which no matrix has.
        if note and name != "token_embd.weight":
            return self.matmul(name, x)
        return np.asarray(self.rounded(name, x) @ self.weights[name].T)

    def norm(self, name: str, x: F64) -> F64:
        return rms_norm(x, self.weights[name], self.hp.eps)

    # one block: a sublayer that mixes rows, a sublayer that does not, each around a residual

    def block(self, il: int, x: F64, earlier: Sequence[F64] = ()) -> F64:
        """earlier: the values of x at the depths before the last, see chain_attention."""
        blk = f"blk.{il}."
        normed = self.norm(blk + "attn_norm.weight", x)
        before = [self.norm(blk + "attn_norm.weight", e) for e in earlier]
        if before and (self.hp.is_recurrent(il) or self.arch == "deepseek2"):
            raise NotImplementedError(f"a chain of heads in {self.arch}")
        if self.hp.is_recurrent(il):
            x = x + self.delta_net(blk, normed)
        elif self.arch == "deepseek2":
            x = x + self.latent_attention(blk, normed)
        else:
            x = x + self.attention(blk, normed, before)

        # the norm between the sublayers has two names
        name = "ffn_norm" if self.arch in ("llama", "deepseek2", "hy_v3") else "post_attention_norm"
        normed = self.norm(f"{blk}{name}.weight", x)
        if not self.hp.has_experts(il):
            return x + self.feed_forward(blk, "", normed)
        out = self.experts(blk, normed)
        if self.hp.n_ff_shexp:
            shared = self.feed_forward(blk, "_shexp", normed)
            if self.arch == "qwen35moe":
                shared *= sigmoid(self.matmul(blk + "ffn_gate_inp_shexp.weight", normed))
            out = out + shared
        return x + out

    def attention(self, blk: str, x: F64, earlier: Sequence[F64] = ()) -> F64:
        """Grouped-query attention; qwen35 gates its output, glm4moe and qwen35 turn part of a head."""
        hp = self.hp
        rows, d = len(x), hp.head_dim
        q = self.project(blk + "attn_q", x)
        gate = None
        if self.arch in ("qwen35", "qwen35moe"):
            # attn_q gives each head its query, then its gate
            both = q.reshape(rows, hp.n_head, 2, d)
            q, gate = both[:, :, 0], both[:, :, 1]
        q = self.turned(blk + "attn_q_norm.weight", q.reshape(rows, hp.n_head, d))
        k, v = self.keys_and_values(blk, x)
        scale = 1.0 / np.sqrt(d)
        if earlier:
            with self.unobserved():
                before = [self.keys_and_values(blk, e) for e in earlier]
            keys, values = zip(*before, (k, v), strict=True)
            out = chain_attention(q, keys, values, scale)
        else:
            out = causal_attention(q, k, v, scale)
        if gate is not None:
            out = out * sigmoid(gate)
        return self.matmul(blk + "attn_output.weight", out.reshape(rows, hp.n_head * d))

    def keys_and_values(self, blk: str, x: F64) -> tuple[F64, F64]:
        """As the cache stores them."""
        shape = (len(x), self.hp.n_head_kv, self.hp.head_dim)
        k = self.project(blk + "attn_k", x).reshape(shape)
        v = self.project(blk + "attn_v", x).reshape(shape)
        return self.cached(self.turned(blk + "attn_k_norm.weight", k)), self.cached(v)

    def turned(self, norm: str, x: F64) -> F64:
        if norm in self.weights:
            x = self.norm(norm, x)
        return rope(x, self.hp.n_rot, self.hp.rope_base, halves=self.arch != "llama")

    def project(self, name: str, x: F64) -> F64:
        out = self.matmul(name + ".weight", x)
        bias = self.weights.get(name + ".bias")
        return out if bias is None else out + bias

    def latent_attention(self, blk: str, x: F64) -> F64:
        """Multi-head latent attention, as the engine runs it: heads share one latent key and value.

        attn_k_b carries each head's query into the latent space, attn_v_b each head's result out
        of it (the "absorbed" form in src/models/deepseek2.cpp), so both see rows once a head.
        """
        hp = self.hp
        rows = len(x)
        q = self.norm(blk + "attn_q_a_norm.weight", self.matmul(blk + "attn_q_a.weight", x))
        q = self.matmul(blk + "attn_q_b.weight", q).reshape(rows, hp.n_head, -1)
        q_plain, q_turned = q[..., : hp.qk_nope], q[..., hp.qk_nope :]
        q_turned = rope(q_turned, hp.n_rot, hp.rope_base, halves=False)
        q_latent = self.matmul_heads(blk + "attn_k_b.weight", q_plain)

        kv = self.matmul(blk + "attn_kv_a_mqa.weight", x)
        latent = self.norm(blk + "attn_kv_a_norm.weight", kv[:, : hp.kv_lora])[:, None, :]
        k_turned = rope(kv[:, None, hp.kv_lora :], hp.n_rot, hp.rope_base, halves=False)

        out = causal_attention(
            np.concatenate([q_latent, q_turned], axis=-1),
            self.cached(np.concatenate([latent, k_turned], axis=-1)),
            self.cached(latent),
            1.0 / np.sqrt(hp.qk_nope + hp.n_rot),  # of the heads behind the latent ones
        )
        out = self.matmul_heads(blk + "attn_v_b.weight", out)
        return self.matmul(blk + "attn_output.weight", out.reshape(rows, -1))

    def delta_net(self, blk: str, x: F64) -> F64:
        """qwen35's linear attention (build_layer_attn_linear in src/models/qwen35.cpp)."""
        hp = self.hp
        rows, size = len(x), hp.ssm_state
        qkv = self.matmul(blk + "attn_qkv.weight", x)
        z = self.matmul(blk + "attn_gate.weight", x)
        beta = sigmoid(self.matmul(blk + "ssm_beta.weight", x))
        alpha = self.matmul(blk + "ssm_alpha.weight", x)
        # ssm_a is stored as -exp(A_log): decay = exp(-exp(A_log) * softplus(alpha + dt))
        log_decay = self.weights[blk + "ssm_a"] * softplus(
            alpha + self.weights[blk + "ssm_dt.bias"]
        )

        qkv = silu(causal_conv(qkv, self.weights[blk + "ssm_conv1d.weight"]))
        q, k, v = np.split(qkv, [hp.ssm_k_dim, 2 * hp.ssm_k_dim], axis=-1)
        q = self.unit(q.reshape(rows, hp.ssm_k_heads, size))
        k = self.unit(k.reshape(rows, hp.ssm_k_heads, size))
        v = v.reshape(rows, hp.ssm_v_heads, size)
        # value head j reads key head j % k_heads (ggml_compute_forward_gated_delta_net)
        key_head = np.arange(hp.ssm_v_heads) % hp.ssm_k_heads
        out = gated_delta_rule(q[:, key_head], k[:, key_head], v, log_decay, beta)

        out = self.norm(blk + "ssm_norm.weight", out) * silu(z.reshape(out.shape))
        return self.matmul(blk + "ssm_out.weight", out.reshape(rows, hp.ssm_v_dim))

    def unit(self, x: F64) -> F64:
        """x divided by its length; eps goes under the root (build_gdn_l2_norm in
        src/models/models.h)."""
        return np.asarray(x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + self.hp.eps))

    def feed_forward(self, blk: str, suffix: str, x: F64) -> F64:
        gate = self.matmul(f"{blk}ffn_gate{suffix}.weight", x)
        up = self.matmul(f"{blk}ffn_up{suffix}.weight", x)
        return self.matmul(f"{blk}ffn_down{suffix}.weight", silu(gate) * up)

    def experts(self, blk: str, x: F64) -> F64:
        """Each row goes to its n_expert_used best experts (build_moe_ffn in src/llama-graph.cpp)."""
        hp = self.hp
        router = blk + "ffn_gate_inp.weight"
        logits = self.matmul(router, x)
        probs = sigmoid(logits) if hp.gating == "sigmoid" else softmax(logits)
        # the bias affects the choice, not the weights
        bias = blk + ("exp_probs_b" if self.arch == "hy_v3" else "exp_probs_b.bias")
        score = probs + self.weights.get(bias, 0.0)
        ranked = np.argsort(-score, axis=-1, kind="stable")
        chosen = ranked[:, : hp.n_expert_used]
        if hp.n_expert_used < hp.n_expert:
            sorted_score = np.take_along_axis(score, ranked, axis=-1)
            gap = sorted_score[:, hp.n_expert_used - 1] - sorted_score[:, hp.n_expert_used]
            before = self.result.margins.get(router, np.inf)
            self.result.margins[router] = min(before, float(gap.min()))

        share = np.take_along_axis(probs, chosen, axis=-1)
        if hp.expert_norm:
            share = share / np.maximum(share.sum(axis=-1, keepdims=True), 2.0**-14)
        share = share * hp.expert_scale

        out = np.zeros_like(x)
        for expert in range(hp.n_expert):
            rows, place = np.nonzero(chosen == expert)
            gate = self.matmul_expert(blk + "ffn_gate_exps.weight", expert, x[rows], rows)
            up = self.matmul_expert(blk + "ffn_up_exps.weight", expert, x[rows], rows)
            y = self.matmul_expert(blk + "ffn_down_exps.weight", expert, silu(gate) * up, rows)
            out[rows] += share[rows, place][:, None] * y
        return out
