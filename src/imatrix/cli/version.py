"""`imatrix --version`: what this build has."""

from __future__ import annotations

import imatrix
from imatrix.cli.status import FAILED, OK, USAGE
from imatrix.cli.terminal import Terminal
from imatrix.words import size

__all__ = ["show_version"]


def show_version(terminal: Terminal) -> int:
    """Print the engine, its backends and the devices; the exit status."""
    out = terminal.out
    out.print(f"imatrix {imatrix.__version__}")
    try:
        found = imatrix.backends()
    except ValueError as error:  # an environment variable
        terminal.error(str(error))
        return USAGE
    except (ImportError, imatrix.EngineError) as error:
        terminal.error(str(error))
        return FAILED
    out.print(f"engine      {found.engine}")
    out.print(f"backends    {', '.join(found.built)}")
    for backend in found.unusable:
        out.print(f"unusable    {backend.file}: {backend.reason}", soft_wrap=True)
    if found.cpu_variant is not None:
        out.print(f"CPU variant {found.cpu_variant}")
    for device in found.devices:
        memory = f", {size(device.memory_free)} free" if device.memory_total else ""
        out.print(
            f"device      {device.name}: {device.description} ({device.backend}{memory})",
            soft_wrap=True,
        )
    others = [name for name in found.row_kernels if name != found.row_kernel]
    also = f" (also: {', '.join(others)})" if others else ""
    out.print(f"row kernel  {found.row_kernel}{also}")
    out.print(f"features    {found.features}", soft_wrap=True)
    return OK
