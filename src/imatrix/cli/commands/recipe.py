"""`imatrix recipe`: which tensor should get which type, so that a file has a size."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from rich import box
from rich.table import Table

import imatrix
from imatrix.cli import beside_table
from imatrix.cli.command import Command
from imatrix.cli.flags import hub, placement, sources
from imatrix.cli.flags.common import (
    add_parse_special,
    add_skipped_chunks,
    add_threads,
    add_verbose,
)
from imatrix.cli.flags.values import at_least, chunks
from imatrix.cli.head_table import print_head_table
from imatrix.cli.outputs import Files, check_output
from imatrix.cli.progress import RecipeBar
from imatrix.cli.signals import catch_signals
from imatrix.cli.status import OK
from imatrix.cli.terminal import Terminal, Text
from imatrix.engine.placement import Placement
from imatrix.files.outputs import Output
from imatrix.quantization.source import data_bytes
from imatrix.recipes.beside import (
    LEAST_CHUNKS,
    Beside,
    check_mixtures,
    compare_beside,
    count_chunks,
    kept_files,
    share_text,
)
from imatrix.recipes.groups import wanted_types
from imatrix.recipes.making import make
from imatrix.recipes.options import Effort, RecipeOptions, Target, parse_size
from imatrix.tensors import kind_of, n_values
from imatrix.text.inputs import Texts, text_inputs
from imatrix.words import plural, size

__all__ = ["COMMAND"]


def _add_arguments(command: hub.Parser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="GGUF model of F32, F16 or BF16; the first part of several")
    add("imatrix", metavar="MATRIX", nargs="?", help="importance matrix (default: none)")
    hub.add_to_positional(command)
    sources.add_arguments(command, kind="text to measure on", required=True)
    add(
        "--size",
        metavar="SIZE",
        action="append",
        default=[],
        help="bytes of the whole file at most, as 12G (of 1024^3 bytes), 900M or 12GB (of 1000^3); "
        "several with commas between them, or repeated: one measurement serves all",
    )
    add(
        "--bpw",
        metavar="BITS",
        action="append",
        default=[],
        help="bits a weight at most, over all weights; several likewise",
    )
    add(
        "--kl",
        metavar="NATS",
        action="append",
        default=[],
        help="KL divergence to the unchanged model at most, as measured; several likewise",
    )
    add(
        "-o",
        "--output",
        metavar="OUT",
        default="recipe.json",
        help="the recipe (default: recipe.json); of several sizes one file each, as recipe-12G.json",
    )
    add(
        "-m",
        "--measured",
        metavar="FILE",
        help="what was measured, to go on from (default: OUT.measured)",
    )
    add("--restart", action="store_true", help="do not go on from it")
    add(
        "--effort",
        choices=get_args(Effort),
        default="standard",
        help="how much is measured: quick, a few types of groups of tensors on little text; "
        "standard; thorough, more text, types and rounds (default: standard)",
    )
    add(
        "--types",
        metavar="TYPE,...",
        help="types that may be used, as q4_k,q6_k (default: all from iq1_s to q8_0 that fit)",
    )
    add(
        "--head",
        metavar="auto|keep|drop|TYPE",
        default="auto",
        help="what an MTP head gets: auto, the type that its drafts are worth, or none at all; keep, "
        "what the file has; drop, nothing: the recipe is for the file without it; or a type "
        "(default: auto)",
    )
    add(
        "-c",
        "--ctx-size",
        metavar="N",
        type=at_least(4),
        default=512,
        help="tokens a chunk (default: 512)",
    )
    add(
        "--chunks",
        metavar="N",
        type=chunks,
        help="chunks of text (default: the effort's: 8, 16 or 48)",
    )
    add_skipped_chunks(command)
    add_parse_special(command)
    beside_table.add_arguments(command)
    add_threads(command)
    placement.add_arguments(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    targets = tuple(_targets(args))
    for output in _outputs(args):
        check_output(output.path)
    text = sources.texts(args, again=bool(args.beside))
    if text is None:
        raise ValueError("-p: there is no text in it to measure on")
    text_arguments = sources.run_arguments(args)
    other = _other_text(args)
    types = None if args.types is None else [each for each in args.types.split(",") if each]
    wanted = wanted_types(types)
    args.model, _ = hub.fetch(args.model, args, terminal)
    placement.use_servers(args, isolate=False)
    placement.warn_of_no_device(
        args,
        terminal,
        lambda: args.rpc is not None or any(each.gpu for each in imatrix.backends().devices),
    )
    placed = placement.arguments(args)
    options = RecipeOptions(
        model=args.model,
        targets=targets,
        effort=args.effort,
        types=wanted,
        head=args.head,
        n_ctx=args.ctx_size,
        n_chunks=args.chunks,
        skip_chunks=args.chunk,
        parse_special=args.parse_special,
        **text_arguments,
        placement=Placement.of(
            split_mode=placed["split_mode"],
            tensor_split=placed["tensor_split"],
            main_gpu=placed["main_gpu"],
            devices=placed["devices"],
            override_tensor=placed["override_tensor"],
            cpu_moe=False,
            n_cpu_moe=0,
        ),
        n_gpu_layers=placed["n_gpu_layers"],
        n_threads=args.threads,
        measured=_measured(args),
        restart=args.restart,
    )
    plan = None
    if args.beside:
        plan = _plan_beside(args, options, text, other)
        options = plan.options
    try:
        with catch_signals(terminal), RecipeBar(terminal) as bar:
            made = make(options, args.imatrix, text, progress=bar)
    except (KeyboardInterrupt, imatrix.EngineError, imatrix.NonFiniteError, MemoryError, OSError):
        if Path(_measured(args)).exists():
            terminal.note(
                f"what was measured is in {_measured(args)}; the same command goes on from it"
            )
        raise
    paths = _paths(args)
    recipes = dict(zip(options.targets, made.recipes, strict=True))
    for number, (target, path) in enumerate(zip(targets, paths, strict=True)):
        recipe = recipes[target]
        recipe.save(path)
        if made.head_tables:
            print_head_table(terminal, made.head_tables[number], made.decisions[number])
        _print(recipe, target, terminal)
        _print_next(args, recipe, path, terminal)
    if plan is not None:
        with catch_signals(terminal), beside_table.BesideBar(terminal) as told:
            found = compare_beside(
                args.model,
                args.imatrix,
                args.beside,
                lambda n_bytes: recipes[Target("size", n_bytes)],
                plan.text,
                skip_chunks=plan.skip_chunks,
                max_chunks=args.beside_chunks,
                folder=Path(args.output).parent,
                keep=args.keep,
                n_ctx=args.ctx_size,
                parse_special=args.parse_special,
                **text_arguments,
                **placed,
                n_threads=args.threads,
                progress=told,
            )
        beside_table.print_beside(found, terminal, text=plan.describe(args, recipes, found))
    return OK


@dataclass(frozen=True)
class _Plan:
    """What --beside makes of the arguments.

    Attributes:
        options: of the measurement, with the mixtures' sizes among the targets.
        text: what is compared on.
        skip_chunks: how many of its chunks are left out, since they were measured.
    """

    options: RecipeOptions
    text: Texts
    skip_chunks: int

    def describe(
        self,
        args: argparse.Namespace,
        recipes: Mapping[Target, imatrix.Recipe],
        found: Sequence[Beside],
    ) -> str:
        """What was measured on and what is compared on, in a sentence."""
        recipe = next(iter(recipes.values()))
        return beside_table.describe_texts(
            recipe.text, recipe.chunks, args.beside_file, found[0].mixture.evaluation.n_chunks
        )


def _other_text(args: argparse.Namespace) -> Texts | None:
    """The text of --beside-file, which must not be the text that is measured; None for none."""
    if not args.beside:
        for flag in ("beside_file", "keep"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag.replace('_', '-')} goes with --beside")
        return None
    if args.beside_file is None:
        return None
    source = imatrix.Source.parse(args.beside_file)
    mine = {os.path.realpath(each.path) for each in text_inputs(source)}
    for given in args.file or ():
        for each in text_inputs(imatrix.Source.parse(given)):
            if os.path.realpath(each.path) in mine:
                raise ValueError(
                    f"--beside-file {args.beside_file}: {each.path} is measured too (-f). Leave "
                    "--beside-file out: then the part of -f that is not measured is compared on"
                )
    mixture = imatrix.Mixture([source])
    mixture.check()
    return mixture if source.plain is None else source.plain


def _plan_beside(
    args: argparse.Namespace, options: RecipeOptions, text: Texts, other: Texts | None
) -> _Plan:
    """Find out what is compared, and share the text, before anything is measured."""
    sizes = check_mixtures(
        args.model,
        args.imatrix,
        args.beside,
        folder=Path(args.output).parent,
        keep=args.keep,
    )
    more = [Target("size", n_bytes) for n_bytes in sizes.values()]
    options = replace(options, targets=tuple(dict.fromkeys([*options.targets, *more])))

    def count(what: Texts, most: int, skip_chunks: int) -> int:
        return count_chunks(
            args.model,
            what,
            n_ctx=options.n_ctx,
            most=most,
            skip_chunks=skip_chunks,
            parse_special=options.parse_special,
            packing=options.packing,
            chat=options.chat,
            on_bad_record=options.on_bad_record,
        )

    if other is not None:
        if (there := count(other, LEAST_CHUNKS, 0)) < LEAST_CHUNKS:
            raise ValueError(
                f"--beside-file {args.beside_file} has {plural(there, 'chunk')} of {options.n_ctx} "
                f"tokens; {LEAST_CHUNKS} are needed for an interval. Give more text"
            )
        return _Plan(options, other, 0)
    # a third of the text is enough for the comparison if it has as many chunks as asked for
    most = max(3 * options.chunks, options.chunks + args.beside_chunks)
    shares = share_text(count(text, most, options.skip_chunks), options.chunks)
    return _Plan(
        replace(options, n_chunks=shares.measured), text, options.skip_chunks + shares.measured
    )


def _targets(args: argparse.Namespace) -> dict[Target, str]:
    """What is wanted, with what its file is called by, in the order of imatrix.recipe."""
    found: dict[Target, str] = {}
    for each in _split(args.size):
        found.setdefault(Target("size", parse_size(each)), each.replace(" ", ""))
    for number in _numbers(args.bpw, "--bpw"):
        found.setdefault(Target("bpw", number), f"{number:g}bpw")
    for number in _numbers(args.kl, "--kl"):
        found.setdefault(Target("kl", number), f"kl{number:g}")
    if not found:
        raise ValueError("nothing to choose for: give --size, --bpw or --kl")
    return found


def _split(given: list[str]) -> list[str]:
    return [each.strip() for value in given for each in value.split(",") if each.strip()]


def _numbers(given: list[str], flag: str) -> list[float]:
    found = []
    for text in _split(given):
        try:
            found.append(float(text))
        except ValueError:
            raise ValueError(f"{flag}: expected a number, got {text!r}") from None
    return found


def _measured(args: argparse.Namespace) -> str:
    return args.measured if args.measured is not None else f"{args.output}.measured"


def _paths(args: argparse.Namespace) -> list[str]:
    """A file for each target: OUT, or OUT with what it is for."""
    labels = _targets(args).values()
    if len(labels) < 2:
        return [args.output]
    out = Path(args.output)
    return [str(out.with_name(f"{out.stem}-{label}{out.suffix}")) for label in labels]


def _outputs(args: argparse.Namespace) -> Iterator[Output]:
    # OUT itself is not written if there are several; a name that may not be written is wrong all the same
    yield Output(args.output)
    for path in _paths(args):
        if path != args.output:
            yield Output(path, args.output)
    measured = _measured(args)
    yield Output(measured, args.output if args.measured is None else "")
    yield Output(f"{measured}.lock", measured)
    if args.beside and args.keep is not None:
        for kept in kept_files(args.keep, args.model, args.beside):
            yield Output(os.fspath(kept), args.keep)


def _print(recipe: imatrix.Recipe, target: Target, terminal: Terminal) -> None:
    """Kinds of tensors by types, then the figures."""
    used = sorted(set(recipe.types.values()), key=_bits)
    rows: dict[str, dict[str, int]] = {}
    totals: dict[str, int] = {}
    for name, kind in recipe.types.items():
        tensor = recipe.source[name]
        n_bytes = int(_bits(kind) * n_values(tensor.shape) / 8)
        where = kind_of(name).removesuffix(".weight")
        row = rows.setdefault(where, {})
        row[kind] = row.get(kind, 0) + 1
        totals[where] = totals.get(where, 0) + n_bytes
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tensors", no_wrap=True)
    for kind in used:
        table.add_column(kind, justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for where, row in rows.items():
        counts = [str(row[kind]) if kind in row else "" for kind in used]
        table.add_row(Text(where), *counts, size(totals[where]))
    terminal.out.print(table)
    terminal.out.print(
        f"for {target}: {recipe.bytes} bytes ({size(recipe.bytes)}), "
        f"{recipe.bits_per_weight:.3f} bits per weight",
        soft_wrap=True,
    )
    if recipe.predicted_kl is not None and recipe.measured_kl is not None:
        found = recipe.measured_kl
        terminal.out.print(
            f"KL divergence to the unchanged model: predicted {recipe.predicted_kl:.5f}, measured "
            f"{found.value:.5f} ± {found.error:.5f} nats a token, {found.positions} positions",
            soft_wrap=True,
        )


def _bits(kind: str) -> float:
    return data_bytes((256 * 4,), kind) / 128


def _print_next(
    args: argparse.Namespace, recipe: imatrix.Recipe, path: str, terminal: Terminal
) -> None:
    """Where it is, and the command that follows it."""
    terminal.note(f"wrote {path}; what was measured is in {_measured(args)}")
    model = Path(args.model)
    if recipe.head is not None and recipe.head.label == "dropped":
        left = model.with_name(recipe.model)
        words = ["imatrix", "drop-mtp", os.fspath(model), "-o", os.fspath(left)]
        terminal.note(
            f"the recipe is for the model without its head, so first: {shlex.join(words)}"
        )
        model = left
    out = f"{model.stem}-{Path(path).stem}.gguf"
    words = ["imatrix", "quantize", os.fspath(model), out, recipe.ftype]
    if args.imatrix is not None:
        words += ["--imatrix", args.imatrix]
    terminal.note(f"go on with: {shlex.join([*words, '--recipe', path])}")


COMMAND = Command(
    name="recipe",
    help="which tensor should get which type, so that a file has a size",
    description="Measure what each type costs each tensor in the model's own output, and choose types "
    "so that the file has a size and the output changes least. Nothing is quantized yet: imatrix "
    "quantize --recipe follows what is written here. The text (-f) is what the changes are measured "
    "on: take text like that which the model is for, and not what MATRIX was collected from, which "
    "makes low types look better than they are.",
    add_arguments=_add_arguments,
    files=Files(
        models=("model",),
        texts=("file", "beside_file"),
        files=("imatrix", "chat_template_file", "chat_tools"),
        outputs=_outputs,
    ),
    run=_run,
)
