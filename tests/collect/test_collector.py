"""What a Collector does and what it refuses, on small models made for these tests."""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import engine_tools, oracle
from helpers.forge import Arch, ModelSpec, make_model
from helpers.forge_any import make_any
from helpers.running import Forged
from helpers.runs import N_CTX, SEED, assert_same_data, poisoned, token_chunks

import imatrix
from imatrix import Collector, ImportanceMatrix, ModelError, NonFiniteError
from imatrix.native import engine
from imatrix.text.progress import Progress


@pytest.fixture(scope="module")
def plain(forged: Forged) -> ModelSpec:
    """A trunk and no head."""
    return forged("llama", seed=SEED)


@pytest.fixture(scope="module")
def headed(forged: Forged) -> ModelSpec:
    return forged("qwen35", seed=SEED, n_nextn=1)


@pytest.fixture(autouse=True)
def _nothing_is_left_over() -> Iterator[None]:
    """Every test gives back the native sessions that it made, whatever it did to them."""
    gc.collect()
    before = engine.live_objects()
    yield
    gc.collect()
    assert engine.live_objects() == before


def collector(spec: ModelSpec | Path, **options) -> Collector:
    path = spec.path if isinstance(spec, ModelSpec) else spec
    return Collector(path, **{"n_ctx": N_CTX, "n_threads": 1, **options})


# --- the first minute ----------------------------------------------------------------------------


