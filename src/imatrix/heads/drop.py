"""Writes a model without its head, or without the claim of a head that it lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix.errors import ModelError
from imatrix.files import atomic
from imatrix.files.outputs import PathLike
from imatrix.heads.keys import trunk_keys
from imatrix.heads.outputs import check_loads, check_outputs
from imatrix.heads.source import Source
from imatrix.model.raw import Meter, Progress, Tensor, Value, write

__all__ = ["DropReport", "WithoutHead", "drop_mtp", "without_head"]


@dataclass(frozen=True)
class DropReport:
    """What drop_mtp wrote.

    Attributes:
        model, model_bytes: the file and its size.
        source_bytes: size of the input, all its parts together.
        n_trunk: blocks that are left.
        dropped: names of the tensors that are not in it; none if only the claim was dropped.
    """

    model: Path
    model_bytes: int
    source_bytes: int
    n_trunk: int
    dropped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class WithoutHead:
    """A model's file as it would be without its head.

    Attributes:
        keys: its metadata.
        tensors: its tensors, where they lie in the file that has the head.
        n_trunk: blocks that are left.
    """

    keys: Mapping[str, Value]
    tensors: list[Tensor]
    n_trunk: int


def drop_mtp(
    model: PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
) -> DropReport:
    """Write a model without its MTP head, and without the claim that it has one.

    What is left are the trunk's blocks, byte for byte, as convert_hf_to_gguf.py --no-mtp writes
    them. Blocks that the metadata claim for a head are dropped if they hold a nextn tensor, which
    makes them a head, whole or not. Without one they are the trunk's, and stay; then only the
    claim goes. Blocks that hold a nextn tensor without a claim are dropped too.

    Args:
        model: the model, or the first part of a multi-part one.
        out: where to write, one file. A file there is replaced.
        progress: called with the bytes written so far and the bytes to write.

    Raises:
        FileNotFoundError, IsADirectoryError: no such model, or no such folder to write to.
        ValueError: the two paths are the same file.
        ModelError: not a GGUF model, damaged, a part is missing; there is no head and no claim of
            one; nothing would be left; or the engine does not load the result.
        OSError: reading or writing failed.
    """
    source = Source.read(model, any_claim=True)
    path = Path(out)
    check_outputs([path], source.paths)
    left = without_head(source)
    meter = Meter(progress, sum(t.size for t in left.tensors))
    with atomic.replacing(path) as temporary:
        n_bytes = write(temporary, source.version, source.alignment, left.keys, left.tensors, meter)
        check_loads(temporary, path, source.path)
    return DropReport(
        model=path,
        model_bytes=n_bytes,
        source_bytes=source.file_bytes,
        n_trunk=left.n_trunk,
        dropped=tuple(
            t.name for t in source.all() if t.block is not None and t.block >= left.n_trunk
        ),
    )


def without_head(source: Source) -> WithoutHead:
    """What drop_mtp would write of a model.

    Args:
        source: the model; read with any_claim=True to take a wrong claim too.

    Raises:
        ModelError: there is no head and no claim of one, or nothing would be left.
    """
    header = source.header
    key = f"{header.architecture}.nextn_predict_layers"
    claimed = key in source.keys and source.keys[key].decoded() != 0
    heads = {t.block for t in source.all() if t.block is not None and ".nextn." in t.name}
    if header.architecture == "gemma4-assistant" or not (claimed or heads):
        raise ModelError(f"{source.path}: it has no MTP head, and its metadata claim none")
    blocks = {t.block for t in source.all() if t.block is not None}
    if header.claimed_nextn and not any(block >= header.claimed_from for block in heads):
        heads = set()
        n_trunk = max(header.claimed_from, 1 + max(blocks, default=-1))
    else:
        n_trunk = min(heads, default=header.claimed_from)
    kept = [t for t in source.all() if t.block is None or t.block < n_trunk]
    if not any(t.block is not None for t in kept):
        raise ModelError(
            f"{source.path}: it holds a head alone, and nothing would be left without it"
        )
    # arrays are as long as there are blocks, though block_count may leave out those of the head
    keys = trunk_keys(source, n_trunk, n_blocks=max(header.block_count, 1 + max(blocks)))
    return WithoutHead(keys=keys, tensors=kept, n_trunk=n_trunk)
