"""The thread in which native steps run, and how work ends if the interpreter exits.

A second thread waits for the steps, so that Ctrl-C reaches it while the first one is in native code.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar

__all__ = ["NativeThread", "Work", "end_at_exit", "ended_at_exit"]

T = TypeVar("T")

# Seconds that the interpreter waits when it exits for runs in daemon threads, which it would not
# wait for by itself. A step that is told to end does so within a graph.
_PATIENCE = 60.0


class NativeThread:
    """Runs functions one after the other, in a thread of its own, until the context ends.

    This is no ThreadPoolExecutor: one takes no more work once the main thread is through, which
    would end a run in another thread that the interpreter is waiting for. The thread is a daemon,
    because the interpreter must not wait for a run that only a daemon waits for.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._work = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="imatrix", daemon=True)
        self._thread.start()

    def __enter__(self) -> NativeThread:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._work.put(None)
        self._thread.join()

    def submit(self, function: Callable[..., T], *args: Any, **options: Any) -> Future[T]:
        """Have a function run after those that were submitted before it."""
        future: Future[T] = Future()
        self._work.put((future, lambda: function(*args, **options)))
        return future

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, function = item
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            # these would keep alive what the caller has let go of, until the next function comes
            del item, future, function


class Work:
    """Work that takes a while, and that an interpreter that exits may have to end.

    Args:
        what: name of the work in the error.
        cancel: ends the native step that is running; called in any thread.
    """

    def __init__(self, what: str, cancel: Callable[[], object] | None = None) -> None:
        self.cancel = cancel
        self._what = what
        self._why: str | None = None
        self.over = threading.Event()

    def check(self) -> None:
        """Called between two native steps, and after one that was cancelled.

        Raises:
            RuntimeError: the work has to end.
        """
        if self._why is not None:
            raise RuntimeError(f"the {self._what} was ended: {self._why}")

    def end(self, why: str) -> None:
        """Have it end soon; called in any thread."""
        self._why = why
        if self.cancel is not None:
            self.cancel()


class Endable(Protocol):
    """What the interpreter may have to end.

    Attributes:
        over: is set once it has ended.
    """

    over: threading.Event

    def end(self, why: str) -> None:
        """Make it end soon; called in any thread."""


class _Ends:
    """Runs and works that have to end before the interpreter does."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._running: list[weakref.ref[Endable]] = []
        self._exiting = False

    def begin(self, each: Endable) -> None:
        """Remember a run or a work until over() is called for it.

        Raises:
            RuntimeError: the interpreter exits, and waits for no more in this thread.
        """
        with self._guard:
            # what runs at exit (atexit) runs in the main thread, and may do what it likes
            if self._exiting and threading.current_thread() is not threading.main_thread():
                raise RuntimeError("the interpreter exits: nothing more can be started")
            self._running = [ref for ref in self._running if ref() is not None]
            self._running.append(weakref.ref(each))

    def over(self, each: Endable) -> None:
        """Forget a run or a work, which has ended."""
        with self._guard:
            self._running = [ref for ref in self._running if ref() not in (None, each)]

    def __call__(self) -> None:
        with self._guard:
            self._exiting = True
            running = [each for ref in self._running if (each := ref()) is not None]
        for each in running:
            each.end("the interpreter exits")
        for each in running:
            each.over.wait(_PATIENCE)


end_at_exit = _Ends()
# after threads that are no daemons have been joined, and before anything native goes away
atexit.register(end_at_exit)

if hasattr(os, "register_at_fork"):
    # the works of other threads are not in a fork, nor is a thread that would release the guard
    os.register_at_fork(after_in_child=end_at_exit.__init__)  # type: ignore[misc]


@contextmanager
def ended_at_exit(what: str) -> Iterator[Work]:
    """If the interpreter exits, it ends the work inside first, and waits for that. Otherwise, for a
    daemon thread, the engine would be taken down while a step runs.

    Args:
        what: name of the work in the error.

    Raises:
        RuntimeError: the interpreter exits already.
    """
    work = Work(what)
    end_at_exit.begin(work)
    try:
        yield work
    finally:
        work.cancel = None
        work.over.set()
        end_at_exit.over(work)
