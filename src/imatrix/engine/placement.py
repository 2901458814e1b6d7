"""On which devices a model's tensors lie, in llama.cpp's terms."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from imatrix.native.engine import PlacementData

__all__ = [
    "MAX_DEVICES",
    "NO_TENSOR_MODE",
    "OTHER_DEVICES",
    "Overrides",
    "Placement",
    "SplitMode",
    "advise_on_devices",
    "blames_device",
    "on_cpu",
    "parse_overrides",
]

SplitMode = Literal["none", "layer", "row", "tensor"]
Overrides = Mapping[str, str] | Sequence[tuple[str, str]]

# A stretch of the graph that ends with a product of which each device has a part loses the sum over
# the devices (ggml-backend-meta.cpp: the last subgraph is not reduced), and looking at activations
# cuts the graph behind such products.
NO_TENSOR_MODE = (
    "split_mode 'tensor' (-sm tensor) cannot be collected with: where this engine's graph is looked "
    "at, that mode leaves out sums over the devices, and every activation after that is wrong (it "
    "is so in llama-imatrix too). Take 'layer', or 'row'; imatrix evaluate can use it"
)

# What to do about a GPU that cannot be used, and how one shows: in the errors that the engine gives
# for a device (llama-context.cpp; ggml-alloc.c), and in what a GPU's backend says when it ends the
# process (CUDA_CHECK in ggml-cuda.cu and its like; what() of Vulkan's exceptions).
OTHER_DEVICES = (
    "Of the GPUs, devices=[...] (-dev NAME,...) takes those that can be used, devices=[] (-dev none) "
    "none of them; `imatrix collect --list-devices` names them"
)
_DEVICE_FAILED = re.compile(
    r"failed to (?:initialize (?!CPU)\S+ backend|allocate (?!CPU)\S+ buffer)"
)
_BACKEND_ENDED = re.compile(
    r"ggml-(?:cuda|hip|musa|vulkan|sycl|metal|opencl|cann)\b|\bvk::|Device ?Lost"
)

# llama_max_devices() in src/llama.cpp
MAX_DEVICES = 16

# LLAMA_MAX_LAYERS in src/llama-hparams.h
_MAX_LAYERS = 512

# Weights of routed experts and of dense feed-forward networks, as -cmoe and -ncffn have them
# (LLM_FFN_EXPS_REGEX and LLM_FFN_DENSE_REGEX in common/common.h)
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_DENSE = r"\.ffn_(up|down|gate)\."
_CPU = "CPU"  # ggml_backend_cpu_buffer_type()'s name


@dataclass(frozen=True)
class Placement:
    """The devices, and how a model is divided over them. Collector documents its arguments of these
    names.

    Attributes:
        devices: names; an empty tuple for the CPU alone, None for the engine's choice.
        overrides: pairs of a regular expression and a buffer type; the first one that finds a
            tensor counts.
    """

    split_mode: SplitMode = "layer"
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    devices: tuple[str, ...] | None = None
    overrides: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls,
        *,
        split_mode: SplitMode = "layer",
        tensor_split: Sequence[float] | None = None,
        main_gpu: int = 0,
        devices: Sequence[str] | None = None,
        override_tensor: Overrides = (),
        cpu_moe: bool = False,
        n_cpu_moe: int = 0,
    ) -> Placement:
        """The placement of Collector's arguments.

        Raises:
            ValueError: something is no split mode, share or regular expression on any machine.
                What this machine does not have is found when a model is loaded.
        """
        if split_mode not in get_args(SplitMode):
            raise ValueError(
                f"split_mode must be one of {', '.join(get_args(SplitMode))}, got {split_mode!r}"
            )
        shares = tuple(float(share) for share in tensor_split or ())
        if not all(math.isfinite(share) and share >= 0 for share in shares):
            raise ValueError(f"tensor_split: shares must be 0 or more, got {shares}")
        if len(shares) >= MAX_DEVICES:
            # llama.cpp refuses that number too (common/arg.cpp)
            raise ValueError(
                f"tensor_split has {len(shares)} shares, the engine takes {MAX_DEVICES - 1} at most"
            )
        if n_cpu_moe < 0:
            raise ValueError(f"n_cpu_moe must be 0 or more, got {n_cpu_moe}")
        if isinstance(devices, str):
            raise ValueError(f"devices must be a list of names, got {devices!r}")
        if isinstance(override_tensor, str):
            raise ValueError(
                f"override_tensor must be pairs of a pattern and a buffer type, got "
                f"{override_tensor!r}"
            )
        overrides = override_tensor
        pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
        every = [(str(pattern), str(buffer)) for pattern, buffer in pairs]
        from imatrix.native import engine  # not by a cluster's scheduler, see settings

        for pattern, _ in every:
            try:
                engine.find_name(pattern, ())
            except ValueError as error:
                raise ValueError(f"override_tensor: {error}") from None
        if cpu_moe:
            every += on_cpu("experts")
        every += on_cpu("experts", n_cpu_moe)
        names = None if devices is None else tuple(devices)
        return cls(split_mode, shares, main_gpu, () if names == ("none",) else names, tuple(every))

    def as_data(self) -> PlacementData:
        """What imatrix.native.engine.Model takes, also as JSON."""
        return {
            "split_mode": self.split_mode,
            "tensor_split": list(self.tensor_split),
            "main_gpu": self.main_gpu,
            "devices": None if self.devices is None else list(self.devices),
            "overrides": list(self.overrides),
        }

    def warn_of_idle(self, tensors: Iterable[str], model: str) -> None:
        """Warn of each override that finds no tensor, which the engine says nothing about."""
        from imatrix.native import engine

        names = list(tensors)
        for pattern, _ in self.overrides:
            if engine.find_name(pattern, names) is not None:
                continue
            if pattern.endswith(_EXPERTS):
                why = f"{model} has no experts" + (
                    "" if pattern == _EXPERTS else " in its first blocks"
                )
                warnings.warn(f"{why}: nothing is kept on the CPU for them", stacklevel=4)
            else:
                warnings.warn(
                    f"override_tensor: {pattern!r} finds no tensor of {model}; the first of its "
                    f"{len(names)} are {', '.join(names[:3])}",
                    stacklevel=4,
                )


def blames_device(cause: str) -> bool:
    """Whether what ended the engine's process came from the backend of a GPU."""
    return _BACKEND_ENDED.search(cause) is not None


