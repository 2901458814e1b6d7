"""What a model file says of itself, read from its header without loading it."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from imatrix.errors import ModelError
from imatrix.model.parts import check_part, check_tensor_count, other_parts
from imatrix.native import engine

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def head_blocks(
    architecture: str, block_count: int, claimed: int, tensors: Container[str]
) -> tuple[int, int]:
    """Blocks of the trunk and of the MTP head, as the engine decides on them.

    nextn_predict_layers claims a head; whether there is one, the engine finds out by the first
    head block's nextn.eh_proj (nextn_flags in src/llama-model.cpp). Without it the file is one
    of the trunk alone. For deepseek4 the claim itself then counts for nothing, and all blocks are
    the trunk's (load_arch_hparams in src/models/deepseek4.cpp). A gemma4-assistant is a head of
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
    # without any tensor of these blocks the engine does not load the file, and a head is missing
    if architecture == "deepseek4" and f"blk.{n_trunk}.attn_norm.weight" in tensors:
        return block_count, 0
    return n_trunk, 0


class ModelHeader(Protocol):
    """What the checks of heads ask of a header; ModelFile has it. Shapes in ggml order, row length first."""

    @property
    def path(self) -> Path: ...
    @property
    def architecture(self) -> str: ...
    @property
    def n_trunk(self) -> int: ...
    @property
    def n_nextn(self) -> int: ...
    @property
    def block_count(self) -> int: ...
    @property
    def claimed_nextn(self) -> int: ...
    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]: ...


@dataclass(frozen=True)
class ModelFile:
    """The header of a GGUF model, all parts of a multi-part one together.

    Attributes:
        path: the file, or the first part.
        architecture: general.architecture.
        has_tokenizer: whether text can be tokenized.
        n_trunk: trunk blocks, `blk.0` to `blk.<n_trunk - 1>`; see head_blocks.
        n_nextn: MTP/NextN head blocks, `blk.<n_trunk>` on; see head_blocks.
        block_count: blocks that the metadata claim, trunk and head together.
        claimed_nextn: head blocks that the metadata claim, whose tensors may be missing.
        tensors: shape by tensor name, ggml order: the row length first.
        integers: the architecture's own whole-number keys, without its name in front.
        parts: every file, the first part first, and how many bytes its header has.
        tables: the tensors of int32, which are indices: part, name, byte where it starts, values.
        aligned: whether every tensor lies where the engine can map it into memory.
    """

    path: Path
    architecture: str
    has_tokenizer: bool
    n_trunk: int
    n_nextn: int
    tensors: Mapping[str, tuple[int, ...]]
    integers: Mapping[str, int]
    parts: tuple[tuple[Path, int], ...] = ()
    tables: tuple[tuple[Path, str, int, int], ...] = ()
    aligned: bool = True
    block_count: int = 0
    claimed_nextn: int = 0

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ModelFile:
        """Read the header.

        Raises:
            FileNotFoundError, IsADirectoryError: no such file.
            ModelError: not GGUF, damaged, truncated, no architecture, or its parts are not
                those of one model.
        """
        first = Path(path)
        if first.is_dir():
            raise IsADirectoryError(errno.EISDIR, "expected a GGUF model file", str(first))
        if not first.exists():
            raise FileNotFoundError(errno.ENOENT, "no such model file", str(first))
        header = engine.model_file(str(first))
        # before the architecture: later parts of a multi-part model have none
        headers = [(first, header)]
        count = header["split_count"]
        for part in other_parts(first, count):
            headers.append((part, engine.model_file(str(part))))
        tensors: dict[str, tuple[int, ...]] = {}
        for number, (part, other) in enumerate(headers):
            if count > 1:
                check_part(part, number, count, other["split_no"], other["split_count"])
            if twice := tensors.keys() & other["tensors"].keys():
                raise ModelError(f"{part}: the tensor {min(twice)} is in an earlier part too")
            tensors.update(other["tensors"])
        if count > 1:
            check_tensor_count(first, len(tensors), header["split_tensors"])
        if not header["architecture"]:
            raise ModelError(f"{first}: no general.architecture; this GGUF file is not a model")
        claimed, block_count = header["n_nextn"], header["block_count"]
        if not 0 <= claimed <= block_count:
            raise ModelError(
                f"{first}: nextn_predict_layers is {claimed}, block_count is "
                f"{block_count}; the metadata contradict each other. If the model has no head, "
                f"drop the claim: imatrix drop-mtp {first} -o OUT.gguf"
            )
        n_trunk, n_nextn = head_blocks(header["architecture"], block_count, claimed, tensors)
        return cls(
            path=first,
            architecture=header["architecture"],
            # "no_vocab" is the engine's word for a model without one; asking such a model
            # to tokenize ends the process (src/llama-vocab.cpp)
            has_tokenizer=header["tokenizer"] not in ("", "no_vocab", "none"),
            n_trunk=n_trunk,
            n_nextn=n_nextn,
            block_count=block_count,
            claimed_nextn=claimed,
            tensors=tensors,
            integers=header["integers"],
            parts=tuple((part, other["data_offset"]) for part, other in headers),
            tables=tuple((part, *table) for part, other in headers for table in other["tables"]),
            aligned=all(other["aligned"] for _, other in headers),
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
