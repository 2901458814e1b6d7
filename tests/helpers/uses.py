"""Models that need a chosen amount of memory for a batch, for tests of n_batch="auto"."""

from __future__ import annotations

from collections.abc import Callable

from imatrix.engine.settings import Batch
from imatrix.native import engine

MB = 10**6


# --- the rule ------------------------------------------------------------------------------------


def need(
    weights: int, chunk: int, token: int, fixed: int = 0, device: int = 0, on_device: int = 0
) -> Callable[[Batch], list[engine.MemoryUse]]:
    """A model that needs these bytes: for mapped weights, for a chunk's keys and values, for one
    token of a graph."""

    def uses(batch: Batch) -> list[engine.MemoryUse]:
        context, compute = batch.n_seq * chunk, batch.n_ubatch * token
        on_gpu: engine.MemoryUse = {
            "device": "GPU0", "host": False, "plain": False,
            "model": on_device, "context": 0, "compute": device * batch.n_ubatch,
        }  # fmt: skip
        return [
            {"device": "CPU", "host": True, "plain": True,
             "model": weights, "context": context, "compute": compute},
            {"device": "CPU", "host": True, "plain": False,
             "model": fixed, "context": 0, "compute": 0},
            *([on_gpu] if device else []),
        ]  # fmt: skip

    return uses
