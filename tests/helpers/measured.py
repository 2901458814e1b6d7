"""What is collected from each architecture, and what its graphs say should be: for tests/model and
for docs/make_architectures.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.forge_any import ARCHS, AnyModel, make_any
from helpers.ggufs import hollowed

N_CTX = 136  # more than a block of deepseek4's longest compression, 128
N_CHUNKS = 2
ROWS = N_CTX * N_CHUNKS

SEVERAL = ("hy_v3", "mimo2", "step35")  # graph_mtp takes nextn_layer_offset, and no assert of 1

# --- found by reading src/models/*.cpp -----------------------------------------------------------

CONV = "a convolution kernel (ggml_ssm_conv)"
SCAN = "a decay or skip factor of the state space, not a matrix"
NORM = "a norm with one row a group"
DEPTHWISE = "a convolution kernel, one weight a channel and tap (ggml_mul)"
APE = "positions added to a compressed block"
HASH = "a table of experts by token"
INDEXER = "the MTP graph attends to every position, without the indexer"
LOOKUP = "a lookup by token (ggml_get_rows)"

# Weights of two or more dimensions that no graph multiplies. {h} is the head's first block, and
# the trunk is as short as forge_any makes it (_Arch.n_layer).
NEVER: Mapping[str, Mapping[str, str]] = {
    "bailingmoe3": {
        "blk.0.ssm_conv1d_q.weight": CONV,
        "blk.0.ssm_conv1d_k.weight": CONV,
        "blk.0.ssm_conv1d_v.weight": CONV,
        "blk.0.ssm_a": SCAN,
    },
    "cohere2moe": {},
    "deepseek2": {},
    "deepseek32": {
        "blk.{h}.indexer.proj.weight": INDEXER,
        "blk.{h}.indexer.attn_k.weight": INDEXER,
        "blk.{h}.indexer.attn_q_b.weight": INDEXER,
    },
    "deepseek4": {
        "blk.0.ffn_gate_tid2eid.weight": HASH,
        "blk.1.attn_compressor_ape.weight": APE,
        "blk.1.indexer_compressor_ape.weight": APE,
        "blk.2.attn_compressor_ape.weight": APE,
    },
    "glm-dsa": {
        "blk.{h}.indexer.proj.weight": INDEXER,
        "blk.{h}.indexer.attn_k.weight": INDEXER,
        "blk.{h}.indexer.attn_q_b.weight": INDEXER,
    },
    "glm4moe": {},
    "glm5-next": {
        "blk.0.ssm_conv1d_q.weight": CONV,
        "blk.0.ssm_conv1d_k.weight": CONV,
        "blk.0.ssm_conv1d_v.weight": CONV,
        "blk.1.indexer_compressor_ape.weight": APE,
        "blk.{h}.indexer_compressor_ape.weight": APE,
    },
    "hy_v3": {},
    "mimo2": {},
    "nemotron_h_moe": {
        "blk.0.ssm_conv1d.weight": CONV,
        "blk.0.ssm_norm.weight": NORM,
        "blk.0.ssm_a": SCAN,
        "blk.0.ssm_d": SCAN,
    },
    "qwen35": {"blk.0.ssm_conv1d.weight": CONV},
    "qwen35moe": {"blk.0.ssm_conv1d.weight": CONV},
    "qwen3next": {"blk.0.ssm_conv1d.weight": CONV},
    "qwen4exp": {
        "blk.0.ssm_conv1d.weight": CONV,
        "blk.0.ple_conv1d.weight": DEPTHWISE,
    },
    "step35": {},
}

# The loader has no room for nextn.embed_tokens and nextn.shared_head_head (load_arch_tensors in
# bailingmoe3.cpp, nemotron-h.cpp and qwen4exp.cpp); every other one takes both.
NO_TABLES = ("bailingmoe3", "nemotron_h_moe", "qwen4exp")

# A vector that is multiplied as a matrix of one row (build_lora_mm in qwen35moe.cpp, qwen3next.cpp,
# qwen4exp.cpp)
VECTORS = ("ffn_gate_inp_shexp.weight",)

# Every trunk runs its last layer on all rows if its hidden rows are asked for unmasked:
# `embeddings_nextn_masked` is in the condition of each crop of src/models/, and deepseek4 crops
# only after the last block. So no block of a trunk needs outputs; only the weights behind the
# blocks do (OUTSIDE).
#
# Heads whose block runs on output rows only, and why.
HEAD_CROPS = {
    # before the experts, whatever is asked for (graph_mtp, after wo)
    "qwen3next": "the experts run on output rows only",
    # crop_before_nextn, unless hidden rows are asked for unmasked, which one head alone does not need
    "nemotron_h_moe": "the experts run on output rows only",
    "glm5-next": "the experts run on output rows only",  # crop_before_nextn, likewise
    # the mixer is the norm before the LM head (flat_out in graph_mtp)
    "qwen4exp": "the mixer of its streams (`nextn.hc_head_*`) runs on output rows only",
}
# Heads that crop after their block: the row that the next head takes is an output row, and a single
# head hands none on (h_nextn in graph_mtp of mimo2.cpp, step35.cpp).
NEXT_HEAD_CROPS = ("mimo2", "step35")

# Rows per token of weights that do not run once per token: four hyper-connection streams.
ROWS_A_TOKEN = {
    ("deepseek4", "nextn.eh_proj.weight"): 4,
    ("qwen4exp", "nextn.eh_proj.weight"): 4,
}

# Weights outside the blocks, other than the embeddings and the output, that the trunk multiplies
# and that a type like IQ2_XXS needs data for: they combine the streams of its hyper-connections.
# llama-imatrix leaves them out.
OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "deepseek4": ("output_hc_fn.weight",),
    "qwen4exp": ("output_hc_down.weight", "output_hc_up.weight"),
}

# Heads that a loader takes and no graph runs; build_arch_graph there gives the trunk's, or throws
NO_HEAD_GRAPH = ("bailingmoe2", "dots3note", "exaone-moe", "exaone4", "glm4")


def never(arch: str, variant: str = "plain") -> dict[str, str]:
    """NEVER for a variant of measured()."""
    head = ARCHS[arch].n_layer
    found = {name.format(h=head): reason for name, reason in NEVER[arch].items()}
    if variant == "tables" and arch not in NO_TABLES:
        found[f"blk.{head}.nextn.embed_tokens.weight"] = LOOKUP
    return found


# --- measuring -----------------------------------------------------------------------------------

_MEASURE = """
import json, sys
import numpy as np
from imatrix import Collector

