"""Compares a head with the NumPy oracle, with the tolerances; makes models whose heads draft
well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import forge, oracle
from helpers.forge import Arch, ModelSpec
from imatrix import ImportanceMatrix

# --- drafts -------------------------------------------------------------------------------------------


def agreeing(
    path: Path, arch: Arch, monkeypatch: pytest.MonkeyPatch, *, blur: float, **options: Any
) -> ModelSpec:
    """A model whose trunk predicts mostly from the last token, and whose heads do too.

    blur: the weight of the blocks and of the trunk's row. With 0 every head is the trunk.
    """
    drawn = forge._draw

    def draw(name: str, shape: forge.Shape, seed: int, hp: forge.Hparams) -> forge.F32:
        if name.endswith("nextn.shared_head_norm.weight"):
            name = "output_norm.weight"  # the same norm before the LM head
        values = drawn(name, shape, seed, hp)
        kind = name.split(".", 2)[-1]
        if kind.startswith(("attn_output", "ssm_out", "ffn_down")):
            values *= blur
        elif kind == "nextn.enorm.weight":
            values[:] = 1
        elif kind == "nextn.eh_proj.weight":
            values[:, : hp.n_embd] = np.eye(hp.n_embd)
            values[:, hp.n_embd :] *= 3 * blur
        return values

    monkeypatch.setattr(forge, "_draw", draw)
    return forge.make_model(path, arch, **options)


# Relative to the largest sum of a tensor. The engine computes in float32 with its KV cache in
# float16, which the oracle follows; a difference of 2e-4 is seen if attention runs in tiles.
# Batches of fewer than 64 rows use a kernel that adds up in float16 (ops.cpp), which costs 4e-4 to
# 7e-4.
GATE = 1e-3


# The narrowest choice between two experts that the roundings above cannot change. With a narrower
# one a count may rightly differ, and the test needs another seed, not another tolerance.
CLEAR = 1e-4
Chunks = Sequence[Sequence[int]]


def reference(spec: ModelSpec, chunks: Chunks, **options: Any) -> oracle.Result:
    result = oracle.run(
        spec, chunks, kv_dtype=np.float16, round_inputs=True, head_lm_head=True, **options
    )
    # head_lm_head notes the trunk's LM head if the head has none of its own; it is not compared
    # here
    result.entries.pop("output.weight", None)
    return result


def head_differences(
    got: ImportanceMatrix, want: oracle.Result, spec: ModelSpec
) -> dict[str, float]:
    block = f"blk.{spec.hparams.n_layer}."
    sums = {name: entry.sums for name, entry in got.items() if name.startswith(block)}
    return oracle.compare(sums, want.entries)


def assert_agrees(got: ImportanceMatrix, want: oracle.Result, tolerance: float = GATE) -> None:
    close = {name: gap for name, gap in want.margins.items() if gap < CLEAR}
    assert not close, f"two experts are too close to call; take another seed: {close}"
    assert set(got) == set(want.entries)
    for name, entry in want.entries.items():
        np.testing.assert_array_equal(got[name].counts, entry.counts, err_msg=name)
    worst = oracle.compare({name: entry.sums for name, entry in got.items()}, want.entries)
    assert {name: d for name, d in worst.items() if not d <= tolerance} == {}
    # a square has twice the relative error of its root
    signed = {name: entry.signed_sums for name, entry in got.items()}
    worst = oracle.compare_signed(signed, want.entries)
    assert {name: d for name, d in worst.items() if not d <= tolerance} == {}
