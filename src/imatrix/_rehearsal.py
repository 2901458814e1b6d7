"""A dress rehearsal in a process of its own: would the engine survive this model?

The engine asserts a great deal while it reads a model's metadata, its vocabulary and builds its
graphs, and an assertion ends the process, with hours of somebody else's work in it. So all of it
is done once in a child process first, from the header alone (llama_model_params.no_alloc: no
weights are read and no memory is taken for them). What ends the child is refused in the parent,
in the engine's own last words.

A chunk is then decoded as far as the engine goes before it computes: it has split the batch, found
room in the memory, built and allocated the graph, and filled its inputs (Session::try_decode in
ext/session.h). Nothing is computed, because there are no weights to compute with: what would end
the process within an operation is looked for in the graph instead (ext/graph_check.cpp).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imatrix.architectures import loads_alone
from imatrix.errors import EngineError, ModelError
from imatrix.model_file import ModelFile

_log = logging.getLogger("imatrix")

# exit codes of a process that ended itself, where there are no signals: abort(), and the status
# codes of Windows for a fast fail, an access violation and a division by zero
_ABORTED = frozenset({3, 0xC0000409, 0xC0000005, 0xC0000094})
# no card is needed to build a graph, and none may be taken from whoever uses it
_NO_CARDS = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "",
}
_ASSERTION = re.compile(r"\S*?([\w-]+/[\w-]+\.(?:cpp|c|h|cu|m)):(\d+): (.*)")
_EXCEPTION = re.compile(r"\s*what\(\):\s*(.*)")
# Far more than a model of a thousand gigabytes takes: a header is read, and graphs are built.
_SECONDS = 600

# Every kind of character that a tokenizer treats on its own, and every byte of UTF-8.
_SAMPLE = (
    "".join(map(chr, range(1, 128)))
    + "  The the\n\n\t it's 1234567 <s></s> [CLS] <|im_start|> <unk> <0x0A> \u2581\u2581a\r\n"
    + "\u00e9\u00df\u0301 \u0416\u05d0\u0627\u0939\u0e01\u4e2d\u6587\uac00\u3042\ufffd\U0001f600"
    + "\U000e0001\U0010ffff\u200b\u2028 \u00a0\ud7ff"
)

_LOADED, _BUILT, _DECODED, _TOKENIZED = "loaded", "built", "decoded", "tokenized"
_CAUSAL, _NOT_CAUSAL = "causal", "not causal"


@dataclass(frozen=True)
class Rehearsal:
    """What a child found out of a model that it survived.

    Attributes:
        tokenizer_fault: how the engine's tokenizer ended the child, in words; None if it did not.
            Token lists can still be run.
        causal: whether a token sees only those before it; None if it was not asked.
    """

    tokenizer_fault: str | None
    causal: bool | None


def module_command(module: str, *argv: str) -> list[str]:
    """Runs a module of ours as a program, by this interpreter.

    `python -m` would look for modules in the current folder first, where anybody's files may be.
    """
    start = "import sys; sys.path[:] = filter(None, sys.path); import runpy; "
    start += f"runpy.run_module({module!r}, run_name='__main__', alter_sys=False)"
    return [sys.executable, "-c", start, *argv]


def rehearse(model: Path, mtp_model: Path | None, settings: dict[str, Any]) -> Rehearsal | None:
    """Load a model, build the graphs of a run, decode without computing, and tokenize, in a child
    process.

    Args:
        model: the trunk's file.
        mtp_model: the head's own file, None where the head is bundled or not wanted.
        settings: what _session.Session.open takes; "mtp" alone to load and build no graphs. The
            batch is made larger where a chunk has to be decoded in one piece.

    Returns:
        What was found out; None if no child could be started.

    Raises:
        ModelError: the engine ended the child; the message has its assertion or the signal.
            Or the graphs hold what would end the process when they run.
    """
    work = {"model": str(model), "mtp_model": mtp_model and str(mtp_model), "settings": settings}
    found = _tried(work, model)
    if found is None:
        return None
    stages, last_words = found
    for stage in stages:
        if stage.startswith("refused "):
            raise ModelError(stage.removeprefix("refused "))
    causal = None if _CAUSAL not in stages and _NOT_CAUSAL not in stages else _CAUSAL in stages
    if last_words is None or _DECODED in stages:
        return Rehearsal(last_words, causal)
    doing = "builds the graphs" if _LOADED in stages else "loads it"
    if _BUILT in stages:
        raise ModelError(
            f"{mtp_model or model}: the engine ends the process on this model when it decodes a "
            f"chunk: {last_words}. It cannot run the model, and llama.cpp's own programs that decode "
            "with the same version end likewise; report it there, or here with the output of "
            "`imatrix --version`."
        )
    raise ModelError(
        f"{mtp_model or model}: the engine ends the process on this model while it {doing}: "
        f"{last_words}. Its metadata and its tensors do "
        "not go together; convert it again, or report it with the output of `imatrix --version`."
    )


def rehearse_load(model: Path, *, mtp: bool) -> str | None:
    """Let the engine load a model in a child process, its weights left out.

    Args:
        model: the file, or the first part.
        mtp: load the head's tensors too.

    Returns:
        Why the engine refuses it, or ended the child, in words; None if it loads.
    """
    found = _tried({"load": str(model), "mtp": mtp}, model)
    if found is None:
        return None
    stages, last_words = found
    for stage in stages:
        if stage.startswith("refused "):
            return stage.removeprefix("refused ")
    return last_words


_quantizable: set[tuple[object, ...]] = set()


def rehearse_quantize(file: ModelFile) -> None:
    """Let the quantizer look through a model in a child process, and the engine load it, once for
    each file: the quantizer takes a model that no engine loads, and writes another.

    Args:
        file: the model; by the sizes and times of its parts it is known again.

    Raises:
        ModelError: as rehearse() does, or the engine's loader refuses the model.
    """
    model = file.path
    stats = [part.stat() for part, _ in file.parts]
    key = (model, *((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))
    if key in _quantizable:
        return
    found = _tried({"quantize": str(model)}, model)
    if found is not None and found[1] is not None:
        raise ModelError(
            f"{model}: the engine's quantizer ends the process on this model: {found[1]}. Its "
            "metadata and its tensors do not go together; convert it again, or report it with "
            "the output of `imatrix --version`."
        )
    if loads_alone(file) and (why := rehearse_load(model, mtp=file.n_nextn > 0)):
        raise ModelError(
            f"{model}: the engine does not load this model, and would not load what is made of "
            f"it: {why}"
        )
    _quantizable.add(key)


def _tried(work: dict[str, Any], model: Path) -> tuple[list[str], str | None] | None:
    """The stages that a child got through, and its last words if it was ended."""
    if not sys.executable:
        _log.warning("no rehearsal of %s: this interpreter does not know its own executable", model)
        return None
    try:
        status, stdout, stderr = child_process(work)
    except subprocess.TimeoutExpired:
        return [], f"it came to no end within {_SECONDS} seconds"
    if status >= 0 and status not in _ABORTED:
        if status != 0:
            _log.warning("no rehearsal of %s: %s", model, stderr.strip()[-500:])
        return stdout.splitlines(), None
    return stdout.splitlines(), last_words(stderr, status)


def in_child(
    module: str, work: dict[str, Any], path: Path, *, cards: bool = False
) -> tuple[int, str, str]:
    """Run a module with `work` as its argument, in JSON.

    Args:
        path: the model, for the message.
        cards: whether it may see graphics cards.

    Returns:
        Its exit status, standard output and standard error.

    Raises:
        ModelError: the engine ended the child, or it came to no end.
    """
    try:
        status, stdout, stderr = child_process(work, module, cards=cards)
    except subprocess.TimeoutExpired:
        words = f"it came to no end within {_SECONDS} seconds"
    else:
        if status >= 0 and status not in _ABORTED:
            return status, stdout, stderr
        words = last_words(stderr, status)
    raise ModelError(
        f"{path}: the engine ends the process on this model while it builds the graphs: {words}. "
        "Its metadata and its tensors do not go together; convert it again, or report it with the "
        "output of `imatrix --version`."
    )


def child_process(
    work: Any,
    module: str = "imatrix._rehearsal",
    *,
    cards: bool = False,
    timeout: float = _SECONDS,
) -> tuple[int, str, str]:
    """A module of ours in a process of its own: its exit status, negative for a signal, and its
    output."""
    child = subprocess.run(
        module_command(module, json.dumps(work)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="surrogateescape",  # a path may be any bytes
        timeout=timeout,
        # ggml_abort would start a debugger for a backtrace where there is one
        env={
            **os.environ,
            **({} if cards else _NO_CARDS),
            "GGML_NO_BACKTRACE": "1",
            "PYTHONIOENCODING": "utf-8:surrogateescape",
        },
    )
    return child.returncode, child.stdout, child.stderr


def last_words(stderr: str, status: int) -> str:
    """What ended a process: the engine's assertion if there is one, else the signal."""
    for line in reversed(stderr.splitlines()):
        if found := _ASSERTION.match(line.strip()):
            return f"{found[1]}:{found[2]}: {found[3]}"
        if found := _EXCEPTION.match(line):
            return found[1]
    if status < 0:
        try:
            return signal.Signals(-status).name
        except ValueError:
            pass
    return f"status {status}"