def test_the_two_lines_of_the_readme(headed: ModelSpec, prose: str, tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text(prose[:6000], encoding="ascii")
    with imatrix.Collector(headed.path) as made, text.open(encoding="ascii") as file:
        matrix = made.run(file, mtp=True)
    matrix.save(tmp_path / "imatrix.gguf")

    n_chunks = len(headed.encode(prose[:6000])) // 512
    assert n_chunks >= 2
    assert (matrix.chunk_count, matrix.chunk_size) == (n_chunks, 512)
    assert matrix["blk.2.nextn.eh_proj.weight"].counts.tolist() == [n_chunks * 511]
    assert matrix.datasets == (str(text),)
    assert set(ImportanceMatrix.load(tmp_path / "imatrix.gguf")) == set(matrix)


def test_what_a_model_says_of_itself(headed: ModelSpec, plain: ModelSpec) -> None:
    with collector(headed) as made:
        assert (made.architecture, made.n_trunk, made.n_nextn) == ("qwen35", 2, 1)
        assert made.n_vocab == headed.hparams.n_vocab
    with collector(plain) as made:
        assert (made.architecture, made.n_trunk, made.n_nextn) == ("llama", 2, 0)


def test_tokenize(plain: ModelSpec, forged: Forged, prose: str) -> None:
    with collector(plain) as made:
        assert made.tokenize(prose).tolist() == plain.encode(prose)
    bos = forged("llama", seed=SEED, add_bos=True)
    assert bos.tokenizer is not None
    with collector(bos) as made:
        assert made.tokenize("the").tolist() == [bos.tokenizer.bos, *bos.encode("the")]
        assert made.tokenize("the", add_special=False).tolist() == bos.encode("the")
        assert made.tokenize("<|begin|>", add_special=False, parse_special=True).tolist() == [
            bos.tokenizer.bos
        ]
        spelled = made.tokenize("<|begin|>", add_special=False).tolist()
        assert spelled == bos.encode("<|begin|>")


def test_provenance_and_digest(headed: ModelSpec) -> None:
    chunks = token_chunks(headed, 3)
    with collector(headed) as made:
        matrix = made.run(chunks, mtp=True)
        trunk = made.run(chunks)
    tokens = np.concatenate([np.asarray(chunk, dtype="<i4") for chunk in chunks])
    found = matrix.provenance
    assert found is not None
    assert found.dataset_digest == hashlib.sha256(tokens.tobytes()).hexdigest()
    assert found.mtp is True
    assert found.n_ctx == N_CTX
    assert found.collector == f"imatrix {imatrix.__version__}"
    pin = engine_tools.pin()
    assert found.engine == f"llama.cpp {pin['engine']} ({pin['build']})"
    assert trunk.provenance is not None
    assert trunk.provenance.mtp is False
    assert trunk.provenance.dataset_digest == found.dataset_digest


def test_digest_is_of_what_was_fed(forged: Forged) -> None:
    """BOS replaces the first token of a chunk; skipped chunks and the tail are left out."""
    spec = forged("llama", seed=SEED, add_bos=True)
    assert spec.tokenizer is not None
    stream = np.arange(3 * N_CTX + 5, dtype="<i4")
    with collector(spec) as made:
        matrix = made.run([stream], skip_chunks=1)
    fed = stream[N_CTX : 3 * N_CTX].copy()
    fed[[0, N_CTX]] = spec.tokenizer.bos
    assert matrix.provenance is not None
    assert matrix.provenance.dataset_digest == hashlib.sha256(fed.tobytes()).hexdigest()


def test_a_short_text_is_one_short_chunk(headed: ModelSpec) -> None:
    tokens = headed.encode("the walked carried")
    assert 2 <= len(tokens) < N_CTX
    with collector(headed) as made:
        matrix = made.run("the walked carried", mtp=True)
    assert matrix.chunk_count == 1
    assert {tuple(entry.counts) for entry in matrix.trunk.values()} == {(len(tokens),)}
    # slot 0 fills the head's cache and is not counted
    assert {tuple(entry.counts) for entry in matrix.head.values()} == {(len(tokens) - 1,)}


def test_every_run_starts_from_zero(headed: ModelSpec) -> None:
    a, b = token_chunks(headed, 2, seed=1), token_chunks(headed, 2, seed=2)
    with collector(headed) as made:
        first = made.run(a, mtp=True)
        second = made.run(b)
        third = made.run(a, mtp=True)
        assert_same_data(made.matrix, third)
    assert_same_data(first, third)
    assert second.head_blocks == frozenset()
    with collector(headed) as made:
        assert_same_data(made.run(b), second)


def test_one_file_many_collectors(plain: ModelSpec) -> None:
    chunks = token_chunks(plain, 2)
    with collector(plain) as one, collector(plain) as two:
        one.run(chunks)
        two.run(chunks, process_output=True)
        assert "output.weight" not in one.matrix
        assert "output.weight" in two.matrix


def test_a_stream_is_taken_as_it_is_needed(plain: ModelSpec) -> None:
    taken = itertools.count()
    stream = (chunk for chunk in itertools.repeat([7] * N_CTX) if next(taken) >= 0)
    totals = []
    with collector(plain) as made:
        matrix = made.run(stream, max_chunks=3, progress=lambda at: totals.append(at.total))
    assert matrix.chunk_count == 3
    assert next(taken) == 3  # it takes as many items as chunks: nothing is read ahead of the limit
    assert totals == [None] * 3


def test_a_stream_of_texts_is_one_text(plain: ModelSpec, prose: str) -> None:
    words = prose.split(" ")
    pieces = [words[0], *(f" {word}" for word in words[1:])]  # cut where the tokenizer cuts
    with collector(plain) as made:
        whole = made.run(prose, max_chunks=4)
        parts = made.run(iter(pieces), max_chunks=4)
    assert_same_data(whole, parts)


def test_progress(plain: ModelSpec, prose: str) -> None:
    seen: list[Progress] = []
    with collector(plain) as made:
        made.run(prose, max_chunks=3, perplexity=True, progress=seen.append)
        assert seen[-1].perplexity == made.perplexity
    assert [(at.chunks, at.total, at.tokens) for at in seen] == [
        (n, 3, n * N_CTX) for n in (1, 2, 3)
    ]
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(seen))
    assert [at.perplexity.n_scored for at in seen if at.perplexity] == [
        n * (N_CTX // 2 - 1) for n in (1, 2, 3)
    ]


def test_the_matrix_during_a_run(plain: ModelSpec) -> None:
    chunks = token_chunks(plain, 3)
    with collector(plain) as made:
        during: list[ImportanceMatrix] = []
        made.run(chunks, progress=lambda _: during.append(made.matrix))
        for n in (1, 2, 3):
            assert_same_data(during[n - 1], made.run(chunks, max_chunks=n))


def test_perplexity_is_none_unless_asked_for(plain: ModelSpec) -> None:
    with collector(plain) as made:
        made.run(token_chunks(plain, 1))
        assert made.perplexity is None


def test_perplexity_of_a_known_model(plain: ModelSpec) -> None:
    """The expected value is the oracle's, over the second half of the chunk."""
    chunks = token_chunks(plain, 2)
    logits = oracle.run(plain, chunks, kv_dtype=np.float16).logits
    nll = np.concatenate(
        [oracle.nll(rows, chunk)[N_CTX // 2 :] for rows, chunk in zip(logits, chunks, strict=True)]
    )
    with collector(plain) as made:
        made.run(chunks, perplexity=True)
        found = made.perplexity
    assert found is not None
    assert found.n_scored == len(nll)
    # float32 logits, attention in float16: 1e-3 nats at most, on the mean much less
    assert np.log(found.value) == pytest.approx(nll.mean(), abs=1e-3)


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_ctx": 1}, "n_ctx must be 2 or more, got 1"),
        ({"n_ctx": 0}, "n_ctx must be 2 or more, got 0"),
        ({"n_batch": 0}, "n_batch must be 1 or more, got 0"),
        ({"n_batch": 2, "n_seq": 3}, "n_batch must be 3 or more, got 2"),
        ({"n_ubatch": 0}, "n_ubatch must be 1 or more, got 0"),
        ({"n_seq": 0}, "n_seq must be 1 or more, got 0"),
        ({"n_threads": 0}, "n_threads must be 1 or more, got 0"),
    ],
)
def test_bad_numbers(options: dict[str, int], says: str, plain: ModelSpec) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        collector(plain, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_chunks": 0}, "max_chunks must be 1 or more"),
        ({"skip_chunks": -1}, "skip_chunks must be 0 or more"),
    ],
)
def test_bad_numbers_of_a_run(options: dict[str, int], says: str, plain: ModelSpec) -> None:
    with collector(plain) as made, pytest.raises(ValueError, match=says):
        made.run([[1, 2, 3]], **options)


