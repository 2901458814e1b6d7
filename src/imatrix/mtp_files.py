"""Takes an MTP/NextN head out of a model file, or puts one in, without converting again.

The two halves are laid out as llama.cpp's convert_hf_to_gguf.py does it (conversion/glm.py,
qwen.py, step3.py, mimo.py, hunyuan.py, bailingmoe3.py, deepseek.py, and the loaders under
src/models/ that take such files):

    bundled             every tensor; block_count = trunk + head; nextn_predict_layers = head
    trunk, --no-mtp     no `blk.<n_trunk>` and on; block_count = trunk; no nextn_predict_layers;
                        per-layer arrays as long as the trunk
    head, --mtp         the head's blocks and the tensors outside the blocks (token_embd,
                        output_norm, output); every key as in the bundled file, the tokenizer too:
                        it is loaded as a model of its own. The converter puts `mtp-` before the
                        file name when it chooses the name itself, and the engine looks for a head
                        under that prefix (common/download.cpp).

The files are read and written here, and not by gguf-py: its reader decodes every word of a
vocabulary, its writer rewrites every key, and neither streams. Here what does not change is
copied as the bytes that it is, the tensors in blocks of a few MB, so that memory follows the
header's size, and types that no library here knows come through.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from imatrix import atomic
from imatrix.errors import ModelError

__all__ = ["ExtractReport", "GraftReport", "check_fit", "extract_mtp", "graft_mtp", "mtp_name"]

PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]


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


def mtp_name(model: PathLike) -> str:
    """The file name for the head of ``model``: `mtp-` and its name, without a part's number."""
    name = Path(model).name
    return "mtp-" + _PART.sub(".gguf", name)


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
    source = _Model.read(Path(model))
    head_path = Path(out)
    if head_path.is_dir():
        head_path = head_path / mtp_name(model)
    trunk_path = None if trunk_out is None else Path(trunk_out)
    outputs = [head_path] if trunk_path is None else [head_path, trunk_path]
    _check_outputs(outputs, source.paths)
    _check_has_head(source)
    if source.n_trunk == 0:
        raise ModelError(
            f"{source.path}: all {source.n_nextn} blocks are MTP head blocks; it is a head-only "
            f"model already (architecture {source.architecture})"
        )
    if not source.has_trunk():
        raise ModelError(
            f"{source.path}: it is a head-only file already: it has the blocks from "
            f"blk.{source.n_trunk} on, and none of the {source.n_trunk} of the trunk"
        )
    head = [t for t in source.infos.values() if t.block is None or t.block >= source.n_trunk]
    trunk = [t for t in source.infos.values() if t.block is None or t.block < source.n_trunk]
    keys = _without_split(source)
    meter = _Meter(progress, sum(t.size for t in (head if trunk_path is None else head + trunk)))
    with ExitStack() as stack:
        # Both are complete before either takes its place.
        temporary = [stack.enter_context(atomic.replacing(path)) for path in outputs]
        head_bytes = _write(temporary[0], source, keys, head, meter)
        trunk_bytes = None
        if trunk_path is not None:
            trunk_bytes = _write(temporary[1], source, _trunk_keys(source, keys), trunk, meter)
    return ExtractReport(
        head=head_path,
        head_bytes=head_bytes,
        trunk=trunk_path,
        trunk_bytes=trunk_bytes,
        model_bytes=source.file_bytes,
        shared={t.name: t.size for t in source.infos.values() if t.block is None},
        n_trunk=source.n_trunk,
        n_nextn=source.n_nextn,
    )


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
    body, donor = _Model.read(Path(trunk)), _Model.read(Path(mtp_model))
    model_path = Path(out)
    if model_path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "name a file in this folder", str(model_path))
    _check_outputs([model_path], [*body.paths, *donor.paths])
    if body.n_trunk and not body.has_trunk():
        raise ModelError(f"{body.path}: it has no trunk block; give the trunk first, then the head")
    if any(t.block is not None and t.block >= body.n_trunk for t in body.infos.values()):
        raise ModelError(
            f"{body.path}: it has a head already ({body.n_nextn} MTP block(s) from "
            f"blk.{body.n_trunk} on); take it out first (extract_mtp with trunk_out, "
            "imatrix extract-mtp --trunk-out)"
        )
    check_fit(body, donor)
    told = list(_check_keys(body, donor))
    keys = _bundled_keys(body, donor)
    shared = [t for t in donor.infos.values() if t.block is None and t.name in body.infos]
    with _Files() as files:
        differing = tuple(t.name for t in shared if not files.same(t, body.infos[t.name]))
    _check_differing(body, donor, differing)
    if differing:
        told.append(
            f"{', '.join(differing)} differ in values or type; the head may have been trained, or "
            "quantized, with others"
        )
    if left := [t.name for t in donor.infos.values() if t.block is None and t not in shared]:
        told.append(f"{', '.join(left)} lie only in the head's file, and are left out")
    for what in told:
        warnings.warn(
            f"{donor.path.name} and {body.path.name}: {what}. The trunk's are kept.", stacklevel=2
        )
    tensors = _bundled_order(body, donor)
    meter = _Meter(progress, sum(t.size for t in tensors))
    with atomic.replacing(model_path) as temporary:
        model_bytes = _write(temporary, body, keys, tensors, meter)
    return GraftReport(
        model=model_path,
        model_bytes=model_bytes,
        trunk_bytes=body.file_bytes,
        head_bytes=donor.file_bytes,
        shared={t.name: t.size for t in shared},
        differing=differing,
        n_trunk=donor.n_trunk,
        n_nextn=donor.n_nextn,
    )


