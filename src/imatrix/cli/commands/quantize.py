"""`imatrix quantize`: quantize a model with the engine's quantizer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from rich import box
from rich.table import Table

import imatrix
from imatrix.cli.command import Command
from imatrix.cli.coverages import as_data
from imatrix.cli.data import write_json
from imatrix.cli.flags import hub, quantizing, tensor_types
from imatrix.cli.flags.common import add_isolate, add_threads, add_verbose
from imatrix.cli.outputs import Files, check_output
from imatrix.cli.progress import StepProgress, describe_tensors
from imatrix.cli.signals import catch_signals
from imatrix.cli.status import OK
from imatrix.cli.terminal import Console, Terminal, Text
from imatrix.files.outputs import Output
from imatrix.model.parts import count_in_name, named_parts
from imatrix.quantization.coverage import describe_stop
from imatrix.words import plural, size

__all__ = ["COMMAND"]


def _add_arguments(command: hub.Parser) -> None:
    add = command.add_argument
    add("src", metavar="SRC", help="GGUF model, F16 or BF16")
    add("dst", metavar="DST", nargs="?", help="what to write; may be left out with --dry-run")
    hub.add_to_positional(command)
    add("type", metavar="TYPE", help="llama-quantize's name for it: IQ2_XXS, Q4_K_M, ...")
    add("--imatrix", metavar="FILE", help="importance matrix")
    quantizing.add_arguments(command)
    add(
        "--dry-run",
        action="store_true",
        help="tell what each tensor would become, and the sizes; nothing is written",
    )
    add("--json", action="store_true", help="with --dry-run: as JSON")
    add_threads(command)
    add_isolate(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    if args.dry_run:
        return _dry_run(args, terminal)
    if args.dst is None:
        raise ValueError(
            "the following arguments are required: TYPE. Expected SRC DST TYPE; only with --dry-run "
            "may DST be left out"
        )
    if args.json:
        raise ValueError("--json goes with --dry-run; there is nothing to print otherwise")
    for output in _outputs(args):
        check_output(output.path)
    options = quantizing.options(args)
    args.src, _ = hub.fetch(args.src, args, terminal)
    with catch_signals(terminal), StepProgress(terminal, "quantizing", describe_tensors) as bar:
        done = imatrix.quantize(
            args.src,
            args.dst,
            args.type,
            imatrix=args.imatrix,
            n_threads=args.threads,
            isolate=args.isolate,
            progress=bar,
            **options,
        )
    more = f" and {plural(len(done.parts) - 1, 'more part')}" if len(done.parts) > 1 else ""
    terminal.note(
        f"wrote {done.path if args.keep_split else args.dst}{more}: {args.type.upper()}, "
        f"{size(done.bytes)}, {done.bits_per_weight:.2f} bits per weight"
    )
    return OK


def _dry_run(args: argparse.Namespace, terminal: Terminal) -> int:
    options = quantizing.options(args)
    args.src, _ = hub.fetch(args.src, args, terminal)
    found = imatrix.coverage(args.src, args.imatrix, args.type, isolate=args.isolate, **options)
    for text in found.warnings:
        terminal.warn(text)
    if args.json:
        write_json(as_data(found, args.imatrix))
    else:
        _print(terminal.out, found)
    if not found.ready:
        first = found.failing[0]
        terminal.warn(
            f"{plural(len(found.failing), 'tensor')} would stop the quantizer, first {first.name}: "
            f"{describe_stop(first, found)}. See imatrix check."
        )
    return OK


def _print(console: Console, found: imatrix.Coverage) -> None:
    """A line a tensor in the quantizer's order, then the totals."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(f"tensors: {len(found.tensors)}", no_wrap=True)
    table.add_column("type", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("becomes", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for tensor in found.tensors:
        kept = tensor.target_type == tensor.source_type
        table.add_row(
            Text(tensor.name),
            tensor.source_type,
            str(tensor.source_bytes),
            "(kept)" if kept else tensor.target_type,
            str(tensor.target_bytes),
        )
    console.print(table)
    console.print()
    before = 8 * found.source_bytes / found.n_values
    console.print(
        f"{found.ftype}: {found.source_bytes} -> {found.target_bytes} bytes "
        f"({size(found.source_bytes)} -> {size(found.target_bytes)}), {before:.2f} -> "
        f"{found.bits_per_weight:.2f} bits per weight",
        soft_wrap=True,
    )


def _outputs(args: argparse.Namespace) -> Iterator[Output]:
    """The file, or the parts as far as the name of the model tells their number."""
    if args.dst is None or args.dry_run:
        return
    if not args.keep_split:
        yield Output(args.dst)
        return
    for path in named_parts(args.dst, count_in_name(args.src)):
        yield Output(str(path), args.dst)


COMMAND = Command(
    name="quantize",
    help="quantize a model with the engine's quantizer",
    description="Quantize a model as llama-quantize does.",
    add_arguments=_add_arguments,
    files=Files(
        models=("src",),
        files=("imatrix", "recipe"),
        outputs=_outputs,
        reads=tensor_types.rule_files,
    ),
    run=_run,
)