def test_the_head_wants_one_sequence(headed: ModelSpec) -> None:
    with (
        collector(headed, n_seq=2) as made,
        pytest.raises(ValueError, match=r"mtp=True needs n_seq=1.* n_seq=2.*Set n_seq=1\."),
    ):
        made.run(token_chunks(headed, 2), mtp=True)


def test_the_native_session_refuses_it_too(headed: ModelSpec) -> None:
    """keep_rows() in ext/contexts.cpp would give a chunk's first slots another chunk's rows."""
    model = engine.Model(
        str(headed.path), mtp=True, n_gpu_layers=0, use_mmap=True, check_tensors=False
    )
    session = engine.Session(model, model)
    settings = {
        "n_ctx": 64, "n_batch": 128, "n_ubatch": 128, "n_threads": 1, "mtp": True,
        "process_output": False, "perplexity": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"one chunk at a time: n_seq must be 1, got 2"):
        session.open(n_seq=2, **settings)
    session.open(n_seq=1, **settings)


def test_sequences_side_by_side(headed: ModelSpec) -> None:
    """Five chunks, three at a time, give the same names and counts as one at a time."""
    chunks = token_chunks(headed, 5)
    with collector(headed, n_seq=3) as made:
        matrix = made.run(chunks)
    assert matrix.chunk_count == 5
    assert {tuple(entry.counts) for entry in matrix.values()} == {(5 * N_CTX,)}


def test_mtp_false_is_final(headed: ModelSpec) -> None:
    with (
        collector(headed, mtp=False) as made,
        pytest.raises(ValueError, match="made with mtp=False"),
    ):
        made.run(token_chunks(headed, 1), mtp=True)


def test_mtp_without_a_head_is_a_warning(plain: ModelSpec) -> None:
    chunks = token_chunks(plain, 1)
    with collector(plain) as made:
        with pytest.warns(UserWarning, match=r"\(llama\) has no MTP head .*trunk only"):
            matrix = made.run(chunks, mtp=True)
        assert_same_data(matrix, made.run(chunks))
    assert matrix.provenance is not None
    assert matrix.provenance.mtp is False


