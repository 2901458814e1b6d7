"""An importance matrix at a glance: figures by weight or kind of weight, and facts in a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from imatrix.entries import Entry, LeftOut, TextSource
from imatrix.formats import Format
from imatrix.matrix.experts import experts
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.tensors import name_in_block
from imatrix.words import few, plural

__all__ = [
    "Line",
    "as_data",
    "describe_left_out",
    "describe_sources",
    "describe_unused",
    "describe_weights",
    "lines",
]


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


def lines(matrix: ImportanceMatrix, *, every_weight: bool = False) -> list[Line]:
    """A line a weight, or one a kind of weight ("blk.*.attn_q.weight")."""
    groups: dict[str, list[str]] = {}
    for name in matrix:
        kind = name if every_weight else name_in_block(name, "*") or name
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


def describe_weights(matrix: ImportanceMatrix) -> str:
    """How many weights: "42 weights: 29 trunk, 13 head (block 3)"."""
    text = f"{plural(len(matrix), 'weight')}: {len(matrix.trunk)} trunk, {len(matrix.head)} head"
    if blocks := sorted(matrix.head_blocks):
        text += f" (block {', '.join(map(str, blocks))})"
    return text


def as_data(matrix: ImportanceMatrix, file: str, form: Format = "gguf") -> dict[str, Any]:
    """What `imatrix show --json` prints: the facts, and every weight."""
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


def describe_sources(sources: Sequence[TextSource]) -> str:
    """The sources of a text and their shares of its tokens, the largest first."""
    total = sum(source.tokens for source in sources) or 1
    ordered = sorted(sources, key=lambda source: -source.tokens)
    return ", ".join(f"{each.name or 'text'} {each.tokens / total:.1%}" for each in ordered)


def describe_unused(sources: Sequence[TextSource]) -> str:
    """How many documents were empty and how many records could not be used; "" for none."""
    empty = sum(source.empty for source in sources)
    skipped = sum(source.skipped for source in sources)
    parts = [plural(empty, "empty document")] if empty else []
    parts += [f"{plural(skipped, 'bad record')} skipped"] if skipped else []
    return ", ".join(parts)


def describe_left_out(left_out: Sequence[LeftOut]) -> str:
    """The chunks that do not count and why, the first few by number."""
    first = few([f"{one.chunk} ({one.weight})" for one in left_out], 3)
    return f"{plural(len(left_out), 'chunk')} with NaN or infinite activations: {first}"
