"""Does a head fit a trunk? Decided on the headers of both, before the engine sees them.

The engine takes most of it on trust, and asserts the rest, which ends the process.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable

from imatrix.errors import ModelError
from imatrix.model.architectures import check_vocabulary
from imatrix.model.header import ModelHeader

__all__ = ["check_fit", "check_has_head", "misfit"]


def check_fit(trunk: ModelHeader, head: ModelHeader, *, grafting: bool = False) -> None:
    """Refuse a head that was not made for this trunk.

    The engine compares one width, by an assertion that ends the process, and takes the rest on
    trust (common/speculative.cpp, common_speculative_impl_draft_mtp).

    Args:
        trunk: a model with or without a head of its own.
        head: a head-only file, or a bundled model.
        grafting: only the head's blocks are asked for, which go into the trunk's file; else the
            head is to run from its own, and needs the tables of tokens there.

    Raises:
        ModelError: ``head`` has no head, or lacks a tensor of it, or drafts from a part of the
            vocabulary; architecture, block count, number of head blocks, width or vocabulary
            differ. The message has both values.
    """
    check_has_head(head)
    check_vocabulary(head)
    differ = misfit(trunk, head)
    if trunk.architecture != head.architecture:
        raise differ("architecture", trunk.architecture, head.architecture)
    if trunk.n_trunk != head.n_trunk:
        raise differ("the number of trunk blocks", trunk.n_trunk, head.n_trunk)
    if trunk.claimed_nextn not in (0, head.n_nextn):
        raise differ("nextn_predict_layers", trunk.claimed_nextn, head.n_nextn)
    embeddings = "token_embd.weight"
    if len(trunk.tensors.get(embeddings, ())) != 2:
        raise ModelError(f"{trunk.path}: the tensor {embeddings} is missing")
    n_embd, n_vocab = trunk.tensors[embeddings]
    if embeddings in head.tensors:
        n_embd_head, n_vocab_head = (*head.tensors[embeddings], 1)[:2]
        if n_embd != n_embd_head:
            raise differ(f"the width of a row (n_embd, {embeddings})", n_embd, n_embd_head)
        if n_vocab != n_vocab_head:
            raise differ(f"the vocabulary (rows of {embeddings})", n_vocab, n_vocab_head)
    if not grafting:
        graft = f"{_quoted(trunk)} {_quoted(head)} -o OUT.gguf"
        # the engine loads a head's own file as a model of its own
        if embeddings not in head.tensors:
            raise ModelError(
                f"{head.path}: it has the head's blocks, but the tensor {embeddings} is missing, and "
                "the engine loads a head from a file of its own only with it. Put the head into its "
                f"model's file: imatrix graft-mtp {graft}"
            )
        own = f"blk.{head.n_trunk}.nextn.shared_head_head.weight"
        output = "output.weight"
        if output in trunk.tensors and not (output in head.tensors or own in head.tensors):
            # the loaders take token_embd.weight in its place (src/models/)
            raise ModelError(
                f"{head.path}: {trunk.path.name} has an {output}, this file has none, and the "
                "engine would take the head's token embedding in its place. Put the head into its "
                f"model's file: imatrix graft-mtp {graft}"
            )
    for block in head.head_blocks:
        # [2 * n_embd, n_embd] in every architecture that has one (src/models/)
        name = f"blk.{block}.nextn.eh_proj.weight"
        if head.tensors[name] != (2 * n_embd, n_embd):
            raise differ(f"the shape of {name}", (2 * n_embd, n_embd), head.tensors[name])


def _quoted(model: ModelHeader) -> str:
    return shlex.quote(str(model.path))


def misfit(trunk: ModelHeader, head: ModelHeader) -> Callable[[str, object, object], ModelError]:
    """Make the error for two files of which something differs.

    Returns:
        A function that takes what differs, and the trunk's and the head's value of it.
    """

    def error(what: str, ours: object, theirs: object) -> ModelError:
        return ModelError(
            f"{head.path} does not fit {trunk.path}: {what} is {ours} in the trunk, {theirs} in "
            "the head's file; they must come from the same model"
        )

    return error


def check_has_head(model: ModelHeader) -> None:
    """Refuse a file without a whole MTP head.

    Raises:
        ModelError: the metadata claim none, or a tensor is missing that every head has.
    """
    if model.n_nextn == 0 and model.claimed_nextn:
        raise ModelError(
            f"{model.path}: the metadata claim {model.claimed_nextn} MTP head block(s), but "
            f"blk.{model.claimed_from}.nextn.eh_proj.weight is missing; the "
            "file holds no complete head"
        )
    if model.n_nextn == 0:
        raise ModelError(
            f"{model.path}: it has no MTP head ({model.architecture}.nextn_predict_layers is 0 or "
            "absent); was it converted with --no-mtp?"
        )
    for block in model.head_blocks:
        # The loaders require these of every head (src/models/). The rest differs by architecture
        # (exaone4's has no attn_norm), but no head consists of these three alone.
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
