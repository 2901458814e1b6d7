"""What a run would collect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What a run would collect, read off the engine's graphs without running them.

    Attributes:
        trunk, head: rows a token by weight name, for the weights that the graph multiplies;
            0 if rows do not follow the tokens (a compressed sequence).
        never: weights of the model with two or more dimensions that no graph multiplies, so
            that no data can reach them: lookup tables, convolution kernels, tensors that the
            architecture's graph leaves out. With mtp=False the head's are among them.
        trunk_outputs, head_outputs: whether every row is asked for logits, because the
            last layer of the graph keeps only the rows whose output is requested.
    """

    trunk: Mapping[str, int]
    head: Mapping[str, int]
    never: tuple[str, ...]
    trunk_outputs: bool
    head_outputs: bool
