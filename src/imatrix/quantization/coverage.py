"""Coverage: would this model, with this matrix, quantize to that type? Answered in seconds.

Nothing is quantized and no weight is read. Weights that hold a NaN, or a disk that fills up, show
only in the real run.

    question.py  reads: what is asked, and what the quantizer's dry run answers
    verdicts.py  decides what would become of each tensor
    cures.py     decides what gives a tensor the data that it lacks
    advice.py    says in words what to do
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imatrix.engine.plan import Plan
from imatrix.engine.quantizing import Quantizer, open_quantizer
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.architectures import check_whole
from imatrix.model.header import ModelFile
from imatrix.quantization.advice import Advice
from imatrix.quantization.cures import Cures
from imatrix.quantization.keys import Overrides
from imatrix.quantization.options import Options
from imatrix.quantization.question import Question
from imatrix.quantization.recipe import Recipe
from imatrix.quantization.rehearsal import rehearse_quantize
from imatrix.quantization.rules import RuleUse, TensorTypes, uses
from imatrix.quantization.verdicts import Status, TensorCoverage, Verdicts, failing_in_order
from imatrix.tensors import n_values

__all__ = ["Coverage", "coverage", "describe_stop", "examine"]


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
    ftype: str | None = None,
    *,
    tensor_types: TensorTypes | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    allow_requantize: bool = False,
    pure: bool = False,
    quantize_output: bool = True,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    override_kv: Overrides | None = None,
    keep_split: bool = False,
    isolate: bool = False,
    plan: Plan | None = None,
    matrix_name: str | os.PathLike[str] | None = None,
) -> Coverage:
    """Find out what quantizing a model would do, without doing it.

    The verdict is llama-quantize's, given the same options and the matrix as a file; with
    `tensor_types` for F32, F16 or BF16, which it passes over, that of imatrix.quantize.

    Args:
        model: the model, or the first part of a multi-part one.
        matrix: importance data, or the path of a file that holds them; None for none.
        ftype: one of llama-quantize's names, such as "IQ2_XXS", in any case; None for the recipe's.
        tensor_types: exceptions, as imatrix.quantize takes them.
        recipe: a recipe, as imatrix.quantize takes it.
        allow_requantize, pure, quantize_output: as imatrix.quantize takes them.
        output_tensor_type, token_embedding_type, override_kv, keep_split: likewise.
        isolate: run the engine's quantizer in a process of its own.
        plan: from Collector.plan(mtp=True), for the weights that no run can reach; without it
            only those are known that the header gives away.
        matrix_name: what the commands in `fixes` call the matrix; its path if `matrix` is one.

    Raises:
        ValueError: an unknown type, one whose blocks do not fit, a bad pattern, a key that the
            engine cannot take, or a recipe for another model.
        ModelError (a ValueError): `model` is not a model.
        FormatError (a ValueError): `matrix` is not an importance matrix, or `recipe` no recipe.
        OSError: a file cannot be read.
        EngineError: the engine cannot give the tensors types at all.
        EngineDiedError: with isolate=True, the process that ran the engine is gone.
    """
    options = Options.read(
        ftype,
        tensor_types=tensor_types,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        override_kv=override_kv,
        recipe=recipe,
        has_matrix=matrix is not None,
        allow_requantize=allow_requantize,
        pure=pure,
        quantize_output=quantize_output,
        keep_split=keep_split,
    )
    with open_quantizer(isolate) as quantizer:
        return examine(quantizer, model, matrix, options, plan=plan, matrix_name=matrix_name)


def examine(
    quantizer: Quantizer,
    model: str | os.PathLike[str],
    matrix: ImportanceMatrix | str | os.PathLike[str] | None,
    options: Options,
    *,
    plan: Plan | None = None,
    matrix_name: str | os.PathLike[str] | None = None,
) -> Coverage:
    """As coverage(), with a quantizer that may have a process of its own.

    Raises:
        EngineDiedError: that process is gone.
    """
    file = ModelFile.read(model)
    check_whole(file)
    options.check_rows(file.tensors)
    if options.recipe is not None:
        options.recipe.check_model(file)
    rehearse_quantize(file, options)
    if isinstance(matrix, (str, os.PathLike)):
        matrix_name = matrix_name or matrix
        matrix = ImportanceMatrix.load(matrix)
    question = Question(
        quantizer=quantizer,
        file=file,
        matrix=matrix or None,  # llama-quantize takes one without entries for none
        options=options,
        plan=plan,
        matrix_name="MATRIX.gguf" if matrix_name is None else os.fspath(matrix_name),
    )
    cures = Cures(question)
    verdicts = Verdicts(question, cures)
    tensors = verdicts.tensors()
    if options.recipe is not None:
        _check_followed(options.recipe, tensors, question.of_two_types())
    overrides = verdicts.overrides(tensors)
    used = _rule_uses(question, tensors)
    unused = tuple(entry for entry in question.matrix or () if entry not in file.tensors)
    advice = Advice(question, cures, verdicts)
    return Coverage(
        model=file.path,
        architecture=file.architecture,
        ftype=options.ftype,
        has_matrix=question.matrix is not None,
        tensors=tensors,
        failing=failing_in_order(tensors, question.matrix is not None),
        unused=unused,
        overrides=overrides,
        fixes=tuple(advice.fixes(tensors, overrides, unused)),
        n_values=sum(n_values(shape) for shape in file.tensors.values()),
        rules=used,
        warnings=tuple(_warnings(question, used)),
    )


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


def _rule_uses(question: Question, tensors: Sequence[TensorCoverage]) -> tuple[RuleUse, ...]:
    """What came of the given exceptions."""
    options = question.options
    if not options.rules or options.recipe is not None:  # each of a recipe's counts for its tensor
        return ()
    shapes = {tensor.name: question.file.tensors[tensor.name] for tensor in tensors}
    targets = {tensor.name: tensor.target_type for tensor in tensors}
    named = frozenset(name for name in shapes if options.named(name) is not None)
    return uses(options.rules, shapes, targets, question.of_two_types(), named)


def _check_followed(
    recipe: Recipe, tensors: Sequence[TensorCoverage], changeable: frozenset[str]
) -> None:
    """Refuse a recipe that would not be followed to the letter.

    Args:
        tensors: what would become of each.
        changeable: names of those that the quantizer can change.

    Raises:
        ValueError: the first tensor that the recipe leaves open, or that gets another type.
    """
    again = "make the recipe again (imatrix recipe)"
    for tensor in tensors:
        wanted = recipe.types.get(tensor.name)
        if wanted is None and tensor.name in changeable:
            raise ValueError(
                f"the recipe has no type for {tensor.name}, which the quantizer would change; {again}"
            )
        if wanted is not None and wanted != tensor.target_type.lower():
            raise ValueError(
                f"the recipe wants {wanted} for {tensor.name}, but this engine's quantizer makes "
                f"it {tensor.target_type}; {again}"
            )


def _warnings(question: Question, used: Sequence[RuleUse]) -> Iterable[str]:
    """Options that do not do what they say."""
    yield from (use.warning for use in used if use.warning)
    yield from question.options.idle(question.file.tensors)
