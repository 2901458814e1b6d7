"""How much of a model goes to the devices: what n_gpu_layers="auto" comes to.

docs/backends.md has the rule. What a model and its contexts take on each device is asked of the
engine, which plans both without taking any memory (llama_model_params.no_alloc).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imatrix.engine.interface import MemoryUses
from imatrix.engine.settings import ALL, Layers
from imatrix.model.header import ModelFile
from imatrix.tensors import n_entry_values

if TYPE_CHECKING:
    from imatrix.native.engine import DeviceInfo

__all__ = ["MARGIN", "Fit", "choose", "fit_layers", "sums_size"]

# Bytes that are left free on each device: llama.cpp's default too (fit_params_target in
# common/common.h).
MARGIN = 1 << 30


@dataclass(frozen=True)
class Fit:
    """What was found to fit.

    Attributes:
        layers: what goes to the devices.
        contexts: bytes that a session's contexts will take on each device, by its name.
    """

    layers: Layers
    contexts: Mapping[str, int]


def fit_layers(
    n_blocks: int,
    need: Callable[[Layers], MemoryUses | None],
    devices: Iterable[DeviceInfo],
    beside: Mapping[str, int],
    *,
    experts: bool,
    sums: int,
) -> Fit:
    """choose() by the memory that is free on the devices now.

    Args:
        devices: those that layers can go to. One that does not say how much memory it has is taken
            to have room for all.
        beside: bytes on each device to leave to something else.
        n_blocks, need, experts, sums: as choose() has them.
    """
    free = {
        device["name"]: device["memory_free"] - beside.get(device["name"], 0)
        for device in devices
        if device["memory_total"] > 0
    }
    layers = choose(n_blocks, need, free, experts=experts, sums=sums)
    contexts: dict[str, int] = {}
    for use in need(layers) or ():
        if not use["host"]:
            taken = use["context"] + use["compute"]
            contexts[use["device"]] = contexts.get(use["device"], 0) + taken
    return Fit(layers, contexts)


def choose(
    n_blocks: int,
    need: Callable[[Layers], MemoryUses | None],
    free: Mapping[str, int],
    *,
    experts: bool,
    sums: int = 0,
) -> Layers:
    """The most that the devices have room for.

    Experts stay on the CPU before anything else does: they are most of a model's bytes, and a token
    needs few of them. Those of blocks all over the model do, so that each of several devices is
    relieved, whichever blocks it has.

    Args:
        n_blocks: blocks of the model, its head's included.
        need: what the model and its contexts take; None if the engine makes no such contexts.
        free: bytes free on each device by its name. One that is not there has room for all.
        experts: whether there are experts that may stay on the CPU.
        sums: bytes of the sums that devices hold, all together.
    """

    def fits(layers: Layers) -> bool:
        uses = need(layers)
        if uses is None:
            return False
        weights = sum(use["model"] for use in uses)
        for use in uses:
            taken = use["model"] + use["context"] + use["compute"]
            if use["host"] or use["device"] not in free or taken == 0:
                continue
            # sums lie on the device that has their weights
            taken += sums * use["model"] // max(1, weights)
            if taken > free[use["device"]] - MARGIN:
                return False
        return True

    def spread(n: int) -> tuple[int, ...]:
        return tuple(i * n_blocks // n for i in range(n))

    if fits(ALL):
        return ALL
    kept: tuple[int, ...] = ()
    if experts:
        kept = spread(n_blocks)
        if fits(Layers(-1, kept)):
            bad, good = 0, n_blocks
            while bad + 1 < good:
                n = (bad + good) // 2
                bad, good = (bad, n) if fits(Layers(-1, spread(n))) else (n, good)
            return Layers(-1, spread(good))
    good, bad = 0, n_blocks + 1
    while good + 1 < bad:
        n = (good + bad) // 2
        good, bad = (n, bad) if fits(Layers(n, kept)) else (good, n)
    if good == 0:
        # if the contexts cannot be made at all, loading all layers says why
        return Layers(0) if need(Layers(0)) is not None else ALL
    return Layers(good, kept)


def sums_size(*files: ModelFile) -> int:
    """Bytes of float32 sums of squares of all weights of these models, at most: weights that share
    their rows share their sums."""
    return sum(
        4 * n_entry_values(shape)
        for file in files
        for name, shape in file.tensors.items()
        if name.startswith("blk.") and len(shape) > 1
    )
