"""The choice measured as a whole, corrected, and made again.

Two things are assumed of a choice: that a type's KL follows from its error, and that the KL of all
groups add up. Both are nearly so and no more. A recipe is therefore put in place and measured as a
whole, and so are some neighbours of it, in which all groups of a kind have the next larger type. What
is seen corrects both: a factor for each such kind, and total = scale * sum^power for the whole. Then
it is chosen anew. Of all that were measured and keep to the target the best one counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from imatrix.recipes.choosing import Chosen, Frontier, Item, Option
from imatrix.recipes.costs import Corrections, Costs, costs
from imatrix.recipes.groups import Group
from imatrix.recipes.measured import Trial, standard_error
from imatrix.recipes.measuring import Measurer

__all__ = ["Refined", "Refiner"]

# A factor that a neighbour gives is held between these: it is one difference of two noisy figures.
_LEAST, _MOST = 0.25, 4.0

# Wholes that a KL to reach takes at most, and how near below it is near enough.
_KL_ROUNDS, _NEAR = 12, 0.95

# The sums of two wholes tell a power only if they are this far apart.
_APART = 1.5


@dataclass(frozen=True, kw_only=True)
class Refined:
    """A choice that was measured as a whole.

    Attributes:
        types: group -> type.
        bytes: of the groups.
        predicted: what the KL divergence was thought to be, in nats a token.
        trial: what it was, by chunk.
        measured: the mean over all positions.
        points: (bytes of the groups, mean KL, its standard error) of each recipe that was measured as
            a whole for it, this one among them.
    """

    types: Mapping[str, str]
    bytes: int
    predicted: float
    trial: Trial
    measured: float
    points: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class _Whole:
    """A recipe that was measured."""

    chosen: Chosen
    uncorrected: float  # the sum of its groups' KL without corrections
    predicted: float
    trial: Trial
    measured: float


class Refiner:
    """Chooses among groups whose costs were measured.

    Args:
        measurer: makes the trials of wholes.
        groups: what is chosen for.
        measured: group -> types that it was measured with.
        rounds, neighbours: see EffortPlan.

    Raises:
        ValueError: nothing was measured surely above zero.
    """

    def __init__(
        self,
        measurer: Measurer,
        groups: Sequence[Group],
        measured: Mapping[str, Sequence[str]],
        *,
        rounds: int,
        neighbours: int,
    ) -> None:
        self._measurer = measurer
        self._groups = groups
        self._rounds, self._neighbours = rounds, neighbours
        found = measurer.measurement
        self._kinds = {group.name: group.kind for group in groups}
        self._errors: dict[str, dict[str, float]] = {}
        self._trials: dict[str, dict[str, tuple[float, ...]]] = {}
        for group in groups:
            self._errors[group.name] = {
                kind: 0.0
                if kind == group.source
                else sum(found.errors[name, kind] for name in group.tensors)
                for kind in group.bytes
            }
            trials = {kind: found.trial(group.types(kind)) for kind in measured[group.name]}
            kept = {kind: trial.kl for kind, trial in trials.items() if trial is not None}
            if kept:
                self._trials[group.name] = kept
        self.costs = self._costs(Corrections())
        self.frontier = Frontier(self._items(self.costs))
        """Of the groups as they were measured, without corrections."""

    def tensors(self, types: Mapping[str, str]) -> dict[str, str]:
        """Tensor -> type of a choice: of those that change."""
        return {
            name: kind
            for group in self._groups
            for name, kind in group.types(types[group.name]).items()
        }

    def at_most(self, n_bytes: int) -> Refined:
        """The best recipe whose groups have at most so many bytes.

        Raises:
            ValueError: the smallest choice has more; both ends are told.
        """
        corrections = Corrections()
        wholes: list[_Whole] = []
        beside: list[_Whole] = []
        for number in range(self._rounds):
            frontier = Frontier(self._items(self._costs(corrections)))
            chosen = frontier.at_most(n_bytes)
            if any(whole.chosen.types == chosen.types for whole in wholes):
                break
            whole = self._whole(chosen, corrections)
            wholes.append(whole)
            if number + 1 == self._rounds:
                break
            if number == 0 and self._neighbours:
                kinds, beside = self._from_neighbours(whole)
                corrections = replace(corrections, kinds=kinds)
            corrections = self._scaled(corrections, [*wholes, *beside])
        # a neighbour that fits is as good as any other
        fitting = [whole for whole in (*wholes, *beside) if whole.chosen.bytes <= n_bytes]
        best = min(fitting, key=lambda whole: whole.measured)
        return self._refined(best, [*wholes, *beside])

    def reaching(self, kl: float) -> Refined:
        """The smallest recipe found whose measured KL is at most that."""
        corrections = Corrections()
        wholes: list[_Whole] = []
        frontier = Frontier(self._items(self._costs(corrections)))
        wanted = kl
        for number in range(_KL_ROUNDS):
            chosen = frontier.reaching(wanted)
            known = [whole for whole in wholes if whole.chosen.types == chosen.types]
            if known:
                break
            whole = self._whole(chosen, corrections)
            wholes.append(whole)
            below = [each for each in wholes if each.measured <= kl]
            if below and max(each.measured for each in below) >= _NEAR * kl:
                break
            if below and number >= 1 + self._rounds:
                break
            corrections = self._scaled(corrections, wholes)
            wanted = corrections.sum_for(kl)
            above = [each.chosen.kl for each in wholes if each.measured > kl]
            if above:  # never again what was too much
                wanted = min(wanted, 0.97 * min(above))
        below = [whole for whole in wholes if whole.measured <= kl]
        if not below:
            below = [self._whole(frontier.largest, corrections)]
            wholes += below
        return self._refined(min(below, key=lambda whole: whole.chosen.bytes), wholes)

    # --- inside ----------------------------------------------------------------------------------

    def _costs(self, corrections: Corrections) -> Costs:
        return costs(self._errors, self._trials, kinds=self._kinds, corrections=corrections)

    def _items(self, found: Costs) -> list[Item]:
        return [
            Item(
                group.name,
                tuple(
                    Option(kind, size, found.kl[group.name][kind])
                    for kind, size in group.bytes.items()
                ),
            )
            for group in self._groups
        ]

    def _whole(self, chosen: Chosen, corrections: Corrections) -> _Whole:
        (trial,) = self._measurer.trials([self.tensors(chosen.types)], "the recipe as a whole")
        uncorrected = sum(self.costs.kl[group][kind] for group, kind in chosen.types.items())
        return _Whole(
            chosen,
            uncorrected,
            corrections.total(chosen.kl),
            trial,
            self._measurer.measurement.mean(trial) if trial.types else 0.0,
        )

    def _from_neighbours(self, whole: _Whole) -> tuple[dict[str, float], list[_Whole]]:
        """Factors of kinds, from recipes in which a kind has the next larger type."""
        found = self.costs
        moved: list[tuple[float, str, Chosen]] = []
        for kind in dict.fromkeys(self._kinds.values()):
            types = dict(whole.chosen.types)
            for group in self._groups:
                if group.kind == kind:
                    types[group.name] = self._larger(group, types[group.name])
            sums = [
                sum(found.kl[name][each] for name, each in given.items())
                for given in (whole.chosen.types, types)
            ]
            if sums[0] - sums[1] > 0:
                size = sum(group.bytes[types[group.name]] for group in self._groups)
                moved.append((sums[0] - sums[1], kind, Chosen(types, size, sums[1])))
        moved.sort(key=lambda each: -each[0])
        moved = moved[: self._neighbours]
        trials = self._measurer.trials(
            [self.tensors(chosen.types) for _, _, chosen in moved], "neighbours of the recipe"
        )
        mean = self._measurer.measurement.mean
        scale = whole.measured / whole.uncorrected if whole.uncorrected > 0 else 1.0
        factors, wholes = {}, []
        for (gain, kind, chosen), trial in zip(moved, trials, strict=True):
            measured = mean(trial) if trial.types else 0.0
            wholes.append(_Whole(chosen, chosen.kl, scale * chosen.kl, trial, measured))
            if not (scale > 0 and trial.types):
                continue
            saved = np.subtract(whole.trial.kl, trial.kl)
            noise = float(saved.std(ddof=1) / math.sqrt(len(saved))) if len(saved) > 1 else 0.0
            wanted = scale * gain
            factor = min(max((whole.measured - measured) / wanted, _LEAST), _MOST)
            # the less, the less sure it is
            factors[kind] = factor ** (1 / (1 + (noise / wanted) ** 2))
        return factors, wholes

    def _larger(self, group: Group, kind: str) -> str:
        """The type with the next larger bytes that costs less; the same if there is none."""
        kl = self.costs.kl[group.name]
        better = [
            other
            for other, size in group.bytes.items()
            if size > group.bytes[kind] and kl[other] < kl[kind]
        ]
        return min(better, key=lambda other: (group.bytes[other], kl[other]), default=kind)

    def _scaled(self, corrections: Corrections, wholes: Sequence[_Whole]) -> Corrections:
        """The scale, and the power if the wholes are far enough apart, by what was measured."""
        found = self._costs(corrections)
        points = []
        for whole in wholes:
            total = sum(found.kl[group][kind] for group, kind in whole.chosen.types.items())
            if total > 0 and whole.measured > 0:
                points.append((math.log(total), math.log(whole.measured)))
        if not points:
            return corrections
        x, y = np.array(points).T
        power = 1.0
        if x.max() - x.min() > math.log(_APART):
            power = min(max(float(np.polyfit(x, y, 1)[0]), 0.5), 2.0)
        return replace(corrections, scale=math.exp(float(np.mean(y - power * x))), power=power)

    def _refined(self, whole: _Whole, wholes: Sequence[_Whole]) -> Refined:
        return Refined(
            types=whole.chosen.types,
            bytes=whole.chosen.bytes,
            predicted=whole.predicted,
            trial=whole.trial,
            measured=whole.measured,
            points=tuple(
                (each.chosen.bytes, each.measured, standard_error(each.trial)) for each in wholes
            ),
        )