n_ctx, n_chunks, *paths = sys.argv[1:]
n_ctx = int(n_ctx)
tokens = np.random.default_rng(0).integers(0, 250, (int(n_chunks), n_ctx)).tolist()
for path in paths:
    with Collector(path, n_ctx=n_ctx, n_ubatch=96, n_threads=1) as collector:
        plan = collector.plan(mtp=True)
        both = collector.run(tokens, mtp=True)
        trunk = collector.run(tokens)
    both.save(path + ".both.imatrix")
    trunk.save(path + ".trunk.imatrix")
    same = all(
        entry.sums.tobytes() == both[name].sums.tobytes()
        and entry.counts.tobytes() == both[name].counts.tobytes()
        for name, entry in trunk.items()
    )
    print(json.dumps({
        "trunk": sorted(plan.trunk), "head": sorted(plan.head), "never": sorted(plan.never),
        "rows": {**plan.trunk, **plan.head},
        "trunk_outputs": plan.trunk_outputs, "head_outputs": plan.head_outputs,
        "counts": {name: entry.counts.tolist() for name, entry in both.items()},
        "finite": all(bool(np.isfinite(e.sums).all() and e.sums.any()) for e in both.values()),
        "trunk_entries": sorted(trunk), "same_trunk": same,
    }))
