"""The native part of a Collector in a process of its own, so that somebody is left if it dies.

The engine ends its process on what it holds for impossible (ggml_abort), and the system ends one
that takes too much memory. Neither can be caught in that process. `Engine` starts one, which does what
it is asked (imatrix.engine.service). `Model`, `Session` and `Evaluator` are what `imatrix.native.engine` offers
under these names, done there. Everything else of a run (text, checkpoint, files) stays in the
caller's process.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import queue
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imatrix.engine import devices, frames
from imatrix.engine.background import end_at_exit
from imatrix.engine.children import last_words, start_child
from imatrix.engine.placement import OTHER_DEVICES, blames_device
from imatrix.engine.products import ProductShape, ProductTimes, Timed
from imatrix.errors import (
    EngineDiedError,
    EngineError,
    ModelError,
    NonFiniteError,
    RowsMissingError,
)
from imatrix.formats.checkpoint import Group

if TYPE_CHECKING:
    from imatrix.native.engine import ChunkEvaluation, DeviceInfo, MemoryUse

__all__ = ["Engine", "Evaluator", "Model", "Session"]

_log = logging.getLogger("imatrix.engine")

_ERRORS_TOLD = 3  # of the engine's last lines, if a device's backend ended it
_LOG = 64 * 1024  # of the child's standard error that is kept, bytes

_ERRORS: dict[str, type[Exception]] = {
    "EngineError": EngineError,
    "InterruptedError": InterruptedError,
    "MemoryError": MemoryError,
    "ModelError": ModelError,
    "OSError": OSError,
    "RuntimeError": RuntimeError,
    "RowsMissingError": RowsMissingError,
    "ValueError": ValueError,
}

Answer = tuple[dict[str, Any], list[NDArray[Any]]]


class Engine:
    """The engine's child process, started now.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        if not sys.executable:
            raise OSError(
                "no process of its own for the engine: this interpreter does not know its own "
                "executable (sys.executable is empty); go without (isolate=False, --no-isolate)"
            )
        self._process = start_child()
        # Written by a thread: Ctrl-C must not end a message half way, and an object may be freed
        # (tell) at any moment, whatever lock is held then.
        self._requests: queue.SimpleQueue[tuple[dict[str, Any], Sequence[NDArray[Any]]] | None]
        self._requests = queue.SimpleQueue()
        self._requests.put(({"do": "serve"}, ()))
        self._guard = threading.Lock()  # of what follows
        self._waiting: dict[int, Future[Answer]] = {}
        self._listeners: dict[int, Callable[[Any], object]] = {}
        self._died: EngineDiedError | None = None
        self._closing = False
        self._numbers = itertools.count(1)
        self._tail = bytearray()
        self._listener = threading.Thread(target=self._listen, name="imatrix-isolate", daemon=True)
        self._log_reader = threading.Thread(
            target=self._read_log, name="imatrix-isolate-log", daemon=True
        )
        self._writer = threading.Thread(
            target=self._write, name="imatrix-isolate-requests", daemon=True
        )
        self._log_reader.start()
        self._listener.start()
        self._writer.start()
        _engines.add(self)
        try:
            for endpoint in devices.rpc_servers():
                self.ask("rpc", endpoint=endpoint)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        with self._guard:
            return self._died is None and not self._closing

    def ask(
        self,
        do: str,
        arrays: Sequence[NDArray[Any]] = (),
        *,
        on_progress: Callable[[Any], object] | None = None,
        **request: Any,
    ) -> Answer:
        """Have something done, and wait for it.

        Args:
            do: the method of imatrix.engine.service that does it, without its "_do_".
            arrays, request: what it gets.
            on_progress: called with what it tells meanwhile, in a thread of ours.

        Raises:
            EngineDiedError: the child is gone.
            Exception: what it raised.
        """
        number = next(self._numbers)
        future: Future[Answer] = Future()
        with self._guard:
            if self._died is not None:
                raise self._dead()
            self._waiting[number] = future
            if on_progress is not None:
                self._listeners[number] = on_progress
        self._requests.put(({"do": do, "number": number, **request}, arrays))
        answer, found = future.result()
        if "error" in answer:
            raise _error_from(answer["error"])
        return answer, found

    def tell(self, do: str, number: int) -> None:
        """Have something done to an object, at once and without an answer."""
        self._requests.put(({"do": do, "object": number}, ()))

    def new_number(self) -> int:
        """A number for an object over there."""
        return next(self._numbers)

    def close(self) -> None:
        """End the child. Safe to call twice."""
        with self._guard:
            if self._closing:
                return
            self._closing = True
        _engines.discard(self)
        # it ends at once, whatever it does: nobody wants the result
        self._process.kill()
        self._process.wait()
        self._requests.put(None)
        self._writer.join()
        self._listener.join()
        self._log_reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was not written yet
                stream.close()

    def forget(self) -> None:
        """In a fork: leave the child to the process that started it."""
        self._closing = True
        self._process.returncode = 0  # not our child: nothing to wait for
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            # not stream.close(): its lock may be held by a thread that is not here, and what is
            # in its buffer is not ours to write
            with contextlib.suppress(OSError):
                os.close(stream.fileno())

    def _write(self) -> None:
        stream = self._process.stdin
        assert stream is not None
        while (item := self._requests.get()) is not None:
            # a child that is gone is found by _listen, which answers for it
            with contextlib.suppress(OSError, ValueError):
                frames.send(stream, *item)
            del item

    def _listen(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        why = ""
        errors: list[str] = []
        try:
            while True:
                message, arrays = frames.receive(stream)
                if "log" in message:
                    _log.log(message["log"], "%s", message["line"])
                    if message["log"] >= logging.ERROR:
                        errors = [*errors[1 - _ERRORS_TOLD :], message["line"].strip()]
                    continue
                if "progress_of" in message:
                    with self._guard:
                        listener = self._listeners.get(message["progress_of"])
                    if listener is not None:
                        listener(message["progress"])
                    continue
                with self._guard:
                    future = self._waiting.pop(message["number"], None)
                    self._listeners.pop(message["number"], None)
                if future is not None:
                    future.set_result((message, arrays))
        except EOFError:
            pass
        except (OSError, MemoryError, ValueError) as error:
            why = f"its answer could not be read ({error or type(error).__name__})"
            self._process.kill()
        status = self._process.wait()
        self._log_reader.join()
        log = self._tail.decode("utf-8", "replace")
        cause = why or _cause(log, status)
        cure = ""
        if blames_device(cause):
            # its backend has said which device, and why, in lines before the last (ggml-cuda.cu,
            # ggml_cuda_error)
            cause += f" ({'; '.join(errors)})" if errors else ""
            cure = OTHER_DEVICES
        with self._guard:
            self._died = EngineDiedError(
                f"the process that ran the engine is gone: {cause}", cause=cause, log=log, cure=cure
            )
            waiting, self._waiting = self._waiting, {}
            self._listeners.clear()
        for future in waiting.values():
            future.set_exception(self._dead())

    def _dead(self) -> EngineDiedError:
        assert self._died is not None
        # each caller gets its own: they add to it
        died = self._died
        return EngineDiedError(died.args[0], cause=died.cause, log=died.log, cure=died.cure)

    def _read_log(self) -> None:
        """Keep the end of what the child writes to its standard error, and log it."""
        stream = self._process.stderr
        assert stream is not None
        with contextlib.suppress(OSError, ValueError):
            for line in stream:
                self._tail += line
                del self._tail[:-_LOG]
                if text := line.decode("utf-8", "replace").rstrip():
                    _log.info("%s", text)


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _in_fork() -> None:
    # or the child would outlive the process that it works for, as long as this one holds the pipe
    for engine in list(_engines):
        engine.forget()


@atexit.register
def _at_exit() -> None:
    # The runs end first, whichever of the two modules was imported first: a run saves its sums, which
    # are in a child. Then the children: a thread that still reads from one would hold its stream's
    # lock while the interpreter takes the stream down, which is fatal.
    end_at_exit()
    for engine in list(_engines):
        engine.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_fork)


