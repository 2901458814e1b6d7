"""Collector: runs text through a model and its MTP head and collects the matrix."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from imatrix import _isolate, _session, corpus
from imatrix._batch import MAX_SEQ, USUAL_UBATCH, Batch, choose_in_child, usual
from imatrix._keeper import OTHER_RUN, Keeper, batch_in
from imatrix._lock import locked
from imatrix._native_thread import NativeThread, end_at_exit
from imatrix._rehearsal import rehearse as rehearse_in_child
from imatrix._threads import physical_cores
from imatrix._version import __version__
from imatrix.architectures import (
    check_assistant,
    check_head,
    check_memory,
    check_tables,
    check_trunk,
)
from imatrix.chat_template import ChatOptions, ChatTemplate, Renderer
from imatrix.corpus import Chunk, Chunks, Packing
from imatrix.errors import CheckpointError, EngineDiedError, ModelError, NonFiniteError
from imatrix.formats import FormatError
from imatrix.formats import checkpoint as checkpoint_file
from imatrix.formats.checkpoint import Checkpoint, Group, Setting
from imatrix.matrix import Entry, ImportanceMatrix, LeftOut, Provenance, TextSource
from imatrix.model_file import ModelFile
from imatrix.mtp_files import check_fit
from imatrix.run_report import Ended, ExpertCoverage, Report, coverage_of
from imatrix.text_sources import Mixture, Source

Scores = list[tuple[float, float, int]]

# Here, or in a process of their own.
NativeModel = _session.Model | _isolate.Model
NativeSession = _session.Session | _isolate.Session

# The digest, tokens of each source, documents begun and tokens dropped of each source.
_Mark = tuple[Any, list[int], tuple[tuple[int, int], ...]]

_FOREIGN_HEAD = "mtp:"  # kForeignHead in ext/session.h


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of the trunk over the chunks so far, as llama-imatrix prints it: the second
    half of every chunk is scored (tools/imatrix/imatrix.cpp, compute_imatrix).

    Attributes:
        value: exp of the mean negative log-likelihood.
        error: standard error of `value`; 0 with fewer than two scored tokens.
        n_scored: tokens scored.
    """

    value: float
    error: float
    n_scored: int


@dataclass(frozen=True)
class Progress:
    """Where a run stands, given to its `progress` function after every step.

    Attributes:
        chunks: chunks collected so far.
        total: chunks there will be, None where the text is a stream of unknown length.
        tokens: tokens collected so far.
        seconds: spent on chunks, in an interrupted run that this one goes on from too.
        perplexity: of the chunks so far, None unless asked for.
        resumed: chunks taken over from a checkpoint, those left out among them; 0 if none were.
        experts: rows of the experts so far, None unless min_expert_rows was given.
    """

    chunks: int
    total: int | None
    tokens: int
    seconds: float
    perplexity: Perplexity | None
    resumed: int = 0
    experts: ExpertCoverage | None = None


@dataclass(frozen=True)
class Plan:
    """What a run would collect, read off the engine's graphs without running them.

    Attributes:
        trunk, head: rows a token by weight name, for the weights that the graph multiplies;
            0 where rows do not follow the tokens (a compressed sequence).
        never: weights of the model with two or more dimensions that no graph multiplies, so
            that no data can reach them: lookup tables, convolution kernels, tensors that the
            architecture's graph leaves out. With mtp=False the head's are among them.
        trunk_outputs, head_outputs: whether every row is asked for logits, because the graph
            keeps rows in its last layer only where an output is requested.
    """

    trunk: Mapping[str, int]
    head: Mapping[str, int]
    never: tuple[str, ...]
    trunk_outputs: bool
    head_outputs: bool


class _Tally:
    """Negative log-likelihoods summed in the order of the chunks."""

    def __init__(self) -> None:
        self.nll = 0.0
        self.nll_sq = 0.0
        self.n = 0

    def add(self, scores: Scores) -> None:
        for nll, nll_sq, n in scores:
            self.nll += nll
            self.nll_sq += nll_sq
            self.n += n

    @property
    def perplexity(self) -> Perplexity | None:
        if self.n == 0:
            return None
        mean = self.nll / self.n
        variance = self.nll_sq / self.n - mean * mean
        value = math.exp(mean) if mean < 700 else math.inf
        deviation = math.sqrt(variance / (self.n - 1)) if self.n > 1 and variance > 0 else 0.0
        return Perplexity(value, value * deviation, self.n)


