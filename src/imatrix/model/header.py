"""What a model file says about itself, read from its header without loading it.

A header is parsed in two ways, for two purposes:

    EnginePart (native.engine.model_file)   the engine's own reader, for files that the engine is
                                            to run: it refuses what the engine would refuse, takes
                                            names as the engine takes them, and is fast for large
                                            vocabularies
    raw.Part                                for files to cut up: it keeps every key and tensor as
                                            bytes, and takes types that this engine does not know

Neither interprets what it has read. How the parts of a model make one, and what is its trunk and
what its head, is decided once for both: in parts.read_parts and in ModelHeader.of.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix.errors import ModelError
from imatrix.model.parts import PartHeader, read_parts
from imatrix.native import engine
from imatrix.tensors import block_of

__all__ = ["ModelFile", "ModelHeader"]

_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class ModelHeader:
    """What a model consists of, all parts of a multi-part one together.

    Attributes:
        path: the file, or the first part.
        architecture: general.architecture.
        n_trunk: trunk blocks, `blk.0` to `blk.<n_trunk - 1>`.
        n_nextn: MTP/NextN head blocks, `blk.<n_trunk>` on.
        tensors: shape by tensor name, ggml order: the row length first.
        integers: the architecture's own whole-number keys, without its name in front.
        block_count: blocks that the metadata claim, trunk and head together.
        claimed_nextn: head blocks that the metadata claim, whose tensors may be missing.
    """

    path: Path
    architecture: str
    n_trunk: int
    n_nextn: int
    tensors: Mapping[str, tuple[int, ...]]
    integers: Mapping[str, int]
    block_count: int
    claimed_nextn: int

    @classmethod
    def of(cls, parts: Sequence[PartHeader], *, any_claim: bool = False) -> ModelHeader:
        """Put the parts together.

        Args:
            parts: from parts.read_parts.
            any_claim: take a claim of more head blocks than there are blocks for none.

        Raises:
            ModelError: the file names no architecture, or claims more head blocks than blocks.
        """
        first = parts[0]
        if not first.architecture:
            raise ModelError(
                f"{first.path}: no general.architecture; this GGUF file is not a model"
            )
        block_count = first.integers.get("block_count", 0)
        claimed = first.integers.get("nextn_predict_layers", 0)
        if not 0 <= claimed <= block_count:
            if not any_claim:
                raise ModelError(
                    f"{first.path}: nextn_predict_layers is {claimed}, block_count is "
                    f"{block_count}; the metadata contradict each other. If the model has no "
                    "head, drop the claim: "
                    f"imatrix drop-mtp {shlex.quote(str(first.path))} -o OUT.gguf"
                )
            claimed = 0
        tensors = {name: shape for part in parts for name, shape in part.shapes.items()}
        n_trunk, n_nextn = _head_blocks(first.architecture, block_count, claimed, tensors)
        return ModelHeader(
            path=first.path,
            architecture=first.architecture,
            n_trunk=n_trunk,
            n_nextn=n_nextn,
            tensors=tensors,
            integers=first.integers,
            block_count=block_count,
            claimed_nextn=claimed,
        )

    @property
    def head_blocks(self) -> range:
        """Numbers of the head's blocks."""
        return range(self.n_trunk, self.n_trunk + self.n_nextn)

    def in_head(self, name: str) -> bool:
        """Whether a tensor belongs to the MTP/NextN head."""
        block = block_of(name)
        if block is None:
            return name.startswith("nextn.")
        return block >= self.n_trunk and self.n_nextn > 0

    @property
    def claimed_from(self) -> int:
        """Number of the first block that the metadata claim for a head."""
        return self.block_count - self.claimed_nextn


