"""Weights of two conversions of one model that take the same rows, and so have the same data.

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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from imatrix.entries import Entry
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.header import ModelFile
from imatrix.tensors import apart_expert, parsed_name, row_and_matrices

__all__ = ["Counterparts", "Found", "OtherSizeError", "Step", "UnfitError", "block_and_kind"]

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

# Sums of one input are the same to the bit in a file of llama-imatrix; ours are rounded to float32
# once. What differs more was not fed by the same rows.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Found:
    """Data for a weight.

    Attributes:
        entry: [n_mat, n_in], as the weight needs it.
        sources: the entries of the matrix that it was made of.
        steps: what was done, in order.
    """

    entry: Entry
    sources: tuple[str, ...]
    steps: tuple[Step, ...] = ()

    def after(self, step: Step) -> Found:
        """The same data after one more step."""
        return replace(self, steps=(*self.steps, step))


class OtherSizeError(ValueError):
    """An entry does not have the size that the model asks for."""


class UnfitError(ValueError):
    """The data of one weight cannot be handed on; the rest may be."""


class Counterparts:
    """Finds the entries of a matrix that are the data of a model's weights."""

    def __init__(self, matrix: ImportanceMatrix, file: ModelFile) -> None:
        self._matrix = matrix
        self._file = file
        self._fused = _FUSED | (_SSM_IN if file.architecture == "qwen3next" else {})
        self._whole = {part: whole for whole, parts in self._fused.items() for part in parts}
        self._experts = _experts_apart(file.tensors)

    def find(self, name: str) -> Found | None:
        """Find data for a weight of the model: its own entry, or what is known to be the same.

        Raises:
            OtherSizeError: the entry is of another size, as those of another model are.
            UnfitError: there are data, but they cannot be handed on.
        """
        n_in, n_mat = row_and_matrices(self._file.tensors[name])
        parsed = block_and_kind(name)
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

    def _own(self, name: str, n_in: int, n_mat: int) -> Found | None:
        if name not in self._matrix:
            return None
        return Found(_sized(name, self._matrix[name], n_in, n_mat), (name,))

    def _collected(self, block: str, kind: str, n_in: int, n_mat: int) -> Found | None:
        """The weight's own entry, or those of its experts."""
        own = self._own(f"blk.{block}.{kind}.weight", n_in, n_mat)
        return own or self._stacked(block, kind, n_in, n_mat)

    def _derived(
        self, block: str, kind: str, n_in: int, n_mat: int, *, stack: bool = True
    ) -> Found | None:
        """The data of a weight that takes the same rows.

        Args:
            stack: take also experts that the matrix has apart.
        """
        if (own := self._own(f"blk.{block}.{kind}.weight", n_in, n_mat)) is not None:
            return own  # of all experts, if one of them is asked for
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

    def _stacked(self, block: str, kind: str, n_in: int, n_mat: int) -> Found | None:
        """The experts of a block, each from its own entry; one without an entry has no rows."""
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
            raise OtherSizeError(f"{names[last]} is an expert of more than {n_mat}")
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
        return Found(stacked, ordered, ("stacked",))

    # --- why there are none ---------------------------------------------------------------------

    def why_missing(self, name: str) -> str:
        """Say why a weight of the model has no data; "" if there is nothing to say."""
        parsed = block_and_kind(name)
        if parsed is None:
            return ""
        block, kind = parsed
        if kind in _LATENT and self._has_latent(block, kind):
            return f"{_NOT_SHARED[kind]}: collect from a conversion that has it"
        return ""

    def _has_latent(self, block: str, kind: str) -> bool:
        others = _LATENT[1:] if kind == "attn_kv_b" else _LATENT[:1]
        return any(f"blk.{block}.{other}.weight" in self._matrix for other in others)

    def why_unplaced(self, name: str) -> str:
        """Say why an entry of the matrix is in no weight of the model."""
        parsed = block_and_kind(name)
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


def _in_common(name: str, parts: list[Found]) -> Found | None:
    """The data that weights fed by the same rows have in common, for the weight that holds them.

    Raises:
        UnfitError: they were not fed the same rows.
    """
    if not parts:
        return None
    first = parts[0]
    for other in parts[1:]:
        if not _same(first.entry, other.entry):
            raise UnfitError(
                f"{first.sources[0]} and {other.sources[0]} were not fed the same rows, so that "
                f"neither stands for {name}"
            )
    sources = tuple(source for part in parts for source in part.sources)
    return Found(first.entry, sources, (*first.steps, "fused"))


def _same(a: Entry, b: Entry) -> bool:
    """Whether two entries are about the same rows."""
    return (
        a.sums.shape == b.sums.shape
        and np.array_equal(a.counts, b.counts)
        and np.allclose(a.sums, b.sums, rtol=_ROUNDING, atol=0.0)
    )


def _cut(found: Found, expert: int) -> Found:
    """The data of one expert, out of those of all."""
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
        OtherSizeError: it has another number of values.
        UnfitError: it is of this model, but an old program put all heads into one.
    """
    if (entry.n_mat, entry.n_in) == (n_mat, n_in):
        return entry
    if entry.n_mat == 1 and entry.n_in == n_mat * n_in:
        return entry.reshaped(n_mat, n_in, name=name)
    if entry.sums.size == n_in and name.endswith((".attn_k_b.weight", ".attn_v_b.weight")):
        raise UnfitError(
            f"the matrix has one mean of all {n_mat} heads, as older programs made it, and a "
            "quantizer wants one a head: collect anew"
        )
    raise OtherSizeError(
        f"{name} has {_describe_width(entry.n_in, entry.n_mat)} in the matrix, "
        f"{_describe_width(n_in, n_mat)} in the model"
    )


def _describe_width(n_in: int, n_mat: int) -> str:
    return f"rows of {n_in}" if n_mat == 1 else f"{n_mat} matrices with rows of {n_in}"


def _experts_apart(tensors: Mapping[str, object]) -> dict[tuple[str, str], int]:
    """(block, "ffn_gate") -> how many experts it has, for those that are apart."""
    found: dict[tuple[str, str], int] = {}
    for name in tensors:
        parsed, apart = block_and_kind(name), apart_expert(name)
        if parsed and apart:
            key = (parsed[0], apart[0])
            found[key] = max(found.get(key, 0), apart[1] + 1)
    return found


def block_and_kind(name: str) -> tuple[str, str] | None:
    """("3", "attn_q") of "blk.3.attn_q.weight"; None for any other name.

    The number is as the name has it, so that names of the same block can be made with it.
    """
    place = parsed_name(name)
    if place is None or place.before or not place.kind.endswith(".weight"):
        return None
    kind = place.kind.removesuffix(".weight")
    return (place.number, kind) if kind else None
