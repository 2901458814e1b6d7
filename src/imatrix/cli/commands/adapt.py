"""`imatrix adapt`: importance data for another conversion of the model."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby

from imatrix.cli.command import Command
from imatrix.cli.data import write_json
from imatrix.cli.flags.common import add_verbose
from imatrix.cli.flags.hub import Parser
from imatrix.cli.flags.matrices import add_chunk_size, add_format, warn_of_losses
from imatrix.cli.outputs import Files, check_output, named_outputs
from imatrix.cli.status import OK
from imatrix.cli.terminal import Console, Terminal, Text
from imatrix.formats import Format
from imatrix.matrix.conversion import format_of
from imatrix.matrix.summary import describe_weights
from imatrix.quantization.adaptation import Adapted, Placed, adapt
from imatrix.tensors import apart_expert, block_of, kind_of
from imatrix.words import plural

__all__ = ["COMMAND"]

_LIST = 12  # of what has no data or no place, unless all is asked for


def _add_arguments(command: Parser) -> None:
    add = command.add_argument
    add("file", metavar="FILE", help="importance matrix, GGUF or .dat")
    add("--to", metavar="MODEL", required=True, help="GGUF model to serve; only its header is read")
    add("-o", "--output", metavar="OUT", help="what to write (default: only tell)")
    add("--all", action="store_true", help="a line a weight, those that stay as they are too")
    add("--json", action="store_true", help="what was done as JSON, every weight")
    add_format(command)
    add_chunk_size(command)
    add_verbose(command)


def _run(args: argparse.Namespace, terminal: Terminal) -> int:
    if args.output is not None:
        check_output(args.output)
    found = adapt(args.file, args.to, chunk_size=args.ctx_size)
    if args.json:
        write_json(_as_data(found))
    else:
        _render(terminal.out, found, every=args.all)
    if args.output is None:
        terminal.note("nothing written: name a file with -o")
        return OK
    form: Format = args.output_format or format_of(args.output)
    found.matrix.save(args.output, format=form)
    terminal.note(f"wrote {args.output}: {form}, {describe_weights(found.matrix)}")
    warn_of_losses(found.matrix, form, terminal)
    return OK


def _as_data(found: Adapted) -> dict[str, object]:
    return {
        "placed": [asdict(place) for place in found.placed],
        "missing": dict(found.missing),
        "unplaced": dict(found.unplaced),
    }


def _render(console: Console, found: Adapted, *, every: bool) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    changed = found.changed
    kept = len(found.placed) - len(changed)
    say(f"{plural(len(changed), 'weight')} adapted, {kept} as they were")
    lines = (
        [(place.name, _describe_place(place)) for place in found.placed]
        if every
        else _by_kind(changed)
    )
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        say(f"  {name:<{width}}  {text}".rstrip())
    for heading, names in (
        ("in the model, without data", found.missing),
        ("in the matrix, without a place", found.unplaced),
    ):
        if names:
            say(f"{heading}: {len(names)}", "yellow" if names is found.missing else "")
            reasons = [(name, why) for name, why in names.items()] if every else _reasons(names)
            for name, why in reasons if every else reasons[:_LIST]:
                say(f"  {name}" + (f": {why}" if why else ""))
            if not every and len(reasons) > _LIST:
                say(f"  {len(reasons) - _LIST} more kinds: --all", "dim")


def _describe_place(place: Placed) -> str:
    if not place.steps:
        return ""
    first, *rest = place.sources
    sources = first if not rest else f"{first} and {len(rest)} more"
    if 1 <= len(rest) <= 2:
        sources = ", ".join(place.sources)
    text = f"{', '.join(place.steps)}: from {sources}"
    return text + (f"; {place.unseen} experts saw no rows" if place.unseen else "")


def _by_kind(places: Sequence[Placed]) -> list[tuple[str, str]]:
    """A line for the same weight of several blocks: blk.0-31.attn_q.weight."""
    groups: dict[tuple[str, str], list[str]] = {}
    for place in places:
        sources = dict.fromkeys(_kind(source) for source in place.sources)
        steps = f"{', '.join(place.steps)}: from {', '.join(sources)}"
        if place.unseen and place.steps != ("cut",):
            steps += f"; {place.unseen} experts saw no rows"
        groups.setdefault((_kind(place.name), steps), []).append(place.name)
    return [(_ranged(kind, names), steps) for (kind, steps), names in groups.items()]


def _reasons(names: Mapping[str, str]) -> list[tuple[str, str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, why in names.items():
        groups.setdefault((_kind(name), re.sub(r"block \d+", "such block", why)), []).append(name)
    return [
        (_ranged(kind, found), names[found[0]] if len(found) == 1 else why)
        for (kind, why), found in groups.items()
    ]


def _kind(name: str) -> str:
    """Without the block and the expert: attn_q.weight, ffn_gate.*.weight."""
    expert = apart_expert(name)
    return kind_of(name) if expert is None else f"{expert[0]}.*.weight"


def _ranged(kind: str, names: Sequence[str]) -> str:
    blocks = sorted({block for name in names if (block := block_of(name)) is not None})
    if not blocks:
        return kind
    runs = []
    for _, run in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        numbers = [block for _, block in run]
        runs.append(f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]))
    return f"blk.{','.join(runs)}.{kind}"


COMMAND = Command(
    name="adapt",
    help="importance data for another conversion of the model",
    description="Give importance data the names and shapes of another conversion of their "
    "model, where the same activations reach the weights: q, k and v or gate and up fused or "
    "not, experts merged or apart. Data of another model are refused.",
    add_arguments=_add_arguments,
    files=Files(models=("to",), files=("file",), outputs=named_outputs("output")),
    run=_run,
)