def _head_blocks(
    architecture: str, block_count: int, claimed: int, tensors: Container[str]
) -> tuple[int, int]:
    """Count the blocks of the trunk and of the MTP head, as the engine decides on them.

    nextn_predict_layers claims a head. Whether there is one, the engine finds out by the first
    head block's nextn.eh_proj (nextn_flags in src/llama-model.cpp). Without it the file holds the
    trunk alone. For deepseek4 the claim itself then counts for nothing, and all blocks are the
    trunk's (load_arch_hparams in src/models/deepseek4.cpp). A gemma4-assistant is a head of
    another make.

    Args:
        architecture: general.architecture.
        block_count: blocks that the metadata claim, the head's included.
        claimed: nextn_predict_layers, 0 to block_count.
        tensors: names of all tensors.
    """
    n_trunk = block_count - claimed
    if claimed == 0 or architecture == "gemma4-assistant":
        return n_trunk, claimed
    if f"blk.{n_trunk}.nextn.eh_proj.weight" in tensors:
        return n_trunk, claimed
    # Without any tensor of these blocks the engine does not load the file, and a head is missing.
    if architecture == "deepseek4" and f"blk.{n_trunk}.attn_norm.weight" in tensors:
        return block_count, 0
    return n_trunk, 0


@dataclass(frozen=True)
class EnginePart:
    """One file's header as the engine's reader gives it: a PartHeader, and what runs need beside.

    Attributes:
        tokenizer: tokenizer.ggml.model; "" if it is missing.
        data_offset: bytes of the header, with the padding after it.
        tables: name, byte where it starts, and values of each tensor of int32.
        aligned: whether every tensor lies where the engine can map it into memory.
    """

    path: Path
    architecture: str
    integers: Mapping[str, int]
    split_count: int
    split_no: int
    split_tensors: int
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer: str
    data_offset: int
    tables: Sequence[tuple[str, int, int]]
    aligned: bool

    @classmethod
    def read(cls, path: Path) -> EnginePart:
        """Read one file.

        Raises:
            ModelError: not GGUF, damaged or truncated.
        """
        found = engine.model_file(str(path))
        return cls(
            path=path,
            architecture=found["architecture"],
            integers=found["integers"],
            split_count=found["split_count"],
            split_no=found["split_no"],
            split_tensors=found["split_tensors"],
            shapes=found["tensors"],
            tokenizer=found["tokenizer"],
            data_offset=found["data_offset"],
            tables=found["tables"],
            aligned=found["aligned"],
        )


@dataclass(frozen=True)
class ModelFile(ModelHeader):
    """The header of a GGUF model that the engine can read, all parts of it together.

    Attributes:
        path: the file, or the first part.
        architecture: general.architecture.
        has_tokenizer: whether text can be tokenized.
        n_trunk: trunk blocks, `blk.0` to `blk.<n_trunk - 1>`.
        n_nextn: MTP/NextN head blocks, `blk.<n_trunk>` on.
        block_count: blocks that the metadata claim, trunk and head together.
        claimed_nextn: head blocks that the metadata claim, whose tensors may be missing.
        tensors: shape by tensor name, ggml order: the row length first.
        integers: the architecture's own whole-number keys, without its name in front.
        parts: every file, the first part first, and how many bytes its header has.
        tables: the tensors of int32, which are indices: part, name, byte where it starts, values.
        aligned: whether every tensor lies where the engine can map it into memory.
    """

    has_tokenizer: bool
    parts: tuple[tuple[Path, int], ...]
    tables: tuple[tuple[Path, str, int, int], ...]
    aligned: bool

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ModelFile:
        """Read the header.

        Raises:
            FileNotFoundError, IsADirectoryError: no such file.
            ModelError: not GGUF, damaged, truncated, no architecture, or its parts are not
                those of one model.
        """
        parts = read_parts(Path(path), EnginePart.read)
        header = ModelHeader.of(parts)
        return cls(
            path=header.path,
            architecture=header.architecture,
            n_trunk=header.n_trunk,
            n_nextn=header.n_nextn,
            tensors=header.tensors,
            integers=header.integers,
            block_count=header.block_count,
            claimed_nextn=header.claimed_nextn,
            # "no_vocab" is the engine's word for a model without one; asking such a model
            # to tokenize ends the process (src/llama-vocab.cpp)
            has_tokenizer=parts[0].tokenizer not in ("", "no_vocab", "none"),
            parts=tuple((part.path, part.data_offset) for part in parts),
            tables=tuple((part.path, *table) for part in parts for table in part.tables),
            aligned=all(part.aligned for part in parts),
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