# --- does a head fit a trunk ---------------------------------------------------------------------


class ModelHeader(Protocol):
    """What check_fit asks of a header; ModelFile has it. Shapes in ggml order, row length first."""

    @property
    def path(self) -> Path: ...
    @property
    def architecture(self) -> str: ...
    @property
    def n_trunk(self) -> int: ...
    @property
    def n_nextn(self) -> int: ...
    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]: ...


def check_fit(trunk: ModelHeader, head: ModelHeader) -> None:
    """Refuse a head that was not made for this trunk.

    The engine compares one width, by an assertion that ends the process, and takes the rest on
    trust (common/speculative.cpp, common_speculative_impl_draft_mtp).

    Args:
        trunk: a model with or without a head of its own.
        head: a head-only file, or a bundled model.

    Raises:
        ModelError: ``head`` has no head, or lacks a tensor of it; architecture, block count,
            number of head blocks, width or vocabulary differ. The message has both values.
    """
    _check_has_head(head)
    differ = _differing(trunk, head)
    if trunk.architecture != head.architecture:
        raise differ("architecture", trunk.architecture, head.architecture)
    if trunk.n_trunk != head.n_trunk:
        raise differ("the number of trunk blocks", trunk.n_trunk, head.n_trunk)
    if trunk.n_nextn not in (0, head.n_nextn):
        raise differ("nextn_predict_layers", trunk.n_nextn, head.n_nextn)
    embeddings = "token_embd.weight"
    for side in (trunk, head):
        if len(side.tensors.get(embeddings, ())) != 2:
            raise ModelError(
                f"{side.path}: the tensor {embeddings} is missing; a head-only file has it too, as "
                "it is loaded as a model of its own (convert_hf_to_gguf.py --mtp)"
            )
    (n_embd, n_vocab), (n_embd_head, n_vocab_head) = (
        trunk.tensors[embeddings],
        head.tensors[embeddings],
    )
    if n_embd != n_embd_head:
        raise differ(f"the width of a row (n_embd, {embeddings})", n_embd, n_embd_head)
    if n_vocab != n_vocab_head:
        raise differ(f"the vocabulary (rows of {embeddings})", n_vocab, n_vocab_head)
    for block in range(head.n_trunk, head.n_trunk + head.n_nextn):
        # [2 * n_embd, n_embd] in every architecture that has one (src/models/)
        name = f"blk.{block}.nextn.eh_proj.weight"
        if head.tensors[name] != (2 * n_embd, n_embd):
            raise differ(f"the shape of {name}", (2 * n_embd, n_embd), head.tensors[name])


