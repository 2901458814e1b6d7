"""TODO."""

from __future__ import annotations

import re

import numpy as np

__all__ = ["pictured_block_of"]

PICTURED_BLOCK = re.compile(r"blk\.([0-9]+)\.(.+)", re.DOTALL)


def pictured_block_of(name: str) -> int | None:
    """Number of the block of a weight; None outside the blocks."""
    match = PICTURED_BLOCK.fullmatch(name)
    return int(match[1]) if match else None


SHOWN_BLOCK = re.compile(r"blk\.(\d+)\.")


def row_and_matrices(shape: tuple[int, ...]) -> tuple[int, int]:
    """(n_in, n_mat): ne[0] and ne[2], as llama-quantize counts (src/llama-quant.cpp)."""
    n_in, _, n_mat = (*shape, 1, 1)[:3]
    return n_in, n_mat


_BLOCK = re.compile(r"blk\.([0-9]+)\.")
HEAD_BLOCK = re.compile(r"blk\.([0-9]+)\.nextn\.")


def natural_order(name: str) -> tuple[bool, int, str]:
    block = block_of(name)
    return (block is None, block or 0, name)


def block_of(name: str) -> int | None:
    """Number of the block that a weight belongs to; None for one outside the blocks."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


def count_values(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def n_entry_values(shape: tuple[int, ...]) -> int:
    """Values that an entry must have: one a column and matrix (ne[0] * ne[2])."""
    n_in, _, n_mat = (*shape, 1, 1)[:3]
    return n_in * n_mat


REPORTED_BLOCK = re.compile(r"(?:mtp:)?blk\.\d+")
