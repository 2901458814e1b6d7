"""Settings are refused when they are made, and cross every border between processes unchanged."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest

from imatrix.engine.placement import Placement
from imatrix.engine.settings import Batch, ModelOptions, SessionSettings

# none of these values is a default, so that a value that is left out shows
SETTINGS = SessionSettings(
    n_ctx=96,
    batch=Batch(3, 48, 24),
    n_threads=5,
    process_output=True,
    perplexity=True,
    signed_sums=False,
    device_sums=False,
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"n_ctx": 1}, "n_ctx must be 2 or more, got 1"),
        ({"batch": Batch(1, 8, 0)}, "n_ubatch must be 1 or more, got 0"),
        ({"batch": Batch(0, 8, 8)}, "n_seq must be 1 or more, got 0"),
        ({"batch": Batch(1, 0, 8)}, "n_batch must be 1 or more, got 0"),
        ({"batch": Batch(3, 2, 8)}, "n_batch must be 3 or more, got 2"),
        ({"n_threads": 0}, "n_threads must be 1 or more, got 0"),
        ({"mtp": True}, r"mtp=True needs n_seq=1.* n_seq=3.*Set n_seq=1\."),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **changed)


def test_the_head_runs_alone() -> None:
    assert dataclasses.replace(SETTINGS, mtp=True, batch=Batch(1, 48, 24)).mtp


def test_as_data() -> None:
    assert SETTINGS.as_data() == {
        "n_ctx": 96,
        "n_batch": 48,
        "n_ubatch": 24,
        "n_seq": 3,
        "n_threads": 5,
        "mtp": False,
        "process_output": True,
        "perplexity": True,
        "signed_sums": False,
        "device_sums": False,
    }


@pytest.mark.parametrize(
    "settings", [SETTINGS, SessionSettings(n_ctx=8, batch=Batch(1, 8, 8), n_threads=1, mtp=True)]
)
def test_settings_come_back_from_json(settings: SessionSettings) -> None:
    assert SessionSettings.from_data(json.loads(json.dumps(settings.as_data()))) == settings


@pytest.mark.parametrize(
    ("batch", "whole"),
    [
        (Batch(3, 48, 24), Batch(3, 288, 288)),  # 3 chunks of 96 tokens
        (Batch(3, 300, 24), Batch(3, 300, 288)),
        (Batch(1, 96, 512), Batch(1, 96, 512)),
    ],
)
def test_whole_chunks(batch: Batch, whole: Batch) -> None:
    settings = dataclasses.replace(SETTINGS, batch=batch)
    assert settings.with_whole_chunks() == dataclasses.replace(SETTINGS, batch=whole)


def test_n_gpu_layers_is_a_number_or_auto() -> None:
    assert ModelOptions(model="a.gguf", n_gpu_layers="auto").n_gpu_layers == "auto"
    with pytest.raises(ValueError, match="n_gpu_layers must be a number or 'auto', got 'most'"):
        ModelOptions(model="a.gguf", n_gpu_layers="most")  # type: ignore[arg-type]


def test_settings_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SETTINGS.n_ctx = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelOptions("a.gguf")  # type: ignore[misc]
    with pytest.raises(TypeError):
        SessionSettings(8, Batch(1, 8, 8), 1)  # type: ignore[misc]


def test_settings_are_unpickled_without_the_native_engine() -> None:
    """The scheduler of a cluster unpacks what it passes on."""
    options = ModelOptions(
        model="a.gguf",
        placement=Placement.of(tensor_split=[1, 2], override_tensor={"exps": "CPU"}),
        isolate=True,
    )
    unpack = (
        "import pickle, sys; print(pickle.load(sys.stdin.buffer));"
        "print([name for name in sys.modules if name.startswith('imatrix.native')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", unpack],
        input=pickle.dumps((options, SETTINGS)),
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().splitlines() == [repr((options, SETTINGS)), "[]"]
