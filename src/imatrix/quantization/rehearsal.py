"""A rehearsal of quantizing, in a child process: would the engine survive this model?"""

from __future__ import annotations

from imatrix.engine.quantizing import Choice
from imatrix.engine.rehearsal import rehearse_load, rehearse_quantizer
from imatrix.errors import ModelError
from imatrix.model.architectures import loads_alone
from imatrix.model.header import ModelFile
from imatrix.quantization.options import Options
from imatrix.quantization.types import FTYPES

_quantizable: set[tuple[object, ...]] = set()


def rehearse_quantize(file: ModelFile, options: Options) -> None:
    """Let the quantizer look through a model in a child process, and let the engine load it.

    Both are needed: the quantizer takes models that no engine loads, and writes another of these.
    Each file is tried once: it is known again by the sizes and times of its parts. Keys that the
    engine reads the model by, and another number of parts, are another try; such keys may mend what
    it does not load, so that only what is made of the model is loaded then.

    Args:
        file: the model.
        options: what is asked for.

    Raises:
        ModelError: the quantizer ended the child, with the engine's last words, or the engine's
            loader refuses the model.
    """
    model = file.path
    stats = [part.stat() for part, _ in file.parts]
    choice = Choice(
        ftype=FTYPES["Q4_K_M"], keep_split=options.keep_split, metadata=options.override_kv
    )
    key = (model, choice, *((s.st_ino, s.st_size, s.st_mtime_ns) for s in stats))
    if key in _quantizable:
        return
    cause = "The given override_kv" if options.override_kv else "Its metadata"
    if words := rehearse_quantizer(model, choice):
        raise ModelError(
            f"{model}: the engine's quantizer ends the process on this model: {words}. "
            f"{cause} and its tensors do not go together; convert it again, or report it with "
            "the output of `imatrix --version`."
        )
    if (
        not options.override_kv
        and loads_alone(file)
        and (why := rehearse_load(model, mtp=file.n_nextn > 0))
    ):
        raise ModelError(
            f"{model}: the engine does not load this model, and would not load what is made of "
            f"it: {why}"
        )
    _quantizable.add(key)
