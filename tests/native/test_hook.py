"""The eval hook and its sums on small graphs, compared with plain NumPy.

The graphs run through ggml's own scheduler: on the host, on a device whose memory the host cannot
read, and with weights that the scheduler copies to that device (tests/native/harness.h).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from helpers.forge_any import native_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from imatrix import backends

sys.path.insert(0, str(native_folder()))
from _imatrix_testing import Harness, far_device_lose, plain_name

pytestmark = [
    pytest.mark.engine(
        "ggml/src/ggml-backend.cpp",
        "the scheduler asks for every node, and calls again after it has run",
    ),
]

# a GPU, if the build and the machine have one (docs/backends.md)
DEVICES = tuple(device.name for device in backends().devices if device.gpu)
WHERE = ("host", "device", "offload", "device-sums", "offload-sums")
WHERE += tuple(f"{name}-{how}" for name in DEVICES for how in ("device", "device-sums"))
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass
class Activation:
    """A view of a flat float32 array, in ggml's terms (ne, stride) and in NumPy's (values)."""

    data: F32
    ne: tuple[int, int, int, int]
    stride: tuple[int, int, int, int] = (0, 0, 0, 0)
    offset: int = 0

    def __post_init__(self) -> None:
        if self.stride == (0, 0, 0, 0):
            a, b, c, _ = self.ne
            self.stride = (1, a, a * b, a * b * c)

    @property
    def rows(self) -> tuple[Any, ...]:
        return (self.data, self.ne, self.stride, self.offset)

    @property
    def values(self) -> F32:  # [n3, n2, n1, n_in]
        strides = [4 * s for s in reversed(self.stride)]
        return np.lib.stride_tricks.as_strided(
            self.data[self.offset :], tuple(reversed(self.ne)), strides
        )


@dataclass
class Ids:
    """The experts of each token, [n_tokens, n_used]: a view of a flat int32 array."""

    data: NDArray[np.int32]
    n_used: int
    n_tokens: int
    stride: int
    offset: int = 0

    @property
    def given(self) -> tuple[Any, ...]:
        return (self.data, self.n_used, self.n_tokens, self.stride, self.offset)

    @property
    def values(self) -> NDArray[np.int32]:
        return np.lib.stride_tricks.as_strided(
            self.data[self.offset :], (self.n_tokens, self.n_used), (4 * self.stride, 4)
        )


@dataclass
class Expected:
    sums: F64
    counts: NDArray[np.int64]
    signed: F64
    magnitude: F64  # the sum of |x|, to which the rounding of a signed sum is proportional

    def __iadd__(self, other: Expected) -> Expected:
        return Expected(
            self.sums + other.sums,
            self.counts + other.counts,
            self.signed + other.signed,
            self.magnitude + other.magnitude,
        )

    def times(self, n: int) -> Expected:
        return Expected(n * self.sums, n * self.counts, n * self.signed, n * self.magnitude)


def powers(x: Activation) -> tuple[F64, F64, F64]:
    """x², x and |x| in float64, [n3, n2, n1, n_in] each."""
    values = x.values.astype(np.float64)
    return values**2, values, np.abs(values)


def dense(x: Activation, w2: int = 1, w3: int = 1) -> Expected:
    """Matrix (i2, i3) of the weight sees the rows whose i2, i3 are equal modulo its own."""
    sums, signed, magnitude = np.zeros((3, w3 * w2, x.ne[0]))
    for into, values in zip((sums, signed, magnitude), powers(x), strict=True):
        for i3 in range(x.ne[3]):
            for i2 in range(x.ne[2]):
                into[(i3 % w3) * w2 + i2 % w2] += values[i3, i2].sum(axis=0)
    counts = np.array([x.ne[1] * x.ne[2] * x.ne[3] // (w2 * w3)])
    return Expected(sums, counts, signed, magnitude)


def routed(x: Activation, ids: Ids, n_expert: int) -> Expected:
    """Expert e sees one row for each time that a token uses it."""
    sums, signed, magnitude = np.zeros((3, n_expert, x.ne[0]))
    squares, plain, absolute = powers(x)
    counts = np.zeros(n_expert, dtype=np.int64)
    for token, experts in enumerate(ids.values):
        for used, expert in enumerate(experts):
            row = (0, token, used % x.ne[1])
            sums[expert] += squares[row]
            signed[expert] += plain[row]
            magnitude[expert] += absolute[row]
            counts[expert] += 1
    return Expected(sums, counts, signed, magnitude)


def check(harness: Harness, want: dict[str, Expected]) -> None:
    got = {name: w for name, w in harness.weights.items() if w[1] is not None and w[1].any()}
    assert got.keys() == want.keys()
    for name, (sums, counts, _, _) in got.items():
        assert counts.tolist() == want[name].counts.tolist(), name
        # float32 over at most 512 rows; each square and each addition is rounded once
        tolerance = (min(512, int(counts.max())) + 1) * 2.0**-24
        np.testing.assert_allclose(sums, want[name].sums, rtol=tolerance, atol=1e-40, err_msg=name)
        away = np.abs(harness.signed_sums[name] - want[name].signed)
        assert (away <= tolerance * want[name].magnitude).all(), name


def product(
    weight: str, rows: int = 0, *, ids: int = -1, ne2: int = 1, ne3: int = 1, n_out: int = 2
) -> tuple[Any, ...]:
    return (weight, n_out, ne2, ne3, rows, ids)


def run(
    harness: Harness,
    activations: list[Activation],
    products: list[tuple[Any, ...]],
    ids: list[Ids] | None = None,
    replay: bool = False,
) -> None:
    harness.run([a.rows for a in activations], [i.given for i in ids or []], products, replay)


def any_layout(where: str) -> bool:
    """Whether a graph can be replayed for rows of any layout: a GPU's own multiplication requires
    aligned rows, while the hook must accept any."""
    return where.startswith(DEVICES)


def begin(harness: Harness, output_weight: bool = False) -> None:
    harness.begin_chunk()
    harness.begin_decode(output_weight)


def rows(n_in: int, n1: int = 1, n2: int = 1, n3: int = 1, *, seed: int = 0) -> Activation:
    rng = np.random.default_rng(seed)
    return Activation(
        rng.standard_normal(n_in * n1 * n2 * n3).astype(np.float32), (n_in, n1, n2, n3)
    )


@st.composite
def activations(
    draw: st.DrawFn, n_in: int, n1: int, n2: int, n3: int, permute: bool = True
) -> Activation:
    """Any layout that ggml's CPU backend multiplies: the values of a row are contiguous, the rest
    is strided, with the outer dimensions in any order in memory."""
    sizes = {1: n1, 2: n2, 3: n3}
    order = draw(st.permutations([1, 2, 3])) if permute else [1, 2, 3]
    stride = [1, 0, 0, 0]
    reach = n_in
    for axis in order:
        stride[axis] = reach + draw(st.sampled_from([0, 0, 1, 5]))
        reach = stride[axis] * sizes[axis]
    offset = draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    data = rng.standard_normal(offset + reach).astype(np.float32)
    s0, s1, s2, s3 = stride
    return Activation(data, (n_in, n1, n2, n3), (s0, s1, s2, s3), offset)


@st.composite
def expert_ids(draw: st.DrawFn, n_expert: int, n_used: int, n_tokens: int) -> Ids:
    """The first n_used of a sorted list of all experts, as top-k gives them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    offset = draw(st.integers(0, 3))
    order = np.argsort(rng.random((n_tokens, n_expert)), axis=1).astype(np.int32)
    if draw(st.booleans()):  # some experts are never used
        order = np.sort(order, axis=1)
    data = np.concatenate([np.full(offset, -1, dtype=np.int32), order.ravel()])
    return Ids(data, n_used, n_tokens, n_expert, offset)


