"""What a matrix holds, at a glance: lines of numbers, as tables or as plain data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from imatrix._terminal import Console, Text
from imatrix.formats import Format
from imatrix.matrix import Entry, ImportanceMatrix, LeftOut, TextSource

_BLOCK = re.compile(r"blk\.(\d+)\.")

_FORMATS: Mapping[Format, str] = {"gguf": "GGUF", "dat": ".dat"}

_LEGEND = (
    "mean: squared activation of a channel, on average; peak: the strongest channel / the mean"
)


@dataclass(frozen=True)
class Line:
    """One weight, or all weights of one kind taken together.

    Attributes:
        name: the weight's name; "blk.*." for several blocks.
        n_weights: how many weights it stands for.
        n_in: length of a row, (least, most).
        n_mat: experts or matrices, (least, most).
        rows: activation rows that an expert or a weight saw, (least, most).
        mean: mean importance over the channels that have data; None if none has.
        peak: importance of the strongest channel / mean of its matrix, the largest there is.
        unseen: experts or weights that saw no row.
    """

    name: str
    n_weights: int
    n_in: tuple[int, int]
    n_mat: tuple[int, int]
    rows: tuple[int, int]
    mean: float | None
    peak: float | None
    unseen: int


@dataclass(frozen=True)
class Experts:
    """Which experts saw how much.

    Attributes:
        n_experts: experts, those of all blocks together.
        n_blocks: blocks that have any.
        unseen: (block, expert) of those without a row.
        thinnest: (block, expert, rows) of the one with the fewest, those without any left out.
    """

    n_experts: int
    n_blocks: int
    unseen: tuple[tuple[int, int], ...]
    thinnest: tuple[int, int, int] | None


def lines(matrix: ImportanceMatrix, *, every_weight: bool = False) -> list[Line]:
    """A line a weight, or one a kind of weight ("blk.*.attn_q.weight")."""
    groups: dict[str, list[str]] = {}
    for name in matrix:
        kind = name if every_weight else _BLOCK.sub("blk.*.", name, count=1)
        groups.setdefault(kind, []).append(name)
    return [
        _line(names[0] if len(names) == 1 else kind, [matrix[name] for name in names])
        for kind, names in groups.items()
    ]


def _line(name: str, entries: list[Entry]) -> Line:
    means, peaks = [], []
    for entry in entries:
        # one count may stand for several matrices
        seen = np.broadcast_to(entry.counts > 0, entry.n_mat)
        mean = entry.importance.mean(axis=1)[seen]
        means.extend(mean.tolist())
        peaks.extend((entry.importance.max(axis=1)[seen][mean > 0] / mean[mean > 0]).tolist())
    return Line(
        name=name,
        n_weights=len(entries),
        n_in=_range(entry.n_in for entry in entries),
        n_mat=_range(entry.n_mat for entry in entries),
        rows=_range(int(count) for entry in entries for count in entry.counts),
        mean=sum(means) / len(means) if means else None,
        peak=max(peaks, default=None),
        unseen=sum(int(np.count_nonzero(entry.counts == 0)) for entry in entries),
    )


def _range(values: Iterable[int]) -> tuple[int, int]:
    found = list(values)
    return min(found), max(found)


def experts(matrix: ImportanceMatrix) -> Experts:
    """Rows of the experts, the weights of one block (gate, up, down) taken together."""
    counts: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = {}
    for name, entry in matrix.items():
        block = _BLOCK.match(name)
        if block is None or entry.n_counts == 1:
            continue
        have = counts.get(int(block[1]))
        if have is None or len(have) != entry.n_counts:
            counts[int(block[1])] = entry.counts
        else:
            counts[int(block[1])] = np.minimum(have, entry.counts)
    rows = [
        (int(n), block, expert)
        for block, seen in sorted(counts.items())
        for expert, n in enumerate(seen)
    ]
    thinnest = min((row for row in rows if row[0] > 0), default=None)
    return Experts(
        n_experts=len(rows),
        n_blocks=len(counts),
        unseen=tuple((block, expert) for n, block, expert in rows if n == 0),
        thinnest=None if thinnest is None else (thinnest[1], thinnest[2], thinnest[0]),
    )


def experts_told(found: Experts) -> str:
    """Experts in a line; "" for a matrix without any."""
    if not found.n_experts:
        return ""
    text = f"{found.n_experts} in {plural(found.n_blocks, 'block')}: "
    if found.unseen:
        few = ", ".join(f"blk.{block} expert {expert}" for block, expert in found.unseen[:4])
        more = len(found.unseen) - 4
        text += f"{len(found.unseen)} saw no rows ({few}"
        text += f" and {more} more)" if more > 0 else ")"
    else:
        text += "all saw rows"
    if found.thinnest is not None:
        block, expert, rows = found.thinnest
        text += f"; thinnest: blk.{block} expert {expert}, {plural(rows, 'row')}"
    return text


def weights_told(matrix: ImportanceMatrix) -> str:
    """How many weights: "42 weights: 29 trunk, 13 head (block 3)"."""
    text = f"{plural(len(matrix), 'weight')}: {len(matrix.trunk)} trunk, {len(matrix.head)} head"
    if blocks := sorted(matrix.head_blocks):
        text += f" (block {', '.join(map(str, blocks))})"
    return text


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def as_data(matrix: ImportanceMatrix, file: str, form: Format = "gguf") -> dict[str, Any]:
    """Everything `render` shows, and every weight, for `--json`."""
    head = set(matrix.head)
    found = experts(matrix)
    provenance = matrix.provenance
    weights = []
    for line in lines(matrix, every_weight=True):
        weights.append(
            {
                "name": line.name,
                "part": "head" if line.name in head else "trunk",
                "n_in": line.n_in[0],
                "n_mat": line.n_mat[0],
                "rows_min": line.rows[0],
                "rows_max": line.rows[1],
                "mean": line.mean,
                "peak": line.peak,
                "signed_sums": matrix[line.name].signed_sums is not None,
                "unseen": line.unseen,
            }
        )
    return {
        "file": file,
        "format": form,
        "datasets": list(matrix.datasets),
        "chunk_count": matrix.chunk_count,
        "chunk_size": matrix.chunk_size,
        "provenance": None if provenance is None else asdict(provenance),
        "head_blocks": sorted(matrix.head_blocks),
        "experts": {
            "count": found.n_experts,
            "unseen": [list(place) for place in found.unseen],
            "thinnest": found.thinnest,
        },
        "weights": weights,
    }


def render(
    console: Console,
    matrix: ImportanceMatrix,
    file: str,
    form: Format = "gguf",
    *,
    every_weight: bool = False,
) -> None:
    """Print a summary, then the trunk's and the head's weights in tables."""
    title = Text(file, "bold") + Text(
        f": {_FORMATS[form]} importance matrix, {weights_told(matrix)}"
    )
    console.print(title, soft_wrap=True)
    for label, text in _facts(matrix).items():
        console.print(Text(f"  {label:<10} ", "dim") + Text(text), soft_wrap=True)
    parts: Mapping[str, ImportanceMatrix] = {"trunk": matrix.trunk, "head": matrix.head}
    for heading, part in parts.items():
        if part:
            console.print()
            console.print(_table(heading, lines(part, every_weight=every_weight)))
    console.print(Text(_LEGEND, "dim"))


def _facts(matrix: ImportanceMatrix) -> dict[str, str]:
    facts = {}
    if matrix.chunk_count:
        text = plural(matrix.chunk_count, "chunk")
        made = matrix.provenance
        if made is not None and made.packing == "document":
            text += f" of up to {matrix.chunk_size} tokens, no document beside another"
            text += "" if made.tokens is None else f"; {plural(made.tokens, 'token')}"
        elif matrix.chunk_size:
            text += f" of {matrix.chunk_size} tokens"
        facts["collected"] = text
    made = matrix.provenance
    if made is not None:
        by = ", ".join(part for part in (made.collector, made.engine) if part)
        if by:
            facts["by"] = by
    if made is not None and len(made.sources) > 1:
        facts["text"] = sources_told(made.sources)
    elif matrix.datasets:
        facts["text"] = ", ".join(matrix.datasets)
    if made is not None and made.dataset_digest:
        facts["tokens"] = f"SHA-256 {made.dataset_digest[:16]}..."
    if made is not None and made.left_out:
        facts["left out"] = left_out_told(made.left_out)
    if made is not None and (told := unused_told(made.sources)):
        facts["not used"] = told
    if told := experts_told(experts(matrix)):
        facts["experts"] = told
    if signed := sum(entry.signed_sums is not None for entry in matrix.values()):
        of = "all weights" if signed == len(matrix) else f"{signed} of {len(matrix)} weights"
        facts["signed"] = f"sums of the activations themselves, of {of}"
    return facts


def sources_told(sources: Sequence[TextSource]) -> str:
    """The sources of a text and their shares of its tokens, the largest first."""
    total = sum(source.tokens for source in sources) or 1
    ordered = sorted(sources, key=lambda source: -source.tokens)
    return ", ".join(f"{each.name or 'text'} {each.tokens / total:.1%}" for each in ordered)


def unused_told(sources: Sequence[TextSource]) -> str:
    """How many documents were empty and how many records could not be used; "" for none."""
    empty = sum(source.empty for source in sources)
    skipped = sum(source.skipped for source in sources)
    parts = [plural(empty, "empty document")] if empty else []
    parts += [f"{plural(skipped, 'bad record')} skipped"] if skipped else []
    return ", ".join(parts)


def left_out_told(left_out: Sequence[LeftOut]) -> str:
    """The chunks that do not count and why, the first few by number."""
    first = ", ".join(f"{one.chunk} ({one.weight})" for one in left_out[:3])
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f"{plural(len(left_out), 'chunk')} with NaN or infinite activations: {first}{more}"


def _table(part: str, found: list[Line]) -> Table:
    several = any(line.n_weights > 1 for line in found)
    gaps = any(line.unseen for line in found)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(part, no_wrap=True, overflow="ellipsis", min_width=24)
    if several:
        table.add_column("weights", justify="right")
    for heading in ("n_in", "n_mat", "rows", *(["no rows"] if gaps else []), "mean", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in found:
        table.add_row(
            Text(line.name),
            *([str(line.n_weights)] if several else []),
            _ranged(line.n_in),
            _ranged(line.n_mat),
            _ranged(line.rows),
            *([Text(str(line.unseen or ""), "yellow")] if gaps else []),
            "" if line.mean is None else f"{line.mean:.4g}",
            "" if line.peak is None else f"{line.peak:.1f}",
        )
    return table


def _ranged(values: tuple[int, int]) -> str:
    low, high = values
    return str(low) if low == high else f"{low}-{high}"
