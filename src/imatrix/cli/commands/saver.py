"""TODO."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from dataclasses import replace
from pathlib import Path

import imatrix
from imatrix.cli.outputs import head_output
from imatrix.cli.signals import FAILED, Stopped, describe_error
from imatrix.cli.terminal import Terminal
from imatrix.files import atomic
from imatrix.formats import Format
from imatrix.formats.checkpoint import read as read_checkpoint
from imatrix.formats.checkpoint import write as write_checkpoint
from imatrix.matrix.importance import ImportanceMatrix


def file_digest(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Saver:
    """Writes the matrix as it grows, as --output-frequency and --save-frequency say."""

    def __init__(
        self,
        args: argparse.Namespace,
        collector: imatrix.Collector,
        earlier: list[ImportanceMatrix],
        terminal: Terminal,
    ) -> None:
        self.progress: imatrix.Progress | None = None
        self._args = args
        self._path: str = args.output
        self._every: int = args.output_frequency
        self._every_copy: int = args.save_frequency
        self._collector = collector
        self._earlier = earlier[0].merge(*earlier[1:]) if earlier else None
        self._terminal = terminal
        # llama-imatrix goes on counting where the earlier files stopped
        self._chunks = self._before = chunks_before(earlier, args.ctx_size)
        # Written early, it would be added a second time by the run that goes on from here.
        self._only_at_the_end = any(_same_file(path, args.output) for path in args.in_file)

    def step(self, progress: imatrix.Progress) -> None:
        """After a step: write what is due. A failure is told, and the run goes on: the disk may
        have room again by the end of a long run."""
        first, self.progress = self.progress is None, progress
        before, self._chunks = self._chunks, self._before + progress.chunks
        if first and progress.resumed:
            total = f" of {progress.total}" if progress.total else ""
            self._terminal.note(
                f"going on from {checkpoint_path(self._args)}: {progress.resumed}{total} chunk(s) "
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
                matrix.save(path, format=self._args.output_format)
            except OSError as error:
                self._terminal.warn(f"cannot write {path} yet: {describe_error(error)}")

    def finish(self) -> ImportanceMatrix:
        """Write the whole matrix."""
        matrix = self._matrix()
        form = self._args.output_format
        if not self._only_at_the_end:
            save_matrix(matrix, self._path, form)
            return matrix
        # The moment at which it is there and the checkpoint is too must not look like one before:
        # the checkpoint says first what the output will be.
        checkpoint = checkpoint_path(self._args)
        try:
            with atomic.replacing(self._path) as temporary:
                matrix.save(temporary, format=form)
                with contextlib.suppress(FileNotFoundError):  # it could not be written
                    done = replace(read_checkpoint(checkpoint), output=file_digest(temporary))
                    write_checkpoint(done, checkpoint)
        except OSError as error:
            raise Stopped(f"cannot write {self._path}: {describe_error(error)}", FAILED) from error
        return matrix

    @property
    def head_path(self) -> str:
        """Where the matrix of a head that is a model of its own kind goes."""
        return head_output(self._path)

    def rescue(self, *, interrupted: bool) -> None:
        """After an error: write what was collected before it, if anything was."""
        own = self._collector.matrix
        if not own.chunk_count:
            if interrupted:
                self._terminal.note(f"no chunk was finished; {self._path} is not written")
            return
        checkpoint = checkpoint_path(self._args)
        go_on = f"; run the same command again to go on from {checkpoint}"
        if self._only_at_the_end:
            if checkpoint.exists():
                self._terminal.note(
                    f"{own.chunk_count} chunk(s) so far are in the checkpoint; {self._path} stays as "
                    f"it was, being an input too{go_on}"
                )
            return
        try:
            matrix = self._matrix()
        except ValueError:
            matrix = own  # the earlier files do not fit, which is the error that brought us here
        save_matrix(matrix, self._path, self._args.output_format)
        self._terminal.note(
            f"saved what was collected so far to {self._path}: {own.chunk_count} chunk(s)"
            + (go_on if checkpoint.exists() else "")
        )
        if (head := self._collector.mtp_matrix) is not None and head:
            save_matrix(head, self.head_path, self._args.output_format)

    def _matrix(self) -> ImportanceMatrix:
        own = self._collector.matrix
        if self._earlier is None:
            return own
        # Own first, for its chunk size; the names of the texts in the order they were read.
        both = own.merge(self._earlier)
        return ImportanceMatrix(
            both,
            datasets=tuple(dict.fromkeys((*self._earlier.datasets, *own.datasets))),
            chunk_count=both.chunk_count,
            chunk_size=both.chunk_size,
            provenance=both.provenance,
            head_blocks=both.head_blocks,
        )


def checkpoint_path(args: argparse.Namespace) -> Path:
    return Path(f"{args.output}.checkpoint")


def chunks_before(earlier: list[ImportanceMatrix], n_ctx: int) -> int:
    """Chunks of the earlier files, counted in those of this run."""
    if not earlier:
        return 0
    merged = earlier[0].merge(*earlier[1:])
    return round(merged.chunk_count * (merged.chunk_size or n_ctx) / n_ctx)


def _same_file(a: str, b: str) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)


def _crossed(every: int, before: int, after: int) -> bool:
    """Whether counting from `before` to `after` passed a multiple of `every`."""
    return every > 0 and after // every > before // every


def save_matrix(matrix: ImportanceMatrix, path: str, form: Format) -> None:
    try:
        matrix.save(path, format=form)
    except OSError as error:
        raise Stopped(f"cannot write {path}: {describe_error(error)}", FAILED) from error
