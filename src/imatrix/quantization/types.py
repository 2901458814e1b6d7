"""The file types that the engine's quantizer makes, and the tensors that it treats apart."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["ASKING", "EMBEDDINGS", "FTYPES", "UNASKED"]

# llama-quantize's names (tools/quantize/quantize.cpp) -> enum llama_ftype (include/llama.h).
# COPY, which is no type, is left out.
FTYPES: Mapping[str, int] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K": 12,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K": 15,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K": 17,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4_MOE": 38,
    "Q1_0": 40,
    "Q2_0": 41,
}

# Tables that rows are looked up in.
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
# The engine asks for data for the other weights and reports their lack. For these it does not ask
# (tensor_requires_imatrix in src/llama-quant.cpp), and ggml then ends the process.
UNASKED = (*EMBEDDINGS, "output.weight")

# Types that tensor_requires_imatrix in src/llama-quant.cpp refuses to make without data, and
# q2_K if the file type is Q2_K_S. It never asks for token_embd, per_layer_token_embd and output.
ASKING = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})
