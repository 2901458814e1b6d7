"""How fast this CPU multiplies by weights of each type: the engine's own products, timed.

No table knows it: it depends on the processor's instructions, on the engine's kernels for them and
on the shapes. So a few products like the model's are run, for each type in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from imatrix.native import engine

__all__ = ["BUDGET", "ProductShape", "ProductTimes", "Timed", "measure"]

# Seconds that a probe takes at most. What is on its way then ends by itself, so that this is less
# than the second that a person is told.
BUDGET = 0.8

# Of a product of the probe. 512 rows keep every kernel busy. With fewer than 256 rows of the matrix
# float32 seemed a tenth faster beside the others than in a whole matrix (processor time on a Xeon
# with AVX-512); with more a product takes longer and tells no more.
_MOST_ROWS = 512
_MOST_IN = 1 << 13
_LEAST_OUT = 64
_MOST_VALUES = 1 << 22  # 16 MiB of float32
_WORK = 1 << 27  # multiplications for each thread: milliseconds

_LEAST_ROUNDS = 4  # two for each half
_MOST_ROUNDS = 24


@dataclass(frozen=True, kw_only=True)
class ProductShape:
    """A product of a graph.

    Attributes:
        n_in: values of an activation.
        n_out: rows of a matrix.
        n_rows: activations that the graph multiplies, with one of the matrices each.
        n_mat: matrices; more than one are experts.
    """

    n_in: int
    n_out: int
    n_rows: int
    n_mat: int = 1

    def cut(self, n_threads: int) -> ProductShape:
        """A smaller one that is multiplied as fast: the same rows a matrix, as far as 512 of them
        go, and fewer and smaller matrices."""
        rows = max(1, min(self.n_rows // self.n_mat, _MOST_ROWS))
        n_in = min(self.n_in, _MOST_IN)
        values = min(_MOST_VALUES, n_threads * _WORK // rows)
        # one matrix would be no experts any more, for which the engine has another operation
        least = min(self.n_mat, 2)
        n_out = min(self.n_out, max(_LEAST_OUT, values // (n_in * least)))
        n_mat = min(self.n_mat, max(least, values // (n_in * n_out)))
        return ProductShape(n_in=n_in, n_out=n_out, n_rows=rows * n_mat, n_mat=n_mat)

    @property
    def multiplications(self) -> int:
        """How many there are in it."""
        return self.n_in * self.n_out * self.n_rows


@dataclass(frozen=True)
class ProductTimes:
    """What a multiplication of a product takes.

    Attributes:
        first, second: seconds, the medians of the first and the second half of the probe.
        n: products that were timed.
    """

    first: float
    second: float
    n: int


# Of each shape, by the name of the type.
Timed = tuple[dict[str, ProductTimes], ...]


class _Product(Protocol):
    def run(self) -> float: ...


def _open(kind: str, shape: ProductShape, n_threads: int) -> _Product:
    return engine.Product(
        kind,
        n_in=shape.n_in,
        n_out=shape.n_out,
        n_rows=shape.n_rows,
        n_mat=shape.n_mat,
        n_threads=n_threads,
    )


def measure(
    shapes: Sequence[ProductShape],
    types: Sequence[str],
    *,
    n_threads: int,
    budget: float = BUDGET,
    open_product: Callable[[str, ProductShape, int], _Product] = _open,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed | None:
    """Time products of some shapes by weights of some types, in this process.

    The types take turns, so that a machine that speeds up or slows down does so for all of them.
    The first product of each is not counted.

    Args:
        shapes: of the model's products; smaller ones are timed (ProductShape.cut).
        types: ggml's names.
        n_threads: threads to multiply with.
        budget: seconds after which no product is begun.
        open_product, clock: what makes a product of a type, a shape and so many threads, and what
            tells the time; for tests.

    Returns:
        The times of each shape; None if there was no time for two rounds in each half.

    Raises:
        ValueError: there is no such type, or a shape does not go with one.
        EngineError, MemoryError: the engine cannot multiply.
    """
    end = clock() + budget
    cut = [shape.cut(n_threads) for shape in shapes]
    products: list[tuple[int, str, _Product]] = []
    for number, shape in enumerate(cut):
        for kind in types:
            if clock() >= end:
                return None
            products.append((number, kind, open_product(kind, shape, n_threads)))
    rounds: list[dict[tuple[int, str], float]] = []
    while len(rounds) <= _MOST_ROUNDS:
        seconds: dict[tuple[int, str], float] = {}
        for number, kind, product in products:
            if clock() >= end:
                break
            seconds[number, kind] = product.run() / cut[number].multiplications
        if len(seconds) < len(products):
            break
        rounds.append(seconds)
    counted = rounds[1:]
    if len(counted) < _LEAST_ROUNDS:
        return None
    halves = counted[: len(counted) // 2], counted[len(counted) // 2 :]

    def times(number: int, kind: str) -> ProductTimes:
        first, second = (statistics.median(each[number, kind] for each in half) for half in halves)
        return ProductTimes(first, second, len(counted))

    return tuple({kind: times(number, kind) for kind in types} for number in range(len(cut)))