"""


def child(code: str, *arguments: object, timeout: float = 120) -> str:
    """Run Python code in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=timeout,
        # if a debugger is installed, ggml_abort starts it (ggml_print_backtrace in ggml.c)
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout


@dataclass(frozen=True)
class Measured:
    """One forged model, planned and collected from with the head and without it."""

    model: AnyModel
    trunk: list[str]
    head: list[str]
    never: list[str]
    rows: dict[str, int]
    trunk_outputs: bool
    head_outputs: bool
    counts: dict[str, list[int]]
    finite: bool
    trunk_entries: list[str]
    same_trunk: bool
    both_file: Path = field(repr=False)
    trunk_file: Path = field(repr=False)


MISSING = re.compile(r"Missing importance matrix for tensor (\S+)")
Measuring = Callable[[str], dict[str, Measured]]
Quantizing = Callable[[str], tuple[list[str], str]]


def variants(arch: str) -> dict[str, dict[str, Any]]:
    """Options of make_any by the name of the variant."""
    found: dict[str, dict[str, Any]] = {"plain": {}}
    if arch not in NO_TABLES:
        found["tables"] = {"embed_tokens": True, "shared_head_head": True}
    if arch in SEVERAL:
        found["three"] = {"n_nextn": 3}
    return found


def measure(arch: str, folder: Path) -> dict[str, Measured]:
    """Forge, plan and collect every variant of an architecture. The weights are zero afterwards."""
    models = {
        name: make_any(folder / f"{arch}-{name}.gguf", arch, **options)
        for name, options in variants(arch).items()
    }
    lines = child(_MEASURE, N_CTX, N_CHUNKS, *(model.path for model in models.values()))
    for model in models.values():  # what is quantized and what is asked for depends on no weight
        hollowed(model.path)
    return {
        name: Measured(
            model,
            **json.loads(line),
            both_file=Path(f"{model.path}.both.imatrix"),
            trunk_file=Path(f"{model.path}.trunk.imatrix"),
        )
        for (name, model), line in zip(models.items(), lines.splitlines(), strict=True)
    }


def iq2_xxs(measured: Measured, larger: Iterable[str], llama_quantize: Path) -> str:
    """The log of llama-quantize to IQ2_XXS with trunk and head, some weights at a larger type."""
    out = measured.model.path.with_suffix(".iq2")
    done = subprocess.run(
        [
            llama_quantize, "--imatrix", measured.both_file,
            *(a for name in larger for a in ("--tensor-type", f"^{re.escape(name)}$=q8_0")),
            measured.model.path, out, "IQ2_XXS", "2",
        ],
        capture_output=True, text=True, errors="replace", check=False, timeout=120,
    )  # fmt: skip
    out.unlink(missing_ok=True)
    log = done.stdout + done.stderr
    assert done.returncode >= 0, log
    assert (done.returncode == 0) == ("failed to quantize" not in log), log
    return log


def iq2_xxs_of_most(
    arch: str, found: Mapping[str, Measured], llama_quantize: Path
) -> tuple[list[str], str]:
    """iq2_xxs of the variant with the most tensors in its head, with all weights that never run at
    a larger type; and those of them for which the quantizer looked for data: it leaves the others
    as they are anyway."""
    variant = "tables" if "tables" in found else "plain"
    idle = never(arch, variant)
    log = iq2_xxs(found[variant], idle, llama_quantize)
    # not the tables, which it never asks data for (quantization.types.UNASKED, from
    # tensor_requires_imatrix in src/llama-quant.cpp), and not rows that no block of such a type
    # fits
    unasked = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")
    shapes = found[variant].model.shapes
    without = re.findall(r"did not find weights for (\S+)", log)
    return [name for name in without if name not in unasked and shapes[name][-1] % 256 == 0], log
