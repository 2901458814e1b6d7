"""What each type costs each group: from a few measured points to the KL of all types.

Two things are known of a group of tensors. Of every type, the error E: the sum over its values of
importance * (w - q)^2, which no pass of the model is needed for. Of a few types, the KL divergence
of the model's output, measured with this group alone quantized. The KL of the others follows from

    KL = a * E^p

through the measured points. For small changes of the weights KL grows with their square, so with E
itself (p = 1): it is zero where nothing changed, and that is its least, so the first term of its
Taylor series is the quadratic one (Kullback, "Information Theory and Statistics", 1959, chapter 2,
section 6). For large changes it grows more slowly, as the output has nothing left to lose, or at
once, where a further error tips what attention looks at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["POWERS", "Corrections", "Costs", "Curve", "costs"]

POWERS = (0.5, 2.0)
"""The least and the greatest power. From 4 to 2 bits E grows some 20 to 60 times, so a power that is
wrong by 1 is wrong by that factor in KL: two points that differ by little but noise, or one near
zero, must not give a power of 5, or a negative one."""

_SURE = 2.0  # standard errors above zero, from where on a measured KL counts as it is


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """What whole recipes showed of the sum, which the groups by themselves could not.

    Attributes:
        kinds: the kind of a group -> factor of its KL; 1 for those not named.
        scale: s in total = s * sum^q, for the KL of a whole recipe.
        power: q in it.
    """

    kinds: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0
    power: float = 1.0

    def __post_init__(self) -> None:
        factors = {**self.kinds, "the scale": self.scale, "the power": self.power}
        for name, value in factors.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"corrections are above 0, got {value} for {name}")

    def total(self, kl_sum: float) -> float:
        """KL of a whole recipe whose groups' KL have that sum."""
        return float(self.scale * kl_sum**self.power)

    def sum_for(self, kl: float) -> float:
        """The sum with which a whole recipe has that KL."""
        return float((kl / self.scale) ** (1 / self.power))


@dataclass(frozen=True)
class Curve:
    """KL = scale * E^power for one group.

    Attributes:
        scale: a.
        power: p, from POWERS.
        n_points: measured points that it goes by; 0 if it is that of the group's kind.
    """

    scale: float
    power: float
    n_points: int

    def at(self, error: float) -> float:
        """KL of that error, in nats a token."""
        return self.scale * error**self.power if error > 0 else 0.0


@dataclass(frozen=True)
class Costs:
    """What every type costs every group.

    Attributes:
        kl: group -> type -> KL in nats a token, 0 or more, corrected.
        curves: group -> the power law that the types which were not measured go by, not corrected.
    """

    kl: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class _Point:
    """A measured type.

    Attributes:
        type: its name.
        error: E.
        kl: mean over the chunks.
        noise: the mean's standard error; 0 for one chunk.
    """

    type: str
    error: float
    kl: float
    noise: float

    @property
    def sure(self) -> bool:
        return self.kl > 0 and self.kl > _SURE * self.noise


def costs(
    errors: Mapping[str, Mapping[str, float]],
    measured: Mapping[str, Mapping[str, ArrayLike]],
    *,
    kinds: Mapping[str, str],
    corrections: Corrections | None = None,
) -> Costs:
    """KL of every type of every group.

    A measured type costs what was measured, its mean over the chunks, if that is more than 2
    standard errors above zero. One that is not is drawn towards the power law, the more, the larger
    its standard error is beside what the law tells: the weighted mean of both with the variances
    (standard error)^2 and (law)^2, since the law may well be off by as much as itself.

    Between measured types KL is interpolated in logarithms of E and KL; beyond them it goes on by
    the power law from the last one. The power is that through two points, or of least squares in
    logarithms for more; with one point it is the median of the groups of the same kind, or of all
    groups if none of the kind has two points, or 1. It is held within POWERS. A group without any
    point of its own takes the median law of its kind, or of all.

    So KL never falls as E grows, except between measured types that show just that: a measured
    type keeps what was measured, and for the interpolation such neighbours are pooled.

    Args:
        errors: group -> type -> E, 0 or more, for every type that the group may get. E = 0 is the
            source's own type, which costs nothing.
        measured: group -> type -> KL of each chunk [n_chunks], in nats a token. Types without an
            error are refused; groups may be absent.
        kinds: group -> kind, such as "attn_v".
        corrections: factors by kind; None for none.

    Raises:
        ValueError: a number that is negative (errors) or not finite, a measured group or type
            without errors, a group without a kind, or nothing measured above zero.
    """
    corrections = corrections or Corrections()
    points = _points(errors, measured, kinds)
    sure = {group: [p for p in own if p.sure and p.error > 0] for group, own in points.items()}
    sure = {group: own for group, own in sure.items() if own}
    if not sure and any(error > 0 for own in errors.values() for error in own.values()):
        raise ValueError(
            "no measured KL is surely above zero, so nothing tells what the others are; measure "
            "coarser types, or on more text"
        )
    curves = _curves(sure, {group: kinds[group] for group in errors})
    return Costs(
        kl={
            group: {
                type_: kl * corrections.kinds.get(kinds[group], 1.0)
                for type_, kl in _costs_of(own, points.get(group, []), curves[group]).items()
            }
            for group, own in errors.items()
        },
        curves=curves,
    )


