"""Whether another type of the model's weights is advised: the decision, by made-up probes, and what a
Collector asks the probe for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers.forge import ModelSpec
from helpers.running import Forged
from helpers.runs import N_CTX, token_chunks
from hypothesis import given
from hypothesis import strategies as st

from imatrix import Collector
from imatrix.collect import adviser
from imatrix.collect.advice import (
    Products,
    SourceAdvice,
    advise,
    large_type,
    products_of,
    targets,
)
from imatrix.engine import loading
from imatrix.engine.models import Models
from imatrix.engine.products import ProductShape, ProductTimes, Timed
from imatrix.errors import EngineError
from imatrix.quantization.source import SourceTensor

SHAPE = ProductShape(n_in=1024, n_out=3072, n_rows=512)
PRODUCTS = (Products(SHAPE, 1e9),)


def timed(**seconds: float | tuple[float, float]) -> Timed:
    """A probe of one shape: seconds for 1e9 multiplications, in both halves or in each."""

    def times(value: float | tuple[float, float]) -> ProductTimes:
        first, second = value if isinstance(value, tuple) else (value, value)
        return ProductTimes(first / 1e9, second / 1e9, 8)

    return ({kind: times(value) for kind, value in seconds.items()},)


# --- the decision --------------------------------------------------------------------------------


def test_a_clear_gain() -> None:
    # products take 2 of 2.5 seconds, and half as long in BF16: 1.5 of 2.5 seconds
    found = advise(PRODUCTS, timed(f16=2.0, bf16=1.0), "f16", ["bf16"], 2.5)
    assert found == SourceAdvice(
        source="F16",
        target="BF16",
        source_speed=pytest.approx(0.5e9),
        target_speed=pytest.approx(1e9),
        time=pytest.approx(0.6),
        loss="BF16 keeps 8 of F16's 11 significant bits, and more than its range",
        seconds=2.5,
    )


@pytest.mark.parametrize(
    ("probe", "seconds"),
    [
        (timed(f16=1.0, bf16=1.0), 1.0),  # nothing to gain
        (timed(f16=1.0, bf16=2.0), 1.0),  # the model's type is the fastest
        (timed(f16=1.24, bf16=1.0), 1.24),  # too little
        (timed(f16=(2.0, 1.1), bf16=1.0), 2.0),  # the second half says otherwise: noise
        (timed(f16=(1.1, 2.0), bf16=1.0), 2.0),
        (timed(f16=2.0, bf16=1.0), 20.0),  # products are a tenth of the run
    ],
)
def test_no_clear_gain(probe: Timed, seconds: float) -> None:
    assert advise(PRODUCTS, probe, "f16", ["bf16"], seconds) is None


def test_the_smaller_file_unless_the_larger_one_is_much_faster() -> None:
    def target(**seconds: float) -> str | None:
        found = advise(PRODUCTS, timed(f16=3.0, **seconds), "f16", ["bf16", "f32"], 3.0)
        return None if found is None else found.target

    assert target(bf16=1.0, f32=0.95) == "BF16"
    assert target(bf16=1.0, f32=0.8) == "F32"
    assert target(bf16=2.9, f32=1.0) == "F32"
    assert target(bf16=2.9, f32=2.8) is None


def test_a_larger_file_has_to_be_twice_as_fast() -> None:
    """The probe flatters F32: its matrices lie in the processor's caches, a model's do not."""
    for f32, expected in ((1.6, None), (1.4, "F32")):
        found = advise(PRODUCTS, timed(f16=3.0, f32=f32), "f16", ["f32"], 3.0)
        assert (found and found.target) == expected
    # as F32 to BF16, which is smaller, need not be
    found = advise(PRODUCTS, timed(f32=2.0, bf16=1.5), "f32", ["bf16"], 2.0)
    assert found is not None
    assert found.target == "BF16"


def test_dense_weights_and_experts_count_by_what_they_take() -> None:
    experts = Products(ProductShape(n_in=1024, n_out=256, n_rows=3072, n_mat=64), 3e9)
    dense_probe, expert_probe = timed(f16=2.0, bf16=1.0), timed(f16=1.0, bf16=1.0)
    # 2 + 3 seconds, in BF16 1 + 3: a factor of 1.25, and 4/5 of the time
    found = advise((*PRODUCTS, experts), (*dense_probe, *expert_probe), "f16", ["bf16"], 5.0)
    assert found is not None
    assert found.time == pytest.approx(0.8)
    assert found.source_speed == pytest.approx(4e9 / 5)
    # the experts are half as fast: 1.125
    slower = timed(f16=2.0, bf16=2.0)
    assert advise((*PRODUCTS, experts), (*dense_probe, *slower), "f16", ["bf16"], 8.0) is None


@given(
    st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
    st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
    st.floats(0.01, 1000),
)
def test_what_is_advised_is_faster_in_both_halves(
    source: tuple[float, float], target: tuple[float, float], seconds: float
) -> None:
    found = advise(PRODUCTS, timed(f16=source, bf16=target), "f16", ["bf16"], seconds)
    if found is None:
        return
    assert all(a >= 1.25 * b for a, b in zip(source, target, strict=True))
    assert sum(target) / sum(source) - 1e-9 <= found.time <= 0.9
    assert found.target_speed > found.source_speed


def test_no_type_with_a_smaller_range_is_a_target() -> None:
    """F16 ends at 65504 and at 6e-8, so that weights of F32 and BF16 may not fit."""
    for room in (True, False):
        assert targets("f32", room=room) == ("bf16",)
    assert targets("f16", room=False) == ("bf16",)
    assert targets("f16", room=True) == ("bf16", "f32")
    assert targets("bf16", room=False) == ()
    assert targets("bf16", room=True) == ("f32",)


# --- the model -----------------------------------------------------------------------------------


def tensors(**kinds: tuple[str, tuple[int, ...]]) -> dict[str, SourceTensor]:
    return {name: SourceTensor(*each) for name, each in kinds.items()}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (tensors(a=("f16", (64, 64)), norm=("f32", (1 << 20,))), "f16"),
        (tensors(a=("f16", (64, 64)), router=("f32", (64, 8))), "f16"),
        (tensors(a=("f16", (64, 8)), b=("bf16", (64, 64, 4))), "bf16"),
        (tensors(a=("f16", (64, 64)), ids=("i32", (64, 512))), "f16"),
        # the data are those of a quantized model whatever becomes of the rest
        (tensors(a=("bf16", (64, 64)), experts=("mxfp4", (64, 64, 32))), None),
        (tensors(a=("bf16", (64, 640)), b=("q8_0", (64, 64))), None),
        (tensors(a=("q4_k", (256, 64))), None),
        (tensors(norm=("f32", (64,))), None),
        ({}, None),
    ],
)
def test_the_type_of_the_large_matrices(
    found: dict[str, SourceTensor], expected: str | None
) -> None:
    assert large_type(found) == expected


def test_the_products_of_a_chunk_by_its_counts() -> None:
    model = tensors(
        **{
            "token_embd.weight": ("f16", (64, 1000)),
            "blk.0.attn_q.weight": ("f16", (64, 128)),
            "blk.0.attn_k_b.weight": ("f16", (16, 32, 4)),  # of every row, each head
            "blk.0.ffn_up.weight": ("f16", (64, 256)),
            "blk.0.ffn_up_exps.weight": ("f16", (64, 32, 8)),
            "blk.0.ffn_gate_inp.weight": ("f32", (64, 8)),
            "blk.0.never.weight": ("f16", (64, 64)),
        }
    )
    one = np.array([200])
    counts = {
        "blk.0.attn_q.weight": one,
        "blk.0.attn_k_b.weight": one,
        "blk.0.ffn_up.weight": one,
        "blk.0.ffn_up_exps.weight": np.array([100, 0, 50, 50, 0, 100, 50, 50]),
        "blk.0.ffn_gate_inp.weight": one,
    }
    # two chunks of 100 tokens, two experts a token, graphs of 50 tokens
    dense, experts = products_of(model, counts, "f16", chunks=2, tokens=200, n_ubatch=50, logits=49)
    assert dense.shape == ProductShape(n_in=64, n_out=1000, n_rows=50)
    assert dense.multiplications == (100 * (64 * 128 + 16 * 32 * 4 + 64 * 256) + 49 * 64 * 1000)
    assert experts.shape == ProductShape(n_in=64, n_out=32, n_rows=100, n_mat=8)
    assert experts.multiplications == 200 * 64 * 32
    # without logits the largest is another; an LM head of its own is not the embedding
    [dense, _] = products_of(model, counts, "f16", chunks=2, tokens=200, n_ubatch=50)
    assert dense.shape == ProductShape(n_in=64, n_out=256, n_rows=50)
    model["output.weight"] = SourceTensor("bf16", (64, 1000))
    [head] = products_of(model, counts, "bf16", chunks=2, tokens=200, n_ubatch=50, logits=49)
    assert head.multiplications == 49 * 64 * 1000


# --- a Collector ---------------------------------------------------------------------------------


class Probe:
    """Stands in for the probe: BF16 is fast."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[list[ProductShape], tuple[str, ...], int]] = []
        self.error: Exception | None = None
        monkeypatch.setattr(loading, "measure", self.measure)

    def measure(
        self, shapes: Sequence[ProductShape], types: Sequence[str], *, n_threads: int
    ) -> Timed:
        self.asked.append((list(shapes), tuple(types), n_threads))
        if self.error is not None:
            raise self.error
        # so slow that they are all that a chunk of these small models does
        return tuple(
            {
                kind: ProductTimes(*((1.0,) * 2 if kind == "bf16" else (4.0,) * 2), 8)
                for kind in types
            }
            for _ in shapes
        )


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    # whatever this machine has beside the CPU
    monkeypatch.setattr(Models, "on_cpu", property(lambda _self: True))
    return Probe(monkeypatch)


