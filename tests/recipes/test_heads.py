"""The head's table: bytes read, speed-up, choice, and acceptance measured in the loaded model."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.forge_any import make_any
from helpers.heads import agreeing
from helpers.running import TEXT, Forged, trained_models

import imatrix
from imatrix.cli.head_table import print_head_table
from imatrix.cli.program import main
from imatrix.cli.terminal import Terminal
from imatrix.engine.quantizing import Choice, HereQuantizer
from imatrix.errors import ModelError
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.native import engine, quantizer
from imatrix.quantization.types import FTYPES
from imatrix.recipes.head_table import HeadReads, HeadTable, speed_up
from imatrix.recipes.heads import (
    AS_IT_IS,
    Candidates,
    HeadCandidate,
    HeadFiles,
    HeadTrial,
    head_candidates,
    measure_head,
)
from imatrix.text.chunks import chunks as cut_tokens

[TRAINED] = trained_models()

# --- bytes read, counted from the file by gguf-py -------------------------------------------------


class Counted:
    """A file's tensors by gguf-py: bytes with other types, and what a token reads of them."""

    def __init__(self, path: Path, types: Mapping[str, str] | None = None) -> None:
        reader = gguf.GGUFReader(path)
        self.bytes: dict[str, float] = {}
        self.rows: dict[str, int] = {}
        for tensor in reader.tensors:
            n_bytes = int(tensor.n_bytes)
            shape = [int(n) for n in tensor.shape]
            if types and tensor.name in types:
                kind = gguf.GGMLQuantizationType[types[tensor.name].upper()]
                block, size = gguf.GGML_QUANT_SIZES[kind]
                n_bytes = int(np.prod(shape)) // block * size
            self.bytes[tensor.name] = n_bytes
            self.rows[tensor.name] = int(np.prod(shape[1:]))

    def of(self, *starts: str) -> float:
        return sum(n for name, n in self.bytes.items() if name.startswith(starts))

    def row(self, name: str) -> float:
        return self.bytes[name] / self.rows[name]


def read_of(
    path: Path, head: Mapping[str, str], trunk: Mapping[str, str], depth: int = 1
) -> HeadReads:
    return HeadReads.of(HeadFiles.read(path), head, trunk, depth)


def test_bytes_read_of_a_dense_model(forged: Forged) -> None:
    path = forged("qwen35", n_nextn=1, seed=2).path
    n = Counted(path)
    found = read_of(path, {}, {})
    table = n.row("token_embd.weight")
    # every block whole; output_norm and output; one row of the table
    assert found.trunk.of() == n.of("blk.0.", "blk.1.", "output") + table
    # no LM head and no table of its own
    assert found.draft(1) == n.of("blk.2.", "output.weight") + table
    # the head's block again, without the LM head, with a row for each token
    assert found.catch_up.of(3) == n.of("blk.2.") + 3 * table
    # a dense model reads no more for several tokens, but for the table's rows
    assert found.trunk.of(4) == found.trunk.of() + 3 * table


def test_bytes_read_with_types(forged: Forged) -> None:
    path = forged("qwen35", n_nextn=1, seed=2).path
    trunk = {"blk.0.ffn_up.weight": "q4_K", "output.weight": "q6_k", "token_embd.weight": "q8_0"}
    head = {"blk.2.nextn.eh_proj.weight": "q8_0", "blk.2.attn_q.weight": "Q2_K"}
    n = Counted(path, {**trunk, **head})
    found = read_of(path, head, trunk)
    table = n.row("token_embd.weight")
    assert found.trunk.of() == n.of("blk.0.", "blk.1.", "output") + table
    assert found.draft(1) == n.of("blk.2.", "output.weight") + table
    with pytest.raises(ValueError, match="this engine has no tensor type 'q9_z'"):
        read_of(path, {"blk.2.attn_q.weight": "q9_z"}, {})