def _work(work: dict[str, Any]) -> None:
    """What the child does."""
    try:
        if "quantize" in work:
            _quantize(work["quantize"])
        elif "load" in work:
            _load(work["load"], work["mtp"])
        else:
            _build(work)
    except Exception:
        # not what is looked for here: the run itself will meet it, and raise it
        return


def _told(stage: str) -> None:
    print(stage, flush=True)


def _build(work: dict[str, Any]) -> None:
    from imatrix import _session
    from imatrix._batch import whole

    settings = work["settings"]
    separate = work["mtp_model"]

    def load(path: str, mtp: bool) -> _session.Model:
        return _session.Model(
            path, mtp=mtp, n_gpu_layers=0, use_mmap=False, check_tensors=False, no_alloc=True
        )

    with_head = settings["mtp"]
    model = load(work["model"], with_head and separate is None)
    head = None
    if with_head:
        head = model if separate is None else load(separate, True)
    _told(_LOADED)
    if len(settings) > 1 and model.has_decoder and not model.has_encoder:
        causal = model.causal()
        _told(_CAUSAL if causal else _NOT_CAUSAL)
        settings = settings if causal else whole(settings)
        session = _session.Session(model, head)
        try:
            session.open(**settings)
        except ModelError as error:
            _told("refused " + f"{separate or work['model']}: {error}".replace("\n", " "))
            return
        _told(_BUILT)
        with contextlib.suppress(EngineError, MemoryError):  # the run will say why
            session.open(**settings, computes=False)
            session.try_decode()
    _told(_DECODED)
    if model.has_tokenizer:
        for parse_special in (False, True):
            model.tokenize(_SAMPLE, add_special=True, parse_special=parse_special)
    _told(_TOKENIZED)


def _load(path: str, mtp: bool) -> None:
    from imatrix import _session

    try:
        _session.Model(
            path, mtp=mtp, n_gpu_layers=0, use_mmap=False, check_tensors=False, no_alloc=True
        )
    except ModelError as error:
        _told("refused " + str(error).replace("\n", " "))


def _quantize(path: str) -> None:
    from imatrix import _quantize_pybind
    from imatrix.quantizer import FTYPES

    _quantize_pybind.dry_run(
        os.fsencode(path),
        ftype=FTYPES["Q4_K_M"],
        pure=False,
        quantize_output=True,
        has_matrix=True,
        tensor_types=[],
    )


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
