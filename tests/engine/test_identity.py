"""What a run is compared by: the names and values in checkpoint files."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.forge import ModelSpec
from helpers.running import Forged

import imatrix
from imatrix.engine.identity import (
    describe_differences_of_runs,
    describe_differences_of_work,
    differences_of_runs,
    identity_of_run,
    identity_of_work,
)
from imatrix.engine.models import Models
from imatrix.engine.settings import Batch, ModelOptions, SessionSettings
from imatrix.model.header import ModelFile

SETTINGS = SessionSettings(
    n_ctx=32, batch=Batch(1, 24, 16), n_threads=3, mtp=True, perplexity=True, signed_sums=False
)
ASKED: dict[str, Any] = {
    "parse_special": False,
    "skip_chunks": 2,
    "max_chunks": None,
    "min_expert_rows": None,
    "block": None,
    "part": None,
}


@pytest.fixture(scope="module")
def headed(forged: Forged) -> ModelSpec:
    return forged("glm4moe", seed=3, n_nextn=1)


@pytest.fixture(scope="module")
def models(headed: ModelSpec) -> Models:
    return Models(ModelOptions(model=headed.path), n_ctx=32)


def test_work(headed: ModelSpec, models: Models) -> None:
    assert identity_of_work(models, SETTINGS) == {
        "collector": f"imatrix {imatrix.__version__}",
        "engine": imatrix.backends().engine,
        "model_size": headed.path.stat().st_size,
        "model_fingerprint": ModelFile.read(headed.path).fingerprint(),
        "n_ctx": 32,
        "n_batch": 24,
        "n_ubatch": 16,
        "n_seq": 1,
    }


def test_a_run_has_the_names_of_checkpoints_in_their_order(models: Models) -> None:
    """Files of earlier versions have these names, and `going on from` names differences in this
    order."""
    text = {
        "packing": "document",
        "on_bad_record": "skip",
        "seed": 7,
        "weights": "1.0 2.0",
        "chat": "ab",
        "text_tokens": 9,
        "text_digest": "cd",
    }
    asked = {**ASKED, "max_chunks": 5, "min_expert_rows": 4, "block": 6, "part": 3}
    found = identity_of_run(models, SETTINGS, text, **asked)
    work = identity_of_work(models, SETTINGS)
    assert list(found) == [*work, *["mtp", "process_output", "signed_sums", "parse_special", "perplexity", "skip_chunks", "max_chunks", "block", "part", "packing", "on_bad_record", "min_expert_rows", "seed", "weights", "chat", "text_tokens", "text_digest"]]  # fmt: skip
    assert found == {
        **work,
        **text,
        "mtp": True,
        "process_output": False,
        "signed_sums": False,
        "parse_special": False,
        "perplexity": True,
        "skip_chunks": 2,
        "max_chunks": 5,
        "block": 6,
        "part": 3,
        "min_expert_rows": 4,
    }


def test_what_is_the_default_is_left_out(models: Models) -> None:
    """Otherwise a checkpoint of a version that did not know the setting would not be accepted."""
    found = identity_of_run(models, SETTINGS, {}, **ASKED)
    assert found["max_chunks"] == -1
    assert not {"block", "part", "min_expert_rows"} & set(found)
    assert "part" not in identity_of_run(models, SETTINGS, {}, **{**ASKED, "block": 6, "part": 6})


@pytest.mark.parametrize(
    ("there", "here", "names"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ["b"]),
        ({"a": 1}, {"b": 1}, ["a", "b"]),
        # only one of the two knows its text as a whole
        ({"text_tokens": 9}, {}, []),
        ({}, {"text_digest": "ab"}, []),
        ({"text_tokens": 9}, {"text_tokens": 8}, ["text_tokens"]),
        # a run that ended at a bad record may continue and skip it
        ({}, {"on_bad_record": "skip"}, []),
        ({"on_bad_record": "skip"}, {}, ["on_bad_record"]),
    ],
)
def test_differences_of_runs(there: dict[str, Any], here: dict[str, Any], names: list[str]) -> None:
    assert differences_of_runs(there, here) == names


def test_in_words() -> None:
    there, here = {"a": 1, "long": "x" * 64}, {"b": True, "long": "y" * 64}
    assert describe_differences_of_runs(["a", "long", "b"], there, here) == (
        f"a is 1 there and absent here; long is {'x' * 16}... there and {'y' * 16}... here; "
        "b is absent there and True here"
    )
    # only the work that is asked for here counts, and values are compared as a whole
    assert describe_differences_of_work(there, here) == (
        f"b is absent there and True here; long is {'x' * 64} there and {'y' * 64} here"
    )
    assert describe_differences_of_work({"a": 1, "b": 2}, {"a": 1}) == ""
