"""`imatrix --version`: what this build has."""

from __future__ import annotations

import imatrix
from imatrix.cli.status import FAILED, OK
from imatrix.cli.terminal import Terminal
from imatrix.words import size

__all__ = ["show_version"]


def show_version(terminal: Terminal) -> int:
    """Print the engine, its backends and the devices; the exit status."""
    out = terminal.out
    out.print(f"imatrix {imatrix.__version__}")
    try:
        found = imatrix.backends()
    except ImportError as error:
        terminal.error(str(error))
        return FAILED
    out.print(f"engine      {found.engine}")
    out.print(f"backends    {', '.join(found.built)}")
    for device in found.devices:
        memory = f", {size(device.memory_free)} free" if device.memory_total else ""
        out.print(
            f"device      {device.name}: {device.description} ({device.backend}{memory})",
            soft_wrap=True,
        )
    best, *others = found.row_kernels
    also = f" (also: {', '.join(others)})" if others else ""
    out.print(f"row kernel  {best}{also}")
    out.print(f"features    {found.features}", soft_wrap=True)
    return OK
