"""Decides what gives a tensor the data that it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from imatrix.quantization.adaptation import Placed, adapt
from imatrix.quantization.question import Question
from imatrix.quantization.types import EMBEDDINGS

__all__ = ["Cure", "Cures"]

Cure = Literal[
    "",
    "collect",
    "collect the head",
    "collect the output",
    "adapt",
    "merge",
    "another type",
    "find out",
]


class Cures:
    """What can be done about tensors without data."""

    def __init__(self, question: Question) -> None:
        self._question = question

    def collectable(self, name: str) -> bool | None:
        """Whether a run can reach a tensor; None if it is not known without a Plan."""
        plan = self._question.plan
        if plan is not None and name.startswith("blk."):
            return name in plan.trunk or name in plan.head
        if ".nextn.embed_tokens." in name:
            return False  # rows are looked up in it
        if self._question.file.in_head(name) and self._question.head_refusal:
            return False
        return None

    def of(self, name: str) -> Cure:
        """What gives a tensor the data that it lacks."""
        question = self._question
        collectable = self.collectable(name)
        if name in self.adapted:
            return "adapt"
        if name == question.lm_head:
            return "merge" if question.experts_apart else "collect the output"
        if name in EMBEDDINGS or collectable is False:
            return "another type"
        if not name.startswith(("blk.", "nextn.")):  # is_wanted in ext/wanted_nodes.cpp
            return "another type"
        in_head = question.file.in_head(name)
        if question.experts_apart:
            return "merge"
        covered = question.covers_head if in_head else question.covers_trunk
        if collectable is None and covered:
            # a run that had everything else of this part may have had this one
            return "find out" if question.plan is None else "another type"
        return "collect the head" if in_head else "collect"

    @cached_property
    def adapted(self) -> Mapping[str, Placed]:
        """What adapt() would give data to, beyond what has them."""
        question = self._question
        if question.matrix is None:
            return {}
        try:
            found = adapt(question.matrix, question.file)
        except ValueError:  # of another model
            return {}
        return {place.name: place for place in found.changed}
