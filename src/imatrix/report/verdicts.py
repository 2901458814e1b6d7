"""The verdicts at the top of the page: what there is to judge, in the order of its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imatrix.entries import THIN
from imatrix.matrix.summary import describe_left_out
from imatrix.report.checks import describe_stop
from imatrix.report.parts import Verdict
from imatrix.report.recipe import RecipeView
from imatrix.report.subject import Subject
from imatrix.report.thin import Thin
from imatrix.report.words import count
from imatrix.words import size

if TYPE_CHECKING:
    from imatrix.quantization.coverage import Coverage

__all__ = ["verdicts"]


def verdicts(
    subject: Subject, thin: Thin, checks: Sequence[Coverage], recipe: RecipeView | None = None
) -> list[Verdict]:
    """What there is to judge, in the order of its weight."""
    found = [_quantizing(checks)]
    if checks and checks[0].head and not subject.matrix.head_blocks:
        found.append(
            Verdict(
                "warn",
                "no head",
                "The model has an MTP/NextN head, and the matrix has no data for it.",
            )
        )
    elif not checks and not subject.matrix.head_blocks:
        found.append(
            Verdict(
                "note",
                "no head",
                "No data for an MTP/NextN head. Should the model have one, it needs its own.",
            )
        )
    found.append(_covering(thin))
    if left_out := subject.made.left_out:
        found.append(
            Verdict("warn", "left out", f"{describe_left_out(left_out)}. They do not count.")
        )
    if checks and (unused := checks[0].unused):
        found.append(
            Verdict(
                "warn",
                "unused",
                f"{count(len(unused), 'entry', 'entries')} of the matrix belong to no tensor "
                "of the model.",
            )
        )
    if recipe is not None:
        found.append(Verdict("note", "recipe", _describe_recipe(recipe)))
    return found


def _describe_recipe(view: RecipeView) -> str:
    recipe = view.recipe
    text = f"{view.name}: {size(recipe.bytes)}, {recipe.bits_per_weight:.2f} bits a weight"
    if recipe.measured_kl is not None:
        text += f", KL {recipe.measured_kl.value:.4g} nats a token measured"
    elif recipe.predicted_kl is not None:
        text += f", KL {recipe.predicted_kl:.4g} nats a token predicted"
    return f"{text}."


def _quantizing(checks: Sequence[Coverage]) -> Verdict:
    if not checks:
        return Verdict(
            "note",
            "not checked",
            "Whether the model would quantize with these data was not looked into: "
            "name it with --model.",
        )
    failing = [check for check in checks if not check.ready]
    model = checks[0].model.name
    if not failing:
        types = ", ".join(check.ftype for check in checks)
        return Verdict("good", "ready", f"{model} would quantize to {types}.")
    first = failing[0].failing[0]
    types = ", ".join(check.ftype for check in failing)
    why = describe_stop(first, failing[0])
    text = f"{model} would not quantize to {types}: it stops at {first.name} ({why})"
    if ready := [check.ftype for check in checks if check.ready]:
        text += f". Ready: {', '.join(ready)}"
    return Verdict("bad", "would fail", f"{text}.")


def _covering(thin: Thin) -> Verdict:
    coverage = thin.experts
    without = len(thin.without_rows)
    if coverage and coverage.n_unseen:
        return Verdict(
            "warn",
            "gaps",
            f"{coverage.n_unseen:,} of {coverage.n_experts:,} experts saw no row: their columns "
            "weigh all the same.",
        )
    if without:
        return Verdict("warn", "gaps", f"{count(without, 'weight')} saw no row: no data for them.")
    if coverage and not coverage.reached:
        few = coverage.n_experts - coverage.n_reached
        return Verdict(
            "warn",
            "thin",
            f"{few:,} of {coverage.n_experts:,} experts saw fewer than {THIN} rows.",
        )
    if thin.few_rows:
        return Verdict(
            "warn",
            "thin",
            f"{count(len(thin.few_rows), 'weight')} saw fewer than {THIN} rows.",
        )
    if thin.blind:
        return Verdict(
            "note",
            "experts unknown",
            "The file does not tell the rows of one expert from those of another, as no .dat "
            "file does.",
        )
    what = "expert" if coverage else "weight"
    return Verdict("good", "covered", f"Every {what} in it saw {THIN} rows or more.")
