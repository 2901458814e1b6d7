"""How well a model and its MTP head predict a text, and what a quantization took from them.

All figures are over the same positions: the second half of every chunk without its last token, as
llama-perplexity scores it (tools/perplexity/perplexity.cpp in llama.cpp). There the trunk, at
position p, and the head, at slot p with token x_p and the trunk's row p-1, both predict x_{p+1}.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from imatrix.engine.background import NativeThread, Work, ended_at_exit
from imatrix.engine.cores import physical_cores
from imatrix.engine.models import Models
from imatrix.engine.placement import Overrides, Placement, SplitMode
from imatrix.engine.settings import Batch, ModelOptions, SessionSettings, Wanted
from imatrix.errors import ModelError
from imatrix.evaluation.results import Evaluation, Predictions
from imatrix.model.architectures import lacks_head
from imatrix.native import engine
from imatrix.text.chats import ChatOptions
from imatrix.text.cutting import cut
from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import Texts
from imatrix.text.progress import Perplexity, Progress
from imatrix.text.tokens import Packing

__all__ = ["evaluate"]


def evaluate(
    model: str | os.PathLike[str],
    texts: Texts,
    *,
    mtp_model: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    reference_mtp_model: str | os.PathLike[str] | None = None,
    mtp: bool | None = None,
    depth: int = 3,
    n_ctx: int = 512,
    n_batch: int | None = None,
    n_ubatch: int | None = None,
    max_chunks: int | None = None,
    skip_chunks: int = 0,
    parse_special: bool = False,
    packing: Packing = "stream",
    chat: ChatOptions | None = None,
    on_bad_record: OnBadRecord = "stop",
    n_gpu_layers: int | Literal["auto"] = "auto",
    split_mode: SplitMode = "layer",
    tensor_split: Sequence[float] | None = None,
    main_gpu: int = 0,
    devices: Sequence[str] | None = None,
    override_tensor: Overrides = (),
    cpu_moe: bool = False,
    n_cpu_moe: int = 0,
    n_threads: int | None = None,
    use_mmap: bool = True,
    rehearse: bool = True,
    progress: Callable[[Progress], object] | None = None,
) -> Evaluation:
    """Score a text with a model and its MTP head, beside a reference if one is given.

    Both models are loaded at once and go through the text chunk by chunk; logits never leave the
    native code. KL divergences come from float32 logits: against `llama-perplexity
    --kl-divergence`, which stores the reference's log-probabilities in 16 bits over at most
    16 nats (steps of up to 2.4e-4) and leaves out tokens below exp(-16), a single position may
    differ by some 1e-4 nats, a mean by far less.

    Args:
        model: path of a GGUF model, or of the first part of a multi-part one.
        texts: as Collector.run takes them: sources, mixtures and chats too; rendered and tokenized
            by the model. Take other text than the calibration's.
        mtp_model: the head's own file, where it is not in the model.
        reference: the model to measure against, usually the one before quantization.
        reference_mtp_model: its head's own file, where it is not in it.
        mtp: score the head too (True), never (False), or where there is one (None).
        depth: tokens the head drafts, 1 or more. A chain of heads drafts one each at most.
        n_ctx: tokens a chunk, 4 or more.
        n_batch: tokens a decode; None for n_ctx. Each context keeps the logits of the scored rows
            of a batch: n_batch * n_vocab * 4 bytes at most, half of it where n_batch is n_ctx.
        n_ubatch: tokens a graph; None for 512. A model whose tokens see those after them too
            (Collector.causal) needs each chunk in one decode and one graph: there both are n_ctx
            where they are None, and must be no less where they are not.
        max_chunks, skip_chunks, parse_special, packing, chat: as in Collector.run. A chunk of
            2 tokens, which document packing can make, has no position to score.
        on_bad_record: as in Collector.run; records that are left out are a UserWarning.
        n_gpu_layers, n_threads, use_mmap, rehearse: as in Collector.
        split_mode, tensor_split, main_gpu, devices, override_tensor, cpu_moe, n_cpu_moe: as in
            Collector, for all the models alike.
        progress: called with a Progress after every chunk, in this thread.

    Returns:
        The evaluation.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError (a ValueError): not a model, or a head that the metadata claim is missing.
        TemplateError (a ValueError): a chat cannot be rendered.
        ValueError: a bad number, no tokens, mtp=True without a head, a source that cannot be
            understood, or a reference of another architecture or vocabulary, or without a head
            where the model has one.
        ImportError: a library that reads a source is not installed.
        NonFiniteError: NaN or infinite logits.
        MemoryError: the models or the contexts do not fit.
    """
    wanted = Wanted(1, n_batch, n_ubatch)
    for name, value, least in (
        ("depth", depth, 1),
        ("n_ctx", n_ctx, 4),
        ("n_ubatch", 1 if n_ubatch is None else n_ubatch, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    if n_threads is not None and n_threads < 1:
        raise ValueError(f"n_threads must be 1 or more, got {n_threads}")
    n_threads = physical_cores() if n_threads is None else n_threads
    if (least := wanted.of_causal(n_ctx).n_batch) < depth:
        raise ValueError(f"n_batch must be depth ({depth}) or more, got {least}")
    if reference_mtp_model is not None and reference is None:
        raise ValueError("reference_mtp_model was given without a reference")
    placement = Placement.of(
        split_mode=split_mode,
        tensor_split=tensor_split,
        main_gpu=main_gpu,
        devices=devices,
        override_tensor=override_tensor,
        cpu_moe=cpu_moe,
        n_cpu_moe=n_cpu_moe,
    )

    batches: list[Batch] = []  # as each model needs it
    with ExitStack() as stack:
        work = stack.enter_context(ended_at_exit("evaluation"))

        def opened(path: str | os.PathLike[str], head: str | os.PathLike[str] | None) -> Models:
            options = ModelOptions(
                model=path,
                mtp_model=head,
                placement=placement,
                n_gpu_layers=n_gpu_layers,
                use_mmap=use_mmap,
                rehearse=rehearse,
            )
            models = Models(options, n_ctx=n_ctx)
            stack.callback(models.free)
            return models

        def loaded(
            models: Models, beside: Mapping[str, int]
        ) -> tuple[engine.Model, engine.Model | None]:
            models.check(with_head)
            # the evaluator reads logits, and sums nothing
            settings = SessionSettings(
                n_ctx=n_ctx,
                batch=wanted.of_causal(n_ctx),
                n_threads=n_threads,
                mtp=with_head,
                perplexity=True,
                device_sums=False,
            )
            models.rehearse(settings)
            if with_head:
                models.check_predicts(
                    "there is a head to score", "leave it out (mtp=False, --no-mtp)"
                )
            batches.append(models.batch(wanted))
            trunk = models.load(replace(settings, batch=batches[-1]), beside)
            assert isinstance(trunk, engine.Model)
            assert models.head is None or isinstance(models.head, engine.Model)
            return trunk, models.head

        ours = opened(model, mtp_model)
        if mtp is True and ours.head_file.n_nextn == 0:
            raise ModelError(f"{os.fspath(model)}: {lacks_head(ours.head_file)} (mtp=True)")
        with_head = ours.head_file.n_nextn > 0 if mtp is None else mtp
        theirs = None
        if reference is not None:
            theirs = opened(reference, reference_mtp_model)
            _check_reference(ours, theirs, with_head, os.fspath(reference))
        own, own_head = loaded(ours, {})
        render = ours.renderer(ChatOptions() if chat is None else chat)
        stack.callback(render.close)
        text = cut(
            texts,
            ours.tokenizer(),
            n_ctx,
            packing=packing,
            render=render,
            parse_special=parse_special,
            skip_chunks=skip_chunks,
            max_chunks=max_chunks,
            on_bad_record=on_bad_record,
        )
        chunks = (chunk.tokens for chunk in text.chunks)
        first = next(chunks)  # bad text is an error before any context is made
        beside = beside_head = None
        if theirs is not None:
            beside, beside_head = loaded(theirs, ours.contexts)
        evaluator = engine.Evaluator(own, own_head, beside, beside_head)
        try:
            evaluator.open(
                n_ctx=n_ctx,
                # the larger one, where only one of the two needs its chunks whole
                n_batch=max(batch.n_batch for batch in batches),
                n_ubatch=max(batch.n_ubatch for batch in batches),
                n_threads=n_threads,
                depth=depth,
            )
        except ModelError as error:
            raise ModelError(f"{os.fspath(model)}: {error}") from None
        found, lengths, digest = _drive(work, evaluator, first, chunks, text.total, progress)
        for tally in text.chunks.tallies:
            if tally.skipped:
                warnings.warn(
                    f"{tally.skipped} record(s) could not be used and were skipped, the first: "
                    f"{tally.first_skipped}",
                    stacklevel=2,
                )
        n_vocab = own.n_vocab
        causal = ours.causal
        # a gemma4-assistant runs all its blocks in one graph, which drafts any depth
        if (
            with_head
            and ours.head_file.n_nextn > 1
            and ours.head_file.architecture != "gemma4-assistant"
        ):
            depth = min(depth, ours.head_file.n_nextn)
        del evaluator, own, own_head, beside, beside_head

    sizes = [len(chunk["trunk"]["nll"]) for chunk in found]
    if sum(sizes) == 0:
        raise ValueError("the text is too short: no chunk has a position to score (4 tokens do)")
    return Evaluation(
        model=os.fspath(model),
        mtp_model=None if mtp_model is None else os.fspath(mtp_model),
        reference=None if reference is None else os.fspath(reference),
        n_ctx=n_ctx,
        n_vocab=n_vocab,
        digest=digest,
        chunk=np.repeat(np.arange(len(found), dtype=np.int32), sizes),
        position=np.concatenate(
            [
                np.arange(n // 2, n // 2 + size, dtype=np.int32)
                for n, size in zip(lengths, sizes, strict=True)
            ]
        ),
        trunk=_joined([chunk["trunk"] for chunk in found], reference is not None),
        head=_joined([chunk["head"] for chunk in found], reference is not None)
        if with_head
        else None,
        depth=depth,
        known=np.concatenate([chunk["known"] for chunk in found]),
        accepted=np.concatenate([chunk["accepted"] for chunk in found]),
        causal=causal,
    )


def _check_reference(ours: Models, theirs: Models, with_head: bool, path: str) -> None:
    if ours.trunk_file.architecture != theirs.trunk_file.architecture:
        raise ValueError(
            f"{path} is {theirs.trunk_file.architecture}, the model is {ours.trunk_file.architecture}: a reference is "
            "the same model before it was quantized"
        )
    if with_head and theirs.head_file.n_nextn == 0:
        raise ValueError(
            f"{path} has no MTP head to measure the model's against; give its head's file, or "
            "mtp=False to leave the heads out"
        )
    if with_head and ours.head_file.architecture != theirs.head_file.architecture:
        raise ValueError(
            f"the head is {ours.head_file.architecture}, the reference's is {theirs.head_file.architecture}"
        )


def _drive(
    work: Work,
    evaluator: engine.Evaluator,
    first: NDArray[np.int32],
    rest: Iterator[NDArray[np.int32]],
    total: int | None,
    progress: Callable[[Progress], object] | None,
) -> tuple[list[engine.ChunkEvaluation], list[int], str]:
    """What was found by chunk, their lengths, and the digest of their tokens. Native steps run in
    a second thread, so that Ctrl-C reaches this one."""
    found: list[engine.ChunkEvaluation] = []
    lengths: list[int] = []
    digest = hashlib.sha256()
    n_tokens = n_scored = 0
    nll = nll_sq = 0.0
    started = time.monotonic()
    work.cancel = evaluator.cancel
    with NativeThread() as native:
        try:
            chunk: NDArray[np.int32] | None = first
            while chunk is not None:
                work.check()
                running = native.submit(evaluator.step, chunk)
                following = next(rest, None)
                done = running.result()
                found.append(done)
                lengths.append(len(chunk))
                digest.update(len(chunk).to_bytes(8, "little") + chunk.astype("<i4").tobytes())
                n_tokens += len(chunk)
                n_scored += len(done["trunk"]["nll"])
                nll += float(done["trunk"]["nll"].sum())
                nll_sq += float(np.square(done["trunk"]["nll"]).sum())
                if progress is not None:
                    seconds = time.monotonic() - started
                    so_far = _so_far(nll, nll_sq, n_scored)
                    progress(Progress(len(found), total, n_tokens, seconds, so_far))
                chunk = following
        except BaseException as error:
            evaluator.cancel()
            if isinstance(error, InterruptedError):
                work.check()
            raise
    return found, lengths, digest.hexdigest()


def _so_far(nll: float, nll_sq: float, n: int) -> Perplexity | None:
    if n == 0:
        return None
    mean = nll / n
    value = math.exp(mean) if mean < 700 else math.inf
    variance = max(0.0, nll_sq / n - mean * mean)
    return Perplexity(value, value * math.sqrt(variance / (n - 1)) if n > 1 else 0.0, n)


def _joined(rows: list[engine.ChunkPredictions], with_reference: bool) -> Predictions:
    nll = np.concatenate([row["nll"] for row in rows])
    top = np.concatenate([row["top"] for row in rows])
    if not with_reference:
        return Predictions(nll, top, None, None, None)
    return Predictions(
        nll,
        top,
        np.concatenate([row["reference_nll"] for row in rows]),
        np.concatenate([row["reference_top"] for row in rows]),
        np.concatenate([row["kl"] for row in rows]),
    )
