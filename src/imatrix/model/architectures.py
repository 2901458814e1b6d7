"""What the engine can run of a model, checked on its header before anything is loaded.

The engine asserts a good deal while it builds a graph, and a failed assertion ends the process. What
is known to end that way is refused here first, with the condition in words.
"""

from __future__ import annotations

import re
import shlex

import numpy as np

from imatrix.errors import ModelError
from imatrix.model.header import ModelFile, ModelHeader
from imatrix.tensors import apart_expert, block_of

# Architectures whose graph for a head runs one head block only: GGML_ASSERT(n_layer_nextn == 1)
# in the graph_mtp of src/models/<architecture>.cpp. hy_v3, mimo2 and step35 run several.
_ONE_HEAD = frozenset(
    {
        "bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "glm-dsa", "glm4moe",
        "glm5-next", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next", "qwen4exp",
    }
)  # fmt: skip
# Architectures that carry a head which the engine has no graph for: build_arch_graph in
# src/models/<architecture>.cpp gives the trunk's, or throws.
_NO_HEAD_GRAPH = frozenset({"bailingmoe2", "dots3note", "exaone-moe", "exaone4", "glm4"})
# Hybrids, and the mark of an attention layer in the names of their tensors; ".ssm_" marks a
# recurrent one. Without layers of one kind a part of the hybrid memory has no buffer, which ends
# the process when it is cleared (src/llama-memory-hybrid.cpp).
_HYBRIDS = {
    "bailingmoe3": ".attn_kv_a_mqa.",
    "glm5-next": ".attn_kv_a_mqa.",
    "nemotron_h_moe": ".attn_k.",
    "qwen35": ".attn_q_norm.",
    "qwen35moe": ".attn_q_norm.",
    "qwen3next": ".attn_q_norm.",
    "qwen4exp": ".attn_q_norm.",
}


def check_trunk(file: ModelFile) -> None:
    """Refuse a file that the engine could not run a trunk of.

    Raises:
        ModelError: it holds a head alone, or lacks what the engine asserts.
    """
    if file.architecture == "gemma4-assistant":
        raise ModelError(
            f"{file.path}: gemma4-assistant is a draft head, not a model of its own; give the "
            "gemma4 model as the model and this file as mtp_model"
        )
    if any(name.startswith(("enc.blk.", "dec.blk.")) for name in file.tensors):
        raise ModelError(
            f"{file.path}: {file.architecture} has an encoder, and a decoder (if any) that needs "
            "what the encoder makes of another text; only models that decode text by themselves "
            "can be collected from"
        )
    blocks = {block_of(name) for name in file.tensors}
    if file.n_trunk > 0 and 0 not in blocks:
        raise ModelError(
            f"{file.path}: no tensor of block 0; the file holds "
            + ("a head alone: give its trunk as the model and this file as mtp_model"
               if file.n_nextn else "no trunk")
        )  # fmt: skip
    key_length = file.integers.get("attention.key_length")
    indexer = file.integers.get("attention.indexer.key_length")
    if file.architecture == "deepseek4" and key_length is not None and key_length == indexer:
        # A division by zero in the constructor of llama_kv_cache (src/llama-kv-cache.cpp): one of
        # the caches has no layer, and the rotation of its keys is forced on.
        raise ModelError(
            f"{file.path}: attention.key_length and attention.indexer.key_length are both "
            f"{indexer}; the engine ends the process when it makes a context for such a deepseek4 "
            "model. Convert it again: in DeepSeek's own models the two differ."
        )


# An image or audio encoder in the same file, as some converters write it. The engine has no tensor
# of such a name (src/llama-arch.cpp); it reads an encoder from a file of its own (tools/mtmd).
_ENCODER = re.compile(r"(?:v|a|mm|resampler|vision_tower|audio_tower)\.")


