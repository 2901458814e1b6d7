"""Importance data made for one conversion of a model, put to use for another of the same model.

Converters differ in what they fuse: q, k and v in one tensor or three, gate and up in one or two,
the experts of a block in one tensor or each in its own. The activations that reach a weight stay
the same, and importance data are about those. The rules, each with the graph that it rests on, in
llama.cpp's src/:

- attn_qkv is one matmul of the rows that attn_q, attn_k and attn_v take (build_qkv in
  llama-graph.cpp).
- ffn_gate_up_exps is one MUL_MAT_ID of the rows and the expert ids that ffn_gate_exps and
  ffn_up_exps take (build_moe_ffn in llama-graph.cpp); dense and shared-expert gate and up take the
  same rows too (build_ffn, LLM_FFN_PAR). Where a fused one goes by the name of ffn_up (phi3.cpp,
  glm4.cpp), or a matmul of both reported ffn_up only, ffn_gate takes ffn_up's data.
- ffn_gate.N, ffn_up.N and ffn_down.N are expert N of ffn_gate_exps, ffn_up_exps and ffn_down_exps
  (LLM_TENSOR_FFN_GATE_EXP and its like in llama-arch.cpp).
- in qwen3next ssm_in is one matmul of the rows that attn_qkv and attn_gate take (build_qkvz in
  models/qwen3next.cpp).

attn_kv_b, attn_k_b and attn_v_b do not share rows, though the weights are the same numbers:
attn_kv_b multiplies the compressed key-value rows, attn_k_b is transposed and multiplies the
queries, and attn_v_b multiplies what attention has made of the compressed rows (models/deepseek2.cpp,
build_attn_mha).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from imatrix.entries import Entry
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.header import ModelFile
from imatrix.tensors import apart_expert, natural_order, parsed_name, row_and_matrices

__all__ = ["Adapted", "Placed", "Step", "adapt"]

Step = Literal["fused", "split", "shared", "stacked", "cut"]

_FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
    "ffn_gate_up_shexp": ("ffn_gate_shexp", "ffn_up_shexp"),
}
_SSM_IN = {"ssm_in": ("attn_qkv", "attn_gate")}  # qwen3next alone: elsewhere it is no fusion
_GATES = {"ffn_gate": "ffn_up", "ffn_gate_exps": "ffn_up_exps", "ffn_gate_shexp": "ffn_up_shexp"}

_LATENT = ("attn_kv_b", "attn_k_b", "attn_v_b")
_NOT_SHARED = {
    "attn_k_b": "it multiplies the queries, attn_kv_b the compressed key-value rows",
    "attn_v_b": "it multiplies attention's result, attn_kv_b the compressed key-value rows",
    "attn_kv_b": "it multiplies the compressed key-value rows, attn_k_b the queries and attn_v_b "
    "attention's result",
}

# What llama-quantize leaves as it is (tensor_allows_quantization in src/llama-quant.cpp), then the
# tables that rows are looked up in, and the output, which is rarely collected.
_NO_DATA = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.|^token_types\.|ssm_conv1d|shortconv\.conv\.weight"
    r"|indexer\.[kq]_proj\.weight|attn_rel_b\.weight"
    r"|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|^token_embd\.|^per_layer_token_embd\.|\.nextn\.embed_tokens\.|^output\.weight"
)
_NO_DATA_GLM5_NEXT = re.compile(
    r"hc_|indexer\.(attn_q_b|attn_k|proj)|indexer_compressor_(gate|ape)|ssm_[fg]_[ab]\.weight"
    r"|ssm_beta\.weight|attn_kv_a_mqa\.weight|attn_[kv]_b\.weight"
)

# Sums of one input are the same to the bit in a file of llama-imatrix; ours are rounded to float32
# once. What differs more was not fed by the same rows.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Placed:
    """Where the data of one weight come from.

    Attributes:
        name: the weight of the model.
        sources: the entries of the matrix that they are; its own name if nothing was to be done.
        steps: what was done, in order: "stacked", the experts of a block put into one weight;
            "cut", one expert taken out; "fused", the data that several weights have in common
            given to the weight that holds them all; "split", the data of a fused weight given to
            one that it holds; "shared", the data of ffn_up given to ffn_gate. Empty if nothing.
        unseen: experts without a row.
    """

    name: str
    sources: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    unseen: int = 0


@dataclass(frozen=True)
class Adapted:
    """A matrix for another conversion of its model.

    Attributes:
        matrix: with the model's weights; texts, chunks and provenance as they were.
        placed: the weights of the matrix, in its order.
        missing: weights of the model that a quantizer can use data for and that have none -> why,
            "" where there is nothing to tell. Embeddings and output.weight, for which data are
            rarely collected, are not among them.
        unplaced: entries of the old matrix that are in no weight of the new one -> why.
    """

    matrix: ImportanceMatrix
    placed: tuple[Placed, ...]
    missing: Mapping[str, str]
    unplaced: Mapping[str, str]

    @property
    def changed(self) -> tuple[Placed, ...]:
        """The weights that something was done for."""
        return tuple(place for place in self.placed if place.steps)


def adapt(
    matrix: ImportanceMatrix | str | os.PathLike[str],
    model: ModelFile | str | os.PathLike[str],
    *,
    chunk_size: int = 512,
) -> Adapted:
    """Give importance data the names and shapes that another conversion of the model has.

    Only data of the same activations are handed on, see imatrix.quantization.adaptation for the rules. A weight
    that has an entry of its own keeps it.

    Args:
        matrix: importance data, or the path of a file that holds them.
        model: the conversion to serve; the first part of a multi-part one. Only its header is read.
        chunk_size: tokens a chunk of a .dat file, see imatrix.formats.dat.read.

    Raises:
        ValueError: the matrix is of another model: a size differs, its trunk has another depth, or
            none of its entries belongs to a weight of the model.
        FormatError (a ValueError): `matrix` is not an importance matrix.
        ModelError (a ValueError): `model` is not a model.
        OSError: a file cannot be read.
    """
    if not isinstance(matrix, ImportanceMatrix):
        matrix = ImportanceMatrix.load(matrix, chunk_size=chunk_size)
    file = model if isinstance(model, ModelFile) else ModelFile.read(model)
    _check_depth(matrix, file)
    return _Adaptation(matrix, file).run()


@dataclass(frozen=True)
class _Found:
    entry: Entry
    sources: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    def after(self, step: Step) -> _Found:
        return replace(self, steps=(*self.steps, step))


class _OtherSizeError(ValueError):
    """An entry does not have the size that the model asks for."""


class _UnfitError(ValueError):
    """The data of one weight cannot be handed on; the rest may be."""


class _Adaptation:
    def __init__(self, matrix: ImportanceMatrix, file: ModelFile) -> None:
        self._matrix = matrix
        self._file = file
        self._fused = _FUSED | (_SSM_IN if file.architecture == "qwen3next" else {})
        self._whole = {part: whole for whole, parts in self._fused.items() for part in parts}
        self._experts = _experts_apart(file.tensors)

    def run(self) -> Adapted:
        entries: dict[str, Entry] = {}
        placed: dict[str, Placed] = {}
        missing: dict[str, str] = {}
        unfit: dict[str, str] = {}
        other_size = []
        takes_data = _takes_data(self._file)
        for name, shape in self._file.tensors.items():
            n_in, n_mat = row_and_matrices(shape)
            try:
                found = self._weight(name, n_in, n_mat)
            except _OtherSizeError as error:
                other_size.append(str(error))
                continue
            except _UnfitError as error:
                missing[name] = str(error)
                if name in self._matrix:
                    unfit[name] = str(error)
                continue
            if found is not None:
                unseen = int(np.count_nonzero(found.entry.counts == 0))
                entries[name] = found.entry
                placed[name] = Placed(name, found.sources, found.steps, unseen)
            elif name in takes_data:
                missing[name] = self._why_missing(name)
        if other_size:
            more = f"; {len(other_size) - 3} more" if len(other_size) > 3 else ""
            raise ValueError(
                f"the matrix is of another model than {self._file.path}: "
                f"{'; '.join(other_size[:3])}{more}"
            )
        if not entries:
            raise ValueError(
                f"no entry of the matrix belongs to a weight of {self._file.path}: its first is "
                f"{next(iter(self._matrix), 'missing')!r}. Was it collected from another model?"
            )
        used = {source for place in placed.values() for source in place.sources}
        adapted = ImportanceMatrix(
            entries,
            datasets=self._matrix.datasets,
            chunk_count=self._matrix.chunk_count,
            chunk_size=self._matrix.chunk_size,
            provenance=self._matrix.provenance,
            head_blocks=self._matrix.head_blocks,
        )
        return Adapted(
            matrix=adapted,
            placed=tuple(placed[name] for name in adapted),
            missing={name: missing[name] for name in sorted(missing, key=natural_order)},
            unplaced={
                name: unfit.get(name) or self._why_unplaced(name)
                for name in self._matrix
                if name not in used
            },
        )

    # --- what a weight gets ---------------------------------------------------------------------

    def _weight(self, name: str, n_in: int, n_mat: int) -> _Found | None:
        """Data for a weight: its own entry, or what is known to be the same."""
        parsed = _block_and_kind(name)
        if parsed is None or name in self._matrix:
            return self._own(name, n_in, n_mat)
        block, kind = parsed
        if apart := apart_expert(name):
            base, expert = apart
            n_expert = self._experts[block, base]
            found = self._derived(block, f"{base}_exps", n_in, n_expert, stack=False)
            if found is not None:
                return _cut(found, expert)
            if base not in _GATES:
                return None
            found = self._own(f"blk.{block}.{_GATES[base]}.{expert}.weight", n_in, 1)
            return None if found is None else found.after("shared")
        return self._collected(block, kind, n_in, n_mat) or self._derived(block, kind, n_in, n_mat)

    def _own(self, name: str, n_in: int, n_mat: int) -> _Found | None:
        if name not in self._matrix:
            return None
        return _Found(_sized(name, self._matrix[name], n_in, n_mat), (name,))

    def _collected(self, block: str, kind: str, n_in: int, n_mat: int) -> _Found | None:
        """The weight's own entry, or those of its experts."""
        own = self._own(f"blk.{block}.{kind}.weight", n_in, n_mat)
        return own or self._stacked(block, kind, n_in, n_mat)

    def _derived(
        self, block: str, kind: str, n_in: int, n_mat: int, *, stack: bool = True
    ) -> _Found | None:
        """The data of a weight that takes the same rows. `stack`: also of experts that the matrix
        has apart."""
        if (own := self._own(f"blk.{block}.{kind}.weight", n_in, n_mat)) is not None:
            return own  # of all experts, where one of them is asked for
        if kind in self._fused:
            parts = [self._collected(block, part, n_in, n_mat) for part in self._fused[kind]]
            found = _in_common(f"blk.{block}.{kind}", [part for part in parts if part is not None])
            if found is not None:
                return found
        if kind in self._whole:
            found = self._own(f"blk.{block}.{self._whole[kind]}.weight", n_in, n_mat)
            if found is not None:
                return found.after("split")
        if kind in _GATES:
            up = _GATES[kind]
            if stack:
                found = self._collected(block, up, n_in, n_mat)
            else:
                found = self._own(f"blk.{block}.{up}.weight", n_in, n_mat)
            if found is not None:
                return found.after("shared")
        return None

    def _stacked(self, block: str, kind: str, n_in: int, n_mat: int) -> _Found | None:
        """The experts of a block, each from its own entry; no rows for one without."""
        base = kind.removesuffix("_exps")
        if base == kind:
            return None
        prefix = f"blk.{block}.{base}."
        names = {
            int(number): name
            for name in self._matrix
            if name.startswith(prefix)
            and (number := name[len(prefix) :].removesuffix(".weight")).isdecimal()
        }
        if not names:
            return None
        if (last := max(names)) >= n_mat:
            raise _OtherSizeError(f"{names[last]} is an expert of more than {n_mat}")
        sums, signed = np.zeros((n_mat, n_in)), np.zeros((n_mat, n_in))
        counts = np.zeros(n_mat, np.int64)
        have_signed = True
        for expert, name in names.items():
            entry = _sized(name, self._matrix[name], n_in, 1)
            sums[expert], counts[expert] = entry.sums[0], entry.counts[0]
            if entry.signed_sums is not None:
                signed[expert] = entry.signed_sums[0]
            elif entry.counts.any():
                have_signed = False  # the weight as a whole has none
        ordered = tuple(names[expert] for expert in sorted(names))
        stacked = Entry(
            sums, counts, signed_sums=signed if have_signed else None, name=f"{prefix}*"
        )
        return _Found(stacked, ordered, ("stacked",))

    # --- what is told ---------------------------------------------------------------------------

    def _why_missing(self, name: str) -> str:
        parsed = _block_and_kind(name)
        if parsed is None:
            return ""
        block, kind = parsed
        if kind in _LATENT and self._has_latent(block, kind):
            return f"{_NOT_SHARED[kind]}: collect from a conversion that has it"
        return ""

    def _has_latent(self, block: str, kind: str) -> bool:
        others = _LATENT[1:] if kind == "attn_kv_b" else _LATENT[:1]
        return any(f"blk.{block}.{other}.weight" in self._matrix for other in others)

    def _why_unplaced(self, name: str) -> str:
        parsed = _block_and_kind(name)
        if parsed is None:
            return "the model has no such weight"
        block, kind = parsed
        prefix = f"blk.{block}."
        if not any(weight.startswith(prefix) for weight in self._file.tensors):
            return f"the model has no block {block}"
        if kind in _LATENT and any(
            f"{prefix}{other}.weight" in self._file.tensors for other in _LATENT if other != kind
        ):
            return _NOT_SHARED[kind]
        if kind in _GATES and f"{prefix}{_GATES[kind]}.weight" in self._file.tensors:
            return f"the model has one {_GATES[kind]} for both, whose rows are the same"
        return "the model has no such weight"


