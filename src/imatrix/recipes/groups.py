"""Which tensors a recipe decides on, which of them go together, and which types each may get.

The engine says which tensors its quantizer changes (a dry run). Of these the head's are left to
imatrix.recipes.heads, and those that no graph of the trunk reads stay as they are: no text tells what
they are worth.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from imatrix.engine.quantizing import open_quantizer
from imatrix.errors import ModelError
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.header import ModelFile
from imatrix.model.raw import Tensor
from imatrix.quantization.file_size import padded
from imatrix.quantization.options import Options
from imatrix.quantization.question import Question
from imatrix.quantization.rehearsal import rehearse_quantize
from imatrix.quantization.rules import FLOATS, tensor_type
from imatrix.quantization.source import block_of_type, data_bytes, type_name
from imatrix.quantization.types import ASKING, EMBEDDINGS
from imatrix.tensors import block_of, kind_of, n_entry_values, n_values

__all__ = [
    "OFFERED",
    "Candidates",
    "Group",
    "candidates_of",
    "grouped",
    "importance_fits",
    "measured_types",
    "quantizable",
    "refuse_quantized",
    "wanted_types",
]

OFFERED = (
    *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k"),
    *("iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
)
"""Types that a tensor may get if its rows are a multiple of 256 values."""

OFFERED_SHORT = ("q4_0", "iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")
"""Types that a tensor may get whose rows are a multiple of 32 values only."""

# Weights of one block that multiply the same rows, and that llama.cpp's mixtures treat alike. The
# names are those of src/llama-arch.cpp.
_TOGETHER = (
    re.compile(r"attn_(?:q|k|v|qkv)\.weight"),
    re.compile(r"attn_(?:q_a|kv_a_mqa)\.weight"),
    re.compile(r"ffn_(?:gate|up)\.weight"),
    re.compile(r"ffn_(?:gate|up)_exps\.weight"),
    re.compile(r"ffn_(?:gate|up)_shexp\.weight"),
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors that get one type together.

    Attributes:
        name: "blk.3.attn_q.weight", or "blk.3.attn_q+attn_k+attn_v" for several.
        kind: the name without its block.
        tensors: their names, in the model's order.
        block: number of the first block that sees a change; 0 for the embeddings, the number of
            blocks of the trunk for its output.
        source: the type that they have, in lower case.
        bytes: candidate type -> bytes of their data, as a file has them; falling order of types does
            not matter. The source's type is always one.
        n_values: values in all of them.
    """

    name: str
    kind: str
    tensors: tuple[str, ...]
    block: int
    source: str
    bytes: Mapping[str, int]
    n_values: int

    def types(self, type_: str) -> dict[str, str]:
        """Tensor -> that type, as a trial changes them."""
        return dict.fromkeys(self.tensors, type_) if type_ != self.source else {}


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The types that each tensor may get.

    Attributes:
        types: tensor -> candidates in lower case, the source's own type last.
        without_data: tensors that are offered fewer types, since the matrix has no data of them.
    """

    types: Mapping[str, tuple[str, ...]]
    without_data: tuple[str, ...]


def wanted_types(names: Sequence[str] | None) -> tuple[str, ...]:
    """The types that may be used, in lower case.

    Raises:
        ValueError: an unknown type, one that recipes do not offer, or none.
    """
    offered = tuple(dict.fromkeys((*OFFERED, *OFFERED_SHORT)))
    if names is None:
        return offered
    found = tuple(dict.fromkeys(tensor_type(name, "types").name.lower() for name in names))
    if not found:
        raise ValueError(f"types is empty; expected some of {', '.join(offered)}")
    for name in found:
        if name not in offered:
            raise ValueError(f"types: {name} is not offered; expected some of {', '.join(offered)}")
    return found


def candidates_of(
    tensors: Iterable[Tensor], matrix: ImportanceMatrix | None, wanted: Collection[str]
) -> Candidates:
    """What each tensor may become.

    Args:
        tensors: those that the quantizer may change.
        matrix: importance data; None for none.
        wanted: types that may be used.

    Raises:
        ValueError: an entry of the matrix has another size than its tensor.
    """
    types: dict[str, tuple[str, ...]] = {}
    without = []
    for tensor in tensors:
        has_data = importance_fits(tensor.name, tensor.shape, matrix)
        length = tensor.shape[0]
        offered = OFFERED if length % 256 == 0 else OFFERED_SHORT if length % 32 == 0 else ()
        fitting = [name for name in offered if name in wanted]
        possible = [name for name in fitting if has_data or name not in ASKING]
        if len(possible) < len(fitting):
            without.append(tensor.name)
        types[tensor.name] = (*possible, type_name(tensor.kind))
    return Candidates(types=types, without_data=tuple(without))


def importance_fits(name: str, shape: tuple[int, ...], matrix: ImportanceMatrix | None) -> bool:
    """Whether a matrix has data that the quantizer would use for a tensor.

    Raises:
        ValueError: the entry is of another size; for embeddings the engine passes over it
            (llama_model_quantize_impl in src/llama-quant.cpp).
    """
    entry = None if matrix is None else matrix.get(name)
    if entry is None:
        return False
    expected = n_entry_values(shape)
    if entry.sums.size == expected:
        return True
    if name in EMBEDDINGS:
        return False
    raise ValueError(
        f"the matrix's entry of {name} has {entry.sums.size} values, the weight needs {expected}: it "
        "was collected from another conversion of the model; adapt it (imatrix adapt MATRIX --to "
        "MODEL -o OUT)"
    )


def grouped(
    tensors: Iterable[Tensor],
    candidates: Mapping[str, tuple[str, ...]],
    *,
    n_trunk: int,
    apart: bool,
) -> tuple[Group, ...]:
    """The groups, by block and then in the model's order.

    Args:
        tensors: those that a recipe decides on.
        candidates: what each may become.
        n_trunk: blocks of the trunk.
        apart: each tensor alone; otherwise those of a block that multiply the same rows go together,
            if they have the same candidates.
    """
    together: dict[tuple[object, ...], list[Tensor]] = {}
    for tensor in tensors:
        kind = kind_of(tensor.name)
        role = next((n for n, each in enumerate(_TOGETHER) if each.fullmatch(kind)), None)
        alone = apart or role is None or block_of(tensor.name) is None
        key = (
            (tensor.name,)
            if alone
            else (block_of(tensor.name), role, tensor.kind, candidates[tensor.name])
        )
        together.setdefault(key, []).append(tensor)
    groups = [
        _group(members, candidates[members[0].name], n_trunk) for members in together.values()
    ]
    return tuple(sorted(groups, key=lambda group: group.block))  # stable


def _group(members: Sequence[Tensor], types: Sequence[str], n_trunk: int) -> Group:
    first = members[0]
    block = block_of(first.name)
    kind = kind_of(first.name)
    if len(members) > 1:
        kind = "+".join(kind_of(each.name).removesuffix(".weight") for each in members)
    return Group(
        name=kind if block is None else f"blk.{block}.{kind}",
        kind=kind,
        tensors=tuple(each.name for each in members),
        block=block if block is not None else n_trunk if kind.startswith("output") else 0,
        source=type_name(first.kind),
        bytes={
            name: sum(padded(data_bytes(each.shape, name)) for each in members) for name in types
        },
        n_values=sum(n_values(each.shape) for each in members),
    )


def measured_types(group: Group, wanted: Sequence[str]) -> tuple[str, ...]:
    """The types that a group is measured with: of each wanted one the candidate that is nearest in
    bytes, each once. None if it has no candidate but its own type."""
    others = [name for name in group.bytes if name != group.source]

    def bits(name: str) -> float:
        length, size = block_of_type(name)
        return size / length

    found = [
        min(others, key=lambda each: abs(bits(each) - bits(name))) if name not in others else name
        for name in wanted
        if others
    ]
    return tuple(dict.fromkeys(found))


def quantizable(model: str | os.PathLike[str]) -> frozenset[str]:
    """Names of the tensors that a quantized type would change, as the engine's quantizer says.

    Raises:
        ModelError, EngineError: it does not take the file.
    """
    options = Options(ftype="Q8_0")
    file = ModelFile.read(model)
    rehearse_quantize(file, options)
    with open_quantizer(False) as quantizer:
        question = Question(
            quantizer=quantizer, file=file, matrix=None, options=options, plan=None, matrix_name=""
        )
        return question.quantizable()


def refuse_quantized(tensors: Iterable[Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse a model of which a tensor is quantized already.

    Raises:
        ModelError: one is; what more quantizing takes from it says nothing of the model.
    """
    for tensor in tensors:
        name = type_name(tensor.kind)
        if name not in FLOATS.values():
            raise ModelError(
                f"{os.fspath(path)}: {tensor.name} is {name}, so this model is quantized already, and "
                "what quantizing it again takes from it is not what quantizing the model takes. Give "
                "the model as it was converted: F32, F16 or BF16"
            )
