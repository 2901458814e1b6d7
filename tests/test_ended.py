"""Graphs left after the last wanted weight, where logits were asked for and nobody reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Forged
from forge import ModelSpec

from imatrix import _session, backends

N_CTX = 96

lone_device = pytest.mark.skipif(
    len(backends().devices) != 1, reason="graphs are left early on a lone device only"
)


def collected(
    spec: ModelSpec, *, n_seq: int = 1, n_ubatch: int = 64, **options: Any
) -> tuple[dict[str, Any], dict[str, int]]:
    """What three chunks give, and the counters."""
    model = _session.Model(
        str(spec.path), mtp=False, n_gpu_layers=0, use_mmap=True, check_tensors=False
    )
    session = _session.Session(model, None)
    given = {"process_output": False, "perplexity": False, "mtp": False, **options}
    session.open(
        n_ctx=N_CTX, n_batch=N_CTX * n_seq, n_ubatch=n_ubatch, n_seq=n_seq, n_threads=1, **given
    )
    tokens = np.random.default_rng(1).integers(0, model.n_vocab, (3, N_CTX), dtype=np.int32)
    for first in range(0, 3, n_seq):
        group = tokens[first : first + n_seq]
        session.step(group.ravel(), np.full(len(group), N_CTX, dtype=np.int32))
    return session.snapshot(), session.counters


def assert_same_bits(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for name, (sums, counts) in want.items():
        np.testing.assert_array_equal(got[name][0], sums, err_msg=name)
        np.testing.assert_array_equal(got[name][1], counts, err_msg=name)


@lone_device
@pytest.mark.parametrize("n_seq", [1, 3])
@pytest.mark.parametrize("n_ubatch", [32, 64, 288])
@pytest.mark.parametrize("arch", ["llama", "deepseek2"])
def test_the_sums_are_those_of_whole_graphs(
    arch: Any, n_ubatch: int, n_seq: int, forged: Forged
) -> None:
    spec = forged(arch, seed=2)
    got, counters = collected(spec, n_seq=n_seq, n_ubatch=n_ubatch)
    want, whole = collected(spec, n_seq=n_seq, n_ubatch=n_ubatch, leave_out_logits=False)
    assert whole["ended"] == 0
    if arch == "llama":  # crops its last layer to the rows whose logits are asked for
        graphs = -(-N_CTX * n_seq // n_ubatch) * (3 // n_seq)
        assert counters["ended"] >= graphs  # more where a ubatch does not divide by n_seq
    assert counters["stops"] == whole["stops"]
    assert_same_bits(got, want)


@lone_device
@pytest.mark.parametrize("option", ["perplexity", "process_output"])
def test_who_reads_logits_gets_whole_graphs(option: str, forged: Forged) -> None:
    spec = forged("llama", seed=2)
    _, counters = collected(spec, **{option: True})
    assert counters["ended"] == 0


@lone_device
def test_perplexity_does_not_move_the_sums(forged: Forged) -> None:
    spec = forged("llama", seed=2)
    got, _ = collected(spec)
    want, _ = collected(spec, perplexity=True)
    assert_same_bits(got, want)
