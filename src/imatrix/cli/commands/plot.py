"""`imatrix plot`: pictures of importance matrices and of recipes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from imatrix.cli.command import Command
from imatrix.cli.flags.common import add_verbose
from imatrix.cli.flags.hub import Parser
from imatrix.cli.flags.matrices import add_chunk_size
from imatrix.cli.flags.values import at_least
from imatrix.cli.outputs import Files, check_output, named_outputs
from imatrix.cli.status import OK
from imatrix.cli.terminal import Terminal
from imatrix.matrix.importance import ImportanceMatrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COMMAND"]

# The choices are spelled out: asking imatrix.pictures for them would make every command slower.
_KINDS = ("layers", "experts", "channels", "compare", "recipe", "bits", "frontier")
_STATISTICS = ("mean", "top", "peak", "coverage", "rows")
_DIFFERENCES = ("ratio", "cosine")
_STYLES = ("light", "dark")

# Which flags a kind of picture has a use for, by their names in the namespace.
_USES = {
    "layers": {"statistic"},
    "experts": set[str](),
    "channels": {"weight", "expert", "heaviest"},
    "compare": {"other", "statistic", "difference"},
    "recipe": set[str](),
    "bits": set[str](),
    "frontier": set[str](),
}
_OF_RECIPES = ("recipe", "bits", "frontier")
_FLAGS = {
    "other": "--with",
    "weight": "--weight",
    "expert": "--expert",
    "heaviest": "--heaviest",
    "statistic": "--statistic",
    "difference": "--difference",
}


class Look(TypedDict):
    """How a picture of any kind looks."""

    style: Literal["light", "dark"]
    width: float | None


def _add_arguments(command: Parser) -> None:
    add = command.add_argument
    add("file", metavar="MATRIX", help="importance matrix, or a recipe's JSON file")
    add(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help="what to write; its name ends in .png or .svg",
    )
    add(
        "--kind",
        choices=_KINDS,
        help="what to draw (default: compare where --with is given, channels where --weight is, "
        "else layers; of a recipe: recipe, which is frontier and bits, size against KL divergence "
        "and the types by block)",
    )
    add("--with", dest="other", metavar="OTHER", help="compare: the second matrix")
    add(
        "--weight",
        metavar="NAME",
        action="append",
        help="channels: a weight, as blk.3.ffn_down; may be repeated, 16 at most",
    )
    add(
        "--expert",
        metavar="N",
        type=_expert,
        help="channels: of a weight with experts the one with this number, 'each' for a map of "
        "them all, or 'pooled' (default)",
    )
    add(
        "--heaviest",
        metavar="N",
        type=at_least(0),
        help="channels: how many to name, 20 at most (default: 5)",
    )
    add(
        "--statistic",
        choices=_STATISTICS,
        help="layers, compare: mean squared activation (default); share of the heaviest 1 %% of "
        "channels (top); the heaviest channel over the mean (peak); matrices with rows in %% "
        "(coverage); rows of the matrix with the fewest (rows)",
    )
    add(
        "--difference",
        choices=_DIFFERENCES,
        help="compare: log2 of the ratio of the means (default), or cosine distance",
    )
    add("--style", choices=_STYLES, default="light", help="(default: light)")
    add(
        "--width",
        metavar="INCHES",
        type=_inches,
        help="3 to 40 (default: what the matrix needs; 4.5 suits a phone)",
    )
    add("--dpi", metavar="N", type=_dpi, help="pixels an inch of a PNG, 36 to 600 (default: 144)")
    add_chunk_size(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    from imatrix import pictures

    kind = _kind(args, recipe=_is_recipe(args.file))
    if Path(args.output).suffix.lower() not in pictures.FORMATS:
        raise ValueError(
            f"cannot write {args.output}: a picture's name ends in {' or '.join(pictures.FORMATS)}"
        )
    check_output(args.output)
    look: Look = {"style": args.style, "width": args.width}
    figure = _of_recipe(args, kind, look) if kind in _OF_RECIPES else _of_matrix(args, kind, look)
    pictures.save(figure, args.output, dpi=args.dpi or pictures.DPI)
    terminal.note(f"wrote {args.output}: {figure.get_label()}")
    return OK


def _of_recipe(args: argparse.Namespace, kind: str, look: Look) -> Figure:
    from imatrix import pictures
    from imatrix.quantization.recipe import Recipe

    draw = {"recipe": pictures.recipe, "bits": pictures.bits, "frontier": pictures.frontier}[kind]
    found = Recipe.load(args.file)
    try:
        return draw(found, **look)
    except ValueError as error:
        raise ValueError(f"{args.file}: {error}") from error


def _of_matrix(args: argparse.Namespace, kind: str, look: Look) -> Figure:
    from imatrix import pictures

    matrix = ImportanceMatrix.load(args.file, chunk_size=args.ctx_size)
    name = Path(args.file).name
    if kind == "layers":
        return pictures.layers(matrix, statistic=args.statistic or "mean", name=name, **look)
    if kind == "experts":
        return pictures.experts(matrix, name=name, **look)
    if kind == "channels":
        return _channels(args, matrix, name, look)
    other = ImportanceMatrix.load(args.other, chunk_size=args.ctx_size)
    return pictures.compare(
        matrix,
        other,
        names=_names(args.file, args.other),
        statistic=args.statistic or "mean",
        difference=args.difference or "ratio",
        **look,
    )


def _is_recipe(path: str) -> bool:
    """Whether a file is JSON, as recipes are and no importance matrix is.

    Raises:
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        start = file.read(64)
    # A .dat file may begin with "{", the number of its entries, and has a zero byte behind it.
    return start.lstrip().startswith(b"{") and b"\0" not in start


