"""Writes OUT of `collect`: as it grows, at the end, and after an error."""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

import imatrix
from imatrix.cli.earlier import add_earlier, chunks_before
from imatrix.cli.status import FAILED, Stopped, describe_error
from imatrix.cli.terminal import Terminal
from imatrix.collect.finished import mark_output
from imatrix.files import atomic
from imatrix.formats import Format
from imatrix.matrix.importance import ImportanceMatrix

__all__ = ["Saver", "checkpoint_path", "head_output", "is_same_file", "save_matrix"]


def checkpoint_path(output: str) -> Path:
    """Where the checkpoint of a run goes."""
    return Path(f"{output}.checkpoint")


def head_output(output: str) -> str:
    """Where the matrix of a head that is a model of its own kind goes: OUT with -mtp in its name."""
    out = Path(output)
    return str(out.with_name(f"{out.stem}-mtp{out.suffix}"))


def is_same_file(a: str, b: str) -> bool:
    """Whether two paths lead to one place."""
    return os.path.realpath(a) == os.path.realpath(b)


def save_matrix(matrix: ImportanceMatrix, path: str, form: Format) -> None:
    """Write a matrix.

    Raises:
        Stopped: it cannot be written.
    """
    try:
        matrix.save(path, format=form)
    except OSError as error:
        raise Stopped(f"cannot write {path}: {describe_error(error)}", FAILED) from error


class Saver:
    """Writes the matrix as it grows, as --output-frequency and --save-frequency say."""

    def __init__(
        self,
        args: argparse.Namespace,
        collector: imatrix.Collector,
        earlier: ImportanceMatrix | None,
        terminal: Terminal,
    ) -> None:
        self.progress: imatrix.Progress | None = None
        self._path: str = args.output
        self._checkpoint = checkpoint_path(args.output)
        self._form: Format = args.output_format
        self._every: int = args.output_frequency
        self._every_copy: int = args.save_frequency
        self._collector = collector
        self._earlier = earlier
        self._terminal = terminal
        # llama-imatrix goes on counting where the earlier files stopped
        self._chunks = self._before = chunks_before(earlier, args.ctx_size)
        # If it were written early, the run that goes on from here would add to it a second time.
        self._only_at_the_end = any(is_same_file(path, args.output) for path in args.in_file)

    def step(self, progress: imatrix.Progress) -> None:
        """After a step: write what is due. A failure is a warning, and the run goes on: the disk may
        have room again by the end of a long run."""
        first, self.progress = self.progress is None, progress
        before, self._chunks = self._chunks, self._before + progress.chunks
        if first and progress.resumed:
            total = f" of {progress.total}" if progress.total else ""
            self._terminal.note(
                f"going on from {self._checkpoint}: {progress.resumed}{total} chunk(s) "
                "are done (--restart starts from zero)"
            )
            if progress.chunks <= progress.resumed:
                return  # taken over, nothing new to write
        due = []
        if not self._only_at_the_end and _crossed(self._every, before, self._chunks):
            due.append(self._path)
        if _crossed(self._every_copy, before, self._chunks):
            due.append(f"{self._path}.at_{self._chunks}")
        if not due:
            return  # a copy of the matrix takes a while
        matrix = self._matrix()
        for path in due:
            try:
                matrix.save(path, format=self._form)
            except OSError as error:
                self._terminal.warn(f"cannot write {path} yet: {describe_error(error)}")

    def finish(self) -> ImportanceMatrix:
        """Write the whole matrix."""
        matrix = self._matrix()
        if not self._only_at_the_end:
            save_matrix(matrix, self._path, self._form)
            return matrix
        # Between putting the output in place and removing the checkpoint the run must not look like
        # an unfinished one: the checkpoint says first what the output will be.
        try:
            with atomic.replacing(self._path) as temporary:
                matrix.save(temporary, format=self._form)
                with contextlib.suppress(FileNotFoundError):  # the checkpoint was never written
                    mark_output(self._checkpoint, temporary)
        except OSError as error:
            raise Stopped(f"cannot write {self._path}: {describe_error(error)}", FAILED) from error
        return matrix

    def rescue(self, *, interrupted: bool) -> None:
        """After an error: write what was collected before it, if anything was."""
        own = self._collector.matrix
        if not own.chunk_count:
            if interrupted:
                self._terminal.note(f"no chunk was finished; {self._path} is not written")
            return
        go_on = f"; run the same command again to go on from {self._checkpoint}"
        if self._only_at_the_end:
            if self._checkpoint.exists():
                self._terminal.note(
                    f"{own.chunk_count} chunk(s) so far are in the checkpoint; {self._path} stays as "
                    f"it was, being an input too{go_on}"
                )
            return
        try:
            matrix = self._matrix()
        except ValueError:
            matrix = own  # the earlier files do not fit, which is the error that brought us here
        save_matrix(matrix, self._path, self._form)
        self._terminal.note(
            f"saved what was collected so far to {self._path}: {own.chunk_count} chunk(s)"
            + (go_on if self._checkpoint.exists() else "")
        )
        if (head := self._collector.mtp_matrix) is not None and head:
            save_matrix(head, head_output(self._path), self._form)

    def _matrix(self) -> ImportanceMatrix:
        return add_earlier(self._collector.matrix, self._earlier)


def _crossed(every: int, before: int, after: int) -> bool:
    """Whether counting from `before` to `after` passed a multiple of `every`."""
    return every > 0 and after // every > before // every
