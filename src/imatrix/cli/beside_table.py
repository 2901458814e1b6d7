"""`imatrix recipe --beside`: its flags, what is measured and what compared, and the table."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from imatrix.cli.flags.values import at_least
from imatrix.cli.progress import StepProgress
from imatrix.cli.terminal import Terminal, Text
from imatrix.evaluation.estimates import Difference, Estimate
from imatrix.recipes.beside import LEAST_CHUNKS, Beside, BesideProgress, BesideSide
from imatrix.words import plural, size

__all__ = [
    "BesideBar",
    "add_arguments",
    "describe_texts",
    "mixtures",
    "print_beside",
]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """--beside and what belongs to it."""
    add = command.add_argument
    add(
        "--beside",
        metavar="TYPE[,TYPE...]",
        type=mixtures,
        default=(),
        help="compare with these mixtures of llama-quantize: each is quantized, so is a recipe of no "
        "more bytes, and both are evaluated on text that was not measured",
    )
    add(
        "--beside-file",
        metavar="TEXT",
        help="text for that comparison (default: what is left of -f after the chunks that are "
        "measured)",
    )
    add(
        "--beside-chunks",
        metavar="N",
        type=at_least(LEAST_CHUNKS),
        default=64,
        help="chunks to compare on at most (default: 64)",
    )
    add("--keep", metavar="DIR", help="keep the files that are compared, in this folder")


def mixtures(text: str) -> tuple[str, ...]:
    """The names in "Q3_K_M,IQ3_XS"."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected types with commas between, got {text!r}")
    return names


class BesideBar:
    """Shows the progress of a comparison: a bar for each of its works, a line where there is no
    terminal. A context."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._step = 0
        self._bar: StepProgress | None = None

    def __enter__(self) -> BesideBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def __call__(self, found: BesideProgress) -> None:
        """Show where the comparison stands."""
        if found.step != self._step:
            self._end()
            self._step = found.step
            label = f"{found.step}/{found.steps} {found.doing} {found.name}"
            if not self._terminal.err.is_terminal:
                self._terminal.note(label)
            unit = "chunk" if found.doing == "evaluating" else "tensor"
            self._bar = StepProgress(
                self._terminal, label, lambda done, total: f"{unit} {done}/{total}"
            )
            self._bar.__enter__()
        if self._bar is not None and found.total is not None:
            self._bar(found.done, found.total)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.__exit__()
        self._bar = None


def print_beside(found: Sequence[Beside], terminal: Terminal, *, text: str) -> None:
    """A table for each mixture.

    Args:
        text: what the recipes were measured on, and what is compared on, in a sentence.
    """
    out = terminal.out
    out.print(text, soft_wrap=True)
    for each in found:
        _print_one(each, terminal)
    verdicts = [each.difference.kl.verdict for each in found if each.difference.kl is not None]
    if (n_worse := verdicts.count("worse")) > 0:
        terminal.warn(
            f"the recipe is worse than {plural(n_worse, 'mixture')} of the same size; measure more "
            "(--effort thorough, or more text), or take the mixture"
        )


def _print_one(each: Beside, terminal: Terminal) -> None:
    mixture, recipe = each.mixture, each.recipe
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for side in (mixture, recipe):
        table.add_column(Text(side.name), justify="right")
    table.add_column("recipe minus mixture", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("the recipe is")
    table.add_row("bytes", *(str(side.bytes) for side in (mixture, recipe)))
    table.add_row("", *(size(side.bytes) for side in (mixture, recipe)))
    table.add_row("bits per weight", *(f"{s.bits_per_weight:.3f}" for s in (mixture, recipe)))

    def add(name: str, figures: Sequence[Estimate | None], apart: Difference | None) -> None:
        share = name.endswith("top token")
        if apart is None or None in figures:
            return
        table.add_row(
            name,
            *(_value(figure, share) for figure in figures if figure is not None),
            _signed(apart.value, share),
            "-"
            if math.isnan(apart.low)
            else f"{_signed(apart.low, share)} to {_signed(apart.high, share)}",
            apart.verdict,
        )

    difference = each.difference
    evaluations = (mixture.evaluation, recipe.evaluation)
    add("trunk: KL to the model", [e.kl for e in evaluations], difference.kl)
    add("trunk: same top token", [e.top1 for e in evaluations], difference.top1)
    add("trunk: NLL (nats)", [e.nll for e in evaluations], difference.nll)
    add("head: KL to the model's", [e.head_kl for e in evaluations], difference.head_kl)
    add(
        "draft: accepted tokens",
        [e.accepted_length for e in evaluations],
        difference.accepted_length,
    )
    terminal.out.print()
    terminal.out.print(table)
    ratio = each.kl_ratio
    interval = "" if math.isnan(ratio.low) else f" ({ratio.low:.3f} to {ratio.high:.3f})"
    terminal.out.print(
        f"the recipe's KL is {ratio.value:.3f}{interval} of {mixture.name}'s, with {_fewer(each)}",
        soft_wrap=True,
    )
    for side in (mixture, recipe):
        _print_kept(side, terminal)


def _fewer(each: Beside) -> str:
    fewer = each.mixture.bytes - each.recipe.bytes
    return "the same bytes" if fewer == 0 else f"{plural(fewer, 'byte')} fewer"


def _print_kept(side: BesideSide, terminal: Terminal) -> None:
    if side.path is not None:
        terminal.note(f"wrote {side.path}: {side.name}, {size(side.bytes)}")


def _value(figure: Estimate, share: bool) -> str:
    return f"{100 * figure.value:.2f} %" if share else f"{figure.value:.5f}"


def _signed(value: float, share: bool) -> str:
    return f"{100 * value:+.2f}" if share else f"{value:+.5f}"


def describe_texts(measured: str, n_measured: int, compared: str | None, n_compared: int) -> str:
    """What was measured on and what is compared on, in a sentence.

    Args:
        measured: the measured text's name.
        n_measured: how many of its chunks.
        compared: the name of the other text; None if it is what is left of the first.
    """
    first = f"measured on {plural(n_measured, 'chunk')} of {Path(measured).name}"
    if compared is None:
        return f"{first}, compared on the {plural(n_compared, 'chunk')} after them"
    return f"{first}, compared on {plural(n_compared, 'chunk')} of {Path(compared).name}"
