"""Collector: runs text through a model and its MTP head and collects the matrix."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from imatrix.cluster.cluster import Cluster
from imatrix.collect.advice import SourceAdvice
from imatrix.collect.driver import Driver
from imatrix.collect.lifecycle import Closing, Lifecycle
from imatrix.collect.options import RunOptions
from imatrix.collect.preparation import CollectorOptions, wanted_batch
from imatrix.engine.background import ended_at_exit
from imatrix.engine.placement import NO_TENSOR_MODE, Overrides, Placement, SplitMode
from imatrix.engine.plan import Plan
from imatrix.engine.settings import Batch, Layers, ModelOptions
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.text.chats import ChatOptions
from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import Texts
from imatrix.text.progress import Perplexity, Progress, Report
from imatrix.text.template import ChatTemplate
from imatrix.text.tokens import Packing

__all__ = ["Collector"]


class Collector(Closing):
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
        wanted = wanted_batch(n_batch, n_ubatch, n_seq)
        placement = Placement.of(
            split_mode=split_mode, tensor_split=tensor_split, main_gpu=main_gpu, devices=devices,
            override_tensor=override_tensor, cpu_moe=cpu_moe, n_cpu_moe=n_cpu_moe,
        )  # fmt: skip
        if split_mode == "tensor":
            raise ValueError(NO_TENSOR_MODE)
        files = ModelOptions(
            model=model, mtp_model=mtp_model, placement=placement, n_gpu_layers=n_gpu_layers,
            use_mmap=use_mmap, check_tensors=check_tensors, rehearse=rehearse, isolate=isolate,
        )  # fmt: skip
        options = CollectorOptions(
            model=files, wanted=wanted, n_ctx=n_ctx, n_threads=n_threads, mtp=mtp,
            device_sums=device_sums,
        )  # fmt: skip
        life = Lifecycle(f"Collector({str(Path(model))!r})")
        self._driver = Driver(options, life)
        self._models = self._driver.models
        self._life = life  # last, see Closing

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
        return self._driver.batch

    @property
    def causal(self) -> bool:
        """Whether a token of the trunk sees only those before it, as in any model that writes text
        from left to right. Models that fill in masked tokens (dream, llada, rnd1) and most that make
        embeddings are not so. The engine is asked, in the rehearsal; no weights are loaded.

        Raises:
            ModelError: the engine cannot run the model.
        """
        return self._driver.causal()

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
        return self._driver.current().matrix()

    @property
    def mtp_matrix(self) -> ImportanceMatrix | None:
        """What was collected of a head that is a model of its own kind, for its own file.

        gemma4-assistant numbers its blocks from 0 as the trunk does, so that the two cannot share
        a matrix. None for every other head: its entries are in `matrix`.
        """
        return self._driver.current().head_matrix()

    @property
    def report(self) -> Report:
        """What the current run, or else the last one, made of its text so far."""
        return self._driver.current().report()

    @property
    def perplexity(self) -> Perplexity | None:
        """Perplexity over the current or last run; None unless it was asked for."""
        return self._driver.latest.perplexity()

    @property
    def counters(self) -> Mapping[str, int]:
        """What the current or last run's hook did since its contexts were made: `stops` (nodes
        that the scheduler had to wait for), `fetched_bytes` (copied from memory that the host
        cannot read), `squared_elements`, `ended` (graphs left before their end); docs/speed.md.
        Empty where there are no contexts."""
        return self._driver.current().counters()

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary (loads the model)."""
        return self._driver.loaded().n_vocab

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Token ids of a text by the model's own tokenizer, int32 [n_tokens]."""
        model = self._driver.loaded()
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
        self._driver.loaded()
        return self._models.renderer(ChatOptions(template=name)).template()

    @property
    def has_gpu(self) -> bool:
        """Whether the engine sees a device to put layers on (with isolate, where it runs)."""
        return self._models.has_gpu

    # --- life --------------------------------------------------------------

    def close(self) -> None:
        """Free the model, the contexts and the sums. Safe to call twice.

        A run that is on in another thread is ended first: it raises RuntimeError there, and its
        checkpoint is written. Called by the run's own thread (in `progress`, say), it ends the
        run when that comes back.
        """
        self._life.close(self._driver.free)

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
        options = RunOptions(
            mtp=mtp, max_chunks=max_chunks, skip_chunks=skip_chunks, process_output=process_output,
            signed_sums=signed_sums, parse_special=parse_special, packing=packing, chat=chat,
            min_expert_rows=min_expert_rows, perplexity=perplexity, on_nonfinite=on_nonfinite,
            on_bad_record=on_bad_record, checkpoint=checkpoint, checkpoint_every=checkpoint_every,
            restart=restart, progress=progress, cluster=cluster,
        )  # fmt: skip
        return self._driver.run(texts, options)

    def plan(self, *, mtp: bool = False, process_output: bool = False) -> Plan:
        """What run() would collect and what it never could. Loads the model, runs nothing.

        Raises:
            ModelError, ValueError, MemoryError: as run() does.
        """
        return self._driver.plan(mtp=mtp, process_output=process_output)

    def source_advice(self) -> SourceAdvice | None:
        """A type of weights with which runs on this CPU would be clearly faster, if there is one.

        The engine's products are timed for it, the first time, for 0.8 seconds. To be called by
        `progress`, or after a run: another thread waits for the chunk that runs. None, too, for a
        quantized model, with a GPU or a cluster, and if nothing was collected here.
        """
        return self._driver.source_advice()
