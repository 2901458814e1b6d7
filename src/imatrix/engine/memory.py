"""How much memory this process may still take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory"]

_CGROUPS = Path("/sys/fs/cgroup")


def available_memory(proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> int:
    """Bytes that can be taken without swapping, page cache counted as free.

    On Linux MemAvailable of /proc/meminfo, or what the limits of this process's control groups
    (version 1 or 2) leave if that is less. Elsewhere psutil tells.

    Args:
        proc, cgroups: where the kernel's files are; for tests.

    Raises:
        ImportError: not Linux, and psutil is not installed.
    """
    if not sys.platform.startswith("linux"):
        try:
            import psutil
        except ImportError:
            raise ImportError(
                "n_batch='auto' (-b auto) needs psutil on this system to see the free memory: pip "
                "install psutil, or give the number of tokens"
            ) from None
        return int(psutil.virtual_memory().available)
    meminfo = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    least = int(meminfo["MemAvailable"].split()[0]) * 1024
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            mount, names = cgroups, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            mount = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        for group in _upwards(mount, path):
            left = _left(group, *names)
            least = least if left is None else min(least, left)
    return least


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """A group and those around it. Inside a container the path may be the host's."""
    group = mount / path.lstrip("/")
    while group != mount:
        yield group
        group = group.parent
    yield mount


def _left(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Bytes that a group's limit leaves; None without one."""
    try:
        most = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if most == "max":
        return None
    # pages of files give way to whoever needs memory
    cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, int(most) - used + cache)