SMALL = st.integers(1, 4)


@pytest.mark.parametrize("where", WHERE)
class TestDense:
    @given(data=st.data())
    @settings(deadline=None)
    def test_any_layout_and_batch(self, where: str, data: st.DataObject) -> None:
        draw = data.draw
        w2, w3 = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        shape = (
            draw(st.integers(1, 40)),
            draw(st.integers(1, 9)),
            w2 * draw(SMALL),
            w3 * draw(SMALL),
        )
        names = [f"blk.{i}.w.weight" for i in range(draw(st.integers(1, 3)))]
        harness = Harness(where)
        begin(harness)
        want: dict[str, Expected] = {}
        n_ubatches = draw(st.integers(1, 3))
        for _ in range(n_ubatches):
            x = draw(activations(*shape))
            for name in names:
                more = dense(x, w2, w3)
                want[name] = want[name] if name in want else more.times(0)
                want[name] += more
            products = [product(name, ne2=w2, ne3=w3) for name in names]
            run(harness, [x], products, replay=any_layout(where))
        assert harness.error[0] == "none"
        assert harness.groups_agree
        harness.commit()
        check(harness, want)
        # one look at each activation, however many weights it feeds
        stops, fetched, squared = harness.counters
        assert stops == n_ubatches
        assert squared == n_ubatches * np.prod(shape)
        assert (fetched > 0) == (where != "host")
        if where.endswith("-sums"):  # only sums were copied, once: squares and signed
            assert fetched == 2 * 4 * shape[0] * w2 * w3

    def test_squares_are_the_same_without_signed_sums(self, where: str) -> None:
        x, ids = rows(40, 1, 70), Ids(np.arange(140, dtype=np.int32) % 3, 2, 70, 2)
        products = [product("blk.0.a.weight"), product("blk.0.b_exps.weight", ids=0, ne2=3)]
        found = []
        for keep in (True, False):
            harness = Harness(where)
            harness.keep_signed(keep)
            for _ in range(2):
                begin(harness)
                run(harness, [x], products, [ids])
                harness.commit()
            assert set(harness.signed_sums) == ({p[0] for p in products} if keep else set())
            found.append(harness)
        with_them, without = found
        for name, (sums, counts, *_) in with_them.weights.items():
            np.testing.assert_array_equal(sums, without.weights[name][0])
            np.testing.assert_array_equal(counts, without.weights[name][1])
        # dropped sums do not come back: they lack rows that have gone by
        with_them.keep_signed(False)
        with_them.keep_signed(True)
        begin(with_them)
        run(with_them, [x], products, [ids])
        with_them.commit()
        assert with_them.error[0] == "none"
        assert with_them.signed_sums == {}
        check_squares = {"blk.0.a.weight": dense(x), "blk.0.b_exps.weight": routed(x, ids, 3)}
        for name, once in check_squares.items():
            # as in check()
            np.testing.assert_allclose(
                with_them.weights[name][0], 3 * once.sums, rtol=513 * 2.0**-24
            )

    @pytest.mark.parametrize("n", [1, 15, 16, 511, 512, 513, 1300])
    def test_any_number_of_rows(self, where: str, n: int) -> None:
        x = rows(7, n)
        harness = Harness(where)
        begin(harness)
        run(harness, [x], [product("blk.0.w.weight")])
        harness.commit()
        check(harness, {"blk.0.w.weight": dense(x)})


