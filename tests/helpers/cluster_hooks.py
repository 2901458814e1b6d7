"""What tests/cluster does to the workers of a cluster. Client.run runs these functions on the
workers, which import this module, so that it imports little itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distributed import WorkerPlugin

from imatrix.cluster import worker as _blocks
from imatrix.cluster.work import Block

_step = _blocks._step


def _first(marker: str) -> bool:
    """Whether this is the first caller."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _before_step(act: Callable[[list[Any], int], None]) -> None:
    def step(session: Any, group: list[Any], at: int, block: Block) -> None:
        act(group, at)
        _step(session, group, at, block)

    _blocks._step = step


def as_it_was() -> None:
    _blocks._step = _step
    _blocks._TELL = 2.0


def worker_dies_once(marker: str) -> None:
    """The first worker that reaches the second chunk of a block is killed there."""

    def act(_group: list[Any], at: int) -> None:
        if at == 1 and _first(marker):
            os.kill(os.getpid(), signal.SIGKILL)

    _before_step(act)


def engine_dies(tokens: list[int], marker: str | None) -> None:
    """The engine ends in the chunk with these tokens; with a marker, only once."""

    def act(group: list[Any], _at: int) -> None:
        if group[0].tolist() == tokens and (marker is None or _first(marker)):
            assert _blocks._loaded.models is not None
            engine = _blocks._loaded.models.engine
            assert engine is not None
            os.kill(engine.pid, signal.SIGABRT)

    _before_step(act)


class Deadly(WorkerPlugin):
    """Every worker is killed at the chunk with these tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def setup(self, worker: Any) -> None:
        def act(group: list[Any], _at: int) -> None:
            if group[0].tolist() == self.tokens:
                os.kill(os.getpid(), signal.SIGKILL)

        _before_step(act)


def set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def slow(seconds: float) -> None:
    """Every chunk takes that many seconds, and is reported."""
    _blocks._TELL = 0.0

    def act(_group: list[Any], _at: int) -> None:
        time.sleep(seconds)

    _before_step(act)


def engines() -> list[int]:
    """Process ids of the engines that are loaded there."""
    models = _blocks._loaded.models
    engine = None if models is None else models.engine
    return [] if engine is None else [engine.pid]
