"""The choice, held against an exhaustive search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imatrix.recipes import choosing
from imatrix.recipes.choosing import Chosen, Frontier, Item, Option

# Sums of KL are added in another order than the answer's, so they differ by roundings: at most one
# of 2^-53 an addition, of which there are fewer than a thousand.
ROUNDING = 1e-12


def item(name: str, *options: tuple[int, float]) -> Item:
    return Item(name, tuple(Option(f"t{n}", *option) for n, option in enumerate(options)))


def everything(items: Sequence[Item]) -> list[tuple[int, float]]:
    """(bytes, KL) of every choice."""
    return [
        (sum(o.bytes for o in options), math.fsum(o.kl for o in options))
        for options in itertools.product(*(each.options for each in items))
    ]


def check(chosen: Chosen, items: Sequence[Item]) -> None:
    """Bytes and KL are those of the types told."""
    assert list(chosen.types) == [each.name for each in items]
    options = [next(o for o in each.options if o.type == chosen.types[each.name]) for each in items]
    assert chosen.bytes == sum(o.bytes for o in options)
    assert chosen.kl == math.fsum(o.kl for o in options)


ITEMS = st.lists(
    st.lists(
        # thousandths of a power of two, whose sums are exact in any order
        st.tuples(st.integers(0, 60), st.integers(0, 1024).map(lambda n: n / 1024)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
).map(lambda drawn: [item(f"i{n}", *options) for n, options in enumerate(drawn)])


@given(items=ITEMS, scale=st.sampled_from([1, 7, 4096]), share=st.floats(0, 1.2))
@settings(deadline=None)
def test_the_choice_is_that_of_an_exhaustive_search(
    items: list[Item], scale: int, share: float
) -> None:
    items = [
        Item(i.name, tuple(Option(o.type, o.bytes * scale + 5, o.kl) for o in i.options))
        for i in items
    ]
    frontier = Frontier(items)
    assert frontier.exact
    every = everything(items)
    least, most = min(b for b, _ in every), max(b for b, _ in every)
    n_bytes = least + int(share * (most - least))

    chosen = frontier.at_most(n_bytes)
    check(chosen, items)
    assert chosen.bytes <= n_bytes
    best = min(kl for b, kl in every if b <= n_bytes)
    assert chosen.kl == best
    # of equal ones a smallest
    assert chosen.bytes == min(b for b, kl in every if kl == best)
    assert frontier.bound(n_bytes) <= best + ROUNDING

    wanted = max(max(kl for _, kl in every) * share, frontier.largest.kl)
    found = frontier.reaching(wanted)
    check(found, items)
    assert found.kl <= wanted
    assert found.bytes == min(b for b, kl in every if kl <= wanted)
    assert frontier.reaching(chosen.kl).bytes == chosen.bytes


@given(items=ITEMS, cells=st.integers(1, 40), share=st.floats(0, 1))
@settings(deadline=None)
def test_with_a_coarse_table_the_loss_is_within_what_is_told(
    items: list[Item], cells: int, share: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "_CELLS", cells)
        frontier = Frontier(items)
    every = everything(items)
    least, most = min(b for b, _ in every), max(b for b, _ in every)
    n_bytes = least + int(share * (most - least))

    chosen = frontier.at_most(n_bytes)
    check(chosen, items)
    assert chosen.bytes <= n_bytes
    within = [kl for b, kl in every if b <= n_bytes - frontier.loss]
    if within:
        assert chosen.kl <= min(within)
    step = max(o.kl for i in items for o in i.options)
    assert chosen.kl <= frontier.bound(n_bytes) + step + ROUNDING

    wanted = max(max(kl for _, kl in every) * share, frontier.largest.kl)
    found = frontier.reaching(wanted)
    check(found, items)
    assert found.kl <= wanted
    assert found.bytes <= min(b for b, kl in every if kl <= wanted) + frontier.loss


@given(items=ITEMS)
@settings(deadline=None)
def test_the_frontier_falls_and_its_points_are_possible(items: list[Item]) -> None:
    frontier = Frontier(items)
    points = frontier.points
    for (small, much), (large, little) in itertools.pairwise(points):
        assert small < large
        assert much > little
    every = everything(items)
    for n_bytes, kl in points:
        assert (n_bytes, kl) in every
        assert frontier.at_most(n_bytes).bytes == n_bytes
    assert points[0] == pytest.approx((frontier.smallest.bytes, frontier.smallest.kl))
    assert points[-1] == pytest.approx((frontier.largest.bytes, frontier.largest.kl))


def large(n_items: int, seed: int, unit: int) -> list[Item]:
    """As a model has them: sizes of 1 to 30 times `unit`, KL that falls as 4^-bits."""
    rng = np.random.default_rng(seed)
    bits = (1.75, 2.06, 2.31, 2.56, 3.06, 3.44, 4.25, 4.5, 5.5, 6.56, 8.5, 16)
    found = []
    for n in range(n_items):
        values = int(rng.integers(1, 31)) * unit
        weight = 10 ** rng.uniform(-3, 0)
        options = [
            (
                int(values * b) // 8,
                0.0 if b == 16 else float(weight * 4**-b * rng.uniform(0.7, 1.4)),
            )
            for b in bits
        ]
        found.append(item(f"i{n}", *options))
    return found


@pytest.mark.parametrize(("n_items", "unit"), [(30, 100), (300, 1_000_003)])
def test_a_large_case_is_near_the_bound(n_items: int, unit: int) -> None:
    items = large(n_items, seed=n_items, unit=unit)
    frontier = Frontier(items)
    assert frontier.exact == (n_items == 30)
    low, high = frontier.smallest.bytes, frontier.largest.bytes
    before = math.inf
    for share in (0, 0.01, 0.1, 0.3, 0.6, 0.99, 1):
        n_bytes = low + int(share * (high - low))
        chosen = frontier.at_most(n_bytes)
        check(chosen, items)
        assert chosen.bytes <= n_bytes
        bound = frontier.bound(n_bytes)
        assert bound * (1 - ROUNDING) - ROUNDING <= chosen.kl <= before
        # The step that the linear relaxation takes in part is one of the items' and is worth no
        # more than what the dearest item has to lose.
        assert chosen.kl <= bound + max(i.options[0].kl for i in items)
        before = chosen.kl
        again = frontier.reaching(chosen.kl)
        assert again.kl <= chosen.kl
        assert again.bytes <= chosen.bytes + frontier.loss


def test_the_bound_is_that_of_the_lagrangian() -> None:
    """max over lambda of: the least sum of KL + lambda * bytes, less lambda * n_bytes."""
    items = large(40, seed=4, unit=1000)
    frontier = Frontier(items)
    rates = np.geomspace(1e-14, 1e-2, 20001)
    for share in (0.05, 0.3, 0.8):
        n_bytes = int(
            frontier.smallest.bytes + share * (frontier.largest.bytes - frontier.smallest.bytes)
        )
        values = -rates * n_bytes
        for each in items:
            values += np.min([o.kl + rates * o.bytes for o in each.options], axis=0)
        bound = frontier.bound(n_bytes)
        assert values.max() <= bound * (1 + 1e-9)
        # neighbouring rates of the grid differ by a 700th, and so do the sums at most
        assert values.max() == pytest.approx(bound, rel=2e-3)


def test_of_options_that_another_beats_none_is_taken() -> None:
    items = [item("a", (10, 0.5), (12, 0.5), (20, 0.7), (30, 0.0)), item("b", (7, 0.1))]
    frontier = Frontier(items)
    assert frontier.points == ((17, 0.6), (37, 0.1))
    assert frontier.at_most(36).types == {"a": "t0", "b": "t0"}
    assert frontier.at_most(1000).types == {"a": "t3", "b": "t0"}


def test_nothing_to_choose_between() -> None:
    frontier = Frontier([item("a", (10, 0.5)), item("b", (3, 0.0))])
    assert frontier.at_most(13) == frontier.reaching(0.5) == Chosen({"a": "t0", "b": "t0"}, 13, 0.5)
    assert frontier.points == ((13, 0.5),)


def test_what_is_impossible_is_told_with_both_ends() -> None:
    frontier = Frontier([item("a", (2048, 0.5), (8192, 0.125)), item("b", (100, 0.0))])
    ends = (
        "they take from 2148 bytes \\(2.1 KiB\\) \\(with a KL of 0.5 nats a token\\) to 8292 bytes "
        "\\(8.1 KiB\\) \\(with 0.125\\)"
    )
    with pytest.raises(ValueError, match=f"no types are small enough for 100 bytes: {ends}"):
        frontier.at_most(100)
    with pytest.raises(ValueError, match=ends):
        frontier.bound(2147)
    for kl in (0.1, -1.0, math.nan):
        with pytest.raises(ValueError, match=ends):
            frontier.reaching(kl)


@pytest.mark.parametrize(
    ("items", "told"),
    [
        ([], "no items were given"),
        ([item("a", (1, 0.0)), item("a", (1, 0.0))], "the item a is given twice"),
        ([Item("a", ())], "the item a has no options"),
        ([Item("a", (Option("q", 1, 0.0), Option("q", 2, 0.0)))], "has the option q twice"),
        ([item("a", (-1, 0.0))], "a as t0: -1 bytes"),
        ([item("a", (1, -0.5))], "expected a KL of 0 or more, got -0.5"),
        ([item("a", (1, math.nan))], "expected a KL of 0 or more, got nan"),
    ],
)
def test_items_that_make_no_sense(items: list[Item], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Frontier(items)
