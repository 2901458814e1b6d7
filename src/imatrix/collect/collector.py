"""Collector: runs text through a model and its MTP head and collects the matrix."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from imatrix.cluster.cluster import Cluster
from imatrix.collect.driver import locked_checkpoint, settle
from imatrix.collect.keeper import Keeper, batch_in
from imatrix.collect.messages import describe_left_out
from imatrix.collect.options import RunOptions
from imatrix.collect.run import Run
from imatrix.engine.background import NativeThread, end_at_exit, ended_at_exit
from imatrix.engine.cores import physical_cores
from imatrix.engine.identity import (
    describe_differences_of_work,
    identity_of_run,
    identity_of_work,
)
from imatrix.engine.interface import FOREIGN_HEAD, NativeModel, NativeSession
from imatrix.engine.models import Models
from imatrix.engine.placement import NO_TENSOR_MODE, Overrides, Placement, SplitMode
from imatrix.engine.plan import Plan
from imatrix.engine.settings import (
    MAX_SEQ,
    Batch,
    Layers,
    ModelOptions,
    SessionSettings,
    Wanted,
    check_head_runs_alone,
    usual,
)
from imatrix.engine.sums import BlockSums
from imatrix.errors import EngineDiedError, ModelError
from imatrix.files.outputs import Output, check_files
from imatrix.formats import FormatError
from imatrix.formats import checkpoint as checkpoint_file
from imatrix.formats.checkpoint import Setting
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.architectures import lacks_head
from imatrix.text.chats import ChatOptions
from imatrix.text.chunks import Chunk, Chunks
from imatrix.text.cutting import TextFacts, cut, in_groups
from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import Texts, text_inputs
from imatrix.text.progress import Perplexity, Progress, Report
from imatrix.text.template import ChatTemplate
from imatrix.text.tokens import Packing

__all__ = ["Collector"]


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
        n_seq: chunks side by side in a decode. Must be 1 for the head. A model whose tokens see
            those after them too (the property `causal`) needs each chunk in one graph: there
            n_batch and n_ubatch are chosen accordingly where they are None, must be n_ctx or more
            where they are not, and n_seq is the most that run side by side, as far as n_batch and
            n_ubatch (512 or n_ctx, if not given) have room for whole chunks.
        n_gpu_layers: layers to put on GPUs, the last ones; -1 for all; "auto": as many as there is
            room for when the model is loaded, of a mixture of experts without the experts of some
            blocks before anything else (docs/backends.md); told by the property `layers`.
        split_mode: how the model is divided over several GPUs: "none" (one of them, main_gpu),
            "layer" (by blocks) or "row" (within the weights, where the backend can: CUDA, SYCL).
            llama.cpp's "tensor" is for evaluate() only: see docs/backends.md.
        tensor_split: each GPU's share, in the order of the devices; any scale. None: by their
            free memory.
        main_gpu: which device "none" takes; negative for the CPU.
        devices: names of the devices to put layers on, in this order, as imatrix.backends() has
            them; none of them for the CPU alone, None for all that llama.cpp would take.
        override_tensor: pairs of a regular expression (ECMAScript) and a buffer type
            (Device.buffer_type): tensors whose names it finds are put there, as
            [("ffn_.*_exps", "CPU")]. Of several that find one the first counts. One that finds
            none gives a warning.
        cpu_moe, n_cpu_moe: keep all experts, or those of the first blocks, on the CPU; after
            override_tensor.
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
        ValueError: a bad number or pattern. Devices and buffer types that there are not are found
            when the model is loaded.
        MemoryError: the model does not fit.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        mtp_model: str | os.PathLike[str] | None = None,
        n_ctx: int = 512,
        n_batch: int | Literal["auto"] | None = None,
        n_ubatch: int | None = None,
        n_seq: int = 1,
        n_gpu_layers: int | Literal["auto"] = "auto",
        split_mode: SplitMode = "layer",
        tensor_split: Sequence[float] | None = None,
        main_gpu: int = 0,
        devices: Sequence[str] | None = None,
        override_tensor: Overrides = (),
        cpu_moe: bool = False,
        n_cpu_moe: int = 0,
        n_threads: int | None = None,
        mtp: bool | None = None,
        use_mmap: bool = True,
        check_tensors: bool = False,
        rehearse: bool = True,
        device_sums: bool = True,
        isolate: bool = False,
    ) -> None:
        arguments = dict(locals())
        del arguments["self"]
        self._arguments: dict[str, Any] = arguments  # for the Collectors of a cluster's workers
        self._pid = os.getpid()
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
        self._wanted = Wanted(n_seq, None if isinstance(n_batch, str) else n_batch, n_ubatch)
        self._session = SessionSettings(  # of the trunk alone; see _settings()
            n_ctx=n_ctx,
            batch=usual(n_ctx) if self._auto else self._wanted.of_causal(n_ctx),
            n_threads=physical_cores() if n_threads is None else n_threads,
            device_sums=device_sums,
        )
        placement = Placement.of(
            split_mode=split_mode,
            tensor_split=tensor_split,
            main_gpu=main_gpu,
            devices=devices,
            override_tensor=override_tensor,
            cpu_moe=cpu_moe,
            n_cpu_moe=n_cpu_moe,
        )
        if split_mode == "tensor":
            raise ValueError(NO_TENSOR_MODE)
        self._run = Run([], n_ctx)  # the current one, or the last
        me = weakref.ref(self)  # a circle would keep one that was never closed from saying so

        def let_go() -> None:
            if (collector := me()) is not None:
                collector._let_go()

        options = ModelOptions(
            model=model,
            mtp_model=mtp_model,
            placement=placement,
            n_gpu_layers=n_gpu_layers,
            use_mmap=use_mmap,
            check_tensors=check_tensors,
            rehearse=rehearse,
            isolate=isolate,
        )
        self._models = Models(options, n_ctx=n_ctx, let_go=let_go)
        self._n_ctx = n_ctx
        # until a run finds out what the model needs; "auto": until a run chooses
        self._batch = self._session.batch
        self._mtp = mtp
        if mtp is not None:
            head = self._has_head(mtp)
            self._models.load(self._settings(head, False, False))
        self._closed = False

    # --- what it is --------------------------------------------------------

    @property
    def architecture(self) -> str:
        """The model's general.architecture."""
        return self._models.trunk_file.architecture

    @property
    def mtp_architecture(self) -> str:
        """The general.architecture of the file that holds the head, the model's own or mtp_model."""
        return self._models.head_file.architecture

    @property
    def n_trunk(self) -> int:
        """Trunk blocks: blk.0 to blk.<n_trunk - 1>."""
        return self._models.trunk_file.n_trunk

    @property
    def n_nextn(self) -> int:
        """MTP/NextN head blocks that the metadata claim; 0 for a model without a head."""
        return self._models.head_file.n_nextn

    @property
    def batch(self) -> Batch:
        """Chunks side by side, tokens a decode and tokens a graph (n_seq, n_batch, n_ubatch); with
        n_batch="auto", and for a model that is not `causal`, those that the current or last run
        chose."""
        return self._batch

    @property
    def causal(self) -> bool:
        """Whether a token of the trunk sees only those before it, as in any model that writes text
        from left to right. Models that fill in masked tokens (dream, llada, rnd1) and most that make
        embeddings are not so. The engine is asked, in the rehearsal; no weights are loaded.

        Raises:
            ModelError: the engine cannot run the model.
        """
        self._check_process()
        if self._closed and not self._models.knows_causal:
            raise ValueError("this Collector is closed")
        with self._guard:
            if not self._models.knows_causal:
                self._models.rehearse(self._settings(False, False, False))
            return self._models.causal

    @property
    def layers(self) -> Layers | None:
        """What of the model lies on GPUs (n_gpu_layers, cpu_experts); None until it is loaded."""
        return self._models.layers

    @property
    def matrix(self) -> ImportanceMatrix:
        """A copy of what the current run, or else the last one, has collected so far.

        After an error or KeyboardInterrupt in run() it holds every chunk that was complete; after
        an EngineDiedError those in the checkpoint. Asked for in another thread while a chunk
        runs, it waits for that chunk.
        """
        return self._latest().matrix()

    @property
    def mtp_matrix(self) -> ImportanceMatrix | None:
        """What was collected of a head that is a model of its own kind, for its own file.

        gemma4-assistant numbers its blocks from 0 as the trunk does, so that the two cannot share
        a matrix. None for every other head: its entries are in `matrix`.
        """
        run = self._latest()
        if self.mtp_architecture != "gemma4-assistant" or not run.with_head:
            return None
        return run.matrix(FOREIGN_HEAD)

    @property
    def report(self) -> Report:
        """What the current run, or else the last one, made of its text so far."""
        return self._latest().report()

    @property
    def perplexity(self) -> Perplexity | None:
        """Perplexity over the current or last run; None unless it was asked for."""
        return self._run.perplexity()

    @property
    def counters(self) -> Mapping[str, int]:
        """What the current or last run's hook did since its contexts were made: `stops` (nodes
        that the scheduler had to wait for), `fetched_bytes` (copied from memory that the host
        cannot read), `squared_elements`, `ended` (graphs left before their end); docs/speed.md.
        Empty where there are no contexts."""
        run = self._latest()
        with run.lock:
            if run.session is None or isinstance(run.session, BlockSums):
                return {}
            return cast("dict[str, int]", run.session.counters)

    def _latest(self) -> Run:
        self._check_process()
        return self._run

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary (loads the model)."""
        return self._loaded().n_vocab

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Token ids of a text by the model's own tokenizer, int32 [n_tokens]."""
        model = self._loaded()
        self._models.check_tokenizer()
        with ended_at_exit("tokenizing"):
            return model.tokenize(text, add_special=add_special, parse_special=parse_special)

    def chat_template(self, name: str | None = None) -> ChatTemplate:
        """The model's chat template, with its special tokens; see ChatTemplate.

        Args:
            name: of one of several; None for the default.

        Raises:
            TemplateError: the model has no such template.
        """
        self._loaded()
        return self._models.renderer(ChatOptions(template=name)).template()

    @property
    def has_gpu(self) -> bool:
        """Whether the engine sees a device to put layers on (with isolate, where it runs)."""
        return self._models.has_gpu

    def _loaded(self) -> NativeModel:
        self._check_process()
        if self._closed:
            raise ValueError("this Collector is closed")
        with self._guard:
            return self._models.loaded()

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
        self._let_go()
        self._models.free()

    def _let_go(self) -> None:
        """Drop the session: it holds on to the models."""
        with self._run.lock:
            self._run.session = None

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
            end_at_exit.begin(self)
            self._runner = threading.get_ident()
            self._over.clear()
            self._ending = None
        try:
            yield
        except InterruptedError:
            # of the step that _end() has stopped
            if self._ending is None:
                raise
            raise RuntimeError(f"the run was ended: {self._ending}") from None
        finally:
            with self._guard:
                self._runner = None
                if self._closed:
                    self._free()
                self._over.set()
            end_at_exit.over(self)

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
                f"Collector({str(self._models.trunk_file.path)!r}) was never closed; use it in a with statement",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
            self.close()

    # --- running -----------------------------------------------------------

    def run(
        self,
        texts: Texts,
        *,
        mtp: bool = False,
        max_chunks: int | None = None,
        skip_chunks: int = 0,
        process_output: bool = False,
        signed_sums: bool = True,
        parse_special: bool = False,
        packing: Packing = "stream",
        chat: ChatOptions | None = None,
        min_expert_rows: int | None = None,
        perplexity: bool | None = False,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        on_bad_record: OnBadRecord = "stop",
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        restart: bool = False,
        progress: Callable[[Progress], object] | None = None,
        cluster: Cluster | None = None,
    ) -> ImportanceMatrix:
        """Collect a matrix from texts. Every run starts from zero, or from a checkpoint of its
        own; add matrices with `+`.

        Args:
            texts: a string, an open file, a path, an iterable of strings, of Chats or of token
                lists, a Source, or a Mixture of sources; see imatrix.text.chunks.chunks for how they
                are cut.
            mtp: collect the MTP/NextN head too. A model without one gives a warning.
            max_chunks: chunks to collect at most; None for all.
            skip_chunks: chunks to leave out at the start.
            process_output: collect output.weight too (the trunk's rows only); of a model without
                one, whose token embedding gives the logits, token_embd.weight.
            signed_sums: keep the sums of the activations themselves beside those of their squares
                (Entry.signed_sums), for each channel's mean; they take as much memory and space in
                a file again. False leaves them out.
            parse_special: read special tokens that the text spells out as such. Chats have theirs
                read in any case.
            packing: "stream", as llama-imatrix cuts a text; "document", where no document sees
                another: each chunk is run by itself and holds tokens of one, so that many are
                shorter than n_ctx. The head pairs tokens within a chunk only.
            chat: how chats are rendered; None for the model's own template, as it is.
            min_expert_rows: go on until every expert of every block, the head's too, has seen
                that many rows, or the text or max_chunks comes to its end; None for all the text.
                Whether it has is seen after each step, of n_seq chunks.
            perplexity: score the text as it runs; see the property `perplexity`. None: of a model
                that is `causal`, others have none.
            on_nonfinite: what a NaN or Inf activation does: end the run, or leave out its chunk,
                which the matrix then remembers (Provenance.left_out).
            on_bad_record: what a record does that cannot be used (not JSON, a message without a
                role, a chat that its template refuses, ...): end the run, with the file and the
                record in the error; or be left out, which the matrix then counts
                (TextSource.skipped). What ends a whole file, and what is wrong for every record,
                ends the run in either case.
            checkpoint: file to go on from if the run is interrupted; one run at a time can have
                it. It is written every
                `checkpoint_every` chunks, every three minutes at least, at the end, and where an
                error or Ctrl-C ends the run. Where there is one, the run goes on from it and gives
                the same matrix, bit for bit, as without the interruption (on one backend, with
                one number of threads); give the same model, texts and settings. It stays: remove
                it when the matrix is safe. See docs/checkpoints.md.
            checkpoint_every: chunks between two checkpoints; 0 for the other occasions only. None
                for 10, and with a cluster 0.
            restart: start from zero, whatever there is at `checkpoint`.
            progress: called with a Progress after every step, in this thread, and before the
                first one where a checkpoint was taken over. An exception that it raises ends the
                run.
            cluster: collect on its workers, in blocks of chunks that are added here in their
                order, so that the matrix is the same, to the bit, however many workers there are
                and whatever becomes of them; it differs from that of a run without a cluster by
                the rounding of a float64 sum. What is seen after each step (progress,
                min_expert_rows) is seen after each block, and a NaN that ends the run discards
                its block. The model is loaded here without its weights. See docs/clusters.md.

        Returns:
            The matrix. The property `matrix` gives what there is so far, during a run and after
            one that failed.

        Raises:
            ValueError: no tokens, a bad number, mtp with n_seq other than 1, a checkpoint that is
                one of the files that are read, a source that cannot be understood, or
                min_expert_rows for a model without experts; of a model that is not `causal`: mtp,
                perplexity, or an n_batch or n_ubatch below n_ctx.
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
            ClusterError (a RuntimeError): a worker of the cluster cannot take part, a block
                ended one after the other, or the scheduler is gone.
            NonFiniteError: a NaN or Inf activation; that chunk is discarded, the earlier ones stay.
            MemoryError: no memory for the contexts or the sums.
            KeyboardInterrupt: Ctrl-C; the running chunk is discarded, the earlier ones stay.
        """
        if on_nonfinite not in ("stop", "skip"):
            raise ValueError(f"on_nonfinite must be 'stop' or 'skip', got {on_nonfinite!r}")
        if on_bad_record not in ("stop", "skip"):
            raise ValueError(f"on_bad_record must be 'stop' or 'skip', got {on_bad_record!r}")
        if checkpoint_every is None:
            checkpoint_every = 10 if cluster is None else 0
        if checkpoint_every < 0:
            raise ValueError(f"checkpoint_every must be 0 or more, got {checkpoint_every}")
        if min_expert_rows is not None:
            self._check_experts(min_expert_rows)
        if cluster is not None and self._auto:
            raise ValueError(
                "n_batch='auto' (-b auto) goes by the memory of one machine, and the sums by the "
                "batch: for a cluster give n_batch (-b) as a number"
            )
        asked = RunOptions(
            mtp=mtp,
            max_chunks=max_chunks,
            skip_chunks=skip_chunks,
            process_output=process_output,
            signed_sums=signed_sums,
            parse_special=parse_special,
            packing=packing,
            chat=chat,
            min_expert_rows=min_expert_rows,
            perplexity=perplexity,
            on_nonfinite=on_nonfinite,
            on_bad_record=on_bad_record,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            restart=restart,
            progress=progress,
            cluster=cluster,
            block=None,
            part=None,
        )
        if checkpoint is not None:
            self._check_checkpoint(os.fspath(checkpoint), texts)
        with self._running(), locked_checkpoint(checkpoint):
            return self._run_alone(texts, asked)

    def _check_checkpoint(self, checkpoint: str, texts: Texts) -> None:
        """That neither it nor its lock file is something that the run reads."""
        files = (self._models.trunk_file, self._models.head_file)
        parts = dict.fromkeys(path for each in files for path, _ in each.parts)
        lock = Output(f"{os.path.realpath(checkpoint)}.lock", checkpoint)
        check_files([checkpoint, lock], [*map(os.fspath, parts), *text_inputs(texts)])

    def _run_alone(self, texts: Texts, asked: RunOptions) -> ImportanceMatrix:
        """run(), as the only one."""
        with_head = self._prepare(
            asked.mtp,
            asked.process_output,
            asked.perplexity,
            signed_sums=asked.signed_sums,
            weights=asked.cluster is None,
        )
        if asked.perplexity is None:
            asked = replace(asked, perplexity=self._models.causal)
        if asked.cluster is not None:
            block, part = asked.cluster._sizes(self._batch.n_seq)
            asked = replace(asked, block=block, part=part)
        self._let_go()
        facts = TextFacts.of(texts)
        run = self._run = Run(
            list(facts.datasets),
            self._n_ctx,
            with_head,
            asked.skip_chunks,
            asked.on_nonfinite == "skip",
        )
        render = self._models.renderer(ChatOptions() if asked.chat is None else asked.chat)
        text = cut(
            texts,
            self._models.tokenizer(),
            self._n_ctx,
            packing=asked.packing,
            chat=asked.chat,
            render=render,
            parse_special=asked.parse_special,
            skip_chunks=asked.skip_chunks,
            max_chunks=asked.max_chunks,
            on_bad_record=asked.on_bad_record,
        )
        settings = self._settings(
            with_head, asked.process_output, bool(asked.perplexity), asked.signed_sums
        )
        if self._auto:
            # rounding goes with the batch: a run that goes on keeps that of its first part
            taken = None
            if asked.checkpoint is not None and not asked.restart:
                taken = batch_in(asked.checkpoint)
                if with_head and taken is not None and taken.n_seq != 1:
                    taken = None  # of a run without the head: the keeper refuses it
            self._batch = taken or self._chosen(settings, text.total)
            settings = replace(settings, batch=self._batch)
            self._models.rehearse(settings)
        run.packing = asked.packing
        run.min_expert_rows = asked.min_expert_rows
        run.seed = facts.seed
        run.begin_text(facts.names, facts.weights)
        same = identity_of_run(
            self._models,
            settings,
            text.settings,
            parse_special=asked.parse_special,
            skip_chunks=asked.skip_chunks,
            max_chunks=asked.max_chunks,
            min_expert_rows=asked.min_expert_rows,
            block=asked.block,
            part=asked.part,
        )
        try:
            return self._run_chunks(run, text.chunks, text.total, asked, settings, same)
        finally:
            render.close()

    def _run_chunks(
        self,
        run: Run,
        chunks: Chunks,
        total: int | None,
        asked: RunOptions,
        settings: SessionSettings,
        same: dict[str, Setting],
    ) -> ImportanceMatrix:
        """The rest of run(), with the text at hand. `same`: what must be so to go on from a
        checkpoint."""
        keeper = None
        found = None
        if asked.checkpoint is not None:
            keeper = Keeper(asked.checkpoint, asked.checkpoint_every, lambda: run.checkpoint(same))
            found = None if asked.restart else keeper.load(same)
        if found is not None:
            run.read_past(found, chunks, asked.checkpoint)
        # bad text is an error before any context is made
        first = next(chunks, None)

        session: NativeSession | BlockSums
        if first is None or asked.cluster is not None:
            session = BlockSums()  # where first is None the checkpoint is of a run that was done
        else:
            try:
                session = self._models.open(settings)
            except EngineDiedError as error:
                self._outlive(error, run, keeper)
                raise
        if found is not None:
            run.take_over(found, session)
            found = None  # as large as the sums
        run.session = session

        def report(ahead: int = 0) -> None:
            if asked.progress is not None:
                workers = None if asked.cluster is None else asked.cluster._workers()
                asked.progress(run.progress(total, workers=workers, ahead=ahead))

        if run.resumed:
            report()
        step = asked.block or self._batch.n_seq
        try:
            if first is not None and not run.enough(step):
                rest = itertools.chain([first], chunks)
                if isinstance(session, BlockSums):
                    self._drive_cluster(run, session, rest, asked, keeper, report)
                else:
                    self._drive(run, session, rest, keeper, report)
            run.first_skipped = chunks.first_skipped
            if not run.enough(step):
                # the end of the text: what it dropped there is known now
                run.read = chunks.read
                run.ended_by = None if chunks.ended is None else run.names[chunks.ended]
                if run.done == asked.max_chunks:
                    run.ended = "max_chunks"
            elif asked.min_expert_rows is not None:
                run.ended = "min_expert_rows"
            if keeper is not None:
                keeper.save(run.done)
        except EngineDiedError as error:
            self._outlive(error, run, keeper)
            raise
        except BaseException:
            if keeper is not None:
                keeper.save(run.done)
            raise
        if run.left_out:
            warnings.warn(describe_left_out(run.left_out), stacklevel=4)
        return run.matrix()

    def _check_experts(self, min_expert_rows: int) -> None:
        if min_expert_rows < 1:
            raise ValueError(f"min_expert_rows must be 1 or more, got {min_expert_rows}")
        if self._models.trunk_file.integers.get("expert_count", 0) < 2:
            raise ValueError(
                f"min_expert_rows={min_expert_rows}, but {self._models.trunk_file.path.name} "
                f"({self.architecture}) has no experts; leave it out"
            )

    def plan(self, *, mtp: bool = False, process_output: bool = False) -> Plan:
        """What run() would collect and what it never could. Loads the model, runs nothing.

        Raises:
            ModelError, ValueError, MemoryError: as run() does.
        """
        with self._running():
            with_head = self._prepare(mtp, process_output, False)
            session = self._models.open(self._settings(with_head, process_output, False))
        (trunk_outputs, trunk), (head_outputs, head) = (
            session.plan["trunk"],
            session.plan["head"],
        )
        tensors = {**self._models.trunk_file.tensors, **self._models.head_file.tensors}
        never = tuple(
            name
            for name, shape in tensors.items()
            if name.startswith("blk.") and len(shape) > 1 and name not in trunk and name not in head
        )
        return Plan(trunk, head, never, trunk_outputs, head_outputs)

    def _settings(
        self, with_head: bool, process_output: bool, perplexity: bool, signed_sums: bool = True
    ) -> SessionSettings:
        """Of a session for what was asked, with the batch as it stands."""
        return replace(
            self._session,
            batch=self._batch,
            mtp=with_head,
            process_output=process_output,
            perplexity=perplexity,
            signed_sums=signed_sums,
        )

    def _prepare(
        self,
        mtp: bool,
        process_output: bool,
        perplexity: bool | None,
        *,
        signed_sums: bool = True,
        weights: bool = True,
    ) -> bool:
        """Load the model for what was asked, without `weights` its vocabulary only; whether there
        is a head to collect."""
        if self._closed:
            raise ValueError("this Collector is closed")
        if self._auto:
            self._batch = usual(self._n_ctx)
        if mtp:
            check_head_runs_alone(self._wanted.n_seq)
        if mtp and self._mtp is False:
            raise ValueError("mtp=True, but this Collector was made with mtp=False")
        if mtp and self._models.head_file.claimed_nextn == 0:
            warnings.warn(
                f"{self._models.trunk_file.path.name} ({self.architecture}) has no MTP head "
                "(nextn_predict_layers is absent or 0): collecting the trunk only",
                stacklevel=4,
            )
        with_head = self._has_head(mtp)
        self._models.check(with_head)
        self._models.rehearse(
            self._settings(with_head, process_output, perplexity is not False, signed_sums)
        )
        if with_head:
            self._models.check_predicts("mtp=True (--mtp)", "leave the head out")
        if perplexity:
            self._models.check_predicts(
                "perplexity=True (--ppl)", "leave it out (perplexity=False, --no-ppl)"
            )
        if not self._auto or not self._models.causal:
            self._batch = self._models.batch(self._wanted)
        if weights:
            scored = self._models.causal if perplexity is None else perplexity
            self._models.load(self._settings(with_head, process_output, scored, signed_sums))
        else:
            self._models.load_vocabulary()
        return with_head

    def _chosen(self, settings: SessionSettings, total: int | None) -> Batch:
        """What n_batch="auto" comes to, for `total` chunks (None: nobody knows)."""
        most = MAX_SEQ if total is None else min(MAX_SEQ, max(1, total))
        return self._models.choose_batch(settings, 1 if settings.mtp else most)

    def _has_head(self, mtp: bool) -> bool:
        """Whether there is a head to run, if one is wanted; refuses one that is only claimed."""
        file = self._models.head_file
        if mtp and file.claimed_nextn and not file.n_nextn:
            raise ModelError(
                f"{file.path}: {lacks_head(file)}. Put the head in with imatrix graft-mtp; or "
                f"collect the trunk alone (mtp=False), and drop the claim: imatrix drop-mtp "
                f"{file.path} -o OUT.gguf"
            )
        return mtp and file.n_nextn > 0

    def _drive(
        self,
        run: Run,
        session: NativeSession,
        chunks: Iterator[Chunk],
        keeper: Keeper | None,
        report: Callable[[], None],
    ) -> None:
        """Native steps run in a second thread: the next chunk is tokenized meanwhile, and
        Ctrl-C reaches this one, which then tells the engine to stop. What a step adds is counted
        in that thread too, where no signal can come between the two."""
        groups = in_groups(chunks, self._batch.n_seq, run.done)
        before = run.seconds
        started = time.monotonic()
        with self._stoppable(session), NativeThread() as native:
            running: Future[None] | None = None
            try:
                group = next(groups, None)
                while group is not None:
                    self._check_ending()
                    running = native.submit(run.collect, session, group)
                    try:
                        following = next(groups, None)
                    except Exception:
                        running.result()  # the text failed, not the chunk that is on its way
                        raise
                    running.result()
                    run.seconds = before + time.monotonic() - started
                    if keeper is not None:
                        keeper.step(run.done)
                    report()
                    if run.enough(self._batch.n_seq):
                        break
                    group = following
            except BaseException:
                if running is not None:
                    settle(session, running)
                raise

    def _drive_cluster(
        self,
        run: Run,
        sums: BlockSums,
        chunks: Iterator[Chunk],
        asked: RunOptions,
        keeper: Keeper | None,
        report: Callable[[int], None],
    ) -> None:
        """_drive() with a cluster's workers in place of the session. Blocks are added in a second
        thread, where no signal can come between sums and counts."""
        cluster, block_chunks = asked.cluster, asked.block
        assert cluster is not None
        assert block_chunks is not None
        before = run.seconds
        started = time.monotonic()
        work = cluster._work(
            self._arguments,
            mtp=run.with_head,
            process_output=asked.process_output,
            signed_sums=asked.signed_sums,
            perplexity=bool(asked.perplexity),
            identity=tuple(
                identity_of_work(self._models, self._settings(run.with_head, False, False)).items()
            ),
        )

        def look(ahead: int) -> None:
            self._check_ending()
            report(ahead)

        with (
            NativeThread() as native,
            cluster._collecting(
                work,
                in_groups(chunks, block_chunks, run.done),
                first=run.skipped + run.done,
                look=look,
            ) as blocks,
        ):
            for group, block in blocks:
                self._check_ending()
                adding = native.submit(run.add, sums, group, block)
                try:
                    adding.result()
                except BaseException:
                    settle(None, adding)
                    raise
                run.seconds = before + time.monotonic() - started
                if keeper is not None:
                    keeper.step(run.done)
                report(0)
                if run.enough(block_chunks):
                    break

    def _block_session(
        self,
        wanted: Mapping[str, Setting],
        *,
        mtp: bool,
        process_output: bool,
        signed_sums: bool,
        perplexity: bool,
    ) -> NativeSession:
        """For a worker of a cluster: load the model, and open a session on it.

        Args:
            wanted: identity_of_work() where the run is.

        Raises:
            ModelError: this is another model than there.
        """
        self._batch = self._models.batch(self._wanted)
        here = identity_of_work(self._models, self._settings(mtp, process_output, perplexity))
        if told := describe_differences_of_work(here, wanted):
            raise ModelError(
                f"{self._models.trunk_file.path} is not what the run was started with: {told}"
            )
        self._prepare(mtp, process_output, perplexity, signed_sums=signed_sums)
        return self._models.open(self._settings(mtp, process_output, perplexity, signed_sums))

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

    def _outlive(self, error: EngineDiedError, run: Run, keeper: Keeper | None) -> None:
        """The engine's process is gone, and the sums with it: go back to the checkpoint, and say
        in the error what there is."""
        found = None
        if keeper is not None and keeper.saved:
            with contextlib.suppress(OSError, FormatError):
                found = checkpoint_file.read(keeper.path)
        run.tell_death(error, self._batch.n_seq, found, keeper)
        self._free()
        if found is None:
            self._run = run.again()
        else:
            run.go_back(found)
