"""The frontier in a recipe's file: what goes in comes out, and damage is told."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from imatrix.quantization.frontier import FrontierCurve, FrontierPoint


def curve(n: int = 5) -> FrontierCurve:
    return FrontierCurve(
        bytes=np.arange(1, n + 1, dtype=np.int64) * 1000,
        kl=1.0 / np.arange(1, n + 1),
        measured=(FrontierPoint(bytes=2000, kl=0.4, error=0.01),),
        mixtures=(FrontierPoint(bytes=3000, kl=0.9, name="Q3_K_M"),),
        chosen=(2000,),
    )


def data() -> Any:
    return json.loads(json.dumps(curve().as_data()))


def test_what_goes_into_a_file_comes_out() -> None:
    found = FrontierCurve.of_data(data(), "recipe.json")
    assert found.bytes.tolist() == [1000, 2000, 3000, 4000, 5000]
    assert found.kl.tolist() == [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert found.measured == (FrontierPoint(bytes=2000, kl=0.4, error=0.01),)
    (mixture,) = found.mixtures
    assert (mixture.bytes, mixture.kl, mixture.name) == (3000, 0.9, "Q3_K_M")
    assert math.isnan(mixture.error)
    assert found.chosen == (2000,)


def test_of_a_long_curve_the_file_keeps_both_ends() -> None:
    predicted = curve(12_345).as_data()["predicted"]
    assert len(predicted["bytes"]) == len(predicted["kl"]) == 200
    assert (predicted["bytes"][0], predicted["bytes"][-1]) == (1000, 12_345_000)
    # each size has still its own KL
    assert all(
        kl == pytest.approx(1000 / n, rel=1e-15)  # one division, rounded once
        for n, kl in zip(predicted["bytes"], predicted["kl"], strict=True)
    )


def test_a_curve_without_points() -> None:
    empty = FrontierCurve(bytes=np.array([], np.int64), kl=np.array([]))
    assert not len(FrontierCurve.of_data(empty.as_data(), "x").bytes)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), [], r"expected the frontier as an object, got \[\]"),
        (("predicted",), None, 'expected "predicted" as an object, got None'),
        (("predicted", "kl"), 3, 'expected "kl" as a list, got 3'),
        (("predicted", "kl"), [1.0], r"one KL for each size, got arrays of the shapes \(5,\)"),
        (("predicted", "kl", 0), "x", "expected a number, got 'x'"),
        (("predicted", "kl", 0), float("nan"), "numbers of 0 or more"),
        (("predicted", "kl", 0), -1, "numbers of 0 or more"),
        (("predicted", "bytes", 0), 2000, "must be above 0 and ascend"),
        (("predicted", "bytes", 0), True, "expected a number of bytes, got True"),
        (("predicted", "bytes", 0), 2**60, "expected a number of bytes"),
        (("measured", 0), 1, 'an item of "measured" as an object, got 1'),
        (("measured", 0, "kl"), -1, "a KL of 0 or more, got 2000 and -1"),
        (("measured", 0, "error"), -1, "a standard error is 0 or more"),
        (("mixtures", 0, "name"), 5, "expected a name, got 5"),
        (("chosen",), None, 'expected "chosen" as a list'),
        (("chosen", 0), 0, "expected a number of bytes, got 0"),
    ],
)
def test_damage_is_told(path: tuple[Any, ...], value: object, message: str) -> None:
    whole = {"": data()}
    place: Any = whole
    for key in ("", *path)[:-1]:
        place = place[key]
    place[("", *path)[-1]] = value
    with pytest.raises(ValueError, match=f'^r.json: its "frontier" is damaged: .*{message}'):
        FrontierCurve.of_data(whole[""], "r.json")