@pytest.mark.parametrize("where", WHERE)
class TestExperts:
    @given(data=st.data())
    @settings(deadline=None)
    def test_any_choice_of_experts(self, where: str, data: st.DataObject) -> None:
        draw = data.draw
        n_in, n_expert, n_tokens = (
            draw(st.integers(1, 40)),
            draw(st.integers(1, 6)),
            draw(st.integers(1, 9)),
        )
        n_used = draw(st.integers(1, n_expert))
        each = draw(st.booleans())  # a row for each used expert (down), or one for all (gate, up)
        x = draw(activations(n_in, n_used if each else 1, n_tokens, 1))
        ids = draw(expert_ids(n_expert, n_used, n_tokens))
        names = ["blk.3.gate_exps.weight", "blk.3.up_exps.weight"]
        harness = Harness(where)
        begin(harness)
        products = [product(name, ids=0, ne2=n_expert) for name in names]
        run(harness, [x], products, [ids], replay=any_layout(where))
        assert harness.error[0] == "none"
        assert harness.groups_agree
        harness.commit()
        check(harness, {name: routed(x, ids, n_expert) for name in names})
        assert harness.counters[0] == 1
        if where.endswith("-sums"):
            assert harness.counters[1] == 4 * (2 * n_in * n_expert + n_used * n_tokens)

    @pytest.mark.parametrize(("n_in", "n_tokens"), [(5, 17), (3, 1000), (8192, 1100)])
    def test_many_rows_an_expert(self, where: str, n_in: int, n_tokens: int) -> None:
        # the last number is more than a device gathers at a time, kGatherBytes in device_sums.cpp
        x = rows(n_in, 1, n_tokens)
        order = np.tile([0, 3, 1, 2], n_tokens).astype(np.int32)
        order[-3:] = [2, 0, 1]
        ids = Ids(order, 2, n_tokens, 4)
        harness = Harness(where)
        begin(harness)
        run(harness, [x], [product("blk.0.w.weight", ids=0, ne2=5)], [ids])
        harness.commit()
        check(harness, {"blk.0.w.weight": routed(x, ids, 5)})

    def test_same_rows_but_other_experts_are_not_shared(self, where: str) -> None:
        x = rows(6, 1, 3)
        one = Ids(np.array([0, 1, 2], dtype=np.int32), 1, 3, 1)
        two = Ids(np.array([3, 3, 0], dtype=np.int32), 1, 3, 1)
        names = ("blk.0.a.weight", "blk.0.b.weight")
        harness = Harness(where)
        begin(harness)
        run(harness, [x], [product(n, ids=i, ne2=4) for i, n in enumerate(names)], [one, two])
        harness.commit()
        check(harness, {names[0]: routed(x, one, 4), names[1]: routed(x, two, 4)})

    def test_a_token_may_use_an_expert_twice(self, where: str) -> None:
        x = rows(6, 2, 2)
        ids = Ids(np.array([1, 1, 0, 1], dtype=np.int32), 2, 2, 2)
        harness = Harness(where)
        begin(harness)
        # replayed, because ggml's own kernel assumes that a token's experts are different
        run(harness, [x], [product("blk.0.w.weight", ids=0, ne2=2)], [ids], replay=True)
        harness.commit()
        check(harness, {"blk.0.w.weight": routed(x, ids, 2)})

    def test_dense_weight_and_router_share_with_nobody_else(self, where: str) -> None:
        # the router multiplies the same activation as the experts' gate, but as a dense weight
        x = rows(6, 1, 4)
        ids = Ids(np.array([0, 1, 1, 0], dtype=np.int32), 1, 4, 1)
        harness = Harness(where)
        begin(harness)
        run(
            harness,
            [x],
            [product("blk.0.router.weight"), product("blk.0.exps.weight", ids=0, ne2=2)],
            [ids],
        )
        harness.commit()
        check(harness, {"blk.0.router.weight": dense(x), "blk.0.exps.weight": routed(x, ids, 2)})


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decorated", "plain"),
    [
        ("blk.0.attn_k.weight", "blk.0.attn_k.weight"),
        ("CUDA0#blk.0.attn_k.weight#0", "blk.0.attn_k.weight"),
        ("Vulkan1#blk.12.ffn_down_exps.weight#3", "blk.12.ffn_down_exps.weight"),
        ("CUDA0#output.weight#0", "output.weight"),
        ("CUDA0#blk.0.attn_k.weight", "blk.0.attn_k.weight"),  # cut off after 63 characters
        ("#blk.0.attn_k.weight#", "blk.0.attn_k.weight"),
        ("", ""),
        ("#", ""),
    ],
)
def test_plain_name(decorated: str, plain: str) -> None:
    assert plain_name(decorated) == plain