def test_bytes_read_of_a_mixture_of_experts_with_tied_embeddings() -> None:
    """The shipped model: 2 of 4 experts in block 3 and in the head, a shared one, no output.weight."""
    n = Counted(TRAINED)
    assert "output.weight" not in n.bytes
    found = read_of(TRAINED, {}, {}, depth=3)
    experts = {
        il: n.of(*(f"blk.{il}.ffn_{k}_exps" for k in ("gate", "up", "down"))) for il in (3, 4)
    }
    table, lm_head = n.row("token_embd.weight"), n.bytes["token_embd.weight"]
    blocks = n.of("blk.0.", "blk.1.", "blk.2.", "blk.3.", "output_norm")
    assert found.trunk.of() == blocks - experts[3] / 2 + lm_head + table
    step = n.of("blk.4.") - experts[4] / 2 + lm_head + table
    assert found.draft(3) == 3 * step
    # of 3 tokens one expert is left out by all with (1/2)^3, if they choose independently
    assert found.trunk.of(3) == pytest.approx(
        blocks - experts[3] / 8 + lm_head + 3 * table, rel=1e-12
    )
    assert found.catch_up.of(3) == pytest.approx(
        n.of("blk.4.") - experts[4] / 8 + 3 * table, rel=1e-12
    )


def test_a_head_with_a_table_and_an_lm_head_of_its_own(forged: Forged) -> None:
    options: dict[str, Any] = {"embed_tokens": True, "shared_head_head": True}
    path = forged("qwen35", n_nextn=1, seed=2, **options).path
    n = Counted(path)
    own = (
        n.of("blk.2.") - n.of("blk.2.nextn.embed_tokens") + n.row("blk.2.nextn.embed_tokens.weight")
    )
    found = read_of(path, {}, {})
    assert found.draft(1) == own
    assert found.catch_up.of() == own - n.of("blk.2.nextn.shared_head_head")


def test_a_chain_of_heads_reads_one_a_step(forged: Forged) -> None:
    path = forged("hy_v3", n_nextn=2, seed=6).path
    n = Counted(path)
    found = read_of(path, {}, {}, depth=2)
    files = HeadFiles.read(path)
    first = files.head.header.n_trunk
    used, count = (files.head.header.integers[f"expert_{k}"] for k in ("used_count", "count"))
    each = []
    for il in (first, first + 1):
        experts = sum(v for k, v in n.bytes.items() if k.startswith(f"blk.{il}.") and "_exps" in k)
        each.append(n.of(f"blk.{il}.") - experts * (1 - used / count))
    lm_head, table = n.bytes["output.weight"], n.row("token_embd.weight")
    for k in (1, 2):
        assert found.draft(k) == pytest.approx(sum(each[:k]) + k * (lm_head + table), rel=1e-12)
    assert found.catch_up.of() == pytest.approx(sum(each) + 2 * table, rel=1e-12)


def test_a_head_in_a_file_of_its_own(forged: Forged, tmp_path: Path) -> None:
    whole = forged("glm4moe", n_nextn=1, seed=11).path
    trunk, head = tmp_path / "trunk.gguf", tmp_path / "head.gguf"
    imatrix.extract_mtp(whole, head, trunk_out=trunk)
    files = HeadFiles.read(trunk, head)
    assert files.own_file
    assert set(files.names) == set(Counted(head).bytes)
    assert set(files.trunk_names) == set(Counted(trunk).bytes)
    types = {"output.weight": "q4_k"}  # of the trunk; the head's own LM head stays
    apart = HeadReads.of(files, {}, types, 1)
    assert apart.draft(1) == read_of(whole, {}, {}).draft(1)
    assert apart.trunk == read_of(whole, {}, types).trunk


def test_a_head_that_shares_the_trunks_memory(tmp_path: Path) -> None:
    trunk = make_any(tmp_path / "gemma4.gguf", "gemma4", n_nextn=0, seed=1, n_embd=512).path
    head = make_any(tmp_path / "assistant.gguf", "gemma4-assistant", n_nextn=2, seed=2).path
    files = HeadFiles.read(trunk, head)
    found = HeadReads.of(files, {}, {}, 3)
    n, of_trunk = Counted(head), Counted(trunk)
    # all blocks at once, its own table as the LM head, and a row of the trunk's table
    everything = sum(n.bytes.values()) + of_trunk.row("token_embd.weight")
    assert found.draft(3) == 3 * everything
    assert found.catch_up.of(4) == 0


