"""A model file that is cut up: its header, and its keys and tensors as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imatrix.files.outputs import PathLike
from imatrix.model.header import ModelHeader
from imatrix.model.parts import read_parts
from imatrix.model.raw import STRING, Part, Tensor, Value

__all__ = ["Source"]

# Arrays under <arch>. that are not per layer, whatever their length (src/llama-arch.cpp).
_NOT_PER_LAYER = (
    "rope.dimension_sections",
    "target_layers",
    "ple.layers",
    "ple.layer_multipliers",
    "ple.head_offsets",
    "ple.head_vocab_sizes",
)


# Tensors outside the blocks, and keys under <arch>., that a head's file has no use for. The engine
# looks for a table of n-grams only if the keys tell of one (qwen4exp.cpp, load_arch_hparams), and
# for the mixer at the trunk's end only if the file has a trunk (nextn_flags in
# src/llama-model.cpp). The table is larger than the rest of the model together; the converter
# leaves these out too (conversion/qwen4exp.py, mtp_only).
_TRUNK_ONLY = {
    "qwen4exp": (
        "per_layer_token_embd.weight", "output_hc_norm.weight", "output_hc_down.weight",
        "output_hc_up.weight", "qwen4exp.ple.", "qwen4exp.embedding_length_per_layer_input",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model to take blocks from, all parts of a multi-part one together.

    Attributes:
        header: what it consists of.
        version, alignment: of the format, as the first part has them.
        keys: the first part's metadata, as bytes.
        tensors: every tensor by name, in the order of the parts.
        paths: its files, the first part first.
        file_bytes: size of all files.
    """

    header: ModelHeader
    version: int
    alignment: int
    keys: Mapping[str, Value]
    tensors: Mapping[str, Tensor]
    paths: list[Path]
    file_bytes: int

    @classmethod
    def read(cls, path: PathLike, *, any_claim: bool = False) -> Source:
        """Read the headers of all parts.

        Args:
            path: the file, or the first part.
            any_claim: take a claim of more head blocks than there are blocks for none.

        Raises:
            FileNotFoundError, IsADirectoryError: no such file.
            ModelError: not a GGUF model, damaged, or a part is missing.
        """
        parts = read_parts(Path(path), Part.read)
        return cls(
            header=ModelHeader.of(parts, any_claim=any_claim),
            version=parts[0].version,
            alignment=parts[0].alignment,
            keys=parts[0].keys,
            tensors={name: tensor for part in parts for name, tensor in part.tensors.items()},
            paths=[part.path for part in parts],
            file_bytes=sum(part.file_bytes for part in parts),
        )

    @property
    def path(self) -> Path:
        """The file, or the first part."""
        return self.paths[0]

    def has_trunk(self) -> bool:
        """Whether any block of the trunk is there."""
        return any(t.block is not None and t.block < self.header.n_trunk for t in self.all())

    def all(self) -> Iterable[Tensor]:
        """Every tensor, in order."""
        return self.tensors.values()

    def is_trunk_only(self, name: str) -> bool:
        """Whether a tensor outside the blocks, or a key, is of no use in a head's file."""
        return name.startswith(_TRUNK_ONLY.get(self.header.architecture, ()))

    def is_per_layer(self, key: str, n_blocks: int | None = None) -> bool:
        """Whether `key` holds an entry for each block, those of the head included.

        The engine reads such arrays with the length block_count and refuses another
        (llama_model_loader::get_key_or_arr). Arrays that it reads with another length, as
        glm-dsa's indexer types, one for each trunk block, are left as they are.

        Args:
            key: the key.
            n_blocks: how many blocks there are; None for block_count.
        """
        value = self.keys.get(key)
        prefix = f"{self.header.architecture}."
        return (
            value is not None
            and value.is_array
            and value.kind != STRING
            and value.count == (self.header.block_count if n_blocks is None else n_blocks)
            and key.startswith(prefix)
            and key.removeprefix(prefix) not in _NOT_PER_LAYER
        )

    def per_layer(self, key: str, count: int) -> list[Any]:
        """The first `count` entries; if there is one value for all blocks, `count` times that."""
        value = self.keys[key].decoded()
        return value[:count] if self.keys[key].is_array else [value] * count
