"""Makes file calls of this process fail, or kill it there, at the system call: see
native/faults.cpp.

tests/collect/test_robustness.py and benchmarks/robustness.py use it, on Linux on x86-64 and aarch64
only. A process cannot stop being watched, and programs that it starts die: use a process that is
made for the purpose and runs nothing else.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import sys
from collections import Counter
from pathlib import Path

from helpers import engine_tools

# as in native/faults.cpp
OPEN, WRITE, SYNC, RENAME, UNLINK, CHANGE, LOCK, OPEN_READ = (1 << i for i in range(8))
NAMES = {
    OPEN: "open", WRITE: "write", SYNC: "sync", RENAME: "rename", UNLINK: "remove",
    CHANGE: "chmod or truncate", LOCK: "lock", OPEN_READ: "open to read",
}  # fmt: skip
ALL = 255
KILL, TEAR, FAIL, FAIL_ON = 1, 2, 3, 4

SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")

_KINDS = 1 << 16
_watched: list[Tally] = []


class Tally:
    """What a process did to its files; to be made before the fork."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 + _KINDS)
        self._buffer = (ctypes.c_char * len(self._memory)).from_buffer(self._memory)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._buffer)

    @property
    def kinds(self) -> list[int]:
        """The kind of every call, in order."""
        (seen,) = struct.unpack_from("<q", self._memory)
        if seen > _KINDS:
            raise RuntimeError(f"{seen} calls are too many to keep")
        return list(self._memory[8 : 8 + seen])

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def __str__(self) -> str:
        return ", ".join(f"{n} {NAMES[kind]}" for kind, n in Counter(self.kinds).items())


def watch(folder: Path, tally: Tally) -> None:
    """Count the calls on files in `folder` from here on."""
    library = _library()
    _watched.append(tally)  # from here on, calls write to it
    error = library.faults_watch(os.fsencode(os.path.realpath(folder)), tally.address)
    if error:
        raise OSError(error, os.strerror(error), "seccomp")


def arm(number: int, action: int, *, kinds: int = ALL, error: int = 0) -> None:
    """Act at the `number`-th call (from 1), or from there on, counting only calls of these
    kinds."""
    _library().faults_arm(kinds, number, action, error)


def _library() -> ctypes.CDLL:
    name = "libimatrix-faults.so"
    found = list(engine_tools.ROOT.glob(f"build/*/tests/native/{name}"))
    if not found:
        raise LookupError(f"{name} is not built: run `make tools`")
    library = ctypes.CDLL(str(max(found, key=lambda path: path.stat().st_mtime)))
    library.faults_watch.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.faults_arm.argtypes = [ctypes.c_uint, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    return library