def _differing(
    trunk: ModelHeader, head: ModelHeader
) -> Callable[[str, object, object], ModelError]:
    def error(what: str, ours: object, theirs: object) -> ModelError:
        return ModelError(
            f"{head.path} does not fit {trunk.path}: {what} is {ours} in the trunk, {theirs} in "
            "the head's file; they must come from the same model"
        )

    return error


def _check_has_head(model: ModelHeader) -> None:
    if model.n_nextn == 0:
        raise ModelError(
            f"{model.path}: it has no MTP head ({model.architecture}.nextn_predict_layers is 0 or "
            "absent); was it converted with --no-mtp?"
        )
    for block in range(model.n_trunk, model.n_trunk + model.n_nextn):
        # What the loaders require of every head (src/models/); the rest differs by architecture,
        # exaone4's has no attn_norm, but no head is these three alone.
        prefix = f"blk.{block}."
        missing = [
            name
            for part in ("eh_proj", "enorm", "hnorm")
            if (name := f"{prefix}nextn.{part}.weight") not in model.tensors
        ]
        nextn = prefix + "nextn."
        if all(not n.startswith(prefix) or n.startswith(nextn) for n in model.tensors):
            missing.append(f"{prefix}attn_*")
        if missing:
            raise ModelError(
                f"{model.path}: the metadata claim {model.n_nextn} MTP head block(s), but "
                f"{', '.join(missing)} is missing; the file holds no complete head"
            )


# A person may have edited these in one file without making the weights useless for the other.
_EDITABLE = ("context_length", "expert_used_count")
_EDITABLE_PREFIXES = ("rope.",)


def _check_keys(trunk: _Model, head: _Model) -> Iterator[str]:
    """Refuse what is at odds in the metadata; give the rest as sentences for a warning."""
    differ = _differing(trunk, head)
    words = "tokenizer.ggml.tokens"
    ours, theirs = trunk.keys.get(words), head.keys.get(words)
    if ours is not None and theirs is not None and ours.raw != theirs.raw:
        if ours.count != theirs.count:
            raise differ(f"the number of {words}", ours.count, theirs.count)
        yield f"the words of the vocabulary ({words}) differ, in equal number"
    # precision options by tensor name (llama_prec_policy::load in src/llama-model.cpp)
    options = "general.tensor_extra.name"
    ours, theirs = trunk.keys.get(options), head.keys.get(options)
    if theirs is not None and (ours is None or ours.raw != theirs.raw):
        yield f"{options} differs; options of the head's own tensors are lost"
    prefix = f"{head.architecture}."
    for key in [*trunk.keys, *(k for k in head.keys if k not in trunk.keys)]:
        field = key.removeprefix(prefix)
        if field == key or field in ("block_count", "nextn_predict_layers"):
            continue  # not of the architecture, or compared in check_fit
        ours, theirs = trunk.keys.get(key), head.keys.get(key)
        if ours is None or theirs is None:
            yield f"{key} is only in the {'head' if ours is None else 'trunk'}'s file"
        elif trunk.is_per_layer(key) or head.is_per_layer(key):
            of_trunk = trunk.per_layer(key, trunk.n_trunk)
            of_head = head.per_layer(key, trunk.n_trunk)
            if len(of_trunk) != len(of_head):
                raise differ(f"the length of {key}", len(of_trunk), len(of_head))
            for block, (one, other) in enumerate(zip(of_trunk, of_head, strict=True)):
                if one != other:
                    raise differ(f"{key} of block {block}", one, other)
        elif (one := ours.decoded()) != (other := theirs.decoded()):
            if field not in _EDITABLE and not field.startswith(_EDITABLE_PREFIXES):
                raise differ(key, one, other)
            yield f"{key} is {one} in the trunk, {other} in the head's file"


