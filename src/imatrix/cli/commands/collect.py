"""`imatrix collect`: run text through a model and write an importance matrix."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import Literal

import imatrix
from imatrix.cli.command import Command
from imatrix.cli.earlier import check_same_model, chunks_before, merge_earlier
from imatrix.cli.flags import cluster, hub, placement, sources
from imatrix.cli.flags.common import (
    add_isolate,
    add_parse_special,
    add_skipped_chunks,
    add_threads,
    add_verbose,
)
from imatrix.cli.flags.matrices import warn_of_lost_signed_sums
from imatrix.cli.flags.values import at_least, chunks, files
from imatrix.cli.outputs import Files, check_command, check_copies, check_output
from imatrix.cli.progress import CollectProgress
from imatrix.cli.saving import Saver, checkpoint_path, head_output, is_same_file, save_matrix
from imatrix.cli.signals import catch_signals
from imatrix.cli.source_advice import SourceAdvisor
from imatrix.cli.status import OK, USAGE, Stopped
from imatrix.cli.terminal import Terminal
from imatrix.collect.finished import is_finished
from imatrix.collect.options import checkpoint_interval
from imatrix.files import atomic
from imatrix.files.lock import locked
from imatrix.files.outputs import Output
from imatrix.matrix.experts import describe_experts, experts
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.matrix.summary import describe_weights
from imatrix.text.inputs import Texts
from imatrix.words import duration

__all__ = ["COMMAND"]

# tokens a decode if none are given, as llama.cpp has it (common/common.h, n_batch)
_BATCH_SIZE = 2048


def _add_arguments(command: hub.Parser) -> None:
    add = command.add_argument
    add("-m", "--model", metavar="MODEL", help="GGUF model; the first part of a multi-part one")
    hub.add_arguments(command)
    sources.add_arguments(command)
    sources.add_min_expert_rows(command)
    add(
        "-o",
        "--output",
        "--output-file",
        metavar="OUT",
        default="imatrix.gguf",
        help="what to write (default: imatrix.gguf)",
    )
    add("--mtp", "--nextn", action="store_true", help="collect the MTP/NextN head too")
    add(
        "--mtp-model",
        "-md",
        "--model-draft",
        "--spec-draft-model",
        metavar="FILE",
        help="the head's own file, where it is not in MODEL; collects it, as --mtp does. The "
        "matrix of a gemma4-assistant goes to OUT with -mtp in its name",
    )
    add(
        "-c",
        "--ctx-size",
        metavar="N",
        type=at_least(2),
        default=512,
        help="tokens a chunk (default: 512)",
    )
    add(
        "-b",
        "--batch-size",
        metavar="N",
        type=_batch_size,
        help="tokens a decode; as many chunks as fit run side by side, with --mtp one "
        "(default: 2048). A model whose tokens see those after them needs at least -c, and -ub as "
        "well; without the flags it gets that. auto: where the model does not fit into memory, as many as the memory "
        "has room for, so that it is read from the disk less often",
    )
    add(
        "-ub",
        "--ubatch-size",
        metavar="N",
        type=at_least(1),
        help="tokens a graph (default: 512)",
    )
    add_threads(command)
    placement.add_arguments(command)
    cluster.add_arguments(command)
    add_skipped_chunks(command)
    add(
        "--chunks",
        metavar="N",
        type=chunks,
        help="chunks to collect at most (default: -1, all)",
    )
    add(
        "--process-output",
        action="store_true",
        help="collect output.weight too; of a model with tied embeddings token_embd.weight",
    )
    add(
        "--signed-sums",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the sums of the activations beside those of their squares, for each channel's "
        "mean (default: on; they double the file)",
    )
    add_parse_special(command)
    add(
        "--ppl",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="perplexity along the way (default: on, where the model predicts what comes next; it "
        "costs time)",
    )
    add(
        "--in-file",
        metavar="FILE,...",
        action="extend",
        type=files,
        default=[],
        help="earlier matrix to add to; several with commas between them, or with the flag "
        "repeated. Without a text: combine only",
    )
    add(
        "-ofreq",
        "--output-frequency",
        metavar="N",
        type=at_least(0),
        help="write OUT and OUT.checkpoint every N chunks (default: 10, with --dask 0; 0: OUT at the "
        "end only, OUT.checkpoint every three minutes)",
    )
    add(
        "--save-frequency",
        metavar="N",
        type=at_least(0),
        default=0,
        help="keep a copy OUT.at_<chunks> every N chunks (default: 0, never)",
    )
    add(
        "--restart",
        action="store_true",
        help="start from zero, though OUT.checkpoint is there to go on from",
    )
    add(
        "--on-nonfinite",
        choices=("stop", "skip"),
        default="stop",
        help="what a NaN or infinite activation does: end the run, or leave out its chunk "
        "(default: stop)",
    )
    add_isolate(command)
    add(
        "--advice",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in a run of more than a minute, say once if the model's type is a slow one on this "
        "CPU, by products of the engine that are timed for up to a second, and how to convert it "
        "(default: on)",
    )
    add(
        "--output-format",
        choices=("gguf", "dat"),
        default="gguf",
        help="gguf (default), or dat for programs that read only the old format",
    )
    add("--no-mmap", action="store_true", help="read the model instead of mapping it")
    add("--check-tensors", action="store_true", help="look for NaN and Inf in the model's weights")
    add_verbose(command)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else at_least(1)(text)


def _outputs(args: argparse.Namespace) -> Iterator[Output]:
    out = args.output
    checkpoint = str(checkpoint_path(out))
    # an earlier matrix may be added to, under its own name
    yield Output(out, replaces=tuple(each for each in args.in_file if is_same_file(each, out)))
    yield Output(_lock_of(out), out)
    yield Output(checkpoint, out)
    yield Output(_lock_of(checkpoint), out)
    if args.mtp_model is not None and _is_assistant(args.mtp_model):
        yield Output(head_output(out), out)


def _lock_of(path: str) -> str:
    return f"{os.path.realpath(path)}.lock"  # as imatrix.files.lock has it


def _is_assistant(path: str) -> bool:
    """Whether a head is a model of its own kind, whose matrix goes to a file of its own."""
    try:
        return imatrix.ModelFile.read(path).architecture == "gemma4-assistant"
    except (OSError, ValueError):
        return False  # the run tells what is wrong with it


_FILES = Files(
    models=("model", "mtp_model", "dask_model", "dask_mtp_model"),
    texts=("file",),
    files=("in_file", "chat_template_file", "chat_tools"),
    outputs=_outputs,
)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    text = sources.texts(args)
    if text is None and not args.in_file:
        raise Stopped(
            "nothing to collect from: give a text with -f FILE or -p TEXT, or files to combine "
            "with --in-file",
            USAGE,
        )
    if text is not None:
        hub.resolve(args, terminal)
    if text is not None and args.model is None:
        raise Stopped("no model: give one with -m MODEL (or -hf)", USAGE)
    cluster.check(args)
    check_command(_FILES, args)  # again, now that a model of the Hub has a path
    check_output(args.output)
    try:
        lock = locked(args.output)
    except imatrix.LockedError as error:
        raise Stopped(str(error), USAGE) from None
    checkpoint = checkpoint_path(args.output)
    with lock, catch_signals(terminal):
        # what a killed run left half written; nobody else writes these now
        for path in (args.output, checkpoint):
            atomic.clear(path)
        if text is not None and not args.restart and is_finished(checkpoint, args.output):
            checkpoint.unlink()
            terminal.note(
                f"{args.output} is done: the run before this one was ended between writing it and "
                "removing its checkpoint, which is done now. Nothing was added; the same command "
                "again would collect anew"
            )
            return OK
        # under the lock: the output may be one of them
        earlier = [ImportanceMatrix.load(path, chunk_size=args.ctx_size) for path in args.in_file]
        if args.save_frequency:
            before = chunks_before(merge_earlier(earlier), args.ctx_size)
            check_copies(_FILES, args, before)
        if text is None:
            return _combine(args, earlier, terminal)
        if earlier:
            check_same_model(earlier, args.in_file, args.model)
        placement.use_servers(args, isolate=args.isolate)
        args.output_frequency = checkpoint_interval(
            args.output_frequency, on_cluster=args.dask is not None
        )
        with cluster.connect(args, terminal) as workers:
            return _collect(args, text, earlier, terminal, workers)


def _combine(
    args: argparse.Namespace, earlier: Sequence[ImportanceMatrix], terminal: Terminal
) -> int:
    """Without a text: the earlier files as one."""
    matrix = earlier[0].merge(*earlier[1:])
    save_matrix(matrix, args.output, args.output_format)
    terminal.note(f"combined {len(earlier)} file(s) into {args.output}")
    warn_of_lost_signed_sums(earlier, matrix, terminal)
    _print_matrix(matrix, terminal)
    return OK


def _collect(
    args: argparse.Namespace,
    text: Texts,
    earlier: Sequence[ImportanceMatrix],
    terminal: Terminal,
    workers: imatrix.Cluster | None,
) -> int:
    mtp = args.mtp or args.mtp_model is not None
    text_arguments = sources.run_arguments(args)
    checkpoint = checkpoint_path(args.output)
    with _make_collector(args, mtp=mtp) as collector:
        if workers is None:
            placement.warn_of_no_device(args, terminal, lambda: collector.has_gpu)
        head = f" + {collector.n_nextn} MTP head" if collector.n_nextn else ""
        terminal.note(f"{args.model}: {collector.architecture}, {collector.n_trunk}{head} blocks")
        saver = Saver(args, collector, merge_earlier(earlier), terminal)
        advisor = SourceAdvisor(args, collector, terminal)
        bar = CollectProgress(terminal, "collecting", every=args.output_frequency or 10)

        def on_step(progress: imatrix.Progress) -> None:
            if saver.progress is None:
                _print_choices(args, collector, terminal)
            bar(progress)
            saver.step(progress)
            advisor.step(progress)

        try:
            with bar:
                collector.run(
                    text,
                    mtp=mtp,
                    max_chunks=args.chunks,
                    skip_chunks=args.chunk,
                    process_output=args.process_output,
                    signed_sums=args.signed_sums,
                    parse_special=args.parse_special,
                    **text_arguments,
                    min_expert_rows=args.min_expert_rows,
                    perplexity=args.ppl,
                    on_nonfinite=args.on_nonfinite,
                    checkpoint=checkpoint,
                    checkpoint_every=args.output_frequency,
                    restart=args.restart,
                    progress=on_step,
                    cluster=workers,
                )
        except BaseException as error:
            saver.rescue(interrupted=isinstance(error, KeyboardInterrupt))
            raise
        if (head_matrix := collector.mtp_matrix) is not None:
            path = head_output(args.output)
            save_matrix(head_matrix, path, args.output_format)
            terminal.note(f"wrote {path}, for {args.mtp_model}: {len(head_matrix)} weights")
        matrix = saver.finish()  # the last file: if it is there, all is done (is_finished)
        terminal.note(f"wrote {args.output}")
        _print_matrix(matrix, terminal)
        if earlier:
            warn_of_lost_signed_sums([*earlier, collector.matrix], matrix, terminal)
        checkpoint.unlink(missing_ok=True)  # all it held is safe now
        sources.print_report(collector.report, terminal)
        if saver.progress is not None:
            _print_run(saver.progress, terminal)
        if args.ppl is None and not collector.causal:
            terminal.note(
                f"no perplexity: the tokens of {collector.architecture} see those after them, so "
                "that there is no next token to predict"
            )
        if workers is not None:
            cluster.print_use(workers, terminal)
    return OK


def _make_collector(args: argparse.Namespace, *, mtp: bool) -> imatrix.Collector:
    n_seq = 1
    n_batch: int | Literal["auto"] | None
    n_batch = _BATCH_SIZE if args.batch_size is None else args.batch_size
    if n_batch == "auto":
        if args.ubatch_size is not None:
            raise Stopped("-b auto chooses the tokens a graph too: leave -ub out", USAGE)
    else:
        # llama-imatrix fills its batch with chunks side by side; the head takes one at a time
        n_seq = 1 if mtp else max(1, n_batch // args.ctx_size)
        n_batch = min(n_batch, args.ctx_size * n_seq)

    def make(n_batch: int | Literal["auto"] | None) -> imatrix.Collector:
        return imatrix.Collector(
            args.model,
            mtp_model=args.mtp_model,
            n_ctx=args.ctx_size,
            n_batch=n_batch,
            n_ubatch=args.ubatch_size,
            n_seq=n_seq,
            **placement.arguments(args),
            n_threads=args.threads,
            use_mmap=not args.no_mmap,
            check_tensors=args.check_tensors,
            isolate=args.isolate,
        )

    if args.batch_size is None and args.ctx_size > _BATCH_SIZE:
        # the default is nobody's wish: if chunks cannot be divided, it gives way
        with make(None) as asked:
            if not asked.causal:
                n_batch = None
    return make(n_batch)


def _print_choices(
    args: argparse.Namespace, collector: imatrix.Collector, terminal: Terminal
) -> None:
    """Print what was chosen for the user, once the model is loaded."""
    if args.batch_size == "auto":
        batch = collector.batch
        side = f"{batch.n_seq} chunks side by side, " if batch.n_seq > 1 else ""
        terminal.note(f"-b auto: {side}{batch.n_batch} tokens a decode, {batch.n_ubatch} a graph")
    if args.gpu_layers in (None, "auto"):
        layers = placement.describe_layers(collector, args)
        if layers:
            terminal.note(layers)


def _print_matrix(matrix: ImportanceMatrix, terminal: Terminal) -> None:
    terminal.note(f"{describe_weights(matrix)}; {matrix.chunk_count} chunks")
    found = experts(matrix)
    if found.unseen:
        terminal.warn(
            f"experts: {describe_experts(found)}. A quantizer weighs every column of an expert "
            "without rows the same; more or other text may reach it."
        )


def _print_run(progress: imatrix.Progress, terminal: Terminal) -> None:
    if progress.perplexity is not None:
        # as llama-imatrix prints it
        found = progress.perplexity
        terminal.note(f"Final estimate: PPL = {found.value:.4f} +/- {found.error:.5f}")
    speed = progress.tokens / progress.seconds if progress.seconds else 0.0
    took = f"{progress.seconds:.1f} s" if progress.seconds < 60 else duration(progress.seconds)
    terminal.note(f"{progress.tokens} tokens in {took}, {speed:.0f} tokens/s")


COMMAND = Command(
    name="collect",
    help="run text through a model and write an importance matrix",
    description="Run text through a model and write an importance matrix. The flags mean "
    "what they mean to llama-imatrix.",
    add_arguments=_add_arguments,
    files=_FILES,
    run=_run,
)
