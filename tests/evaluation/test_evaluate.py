"""evaluate() compared with llama-perplexity, and with the oracle's float64 forward pass."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import forge, forge_any, oracle
from helpers.forge import Arch, ModelSpec
from helpers.forge_any import MTP_ARCHS, make_any
from helpers.heads import agreeing
from helpers.running import EngineTool, Forged, run_tool, until_printed
from numpy.typing import NDArray

import imatrix
from imatrix import Evaluation, Predictions
from imatrix.cli.program import main

F64 = NDArray[np.float64]
Chunks = list[list[int]]

N_CTX = 64
# In these models the engine's rounding decides no expert on the text of conftest.py
# (tests/collect/test_head_oracle.py found them).
SEEDS: dict[Arch, int] = {"glm4moe": 11, "qwen35": 2, "hy_v3": 285}
HEADS: list[Arch] = ["glm4moe", "qwen35", "hy_v3"]


def evaluate(*arguments: Any, **options: Any) -> Evaluation:
    """imatrix.evaluate without the rehearsal in a child process, which would take most of the time;
    the test of the command has it."""
    return imatrix.evaluate(*arguments, **{"rehearse": False, **options})


def scored(n: int) -> slice:
    """The positions that llama-perplexity scores: the second half of a chunk, without the last
    token."""
    return slice(n // 2, n - 1)


# --- llama-perplexity ------------------------------------------------------------------------------


def perplexity(tool: Path, last_line: str, *options: str | Path | int) -> str:
    # -b as large as -c: chunks one by one, as in this package
    size = ("-c", N_CTX, "-b", N_CTX, "-ub", N_CTX, "-t", 1)
    return until_printed(last_line, lambda: run_tool(tool, *map(str, (*options, *size))))


def printed(log: str, label: str) -> tuple[float, float]:
    """The two numbers around the ± (or +/-) in a line of the tool."""
    found = re.search(re.escape(label) + r"\s*[:=]\s*([-\d.]+)\s*(?:±|\+/-)\s*([-\d.]+)", log)
    assert found, f"no {label!r} in:\n{log}"
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("arch", ["llama", "qwen35", "glm4moe"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_perplexity_is_the_tools(
    arch: Arch, add_bos: bool, forged: Forged, engine_tool: EngineTool, prose_file: Path
) -> None:
    n_nextn = 0 if arch == "llama" else 1
    spec = forged(arch, seed=SEEDS.get(arch, 1), n_nextn=n_nextn, add_bos=add_bos)
    log = perplexity(
        engine_tool("llama-perplexity"), "Final estimate", "-m", spec.path, "-f", prose_file
    )
    value, error = printed(log, "Final estimate: PPL")
    found = evaluate(spec.path, prose_file, n_ctx=N_CTX, n_threads=1)
    # as printed, with 4 and 5 decimals
    assert found.perplexity.value == pytest.approx(value, abs=6e-5)
    assert found.perplexity.error == pytest.approx(error, abs=6e-6)
    assert found.nll.n == found.n_chunks * (N_CTX - 1 - N_CTX // 2)
    assert (found.head is None) == (n_nextn == 0)


def test_the_head_does_not_change_the_trunk(forged: Forged, prose_file: Path) -> None:
    spec = forged("glm4moe", seed=SEEDS["glm4moe"], n_nextn=1)
    options: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": 1, "max_chunks": 2}
    both = evaluate(spec.path, prose_file, **options)
    alone = evaluate(spec.path, prose_file, mtp=False, **options)
    # the same rows go through the same kernels
    np.testing.assert_allclose(both.trunk.nll, alone.trunk.nll, rtol=0, atol=1e-5)
    assert alone.head is None
    assert alone.draft == ()
    assert alone.accepted_length is None


@pytest.mark.parametrize("arch", ["llama", "qwen35"])
def test_kl_divergence_is_the_tools(
    arch: Arch, forged: Forged, engine_tool: EngineTool, prose_file: Path, tmp_path: Path
) -> None:
    spec = forged(arch, seed=SEEDS.get(arch, 1), n_nextn=0 if arch == "llama" else 1)
    quantized = tmp_path / "quantized.gguf"
    imatrix.quantize(spec.path, quantized, "Q4_0", n_threads=1)
    tool, base = engine_tool("llama-perplexity"), tmp_path / "base.kld"
    perplexity(tool, "", "-m", spec.path, "-f", prose_file, "--kl-divergence-base", base)
    log = perplexity(
        tool, "Same top p:", "-m", quantized, "--kl-divergence", "--kl-divergence-base", base
    )

    found = evaluate(quantized, prose_file, reference=spec.path, n_ctx=N_CTX, n_threads=1)
    assert found.kl is not None
    assert found.top1 is not None
    assert found.trunk.reference_nll is not None
    kl, kl_error = printed(log, "Mean    KLD")
    # The tool keeps the reference in 16 bits: one value in 65535 of the range of its logits, at
    # most 16 nats, so that each is off by at most 1.2e-4, and the mean by much less.
    assert found.kl.value > 0.01
    assert found.kl.value == pytest.approx(kl, abs=2e-5)
    assert found.kl.error == pytest.approx(kl_error, abs=2e-5)
    top, top_error = printed(log, "Same top p")
    # in 16 bits two tokens can be equal that are not: a position or two differ in the other
    # direction
    assert found.top1.value == pytest.approx(top / 100, abs=2.5 / found.top1.n)
    assert found.top1.error == pytest.approx(top_error / 100, rel=1e-2)
    ppl, ppl_error = printed(log, "Mean PPL(Q)")
    assert found.perplexity.value == pytest.approx(ppl, rel=1e-5)
    assert found.perplexity.error == pytest.approx(ppl_error, rel=1e-4)
    base_ppl, _ = printed(log, "Mean PPL(base)")
    # in 16 bits again
    assert math.exp(found.trunk.reference_nll.mean()) == pytest.approx(base_ppl, rel=1e-4)


def test_a_model_is_no_distance_from_itself(forged: Forged, prose_file: Path) -> None:
    spec = forged("qwen35", seed=2, n_nextn=1)
    found = evaluate(
        spec.path, prose_file, reference=spec.path, n_ctx=N_CTX, max_chunks=2, n_threads=1
    )
    assert found.head is not None
    for rows in (found.trunk, found.head):
        assert rows.kl is not None
        assert rows.reference_nll is not None
        assert not rows.kl.any()
        assert np.array_equal(rows.nll, rows.reference_nll)
    assert found.top1 is not None
    assert found.top1.value == 1
    difference = found.compare(found)
    assert difference.nll.value == difference.nll.high == 0
    assert difference.accepted_length is not None
    assert difference.accepted_length.value == 0


# --- the head against the oracle ---------------------------------------------------------------------

# nats at any one position: the effect of the float16 of the engine's cache, and of its attention
# over fewer than 64 rows (tests/collect/test_head_chain.py), on the logits of these models
CLOSE = 2e-2
MEAN_CLOSE = 2e-3
# two tokens this close may change places
CLEAR = 2e-2


def log_softmax(logits: F64) -> F64:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def assert_same_tops(got: NDArray[np.int32], logits: F64) -> None:
    """Equal wherever the oracle's choice is clear, which it nearly always is."""
    two = np.sort(logits, axis=-1)[:, -2:]
    clear = two[:, 1] - two[:, 0] > CLEAR
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(got[clear], logits.argmax(axis=-1)[clear])


