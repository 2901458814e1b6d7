"""Puts a head into a trunk: one bundled model of two files."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix.errors import ModelError
from imatrix.files import atomic
from imatrix.files.outputs import PathLike
from imatrix.heads.keys import bundled_keys, check_keys
from imatrix.heads.outputs import check_loads, check_outputs
from imatrix.heads.source import Source
from imatrix.model.fit import check_fit
from imatrix.model.raw import Files, Meter, Progress, Tensor, write

__all__ = ["GraftReport", "graft_mtp"]


@dataclass(frozen=True)
class GraftReport:
    """What graft_mtp wrote.

    Attributes:
        model, model_bytes: the bundled file and its size.
        trunk_bytes, head_bytes: sizes of the inputs, all their parts together.
        shared: bytes by name of the tensors that both inputs hold, as the head's file has them:
            what one file saves.
        differing: those of them whose values are not the same; the model has the trunk's.
        n_trunk, n_nextn: blocks of the trunk and of the head.
    """

    model: Path
    model_bytes: int
    trunk_bytes: int
    head_bytes: int
    shared: Mapping[str, int]
    differing: tuple[str, ...]
    n_trunk: int
    n_nextn: int

    @property
    def shared_bytes(self) -> int:
        """Bytes of tensors that lay in both inputs, and lie in the model once."""
        return sum(self.shared.values())


def graft_mtp(
    trunk: PathLike,
    mtp_model: PathLike,
    out: PathLike,
    *,
    progress: Progress | None = None,
) -> GraftReport:
    """Write one model with the trunk of one file and the MTP head of another.

    Everything comes from the trunk but the head's blocks, block_count, nextn_predict_layers, and
    the head's entries of per-layer arrays. Whatever the two files say differently without being
    at odds (a tensor in both with other values, the words of the vocabulary, context_length, the
    rope keys) is a UserWarning, and the trunk's is kept. Where the trunk's metadata claim the very
    head whose tensors it lacks, the head is put in its place.

    Args:
        trunk: a model without a head, or the first part of one.
        mtp_model: a head-only file, or a bundled one, of which only the head is taken.
        out: the bundled model, one file. A file there is replaced.
        progress: called with the bytes written so far and the bytes to write.

    Raises:
        FileNotFoundError, IsADirectoryError: no such input, or no such folder to write to.
        ValueError: two of the paths are the same file.
        ModelError: an input is not a GGUF model, is damaged, or lacks a part; the trunk has a
            head already; the head does not fit (see check_fit; also every other key of the
            architecture that shapes the weights); the message gives the two values that differ.
        OSError: reading or writing failed.
    """
    body, donor = Source.read(trunk), Source.read(mtp_model)
    model_path = Path(out)
    if model_path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "name a file in this folder", str(model_path))
    check_outputs([model_path], [*body.paths, *donor.paths])
    if body.header.n_trunk and not body.has_trunk():
        raise ModelError(f"{body.path}: it has no trunk block; give the trunk first, then the head")
    if any(t.block is not None and t.block >= body.header.n_trunk for t in body.all()):
        raise ModelError(
            f"{body.path}: it has a head already ({body.header.n_nextn} MTP block(s) from "
            f"blk.{body.header.n_trunk} on); take it out first (extract_mtp with trunk_out, "
            "imatrix extract-mtp --trunk-out)"
        )
    check_fit(body.header, donor.header, grafting=True)
    differences = list(check_keys(body, donor))
    keys = bundled_keys(body, donor)
    shared = [t for t in donor.all() if t.block is None and t.name in body.tensors]
    with Files() as files:
        differing = tuple(t.name for t in shared if not files.same(t, body.tensors[t.name]))
    _check_differing(body, donor, differing)
    if differing:
        differences.append(
            f"{', '.join(differing)} differ in values or type; the head may have been trained, or "
            "quantized, with others"
        )
    if left := [t.name for t in donor.all() if t.block is None and t not in shared]:
        differences.append(f"{', '.join(left)} lie only in the head's file, and are left out")
    for what in differences:
        warnings.warn(
            f"{donor.path.name} and {body.path.name}: {what}. The trunk's are kept.", stacklevel=2
        )
    tensors = _bundled_order(body, donor)
    meter = Meter(progress, sum(t.size for t in tensors))
    with atomic.replacing(model_path) as temporary:
        model_bytes = write(temporary, body.version, body.alignment, keys, tensors, meter)
        check_loads(temporary, model_path, body.path)
    return GraftReport(
        model=model_path,
        model_bytes=model_bytes,
        trunk_bytes=body.file_bytes,
        head_bytes=donor.file_bytes,
        shared={t.name: t.size for t in shared},
        differing=differing,
        n_trunk=donor.header.n_trunk,
        n_nextn=donor.header.n_nextn,
    )


def _check_differing(trunk: Source, head: Source, differing: Iterable[str]) -> None:
    """Refuse two files of which both have to keep their own tensor of one name.

    Raises:
        ModelError: which one.
    """
    for name in differing:
        # deepseek4: the converter renames the head's own output mixing to the trunk's names
        # (conversion/deepseek.py, filter_tensors), and writes no bundled file for that reason.
        if name.startswith("hc_head"):
            raise ModelError(
                f"{head.path} and {trunk.path} hold tensors named {name} with different values, "
                "and both are needed: one file has no place for two. Keep this model as two files"
            )


def _bundled_order(trunk: Source, head: Source) -> list[Tensor]:
    """Order the trunk's tensors and the head's blocks.

    The trunk's keep their order, and the head's blocks lie between them as in the head's file: each
    goes before the tensor outside the blocks that follows it in the head's file, and at the
    end if none does: for the two outputs of extract_mtp that is the order of the model.
    """
    waiting: dict[str | None, list[Tensor]] = {}
    group: list[Tensor] = []
    for tensor in head.all():
        if tensor.block is None:
            if tensor.name in trunk.tensors:
                waiting[tensor.name] = group
                group = []
        elif tensor.block >= head.header.n_trunk:
            group.append(tensor)
    waiting[None] = group
    out: list[Tensor] = []
    for tensor in trunk.all():
        out += waiting.get(tensor.name, [])
        out.append(tensor)
    return out + waiting[None]
