"""A recipe for a size: measured, chosen, measured as a whole, and chosen again."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from imatrix.engine.placement import Overrides, Placement, SplitMode
from imatrix.engine.quantizing import open_quantizer
from imatrix.errors import ModelError
from imatrix.files.outputs import check_files
from imatrix.heads.drop import without_head
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.parts import model_inputs
from imatrix.model.raw import Tensor, Value
from imatrix.quantization.file_size import bytes_of
from imatrix.quantization.frontier import FrontierCurve, FrontierPoint
from imatrix.quantization.keys import matrix_keys
from imatrix.quantization.recipe import HeadChoice, Measured, Recipe
from imatrix.quantization.source import bytes_as, described, tensors_digest, type_name
from imatrix.recipes.groups import (
    Group,
    candidates_of,
    grouped,
    measured_types,
    quantizable,
    refuse_quantized,
    wanted_types,
)
from imatrix.recipes.head_table import HeadDecision, HeadTable
from imatrix.recipes.heads import (
    AS_IT_IS,
    HEAD_TYPES,
    Candidates,
    HeadFiles,
    HeadTrial,
    head_candidates,
)
from imatrix.recipes.measured import Measurement, Trial, identity_in, opened, standard_error
from imatrix.recipes.measuring import Bench, Measurer, RecipeProgress
from imatrix.recipes.options import RecipeOptions, Target, targets_of
from imatrix.recipes.refining import Refiner
from imatrix.tensors import n_values
from imatrix.text.chats import ChatOptions
from imatrix.text.cutting import TextFacts
from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import Texts
from imatrix.text.tokens import Packing
from imatrix.words import few, plural
from imatrix.words import size as describe_size

__all__ = ["Made", "make", "recipe"]

_log = logging.getLogger("imatrix")

# Tokens of a draft that the head's types are measured with, as evaluate() has it.
_DEPTH = 3
_FEW = 3

# Bits a weight of the file types as tools/quantize/quantize.cpp tells them; for those of which it tells
# the size of Llama-3-8B, that by its 8.03e9 weights.
_BITS = {
    **{"IQ1_S": 1.56, "IQ1_M": 1.75, "IQ2_XXS": 2.06, "IQ2_XS": 2.31, "IQ2_S": 2.5, "IQ2_M": 2.7},
    **{"IQ3_XXS": 3.06, "Q2_K": 3.17, "IQ3_XS": 3.3, "IQ3_S": 3.44, "Q3_K_S": 3.65, "IQ3_M": 3.66},
    **{"Q3_K_M": 4.0, "IQ4_XS": 4.25, "Q3_K_L": 4.31, "Q4_K_S": 4.67, "Q4_K_M": 4.9},
    **{"Q5_K_S": 5.57, "Q5_K_M": 5.7, "Q6_K": 6.57, "Q8_0": 8.5, "F16": 16.0},
}


def recipe(
    model: str | os.PathLike[str],
    matrix: ImportanceMatrix | str | os.PathLike[str] | None,
    texts: Texts,
    *,
    size: int | str | Sequence[int | str] | None = None,
    bpw: float | Sequence[float] | None = None,
    kl: float | Sequence[float] | None = None,
    effort: Literal["quick", "standard", "thorough"] = "standard",
    types: Sequence[str] | None = None,
    head: str = "auto",
    n_ctx: int = 512,
    max_chunks: int | None = None,
    skip_chunks: int = 0,
    parse_special: bool = False,
    packing: Packing = "stream",
    chat: ChatOptions | None = None,
    on_bad_record: OnBadRecord = "stop",
    n_gpu_layers: int | Literal["auto"] = "auto",
    split_mode: SplitMode = "layer",
    tensor_split: Sequence[float] | None = None,
    main_gpu: int = 0,
    devices: Sequence[str] | None = None,
    override_tensor: Overrides = (),
    cpu_moe: bool = False,
    n_cpu_moe: int = 0,
    n_threads: int | None = None,
    rehearse: bool = True,
    measured: str | os.PathLike[str] | None = None,
    restart: bool = False,
    progress: Callable[[RecipeProgress], object] | None = None,
) -> list[Recipe]:
    """Find out which tensor should get which type, so that the file keeps to a size and the model's
    output changes least.

    Each group of tensors is quantized alone in the loaded model, by the engine's quantizer with the
    matrix's data, and the KL divergence to the unchanged model is measured on a text. What other
    types would cost follows from their importance-weighted error. Then the choice is made, measured
    as a whole, corrected and made again. One measurement serves all sizes.

    Args:
        model: a GGUF model of F32, F16 or BF16, or the first part of a multi-part one.
        matrix: importance data, or the path of a file that holds them; None for none. Give imatrix.
            quantize the same, by the same path, or the file may differ from the size in its metadata.
        texts: what is measured on, as imatrix.evaluate takes it. Not the calibration's: a matrix
            that has seen it makes low types look better than they are. Text like that which the
            model is for.
        size: bytes of the whole file at most: a number, "12G", or several. See
            imatrix.recipes.options.parse_size.
        bpw: bits a weight at most, over the data of all tensors.
        kl: KL divergence to the unchanged model at most, in nats a token, as measured.
        effort: how much is measured; see docs/measuring-recipes.md.
        types: ggml types that may be used, such as ["q4_k", "q6_k"]; None for all that are offered.
        head: what an MTP head gets: "auto" for what its drafts are worth, "keep" for what the file
            has, "drop" for a recipe for the file without it, as imatrix.drop_mtp writes it, or a
            type, such as "q8_0". "auto" may come to drop it, if no type is shown to be worth it:
            the recipe's `head` and `model` say so.
        max_chunks: chunks of text; None for the effort's number.
        n_ctx, skip_chunks, parse_special, packing, chat, on_bad_record: as in imatrix.evaluate.
        n_gpu_layers, n_threads, rehearse: as in Collector. The model is read into memory, not mapped.
        split_mode, tensor_split, main_gpu, devices, override_tensor, cpu_moe, n_cpu_moe: likewise.
        measured: file that keeps what was measured, so that an interrupted run goes on from it and
            another size costs little.
        restart: do not go on from it.
        progress: called with a RecipeProgress, in this thread.

    Returns:
        A recipe for each size, bpw and kl, in that order.

    Raises:
        FileNotFoundError, OSError: a file cannot be read or written.
        ModelError (a ValueError): no model, or one that is quantized already.
        FormatError (a ValueError): `matrix` is not an importance matrix.
        CheckpointError (a ValueError): `measured` is of another measurement.
        ValueError: a bad argument, a size below or above what is possible, or too little text.
        NonFiniteError: NaN or infinite logits.
        EngineError, MemoryError: the engine cannot run the model.
        LockedError: another process writes `measured`.
        KeyboardInterrupt: Ctrl-C; what was measured is in `measured`.
    """
    options = RecipeOptions(
        model=model,
        targets=targets_of(size, bpw, kl),
        effort=effort,
        types=wanted_types(types),
        head=head,
        n_ctx=n_ctx,
        n_chunks=max_chunks,
        skip_chunks=skip_chunks,
        parse_special=parse_special,
        packing=packing,
        chat=chat,
        on_bad_record=on_bad_record,
        placement=Placement.of(
            split_mode=split_mode,
            tensor_split=tensor_split,
            main_gpu=main_gpu,
            devices=devices,
            override_tensor=override_tensor,
            cpu_moe=cpu_moe,
            n_cpu_moe=n_cpu_moe,
        ),
        n_gpu_layers=n_gpu_layers,
        n_threads=n_threads,
        rehearse=rehearse,
        measured=measured,
        restart=restart,
    )
    return list(make(options, matrix, texts, progress=progress).recipes)


@dataclass(frozen=True, kw_only=True)
class Made:
    """Recipes, and what they were made from.

    Attributes:
        recipes: one for each target.
        head_tables, decisions: of the head, one for each target; empty if it was not measured.
    """

    recipes: tuple[Recipe, ...]
    head_tables: tuple[HeadTable, ...] = ()
    decisions: tuple[HeadDecision, ...] = ()


def make(
    options: RecipeOptions,
    matrix: ImportanceMatrix | str | os.PathLike[str] | None,
    texts: Texts,
    *,
    progress: Callable[[RecipeProgress], object] | None = None,
) -> Made:
    """As recipe()."""
    named = [matrix] if isinstance(matrix, (str, os.PathLike)) else []
    if options.measured is not None:
        check_files(
            [options.measured, f"{os.fspath(options.measured)}.lock"],
            [*model_inputs(options.model), *named],
        )
    data = ImportanceMatrix.load(matrix) if isinstance(matrix, (str, os.PathLike)) else matrix
    with Bench(options, data) as bench:
        return _Making(options, bench, data, named[0] if named else None, texts, progress).made()


class _Making:
    """One call of make()."""

    def __init__(
        self,
        options: RecipeOptions,
        bench: Bench,
        matrix: ImportanceMatrix | None,
        matrix_path: str | os.PathLike[str] | None,
        texts: Texts,
        progress: Callable[[RecipeProgress], object] | None,
    ) -> None:
        self._options = options
        self._bench = bench
        self._matrix = matrix
        self._matrix_path = matrix_path
        self._texts = texts
        self._progress = progress
        self._facts = TextFacts.of(texts)
        header = bench.source.header
        self._with_head = header.n_nextn > 0
        whole = bench.source
        self._whole = _Layout(whole.path.name, whole.keys, tuple(whole.all()), header.head_blocks)

    def made(self) -> Made:
        """Measure and choose."""
        options, bench = self._options, self._bench
        path = bench.source.path
        changed = quantizable(path)
        self._in_head = {
            t.name: type_name(t.kind)
            for t in bench.source.all()
            if t.name in changed and bench.source.header.in_head(t.name)
        }
        refuse_quantized([t for t in bench.source.all() if t.name in changed], path)
        heads = self._head_candidates()
        self._load()
        groups, kept = self._groups(changed)
        self._check_possible(groups, kept, None if heads is None else heads[1])
        if told := bench.read(self._texts):
            warnings.warn(told, stacklevel=4)
        self._warn_of_own_text()
        there = {} if options.measured is None or options.restart else identity_in(options.measured)
        top = there.get("top")
        bench.choose_top(top if isinstance(top, int) else None)
        identity = {**bench.identity(_digest(self._matrix)), "depth": _DEPTH}
        measured = {group.name: measured_types(group, options.plan.measured) for group in groups}
        names = [name for group in groups for name in group.tensors]
        with opened(options.measured, identity, restart=options.restart) as measurement:
            bench.check_weights(names)
            measurer = Measurer(bench, measurement, self._progress)
            measurer.measure_groups(groups, measured)
            trials = {}
            if heads is not None and self._measures_head:
                trials = measurer.measure_head(heads[0], heads[1], _DEPTH)
            refiner = Refiner(
                measurer,
                groups,
                measured,
                rounds=options.plan.rounds,
                neighbours=options.plan.neighbours,
            )
            found = [
                self._recipe(target, refiner, groups, kept, heads, trials, measurement)
                for target in options.targets
            ]
            measurer.finish(names)
        return Made(
            recipes=tuple(each.recipe for each in found),
            head_tables=tuple(each.table for each in found if each.table is not None),
            decisions=tuple(each.decision for each in found if each.decision is not None),
        )

    # --- before it is measured -------------------------------------------------------------------

    @property
    def _measures_head(self) -> bool:
        return self._with_head and self._options.head == "auto"

    def _head_candidates(self) -> tuple[HeadFiles, Candidates] | None:
        """What the head may be; None if there is none or it stays as it is."""
        wanted = self._options.head
        if not self._with_head:
            if wanted not in ("auto", "keep"):
                raise ValueError(
                    f"head is {wanted!r} (--head), but {self._bench.source.path} has no MTP head"
                )
            return None
        if wanted in ("keep", "drop"):
            return None
        files = HeadFiles.read(self._options.model)
        with open_quantizer(False) as quantizer:
            if wanted == "auto":
                types = [
                    label
                    for label in HEAD_TYPES
                    if set(label.lower().split("+")) <= set(self._options.types)
                ]
                return files, head_candidates(files, self._matrix, quantizer, types)
            return files, head_candidates(files, self._matrix, quantizer, [wanted])

    def _groups(self, changed: frozenset[str]) -> tuple[tuple[Group, ...], dict[str, str]]:
        """The groups, and tensor -> type of those that the quantizer would change and that stay as
        they are."""
        options, source = self._options, self._bench.source
        loaded = self._bench.loaded_names()
        own = [t for t in source.all() if t.name in changed and not source.header.in_head(t.name)]
        decided = [tensor for tensor in own if tensor.name in loaded]
        if not decided:
            raise ValueError(f"{source.path}: the quantizer changes no weight that the trunk reads")
        found = candidates_of(decided, self._matrix, options.types)
        if found.without_data:
            names = few(found.without_data, _FEW)
            what = "there is no matrix" if self._matrix is None else "the matrix has no data of"
            warnings.warn(
                f"{what} {names if self._matrix is not None else ''}".rstrip()
                + f": {plural(len(found.without_data), 'tensor')} can get only types that need none",
                stacklevel=5,
            )
        groups = grouped(
            decided,
            found.types,
            n_trunk=source.header.n_trunk,
            apart=options.plan.apart,
        )
        kept = {t.name: type_name(t.kind) for t in own if t.name not in loaded}
        return groups, kept

    def _warn_of_own_text(self) -> None:
        """Warn if the text is what the matrix was collected from, as far as that is known."""
        matrix = self._matrix
        if matrix is None:
            return
        names = {Path(name).name for name in (*self._facts.datasets, *self._facts.names) if name}
        known = {Path(name).name for name in matrix.datasets if name}
        digest = ""
        if matrix.provenance is not None:
            known |= {Path(each.name).name for each in matrix.provenance.sources if each.name}
            digest = matrix.provenance.dataset_digest or ""
        text = hashlib.sha256(
            b"".join(chunk.astype("<i4").tobytes() for chunk in self._bench.chunks)
        )
        if names & known or (digest and text.hexdigest() == digest):
            named = f" ({few(sorted(names & known), _FEW)})" if names & known else ""
            warnings.warn(
                f"the text seems to be what the matrix was collected from{named}: types that follow "
                "its data look better on it than on other text. Take text that the matrix has not "
                "seen",
                stacklevel=5,
            )

    def _load(self) -> None:
        if not self._measures_head:
            self._bench.load(with_head=False)
            return
        try:
            self._bench.load(with_head=True)
        except ModelError as error:
            error.args = (
                f"{error}. If it is the head that cannot be run: name its type (head, --head TYPE), or "
                "leave it as it is (head='keep', --head keep), so that it is not measured",
            )
            raise

    def _check_possible(
        self, groups: Sequence[Group], kept: Mapping[str, str], candidates: Candidates | None
    ) -> None:
        """Refuse a target that no measurement can make possible.

        Raises:
            ValueError: it is below the smallest choice or above the model; with both ends.
        """
        heads: list[dict[str, str]] = [{}]
        if candidates is not None:
            heads = [dict(candidate.types) for candidate in candidates.offered]
        if not self._measures_head:
            heads = heads[-1:]
        least_of = {g.name: min(g.bytes, key=g.bytes.__getitem__) for g in groups}
        most_of = {group.name: group.source for group in groups}
        smaller = larger = self._whole
        if self._options.head == "drop":
            smaller = larger = self._dropped
        elif self._measures_head:
            smaller = self._dropped
        ends = [
            (smaller, self._all_types(least_of, groups, self._fixed(smaller, kept, heads[-1]))),
            (larger, self._all_types(most_of, groups, self._fixed(larger, kept, heads[0]))),
        ]
        for target in self._options.targets:
            if target.kind == "size":
                low, high = (self._file_bytes(layout, types) for layout, types in ends)
                if not low <= target.value <= high:
                    self._refuse(target, f"{_told(low)} to {_told(high)}", target.value < low)
            elif target.kind == "bpw":
                least, most = (layout.bits_per_weight(types) for layout, types in ends)
                if not least <= target.value <= most:
                    self._refuse(
                        target, f"{least:.4f} to {most:.4f} bits per weight", target.value < least
                    )

    def _refuse(self, target: Target, ends: str, below: bool) -> NoReturn:
        what = "below the smallest" if below else "above the largest"
        raise ValueError(
            f"{target} is {what} that a recipe can be for {self._bench.source.path.name} with these "
            f"types: {ends}"
        )

    # --- a target --------------------------------------------------------------------------------

    def _recipe(
        self,
        target: Target,
        refiner: Refiner,
        groups: Sequence[Group],
        kept: Mapping[str, str],
        heads: tuple[HeadFiles, Candidates] | None,
        trials: Mapping[str, HeadTrial],
        measurement: Measurement,
    ) -> _One:
        smallest, largest = refiner.frontier.smallest, refiner.frontier.largest
        head = self._head(target, refiner, groups, kept, heads, trials)
        layout = head.layout
        fixed = self._fixed(layout, kept, head.types)
        budget = self._budget(target, refiner, groups, layout, fixed)
        if budget is None:
            found = refiner.reaching(target.value)
        else:
            self._check_ends(target, layout, budget, smallest.bytes, largest.bytes)
            found = refiner.at_most(budget)
        types = self._all_types(found.types, groups, fixed)
        base = self._file_bytes(layout, types) - found.bytes
        points = refiner.frontier.points
        return _One(
            Recipe(
                architecture=self._bench.source.header.architecture,
                model=layout.name,
                tensors_digest=tensors_digest(described(layout.tensors)),
                source=described(layout.tensors),
                head_blocks=tuple(layout.head_blocks),
                types=types,
                ftype=_nearest_ftype(layout.bits_per_weight(types), self._matrix is not None),
                bytes=base + found.bytes,
                bits_per_weight=layout.bits_per_weight(types),
                predicted_kl=found.predicted,
                measured_kl=_measured(found.trial, measurement),
                head=head.choice,
                text=few([_short(name) for name in self._facts.datasets], _FEW),
                chunks=len(self._bench.chunks),
                n_ctx=self._options.n_ctx,
                frontier=FrontierCurve(
                    bytes=np.array([base + size for size, _ in points], np.int64),
                    kl=np.array([kl for _, kl in points]),
                    measured=tuple(
                        FrontierPoint(bytes=base + size, kl=max(0.0, kl), error=error)
                        for size, kl, error in found.points
                    ),
                    chosen=(base + found.bytes,),
                ),
            ),
            head.table,
            head.decision,
        )

    def _head(
        self,
        target: Target,
        refiner: Refiner,
        groups: Sequence[Group],
        kept: Mapping[str, str],
        heads: tuple[HeadFiles, Candidates] | None,
        trials: Mapping[str, HeadTrial],
    ) -> _Head:
        """What becomes of the head."""
        if not self._with_head:
            return _Head(self._whole, {})
        if self._options.head == "drop":
            return _Head(self._dropped, {}, HeadChoice(label="dropped", bytes=0))
        if heads is None:
            stored = sum(t.size for t in self._whole.tensors if t.block in self._whole.head_blocks)
            return _Head(self._whole, {}, HeadChoice(label=AS_IT_IS, bytes=stored))
        files, candidates = heads
        if not self._measures_head:
            candidate = candidates.offered[-1]
            choice = HeadChoice(label=candidate.label, bytes=candidate.bytes)
            return _Head(self._whole, candidate.types, choice)
        # The trunk's bytes decide the head's worth, and the head's bytes are not the trunk's: begin
        # with the smallest head, behind which the trunk is largest. If a head is not worth it there,
        # it is not behind any other. Then the trunk is the one beside the chosen head.
        smallest = min(candidates.offered, key=lambda candidate: candidate.bytes)
        table = HeadTable(
            files,
            candidates,
            trials,
            self._trunk_beside(smallest.types, target, refiner, groups, kept),
        )
        decision = table.choose("auto")
        if decision.candidate is not None:
            types = self._trunk_beside(decision.candidate.types, target, refiner, groups, kept)
            again = HeadTable(files, candidates, trials, types)
            if (confirmed := again.choose("auto")).candidate is not None:
                table, decision = again, confirmed
        row = decision.row
        choice = HeadChoice(label="dropped", bytes=0)
        if decision.candidate is not None and row is not None:
            choice = HeadChoice(
                label=row.label,
                bytes=row.bytes,
                accepted=row.accepted.value,
                accepted_low=row.accepted.low,
                accepted_high=row.accepted.high,
                depth=table.depth,
                speed_up=row.speed_up.value,
            )
            return _Head(self._whole, decision.candidate.types, choice, table, decision)
        return _Head(self._dropped, {}, choice, table, decision)

    def _trunk_beside(
        self,
        head_types: Mapping[str, str],
        target: Target,
        refiner: Refiner,
        groups: Sequence[Group],
        kept: Mapping[str, str],
    ) -> Mapping[str, str]:
        """The trunk's types for a target, if the head has these."""
        fixed = self._fixed(self._whole, kept, head_types)
        budget = self._budget(target, refiner, groups, self._whole, fixed)
        trunk = refiner.frontier.smallest
        if budget is None:
            trunk = refiner.frontier.reaching(target.value)
        elif budget >= trunk.bytes:
            trunk = refiner.frontier.at_most(budget)
        return refiner.tensors(trunk.types)

    @cached_property
    def _dropped(self) -> _Layout:
        """The file as imatrix drop-mtp writes it."""
        source = self._bench.source
        left = without_head(source)
        name = f"{source.path.stem}-no-mtp.gguf"  # as the head's decision calls it
        return _Layout(name, left.keys, tuple(left.tensors), ())

    def _fixed(
        self, layout: _Layout, kept: Mapping[str, str], head: Mapping[str, str]
    ) -> dict[str, str]:
        """Tensor -> type of all that is no group's: a recipe names every tensor that the quantizer
        changes."""
        if layout is not self._whole:
            return dict(kept)
        return {**kept, **self._in_head, **{name: kind.lower() for name, kind in head.items()}}

    def _budget(
        self,
        target: Target,
        refiner: Refiner,
        groups: Sequence[Group],
        layout: _Layout,
        fixed: Mapping[str, str],
    ) -> int | None:
        """Bytes that the groups may have together; None for a KL to reach."""
        if target.kind == "kl":
            return None
        smallest = refiner.frontier.smallest
        types = self._all_types(smallest.types, groups, fixed)
        if target.kind == "size":
            return int(target.value) - (self._file_bytes(layout, types) - smallest.bytes)
        rest = layout.data_bytes(types) - smallest.bytes
        return math.floor(target.value * layout.n_weights / 8) - rest

    def _check_ends(
        self, target: Target, layout: _Layout, budget: int, least: int, most: int
    ) -> None:
        """Refuse what is not possible.

        Raises:
            ValueError: it is below the smallest choice or above the model; with both ends.
        """
        if least <= budget <= most:
            return
        if target.kind == "size":
            # what is no group's data is the same in all
            rest = int(target.value) - budget
            self._refuse(target, f"{_told(least + rest)} to {_told(most + rest)}", budget < least)
        low, high = (
            target.value + 8 * (each - budget) / layout.n_weights for each in (least, most)
        )
        self._refuse(target, f"{low:.4f} to {high:.4f} bits per weight", budget < least)

    def _all_types(
        self, chosen: Mapping[str, str], groups: Sequence[Group], fixed: Mapping[str, str]
    ) -> dict[str, str]:
        """Tensor -> type of every tensor that the quantizer changes, in the file's order."""
        types = {name: chosen[group.name] for group in groups for name in group.tensors}
        types |= fixed
        return {name: types[name] for name in self._bench.source.tensors if name in types}

    def _file_bytes(self, layout: _Layout, types: Mapping[str, str]) -> int:
        keys = [] if self._matrix is None else matrix_keys(self._matrix, self._matrix_path)
        return bytes_of(layout.keys, layout.tensors, types, keys)