def test_n_ctx_beyond_the_training_is_a_warning(forged: Forged) -> None:
    spec = forged("llama", seed=SEED, n_ctx_train=16)
    with (
        collector(spec) as made,
        pytest.warns(UserWarning, match=r"n_ctx=32 is more than the 16 tokens"),
    ):
        made.run(token_chunks(spec, 1))


def test_no_text(plain: ModelSpec) -> None:
    with collector(plain) as made:
        for empty in ("", [], [""], [[]]):
            with pytest.raises(ValueError, match="no tokens"):
                made.run(empty)
        with pytest.raises(ValueError, match="1 token only"):
            made.run([[3]])
        with pytest.raises(ValueError, match="nothing is left after skipping 4 chunks"):
            made.run(token_chunks(plain, 4), skip_chunks=4)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_out_of_range(token: int, plain: ModelSpec) -> None:
    with collector(plain) as made:
        with pytest.raises(ValueError, match=rf"texts\[0\]\[1\]: token id {token} is out of range"):
            made.run([[3, token, 4]])
        # later in a stream, the chunks that were complete by then stay
        chunks = token_chunks(plain, 4)
        with pytest.raises(ValueError, match=rf"texts\[4\]\[0\]: token id {token}"):
            made.run([*chunks, [token] * N_CTX])
        kept = made.matrix
        assert kept.chunk_count >= 1
        assert_same_data(made.run(chunks, max_chunks=kept.chunk_count), kept)


def test_no_tokenizer(forged: Forged) -> None:
    spec = forged("llama", seed=SEED, tokenizer=None)
    with collector(spec) as made:
        for text in ("some text", ["some", "text"]):
            with pytest.raises(ModelError, match=r"no tokenizer.*give token lists"):
                made.run(text)
        with pytest.raises(ModelError, match="no tokenizer"):
            made.tokenize("text")
        assert made.run(token_chunks(spec, 1)).chunk_count == 1


# --- the end of its life -------------------------------------------------------------------------


def test_closed(plain: ModelSpec) -> None:
    before = engine.live_objects()
    made = collector(plain)
    made.run(token_chunks(plain, 1))
    assert engine.live_objects()["sessions"] == before["sessions"] + 1
    made.close()
    made.close()
    assert engine.live_objects() == before
    with pytest.raises(ValueError, match="closed"):
        made.run(token_chunks(plain, 1))
    with pytest.raises(ValueError, match="closed"):
        made.tokenize("text")


def test_an_open_one_says_so_when_it_is_collected(plain: ModelSpec) -> None:
    made = collector(plain)
    made.run(token_chunks(plain, 1))
    holder = [made]
    del made
    with pytest.warns(ResourceWarning, match="was never closed"):
        holder.clear()


def test_a_closed_one_and_a_failed_one_say_nothing(plain: ModelSpec, tmp_path: Path) -> None:
    # warnings are errors here; those of __del__ arrive through the unraisable hook
    collector(plain).close()
    with pytest.raises(FileNotFoundError):
        Collector(tmp_path / "missing.gguf")
    with pytest.raises(ValueError, match="n_ctx"):
        collector(plain, n_ctx=1)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(plain.path.read_bytes()[:-1000])
    for mtp in (True, False):  # the model is loaded at once
        with pytest.raises(ModelError):
            collector(cut, mtp=mtp)
    gc.collect()


# --- files that are not what they should be ------------------------------------------------------


def test_missing_file_and_folder(tmp_path: Path) -> None:
    missing = tmp_path / "missing.gguf"
    with pytest.raises(FileNotFoundError, match="no such model file") as caught:
        Collector(missing)
    assert caught.value.filename == str(missing)
    with pytest.raises(IsADirectoryError, match="expected a GGUF model file"):
        Collector(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GG", b"plain text, no model\n" * 50])
def test_not_gguf(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(str(path))):
        Collector(path)


def test_an_importance_matrix_is_not_a_model(plain: ModelSpec, tmp_path: Path) -> None:
    with collector(plain) as made:
        made.run(token_chunks(plain, 1)).save(tmp_path / "matrix.gguf")
    with pytest.raises(ModelError, match="not a model"):
        Collector(tmp_path / "matrix.gguf")


@pytest.mark.parametrize("part", [0.00001, 0.0005, 0.002, 0.3, 0.9, 0.9999])
def test_truncated(part: float, plain: ModelSpec, tmp_path: Path) -> None:
    """The file is cut in the magic, in the keys, in the list of tensors and in the data."""
    whole = plain.path.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: max(3, int(part * len(whole)))])
    with pytest.raises(ModelError, match=re.escape(str(path))), collector(path) as made:
        made.run([[1, 2, 3]])