@pytest.mark.parametrize("arch", HEADS)
def test_trunk_and_head_predict_as_the_oracle(arch: Arch, forged: Forged, prose: str) -> None:
    spec = forged(arch, seed=SEEDS[arch], n_nextn=1)
    chunks = spec.chunks(prose, 96, 2)
    found = evaluate(spec.path, chunks, n_ctx=96, n_threads=1, depth=1)
    want = oracle.run(spec, chunks, kv_dtype=np.float16)
    rows = scored(96)
    assert found.head is not None
    for got, logits in ((found.trunk, want.logits), (found.head, want.head_logits)):
        nll = np.concatenate(
            [oracle.nll(row, chunk)[rows] for row, chunk in zip(logits, chunks, strict=True)]
        )
        np.testing.assert_allclose(got.nll, nll, rtol=0, atol=CLOSE)
        assert got.nll.mean() == pytest.approx(nll.mean(), abs=MEAN_CLOSE)
        assert_same_tops(got.top, np.concatenate([row[rows] for row in logits]))
    # agreement at depth 1 follows from these
    np.testing.assert_array_equal(found.accepted, found.head.top == found.trunk.top)
    assert (found.known == 1).all()
    assert found.draft[0].value == (found.head.top == found.trunk.top).mean()
    assert found.chunk.tolist() == [0] * 47 + [1] * 47
    assert found.position.tolist() == [*range(48, 95)] * 2


