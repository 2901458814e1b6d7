"""How well a model and its MTP head predict a text, and what a quantization took from them.

All figures are over the same positions: the second half of every chunk without its last token, as
llama-perplexity scores it (tools/perplexity/perplexity.cpp in llama.cpp). There the trunk, at
position p, and the head, at slot p with token x_p and the trunk's row p-1, both predict x_{p+1}.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Literal

import numpy as np

from imatrix.engine.background import ended_at_exit
from imatrix.engine.placement import Overrides, Placement, SplitMode
from imatrix.errors import ModelError
from imatrix.evaluation.driver import Side, check_reference, drive, joined, open_evaluator
from imatrix.evaluation.options import EvaluateOptions
from imatrix.evaluation.results import Evaluation
from imatrix.model.architectures import lacks_head
from imatrix.text.chats import ChatOptions
from imatrix.text.cutting import cut
from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import Texts
from imatrix.text.progress import Progress
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
    isolate: bool = False,
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
        mtp_model: the head's own file, if it is not in the model.
        reference: the model to measure against, usually the one before quantization.
        reference_mtp_model: its head's own file, if it is not in it.
        mtp: score the head too (True), never (False), or if there is one (None).
        depth: tokens the head drafts, 1 or more. A chain of heads drafts one each at most.
        n_ctx: tokens a chunk, 4 or more.
        n_batch: tokens a decode; None for n_ctx. Each context keeps the logits of the scored rows
            of a batch: n_batch * n_vocab * 4 bytes at most, half of it if n_batch is n_ctx.
        n_ubatch: tokens a graph; None for 512. A model whose tokens see those after them too
            (Collector.causal) needs each chunk in one decode and one graph: there both are n_ctx
            if they are None, and must be no less if they are not.
        max_chunks, skip_chunks, parse_special, packing, chat: as in Collector.run. A chunk of
            2 tokens, which document packing can make, has no position to score.
        on_bad_record: as in Collector.run; records that are left out are a UserWarning.
        n_gpu_layers, n_threads, use_mmap, rehearse: as in Collector.
        isolate: run the engine in a process of its own, for all the models. Should the engine or the
            system end that one, this one stays: an EngineDiedError names the chunk. The figures are
            the same to the bit.
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
            if the model has one.
        ImportError: a library that reads a source is not installed.
        NonFiniteError: NaN or infinite logits.
        EngineDiedError: with isolate=True, the process that ran the engine is gone.
        MemoryError: the models or the contexts do not fit.
    """
    options = EvaluateOptions(
        model=model,
        mtp_model=mtp_model,
        reference=reference,
        reference_mtp_model=reference_mtp_model,
        mtp=mtp,
        depth=depth,
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        max_chunks=max_chunks,
        skip_chunks=skip_chunks,
        parse_special=parse_special,
        packing=packing,
        chat=chat,
        on_bad_record=on_bad_record,
        placement=Placement.of(
            split_mode=split_mode,
            tensor_split=tensor_split,
            main_gpu=main_gpu,
            devices=devices,
            override_tensor=override_tensor,
            cpu_moe=cpu_moe,
            n_cpu_moe=n_cpu_moe,
        ),
        n_gpu_layers=n_gpu_layers,
        n_threads=n_threads,
        use_mmap=use_mmap,
        rehearse=rehearse,
        isolate=isolate,
    )
    with ExitStack() as stack:
        work = stack.enter_context(ended_at_exit("evaluation"))
        ours = stack.enter_context(Side(options, options.own_model))
        head_file = ours.models.head_file
        if mtp is True and head_file.n_nextn == 0:
            raise ModelError(f"{os.fspath(model)}: {lacks_head(head_file)} (mtp=True)")
        with_head = head_file.n_nextn > 0 if mtp is None else mtp
        theirs = None
        if reference is not None and options.reference_model is not None:
            theirs = stack.enter_context(Side(options, options.reference_model, ours.models.loader))
            check_reference(ours.models, theirs.models, with_head, os.fspath(reference))
        ours.load(with_head, {})
        render = ours.models.renderer(ChatOptions() if chat is None else chat)
        stack.callback(render.close)
        text = cut(
            texts,
            ours.models.tokenizer(),
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
        if theirs is not None:
            theirs.load(with_head, ours.models.contexts)
        evaluator = open_evaluator(options, ours, theirs)
        scored = drive(
            work,
            evaluator,
            # a process of its own ends at once, this one's step within a graph
            evaluator.cancel if ours.models.engine is None else ours.models.engine.close,
            first,
            chunks,
            skipped=skip_chunks,
            total=text.total,
            progress=progress,
        )
        for tally in text.chunks.tallies:
            if tally.skipped:
                warnings.warn(
                    f"{tally.skipped} record(s) could not be used and were skipped, the first: "
                    f"{tally.first_skipped}",
                    stacklevel=2,
                )
        n_vocab = ours.models.loaded().n_vocab
        causal = ours.models.causal
        # a gemma4-assistant runs all its blocks in one graph, which drafts any depth
        if with_head and head_file.n_nextn > 1 and head_file.architecture != "gemma4-assistant":
            depth = min(depth, head_file.n_nextn)
        del evaluator  # before the models go

    found = scored.chunks
    sizes = [len(chunk["trunk"]["nll"]) for chunk in found]
    if sum(sizes) == 0:
        raise ValueError("the text is too short: no chunk has a position to score (4 tokens do)")
    with_reference = reference is not None
    return Evaluation(
        model=os.fspath(model),
        mtp_model=None if mtp_model is None else os.fspath(mtp_model),
        reference=None if reference is None else os.fspath(reference),
        n_ctx=n_ctx,
        n_vocab=n_vocab,
        digest=scored.digest,
        chunk=np.repeat(np.arange(len(found), dtype=np.int32), sizes),
        position=np.concatenate(
            [
                np.arange(n // 2, n // 2 + size, dtype=np.int32)
                for n, size in zip(scored.lengths, sizes, strict=True)
            ]
        ),
        trunk=joined([chunk["trunk"] for chunk in found], with_reference),
        head=joined([chunk["head"] for chunk in found], with_reference) if with_head else None,
        depth=depth,
        known=np.concatenate([chunk["known"] for chunk in found]),
        accepted=np.concatenate([chunk["accepted"] for chunk in found]),
        causal=causal,
    )