@pytest.mark.parametrize("arch", ["glm4moe", "qwen35"])
@pytest.mark.parametrize(
    ("drop", "first"),
    [
        ("blk.2.*", "nextn.eh_proj"),
        ("blk.2.nextn.enorm.*", "nextn.enorm"),
        ("*hnorm*", "nextn.hnorm"),
    ],
)
def test_a_head_in_the_keys_only(arch: Arch, drop: str, first: str, forged: Forged) -> None:
    spec = forged(arch, seed=SEED, n_nextn=1, drop=(drop,))
    says = rf"blk\.2\.{first}\.weight is missing"
    with collector(spec) as made:
        assert made.n_nextn == (0 if first == "nextn.eh_proj" else 1)
        with pytest.raises(ModelError, match=says):
            made.run(token_chunks(spec, 1), mtp=True)
    with pytest.raises(ModelError, match=says):
        collector(spec, mtp=True)


@pytest.mark.engine(
    "src/llama-model.cpp", "a file without a head's eh_proj is a trunk (nextn_flags)"
)
@pytest.mark.parametrize("arch", ["glm4moe", "qwen35"])
def test_the_trunk_of_a_file_without_its_head(arch: Arch, forged: Forged) -> None:
    """The engine takes such a file for a trunk (nextn_flags in src/llama-model.cpp)."""
    spec = forged(arch, seed=SEED, n_nextn=1, drop=("blk.2.*",))
    chunks = token_chunks(spec, 2)
    with collector(spec) as made, collector(forged(arch, seed=SEED, n_nextn=1)) as whole:
        assert_same_data(made.run(chunks), whole.run(chunks))


@pytest.mark.parametrize("arch", ["glm4moe", "qwen35"])
@pytest.mark.parametrize(
    "name", ["attn_q.weight", "attn_output.weight", "post_attention_norm.weight"]
)
def test_a_head_without_one_of_its_tensors(arch: Arch, name: str, forged: Forged) -> None:
    spec = forged(arch, seed=SEED, n_nextn=1, drop=(f"blk.2.{name}",))
    with collector(spec) as made, pytest.raises(ModelError, match=re.escape(f"blk.2.{name}")):
        made.run(token_chunks(spec, 1), mtp=True)


@pytest.mark.engine(
    "src/models/deepseek4.cpp", "the loader asks for a head's tensors even to skip them"
)
def test_the_engine_wants_a_head_it_skips(tmp_path: Path) -> None:
    """deepseek4's file lacks the block of the head, which the engine then counts as a block of the
    trunk (load_arch_hparams in src/models/deepseek4.cpp): the file is refused before it is
    loaded."""
    model = make_any(tmp_path / "m.gguf", "deepseek4", drop=("blk.3.*",))
    with pytest.raises(ModelError, match=r"blk\.3\.nextn\.eh_proj\.weight is missing.*drop-mtp"):
        Collector(model.path, n_ctx=N_CTX, n_threads=1)


def test_keys_that_contradict_each_other(tmp_path: Path) -> None:
    spec = make_model(
        tmp_path / "many.gguf", "glm4moe", metadata={"glm4moe.nextn_predict_layers": 7}
    )
    with pytest.raises(ModelError, match="nextn_predict_layers is 7, block_count is 2"):
        collector(spec)


def in_parts(spec: ModelSpec, folder: Path) -> list[Path]:
    """The model in several files, as gguf-split writes them: every key in the first."""
    reader = gguf.GGUFReader(spec.path)
    writer = gguf.GGUFWriter(folder / "model.gguf", spec.arch, split_max_tensors=8)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("*.gguf"))


