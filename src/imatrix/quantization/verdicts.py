"""Decides what would become of each tensor, in the order in which the quantizer decides.

What a real run would say to each tensor is restated here, from the main loop of
llama_model_quantize_impl in src/llama-quant.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from imatrix.entries import THIN, Entry
from imatrix.native import quantizer
from imatrix.quantization.cures import Cure, Cures
from imatrix.quantization.question import Assigned, Question
from imatrix.quantization.rules import rules_of
from imatrix.quantization.types import ASKING, EMBEDDINGS, UNASKED
from imatrix.tensors import n_entry_values, n_values

__all__ = ["Status", "TensorCoverage", "Verdicts", "failing_in_order"]

Status = Literal[
    "ready",
    "partial",
    "without data",
    "missing",
    "wrong size",
    "requantize",
    "not convertible",
    "kept",
]

# Statuses that stop the quantizer.
_STOPS: frozenset[Status] = frozenset({"missing", "wrong size", "requantize", "not convertible"})

# Types whose quantizer takes importance data and leaves them aside (ggml-quants.c,
# ggml_quantize_chunk in ggml.c).
_INDIFFERENT = frozenset(
    {"f32", "f16", "bf16", "q8_0", "q1_0", "q2_0", "tq1_0", "tq2_0", "mxfp4", "nvfp4"}
)

# The smallest type that is common, needs no data, and falls back by itself if rows are no
# multiple of 256 long (tensor_type_fallback).
_SAFE = "q4_k"


@dataclass(frozen=True)
class TensorCoverage:
    """What would become of one tensor.

    Attributes:
        name: the tensor.
        source_type, target_type: ggml types, as the engine spells them ("f16", "iq2_xxs"); equal
            if the tensor is copied.
        source_bytes, target_bytes: size of its data.
        in_head: whether it belongs to the MTP/NextN head.
        needs_data: whether the engine makes the target type only with importance data.
        uses_data: whether data would change the result: False for types such as q8_0 and for
            tensors that are copied.
        status: "ready": quantized with data. "partial": with data, but an expert (or the whole
            weight) saw fewer than THIN rows. "without data": quantized without. "kept": copied as
            it is. The others stop the quantizer: "missing": it needs data and has none. "wrong
            size": its entry is of another size. "requantize": the source is quantized already.
            "not convertible": of a type that nothing reads.
        n_counts: counts of its entry: experts, or 1 for a dense weight; 0 without an entry.
        n_empty: counts that are 0.
        n_thin: counts from 1 to THIN - 1.
        thinnest: (expert, rows) of the lowest count above 0; None if there is none.
        collectable: whether a run can reach it; None: not known without a Plan.
        detail: a status in words, where it needs some; else "".
        cure: what gives a "missing" tensor data: "collect", with "the head" (mtp) or "the output"
            (process_output). "adapt": the matrix has them under another name or in another shape.
            "merge": experts apart, which no graph runs: collect from a conversion that has them
            merged, and adapt. "another type": no run collects data for it. "find out": the matrix
            has data for others of its part, and only a Plan tells whether a run reaches it.
    """

    name: str
    source_type: str
    target_type: str
    source_bytes: int
    target_bytes: int
    in_head: bool
    needs_data: bool
    uses_data: bool
    status: Status
    n_counts: int = 0
    n_empty: int = 0
    n_thin: int = 0
    thinnest: tuple[int, int] | None = None
    collectable: bool | None = None
    detail: str = ""
    cure: Cure = ""


def failing_in_order(
    tensors: Sequence[TensorCoverage], has_matrix: bool
) -> tuple[TensorCoverage, ...]:
    """The failing tensors in the order in which the engine comes upon them.

    The engine works tensor by tensor. Without any matrix it first looks through all of them for
    one that it would ask data for.
    """
    failing = [tensor for tensor in tensors if tensor.status in _STOPS]
    if not has_matrix:
        failing.sort(key=lambda tensor: tensor.status != "missing" or tensor.name in UNASKED)
    return tuple(failing)


class Verdicts:
    """The verdict on each tensor of a question."""

    def __init__(self, question: Question, cures: Cures) -> None:
        self._question = question
        self._cures = cures
        self._blocks = quantizer.type_blocks()
        self._convertible = quantizer.tensor_types()

    def tensors(self, extra: Mapping[str, str] | None = None) -> tuple[TensorCoverage, ...]:
        """Every tensor in the quantizer's order, with `extra` in front of the given exceptions."""
        assigned = self._question.assigned(rules_of(extra))
        asked = self._asked_unconverted(assigned)
        return tuple(self._tensor(each, each.name in asked) for each in assigned)

    def overrides(self, tensors: Sequence[TensorCoverage]) -> dict[str, str]:
        """Exceptions that let what lacks data pass without.

        An exception takes its tensor out of the counting that the mixture goes by, which may
        move others, so this is repeated until none is missing.
        """
        extra: dict[str, str] = {}
        for _ in range(8):
            new = self.safe_types(
                t.name
                for t in tensors
                # a rule does not count for the others
                if t.status == "missing" and self._question.options.named(t.name) is None
            )
            if not new or new.keys() <= extra.keys():
                break
            extra.update(new)
            tensors = self.tensors(extra)
        return extra

    def safe_types(self, names: Iterable[str]) -> dict[str, str]:
        """Exceptions that give each of the tensors a type that needs no data."""
        return {_pattern(name, self._question.file.tensors): _SAFE for name in names}

    def _asked_unconverted(self, assigned: Iterable[Assigned]) -> frozenset[str]:
        """Tensors that are of the target type already, and that data are asked for all the same.

        That happens only if there is no matrix at all: the engine then asks before it knows that
        it would copy them. It asks for those that it may quantize, which shows with another type.
        """
        same = frozenset(
            name
            for name, source, target in assigned
            if source == target and self._asks(name, target)
        )
        if self._question.matrix is not None or not same:
            return frozenset()
        return same & self._question.quantizable()

    def _asks(self, name: str, target: str) -> bool:
        """Whether the engine asks for data before it makes the type, and reports their lack."""
        if name in UNASKED:
            return False
        return target in ASKING or (target == "q2_K" and self._question.options.ftype == "Q2_K_S")

    def _tensor(self, assigned: Assigned, asked: bool) -> TensorCoverage:
        name, source, target = assigned
        question = self._question
        shape = question.file.tensors[name]
        converted = source != target
        entry = question.matrix.get(name) if question.matrix is not None else None
        asks = self._asks(name, target)
        needs = asks or (name in UNASKED and self._convertible.get(target, (0, False))[1])
        status, detail = self._status(assigned, entry, asks, needs)
        if not converted:
            status, detail = ("missing", detail) if asked else ("kept", "")
        counts = np.zeros(0, np.int64) if entry is None else entry.counts
        seen = np.flatnonzero(counts)
        least = None
        if len(seen):
            expert = int(seen[np.argmin(counts[seen])])
            least = (expert, int(counts[expert]))
        return TensorCoverage(
            name=name,
            source_type=source,
            target_type=target,
            source_bytes=self._bytes(shape, source),
            target_bytes=self._bytes(shape, target),
            in_head=question.file.in_head(name),
            needs_data=(converted or asked) and needs,
            uses_data=converted and target not in _INDIFFERENT,
            status=status,
            n_counts=len(counts),
            n_empty=len(counts) - len(seen),
            n_thin=int(np.count_nonzero(counts[seen] < THIN)),
            thinnest=least,
            collectable=self._cures.collectable(name),
            detail=detail,
            cure=self._cures.of(name) if status == "missing" else "",
        )

    def _status(
        self, assigned: Assigned, entry: Entry | None, asks: bool, needs: bool
    ) -> tuple[Status, str]:
        """The status of a tensor that is converted, and its detail. The order is the engine's."""
        name, source, target = assigned
        expected = n_entry_values(self._question.file.tensors[name])
        other_size = ""
        if entry is not None and entry.sums.size != expected:
            other_size = f"the entry has {entry.sums.size} values, the weight needs {expected}"
            if name not in EMBEDDINGS:
                return "wrong size", other_size
            entry = None  # passed over for embeddings only
            other_size += "; ignored"
        if entry is None and asks:
            return "missing", ""
        if self._blocks[source][0] > 1 and not self._question.options.allow_requantize:
            return "requantize", f"{source} already"
        if source not in self._convertible:
            return "not convertible", f"no values can be read from {source}"
        if entry is None and needs:
            # not an error message but GGML_ASSERT in ggml_quantize_chunk (ggml.c)
            return "missing", "the engine ends the process here"
        if entry is None:
            return "without data", other_size
        thin = int(entry.counts.min()) < THIN and target not in _INDIFFERENT
        return ("partial" if thin else "ready"), ""

    def _bytes(self, shape: tuple[int, ...], type_: str) -> int:
        values, size = self._blocks[type_]
        return n_values(shape) // values * size


def _pattern(name: str, others: Iterable[str]) -> str:
    """A regular expression for one tensor that needs no quotes in a shell.

    llama-quantize searches for it anywhere in the name and lowers it before (parse_tensor_type in
    tools/quantize/quantize.cpp). A dot stands for itself well enough; "output.weight" alone would
    mean attn_output.weight too.
    """
    pattern = re.sub(r"[^a-z0-9_.]", ".", name)
    alone = name.startswith("blk.") and not any(name in other for other in others if other != name)
    return pattern if alone else f"^{pattern}"
