"""A figure, how sure it is, and the bootstrap over chunks that says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Difference", "Estimate"]

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
RESAMPLES = 1000
_SEED = 20240229


@dataclass(frozen=True)
class Estimate:
    """A figure and how sure it is.

    Attributes:
        value: the figure itself.
        error: standard error, with every position taken as independent, as llama-perplexity has
            it; for the accepted length the standard deviation of the bootstrap. NaN if there
            are too few positions.
        low, high: 95 % interval, from a bootstrap over chunks (percentiles of 1000 resamples, a
            fixed seed). Positions of a chunk hang together, so it is the one to trust. NaN with
            fewer than two chunks.
        n: positions behind it.
    """

    value: float
    error: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """One evaluation's figure minus another's, and what can be said of it.

    Attributes:
        verdict: "better" or "worse", for the first of the two, if the interval leaves out
            zero; "no difference shown" if it does not; "too few chunks to tell" without one.
    """

    verdict: str


class Sample:
    """Chunks, and bootstrap resamples of them: means are ratios of sums over chunks."""

    def __init__(self, chunk: NDArray[np.int32]) -> None:
        self._chunk = chunk
        self._n_chunks = int(chunk.max()) + 1
        rng = np.random.default_rng(_SEED)
        share = np.full(self._n_chunks, 1 / self._n_chunks)
        # how often each chunk is drawn: [resamples, chunks]
        self._drawn = rng.multinomial(self._n_chunks, share, size=RESAMPLES)

    def means(self, values: NDArray[Any], where: NDArray[np.bool_] | None = None) -> F64:
        """The mean of `values`, then that of every resample: [1 + resamples]; NaN for none."""
        weights = None if where is None else where.astype(np.float64)
        counts = np.bincount(self._chunk, weights, self._n_chunks).astype(np.float64)
        kept = values if where is None else np.where(where, values, 0)
        sums = np.bincount(self._chunk, kept.astype(np.float64), self._n_chunks).astype(np.float64)
        return self.ratios(sums, counts)

    def ratios(self, sums: F64, counts: F64) -> F64:
        """Sum over chunks / count over chunks, then that of every resample: [1 + resamples]; NaN for
        nothing by nothing.

        Args:
            sums, counts: [chunks].
        """
        out = np.full(1 + RESAMPLES, np.nan)
        n = np.concatenate([[counts.sum()], self._drawn @ counts])
        total = np.concatenate([[sums.sum()], self._drawn @ sums])
        np.divide(total, n, out=out, where=n > 0)
        return out

    def estimate(self, means: F64, error: float, n: int) -> Estimate:
        resampled = means[1:][np.isfinite(means[1:])]
        low = high = math.nan
        if self._n_chunks > 1 and resampled.size:
            low, high = (float(v) for v in np.percentile(resampled, (2.5, 97.5)))
        return Estimate(float(means[0]), error, low, high, n)

    def mean(self, values: NDArray[Any], where: NDArray[np.bool_] | None = None) -> Estimate:
        kept = values if where is None else values[where]
        return self.estimate(self.means(values, where), _standard_error(kept), len(kept))

    def spread(self, means: F64) -> float:
        """Standard deviation of the resamples."""
        resampled = means[1:][np.isfinite(means[1:])]
        return float(resampled.std()) if self._n_chunks > 1 and resampled.size else math.nan


def _standard_error(values: NDArray[Any]) -> float:
    """sqrt((mean of squares - square of mean) / (n - 1)), as llama-perplexity has it."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values.astype(np.float64)) / math.sqrt(len(values) - 1))


def exponential(mean: Estimate) -> Estimate:
    with np.errstate(over="ignore"):
        value, low, high = (float(v) for v in np.exp([mean.value, mean.low, mean.high]))
    return Estimate(value, value * mean.error, low, high, mean.n)


def with_verdict(found: Estimate, less_is_better: bool) -> Difference:
    if math.isnan(found.low):
        verdict = "too few chunks to tell"
    elif found.low <= 0 <= found.high:
        verdict = "no difference shown"
    else:
        verdict = "better" if (found.high < 0) == less_is_better else "worse"
    return Difference(found.value, found.error, found.low, found.high, found.n, verdict)


def estimate_data(estimate: Estimate | None) -> dict[str, float | int | str | None] | None:
    if estimate is None:
        return None
    verdict = {"verdict": estimate.verdict} if isinstance(estimate, Difference) else {}
    figures = {
        "value": estimate.value,
        "error": estimate.error,
        "low": estimate.low,
        "high": estimate.high,
    }
    return {
        **{name: v if math.isfinite(v) else None for name, v in figures.items()},
        "n": estimate.n,
        **verdict,
    }
