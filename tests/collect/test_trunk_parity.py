"""Compares the trunk with llama-imatrix: same text, same names, same counts, same sums."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forge import Arch, ModelSpec
from helpers.parity import PARITY, assert_same_trunk, differences
from helpers.running import EngineTool, Forged, run_tool, until_printed

from imatrix import Collector, ImportanceMatrix

pytestmark = [
    pytest.mark.engine(
        "tools/imatrix/imatrix.cpp",
        "llama-imatrix collects the same weights of a trunk, with the same counts and sums",
    ),
]

N_CTX = 64


# The CPU's attention has two kernels: tiles, for 64 query rows of a sequence or more in a ubatch,
# with float32 accumulators, and a plain one, for fewer rows, with float16 accumulators if the cache
# is F16 (ggml_compute_forward_flash_attn_ext_f16 in ggml/src/ggml-cpu/ops.cpp). If two runs use
# different kernels, the outputs of attention differ by some float16 roundings (5e-4 each).
OTHER_ATTENTION = 2e-3

TRUNKS: list[tuple[Arch, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen35", {"n_nextn": 1}),  # a recurrent layer and one with attention
    ("qwen35moe", {"n_nextn": 1}),
    ("glm4moe", {"n_nextn": 1}),
    ("deepseek2", {"n_nextn": 1}),  # 3-D weights
]
ARCHS = [arch for arch, _ in TRUNKS]
OPTIONS = dict(TRUNKS)
# A model in which no two experts are so close that another attention kernel would swap them. If
# both sides run the same kernels, any seed will do.
SEED = 2


class Theirs:
    """Runs llama-imatrix on the test's text."""

    def __init__(self, tool: Path, text: Path, folder: Path) -> None:
        self.tool, self.text, self.folder = tool, text, folder
        self.log = ""

    def __call__(self, spec: ModelSpec, *options: str | int) -> ImportanceMatrix:
        out = self.folder / "theirs.gguf"
        # fmt: off
        self.log = run_tool(
            self.tool, "-m", spec.path, "-f", self.text, "-o", out, "-t", "1",
            *map(str, options),
        )
        # fmt: on
        return ImportanceMatrix.load(out)


@pytest.fixture
def theirs(engine_tool: EngineTool, prose_file: Path, tmp_path: Path) -> Theirs:
    return Theirs(engine_tool("llama-imatrix"), prose_file, tmp_path)


def ours(
    spec: ModelSpec, text: Path, *, mtp: bool = False, collector: Any = None, **options: Any
) -> ImportanceMatrix:
    with Collector(spec.path, n_threads=1, **{"n_ctx": N_CTX, **(collector or {})}) as made:
        return made.run(text, mtp=mtp, **options)


# llama-imatrix's -b and -ub; then this package's n_batch, n_ubatch and n_seq. Both sides have the
# same number of rows of a sequence in a ubatch, or at least 64 of them, and thus the same attention
# kernel.
BATCHES = {
    "below n_ctx": (32, 32, {"n_batch": 32, "n_ubatch": 32}),
    "equal to n_ctx": (64, 64, {"n_batch": 64, "n_ubatch": 64}),
    "above n_ctx, ours one by one": (192, 192, {"n_ubatch": 64}),
    "above n_ctx, side by side": (192, 192, {"n_seq": 3, "n_ubatch": 192}),
    "above n_ctx, split ubatches": (192, 96, {"n_seq": 3, "n_ubatch": 96}),
}


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("arch", ARCHS)
def test_names_counts_and_sums_are_theirs(
    arch: Arch, batches: str, forged: Forged, theirs: Theirs, prose_file: Path
) -> None:
    spec = forged(arch, seed=SEED, **OPTIONS[arch])
    n_batch, n_ubatch, collector = BATCHES[batches]
    # 7 chunks: the last group of three is not full
    want = theirs(spec, "--no-ppl", "-c", N_CTX, "-b", n_batch, "-ub", n_ubatch, "--chunks", 7)
    got = ours(spec, prose_file, collector=collector, max_chunks=7)
    assert got.chunk_count == want.chunk_count == 7
    assert got.chunk_size == want.chunk_size == N_CTX
    assert_same_trunk(got, want)


@pytest.mark.parametrize("arch", ARCHS)
def test_default_batches_agree_with_default_batches(
    arch: Arch, forged: Forged, theirs: Theirs, prose_file: Path
) -> None:
    """Both programs run with their default batches; only the size of a chunk is given."""
    spec = forged(arch, seed=SEED, **OPTIONS[arch])
    want = theirs(spec, "--no-ppl", "-c", 128, "--chunks", 4)
    assert_same_trunk(ours(spec, prose_file, collector={"n_ctx": 128}, max_chunks=4), want)