def _check_differing(trunk: _Model, head: _Model, differing: Iterable[str]) -> None:
    for name in differing:
        # deepseek4: the converter renames the head's own output mixing to the trunk's names
        # (conversion/deepseek.py, filter_tensors), and writes no bundled file for that reason.
        if name.startswith("hc_head"):
            raise ModelError(
                f"{head.path} and {trunk.path} hold tensors named {name} with different values, "
                "and both are needed: one file has no place for two. Keep this model as two files"
            )


def _check_outputs(outputs: list[Path], inputs: list[Path]) -> None:
    for i, output in enumerate(outputs):
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, "name a file in this folder", str(output))
        for other in [*inputs, *outputs[:i]]:
            same = os.path.realpath(output) == os.path.realpath(other)
            if same or (output.exists() and other.exists() and output.samefile(other)):
                role = "an input" if other in inputs else "the other output"
                raise ValueError(f"cannot write {str(output)!r}: it is {role}; name another file")


# --- metadata and order of the halves ------------------------------------------------------------


def _without_split(model: _Model) -> dict[str, _Value]:
    """The keys without those that tools/gguf-split/gguf-split.cpp adds: an output is one file."""
    return {key: value for key, value in model.keys.items() if not key.startswith("split.")}


def _trunk_keys(model: _Model, keys: Mapping[str, _Value]) -> dict[str, _Value]:
    block_count = f"{model.architecture}.block_count"
    out = {}
    for key, value in keys.items():
        if key == f"{model.architecture}.nextn_predict_layers":
            continue
        if key == block_count:
            out[key] = value.with_scalar(model.n_trunk)
        elif model.is_per_layer(key):
            out[key] = value.first(model.n_trunk)
        else:
            out[key] = value
    return out


def _bundled_keys(trunk: _Model, head: _Model) -> dict[str, _Value]:
    """The trunk's keys, with what tells of the head taken from the head's file."""
    block_count = f"{head.architecture}.block_count"
    nextn = f"{head.architecture}.nextn_predict_layers"
    ours, theirs = _without_split(trunk), _without_split(head)
    # Back where it was before extract_mtp took it out: before the key that follows it there.
    names = list(theirs)
    following = next((k for k in names[names.index(nextn) :] if k in ours), None)
    out: dict[str, _Value] = {}
    for key, value in ours.items():
        if key == following:
            out[nextn] = theirs[nextn]
        if key in (block_count, nextn) or head.is_per_layer(key):
            out[key] = theirs[key]
        elif (
            trunk.is_per_layer(key)
            and trunk.n_nextn == 0
            and key in theirs
            and not theirs[key].is_array
        ):
            out[key] = value.extended(theirs[key].decoded(), head.n_nextn)
        else:
            out[key] = value
    out.setdefault(nextn, theirs[nextn])
    return out


def _bundled_order(trunk: _Model, head: _Model) -> list[_Tensor]:
    """All tensors of the trunk in its order, and the head's blocks where the head's file has them.

    Each goes before the tensor outside the blocks that follows it in the head's file, and at the
    end if none does: for the two outputs of extract_mtp that is the order of the model.
    """
    waiting: dict[str | None, list[_Tensor]] = {}
    group: list[_Tensor] = []
    for tensor in head.infos.values():
        if tensor.block is None:
            if tensor.name in trunk.infos:
                waiting[tensor.name] = group
                group = []
        elif tensor.block >= head.n_trunk:
            group.append(tensor)
    waiting[None] = group
    out: list[_Tensor] = []
    for tensor in trunk.infos.values():
        out += waiting.get(tensor.name, [])
        out.append(tensor)
    return out + waiting[None]


