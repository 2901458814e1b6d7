"""The metadata of a bundled model, of its trunk and of its head."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imatrix.errors import ModelError
from imatrix.heads.source import Source
from imatrix.model.fit import misfit
from imatrix.model.raw import Value

__all__ = ["bundled_keys", "check_keys", "trunk_keys", "without_split"]


def without_split(source: Source) -> dict[str, Value]:
    """The keys without those that tools/gguf-split/gguf-split.cpp adds: an output is one file."""
    return {key: value for key, value in source.keys.items() if not key.startswith("split.")}


def trunk_keys(source: Source, n_trunk: int, n_blocks: int | None = None) -> dict[str, Value]:
    """The keys of the trunk alone.

    Args:
        source: the model.
        n_trunk: blocks of the trunk.
        n_blocks: blocks of the model, as many entries as a per-layer array has; None for
            block_count.
    """
    architecture = source.header.architecture
    block_count = f"{architecture}.block_count"
    out = {}
    for key, value in without_split(source).items():
        if key == f"{architecture}.nextn_predict_layers":
            continue
        if key == block_count:
            out[key] = value.with_scalar(n_trunk)
        elif source.is_per_layer(key, n_blocks):
            out[key] = value.first(min(n_trunk, value.count))
        else:
            out[key] = value
    return out


def bundled_keys(trunk: Source, head: Source) -> dict[str, Value]:
    """The trunk's keys, with what tells of the head taken from the head's file."""
    architecture = head.header.architecture
    block_count = f"{architecture}.block_count"
    nextn = f"{architecture}.nextn_predict_layers"
    ours, theirs = without_split(trunk), without_split(head)
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
            and trunk.header.claimed_nextn == 0
            and key in theirs
            and not theirs[key].is_array
        ):
            try:
                out[key] = value.extended(theirs[key].decoded(), head.header.n_nextn)
            except struct.error:  # equal numbers may be of types that do not go together
                raise ModelError(
                    f"{head.path}: {key} is {theirs[key].decoded()!r}, which has no place in the "
                    f"array that {trunk.path} has under that key; convert both with one converter"
                ) from None
        else:
            out[key] = value
    out.setdefault(nextn, theirs[nextn])
    return out


# A person may edit these in one file, and the weights still fit the other.
_EDITABLE = ("context_length", "expert_used_count")
_EDITABLE_PREFIXES = ("rope.",)


def check_keys(trunk: Source, head: Source) -> Iterator[str]:
    """Refuse metadata that are at odds, and give the other differences as sentences for a warning.

    Raises:
        ModelError: a key that shapes the weights differs; the message has both values.
    """
    differ = misfit(trunk.header, head.header)
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
    prefix = f"{head.header.architecture}."
    for key in [*trunk.keys, *(k for k in head.keys if k not in trunk.keys)]:
        field = key.removeprefix(prefix)
        if field == key or field in ("block_count", "nextn_predict_layers"):
            continue  # not of the architecture, or compared in check_fit
        ours, theirs = trunk.keys.get(key), head.keys.get(key)
        if theirs is None and trunk.is_trunk_only(key):
            continue
        if ours is None or theirs is None:
            yield f"{key} is only in the {'head' if ours is None else 'trunk'}'s file"
        elif trunk.is_per_layer(key) or head.is_per_layer(key):
            of_trunk = trunk.per_layer(key, trunk.header.n_trunk)
            of_head = head.per_layer(key, trunk.header.n_trunk)
            if len(of_trunk) != len(of_head):
                raise differ(f"the length of {key}", len(of_trunk), len(of_head))
            for block, (one, other) in enumerate(zip(of_trunk, of_head, strict=True)):
                if one != other:
                    raise differ(f"{key} of block {block}", one, other)
        elif (one := ours.decoded()) != (other := theirs.decoded()):
            if field not in _EDITABLE and not field.startswith(_EDITABLE_PREFIXES):
                raise differ(key, one, other)
            yield f"{key} is {one} in the trunk, {other} in the head's file"