@dataclass(frozen=True)
class _Layout:
    """A file that a recipe is for: the model's, or what is left of it without its head.

    Attributes:
        name: of the file.
        keys, tensors: what it holds.
        head_blocks: numbers of the head's blocks.
    """

    name: str
    keys: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    head_blocks: Sequence[int]

    @property
    def n_weights(self) -> int:
        """Values of all tensors."""
        return sum(n_values(tensor.shape) for tensor in self.tensors)

    def data_bytes(self, types: Mapping[str, str]) -> int:
        """Bytes of the data of all tensors, without padding."""
        return sum(bytes_as(tensor, types) for tensor in self.tensors)

    def bits_per_weight(self, types: Mapping[str, str]) -> float:
        """Bits of the data of all tensors, over all weights."""
        return 8 * self.data_bytes(types) / self.n_weights


@dataclass(frozen=True)
class _Head:
    """What becomes of the head.

    Attributes:
        layout: the file that the recipe is for.
        types: tensor of the head -> type, of those that change.
        choice: as the recipe tells it; None without a head.
        table, decision: if it was measured.
    """

    layout: _Layout
    types: Mapping[str, str]
    choice: HeadChoice | None = None
    table: HeadTable | None = None
    decision: HeadDecision | None = None


def _short(name: str) -> str:
    """What a text is called, without the folders that it lies in."""
    return name if name.startswith("hf:") else Path(name).name