def test_one_weight_under_all_its_names() -> None:
    harness = Harness()
    begin(harness)
    x = rows(8, 3)
    run(harness, [x], [product("blk.0.attn_k.weight")])
    run(harness, [x], [product("CUDA0#blk.0.attn_k.weight#0")])
    harness.commit()
    want = dense(x)
    want += dense(x)
    check(harness, {"blk.0.attn_k.weight": want})


@pytest.mark.parametrize("asked", [False, True])
def test_which_weights_are_wanted(asked: bool) -> None:
    names = [
        "blk.0.w.weight", "output.weight", "token_embd.weight", "output_norm.weight", "blk.", "blk",
        "cache_k_l0", "output.weight.x", "", "Far0#output.weight#0", "xblk.0.w.weight",
    ]  # fmt: skip
    harness = Harness()
    begin(harness, asked)
    x = rows(8, 3)
    products = [product(name) for name in names]
    plan = harness.plan([x.rows], [], products, output_weight=asked)
    run(harness, [x], products)
    harness.commit()
    wanted = {"blk.0.w.weight"} | (
        # a model without an output.weight multiplies its token embedding instead
        {"output.weight", "token_embd.weight"} if asked else set()
    )
    assert harness.weights.keys() == plan.keys() == wanted


def test_plan_tells_the_rows_that_will_come() -> None:
    x, y = rows(8, 5, 2), rows(8, 1, 4, seed=1)
    ids = Ids(np.zeros(12, dtype=np.int32), 3, 4, 3)
    products = [
        product("blk.0.a.weight", 0),
        product("blk.0.b.weight", 0, ne2=2),
        product("blk.0.c.weight", 1, ids=0, ne2=2),
        product("blk.0.a.weight", 1),
    ]
    harness = Harness()
    plan = harness.plan([x.rows, y.rows], [ids.given], products)
    assert plan == {"blk.0.a.weight": 14, "blk.0.b.weight": 5, "blk.0.c.weight": 12}
    begin(harness)
    run(harness, [x, y], products, [ids], replay=True)
    assert {name: w[2] for name, w in harness.weights.items()} == plan


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", WHERE)
class TestErrors:
    @given(data=st.data())
    @settings(deadline=None, max_examples=30)
    def test_what_is_not_finite_is_found_where_it_is(self, where: str, data: st.DataObject) -> None:
        draw = data.draw
        w2 = draw(st.integers(1, 3))
        n_in, n1, n2 = draw(st.integers(1, 40)), draw(st.integers(1, 9)), w2 * draw(SMALL)
        x = draw(activations(n_in, n1, n2, 1))
        value = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
        channel, i1, i2 = (draw(st.integers(0, n - 1)) for n in (n_in, n1, n2))
        harness = Harness(where)
        begin(harness)
        good = [product("blk.0.good.weight", 0, ne2=w2)]
        run(harness, [x], good, replay=any_layout(where))
        harness.commit()
        want = dense(x, w2)

        begin(harness)
        bad = Activation(x.data.copy(), x.ne, x.stride, x.offset)
        bad.values[0, i2, i1, channel] = value
        products = [*good, product("blk.0.bad.weight", 1, ne2=w2), *good]
        run(harness, [x, bad], products, replay=any_layout(where))
        harness.finish()
        assert harness.error == (
            "non_finite", "blk.0.bad.weight", i2 % w2 if w2 > 1 else -1, channel
        )  # fmt: skip
        harness.discard()
        check(harness, {"blk.0.good.weight": want})

        begin(harness)  # and the next chunk counts again
        run(harness, [x], good, replay=any_layout(where))
        assert harness.error[0] == "none"
        harness.commit()
        want += dense(x, w2)
        check(harness, {"blk.0.good.weight": want})

    def test_what_lies_between_the_rows_does_not_matter(self, where: str) -> None:
        data = np.full(40, np.nan, dtype=np.float32)
        x = Activation(data, (5, 3, 1, 1), (1, 9, 36, 36), 4)
        x.values[...] = np.arange(15).reshape(1, 1, 3, 5)
        harness = Harness(where)
        begin(harness)
        run(harness, [x], [product("blk.0.w.weight")], replay=any_layout(where))
        assert harness.error[0] == "none"
        harness.commit()
        check(harness, {"blk.0.w.weight": dense(x)})

    def test_an_expert_that_is_not_finite(self, where: str) -> None:
        x = rows(8, 2, 3)
        x.values[0, 1, 1, 6] = np.inf
        ids = Ids(np.array([0, 1, 2, 3, 4, 0], dtype=np.int32), 2, 3, 2)
        harness = Harness(where)
        begin(harness)
        run(harness, [x], [product("blk.0.w.weight", ids=0, ne2=5)], [ids])
        harness.finish()
        assert harness.error == ("non_finite", "blk.0.w.weight", 3, 6)

    @pytest.mark.parametrize("expert", [-1, 4, 2**31 - 1, -(2**31)])
    def test_an_expert_that_does_not_exist(self, where: str, expert: int) -> None:
        ids = Ids(np.array([0, expert, 3], dtype=np.int32), 1, 3, 1)
        harness = Harness(where)
        begin(harness)
        run(harness, [rows(8, 1, 3)], [product("blk.0.w.weight", ids=0, ne2=4)], [ids], replay=True)
        assert harness.error == ("bad_expert", "blk.0.w.weight", expert, -1)

    def test_rows_that_are_not_contiguous(self, where: str) -> None:
        x = Activation(np.ones(64, dtype=np.float32), (8, 4, 1, 1), (4, 1, 32, 32))
        harness = Harness(where)
        begin(harness)
        run(harness, [x], [product("blk.0.w.weight")], replay=True)
        assert harness.error == ("bad_layout", "blk.0.w.weight", -1, -1)

    @pytest.mark.parametrize("again", [{"n_in": 9}, {"ne2": 3}, {"ids": 0, "ne2": 2}])
    def test_a_weight_that_changes_its_shape(self, where: str, again: dict[str, int]) -> None:
        harness = Harness(where)
        begin(harness)
        run(harness, [rows(8, 1, 6)], [product("blk.0.w.weight", ne2=2)])
        harness.commit()
        begin(harness)
        again = dict(again)
        x = rows(again.pop("n_in", 8), 1, 6)
        ids = [Ids(np.zeros(6, dtype=np.int32), 1, 6, 1)]
        run(harness, [x], [product("blk.0.w.weight", **({"ne2": 2} | again))], ids)
        assert harness.error == ("shape_changed", "blk.0.w.weight", -1, -1)

    def test_only_the_first_error_counts(self, where: str) -> None:
        x, y = rows(8, 2), rows(8, 2, seed=1)
        x.values[0, 0, 1, 2] = np.nan
        y.values[0, 0, 0, 1] = np.nan
        harness = Harness(where)
        begin(harness)
        run(harness, [x, y], [product("blk.0.x.weight", 0), product("blk.0.y.weight", 1)])
        harness.begin_decode()
        run(harness, [y], [product("blk.0.y.weight")])
        harness.finish()
        assert harness.error == ("non_finite", "blk.0.x.weight", -1, 2)
        # the error is found at once, and the rest ran unobserved; copied rows are checked while the
        # graph runs, and on a device the error is found at the end
        found_after = 1 if where == "host" else 2
        assert harness.counters[0] == (3 if where.endswith("-sums") else found_after)


