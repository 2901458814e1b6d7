"""What is checked of the files to write: before, their paths; after, whether the engine loads them."""

from __future__ import annotations

import errno
from pathlib import Path

from gguf import GGMLQuantizationType

from imatrix.engine.rehearsal import rehearse_load
from imatrix.errors import ModelError
from imatrix.files.outputs import check_files
from imatrix.model.architectures import loads_alone
from imatrix.model.header import ModelFile
from imatrix.model.raw import Part

__all__ = ["check_loads", "check_outputs"]

_TYPES = frozenset(map(int, GGMLQuantizationType))


def check_outputs(outputs: list[Path], inputs: list[Path]) -> None:
    """Refuse outputs that are folders, or that cannot be written beside the inputs.

    Raises:
        IsADirectoryError: an output is a folder.
        OSError, ValueError: see files.outputs.check_files.
    """
    for output in outputs:
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, "name a file in this folder", str(output))
    check_files(outputs, inputs)


def check_loads(temporary: Path, path: Path, source: Path) -> None:
    """Refuse to put a file in its place that the engine does not load.

    Args:
        temporary: the file, whole.
        path: its place.
        source: the model that it was made from.

    Raises:
        ModelError: the engine's own reason.
    """
    if any(t.kind not in _TYPES for t in Part.read(temporary).tensors.values()):
        return  # types of a fork's quantizer, which its engine loads and this one does not
    written = ModelFile.read(temporary)
    if loads_alone(written) and (why := rehearse_load(temporary, mtp=written.n_nextn > 0)):
        raise ModelError(
            f"{source}: nothing was written to {path}, because the engine would not load it: {why}"
        )
