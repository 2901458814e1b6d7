"""Interrupted runs that continue give the same bits as a whole run, or are refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.forge import ModelSpec, make_model
from helpers.forge_any import make_any
from helpers.running import Forged
from helpers.runs import (
    N_CTX,
    SEED,
    Enough,
    assert_same_data,
    poisoned,
    saved,
    stop_at,
    token_chunks,
)

import imatrix
from imatrix import CheckpointError, Collector, ImportanceMatrix, LeftOut, NonFiniteError
from imatrix.collect import keeper
from imatrix.formats import FormatError
from imatrix.formats import checkpoint as file
from imatrix.native import engine
from imatrix.text.progress import Progress

N_CHUNKS = 5


@pytest.fixture(scope="module")
def headed(forged: Forged) -> ModelSpec:
    """Experts and a head: there are groups that share rows, and weights that do not see every
    chunk."""
    return forged("glm4moe", seed=SEED, n_nextn=1)


def collector(spec: ModelSpec | Path, **options: Any) -> Collector:
    path = spec.path if isinstance(spec, ModelSpec) else spec
    return Collector(path, **{"n_ctx": N_CTX, "n_threads": 1, "rehearse": False, **options})


# --- to the bit ----------------------------------------------------------------------------------


def test_at_every_chunk(headed: ModelSpec, tmp_path: Path) -> None:
    chunks = token_chunks(headed, N_CHUNKS)
    options = {"mtp": True, "perplexity": True}
    with collector(headed) as made:
        whole = made.run(chunks, **options)
        expected = saved(whole, tmp_path)
        perplexity = made.perplexity
    for n in range(1, N_CHUNKS + 1):
        path = tmp_path / f"{n}.checkpoint"
        with collector(headed) as made, pytest.raises(Enough):
            made.run(chunks, checkpoint=path, progress=stop_at(n), **options)
        assert file.read(path).done == n
        reports: list[Progress] = []
        with collector(headed) as made:
            matrix = made.run(chunks, checkpoint=path, progress=reports.append, **options)
            assert made.perplexity == perplexity
        assert matrix == whole
        assert saved(matrix, tmp_path) == expected
        assert {at.resumed for at in reports} == {n}
        assert [at.chunks for at in reports] == list(range(n, N_CHUNKS + 1))
        assert [at.tokens for at in reports] == [at.chunks * N_CTX for at in reports]
        assert file.read(path).done == N_CHUNKS


def test_across_several_interruptions(headed: ModelSpec, tmp_path: Path) -> None:
    chunks = token_chunks(headed, N_CHUNKS)
    path = tmp_path / "checkpoint"
    with collector(headed) as made:
        whole = made.run(chunks, mtp=True)
    for n in (1, 3, 4):
        with collector(headed) as made, pytest.raises(Enough):
            made.run(iter(chunks), mtp=True, checkpoint=path, progress=stop_at(n))
    with collector(headed) as made:
        assert made.run(iter(chunks), mtp=True, checkpoint=path) == whole
        # a run that is done gives its matrix again without running anything
        assert made.run(iter(chunks), mtp=True, checkpoint=path) == whole
        # and starts again from zero if that is asked for
        reports: list[Progress] = []
        again = made.run(chunks, mtp=True, checkpoint=path, restart=True, progress=reports.append)
        assert again == whole
        assert [(at.chunks, at.resumed) for at in reports] == [
            (n, 0) for n in range(1, N_CHUNKS + 1)
        ]


def test_chunks_side_by_side(headed: ModelSpec, tmp_path: Path) -> None:
    chunks = token_chunks(headed, 8)
    options = {"skip_chunks": 1, "process_output": True}
    with collector(headed, n_seq=3) as made:
        whole = made.run(chunks, **options)
    for n in (3, 6, 7):
        path = tmp_path / f"{n}.checkpoint"
        with collector(headed, n_seq=3) as made, pytest.raises(Enough):
            made.run(chunks, checkpoint=path, progress=stop_at(n), **options)
        with collector(headed, n_seq=3) as made:
            assert made.run(chunks, checkpoint=path, **options) == whole


def test_text_is_tokenized_again(headed: ModelSpec, prose: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with collector(headed) as made:
        whole = made.run(prose, max_chunks=4)
        with pytest.raises(Enough):
            made.run(prose, max_chunks=4, checkpoint=path, progress=stop_at(2))
        reports: list[Progress] = []
        again = made.run(prose, max_chunks=4, checkpoint=path, progress=reports.append)
    assert again == whole
    assert [(at.chunks, at.total) for at in reports] == [(2, 4), (3, 4), (4, 4)]


def test_a_head_of_its_own_kind(tmp_path: Path) -> None:
    """gemma4-assistant: its names say whose they are."""
    trunk = make_any(tmp_path / "gemma4.gguf", "gemma4", n_nextn=0, seed=1, n_embd=512).path
    head = make_any(tmp_path / "head.gguf", "gemma4-assistant", n_nextn=2, seed=2).path
    chunks = np.random.default_rng(0).integers(0, 64, (3, N_CTX)).tolist()
    options = {"mtp_model": head}
    path = tmp_path / "checkpoint"
    with collector(trunk, **options) as made:
        whole = made.run(chunks, mtp=True)
        whole_head = made.mtp_matrix
    assert whole_head
    with collector(trunk, **options) as made, pytest.raises(Enough):
        made.run(chunks, mtp=True, checkpoint=path, progress=stop_at(1))
    with collector(trunk, **options) as made:
        assert made.run(chunks, mtp=True, checkpoint=path) == whole
        assert made.mtp_matrix == whole_head


def test_more_threads_go_on(headed: ModelSpec, tmp_path: Path) -> None:
    """The number of threads, mapping, devices and the file's place may change."""
    chunks = token_chunks(headed, 3)
    path = tmp_path / "checkpoint"
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(headed.path.read_bytes())
    with collector(headed) as made, pytest.raises(Enough):
        made.run(chunks, checkpoint=path, progress=stop_at(2))
    elsewhere = {"devices": [], "override_tensor": {"ffn": "CPU"}, "n_gpu_layers": 0}
    with collector(moved, n_threads=2, use_mmap=False, **elsewhere) as made:
        matrix = made.run(chunks, checkpoint=path)
    with collector(headed) as made:
        whole = made.run(chunks)
    for name, entry in whole.items():
        assert np.array_equal(matrix[name].counts, entry.counts)
        assert np.allclose(matrix[name].sums, entry.sums, rtol=1e-3)


