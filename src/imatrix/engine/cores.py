"""How many threads to compute with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["physical_cores"]


def physical_cores() -> int:
    """Physical cores that this process may use, at least 1.

    Matrix multiplication gains nothing from a core's second hardware thread; llama.cpp's
    programs count the same way (common/common.cpp, cpu_get_num_math).
    """
    logical = _usable_cpus()
    if sys.platform == "linux":
        siblings = set()
        for cpu in logical:
            path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            try:
                siblings.add(path.read_text().strip())
            except OSError:
                return max(1, len(logical))
        return max(1, len(siblings))
    if sys.platform == "darwin":
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            result = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True)
            if result.returncode == 0 and result.stdout.strip().isdigit():
                return max(1, int(result.stdout))
    return max(1, len(logical))


def _usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
