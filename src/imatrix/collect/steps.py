"""Where the steps of a run come from: this machine's session, or the workers of a cluster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Protocol

from imatrix.cluster.work import Block
from imatrix.collect.run import Run
from imatrix.engine.interface import NativeSession
from imatrix.engine.sums import BlockSums
from imatrix.text.chunks import Chunk

__all__ = ["ClusterSteps", "SessionSteps", "Steps"]


class Steps(Protocol):
    """The steps of one run, in their order.

    A step collects some chunks and counts them. It is called in the native thread, where no signal
    can come between sums and counts.
    """

    @property
    def session(self) -> NativeSession | None:
        """The session whose step can be stopped; None if a step only adds what was collected
        elsewhere."""

    def take(self) -> Callable[[], None] | None:
        """The next step; None if the text has come to its end. May wait for it."""

    def look_ahead(self) -> None:
        """Called while a step runs: get ready what take() would have to wait for."""


class SessionSteps:
    """Groups of chunks that a session here collects.

    Args:
        groups: the chunks of each step. The next ones are read and tokenized while a step runs.
    """

    def __init__(self, run: Run, session: NativeSession, groups: Iterator[list[Chunk]]) -> None:
        self.session = session
        self._collect = functools.partial(run.collect, session)
        self._groups = groups
        self._next: list[Chunk] | None = None

    def take(self) -> Callable[[], None] | None:
        """See Steps."""
        self.look_ahead()
        group, self._next = self._next, None
        return None if group is None else functools.partial(self._collect, group)

    def look_ahead(self) -> None:
        """See Steps."""
        if self._next is None:
            self._next = next(self._groups, None)


class ClusterSteps:
    """Blocks that workers have collected, to be added here.

    Args:
        sums: what they are added to.
        blocks: the chunks of each block and what came of them, in the order of the text.
    """

    session = None

    def __init__(
        self, run: Run, sums: BlockSums, blocks: Iterator[tuple[list[Chunk], Block]]
    ) -> None:
        self._add = functools.partial(run.add, sums)
        self._blocks = blocks

    def take(self) -> Callable[[], None] | None:
        """See Steps."""
        found = next(self._blocks, None)
        return None if found is None else functools.partial(self._add, *found)

    def look_ahead(self) -> None:
        """Nothing: the workers are ahead by themselves, and whoever waits for them reports the
        run's progress, which must not happen while a block is added."""
