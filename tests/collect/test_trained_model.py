"""The model that ships: the engine computes what the code that trained it says it computes.

PyTorch computed the figures beside the model in float64 from the file's own, rounded weights
(benchmarks/train_model.py verify), with no part of the engine. If they come out again here,
tokenizer, graph, pairing of the head, and scoring are right from end to end.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

import imatrix

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "src" / "imatrix" / "data"
MODEL = DATA / "tiny-glm4moe-mtp.gguf"
COMMITTED = json.loads(MODEL.with_suffix(".json").read_text(encoding="utf-8"))
TEXTS = {"held-out": "held-out.txt", "held-out-prose": "held-out-prose.txt"}


@pytest.fixture(scope="module", params=TEXTS)
def measured(request: pytest.FixtureRequest) -> tuple[imatrix.Evaluation, dict[str, Any]]:
    text = (DATA / TEXTS[request.param]).read_text(encoding="utf-8")
    return imatrix.evaluate(MODEL, text), COMMITTED["figures"][request.param]


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/corpus.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("corpus", ROOT / "benchmarks" / "corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "corpus", module)
    spec.loader.exec_module(module)
    return module


def by_chunk(values: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    return np.bincount(chunk, values) / np.bincount(chunk)


@pytest.mark.slow
def test_the_engine_reads_the_text_as_the_tokenizers_library_does(
    measured: tuple[imatrix.Evaluation, dict[str, Any]],
) -> None:
    found, torch = measured
    assert found.n_chunks == torch["n_chunks"]
    assert found.digest == torch["tokens_sha256"]


def test_trunk_and_head_are_pytorchs(
    measured: tuple[imatrix.Evaluation, dict[str, Any]],
) -> None:
    found, torch = measured
    assert found.head is not None
    for name, rows in (("trunk_nll", found.trunk), ("head_nll", found.head)):
        # The engine rounds each matmul's input to F16 and keeps keys and values in F16 (relative
        # steps of 2^-11), which moves a position's NLL by some 1e-3 and a chunk's mean over 255 of
        # them by far less. A row that a near tie sends to another expert moves more, but alone. If
        # the head were fed h[p] instead of h[p-1], its NLL would be off by whole nats.
        np.testing.assert_allclose(
            by_chunk(rows.nll, found.chunk), torch["by_chunk"][name], atol=5e-3
        )
    assert found.nll.value == pytest.approx(torch["nll"], abs=5e-4)
    assert found.head_nll is not None
    assert found.head_nll.value == pytest.approx(torch["head_nll"], abs=5e-4)


def test_the_drafts_are_pytorchs(
    measured: tuple[imatrix.Evaluation, dict[str, Any]],
) -> None:
    found, torch = measured
    same = by_chunk((found.accepted >= 1).astype(float), found.chunk)
    # The same rounding may change which of the two likeliest tokens is first if they are nearly
    # tied, in trunk or head: at a few of a chunk's 255 positions, and at some per mille of all.
    np.testing.assert_allclose(same, torch["by_chunk"]["agreement"], atol=4 / 255)
    assert found.draft[0].value == pytest.approx(torch["agreement"], abs=2e-3)


def test_the_trunk_is_better_than_its_head_and_the_head_than_chance(
    measured: tuple[imatrix.Evaluation, dict[str, Any]],
) -> None:
    found, _ = measured
    assert found.head is not None
    assert found.head_nll is not None
    assert found.chance is not None
    # position by position, so that no hard chunk hides a bad one
    assert (found.head.nll - found.trunk.nll).mean() > 0.1
    assert found.nll.value < 0.6 * np.log(found.n_vocab)
    assert found.draft[0].low > found.chance + 0.3
    assert len(found.draft) == 3
    assert not found.head_is_dead


def test_the_file_is_small_and_fits_every_low_bit_type() -> None:
    assert MODEL.stat().st_size <= 10_000_000
    reader = gguf.GGUFReader(MODEL)
    assert reader.fields["general.architecture"].contents() == "glm4moe"
    names = {tensor.name for tensor in reader.tensors}
    assert {"blk.0.ffn_up.weight", "blk.3.ffn_up_exps.weight", "blk.3.ffn_up_shexp.weight"} <= names
    assert "blk.4.nextn.eh_proj.weight" in names
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        matrix = len(tensor.shape) >= 2 and "ffn_gate_inp" not in tensor.name
        assert kind == (gguf.GGMLQuantizationType.F16 if matrix else gguf.GGMLQuantizationType.F32)
        # QK_K of ggml-common.h; the shape is the file's, rows first
        assert not matrix or tensor.shape[0] % 256 == 0
        assert np.isfinite(np.asarray(tensor.data, dtype=np.float64)).all()


def test_training_kept_to_its_bounds() -> None:
    training = COMMITTED["training"]
    assert training["minutes"] <= 90
    assert training["threads"] == 2
    assert training["cpu_minutes"] <= 2 * 90


def windows(text: str, size: int = 200) -> set[str]:
    return {text[i : i + size] for i in range(len(text) - size + 1)}


def test_held_out_text_is_in_no_other_text(corpus: ModuleType) -> None:
    """The texts are those of this machine's standard library. The tables and the training text need
    the library's tests, which some distributions leave out, so the split is also tried on a made-up
    library."""
    held = {name: (DATA / file).read_text(encoding="utf-8") for name, file in TEXTS.items()}
    held_out = windows(held["held-out"]) | windows(held["held-out-prose"])
    assert not windows(held["held-out"]) & windows(held["held-out-prose"])
    others = [(DATA / "calibration.txt").read_text(encoding="utf-8")]
    others += [corpus.text(name) for name in ("code", "prose")]
    for other in others:
        assert not any(other[i : i + 200] in held_out for i in range(len(other) - 199))


def test_the_split_keeps_copies_of_held_out_text_apart(
    corpus: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)

    def prose(n: int) -> str:
        return "".join(f"name_{i} = {i * i}\n" for i in rng.integers(0, 10**9, n))

    licence = prose(20)
    library, data = tmp_path / "library", tmp_path / "data"
    (library / "test").mkdir(parents=True)
    data.mkdir()
    for i in range(40):
        # every fourth module carries the same licence, which therefore may not be held out
        (library / f"m{i}.py").write_text((licence if i % 4 == 0 else "") + prose(300))
        (library / "test" / f"test_m{i}.py").write_text(prose(100))
    monkeypatch.setattr(corpus, "_library", lambda: library)
    monkeypatch.setattr(corpus, "DATA", data)
    monkeypatch.setattr(corpus, "_HELD_OUT_BYTES", 30_000)
    monkeypatch.setattr(corpus, "_CALIBRATION_BYTES", 50_000)
    held = "\n\n".join(corpus.documents("held-out"))
    assert len(held) >= 30_000
    assert licence not in held
    (data / "held-out.txt").write_text(held)
    (data / "held-out-prose.txt").write_text("\n\n".join(corpus.documents("held-out-prose")))
    # A copy that a later library has under another name is removed from training because of its
    # text.
    copied = held[1_000:1_300]
    (library / "test" / "test_copy.py").write_text(prose(100) + copied + prose(100))
    corpus._sources.cache_clear()
    corpus._split.cache_clear()
    corpus.documents.cache_clear()
    train = corpus.text("train")
    assert len(train) > 100_000
    assert copied[:200] not in train
    assert not windows(held) & (windows(train) | windows(corpus.text("code")))
    assert not windows(train) & windows(corpus.text("code")) - windows(licence)
    with pytest.raises(ValueError, match="no text named 'poems'"):
        corpus.documents("poems")
