"""What run() was asked is refused when it is asked, before a model is read."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from imatrix.collect.options import RunOptions, checkpoint_interval
from imatrix.collect.preparation import wanted_batch
from imatrix.engine.settings import Wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "go"}, "on_nonfinite must be 'stop' or 'skip', got 'go'"),
        ({"on_bad_record": None}, "on_bad_record must be 'stop' or 'skip', got None"),
        ({"checkpoint_every": -1}, "checkpoint_every must be 0 or more, got -1"),
        ({"min_expert_rows": 0}, "min_expert_rows must be 1 or more, got 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        RunOptions(**options)


def test_nothing_changes_on_the_way() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunOptions().perplexity = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("asked", "here", "on_cluster"), [(None, 10, 0), (0, 0, 0), (1, 1, 1), (25, 25, 25)]
)
def test_chunks_between_two_checkpoints(asked: int | None, here: int, on_cluster: int) -> None:
    """As the help of `collect --output-frequency` has it."""
    assert checkpoint_interval(asked, on_cluster=False) == here
    assert checkpoint_interval(asked, on_cluster=True) == on_cluster
    assert RunOptions(checkpoint_every=asked).interval == here


def test_the_batch_that_was_asked_for() -> None:
    assert wanted_batch(None, None, 2) == Wanted(2, None, None)
    assert wanted_batch(64, 32, 1) == Wanted(1, 64, 32)
    assert wanted_batch("auto", None, 1) is None
    with pytest.raises(ValueError, match="n_batch must be a number, 'auto' or None, got 'many'"):
        wanted_batch("many", None, 1)  # type: ignore[arg-type]
    for n_ubatch, n_seq in ((32, 1), (None, 2)):
        with pytest.raises(ValueError, match="chooses n_ubatch and n_seq too"):
            wanted_batch("auto", n_ubatch, n_seq)
