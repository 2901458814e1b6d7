"""Progress on stderr: a bar at a terminal, a line now and then in a log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn

import imatrix
from imatrix.cli.terminal import Terminal
from imatrix.recipes.measuring import Cost, RecipeProgress
from imatrix.words import duration, plural, printable, size

__all__ = ["CollectProgress", "RecipeBar", "StepProgress", "describe_bytes", "describe_tensors"]


class CollectProgress:
    """Progress of a run: a bar on a terminal, a line now and then elsewhere.

    Args:
        every: chunks between two lines; 0 for a line at the start and the end only.
    """

    def __init__(self, terminal: Terminal, label: str, *, every: int) -> None:
        self._terminal = terminal
        self._label = printable(label)
        self._every = every
        self._shown: int | None = None  # chunks in the last line
        self._last: imatrix.Progress | None = None
        self._bar = _bar(terminal) if terminal.err.is_terminal else None
        self._task: TaskID | None = None
        self._experts: TaskID | None = None

    def __enter__(self) -> CollectProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=None, info="loading")
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last is not None and self._shown != self._last.chunks:
            self._line(self._last)

    def __call__(self, progress: imatrix.Progress) -> None:
        """Show where the run stands."""
        self._last = progress
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                total=progress.total,
                completed=progress.chunks + progress.ahead,
                info=_describe_progress(progress),
            )
            if progress.experts is not None:
                self._show_experts(self._bar, progress.experts)
        elif self._shown is None or (
            self._every and progress.chunks // self._every > self._shown // self._every
        ):
            self._line(progress)

    def _show_experts(self, bar: Progress, experts: imatrix.ExpertCoverage) -> None:
        """A second bar: how many of them have as many rows as they are to have."""
        if self._experts is None:
            self._experts = bar.add_task("experts", total=experts.n_experts, info="")
        bar.update(self._experts, completed=experts.n_reached, info=_describe_experts(experts))

    def _line(self, progress: imatrix.Progress) -> None:
        self._shown = progress.chunks
        text = f"{self._label}: {_describe_progress(progress)}"
        if progress.experts is not None:
            text += f", experts {_describe_experts(progress.experts)}"
        self._terminal.note(text)


class StepProgress:
    """Progress of a shorter work: a bar on a terminal, nothing elsewhere.

    Args:
        describe: gives the words for a position, from what is done and the total.
    """

    def __init__(self, terminal: Terminal, label: str, describe: Callable[[int, int], str]) -> None:
        self._bar = _bar(terminal) if terminal.err.is_terminal else None
        self._label = printable(label)
        self._describe = describe
        self._task: TaskID | None = None

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=None, info="reading")
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show how much is done."""
        if self._bar is not None and self._task is not None and total:
            self._bar.update(
                self._task, total=total, completed=done, info=self._describe(done, total)
            )


class RecipeBar:
    """Progress of a measurement: a bar on a terminal, a line now and then elsewhere; and what it
    takes, before it begins."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._bar = _bar(terminal) if terminal.err.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, int] = {}

    def __enter__(self) -> RecipeBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: RecipeProgress) -> None:
        """Show where it stands."""
        if progress.cost is not None:
            self._terminal.note(_describe_cost(progress.what, progress.cost))
        if not progress.total:
            return
        info = f"{progress.done}/{progress.total}"
        if progress.seconds_left:
            info += f", ETA {duration(progress.seconds_left)}"
        if self._bar is not None:
            if progress.what not in self._tasks:
                self._tasks[progress.what] = self._bar.add_task(
                    progress.what, total=progress.total, info=info
                )
            self._bar.update(
                self._tasks[progress.what],
                total=progress.total,
                completed=progress.done,
                info=info,
            )
            return
        tenth = 10 * progress.done // progress.total
        if tenth != self._shown.get(progress.what) and progress.done:
            self._shown[progress.what] = tenth
            self._terminal.note(f"{progress.what}: {info}")


def _describe_cost(what: str, cost: Cost) -> str:
    """What a stage takes, in a line."""
    kept = "all logits" if cost.top == 0 else f"the {cost.top} likeliest logits"
    return (
        f"{what}: {plural(cost.trials, 'trial')}, {cost.passes:.1f} passes over {cost.tokens} tokens, "
        f"about {duration(cost.seconds)} without quantizing; "
        f"{size(cost.kept_bytes)} for {kept} of the unchanged model"
    )


def describe_tensors(done: int, total: int) -> str:
    """Progress of a quantization: "tensor 3/35"."""
    return f"tensor {done}/{total}"


def describe_bytes(done: int, total: int) -> str:
    """Progress of a copy: "1.5 of 13.7 GiB"."""
    return f"{size(done)} of {size(total)}"


def _bar(terminal: Terminal) -> Progress:
    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[info]}", markup=False),
    ]
    return Progress(*columns, console=terminal.err)


def _describe_progress(progress: imatrix.Progress) -> str:
    """Progress in a line: "chunk 12/216, 14057 tokens/s, ETA 0:13, PPL 9.4213"."""
    parts = [f"chunk {progress.chunks}" + (f"/{progress.total}" if progress.total else "")]
    if progress.ahead:
        parts[0] += f" (+{progress.ahead})"
    if progress.workers is not None:
        parts.append(plural(progress.workers, "worker"))
    if progress.seconds > 0:
        parts.append(f"{progress.tokens / progress.seconds:.0f} tokens/s")
    if progress.total and 0 < progress.chunks < progress.total:
        left = (progress.total - progress.chunks) * progress.seconds / progress.chunks
        parts.append(f"ETA {duration(left)}")
    if progress.perplexity is not None:
        parts.append(f"PPL {progress.perplexity.value:.4f}")
    return ", ".join(parts)


def _describe_experts(experts: imatrix.ExpertCoverage) -> str:
    """Experts in a line: "23/24 at 50 rows, thinnest blk.1 expert 1: 40"."""
    block, expert, rows = experts.thinnest
    return (
        f"{experts.n_reached}/{experts.n_experts} at {experts.wanted} rows, thinnest {block} "
        f"expert {expert}: {rows}"
    )