def asked(spec: ModelSpec, **options: Any) -> list[SourceAdvice | None]:
    """What a run answers after each of two chunks, and after itself."""
    found: list[SourceAdvice | None] = []
    with Collector(spec.path, n_ctx=N_CTX, n_threads=1) as collector:
        collector.run(
            token_chunks(spec, 2),
            progress=lambda _progress: found.append(collector.source_advice()),
            **options,
        )
        found.append(collector.source_advice())
    return found


def test_a_run_asks_the_probe_once(forged: Forged, probe: Probe) -> None:
    spec = forged("glm4moe", seed=3, n_nextn=1, dtype="F16")
    found = asked(spec, mtp=True)
    assert len(found) == 3
    for advice in found:
        assert advice is not None
        assert (advice.source, advice.target) == ("F16", "BF16")
        assert advice.time == pytest.approx(0.25)
        assert advice.seconds > 0
    [(shapes, types, n_threads)] = probe.asked
    assert n_threads == 1
    assert types in (("f16", "bf16"), ("f16", "bf16", "f32"))  # as the memory has room
    hparams = spec.hparams
    dense, experts = shapes
    assert dense.n_mat == 1
    assert dense.n_rows == N_CTX
    assert experts.n_mat == hparams.n_expert
    assert experts.n_rows == N_CTX * hparams.n_expert_used
    assert {experts.n_in, experts.n_out} == {hparams.n_embd, hparams.n_ff_exp}


