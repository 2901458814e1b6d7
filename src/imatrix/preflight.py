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
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from imatrix import _quantize_pybind, _session
from imatrix._rehearsal import rehearse_quantize
from imatrix.architectures import check_head, check_trunk, check_whole
from imatrix.errors import EngineError, ModelError
from imatrix.matrix import THIN, Entry, ImportanceMatrix
from imatrix.model_file import ModelFile
from imatrix.quantizer import FTYPES, UNASKED, near, overrides_of

if TYPE_CHECKING:
    from imatrix.collector import Plan

__all__ = ["THIN", "Coverage", "Status", "TensorCoverage", "coverage"]

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

# Types that tensor_requires_imatrix in src/llama-quant.cpp refuses to make without data, and
# q2_K if the file type is Q2_K_S. It never asks for token_embd, per_layer_token_embd and output.
_ASKING = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})

# Types whose quantizer takes importance data and leaves them aside (ggml-quants.c,
# ggml_quantize_chunk in ggml.c).
_INDIFFERENT = frozenset(
    {"f32", "f16", "bf16", "q8_0", "q1_0", "q2_0", "tq1_0", "tq2_0", "mxfp4", "nvfp4"}
)

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
    tensor_types: Mapping[str, str] | None = None,
    allow_requantize: bool = False,
    pure: bool = False,
    quantize_output: bool = True,
    plan: Plan | None = None,
) -> Coverage:
    """Find out what quantizing a model would do, without doing it.

    The verdict is llama-quantize's, given the same options and the matrix as a file.

    Args:
        model: the model, or the first part of a multi-part one.
        matrix: importance data, or the path of a file that holds them; None for none.
        ftype: one of llama-quantize's names, such as "IQ2_XXS", in any case.
        tensor_types: exceptions, as imatrix.quantize takes them.
        allow_requantize, pure, quantize_output: as imatrix.quantize takes them.
        plan: from Collector.plan(mtp=True), for the weights that no run can reach; without it
            only those are known that the header gives away.

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
        matrix = ImportanceMatrix.load(matrix)
    check = _Check(
        file,
        matrix if matrix else None,  # llama-quantize takes one without entries for none
        name,
        tensor_types or {},
        allow_requantize,
        pure,
        quantize_output,
        plan,
    )
    tensors = check.tensors({})
    failing = _in_order(tensors, check.matrix is not None)
    overrides = check.overrides(tensors)
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
        n_values=sum(_values(shape) for shape in file.tensors.values()),
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
        tensor_types: Mapping[str, str],
        allow_requantize: bool,
        pure: bool,
        quantize_output: bool,
        plan: Plan | None,
    ) -> None:
        self.file = file
        self.matrix = matrix
        self._ftype = ftype
        self._tensor_types = tensor_types
        self._allow_requantize = allow_requantize
        self._pure = pure
        self._quantize_output = quantize_output
        self._plan = plan
        self._blocks = _quantize_pybind.type_blocks()
        self._convertible = _quantize_pybind.tensor_types()
        self._head_refused = _refusal(file)

    def _dry_run(
        self, ftype: str, pure: bool, tensor_types: Mapping[str, str]
    ) -> list[tuple[str, str, str]]:
        """(name, source type, target type) of every tensor."""
        _session.set_log_level()  # so that the binding finds the package's log to hand on to
        try:
            return _quantize_pybind.dry_run(
                str(self.file.path),
                ftype=FTYPES[ftype],
                pure=pure,
                quantize_output=self._quantize_output,
                has_matrix=self.matrix is not None,
                tensor_types=[(p, number) for p, (number, _) in overrides_of(tensor_types).items()],
            )
        except RuntimeError as error:
            reason = str(error).rpartition("failed to quantize: ")[2].strip() or str(error)
            if "regular expression" in reason:
                raise ValueError(f"a pattern in tensor_types is wrong: {reason}") from None
            raise EngineError(f"{self.file.path}: cannot quantize to {ftype}: {reason}") from None

    def tensors(self, extra: Mapping[str, str]) -> tuple[TensorCoverage, ...]:
        """Every tensor, with `extra` in front of the given exceptions."""
        types = {**extra, **{p: t for p, t in self._tensor_types.items() if p not in extra}}
        assigned = self._dry_run(self._ftype, self._pure, types)
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
            for name, source, target in self._dry_run("Q8_0", True, {})
            if name in same and source != target
        )

    def _asks(self, name: str, target: str) -> bool:
        if name in UNASKED:
            return False
        return target in _ASKING or (target == "q2_K" and self._ftype == "Q2_K_S")

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
            collectable=self._collectable(name),
            detail=detail,
        )

    def _status(
        self, name: str, source: str, target: str, entry: Entry | None, asks: bool, needs: bool
    ) -> tuple[Status, str]:
        """Of a tensor that is converted; the order is the engine's."""
        expected = _expected(self.file.tensors[name])
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
        return _values(shape) // values * size

    def _in_head(self, name: str) -> bool:
        block = re.match(r"blk\.(\d+)\.", name)
        if block is None:
            return name.startswith("nextn.")
        return int(block[1]) >= self.file.n_trunk and self.file.n_nextn > 0

    def _collectable(self, name: str) -> bool | None:
        if self._plan is not None and name.startswith("blk."):
            return name in self._plan.trunk or name in self._plan.head
        if ".nextn.embed_tokens." in name:
            return False  # rows are looked up in it
        if self._in_head(name) and self._head_refused:
            return False
        return None

    def overrides(self, tensors: Sequence[TensorCoverage]) -> dict[str, str]:
        """Exceptions that let what lacks data pass without.

        An exception takes its tensor out of the counting that the mixture goes by, which may
        move others: hence again until none is missing.
        """
        extra: dict[str, str] = {}
        for _ in range(8):
            new = {_pattern(t.name): _SAFE for t in tensors if t.status == "missing"}
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
                f"({self._collect(self.file.n_nextn > 0)})."
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
        if not missing:
            return
        never, reachable = [], []
        covered = {self._in_head(name) for name in self.matrix or () if name in self.file.tensors}
        for tensor in missing:
            # a run that had everything else of this part would have had this one
            skipped = tensor.collectable is None and tensor.in_head in covered
            if tensor.collectable is False or skipped or tensor.name in UNASKED[:2]:
                never.append(tensor)
            else:
                reachable.append(tensor)
        if reachable:
            part = "the head's weights" if all(t.in_head for t in reachable) else "the data"
            if all(t.name == "output.weight" for t in reachable):
                yield f"Collect output.weight too: {self._collect(False)} --process-output"
            else:
                mtp = any(t.in_head for t in reachable) and self._head_refused is None
                with_mtp = " with --mtp" if mtp else ""
                yield f"Collect {part}{with_mtp}: {self._collect(mtp)}"
        if self._head_refused and any(t.in_head for t in never):
            yield f"The head cannot be collected: {self._head_refused}"
        if never:
            also = "These stay without data even then: give them"
            alone = f"Give what no run reaches ({_plural(len(never), 'tensor')})"
            paste = self._paste({_pattern(tensor.name): _SAFE for tensor in never})
            yield f"{also if reachable else alone} a type that needs no data:\n{paste}"
        # a whole model is not spelled out
        if reachable and (self.matrix is not None or len(overrides) <= 16):
            yield f"Or quantize without the data, at a loss:\n{self._paste(overrides)}"

    def _paste(self, overrides: Mapping[str, str]) -> str:
        """The exceptions, then those that were given: the first match counts."""
        given = {p: t for p, t in self._tensor_types.items() if p not in overrides}
        types = {**overrides, **given}
        lines = (f"--tensor-type {shlex.quote(f'{p}={t}')}" for p, t in types.items())
        return " \\\n".join(lines)

    def _collect(self, mtp: bool) -> str:
        path = shlex.quote(str(self.file.path))
        try:
            check_trunk(self.file)
        except ModelError:  # a head's own file
            return f"imatrix collect -m TRUNK.gguf --mtp-model {path} -f TEXT"
        return f"imatrix collect -m {path} -f TEXT" + (" --mtp" if mtp else "")


def _refusal(file: ModelFile) -> str | None:
    """Why the head cannot be collected; None if it can, or there is none."""
    if file.n_nextn == 0:
        return None
    try:
        check_head(file)
    except ModelError as error:
        return str(error)
    return None


def _values(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _expected(shape: tuple[int, ...]) -> int:
    """Values that an entry must have: one a column and matrix (ne[0] * ne[2])."""
    n_in, _, n_mat = (*shape, 1, 1)[:3]
    return n_in * n_mat


def _pattern(name: str) -> str:
    """A regular expression for one tensor that needs no quotes in a shell.

    llama-quantize searches for it anywhere in the name and lowers it before (parse_tensor_type in
    tools/quantize/quantize.cpp). A dot stands for itself well enough; "output.weight" alone would
    mean attn_output.weight too.
    """
    pattern = re.sub(r"[^a-z0-9_.]", ".", name)
    return pattern if name.startswith("blk.") else f"^{pattern}"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