def _told(n_bytes: int) -> str:
    return f"{n_bytes} bytes ({describe_size(n_bytes)})"


def _nearest_ftype(bits: float, has_matrix: bool) -> str:
    """The file type whose bits a weight are nearest. Without a matrix it is none that
    llama-quantize asks a matrix for."""
    names = [name for name in _BITS if has_matrix or not name.startswith(("IQ1", "IQ2", "IQ3"))]
    return min(names, key=lambda name: abs(_BITS[name] - bits))


@dataclass(frozen=True)
class _One:
    """A recipe, and the head's table that it was made with."""

    recipe: Recipe
    table: HeadTable | None
    decision: HeadDecision | None


def _digest(matrix: ImportanceMatrix | None) -> str:
    """SHA-256 of what the quantizer reads of a matrix; "" for none."""
    if matrix is None:
        return ""
    digest = hashlib.sha256()
    with np.errstate(over="ignore"):
        for name, entry in matrix.items():
            data = entry.importance.astype("<f4").tobytes()
            digest.update(f"{name} {len(data)}\n".encode(errors="surrogateescape") + data)
    return digest.hexdigest()


def _measured(trial: Trial, measurement: Measurement) -> Measured:
    """The mean of a trial, and its standard error over the chunks, whose positions hang together."""
    positions = sum(measurement.positions)
    if not trial.types:
        return Measured(value=0.0, error=0.0, positions=positions)
    return Measured(value=measurement.mean(trial), error=standard_error(trial), positions=positions)