def test_a_token_meets_every_matrix_of_a_dense_model(
    forged: Forged, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The multiplications of a chunk, counted from the shapes alone."""
    spec = forged("llama", seed=2, dtype="F16")
    found: list[Sequence[Products]] = []

    def advised(products: Sequence[Products], *_rest: object) -> None:
        found.append(products)

    monkeypatch.setattr(adviser, "advise", advised)
    blocks = sum(
        values.size
        for name, values in spec.tensors.items()
        if name.startswith("blk.") and values.ndim == 2
    )
    for perplexity in (False, True):
        asked(spec, perplexity=perplexity)
        # of the logits those that are scored: the second half of a chunk, but its last token
        scored = (N_CTX // 2 - 1) * perplexity
        head = scored * spec.tensors["output.weight"].size
        for products in found:
            assert sum(each.multiplications for each in products) == N_CTX * blocks + head
        assert len(found) == 3
        found.clear()


@pytest.mark.parametrize("dtype", ["BF16", "Q8_0"])
def test_the_fastest_type_and_a_quantized_one_hear_nothing(
    forged: Forged, probe: Probe, dtype: str
) -> None:
    assert asked(forged("llama", seed=2, dtype=dtype)) == [None, None, None]
    if dtype == "Q8_0":
        assert probe.asked == []


def test_with_a_gpu_nothing_is_said(
    forged: Forged, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Models, "on_cpu", property(lambda _self: False))
    assert asked(forged("llama", seed=2, dtype="F16")) == [None, None, None]
    assert probe.asked == []


def test_where_the_cpu_multiplies_everything(
    forged: Forged, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = forged("llama", seed=2).path
    monkeypatch.setattr(Models, "has_gpu", property(lambda _self: True))
    with Collector(path, n_gpu_layers=0) as collector:
        assert not collector._models.on_cpu  # large products go to the GPU all the same
    with Collector(path, devices=[]) as collector:
        assert collector._models.on_cpu
    monkeypatch.setattr(Models, "has_gpu", property(lambda _self: False))
    with Collector(path) as collector:
        assert collector._models.on_cpu


@pytest.mark.parametrize("error", [EngineError("no"), MemoryError("none")])
def test_a_probe_that_fails_does_not_end_the_run(
    forged: Forged, probe: Probe, error: Exception
) -> None:
    probe.error = error
    assert asked(forged("llama", seed=2, dtype="F16")) == [None, None, None]


def test_before_a_run_and_after_close(forged: Forged, probe: Probe) -> None:
    collector = Collector(forged("llama", seed=2, dtype="F16").path, n_ctx=N_CTX)
    assert collector.source_advice() is None
    collector.close()
    with pytest.raises(ValueError, match="closed"):
        collector.source_advice()
    assert probe.asked == []