def test_a_device_that_is_lost() -> None:
    """The device throws: the chunk is lost, and the next chunk's rows are copied."""
    x = rows(8, 3)
    harness = Harness("device-sums")
    begin(harness)
    far_device_lose(True)
    try:
        run(harness, [x], [product("blk.0.w.weight")], replay=True)
    finally:
        far_device_lose(False)
    assert harness.error == ("device_failed", "blk.0.w.weight", -1, -1)
    harness.discard()
    begin(harness)
    run(harness, [x], [product("blk.0.w.weight")])
    assert harness.error[0] == "none"
    harness.commit()
    check(harness, {"blk.0.w.weight": dense(x)})
    assert harness.counters[1] == x.data.nbytes


def test_nothing_is_seen_while_it_is_off() -> None:
    harness = Harness()
    harness.set_enabled(False)
    begin(harness)
    run(harness, [rows(8, 2)], [product("blk.0.w.weight")])
    assert harness.weights == {}
    assert harness.counters == (0, 0, 0)


# --- graphs that end early -----------------------------------------------------------------------


class TestLeaving:
    """A graph ends when its wanted weights and the values that it writes for later graphs have run,
    in whatever order: a backend may change it (graph_optimize in ggml-vulkan.cpp)."""

    X, Y = rows(6, 5), rows(6, 3, seed=1)
    A, B = product("blk.0.a.weight", 0), product("blk.0.b.weight", 1)
    STATE = product("", 1, n_out=0)
    HEAD = product("output.weight", 0)

    def end(self, harness: Harness, products: list[tuple[Any, ...]]) -> tuple[int, int]:
        end: tuple[int, int] = harness.end_of([self.X.rows, self.Y.rows], [], products)
        return end

    @pytest.mark.parametrize("order", [[0, 1, 2, 3], [1, 2, 0, 3], [1, 0, 2, 3]])
    @pytest.mark.parametrize("where", ["host", "device"])
    def test_what_is_written_is_written(self, where: str, order: list[int]) -> None:
        built = [self.STATE, self.A, self.B, self.HEAD]
        harness = Harness(where)
        assert self.end(harness, built) == (2, 1)
        harness.end_after(2, 1)
        begin(harness)
        for ubatch in range(1, 4):
            run(harness, [self.X, self.Y], [built[i] for i in order])
            assert harness.ended == ubatch
            assert harness.copied == [self.Y.data.tolist()]
        harness.commit()
        want = {"blk.0.a.weight": dense(self.X), "blk.0.b.weight": dense(self.Y)}
        for name, once in want.items():
            want[name] = once.times(3)
        check(harness, want)

    def test_nowhere_if_something_is_written_after_all(self) -> None:
        harness = Harness()
        assert self.end(harness, [self.A, self.B, self.STATE]) == (0, 0)
        assert self.end(harness, [self.HEAD, self.STATE]) == (0, 0)
        harness.end_after(0, 0)
        begin(harness)
        run(harness, [self.X, self.Y], [self.A, self.B, self.STATE])
        assert harness.ended == 0
        assert harness.copied == [self.Y.data.tolist()]


