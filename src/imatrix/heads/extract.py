"""Takes the head out of a bundled model, into a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix.errors import ModelError
from imatrix.files import atomic
from imatrix.files.outputs import PathLike
from imatrix.heads.keys import trunk_keys, without_split
from imatrix.heads.outputs import check_loads, check_outputs
from imatrix.heads.source import Source
from imatrix.model.fit import check_has_head
from imatrix.model.parts import without_part
from imatrix.model.raw import Meter, Progress, write

__all__ = ["ExtractReport", "extract_mtp", "mtp_name"]


@dataclass(frozen=True)
class ExtractReport:
    """What extract_mtp wrote.

    Attributes:
        head, head_bytes: the head-only file and its size.
        trunk, trunk_bytes: the trunk-only file and its size; None if none was asked for.
        model_bytes: size of the bundled file, all its parts together.
        shared: bytes by name of the tensors that both halves need. Kept as two files, the model
            costs their sum once more, on the disk and in memory.
        n_trunk, n_nextn: blocks of the trunk and of the head.
    """

    head: Path
    head_bytes: int
    trunk: Path | None
    trunk_bytes: int | None
    model_bytes: int
    shared: Mapping[str, int]
    n_trunk: int
    n_nextn: int

    @property
    def shared_bytes(self) -> int:
        """Bytes of tensors that lie in both halves."""
        return sum(self.shared.values())


def mtp_name(model: PathLike) -> str:
    """The file name for the head of ``model``: `mtp-` and its name, without a part's number."""
    name = Path(model).name
    return "mtp-" + without_part(name)


def extract_mtp(
    model: PathLike,
    out: PathLike,
    *,
    trunk_out: PathLike | None = None,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write the head of a bundled model as a file of its own, and the trunk too if asked.

    Tensors keep their bytes, types and order. A multi-part model is read as a whole, each output
    is one file, without the split.* keys. graft_mtp on the two outputs gives the model back.
    The engine loads a head alone where it can run one at all; those of exaone4, exaone-moe, glm4,
    bailingmoe2 and dots3 it only carries along, and asks for their trunk (src/models/).

    Args:
        model: a bundled model, or the first part of one.
        out: the head-only file; in a folder it is named by mtp_name. A file there is replaced.
        trunk_out: where to write the model without its head, if anywhere.
        progress: called with the bytes written so far and the bytes to write.

    Raises:
        FileNotFoundError, IsADirectoryError: no such model, or no such folder to write to.
        ValueError: two of the paths are the same file.
        ModelError: not a GGUF model, damaged, a part is missing, or it has no head.
        OSError: reading or writing failed.
    """
    source = Source.read(model)
    head_path = Path(out)
    if head_path.is_dir():
        head_path = head_path / mtp_name(model)
    trunk_path = None if trunk_out is None else Path(trunk_out)
    outputs = [head_path] if trunk_path is None else [head_path, trunk_path]
    check_outputs(outputs, source.paths)
    header = source.header
    check_has_head(header)
    if header.n_trunk == 0:
        raise ModelError(
            f"{source.path}: all {header.n_nextn} blocks are MTP head blocks; it is a head-only "
            f"model already (architecture {header.architecture})"
        )
    if not source.has_trunk():
        raise ModelError(
            f"{source.path}: it is a head-only file already: it has the blocks from "
            f"blk.{header.n_trunk} on, and none of the {header.n_trunk} of the trunk"
        )
    head = [
        t
        for t in source.all()
        if (t.block is None and not source.is_trunk_only(t.name))
        or (t.block or 0) >= header.n_trunk
    ]
    trunk = [t for t in source.all() if t.block is None or t.block < header.n_trunk]
    head_keys = {
        key: value for key, value in without_split(source).items() if not source.is_trunk_only(key)
    }
    meter = Meter(progress, sum(t.size for t in (head if trunk_path is None else head + trunk)))
    # both are on the disk before either takes its place
    with atomic.replacing_together(outputs) as temporary:
        head_bytes = write(temporary[0], source.version, source.alignment, head_keys, head, meter)
        trunk_bytes = None
        if trunk_path is not None:
            trunk_bytes = write(
                temporary[1],
                source.version,
                source.alignment,
                trunk_keys(source, header.n_trunk),
                trunk,
                meter,
            )
        for path, half in zip(temporary, outputs, strict=True):
            check_loads(path, half, source.path)
    return ExtractReport(
        head=head_path,
        head_bytes=head_bytes,
        trunk=trunk_path,
        trunk_bytes=trunk_bytes,
        model_bytes=source.file_bytes,
        shared={t.name: t.size for t in head if t.block is None},
        n_trunk=header.n_trunk,
        n_nextn=header.n_nextn,
    )