# --- reading -------------------------------------------------------------------------------------

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # one layout; the engine refuses version 1 (ggml/src/gguf.cpp)
_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT in gguf.h, where general.alignment is absent
_MAX_DIMS = 4  # GGML_MAX_DIMS
_BUFFER = 4 << 20

_STRING, _ARRAY = 8, 9
# gguf_type in gguf.h
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)

# Arrays under <arch>. that are not per layer, whatever their length (src/llama-arch.cpp).
_NOT_PER_LAYER = (
    "rope.dimension_sections",
    "target_layers",
    "ple.layer_multipliers",
    "ple.head_offsets",
    "ple.head_vocab_sizes",
)


class _DamagedError(Exception):
    """The bytes are no GGUF; the text says why."""


@dataclass(frozen=True)
class _Value:
    """A metadata value as it lies in the file: ``raw`` follows the key, type and count included."""

    kind: int  # of the value, or of an array's elements
    is_array: bool
    count: int
    raw: bytes

    @property
    def _data(self) -> bytes:
        return self.raw[16:] if self.is_array else self.raw[4:]

    def decoded(self) -> Any:
        """A number, a bool, a str, or a list of numbers; for an array of strings its bytes."""
        if self.kind == _STRING:
            return self._data if self.is_array else self._data[8:].decode("utf-8", "replace")
        values = list(struct.unpack(f"<{self.count}{_SCALARS[self.kind]}", self._data))
        return values if self.is_array else values[0]

    def with_scalar(self, value: int) -> _Value:
        raw = struct.pack(f"<I{_SCALARS[self.kind]}", self.kind, value)
        return _Value(self.kind, False, 1, raw)

    def first(self, count: int) -> _Value:
        """The array's first entries."""
        size = struct.calcsize(f"<{_SCALARS[self.kind]}")
        return self._array(count, self._data[: count * size])

    def extended(self, value: Any, count: int) -> _Value:
        """The array and ``count`` times ``value`` after it."""
        more = struct.pack(f"<{count}{_SCALARS[self.kind]}", *[value] * count)
        return self._array(self.count + count, self._data + more)

    def _array(self, count: int, data: bytes) -> _Value:
        return _Value(self.kind, True, count, struct.pack("<IIQ", _ARRAY, self.kind, count) + data)


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    kind: int  # ggml_type
    size: int  # bytes, without padding
    path: Path
    start: int  # byte in the file
    granule: int  # the size may be too large by less than this; 1 where it is exact

    @property
    def block(self) -> int | None:
        """The number in `blk.<number>.`; None for a tensor outside the blocks."""
        found = _BLOCK.match(self.name)
        return int(found[1]) if found else None


