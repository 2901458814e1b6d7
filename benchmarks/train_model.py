"""Trains the small language model with an MTP head that ships with the package, on the CPU.

    pip install "imatrix[train]"
    python benchmarks/train_model.py train OUT.gguf --minutes 60
    python benchmarks/train_model.py verify src/imatrix/data/tiny-glm4moe-mtp.gguf

The model is of the engine's glm4moe kind (src/models/glm4-moe.cpp in llama.cpp): leading dense
blocks, a block of experts with a shared one, and a NextN head that is a block of experts too. The
text comes from benchmarks/corpus.py.

The trunk is trained without regard to the head: what the head gets of it (its rows, the embedding and
the LM head) is detached. The head begins later and learns the text's next token from the trunk's last
row and the token after it. They are paired as in the engine's drafts: slot p holds x_p and h[p-1],
and slot 0 has zeros (draft-mtp in common/speculative.cpp).

A run is limited by tokens and by minutes, whichever is reached first, and the learning rate follows
that limit; so two runs differ. `verify` computes the held-out figures in float64 from the file
itself, without the engine, and compares them with those committed beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import corpus
import gguf
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

BOS, EOS, PAD = SPECIALS = ("<|begin|>", "<|endoftext|>", "<|pad|>")


@dataclass(frozen=True)
class Shape:
    """Sizes. All rows are multiples of 256, as low-bit types demand (QK_K, ggml-common.h)."""

    n_vocab: int = 2048
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_rot: int = 32
    rope_base: float = 10000.0
    n_layer_dense: int = 3
    n_layer: int = 4
    n_ff: int = 512
    n_ff_exp: int = 256
    n_expert: int = 4
    n_expert_used: int = 2
    n_ctx: int = 512
    # Written as the context length. evaluate() takes 1.5 times as many cells as a chunk has tokens,
    # and the engine warns if there are more than this.
    n_ctx_file: int = 1024
    eps: float = 1e-5


# --- the tokenizer -------------------------------------------------------------------------------


def _byte_level(tokenizer: Tokenizer) -> Tokenizer:
    # the splitting of tokenizer.ggml.pre "gpt-2" (llama-vocab.cpp)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Sequence[str], n_vocab: int) -> Tokenizer:
    tokenizer = _byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _parts(tokenizer: Tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """Token texts by id, with special tokens last, and merges in order."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return [*tokens, *SPECIALS], [tuple(pair) for pair in model["merges"]]