def test_no_head_and_no_graph_for_it_are_refused(forged: Forged, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no MTP head in it"):
        HeadFiles.read(forged("llama").path)


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accepted", "draft", "trunk", "expected"),
    [
        (0.0, 1, 10, 1 / 1.1),  # nothing accepted: the drafts were for nothing
        (1.0, 1, 10, 2 / 1.1),
        (2.0, 30, 10, 0.75),  # three steps as dear as the trunk
        (1.5, 15, 60, 2.0),
    ],
)
def test_the_speed_up_by_hand(accepted: float, draft: float, trunk: float, expected: float) -> None:
    assert float(speed_up(accepted, draft, trunk)) == pytest.approx(expected, rel=1e-15)


# --- candidates -----------------------------------------------------------------------------------


def test_candidates_without_data_are_those_that_need_none() -> None:
    files = HeadFiles.read(TRAINED)
    found = head_candidates(files, None, HereQuantizer())
    labels = [c.label for c in found.offered]
    assert labels[0] == AS_IT_IS
    assert "Q4_K" in labels
    assert "Q4_K+Q8_0" in labels
    assert set(found.left_out) == {"IQ3_XXS", "IQ2_XXS", "IQ2_XXS+Q5_K"}
    assert "there is no matrix" in found.left_out["IQ2_XXS"]
    n = Counted(TRAINED)
    assert found.offered[0].bytes == n.of("blk.4.")
    for candidate in found.offered[1:]:
        assert candidate.bytes == Counted(TRAINED, candidate.types).of("blk.4.")
    with pytest.raises(ValueError, match="IQ2_XXS: it needs importance data"):
        head_candidates(files, None, HereQuantizer(), ["IQ2_XXS"])
    with pytest.raises(ValueError, match="unknown tensor type 'Q5_Z'"):
        head_candidates(files, None, HereQuantizer(), ["q5_z"])


def test_a_matrix_of_the_trunk_alone_says_how_to_collect() -> None:
    files = HeadFiles.read(TRAINED)
    ones = {
        name: imatrix.Entry(np.ones((int(np.prod(t.shape[2:])), t.shape[0])), [1])
        for name, t in files.trunk.tensors.items()
        if len(t.shape) > 1
    }
    trunk = ImportanceMatrix({k: v for k, v in ones.items() if not k.startswith("blk.4.")})
    found = head_candidates(files, trunk, HereQuantizer(), ["Q4_K", "IQ2_XXS"])
    assert [c.label for c in found.offered] == [AS_IT_IS, "Q4_K"]
    assert "none of the head: collect with mtp=True (--mtp)" in found.left_out["IQ2_XXS"]
    lacking = ImportanceMatrix({k: v for k, v in ones.items() if k != "blk.4.attn_q.weight"})
    found = head_candidates(files, lacking, HereQuantizer(), ["Q4_K", "IQ2_XXS"])
    assert found.left_out["IQ2_XXS"].endswith("none of blk.4.attn_q.weight")
    found = head_candidates(files, ImportanceMatrix(ones), HereQuantizer(), ["IQ2_XXS+Q5_K"])
    types = found.offered[1].types
    assert types["blk.4.attn_q.weight"] == types["blk.4.nextn.eh_proj.weight"] == "q5_K"
    assert types["blk.4.ffn_up_exps.weight"] == "iq2_xxs"


# --- the table and the choice ---------------------------------------------------------------------


def trial(label: str, rates: Sequence[float], chunks: int = 24, n: int = 100) -> HeadTrial:
    """Drafts of a head that agrees with the trunk by these shares, almost alike in every chunk."""
    judged, accepted = [], []
    for chunk in range(chunks):
        left = n
        judged.append([])
        accepted.append([])
        for rate in rates:
            hits = round(left * rate) + (chunk % 3 - 1 if left == n else 0)
            judged[-1].append(left)
            accepted[-1].append(hits)
            left = hits
    return HeadTrial(
        label=label,
        judged=tuple(map(tuple, judged)),
        accepted=tuple(map(tuple, accepted)),
    )


def table_of(rates: Mapping[str, Sequence[float]], **options: Any) -> HeadTable:
    files = HeadFiles.read(TRAINED)
    offered = head_candidates(files, None, HereQuantizer(), [r for r in rates if r != AS_IT_IS])
    return HeadTable(
        files, offered, {label: trial(label, each) for label, each in rates.items()}, {}, **options
    )