def _points(
    errors: Mapping[str, Mapping[str, float]],
    measured: Mapping[str, Mapping[str, ArrayLike]],
    kinds: Mapping[str, str],
) -> dict[str, list[_Point]]:
    """The measured types of each group, by E."""
    for group, own in errors.items():
        if group not in kinds:
            raise ValueError(f"the group {group} has no kind")
        for name, error in own.items():
            if not (math.isfinite(error) and error >= 0):
                raise ValueError(f"{group} as {name}: expected an error of 0 or more, got {error}")
    found: dict[str, list[_Point]] = {}
    for group, trials in measured.items():
        if group not in errors:
            raise ValueError(f"the group {group} was measured, but it has no errors")
        for name, given in trials.items():
            if name not in errors[group]:
                raise ValueError(f"{group} was measured as {name}, but that has no error")
            chunks = np.asarray(given, np.float64).ravel()
            if not (chunks.size and np.isfinite(chunks).all()):
                raise ValueError(f"{group} as {name}: expected a finite KL of each chunk")
            noise = chunks.std(ddof=1) / math.sqrt(chunks.size) if chunks.size > 1 else 0.0
            found.setdefault(group, []).append(
                _Point(name, errors[group][name], float(chunks.mean()), float(noise))
            )
        found.get(group, []).sort(key=lambda point: point.error)
    return found


def _curves(sure: Mapping[str, Sequence[_Point]], kinds: Mapping[str, str]) -> dict[str, Curve]:
    """The law of each group, its own or that of its kind.

    Args:
        sure: group -> points above zero that it goes by, at least one.
        kinds: of all groups.
    """
    powers = {
        group: power for group, own in sure.items() if (power := _power_through(own)) is not None
    }
    curves = {}
    for group, kind in kinds.items():
        alike = [other for other in sure if kinds[other] == kind]
        usual = _median([powers[g] for g in alike if g in powers] or powers.values() or [1.0])
        if group in sure:
            power = powers.get(group, usual)
            scale = math.exp(_log_scale(sure[group], power))
        else:
            power = usual
            scales = [_log_scale(sure[g], power) for g in alike or sure]
            scale = math.exp(_median(scales)) if scales else 0.0
        curves[group] = Curve(scale, power, len(sure.get(group, ())))
    return curves


def _power_through(points: Sequence[_Point]) -> float | None:
    """The slope of log KL over log E by least squares, within POWERS; None if there is but one E."""
    x = np.log([point.error for point in points])
    y = np.log([point.kl for point in points])
    spread = x - x.mean()
    if not (spread**2).sum() > 1e-12:  # of E within a millionth of each other
        return None
    slope = float((spread * y).sum() / (spread**2).sum())
    return min(max(slope, POWERS[0]), POWERS[1])


def _log_scale(points: Sequence[_Point], power: float) -> float:
    return float(np.mean([math.log(point.kl) - power * math.log(point.error) for point in points]))


def _costs_of(
    errors: Mapping[str, float], points: Sequence[_Point], curve: Curve
) -> dict[str, float]:
    """KL of each type of a group."""
    known = {point.type: _drawn(point, curve.at(point.error)) for point in points}
    nodes = _pooled(
        [(math.log(p.error), math.log(known[p.type])) for p in points if p.error and known[p.type]]
    )
    found = {}
    for name, error in errors.items():
        if name in known:
            found[name] = known[name]
        elif not nodes or not error:
            found[name] = curve.at(error)
        else:
            x = math.log(error)
            y = float(np.interp(x, [node[0] for node in nodes], [node[1] for node in nodes]))
            beyond = min(x - nodes[0][0], 0.0) + max(x - nodes[-1][0], 0.0)
            found[name] = math.exp(y + curve.power * beyond)
    return found


def _drawn(point: _Point, law: float) -> float:
    """What a measured type costs, see costs()."""
    if point.sure:
        return point.kl
    kl = max(point.kl, 0.0)
    if not point.noise:
        return kl
    own = law**2 / (law**2 + point.noise**2)
    return own * kl + (1 - own) * law


def _pooled(nodes: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The nodes (x, y) in order of x with y never falling: those that fall get their mean."""
    pools: list[list[tuple[float, float]]] = []
    for node in nodes:
        pools.append([node])
        while len(pools) > 1 and _mean(pools[-2]) >= _mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [(x, _mean(pool)) for pool in pools for x, _ in pool]


def _mean(pool: Sequence[tuple[float, float]]) -> float:
    return sum(y for _, y in pool) / len(pool)


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))
