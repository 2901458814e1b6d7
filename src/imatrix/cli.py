"""The `imatrix` command; its subcommands are those of `_COMMANDS`.

It takes llama-imatrix's flags (tools/imatrix/imatrix.cpp and common/arg.cpp in llama.cpp) and
does nothing that `import imatrix` does not offer.

Messages and progress go to stderr, data to stdout. Exit status: 0 done, 1 it failed, 2 wrong
usage or bad input, 130 interrupted (SIGINT, Ctrl-C), 143 terminated (SIGTERM). `collect` saves
what there is on either; a second signal ends it at once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import imatrix
from imatrix import (
    _adapt_cli,
    _check_cli,
    _cluster_cli,
    _completion_cli,
    _diff_cli,
    _evaluate_cli,
    _files_cli,
    _hub_cli,
    _placement_cli,
    _plot_cli,
    _report_cli,
    _show,
    _sources_cli,
    _stats_cli,
    atomic,
)
from imatrix._arguments import (
    Commands,
    Parser,
    add_parse_special,
    add_skipped_chunks,
    add_tensor_type,
    add_threads,
    add_verbose,
    at_least,
    chunks,
    files,
    tensor_types,
)
from imatrix._lock import locked
from imatrix._output import check_command, check_copies, check_output, head_output
from imatrix._terminal import (
    CollectProgress,
    StepProgress,
    Terminal,
    bytes_told,
    duration,
    size,
    tensors_told,
    write_json,
)
from imatrix.corpus import Texts
from imatrix.formats import Format, FormatError, detected
from imatrix.formats.checkpoint import read as read_checkpoint
from imatrix.formats.checkpoint import write as write_checkpoint
from imatrix.matrix import ImportanceMatrix

__all__ = ["entry", "main"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
TERMINATED = 143

# tokens a decode where none are given, as llama.cpp has it (common/common.h, n_batch)
_BATCH_SIZE = 2048


class _Terminated(KeyboardInterrupt):
    """SIGTERM came; treated as Ctrl-C is."""


class _Stopped(Exception):
    """The command cannot go on. The message is for the user, the status for the shell."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def entry() -> None:
    """The console script."""
    try:
        status = main()
    except Exception:
        # a defect of ours; its message may have text from a file all the same
        Terminal().traceback(traceback.format_exc())
        status = FAILED
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None for sys.argv's.

    Returns:
        The exit status, see the module.
    """
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has told the user
        return stop.code if isinstance(stop.code, int) else USAGE
    terminal = Terminal(verbose=getattr(args, "verbose", False))
    if args.version:
        return _version(terminal)
    if args.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    with terminal.listening():
        return _run(args.run, args, terminal)


def _run(
    command: Callable[[argparse.Namespace, Terminal], int],
    args: argparse.Namespace,
    terminal: Terminal,
) -> int:
    try:
        check_command(args)
        return command(args, terminal)
    except _Terminated:
        terminal.error("terminated")
        return TERMINATED
    except KeyboardInterrupt:
        terminal.error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # `imatrix show | head`: nobody is left to tell; the interpreter must not try either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (
        _Stopped,
        imatrix.ImatrixError,
        ValueError,
        OSError,
        MemoryError,
        RuntimeError,
        ImportError,
    ) as error:
        if terminal.verbose:
            terminal.traceback(traceback.format_exc())
        terminal.error(_told(error))
        return _status(error)


def _status(error: Exception) -> int:
    if isinstance(error, _Stopped):
        return error.status
    bad_input = (
        ValueError,
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
    )
    return USAGE if isinstance(error, bad_input) else FAILED


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    return str(error) or type(error).__name__


# --- collect -----------------------------------------------------------------


def _collect(args: argparse.Namespace, terminal: Terminal) -> int:
    text = _sources_cli.texts(args)
    if text is None and not args.in_file:
        raise _Stopped(
            "nothing to collect from: give a text with -f FILE or -p TEXT, or files to combine "
            "with --in-file",
            USAGE,
        )
    if text is not None:
        _hub_cli.resolve(args, terminal)
    if text is not None and args.model is None:
        raise _Stopped("no model: give one with -m MODEL (or -hf)", USAGE)
    _cluster_cli.check(args)
    check_command(args)  # again, now that a model of the Hub has a path
    check_output(args.output)
    try:
        lock = locked(args.output)
    except imatrix.LockedError as error:
        raise _Stopped(str(error), USAGE) from None
    with lock, _signals(terminal):
        # what a killed run left half written; nobody else writes these now
        for path in (args.output, _checkpoint_path(args)):
            atomic.clear(path)
        if text is not None and not args.restart and _is_finished(args):
            _checkpoint_path(args).unlink()
            terminal.note(
                f"{args.output} is done: the run before this one was ended between writing it and "
                "removing its checkpoint, which is done now. Nothing was added; the same command "
                "again would collect anew"
            )
            return OK
        # under the lock: the output may be one of them
        earlier = [ImportanceMatrix.load(path, chunk_size=args.ctx_size) for path in args.in_file]
        if args.save_frequency:
            check_copies(args, _chunks_before(earlier, args.ctx_size))
        return _collect_locked(args, text, earlier, terminal)


def _collect_locked(
    args: argparse.Namespace,
    text: Texts | None,
    earlier: list[ImportanceMatrix],
    terminal: Terminal,
) -> int:
    if text is None:
        matrix = earlier[0].merge(*earlier[1:])
        _save(matrix, args.output, args.output_format)
        terminal.note(f"combined {len(earlier)} file(s) into {args.output}")
        _files_cli.tell_unsigned(earlier, matrix, terminal)
        _tell_matrix(matrix, terminal)
        return OK
    if earlier:
        _check_same_model(earlier, args)
    _placement_cli.use_servers(args, isolate=args.isolate)
    if args.output_frequency is None:
        # blocks of a cluster may come several times a second, and their sums be large
        args.output_frequency = 10 if args.dask is None else 0
    with _cluster_cli.connected(args, terminal) as cluster:
        return _collect_text(args, text, earlier, terminal, cluster)


def _collect_text(
    args: argparse.Namespace,
    text: Texts,
    earlier: list[ImportanceMatrix],
    terminal: Terminal,
    cluster: imatrix.Cluster | None,
) -> int:
    mtp = args.mtp or args.mtp_model is not None
    text_arguments = _sources_cli.run_arguments(args)
    checkpoint = _checkpoint_path(args)
    n_seq = 1
    n_batch = _BATCH_SIZE if args.batch_size is None else args.batch_size
    if n_batch == "auto":
        if args.ubatch_size is not None:
            raise _Stopped("-b auto chooses the tokens a graph too: leave -ub out", USAGE)
    else:
        # llama-imatrix fills its batch with chunks side by side; the head takes one at a time
        n_seq = 1 if mtp else max(1, n_batch // args.ctx_size)
        n_batch = min(n_batch, args.ctx_size * n_seq)

    def made(n_batch: int | Literal["auto"] | None) -> imatrix.Collector:
        return imatrix.Collector(
            args.model,
            mtp_model=args.mtp_model,
            n_ctx=args.ctx_size,
            n_batch=n_batch,
            n_ubatch=args.ubatch_size,
            n_seq=n_seq,
            **_placement_cli.arguments(args),
            n_threads=args.threads,
            use_mmap=not args.no_mmap,
            check_tensors=args.check_tensors,
            isolate=args.isolate,
        )

    if args.batch_size is None and args.ctx_size > _BATCH_SIZE:
        # the default is no wish: where chunks cannot be divided it gives way
        with made(None) as asked:
            if not asked.causal:
                n_batch = None
    with made(n_batch) as collector:
        if cluster is None:
            _placement_cli.warn_of_no_device(args, terminal, lambda: collector.has_gpu)
        head = f" + {collector.n_nextn} MTP head" if collector.n_nextn else ""
        terminal.note(f"{args.model}: {collector.architecture}, {collector.n_trunk}{head} blocks")
        saver = _Saver(args, collector, earlier, terminal)
        bar = CollectProgress(terminal, "collecting", every=args.output_frequency or 10)

        def on_step(progress: imatrix.Progress) -> None:
            if saver.progress is None:
                if args.batch_size == "auto":
                    terminal.note(_batch_told(collector))
                if args.gpu_layers in (None, "auto") and (
                    told := _placement_cli.layers_told(collector, args)
                ):
                    terminal.note(told)
            bar(progress)
            saver.step(progress)

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
                    cluster=cluster,
                )
        except BaseException as error:
            saver.rescue(interrupted=isinstance(error, KeyboardInterrupt))
            raise
        if (head_matrix := collector.mtp_matrix) is not None:
            path = saver.head_path
            _save(head_matrix, path, args.output_format)
            terminal.note(f"wrote {path}, for {args.mtp_model}: {len(head_matrix)} weights")
        matrix = saver.finish()  # the last of them: where it is, all is done (_is_finished)
        terminal.note(f"wrote {args.output}")
        _tell_matrix(matrix, terminal)
        if earlier:
            _files_cli.tell_unsigned([*earlier, collector.matrix], matrix, terminal)
        checkpoint.unlink(missing_ok=True)  # all it held is safe now
        _sources_cli.tell(collector.report, terminal)
        if saver.progress is not None:
            _tell_run(saver.progress, terminal)
        if args.ppl is None and not collector.causal:
            terminal.note(
                f"no perplexity: the tokens of {collector.architecture} see those after them, so "
                "that there is no next token to predict"
            )
        if cluster is not None:
            _cluster_cli.tell(cluster, terminal)
    return OK


def _is_finished(args: argparse.Namespace) -> bool:
    """Whether the checkpoint is of a run that has written all it had to.

    An output that is an input too must not be added to once more. What it was going to be is in
    the checkpoint (_Saver.finish).
    """
    try:
        output = read_checkpoint(_checkpoint_path(args)).output
        return bool(output) and _digest(args.output) == output
    except (OSError, FormatError):
        return False  # the run itself tells what is wrong with it


def _digest(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _batch_told(collector: imatrix.Collector) -> str:
    batch = collector.batch
    side = f"{batch.n_seq} chunks side by side, " if batch.n_seq > 1 else ""
    return f"-b auto: {side}{batch.n_batch} tokens a decode, {batch.n_ubatch} a graph"


def _checkpoint_path(args: argparse.Namespace) -> Path:
    return Path(f"{args.output}.checkpoint")


@contextmanager
def _signals(terminal: Terminal) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the run in good order, the second one at once.

    Signals that were ignored stay so, as under nohup.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if seen:
            # files are replaced in one step, so that nothing half written is left in their place
            terminal.err.show_cursor(True)
            os._exit(TERMINATED if number == signal.SIGTERM else INTERRUPTED)
        seen.append(number)
        raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt

    taken = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler in (signal.default_int_handler, signal.SIG_DFL):
            taken[number] = handler
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


class _Saver:
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
        self._chunks = self._before = _chunks_before(earlier, args.ctx_size)
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
                f"going on from {_checkpoint_path(self._args)}: {progress.resumed}{total} chunk(s) "
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
                self._terminal.warn(f"cannot write {path} yet: {_told(error)}")

    def finish(self) -> ImportanceMatrix:
        """Write the whole matrix."""
        matrix = self._matrix()
        form = self._args.output_format
        if not self._only_at_the_end:
            _save(matrix, self._path, form)
            return matrix
        # The moment at which it is there and the checkpoint is too must not look like one before:
        # the checkpoint says first what the output will be.
        checkpoint = _checkpoint_path(self._args)
        try:
            with atomic.replacing(self._path) as temporary:
                matrix.save(temporary, format=form)
                with contextlib.suppress(FileNotFoundError):  # it could not be written
                    done = replace(read_checkpoint(checkpoint), output=_digest(temporary))
                    write_checkpoint(done, checkpoint)
        except OSError as error:
            raise _Stopped(f"cannot write {self._path}: {_told(error)}", FAILED) from error
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
        checkpoint = _checkpoint_path(self._args)
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
        _save(matrix, self._path, self._args.output_format)
        self._terminal.note(
            f"saved what was collected so far to {self._path}: {own.chunk_count} chunk(s)"
            + (go_on if checkpoint.exists() else "")
        )
        if (head := self._collector.mtp_matrix) is not None and head:
            _save(head, self.head_path, self._args.output_format)

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


def _chunks_before(earlier: list[ImportanceMatrix], n_ctx: int) -> int:
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


def _check_same_model(earlier: list[ImportanceMatrix], args: argparse.Namespace) -> None:
    """Refuse earlier files of another model now, not when the work is done."""
    tensors = imatrix.ModelFile.read(args.model).tensors
    for matrix, path in zip(earlier, args.in_file, strict=True):
        if not any(name in tensors for name in matrix):
            raise _Stopped(
                f"{path} names no weight of {args.model} (its first is {next(iter(matrix))}); was "
                "it collected from another model?",
                USAGE,
            )
        for name, entry in matrix.items():
            n_in, _, *n_mat = (*tensors.get(name, (entry.sums.size, 1)), 1, 1)[:4]
            if entry.sums.size != n_in * n_mat[0] * n_mat[1]:
                raise _Stopped(
                    f"{path}: {name} has {entry.sums.size} sums, in {args.model} it has "
                    f"{n_in * n_mat[0] * n_mat[1]}; was it collected from another model?",
                    USAGE,
                )


def _save(matrix: ImportanceMatrix, path: str, form: Format) -> None:
    try:
        matrix.save(path, format=form)
    except OSError as error:
        raise _Stopped(f"cannot write {path}: {_told(error)}", FAILED) from error


def _tell_matrix(matrix: ImportanceMatrix, terminal: Terminal) -> None:
    terminal.note(f"{_show.weights_told(matrix)}; {matrix.chunk_count} chunks")
    found = _show.experts(matrix)
    if found.unseen:
        terminal.warn(
            f"experts: {_show.experts_told(found)}. A quantizer weighs every column of an expert "
            "without rows the same; more or other text may reach it."
        )


def _tell_run(progress: imatrix.Progress, terminal: Terminal) -> None:
    if progress.perplexity is not None:
        # as llama-imatrix prints it
        found = progress.perplexity
        terminal.note(f"Final estimate: PPL = {found.value:.4f} +/- {found.error:.5f}")
    speed = progress.tokens / progress.seconds if progress.seconds else 0.0
    took = f"{progress.seconds:.1f} s" if progress.seconds < 60 else duration(progress.seconds)
    terminal.note(f"{progress.tokens} tokens in {took}, {speed:.0f} tokens/s")


# --- show, quantize, demo, version -------------------------------------------


def _show_file(args: argparse.Namespace, terminal: Terminal) -> int:
    matrix = ImportanceMatrix.load(args.file)
    form = detected(args.file)
    if args.json:
        write_json(_show.as_data(matrix, args.file, form))
    else:
        _show.render(terminal.out, matrix, args.file, form, every_weight=args.all)
    sys.stdout.flush()  # here, where a closed pipe is expected
    return OK


def _quantize(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.dst)
    rules = tensor_types(args)
    args.src, _ = _hub_cli.fetched(args.src, args, terminal)
    with StepProgress(terminal, "quantizing", tensors_told) as bar:
        done = imatrix.quantize(
            args.src,
            args.dst,
            args.type,
            imatrix=args.imatrix,
            tensor_types=rules,
            n_threads=args.threads,
            allow_requantize=args.allow_requantize,
            pure=args.pure,
            quantize_output=not args.leave_output_tensor,
            progress=bar,
        )
    terminal.note(
        f"wrote {args.dst}: {args.type.upper()}, {size(done.bytes)}, "
        f"{done.bits_per_weight:.2f} bits per weight"
    )
    return OK


def _extract(args: argparse.Namespace, terminal: Terminal) -> int:
    # beside the model, but not among the files of the Hub's cache
    folder = "." if _hub_cli.is_hub(args.model) else str(Path(args.model).parent)
    args.model, _ = _hub_cli.fetched(args.model, args, terminal)
    out = args.output or folder
    with StepProgress(terminal, "extracting", bytes_told) as bar:
        report = imatrix.extract_mtp(args.model, out, trunk_out=args.trunk_out, progress=bar)
    terminal.note(
        f"wrote {report.head}: {size(report.head_bytes)}, {report.n_nextn} head block(s) from "
        f"block {report.n_trunk} on"
    )
    if report.trunk is not None and report.trunk_bytes is not None:
        terminal.note(f"wrote {report.trunk}: {size(report.trunk_bytes)}, {report.n_trunk} blocks")
    shared = ", ".join(report.shared)
    terminal.note(
        f"the split form costs {report.shared_bytes} bytes ({size(report.shared_bytes)}): {shared} "
        "are in both files"
    )
    return OK


def _graft(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.output)
    args.trunk, _ = _hub_cli.fetched(args.trunk, args, terminal)
    args.mtp_model, _ = _hub_cli.fetched(args.mtp_model, args, terminal, first=False)
    with StepProgress(terminal, "grafting", bytes_told) as bar:
        report = imatrix.graft_mtp(args.trunk, args.mtp_model, args.output, progress=bar)
    terminal.note(
        f"wrote {report.model}: {size(report.model_bytes)}, {report.n_trunk} trunk and "
        f"{report.n_nextn} head block(s)"
    )
    terminal.note(
        f"{report.shared_bytes} bytes ({size(report.shared_bytes)}) less than the two files: "
        f"{', '.join(report.shared)} are in it once"
    )
    return OK


def _drop(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.output)
    args.model, _ = _hub_cli.fetched(args.model, args, terminal)
    with StepProgress(terminal, "writing", bytes_told) as bar:
        report = imatrix.drop_mtp(args.model, args.output, progress=bar)
    what = (
        f"without {len(report.dropped)} tensor(s) of the head"
        if report.dropped
        else "with all tensors, without the claim of a head"
    )
    terminal.note(
        f"wrote {report.model}: {size(report.model_bytes)}, {report.n_trunk} trunk blocks, {what}"
    )
    return OK


def _demo(args: argparse.Namespace, terminal: Terminal) -> int:
    from imatrix import demo

    return OK if demo.run(terminal, args.dir, keep=args.keep) else FAILED


def _version(terminal: Terminal) -> int:
    out = terminal.out
    out.print(f"imatrix {imatrix.__version__}")
    try:
        found = imatrix.backends()
    except ImportError as error:
        terminal.error(str(error))
        return FAILED
    out.print(f"engine      {found.engine}")
    out.print(f"backends    {', '.join(found.built)}")
    for device in found.devices:
        memory = f", {size(device.memory_free)} free" if device.memory_total else ""
        out.print(
            f"device      {device.name}: {device.description} ({device.backend}{memory})",
            soft_wrap=True,
        )
    best, *others = found.row_kernels
    also = f" (also: {', '.join(others)})" if others else ""
    out.print(f"row kernel  {best}{also}")
    out.print(f"features    {found.features}", soft_wrap=True)
    return OK


# --- arguments ---------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="imatrix",
        description="Importance matrices for low-bit GGUF quantization, MTP heads included.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="store_true", help="this build: engine, backends, devices"
    )
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", parser_class=_hub_cli.Parser
    )
    for add_parser in _COMMANDS:
        add_parser(commands)
    return parser


def _add_collect(commands: Commands) -> None:
    command = commands.add_parser(
        "collect",
        help="run text through a model and write an importance matrix",
        description="Run text through a model and write an importance matrix. The flags mean "
        "what they mean to llama-imatrix.",
        allow_abbrev=False,
    )
    command.set_defaults(run=_collect)
    add = command.add_argument
    add("-m", "--model", metavar="MODEL", help="GGUF model; the first part of a multi-part one")
    _hub_cli.add_arguments(command)
    _sources_cli.add_arguments(command)
    _sources_cli.add_min_expert_rows(command)
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
    _placement_cli.add_arguments(command)
    _cluster_cli.add_arguments(command)
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
    add(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the engine in a process of its own: if the engine or the system ends that one, "
        "say what is left and how to go on (default: on)",
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


def _add_show(commands: Commands) -> None:
    command = commands.add_parser(
        "show", help="what an importance matrix holds, the head apart", allow_abbrev=False
    )
    command.set_defaults(run=_show_file)
    command.add_argument("file", metavar="FILE", help="importance matrix")
    command.add_argument(
        "--all", action="store_true", help="every weight by itself, not one line a kind"
    )
    command.add_argument("--json", action="store_true", help="as JSON, every weight")
    add_verbose(command)


def _add_quantize(commands: Commands) -> None:
    command = commands.add_parser(
        "quantize",
        help="quantize a model with the engine's quantizer",
        description="Quantize a model as llama-quantize does.",
        allow_abbrev=False,
    )
    command.set_defaults(run=_quantize)
    add = command.add_argument
    add("src", metavar="SRC", help="GGUF model, F16 or BF16")
    add("dst", metavar="DST", help="what to write")
    _hub_cli.add_to_positional(command)
    add("type", metavar="TYPE", help="llama-quantize's name for it: IQ2_XXS, Q4_K_M, ...")
    add("--imatrix", metavar="FILE", help="importance matrix")
    add_tensor_type(command)
    add("--allow-requantize", action="store_true", help="start from quantized weights")
    add("--pure", action="store_true", help="one format for all weights, no mixture")
    add("--leave-output-tensor", action="store_true", help="leave output.weight as it is")
    add_threads(command)
    add_verbose(command)


def _add_mtp_files(commands: Commands) -> None:
    extract = commands.add_parser(
        "extract-mtp",
        help="take the head out of a bundled model, into a file of its own",
        allow_abbrev=False,
    )
    extract.set_defaults(run=_extract)
    extract.add_argument("model", metavar="MODEL", help="GGUF model with a head")
    _hub_cli.add_to_positional(extract)
    extract.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="the head's file, or a folder for it (default: mtp-<name>.gguf beside MODEL, here for "
        "one from the Hub)",
    )
    extract.add_argument("--trunk-out", metavar="TRUNK", help="write the rest as well")
    add_verbose(extract)
    graft = commands.add_parser(
        "graft-mtp", help="put a head into a trunk, one bundled model", allow_abbrev=False
    )
    graft.set_defaults(run=_graft)
    graft.add_argument("trunk", metavar="TRUNK", help="GGUF model without a head")
    _hub_cli.add_to_positional(graft)
    graft.add_argument("mtp_model", metavar="MTP", help="the head's file, or a bundled model")
    graft.add_argument("-o", "--output", metavar="OUT", required=True, help="what to write")
    add_verbose(graft)
    drop = commands.add_parser(
        "drop-mtp",
        help="write a model without its head, or without the claim of one that it lacks",
        allow_abbrev=False,
    )
    drop.set_defaults(run=_drop)
    drop.add_argument("model", metavar="MODEL", help="GGUF model")
    _hub_cli.add_to_positional(drop)
    drop.add_argument("-o", "--output", metavar="OUT", required=True, help="what to write")
    add_verbose(drop)


def _add_demo(commands: Commands) -> None:
    command = commands.add_parser(
        "demo",
        help="collect, quantize and evaluate a small trained model",
        allow_abbrev=False,
    )
    command.set_defaults(run=_demo)
    command.add_argument(
        "--dir", metavar="DIR", type=Path, help="keep the files here (default: a temporary folder)"
    )
    command.add_argument(
        "--keep", action="store_true", help="do not remove the temporary folder at the end"
    )
    add_verbose(command)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else at_least(1)(text)


# in the order of the help
_COMMANDS: tuple[Callable[[Commands], None], ...] = (
    _add_collect,
    _check_cli.add_parser,
    _add_show,
    _stats_cli.add_parser,
    _plot_cli.add_parser,
    _report_cli.add_parser,
    _files_cli.add_parser,
    _diff_cli.add_parser,
    _adapt_cli.add_parser,
    _add_quantize,
    _evaluate_cli.add_parser,
    _add_mtp_files,
    _add_demo,
    _completion_cli.add_parser,
)
