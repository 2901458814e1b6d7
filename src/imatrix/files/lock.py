"""One writer for a file: a lock beside it that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from imatrix.errors import LockedError

__all__ = ["locked"]

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None  # type: ignore[assignment]


# The descriptors of this process. A fork has them too, and would keep a lock after this process is
# gone, so it closes them.
_held_here: set[int] = set()


def _in_fork() -> None:
    for descriptor in _held_here:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held_here.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_fork)


def locked(path: str | os.PathLike[str], what: str = "output") -> AbstractContextManager[None]:
    """Hold the lock of ``path``, a file `<path>.lock`, until the context ends.

    The system drops the lock of a process that is gone, so a lock file that it left is taken over.
    If the system supports no locks (Windows, some network file systems), nothing is locked.

    Args:
        what: what the file is, for the message.

    Raises:
        LockedError: another process has it; the message names it.
        OSError: the lock file cannot be written.
    """
    file = Path(os.path.realpath(path) + ".lock")
    if fcntl is None:
        return contextlib.nullcontext()
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                who = f"process {holder}" if holder.isdigit() else "another process"
                raise LockedError(
                    f"{who} is writing {os.fspath(path)} (it holds {file}); wait for it, end it, "
                    f"or name another {what}"
                ) from None
            with contextlib.suppress(OSError):
                file.unlink()
            return contextlib.nullcontext()
        if _is_at(descriptor, file):
            break
        os.close(descriptor)  # its holder has removed the file meanwhile
    _held_here.add(descriptor)
    with contextlib.suppress(OSError):  # on a full disk the lock is held too, without a number
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return _held(descriptor, file)


@contextmanager
def _held(descriptor: int, file: Path) -> Iterator[None]:
    try:
        yield
    finally:
        # The file is removed while the lock is held. A process that opened it before gets the lock
        # next, and sees that the file is gone (_is_at).
        if descriptor in _held_here:  # not in a fork
            with contextlib.suppress(OSError):
                file.unlink()
            _held_here.discard(descriptor)
            os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
