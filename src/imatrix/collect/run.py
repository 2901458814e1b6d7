"""One run: what it has collected, what it knows of its text, and where a checkpoint stands."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from imatrix._version import __version__
from imatrix.cluster.work import Block
from imatrix.collect.keeper import OTHER_RUN
from imatrix.collect.messages import explain_nonfinite
from imatrix.engine.devices import engine_name
from imatrix.engine.interface import FOREIGN_HEAD, NativeSession
from imatrix.engine.sums import BlockSums
from imatrix.entries import Entry, LeftOut, Provenance, TextSource
from imatrix.errors import CheckpointError, EngineDiedError, NonFiniteError
from imatrix.formats.checkpoint import Checkpoint, Setting
from imatrix.matrix.experts import ExpertCoverage, coverage_of
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.text.chunks import Chunk, Chunks, Read
from imatrix.text.cutting import TextFacts, tokens_of
from imatrix.text.progress import Ended, Perplexity, Progress, Report, Tally
from imatrix.text.tokens import Packing

__all__ = ["Run", "RunSetup", "Work"]

_NO_TEXT = TextFacts((), (), (), None)


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """What is settled before the first chunk of a run.

    Attributes:
        n_ctx: tokens a chunk.
        with_head: whether the head is collected.
        foreign_head: whether the head's weights have a matrix of their own.
        skipped: chunks left out at the start of the text.
        skip_nonfinite: leave out a chunk with a NaN or Inf, instead of ending.
        min_expert_rows: rows that each expert has to see; None if the run does not end by that.
        packing: how the chunks are cut.
        text: what the texts say of themselves.
    """

    n_ctx: int
    with_head: bool = False
    foreign_head: bool = False
    skipped: int = 0
    skip_nonfinite: bool = False
    min_expert_rows: int | None = None
    packing: Packing = "stream"
    text: TextFacts = _NO_TEXT


@dataclass(frozen=True)
class Work:
    """What a run has done so far.

    Attributes:
        counts: rows that each weight has seen, int64 [1], of experts [n_mat].
        chunks, tokens: that count.
        scored: tokens whose logits were computed.
    """

    counts: Mapping[str, NDArray[np.int64]]
    chunks: int
    tokens: int
    scored: int


@dataclass(frozen=True)
class _Mark:
    """What a checkpoint need not hold, because the text, read again, gives it."""

    digest: Any  # of the chunks that count
    source_tokens: tuple[int, ...]
    read: tuple[Read, ...]


class Run:
    """The state of a run, from its first chunk to its last.

    What reads it may do so in any thread, between two chunks: `lock` is held while a chunk is
    counted, so that it counts wholly or not at all.

    Attributes:
        setup: what was settled before its first chunk.
        session: what holds the sums: the engine's session, or BlockSums if they are not in the
            engine (any more); None before the first chunk, and once they were let go. Models closes
            the engine's session before it goes itself; then it holds no sums.
        done: chunks that are done, those left out among them.
        chunks: chunks that count.
        resumed: chunks that were taken over from a checkpoint.
        left_out: chunks that do not count.
        pace: seconds of the last step here, for each of its chunks; None before the first.
    """

    def __init__(self, setup: RunSetup) -> None:
        self.setup = setup
        self.lock = threading.RLock()
        self.session: NativeSession | BlockSums | None = None
        self.done = 0
        self.chunks = 0
        self.resumed = 0
        self.left_out: list[LeftOut] = []
        self.pace: float | None = None
        self._tally = Tally()
        self._tokens = 0
        self._digest = hashlib.sha256()  # of the chunks that count
        self._text_digest = hashlib.sha256()  # of all that are done
        self._read = (Read(),) * len(setup.text.names)  # of each source
        self._source_tokens = [0] * len(setup.text.names)
        self._first_skipped = ("",) * len(setup.text.names)  # why; known at the end
        self._ended: Ended = "text"
        self._ended_by: str | None = None
        self._seconds = 0.0  # spent on chunks, before an interruption too
        self._clock = (0.0, 0.0)  # those seconds and the time, when the steps began
        self._covered: tuple[int, ExpertCoverage | None] | None = None  # by chunks done
        # of the last checkpoints, by chunks done: see go_back
        self._marks: dict[int, _Mark] = {}

    # --- its course ----------------------------------------------------------

    def begin(self, session: NativeSession | BlockSums, found: Checkpoint | None) -> None:
        """Collect into this session from here on; with `found` from where that checkpoint was
        written, with its sums."""
        if found is not None:
            for group in found.groups:
                session.restore(*group)
            self.resumed = found.done
            self._stand_at(found)
        self.session = session

    def start_clock(self) -> None:
        """The first step begins."""
        self._clock = self._seconds, time.monotonic()

    def read_clock(self) -> None:
        """A step is over."""
        before, started = self._clock
        self._seconds = before + time.monotonic() - started

    def finish(self, chunks: Chunks, step: int, max_chunks: int | None) -> None:
        """The last step is over.

        Args:
            chunks: the text; if it has come to its end, what it dropped there is known now.
            step: chunks of a step.
            max_chunks: how many were asked for at most.
        """
        self._first_skipped = chunks.first_skipped
        if self.enough(step):
            self._ended = "min_expert_rows"
            return
        self._read = chunks.read
        self._ended_by = None if chunks.ended is None else self.setup.text.names[chunks.ended]
        if self.done == max_chunks:
            self._ended = "max_chunks"

    def let_go(self) -> None:
        """Drop the sums, those of a cluster's blocks too; the chunks stay counted."""
        with self.lock:
            self.session = None

    @property
    def next_chunk(self) -> int:
        """Number of the first chunk that is not done, skipped ones counted."""
        return self.setup.skipped + self.done

    # --- one step ------------------------------------------------------------

    def collect(self, session: NativeSession, group: list[Chunk]) -> None:
        """Collect chunks side by side and count them; in the native thread.

        Raises:
            NonFiniteError: a NaN or Inf, and they are not to be left out.
            EngineDiedError: it names the chunk.
        """
        with self.lock:
            started = time.monotonic()
            self._collect(session, group)
            self.pace = (time.monotonic() - started) / len(group)

    def _collect(self, session: NativeSession, group: list[Chunk]) -> None:
        lengths = np.array([len(chunk.tokens) for chunk in group], dtype=np.int32)
        try:
            scores = session.step(np.concatenate([chunk.tokens for chunk in group]), lengths)
        except NonFiniteError as error:
            if len(group) > 1:  # which of them it was shows when each runs by itself
                for chunk in group:
                    self._collect(session, [chunk])
                return
            error.chunk = self.next_chunk
            if not self.setup.skip_nonfinite:
                explain_nonfinite(error, self.chunks)
                raise
            self._leave_out(LeftOut(error.chunk, group[0].start, error.weight), group[0])
        except EngineDiedError as error:
            error.chunk = self.next_chunk
            raise
        else:
            for chunk in group:
                self._count(chunk)
            self._tally.add(scores)

    def add(self, sums: BlockSums, chunks: list[Chunk], block: Block) -> None:
        """Add what a worker of a cluster made of a block of chunks, and count them; in the native
        thread.

        Raises:
            NonFiniteError: a NaN or Inf, and they are not to be left out. Nothing is added.
            ClusterError: it does not go with the blocks before it. Nothing is added.
        """
        with self.lock:
            if block.nonfinite and not self.setup.skip_nonfinite:
                at, error = min(block.nonfinite.items())
                error.chunk = self.next_chunk + at
                explain_nonfinite(error, self.chunks, "Its block was")
                raise error
            sums.add(block.groups)
            for at, (chunk, score) in enumerate(zip(chunks, block.scores, strict=True)):
                if score is None:
                    weight = block.nonfinite[at].weight
                    self._leave_out(LeftOut(self.next_chunk, chunk.start, weight), chunk)
                else:
                    self._count(chunk)
                    self._tally.add([score])

    def _count(self, chunk: Chunk) -> None:
        """A chunk is done, and its sums are in."""
        self.chunks += 1
        self._tokens += len(chunk.tokens)
        self._pass(chunk, counts=True)
        self.done += 1

    def _leave_out(self, one: LeftOut, chunk: Chunk) -> None:
        """A chunk is done, and does not count."""
        self.left_out.append(one)
        self._pass(chunk, counts=False)
        self.done += 1

    def _pass(self, chunk: Chunk, *, counts: bool) -> None:
        """What a chunk does to what is known of the text."""
        tokens = tokens_of(chunk.tokens)
        self._text_digest.update(tokens)
        self._read = chunk.read
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
                datasets=self.setup.text.datasets,
                chunk_count=self.chunks,
                chunk_size=self.setup.n_ctx,
                provenance=Provenance(
                    collector=f"imatrix {__version__}",
                    engine=engine_name(),
                    mtp=self.setup.with_head,
                    n_ctx=self.setup.n_ctx,
                    dataset_digest=self._digest.hexdigest(),
                    left_out=tuple(self.left_out),
                    tokens=self._tokens,
                    packing=self.setup.packing,
                    seed=self.setup.text.seed,
                    sources=self._sources(),
                ),
            )

    def head_matrix(self) -> ImportanceMatrix | None:
        """The entries of a head that is a model of its own kind; None if it is not, or if it is not
        collected."""
        setup = self.setup
        return self.matrix(FOREIGN_HEAD) if setup.with_head and setup.foreign_head else None

    def counters(self) -> Mapping[str, int]:
        """The engine's counters; none if there are no contexts (any more)."""
        with self.lock:
            if self.session is None or isinstance(self.session, BlockSums):
                return {}
            return cast("dict[str, int]", self.session.counters)

    @property
    def collects_here(self) -> bool:
        """Whether a session in this machine's engine holds the sums, and has some."""
        return (
            self.session is not None
            and not isinstance(self.session, BlockSums)
            and self.chunks > 0
            and bool(self.session.counts())
        )

    def work(self) -> Work:
        """What it has done so far."""
        with self.lock:
            counts = {} if self.session is None else self.session.counts()
            return Work(counts, self.chunks, self._tokens, self._tally.n)

    def report(self) -> Report:
        """What it made of its text so far."""
        with self.lock:
            counts = {} if self.session is None else self.session.counts()
            return Report(
                sources=self._sources(),
                chunks=self.chunks,
                tokens=self._tokens,
                packing=self.setup.packing,
                seed=self.setup.text.seed,
                digest=self._digest.hexdigest(),
                ended=self._ended,
                ended_by=self._ended_by,
                experts=coverage_of(counts, self.setup.min_expert_rows or 1),
                first_skipped=self._first_skipped,
            )

    def perplexity(self) -> Perplexity | None:
        """Of the chunks so far; None unless it was asked for."""
        with self.lock:
            return self._tally.perplexity

    def progress(
        self, total: int | None, *, workers: int | None = None, ahead: int = 0
    ) -> Progress:
        """Where it stands, of `total` chunks. Between two steps only."""
        return Progress(
            self.chunks,
            total,
            self._tokens,
            self._seconds,
            self._tally.perplexity,
            self.resumed,
            self._coverage(),
            workers,
            ahead,
        )

    def _sources(self) -> tuple[TextSource, ...]:
        return tuple(
            TextSource(name, read.documents, tokens, read.dropped, weight, read.empty, read.skipped)
            for name, tokens, weight, read in zip(
                self.setup.text.names,
                self._source_tokens,
                self.setup.text.weights,
                self._read,
                strict=True,
            )
        )

    def _coverage(self) -> ExpertCoverage | None:
        """Of the experts; None if no number of rows is wanted. Between two steps only, and counted
        once for each: the report and the end of the run both look at it."""
        if self.setup.min_expert_rows is None or self.session is None:
            return None
        if self._covered is not None and self._covered[0] == self.done:
            return self._covered[1]
        found = coverage_of(self.session.counts(), self.setup.min_expert_rows)
        self._covered = (self.done, found)
        return found

    def enough(self, step: int) -> bool:
        """Whether the experts have the rows that were wanted. The answer is yes only at the end of
        a step: so a run that was resumed within a step ends where one that was never interrupted
        does.

        Args:
            step: chunks of a step.
        """
        if self.done % step:
            return False
        found = self._coverage()
        return found is not None and found.reached

    # --- checkpoints ---------------------------------------------------------

    def checkpoint(self, settings: dict[str, Setting]) -> Checkpoint:
        """Where it stands, to be written. `settings`: what must be the same to go on."""
        # go_back() needs one of them: the last but one, if the file cannot be written now
        self._marks = {**dict(list(self._marks.items())[-1:]), self.done: self._mark()}
        return Checkpoint(
            done=self.done,
            tokens=self._tokens,
            seconds=self._seconds,
            nll=self._tally.nll,
            nll_sq=self._tally.nll_sq,
            scored=self._tally.n,
            text_digest=self._text_digest.hexdigest(),
            settings=settings,
            left_out=tuple(self.left_out),
            groups=[] if self.session is None else self.session.groups(),
        )

    def _mark(self) -> _Mark:
        return _Mark(self._digest.copy(), tuple(self._source_tokens), self._read)

    def read_past(self, found: Checkpoint, chunks: Iterator[Chunk], path: object) -> None:
        """Take the chunks that are done off the text, and see that they are the same.

        Raises:
            CheckpointError: they are not.
        """
        left_out = {one.chunk - self.setup.skipped for one in found.left_out}
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

    def _stand_at(self, found: Checkpoint) -> None:
        self.done = found.done
        self.chunks = found.done - len(found.left_out)
        self._tokens = found.tokens
        self._seconds = found.seconds
        self.left_out = list(found.left_out)
        self._tally.nll, self._tally.nll_sq = found.nll, found.nll_sq
        self._tally.n = found.scored

    def go_back(self, found: Checkpoint) -> None:
        """Stand where a checkpoint of this run was written, without a session: the engine's
        process is gone, and the sums with it."""
        self._stand_at(found)
        if (mark := self._marks.get(found.done)) is not None:
            self._digest, self._read = mark.digest, mark.read
            self._source_tokens = list(mark.source_tokens)
        self.session = kept = BlockSums()
        for group in found.groups:
            kept.restore(*group)
