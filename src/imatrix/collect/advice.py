"""Whether a run would be faster with the model's weights in another type that loses next to
nothing, by products that were timed on this CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imatrix.engine.products import ProductShape, Timed
from imatrix.quantization.source import SourceTensor, data_bytes

__all__ = [
    "Products",
    "SourceAdvice",
    "advise",
    "foretold_time",
    "large_type",
    "products_of",
    "targets",
]

# Types that a model is collected from, and what each may become: nothing whose range is less, since
# a weight that does not fit would become an infinity or a zero. What is lost in words.
_LOSSES: Mapping[str, Mapping[str, str]] = {
    "f32": {"bf16": "BF16 keeps 8 of F32's 24 significant bits, and its range"},
    "f16": {
        "bf16": "BF16 keeps 8 of F16's 11 significant bits, and more than its range",
        "f32": "nothing is lost; the file is twice as large",
    },
    "bf16": {"f32": "nothing is lost; the file is twice as large"},
}

# A gain is clear if products are faster by this factor in both halves of a probe,
_CLEAR = 1.25
# by this one if the file would be larger: the small matrices of a probe lie nearer to the processor
# than a model's, so that products in F32 were found 1.45 times as fast as in F16 where a run was
# 1.11 times as fast (benchmarks/results/source-types.md),
_CLEAR_IF_LARGER = 2.0
# and the run as a whole would take no more than this part of the time.
_MOST_TIME = 0.9
# A type with more bytes a weight has to be faster than a smaller one by this factor.
_FOR_SIZE = 1.1
_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class SourceAdvice:
    """A type of weights with which a run on this CPU would be faster.

    Attributes:
        source, target: the type of the model's large matrices, and the faster one, as
            imatrix.quantize names them: "F16", "BF16".
        source_speed, target_speed: multiplications a second of products like the model's.
        time: how much of its time a run would take, between 0 and 1.
        loss: what converting loses, in words.
        seconds: of a chunk, as the model is.
    """

    source: str
    target: str
    source_speed: float
    target_speed: float
    time: float
    loss: str
    seconds: float


@dataclass(frozen=True)
class Products:
    """What a chunk multiplies by weights of one type, either experts or all others.

    Attributes:
        shape: of the products that take most of it.
        multiplications: a chunk, of all of them together.
    """

    shape: ProductShape
    multiplications: float


def large_type(tensors: Mapping[str, SourceTensor]) -> str | None:
    """The ggml type with most bytes among the matrices of a model, if all are F32, F16 or BF16.

    None for a model with quantized matrices: the data would be those of the quantized model whatever
    is done to it. Indices, which nothing is multiplied by, do not count.
    """
    found: dict[str, int] = {}
    for kind, shape in tensors.values():
        if len(shape) < 2 or kind in ("i8", "i16", "i32", "i64"):
            continue
        if kind not in _LOSSES:
            return None
        found[kind] = found.get(kind, 0) + data_bytes(shape, kind)
    return max(found, key=lambda kind: found[kind], default=None)


def targets(source: str, *, room: bool) -> tuple[str, ...]:
    """The types that weights of a type may become.

    Args:
        room: whether the memory holds the model with twice the bytes.
    """
    return tuple(kind for kind in _LOSSES[source] if room or _BYTES[kind] <= _BYTES[source])


def products_of(
    tensors: Mapping[str, SourceTensor],
    counts: Mapping[str, NDArray[np.int64]],
    kind: str,
    *,
    chunks: int,
    tokens: int,
    n_ubatch: int,
    logits: float = 0.0,
) -> tuple[Products, ...]:
    """What a chunk multiplies by the weights of a type, as a run has counted it.

    Args:
        tensors: of the model's file.
        counts: rows that each weight has seen, int64 [1], of experts [n_mat].
        kind: the type.
        chunks, tokens: of which these are the counts.
        n_ubatch: tokens a graph.
        logits: rows a chunk that the LM head multiplies; its weight has no counts.
    """
    dense: dict[ProductShape, float] = {}
    experts: dict[ProductShape, float] = {}
    for name, tensor in tensors.items():
        if tensor.type != kind or len(tensor.shape) not in (2, 3):
            continue
        rows = logits if name == _lm_head(tensors) else 0.0
        routed = False
        if (seen := counts.get(name)) is not None:
            rows = float(seen.sum()) / chunks
            routed = len(seen) > 1
        if not rows:
            continue
        n_in, n_out, n_mat = (*tensor.shape, 1)[:3]
        if routed:
            key = ProductShape(
                n_in=n_in,
                n_out=n_out,
                n_rows=max(1, round(n_ubatch * rows * chunks / tokens)),
                n_mat=n_mat,
            )
            experts[key] = experts.get(key, 0.0) + rows * n_in * n_out
        else:
            key = ProductShape(n_in=n_in, n_out=n_out, n_rows=n_ubatch)
            dense[key] = dense.get(key, 0.0) + rows * n_in * n_out * n_mat
    return tuple(
        Products(max(found, key=lambda key: found[key]), sum(found.values()))
        for found in (dense, experts)
        if found
    )


def advise(
    products: Sequence[Products],
    timed: Timed,
    source: str,
    wanted: Iterable[str],
    seconds: float,
) -> SourceAdvice | None:
    """The type that a run would be clearly faster with; None if there is none.

    Args:
        products: what a chunk multiplies by weights of the type `source`.
        timed: how long that takes, by weights of each type.
        source: the type.
        wanted: types that the weights may become.
        seconds: that a chunk took.
    """

    def is_clear(kind: str) -> bool:
        factor = _CLEAR_IF_LARGER if _BYTES[kind] > _BYTES[source] else _CLEAR
        return all(
            a >= factor * b
            for a, b in zip(
                _halves(products, timed, source), _halves(products, timed, kind), strict=True
            )
        )

    def whole(kind: str) -> float:
        return _seconds(products, timed, kind)

    clear = [kind for kind in wanted if is_clear(kind)]
    if not clear:
        return None
    least = min(_BYTES[kind] for kind in clear)
    best = min(clear, key=lambda kind: whole(kind) * (1 if _BYTES[kind] == least else _FOR_SIZE))
    time = foretold_time(products, timed, source, best, seconds)
    if time > _MOST_TIME:
        return None
    total = sum(each.multiplications for each in products)
    return SourceAdvice(
        source=source.upper(),
        target=best.upper(),
        source_speed=total / whole(source),
        target_speed=total / whole(best),
        time=time,
        loss=_LOSSES[source][best],
        seconds=seconds,
    )


def foretold_time(
    products: Sequence[Products], timed: Timed, source: str, target: str, seconds: float
) -> float:
    """How much of its time a chunk would take with weights of another type, by a probe.

    Args:
        products, timed, source, seconds: as for advise().
        target: the type, one that was timed.
    """
    now = _seconds(products, timed, source)
    # the products alone get faster; and a probe may find them slower than a whole run
    share = min(1.0, now / seconds)
    return 1 - share * (1 - _seconds(products, timed, target) / now)


def _halves(products: Sequence[Products], timed: Timed, kind: str) -> tuple[float, float]:
    """Seconds of a chunk's products by both halves of a probe."""
    pairs = list(zip(products, timed, strict=True))
    return (
        sum(each.multiplications * times[kind].first for each, times in pairs),
        sum(each.multiplications * times[kind].second for each, times in pairs),
    )


def _seconds(products: Sequence[Products], timed: Timed, kind: str) -> float:
    """Seconds of a chunk's products by the whole of a probe."""
    return sum(_halves(products, timed, kind)) / 2


def _lm_head(tensors: Mapping[str, SourceTensor]) -> str:
    """The weight that makes the logits."""
    return "output.weight" if "output.weight" in tensors else "token_embd.weight"