# --- who shares with whom ------------------------------------------------------------------------

WEIGHTS = [f"blk.0.{name}.weight" for name in ("q", "k", "v", "gate", "up")]


@dataclass
class Graph:
    """Which weight multiplies which activation; the graph runs once for each ubatch, on new
    rows."""

    products: list[tuple[int, int]]  # (weight, activation)
    n_rows: list[int]  # of each activation
    n_ubatches: int


@dataclass
class Chunk:
    decodes: list[Graph]
    kept: bool
    seed: int


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    n_activations = draw(st.integers(1, 3))
    # often the same number everywhere, because only then can two groups be confused
    n_rows = draw(st.sampled_from([[2] * n_activations, list(range(1, n_activations + 1))]))
    products = draw(
        st.lists(
            st.tuples(st.integers(0, len(WEIGHTS) - 1), st.integers(0, n_activations - 1)),
            min_size=1,
            max_size=7,
        )
    )
    return Graph(products, n_rows, draw(st.integers(1, 2)))


@st.composite
def chunks(draw: st.DrawFn) -> list[Chunk]:
    usual = draw(st.lists(graphs(), min_size=1, max_size=2))  # the common behaviour of chunks
    return [
        Chunk(
            draw(st.lists(st.one_of(st.sampled_from(usual), graphs()), min_size=1, max_size=2)),
            draw(st.sampled_from([True, True, False])),
            draw(st.integers(0, 2**32)),
        )
        for _ in range(draw(st.integers(1, 4)))
    ]


