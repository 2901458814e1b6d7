"""Flags that say on which devices a model lies: -ngl, -sm, -ts, -mg, -dev, -ot, -cmoe, -ncmoe, -ncffn
and --rpc, with llama.cpp's names and syntax (common/arg.cpp)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, get_args

import imatrix
from imatrix.cli.flags.values import at_least, gpu_layers, whole
from imatrix.cli.terminal import Terminal
from imatrix.engine.placement import Overrides, SplitMode, on_cpu, parse_overrides
from imatrix.engine.settings import ALL
from imatrix.words import size

__all__ = ["add_arguments", "arguments", "describe_layers", "use_servers", "warn_of_no_device"]

_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """All of them, and --list-devices."""
    add = command.add_argument
    add(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        metavar="N",
        type=gpu_layers,
        help="layers on the GPU, a number, 'all' or 'auto': as many as there is room for (default: "
        "auto)",
    )
    add(
        "-sm",
        "--split-mode",
        choices=get_args(SplitMode),
        help="how a model is divided over several GPUs: none, one GPU only (-mg); layer, by blocks "
        "(default); row, within the weights, where the backend can; tensor, for evaluate only",
    )
    add(
        "-ts",
        "--tensor-split",
        metavar="N0,N1,...",
        type=_shares,
        help="each GPU's share of the model, as 3,1 (default: by their free memory)",
    )
    add(
        "-mg",
        "--main-gpu",
        metavar="INDEX",
        type=whole,
        help="the GPU that -sm none takes (default: 0)",
    )
    add(
        "-dev",
        "--device",
        metavar="DEV1,DEV2,...",
        type=_devices,
        help="devices to put layers on, in this order; none: the CPU alone (default: all there are)",
    )
    add(
        "--list-devices",
        action=_ListDevices,
        nargs=0,
        help="list the devices, those of a --rpc before this one too, and exit",
    )
    add(
        "-ot",
        "--override-tensor",
        metavar="PATTERN=BUFFER,...",
        action=_Override,
        type=_overrides,
        help="put the tensors whose names a regular expression finds into a buffer type of "
        "--list-devices, as exps=CPU; may be repeated, the first that finds one counts",
    )
    add(
        "-cmoe",
        "--cpu-moe",
        dest="override_tensor",
        action=_Override,
        nargs=0,
        const=on_cpu("experts"),
        help="keep all experts on the CPU",
    )
    add(
        "-ncmoe",
        "--n-cpu-moe",
        dest="override_tensor",
        metavar="N",
        action=_Override,
        type=lambda text: on_cpu("experts", at_least(0)(text)),
        help="keep the experts of the first N blocks on the CPU",
    )
    add(
        "-ncffn",
        "--n-cpu-ffn",
        dest="override_tensor",
        metavar="N",
        action=_Override,
        type=lambda text: on_cpu("dense", at_least(0)(text)),
        help="keep the feed-forward weights of the first N blocks on the CPU, but for experts",
    )
    add(
        "--rpc",
        metavar="SERVERS",
        help="compute on ggml-rpc-servers too: host:port,host:port,... (a build with GGML_RPC=ON)",
    )


class PlacementArguments(TypedDict):
    """Arguments of Collector and of evaluate() that the flags decide."""

    n_gpu_layers: int | Literal["auto"]
    split_mode: SplitMode
    tensor_split: Sequence[float] | None
    main_gpu: int
    devices: Sequence[str] | None
    override_tensor: Overrides


def arguments(args: argparse.Namespace) -> PlacementArguments:
    """What Collector and evaluate() take."""
    return {
        "n_gpu_layers": "auto" if args.gpu_layers is None else args.gpu_layers,
        "split_mode": args.split_mode or "layer",
        "tensor_split": args.tensor_split,
        "main_gpu": args.main_gpu or 0,
        "devices": args.device,
        "override_tensor": args.override_tensor or (),
    }


def describe_layers(collector: imatrix.Collector, args: argparse.Namespace) -> str | None:
    """What -ngl auto came to; None if all is on the GPU, or there is no GPU."""
    layers = collector.layers
    if layers in (None, ALL) or not collector.has_gpu:
        return None
    in_the_file = collector.n_nextn if args.mtp_model is None else 0
    return f"-ngl auto: {layers.describe(collector.n_trunk + in_the_file)}"


def use_servers(args: argparse.Namespace, *, isolate: bool) -> None:
    """Make the servers of --rpc known to the engine.

    Raises:
        ValueError, OSError, EngineError: as add_rpc_server() does.
    """
    if args.rpc is not None:
        # a server that goes away must not take this process with it
        from imatrix.engine.devices import name_rpc_server

        (name_rpc_server if isolate else imatrix.add_rpc_server)(args.rpc)


def warn_of_no_device(
    args: argparse.Namespace, terminal: Terminal, has_gpu: Callable[[], bool]
) -> None:
    """Warn of flags that mean nothing, if there is no device but the CPU.

    Args:
        has_gpu: asked only if such a flag is given.
    """
    given = {
        "-ngl": args.gpu_layers not in (None, 0),
        "-sm": args.split_mode is not None,
        "-ts": args.tensor_split is not None,
        "-mg": args.main_gpu is not None,
    }
    flags = [flag for flag, is_given in given.items() if is_given]
    flags += dict.fromkeys(getattr(args, "override_flags", ()))
    if flags and not has_gpu():
        are = "is" if ", " not in ", ".join(flags) else "are"
        terminal.warn(f"there is no GPU in this build or machine: {', '.join(flags)} {are} ignored")


def _shares(text: str) -> list[float]:
    shares = re.split(r"[,/]+", text)
    if len(shares) > 1 and not shares[-1]:
        shares.pop()  # llama.cpp's iterator gives none behind the last separator
    for share in shares:
        if _NUMBER.fullmatch(share) is None:
            raise argparse.ArgumentTypeError(
                f"expected each GPU's share, as 3,1 or 0.7,0.3, got {share!r} in {text!r}"
            )
    return [float(share) for share in shares]


def _devices(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def _overrides(text: str) -> list[tuple[str, str]]:
    try:
        return parse_overrides(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _Override(argparse.Action):
    """Adds to the one list of overrides, whichever flag they come from: their order counts."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*before, *(values or self.const or [])])
        namespace.override_flags = [*getattr(namespace, "override_flags", ()), option_string]


class _ListDevices(argparse.Action):
    """Prints the devices and ends the program."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            use_servers(namespace, isolate=False)
            devices = imatrix.backends().devices
        except (ImportError, ValueError, OSError, imatrix.ImatrixError) as error:
            parser.exit(2 if isinstance(error, ValueError) else 1, f"error: {error}\n")
        out = Terminal().out
        out.print("devices for -dev, and the buffer types of -ot:")
        for device in devices:
            memory = f", {size(device.memory_free)} free" if device.memory_total else ""
            line = (
                f"  {device.name}: {device.description}{memory}, buffer type {device.buffer_type}"
            )
            if device.backend == "CPU":
                line += " (not for -dev)"
            out.print(line, soft_wrap=True)
        parser.exit()
