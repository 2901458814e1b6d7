"""Recipes for tests: of the shapes of a model with a head, the types drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

__all__ = ["BITS", "BLOCKS", "recipe_data", "small_source"]

# (values, bytes) of a block: llama.cpp's ggml-common.h, written down here anew
BLOCKS = {
    "f32": (1, 4),
    "f16": (1, 2),
    "q8_0": (32, 34),
    "q6_k": (256, 210),
    "q5_k": (256, 176),
    "q4_k": (256, 144),
    "iq4_xs": (256, 136),
    "q3_k": (256, 110),
    "iq3_s": (256, 110),
    "iq3_xxs": (256, 98),
    "q2_k": (256, 84),
    "iq2_xxs": (256, 66),
}
BITS = {kind: 8 * n_bytes / values for kind, (values, n_bytes) in BLOCKS.items()}


Source = dict[str, tuple[str, tuple[int, ...]]]


def small_source(n_blocks: int = 4) -> Source:
    """(type, shape) by tensor: attention in all blocks, experts from block 1 on, the last block is
    the head."""
    found: Source = {
        "token_embd.weight": ("f16", (256, 2048)),
        "output_norm.weight": ("f32", (256,)),
    }
    for block in range(n_blocks):
        for kind, rows in (("attn_q", 256), ("attn_k", 128), ("attn_v", 128)):
            found[f"blk.{block}.{kind}.weight"] = ("f16", (256, rows))
        found[f"blk.{block}.attn_norm.weight"] = ("f32", (256,))
        if block == 0:
            found["blk.0.ffn_down.weight"] = ("f16", (512, 256))
        else:
            found[f"blk.{block}.ffn_gate_inp.weight"] = ("f32", (256, 4))
            found[f"blk.{block}.ffn_down_exps.weight"] = ("f16", (256, 256, 4))
    found[f"blk.{n_blocks - 1}.nextn.eh_proj.weight"] = ("f16", (512, 256))
    return found


def recipe_data(
    source: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    *,
    seed: int = 0,
    **changes: Any,
) -> dict[str, Any]:
    """A recipe as its file holds it.

    Args:
        source: (type, shape) by tensor; None for those of `small_source`.
        seed: decides which tensor gets which type; one in ten stays F16.
        changes: other values for some keys. The digest is none: the recipe is for no model.
    """
    source = small_source() if source is None else source
    draw = random.Random(seed)
    kinds = [kind for kind in BLOCKS if kind not in ("f32", "f16")]
    types = {
        name: draw.choice(kinds) if draw.random() < 0.9 else kind
        for name, (kind, _) in source.items()
        if kind != "f32"
    }
    return {
        "format": "imatrix-recipe",
        "version": 1,
        "architecture": "glm4moe",
        "model": "small-F16.gguf",
        "tensors_digest": "ab" * 32,
        "ftype": "Q3_K_M",
        "types": types,
        "bytes": 3_000_000,
        "bits_per_weight": 3.875,
        "predicted_kl": 0.25,
        "measured_kl": {"value": 0.3, "error": 0.02, "positions": 3060},
        "head": None,
        "text": "held-out.txt",
        "chunks": 12,
        "n_ctx": 512,
        "head_blocks": [max(int(name.split(".")[1]) for name in source if name[:4] == "blk.")],
        "source": {name: [kind, list(shape)] for name, (kind, shape) in source.items()},
        "frontier": {
            "predicted": {
                "bytes": [2_000_000 + 10_000 * n for n in range(200)],
                "kl": [2.0 * 0.97**n for n in range(199)] + [0.0],
            },
            "measured": [
                {"bytes": 2_500_000, "kl": 0.6, "error": 0.03},
                {"bytes": 3_000_000, "kl": 0.3, "error": 0.02},
                {"bytes": 3_400_000, "kl": 0.02, "error": 0.02},
            ],
            "mixtures": [
                {"name": "IQ3_XXS", "bytes": 2_900_000, "kl": 0.5, "error": None},
                {"name": "Q3_K_M", "bytes": 3_100_000, "kl": 0.4, "error": 0.03},
                {"name": "$\\frac{a$<b>\x01", "bytes": 3_110_000, "kl": 0.39, "error": 0.03},
            ],
            "chosen": [2_500_000, 3_000_000],
        },
    } | changes
