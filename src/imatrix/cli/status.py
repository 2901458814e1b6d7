"""Exit statuses, and how an error ends a command."""

from __future__ import annotations

__all__ = ["FAILED", "INTERRUPTED", "OK", "TERMINATED", "USAGE", "Stopped", "describe_error"]

OK, FAILED, USAGE = 0, 1, 2
# 128 + the signal's number, as a shell has it
INTERRUPTED, TERMINATED = 130, 143


class Stopped(Exception):
    """The command cannot go on. The message is for the user, the status for the shell."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def describe_error(error: Exception) -> str:
    """An error in a line, for a person."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}" if str(error) else "out of memory"
    return str(error) or type(error).__name__
