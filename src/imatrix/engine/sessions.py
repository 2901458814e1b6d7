"""Sessions that go when their models do."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from imatrix.engine.interface import MemoryUses, NativeSession
from imatrix.formats.checkpoint import Group

if TYPE_CHECKING:
    from imatrix.native.engine import ContextPlans

__all__ = ["OpenSession"]


class OpenSession:
    """A session that imatrix.engine.models.Models has opened, until Models closes it.

    A native session keeps its models in memory. Models closes this one before it drops them, so
    that nobody who still holds it keeps a model alive or reaches one that is gone. After that there
    are no sums: snapshot(), counts(), groups() and counters are empty, and every other call but
    cancel() and clear_cancel() is a ValueError.

    Any thread may call it. Closing waits for the call that is on, a step too.
    """

    def __init__(self, session: NativeSession) -> None:
        self._session: NativeSession | None = session
        self._lock = threading.RLock()  # a call is on

    def close(self) -> None:
        """Let the native session go, and with it what it holds of the models."""
        with self._lock:
            self._session = None

    def step(
        self, tokens: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> list[tuple[float, float, int]]:
        """See NativeSession.step."""
        with self._lock:
            return self._open().step(tokens, lengths)

    def cancel(self) -> None:
        """See NativeSession.cancel."""
        # not under the lock, which the running step holds
        if (session := self._session) is not None:
            session.cancel()

    def clear_cancel(self) -> None:
        """See NativeSession.clear_cancel."""
        if (session := self._session) is not None:
            session.clear_cancel()

    def clear_sums(self) -> None:
        """See NativeSession.clear_sums."""
        with self._lock:
            self._open().clear_sums()

    def restore(
        self,
        names: list[str],
        sums: NDArray[np.float64],
        counts: NDArray[np.int64],
        signed_sums: NDArray[np.float64] | None = None,
    ) -> None:
        """See NativeSession.restore."""
        with self._lock:
            self._open().restore(names, sums, counts, signed_sums)

    def snapshot(
        self,
    ) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64] | None]]:
        """See NativeSession.snapshot."""
        with self._lock:
            return {} if self._session is None else self._session.snapshot()

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """See NativeSession.counts."""
        with self._lock:
            return {} if self._session is None else self._session.counts()

    def groups(self) -> list[Group]:
        """See NativeSession.groups."""
        with self._lock:
            return [] if self._session is None else self._session.groups()

    @property
    def counters(self) -> Mapping[str, object]:
        """See NativeSession.counters."""
        with self._lock:
            return {} if self._session is None else self._session.counters

    @property
    def plan(self) -> ContextPlans:
        """See NativeSession.plan."""
        with self._lock:
            return self._open().plan

    @property
    def memory(self) -> MemoryUses:
        """See NativeSession.memory."""
        with self._lock:
            return self._open().memory

    def _open(self) -> NativeSession:
        if self._session is None:
            raise ValueError("this session is closed: its models were freed or loaded anew")
        return self._session