@pytest.mark.parametrize("arch", HEADS)
@pytest.mark.parametrize("pairing", ["unshifted", "shifted2"])
def test_a_wrong_pairing_is_far_off(
    arch: Arch, pairing: oracle.Pairing, forged: Forged, prose: str
) -> None:
    spec = forged(arch, seed=SEEDS[arch], n_nextn=1)
    chunks = spec.chunks(prose, 96, 1)
    found = evaluate(spec.path, chunks, n_ctx=96, n_threads=1, depth=1)
    assert found.head is not None
    wrong = oracle.run(spec, chunks, kv_dtype=np.float16, pairing=pairing)
    nll = oracle.nll(wrong.head_logits[0], chunks[0])[scored(96)]
    assert np.abs(found.head.nll - nll).mean() > 10 * CLOSE


@pytest.mark.parametrize("arch", HEADS)
def test_kl_to_the_reference_and_its_head(arch: Arch, forged: Forged, prose: str) -> None:
    spec = forged(arch, seed=SEEDS[arch], n_nextn=1)
    # the same weights as reference, and another model, by the constant in its norms
    other = forged(arch, seed=SEEDS[arch], n_nextn=1, eps=0.5)
    chunks = spec.chunks(prose, 96, 1)
    found = evaluate(other.path, chunks, reference=spec.path, n_ctx=96, n_threads=1)
    rows = scored(96)
    ours, theirs = (oracle.run(model, chunks, kv_dtype=np.float16) for model in (other, spec))
    assert found.head is not None
    for got, p, q in (
        (found.trunk, ours.logits[0], theirs.logits[0]),
        (found.head, ours.head_logits[0], theirs.head_logits[0]),
    ):
        log_p, log_q = log_softmax(p[rows]), log_softmax(q[rows])
        kl = (np.exp(log_q) * (log_q - log_p)).sum(axis=-1)
        assert kl.mean() > 0.01
        assert got.kl is not None
        assert got.reference_nll is not None
        assert got.reference_top is not None
        np.testing.assert_allclose(got.kl, kl, rtol=0, atol=CLOSE)
        assert got.kl.mean() == pytest.approx(kl.mean(), abs=MEAN_CLOSE)
        np.testing.assert_allclose(
            got.reference_nll, oracle.nll(q, chunks[0])[rows], rtol=0, atol=CLOSE
        )
        assert_same_tops(got.reference_top, q[rows])


def test_any_batch_gives_the_same(forged: Forged, prose: str) -> None:
    spec = forged("qwen35", seed=2, n_nextn=1)
    chunks = spec.chunks(prose, 96, 2)
    whole = evaluate(spec.path, chunks, n_ctx=96, n_threads=1)
    for n_batch, n_ubatch in ((40, 512), (7, 512), (96, 13)):
        parts = evaluate(
            spec.path, chunks, n_ctx=96, n_batch=n_batch, n_ubatch=n_ubatch, n_threads=2
        )
        assert whole.head is not None
        assert parts.head is not None
        np.testing.assert_allclose(parts.trunk.nll, whole.trunk.nll, rtol=0, atol=CLOSE)
        np.testing.assert_allclose(parts.head.nll, whole.head.nll, rtol=0, atol=CLOSE)


def greedy_text(spec: ModelSpec, n: int, *, noise: float, seed: int = 3) -> list[int]:
    """The text that the trunk writes, by the oracle; a share of `noise` of its tokens is
    replaced."""
    rng = np.random.default_rng(seed)
    forward = oracle._Forward(spec, np.float16, False)
    tokens = [int(rng.integers(0, 256))]
    while len(tokens) < n:
        _, logits = forward.trunk(np.asarray(tokens), False)
        token = int(logits[-1].argmax())
        tokens.append(int(rng.integers(0, 256)) if rng.random() < noise else token)
    return tokens