class Model:
    """imatrix.native.engine.Model in the child."""

    def __init__(self, engine: Engine, path: str, **options: Any) -> None:
        self.engine = engine
        self.number = engine.new_number()
        found, _ = engine.ask(
            "model",
            object=self.number,
            path=path,
            options=options,
            log_level=_log.getEffectiveLevel(),
        )
        self.n_nextn: int = found["n_nextn"]
        self.n_trunk: int = found["n_trunk"]
        self.n_vocab: int = found["n_vocab"]
        self.n_ctx_train: int = found["n_ctx_train"]
        self.has_tokenizer: bool = found["has_tokenizer"]
        self.has_decoder: bool = found["has_decoder"]
        self.has_encoder: bool = found["has_encoder"]
        self.add_bos: bool = found["add_bos"]
        self.bos: int = found["bos"]
        self.description: str = found["description"]

    def __del__(self) -> None:
        if hasattr(self, "number"):
            self.engine.tell("free", self.number)

    def causal(self) -> bool:
        found, _ = self.engine.ask("causal", object=self.number)
        causal: bool = found["causal"]
        return causal

    def token_text(self, token: int) -> str:
        found, _ = self.engine.ask("token_text", object=self.number, token=token)
        text: str = found["text"]
        return text

    def metadata(self, prefix: str) -> dict[str, str]:
        found, _ = self.engine.ask("metadata", object=self.number, prefix=prefix)
        metadata: dict[str, str] = found["metadata"]
        return metadata

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        options = {"add_special": add_special, "parse_special": parse_special}
        _, (tokens,) = self.engine.ask("tokenize", object=self.number, text=text, options=options)
        return tokens