def test_the_figures_of_a_row() -> None:
    found = table_of({AS_IT_IS: [0.8, 0.5], "Q4_K": [0.6, 0.5]}, depth=2)
    row = found.row("q4_k")
    # 24 chunks whose ±1 cancel: 0.6, and of these the half
    assert row.accepted.value == pytest.approx(0.6 + 0.3, abs=1e-3)
    reads = read_of(TRAINED, row.candidate.types, {}, 2)
    expected = (1 + row.accepted.value) / (1 + reads.draft(2) / reads.trunk.of())
    assert row.speed_up.value == pytest.approx(expected, rel=1e-12)
    assert row.difference.value == pytest.approx(-0.3, abs=1e-3)
    assert row.difference.verdict == "worse"
    assert row.speed_up.low <= row.speed_up.value <= row.speed_up.high
    assert found.rows[0].difference.value == found.rows[0].difference.high == 0


def test_ties_go_to_fewer_bytes() -> None:
    """Q8_0 accepts more than Q4_K, but not enough to be read more; Q2_K accepts clearly less."""
    found = table_of(
        {AS_IT_IS: [0.8, 0.7], "Q8_0": [0.8, 0.7], "Q4_K": [0.8, 0.69], "Q2_K": [0.3, 0.3]}, depth=2
    )
    decision = found.choose("auto")
    assert not decision.drop
    assert decision.candidate is not None
    assert decision.candidate.label == "Q4_K"
    assert any(note.startswith("Q8_0 takes") for note in decision.notes)
    bought = found.buys("Q8_0", "Q4_K")
    assert bought.bytes == found.row("Q8_0").bytes - found.row("Q4_K").bytes
    assert bought.accepted.value == pytest.approx(0.8 * 0.01, abs=5e-3)  # whole tokens of 80
    for label in ("Q2_K", AS_IT_IS):
        asked = found.choose(label)
        assert asked.candidate is not None
        assert asked.candidate.label == label
    with pytest.raises(KeyError, match="IQ9 was not measured"):
        found.choose("IQ9")


