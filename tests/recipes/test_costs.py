"""The costs of types, where the truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imatrix.recipes.costs import POWERS, Corrections, costs

# Exponentials of sums of a few logarithms: each rounds by 2^-53 of some ten.
CLOSE = 1e-12

ERRORS = {"q8_0": 0.001, "q6_k": 0.02, "q4_k": 0.4, "q3_k": 2.0, "q2_k": 9.0, "iq1_s": 40.0}


@pytest.mark.parametrize("power", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("at", [("q4_k", "q2_k"), ("q6_k", "q3_k", "iq1_s")])
def test_a_power_law_is_found_again(power: float, at: tuple[str, ...]) -> None:
    true = {name: 0.003 * error**power for name, error in ERRORS.items()}
    found = costs(
        {"g": {**ERRORS, "f16": 0.0}},
        {"g": {name: [0.9 * true[name], 1.1 * true[name]] for name in at}},
        kinds={"g": "attn_v"},
    )
    assert found.kl["g"] == pytest.approx({**true, "f16": 0.0}, rel=CLOSE)
    assert found.curves["g"].power == pytest.approx(power, rel=CLOSE)
    assert found.curves["g"].n_points == len(at)


def test_three_points_give_the_power_of_least_squares() -> None:
    measured = {"q6_k": 2e-4, "q4_k": 1e-3, "q2_k": 0.05}
    found = costs({"g": ERRORS}, {"g": {k: [v] for k, v in measured.items()}}, kinds={"g": "k"})
    x = np.log([ERRORS[name] for name in measured])
    slope = float(np.polyfit(x, np.log(list(measured.values())), 1)[0])
    # polyfit solves by singular values, with roundings of its own
    assert found.curves["g"].power == pytest.approx(slope, rel=1e-9)
    # measured ones stay; between two it is the line in logarithms, beyond them the power
    between = math.exp(np.interp(math.log(2), x, np.log(list(measured.values()))))
    beyond = 0.05 * (40 / 9) ** slope
    below = 2e-4 * (0.001 / 0.02) ** slope
    assert found.kl["g"] == pytest.approx(
        {**measured, "q3_k": between, "iq1_s": beyond, "q8_0": below}, rel=1e-9
    )


def test_one_point_takes_the_power_of_its_kind() -> None:
    groups = {f"v{n}": ERRORS for n in range(4)} | {"d": ERRORS, "e": ERRORS}
    kinds = {f"v{n}": "attn_v" for n in range(4)} | {"d": "ffn_down", "e": "output"}
    measured = {
        f"v{n}": {name: [0.01 * ERRORS[name] ** p] for name in ("q4_k", "q2_k")}
        for n, p in enumerate((0.8, 0.9, 1.5))
    }
    measured["v3"] = {"q3_k": [0.5]}
    measured["d"] = {"q3_k": [0.25]}
    found = costs(groups, measured, kinds=kinds)
    assert found.curves["v3"].power == pytest.approx(0.9, rel=CLOSE)
    assert found.kl["v3"]["iq1_s"] == pytest.approx(0.5 * 20**0.9, rel=CLOSE)
    # none of its kind has two: that of all groups
    assert found.kl["d"]["iq1_s"] == pytest.approx(0.25 * 20**0.9, rel=CLOSE)
    # not measured, nor any of its kind: the median of all
    assert found.curves["e"].n_points == 0
    assert found.kl["e"]["q8_0"] > 0


def test_without_two_points_anywhere_kl_grows_with_the_error() -> None:
    found = costs({"g": ERRORS}, {"g": {"q3_k": [0.5]}}, kinds={"g": "attn_v"})
    assert found.kl["g"] == pytest.approx({k: 0.25 * e for k, e in ERRORS.items()}, rel=CLOSE)


def test_a_group_that_was_not_measured_goes_by_its_kind() -> None:
    measured = {
        f"v{n}": {name: [a * ERRORS[name]] for name in ("q4_k", "q2_k")}
        for n, a in enumerate((0.1, 0.2, 0.9))
    }
    measured["d"] = {name: [7 * ERRORS[name]] for name in ("q4_k", "q2_k")}
    kinds = {"v0": "v", "v1": "v", "v2": "v", "v3": "v", "d": "d"}
    twice = {name: 2 * error for name, error in ERRORS.items()}
    found = costs(
        {**dict.fromkeys(("v0", "v1", "v2", "d"), ERRORS), "v3": twice}, measured, kinds=kinds
    )
    assert found.kl["v3"] == pytest.approx({k: 0.2 * e for k, e in twice.items()}, rel=CLOSE)


@pytest.mark.parametrize(
    ("low", "high", "power"),
    [(0.3, 0.301, POWERS[0]), (0.3, 0.2, POWERS[0]), (1e-9, 0.3, POWERS[1])],
)
def test_an_absurd_power_is_held_back(low: float, high: float, power: float) -> None:
    found = costs({"g": ERRORS}, {"g": {"q4_k": [low], "q2_k": [high]}}, kinds={"g": "attn_v"})
    own = found.kl["g"]
    assert found.curves["g"].power == power
    # what was measured stays
    assert own["q4_k"] == low
    assert own["q2_k"] == high
    # beyond it by the power, from both pooled if they fall
    last = math.sqrt(low * high) if high < low else high
    assert own["iq1_s"] == pytest.approx(last * (40 / 9) ** power, rel=CLOSE)
    first = math.sqrt(low * high) if high < low else low
    assert own["q6_k"] == pytest.approx(first * (0.02 / 0.4) ** power, rel=CLOSE)


def test_noise_is_drawn_to_the_law() -> None:
    """A value that its standard error hides counts as much as the law is sure beside that error."""
    chunks = np.array([0.004, -0.003, 0.002, -0.004])  # mean -0.00025
    noise = chunks.std(ddof=1) / 2
    found = costs(
        {"g": ERRORS},
        {"g": {"q3_k": [0.5, 0.5], "q2_k": [2.25, 2.25], "q8_0": chunks}},
        kinds={"g": "attn_v"},
    )
    law = 0.25 * ERRORS["q8_0"]
    assert found.curves["g"].n_points == 2
    share = law**2 / (law**2 + noise**2)
    assert found.kl["g"]["q8_0"] == pytest.approx((1 - share) * law, rel=CLOSE)
    assert found.kl["g"]["q3_k"] == 0.5


def test_a_group_of_noise_alone_goes_by_its_kind() -> None:
    found = costs(
        {"g": ERRORS, "h": ERRORS},
        {"g": {"q3_k": [0.5, 0.5]}, "h": {"q3_k": [30.0, -30.0], "q2_k": [-1e-9]}},
        kinds={"g": "attn_v", "h": "attn_v"},
    )
    assert found.curves["h"].n_points == 0
    # a standard error of 30 beside a law of 0.5
    assert found.kl["h"]["q3_k"] == pytest.approx(0.5, rel=1e-3)
    # below zero, and one chunk tells no error: it costs nothing
    assert found.kl["h"]["q2_k"] == 0


NAMES = list("abcdefgh")


@given(
    drawn=st.lists(st.floats(1e-6, 1e3), min_size=8, max_size=8),
    measured=st.dictionaries(
        st.sampled_from(NAMES),
        st.lists(st.floats(-1e-3, 5), min_size=1, max_size=4),
        min_size=1,
    ),
)
@settings(deadline=None)
def test_kl_grows_with_the_error_and_is_never_negative(
    drawn: list[float], measured: dict[str, list[float]]
) -> None:
    errors = dict(zip(NAMES, drawn, strict=True))
    surely = {"h": errors, "g": {"x": 1.0}}
    found = costs(surely, {"h": measured, "g": {"x": [0.1]}}, kinds={"g": "v", "h": "v"}).kl["h"]
    assert all(math.isfinite(kl) and kl >= 0 for kl in found.values())
    rest = sorted((errors[name], kl) for name, kl in found.items() if name not in measured)
    for (_, low), (_, high) in itertools.pairwise(rest):
        assert low <= high * (1 + CLOSE)
    for name, chunks in measured.items():
        mean = np.mean(chunks)
        noise = np.std(chunks, ddof=1) / math.sqrt(len(chunks)) if len(chunks) > 1 else 0
        if mean > 2.001 * noise:
            assert found[name] == pytest.approx(mean, rel=CLOSE)


def test_corrections() -> None:
    given_ = ({"g": ERRORS, "h": ERRORS}, {"g": {"q3_k": [0.5]}, "h": {"q3_k": [0.1]}})
    kinds = {"g": "attn_v", "h": "ffn_down"}
    plain = costs(*given_, kinds=kinds)
    corrections = Corrections(kinds={"attn_v": 1.5}, scale=0.8, power=1.1)
    found = costs(*given_, kinds=kinds, corrections=corrections)
    assert found.kl["g"] == pytest.approx({k: 1.5 * v for k, v in plain.kl["g"].items()})
    assert found.kl["h"] == plain.kl["h"]
    assert found.curves == plain.curves
    assert corrections.total(0.2) == pytest.approx(0.8 * 0.2**1.1, rel=CLOSE)
    assert corrections.sum_for(corrections.total(0.2)) == pytest.approx(0.2, rel=CLOSE)
    assert Corrections().total(0.2) == 0.2


def test_weights_without_importance_cost_nothing() -> None:
    found = costs({"g": {"q2_k": 0.0, "f16": 0.0}}, {}, kinds={"g": "ffn_up_exps"})
    assert found.kl == {"g": {"q2_k": 0.0, "f16": 0.0}}


@pytest.mark.parametrize(
    ("errors", "measured", "told"),
    [
        ({"g": {"q": -1.0}}, {}, "g as q: expected an error of 0 or more, got -1.0"),
        ({"g": {"q": math.nan}}, {}, "expected an error of 0 or more, got nan"),
        ({"x": {"q": 1.0}}, {}, "the group x has no kind"),
        ({"g": {"q": 1.0}}, {"h": {"q": [1.0]}}, "the group h was measured, but it has no errors"),
        ({"g": {"q": 1.0}}, {"g": {"r": [1.0]}}, "g was measured as r, but that has no error"),
        ({"g": {"q": 1.0}}, {"g": {"q": [math.inf]}}, "g as q: expected a finite KL of each chunk"),
        ({"g": {"q": 1.0}}, {"g": {"q": []}}, "g as q: expected a finite KL of each chunk"),
        ({"g": {"q": 1.0}}, {"g": {"q": [-1.0]}}, "no measured KL is surely above zero"),
        ({"g": {"q": 1.0}}, {}, "no measured KL is surely above zero"),
    ],
)
def test_numbers_that_make_no_sense(
    errors: dict[str, dict[str, float]], measured: dict[str, dict[str, list[float]]], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        costs(errors, measured, kinds={"g": "attn_v"})


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"power": -1.0}, {"kinds": {"v": math.nan}}])
def test_corrections_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="corrections are above 0, got"):
        Corrections(**wrong)  # type: ignore[arg-type]
