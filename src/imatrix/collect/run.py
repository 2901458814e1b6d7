"""One run: what it has collected, what it knows of its text, and where a checkpoint stands."""

from __future__ import annotations

import datetime
import hashlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from imatrix._version import __version__
from imatrix.cluster.work import Block
from imatrix.collect.keeper import OTHER_RUN, Keeper
from imatrix.collect.messages import tell_where
from imatrix.engine.devices import engine_name
from imatrix.engine.interface import FOREIGN_HEAD, NativeSession
from imatrix.engine.sums import BlockSums
from imatrix.entries import Entry, LeftOut, Provenance, TextSource
from imatrix.errors import CheckpointError, EngineDiedError, NonFiniteError
from imatrix.formats.checkpoint import Checkpoint, Setting
from imatrix.matrix.experts import ExpertCoverage, coverage_of
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.text.chunks import Chunk, Read
from imatrix.text.cutting import tokens_of
from imatrix.text.progress import Ended, Perplexity, Progress, Report, Tally
from imatrix.text.tokens import Packing

__all__ = ["Run"]

# The digest, tokens of each source, and what was read of each.
_Mark = tuple[Any, list[int], tuple[Read, ...]]


class Run:
    """The state of a run, from its first chunk to its last.

    What reads it may do so in any thread, between two chunks: `lock` is held while a chunk is
    counted, so that it counts wholly or not at all.

    Args:
        datasets: names of the texts, for the file.
        n_ctx: tokens a chunk.
        with_head: whether the head is collected.
        skipped: chunks left out at the start of the text.
        skip_nonfinite: leave out a chunk with a NaN or Inf, instead of ending.

    Attributes:
        session: what holds the sums: the engine's, or BlockSums where it is elsewhere or gone; None
            before the first chunk, and once it was let go.
        done: chunks that are done; chunks: those of them that count.
        resumed: chunks that were taken over from a checkpoint.
        seconds: spent on chunks, before an interruption too.
        names, weights, read: of the sources: names, shares, and what was read of each.
        first_skipped: of each source, why the first record was skipped; known at the end.
    """

    def __init__(
        self,
        datasets: list[str],
        n_ctx: int,
        with_head: bool = False,
        skipped: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        self.lock = threading.RLock()
        self.session: NativeSession | BlockSums | None = None
        self.datasets = datasets
        self.with_head = with_head
        self.skipped = skipped
        self.chunks = 0
        self.done = 0
        self.resumed = 0
        self.seconds = 0.0
        self.left_out: list[LeftOut] = []
        self.tally = Tally()
        self.packing: Packing = "stream"
        self.seed: int | None = None
        self.min_expert_rows: int | None = None
        self.ended: Ended = "text"
        self.ended_by: str | None = None
        self.names: tuple[str, ...] = ()
        self.weights: tuple[float | None, ...] = ()
        self.read: tuple[Read, ...] = ()
        self.first_skipped: tuple[str, ...] = ()
        self._n_ctx = n_ctx
        self._skip_nonfinite = skip_nonfinite
        self._tokens = 0
        self._digest = hashlib.sha256()  # of the chunks that count
        self._text_digest = hashlib.sha256()  # of all that are done
        self._source_tokens: list[int] = []
        self._covered: tuple[int, ExpertCoverage | None] | None = None  # by chunks done
        # of the last checkpoints, by chunks done: see go_back
        self._marks: dict[int, _Mark] = {}

    def again(self) -> Run:
        """A run like this one, at its start."""
        return Run(self.datasets, self._n_ctx, self.with_head, self.skipped, self._skip_nonfinite)

    def begin_text(self, names: tuple[str, ...], weights: tuple[float | None, ...]) -> None:
        """Count the tokens of these sources from zero."""
        self.names = names
        self.weights = weights
        self.read = (Read(),) * len(names)
        self.first_skipped = ("",) * len(names)
        self._source_tokens = [0] * len(names)

    # --- one step ------------------------------------------------------------

    def collect(self, session: NativeSession, group: list[Chunk]) -> None:
        """Collect chunks side by side and count them; in the native thread.

        Raises:
            NonFiniteError: a NaN or Inf, and they are not to be left out.
            EngineDiedError: it names the chunk.
        """
        with self.lock:
            self._collect(session, group)

    def _collect(self, session: NativeSession, group: list[Chunk]) -> None:
        lengths = np.array([len(chunk.tokens) for chunk in group], dtype=np.int32)
        try:
            scores = session.step(np.concatenate([chunk.tokens for chunk in group]), lengths)
        except NonFiniteError as error:
            if len(group) > 1:  # which of them it was shows when each runs by itself
                for chunk in group:
                    self._collect(session, [chunk])
                return
            error.chunk = self.skipped + self.done
            if not self._skip_nonfinite:
                tell_where(error, self.chunks)
                raise
            self.leave_out(LeftOut(error.chunk, group[0].start, error.weight), group[0])
        except EngineDiedError as error:
            error.chunk = self.skipped + self.done
            raise
        else:
            for chunk in group:
                self.count(chunk)
            self.tally.add(scores)

    def add(self, sums: BlockSums, chunks: list[Chunk], block: Block) -> None:
        """Add what a worker of a cluster made of a block of chunks, and count them; in the native
        thread.

        Raises:
            NonFiniteError: a NaN or Inf, and they are not to be left out. Nothing is added.
            ClusterError: it does not go with the blocks before it. Nothing is added.
        """
        with self.lock:
            if block.nonfinite and not self._skip_nonfinite:
                at, error = min(block.nonfinite.items())
                error.chunk = self.skipped + self.done + at
                tell_where(error, self.chunks, "Its block was")
                raise error
            sums.add(block.groups)
            for at, (chunk, score) in enumerate(zip(chunks, block.scores, strict=True)):
                if score is None:
                    weight = block.nonfinite[at].weight
                    told = LeftOut(self.skipped + self.done, chunk.start, weight)
                    self.leave_out(told, chunk)
                else:
                    self.count(chunk)
                    self.tally.add([score])

    def count(self, chunk: Chunk) -> None:
        """A chunk is done, and its sums are in."""
        self.chunks += 1
        self._tokens += len(chunk.tokens)
        self._pass(chunk, counts=True)
        self.done += 1

    def leave_out(self, told: LeftOut, chunk: Chunk) -> None:
        """A chunk is done, and does not count."""
        self.left_out.append(told)
        self._pass(chunk, counts=False)
        self.done += 1

    def _pass(self, chunk: Chunk, *, counts: bool) -> None:
        """What a chunk does to what is known of the text."""
        tokens = tokens_of(chunk.tokens)
        self._text_digest.update(tokens)
        self.read = chunk.read
        if counts:
            self._digest.update(tokens)
            for source, n_tokens in chunk.parts:
                self._source_tokens[source] += n_tokens

    # --- what there is -------------------------------------------------------

    def matrix(self, prefix: str = "") -> ImportanceMatrix:
        """The entries whose native names start with `prefix`, without it."""
        with self.lock:
            entries: dict[str, Entry] = {}
            if self.session is not None:
                entries = {
                    name.removeprefix(prefix): Entry(sums, counts, signed_sums=signed, name=name)
                    for name, (sums, counts, signed) in self.session.snapshot().items()
                    if name.startswith(FOREIGN_HEAD) == bool(prefix)
                }
            return ImportanceMatrix(
                entries,
                datasets=self.datasets,
                chunk_count=self.chunks,
                chunk_size=self._n_ctx,
                provenance=Provenance(
                    collector=f"imatrix {__version__}",
                    engine=engine_name(),
                    mtp=self.with_head,
                    n_ctx=self._n_ctx,
                    dataset_digest=self._digest.hexdigest(),
                    left_out=tuple(self.left_out),
                    tokens=self._tokens,
                    packing=self.packing,
                    seed=self.seed,
                    sources=self._sources(),
                ),
            )

    def report(self) -> Report:
        """What it made of its text so far."""
        with self.lock:
            counts = {} if self.session is None else self.session.counts()
            return Report(
                sources=self._sources(),
                chunks=self.chunks,
                tokens=self._tokens,
                packing=self.packing,
                seed=self.seed,
                digest=self._digest.hexdigest(),
                ended=self.ended,
                ended_by=self.ended_by,
                experts=coverage_of(counts, self.min_expert_rows or 1),
                first_skipped=self.first_skipped,
            )

    def perplexity(self) -> Perplexity | None:
        """Of the chunks so far; None unless it was asked for."""
        with self.lock:
            return self.tally.perplexity

    def progress(
        self, total: int | None, *, workers: int | None = None, ahead: int = 0
    ) -> Progress:
        """Where it stands, of `total` chunks. Between two steps only."""
        return Progress(
            self.chunks,
            total,
            self._tokens,
            self.seconds,
            self.tally.perplexity,
            self.resumed,
            self._coverage(),
            workers,
            ahead,
        )

    def _sources(self) -> tuple[TextSource, ...]:
        return tuple(
            TextSource(name, read.documents, tokens, read.dropped, weight, read.empty, read.skipped)
            for name, tokens, weight, read in zip(
                self.names, self._source_tokens, self.weights, self.read, strict=True
            )
        )

    def _coverage(self) -> ExpertCoverage | None:
        """Of the experts, where a number of rows is wanted. Between two steps only, and counted
        once for each: the report and the end of the run both look at it."""
        if self.min_expert_rows is None or self.session is None:
            return None
        if self._covered is not None and self._covered[0] == self.done:
            return self._covered[1]
        found = coverage_of(self.session.counts(), self.min_expert_rows)
        self._covered = (self.done, found)
        return found

    def enough(self, n_seq: int) -> bool:
        """Whether the experts have the rows that were wanted. Seen only where a group of n_seq
        chunks ends, so that a run that went on from a checkpoint within one ends where one that
        was never interrupted does."""
        if self.done % n_seq:
            return False
        found = self._coverage()
        return found is not None and found.reached

    # --- checkpoints ---------------------------------------------------------

    def checkpoint(self, settings: dict[str, Setting]) -> Checkpoint:
        """Where it stands, to be written. `settings`: what must be the same to go on."""
        # what go_back goes back to; the one before it, where this one cannot be written
        self._marks = {**dict(list(self._marks.items())[-1:]), self.done: self._mark()}
        return Checkpoint(
            done=self.done,
            tokens=self._tokens,
            seconds=self.seconds,
            nll=self.tally.nll,
            nll_sq=self.tally.nll_sq,
            scored=self.tally.n,
            text_digest=self._text_digest.hexdigest(),
            settings=settings,
            left_out=tuple(self.left_out),
            groups=[] if self.session is None else self.session.groups(),
        )

    def _mark(self) -> _Mark:
        """What a checkpoint need not hold: the text, read again, gives it."""
        return self._digest.copy(), list(self._source_tokens), self.read

    def read_past(self, found: Checkpoint, chunks: Iterator[Chunk], path: object) -> None:
        """Take the chunks that are done off the text, and see that they are the same.

        Raises:
            CheckpointError: they are not.
        """
        left_out = {one.chunk - self.skipped for one in found.left_out}
        for number in range(found.done):
            chunk = next(chunks, None)
            if chunk is None:
                raise CheckpointError(
                    f"{path} is of another text: {found.done} chunks of it are done, this one "
                    f"has {number}. {OTHER_RUN}"
                )
            self._pass(chunk, counts=number not in left_out)
        if self._text_digest.hexdigest() != found.text_digest:
            raise CheckpointError(
                f"{path} is of another text: the first {found.done} chunks differ. {OTHER_RUN}"
            )
        self._marks = {found.done: self._mark()}

    def take_over(self, found: Checkpoint, session: NativeSession | BlockSums) -> None:
        """Stand where the checkpoint was written, with its sums in the session."""
        for group in found.groups:
            session.restore(*group)
        self.resumed = found.done
        self._stand_at(found)

    def _stand_at(self, found: Checkpoint) -> None:
        self.done = found.done
        self.chunks = found.done - len(found.left_out)
        self._tokens = found.tokens
        self.seconds = found.seconds
        self.left_out = list(found.left_out)
        self.tally.nll, self.tally.nll_sq = found.nll, found.nll_sq
        self.tally.n = found.scored

    def go_back(self, found: Checkpoint) -> None:
        """Stand where a checkpoint of this run was written, without a session: the engine's
        process is gone, and the sums with it."""
        self._stand_at(found)
        if (mark := self._marks.get(found.done)) is not None:
            self._digest, self._source_tokens, self.read = mark
        self.session = kept = BlockSums()
        for group in found.groups:
            kept.restore(*group)

    def tell_death(
        self, error: EngineDiedError, n_seq: int, found: Checkpoint | None, keeper: Keeper | None
    ) -> None:
        """Say in the error where the run was, and what there is to go on from."""
        at = error.chunk
        ran = f", in chunk {at}"
        if at is None:  # not in one: while its sums were fetched, say
            ran = f", before chunk {self.skipped + self.done}" if self.done else ""
        if at is not None and n_seq > 1:
            ran = f", in one of the chunks {at} to {at + n_seq - 1}"
        if found is None or keeper is None:
            left = (
                f"There is no checkpoint to go on from, {self.done} chunk(s) are lost"
                + (": give run() one (checkpoint=)." if keeper is None else ".")
                if self.done
                else "No chunk was finished."
            )
        else:
            error.checkpoint = keeper.path
            age = datetime.timedelta(
                seconds=max(0, round(time.time() - keeper.path.stat().st_mtime))
            )
            left = (
                f"{keeper.path} holds {found.done} chunk(s) and is {age} old (h:mm:ss): run the "
                "same again to go on from it. If it ends at the same chunk again, collect those "
                "before it (max_chunks, --chunks) and those after it (skip_chunks, --chunk) by "
                "themselves, and add the matrices (+, --in-file)."
            )
        error.args = (f"{error.args[0]}{ran}. {left}",)