def check_whole(file: ModelFile) -> None:
    """Refuse a file whose metadata and tensors disagree about what belongs to the model.

    The engine does not load such a file, or, worse, loads it without its last block.

    Raises:
        ModelError: what is too much or missing, and what to do.
    """
    drop = f"imatrix drop-mtp {shlex.quote(str(file.path))} -o OUT.gguf"
    if foreign := [name for name in file.tensors if _ENCODER.match(name)]:
        some = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise ModelError(
            f"{file.path}: {len(foreign)} tensor(s) of an image or audio encoder lie in the "
            f"model's file ({some}), and the engine loads no such file. Convert the model again "
            "with llama.cpp's converter, which writes the encoder into a file of its own (mmproj)"
        )
    by_block: dict[int, list[str]] = {}
    for name in file.tensors:
        if (block := block_of(name)) is not None:
            by_block.setdefault(block, []).append(name)
    nextn = [name for names in by_block.values() for name in names if ".nextn." in name]
    claim = f"{file.architecture}.nextn_predict_layers"
    if nextn and file.claimed_nextn == 0:
        raise ModelError(
            f"{file.path}: it holds tensors of an MTP head ({nextn[0]}), but {claim} is absent or "
            "0, so that the engine does not know them and loads no such file. Convert the model "
            f"again, or take the head out: {drop}"
        )
    if by_block and max(by_block) >= file.block_count:
        raise ModelError(
            f"{file.path}: block_count is {file.block_count}, but there are tensors of block "
            f"{max(by_block)} ({by_block[max(by_block)][0]}); the engine loads no such file. "
            "Convert the model again"
        )
    if file.n_nextn == file.claimed_nextn or file.n_trunk == file.block_count:
        return
    if file.architecture == "granite-switch":
        return  # counts a router layer of its own as the head (src/models/granite-switch.cpp)
    left = [name for block, names in by_block.items() if block >= file.n_trunk for name in names]
    if not left:
        if file.architecture == "deepseek4" or file.architecture in _NO_HEAD_GRAPH:
            # deepseek4: all blocks are then the trunk's. The others do not ask whether there is a
            # head (no nextn_flags in src/models/<architecture>.cpp).
            raise ModelError(
                f"{file.path}: {lacks_head(file)}. The engine does not load such a file of "
                f"{file.architecture}. Put the head in with imatrix graft-mtp, or drop the claim: "
                f"{drop}"
            )
        return  # a trunk without its head, which the engine loads
    if not any(".nextn." in name for name in left):
        raise ModelError(
            f"{file.path}: {claim} is {file.claimed_nextn}, so that the engine takes the blocks "
            f"from {file.n_trunk} on for an MTP head and leaves them out, but they have no nextn "
            f"tensor: they are the trunk's. Drop the claim, which keeps the blocks: {drop}"
        )
    raise ModelError(
        f"{file.path}: {lacks_head(file)}. What there is of the head ({left[0]}, ...) is of no use: "
        f"convert the model again, or take it out: {drop}. imatrix graft-mtp can then put a whole "
        "one in."
    )


def lacks_head(file: ModelFile) -> str:
    """Say that there is no MTP head in a file, and which tensor of a claimed one is missing."""
    if file.claimed_nextn == 0:
        return "no MTP head in it (nextn_predict_layers is absent or 0)"
    return (
        f"the metadata claim {file.claimed_nextn} MTP head block(s), but the tensor "
        f"blk.{file.claimed_from}.nextn.eh_proj.weight is missing"
    )


def loads_alone(file: ModelFile) -> bool:
    """Whether the engine is meant to load a file by itself.

    It is not meant to load a head that it has no graph for, in a file of its own. Nor does it load
    old conversions with a tensor for each expert, which ik_llama.cpp still does.
    """
    if any(apart_expert(name) for name in file.tensors):
        return False
    return file.architecture not in _NO_HEAD_GRAPH or any(block_of(t) == 0 for t in file.tensors)


def check_memory(file: ModelFile) -> None:
    """Refuse a hybrid trunk that lacks one of its two kinds of layers.

    Raises:
        ModelError: the kind that is missing, and how it was looked for.
    """
    if file.architecture not in _HYBRIDS:
        return
    trunk = [
        name
        for name in file.tensors
        if (block := block_of(name)) is not None and block < file.n_trunk
    ]
    for kind, mark in (("a recurrent", ".ssm_"), ("an attention", _HYBRIDS[file.architecture])):
        if not any(mark in name for name in trunk):
            raise ModelError(
                f"{file.path}: {file.architecture} without {kind} layer in its trunk (no tensor "
                f"blk.*{mark}*); the engine's hybrid memory needs one and would end the process"
            )


def check_tables(file: ModelFile) -> None:
    """Refuse a table of experts by token (deepseek4) that names an expert that does not exist.

    The engine asserts that none does while it multiplies (ggml_compute_forward_mul_mat_id).

    Raises:
        ModelError: the first such value.
    """
    n_expert = file.integers.get("expert_count", 0)
    for part, name, start, count in file.tables:
        if not name.endswith("ffn_gate_tid2eid.weight"):
            continue
        ids = np.memmap(part, dtype="<i4", mode="r", offset=start, shape=(count,))
        if not 0 <= int(ids.min()) <= int(ids.max()) < n_expert:
            bad = int(ids[(ids < 0) | (ids >= n_expert)][0])
            raise ModelError(f"{part}: {name} names expert {bad} of {n_expert} (expert_count)")


