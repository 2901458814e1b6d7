"""How long a Collector lives: one run at a time, in the process that made it, ended from any
thread, and closed in the end."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from imatrix.engine.background import end_at_exit
from imatrix.engine.interface import NativeSession

__all__ = ["Closing", "Lifecycle"]

Self = TypeVar("Self", bound="Closing")


class Lifecycle:
    """Whether a Collector is closed, who runs on it, and whether that run has to end.

    Args:
        owner: the Collector in words, for a warning.

    Attributes:
        guard: held while the model is loaded outside of a run.
        over: is set while no run is on; the interpreter waits for it when it exits
            (imatrix.engine.background).
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.guard = threading.RLock()
        self._pid = os.getpid()
        self._closed = False
        self._runner: int | None = None  # the thread of a run
        self._ending: str | None = None  # why the run has to end
        self._stepping: NativeSession | None = None  # end() has to stop its step
        self.over = threading.Event()
        self.over.set()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def in_fork(self) -> bool:
        """Whether this process is a fork of the one that made the Collector: what is native
        belongs to that one."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """That this is the process that made the Collector.

        Raises:
            RuntimeError: it is a fork of it.
        """
        if self.in_fork:
            raise RuntimeError(
                f"this Collector belongs to process {self._pid}, of which this one is a fork: what "
                "the engine has there is not here. Make a Collector here with isolate=True, or "
                "start processes by multiprocessing's 'spawn'"
            )

    def check_open(self) -> None:
        """That the Collector is not closed.

        Raises:
            ValueError: it is.
        """
        if self._closed:
            raise ValueError("this Collector is closed")

    def check_ending(self) -> None:
        """That the run may go on; called between two steps.

        Raises:
            RuntimeError: it has to end.
        """
        if self._ending is not None:
            raise RuntimeError(f"the run was ended: {self._ending}")

    def end(self, why: str) -> None:
        """Have the run that is on end soon; called in any thread, also when the interpreter exits
        (imatrix.engine.background)."""
        with self.guard:
            if self._runner is not None:
                self._ending = why
                if self._stepping is not None:
                    self._stepping.cancel()

    def close(self, free: Callable[[], None]) -> None:
        """End the run that is on, wait until it is over, and free what it used.

        If the run's own thread calls this, the run ends when its `progress` comes back, and frees
        what it used.
        """
        self._closed = True
        if self.in_fork:
            return
        self.end("this Collector was closed")
        if self._runner == threading.get_ident():
            return
        self.over.wait()
        free()

    @contextmanager
    def running(self, free: Callable[[], None]) -> Iterator[None]:
        """Be the one run of this Collector.

        Args:
            free: frees what the run used, if the Collector is closed meanwhile. It is not kept:
                a reference cycle would delay the Collector's __del__ and its ResourceWarning.

        Raises:
            RuntimeError: another run is on, the run was ended, or this process is a fork.
            ValueError: the Collector is closed.
        """
        self.check_process()
        with self.guard:
            if self._runner is not None:
                where = "this" if self._runner == threading.get_ident() else "another"
                raise RuntimeError(
                    f"a run of this Collector is on, in {where} thread; wait for it, or make a "
                    "Collector of its own for each"
                )
            end_at_exit.begin(self)
            self._runner = threading.get_ident()
            self.over.clear()
            self._ending = None
        try:
            self.check_open()
            yield
        except InterruptedError:
            # of the step that end() has stopped
            if self._ending is None:
                raise
            raise RuntimeError(f"the run was ended: {self._ending}") from None
        finally:
            with self.guard:
                self._runner = None
                if self._closed:
                    free()
                self.over.set()
            end_at_exit.over(self)

    @contextmanager
    def stoppable(self, session: NativeSession | None) -> Iterator[None]:
        """Whatever ends the run stops this session's step too; None if there is no session here."""
        with self.guard:
            self._stepping = session
        try:
            yield
        finally:
            with self.guard:
                self._stepping = None


class Closing:
    """What has to be closed: a context manager that warns if nobody closed it.

    A class that is derived from it sets `_life` last when it is made: one whose arguments were
    refused has nothing to close.
    """

    _life: Lifecycle

    def close(self) -> None:
        """Free what is held."""
        raise NotImplementedError

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        life = getattr(self, "_life", None)
        if life is not None and not life.closed and not life.in_fork:
            warnings.warn(
                f"{life.owner} was never closed; use it in a with statement",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
            self.close()
