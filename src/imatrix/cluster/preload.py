"""What a worker of a local cluster loads first (Dask's `preload`)."""

from __future__ import annotations

import signal


def dask_setup(_worker: object) -> None:
    """Ignore Ctrl-C at the terminal: it is for the process that started this one, which saves what
    there is and then ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
