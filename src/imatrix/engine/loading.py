"""Where models are loaded and sessions are made: by the engine in this process, or by one in a
process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imatrix.engine import process
from imatrix.engine.background import ended_at_exit
from imatrix.engine.interface import NativeModel, NativeSession
from imatrix.engine.products import ProductShape, Timed, measure
from imatrix.engine.settings import SessionSettings
from imatrix.native import engine

if TYPE_CHECKING:
    from imatrix.native.engine import DeviceInfo, LoadData

__all__ = ["Loader"]


class Loader:
    """Loads files and opens sessions on them.

    Args:
        isolate: in a process of its own, which is started when it is first needed.

    Attributes:
        process: the engine's own process, once it was started; None without isolate.
    """

    def __init__(self, isolate: bool) -> None:
        self._isolate = isolate
        self.process: process.Engine | None = None

    def load(self, path: Path, options: LoadData) -> NativeModel:
        """Load a model file.

        Raises:
            ModelError, MemoryError, OSError: the engine refuses it.
            EngineDiedError: the engine's own process is gone.
        """
        if self._isolate:
            return process.Model(self._started(), str(path), **options)
        with ended_at_exit("load"):
            return engine.Model(str(path), **options)

    def open(
        self, trunk: NativeModel, head: NativeModel | None, settings: SessionSettings
    ) -> NativeSession:
        """Make a session on models that load() has given.

        Raises:
            ModelError, EngineError, MemoryError: there can be no such contexts.
            EngineDiedError: the engine's own process is gone.
        """
        session: process.Session | engine.Session
        if isinstance(trunk, process.Model):
            assert head is None or isinstance(head, process.Model)
            session = process.Session(trunk, head)
        else:
            assert isinstance(trunk, engine.Model)
            assert head is None or isinstance(head, engine.Model)
            session = engine.Session(trunk, head)
        session.open(**settings.as_data())
        return session

    def devices(self) -> list[DeviceInfo]:
        """The devices that the engine sees where it runs."""
        if self._isolate:
            return process.machine(self._started())[1]
        return engine.backends()[1]

    def features(self) -> str:
        """Instruction sets and build of the engine's own process, in its words."""
        assert self._isolate
        return process.machine(self._started())[0]

    def measure_products(
        self, shapes: Sequence[ProductShape], types: Sequence[str], *, n_threads: int
    ) -> Timed | None:
        """See imatrix.engine.products.measure; measured where the engine runs."""
        if self._isolate:
            return process.measure_products(self._started(), shapes, types, n_threads=n_threads)
        with ended_at_exit("probe"):
            return measure(shapes, types, n_threads=n_threads)

    @property
    def died(self) -> bool:
        """Whether the engine's own process was started and is gone, with all it had loaded."""
        return self.process is not None and not self.process.alive

    def close(self) -> None:
        """End the engine's own process, if there is one."""
        if self.process is not None:
            self.process.close()
            self.process = None

    def _started(self) -> process.Engine:
        if self.process is None:
            self.process = process.Engine()
        return self.process