def test_a_model_in_parts(headed: ModelSpec, tmp_path: Path) -> None:
    parts = in_parts(headed, tmp_path)
    assert len(parts) > 2
    chunks = token_chunks(headed, 2)
    with collector(headed) as whole, collector(parts[0]) as made:
        assert made.n_nextn == 1
        assert_same_data(made.run(chunks, mtp=True), whole.run(chunks, mtp=True))
    with pytest.raises(ModelError, match=r"part 2 of \d+; give the first part"):
        collector(parts[1])
    parts[1].unlink()
    with pytest.raises(ModelError, match=re.escape(f"{parts[1]} is missing")):
        collector(parts[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_names_weight_chunk_and_channel(value: float, plain: ModelSpec, tmp_path: Path) -> None:
    """One channel of one token's embedding is not finite; the norm spreads it to the whole row, an
    infinity as NaN in that channel and as 0 elsewhere."""
    token, channel = 77, 41
    path = poisoned(plain, tmp_path, "token_embd.weight", token, channel, value=value)
    chunks = [[token + 1] * N_CTX, [token + 2] * N_CTX, [token] * N_CTX, [token + 3] * N_CTX]
    with collector(path) as made:
        with pytest.raises(NonFiniteError, match="NaN or infinite activation") as caught:
            made.run([[1] * N_CTX, *chunks], skip_chunks=1)
        error = caught.value
        assert error.weight in {f"blk.0.attn_{x}.weight" for x in "qkv"}
        assert error.chunk == 3  # in the text, the skipped one counted
        assert error.channel == (0 if np.isnan(value) else channel)
        assert error.expert is None
        for part in (error.weight, "chunk 3", f"channel {error.channel}", "the 2 before it"):
            assert part in str(error)
        kept = made.matrix
        assert kept.chunk_count == 2
        # and the Collector can run again
        assert_same_data(made.run(chunks[:2]), kept)


def test_nan_in_the_middle_of_a_model(plain: ModelSpec, tmp_path: Path) -> None:
    path = poisoned(plain, tmp_path, "blk.1.ffn_up.weight", 300)
    with collector(path) as made:
        with pytest.raises(NonFiniteError) as caught:
            made.run(token_chunks(plain, 2))
        assert (caught.value.weight, caught.value.channel) == ("blk.1.ffn_down.weight", 300)
        assert caught.value.chunk == 0
        # a chunk counts wholly or not at all: the rows of its first layers do not count either
        assert len(made.matrix) == 0
        assert made.matrix.chunk_count == 0


def test_nan_in_one_expert(forged: Forged, tmp_path: Path) -> None:
    """The error appears in the first chunk that has a token for that expert; the oracle knows
    which."""
    spec = forged("glm4moe", seed=SEED, n_nextn=1)
    chunks = token_chunks(spec, 6, n_ctx=4)
    used = [
        oracle.run(spec, [chunk]).entries["blk.1.ffn_down_exps.weight"].counts > 0
        for chunk in chunks
    ]
    first_use = np.argmax(used, axis=0)
    expert = int(first_use.argmax())
    first = int(first_use[expert])
    assert first >= 1, "every expert is used by the first chunk: take shorter ones"
    path = poisoned(spec, tmp_path, "blk.1.ffn_up_exps.weight", expert, 200)
    with collector(path, n_ctx=4) as made:
        with pytest.raises(NonFiniteError, match=f"expert {expert}, channel 200") as caught:
            made.run(chunks)
        error = caught.value
        assert error.weight == "blk.1.ffn_down_exps.weight"
        assert (error.chunk, error.expert, error.channel) == (first, expert, 200)
        kept = made.matrix
    with collector(spec, n_ctx=4) as made:
        assert_same_data(made.run(chunks, max_chunks=first), kept)


def test_nan_in_the_head(forged: Forged, tmp_path: Path) -> None:
    spec = forged("glm4moe", seed=SEED, n_nextn=1)
    path = poisoned(spec, tmp_path, "blk.2.ffn_up_shexp.weight", 17)
    chunks = token_chunks(spec, 1)
    with collector(path) as made:
        with pytest.raises(NonFiniteError) as caught:
            made.run(chunks, mtp=True)
        assert (caught.value.weight, caught.value.channel) == ("blk.2.ffn_down_shexp.weight", 17)
        assert len(made.matrix) == 0  # the trunk's rows of that chunk are discarded with it
        trunk = made.run(chunks)
    with collector(spec) as made:
        assert_same_data(made.run(chunks), trunk)


# --- stopping ------------------------------------------------------------------------------------


def test_ctrl_c_between_two_chunks(headed: ModelSpec) -> None:
    chunks = token_chunks(headed, 6)

    def press(at: Progress) -> None:
        if at.chunks == 2:
            signal.raise_signal(signal.SIGINT)

    with collector(headed) as made:
        with pytest.raises(KeyboardInterrupt):
            made.run(chunks, mtp=True, progress=press)
        kept = made.matrix
        assert kept.chunk_count == 2
        assert_same_data(made.run(chunks, mtp=True, max_chunks=2), kept)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals to a thread are POSIX")
def test_ctrl_c_at_any_moment(headed: ModelSpec) -> None:
    """The text has no end, only the interrupt ends the run."""
    chunk = token_chunks(headed, 1, n_ctx=256)[0]
    main = threading.main_thread().ident
    assert main is not None
    timers: list[threading.Timer] = []

    def start_timer(at: Progress) -> None:
        if at.chunks == 1:
            timers.append(threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)))
            timers[0].start()

    with collector(headed, n_ctx=256) as made:
        with pytest.raises(KeyboardInterrupt):
            made.run(itertools.repeat(chunk), mtp=True, progress=start_timer)
        timers[0].join()
        kept = made.matrix
        assert kept.chunk_count >= 1
        again = made.run(itertools.repeat(chunk), mtp=True, max_chunks=kept.chunk_count)
        assert_same_data(again, kept)