def advise_on_devices(error: Exception) -> None:
    """If the engine could not use a GPU, add to the error how to go without that one."""
    if _DEVICE_FAILED.search(str(error)) is not None:
        error.args = (f"{error}. {OTHER_DEVICES}",)


def on_cpu(
    kind: Literal["experts", "dense"], blocks: int | Sequence[int] | None = None
) -> list[tuple[str, str]]:
    """The overrides that keep feed-forward weights on the CPU (-cmoe, -ncmoe, -ncffn).

    Args:
        blocks: how many of the first blocks, or the numbers of blocks; None for all.
    """
    pattern = _EXPERTS if kind == "experts" else _DENSE
    if blocks is None:
        return [(pattern, _CPU)]
    if isinstance(blocks, int):
        blocks = range(min(blocks, _MAX_LAYERS))
    numbers = "|".join(map(str, blocks))
    return [(rf"blk\.({numbers}){pattern}", _CPU)] if numbers else []


def parse_overrides(text: str) -> list[tuple[str, str]]:
    """The pairs in -ot's PATTERN=BUFFER,... as parse_tensor_buffer_overrides in common/arg.cpp takes
    it apart: at each comma, then at the first equals sign.

    Raises:
        ValueError: a part without an equals sign.
    """
    found = []
    for part in text.split(","):
        pattern, equals, buffer = part.partition("=")
        if not equals:
            raise ValueError(f"expected PATTERN=BUFFER,... as exps=CPU, got {part!r} in {text!r}")
        found.append((pattern, buffer))
    return found