class _Cursor:
    """Reads forward through bytes, and never past their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def skip(self, count: int, what: str) -> int:
        """Step over ``count`` bytes; gives where they start."""
        start, end = self.at, self.at + count
        if end > len(self.data):
            raise _DamagedError(
                f"cut short or damaged: {what} would end at byte {end}, the file has "
                f"{len(self.data)}"
            )
        self.at = end
        return start

    def u32(self, what: str) -> int:
        return int(struct.unpack_from("<I", self.data, self.skip(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack_from("<Q", self.data, self.skip(8, what))[0])

    def text(self, what: str) -> str:
        size = self.u64(what)
        start = self.skip(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise _DamagedError(f"damaged: {what} is not UTF-8") from None

    def value(self, key: str) -> _Value:
        start = self.at
        kind = self.u32(key)
        is_array, count = kind == _ARRAY, 1
        if is_array:
            kind = self.u32(key)
            count = self.u64(key)
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.u64(key), key)
        elif kind in _SCALARS:
            self.skip(count * struct.calcsize(f"<{_SCALARS[kind]}"), key)
        else:
            raise _DamagedError(f"damaged: the key {key!r} has the unknown type {kind}")
        return _Value(kind, is_array, count, self.data[start : self.at])


@dataclass(frozen=True)
class _Part:
    """One GGUF file."""

    path: Path
    version: int
    alignment: int
    keys: dict[str, _Value]
    tensors: list[_Tensor]
    file_bytes: int

    @classmethod
    def read(cls, path: Path) -> _Part:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "expected a GGUF model file", str(path))
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "no such model file", str(path))
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != _MAGIC:
                start = f"it starts with {magic!r}" if magic else "it is empty"
                raise ModelError(f"{path}: not a GGUF file: {start}, expected {_MAGIC!r}")
            try:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return cls._parsed(path, _Cursor(data))
            except _DamagedError as error:
                raise ModelError(f"{path}: {error}") from None

    @classmethod
    def _parsed(cls, path: Path, cursor: _Cursor) -> _Part:
        cursor.skip(4, "the magic")
        version = cursor.u32("the version")
        if version not in _VERSIONS:
            if version & 0xFFFF == 0:
                raise _DamagedError("big-endian GGUF, which is not supported")
            raise _DamagedError(f"GGUF version {version}; 2 and 3 are supported")
        n_tensors, n_keys = cursor.u64("the tensor count"), cursor.u64("the key count")
        keys: dict[str, _Value] = {}
        for i in range(n_keys):
            key = cursor.text(f"the name of key {i}")
            if key in keys:
                raise _DamagedError(f"damaged: the key {key!r} is there twice")
            keys[key] = cursor.value(key)
        alignment = _integer(keys, "general.alignment", _ALIGNMENT)
        if alignment < 1 or alignment & (alignment - 1):
            raise _DamagedError(f"general.alignment is {alignment}, no power of two")
        infos = [cls._tensor_info(cursor, i) for i in range(n_tensors)]
        data = _padded(cursor.at, alignment)
        return cls(
            path,
            version,
            alignment,
            keys,
            _placed(path, infos, data, len(cursor.data), alignment),
            len(cursor.data),
        )

    @staticmethod
    def _tensor_info(cursor: _Cursor, i: int) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.text(f"the name of tensor {i}")
        n_dims = cursor.u32(name)
        if n_dims > _MAX_DIMS:
            raise _DamagedError(f"damaged: the tensor {name!r} has {n_dims} dimensions")
        shape = tuple(cursor.u64(name) for _ in range(n_dims))
        return name, shape, cursor.u32(name), cursor.u64(name)


def _placed(
    path: Path,
    infos: list[tuple[str, tuple[int, ...], int, int]],
    data: int,
    file_bytes: int,
    alignment: int,
) -> list[_Tensor]:
    """Tensors with their size in bytes, which the file does not give: it follows from the type."""
    ends = sorted({data + offset for *_, offset in infos} | {file_bytes})
    following = dict(itertools.pairwise(ends))
    tensors = []
    for name, shape, kind, offset in infos:
        start = data + offset
        if start > file_bytes:
            raise _DamagedError(f"cut short: {name} starts at byte {start}, it has {file_bytes}")
        # A type that gguf-py does not know (a fork's, a newer one) reaches to the next tensor.
        # The padding that may come along does no harm, since the output pads alike.
        size = following.get(start, file_bytes) - start
        if (known := _size(shape, kind)) is not None:
            if start + known > file_bytes:
                raise _DamagedError(
                    f"cut short: {name} ends at byte {start + known}, the file has {file_bytes}"
                )
            if known > size:
                raise _DamagedError(f"damaged: the data of {name} overlap another tensor's")
            size = known
        granule = alignment if known is None else 1
        tensors.append(_Tensor(name, shape, kind, size, path, start, granule))
    return tensors


def _size(shape: tuple[int, ...], kind: int) -> int | None:
    """Bytes of a tensor; None where the type is unknown."""
    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return None
    count = 1
    for length in shape:
        count *= length
    return count // block * block_bytes


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _integer(keys: Mapping[str, _Value], key: str, default: int) -> int:
    value = keys.get(key)
    if value is None:
        return default
    if value.is_array or value.kind not in _INTEGERS:
        raise _DamagedError(f"{key} is not an integer")
    return int(value.decoded())


@dataclass(frozen=True)
class _Model:
    """A model file, all parts of a multi-part one together. A ModelHeader."""

    paths: list[Path]
    version: int
    alignment: int
    keys: Mapping[str, _Value]
    infos: Mapping[str, _Tensor]
    file_bytes: int
    architecture: str
    block_count: int
    n_nextn: int

    @classmethod
    def read(cls, path: Path) -> _Model:
        """Read the headers of all parts, as src/llama-model-loader.cpp finds them.

        Raises:
            FileNotFoundError, IsADirectoryError: no such file.
            ModelError: see _Part.read; or a part is missing, or it is not a model.
        """
        first = _Part.read(path)
        try:
            parts = [first, *map(_Part.read, _other_parts(first))]
            found = first.keys.get("general.architecture")
            architecture = found.decoded() if found and found.kind == _STRING else None
            if not isinstance(architecture, str):
                raise _DamagedError("no general.architecture; this GGUF file is not a model")
            block_count = _integer(first.keys, f"{architecture}.block_count", 0)
            n_nextn = _integer(first.keys, f"{architecture}.nextn_predict_layers", 0)
            if not 0 <= n_nextn <= block_count:
                raise _DamagedError(
                    f"nextn_predict_layers is {n_nextn}, block_count is {block_count}; the "
                    "metadata contradict each other"
                )
            infos: dict[str, _Tensor] = {}
            for number, part in enumerate(parts):
                if len(parts) > 1 and (said := _integer(part.keys, "split.no", -1)) != number:
                    raise _DamagedError(f"{part.path.name} says it is part {said + 1} (split.no)")
                for tensor in part.tensors:
                    if tensor.name in infos:
                        raise _DamagedError(f"damaged: the tensor {tensor.name} is there twice")
                    infos[tensor.name] = tensor
            expected = _integer(first.keys, "split.tensors.count", len(infos))
            if len(parts) > 1 and len(infos) != expected:
                raise _DamagedError(
                    f"its parts have {len(infos)} tensors, {expected} expected "
                    "(split.tensors.count)"
                )
        except _DamagedError as error:
            raise ModelError(f"{path}: {error}") from None
        return cls(
            paths=[part.path for part in parts],
            version=first.version,
            alignment=first.alignment,
            keys=first.keys,
            infos=infos,
            file_bytes=sum(part.file_bytes for part in parts),
            architecture=architecture,
            block_count=block_count,
            n_nextn=n_nextn,
        )

    @property
    def path(self) -> Path:
        return self.paths[0]

    @property
    def n_trunk(self) -> int:
        return self.block_count - self.n_nextn

    @cached_property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name, as in ModelFile."""
        return {name: tensor.shape for name, tensor in self.infos.items()}

    def has_trunk(self) -> bool:
        """Whether any block of the trunk is there."""
        return any(t.block is not None and t.block < self.n_trunk for t in self.infos.values())

    def is_per_layer(self, key: str) -> bool:
        """Whether ``key`` holds an entry for each block, those of the head included.

        The engine reads such arrays with the length block_count and refuses another
        (llama_model_loader::get_key_or_arr); arrays it reads with another length, as glm-dsa's
        indexer types, one for each trunk block, are left as they are.
        """
        value = self.keys.get(key)
        return (
            value is not None
            and value.is_array
            and value.kind != _STRING
            and value.count == self.block_count
            and key.startswith(f"{self.architecture}.")
            and key.removeprefix(f"{self.architecture}.") not in _NOT_PER_LAYER
        )

    def per_layer(self, key: str, count: int) -> list[Any]:
        """The first ``count`` entries; of one value for all blocks, that many times the value."""
        value = self.keys[key].decoded()
        return value[:count] if self.keys[key].is_array else [value] * count


