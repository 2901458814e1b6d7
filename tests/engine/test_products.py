"""The probe of products: what it multiplies, how long it may take, and what it makes of the times.

No test measures time: the probe gets a clock that the test moves.
"""

from __future__ import annotations

import itertools
import logging
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from helpers.running import Forged
from hypothesis import given
from hypothesis import strategies as st

from imatrix.engine.loading import Loader
from imatrix.engine.placement import Placement
from imatrix.engine.products import BUDGET, ProductShape, ProductTimes, measure
from imatrix.native import engine

LARGE = ProductShape(n_in=1024, n_out=3072, n_rows=512)
EXPERTS = ProductShape(n_in=1024, n_out=256, n_rows=3072, n_mat=64)


@dataclass
class Machine:
    """A clock, and products that take the time that they are said to."""

    seconds: Callable[[str, int], float]  # by type and how often it was multiplied
    opening: float = 0.0
    now: float = 100.0
    opened: list[tuple[str, ProductShape, int]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def open_product(self, kind: str, shape: ProductShape, n_threads: int) -> Machine.Product:
        self.now += self.opening
        self.opened.append((kind, shape, n_threads))
        return Machine.Product(self, kind)

    @dataclass
    class Product:
        machine: Machine
        kind: str
        n: int = 0

        def run(self) -> float:
            took = self.machine.seconds(self.kind, self.n)
            self.n += 1
            self.machine.now += took
            self.machine.order.append(self.kind)
            return took

    def measure(self, *shapes: ProductShape, types: tuple[str, ...] = ("f16", "bf16")):
        return measure(
            shapes, types, n_threads=2, open_product=self.open_product, clock=lambda: self.now
        )


def test_the_halves_are_medians_of_turns() -> None:
    rng = iter([itertools.count(1), itertools.count(7)])
    counters = {"f16": next(rng), "bf16": next(rng)}
    seconds: dict[str, list[float]] = {"f16": [], "bf16": []}

    def take(kind: str, _n: int) -> float:
        seconds[kind].append(1e-3 * (1 + next(counters[kind]) * 37 % 11))
        return seconds[kind][-1]

    machine = Machine(take)
    found = machine.measure(LARGE)
    assert found is not None
    assert machine.order == ["f16", "bf16"] * (len(machine.order) // 2)
    size = LARGE.cut(2).multiplications
    for kind in ("f16", "bf16"):
        counted = seconds[kind][1:]  # the first one also warms up
        half = len(counted) // 2
        times = found[0][kind]
        assert times.n == len(counted)
        assert times.first == pytest.approx(statistics.median(counted[:half]) / size, rel=1e-12)
        assert times.second == pytest.approx(statistics.median(counted[half:]) / size, rel=1e-12)


@given(
    st.floats(1e-5, 3.0),
    st.floats(0.5, 3.0),
    st.floats(0.0, 0.3),
    st.sampled_from([("f16", "bf16"), ("f32", "bf16"), ("f16", "bf16", "f32")]),
    st.booleans(),
)
def test_no_product_begins_after_the_deadline(
    seconds: float, ratio: float, opening: float, types: tuple[str, ...], experts: bool
) -> None:
    """So a probe takes BUDGET and one product at most, however slow the machine."""
    began: list[float] = []

    def take(kind: str, _n: int) -> float:
        began.append(machine.now)
        return seconds if kind == types[0] else seconds * ratio

    machine = Machine(take, opening)
    started = machine.now
    found = machine.measure(LARGE, *([EXPERTS] if experts else []), types=types)
    last = max(seconds, seconds * ratio, opening)
    assert all(at < started + BUDGET for at in began)
    assert machine.now <= started + BUDGET + last + 1e-9
    assert BUDGET < 1
    n = len(types) * (2 if experts else 1)
    rounds = len(machine.order) // n
    assert (found is not None) == (rounds >= 5)  # one to warm up, two in each half
    assert rounds <= 25
    if found is not None:
        assert [list(each) for each in found] == [list(types)] * (n // len(types))


def test_a_machine_that_is_too_slow_gives_nothing() -> None:
    machine = Machine(lambda _kind, _n: 0.25)
    assert machine.measure(LARGE) is None
    assert len(machine.order) == 4
    machine = Machine(lambda _kind, _n: 1e-3, opening=0.5)
    assert machine.measure(LARGE) is None
    assert machine.order == []


@given(
    st.integers(1, 1 << 16), st.integers(1, 1 << 18), st.integers(1, 1 << 13),
    st.integers(1, 512), st.integers(1, 256),
)  # fmt: skip
def test_a_cut_product_is_small_and_like_the_model_s(
    n_in: int, n_out: int, n_rows: int, n_mat: int, n_threads: int
) -> None:
    shape = ProductShape(n_in=n_in, n_out=n_out, n_rows=n_rows, n_mat=n_mat)
    cut = shape.cut(n_threads)
    assert 1 <= cut.n_in == min(n_in, 8192)
    assert 1 <= cut.n_out <= n_out
    assert (cut.n_mat > 1) == (n_mat > 1)
    assert cut.n_mat <= n_mat
    # the rows that each matrix sees decide how a kernel divides its work
    assert cut.n_rows == cut.n_mat * max(1, min(n_rows // n_mat, 512))
    # 64 MiB of float32 at most, with the least that is left of the largest
    assert cut.n_in * cut.n_out * cut.n_mat <= max(1 << 22, 2 * 8192 * 64)
    assert cut.multiplications == cut.n_in * cut.n_out * cut.n_rows


def test_what_is_small_enough_stays() -> None:
    shape = ProductShape(n_in=256, n_out=512, n_rows=64)
    assert shape.cut(1) == shape
    # two matrices at least: for one alone the engine has another operation
    assert EXPERTS.cut(1).n_mat >= 2


# --- the engine's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "mxfp4", "q4_K"])
@pytest.mark.parametrize("n_mat", [1, 3])
def test_the_engine_multiplies(kind: str, n_mat: int) -> None:
    product = engine.Product(kind, n_in=256, n_out=32, n_rows=9, n_mat=n_mat, n_threads=1)
    assert product.run() > 0
    assert product.run() > 0


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_the_matrix_lies_where_the_engine_loads_such_a_weight(
    forged: Forged, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the engine's own log: where it does not, another kernel is timed (Q8_0 is repacked on some
    processors)."""
    spec = forged("llama", seed=2, dtype=kind)
    rows, columns = spec.tensors["blk.0.ffn_up.weight"].shape
    with caplog.at_level(logging.INFO, "imatrix.engine"):
        engine.set_log_level()
        engine.Model(
            str(spec.path), mtp=False, n_gpu_layers=0, use_mmap=False, check_tensors=False,
            placement=Placement(devices=()).as_data(),
        )  # fmt: skip
    engine.set_log_level()
    places = set(re.findall(r"(\S+) model buffer size", caplog.text))
    assert places
    # beside norms, which lie in plain memory, these matrices are all that there is
    best = (places - {"CPU"}) or places
    product = engine.Product(
        kind.lower(), n_in=columns, n_out=rows, n_rows=64, n_mat=1, n_threads=1
    )
    assert {product.buffer_type} == best


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "f17"}, "no type of weights is called f17"),
        ({"type": "i32"}, "i32"),
        ({"type": "iq2_xxs"}, "without importance data"),
        ({"type": "q8_0", "n_in": 33}, "rows of 33 values"),
        ({"n_out": 0}, "1 or more"),
        ({"n_threads": 0}, "1 or more"),
    ],
)
def test_what_the_engine_cannot_multiply_is_refused(given: dict[str, object], message: str) -> None:
    arguments = {"type": "f16", "n_in": 32, "n_out": 8, "n_rows": 4, "n_mat": 1, "n_threads": 1}
    arguments |= given
    with pytest.raises(ValueError, match=message):
        engine.Product(arguments.pop("type"), **arguments)


def test_a_process_of_its_own_measures_the_same_way() -> None:
    loader = Loader(isolate=True)
    try:
        shapes = [ProductShape(n_in=64, n_out=64, n_rows=16)]
        found = loader.measure_products(shapes, ["f16", "bf16"], n_threads=1)
        with pytest.raises(ValueError, match="no type of weights is called f17"):
            loader.measure_products(shapes, ["f17"], n_threads=1)
    finally:
        loader.close()
    assert found is not None  # a product takes microseconds
    assert list(found[0]) == ["f16", "bf16"]
    for times in found[0].values():
        assert isinstance(times, ProductTimes)
        assert times.first > 0
        assert times.second > 0
        assert 4 <= times.n <= 24
