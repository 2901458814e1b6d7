"""The program of every process that the engine gets to itself: the one child of this package that
loads the engine.

It reads one request from its standard input (see imatrix.engine.frames) and does what the request's
"do" names. `serve` runs the engine for another process until that one is gone
(imatrix.engine.service). Everything else is done once, prints what it found, and ends: what the
engine would abort on is found out that way.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import IO, Any

from imatrix.engine import frames
from imatrix.engine.batch import Room, choose
from imatrix.engine.placement import Placement
from imatrix.engine.rehearsal import BUILT, CAUSAL, DECODED, LOADED, NOT_CAUSAL, TOKENIZED
from imatrix.engine.service import serve
from imatrix.engine.settings import Batch, SessionSettings
from imatrix.errors import EngineError, ModelError
from imatrix.native import engine, quantizer

__all__ = ["perform"]

# Every kind of character that a tokenizer treats on its own, and every byte of UTF-8.
_SAMPLE = (
    "".join(map(chr, range(1, 128)))
    + "  The the\n\n\t it's 1234567 <s></s> [CLS] <|im_start|> <unk> <0x0A> \u2581\u2581a\r\n"
    + "\u00e9\u00df\u0301 \u0416\u05d0\u0627\u0939\u0e01\u4e2d\u6587\uac00\u3042\ufffd\U0001f600"
    + "\U000e0001\U0010ffff\u200b\u2028 \u00a0\ud7ff"
)

# The graphs are the same wherever the model will lie, and a context makes itself at home on each
# device that its model may use (llama_context::llama_context), even with no layer there: one that
# cannot be used would end the child, and the model would be blamed.
_NO_DEVICE = Placement(devices=()).as_data()


def perform(request: dict[str, Any]) -> None:
    """Do what is done once."""
    arguments = dict(request)
    _WORKS[arguments.pop("do")](**arguments)


def _rehearse(
    model: str, mtp_model: str | None, mtp: bool, settings: engine.SessionData | None
) -> None:
    """Load a model, build the graphs of a run unless settings is None, decode without computing,
    and tokenize."""
    trunk = _load_header(model, mtp=mtp and mtp_model is None, placement=_NO_DEVICE)
    head = None
    if mtp:
        head = (
            trunk if mtp_model is None else _load_header(mtp_model, mtp=True, placement=_NO_DEVICE)
        )
    _report_stage(LOADED)
    if settings is not None and trunk.has_decoder and not trunk.has_encoder:
        causal = trunk.causal()
        _report_stage(CAUSAL if causal else NOT_CAUSAL)
        wanted = SessionSettings.from_data(settings)
        if not causal:
            wanted = wanted.with_whole_chunks()
        session = engine.Session(trunk, head)
        try:
            session.open(**wanted.as_data())
        except ModelError as error:
            _report_refusal(f"{mtp_model or model}: {error}")
            return
        _report_stage(BUILT)
        with contextlib.suppress(EngineError, MemoryError):  # the run will say why
            session.open(**wanted.as_data(), computes=False)
            session.try_decode()
    _report_stage(DECODED)
    if trunk.has_tokenizer:
        for parse_special in (False, True):
            trunk.tokenize(_SAMPLE, add_special=True, parse_special=parse_special)
    _report_stage(TOKENIZED)


def _load(model: str, mtp: bool) -> None:
    """Load a model, its weights left out."""
    try:
        _load_header(model, mtp=mtp, placement=_NO_DEVICE)
    except ModelError as error:
        _report_refusal(str(error))


def _quantize(model: str, choice: dict[str, Any]) -> None:
    """Let the quantizer look through a model, and write nothing.

    Args:
        choice: what imatrix.native.quantizer.dry_run takes, but for has_matrix.
    """
    quantizer.dry_run(os.fsencode(model), **choice, has_matrix=True)


def _choose_batch(
    model: str,
    mtp_model: str | None,
    settings: engine.SessionData,
    n_gpu_layers: int,
    placement: engine.PlacementData,
    host: int,
    mapped: bool,
    most: int,
    causal: bool,
) -> None:
    """Print what imatrix.engine.batch.choose() chooses, as JSON."""

    wanted = SessionSettings.from_data(settings)

    def load(path: str, mtp: bool) -> engine.Model:
        return _load_header(path, mtp=mtp, n_gpu_layers=n_gpu_layers, placement=placement)

    trunk = load(model, wanted.mtp and mtp_model is None)
    head = None
    if wanted.mtp:
        head = trunk if mtp_model is None else load(mtp_model, True)

    def need(batch: Batch) -> Sequence[engine.MemoryUse] | None:
        session = engine.Session(trunk, head)
        try:
            session.open(**replace(wanted, batch=batch).as_data())
        except (EngineError, MemoryError):
            return None
        return session.memory

    room = Room(host, {device["name"]: device["memory_free"] for device in engine.backends()[1]})
    chosen = choose(wanted.n_ctx, need, room, mapped=mapped, most=most, causal=causal)
    print(json.dumps(asdict(chosen)))


def _ask_server(endpoint: str) -> None:
    """Talk to a ggml-rpc-server, which ends the process if it is none."""
    try:
        engine.add_rpc_server(endpoint)
    except Exception as stop:
        sys.exit(f"what(): {stop}")


def _load_header(
    path: str,
    *,
    mtp: bool,
    n_gpu_layers: int = 0,
    placement: engine.PlacementData | None = None,
) -> engine.Model:
    """A model without its weights."""
    return engine.Model(
        path,
        mtp=mtp,
        n_gpu_layers=n_gpu_layers,
        use_mmap=False,
        check_tensors=False,
        no_alloc=True,
        placement=placement,
    )


def _report_stage(stage: str) -> None:
    print(stage, flush=True)


def _report_refusal(why: str) -> None:
    _report_stage("refused " + why.replace("\n", " "))


def _tried(work: Callable[..., None]) -> Callable[..., None]:
    """Only the process's end is of interest: an exception is what the run itself will meet, and
    raise."""

    def attempt(**arguments: Any) -> None:
        with contextlib.suppress(Exception):
            work(**arguments)

    return attempt


_WORKS: dict[str, Callable[..., None]] = {
    "rehearse": _tried(_rehearse),
    "load": _tried(_load),
    "quantize": _tried(_quantize),
    "choose a batch": _choose_batch,
    "ask a server": _ask_server,
}


def _end_with(requests: IO[bytes]) -> None:
    """End this process if the one that asked is gone."""
    while os.read(requests.fileno(), 4096):
        pass
    os._exit(1)


def _main() -> None:
    # without a buffer: its lock, held by a thread that waits, would be fatal to an interpreter that
    # exits
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    request, _ = frames.receive(requests)
    if request["do"] == "serve":
        serve(requests)
    threading.Thread(target=_end_with, args=(requests,), daemon=True).start()
    for stream in (sys.stdout, sys.stderr):
        # a path may be any bytes
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    perform(request)


if __name__ == "__main__":
    _main()
