"""The thread that native steps run in, beside the one that waits for them."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

__all__ = ["NativeThread", "end_at_exit"]

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

    def submit(self, function: Callable[..., None], *args: Any) -> Future[None]:
        future: Future[None] = Future()
        self._work.put((future, lambda: function(*args)))
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


class _Ends:
    """What has to end before the interpreter does."""

    def __init__(self) -> None:
        self.running: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self) -> None:
        running = list(self.running)
        for each in running:
            each._end("the interpreter exits")
        for each in running:
            each._over.wait(_PATIENCE)


end_at_exit = _Ends()
# after threads that are no daemons have been joined, and before anything native goes away
atexit.register(end_at_exit)
