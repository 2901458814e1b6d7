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

What does not change is copied as the bytes that it is (imatrix.model.raw).
"""

from __future__ import annotations

import errno
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from imatrix.engine.rehearsal import rehearse_load
from imatrix.errors import ModelError
from imatrix.files import atomic
from imatrix.files.outputs import check_files
from imatrix.model.architectures import loads_alone
from imatrix.model.fit import check_fit, check_has_head, misfit
from imatrix.model.header import ModelFile, head_blocks
from imatrix.model.parts import check_part, check_tensor_count, other_parts, without_part
from imatrix.model.raw import (
    STRING,
    DamagedError,
    Files,
    Meter,
    Part,
    Progress,
    Tensor,
    Value,
    integer,
    write,
)

__all__ = [
    "DropReport",
    "ExtractReport",
    "GraftReport",
    "drop_mtp",
    "extract_mtp",
    "graft_mtp",
    "mtp_name",
]

PathLike = str | os.PathLike[str]

_TYPES = frozenset(map(int, GGMLQuantizationType))


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
    source = _Model.read(Path(model))
    head_path = Path(out)
    if head_path.is_dir():
        head_path = head_path / mtp_name(model)
    trunk_path = None if trunk_out is None else Path(trunk_out)
    outputs = [head_path] if trunk_path is None else [head_path, trunk_path]
    _check_outputs(outputs, source.paths)
    check_has_head(source)
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
    head = [
        t
        for t in source.infos.values()
        if (t.block is None and not source.is_trunks(t.name)) or (t.block or 0) >= source.n_trunk
    ]
    trunk = [t for t in source.infos.values() if t.block is None or t.block < source.n_trunk]
    keys = _without_split(source)
    meter = Meter(progress, sum(t.size for t in (head if trunk_path is None else head + trunk)))
    with ExitStack() as stack:
        # Both are complete before either takes its place.
        temporary = [stack.enter_context(atomic.replacing(path)) for path in outputs]
        head_keys = {key: value for key, value in keys.items() if not source.is_trunks(key)}
        head_bytes = write(temporary[0], source.version, source.alignment, head_keys, head, meter)
        trunk_bytes = None
        if trunk_path is not None:
            trunk_bytes = write(
                temporary[1],
                source.version,
                source.alignment,
                _trunk_keys(source, keys),
                trunk,
                meter,
            )
        for path, half in zip(temporary, outputs, strict=True):
            _check_loads(path, half, source.path)
    return ExtractReport(
        head=head_path,
        head_bytes=head_bytes,
        trunk=trunk_path,
        trunk_bytes=trunk_bytes,
        model_bytes=source.file_bytes,
        shared={t.name: t.size for t in head if t.block is None},
        n_trunk=source.n_trunk,
        n_nextn=source.n_nextn,
    )


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
    source = _Model.read(Path(model), any_claim=True)
    path = Path(out)
    _check_outputs([path], source.paths)
    key = f"{source.architecture}.nextn_predict_layers"
    claimed = key in source.keys and source.keys[key].decoded() != 0
    heads = {t.block for t in source.infos.values() if t.block is not None and ".nextn." in t.name}
    if source.architecture == "gemma4-assistant" or not (claimed or heads):
        raise ModelError(f"{source.path}: it has no MTP head, and its metadata claim none")
    claimed_from = source.block_count - source.claimed_nextn
    blocks = {t.block for t in source.infos.values() if t.block is not None}
    if source.claimed_nextn and not any(block >= claimed_from for block in heads):
        heads = set()
        n_trunk = max(claimed_from, 1 + max(blocks, default=-1))
    else:
        n_trunk = min(heads, default=claimed_from)
    kept = [t for t in source.infos.values() if t.block is None or t.block < n_trunk]
    if not any(t.block is not None for t in kept):
        raise ModelError(
            f"{source.path}: it holds a head alone, and nothing would be left without it"
        )
    meter = Meter(progress, sum(t.size for t in kept))
    # arrays are as long as there are blocks, though block_count may leave out those of the head
    whole = replace(source, block_count=max(source.block_count, 1 + max(blocks)))
    keys = _trunk_keys(whole, _without_split(source), n_trunk)
    with atomic.replacing(path) as temporary:
        n_bytes = write(temporary, source.version, source.alignment, keys, kept, meter)
        _check_loads(temporary, path, source.path)
    return DropReport(
        model=path,
        model_bytes=n_bytes,
        source_bytes=source.file_bytes,
        n_trunk=n_trunk,
        dropped=tuple(
            t.name for t in source.infos.values() if t.block is not None and t.block >= n_trunk
        ),
    )


def _check_loads(temporary: Path, path: Path, source: Path) -> None:
    """Refuse to put a file in its place that the engine does not load.

    Raises:
        ModelError: the engine's own reason.
    """
    if any(t.kind not in _TYPES for t in Part.read(temporary).tensors):
        return  # types of a fork's quantizer, which its engine loads and this one does not
    written = ModelFile.read(temporary)
    if loads_alone(written) and (why := rehearse_load(temporary, mtp=written.n_nextn > 0)):
        raise ModelError(
            f"{source}: nothing was written to {path}, because the engine would not load it: {why}"
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
    check_fit(body, donor, grafting=True)
    told = list(_check_keys(body, donor))
    keys = _bundled_keys(body, donor)
    shared = [t for t in donor.infos.values() if t.block is None and t.name in body.infos]
    with Files() as files:
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
    meter = Meter(progress, sum(t.size for t in tensors))
    with atomic.replacing(model_path) as temporary:
        model_bytes = write(temporary, body.version, body.alignment, keys, tensors, meter)
        _check_loads(temporary, model_path, body.path)
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


# A person may have edited these in one file without making the weights useless for the other.
_EDITABLE = ("context_length", "expert_used_count")
_EDITABLE_PREFIXES = ("rope.",)


def _check_keys(trunk: _Model, head: _Model) -> Iterator[str]:
    """Refuse what is at odds in the metadata; give the rest as sentences for a warning."""
    differ = misfit(trunk, head)
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
        if theirs is None and trunk.is_trunks(key):
            continue
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
    for output in outputs:
        if output.is_dir():
            raise IsADirectoryError(errno.EISDIR, "name a file in this folder", str(output))
    check_files(outputs, inputs)


# --- metadata and order of the halves ------------------------------------------------------------


def _without_split(model: _Model) -> dict[str, Value]:
    """The keys without those that tools/gguf-split/gguf-split.cpp adds: an output is one file."""
    return {key: value for key, value in model.keys.items() if not key.startswith("split.")}


def _trunk_keys(
    model: _Model, keys: Mapping[str, Value], n_trunk: int | None = None
) -> dict[str, Value]:
    n_trunk = model.n_trunk if n_trunk is None else n_trunk
    block_count = f"{model.architecture}.block_count"
    out = {}
    for key, value in keys.items():
        if key == f"{model.architecture}.nextn_predict_layers":
            continue
        if key == block_count:
            out[key] = value.with_scalar(n_trunk)
        elif model.is_per_layer(key):
            out[key] = value.first(min(n_trunk, value.count))
        else:
            out[key] = value
    return out


def _bundled_keys(trunk: _Model, head: _Model) -> dict[str, Value]:
    """The trunk's keys, with what tells of the head taken from the head's file."""
    block_count = f"{head.architecture}.block_count"
    nextn = f"{head.architecture}.nextn_predict_layers"
    ours, theirs = _without_split(trunk), _without_split(head)
    # Back where it was before extract_mtp took it out: before the key that follows it there.
    names = list(theirs)
    following = next((k for k in names[names.index(nextn) :] if k in ours), None)
    out: dict[str, Value] = {}
    for key, value in ours.items():
        if key == following:
            out[nextn] = theirs[nextn]
        if key in (block_count, nextn) or head.is_per_layer(key):
            out[key] = theirs[key]
        elif (
            trunk.is_per_layer(key)
            and trunk.claimed_nextn == 0
            and key in theirs
            and not theirs[key].is_array
        ):
            try:
                out[key] = value.extended(theirs[key].decoded(), head.n_nextn)
            except struct.error:  # equal numbers may be of types that do not go together
                raise ModelError(
                    f"{head.path}: {key} is {theirs[key].decoded()!r}, which has no place in the "
                    f"array that {trunk.path} has under that key; convert both with one converter"
                ) from None
        else:
            out[key] = value
    out.setdefault(nextn, theirs[nextn])
    return out


def _bundled_order(trunk: _Model, head: _Model) -> list[Tensor]:
    """All tensors of the trunk in its order, and the head's blocks where the head's file has them.

    Each goes before the tensor outside the blocks that follows it in the head's file, and at the
    end if none does: for the two outputs of extract_mtp that is the order of the model.
    """
    waiting: dict[str | None, list[Tensor]] = {}
    group: list[Tensor] = []
    for tensor in head.infos.values():
        if tensor.block is None:
            if tensor.name in trunk.infos:
                waiting[tensor.name] = group
                group = []
        elif tensor.block >= head.n_trunk:
            group.append(tensor)
    waiting[None] = group
    out: list[Tensor] = []
    for tensor in trunk.infos.values():
        out += waiting.get(tensor.name, [])
        out.append(tensor)
    return out + waiting[None]


# --- a model ---------------------------------------------------------------------------------

# Arrays under <arch>. that are not per layer, whatever their length (src/llama-arch.cpp).
_NOT_PER_LAYER = (
    "rope.dimension_sections",
    "target_layers",
    "ple.layers",
    "ple.layer_multipliers",
    "ple.head_offsets",
    "ple.head_vocab_sizes",
)


# What a head's file has no use for of what lies outside the blocks: tensors, and keys under
# <arch>. The engine looks for a table of n-grams only if the keys tell of one (qwen4exp.cpp,
# load_arch_hparams), and of the mixer at the trunk's end only if the file has a trunk
# (nextn_flags in src/llama-model.cpp). The table is larger than the rest of the model together;
# the converter leaves these out too (conversion/qwen4exp.py, mtp_only).
_TRUNKS = {
    "qwen4exp": (
        "per_layer_token_embd.weight", "output_hc_norm.weight", "output_hc_down.weight",
        "output_hc_up.weight", "qwen4exp.ple.", "qwen4exp.embedding_length_per_layer_input",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Model:
    """A model file, all parts of a multi-part one together. A ModelHeader."""

    paths: list[Path]
    version: int
    alignment: int
    keys: Mapping[str, Value]
    infos: Mapping[str, Tensor]
    file_bytes: int
    architecture: str
    block_count: int
    claimed_nextn: int
    n_trunk: int
    n_nextn: int

    @classmethod
    def read(cls, path: Path, *, any_claim: bool = False) -> _Model:
        """Read the headers of all parts, as src/llama-model-loader.cpp finds them.

        Args:
            any_claim: take a claim of more head blocks than there are blocks for none.

        Raises:
            FileNotFoundError, IsADirectoryError: no such file.
            ModelError: see Part.read; or a part is missing, or it is not a model.
        """
        first = Part.read(path)
        try:
            count = integer(first.keys, "split.count", 1)
            parts = [first, *map(Part.read, other_parts(path, count))]
            found = first.keys.get("general.architecture")
            architecture = found.decoded() if found and found.kind == STRING else None
            if not isinstance(architecture, str):
                raise DamagedError("no general.architecture; this GGUF file is not a model")
            block_count = integer(first.keys, f"{architecture}.block_count", 0)
            claimed = integer(first.keys, f"{architecture}.nextn_predict_layers", 0)
            if not 0 <= claimed <= block_count:
                if not any_claim:
                    raise DamagedError(
                        f"nextn_predict_layers is {claimed}, block_count is {block_count}; the "
                        "metadata contradict each other. If the model has no head, drop the "
                        f"claim: imatrix drop-mtp {path} -o OUT.gguf"
                    )
                claimed = 0
            infos: dict[str, Tensor] = {}
            for number, part in enumerate(parts):
                if len(parts) > 1:
                    numbers = (integer(part.keys, f"split.{k}", -1) for k in ("no", "count"))
                    check_part(part.path, number, count, *numbers)
                for tensor in part.tensors:
                    if tensor.name in infos:
                        raise DamagedError(f"damaged: the tensor {tensor.name} is there twice")
                    infos[tensor.name] = tensor
            if len(parts) > 1:
                expected = integer(first.keys, "split.tensors.count", -1)
                check_tensor_count(path, len(infos), expected)
        except DamagedError as error:
            raise ModelError(f"{path}: {error}") from None
        n_trunk, n_nextn = head_blocks(architecture, block_count, claimed, infos)
        return cls(
            paths=[part.path for part in parts],
            version=first.version,
            alignment=first.alignment,
            keys=first.keys,
            infos=infos,
            file_bytes=sum(part.file_bytes for part in parts),
            architecture=architecture,
            block_count=block_count,
            claimed_nextn=claimed,
            n_trunk=n_trunk,
            n_nextn=n_nextn,
        )

    @property
    def path(self) -> Path:
        return self.paths[0]

    @cached_property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by name, as in ModelFile."""
        return {name: tensor.shape for name, tensor in self.infos.items()}

    def has_trunk(self) -> bool:
        """Whether any block of the trunk is there."""
        return any(t.block is not None and t.block < self.n_trunk for t in self.infos.values())

    def is_trunks(self, name: str) -> bool:
        """Whether a tensor outside the blocks, or a key, is of no use in a head's file."""
        return name.startswith(_TRUNKS.get(self.architecture, ()))

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
            and value.kind != STRING
            and value.count == self.block_count
            and key.startswith(f"{self.architecture}.")
            and key.removeprefix(f"{self.architecture}.") not in _NOT_PER_LAYER
        )

    def per_layer(self, key: str, count: int) -> list[Any]:
        """The first ``count`` entries; of one value for all blocks, that many times the value."""
        value = self.keys[key].decoded()
        return value[:count] if self.keys[key].is_array else [value] * count