def _other_parts(first: _Part) -> list[Path]:
    """The parts of a multi-part model after the first; the engine finds them by name too."""
    n_parts = _integer(first.keys, "split.count", 1)
    if n_parts <= 1:
        return []
    match = _PART.search(first.path.name)
    if match is None or int(match[2]) != n_parts:
        raise _DamagedError(
            f"part of a model in {n_parts} parts, but not named …-00001-of-{n_parts:05d}.gguf; "
            "give the first part under its original name"
        )
    if int(match[1]) != 1:
        raise _DamagedError(f"part {int(match[1])} of {n_parts}; give the first part")
    stem = first.path.name[: match.start()]
    parts = [
        first.path.with_name(f"{stem}-{n:05d}-of-{n_parts:05d}.gguf") for n in range(2, n_parts + 1)
    ]
    for part in parts:
        if not part.is_file():
            raise _DamagedError(f"{part.name} is missing: this is the first of {n_parts} parts")
    return parts


# --- writing -------------------------------------------------------------------------------------


class _Meter:
    """Counts written bytes for the caller."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Files(ExitStack):
    """The inputs, each opened once, read in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[Path, FileIO] = {}

    def blocks(self, tensor: _Tensor) -> Iterator[memoryview]:
        """The tensor's bytes, in equal blocks and a rest; each is overwritten by the next."""
        if tensor.path not in self._open:
            # Unbuffered: a block goes into our buffer without a copy in between.
            self._open[tensor.path] = self.enter_context(tensor.path.open("rb", buffering=0))
        file = self._open[tensor.path]
        buffer = memoryview(bytearray(min(_BUFFER, tensor.size)))
        for done in range(0, tensor.size, _BUFFER):
            block = buffer[: tensor.size - done]
            file.seek(tensor.start + done)
            filled = 0
            while filled < len(block):
                got = file.readinto(block[filled:])
                if not got:
                    raise OSError(errno.EIO, f"it ended inside {tensor.name}", str(tensor.path))
                filled += got
            yield block

    def same(self, one: _Tensor, other: _Tensor) -> bool:
        """Whether two tensors are alike in type and bytes."""
        if (one.kind, one.size) != (other.kind, other.size):
            return False
        pairs = zip(self.blocks(one), self.blocks(other), strict=True)
        # bytearray, since two views are compared an item at a time
        return all(bytearray(ours) == theirs for ours, theirs in pairs)