def tokenizer_of(reader: gguf.GGUFReader) -> Tokenizer:
    """The `tokenizers` library's own encoding by the vocabulary of a GGUF file."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    plain = {token: i for i, token in enumerate(tokens) if token not in SPECIALS}
    return _byte_level(Tokenizer(models.BPE(plain, [tuple(m.split(" ")) for m in merges])))


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(list(texts))]


# --- the model -----------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _matrix(*shape: int, zero: bool = False) -> nn.Parameter:
    if zero:
        return nn.Parameter(torch.zeros(*shape))
    return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)


class Block(nn.Module):
    """One block; parameters have the engine's names without "blk.N." and ".weight"."""

    def __init__(self, s: Shape, experts: bool) -> None:
        super().__init__()
        self.s = s
        self.experts = experts
        d = s.n_embd
        self.attn_norm = nn.Parameter(torch.ones(d))
        self.attn_q = _matrix(s.n_head * s.head_dim, d)
        self.attn_k = _matrix(s.n_head_kv * s.head_dim, d)
        self.attn_v = _matrix(s.n_head_kv * s.head_dim, d)
        self.attn_q_norm = nn.Parameter(torch.ones(s.head_dim))
        self.attn_k_norm = nn.Parameter(torch.ones(s.head_dim))
        self.attn_output = _matrix(d, s.n_head * s.head_dim, zero=True)
        self.post_attention_norm = nn.Parameter(torch.ones(d))
        if not experts:
            self.ffn_gate = _matrix(s.n_ff, d)
            self.ffn_up = _matrix(s.n_ff, d)
            self.ffn_down = _matrix(d, s.n_ff, zero=True)
            return
        self.ffn_gate_inp = _matrix(s.n_expert, d)
        self.register_buffer("exp_probs_b", torch.zeros(s.n_expert))
        self.ffn_gate_exps = _matrix(s.n_expert, s.n_ff_exp, d)
        self.ffn_up_exps = _matrix(s.n_expert, s.n_ff_exp, d)
        self.ffn_down_exps = _matrix(s.n_expert, d, s.n_ff_exp, zero=True)
        self.ffn_gate_shexp = _matrix(s.n_ff_exp, d)
        self.ffn_up_shexp = _matrix(s.n_ff_exp, d)
        self.ffn_down_shexp = _matrix(d, s.n_ff_exp, zero=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [batch, row, n_embd], and how many rows each expert got: [n_expert]."""
        x = x + self.attention(rms_norm(x, self.attn_norm, self.s.eps), cos, sin)
        normed = rms_norm(x, self.post_attention_norm, self.s.eps)
        if not self.experts:
            out = F.linear(
                F.silu(F.linear(normed, self.ffn_gate)) * F.linear(normed, self.ffn_up),
                self.ffn_down,
            )
            return x + out, x.new_zeros(self.s.n_expert)
        out, load = self.mixture(normed)
        return x + out, load

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = self.s
        n, rows, _ = x.shape
        q = F.linear(x, self.attn_q).view(n, rows, s.n_head, s.head_dim)
        k = F.linear(x, self.attn_k).view(n, rows, s.n_head_kv, s.head_dim)
        v = F.linear(x, self.attn_v).view(n, rows, s.n_head_kv, s.head_dim)
        q = self.rope(rms_norm(q, self.attn_q_norm, s.eps), cos, sin).to(v.dtype)
        k = self.rope(rms_norm(k, self.attn_k_norm, s.eps), cos, sin).to(v.dtype)
        group = s.n_head // s.n_head_kv
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(out.transpose(1, 2).reshape(n, rows, -1), self.attn_output)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # glm4moe turns pairs (i, i + n_rot/2), LLAMA_ROPE_TYPE_NEOX in llama-model.cpp
        half = self.s.n_rot // 2
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def mixture(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """build_moe_ffn of llama-graph.cpp: sigmoid gates; the bias takes part in the choice only."""
        s = self.s
        flat = x.reshape(-1, s.n_embd)
        with torch.autocast("cpu", enabled=False):  # F32 in the file, so F32 here
            gates = torch.sigmoid(flat.to(self.ffn_gate_inp.dtype) @ self.ffn_gate_inp.T)
        chosen = torch.topk(gates + self.exp_probs_b, s.n_expert_used, dim=-1).indices
        mask = torch.zeros_like(gates).scatter(-1, chosen, 1.0)
        share = gates * mask
        share = share / share.sum(-1, keepdim=True).clamp_min(2.0**-14)
        out = self.ffn(flat, self.ffn_gate_shexp, self.ffn_up_shexp, self.ffn_down_shexp)
        # All four experts run on all rows, and two are weighted by zero. So the shapes are fixed, which
        # gains more on a CPU than leaving out rows.
        for e in range(s.n_expert):
            y = self.ffn(flat, self.ffn_gate_exps[e], self.ffn_up_exps[e], self.ffn_down_exps[e])
            out = out + share[:, e : e + 1] * y
        return out.view(x.shape), mask.sum(0)

    @staticmethod
    def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


class Trunk(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.token_embd = nn.Parameter(torch.randn(s.n_vocab, s.n_embd) * 0.02)
        self.output_norm = nn.Parameter(torch.ones(s.n_embd))
        self.blocks = nn.ModuleList(Block(s, il >= s.n_layer_dense) for il in range(s.n_layer))

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [batch, row, n_embd] as the head gets it, logits, and the experts' loads."""
        x = F.embedding(tokens, self.token_embd)
        load = x.new_zeros(self.s.n_expert)
        for block in self.blocks:
            x, more = block(x, cos, sin)
            load = load + more
        h = rms_norm(x, self.output_norm, self.s.eps)
        return h, F.linear(h, self.token_embd), load


class Head(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.enorm = nn.Parameter(torch.ones(s.n_embd))
        self.hnorm = nn.Parameter(torch.ones(s.n_embd))
        self.eh_proj = _matrix(s.n_embd, 2 * s.n_embd)
        self.shared_head_norm = nn.Parameter(torch.ones(s.n_embd))
        self.block = Block(s, experts=True)

    def forward(
        self, tokens: Tensor, h: Tensor, token_embd: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits and the experts' loads; h are the trunk's rows, not yet shifted."""
        state = F.pad(h, (0, 0, 1, 0))[:, :-1]
        e = rms_norm(F.embedding(tokens, token_embd), self.enorm, self.s.eps)
        state = rms_norm(state, self.hnorm, self.s.eps)
        x = F.linear(torch.cat([e, state.to(e.dtype)], -1), self.eh_proj)
        x, load = self.block(x, cos, sin)
        x = rms_norm(x, self.shared_head_norm, self.s.eps)
        return F.linear(x, token_embd), load


def rope_tables(s: Shape, n_ctx: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [row, 1, n_rot / 2]."""
    speed = s.rope_base ** (-2.0 * torch.arange(s.n_rot // 2, dtype=torch.float64) / s.n_rot)
    angle = torch.arange(n_ctx, dtype=torch.float64)[:, None] * speed
    return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)


# --- the optimizer -------------------------------------------------------------------------------


def orthogonal(g: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices of g [n, rows, columns]: Newton-Schulz of fifth
    order with the coefficients of K. Jordan's Muon (https://kellerjordan.github.io/posts/muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        xx = x @ x.mT
        x = a * x + (b * xx + c * (xx @ xx)) @ x
    return (x.mT if tall else x).float()


class Muon:
    """Momentum that is made orthogonal, for matrices; AdamW does the rest."""

    def __init__(self, matrices: Sequence[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in matrices:
            self.groups.setdefault(tuple(p.shape[-2:]), []).append(p)
        self.buffers = {p: torch.zeros_like(p) for p in matrices}

    def tasks(self, lr: float) -> list[Callable[[], None]]:
        """One step, in parts that may run at the same time."""
        parts = []
        for (rows, columns), matrices in self.groups.items():
            for half in (matrices[0::2], matrices[1::2]):
                if half:
                    parts.append(partial(self._part, half, rows, columns, lr))
        return parts

    @torch.no_grad()
    def _part(self, matrices: Sequence[nn.Parameter], rows: int, columns: int, lr: float) -> None:
        updates = []
        for p in matrices:
            buffer = self.buffers[p]
            buffer.lerp_(p.grad, 1 - self.momentum)
            updates.append(p.grad.lerp(buffer, self.momentum).reshape(-1, rows, columns))
        scale = lr * max(1.0, rows / columns) ** 0.5
        turned = orthogonal(torch.cat(updates))
        for p, update in zip(matrices, turned.split([len(u) for u in updates]), strict=True):
            p.add_(update.reshape(p.shape), alpha=-scale)


class Optimizer:
    """Both optimizers for one module; lr is Muon's, and AdamW's is a fixed share of it."""

    def __init__(self, module: nn.Module, lr: float, adam_lr: float) -> None:
        self.lr, self.adam_lr = lr, adam_lr
        named = list(module.named_parameters())
        hidden = [
            p for n, p in named if p.ndim >= 2 and "token_embd" not in n and "gate_inp" not in n
        ]
        chosen = {id(p) for p in hidden}
        self.rest = [p for _, p in named if id(p) not in chosen]
        self.muon = Muon(hidden)
        self.adam = torch.optim.AdamW(
            self.rest, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, foreach=True
        )
        self.all = [p for _, p in named]

    def tasks(self, grads: Sequence[Tensor], share: float) -> list[Callable[[], None]]:
        """One step, in parts that may run at the same time."""
        for p, grad in zip(self.all, grads, strict=True):
            p.grad = grad
        return [*self.muon.tasks(self.lr * share), partial(self._adam, self.adam_lr * share)]

    def _adam(self, lr: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()


# --- training ------------------------------------------------------------------------------------


def batches(stream: np.ndarray, n_ctx: int, size: int, bos: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of n_ctx tokens, and the token after each; a row begins with BOS, as chunks do."""
    rng = np.random.default_rng(1)
    while True:
        offset = int(rng.integers(n_ctx))
        n_rows = (len(stream) - offset - 1) // n_ctx
        order = rng.permutation(n_rows)
        for i in range(0, n_rows - size + 1, size):
            starts = offset + order[i : i + size] * n_ctx
            rows = np.stack([stream[a : a + n_ctx + 1] for a in starts]).astype(np.int64)
            targets = torch.from_numpy(rows[:, 1:].copy())
            rows[:, 0] = bos
            yield torch.from_numpy(rows[:, :-1].copy()), targets


def schedule(progress: float, warm: float = 0.01, decay: float = 0.6) -> float:
    """Share of the learning rate: it rises, stays, and falls to zero over the last part."""
    return max(0.0, min(1.0, (progress + 1e-3) / warm, (1.0 - progress) / decay))


@torch.no_grad()
def balance(block: Block, load: Tensor, rate: float) -> None:
    """Nudge the choice towards experts with fewer rows (the loss-free balancing of DeepSeek-V3)."""
    block.exp_probs_b += rate * torch.sign(load.mean() - load)
    block.exp_probs_b -= block.exp_probs_b.mean()


def train(args: argparse.Namespace) -> None:
    started = time.monotonic()
    torch.manual_seed(7)
    s = Shape()
    documents = corpus.documents("train")
    tokenizer = train_tokenizer(documents, s.n_vocab)
    tokens, _ = _parts(tokenizer)
    if len(tokens) != s.n_vocab:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, {s.n_vocab} were wanted")
    bos, eos = tokens.index(BOS), tokens.index(EOS)
    ids = encode(tokenizer, documents)
    stream = np.concatenate([part for doc in ids for part in (doc, np.array([eos], np.uint16))])
    held = encode(tokenizer, [corpus.text("held-out")])[0]
    print(f"{len(stream)} training tokens, {len(held)} held-out ones, "
          f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip

    trunk, head = Trunk(s), Head(s)
    n_params = sum(p.numel() for m in (trunk, head) for p in m.parameters())
    cos, sin = rope_tables(s, s.n_ctx, torch.float32)
    for_trunk = Optimizer(trunk, args.lr, args.adam_lr)
    for_head = Optimizer(head, args.lr, args.adam_lr)
    run_trunk, run_head = trunk, head
    if args.compile:
        run_trunk, run_head = torch.compile(trunk), torch.compile(head)  # type: ignore[assignment]

    def gradients(x: Tensor, y: Tensor, with_head: bool) -> tuple[Tensor, ...]:
        """Losses and loads, then the gradients of the trunk and, if asked for, of the head."""
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            h, logits, load = run_trunk(x, cos, sin)
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        grads = torch.autograd.grad(loss, for_trunk.all)
        if not with_head:
            return (loss.detach(), load.detach(), *grads)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            h, token_embd = h.detach(), trunk.token_embd.detach()
            head_logits, head_load = run_head(x, h, token_embd, cos, sin)
            head_loss = F.cross_entropy(head_logits.float().flatten(0, 1), y.flatten())
        more = torch.autograd.grad(head_loss, for_head.all)
        head_only = (head_loss.detach(), head_load.detach())
        return (loss.detach(), load.detach(), *grads, *head_only, *more)

    # Each core has one thread with rows of its own. Threads inside an operation would wait for each
    # other thousands of times in a step, which takes most of the time if the cores have other work.
    torch.set_num_threads(1)
    workers = ThreadPoolExecutor(args.threads, initializer=lambda: torch.set_num_threads(1))
    data = batches(stream, s.n_ctx, args.batch, bos)
    n_tokens = n_head_tokens = step = tokens_logged = 0
    seconds = args.minutes * 60
    last_log = last_save = time.monotonic()
    optimizing = 0.0
    if args.compile:  # in one thread, before the second one starts
        x, y = next(data)
        gradients(x[: args.rows], y[: args.rows], with_head=True)
        print(f"compiled, {time.monotonic() - started:.0f} s", flush=True)
    while True:
        now = time.monotonic()
        progress = max(n_tokens / args.tokens, (now - started) / seconds)
        if progress >= 1:
            break
        x, y = next(data)
        share = schedule(progress)
        with_head = progress >= args.head_from
        parts = list(
            workers.map(gradients, x.split(args.rows), y.split(args.rows), repeat(with_head))
        )
        one, load, *grads = (torch.stack(same).mean(0) for same in zip(*parts, strict=True))
        computed = time.monotonic()
        n_trunk = len(for_trunk.all)
        tasks = for_trunk.tasks(grads[:n_trunk], share)
        head_text = ""
        if with_head:
            head_one, head_load, *head_grads = grads[n_trunk:]
            # first a warm-up of its own, then the trunk's schedule
            warm = min(1.0, (progress - args.head_from + 1e-3) / 0.02)
            tasks += for_head.tasks(head_grads, share * warm)
            balance(head.block, head_load, 2e-3 * share)
            n_head_tokens += x.numel()
            head_text = f" head {head_one.item():.4f}"
        list(workers.map(lambda task: task(), tasks))
        balance(trunk.blocks[-1], load, 2e-3 * share)
        optimizing += time.monotonic() - computed
        n_tokens += x.numel()
        step += 1
        if now - last_log > args.log_every or step <= 3:
            after = time.monotonic()
            rate = (n_tokens - tokens_logged) / (after - last_log)
            spent = optimizing / (after - last_log)
            tokens_logged, last_log, optimizing = n_tokens, after, 0.0
            print(f"{now - started:6.0f} s step {step} tokens {n_tokens} progress {progress:.3f} "
                  f"trunk {one.item():.4f}{head_text} {rate:.0f} tok/s, {spent:.0%} of the time in "
                  f"the optimizer, load {(load / load.sum()).tolist()}", flush=True)  # fmt: skip
        if now - last_save > args.save_every:
            last_save = now
            note = {"tokens": n_tokens, "checkpoint": True}
            export(args.out.with_suffix(".checkpoint.gguf"), s, trunk, head, tokenizer, note)
    workers.shutdown()

    usage = resource.getrusage(resource.RUSAGE_SELF)
    note = {
        "parameters": n_params,
        "tokens": n_tokens,
        "head_tokens": n_head_tokens,
        "corpus_tokens": len(stream),
        "steps": step,
        "batch_rows": args.batch,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "cpu_minutes": round((usage.ru_utime + usage.ru_stime) / 60, 1),
        "threads": args.threads,
        "bfloat16": args.bf16,
        "compiled": args.compile,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus": corpus.describe("train"),
    }
    export(args.out, s, trunk, head, tokenizer, note)
    write_figures(args.out)


# --- the file ------------------------------------------------------------------------------------


def _tensors(s: Shape, trunk: Trunk, head: Head) -> Iterator[tuple[str, Tensor]]:
    """The tensors by their names in the file."""
    yield "token_embd.weight", trunk.token_embd
    yield "output_norm.weight", trunk.output_norm
    for il, block in enumerate([*trunk.blocks, head.block]):
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            kind = "bias" if name == "exp_probs_b" else "weight"
            yield f"blk.{il}.{name}.{kind}", tensor
    for name in ("eh_proj", "enorm", "hnorm", "shared_head_norm"):
        yield f"blk.{s.n_layer}.nextn.{name}.weight", getattr(head, name)


def export(
    path: Path, s: Shape, trunk: Trunk, head: Head, tokenizer: Tokenizer, note: dict[str, Any]
) -> None:
    """Matrices as F16, the router and all vectors as F32."""
    part = path.with_name(path.name + ".part")
    w = gguf.GGUFWriter(part, "glm4moe")
    w.add_name("tiny-glm4moe-mtp")
    w.add_description("Trained on Python's standard library by imatrix's benchmarks/train_model.py")
    w.add_license("PSF-2.0")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    # Keys that load_hparams (llama-model.cpp) and glm4-moe.cpp read. rope.dimension_sections is left
    # out: zeros in it select a rope on which the engine aborts.
    w.add_context_length(s.n_ctx_file)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layer + 1)  # with the head's
    w.add_uint32("glm4moe.nextn_predict_layers", 1)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_head_kv)
    w.add_key_length(s.head_dim)
    w.add_value_length(s.head_dim)
    w.add_layer_norm_rms_eps(s.eps)
    w.add_rope_dimension_count(s.n_rot)
    w.add_rope_freq_base(s.rope_base)
    w.add_leading_dense_block_count(s.n_layer_dense)
    w.add_expert_count(s.n_expert)
    w.add_expert_used_count(s.n_expert_used)
    w.add_expert_shared_count(1)
    w.add_expert_feed_forward_length(s.n_ff_exp)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    w.add_expert_weights_norm(True)
    w.add_expert_weights_scale(1.0)
    tokens, merges = _parts(tokenizer)
    n_plain = len(tokens) - len(SPECIALS)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.NORMAL] * n_plain + [gguf.TokenType.CONTROL] * len(SPECIALS))
    w.add_token_merges([f"{a} {b}" for a, b in merges])
    w.add_bos_token_id(tokens.index(BOS))
    w.add_eos_token_id(tokens.index(EOS))
    w.add_pad_token_id(tokens.index(PAD))
    w.add_add_bos_token(True)
    w.add_string("imatrix.training", json.dumps(note))
    for name, tensor in _tensors(s, trunk, head):
        values = tensor.detach().float().numpy()
        matrix = values.ndim >= 2 and "ffn_gate_inp" not in name
        w.add_tensor(name, values.astype(np.float16) if matrix else values.copy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    part.replace(path)


def load(path: Path) -> tuple[Shape, Trunk, Head, Tokenizer]:
    """The model of a file, its rounded weights as float64."""
    reader = gguf.GGUFReader(path)

    def key(name: str) -> Any:
        return reader.fields[f"glm4moe.{name}"].contents()

    s = Shape(
        n_vocab=len(reader.fields["tokenizer.ggml.tokens"].contents()),
        n_embd=key("embedding_length"),
        n_head=key("attention.head_count"),
        n_head_kv=key("attention.head_count_kv"),
        head_dim=key("attention.key_length"),
        n_rot=key("rope.dimension_count"),
        rope_base=key("rope.freq_base"),
        n_layer_dense=key("leading_dense_block_count"),
        n_layer=key("block_count") - key("nextn_predict_layers"),
        n_ff=key("feed_forward_length"),
        n_ff_exp=key("expert_feed_forward_length"),
        n_expert=key("expert_count"),
        n_expert_used=key("expert_used_count"),
        n_ctx_file=key("context_length"),
        eps=key("attention.layer_norm_rms_epsilon"),
    )
    trunk, head = Trunk(s).double(), Head(s).double()
    stored = {tensor.name: tensor for tensor in reader.tensors}
    with torch.no_grad():
        for name, tensor in _tensors(s, trunk, head):
            values = np.asarray(stored.pop(name).data, dtype=np.float64)
            tensor.copy_(torch.from_numpy(values.reshape(tensor.shape)))
    if stored:
        raise ValueError(f"{path}: tensors that this script does not know: {', '.join(stored)}")
    return s, trunk, head, tokenizer_of(reader)


# --- the figures ---------------------------------------------------------------------------------


def measure(path: Path, text: str, n_ctx: int = 512, threads: int = 2) -> dict[str, Any]:
    """What `imatrix.evaluate` reports at depth 1, by chunk, computed in float64 from this file alone.

    Chunks of n_ctx tokens of one stream, which begins with BOS; the tail is dropped, the first
    token of each chunk replaced by BOS. Scored are the positions p of the second half but the last:
    n_ctx/2 <= p < n_ctx - 1 (llama-perplexity). Trunk row p and head slot p both predict x_{p+1}.
    """
    s, trunk, head, tokenizer = load(path)
    bos = s.n_vocab - len(SPECIALS) + SPECIALS.index(BOS)
    ids = np.concatenate([[bos], encode(tokenizer, [text])[0].astype(np.int64)])
    cos, sin = rope_tables(s, n_ctx, torch.float64)
    chunks = ids[: len(ids) // n_ctx * n_ctx].reshape(-1, n_ctx).copy()
    chunks[:, 0] = bos
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(n_ctx.to_bytes(8, "little") + chunk.astype("<i4").tobytes())
    scored = slice(n_ctx // 2, n_ctx - 1)

    @torch.no_grad()
    def score(chunk: np.ndarray) -> tuple[float, float, float]:
        x = torch.from_numpy(chunk)[None]
        h, logits, _ = trunk(x, cos, sin)
        head_logits, _ = head(x, h, trunk.token_embd, cos, sin)
        targets = x[0, 1:][scored]
        rows, head_rows = logits[0, :-1][scored], head_logits[0, :-1][scored]
        same = rows.argmax(-1) == head_rows.argmax(-1)
        return (
            F.cross_entropy(rows, targets).item(),
            F.cross_entropy(head_rows, targets).item(),
            same.double().mean().item(),
        )

    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as workers:
        found = np.array(list(workers.map(score, chunks)))
    by_chunk = dict(zip(("trunk_nll", "head_nll", "agreement"), found.T.tolist(), strict=True))
    return {
        "n_ctx": n_ctx,
        "n_tokens": len(ids),
        "n_chunks": len(chunks),
        "tokens_sha256": digest.hexdigest(),  # as Evaluation.digest
        "nll": float(np.mean(by_chunk["trunk_nll"])),
        "head_nll": float(np.mean(by_chunk["head_nll"])),
        "agreement": float(np.mean(by_chunk["agreement"])),
        "by_chunk": {name: [round(v, 7) for v in values] for name, values in by_chunk.items()},
    }


def figures(path: Path) -> dict[str, Any]:
    return {name: measure(path, corpus.text(name)) for name in corpus.HELD_OUT}


def write_figures(path: Path) -> None:
    """Write PATH with suffix .json: how the model was trained, and its figures on held-out text."""
    reader = gguf.GGUFReader(path)
    found = {
        "training": json.loads(reader.fields["imatrix.training"].contents()),
        "figures": figures(path),
    }
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found["training"]))
    for name, figure in found["figures"].items():
        print(name, {k: v for k, v in figure.items() if k != "by_chunk"})


def verify(args: argparse.Namespace) -> None:
    """Compute the figures again and compare them with the committed ones."""
    if args.write:
        write_figures(args.model)
        return
    committed = json.loads(args.model.with_suffix(".json").read_text(encoding="utf-8"))["figures"]
    worst = 0.0
    for name, now in figures(args.model).items():
        before = committed[name]
        if now["tokens_sha256"] != before["tokens_sha256"]:
            raise SystemExit(f"error: {name}: other tokens than the committed figures are of")
        for figure, values in now["by_chunk"].items():
            off = float(np.abs(np.subtract(values, before["by_chunk"][figure])).max())
            worst = max(worst, off)
            print(f"{name}: {figure} {np.mean(values):.6f}, furthest chunk off by {off:.1e}")
    if worst > 1e-6:  # float64 adds in another order, and the figures have seven places
        raise SystemExit(f"error: the figures differ from the committed ones by up to {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("train", help="train and write OUT.gguf, with OUT.json beside it")
    p.add_argument("out", type=Path)
    p.add_argument("--minutes", type=float, default=60.0, help="wall clock, all included")
    p.add_argument("--tokens", type=int, default=40_000_000, help="of the trunk, at most")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--batch", type=int, default=16, help="rows of 512 tokens a step")
    p.add_argument("--rows", type=int, default=2, help="rows a thread computes at once")
    p.add_argument("--lr", type=float, default=0.02, help="Muon's")
    p.add_argument("--adam-lr", type=float, default=3e-3)
    p.add_argument("--head-from", type=float, default=0.45, help="share of the run before the head")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--log-every", type=float, default=30.0, help="seconds")
    p.add_argument("--save-every", type=float, default=600.0, help="seconds")
    p.set_defaults(run=train)
    p = commands.add_parser("verify", help="compute the held-out figures of a file again")
    p.add_argument("model", type=Path)
    p.add_argument("--write", action="store_true", help="write the .json beside it instead")
    p.set_defaults(run=verify)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
