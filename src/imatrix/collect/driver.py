"""Drives a run: from texts through its steps, on this machine or on a cluster, to the matrix."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from itertools import chain

from imatrix.cluster.work import BlockSize
from imatrix.collect.advice import SourceAdvice
from imatrix.collect.adviser import Adviser
from imatrix.collect.keeper import Keeper, batch_in
from imatrix.collect.lifecycle import Lifecycle
from imatrix.collect.messages import describe_left_out, explain_death
from imatrix.collect.options import RunOptions
from imatrix.collect.preparation import CollectorOptions, Preparation
from imatrix.collect.run import Run, RunSetup
from imatrix.collect.steps import ClusterSteps, SessionSteps, Steps
from imatrix.engine.background import NativeThread
from imatrix.engine.identity import identity_of_run, identity_of_work
from imatrix.engine.interface import NativeModel, NativeSession
from imatrix.engine.plan import Plan
from imatrix.engine.settings import Batch, SessionSettings
from imatrix.engine.sums import BlockSums
from imatrix.errors import EngineDiedError
from imatrix.files.lock import locked
from imatrix.formats import FormatError, checkpoint
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.text.chats import ChatOptions
from imatrix.text.chunks import Chunk
from imatrix.text.cutting import Cut, TextFacts, cut, in_groups
from imatrix.text.inputs import Texts

__all__ = ["Driver"]


class Driver:
    """Runs texts through the model of a Collector.

    Args:
        options: the arguments of the Collector.
        life: lets one run be on at a time, and ends it.

    Attributes:
        latest: the current run, or else the last one.
        models: the files of the model, and what is loaded of them.
    """

    def __init__(self, options: CollectorOptions, life: Lifecycle) -> None:
        self.latest = Run(RunSetup(n_ctx=options.n_ctx))
        self._life = life
        self._preparation = Preparation(options)
        self.models = self._preparation.models
        self._adviser = Adviser(self.models)

    def free(self) -> None:
        """Free the models, the session and the sums."""
        self.latest.let_go()
        self.models.free()

    @property
    def batch(self) -> Batch:
        """See Collector.batch."""
        return self._preparation.batch

    def causal(self) -> bool:
        """See Collector.causal."""
        self._life.check_process()
        if not self.models.knows_causal:
            self._life.check_open()
        with self._life.guard:
            return self._preparation.causal()

    def loaded(self) -> NativeModel:
        """The trunk's model, as it is loaded, or now if it is not."""
        self._life.check_process()
        self._life.check_open()
        with self._life.guard:
            return self.models.loaded()

    def current(self) -> Run:
        """The latest run, for whoever wants to see its sums."""
        self._life.check_process()
        return self.latest

    def source_advice(self) -> SourceAdvice | None:
        """See Collector.source_advice."""
        self._life.check_process()
        self._life.check_open()
        return self._adviser.advice(self.latest, self._preparation.settings())

    def plan(self, *, mtp: bool, process_output: bool) -> Plan:
        """See Collector.plan."""
        with self._life.running(self.free):
            settings = self._preparation.prepare(
                mtp=mtp, process_output=process_output, perplexity=False
            )
            return self._preparation.plan(settings)

    def run(self, texts: Texts, options: RunOptions) -> ImportanceMatrix:
        """Collect a matrix from texts: see Collector.run."""
        options.check(
            texts,
            self.models.trunk_file,
            self.models.head_file,
            batch_by_memory=self._preparation.batch_by_memory,
        )
        with self._life.running(self.free), _locked(options.checkpoint):
            settings = self._preparation.prepare(
                mtp=options.mtp,
                process_output=options.process_output,
                perplexity=options.perplexity,
                signed_sums=options.signed_sums,
                weights=options.cluster is None,
            )
            size = None
            if options.cluster is not None:
                size = options.cluster.block_size(settings.batch.n_seq)
            self.latest.let_go()
            self.models.close_sessions()
            run = self.latest = Run(
                RunSetup(
                    n_ctx=settings.n_ctx,
                    with_head=settings.mtp,
                    foreign_head=self.models.head_file.architecture == "gemma4-assistant",
                    skipped=options.skip_chunks,
                    skip_nonfinite=options.on_nonfinite == "skip",
                    min_expert_rows=options.min_expert_rows,
                    packing=options.packing,
                    text=TextFacts.of(texts),
                )
            )
            chat = ChatOptions() if options.chat is None else options.chat
            with contextlib.closing(self.models.renderer(chat)) as render:
                text = cut(
                    texts,
                    self.models.tokenizer(),
                    settings.n_ctx,
                    packing=options.packing,
                    chat=options.chat,
                    render=render,
                    parse_special=options.parse_special,
                    skip_chunks=options.skip_chunks,
                    max_chunks=options.max_chunks,
                    on_bad_record=options.on_bad_record,
                )
                if self._preparation.batch_by_memory:
                    before = None
                    if options.checkpoint is not None and not options.restart:
                        before = batch_in(options.checkpoint)
                    settings = self._preparation.choose_batch(settings, text.total, before)
                return self._collect(run, text, options, settings, size)

    def _collect(
        self,
        run: Run,
        text: Cut,
        options: RunOptions,
        settings: SessionSettings,
        size: BlockSize | None,
    ) -> ImportanceMatrix:
        """The rest of run(), with the text at hand."""
        chunks = text.chunks
        keeper = None
        found = None
        if options.checkpoint is not None:
            identity = identity_of_run(
                self.models,
                settings,
                text.settings,
                parse_special=options.parse_special,
                skip_chunks=options.skip_chunks,
                max_chunks=options.max_chunks,
                min_expert_rows=options.min_expert_rows,
                block=None if size is None else size.block,
                part=None if size is None else size.part,
            )
            keeper = Keeper(options.checkpoint, options.interval, lambda: run.checkpoint(identity))
            found = None if options.restart else keeper.load(identity)
        if found is not None:
            run.read_past(found, chunks, options.checkpoint)
        # bad text is an error before any context is made
        first = next(chunks, None)
        n_step = settings.batch.n_seq if size is None else size.block
        with self._explaining_death(run, keeper, settings.batch.n_seq):
            sums: NativeSession | BlockSums
            if first is None or options.cluster is not None:
                sums = BlockSums()  # if first is None the checkpoint is of a run that was done
            else:
                sums = self.models.open(settings)
            run.begin(sums, found)
            found = None  # as large as the sums

            def report(ahead: int = 0) -> None:
                if options.progress is not None:
                    cluster = options.cluster
                    n_workers = None if cluster is None else cluster.recent_n_workers()
                    options.progress(run.progress(text.total, workers=n_workers, ahead=ahead))

            with _saving(run, keeper):
                if run.resumed:
                    report()
                if first is not None and not run.enough(n_step):
                    groups = in_groups(chain([first], chunks), n_step, run.done)
                    with self._steps(run, sums, groups, options, settings, size, report) as steps:
                        self._drive(run, steps, n_step, keeper, report)
                run.finish(chunks, n_step, options.max_chunks)
        if run.left_out:
            warnings.warn(describe_left_out(run.left_out), stacklevel=4)
        return run.matrix()

    @contextmanager
    def _steps(
        self,
        run: Run,
        sums: NativeSession | BlockSums,
        groups: Iterator[list[Chunk]],
        options: RunOptions,
        settings: SessionSettings,
        size: BlockSize | None,
        report: Callable[[int], None],
    ) -> Iterator[Steps]:
        """Where the run's steps come from: the session, or the workers of the cluster."""
        if not isinstance(sums, BlockSums):
            yield SessionSteps(run, sums, groups)
            return
        assert options.cluster is not None
        assert size is not None

        def look(ahead: int) -> None:
            self._life.check_ending()
            report(ahead)

        with options.cluster.collecting(
            groups,
            size=size,
            model=self._preparation.options.model,
            session=settings,
            n_threads=self._preparation.options.n_threads,
            identity=identity_of_work(self.models, settings),
            first=run.next_chunk,
            look=look,
        ) as blocks:
            yield ClusterSteps(run, sums, blocks)

    def _drive(
        self,
        run: Run,
        steps: Steps,
        n_step: int,
        keeper: Keeper | None,
        report: Callable[[], None],
    ) -> None:
        """Take steps until the text ends or the experts have enough.

        A step runs in a second thread: the next one is made ready meanwhile, and Ctrl-C reaches
        this thread, which then tells the engine to stop. What a step adds is counted in that thread
        too, where no signal can come between the two.

        Args:
            n_step: chunks of a step.
        """
        run.start_clock()
        with self._life.stoppable(steps.session), NativeThread() as native:
            running: Future[None] | None = None
            try:
                while (step := steps.take()) is not None:
                    self._life.check_ending()
                    running = native.submit(step)
                    try:
                        steps.look_ahead()
                    except Exception:
                        running.result()  # the text failed, not the chunk that is on its way
                        raise
                    running.result()
                    run.read_clock()
                    if keeper is not None:
                        keeper.step(run.done)
                    report()
                    if run.enough(n_step):
                        break
            except BaseException:
                if running is not None:
                    _settle(steps.session, running)
                raise

    @contextmanager
    def _explaining_death(self, run: Run, keeper: Keeper | None, n_seq: int) -> Iterator[None]:
        """If the engine's process ends, the sums end with it: go back to the checkpoint, and say in
        the error what there is."""
        try:
            yield
        except EngineDiedError as error:
            found = None
            if keeper is not None and keeper.saved:
                with contextlib.suppress(OSError, FormatError):
                    found = checkpoint.read(keeper.path)
            explain_death(
                error,
                next_chunk=run.next_chunk,
                done=run.done,
                n_seq=n_seq,
                checkpoint=None if keeper is None else keeper.path,
                saved=None if found is None else found.done,
            )
            self.free()
            if found is None:
                self.latest = Run(run.setup)
            else:
                run.go_back(found)
            raise


@contextmanager
def _saving(run: Run, keeper: Keeper | None) -> Iterator[None]:
    """Write the checkpoint at the end, and if an error or Ctrl-C ends the run; not if the engine's
    process ended, which takes the sums with it."""
    try:
        yield
        if keeper is not None:
            keeper.save(run.done)
    except EngineDiedError:
        raise
    except BaseException:
        if keeper is not None:
            keeper.save(run.done)
        raise


def _locked(path: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
    """Lets one run have a checkpoint. If no lock can be written, no checkpoint can be either: that
    is a warning when the checkpoint is due."""
    if path is None:
        return contextlib.nullcontext()
    try:
        return locked(path, "checkpoint")
    except OSError:
        return contextlib.nullcontext()


def _settle(session: NativeSession | None, running: Future[None]) -> None:
    """End the running step, and wait until it has ended: its sums count or they do not.

    Args:
        session: whose step it is; None if nothing can end it early.
    """
    if session is not None:
        session.cancel()
    while not running.done():
        try:
            wait([running])
        except KeyboardInterrupt:
            continue  # on its way already
    if session is not None:
        session.clear_cancel()