def _in_common(name: str, parts: list[_Found]) -> _Found | None:
    """What weights fed by the same rows have in common, for the weight that holds them all."""
    if not parts:
        return None
    first = parts[0]
    for other in parts[1:]:
        if not _same(first.entry, other.entry):
            raise _UnfitError(
                f"{first.sources[0]} and {other.sources[0]} were not fed the same rows, so that "
                f"neither stands for {name}"
            )
    sources = tuple(source for part in parts for source in part.sources)
    return _Found(first.entry, sources, (*first.steps, "fused"))


def _same(a: Entry, b: Entry) -> bool:
    return (
        a.sums.shape == b.sums.shape
        and np.array_equal(a.counts, b.counts)
        and np.allclose(a.sums, b.sums, rtol=_ROUNDING, atol=0.0)
    )


def _cut(found: _Found, expert: int) -> _Found:
    entry = found.entry
    counts = entry.counts if entry.n_counts == 1 else entry.counts[expert : expert + 1]
    signed = entry.signed_sums
    one = Entry(
        entry.sums[expert : expert + 1],
        counts,
        signed_sums=None if signed is None else signed[expert : expert + 1],
    )
    return replace(found.after("cut"), entry=one)


def _sized(name: str, entry: Entry, n_in: int, n_mat: int) -> Entry:
    """The entry as [n_mat, n_in]: .dat files have all of it in one row.

    Raises:
        _OtherSizeError: it has another number of values.
        _UnfitError: it is of this model, but an old program put all heads into one.
    """
    if (entry.n_mat, entry.n_in) == (n_mat, n_in):
        return entry
    if entry.n_mat == 1 and entry.n_in == n_mat * n_in:
        return entry.reshaped(n_mat, n_in, name=name)
    if entry.sums.size == n_in and name.endswith((".attn_k_b.weight", ".attn_v_b.weight")):
        raise _UnfitError(
            f"the matrix has one mean of all {n_mat} heads, as older programs made it, and a "
            "quantizer wants one a head: collect anew"
        )
    raise _OtherSizeError(
        f"{name} has {_describe_width(entry.n_in, entry.n_mat)} in the matrix, "
        f"{_describe_width(n_in, n_mat)} in the model"
    )


