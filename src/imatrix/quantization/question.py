"""What coverage() is asked, and the answers of the engine's quantizer to it.

The types come from a dry run: the code of a real run, up to the point where weights are read.
Nothing is decided here; see verdicts.py and cures.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from imatrix.engine.plan import Plan
from imatrix.engine.quantizing import Choice, Quantizer
from imatrix.errors import EngineDiedError, EngineError, ModelError
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.architectures import check_head
from imatrix.model.header import ModelFile
from imatrix.quantization.options import Options
from imatrix.quantization.rules import Rule
from imatrix.tensors import apart_expert

__all__ = ["Assigned", "Question"]


class Assigned(NamedTuple):
    """The type that the quantizer would give a tensor."""

    name: str
    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """Would this model, with this matrix, quantize to that type?

    Attributes:
        quantizer: the engine's, which answers.
        file: the model.
        matrix: importance data; None if there are none.
        options: what else is asked for.
        plan: which weights a run can reach; None if it is not known.
        matrix_name: what commands call the matrix.
    """

    quantizer: Quantizer
    file: ModelFile
    matrix: ImportanceMatrix | None
    options: Options
    plan: Plan | None
    matrix_name: str

    # --- what the quantizer would do --------------------------------------------------------------

    def assigned(self, extra: Sequence[Rule] = ()) -> list[Assigned]:
        """Every tensor in the quantizer's order, with `extra` in front of the exceptions."""
        return self._dry_run(self.options.choice(rules=(*extra, *self.options.rules)))

    def of_two_types(self) -> frozenset[str]:
        """Names of the tensors that become of another type for F16 than for F32.

        These are what the quantizer changes at all, and so what an exception can change.
        """
        f16, f32 = (
            self._dry_run(self.options.choice(ftype, pure=False, rules=()))
            for ftype in ("F16", "F32")
        )
        other = {tensor.name: tensor.target for tensor in f16}
        return frozenset(t.name for t in f32 if t.target != other[t.name])

    def quantizable(self) -> frozenset[str]:
        """Names of the tensors that a quantized type would change."""
        return frozenset(
            tensor.name
            for tensor in self._dry_run(self.options.choice("Q8_0", pure=True, rules=()))
            if tensor.source != tensor.target
        )

    def _dry_run(self, choice: Choice) -> list[Assigned]:
        try:
            found = self.quantizer.dry_run(
                str(self.file.path), choice, has_matrix=self.matrix is not None
            )
        except EngineDiedError as error:
            error.args = (f"{error.args[0]}, while its quantizer looked through {self.file.path}",)
            raise
        except RuntimeError as error:
            reason = str(error).rpartition("failed to quantize: ")[2].strip() or str(error)
            raise EngineError(
                f"{self.file.path}: cannot quantize to {self.options.ftype}: {reason}"
            ) from None
        return [Assigned(*tensor) for tensor in found]

    # --- what the model and the matrix are --------------------------------------------------------

    @cached_property
    def lm_head(self) -> str:
        """The weight that gives the logits, and that process_output collects."""
        # without an output.weight the token embedding is used (tied)
        return "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"

    @cached_property
    def head_refusal(self) -> str | None:
        """Why the head cannot be collected; None if it can, or there is none."""
        if self.file.n_nextn == 0:
            return None
        try:
            check_head(self.file)
        except ModelError as error:
            return str(error)
        return None

    @cached_property
    def experts_apart(self) -> bool:
        """Whether each expert is a tensor of its own, which no graph of the engine runs any more."""
        return any(apart_expert(name) is not None for name in self.file.tensors)

    @cached_property
    def covers_trunk(self) -> bool:
        """Whether the matrix has data of the trunk."""
        return any(not self.file.in_head(name) for name in self._known)

    @cached_property
    def covers_head(self) -> bool:
        """Whether the matrix has data of the head."""
        return any(self.file.in_head(name) for name in self._known)

    @cached_property
    def _known(self) -> tuple[str, ...]:
        return tuple(name for name in self.matrix or () if name in self.file.tensors)