@dataclass
class Steps:
    """Collects chunks the way Session::step does."""

    harness: Harness
    grouped: bool = True
    want: dict[str, Expected] = field(default_factory=dict)

    def graphs_of(self, chunk: Chunk) -> Iterator[tuple[int, Graph, list[Activation]]]:
        rng = np.random.default_rng(chunk.seed)
        for decode, graph in enumerate(chunk.decodes):
            for _ in range(graph.n_ubatches):
                yield decode, graph, [rows(4, n, seed=rng.integers(2**32)) for n in graph.n_rows]

    def collect(self, chunk: Chunk) -> None:
        self.harness.begin_chunk()
        last = -1
        for decode, graph, xs in self.graphs_of(chunk):
            if decode != last:
                self.harness.begin_decode()
            last = decode
            run(self.harness, xs, [product(WEIGHTS[w], x) for w, x in graph.products])
        self.harness.finish()

    def step(self, chunk: Chunk) -> None:
        self.collect(chunk)
        if self.harness.error[0] == "regroup" or not self.harness.groups_agree:
            assert self.grouped
            self.grouped = False
            self.harness.ungroup()
            self.collect(chunk)
        assert self.harness.error[0] == "none"
        assert self.harness.groups_agree
        if not chunk.kept:
            self.harness.discard()
            return
        self.harness.commit()
        for _, graph, xs in self.graphs_of(chunk):
            for w, x in graph.products:
                more = dense(xs[x])
                if WEIGHTS[w] in self.want:
                    self.want[WEIGHTS[w]] += more
                else:
                    self.want[WEIGHTS[w]] = more


