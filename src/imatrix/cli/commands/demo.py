"""`imatrix demo`: the whole job on a small trained model, and what the head's data are worth."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table

import imatrix
from imatrix.cli.command import Command
from imatrix.cli.commands import show
from imatrix.cli.flags.common import add_verbose
from imatrix.cli.flags.hub import Parser
from imatrix.cli.outputs import Files
from imatrix.cli.progress import CollectProgress, StepProgress, describe_tensors
from imatrix.cli.status import FAILED, OK
from imatrix.cli.terminal import Terminal, Text
from imatrix.demo import CALIBRATION, HELD_OUT, MODEL
from imatrix.entries import Entry
from imatrix.files.outputs import Input, Output
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.words import size

__all__ = ["COMMAND", "FILES", "run"]


TYPE = "IQ2_XXS"

WITH_HEAD, TRUNK_ONLY = "with-head.gguf", "trunk-only.gguf"

FILES = (
    *(WITH_HEAD, TRUNK_ONLY),
    *(f"head-{TYPE}-{data}.gguf" for data in ("flat", "collected", "none")),
)
"""What it writes into its folder."""

_N_CTX = 512
_VERDICTS = {
    "better": Text("collected is better", "green"),
    "worse": Text("flat is better", "red"),
}
_DEPTH = 3

# Columns that a paragraph fills at most.
_WIDTH = 100

# How much of either text; None for all.
_CALIBRATION_CHUNKS: int | None = None
_HELD_OUT_CHUNKS: int | None = None


def _add_arguments(command: Parser) -> None:
    command.add_argument(
        "--dir", metavar="DIR", type=Path, help="keep the files here (default: a temporary folder)"
    )
    command.add_argument(
        "--keep", action="store_true", help="do not remove the temporary folder at the end"
    )
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    return OK if run(terminal, args.dir, keep=args.keep) else FAILED


def _reads(_args: argparse.Namespace) -> Iterator[Input]:
    yield from map(Input, map(str, (MODEL, CALIBRATION, HELD_OUT)))


def _outputs(args: argparse.Namespace) -> Iterator[Output]:
    if args.dir is not None:
        yield from (Output(str(args.dir / name), str(args.dir)) for name in FILES)


def run(terminal: Terminal, folder: Path | None = None, *, keep: bool = False) -> bool:
    """Collect from the package's trained model and its MTP head, bring the head to a low-bit type
    with and without its data, and measure what it drafts.

    Args:
        terminal: where to print.
        folder: where to put the files, made if need be, and left there; None for a temporary one.
        keep: leave the temporary folder too.

    Returns:
        Whether everything went as announced: the quantizer refused the matrix of the trunk alone,
        and took those with data for the head.

    Raises:
        OSError: the files cannot be written.
        ImatrixError: the engine failed at what it should do.
    """
    with _place(folder, keep) as place:
        done = _steps(terminal, place)
        if folder is not None or keep:
            terminal.out.print()
            terminal.out.print(f"The files are in {place}", soft_wrap=True)
    return done


@contextmanager
def _place(folder: Path | None, keep: bool) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    elif keep:
        yield Path(tempfile.mkdtemp(prefix="imatrix-demo-"))
    else:
        with tempfile.TemporaryDirectory(prefix="imatrix-demo-") as name:
            yield Path(name)


def _steps(terminal: Terminal, place: Path) -> bool:
    out = terminal.out
    header = imatrix.ModelFile.read(MODEL)
    head = header.n_trunk

    _heading(terminal, 1, "A small trained model with an MTP head")
    _line(
        terminal,
        f"{MODEL.name}: {header.architecture}, {size(MODEL.stat().st_size)}, blocks 0 to "
        f"{head - 1} are the trunk, block {head} is the head",
    )

    _heading(terminal, 2, "Collect both over the calibration text: --mtp")
    matrix = _collect(terminal)
    with_head, trunk_only = place / WITH_HEAD, place / TRUNK_ONLY
    matrix.save(with_head)
    matrix.trunk.save(trunk_only)
    out.print()
    show.render(out, matrix, with_head.name)

    _heading(terminal, 3, "Would it do? check, before any hour is spent on quantizing")
    types = {rf"^blk\.{head}\.": TYPE.lower()}
    for file in (trunk_only, with_head):
        _check(terminal, file, types)

    _heading(terminal, 4, f"The head at {TYPE}, the trunk at Q8_0, measured on other text")
    refused = _refusal(terminal, place, trunk_only, types)
    if refused is None:
        terminal.error("the engine took a matrix without the head, which it should refuse")
        return False
    found = {"F16 (reference)": _evaluate(terminal, MODEL, "F16", reference=None)}
    for name, data in {"flat ones": _flat(matrix), "collected": matrix}.items():
        target = place / f"head-{TYPE}-{name.split()[0]}.gguf"
        with StepProgress(terminal, f"   quantizing, {name}", describe_tensors) as bar:
            imatrix.quantize(MODEL, target, "Q8_0", imatrix=data, tensor_types=types, progress=bar)
        found[name] = _evaluate(terminal, target, name, reference=MODEL)
    _render(terminal, found, refused)
    return True


def _heading(terminal: Terminal, number: int, text: str) -> None:
    terminal.out.print()
    terminal.out.print(Text(f"{number}. {text}", "bold"))


def _line(terminal: Terminal, text: str) -> None:
    terminal.out.print(Text(f"   {text}"))


def _collect(terminal: Terminal) -> ImportanceMatrix:
    with (
        imatrix.Collector(MODEL, n_ctx=_N_CTX) as collector,
        CollectProgress(terminal, "   collecting", every=0) as bar,
    ):
        return collector.run(CALIBRATION, mtp=True, max_chunks=_CALIBRATION_CHUNKS, progress=bar)


def _check(terminal: Terminal, file: Path, types: Mapping[str, str]) -> None:
    found = imatrix.coverage(MODEL, file, "Q8_0", tensor_types=types)
    if found.ready:
        verdict = Text("ready", "green")
    else:
        verdict = Text(f"{len(found.failing)} weights of the head would fail", "red")
    terminal.out.print(Text(f"   {file.name}: ") + verdict)


def _flat(matrix: ImportanceMatrix) -> ImportanceMatrix:
    """The trunk's data, and for the head ones: every column weighs the same."""
    ones = {
        name: Entry(np.ones_like(entry.sums), np.ones_like(entry.counts))
        for name, entry in matrix.head.items()
    }
    return ImportanceMatrix({**matrix.trunk, **ones})


