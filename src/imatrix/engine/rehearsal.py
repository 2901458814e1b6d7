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

import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imatrix.engine.children import ABORTED, SECONDS, last_words, run_child
from imatrix.engine.quantizing import Choice
from imatrix.engine.settings import SessionSettings
from imatrix.errors import ModelError

# The stages that the child gets through, as it prints them
LOADED, BUILT, DECODED, TOKENIZED = "loaded", "built", "decoded", "tokenized"
CAUSAL, NOT_CAUSAL = "causal", "not causal"

_log = logging.getLogger("imatrix")


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


def rehearse(
    model: Path, mtp_model: Path | None, mtp: bool, settings: SessionSettings | None
) -> Rehearsal | None:
    """Load a model, build the graphs of a run, decode without computing, and tokenize, in a child
    process.

    Args:
        model: the trunk's file.
        mtp_model: the head's own file, None if the head is bundled or not wanted.
        mtp: load the head too.
        settings: of the run's session; None to load and build no graphs. The batch is made larger
            if a chunk has to be decoded in one piece.

    Returns:
        What was found out; None if no child could be started.

    Raises:
        ModelError: the engine ended the child; the message has its assertion or the signal.
            Or the graphs hold what would end the process when they run.
    """
    request = {
        "do": "rehearse",
        "model": str(model),
        "mtp_model": mtp_model and str(mtp_model),
        "mtp": mtp,
        "settings": settings and settings.as_data(),
    }
    found = _tried(request, model)
    if found is None:
        return None
    stages, words = found
    for stage in stages:
        if stage.startswith("refused "):
            raise ModelError(stage.removeprefix("refused "))
    causal = None if CAUSAL not in stages and NOT_CAUSAL not in stages else CAUSAL in stages
    if words is None or DECODED in stages:
        return Rehearsal(words, causal)
    doing = "builds the graphs" if LOADED in stages else "loads it"
    if BUILT in stages:
        raise ModelError(
            f"{mtp_model or model}: the engine ends the process on this model when it decodes a "
            f"chunk: {words}. It cannot run the model, and llama.cpp's own programs that decode "
            "with the same version end likewise; report it there, or here with the output of "
            "`imatrix --version`."
        )
    raise ModelError(
        f"{mtp_model or model}: the engine ends the process on this model while it {doing}: "
        f"{words}. Its metadata and its tensors do "
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
    found = _tried({"do": "load", "model": str(model), "mtp": mtp}, model)
    if found is None:
        return None
    stages, words = found
    for stage in stages:
        if stage.startswith("refused "):
            return stage.removeprefix("refused ")
    return words


def rehearse_quantizer(model: Path, choice: Choice) -> str | None:
    """Let the quantizer look through a model in a child process.

    Args:
        model: the file, or the first part.
        choice: what the quantizer is asked for.

    Returns:
        How the engine ended the child, in words; None if it did not.
    """
    found = _tried({"do": "quantize", "model": str(model), "choice": asdict(choice)}, model)
    return None if found is None else found[1]


def _tried(request: dict[str, Any], model: Path) -> tuple[list[str], str | None] | None:
    """The stages that a child got through, and its last words if it was ended."""
    if not sys.executable:
        _log.warning("no rehearsal of %s: this interpreter does not know its own executable", model)
        return None
    try:
        status, stdout, stderr = run_child(request)
    except subprocess.TimeoutExpired:
        return [], f"it came to no end within {SECONDS} seconds"
    if status >= 0 and status not in ABORTED:
        if status != 0:
            _log.warning("no rehearsal of %s: %s", model, stderr.strip()[-500:])
        return stdout.splitlines(), None
    return stdout.splitlines(), last_words(stderr, status)