class TestSharing:
    @pytest.mark.parametrize("where", ["host", "device-sums"])
    @given(plan=chunks())
    @settings(deadline=None, max_examples=300)
    def test_it_never_shows_in_the_sums(self, where: str, plan: list[Chunk]) -> None:
        steps = Steps(Harness(where))
        for chunk in plan:
            steps.step(chunk)
            check(steps.harness, steps.want)

    def test_weights_of_one_activation_share_a_slot(self) -> None:
        steps = Steps(Harness())
        together = Graph([(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)], [3, 3], 2)
        for seed in range(3):
            steps.step(Chunk([together], True, seed))
        slots = [steps.harness.weights[name][3] for name in WEIGHTS]
        assert slots == [0, 0, 0, 1, 1]
        assert steps.harness.counters[0] == 3 * 2 * 2
        check(steps.harness, steps.want)

    def test_weights_that_part_get_what_is_theirs(self) -> None:
        steps = Steps(Harness())
        steps.step(Chunk([Graph([(0, 0), (1, 0)], [3], 1)], True, 0))
        assert steps.grouped
        steps.step(Chunk([Graph([(0, 0), (1, 1)], [3, 3], 1)], True, 1))
        assert not steps.grouped
        steps.step(Chunk([Graph([(0, 0), (1, 0)], [3], 1)], True, 2))
        assert len({steps.harness.weights[name][3] for name in WEIGHTS[:2]}) == 2
        check(steps.harness, steps.want)

    def test_one_of_a_group_alone(self) -> None:
        steps = Steps(Harness())
        steps.step(Chunk([Graph([(0, 0), (1, 0)], [3], 1)], True, 0))
        steps.step(Chunk([Graph([(1, 0)], [3], 1)], True, 1))
        check(steps.harness, steps.want)

    def test_a_weight_used_twice_in_a_graph(self) -> None:
        steps = Steps(Harness())
        twice = Graph([(0, 0), (1, 0), (0, 1), (1, 1)], [2, 5], 2)
        for seed in range(2):
            steps.step(Chunk([twice], True, seed))
        check(steps.harness, steps.want)

    def test_a_failed_first_chunk_leaves_nothing(self) -> None:
        steps = Steps(Harness())
        begin(steps.harness)
        bad = rows(4, 2)
        bad.values[0, 0, 0, 0] = np.nan
        run(steps.harness, [bad], [product(WEIGHTS[0]), product(WEIGHTS[1])])
        assert steps.harness.error[0] == "non_finite"
        steps.harness.discard()
        for seed in range(2):
            steps.step(Chunk([Graph([(0, 0), (1, 1)], [2, 2], 1)], True, seed))
        check(steps.harness, steps.want)