def _refusal(terminal: Terminal, place: Path, matrix: Path, types: Mapping[str, str]) -> str | None:
    """The reason to refuse, in the engine's words; None if it did not."""
    try:
        with StepProgress(terminal, "   quantizing", describe_tensors) as bar:
            imatrix.quantize(
                MODEL,
                place / f"head-{TYPE}-none.gguf",
                "Q8_0",
                imatrix=matrix,
                tensor_types=types,
                progress=bar,
            )
    except imatrix.EngineError as error:
        return str(error).replace(str(MODEL), MODEL.name)
    return None


def _evaluate(
    terminal: Terminal, model: Path, name: str, *, reference: Path | None
) -> imatrix.Evaluation:
    with CollectProgress(terminal, f"   evaluating, {name}", every=0) as bar:
        return imatrix.evaluate(
            model,
            HELD_OUT,
            reference=reference,
            depth=_DEPTH,
            n_ctx=_N_CTX,
            max_chunks=_HELD_OUT_CHUNKS,
            progress=bar,
        )


def _render(terminal: Terminal, found: Mapping[str, imatrix.Evaluation], refused: str) -> None:
    flat, collected = found["flat ones"], found["collected"]
    _indented(terminal, Text("none: ", "red") + Text(refused))
    terminal.out.print()

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("head data")
    depths = [f"depth {k}" for k in range(1, _DEPTH + 1)]
    for name in ("head NLL", "KL", *depths, "tokens"):
        table.add_column(name, justify="right")
    for name, each in found.items():
        if each is flat:
            table.add_row("none", Text("refused", "red"))
        table.add_row(
            name,
            _describe_estimate(each.head_nll, "{:.4f}"),
            _describe_estimate(each.head_kl, "{:.4f}"),
            *(_describe_estimate(rate, "{:.2%}") for rate in each.draft),
            *[""] * (_DEPTH - len(each.draft)),
            _describe_estimate(each.accepted_length, "{:.3f}"),
        )
    _indented(terminal, table)
    _indented(
        terminal,
        Text(
            "KL: from the F16 head. depth k: how often the trunk accepts the k-th token of a draft "
            "whose earlier tokens it accepted. tokens: accepted a draft, of "
            f"{_DEPTH}. {len(flat.chunk)} positions."
        ),
    )
    terminal.out.print()

    difference = collected.compare(flat)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("collected less flat, paired")
    table.add_column("difference", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("")
    measures = {
        "KL to the F16 head, nats": (difference.head_kl, "{:+.4f}"),
        "head NLL, nats": (difference.head_nll, "{:+.4f}"),
        "accepted at depth 1": (difference.draft[0], "{:+.2%}"),
        "tokens a draft": (difference.accepted_length, "{:+.3f}"),
    }
    for name, (apart, form) in measures.items():
        if apart is not None:
            low, high = form.format(apart.low), form.format(apart.high)
            verdict = _VERDICTS.get(apart.verdict, Text(apart.verdict, "yellow"))
            table.add_row(name, form.format(apart.value), f"{low} to {high}", verdict)
    _indented(terminal, table)


def _indented(terminal: Terminal, what: RenderableType) -> None:
    out = terminal.out
    out.print(Padding(what, (0, 0, 0, 3), expand=False), width=min(out.width, _WIDTH))


def _describe_estimate(estimate: imatrix.Estimate | None, form: str) -> str:
    return "" if estimate is None else form.format(estimate.value)


COMMAND = Command(
    name="demo",
    help="collect, quantize and evaluate a small trained model",
    add_arguments=_add_arguments,
    files=Files(outputs=_outputs, reads=_reads),
    run=_run,
)
