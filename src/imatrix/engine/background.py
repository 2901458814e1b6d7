"""The thread that native steps run in, beside the one that waits for them, and how both end when
the interpreter does."""

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
from typing import Any, TypeVar

__all__ = ["NativeThread", "Work", "end_at_exit", "ended_at_exit"]

T = TypeVar("T")

# How long the interpreter waits, when it exits, for runs in threads that it does not wait for
# (daemons). A step that is told to end does so within a graph.
_PATIENCE = 60.0


class NativeThread:
    """Runs functions one after the other, in a thread of its own, until the context ends.

    Not a ThreadPoolExecutor: one takes no more work once the main thread is through, which would
    end a run in another thread that the interpreter is waiting for. And the thread is a daemon:
    the interpreter must not wait for a run that only a daemon waits for.
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
            # or it would keep what the caller has let go of, until the next one
            del item, future, function


class Work:
    """What a function does here that takes a while, and that the interpreter may have to end.

    Args:
        what: what to call it in the error.
        cancel: ends the native step that is on; called in any thread.
    """

    def __init__(self, what: str, cancel: Callable[[], object] | None = None) -> None:
        self.cancel = cancel
        self._what = what
        self._why: str | None = None
        self._over = threading.Event()

    def check(self) -> None:
        """Between two native steps, and after one that was cancelled.

        Raises:
            RuntimeError: it has to end.
        """
        if self._why is not None:
            raise RuntimeError(f"the {self._what} was ended: {self._why}")

    def _end(self, why: str) -> None:
        self._why = why
        if self.cancel is not None:
            self.cancel()


class _Ends:
    """What has to end before the interpreter does."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._running: list[weakref.ref[Any]] = []
        self._exiting = False

    def begin(self, each: Any) -> None:
        """`each` has _end(why), which has it end soon, and an event _over, set once it has.

        Raises:
            RuntimeError: the interpreter exits, and waits for no more in this thread.
        """
        with self._guard:
            # what runs at exit (atexit) runs in the main thread, and may do what it likes
            if self._exiting and threading.current_thread() is not threading.main_thread():
                raise RuntimeError("the interpreter exits: nothing more can be started")
            self._running = [ref for ref in self._running if ref() is not None]
            self._running.append(weakref.ref(each))

    def over(self, each: Any) -> None:
        with self._guard:
            self._running = [ref for ref in self._running if ref() not in (None, each)]

    def __call__(self) -> None:
        with self._guard:
            self._exiting = True
            running = [each for ref in self._running if (each := ref()) is not None]
        for each in running:
            each._end("the interpreter exits")
        for each in running:
            each._over.wait(_PATIENCE)


end_at_exit = _Ends()
# after threads that are no daemons have been joined, and before anything native goes away
atexit.register(end_at_exit)

if hasattr(os, "register_at_fork"):
    # the works of other threads are not in a fork, nor is a thread that would release the guard
    os.register_at_fork(after_in_child=end_at_exit.__init__)  # type: ignore[misc]


@contextmanager
def ended_at_exit(what: str) -> Iterator[Work]:
    """The interpreter, should it exit, has the work inside end first, and waits for that: in a
    daemon thread it would otherwise take the engine down below a step that is on.

    Raises:
        RuntimeError: the interpreter exits already.
    """
    work = Work(what)
    end_at_exit.begin(work)
    try:
        yield work
    finally:
        work.cancel = None
        work._over.set()
        end_at_exit.over(work)