@pytest.mark.parametrize("arch", ["llama", "glm4moe"])
def test_bos_goes_over_the_first_token_of_every_chunk(
    arch: Arch, forged: Forged, theirs: Theirs, prose_file: Path
) -> None:
    with_bos = forged(arch, seed=SEED, add_bos=True, **OPTIONS[arch])
    without = forged(arch, seed=SEED, add_bos=False, **OPTIONS[arch])
    args = ("--no-ppl", "-c", N_CTX, "-b", N_CTX, "--chunks", 4)
    got = ours(with_bos, prose_file, max_chunks=4)
    assert_same_trunk(got, theirs(with_bos, *args))
    # the two models differ in that key alone, and the key matters
    worst = differences(got, theirs(without, *args))
    assert worst["blk.0.attn_q.weight"] > 100 * PARITY


@pytest.mark.parametrize("arch", ["llama", "qwen35", "deepseek2"])
def test_process_output_adds_output_weight(
    arch: Arch, forged: Forged, theirs: Theirs, prose_file: Path
) -> None:
    spec = forged(arch, seed=SEED, **OPTIONS[arch])
    want = theirs(spec, "--no-ppl", "--process-output", "-c", N_CTX, "-b", N_CTX, "--chunks", 3)
    assert "output.weight" in want
    assert "token_embd.weight" not in want
    assert_same_trunk(ours(spec, prose_file, process_output=True, max_chunks=3), want)
    assert "output.weight" not in ours(spec, prose_file, max_chunks=1)


@pytest.mark.parametrize("arch", ["llama", "qwen35", "glm4moe"])
def test_process_output_adds_the_token_embedding_where_it_gives_the_logits(
    arch: Arch, forged: Forged, theirs: Theirs, prose_file: Path
) -> None:
    """The model has no output.weight: the engine multiplies token_embd.weight instead."""
    spec = forged(arch, seed=SEED, tied=True, **OPTIONS[arch])
    assert "output.weight" not in spec.tensors
    want = theirs(spec, "--no-ppl", "--process-output", "-c", N_CTX, "-b", N_CTX, "--chunks", 3)
    assert want["token_embd.weight"].counts.tolist() == [3 * N_CTX]
    got = ours(spec, prose_file, process_output=True, max_chunks=3)
    assert_same_trunk(got, want)
    assert_same_trunk(
        ours(spec, prose_file, process_output=True, max_chunks=3, perplexity=True), want
    )
    # the native thread runs several chunks side by side
    side = ours(spec, prose_file, collector={"n_seq": 3}, process_output=True, max_chunks=3)
    assert_same_trunk(side, want, OTHER_ATTENTION)
    assert "token_embd.weight" not in ours(spec, prose_file, max_chunks=1)


@pytest.mark.parametrize(
    ("skip", "most", "theirs_says"),
    [(2, 3, ("--chunk", 2, "--chunks", 3)), (20, None, ("--chunk", 20)), (0, 1, ("--chunks", 1))],
)
def test_chunks_are_skipped_and_limited_alike(
    skip: int,
    most: int | None,
    theirs_says: tuple[str | int, ...],
    forged: Forged,
    theirs: Theirs,
    prose_file: Path,
) -> None:
    spec = forged("llama", seed=SEED, add_bos=True)
    n_ctx = 256  # few chunks, so that "all of them" is quick
    want = theirs(spec, "--no-ppl", "-c", n_ctx, "-b", n_ctx, *theirs_says)
    collector = {"n_ctx": n_ctx, "n_ubatch": n_ctx}
    got = ours(spec, prose_file, collector=collector, skip_chunks=skip, max_chunks=most)
    assert got.chunk_count == want.chunk_count
    assert most is None or got.chunk_count == most
    assert_same_trunk(got, want)


def test_rows_of_a_small_last_ubatch_are_counted(
    forged: Forged, theirs: Theirs, prose_file: Path
) -> None:
    """100 tokens in ubatches of 96 leave 4: llama-imatrix ignores a plain matmul of fewer than 16
    rows (collect_imatrix in tools/imatrix/imatrix.cpp), but not that of experts."""
    spec = forged("glm4moe", seed=SEED, n_nextn=1)
    want = theirs(spec, "--no-ppl", "-c", 100, "-b", 100, "-ub", 96, "--chunks", 3)
    got = ours(spec, prose_file, collector={"n_ctx": 100, "n_ubatch": 96}, max_chunks=3)
    assert set(got) == set(want)
    for name in want:
        if "_exps" in name:
            np.testing.assert_array_equal(got[name].counts, want[name].counts)
            assert got[name].counts.sum() == 3 * 100 * spec.hparams.n_expert_used
        else:
            assert got[name].counts.tolist() == [3 * 100], name
            assert want[name].counts.tolist() == [3 * 96], name


