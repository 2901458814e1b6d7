"""What the engine can run of a model, checked on its header before anything is loaded.

The engine asserts a good deal while it builds a graph, and an assertion ends the process. What
is known to end that way is refused here first, with the condition in words.
"""

from __future__ import annotations

import re

import numpy as np

from imatrix.errors import ModelError
from imatrix.model_file import ModelFile

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

_BLOCK = re.compile(r"blk\.(\d{1,9})\.", re.ASCII)


def block_of(name: str) -> int | None:
    """The number in `blk.<number>.`; None for a tensor outside the blocks."""
    found = _BLOCK.match(name)
    return int(found[1]) if found else None


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
    """Refuse a table of experts by token (deepseek4) that names an expert there is not.

    The engine asserts it while it multiplies (ggml_compute_forward_mul_mat_id).

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
    for block in range(file.n_trunk, file.n_trunk + file.n_nextn):
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
        for block in range(file.n_trunk, file.n_trunk + file.n_nextn):
            for tensor in ("attn_qkv", "ffn_gate", "ffn_up", "ffn_down"):
                if f"blk.{block}.{tensor}.weight" not in file.tensors:
                    raise ModelError(
                        f"{file.path}: the engine's graph for a mimo2 head needs "
                        f"blk.{block}.{tensor}.weight (fused q, k and v, and a dense feed-forward "
                        "part); convert the model again, or collect the trunk alone (mtp=False)"
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
