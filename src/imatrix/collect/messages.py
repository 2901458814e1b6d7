"""TODO."""

from __future__ import annotations

from imatrix.entries import LeftOut
from imatrix.errors import NonFiniteError
from imatrix.words import few

__all__ = ["describe_left_out", "tell_where"]


def tell_where(error: NonFiniteError, kept: int, what: str = "That chunk was") -> None:
    """Say in the error which chunk it was, and what is kept."""
    where = f"channel {error.channel}"
    if error.expert is not None:
        where = f"expert {error.expert}, {where}"
    error.args = (
        f"{error.args[0]} in chunk {error.chunk} ({where}). {what} discarded; the {kept} "
        "before it are kept in Collector.matrix. on_nonfinite='skip' (--on-nonfinite skip) leaves "
        "such chunks out and goes on.",
    )


def describe_left_out(left_out: list[LeftOut]) -> str:
    """The warning about chunks that do not count."""
    first = few(
        [f"chunk {one.chunk} (from token {one.token}, at {one.weight})" for one in left_out], 3
    )
    return f"left out for NaN or infinite activations: {first}"