def _describe_width(n_in: int, n_mat: int) -> str:
    return f"rows of {n_in}" if n_mat == 1 else f"{n_mat} matrices with rows of {n_in}"


def _takes_data(file: ModelFile) -> dict[str, tuple[int, ...]]:
    """The tensors that a quantizer can use data for, by their names and shapes."""

    def takes(name: str, shape: tuple[int, ...]) -> bool:
        dimensions = max((i + 1 for i, n in enumerate(shape) if n > 1), default=1)
        if dimensions < 2 or not name.endswith("weight") or _NO_DATA.search(name):
            return False
        return file.architecture != "glm5-next" or not _NO_DATA_GLM5_NEXT.search(name)

    return {name: shape for name, shape in file.tensors.items() if takes(name, shape)}


def _experts_apart(tensors: Mapping[str, object]) -> dict[tuple[str, str], int]:
    """How many experts a block has, (block, "ffn_gate") -> experts, where they are apart."""
    found: dict[tuple[str, str], int] = {}
    for name in tensors:
        parsed, apart = _block_and_kind(name), apart_expert(name)
        if parsed and apart:
            key = (parsed[0], apart[0])
            found[key] = max(found.get(key, 0), apart[1] + 1)
    return found


def _check_depth(matrix: ImportanceMatrix, file: ModelFile) -> None:
    """Refuse a matrix whose trunk has another number of blocks."""
    # blocks without a weight to collect for, as pruning leaves them, do not count
    trunk = {block for block in _blocks(_takes_data(file)) if block < file.n_trunk}
    heads = matrix.head_blocks | set(range(file.n_trunk, file.n_trunk + file.n_nextn))
    found = {block for block in _blocks(matrix) if block not in heads}
    if trunk and found and max(trunk) != max(found):
        raise ValueError(
            f"the matrix is of another model than {file.path}: its trunk has "
            f"{max(found) + 1} blocks, the model's {max(trunk) + 1}"
        )


def _blocks(names: Mapping[str, object]) -> Iterator[int]:
    for name in names:
        if parsed := _block_and_kind(name):
            yield int(parsed[0])


def _block_and_kind(name: str) -> tuple[str, str] | None:
    """("3", "attn_q") of "blk.3.attn_q.weight"; None for any other name. The number is as the name
    has it, so that names of the same block can be made with it."""
    place = parsed_name(name)
    if place is None or place.before or not place.kind.endswith(".weight"):
        return None
    kind = place.kind.removesuffix(".weight")
    return (place.number, kind) if kind else None