def check_head(file: ModelFile) -> None:
    """Refuse a head that the engine could not run, in the file that holds it.

    The engine takes a file without nextn.eh_proj for a trunk, loads it, and ends the process
    when a context for the head is made (src/models/glm4-moe.cpp, deepseek2.cpp).

    Raises:
        ModelError: no graph for it, more head blocks than the graph runs, or a tensor that the
            metadata claim is missing: the first one is named.
    """
    if file.architecture in _NO_HEAD_GRAPH:
        raise ModelError(
            f"{file.path}: the engine has no graph for the MTP head of {file.architecture}, so "
            "nothing can reach its weights; collect the trunk alone (mtp=False) and keep the head "
            "at a type that needs no data"
        )
    if file.architecture in _ONE_HEAD and file.n_nextn > 1:
        raise ModelError(
            f"{file.path}: {file.n_nextn} MTP head blocks, but the engine's graph for "
            f"{file.architecture} runs 1; collect the trunk alone (mtp=False)"
        )
    if file.architecture == "gemma4-assistant":
        return  # blocks of another make; a missing tensor is an error of the engine's loader
    check_vocabulary(file)
    for block in file.head_blocks:
        # qwen4exp has no attn_norm: the mixer of its hyper-connections carries the norm
        norm = "hc_attn_norm" if file.architecture == "qwen4exp" else "attn_norm"
        for tensor in ("nextn.eh_proj", "nextn.enorm", "nextn.hnorm", norm):
            name = f"blk.{block}.{tensor}.weight"
            if name not in file.tensors:
                raise ModelError(
                    f"{file.path}: the metadata claim {file.n_nextn} MTP head block(s), but the "
                    f"tensor {name} is missing. Convert the model again with its head (or "
                    "without it, so that the metadata claim none), or graft the head in with "
                    "imatrix graft-mtp."
                )
    if file.architecture == "mimo2":  # GGML_ASSERTs of graph_mtp in src/models/mimo2.cpp
        for block in file.head_blocks:
            for tensor in ("attn_qkv", "ffn_gate", "ffn_up", "ffn_down"):
                if f"blk.{block}.{tensor}.weight" not in file.tensors:
                    raise ModelError(
                        f"{file.path}: the engine's graph for a mimo2 head needs "
                        f"blk.{block}.{tensor}.weight (fused q, k and v, and a dense feed-forward "
                        "part); convert the model again, or collect the trunk alone (mtp=False)"
                    )


def check_vocabulary(head: ModelHeader) -> None:
    """Refuse a head that drafts from a part of the vocabulary.

    Its outputs are numbered anew, and a tensor d2t maps them back. Only the engine's dflash graph
    reads one (src/models/dflash.cpp), none of the MTP graphs.

    Raises:
        ModelError: the mapping, or the head's own output of another size than the vocabulary.
    """
    why = (
        "The head drafts from a part of the vocabulary, which none of the engine's MTP graphs can. "
        "Convert the head again with its whole vocabulary"
    )
    for name in head.tensors:
        parts = name.removesuffix(".weight").split(".")
        if parts[-1] in ("d2t", "t2d") and head.architecture != "dflash":
            raise ModelError(f"{head.path}: it has the tensor {name}. {why}")
    n_vocab = head.tensors.get("token_embd.weight", (0, 0))[-1]
    for name, shape in head.tensors.items():
        if name.endswith("nextn.shared_head_head.weight") and n_vocab and shape[-1] != n_vocab:
            raise ModelError(
                f"{head.path}: {name} has {shape[-1]} rows, token_embd.weight has {n_vocab}. {why}"
            )


def check_assistant(trunk: ModelFile, assistant: ModelFile) -> None:
    """Refuse a gemma4-assistant file that does not fit its gemma4 model.

    Raises:
        ModelError: another architecture, or rows of another width than the assistant takes
            (embedding_length_out, src/models/gemma4-assistant.cpp).
    """
    if trunk.architecture != "gemma4":
        raise ModelError(
            f"{assistant.path}: gemma4-assistant drafts for gemma4; the model {trunk.path.name} "
            f"is {trunk.architecture}"
        )
    takes = assistant.integers.get("embedding_length_out")
    gives = trunk.integers.get("embedding_length")
    if takes != gives:
        raise ModelError(
            f"{assistant.path}: takes rows of {takes} values (embedding_length_out), "
            f"{trunk.path.name} gives rows of {gives} (embedding_length)"
        )
