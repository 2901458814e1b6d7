"""Coverage: would this model, with this matrix, quantize to that type? Answered in seconds.

Nothing is quantized and no weight is read. The types come from a dry run of the engine's own
quantizer, which is the code of a real run up to the point where weights are read; what a real run
would then say to each tensor is restated here, from the main loop of llama_model_quantize_impl in
src/llama-quant.cpp. Weights that hold a NaN, or a disk that fills up, show only in the real run.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from imatrix.entries import THIN, Entry
from imatrix.errors import EngineError, ModelError
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.architectures import check_head, check_trunk, check_whole
from imatrix.model.header import ModelFile
from imatrix.native import engine, quantizer
from imatrix.quantization.adaptation import Placed, adapt
from imatrix.quantization.rehearsal import rehearse_quantize
from imatrix.quantization.rules import Rule, RuleUse, TensorTypes, near, request, rules_of, uses
from imatrix.quantization.types import FTYPES, UNASKED
from imatrix.tensors import apart_expert, block_of, n_entry_values, n_values

if TYPE_CHECKING:
    from imatrix.engine.plan import Plan

__all__ = ["THIN", "Coverage", "Cure", "Status", "TensorCoverage", "coverage", "describe_stop"]


def describe_stop(tensor: TensorCoverage, found: Coverage) -> str:
    """Why a tensor stops the quantizer, in a few words."""
    words: dict[str, str] = {
        "missing": "no data" if found.has_matrix else "no matrix",
        "wrong size": "an entry of another size",
        "requantize": "quantized already",
    }
    word = words.get(tensor.status, tensor.status)
    never = "no run can reach it" if tensor.collectable is False else ""
    return "; ".join(part for part in (word, tensor.detail, never) if part)


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

Cure = Literal[
    "",
    "collect",
    "collect the head",
    "collect the output",
    "adapt",
    "merge",
    "another type",
    "find out",
]

# Statuses that stop the quantizer.
_STOPS: frozenset[Status] = frozenset({"missing", "wrong size", "requantize", "not convertible"})

# Types that tensor_requires_imatrix in src/llama-quant.cpp refuses to make without data, and
# q2_K if the file type is Q2_K_S. It never asks for token_embd, per_layer_token_embd and output.
_ASKING = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})

# Types whose quantizer takes importance data and leaves them aside (ggml-quants.c,
# ggml_quantize_chunk in ggml.c).
_INDIFFERENT = frozenset(
    {"f32", "f16", "bf16", "q8_0", "q1_0", "q2_0", "tq1_0", "tq2_0", "mxfp4", "nvfp4"}
)

_COLLECT: tuple[Cure, ...] = ("collect", "collect the head", "collect the output")

# What adapt() does for a weight, in a few words.
_HOW = {
    "stacked": "the experts are apart there and merged here",
    "cut": "the experts are merged there and apart here",
    "fused": "weights are apart there and fused here",
    "split": "weights are fused there and apart here",
    "shared": "gate and up take the same rows",
}

# The smallest type that is common, needs no data, and falls back by itself where rows are no
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


@dataclass(frozen=True)
class Coverage:
    """What a quantization would do to every tensor, and whether it would finish.

    Attributes:
        model: the model file.
        architecture: its general.architecture.
        ftype: the type asked for, in upper case.
        has_matrix: whether there is a matrix.
        tensors: every tensor, in the quantizer's order.
        failing: the tensors that would stop it, in the order in which it would come upon them:
            the first is the one that its error names.
        unused: entries of the matrix that belong to no tensor of the model.
        overrides: pattern -> type that lets every missing tensor pass without data, to be put in
            front of the given tensor_types (tried in a dry run). They help no other failure.
        fixes: what to do, in words, most to the point first; the first ones are for what fails.
        rules: what came of each of the given tensor_types, in order.
        warnings: options that do nothing or not all that they say, in words.
        n_values: values in all tensors.
    """

    model: Path
    architecture: str
    ftype: str
    has_matrix: bool
    tensors: tuple[TensorCoverage, ...]
    failing: tuple[TensorCoverage, ...]
    unused: tuple[str, ...]
    overrides: Mapping[str, str]
    fixes: tuple[str, ...]
    n_values: int = field(repr=False)
    rules: tuple[RuleUse, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the quantizer would finish."""
        return not self.failing

    @property
    def missing(self) -> tuple[TensorCoverage, ...]:
        """Tensors that need data and have none."""
        return self._with("missing")

    @property
    def without_data(self) -> tuple[TensorCoverage, ...]:
        """Tensors that would be quantized without data, those that use none included."""
        return self._with("without data")

    @property
    def partial(self) -> tuple[TensorCoverage, ...]:
        """Tensors of which a part saw few rows or none."""
        return self._with("partial")

    @property
    def wrong_size(self) -> tuple[TensorCoverage, ...]:
        """Tensors whose entry has another size."""
        return self._with("wrong size")

    @property
    def trunk(self) -> tuple[TensorCoverage, ...]:
        """Tensors outside the MTP head."""
        return tuple(tensor for tensor in self.tensors if not tensor.in_head)

    @property
    def head(self) -> tuple[TensorCoverage, ...]:
        """Tensors of the MTP head."""
        return tuple(tensor for tensor in self.tensors if tensor.in_head)

    @property
    def source_bytes(self) -> int:
        """Bytes of tensor data in the model."""
        return sum(tensor.source_bytes for tensor in self.tensors)

    @property
    def target_bytes(self) -> int:
        """Bytes of tensor data in the result."""
        return sum(tensor.target_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the result's tensor data, metadata not counted."""
        return 8 * self.target_bytes / self.n_values

    def _with(self, status: Status) -> tuple[TensorCoverage, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.status == status)


def coverage(
    model: str | os.PathLike[str],
    matrix: ImportanceMatrix | str | os.PathLike[str] | None,
    ftype: str,
    *,
    tensor_types: TensorTypes | None = None,
    allow_requantize: bool = False,
    pure: bool = False,
    quantize_output: bool = True,
    plan: Plan | None = None,
    matrix_name: str | os.PathLike[str] | None = None,
) -> Coverage:
    """Find out what quantizing a model would do, without doing it.

    The verdict is llama-quantize's, given the same options and the matrix as a file; with
    `tensor_types` for F32, F16 or BF16, which it passes over, that of imatrix.quantize.

    Args:
        model: the model, or the first part of a multi-part one.
        matrix: importance data, or the path of a file that holds them; None for none.
        ftype: one of llama-quantize's names, such as "IQ2_XXS", in any case.
        tensor_types: exceptions, as imatrix.quantize takes them.
        allow_requantize, pure, quantize_output: as imatrix.quantize takes them.
        plan: from Collector.plan(mtp=True), for the weights that no run can reach; without it
            only those are known that the header gives away.
        matrix_name: what the commands in `fixes` call the matrix; its path if `matrix` is one.

    Raises:
        ValueError: an unknown type or a bad pattern.
        ModelError (a ValueError): `model` is not a model.
        FormatError (a ValueError): `matrix` is not an importance matrix.
        OSError: a file cannot be read.
        EngineError: the engine cannot give the tensors types at all.
    """
    name = ftype.upper()
    if name not in FTYPES:
        raise ValueError(
            f"unknown type {ftype!r}{near(name, FTYPES)}. Types: {', '.join(sorted(FTYPES))}"
        )
    file = ModelFile.read(model)
    check_whole(file)
    rehearse_quantize(file)
    if isinstance(matrix, (str, os.PathLike)):
        matrix_name = matrix_name or matrix
        matrix = ImportanceMatrix.load(matrix)
    rules = rules_of(tensor_types)
    check = _Check(
        file,
        matrix if matrix else None,  # llama-quantize takes one without entries for none
        name,
        rules,
        allow_requantize,
        pure,
        quantize_output,
        plan,
        "MATRIX.gguf" if matrix_name is None else os.fspath(matrix_name),
    )
    tensors = check.tensors({})
    failing = _in_order(tensors, check.matrix is not None)
    overrides = check.overrides(tensors)
    used = check.uses(tensors)
    unused = tuple(entry for entry in check.matrix or () if entry not in file.tensors)
    return Coverage(
        model=file.path,
        architecture=file.architecture,
        ftype=name,
        has_matrix=check.matrix is not None,
        tensors=tensors,
        failing=failing,
        unused=unused,
        overrides=overrides,
        fixes=tuple(check.fixes(tensors, overrides, unused)),
        n_values=sum(n_values(shape) for shape in file.tensors.values()),
        rules=used,
        warnings=tuple(check.warnings(used)),
    )


def _in_order(tensors: Sequence[TensorCoverage], has_matrix: bool) -> tuple[TensorCoverage, ...]:
    """The failing tensors as the engine comes upon them.

    It works tensor by tensor, but without any matrix looks through all of them for one that it
    would ask data for, before it starts.
    """
    failing = [tensor for tensor in tensors if tensor.status in _STOPS]
    if not has_matrix:
        failing.sort(key=lambda tensor: tensor.status != "missing" or tensor.name in UNASKED)
    return tuple(failing)


class _Check:
    """One question to the engine, with what the answer is read by."""

    def __init__(
        self,
        file: ModelFile,
        matrix: ImportanceMatrix | None,
        ftype: str,
        rules: tuple[Rule, ...],
        allow_requantize: bool,
        pure: bool,
        quantize_output: bool,
        plan: Plan | None,
        matrix_name: str,
    ) -> None:
        self.file = file
        self.matrix = matrix
        self._ftype = ftype
        self._rules = rules
        self._allow_requantize = allow_requantize
        self._pure = pure
        self._quantize_output = quantize_output
        self._plan = plan
        self._matrix_name = matrix_name
        self._blocks = quantizer.type_blocks()
        self._convertible = quantizer.tensor_types()
        self._head_refused = _refusal(file)
        # what gives the logits, and process_output collects; tied: the token embedding
        self._lm_head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
        # whether the matrix has data of the trunk, of the head
        self._covered = {self._in_head(name) for name in matrix or () if name in file.tensors}
        # no graph of the engine runs the experts of old conversions any more
        self._experts_apart = any(apart_expert(name) for name in file.tensors)

    def _dry_run(self, ftype: str, pure: bool, rules: Sequence[Rule]) -> list[tuple[str, str, str]]:
        """(name, source type, target type) of every tensor."""
        engine.set_log_level()  # so that the binding finds the package's log to hand on to
        asked = request(ftype, rules)
        try:
            return quantizer.dry_run(
                str(self.file.path),
                ftype=FTYPES[asked.ftype],
                pure=pure,
                quantize_output=self._quantize_output,
                has_matrix=self.matrix is not None,
                tensor_types=asked.rules,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("failed to quantize: ")[2].strip() or str(error)
            raise EngineError(f"{self.file.path}: cannot quantize to {ftype}: {reason}") from None

    def tensors(self, extra: Mapping[str, str]) -> tuple[TensorCoverage, ...]:
        """Every tensor, with `extra` in front of the given exceptions."""
        rules = (*rules_of(extra), *self._rules)
        assigned = self._dry_run(self._ftype, self._pure, rules)
        asked = self._asked_unconverted(assigned)
        return tuple(
            self._tensor(name, source, target, name in asked) for name, source, target in assigned
        )

    def _asked_unconverted(self, assigned: Iterable[tuple[str, str, str]]) -> frozenset[str]:
        """Tensors that are of the target type already and that data are asked for all the same.

        Only where there is no matrix at all: the engine then asks before it knows that it would
        copy them. It asks for those that it may quantize, which shows with another type.
        """
        same = {
            name
            for name, source, target in assigned
            if source == target and self._asks(name, target)
        }
        if self.matrix is not None or not same:
            return frozenset()
        return frozenset(
            name
            for name, source, target in self._dry_run("Q8_0", True, ())
            if name in same and source != target
        )

    def _asks(self, name: str, target: str) -> bool:
        if name in UNASKED:
            return False
        return target in _ASKING or (target == "q2_K" and self._ftype == "Q2_K_S")

    def uses(self, tensors: Sequence[TensorCoverage]) -> tuple[RuleUse, ...]:
        """What came of the given exceptions."""
        if not self._rules:
            return ()
        # what the quantizer may change gets the type, whichever it is
        f16, f32 = (self._dry_run(ftype, False, ()) for ftype in ("F16", "F32"))
        other = {name: target for name, _, target in f16}
        quantized = frozenset(name for name, _, target in f32 if target != other[name])
        shapes = {tensor.name: self.file.tensors[tensor.name] for tensor in tensors}
        targets = {tensor.name: tensor.target_type for tensor in tensors}
        return uses(self._rules, shapes, targets, quantized)

    def warnings(self, used: Sequence[RuleUse]) -> Iterable[str]:
        """Options that do not do what they say."""
        yield from (use.warning for use in used if use.warning)
        if not self._quantize_output and "output.weight" not in self.file.tensors:
            yield (
                "there is no output.weight to leave as it is: the model's output is "
                "token_embd.weight, which is quantized"
            )

    def _tensor(self, name: str, source: str, target: str, asked: bool) -> TensorCoverage:
        shape = self.file.tensors[name]
        converted = source != target
        entry = self.matrix.get(name) if self.matrix is not None else None
        asks = self._asks(name, target)
        needs = asks or (name in UNASKED and self._convertible.get(target, (0, False))[1])
        status, detail = self._status(name, source, target, entry, asks, needs)
        if not converted:
            status, detail = ("missing", detail) if asked else ("kept", "")
        counts = np.zeros(0, np.int64) if entry is None else entry.counts
        seen = np.flatnonzero(counts)
        least = None
        if len(seen):
            expert = int(seen[np.argmin(counts[seen])])
            least = (expert, int(counts[expert]))
        collectable = self._collectable(name)
        return TensorCoverage(
            name=name,
            source_type=source,
            target_type=target,
            source_bytes=self._bytes(shape, source),
            target_bytes=self._bytes(shape, target),
            in_head=self._in_head(name),
            needs_data=(converted or asked) and needs,
            uses_data=converted and target not in _INDIFFERENT,
            status=status,
            n_counts=len(counts),
            n_empty=len(counts) - len(seen),
            n_thin=int(np.count_nonzero(counts[seen] < THIN)),
            thinnest=least,
            collectable=collectable,
            detail=detail,
            cure=self._cure(name, collectable) if status == "missing" else "",
        )

    def _status(
        self, name: str, source: str, target: str, entry: Entry | None, asks: bool, needs: bool
    ) -> tuple[Status, str]:
        """Of a tensor that is converted; the order is the engine's."""
        expected = n_entry_values(self.file.tensors[name])
        other_size = ""
        if entry is not None and entry.sums.size != expected:
            other_size = f"the entry has {entry.sums.size} values, the weight needs {expected}"
            if name not in UNASKED[:2]:
                return "wrong size", other_size
            entry = None  # passed over for embeddings only
            other_size += "; ignored"
        if entry is None and asks:
            return "missing", ""
        if self._blocks[source][0] > 1 and not self._allow_requantize:
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

    def _in_head(self, name: str) -> bool:
        block = block_of(name)
        if block is None:
            return name.startswith("nextn.")
        return block >= self.file.n_trunk and self.file.n_nextn > 0

    def _collectable(self, name: str) -> bool | None:
        if self._plan is not None and name.startswith("blk."):
            return name in self._plan.trunk or name in self._plan.head
        if ".nextn.embed_tokens." in name:
            return False  # rows are looked up in it
        if self._in_head(name) and self._head_refused:
            return False
        return None

    def _cure(self, name: str, collectable: bool | None) -> Cure:
        """What gives a tensor the data that it lacks."""
        if name in self._adapted:
            return "adapt"
        if name == self._lm_head:
            return "merge" if self._experts_apart else "collect the output"
        if name in UNASKED[:2] or collectable is False:
            return "another type"
        if not name.startswith(("blk.", "nextn.")):  # is_wanted in ext/eval_hook.cpp
            return "another type"
        in_head = self._in_head(name)
        if self._experts_apart:
            return "merge"
        if collectable is None and in_head in self._covered:
            # a run that had everything else of this part may have had this one
            return "find out" if self._plan is None else "another type"
        return "collect the head" if in_head else "collect"

    @cached_property
    def _adapted(self) -> Mapping[str, Placed]:
        """What adapt() would give data to, beyond what has them."""
        if self.matrix is None:
            return {}
        try:
            found = adapt(self.matrix, self.file)
        except ValueError:  # of another model
            return {}
        return {place.name: place for place in found.changed}

    def overrides(self, tensors: Sequence[TensorCoverage]) -> dict[str, str]:
        """Exceptions that let what lacks data pass without.

        An exception takes its tensor out of the counting that the mixture goes by, which may
        move others: hence again until none is missing.
        """
        extra: dict[str, str] = {}
        for _ in range(8):
            new = self._safe([t for t in tensors if t.status == "missing"])
            if not new or new.keys() <= extra.keys():
                break
            extra.update(new)
            tensors = self.tensors(extra)
        return extra

    def fixes(
        self,
        tensors: Sequence[TensorCoverage],
        overrides: Mapping[str, str],
        unused: Sequence[str],
    ) -> Iterable[str]:
        """What to do, the cure before the workaround."""
        if self.matrix is not None and len(unused) == len(self.matrix):
            yield (
                "No entry of the matrix names a tensor of this model: was it collected from "
                "another one?"
            )
        if any(tensor.status == "wrong size" for tensor in tensors):
            yield (
                "Entries of another size come from another model: collect from this one "
                f"({self._collect(self.file.n_nextn > 0 and self._head_refused is None)})."
            )
        yield from self._missing_fixes([t for t in tensors if t.status == "missing"], overrides)
        if any(tensor.status == "requantize" for tensor in tensors):
            yield (
                "The model is quantized already: start from its F16 or BF16 file, or accept the "
                "loss with --allow-requantize."
            )
        if unseen := [t for t in tensors if t.status == "partial" and t.n_empty]:
            most = max(t.n_empty for t in unseen)
            yield (
                f"{_plural(len(unseen), 'tensor')} with parts that saw no rows (at most "
                f"{_plural(most, 'expert')} each): the quantizer weighs their columns all the "
                "same (1.0). More or more varied text may reach them."
            )
        elif any(tensor.status == "partial" for tensor in tensors):
            yield f"Parts of tensors saw fewer than {THIN} rows: more text gives a steadier mean."

    def _missing_fixes(
        self, missing: Sequence[TensorCoverage], overrides: Mapping[str, str]
    ) -> Iterable[str]:
        by_cure: dict[Cure, list[TensorCoverage]] = {}
        for tensor in missing:
            by_cure.setdefault(tensor.cure, []).append(tensor)
        collect = [t for cure in _COLLECT for t in by_cure.get(cure, ())]
        adaptable = by_cure.get("adapt", [])
        merge = by_cure.get("merge", [])
        never = by_cure.get("another type", [])
        unknown = by_cure.get("find out", [])
        if collect:  # from this model, which makes up for what could be adapted too
            yield self._collect_fix(collect)
        elif adaptable:
            steps = [step for t in adaptable for step in self._adapted[t.name].steps]
            how = ", ".join(dict.fromkeys(_HOW[step] for step in steps))
            yield (
                f"The matrix has the data of {_plural(len(adaptable), 'tensor')} in another form "
                f"({how}): {self._adapt_command(self._matrix_name)}"
            )
        if merge:
            yield (
                f"The engine runs no model whose experts are apart ({_plural(len(merge), 'tensor')} "
                "without data): collect from a conversion that has them merged, then adapt: "
                f"{self._adapt_command('MERGED-MATRIX.gguf')}"
            )
        if self._head_refused and any(t.in_head for t in never):
            yield f"The head cannot be collected: {self._head_refused}"
        if never:
            even_then = " even then" if collect or adaptable or merge else ""
            why = ", ".join(dict.fromkeys(self._why_never(t) for t in never))
            yield self._with_paste(
                f"No run collects data for {_plural(len(never), 'tensor')}{even_then} ({why}): "
                "use a type that needs none",
                never,
            )
        if unknown:
            which = "is" if len(unknown) == 1 else "are"
            yield self._with_paste(
                f"{_plural(len(unknown), 'tensor')} of a part that the matrix covers {which} not "
                "in it. A type that needs no data lets such pass",
                unknown,
            )
            yield (
                "Whether a run reaches them, so that collecting again is better: "
                f"{self._check_command()} --plan"
            )
        # a whole model is not spelled out
        if (collect or adaptable or merge) and (self.matrix is not None or len(overrides) <= 16):
            yield self._with_paste("Or quantize without the data, at a loss", missing, overrides)

    def _collect_fix(self, tensors: Sequence[TensorCoverage]) -> str:
        """One command that collects them, and all that the matrix has already."""
        head = self._head_refused is None and any(t.in_head for t in tensors)
        output = any(t.name == self._lm_head for t in tensors)
        command = self._collect(
            head or (self._head_refused is None and True in self._covered),
            output or self._lm_head in (self.matrix or ()),
        )
        if all(t.name == self._lm_head for t in tensors):
            return f"Collect {self._lm_head} too: {command}"
        part = "the head's weights" if all(t.in_head for t in tensors) else "the data"
        return f"Collect {part}{' with --mtp' if head else ''}: {command}"

    def _why_never(self, tensor: TensorCoverage) -> str:
        if tensor.name in UNASKED[:2] or ".nextn.embed_tokens." in tensor.name:
            return "rows are looked up in a table"
        if tensor.in_head and self._head_refused:
            return "the head cannot be run"
        if tensor.collectable is False:
            return "no graph multiplies it"
        return "it is collected for blk.* and output.weight alone"

    def _safe(self, tensors: Iterable[TensorCoverage]) -> dict[str, str]:
        """Exceptions that give each of the tensors a type that needs no data."""
        return {_pattern(t.name, self.file.tensors): _SAFE for t in tensors}

    def _with_paste(
        self,
        words: str,
        tensors: Sequence[TensorCoverage],
        overrides: Mapping[str, str] | None = None,
    ) -> str:
        """Words, and the exceptions to paste, then those that were given: the first counts."""
        types = self._safe(tensors) if overrides is None else dict(overrides)
        if self._rules:
            words += " (instead of the rules given, which are in it)"
        pairs = [*types.items(), *((r.pattern, r.type) for r in self._rules)]
        lines = (f"--tensor-type {shlex.quote(f'{p}={t}')}" for p, t in pairs)
        return f"{words}:\n" + " \\\n".join(lines)

    def _collect(self, mtp: bool, process_output: bool = False) -> str:
        path = shlex.quote(str(self.file.path))
        try:
            check_trunk(self.file)
        except ModelError:  # a head's own file
            command = f"imatrix collect -m TRUNK.gguf --mtp-model {path} -f TEXT"
        else:
            command = f"imatrix collect -m {path} -f TEXT" + (" --mtp" if mtp else "")
        return command + (" --process-output" if process_output else "")

    def _adapt_command(self, matrix: str) -> str:
        model = shlex.quote(str(self.file.path))
        return f"imatrix adapt {shlex.quote(matrix)} --to {model} -o adapted.gguf"

    def _check_command(self) -> str:
        """This check, as a command."""
        words = ["imatrix", "check", str(self.file.path)]
        if self.matrix is not None:
            words.append(self._matrix_name)
        words += ["--type", self._ftype]
        words += ["--pure"] * self._pure + ["--allow-requantize"] * self._allow_requantize
        words += ["--leave-output-tensor"] * (not self._quantize_output)
        for rule in self._rules:
            words += ["--tensor-type", f"{rule.pattern}={rule.type}"]
        return shlex.join(words)


def _refusal(file: ModelFile) -> str | None:
    """Why the head cannot be collected; None if it can, or there is none."""
    if file.n_nextn == 0:
        return None
    try:
        check_head(file)
    except ModelError as error:
        return str(error)
    return None


def _pattern(name: str, others: Iterable[str]) -> str:
    """A regular expression for one tensor that needs no quotes in a shell.

    llama-quantize searches for it anywhere in the name and lowers it before (parse_tensor_type in
    tools/quantize/quantize.cpp). A dot stands for itself well enough; "output.weight" alone would
    mean attn_output.weight too.
    """
    pattern = re.sub(r"[^a-z0-9_.]", ".", name)
    alone = name.startswith("blk.") and not any(name in other for other in others if other != name)
    return pattern if alone else f"^{pattern}"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
