"""Tells in a run of `collect`, once, if the model's type is a slow one on this CPU, and how to
convert."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import imatrix
from imatrix.cli.terminal import Terminal
from imatrix.collect.advice import SourceAdvice, large_type
from imatrix.model.parts import without_part
from imatrix.quantization.source import source_tensors

__all__ = ["SourceAdvisor", "describe_advice"]

# Seconds that a run must have before it, for advice to matter and for its probe, of a second, not to.
_WORTH = 60.0
# Steps that are looked at: the first one also reads the model from the disk, and may be too slow for
# its products to show.
_LOOKS = 2


class SourceAdvisor:
    """Looks at the first steps of a run.

    Args:
        args: of the command.
        collector: what runs.
    """

    def __init__(
        self, args: argparse.Namespace, collector: imatrix.Collector, terminal: Terminal
    ) -> None:
        self._args = args
        self._collector = collector
        self._terminal = terminal
        # what a cluster's workers compute with is not this CPU
        self._looks = _LOOKS if args.advice and args.dask is None else 0

    def step(self, progress: imatrix.Progress) -> None:
        """A step is over, and the next one has not begun."""
        # what an interrupted run has collected would not count for another file of the model
        if not self._looks or progress.resumed or not progress.chunks:
            return
        if progress.total is None:
            if progress.seconds < _WORTH:
                return
        elif progress.seconds / progress.chunks * (progress.total - progress.chunks) < _WORTH:
            self._looks = 0
            return
        self._looks -= 1
        advice = self._collector.source_advice()
        if advice is not None:
            self._looks = 0
            self._terminal.note(describe_advice(advice, self._args))


def describe_advice(advice: SourceAdvice, args: argparse.Namespace) -> str:
    """Advice in words, with the command that converts.

    Args:
        args: of the command: where its model is.
    """
    files = [args.model]
    if args.mtp_model is not None and _type_of(args.mtp_model) == advice.source.lower():
        files.append(args.mtp_model)
    folder = Path() if args.hf_repo is not None else None  # the cache is the Hub's
    commands = " && ".join(
        f"imatrix quantize {shlex.quote(path)} {shlex.quote(_free_name(path, advice, folder))} "
        f"{advice.target}"
        for path in files
    )
    return (
        f"{advice.source} is a slow type on this CPU: products of its weights run at "
        f"{_speed(advice.source_speed)}, those of {advice.target} at "
        f"{_speed(advice.target_speed)} GFLOP/s, so that a run of the same model in "
        f"{advice.target} would take about {advice.time:.2f} of the time ({advice.loss}). To "
        f"convert: {commands} (--no-advice: say nothing of this)"
    )


def _speed(multiplications: float) -> str:
    """Billions of operations a second: each multiplication goes with an addition."""
    return f"{2 * multiplications / 1e9:.3g}"


def _type_of(path: str) -> str | None:
    return large_type(source_tensors(imatrix.ModelFile.read(path)))


def _free_name(path: str, advice: SourceAdvice, folder: Path | None) -> str:
    """A name for the converted model that no file has yet: the model's with the other type in it."""
    model = Path(without_part(path))
    stem = model.stem
    named = re.compile(rf"(?<![A-Za-z0-9]){advice.source}(?![A-Za-z0-9])", re.IGNORECASE)
    stem = named.sub(advice.target, stem) if named.search(stem) else f"{stem}-{advice.target}"
    folder = model.parent if folder is None else folder
    number = 1
    while (found := folder / f"{stem}{f'-{number}' if number > 1 else ''}.gguf").exists():
        number += 1
    return str(found)