class Collector:
    """Collects importance matrices from one model.

    Args:
        model: path of a GGUF model, or of the first part of a multi-part one.
        mtp_model: path of the head's own file, where the head was split off (`mtp-….gguf`).
        n_ctx: tokens a chunk.
        n_batch: tokens a decode; None for n_ctx * n_seq. "auto": for a model that does not fit into
            memory, as many chunks side by side, in one graph, as the memory has room for, so that
            the weights are read from the disk less often; chosen by each run, n_seq and n_ubatch
            with it, and told by the property `batch` (docs/memory.md). The sums depend on it only
            by the engine's rounding: below 64 rows its CPU attention adds in float16, which moved
            sums by 5e-4 here and can tip a close choice of an expert.
        n_ubatch: tokens a graph; None for 512.
        n_seq: chunks side by side in a decode. Must be 1 for the head.
        n_gpu_layers: layers to put on the GPU, -1 for all; ignored by a build without one.
        n_threads: threads to compute with; None for the physical cores.
        mtp: load the head's tensors now (True), never (False), or when a run first asks for
            them (None). A trunk-only run keeps no memory for the head unless this is True.
        use_mmap: map the file instead of reading it.
        check_tensors: look for NaN and Inf in the weights while loading.
        rehearse: build the graphs in a child process first, from the header alone, so that a
            model on which the engine would end the process is a ModelError instead. Takes a
            fraction of a second, once for each kind of run.
        isolate: run the engine in a process of its own, started when it is first needed and ended
            by close(). Should the engine or the system end that one, this one stays: run() raises
            EngineDiedError, which names the chunk and what there is to go on from. Texts,
            checkpoints and matrices stay in this process; the sums come over for each checkpoint
            and each `matrix`.
        device_sums: sum activations that lie in a device's memory there, where the device can,
            and fetch the sums once a chunk. False copies every activation to the host. Either
            way the sums are float32 within a chunk or less and float64 beyond.

    The model is loaded by the first run (or here, if `mtp` is True or False). Use it as a context
    manager, or call close().

    Any thread may use it, and there may be several in one process, each with a run of its own; one
    has one run at a time. In a process forked from the one that made it, it can only be closed.
    See docs/robustness.md.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError (a ValueError): not a GGUF model, truncated, or without tensors it claims.
        MemoryError: the model does not fit.
    """

    # what a run knows of its text; of each source its name, weight, tokens that count, and how
    # many documents were begun and tokens dropped
    _packing: Packing
    _seed: int | None
    _min_expert_rows: int | None
    _covered: tuple[int, ExpertCoverage | None] | None  # by chunks done
    _ended: Ended
    _ended_by: str | None
    _names: tuple[str, ...]
    _weights: tuple[float | None, ...]
    _source_tokens: list[int]
    _read: tuple[tuple[int, int], ...]

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        mtp_model: str | os.PathLike[str] | None = None,
        n_ctx: int = 512,
        n_batch: int | Literal["auto"] | None = None,
        n_ubatch: int | None = None,
        n_seq: int = 1,
        n_gpu_layers: int = -1,
        n_threads: int | None = None,
        mtp: bool | None = None,
        use_mmap: bool = True,
        check_tensors: bool = False,
        rehearse: bool = True,
        device_sums: bool = True,
        isolate: bool = False,
    ) -> None:
        self._model: NativeModel | None = None
        self._head_model: NativeModel | None = None
        self._session: NativeSession | _Kept | None = None
        self._engine: _isolate.Engine | None = None
        self._pid = os.getpid()
        self._state = threading.RLock()  # a chunk counts wholly or not at all, in any thread
        self._guard = threading.RLock()  # who runs, and what is loaded
        self._runner: int | None = None  # the thread of a run
        self._over = threading.Event()  # no run is on
        self._over.set()
        self._ending: str | None = None  # why the run has to end
        self._stepping: NativeSession | None = None  # what _end() has to stop
        self._closed = True  # until all arguments are found good
        if isinstance(n_batch, str):
            if n_batch != "auto":
                raise ValueError(f"n_batch must be a number, 'auto' or None, got {n_batch!r}")
            if n_ubatch is not None or n_seq != 1:
                raise ValueError("n_batch='auto' chooses n_ubatch and n_seq too: leave them out")
        self._auto = n_batch == "auto"
        tokens = n_ctx * n_seq if n_batch is None or isinstance(n_batch, str) else n_batch
        for name, value, least in (
            ("n_ctx", n_ctx, 2),
            ("n_ubatch", 1 if n_ubatch is None else n_ubatch, 1),
            ("n_seq", n_seq, 1),
            ("n_batch", tokens, n_seq),
            ("n_threads", 1 if n_threads is None else n_threads, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        self._file = ModelFile.read(model)
        check_trunk(self._file)
        self._head_file = self._file
        if mtp_model is not None:
            self._head_file = ModelFile.read(mtp_model)
            if self._head_file.n_nextn == 0:
                raise ModelError(
                    f"{self._head_file.path}: no MTP head in it (nextn_predict_layers is absent "
                    "or 0); give the head's own file as mtp_model, such as imatrix extract-mtp makes"
                )
            if self._head_file.architecture == "gemma4-assistant":
                check_assistant(self._file, self._head_file)
            else:
                check_fit(self._file, self._head_file)
        self._n_ctx = n_ctx
        # a larger batch than a group of chunks is never filled
        self._batch = Batch(
            n_seq, min(n_ctx * n_seq, tokens), USUAL_UBATCH if n_ubatch is None else n_ubatch
        )
        if self._auto:
            self._batch = usual(n_ctx)  # until a run chooses
        self._n_gpu_layers = n_gpu_layers
        self._n_threads = physical_cores() if n_threads is None else n_threads
        self._mtp = mtp
        self._use_mmap = use_mmap
        self._check_tensors = check_tensors
        self._rehearse = rehearse
        self._rehearsed: set[tuple[Batch, bool, bool, bool]] = set()
        self._rehearsed_loads: set[bool] = set()
        self._tokenizer_fault: str | None = None
        self._device_sums = device_sums
        self._isolate = isolate
        self._loaded_mtp = False
        self._tally = _Tally()
        self._seconds = 0.0
        self._reset_run([], False)
        if mtp is not None:
            self._load(mtp and self.n_nextn > 0)
        self._closed = False

    # --- what it is --------------------------------------------------------

    @property
    def architecture(self) -> str:
        """The model's general.architecture."""
        return self._file.architecture

    @property
    def mtp_architecture(self) -> str:
        """The general.architecture of the file that holds the head, the model's own or mtp_model."""
        return self._head_file.architecture

    @property
    def n_trunk(self) -> int:
        """Trunk blocks: blk.0 to blk.<n_trunk - 1>."""
        return self._file.n_trunk

    @property
    def n_nextn(self) -> int:
        """MTP/NextN head blocks that the metadata claim; 0 for a model without a head."""
        return self._head_file.n_nextn

    @property
    def batch(self) -> Batch:
        """Chunks side by side, tokens a decode and tokens a graph (n_seq, n_batch, n_ubatch); with
        n_batch="auto" those that the current or last run chose."""
        return self._batch

    @property
    def matrix(self) -> ImportanceMatrix:
        """A copy of what the current run, or else the last one, has collected so far.

        After an error or KeyboardInterrupt in run() it holds every chunk that was complete; after
        an EngineDiedError those in the checkpoint. Asked for in another thread while a chunk
        runs, it waits for that chunk.
        """
        return self._matrix_of("")

    @property
    def mtp_matrix(self) -> ImportanceMatrix | None:
        """What was collected of a head that is a model of its own kind, for its own file.

        gemma4-assistant numbers its blocks from 0 as the trunk does, so that the two cannot share
        a matrix. None for every other head: its entries are in `matrix`.
        """
        if self._head_file.architecture != "gemma4-assistant" or not self._with_head:
            return None
        return self._matrix_of(_FOREIGN_HEAD)

    def _matrix_of(self, prefix: str) -> ImportanceMatrix:
        """The entries whose native names start with `prefix`, without it."""
        self._check_process()
        with self._state:
            entries: dict[str, Entry] = {}
            if self._session is not None:
                entries = {
                    name.removeprefix(prefix): Entry(sums, counts, name=name)
                    for name, (sums, counts) in self._session.snapshot().items()
                    if name.startswith(_FOREIGN_HEAD) == bool(prefix)
                }
            return ImportanceMatrix(
                entries,
                datasets=self._datasets,
                chunk_count=self._chunks,
                chunk_size=self._n_ctx,
                provenance=Provenance(
                    collector=f"imatrix {__version__}",
                    engine=engine_name(),
                    mtp=self._with_head,
                    n_ctx=self._n_ctx,
                    dataset_digest=self._digest.hexdigest(),
                    left_out=tuple(self._left_out),
                    tokens=self._tokens,
                    packing=self._packing,
                    seed=self._seed,
                    sources=self._sources(),
                ),
            )

    def _sources(self) -> tuple[TextSource, ...]:
        return tuple(
            TextSource(name, documents, tokens, dropped, weight)
            for name, tokens, weight, (documents, dropped) in zip(
                self._names, self._source_tokens, self._weights, self._read, strict=True
            )
        )

    @property
    def report(self) -> Report:
        """What the current run, or else the last one, made of its text so far."""
        self._check_process()
        with self._state:
            counts = {} if self._session is None else self._session.counts()
            return Report(
                sources=self._sources(),
                chunks=self._chunks,
                tokens=self._tokens,
                packing=self._packing,
                seed=self._seed,
                digest=self._digest.hexdigest(),
                ended=self._ended,
                ended_by=self._ended_by,
                experts=coverage_of(counts, self._min_expert_rows or 1),
            )

    @property
    def perplexity(self) -> Perplexity | None:
        """Perplexity over the current or last run; None unless it was asked for."""
        with self._state:
            return self._tally.perplexity

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary (loads the model)."""
        return self._loaded().n_vocab

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Token ids of a text by the model's own tokenizer, int32 [n_tokens]."""
        self._check_tokenizer()
        return self._loaded().tokenize(text, add_special=add_special, parse_special=parse_special)

    def chat_template(self, name: str | None = None) -> ChatTemplate:
        """The model's chat template, with its special tokens; see ChatTemplate.

        Args:
            name: of one of several; None for the default.

        Raises:
            TemplateError: the model has no such template.
        """
        return self._renderer(self._loaded(), ChatOptions(template=name)).template()

    def _renderer(self, model: NativeModel, options: ChatOptions) -> Renderer:
        return Renderer(
            model.metadata("tokenizer."), model.token_text, options, str(self._file.path)
        )

    # --- life --------------------------------------------------------------

    def close(self) -> None:
        """Free the model, the contexts and the sums. Safe to call twice.

        A run that is on in another thread is ended first: it raises RuntimeError there, and its
        checkpoint is written. Called by the run's own thread (in `progress`, say), it ends the
        run when that comes back.
        """
        self._closed = True
        if os.getpid() != self._pid:
            return  # a fork: what is native belongs to the process that made it
        self._end("this Collector was closed")
        if self._runner == threading.get_ident():
            return  # run() does the rest
        self._over.wait()
        self._free()

    def _free(self) -> None:
        with self._state:
            self._session = None
            self._model = None
            self._head_model = None
            self._loaded_mtp = False
            if self._engine is not None:
                self._engine.close()
                self._engine = None

    def _end(self, why: str) -> None:
        """Have the run that is on end soon, from any thread."""
        with self._guard:
            if self._runner is not None:
                self._ending = why
                if self._stepping is not None:
                    self._stepping.cancel()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Be the one run of this Collector."""
        self._check_process()
        with self._guard:
            if self._runner is not None:
                where = "this" if self._runner == threading.get_ident() else "another"
                raise RuntimeError(
                    f"a run of this Collector is on, in {where} thread; wait for it, or make a "
                    "Collector of its own for each"
                )
            self._runner = threading.get_ident()
            self._over.clear()
            self._ending = None
        end_at_exit.running.add(self)
        try:
            yield
        except InterruptedError:
            # of the step that _end() has stopped
            if self._ending is None:
                raise
            raise RuntimeError(f"the run was ended: {self._ending}") from None
        finally:
            end_at_exit.running.discard(self)
            with self._guard:
                self._runner = None
                if self._closed:
                    self._free()
                self._over.set()

    def _check_ending(self) -> None:
        if self._ending is not None:
            raise RuntimeError(f"the run was ended: {self._ending}")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this Collector belongs to process {self._pid}, of which this one is a fork: what "
                "the engine has there is not here. Make a Collector here with isolate=True, or "
                "start processes by multiprocessing's 'spawn'"
            )

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and os.getpid() == self._pid:
            warnings.warn(
                f"Collector({str(self._file.path)!r}) was never closed; use it in a with statement",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
            self.close()

    # --- running -----------------------------------------------------------

    def run(
        self,
        texts: corpus.Texts,
        *,
        mtp: bool = False,
        max_chunks: int | None = None,
        skip_chunks: int = 0,
        process_output: bool = False,
        parse_special: bool = False,
        packing: Packing = "stream",
        chat: ChatOptions | None = None,
        min_expert_rows: int | None = None,
        perplexity: bool = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 10,
        restart: bool = False,
        progress: Callable[[Progress], object] | None = None,
    ) -> ImportanceMatrix:
        """Collect a matrix from texts. Every run starts from zero, or from a checkpoint of its
        own; add matrices with `+`.

        Args:
            texts: a string, an open file, a path, an iterable of strings, of Chats or of token
                lists, a Source, or a Mixture of sources; see imatrix.corpus.chunks for how they
                are cut.
            mtp: collect the MTP/NextN head too. A model without one gives a warning.
            max_chunks: chunks to collect at most; None for all.
            skip_chunks: chunks to leave out at the start.
            process_output: collect output.weight too (the trunk's rows only).
            parse_special: read special tokens that the text spells out as such. Chats have theirs
                read in any case.
            packing: "stream", as llama-imatrix cuts a text; "document", where no document sees
                another: each chunk is run by itself and holds tokens of one, so that many are
                shorter than n_ctx. The head pairs tokens within a chunk only.
            chat: how chats are rendered; None for the model's own template, as it is.
            min_expert_rows: go on until every expert of every block, the head's too, has seen
                that many rows, or the text or max_chunks comes to its end; None for all the text.
                Whether it has is seen after each step, of n_seq chunks.
            perplexity: score the text as it runs; see the property `perplexity`.
            on_nonfinite: what a NaN or Inf activation does: end the run, or leave out its chunk,
                which the matrix then remembers (Provenance.left_out).
            checkpoint: file to go on from if the run is interrupted; one run at a time can have
                it. It is written every
                `checkpoint_every` chunks, every three minutes at least, at the end, and where an
                error or Ctrl-C ends the run. Where there is one, the run goes on from it and gives
                the same matrix, bit for bit, as without the interruption (on one backend, with
                one number of threads); give the same model, texts and settings. It stays: remove
                it when the matrix is safe. See docs/checkpoints.md.
            checkpoint_every: chunks between two checkpoints; 0 for the other occasions only.
            restart: start from zero, whatever there is at `checkpoint`.
            progress: called with a Progress after every step, in this thread, and before the
                first one where a checkpoint was taken over. An exception that it raises ends the
                run.

        Returns:
            The matrix. The property `matrix` gives what there is so far, during a run and after
            one that failed.

        Raises:
            ValueError: no tokens, a bad number, mtp with n_seq other than 1, a source that cannot
                be understood, or min_expert_rows for a model without experts.
            TemplateError (a ValueError): a chat cannot be rendered.
            ImportError: a library that reads a source is not installed.
            ModelError: the head that the metadata claim is not in the file, or text was given to
                a model without a tokenizer.
            CheckpointError (a ValueError): the checkpoint is of another model, text or setting,
                or damaged.
            LockedError (a RuntimeError): another run has this checkpoint; it names the process.
            RuntimeError: a run of this Collector is on, it was closed meanwhile, or this process
                is a fork of the one that made it.
            EngineDiedError: with isolate=True, the process that ran the engine is gone.
            NonFiniteError: a NaN or Inf activation; that chunk is discarded, the earlier ones stay.
            MemoryError: no memory for the contexts or the sums.
            KeyboardInterrupt: Ctrl-C; the running chunk is discarded, the earlier ones stay.
        """
        if on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite must be 'stop' or 'skip', got {on_nonfinite!r}")
        if checkpoint_every < 0:
            raise ValueError(f"checkpoint_every must be 0 or more, got {checkpoint_every}")
        if min_expert_rows is not None:
            self._check_experts(min_expert_rows)
        with self._running(), _locked(checkpoint):
            return self._run(
                texts,
                mtp=mtp,
                max_chunks=max_chunks,
                skip_chunks=skip_chunks,
                process_output=process_output,
                parse_special=parse_special,
                packing=packing,
                chat=chat,
                min_expert_rows=min_expert_rows,
                perplexity=perplexity,
                on_nonfinite=on_nonfinite,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                restart=restart,
                progress=progress,
            )

    def _run(
        self,
        texts: corpus.Texts,
        *,
        mtp: bool,
        max_chunks: int | None,
        skip_chunks: int,
        process_output: bool,
        parse_special: bool,
        packing: Packing,
        chat: ChatOptions | None,
        min_expert_rows: int | None,
        perplexity: bool,
        on_nonfinite: Literal["stop", "skip"],
        checkpoint: str | os.PathLike[str] | None,
        checkpoint_every: int,
        restart: bool,
        progress: Callable[[Progress], object] | None,
    ) -> ImportanceMatrix:
        """run(), as the only one."""
        model, with_head = self._prepare(mtp, process_output, perplexity)
        self._reset_run(_dataset_names(texts), with_head, skip_chunks, on_nonfinite == "skip")
        options = ChatOptions() if chat is None else chat
        render = self._renderer(model, options)
        chunks, total, text = self._packed(
            model, texts, packing, render, parse_special, skip_chunks, max_chunks
        )
        if self._auto:
            # rounding goes with the batch: a run that goes on keeps that of its first part
            taken = None if checkpoint is None or restart else batch_in(checkpoint)
            self._batch = taken or self._chosen(with_head, process_output, perplexity, total)
            self._rehearse_once(with_head, process_output, perplexity)
        self._packing = packing
        self._min_expert_rows = min_expert_rows
        self._seed = texts.seed if isinstance(texts, Mixture) else None
        self._weights = _weights(texts)
        self._names = _source_names(texts, chunks.names)
        self._source_tokens = [0] * len(self._names)
        self._read = ((0, 0),) * len(self._names)
        try:
            return self._run_chunks(
                model,
                with_head,
                chunks,
                total,
                {
                    "mtp": with_head,
                    "process_output": process_output,
                    "parse_special": parse_special,
                    "perplexity": perplexity,
                    "skip_chunks": skip_chunks,
                    "max_chunks": -1 if max_chunks is None else max_chunks,
                    **_text_settings(texts, packing, chat, min_expert_rows),
                    **text,
                },
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                restart=restart,
                max_chunks=max_chunks,
                progress=progress,
            )
        finally:
            render.close()

    def _run_chunks(
        self,
        model: NativeModel,
        with_head: bool,
        chunks: Chunks,
        total: int | None,
        arguments: dict[str, Setting],
        *,
        checkpoint: str | os.PathLike[str] | None,
        checkpoint_every: int,
        restart: bool,
        max_chunks: int | None,
        progress: Callable[[Progress], object] | None,
    ) -> ImportanceMatrix:
        """The rest of _run(), with the text at hand. `arguments`: those of run() that must be the
        same to go on from a checkpoint."""
        process_output, perplexity = (
            bool(arguments["process_output"]),
            bool(arguments["perplexity"]),
        )
        keeper = None
        found = None
        if checkpoint is not None:
            settings: dict[str, Setting] = {**self._identity(), **arguments}
            keeper = Keeper(checkpoint, checkpoint_every, lambda: self._checkpoint(settings))
            found = None if restart else keeper.load(settings)
        if found is not None:
            self._read_past(found, chunks, checkpoint)
        # bad text is an error before any context is made
        first = next(chunks, None)

        session: NativeSession | _Kept
        if first is None:  # the checkpoint is of a run that was done
            session = _Kept()
        else:
            try:
                session = self._open(model, with_head, process_output, perplexity)
            except EngineDiedError as error:
                self._outlive(error, keeper)
                raise
        if found is not None:
            self._take_over(found, session)
            found = None  # as large as the sums
        self._session = session
        report = self._reporter(progress, total)
        if self._resumed:
            report()
        try:
            if first is not None and not self._enough():
                assert not isinstance(session, _Kept)
                self._drive(session, itertools.chain([first], chunks), keeper, report)
            if not self._enough():
                # the end of the text: what it dropped there is known now
                self._read = chunks.read
                self._ended_by = None if chunks.ended is None else self._names[chunks.ended]
                if self._done == max_chunks:
                    self._ended = "max_chunks"
            elif self._min_expert_rows is not None:
                self._ended = "min_expert_rows"
            if keeper is not None:
                keeper.save(self._done)
        except EngineDiedError as error:
            self._outlive(error, keeper)
            raise
        except BaseException:
            if keeper is not None:
                keeper.save(self._done)
            raise
        if self._left_out:
            warnings.warn(_left_out_told(self._left_out), stacklevel=4)
        return self.matrix

    def _check_experts(self, min_expert_rows: int) -> None:
        if min_expert_rows < 1:
            raise ValueError(f"min_expert_rows must be 1 or more, got {min_expert_rows}")
        if self._file.integers.get("expert_count", 0) < 2:
            raise ValueError(
                f"min_expert_rows={min_expert_rows}, but {self._file.path.name} "
                f"({self.architecture}) has no experts; leave it out"
            )

    def _coverage(self) -> ExpertCoverage | None:
        """Of the experts, where a number of rows is wanted. Between two steps only, and counted
        once for each: the report and the end of the run both look at it."""
        if self._min_expert_rows is None or self._session is None:
            return None
        if self._covered is not None and self._covered[0] == self._done:
            return self._covered[1]
        found = coverage_of(self._session.counts(), self._min_expert_rows)
        self._covered = (self._done, found)
        return found

    def _enough(self) -> bool:
        """Whether the experts have the rows that were wanted. Seen only where a group of chunks
        ends, so that a run that went on from a checkpoint within one ends where one that was
        never interrupted does."""
        if self._done % self._batch.n_seq:
            return False
        found = self._coverage()
        return found is not None and found.reached

    def plan(self, *, mtp: bool = False, process_output: bool = False) -> Plan:
        """What run() would collect and what it never could. Loads the model, runs nothing.

        Raises:
            ModelError, ValueError, MemoryError: as run() does.
        """
        with self._running():
            model, with_head = self._prepare(mtp, process_output, False)
            session = self._open(model, with_head, process_output, False)
        (trunk_outputs, trunk), (head_outputs, head) = (
            session.plan["trunk"],
            session.plan["head"],
        )
        tensors = {**self._file.tensors, **self._head_file.tensors}
        never = tuple(
            name
            for name, shape in tensors.items()
            if name.startswith("blk.") and len(shape) > 1 and name not in trunk and name not in head
        )
        return Plan(trunk, head, never, trunk_outputs, head_outputs)

    def _open(
        self, model: NativeModel, with_head: bool, process_output: bool, perplexity: bool
    ) -> NativeSession:
        session: NativeSession
        with self._dropping_engine():
            if isinstance(model, _isolate.Model):
                assert not isinstance(self._head_model, _session.Model)
                session = _isolate.Session(model, self._head_model)
            else:
                assert not isinstance(self._head_model, _isolate.Model)
                session = _session.Session(model, self._head_model)
            session.open(**self._settings(with_head, process_output, perplexity))
        return session

    @contextmanager
    def _dropping_engine(self) -> Iterator[None]:
        """Where loading fails or is interrupted, the engine's own process goes, and with it what
        it may still be busy with."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, EngineDiedError):
                error.args = (f"{error.args[0]}, while it loaded {self._file.path}",)
            elif not isinstance(error, Exception):
                self._free()
            raise

    def _started(self) -> _isolate.Engine:
        """The engine's own process, a new one where the last one has died."""
        if self._engine is not None and not self._engine.alive:
            self._free()
        if self._engine is None:
            self._engine = _isolate.Engine()
        return self._engine

    @property
    def has_gpu(self) -> bool:
        """Whether the engine sees a device to put layers on (with isolate, where it runs)."""
        if self._isolate:
            return _isolate.has_gpu(self._started())
        return any(device["gpu"] for device in _session.backends()[1])

    def _settings(self, with_head: bool, process_output: bool, perplexity: bool) -> dict[str, Any]:
        """What _session.Session.open takes."""
        return {
            "n_ctx": self._n_ctx,
            "n_batch": self._batch.n_batch,
            "n_ubatch": self._batch.n_ubatch,
            "n_seq": self._batch.n_seq,
            "n_threads": self._n_threads,
            "mtp": with_head,
            "process_output": process_output,
            "perplexity": perplexity,
            "device_sums": self._device_sums,
        }

    def _prepare(
        self, mtp: bool, process_output: bool, perplexity: bool
    ) -> tuple[NativeModel, bool]:
        """The model, loaded for what was asked, and whether there is a head to collect."""
        if self._closed:
            raise ValueError("this Collector is closed")
        if self._auto:
            self._batch = usual(self._n_ctx)
        if mtp and self._batch.n_seq != 1:
            raise ValueError(
                f"mtp=True needs n_seq=1, this Collector has n_seq={self._batch.n_seq}: the head is fed "
                "each token with the trunk's row of the token before it, and rows of chunks that "
                "run side by side would be paired across them. Set n_seq=1."
            )
        if mtp and self._mtp is False:
            raise ValueError("mtp=True, but this Collector was made with mtp=False")
        if mtp and self.n_nextn == 0:
            warnings.warn(
                f"{self._file.path.name} ({self.architecture}) has no MTP head "
                "(nextn_predict_layers is absent or 0): collecting the trunk only",
                stacklevel=4,
            )
        with_head = mtp and self.n_nextn > 0
        if with_head:
            check_head(self._head_file)
        check_memory(self._file)
        self._rehearse_once(with_head, process_output, perplexity)
        return self._load(with_head), with_head

    def _rehearse_once(self, with_head: bool, process_output: bool, perplexity: bool) -> None:
        """Unless it was done for such a run, with this batch."""
        kind = (with_head, process_output, perplexity)
        if self._rehearse and (self._batch, *kind) not in self._rehearsed:
            self._tokenizer_fault = rehearse_in_child(
                *self._files(with_head), self._settings(*kind)
            )
            self._rehearsed.add((self._batch, *kind))
            self._rehearsed_loads.add(with_head)

    def _files(self, with_head: bool) -> tuple[Path, Path | None]:
        """The trunk's file, and that of a head which is not in it."""
        bundled = self._head_file is self._file
        return self._file.path, self._head_file.path if with_head and not bundled else None

    def _chosen(
        self, with_head: bool, process_output: bool, perplexity: bool, total: int | None
    ) -> Batch:
        """What n_batch="auto" comes to, for `total` chunks (None: nobody knows)."""
        return choose_in_child(
            *self._files(with_head),
            self._settings(with_head, process_output, perplexity),
            n_gpu_layers=self._n_gpu_layers,
            mapped=self._maps(self._file),
            most=1 if with_head else min(MAX_SEQ, max(1, MAX_SEQ if total is None else total)),
        )

    def _drive(
        self,
        session: NativeSession,
        chunks: Iterator[Chunk],
        keeper: Keeper | None,
        report: Callable[[], None],
    ) -> None:
        """Native steps run in a second thread: the next chunk is tokenized meanwhile, and
        Ctrl-C reaches this one, which then tells the engine to stop. What a step adds is counted
        in that thread too, where no signal can come between the two."""
        groups = _groups(chunks, self._batch.n_seq, self._done)
        before = self._seconds
        started = time.monotonic()
        with self._stoppable(session), NativeThread() as native:
            running: Future[None] | None = None
            try:
                group = next(groups, None)
                while group is not None:
                    self._check_ending()
                    running = native.submit(self._collect, session, group)
                    try:
                        following = next(groups, None)
                    except Exception:
                        running.result()  # the text failed, not the chunk that is on its way
                        raise
                    running.result()
                    self._seconds = before + time.monotonic() - started
                    if keeper is not None:
                        keeper.step(self._done)
                    report()
                    if self._enough():
                        break
                    group = following
            except BaseException:
                if running is not None:
                    _settle(session, running)
                raise

    @contextmanager
    def _stoppable(self, session: NativeSession) -> Iterator[None]:
        """_end() reaches this session's steps."""
        with self._guard:
            self._stepping = session
        try:
            yield
        finally:
            with self._guard:
                self._stepping = None

    def _collect(self, session: NativeSession, group: list[Chunk]) -> None:
        """Collect chunks side by side and count them; in the native thread."""
        with self._state:
            self._collect_group(session, group)

    def _collect_group(self, session: NativeSession, group: list[Chunk]) -> None:
        lengths = np.array([len(chunk.tokens) for chunk in group], dtype=np.int32)
        try:
            scores = session.step(np.concatenate([chunk.tokens for chunk in group]), lengths)
        except NonFiniteError as error:
            if len(group) > 1:  # which of them it was shows when each runs by itself
                for chunk in group:
                    self._collect_group(session, [chunk])
                return
            error.chunk = self._skipped + self._done
            if not self._skip_nonfinite:
                _tell_where(error, self._chunks)
                raise
            self._left_out.append(LeftOut(error.chunk, group[0].start, error.weight))
        except EngineDiedError as error:
            error.chunk = self._skipped + self._done
            raise
        else:
            for chunk in group:
                self._digest.update(chunk.tokens.astype("<i4").tobytes())
                self._chunks += 1
                self._tokens += len(chunk.tokens)
                self._count_sources(chunk)
            self._tally.add(scores)
        for chunk in group:
            self._text_digest.update(chunk.tokens.astype("<i4").tobytes())
            self._read = chunk.read
            self._done += 1

    def _count_sources(self, chunk: Chunk) -> None:
        for source, tokens in chunk.parts:
            self._source_tokens[source] += tokens

    def _reporter(
        self, progress: Callable[[Progress], object] | None, total: int | None
    ) -> Callable[[], None]:
        def report() -> None:
            if progress is not None:
                done = Progress(
                    self._chunks,
                    total,
                    self._tokens,
                    self._seconds,
                    self._tally.perplexity,
                    self._resumed,
                    self._coverage(),
                )
                progress(done)

        return report

    def _reset_run(
        self,
        datasets: list[str],
        with_head: bool,
        skipped: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        self._session = None
        self._datasets = datasets
        self._with_head = with_head
        self._skipped = skipped  # chunks, at the start of the text
        self._skip_nonfinite = skip_nonfinite
        self._chunks = 0  # that count
        self._done = 0  # those, and those left out
        self._resumed = 0  # of them, taken over from a checkpoint
        self._tokens = 0
        self._seconds = 0.0
        self._left_out: list[LeftOut] = []
        self._digest = hashlib.sha256()  # of the chunks that count
        self._text_digest = hashlib.sha256()  # of all that are done
        self._tally = _Tally()
        # of the last checkpoints, by chunks done: see _outlive
        self._marks: dict[int, _Mark] = {}
        self._packing = "stream"
        self._seed = None
        self._min_expert_rows = None
        self._covered = None
        self._ended = "text"
        self._ended_by = None
        self._names = ()
        self._weights = ()
        self._source_tokens = []
        self._read = ()

    # --- checkpoints -------------------------------------------------------

    def _identity(self) -> dict[str, Setting]:
        """What decides the numbers, apart from the arguments of run()."""
        found: dict[str, Setting] = {
            "collector": f"imatrix {__version__}",
            "engine": engine_name(),
            "model_size": self._file.size,
            "model_fingerprint": self._file.fingerprint(),
            "n_ctx": self._n_ctx,
            "n_batch": self._batch.n_batch,
            "n_ubatch": self._batch.n_ubatch,
            "n_seq": self._batch.n_seq,
        }
        if self._with_head and self._head_file is not self._file:
            found["mtp_model_size"] = self._head_file.size
            found["mtp_model_fingerprint"] = self._head_file.fingerprint()
        return found

    def _checkpoint(self, settings: dict[str, Setting]) -> Checkpoint:
        # what _outlive goes back to; the one before it, where this one cannot be written
        self._marks = {**dict(list(self._marks.items())[-1:]), self._done: self._mark()}
        return Checkpoint(
            done=self._done,
            tokens=self._tokens,
            seconds=self._seconds,
            nll=self._tally.nll,
            nll_sq=self._tally.nll_sq,
            scored=self._tally.n,
            text_digest=self._text_digest.hexdigest(),
            settings=settings,
            left_out=tuple(self._left_out),
            groups=[] if self._session is None else self._session.groups(),
        )

    def _mark(self) -> _Mark:
        """What a checkpoint need not hold: the text, read again, gives it."""
        return self._digest.copy(), list(self._source_tokens), self._read

    def _read_past(
        self,
        found: Checkpoint,
        chunks: Iterator[Chunk],
        path: str | os.PathLike[str] | None,
    ) -> None:
        """Take the chunks that are done off the text, and see that they are the same."""
        left_out = {one.chunk - self._skipped for one in found.left_out}
        for number in range(found.done):
            chunk = next(chunks, None)
            if chunk is None:
                raise CheckpointError(
                    f"{path} is of another text: {found.done} chunks of it are done, this one "
                    f"has {number}. {OTHER_RUN}"
                )
            tokens = chunk.tokens.astype("<i4").tobytes()
            self._text_digest.update(tokens)
            self._read = chunk.read
            if number not in left_out:
                self._digest.update(tokens)
                self._count_sources(chunk)
        if self._text_digest.hexdigest() != found.text_digest:
            raise CheckpointError(
                f"{path} is of another text: the first {found.done} chunks differ. {OTHER_RUN}"
            )
        self._marks = {found.done: self._mark()}

    def _take_over(self, found: Checkpoint, session: NativeSession | _Kept) -> None:
        """Stand where the checkpoint was written."""
        for group in found.groups:
            session.restore(*group)
        self._resumed = found.done
        self._stand_at(found)

    def _stand_at(self, found: Checkpoint) -> None:
        self._done = found.done
        self._chunks = found.done - len(found.left_out)
        self._tokens = found.tokens
        self._seconds = found.seconds
        self._left_out = list(found.left_out)
        self._tally.nll, self._tally.nll_sq = found.nll, found.nll_sq
        self._tally.n = found.scored

    def _outlive(self, error: EngineDiedError, keeper: Keeper | None) -> None:
        """The engine's process is gone, and the sums with it: go back to the checkpoint, and say
        in the error what there is."""
        at = error.chunk
        ran = f", in chunk {at}"
        if at is None:  # not in one: while its sums were fetched, say
            ran = f", before chunk {self._skipped + self._done}" if self._done else ""
        if at is not None and self._batch.n_seq > 1:
            ran = f", in one of the chunks {at} to {at + self._batch.n_seq - 1}"
        done = self._done
        found = None
        if keeper is not None and keeper.saved:
            with contextlib.suppress(OSError, FormatError):
                found = checkpoint_file.read(keeper.path)
        self._free()
        if found is None or keeper is None:
            self._reset_run(self._datasets, self._with_head, self._skipped, self._skip_nonfinite)
            left = (
                f"There is no checkpoint to go on from, {done} chunk(s) are lost"
                + (": give run() one (checkpoint=)." if keeper is None else ".")
                if done
                else "No chunk was finished."
            )
        else:
            self._stand_at(found)
            if (mark := self._marks.get(found.done)) is not None:
                self._digest, self._source_tokens, self._read = mark
            self._session = _Kept(found.groups)
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

    def _chunks_of(
        self,
        model: NativeModel,
        texts: corpus.Texts,
        parse_special: bool,
        skip_chunks: int,
        max_chunks: int | None,
    ) -> tuple[Iterator[NDArray[np.int32]], int | None, dict[str, Setting]]:
        """_packed() for a stream without chats."""
        chunks, total, text = self._packed(
            model, texts, "stream", None, parse_special, skip_chunks, max_chunks
        )
        return (chunk.tokens for chunk in chunks), total, text

    def _packed(
        self,
        model: NativeModel,
        texts: corpus.Texts,
        packing: Packing,
        render: Renderer | None,
        parse_special: bool,
        skip_chunks: int,
        max_chunks: int | None,
    ) -> tuple[Chunks, int | None, dict[str, Setting]]:
        """The chunks; how many there will be, and what tells the text from another, as far as
        that can be known before it is read."""
        total = None
        text: dict[str, Setting] = {}
        if isinstance(texts, (str, os.PathLike, corpus.TextFile)):
            self._check_tokenizer()
            tokens = np.concatenate(
                [np.empty(0, np.int32), *corpus.pieces(texts, model, parse_special)]
            )
            texts = [tokens]
            text["text_tokens"] = len(tokens)
            text["text_digest"] = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
            if packing == "stream":
                total = max(1, len(tokens) // self._n_ctx) - skip_chunks
            else:  # a single document; a BOS in front of each chunk takes a token's place
                total = sum(1 for _ in corpus.chunks(texts, model, self._n_ctx, packing=packing))
                total -= skip_chunks
            total = total if max_chunks is None else min(total, max_chunks)
        chunks = Chunks(
            texts,
            _Tokenizing(model, self._check_tokenizer),
            self._n_ctx,
            packing=packing,
            parse_special=parse_special,
            skip_chunks=skip_chunks,
            max_chunks=max_chunks,
            render=render,
        )
        return chunks, total, text

    def _check_tokenizer(self) -> None:
        if not self._file.has_tokenizer:
            raise ModelError(
                f"{self._file.path}: the model has no tokenizer (tokenizer.ggml.model), so text "
                "cannot be tokenized; give token lists, or a file converted with its tokenizer"
            )
        self._loaded()  # the tokenizer is rehearsed with it
        if self._tokenizer_fault is not None:
            raise ModelError(
                f"{self._file.path}: the engine's tokenizer ends the process with the vocabulary "
                f"of this model: {self._tokenizer_fault}. Give token lists, or convert the model "
                "again with its tokenizer."
            )

    def _loaded(self) -> NativeModel:
        self._check_process()
        if self._closed:
            raise ValueError("this Collector is closed")
        with self._guard:
            return self._model if self._model is not None else self._load(False)

    def _load(self, head: bool) -> NativeModel:
        """The trunk's model; with `head` the head's is in _head_model, else None is."""
        if self._engine is not None and not self._engine.alive:
            self._free()
        if head:
            check_head(self._head_file)
            check_tables(self._head_file)
        check_tables(self._file)
        bundled = head and self._head_file is self._file
        if self._rehearse and head not in self._rehearsed_loads:
            self._tokenizer_fault = rehearse_in_child(*self._files(head), {"mtp": head})
            self._rehearsed_loads.add(head)
        if self._model is None or (bundled and not self._loaded_mtp):
            self._session = None
            self._model = None  # a reload with the head must not hold the model twice
            self._head_model = None
            self._model = self._load_file(self._file, bundled)
            self._loaded_mtp = bundled
        if not head:
            self._head_model = None
        elif bundled:
            self._head_model = self._model
        elif self._head_model is None:
            self._head_model = self._load_file(self._head_file, True)
        return self._model

    def _native_models(self, head: bool) -> tuple[_session.Model, _session.Model | None]:
        """The trunk and, with `head`, what holds the head, rehearsed and loaded for other native
        work."""
        assert not self._isolate
        model, _ = self._prepare(head, False, False)
        assert isinstance(model, _session.Model)
        assert not isinstance(self._head_model, _isolate.Model)
        return model, self._head_model

    def _maps(self, file: ModelFile) -> bool:
        """The engine maps a file only where its tensors are aligned, or ends the process."""
        return self._use_mmap and file.aligned

    def _load_file(self, file: ModelFile, mtp: bool) -> NativeModel:
        options: dict[str, Any] = {
            "mtp": mtp,
            "n_gpu_layers": self._n_gpu_layers,
            "use_mmap": self._maps(file),
            "check_tensors": self._check_tensors,
        }
        model: NativeModel
        if self._isolate:
            with self._dropping_engine():
                model = _isolate.Model(self._started(), str(file.path), **options)
        else:
            model = _session.Model(str(file.path), **options)
        if not model.has_decoder:
            raise ModelError(
                f"{file.path}: {file.architecture} has no decoder; only models that decode text "
                "can be collected from"
            )
        if 0 < model.n_ctx_train < self._n_ctx:
            warnings.warn(
                f"n_ctx={self._n_ctx} is more than the {model.n_ctx_train} tokens that "
                f"{file.path.name} was trained on",
                stacklevel=5,
            )
        return model


class _Kept:
    """What a session had collected, without one."""

    def __init__(self, groups: list[Group] | None = None) -> None:
        self._groups = groups or []

    def restore(
        self, names: list[str], sums: NDArray[np.float64], counts: NDArray[np.int64]
    ) -> None:
        self._groups.append((names, sums, counts))

    def groups(self) -> list[Group]:
        return self._groups

    def snapshot(self) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
        return {name: (sums, counts) for names, sums, counts in self._groups for name in names}

    def counts(self) -> dict[str, NDArray[np.int64]]:
        return {name: counts for names, _, counts in self._groups for name in names}


class _Tokenizing:
    """The model as a tokenizer that refuses text where there is none; token lists still pass."""

    def __init__(self, model: NativeModel, check: Callable[[], None]) -> None:
        self._model = model
        self._check = check
        self.add_bos = model.add_bos
        self.bos = model.bos
        self.n_vocab = model.n_vocab

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        self._check()
        return self._model.tokenize(text, add_special=add_special, parse_special=parse_special)


def engine_name() -> str:
    """The engine as it is named in files: "llama.cpp 0.5.0 (0c1e57098)"."""
    version, commit = _session.engine()
    return f"llama.cpp {version} ({commit})"


def _dataset_names(texts: corpus.Texts) -> list[str]:
    if isinstance(texts, Source):
        return [texts.name] if texts.name else []
    if isinstance(texts, Mixture):
        return list(dict.fromkeys(name for name in texts.names if name))
    if isinstance(texts, os.PathLike):
        return [os.fspath(texts)]
    name = getattr(texts, "name", None)
    return [name] if isinstance(name, str) else []


def _source_names(texts: corpus.Texts, names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the sources; a text that is no source is called what its data set is."""
    return names if isinstance(texts, (Source, Mixture)) else (*_dataset_names(texts), "")[:1]


def _weights(texts: corpus.Texts) -> tuple[float | None, ...]:
    if not isinstance(texts, Mixture):
        return (None,)
    return texts.weights or (None,) * len(texts.sources)


def _text_settings(
    texts: corpus.Texts,
    packing: Packing,
    chat: ChatOptions | None,
    min_expert_rows: int | None,
) -> dict[str, Setting]:
    """What decides the chunks beside the text, where it is not the default."""
    found: dict[str, Setting] = {}
    if packing != "stream":
        found["packing"] = packing
    if min_expert_rows is not None:
        found["min_expert_rows"] = min_expert_rows
    if isinstance(texts, Mixture):
        if texts.seed is not None:
            found["seed"] = texts.seed
        if texts.weights is not None:
            found["weights"] = " ".join(map(repr, texts.weights))
    if chat is not None:
        found["chat"] = chat.digest()
    return found


def _groups(chunks: Iterator[Chunk], n_seq: int, done: int) -> Iterator[list[Chunk]]:
    """Chunks in groups of n_seq, the last one shorter.

    Where `done` ends inside a group, that group had a chunk with a NaN and ran chunk by chunk:
    so does the rest of it.
    """
    for chunk in itertools.islice(chunks, -done % n_seq):
        yield [chunk]
    group: list[Chunk] = []
    for chunk in chunks:
        group.append(chunk)
        if len(group) == n_seq:  # at once: nothing is taken from the text before its time
            yield group
            group = []
    if group:
        yield group


def _locked(checkpoint: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
    """One run a checkpoint. Where no lock can be written nothing else can: that is told when the
    checkpoint is due."""
    if checkpoint is None:
        return contextlib.nullcontext()
    try:
        return locked(checkpoint, "checkpoint")
    except OSError:
        return contextlib.nullcontext()


def _settle(session: NativeSession, running: Future[None]) -> None:
    """End the running step, and wait until it has: its sums count or they do not."""
    session.cancel()
    while not running.done():
        try:
            wait([running])
        except KeyboardInterrupt:
            continue  # on its way already
    session.clear_cancel()


def _tell_where(error: NonFiniteError, kept: int) -> None:
    where = f"channel {error.channel}"
    if error.expert is not None:
        where = f"expert {error.expert}, {where}"
    error.args = (
        f"{error.args[0]} in chunk {error.chunk} ({where}). That chunk was discarded; the {kept} "
        "before it are kept in Collector.matrix. on_nonfinite='skip' (--on-nonfinite skip) leaves "
        "such chunks out and goes on.",
    )


def _left_out_told(left_out: list[LeftOut]) -> str:
    first = ", ".join(
        f"chunk {one.chunk} (from token {one.token}, at {one.weight})" for one in left_out[:3]
    )
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f"left out for NaN or infinite activations: {first}{more}"