# --- when it is written --------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "at"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (0, [5])])
def test_every_so_many_chunks(
    every: int,
    at: list[int],
    headed: ModelSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = counted(monkeypatch)
    with collector(headed) as made:
        made.run(
            token_chunks(headed, 5), checkpoint=tmp_path / "checkpoint", checkpoint_every=every
        )
    assert written == at


def test_every_so_many_minutes(
    headed: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = counted(monkeypatch)
    monkeypatch.setattr(keeper, "_SECONDS", 0.0)
    with collector(headed) as made:
        made.run(token_chunks(headed, 3), checkpoint=tmp_path / "checkpoint", checkpoint_every=0)
    assert written == [1, 2, 3]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of chunks in every checkpoint that is written from here on."""
    written: list[int] = []
    write = file.write

    def counting(checkpoint: file.Checkpoint, path: Any) -> None:
        written.append(checkpoint.done)
        write(checkpoint, path)

    monkeypatch.setattr(file, "write", counting)
    return written


def test_a_disk_that_is_full_is_a_warning(headed: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "gone" / "checkpoint"
    chunks = token_chunks(headed, 2)
    with collector(headed) as made:
        with pytest.warns(UserWarning, match=r"cannot write the checkpoint .*does not exist"):
            matrix = made.run(chunks, checkpoint=path)
        assert matrix == made.run(chunks)


# --- refused -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(headed: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two chunks of five."""
    path = tmp_path_factory.mktemp("resume") / "run.checkpoint"
    with collector(headed) as made, pytest.raises(Enough):
        made.run(token_chunks(headed, N_CHUNKS), mtp=True, checkpoint=path, progress=stop_at(2))
    return path


@pytest.mark.parametrize(
    ("made_with", "run_with", "says"),
    [
        ({"n_ctx": 16}, {}, "n_ctx is 32 there and 16 here"),
        ({"n_batch": 16}, {}, "n_batch is 32 there and 16 here"),
        ({"n_ubatch": 16}, {}, "n_ubatch is 512 there and 16 here"),
        ({"n_seq": 2}, {"mtp": False}, "n_seq is 1 there and 2 here; mtp is True there and False"),
        ({}, {"process_output": True}, "process_output is False there and True here"),
        ({}, {"perplexity": True}, "perplexity is False there and True here"),
        ({}, {"parse_special": True}, "parse_special is False there and True here"),
        ({}, {"skip_chunks": 1}, "skip_chunks is 0 there and 1 here"),
        ({}, {"max_chunks": 4}, "max_chunks is -1 there and 4 here"),
    ],
)
def test_other_settings(
    made_with: dict[str, Any],
    run_with: dict[str, Any],
    says: str,
    headed: ModelSpec,
    interrupted: Path,
) -> None:
    before = interrupted.read_bytes()
    with (
        collector(headed, **made_with) as made,
        pytest.raises(CheckpointError, match=rf"of another run: .*{says}.*restart=True"),
    ):
        made.run(
            token_chunks(headed, N_CHUNKS), **{"mtp": True, **run_with}, checkpoint=interrupted
        )
    assert interrupted.read_bytes() == before


def test_another_model(headed: ModelSpec, interrupted: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other.gguf", "glm4moe", seed=SEED + 1, n_nextn=1)
    with collector(other) as made, pytest.raises(CheckpointError, match="model_fingerprint is"):
        made.run(token_chunks(headed, N_CHUNKS), mtp=True, checkpoint=interrupted)


def test_another_version(
    headed: ModelSpec, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imatrix.engine.identity.__version__", "99.0")
    with (
        collector(headed) as made,
        pytest.raises(CheckpointError, match=r"collector is imatrix \S+ there and imatrix 99\.0"),
    ):
        made.run(token_chunks(headed, N_CHUNKS), mtp=True, checkpoint=interrupted)


def test_another_text(headed: ModelSpec, prose: str, interrupted: Path, tmp_path: Path) -> None:
    chunks = token_chunks(headed, N_CHUNKS)
    chunks[1][7] ^= 1
    with collector(headed) as made:
        with pytest.raises(CheckpointError, match=r"another text: the first 2 chunks differ"):
            made.run(chunks, mtp=True, checkpoint=interrupted)
        with pytest.raises(CheckpointError, match=r"2 chunks of it are done, this one has 1\."):
            made.run(token_chunks(headed, 1), mtp=True, checkpoint=interrupted)
        # what is still to come is compared if it is known
        path = tmp_path / "checkpoint"
        with pytest.raises(Enough):
            made.run(prose, checkpoint=path, progress=stop_at(1))
        with pytest.raises(CheckpointError, match=r"text_digest is \w{16}\.\.\. there and"):
            made.run(prose[:-50] + prose[-50:].upper(), checkpoint=path)


def test_a_damaged_checkpoint(headed: ModelSpec, interrupted: Path, tmp_path: Path) -> None:
    whole = interrupted.read_bytes()
    path = tmp_path / "checkpoint"
    for content in (b"", b"plain text", whole[: len(whole) // 2], whole[:200]):
        path.write_bytes(content)
        with (
            collector(headed) as made,
            pytest.raises(CheckpointError, match=r"cannot go on from .*--restart"),
        ):
            made.run(token_chunks(headed, N_CHUNKS), mtp=True, checkpoint=path)
        assert path.read_bytes() == content
    with collector(headed) as made:
        made.run(token_chunks(headed, 2), checkpoint=path, restart=True)
    assert file.read(path).done == 2


def test_a_matrix_is_no_checkpoint(headed: ModelSpec, interrupted: Path, tmp_path: Path) -> None:
    path = tmp_path / "matrix.gguf"
    with collector(headed) as made:
        made.run(token_chunks(headed, 1)).save(path)
        with pytest.raises(CheckpointError, match=r"expected .*'imatrix-checkpoint', .*'imatrix'"):
            made.run(token_chunks(headed, 1), checkpoint=path)
    with pytest.raises(FormatError, match=r"expected .*'imatrix', .*'imatrix-checkpoint'"):
        ImportanceMatrix.load(interrupted)


# --- the file ------------------------------------------------------------------------------------


def test_others_can_read_it(headed: ModelSpec, interrupted: Path) -> None:
    """It is read with gguf-py alone: float64 sums and int64 counts, each weight's own or shared
    ones."""
    with collector(headed) as made:
        matrix = made.run(token_chunks(headed, 2), mtp=True)
    reader = gguf.GGUFReader(interrupted)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    contents = {name: field.contents() for name, field in reader.fields.items()}
    assert contents["general.type"] == "imatrix-checkpoint"
    assert contents["imatrix.checkpoint.done"] == 2
    assert contents["imatrix.checkpoint.tokens"] == 2 * N_CTX
    assert contents["imatrix.checkpoint.setting.n_ctx"] == N_CTX
    assert contents["imatrix.checkpoint.setting.mtp"] is True
    whose = dict(
        zip(
            contents["imatrix.checkpoint.shared.weights"],
            contents["imatrix.checkpoint.shared.with"],
            strict=True,
        )
    )
    assert whose["blk.1.ffn_up_exps.weight"] == "blk.1.ffn_gate_exps.weight" or (
        whose["blk.1.ffn_gate_exps.weight"] == "blk.1.ffn_up_exps.weight"
    )
    assert len(tensors) == 3 * (len(matrix) - len(whose))
    for name, entry in matrix.items():
        sums = tensors[f"{whose.get(name, name)}.in_sum2"]
        counts = tensors[f"{whose.get(name, name)}.counts"]
        assert sums.tensor_type == gguf.GGMLQuantizationType.F64
        assert counts.tensor_type == gguf.GGMLQuantizationType.I64
        assert np.array_equal(sums.data, entry.sums)
        assert counts.data.reshape(-1).tolist() == entry.counts.tolist()


def test_all_of_it_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    sums = np.array([[1 / 3, 2**-1074, 1e308], [0.0, 5.0, np.pi]])
    checkpoint = file.Checkpoint(
        done=2**40,
        tokens=2**50 + 1,
        seconds=0.1,
        nll=np.e,
        nll_sq=1 / 7,
        scored=2**33,
        text_digest="0f",
        settings={"a": True, "b": -1, "c": "", "d": 2**62, "e": "§ text"},
        left_out=(LeftOut(3, 2**34, "blk.0.attn_q.weight"),),
        groups=[
            (["x", "y"], sums, np.array([2**53 + 1, 0]), -sums),
            (["z"], sums[:1], np.array([7]), None),
        ],
    )
    file.write(checkpoint, path)
    found = file.read(path)
    for name in ("done", "tokens", "seconds", "nll", "nll_sq", "scored", "text_digest"):
        assert getattr(found, name) == getattr(checkpoint, name)
    assert found.settings == checkpoint.settings
    assert type(found.settings["a"]) is bool
    assert found.left_out == checkpoint.left_out
    assert [names for names, *_ in found.groups] == [["x", "y"], ["z"]]
    assert [signed is None for *_, signed in found.groups] == [False, True]
    assert found.groups[0][3].tobytes() == (-sums).tobytes()
    for (_, a, b, _), (_, c, d, _) in zip(found.groups, checkpoint.groups, strict=True):
        assert a.tobytes() == c.tobytes()
        assert a.shape == c.shape
        assert b.tolist() == d.tolist()
    # and a checkpoint without data, if every chunk so far was left out
    file.write(file.Checkpoint(1, 0, 0.0, 0.0, 0.0, 0, "", {}), path)
    assert file.read(path).groups == []


# --- chunks left out -----------------------------------------------------------------------------


@pytest.fixture
def rotten(headed: ModelSpec, tmp_path: Path) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A model with NaN in one token's embedding; seven chunks, of which numbers 2 and 5 have that
    token; and the other five chunks."""
    path = poisoned(headed, tmp_path, "token_embd.weight", 77, 41)
    chunks = [[token if token != 77 else 78 for token in one] for one in token_chunks(headed, 7)]
    chunks[2][20] = chunks[5][3] = 77
    return path, chunks, [chunk for i, chunk in enumerate(chunks) if i not in (2, 5)]


def test_skip(
    rotten: tuple[Path, list[list[int]], list[list[int]]], headed: ModelSpec, tmp_path: Path
) -> None:
    path, chunks, good = rotten
    with collector(headed) as made:
        expected = made.run(good, mtp=True, perplexity=True)
        perplexity = made.perplexity
    with collector(path) as made:
        with pytest.warns(UserWarning, match=r"left out .*chunk 2 \(from token 64, at blk\.0\."):
            matrix = made.run(chunks, mtp=True, perplexity=True, on_nonfinite="skip")
        assert made.perplexity == perplexity
    assert_same_data(matrix, expected)
    assert matrix.provenance is not None
    assert expected.provenance is not None
    found = matrix.provenance.left_out
    assert [(one.chunk, one.token) for one in found] == [(2, 2 * N_CTX), (5, 5 * N_CTX)]
    assert {one.weight for one in found} <= {f"blk.0.attn_{x}.weight" for x in "qkv"}
    assert matrix.provenance.dataset_digest == expected.provenance.dataset_digest
    # the file has it too, and so does the matrix read from it
    matrix.save(tmp_path / "matrix.gguf")
    again = ImportanceMatrix.load(tmp_path / "matrix.gguf")
    assert again.provenance == matrix.provenance
    assert (again + again).provenance.left_out == found + found  # type: ignore[union-attr]


@pytest.mark.parametrize("n_seq", [1, 3])
def test_skip_and_resume(
    n_seq: int, rotten: tuple[Path, list[list[int]], list[list[int]]], tmp_path: Path
) -> None:
    """The run stops at the first NaN, is told to skip it, and is interrupted anywhere: the result
    is that of one run that skips."""
    path, chunks, _ = rotten
    with collector(path, n_seq=n_seq) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = made.run(chunks, skip_chunks=1, on_nonfinite="skip")
        for n in range(1, 5):
            checkpoint = tmp_path / f"{n}.checkpoint"
            with pytest.raises(NonFiniteError, match=r"in chunk 2 .*on_nonfinite='skip'") as caught:
                made.run(chunks, skip_chunks=1, checkpoint=checkpoint)
            assert caught.value.chunk == 2
            assert file.read(checkpoint).done == 1
            options = {"skip_chunks": 1, "on_nonfinite": "skip", "checkpoint": checkpoint}
            with pytest.raises(Enough):
                made.run(chunks, progress=stop_at(n), **options)
            assert made.run(chunks, **options) == whole
    assert whole.chunk_count == 4
    assert whole.provenance is not None
    assert [one.chunk for one in whole.provenance.left_out] == [2, 5]


def test_bad_arguments(headed: ModelSpec) -> None:
    with collector(headed) as made:
        with pytest.raises(ValueError, match="on_nonfinite must be 'stop' or 'skip', got 'go'"):
            made.run([[1, 2]], on_nonfinite="go")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="checkpoint_every must be 0 or more, got -1"):
            made.run([[1, 2]], checkpoint_every=-1)
    assert issubclass(imatrix.CheckpointError, ValueError)


# --- the native side -----------------------------------------------------------------------------


def test_weights_that_shared_their_rows_may_come_back_alone(
    headed: ModelSpec, interrupted: Path, tmp_path: Path
) -> None:
    """As after a run whose groups fell apart: the first chunk notices it and is computed again."""
    found = file.read(interrupted)
    assert any(len(names) > 1 for names, *_ in found.groups)
    alone = [([name], *data) for names, *data in found.groups for name in names]
    path = tmp_path / "alone.checkpoint"
    file.write(replace(found, groups=alone), path)
    with collector(headed) as made:
        whole = made.run(token_chunks(headed, N_CHUNKS), mtp=True)
        assert made.run(token_chunks(headed, N_CHUNKS), mtp=True, checkpoint=path) == whole
    assert len(file.read(path).groups) == len(alone)


def test_nothing_is_put_back_twice(headed: ModelSpec) -> None:
    model = engine.Model(
        str(headed.path), mtp=False, n_gpu_layers=0, use_mmap=True, check_tensors=False
    )
    session = engine.Session(model)
    sums, counts = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([5, 0])
    session.restore(["a", "b"], sums, counts)
    [(names, found_sums, found_counts, signed)] = session.groups()
    assert signed is None  # none was given any
    assert names == ["a", "b"]
    assert (found_sums.tolist(), found_counts.tolist()) == (sums.tolist(), [5, 0])
    with pytest.raises(ValueError, match="has sums already"):
        session.restore(["c", "a"], sums, counts)
    assert set(session.snapshot()) == {"a", "b"}
    with pytest.raises(ValueError, match="do not fit together"):
        session.restore(["c"], sums, np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="sums and signed sums do not fit together"):
        session.restore(["c"], sums, counts, sums[:1])
    session.restore(["c"], sums, counts, -sums)
    assert session.snapshot()["c"][2].tolist() == (-sums).tolist()