@pytest.mark.parametrize("arch", ARCHS[1:])
@pytest.mark.parametrize("n_batch", [N_CTX, 24])
def test_the_head_changes_no_bit_of_the_trunk(
    arch: Arch, n_batch: int, forged: Forged, prose_file: Path
) -> None:
    spec = forged(arch, seed=SEED, n_nextn=1)
    collector = {"n_batch": n_batch}
    with_head = ours(spec, prose_file, mtp=True, collector=collector, max_chunks=4)
    without = ours(spec, prose_file, mtp=False, collector=collector, max_chunks=4)
    assert without.head_blocks == frozenset()
    assert len(with_head.head) > 5
    assert dict(with_head.trunk) == dict(without)


@pytest.mark.parametrize("arch", ARCHS)
def test_batches_of_whole_tiles_change_nothing(
    arch: Arch, forged: Forged, prose_file: Path
) -> None:
    """Batches and ubatches have 64 rows or more, so that one attention kernel computes everything.

    The result is not the same to the bit: each decode adds its own float32 sums, and the attention
    sees a padded cache of another length. 1e-6 is ten roundings of float32.
    """
    spec = forged(arch, seed=SEED, **OPTIONS[arch])
    whole = ours(spec, prose_file, collector={"n_ctx": 192}, max_chunks=2)
    for sizes in ({"n_batch": 64}, {"n_batch": 96}, {"n_ubatch": 64}, {"n_seq": 2}):
        parts = ours(spec, prose_file, collector={"n_ctx": 192, **sizes}, max_chunks=2)
        assert_same_trunk(parts, whole, 1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_small_batches_change_what_the_engine_rounds(
    arch: Arch, forged: Forged, prose_file: Path
) -> None:
    """The names and counts are the same; the sums differ as much as the two attention kernels
    do."""
    spec = forged(arch, seed=SEED, **OPTIONS[arch])
    whole = ours(spec, prose_file, max_chunks=4)
    parts = ours(spec, prose_file, collector={"n_batch": 24}, max_chunks=4)
    assert_same_trunk(parts, whole, OTHER_ATTENTION)


_ESTIMATE = re.compile(r"Final estimate: PPL = ([0-9.]+) \+/- ([0-9.]+)")


@pytest.mark.parametrize(
    ("arch", "n_batch", "n_seq"),
    [("llama", 64, 1), ("qwen35", 64, 1), ("glm4moe", 32, 1), ("deepseek2", 128, 2)],
)
def test_perplexity_is_what_llama_imatrix_prints(
    arch: Arch, n_batch: int, n_seq: int, forged: Forged, theirs: Theirs, prose_file: Path
) -> None:
    spec = forged(arch, seed=SEED, **OPTIONS[arch])

    def run() -> str:
        theirs(spec, "-c", N_CTX, "-b", n_batch, "-ub", n_batch, "--chunks", 6)
        return theirs.log

    printed = _ESTIMATE.search(until_printed("Final estimate", run))
    assert printed, theirs.log
    with Collector(
        spec.path, n_ctx=N_CTX, n_batch=n_batch, n_ubatch=n_batch, n_seq=n_seq, n_threads=1
    ) as collector:
        collector.run(prose_file, max_chunks=6, perplexity=True)
        found = collector.perplexity
    assert found is not None
    # the second half of each chunk, without its last token, which has no next one
    assert found.n_scored == 6 * (N_CTX // 2 - 1)
    # One unit of the last printed digit: 4 decimals and 5. The logits are float32 and come from a
    # matmul of fewer rows here (only the scored ones), so that the last bits differ.
    assert found.value == pytest.approx(float(printed[1]), rel=0, abs=1.01e-4)
    assert found.error == pytest.approx(float(printed[2]), rel=0, abs=1.01e-5)


def test_scoring_changes_no_sum(forged: Forged, prose_file: Path) -> None:
    """With outputs the LM head runs too; what is collected stays the same to the bit."""
    spec = forged("glm4moe", seed=SEED, n_nextn=1)
    plain = ours(spec, prose_file, mtp=True, max_chunks=3)
    assert dict(ours(spec, prose_file, mtp=True, perplexity=True, max_chunks=3)) == dict(plain)
