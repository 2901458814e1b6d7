"""Writing a file so that a reader sees the old content or the new, never a part of either."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["clear", "leftovers_of", "replacing", "replacing_together"]

# How many characters of a file's name go into the name of its temporary file. With its ending that
# stays below the usual limit of 255 bytes, at 4 bytes a character at worst.
_NAME = 40


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes ``path`` in one step.

    The temporary file lies in the same folder, since a rename is only atomic inside one file
    system. It exists, empty, when the block is entered. After the block it is flushed to the
    disk, renamed over ``path``, and the folder is flushed too, so that the rename survives a
    power cut. If the block or any of these steps fails, the temporary file is removed and a file
    that was at ``path`` stays as it was.

    A symbolic link is followed: the file it points to is replaced, not the link. A file that is
    replaced passes on its permission bits; a new one gets those the umask leaves.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: ``path`` is a folder.
        OSError: ``path`` is neither absent nor a regular file (a device, a pipe), or writing
            failed (no space, no permission).
    """
    target = Path(os.path.realpath(path))
    folder = target.parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"cannot write {os.fspath(path)!r}: the folder {str(folder)!r} does not exist; "
            "create it first"
        )
    mode = _mode_of(target)
    # os.open and not tempfile: tempfile makes files that only the owner can read, and the umask
    # cannot be asked for without changing it for every thread.
    temporary = folder / f".{target.name[:_NAME]}.{secrets.token_hex(8)}.tmp"
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        if mode is not None:
            temporary.chmod(mode)
        _flush(temporary, os.O_RDWR)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # Windows cannot open a folder; its rename is journaled
        _flush(folder, os.O_RDONLY)


@contextmanager
def replacing_together(
    paths: Iterable[str | os.PathLike[str]],
) -> Iterator[tuple[Path, ...]]:
    """Give a temporary path for each path; on success all of them get their names, one by one.

    None is renamed before the block has ended and all are on the disk. See replacing().

    Raises:
        OSError: as replacing() does.
    """
    with contextlib.ExitStack() as stack:
        temporaries = tuple(stack.enter_context(replacing(path)) for path in paths)
        yield temporaries
        for temporary in temporaries:
            _flush(temporary, os.O_RDWR)


def clear(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files of processes that were killed while they replaced ``path``.

    The caller knows that no process is writing it now. If the name is too long to stand in full in
    the names of temporary files, none is removed, since they may be another file's.
    """
    target = Path(os.path.realpath(path))
    if len(target.name) > _NAME:
        return
    pattern = leftovers_of(target)
    with contextlib.suppress(OSError):  # a leftover does no harm
        for left in target.parent.iterdir():
            if pattern.fullmatch(os.fspath(left)):
                left.unlink(missing_ok=True)


def leftovers_of(path: str | os.PathLike[str]) -> re.Pattern[str]:
    """What the paths of temporary files for ``path`` look like, links resolved."""
    target = Path(os.path.realpath(path))
    start = os.fspath(target.with_name(f".{target.name}.")) if target.name else ""
    return re.compile(re.escape(start) + r"[0-9a-f]{16}\.tmp")


def _mode_of(target: Path) -> int | None:
    """The permission bits of ``target``; None if there is none. Refuses what is not a file."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"cannot write {str(target)!r}: it is a folder; name a file in it")
    if not stat.S_ISREG(status.st_mode):
        # A rename would put a plain file where the device was.
        raise OSError(
            f"cannot write {str(target)!r}: it is not a regular file, so it cannot be replaced in "
            "one step; name a file"
        )
    return stat.S_IMODE(status.st_mode)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
