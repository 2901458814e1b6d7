"""The tables of statistics: the parts of the model, and every weight."""

from __future__ import annotations

from imatrix.matrix.statistics import LayerStatistics, Statistics
from imatrix.matrix.summary import Line, lines
from imatrix.matrix.weight_statistics import WeightStatistics
from imatrix.report.parts import Heavy, Part
from imatrix.report.subject import Subject
from imatrix.report.thin import Thin

__all__ = ["part_tables", "weight_table"]

_PARTS: tuple[Part, ...] = ("trunk", "head")


def part_tables(
    subject: Subject, found: Statistics
) -> list[tuple[Part, list[Line], list[LayerStatistics]]]:
    """The trunk and the head: a line a kind of weight, and a line a block."""
    matrices = {"trunk": subject.matrix.trunk, "head": subject.matrix.head}
    return [
        (
            part,
            lines(matrices[part]),
            [each for each in found.layers if each.part == part],
        )
        for part in _PARTS
        if matrices[part]
    ]


def weight_table(
    subject: Subject, found: Statistics, thin: Thin
) -> list[tuple[WeightStatistics, Heavy | None]]:
    """Every weight that saw rows, in the order of the matrix."""
    by_name = {each.name: each for each in found.weights}
    heavy = {each.name: each for each in thin.heavy}
    return [(by_name[name], heavy.get(name)) for name in subject.matrix if name in by_name]
