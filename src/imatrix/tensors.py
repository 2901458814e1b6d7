"""Names of weights, and what follows from their shapes.

The engine names a weight of a block `blk.N.KIND`, such as `blk.3.attn_q.weight` (src/llama-arch.cpp),
and this is the only place that takes such a name apart. Something may stand in front: `mtp:` before a
weight of a head that comes from a file of its own, `enc.` or `dec.` in a model with an encoder.

N has 1 to 9 decimal digits, as many as surely fit into the engine's 32-bit number; a longer one is
the number of no block.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

__all__ = [
    "BlockName",
    "apart_expert",
    "block_label",
    "block_of",
    "kind_of",
    "listed_place",
    "marks_head",
    "n_entry_values",
    "n_values",
    "name_in_block",
    "natural_order",
    "parsed_name",
    "row_and_matrices",
]

_NUMBER = re.compile(r"[0-9]{1,9}")
_NAME = re.compile(r"(.*?)blk\.([0-9]{1,9})\.(.*)", re.DOTALL)
_APART = re.compile(r"(ffn_(?:gate|up|down))\.([0-9]+)\.weight")


class BlockName(NamedTuple):
    """The name of a weight in a block, taken apart: `before`blk.`number`.`kind`.

    Attributes:
        before: what stands in front of "blk."; "" for nothing, which is usual.
        number: of the block, in the digits of the name: "3", or "03".
        kind: what follows the number: "attn_q.weight"; "" for nothing.
    """

    before: str
    number: str
    kind: str

    @property
    def block(self) -> int:
        """Number of the block."""
        return int(self.number)


def parsed_name(name: str) -> BlockName | None:
    """The name taken apart at the first "blk.N." in it; None if there is none."""
    match = _NAME.fullmatch(name)
    return None if match is None else BlockName(match[1], match[2], match[3])


def block_of(name: str) -> int | None:
    """Number of the block that a weight belongs to: 3 for "blk.3.attn_q.weight".

    None for a name that does not start with "blk.N.": a weight outside the blocks.
    """
    found = parsed_name(name)
    return found.block if found is not None and not found.before else None


def kind_of(name: str) -> str:
    """The name without its block: "attn_q.weight" of "blk.3.attn_q.weight".

    A name that does not start with "blk.N." is its own kind.
    """
    found = parsed_name(name)
    return found.kind if found is not None and not found.before else name


def name_in_block(name: str, block: int | str) -> str | None:
    """The name with another number, or other text, for its first "blk.N.".

    "blk.2.attn_q.weight" of "blk.3.attn_q.weight" for 2, and "blk.*.attn_q.weight" for "*". None
    if there is no block in the name.
    """
    found = parsed_name(name)
    return None if found is None else f"{found.before}blk.{block}.{found.kind}"


def block_label(name: str) -> str | None:
    """The block of a weight in words: "blk.3", or "mtp:blk.3" in a head's own file.

    None for a weight outside the blocks.
    """
    found = parsed_name(name)
    if found is None or found.before not in ("", "mtp:"):
        return None
    return f"{found.before}blk.{found.number}"


def marks_head(name: str) -> bool:
    """Whether a weight tells that its block is an MTP/NextN head: "blk.N.nextn.*"."""
    return block_of(name) is not None and kind_of(name).startswith("nextn.")


def apart_expert(name: str) -> tuple[str, int] | None:
    """("ffn_gate", 5) of "blk.3.ffn_gate.5.weight", the weight of one expert alone.

    Old conversions have such weights (LLM_TENSOR_FFN_GATE_EXP and its like in src/llama-arch.cpp).
    None for any other weight.
    """
    match = None if block_of(name) is None else _APART.fullmatch(kind_of(name))
    return None if match is None else (match[1], int(match[2]))


def natural_order(name: str) -> tuple[bool, int, str]:
    """Key to sort names by: by block, then by name; those outside the blocks come last."""
    block = block_of(name)
    return (block is None, block or 0, name)


def listed_place(name: str) -> tuple[int | None, str]:
    """(block, kind) as llama-imatrix lists a weight, which reads names in a way of its own.

    It cuts a name at its points (process_tensor_name in tools/imatrix/imatrix.cpp): the block is
    the item after "blk", wherever that stands, and the kind the item before "weight", the whole
    name if there is none.
    """
    items = name.split(".")
    # a name that ends in a point has no item after it there
    after = items.index("blk") + 1 if "blk" in items else len(items)
    block = items[after] if after < len(items) else ""
    last = items.index("weight") - 1 if "weight" in items[1:] else -1
    return (
        int(block) if _NUMBER.fullmatch(block) else None,
        items[last] if last >= 0 and items[last] else name,
    )


def row_and_matrices(shape: tuple[int, ...]) -> tuple[int, int]:
    """(n_in, n_mat) of a weight: length of a row, and how many matrices it holds.

    These are ne[0] and ne[2], as llama-quantize counts them (src/llama-quant.cpp).

    Args:
        shape: in ggml's order, the row length first; 1 for each dimension that is absent.
    """
    n_in, _, n_mat = (*shape, 1, 1)[:3]
    return n_in, n_mat


def n_values(shape: tuple[int, ...]) -> int:
    """How many values a tensor of that shape has."""
    return int(np.prod(shape, dtype=np.int64))


def n_entry_values(shape: tuple[int, ...]) -> int:
    """How many values an entry of a matrix has for a weight of that shape: n_in * n_mat."""
    n_in, n_mat = row_and_matrices(shape)
    return n_in * n_mat
