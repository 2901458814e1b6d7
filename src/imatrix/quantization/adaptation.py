"""Importance data made for one conversion of a model, put to use for another of the same model.

Which weights have the same data is decided in counterparts.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from imatrix.entries import Entry
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.header import ModelFile
from imatrix.quantization.counterparts import (
    Counterparts,
    OtherSizeError,
    Step,
    UnfitError,
    block_and_kind,
)
from imatrix.tensors import natural_order

__all__ = ["Adapted", "Placed", "Step", "adapt", "takes_data"]

# What llama-quantize leaves as it is (tensor_allows_quantization in src/llama-quant.cpp), then the
# tables that rows are looked up in, and the output, which is rarely collected.
_NO_DATA = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.|^token_types\.|ssm_conv1d|shortconv\.conv\.weight"
    r"|indexer\.[kq]_proj\.weight|attn_rel_b\.weight"
    r"|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|^token_embd\.|^per_layer_token_embd\.|\.nextn\.embed_tokens\.|^output\.weight"
)
_NO_DATA_GLM5_NEXT = re.compile(
    r"hc_|indexer\.(attn_q_b|attn_k|proj)|indexer_compressor_(gate|ape)|ssm_[fg]_[ab]\.weight"
    r"|ssm_beta\.weight|attn_kv_a_mqa\.weight|attn_[kv]_b\.weight"
)


@dataclass(frozen=True)
class Placed:
    """Where the data of one weight come from.

    Attributes:
        name: the weight of the model.
        sources: the entries of the matrix that they are; its own name if nothing was to be done.
        steps: what was done, in order: "stacked", the experts of a block put into one weight;
            "cut", one expert taken out; "fused", the data that several weights have in common
            given to the weight that holds them all; "split", the data of a fused weight given to
            one that it holds; "shared", the data of ffn_up given to ffn_gate. Empty if nothing.
        unseen: experts without a row.
    """

    name: str
    sources: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    unseen: int = 0


@dataclass(frozen=True)
class Adapted:
    """A matrix for another conversion of its model.

    Attributes:
        matrix: with the model's weights; texts, chunks and provenance as they were.
        placed: the weights of the matrix, in its order.
        missing: weights of the model that a quantizer can use data for and that have none -> why,
            "" if there is nothing to say. Embeddings and output.weight, for which data are
            rarely collected, are not among them.
        unplaced: entries of the old matrix that are in no weight of the new one -> why.
    """

    matrix: ImportanceMatrix
    placed: tuple[Placed, ...]
    missing: Mapping[str, str]
    unplaced: Mapping[str, str]

    @property
    def changed(self) -> tuple[Placed, ...]:
        """The weights that something was done for."""
        return tuple(place for place in self.placed if place.steps)


def adapt(
    matrix: ImportanceMatrix | str | os.PathLike[str],
    model: ModelFile | str | os.PathLike[str],
    *,
    chunk_size: int = 512,
) -> Adapted:
    """Give importance data the names and shapes that another conversion of the model has.

    Only data of the same activations are handed on, see imatrix.quantization.counterparts for the
    rules. A weight that has an entry of its own keeps it.

    Args:
        matrix: importance data, or the path of a file that holds them.
        model: the conversion to serve; the first part of a multi-part one. Only its header is read.
        chunk_size: tokens a chunk of a .dat file, see imatrix.formats.dat.read.

    Raises:
        ValueError: the matrix is of another model: a size differs, its trunk has another depth, or
            none of its entries belongs to a weight of the model.
        FormatError (a ValueError): `matrix` is not an importance matrix.
        ModelError (a ValueError): `model` is not a model.
        OSError: a file cannot be read.
    """
    if not isinstance(matrix, ImportanceMatrix):
        matrix = ImportanceMatrix.load(matrix, chunk_size=chunk_size)
    file = model if isinstance(model, ModelFile) else ModelFile.read(model)
    _check_depth(matrix, file)
    return _adapted(matrix, file)


def _adapted(matrix: ImportanceMatrix, file: ModelFile) -> Adapted:
    """Find data for every weight of the model.

    Raises:
        ValueError: the matrix is of another model.
    """
    counterparts = Counterparts(matrix, file)
    entries: dict[str, Entry] = {}
    placed: dict[str, Placed] = {}
    missing: dict[str, str] = {}
    unfit: dict[str, str] = {}
    other_size = []
    needing = takes_data(file)
    for name in file.tensors:
        try:
            found = counterparts.find(name)
        except OtherSizeError as error:
            other_size.append(str(error))
            continue
        except UnfitError as error:
            missing[name] = str(error)
            if name in matrix:
                unfit[name] = str(error)
            continue
        if found is not None:
            unseen = int(np.count_nonzero(found.entry.counts == 0))
            entries[name] = found.entry
            placed[name] = Placed(name, found.sources, found.steps, unseen)
        elif name in needing:
            missing[name] = counterparts.why_missing(name)
    if other_size:
        more = f"; {len(other_size) - 3} more" if len(other_size) > 3 else ""
        raise ValueError(
            f"the matrix is of another model than {file.path}: {'; '.join(other_size[:3])}{more}"
        )
    if not entries:
        raise ValueError(
            f"no entry of the matrix belongs to a weight of {file.path}: its first is "
            f"{next(iter(matrix), 'missing')!r}. Was it collected from another model?"
        )
    used = {source for place in placed.values() for source in place.sources}
    adapted = ImportanceMatrix(
        entries,
        datasets=matrix.datasets,
        chunk_count=matrix.chunk_count,
        chunk_size=matrix.chunk_size,
        provenance=matrix.provenance,
        head_blocks=matrix.head_blocks,
    )
    return Adapted(
        matrix=adapted,
        placed=tuple(placed[name] for name in adapted),
        missing={name: missing[name] for name in sorted(missing, key=natural_order)},
        unplaced={
            name: unfit.get(name) or counterparts.why_unplaced(name)
            for name in matrix
            if name not in used
        },
    )


def takes_data(file: ModelFile) -> dict[str, tuple[int, ...]]:
    """The tensors that a quantizer can use data for, by their names and shapes."""

    def takes(name: str, shape: tuple[int, ...]) -> bool:
        dimensions = max((i + 1 for i, n in enumerate(shape) if n > 1), default=1)
        if dimensions < 2 or not name.endswith("weight") or _NO_DATA.search(name):
            return False
        return file.architecture != "glm5-next" or not _NO_DATA_GLM5_NEXT.search(name)

    return {name: shape for name, shape in file.tensors.items() if takes(name, shape)}


def _check_depth(matrix: ImportanceMatrix, file: ModelFile) -> None:
    """Refuse a matrix whose trunk has another number of blocks."""
    # blocks without a weight to collect for, as pruning leaves them, do not count
    trunk = {block for block in _blocks(takes_data(file)) if block < file.n_trunk}
    heads = matrix.head_blocks | set(file.head_blocks)
    found = {block for block in _blocks(matrix) if block not in heads}
    if trunk and found and max(trunk) != max(found):
        raise ValueError(
            f"the matrix is of another model than {file.path}: its trunk has "
            f"{max(found) + 1} blocks, the model's {max(trunk) + 1}"
        )


def _blocks(names: Mapping[str, object]) -> Iterator[int]:
    for name in names:
        if parsed := block_and_kind(name):
            yield int(parsed[0])
