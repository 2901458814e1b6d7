"""What a model file says of itself, read from its header without loading it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix import _session
from imatrix.errors import ModelError

_SAMPLES = 64
_SAMPLE_BYTES = 4096

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class ModelFile:
    """The header of a GGUF model, all parts of a multi-part one together.

    Attributes:
        path: the file, or the first part.
        architecture: general.architecture.
        has_tokenizer: whether text can be tokenized.
        n_trunk: trunk blocks, `blk.0` to `blk.<n_trunk - 1>`.
        n_nextn: MTP/NextN head blocks that the metadata claims, `blk.<n_trunk>` on.
        tensors: shape by tensor name, ggml order: the row length first.
        integers: the architecture's own whole-number keys, without its name in front.
        parts: every file, the first part first, and how many bytes its header has.
    """

    path: Path
    architecture: str
    has_tokenizer: bool
    n_trunk: int
    n_nextn: int
    tensors: Mapping[str, tuple[int, ...]]
    integers: Mapping[str, int]
    parts: tuple[tuple[Path, int], ...] = ()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ModelFile:
        """Read the header.

        Raises:
            FileNotFoundError, IsADirectoryError: no such file.
            ModelError: not GGUF, truncated, no architecture, or a part is missing.
        """
        first = Path(path)
        if first.is_dir():
            raise IsADirectoryError(errno.EISDIR, "expected a GGUF model file", str(first))
        if not first.exists():
            raise FileNotFoundError(errno.ENOENT, "no such model file", str(first))
        header = _session.model_file(str(first))
        tensors = dict(header["tensors"])
        # before the architecture: later parts of a multi-part model have none
        parts = [(first, header["data_offset"])]
        for part in _other_parts(first, header["split_count"]):
            other = _session.model_file(str(part))
            tensors.update(other["tensors"])
            parts.append((part, other["data_offset"]))
        if not header["architecture"]:
            raise ModelError(f"{first}: no general.architecture; this GGUF file is not a model")
        n_nextn = header["n_nextn"]
        if not 0 <= n_nextn <= header["block_count"]:
            raise ModelError(
                f"{first}: nextn_predict_layers is {n_nextn}, block_count is "
                f"{header['block_count']}; the metadata contradict each other"
            )
        return cls(
            path=first,
            architecture=header["architecture"],
            # "no_vocab" is the engine's word for a model without one; asking such a model
            # to tokenize ends the process (src/llama-vocab.cpp)
            has_tokenizer=header["tokenizer"] not in ("", "no_vocab", "none"),
            n_trunk=header["block_count"] - n_nextn,
            n_nextn=n_nextn,
            tensors=tensors,
            integers=header["integers"],
            parts=tuple(parts),
        )

    @property
    def size(self) -> int:
        """Bytes of all parts together."""
        return sum(path.stat().st_size for path, _ in self.parts)

    def fingerprint(self) -> str:
        """What tells this model from another, in hexadecimal, without reading it all.

        SHA-256 over each part's size, its header, and 64 samples of 4 KiB spread evenly over its
        data: two fine-tunes of one model have the same header. Paths and times do not count.
        """
        digest = hashlib.sha256()
        for path, header in self.parts:
            size = path.stat().st_size
            digest.update(f"{size} {header}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(header))
                for sample in range(_SAMPLES):
                    file.seek(header + (size - header) * sample // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _other_parts(first: Path, split_count: int) -> list[Path]:
    """The parts of a multi-part model after the first; the engine finds them by name too."""
    if split_count <= 1:
        return []
    match = _PART.search(first.name)
    if match is None or int(match[2]) != split_count:
        raise ModelError(
            f"{first}: part of a model in {split_count} parts, but not named "
            f"…-00001-of-{split_count:05d}.gguf; give the first part under its original name"
        )
    if int(match[1]) != 1:
        raise ModelError(f"{first}: part {int(match[1])} of {split_count}; give the first part")
    stem = first.name[: match.start()]
    parts = [
        first.with_name(f"{stem}-{n:05d}-of-{split_count:05d}.gguf")
        for n in range(2, split_count + 1)
    ]
    for part in parts:
        if not part.is_file():
            raise ModelError(f"{part} is missing: {first.name} is the first of {split_count} parts")
    return parts