def test_of_equal_speed_the_smaller_is_chosen() -> None:
    """Two types whose chunks differ by far more than the two do."""
    noisy = [0.5, 0.9] * 12
    found = {}
    for label, sign in ((AS_IT_IS, 1), ("Q5_K", 1), ("Q4_K", -1)):
        rates = [rate + 0.2 * sign * (-1) ** (k // 2) for k, rate in enumerate(noisy)]
        hits = tuple((min(100, round(100 * rate)),) for rate in rates)
        found[label] = HeadTrial(label=label, judged=((100,),) * 24, accepted=hits)
    files = HeadFiles.read(TRAINED)
    offered = head_candidates(files, None, HereQuantizer(), ["Q5_K", "Q4_K"])
    table = HeadTable(files, offered, found, {})
    assert table.buys("Q5_K", "Q4_K").speed_up.verdict == "no difference shown"
    chosen = table.choose().candidate
    assert chosen is not None
    assert chosen.label == "Q4_K"


def test_a_head_that_is_not_worth_it_is_dropped() -> None:
    found = table_of({AS_IT_IS: [0.1], "Q4_K": [0.1]})
    decision = found.choose()
    assert decision.drop
    assert decision.candidate is None
    assert "no type is shown to speed decoding up" in decision.why
    out = TRAINED.with_name(f"{TRAINED.stem}-no-mtp.gguf")
    assert decision.commands() == [f"imatrix drop-mtp {TRAINED} -o {out}"]
    assert found.choose("drop").drop
    # sizes without the head
    n = Counted(TRAINED)
    left = HeadFiles.read(TRAINED).trunk_names
    assert sum(n.bytes[name] for name in left) == sum(n.bytes.values()) - n.of("blk.4.")
    asked = found.choose("Q4_K")
    assert "not shown to be faster" in asked.why


def test_the_depth_is_the_one_that_pays() -> None:
    assert table_of({AS_IT_IS: [0.95, 0.95, 0.95], "Q4_K": [0.95, 0.95, 0.95]}).depth == 3
    assert table_of({AS_IT_IS: [0.8, 0.1, 0.1], "Q4_K": [0.8, 0.1, 0.1]}).depth == 1
    with pytest.raises(ValueError, match="depth must be 1 to 1"):
        table_of({AS_IT_IS: [0.5]}, depth=2)


def test_one_chunk_shows_nothing() -> None:
    files = HeadFiles.read(TRAINED)
    offered = Candidates(offered=(HeadCandidate(label=AS_IT_IS, types={}, bytes=1),), left_out={})
    table = HeadTable(files, offered, {AS_IT_IS: trial(AS_IT_IS, [0.5], chunks=1)}, {})
    assert math.isnan(table.rows[0].speed_up.low)
    with pytest.raises(ValueError, match="one chunk of text shows nothing"):
        table.choose()
    empty = HeadTrial(label=AS_IT_IS, judged=((0,),), accepted=((0,),))
    with pytest.raises(ValueError, match="too short"):
        HeadTable(files, offered, {AS_IT_IS: empty}, {})
    with pytest.raises(ValueError, match="no trial of the head as it is"):
        HeadTable(files, offered, {}, {})


def test_a_trial_goes_through_json() -> None:
    one = trial("Q4_K", [0.5, 0.2], chunks=3)
    assert HeadTrial.of_data(one.as_data()) == one
    with pytest.raises(ValueError, match="no trial of a head"):
        HeadTrial.of_data({"label": "Q4_K", "judged": [[1]]})


# --- measured in the loaded model -----------------------------------------------------------------

N_CTX, DEPTH = 64, 3


class Loaded:
    """Models that can be changed in place, with an evaluator."""

    def __init__(self, trunk: Path, head: Path | None = None) -> None:
        options: dict[str, Any] = {"n_gpu_layers": 0, "use_mmap": False, "check_tensors": False}
        self.trunk = engine.Model(str(trunk), mtp=head is None, changeable=True, **options)
        self.head = self.trunk
        if head is not None:
            self.head = engine.Model(str(head), mtp=True, changeable=True, **options)
        self.evaluator = engine.Evaluator(self.trunk, self.head)
        self.evaluator.open(n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, n_threads=1, depth=DEPTH)
        self.weights = engine.Weights(self.head)
        self.weights.set_threads(1)


def chunks_of(model: Path, text: str, n: int) -> list[Any]:
    """As evaluate() cuts them."""
    vocabulary = engine.Model(
        str(model), mtp=False, n_gpu_layers=0, use_mmap=False, check_tensors=False, no_alloc=True
    )
    return list(cut_tokens([text], vocabulary, N_CTX, max_chunks=n))


def counts(found: imatrix.Evaluation, depth: int) -> tuple[Any, Any]:
    """Judged and accepted drafts by chunk and depth, from the arrays of an evaluation."""
    return tuple(
        tuple(
            tuple(int((values[found.chunk == chunk] >= k).sum()) for k in range(1, depth + 1))
            for chunk in range(found.n_chunks)
        )
        for values in (found.known, found.accepted)
    )


def dequantized(source: Path, out: Path, types: Mapping[str, str], matrix: Any) -> Path:
    """A file that holds what llama_model_quantize makes of some tensors, as F32 again."""
    quantized = out.with_suffix(".quantized.gguf")
    numbers = quantizer.tensor_types()
    rules = [(f"^{name}$", numbers[kind][0]) for name, kind in types.items()]
    data = [
        (name, entry.importance.astype(np.float32).ravel())
        for name, entry in (matrix or {}).items()
    ]
    # Q8_0, because the engine heeds rules for quantized types only; the last one: all others F32
    f32 = numbers["f32"][0]
    made = Choice(
        ftype=FTYPES["Q8_0"],
        output_tensor_type=numbers[types.get("output.weight", "f32")][0],
        token_embedding_type=numbers[types.get("token_embd.weight", "f32")][0],
        tensor_types=(*rules, (".", f32)),
    )
    for of, to, choice in (
        (source, quantized, made),
        (quantized, out, Choice(ftype=FTYPES["F32"])),
    ):
        HereQuantizer().quantize(
            str(of), str(to), choice, n_threads=1, allow_requantize=True, matrix=data, unsaid=""
        )
    return out


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose head drafts well. F32: the CPU's own buffers keep F16 in an order of
    their own, and round otherwise; weights that are changed in place are never kept there, those of
    evaluate() are."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("mixture") / "m.gguf"
        return agreeing(path, "glm4moe", patch, blur=0.1, n_nextn=1, seed=7).path


@pytest.fixture(scope="module")
def data(mixture: Path) -> imatrix.ImportanceMatrix:
    with imatrix.Collector(mixture, n_ctx=N_CTX, rehearse=False) as collector:
        return collector.run([TEXT[20_000:]], mtp=True, max_chunks=2)


def test_the_head_in_place_drafts_as_one_in_a_file(
    mixture: Path, data: imatrix.ImportanceMatrix, tmp_path: Path
) -> None:
    """Also behind a trunk that was changed in place before."""
    chunks = chunks_of(mixture, TEXT, 3)
    files = HeadFiles.read(mixture)
    wanted = ["Q4_K", "Q3_K+Q8_0"]
    offered = head_candidates(files, data, HereQuantizer(), wanted)
    loaded = Loaded(mixture)
    trunk = {"blk.0.attn_q.weight": "q2_K", "blk.1.ffn_down_exps.weight": "q3_K"}
    numbers = quantizer.tensor_types()
    for name, kind in trunk.items():
        tensor = files.trunk.tensors[name]
        source = np.fromfile(tensor.path, np.uint8, tensor.size, offset=tensor.start)
        entry = data.get(name)
        importance = None if entry is None else entry.importance.astype(np.float32).ravel()
        loaded.weights.quantize(name, numbers[kind][0], source, importance)
    steps: list[tuple[int, int]] = []
    made: list[str] = []
    trials = measure_head(
        loaded.evaluator, loaded.weights, files, offered.offered, chunks, data, depth=DEPTH,
        done=lambda each: made.append(each.label), progress=lambda *n: steps.append(n),
    )  # fmt: skip
    assert made == list(trials) == [c.label for c in offered.offered]
    assert steps == [(n, 12) for n in range(1, 13)]

    table = HeadTable(files, offered, trials, trunk, depth=DEPTH)
    found = {}
    for candidate in offered.offered:
        types = trunk | dict(candidate.types)
        file = dequantized(mixture, tmp_path / f"{candidate.label}.gguf", types, data)
        found[candidate.label] = imatrix.evaluate(
            file, [np.concatenate(chunks)], n_ctx=N_CTX, depth=DEPTH, n_threads=1, rehearse=False
        )
        trial = trials[candidate.label]
        assert (trial.judged, trial.accepted) == counts(found[candidate.label], DEPTH)
        assert table.row(candidate.label).accepted == found[candidate.label].accepted_length
    compared = found["Q4_K"].compare(found[AS_IT_IS])
    assert table.row("Q4_K").difference == compared.accepted_length
    assert trials["Q3_K+Q8_0"].accepted != trials[AS_IT_IS].accepted

    # put back, bit for bit, and the trunk left as it was
    for name, tensor in files.trunk.tensors.items():
        source = np.fromfile(tensor.path, np.uint8, tensor.size, offset=tensor.start)
        assert loaded.weights.holds(name, source) == (name not in trunk)

    # what is known is not measured again
    again = measure_head(
        loaded.evaluator, loaded.weights, files, offered.offered, chunks, data, depth=DEPTH,
        known=trials, done=lambda each: made.append(each.label),
    )  # fmt: skip
    assert again == trials
    assert len(made) == 3
    with pytest.raises(ValueError, match="not of these 1 at depth 3"):
        measure_head(
            loaded.evaluator, loaded.weights, files, offered.offered, chunks[:1], data,
            depth=DEPTH, known=trials,
        )  # fmt: skip


def test_an_error_leaves_the_head_as_it_was(mixture: Path, data: imatrix.ImportanceMatrix) -> None:
    chunks = chunks_of(mixture, TEXT, 2)
    files = HeadFiles.read(mixture)
    offered = head_candidates(files, data, HereQuantizer(), ["Q2_K"])
    loaded = Loaded(mixture)

    def stop(done: int, total: int) -> None:
        if done == 5:  # amid the chunks of Q2_K
            raise KeyboardInterrupt

    made: dict[str, HeadTrial] = {}
    with pytest.raises(KeyboardInterrupt):
        measure_head(
            loaded.evaluator, loaded.weights, files, offered.offered, chunks, data, depth=DEPTH,
            done=lambda each: made.update({each.label: each}), progress=stop,
        )  # fmt: skip
    for tensor in files.trunk.all():
        source = np.fromfile(tensor.path, np.uint8, tensor.size, offset=tensor.start)
        assert loaded.weights.holds(tensor.name, source)
    assert list(made) == [AS_IT_IS]
    rest = measure_head(
        loaded.evaluator, loaded.weights, files, offered.offered, chunks, data, depth=DEPTH,
        known=made,
    )  # fmt: skip
    fresh = Loaded(mixture)
    assert rest == measure_head(
        fresh.evaluator, fresh.weights, files, offered.offered, chunks, data, depth=DEPTH
    )


@pytest.mark.parametrize("case", ["own file", "chain", "shares memory"])
def test_other_heads_in_place(
    case: str, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head's own file, with its LM head; two heads in a chain; one that shares the trunk's memory."""
    head: Path | None = None
    deepest = DEPTH
    if case == "chain":
        trunk = agreeing(
            tmp_path / "m.gguf", "hy_v3", monkeypatch, blur=0.1, n_nextn=2, seed=6
        ).path
        deepest = 2
    elif case == "own file":
        trunk, head = tmp_path / "trunk.gguf", tmp_path / "head.gguf"
        imatrix.extract_mtp(mixture, head, trunk_out=trunk)
    else:
        trunk = make_any(tmp_path / "g.gguf", "gemma4", n_nextn=0, seed=1, n_embd=512).path
        head = make_any(tmp_path / "a.gguf", "gemma4-assistant", n_nextn=2, seed=2).path
    files = HeadFiles.read(trunk, head)
    offered = head_candidates(files, None, HereQuantizer(), ["Q2_K+Q8_0", "IQ2_XXS"])
    assert list(offered.left_out) == ["IQ2_XXS"]
    candidate = offered.offered[1]
    chunks = chunks_of(trunk, TEXT, 2)
    loaded = Loaded(trunk, head)
    trials = measure_head(
        loaded.evaluator, loaded.weights, files, offered.offered, chunks, None, depth=DEPTH
    )
    source = trunk if head is None else head
    made = dequantized(source, tmp_path / "made.gguf", candidate.types, None)
    for label, file in ((AS_IT_IS, source), (candidate.label, made)):
        found = imatrix.evaluate(
            trunk if head else file, [np.concatenate(chunks)], n_ctx=N_CTX,
            mtp_model=file if head else None,
            depth=DEPTH, n_threads=1, rehearse=False,
        )  # fmt: skip
        assert found.depth == deepest
        assert (trials[label].judged, trials[label].accepted) == counts(found, deepest)
    table = HeadTable(files, offered, trials, {})
    [*commands] = table.choose(candidate.label).commands()
    if head is None:
        assert commands == []
    else:
        # the command gives the head's file these types
        arguments = shlex.split(commands[0])
        assert arguments[:3] == ["imatrix", "quantize", str(head)]
        assert main(arguments[1:]) == 0
        reader = gguf.GGUFReader(arguments[3])
        got = {t.name: t.tensor_type.name for t in reader.tensors if t.name in candidate.types}
        assert got == {name: kind.upper() for name, kind in candidate.types.items()}
        assert table.choose("drop").commands() == []  # without its file there is no head


def test_the_printed_table(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {AS_IT_IS: [0.8, 0.7], "Q8_0": [0.8, 0.7], "Q4_K": [0.8, 0.69]}
    table = table_of(rates, depth=2)
    print_head_table(Terminal(), table, table.choose())
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert [line[0] for line in lines if line[0] in ("as", *rates)] == ["as", "Q8_0", "Q4_K"]
    [chosen] = [line for line in out.splitlines() if "*" in line]
    row = table.row("Q4_K")
    assert f"Q4_K * {row.bytes / 1024:.1f} KiB" in " ".join(chosen.split())
    assert f"{row.accepted.value:.2f} ({row.accepted.low:.2f} to {row.accepted.high:.2f})" in chosen
    assert "the head is Q4_K: " in err
    assert "Q8_0 takes" in err

    dropped = table_of({AS_IT_IS: [0.1], "Q4_K": [0.1]})
    print_head_table(Terminal(), dropped, dropped.choose())
    out, err = capsys.readouterr()
    assert "*" not in out
    assert "imatrix drop-mtp" in err
