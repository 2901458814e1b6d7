"""Asks for a run whether its model would be faster in another type, with a probe of this CPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from imatrix.collect.advice import SourceAdvice, advise, large_type, products_of, targets
from imatrix.collect.run import Run
from imatrix.engine.memory import available_memory
from imatrix.engine.models import Models
from imatrix.engine.products import ProductShape, Timed
from imatrix.engine.settings import SessionSettings
from imatrix.errors import EngineError, ModelError
from imatrix.quantization.source import SourceTensor, source_tensors

__all__ = ["Adviser"]

_log = logging.getLogger("imatrix")


class Adviser:
    """Advice on the type of one model's file. What the file says and a probe has found is kept.

    Args:
        models: the model.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self._tensors: dict[str, SourceTensor] | None = None
        self._timed: dict[tuple[object, ...], Timed | None] = {}

    def advice(self, run: Run, settings: SessionSettings) -> SourceAdvice | None:
        """See Collector.source_advice."""
        # a step in another thread would disturb the probe, and be disturbed: it waits
        with run.lock:
            if run.pace is None or not run.collects_here or not self._models.on_cpu:
                return None
            try:
                return self._advice(run, settings)
            except (EngineError, MemoryError, ModelError, OSError) as error:
                # advice is not worth a run: what is wrong with the engine, the run will find too
                _log.info("no advice on the model's type: %s", error)
                return None

    def _advice(self, run: Run, settings: SessionSettings) -> SourceAdvice | None:
        file = self._models.trunk_file
        if self._tensors is None:
            self._tensors = source_tensors(file)
        tensors = self._tensors
        source = large_type(tensors)
        if source is None:
            return None
        assert run.pace is not None
        work = run.work()
        products = products_of(
            tensors,
            work.counts,
            source,
            chunks=work.chunks,
            tokens=work.tokens,
            n_ubatch=min(settings.batch.n_ubatch, settings.batch.n_batch),
            logits=work.scored / work.chunks,
        )
        wanted = targets(source, room=_has_room(2 * file.size))
        if not products or not wanted:
            return None
        timed = self._probe([each.shape for each in products], (source, *wanted), settings)
        return None if timed is None else advise(products, timed, source, wanted, run.pace)

    def _probe(
        self, shapes: Sequence[ProductShape], types: Sequence[str], settings: SessionSettings
    ) -> Timed | None:
        key = (*shapes, *types, settings.n_threads)
        if key not in self._timed:
            self._timed[key] = self._models.loader.measure_products(
                shapes, types, n_threads=settings.n_threads
            )
        return self._timed[key]


def _has_room(size: int) -> bool:
    """Whether so many bytes can be read into memory; no if nobody knows."""
    try:
        return size <= available_memory()
    except ImportError:
        return False