def _kind(args: argparse.Namespace, *, recipe: bool) -> str:
    """The kind of picture, after a check that the file and the flags go with it.

    Raises:
        ValueError: they do not.
    """
    asked = "compare" if args.other else "channels" if args.weight else ""
    kind: str = args.kind or asked or ("recipe" if recipe else "layers")
    if recipe and kind not in _OF_RECIPES:
        raise ValueError(
            f"{args.file} is no importance matrix but JSON, as a recipe is; of a recipe there are "
            f"the pictures {', '.join(_OF_RECIPES)} (--kind)"
        )
    if not recipe and kind in _OF_RECIPES:
        raise ValueError(
            f"--kind {kind} needs a recipe, and {args.file} is none: imatrix recipe writes one"
        )
    idle = [
        flag
        for name, flag in _FLAGS.items()
        if getattr(args, name) is not None and name not in _USES[kind]
    ]
    if idle:
        uses = ", ".join(_FLAGS[name] for name in _FLAGS if name in _USES[kind])
        raise ValueError(
            f"--kind {kind} has no use for {', '.join(idle)}"
            + (f"; it takes {uses}" if uses else "")
        )
    if kind == "compare" and not args.other:
        raise ValueError("--kind compare needs the second matrix: --with OTHER")
    if kind == "channels" and not args.weight:
        raise ValueError(
            "--kind channels needs a weight: --weight NAME, as blk.3.ffn_down "
            f"(imatrix show {args.file} --all lists them)"
        )
    return kind


def _channels(args: argparse.Namespace, matrix: ImportanceMatrix, name: str, look: Look) -> Figure:
    from imatrix import pictures

    heaviest = 5 if args.heaviest is None else args.heaviest
    try:
        return pictures.channels(
            matrix,
            args.weight,
            expert="pooled" if args.expert is None else args.expert,
            heaviest=heaviest,
            name=name,
            **look,
        )
    except (KeyError, IndexError) as error:  # what was asked for is not in the file
        raise ValueError(f"{args.file}: {error}") from error


def _names(first: str, second: str) -> tuple[str, str]:
    """Short names that tell two files apart."""
    names = Path(first).name, Path(second).name
    return names if names[0] != names[1] else (first, second)


def _expert(text: str) -> int | str:
    return text if text in ("pooled", "each") else at_least(0)(text)


def _inches(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _dpi(text: str) -> int:
    value = at_least(36)(text)
    if value > 600:
        raise argparse.ArgumentTypeError(f"must be 600 or less, got {value}")
    return value


COMMAND = Command(
    name="plot",
    help="pictures: layers, experts, channels, two matrices side by side, recipes",
    description="Draw an importance matrix as PNG or SVG: weight kinds against blocks; rows by "
    "expert and block; one weight's channels, the heaviest named; two matrices and their "
    "difference. Or a recipe: size against KL divergence, and types by block. Needs matplotlib: pip install 'imatrix[plot]'.",
    add_arguments=_add_arguments,
    files=Files(files=("file", "other"), outputs=named_outputs("output")),
    run=_run,
)