def test_an_exception_of_progress_ends_the_run(plain: ModelSpec) -> None:
    chunks = token_chunks(plain, 5)

    def fail(at: Progress) -> None:
        if at.chunks == 3:
            raise RuntimeError("enough")

    with collector(plain) as made:
        with pytest.raises(RuntimeError, match=r"^enough$"):
            made.run(chunks, progress=fail)
        kept = made.matrix
        assert kept.chunk_count == 3
        assert_same_data(made.run(chunks, max_chunks=3), kept)


def test_an_exception_of_the_stream_ends_the_run(plain: ModelSpec) -> None:
    chunks = token_chunks(plain, 3)

    def stream() -> Iterator[list[int]]:
        yield from chunks
        raise OSError("the disk is gone")

    with collector(plain) as made:
        with pytest.raises(OSError, match="the disk is gone"):
            made.run(stream())
        kept = made.matrix
        # the stream is read ahead while a chunk runs, and that chunk must not count
        assert 1 <= kept.chunk_count <= 3
        assert_same_data(made.run(chunks, max_chunks=kept.chunk_count), kept)


# --- what the engine says ------------------------------------------------------------------------


def test_the_engine_speaks_to_a_logger(
    plain: ModelSpec,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level(logging.INFO, logger="imatrix.engine"), collector(plain) as made:
        made.run(token_chunks(plain, 1))
    lines = [record.getMessage() for record in caplog.records if record.name == "imatrix.engine"]
    assert any("llama_model_loader" in line and str(plain.path) in line for line in lines)
    assert not any(line.endswith("\n") for line in lines)
    assert capfd.readouterr() == ("", "")


def test_a_plain_run_is_silent(headed: ModelSpec, capfd: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, where nobody has set up logging: nothing on stdout, and on stderr
    nothing of a run that went well."""
    code = (
        "import sys, imatrix\n"
        f"with imatrix.Collector({str(headed.path)!r}, n_ctx=64) as made:\n"
        "    made.run([[1, 2, 3] * 50], mtp=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert capfd.readouterr() == ("", "")


def test_the_trunk_alone_is_silent_too(headed: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    """The user asked to leave out the head, so the engine's lines about its tensors are no news."""
    with caplog.at_level(logging.WARNING, logger="imatrix.engine"), collector(headed) as made:
        made.run(token_chunks(headed, 1))
    assert [r.getMessage() for r in caplog.records if r.name == "imatrix.engine"] == []
