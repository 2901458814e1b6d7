"""Prints what each type of a draft head is worth: bytes, accepted tokens, speed-up."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table

from imatrix.cli.terminal import Terminal, Text
from imatrix.evaluation.estimates import Difference, Estimate
from imatrix.recipes.head_table import HeadDecision, HeadTable
from imatrix.words import size

__all__ = ["print_head_table"]


def print_head_table(
    term: Terminal, table: HeadTable, decision: HeadDecision, matrix: str | None = None
) -> None:
    """The table to stdout, and what follows from it as notes.

    Args:
        matrix: path of the importance data of a head's own file, for the command that quantizes it.
    """
    printed = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    printed.add_column("head", no_wrap=True)
    for heading in ("bytes", "accepted", "beside as it is", "speed-up", "cautious"):
        printed.add_column(heading, justify="right", no_wrap=True)
    for row in table.rows:
        first = row is table.rows[0]
        chosen = decision.candidate is not None and row.label == decision.candidate.label
        printed.add_row(
            Text(f"{row.label} *" if chosen else row.label),
            size(row.bytes),
            _figure(row.accepted),
            "" if first else _signed(row.difference),
            _figure(row.speed_up),
            f"{row.cautious:.2f}",
            style="bold" if chosen else "",
        )
    term.out.print(printed)
    term.note(
        f"accepted: tokens of a draft of {table.depth} that the trunk accepts; speed-up: of decoding at "
        "batch 1, by bytes read, beside the trunk alone; with 95 % intervals. cautious: with the experts "
        "of a verification read apart and the head run again over it"
    )
    for text in (decision.why, *decision.notes):
        term.note(text)
    commands = decision.commands(matrix)
    if commands:
        before = (
            "the recipe is for the model without its head: first" if decision.drop else "the head:"
        )
        term.note(before)
    for command in commands:
        term.note(f"  {command}")


def _figure(found: Estimate) -> str:
    if math.isnan(found.low):
        return f"{found.value:.2f}"
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def _signed(found: Difference) -> str:
    if math.isnan(found.low):
        return f"{found.value:+.3f}"
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"