def drafts(
    spec: ModelSpec, tokens: Sequence[int], depth: int, *, own_rows: bool = True
) -> tuple[list[int], list[int], list[float]]:
    """known and accepted of every scored slot, by draft() of draft-mtp (common/speculative.cpp),
    and the margins of all choices that they depend on.

    own_rows: whether drafts continue from the head's own rows, which is right, or from the trunk's.
    """
    forward = oracle._Forward(spec, np.float16, False)
    text = np.asarray(tokens, dtype=np.int64)
    h, logits = forward.trunk(text, False)
    says = logits.argmax(axis=-1)
    chain = spec.hparams.n_nextn > 1
    known, accepted, margins = [], [], []

    def margin(row: F64) -> float:
        low, high = np.sort(row)[-2:]
        return float(high - low)

    last = len(tokens) - 2
    for p in range(len(tokens) // 2, last + 1):
        states, fed = [*oracle.pair(h, "shifted")[: p + 1]], [*text[: p + 1]]
        judged = right = 0
        for k in range(min(depth, spec.hparams.n_nextn) if chain else depth):
            if p + k > last:
                break
            rows, out = forward.head(k if chain else 0, np.asarray(fed), [np.stack(states)], False)
            token = int(out[-1].argmax())
            margins += [margin(out[-1]), margin(logits[p + k])]
            judged += 1
            if token != says[p + k]:
                break
            right += 1
            if token != text[p + k + 1]:
                break
            fed.append(token)
            states.append(rows[-1] if own_rows else h[p + k])
        known.append(judged)
        accepted.append(right)
    return known, accepted, margins


# What the engine's rounding may tip: no choice of a token in these is closer. The seeds were found
# by trying.
CLEAR_DRAFT = 5e-3
DRAFTING: dict[str, tuple[Arch, dict[str, Any]]] = {
    "glm4moe": ("glm4moe", {"n_nextn": 1, "blur": 0.1, "seed": 3}),
    "qwen35": ("qwen35", {"n_nextn": 1, "blur": 0.1, "seed": 4}),
    "chain of 3": ("hy_v3", {"n_nextn": 3, "blur": 0.15, "seed": 3}),
}


@pytest.mark.parametrize("case", DRAFTING)
def test_drafts_are_the_engines_drivers(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, options = DRAFTING[case]
    spec = agreeing(tmp_path / "model.gguf", arch, monkeypatch, **options)
    tokens = greedy_text(spec, 72, noise=0.1)
    known, accepted, margins = drafts(spec, tokens, 4)
    assert min(margins) > CLEAR_DRAFT, "too close to call; take another seed"
    found = evaluate(spec.path, [tokens], n_ctx=72, n_threads=1, depth=4)
    assert found.known.tolist() == known
    assert found.accepted.tolist() == accepted
    # these show what the head drafts on
    wrong_known, wrong_accepted, _ = drafts(spec, tokens, 4, own_rows=False)
    assert (wrong_known, wrong_accepted) != (known, accepted)
    # deep enough to mean something, and not all equal
    assert max(known) == found.depth == (3 if case == "chain of 3" else 4)
    assert len(set(accepted)) > 2
    rates = [
        sum(a >= k for a in accepted) / sum(n >= k for n in known) for k in range(1, max(known) + 1)
    ]
    assert [rate.value for rate in found.draft] == pytest.approx(rates)
    assert found.accepted_length is not None
    assert found.accepted_length.value == pytest.approx(np.cumprod(rates).sum())
    assert not found.head_is_dead
    assert found.verdict is None
    # drafts in several decodes
    few = evaluate(spec.path, [tokens], n_ctx=72, n_batch=5, n_threads=1, depth=4)
    assert few.known.tolist() == known
    assert few.accepted.tolist() == accepted


def test_a_head_that_is_its_trunk_is_accepted_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = agreeing(tmp_path / "model.gguf", "glm4moe", monkeypatch, blur=0.0, n_nextn=1)
    tokens = greedy_text(spec, N_CTX, noise=0.0)
    found = evaluate(spec.path, [tokens], n_ctx=N_CTX, depth=3)
    assert [rate.value for rate in found.draft] == [1, 1, 1]
    assert found.accepted_length is not None
    assert found.accepted_length.value == 3
    # all drafts could be judged, except at the end of the text
    assert found.known.tolist() == [3] * (len(found.known) - 2) + [2, 1]
    assert not found.head_is_dead


def test_a_random_head_is_dead(forged: Forged, prose: str) -> None:
    spec = forged("glm4moe", seed=SEEDS["glm4moe"], n_nextn=1)
    found = evaluate(spec.path, spec.chunks(prose, 96, 2), n_ctx=96)
    assert found.head_is_dead
    assert found.verdict is not None
    assert "wrong pairing" in found.verdict
    assert "tensors are of another model" in found.verdict


_EVALUATE = """
import sys
import numpy as np
from imatrix import evaluate

tokens = np.random.default_rng(0).integers(0, 250, 136, dtype=np.int32)
for path in sys.argv[1:]:
    whole, parts = (
        evaluate(path, [tokens], n_ctx=136, n_batch=n_batch, n_threads=1, rehearse=False)
        for n_batch in (136, 70)
    )
    print(abs(whole.trunk.nll - parts.trunk.nll).max(), abs(whole.head.nll - parts.head.nll).max())
"""


@pytest.mark.parametrize("arch", MTP_ARCHS)
def test_every_architecture_is_evaluated(arch: str, tmp_path: Path) -> None:
    """It runs in a child process, because the engine ends it if one of its assertions fails."""
    models = [make_any(tmp_path / "one.gguf", arch).path]
    if arch in ("hy_v3", "mimo2", "step35"):
        models.append(make_any(tmp_path / "three.gguf", arch, n_nextn=3).path)
    done = subprocess.run(
        [sys.executable, "-c", _EVALUATE, *map(str, models)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    apart = [float(number) for number in done.stdout.split()]
    assert len(apart) == 2 * len(models)
    assert max(apart) < 0.1


@pytest.mark.engine(
    "src/llama-memory-hybrid-idx.cpp", "only whole sequences are copied, of glm5-next and qwen4exp"
)
@pytest.mark.engine("common/speculative.cpp", "a head drafts on its own row and token")
@pytest.mark.parametrize("arch", [a for a in MTP_ARCHS if a != "deepseek4"])
def test_every_architecture_drafts(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that add nothing, and heads that hand on their token: each head says what the trunk
    says, so that on the trunk's own text every draft is accepted. A draft step that got a wrong
    token would not be accepted. (deepseek4 mixes four streams, which this cannot silence.)"""
    drawn = forge_any._draw
    # qwen4exp: n-grams that add nothing, and the same mixer at the end of trunk and head
    hyper_connections = ("ple_value", "ple_conv1d", "nextn.hc_head_down", "output_hc_down")

    def draw(
        arch: str, name: str, shape: forge.Shape, seed: int, n_expert: int
    ) -> NDArray[np.float32]:
        values: NDArray[np.float32] = drawn(arch, name, shape, seed, n_expert)
        kind = name.split(".", 2)[-1] if name.startswith("blk.") else name
        if (
            kind.startswith(("attn_output", "attn_out", "ssm_out", "ffn_down", *hyper_connections))
            and "norm" not in kind
        ):
            values[...] = 0
        elif kind == "nextn.eh_proj.weight":
            values[...] = np.eye(*shape)
        elif "norm" in name and kind.endswith("weight"):
            values[...] = 1
        return values

    monkeypatch.setattr(forge_any, "_draw", draw)
    several = arch in ("hy_v3", "mimo2", "step35")
    model = make_any(tmp_path / "model.gguf", arch, n_nextn=3 if several else 1)
    assert model.tokenizer is not None
    n_vocab = model.tokenizer.n_vocab
    every = np.concatenate([np.arange(n_vocab), np.arange(n_vocab), [0]])
    says = evaluate(model.path, [every], n_ctx=len(every), mtp=False).trunk.top
    tokens = [7]
    while len(tokens) < 48:
        tokens.append(int(says[tokens[-1]]))
    found = evaluate(model.path, [tokens], n_ctx=48, depth=3)
    assert found.trunk.top.tolist() == tokens[25:]
    assert [rate.value for rate in found.draft] == [1, 1, 1]
    assert found.known.tolist() == [3] * 21 + [2, 1]


def test_nan_logits_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forged: Forged, prose: str
) -> None:
    drawn = forge._draw

    def draw(name: str, shape: forge.Shape, seed: int, hp: forge.Hparams) -> forge.F32:
        values = drawn(name, shape, seed, hp)
        if name.endswith("nextn.hnorm.weight"):
            values[3] = np.nan
        return values

    monkeypatch.setattr(forge, "_draw", draw)
    spec = forge.make_model(tmp_path / "model.gguf", "glm4moe", n_nextn=1)
    tokens = spec.encode(prose)[:32]
    with pytest.raises(imatrix.NonFiniteError, match="logits of the head"):
        evaluate(spec.path, [tokens], n_ctx=32)
    assert evaluate(spec.path, [tokens], n_ctx=32, mtp=False).head is None


def test_an_assistant_that_shares_its_trunks_memory(tmp_path: Path) -> None:
    trunk = make_any(tmp_path / "gemma4.gguf", "gemma4", n_nextn=0, seed=1, n_embd=512).path
    head = make_any(tmp_path / "assistant.gguf", "gemma4-assistant", n_nextn=2, seed=2).path
    tokens = np.random.default_rng(5).integers(0, 250, 160, dtype=np.int32)
    whole = evaluate(trunk, [tokens], mtp_model=head, n_ctx=160)
    parts = evaluate(trunk, [tokens], mtp_model=head, n_ctx=160, n_batch=40)
    assert whole.head is not None
    assert parts.head is not None
    assert len(whole.head.nll) == 79
    np.testing.assert_allclose(parts.head.nll, whole.head.nll, rtol=0, atol=CLOSE)


# --- figures --------------------------------------------------------------------------------------------


def made(
    nll: F64,
    chunk: NDArray[np.int32],
    *,
    known: Sequence[int] | NDArray[Any] | None = None,
    accepted: Sequence[int] | NDArray[Any] | None = None,
    digest: str = "same",
) -> Evaluation:
    top = np.arange(len(nll), dtype=np.int32) % 7
    rows = Predictions(nll, top, None, None, None)
    return Evaluation(
        model="model.gguf",
        mtp_model=None,
        reference=None,
        n_ctx=8,
        n_vocab=100,
        digest=digest,
        chunk=chunk,
        position=np.arange(len(chunk), dtype=np.int32),
        trunk=rows,
        head=None if known is None else rows,
        depth=3,
        known=np.asarray([] if known is None else known, dtype=np.int8),
        accepted=np.asarray([] if accepted is None else accepted, dtype=np.int8),
    )


def test_errors_are_those_of_the_textbook() -> None:
    rng = np.random.default_rng(1)
    chunk = np.repeat(np.arange(200, dtype=np.int32), 20)
    # chunks differ, so that the positions of one chunk are correlated
    nll = 2 + 0.5 * rng.standard_normal(200)[chunk] + rng.standard_normal(len(chunk))
    found = made(nll, chunk).nll
    assert found.value == pytest.approx(nll.mean())
    assert found.error == pytest.approx(nll.std(ddof=1) / math.sqrt(len(nll)))
    # the variance of a mean of 200 chunk means; 1000 resamples give it to a few percent
    by_chunk = nll.reshape(200, 20).mean(axis=1)
    half = 1.96 * by_chunk.std(ddof=1) / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    assert (found.high + found.low) / 2 == pytest.approx(nll.mean(), abs=0.1 * half)
    # single positions would promise too much
    assert half > 1.5 * 1.96 * found.error
    assert made(nll, chunk).nll == found  # the seed is fixed


def test_one_chunk_has_no_interval() -> None:
    found = made(np.array([1.0, 3.0]), np.zeros(2, dtype=np.int32))
    assert found.nll.value == 2
    assert found.nll.error == pytest.approx(1)
    assert math.isnan(found.nll.low)
    assert found.as_data()["trunk"]["nll"] == {
        "value": 2.0, "error": 1.0, "low": None, "high": None, "n": 2,
    }  # fmt: skip


def test_comparison_is_paired() -> None:
    rng = np.random.default_rng(2)
    chunk = np.repeat(np.arange(30, dtype=np.int32), 10)
    nll = rng.exponential(2, len(chunk))
    first, second = made(nll + 0.01, chunk), made(nll, chunk)
    # each of them is uncertain by far more than their difference
    assert first.nll.high - first.nll.low > 0.2
    difference = first.compare(second)
    assert difference.nll.value == pytest.approx(0.01)
    assert difference.nll.low == pytest.approx(0.01)
    assert difference.nll.high == pytest.approx(0.01)
    assert difference.kl is None
    assert difference.head_nll is None
    with pytest.raises(ValueError, match="same tokens only"):
        first.compare(made(nll, chunk, digest="other"))


def test_comparison_is_that_of_another_bootstrap() -> None:
    """Chunks are drawn one by one and put together; the code under test weighs the sums of
    chunks."""
    rng = np.random.default_rng(8)
    n_chunks, each, depth = 40, 25, 3
    chunk = np.repeat(np.arange(n_chunks, dtype=np.int32), each)
    easy = rng.normal(0, 0.6, n_chunks)[chunk]  # a chunk is easy for both
    runs = []
    for better in (0.25, 0.0):
        accepted, known = np.zeros((2, len(chunk)), dtype=np.int8)
        going = np.ones(len(chunk), dtype=bool)
        for _ in range(depth):
            known += going
            going &= rng.random(len(chunk)) < 1 / (1 + np.exp(-(0.5 + easy + better)))
            accepted += going
            going &= rng.random(len(chunk)) < 0.8  # the text goes the same way
        nll = 2 - easy + rng.normal(0, 0.3, len(chunk)) - better / 10
        runs.append((nll, known, accepted))
    first, second = (made(nll, chunk, known=k, accepted=a) for nll, k, a in runs)
    got = first.compare(second)

    def figures(rows: NDArray[np.intp]) -> list[float]:
        shares = []
        for _, known, accepted in runs:
            shares.append([(accepted[rows] >= k)[known[rows] >= k].mean() for k in (1, 2, 3)])
        return [
            (runs[0][0] - runs[1][0])[rows].mean(),
            *np.subtract(*shares),
            np.cumprod(shares[0]).sum() - np.cumprod(shares[1]).sum(),
        ]

    rows_of = np.arange(len(chunk)).reshape(n_chunks, each)
    drawn = [figures(rows_of[rng.integers(0, n_chunks, n_chunks)].ravel()) for _ in range(2000)]
    ends = np.percentile(drawn, (2.5, 97.5), axis=0)
    assert len(got.draft) == depth
    assert got.accepted_length is not None
    for found, value, low, high, spread in zip(
        (got.nll, *got.draft, got.accepted_length),
        figures(np.arange(len(chunk))),
        *ends,
        np.std(drawn, axis=0),
        strict=True,
    ):
        assert found.value == pytest.approx(value, abs=1e-12)
        # ends from 1000 and from 2000 resamples differ by a tenth of the spread (one sigma)
        assert found.low == pytest.approx(low, abs=0.4 * spread)
        assert found.high == pytest.approx(high, abs=0.4 * spread)
    for found, spread in zip(
        (*got.draft[1:], got.accepted_length), np.std(drawn, 0)[2:], strict=True
    ):
        assert found.error == pytest.approx(spread, rel=0.1)
    assert got.draft[1].n == min((known >= 2).sum() for _, known, _ in runs)


def test_comparison_in_plain_words() -> None:
    rng = np.random.default_rng(4)
    chunk = np.repeat(np.arange(30, dtype=np.int32), 10)
    nll = rng.exponential(2, len(chunk))
    noise = rng.normal(0, 0.1, len(chunk))
    known = np.ones(len(chunk), dtype=np.int8)
    bad, good = (rng.random(len(chunk)) < share for share in (0.4, 0.8))
    base = made(nll, chunk, known=known, accepted=bad)
    for other, accepted, loss, agreement in (
        (nll + 0.05, bad, "worse", "no difference shown"),
        (nll - 0.05, good, "better", "better"),
        (nll, bad, "no difference shown", "no difference shown"),
    ):
        told = made(other + noise, chunk, known=known, accepted=accepted).compare(base)
        assert told.head_nll is not None
        assert (told.nll.verdict, told.head_nll.verdict) == (loss, loss)
        assert told.draft[0].verdict == agreement
    alone = made(nll, np.zeros_like(chunk))
    assert alone.compare(alone).nll.verdict == "too few chunks to tell"


def test_accepted_length_by_hand() -> None:
    chunk = np.array([0, 0, 0, 1, 1, 1], dtype=np.int32)
    #                       accepted: 4 of 6, then 2 of 3, then 1 of 2
    found = made(np.ones(6), chunk, known=[1, 1, 3, 3, 2, 1], accepted=[0, 1, 2, 3, 1, 0])
    assert [rate.value for rate in found.draft] == pytest.approx([4 / 6, 2 / 3, 1 / 2])
    assert [rate.n for rate in found.draft] == [6, 3, 2]
    assert found.accepted_length is not None
    assert found.accepted_length.value == pytest.approx(4 / 6 + 4 / 9 + 2 / 9)


# --- refusals, and the command ------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused(forged: Forged, prose: str) -> None:
    spec = forged("glm4moe", seed=11, n_nextn=1)
    tokens = spec.encode(prose)[:64]
    for options, match in (
        ({"reference": forged("llama", seed=1).path}, "is llama, the model is glm4moe"),
        ({"reference": forged("glm4moe", seed=11, n_nextn=1, n_vocab=400).path}, "400 tokens"),
        ({"reference": forged("glm4moe", seed=11).path}, "has no MTP head"),
        ({"depth": 0}, "depth must be 1"),
        ({"n_ctx": 3}, "n_ctx must be 4"),
        ({"reference_mtp_model": spec.path}, "without a reference"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate(spec.path, [tokens], **{"n_ctx": 32, **options})
    with pytest.raises(ValueError, match="no MTP head in it"):
        evaluate(forged("llama", seed=1).path, [tokens], mtp=True)
    with pytest.raises(ValueError, match="too short"):
        evaluate(spec.path, [tokens[:2]], n_ctx=32)


def test_an_error_of_progress_ends_it(forged: Forged, prose: str) -> None:
    spec = forged("llama", seed=1)

    def stop(progress: imatrix.Progress) -> None:
        assert progress.chunks == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(spec.path, prose, n_ctx=64, progress=stop)


def test_command(forged: Forged, prose_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = forged("glm4moe", seed=SEEDS["glm4moe"], n_nextn=1, n_ctx_train=64)
    # fmt: off
    args = ["evaluate", str(spec.path), "-f", str(prose_file), "--reference", str(spec.path),
            "-c", "64", "--chunks", "3", "-t", "1"]
    # fmt: on
    assert main([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    found = evaluate(
        spec.path, prose_file, reference=spec.path, n_ctx=64, max_chunks=3, n_threads=1
    )
    assert told == json.loads(json.dumps(found.as_data()))
    assert told["n_chunks"] == 3
    assert told["head"]["dead"] is True
    assert "the MTP head is dead" in err
    assert "overflow" not in err  # no chunk is longer than the context of the training

    assert main(args) == 0
    out, _ = capsys.readouterr()
    assert "trunk: perplexity" in out
    assert f"{found.perplexity.value:.5f}" in out
    assert "draft: agreement at depth 1" in out

    assert main([*args, "--no-mtp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["head"] is None
    assert main(["evaluate", str(spec.path), "-f", "no such file"]) == 2
    assert main([*args, "--depth", "0"]) == 2


def test_command_compares(
    forged: Forged, prose_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = forged("glm4moe", seed=SEEDS["glm4moe"], n_nextn=1).path
    second = forged("glm4moe", seed=SEEDS["glm4moe"], n_nextn=1, eps=0.5).path
    third = forged("glm4moe", seed=SEEDS["glm4moe"]).path  # without a head
    # fmt: off
    args = ["evaluate", str(second), "-f", str(prose_file), "--reference", str(first),
            "-c", "64", "--chunks", "4", "-t", "1", "--against", str(first)]
    # fmt: on
    assert main([*args, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    options: dict[str, Any] = {"reference": first, "n_ctx": 64, "max_chunks": 4, "n_threads": 1}
    ours, theirs = (evaluate(path, prose_file, **options) for path in (second, first))
    [against] = told.pop("against")
    difference = against.pop("difference")
    assert told == json.loads(json.dumps(ours.as_data()))
    assert against == json.loads(json.dumps(theirs.as_data()))
    assert difference == json.loads(json.dumps(ours.compare(theirs).as_data()))
    # the other file is the reference itself: nothing in it differs
    assert ours.kl is not None
    assert difference["trunk"]["kl"]["value"] == pytest.approx(ours.kl.value)
    assert difference["trunk"]["kl"]["verdict"] == "worse"
    assert difference["head"]["agreement"][0]["n"] == ours.nll.n

    assert main([*args, "--against", str(third)]) == 0
    out, err = capsys.readouterr()
    assert f"{second} minus {first}" in out
    assert f"{second} minus {third}" in out
    assert re.search(r"trunk: KL to the reference .* worse", out)
    assert f"{second}: the MTP head is dead" in err
    assert main([*args, "--against-mtp-model", str(first), "--against-mtp-model", "b"]) == 2
    assert "one for each" in capsys.readouterr().err
    assert main([*args, "--against", "no such file"]) == 2
