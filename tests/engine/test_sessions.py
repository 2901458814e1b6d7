"""Sessions end with their models, whoever still holds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.forge import ModelSpec
from helpers.running import Forged

from imatrix.engine.models import Models
from imatrix.engine.settings import Batch, ModelOptions, SessionSettings
from imatrix.native import engine

N_CTX = 16
TOKENS = np.arange(N_CTX, dtype=np.int32)
LENGTHS = np.array([N_CTX], dtype=np.int32)


def settings(**changed: Any) -> SessionSettings:
    return SessionSettings(n_ctx=N_CTX, batch=Batch(1, N_CTX, N_CTX), n_threads=1, **changed)


@pytest.fixture(scope="module")
def headed(forged: Forged) -> ModelSpec:
    return forged("glm4moe", seed=3, n_nextn=1)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_session_is_closed_with_its_models(headed: ModelSpec, isolate: bool) -> None:
    before = engine.live_objects()
    models = Models(ModelOptions(model=headed.path, rehearse=False, isolate=isolate), n_ctx=N_CTX)
    models.load(settings())
    session = models.open(settings())
    session.step(TOKENS, LENGTHS)
    assert session.counts()["blk.0.attn_q.weight"].tolist() == [N_CTX]
    models.free()
    # nothing native is left, though the session is still held here
    assert engine.live_objects() == before
    assert session.snapshot() == {}
    assert session.counts() == {}
    assert session.groups() == []
    assert session.counters == {}
    session.cancel()
    session.clear_cancel()
    for call in (
        lambda: session.step(TOKENS, LENGTHS),
        session.clear_sums,
        lambda: session.restore(["blk.0.attn_q.weight"], np.zeros(4), np.ones(1, np.int64)),
        lambda: session.plan,
        lambda: session.memory,
    ):
        with pytest.raises(ValueError, match="this session is closed"):
            call()


def test_a_model_that_is_loaded_anew_is_not_held_twice(headed: ModelSpec) -> None:
    before = engine.live_objects()
    models = Models(ModelOptions(model=headed.path, rehearse=False), n_ctx=N_CTX)
    models.load(settings())
    session = models.open(settings())
    models.load(settings(mtp=True))  # the head is in the same file
    assert engine.live_objects()["models"] == before["models"] + 1
    assert engine.live_objects()["sessions"] == before["sessions"]
    with pytest.raises(ValueError, match="this session is closed"):
        session.step(TOKENS, LENGTHS)
    models.free()


def test_a_session_that_nobody_holds_is_gone(headed: ModelSpec) -> None:
    before = engine.live_objects()
    models = Models(ModelOptions(model=headed.path, rehearse=False), n_ctx=N_CTX)
    models.load(settings())
    models.open(settings())
    assert engine.live_objects()["sessions"] == before["sessions"]
    first, second = models.open(settings()), models.open(settings())
    models.close_sessions()
    assert engine.live_objects()["sessions"] == before["sessions"]
    assert first.counts() == second.counts() == {}
    assert models.open(settings()).counts() == {}  # the model is still loaded
    models.free()
