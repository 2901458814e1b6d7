"""The engine's side of imatrix.engine.process: a process that runs the engine for another one.

It reads requests from its standard input and answers on its standard output, until the input
ends: that is when the other process closes it, or is gone, however that came.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from typing import IO, Any, NoReturn

from numpy.typing import NDArray

from imatrix.engine import frames, products
from imatrix.errors import NonFiniteError
from imatrix.native import engine, quantizer

__all__ = ["serve"]

Answer = tuple[dict[str, Any], list[NDArray[Any]]]

_log = logging.getLogger("imatrix.engine")

_MODEL = (
    "n_nextn", "n_trunk", "n_vocab", "n_ctx_train", "has_tokenizer", "has_decoder",
    "has_encoder", "add_bos", "bos", "description",
)  # fmt: skip


class Service:
    """The objects that the other process knows by number, and what can be asked of them."""

    def __init__(self, requests: IO[bytes], answers: IO[bytes]) -> None:
        self._requests = requests
        self._answers = answers
        self._writing = threading.Lock()
        self._objects: dict[int, Any] = {}

    def run(self) -> NoReturn:
        """Answer requests until there are no more, and end the process."""
        # more than one: a text is tokenized while a chunk runs
        with ThreadPoolExecutor(2) as threads:
            while True:
                try:
                    request, arrays = frames.receive(self._requests)
                except (EOFError, OSError):
                    # not a return: a chunk may be on its way, and nobody waits for it
                    os._exit(0)
                if request["do"] in ("cancel", "clear_cancel"):
                    with contextlib.suppress(KeyError):  # free was faster
                        getattr(self._objects[request["object"]], request["do"])()
                elif request["do"] == "free":
                    self._objects.pop(request["object"], None)
                else:
                    threads.submit(self._answer, request, arrays)

    def log(self, record: logging.LogRecord) -> None:
        self._send({"log": record.levelno, "line": record.getMessage()}, [])

    def _answer(self, request: dict[str, Any], arrays: list[NDArray[Any]]) -> None:
        try:
            answer, found = getattr(self, f"_do_{request['do']}")(request, arrays)
        except Exception as error:
            answer, found = {"error": _as_data(error)}, []
        self._send({"number": request["number"], **answer}, found)

    def _send(self, message: dict[str, Any], arrays: list[NDArray[Any]]) -> None:
        try:
            with self._writing:
                frames.send(self._answers, message, arrays)
        except OSError:  # nobody is there to work for
            os._exit(1)

    # --- what can be asked -------------------------------------------------

    def _do_rpc(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        engine.add_rpc_server(request["endpoint"])
        return {}, []

    def _do_devices(self, _request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        features = engine.system_info().strip()
        return {"devices": engine.backends()[1], "features": features}, []

    def _do_products(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        _log.setLevel(request["log_level"])
        shapes = [products.ProductShape(**shape) for shape in request["shapes"]]
        timed = products.measure(shapes, request["types"], n_threads=request["n_threads"])
        if timed is None:
            return {"timed": None}, []
        rows = [{kind: astuple(times) for kind, times in each.items()} for each in timed]
        return {"timed": rows}, []

    def _do_model(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        _log.setLevel(request["log_level"])
        model = engine.Model(request["path"], **request["options"])
        self._objects[request["object"]] = model
        return {name: getattr(model, name) for name in _MODEL}, []

    def _do_tokenize(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        model = self._objects[request["object"]]
        return {}, [model.tokenize(request["text"], **request["options"])]

    def _do_token_text(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        return {"text": self._objects[request["object"]].token_text(request["token"])}, []

    def _do_metadata(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        return {"metadata": self._objects[request["object"]].metadata(request["prefix"])}, []

    def _do_causal(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        return {"causal": self._objects[request["object"]].causal()}, []

    def _do_session(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        head = None if request["head"] is None else self._objects[request["head"]]
        session = engine.Session(self._objects[request["model"]], head)
        self._objects[request["object"]] = session
        return {}, []

    def _do_open(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        _log.setLevel(request["log_level"])
        session = self._objects[request["object"]]
        session.open(**request["settings"])
        return {"plan": session.plan}, []

    def _do_step(self, request: dict[str, Any], arrays: list[NDArray[Any]]) -> Answer:
        # JSON has the shortest decimals that give the same float64 again
        return {"scores": self._objects[request["object"]].step(*arrays)}, []

    def _do_groups(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        groups = self._objects[request["object"]].groups()
        arrays = [array for _, *data in groups for array in data if array is not None]
        # [names, whether signed sums follow the sums and counts]
        return {"groups": [[names, signed is not None] for names, _, _, signed in groups]}, arrays

    def _do_counts(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        counts = self._objects[request["object"]].counts()
        return {"names": list(counts)}, list(counts.values())

    def _do_restore(self, request: dict[str, Any], arrays: list[NDArray[Any]]) -> Answer:
        self._objects[request["object"]].restore(request["names"], *arrays)
        return {}, []

    def _do_clear_sums(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        self._objects[request["object"]].clear_sums()
        return {}, []

    def _do_memory(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        return {"memory": self._objects[request["object"]].memory}, []

    def _do_evaluator(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        models: list[Any] = [
            None if number is None else self._objects[number] for number in request["models"]
        ]
        self._objects[request["object"]] = engine.Evaluator(*models)
        return {}, []

    def _do_open_evaluator(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        _log.setLevel(request["log_level"])
        self._objects[request["object"]].open(**request["settings"])
        return {}, []

    def _do_score(self, request: dict[str, Any], arrays: list[NDArray[Any]]) -> Answer:
        found = self._objects[request["object"]].step(*arrays)
        names, rows = [], []
        for part in ("trunk", "head"):
            for name, values in found[part].items():
                names.append([part, name])
                rows.append(values)
        return {"names": names}, [*rows, found["known"], found["accepted"]]

    def _do_dry_run(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        _log.setLevel(request["log_level"])
        engine.set_log_level()
        found = quantizer.dry_run(os.fsencode(request["src"]), **request["options"])
        return {"tensors": found}, []

    def _do_quantize(self, request: dict[str, Any], arrays: list[NDArray[Any]]) -> Answer:
        def tell(done: int, total: int) -> None:
            self._send({"progress_of": request["number"], "progress": [done, total]}, [])

        _log.setLevel(request["log_level"])
        engine.set_log_level()
        watch = quantizer.Watch(tell)
        quantizer.quantize(
            watch,
            os.fsencode(request["src"]),
            os.fsencode(request["dst"]),
            matrix=list(zip(request["names"], arrays, strict=True)),
            **request["options"],
        )
        return {"progress": watch.progress}, []

    def _do_tensor_totals(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        return {"totals": quantizer.tensor_totals(os.fsencode(request["path"]))}, []

    def _do_counters(self, request: dict[str, Any], _arrays: list[NDArray[Any]]) -> Answer:
        return {"counters": self._objects[request["object"]].counters}, []


def _as_data(error: Exception) -> dict[str, Any]:
    data: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, NonFiniteError):
        data |= {"weight": error.weight, "channel": error.channel, "expert": error.expert}
    elif isinstance(error, UnicodeError):
        data["type"] = "ValueError"
    return data


class _Relay(logging.Handler):
    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service

    def emit(self, record: logging.LogRecord) -> None:
        self._service.log(record)


def serve(requests: IO[bytes]) -> NoReturn:
    """Answer on the standard output until `requests` ends, and end the process then."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints must not get among the answers
    service = Service(requests, answers)
    _log.addHandler(_Relay(service))
    _log.propagate = False
    service.run()
