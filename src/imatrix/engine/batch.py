"""How many tokens a decode: what n_batch="auto" chooses. docs/memory.md has the rule.

A graph goes over all weights once, however many tokens it has. Where they do not stay in memory
they are read from the disk each time, so the tokens of one graph (n_ubatch) decide what is read
for each of them. More tokens take more memory for activations, keys and values: how much is asked
of the engine, which plans its contexts without taking any memory (llama_model_params.no_alloc),
in a child process as the rehearsal is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix.engine import devices
from imatrix.engine.children import run_on_model
from imatrix.engine.interface import MemoryUses
from imatrix.engine.memory import available_memory
from imatrix.engine.settings import MAX_SEQ, USUAL_UBATCH, Batch, SessionSettings, usual
from imatrix.errors import EngineError
from imatrix.native import engine

__all__ = ["Room", "choose", "choose_in_child"]

# Of the memory that is free: weights, activations and all, if they fit together
_ALL = 0.9
# and what is left to activations, keys and values if the weights do not fit anyway. They take
# turns in the rest, which has to hold the few that a layer needs and what is read ahead.
_BESIDE_WEIGHTS = 0.5


@dataclass(frozen=True)
class Room:
    """Bytes that are free with the model loaded: on the host, and on each device by its name."""

    host: int
    devices: Mapping[str, int]


def choose(
    n_ctx: int,
    need: Callable[[Batch], MemoryUses | None],
    room: Room,
    *,
    mapped: bool,
    most: int,
    causal: bool = True,
) -> Batch:
    """The batch that reads the weights least often.

    Args:
        n_ctx: tokens a chunk.
        need: what a batch takes; None if the engine makes no such contexts.
        room: what is free with the model loaded.
        mapped: whether weights on the host are mapped: the pages of a file count as free.
        most: chunks side by side at most, 1 with a head.
        causal: whether a chunk can be decoded in parts.
    """
    least = usual(n_ctx) if causal else Batch(1, n_ctx, n_ctx)
    uses = need(least)
    if uses is None:
        return least  # the run will say why
    weights = sum(use["model"] for use in uses if mapped and _in_pages(use))
    if weights + _on_host(uses) <= _ALL * room.host:
        return least

    def fits(batch: Batch) -> bool:
        uses = need(batch)
        return (
            uses is not None
            and _on_host(uses) <= _BESIDE_WEIGHTS * room.host
            and all(
                use["context"] + use["compute"] <= _ALL * room.devices.get(use["device"], 0)
                for use in uses
                if not use["host"]
            )
        )

    def side_by_side(n_seq: int) -> Batch:
        return Batch(n_seq, n_seq * n_ctx, n_seq * n_ctx)

    if fits(side_by_side(1)):
        good, bad = 1, min(most, MAX_SEQ) + 1
        while good + 1 < bad:  # memory grows with the number of chunks
            # from below: contexts far too large take long to plan
            n_seq = min(2 * good, (good + bad) // 2)
            good, bad = (n_seq, bad) if fits(side_by_side(n_seq)) else (good, n_seq)
        return side_by_side(good)
    # not even one chunk in one graph: a part of it, the parts as equal as can be
    for parts in range(2, -(-n_ctx // USUAL_UBATCH) if causal else 0):
        part = Batch(1, -(-n_ctx // parts), -(-n_ctx // parts))
        if fits(part):
            return part
    return least


def _in_pages(use: engine.MemoryUse) -> bool:
    return use["host"] and use["plain"]


def _on_host(uses: MemoryUses) -> int:
    """Bytes of the system's memory that contexts take."""
    return sum(use["context"] + use["compute"] for use in uses if use["host"])


def choose_in_child(
    model: Path,
    mtp_model: Path | None,
    settings: SessionSettings,
    *,
    n_gpu_layers: int,
    placement: engine.PlacementData,
    mapped: bool,
    most: int,
    causal: bool,
) -> Batch:
    """choose() for a model that is loaded, with the memory that is free now.

    Args:
        model, mtp_model, settings: as for the rehearsal; the batch in `settings` is not looked at.
        n_gpu_layers, placement, mapped, most, causal: as the model is loaded, and see choose().

    Raises:
        ModelError: the engine ends the process on this model.
        EngineError: the engine could not plan it.
        ValueError: there are RPC servers.
    """
    if not sys.executable:
        raise EngineError(
            "n_batch='auto' (-b auto) plans in a child process, and this interpreter does not know "
            "its own executable: give the number of tokens"
        )
    if devices.rpc_servers():
        raise ValueError(
            "n_batch='auto' (-b auto) plans in a child process, and a ggml-rpc-server serves one "
            "process at a time: give the number of tokens"
        )
    gpus = any(device.gpu for device in devices.backends().devices)
    request = {
        "do": "choose a batch",
        "model": str(model),
        "mtp_model": mtp_model and str(mtp_model),
        "settings": settings.as_data(),
        "n_gpu_layers": n_gpu_layers if gpus else 0,
        "placement": placement,
        "host": available_memory(),
        "mapped": mapped,
        "most": most,
        "causal": causal,
    }
    status, stdout, stderr = run_on_model(request, mtp_model or model, cards=gpus)
    try:
        return Batch(**json.loads(stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        raise EngineError(
            f"{model}: could not find out how much memory a decode takes: "
            f"{stderr.strip()[-500:] or f'status {status}'}. Give n_batch (-b) as "
            "a number."
        ) from None
