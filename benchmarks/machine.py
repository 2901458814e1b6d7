"""What the results were made on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def told() -> str:
    """The processor and how many cores of it there are: "AMD EPYC 9554, 2 cores"."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        name = found[1]
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