def _write(
    path: Path,
    layout: _Model,
    keys: Mapping[str, _Value],
    tensors: list[_Tensor],
    meter: _Meter,
) -> int:
    """Write a GGUF file with the version and alignment of ``layout``; gives its size in bytes."""
    alignment = layout.alignment
    with path.open("wb") as file, _Files() as files:
        file.write(_MAGIC + struct.pack("<IQQ", layout.version, len(tensors), len(keys)))
        for key, value in keys.items():
            file.write(_text(key) + value.raw)
        offset = 0
        for tensor in tensors:
            if tensor.granule > alignment:
                raise ModelError(
                    f"{tensor.path}: the size of {tensor.name} is not known (ggml type "
                    f"{tensor.kind}), and its file is aligned to {tensor.granule} bytes, the output "
                    f"to {alignment}; give files of the same general.alignment"
                )
            dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            file.write(_text(tensor.name) + dims + struct.pack("<IQ", tensor.kind, offset))
            offset += _padded(tensor.size, alignment)
        _pad(file, alignment)
        for tensor in tensors:
            for block in files.blocks(tensor):
                file.write(block)
                meter.add(len(block))
            _pad(file, alignment)
        return file.tell()


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _pad(file: BinaryIO, alignment: int) -> None:
    at = file.tell()
    file.write(bytes(_padded(at, alignment) - at))