class Session:
    """imatrix.native.engine.Session in the child."""

    def __init__(self, model: Model, head: Model | None = None) -> None:
        self.model = model
        self.head = head
        self._engine = model.engine
        self._number = model.engine.new_number()
        self.plan: Any = None
        self._engine.ask(
            "session",
            object=self._number,
            model=model.number,
            head=None if head is None else head.number,
        )

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            self._engine.tell("free", self._number)

    def open(self, **settings: Any) -> None:
        found, _ = self._engine.ask(
            "open", object=self._number, settings=settings, log_level=_log.getEffectiveLevel()
        )
        self.plan = {context: tuple(plan) for context, plan in found["plan"].items()}

    def step(
        self, tokens: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> list[tuple[float, float, int]]:
        found, _ = self._engine.ask("step", [tokens, lengths], object=self._number)
        return [(nll, nll_sq, n) for nll, nll_sq, n in found["scores"]]

    def clear_sums(self) -> None:
        self._engine.ask("clear_sums", object=self._number)

    def cancel(self) -> None:
        self._engine.tell("cancel", self._number)

    def clear_cancel(self) -> None:
        self._engine.tell("clear_cancel", self._number)

    def groups(self) -> list[Group]:
        found, arrays = self._engine.ask("groups", object=self._number)
        left = iter(arrays)
        return [
            (names, next(left), next(left), next(left) if signed else None)
            for names, signed in found["groups"]
        ]

    def snapshot(
        self,
    ) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64] | None]]:
        return {
            name: (sums, counts, signed)
            for names, sums, counts, signed in self.groups()
            for name in names
        }

    def counts(self) -> dict[str, NDArray[np.int64]]:
        found, arrays = self._engine.ask("counts", object=self._number)
        return dict(zip(found["names"], arrays, strict=True))

    def restore(
        self,
        names: list[str],
        sums: NDArray[np.float64],
        counts: NDArray[np.int64],
        signed_sums: NDArray[np.float64] | None = None,
    ) -> None:
        arrays: list[NDArray[Any]] = [sums, counts]
        if signed_sums is not None:
            arrays.append(signed_sums)
        self._engine.ask("restore", arrays, object=self._number, names=names)

    @property
    def memory(self) -> list[MemoryUse]:
        found, _ = self._engine.ask("memory", object=self._number)
        memory: list[MemoryUse] = found["memory"]
        return memory

    @property
    def counters(self) -> dict[str, int]:
        found, _ = self._engine.ask("counters", object=self._number)
        counters: dict[str, int] = found["counters"]
        return counters


class Evaluator:
    """imatrix.native.engine.Evaluator in the child."""

    def __init__(
        self,
        model: Model,
        head: Model | None = None,
        reference: Model | None = None,
        reference_head: Model | None = None,
    ) -> None:
        self._engine = model.engine
        self._number = model.engine.new_number()
        # freed over there only when this goes
        self._models = (model, head, reference, reference_head)
        self._engine.ask(
            "evaluator",
            object=self._number,
            models=[None if each is None else each.number for each in self._models],
        )

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            self._engine.tell("free", self._number)

    def open(self, **settings: Any) -> None:
        self._engine.ask(
            "open_evaluator",
            object=self._number,
            settings=settings,
            log_level=_log.getEffectiveLevel(),
        )

    def step(self, tokens: NDArray[np.int32]) -> ChunkEvaluation:
        answer, arrays = self._engine.ask("score", [tokens], object=self._number)
        *rows, known, accepted = arrays
        found: Any = {"trunk": {}, "head": {}, "known": known, "accepted": accepted}
        for (part, name), values in zip(answer["names"], rows, strict=True):
            found[part][name] = values
        evaluation: ChunkEvaluation = found
        return evaluation

    def cancel(self) -> None:
        self._engine.tell("cancel", self._number)

    def clear_cancel(self) -> None:
        self._engine.tell("clear_cancel", self._number)


def machine(engine: Engine) -> tuple[str, list[DeviceInfo]]:
    """What the child computes with: instruction sets and build, in the engine's words, and
    its devices."""
    found, _ = engine.ask("devices")
    return found["features"], found["devices"]


def measure_products(
    engine: Engine, shapes: Sequence[ProductShape], types: Sequence[str], *, n_threads: int
) -> Timed | None:
    """imatrix.engine.products.measure in the child."""
    found, _ = engine.ask(
        "products",
        shapes=[asdict(shape) for shape in shapes],
        types=list(types),
        n_threads=n_threads,
        log_level=_log.getEffectiveLevel(),
    )
    if found["timed"] is None:
        return None
    return tuple(
        {kind: ProductTimes(*times) for kind, times in each.items()} for each in found["timed"]
    )


def _cause(log: str, status: int) -> str:
    if hasattr(signal, "SIGKILL") and status == -signal.SIGKILL:
        return "killed (SIGKILL), as the system does where memory runs out"
    words = last_words(log, status)
    name = last_words("", status)
    if words != name:
        return f"{name}: {words}"
    # not an assertion: the C++ runtime, the C library, or the interpreter may have said why
    spoken = [line.strip() for line in log.splitlines() if line.strip()]
    return f"{name}: {spoken[-1]}" if spoken else name


def _error_from(data: dict[str, Any]) -> Exception:
    if data["type"] == "NonFiniteError":
        return NonFiniteError(
            data["message"],
            weight=data["weight"],
            channel=data["channel"],
            expert=data["expert"],
        )
    if (kind := _ERRORS.get(data["type"])) is not None:
        return kind(data["message"])
    return RuntimeError(f"{data['type']}: {data['message']}")
