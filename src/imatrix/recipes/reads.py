"""How many bytes of weights the engine reads to decode a token, by trunk and by head.

At batch 1 decoding waits for memory: a step takes as long as its weights take to be read, and each is
read once. What is read is less than what is stored:

- of a matrix of experts those that a token is sent to, expert_used_count of expert_count; shared
  experts are weights of their own, and whole
- of a table of embeddings one row a token; if there is no output.weight, the table is the LM head as
  well (TENSOR_DUPLICATED in src/models/), and then all of it is read
- the LM head by the trunk for every token, and by the head for every drafted one: its own
  nextn.shared_head_head, or else the output of the model that its file is (graph_mtp in src/models/)

Memory (keys and values), activations and logits are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from imatrix.heads.source import Source
from imatrix.quantization.source import bytes_as
from imatrix.tensors import kind_of, n_values

__all__ = ["ReadBytes", "lm_head", "reads_of_head_block", "reads_of_trunk"]

# ffn_gate_exps, ffn_gate_up_exps, and grovemoe's ffn_gate_chexps; with biases
_EXPERTS = re.compile(r"_(?:ch)?exps\.")
# Tables that a row is looked up in for every token. tid2eid is deepseek4's, of experts by token.
_TABLE = re.compile(
    r"(?:token_embd|per_layer_token_embd|position_embd|token_types|nextn\.embed_tokens"
    r"|ffn_gate_tid2eid)(?:\.|$)"
)
_LM_HEAD = "nextn.shared_head_head.weight"
# Written by converters and read by no graph that decodes text: classifiers (cls.output in
# src/models/qwen35.cpp), the ordered embeddings of src/models/gemma4-assistant.cpp.
_UNREAD = ("cls.", "masked_embd_")


@dataclass(frozen=True)
class ReadBytes:
    """What a graph reads of its weights.

    Attributes:
        whole: bytes that are read once, however many tokens there are.
        rows: bytes for each token: rows of tables.
        experts: of each matrix of experts (bytes of all of them, how many a token uses, how many
            there are).
    """

    whole: float = 0
    rows: float = 0
    experts: tuple[tuple[float, int, int], ...] = ()

    def of(self, n_tokens: int = 1) -> float:
        """Bytes for n tokens that run together.

        For one token this is what it uses. Of several the experts are taken to be chosen
        independently: one of `used` in `count` is missed by all n with (1 - used / count)^n. Real
        tokens that follow each other share experts, so that it is an upper bound in practice.
        """
        experts = sum(b * (1 - (1 - used / count) ** n_tokens) for b, used, count in self.experts)
        return self.whole + self.rows * n_tokens + experts

    def __add__(self, other: ReadBytes) -> ReadBytes:
        return ReadBytes(
            self.whole + other.whole, self.rows + other.rows, self.experts + other.experts
        )


def lm_head(source: Source) -> str:
    """Name of the weight that gives a file's logits."""
    return "output.weight" if "output.weight" in source.tensors else "token_embd.weight"


def reads_of_trunk(source: Source, types: Mapping[str, str]) -> ReadBytes:
    """What the trunk reads for a token.

    Args:
        source: the model's file.
        types: tensor -> ggml type; those that it lacks keep the file's.
    """
    header = source.header
    names = [t.name for t in source.all() if not header.in_head(t.name)]
    return _sum(source, names, types) + _whole(source, lm_head(source), types)


def reads_of_head_block(
    trunk: Source,
    head: Source,
    block: int | None,
    trunk_types: Mapping[str, str],
    head_types: Mapping[str, str],
    *,
    logits: bool,
) -> ReadBytes:
    """What one decode of a head reads.

    Args:
        trunk, head: the files; the same object if one holds both.
        block: number of the head's block that runs; None for all of a gemma4-assistant, which runs
            them in one graph.
        trunk_types, head_types: tensor -> ggml type of either's file.
        logits: whether the LM head runs too, as it does to draft, and not to fill the memory
            (process() in common/speculative.cpp).
    """
    assistant = block is None
    names = [
        t.name
        for t in head.all()
        if (not _TABLE.match(t.name) if assistant else t.block == block)
        and kind_of(t.name) != _LM_HEAD
    ]
    found = _sum(head, names, head_types)
    # the token's embedding: its own table, or that of the model it is loaded from; an assistant
    # reads the trunk's (model_other->tok_embd in src/models/gemma4-assistant.cpp)
    table, types = (trunk, trunk_types) if assistant or head is trunk else (head, head_types)
    if f"blk.{block}.nextn.embed_tokens.weight" not in head.tensors:
        found += _sum(table, ["token_embd.weight"], types)
    if logits:
        own = f"blk.{block}.{_LM_HEAD}"
        if own in head.tensors:
            found += _whole(head, own, head_types)
        else:
            source, types = (trunk, trunk_types) if head is trunk else (head, head_types)
            found += _whole(source, lm_head(source), types)
    return found


def _whole(source: Source, name: str, types: Mapping[str, str]) -> ReadBytes:
    tensor = source.tensors.get(name)
    return ReadBytes() if tensor is None else ReadBytes(whole=bytes_as(tensor, types))


def _sum(source: Source, names: Iterable[str], types: Mapping[str, str]) -> ReadBytes:
    """What a token reads of these tensors, without an LM head."""
    whole = rows = 0.0
    experts = []
    output = lm_head(source)
    for name in names:
        tensor = source.tensors.get(name)
        if tensor is None or name.startswith(_UNREAD):
            continue
        n_bytes = bytes_as(tensor, types)
        kind = kind_of(name)
        if _TABLE.match(kind):
            rows += n_bytes / (n_values(tensor.shape) / max(1, tensor.shape[0]))
        elif name == output:
            continue
        elif _EXPERTS.search(kind) and len(tensor.shape) > 1:
            count = tensor.shape[-1]
            experts.append((float(n_bytes), min(count, _used(source, tensor.block, count)), count))
        else:
            whole += n_bytes
    return ReadBytes(whole, rows, tuple(experts))


def _used(source: Source, block: int | None, count: int) -> int:
    """How many experts a token uses in a block; all if the file does not say.

    The key is one number or one for each block (get_key_or_arr in src/llama-model.cpp).
    """
    value = source.keys.get(f"{source.header.architecture}.expert_used_count")
    if value is None:
        return count
    found = value.decoded()
    if isinstance(found, list):
        found = found[block] if block is not None and block < len(found) else count
    return int(found) or count
