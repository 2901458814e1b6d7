"""`imatrix quantize`: quantize a model with the engine's quantizer."""

from __future__ import annotations

import argparse

import imatrix
from imatrix.cli.command import Command
from imatrix.cli.flags import hub, tensor_types
from imatrix.cli.flags.common import add_isolate, add_threads, add_verbose
from imatrix.cli.outputs import Files, check_output, named_outputs
from imatrix.cli.progress import StepProgress, describe_tensors
from imatrix.cli.signals import catch_signals
from imatrix.cli.status import OK
from imatrix.cli.terminal import Terminal
from imatrix.words import size

__all__ = ["COMMAND"]


def _add_arguments(command: hub.Parser) -> None:
    add = command.add_argument
    add("src", metavar="SRC", help="GGUF model, F16 or BF16")
    add("dst", metavar="DST", help="what to write")
    hub.add_to_positional(command)
    add("type", metavar="TYPE", help="llama-quantize's name for it: IQ2_XXS, Q4_K_M, ...")
    add("--imatrix", metavar="FILE", help="importance matrix")
    tensor_types.add_arguments(command)
    add("--allow-requantize", action="store_true", help="start from quantized weights")
    add("--pure", action="store_true", help="one format for all weights, no mixture")
    add("--leave-output-tensor", action="store_true", help="leave output.weight as it is")
    add_threads(command)
    add_isolate(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    check_output(args.dst)
    rules = tensor_types.read(args)
    args.src, _ = hub.fetch(args.src, args, terminal)
    with catch_signals(terminal), StepProgress(terminal, "quantizing", describe_tensors) as bar:
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
            isolate=args.isolate,
            progress=bar,
        )
    terminal.note(
        f"wrote {args.dst}: {args.type.upper()}, {size(done.bytes)}, "
        f"{done.bits_per_weight:.2f} bits per weight"
    )
    return OK


COMMAND = Command(
    name="quantize",
    help="quantize a model with the engine's quantizer",
    description="Quantize a model as llama-quantize does.",
    add_arguments=_add_arguments,
    files=Files(
        models=("src",),
        files=("imatrix",),
        outputs=named_outputs("dst"),
        reads=tensor_types.rule_files,
    ),
    run=_run,
)
