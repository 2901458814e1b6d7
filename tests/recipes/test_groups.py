"""Which types a tensor may get, which tensors go together, and what is asked for."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from imatrix.entries import Entry
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.raw import Tensor
from imatrix.recipes.groups import (
    Group,
    candidates_of,
    grouped,
    measured_types,
    refuse_quantized,
    wanted_types,
)
from imatrix.recipes.options import Target, parse_size, targets_of

# Types that llama-quantize refuses to make without data (tensor_requires_imatrix)
NEEDY = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"}


def tensor(name: str, *shape: int, kind: str = "F16") -> Tensor:
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    return Tensor(
        name, shape, int(number), int(np.prod(shape)) // block * size, Path("x.gguf"), 0, 1
    )


def matrix(*tensors: Tensor) -> ImportanceMatrix:
    return ImportanceMatrix(
        {each.name: Entry(np.ones(((*each.shape, 1)[2], each.shape[0])), [1]) for each in tensors}
    )


def test_candidates_go_by_the_rows_and_by_the_data() -> None:
    long, short, odd, blind = (
        tensor("blk.0.attn_q.weight", 512, 8),
        tensor("blk.0.attn_k.weight", 96, 8, kind="F32"),
        tensor("blk.0.attn_v.weight", 40, 8, kind="BF16"),
        tensor("output.weight", 256, 8),
    )
    found = candidates_of([long, short, odd, blind], matrix(long, short, odd), wanted_types(None))
    assert set(found.types[long.name]) == {
        *NEEDY,
        *("q2_k", "iq3_s", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0", "f16"),
    }
    assert set(found.types[short.name]) == {
        *("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q8_0", "f32")
    }
    assert found.types[odd.name] == ("bf16",)
    assert set(found.types[blind.name]) == set(found.types[long.name]) - NEEDY
    assert found.without_data == (blind.name,)
    some = candidates_of(
        [long, short], matrix(long, short), wanted_types(["Q4_K", "iq2_xs", "q5_1"])
    )
    assert some.types == {long.name: ("iq2_xs", "q4_k", "f16"), short.name: ("q5_1", "f32")}
    with pytest.raises(ValueError, match="tq1_0 is not offered"):
        wanted_types(["tq1_0"])
    with pytest.raises(ValueError, match="unknown tensor type"):
        wanted_types(["q4"])
    with pytest.raises(ValueError, match="is empty"):
        wanted_types([])


def test_tensors_that_multiply_the_same_rows_go_together() -> None:
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    tensors = [
        tensor("output.weight", 256, 100),
        *(tensor(f"blk.{block}.{name}.weight", 256, 64) for block in (1, 0) for name in names),
        tensor("blk.0.ffn_gate_exps.weight", 256, 64, 4),
        tensor("blk.0.ffn_up_exps.weight", 256, 64, 4),
        tensor("token_embd.weight", 256, 100),
    ]
    types = {each.name: ("q4_k", "q8_0", "f16") for each in tensors}
    types["blk.1.attn_v.weight"] = ("q8_0", "f16")  # it has no data, say
    groups = {g.name: g for g in grouped(tensors, types, n_trunk=2, apart=False)}
    assert list(groups) == [
        *("blk.0.attn_q+attn_k+attn_v", "blk.0.attn_output.weight", "blk.0.ffn_gate+ffn_up"),
        *("blk.0.ffn_down.weight", "blk.0.ffn_gate_exps+ffn_up_exps", "token_embd.weight"),
        *("blk.1.attn_q+attn_k", "blk.1.attn_v.weight", "blk.1.attn_output.weight"),
        *("blk.1.ffn_gate+ffn_up", "blk.1.ffn_down.weight", "output.weight"),
    ]
    experts = groups["blk.0.ffn_gate_exps+ffn_up_exps"]
    n = 2 * 256 * 64 * 4
    assert experts.n_values == n
    assert experts.bytes == {"q4_k": n // 256 * 144, "q8_0": n // 32 * 34, "f16": 2 * n}
    assert experts.types("q4_k") == dict.fromkeys(experts.tensors, "q4_k")
    assert experts.types("f16") == {}
    # a file pads each tensor to 32 bytes: 64 rows of q4_k are 9216 bytes, 100 of q8_0 27200
    assert groups["output.weight"].bytes["q8_0"] == 27200
    assert groups["output.weight"].block == 2
    apart = grouped(tensors, types, n_trunk=2, apart=True)
    assert [group.tensors for group in apart if group.block == 1] == [
        (f"blk.1.{name}.weight",) for name in names
    ]
    odd = grouped([tensor("blk.0.attn_q.weight", 32, 3)], {"blk.0.attn_q.weight": ("q8_0", "f16")},
                  n_trunk=1, apart=True)  # fmt: skip
    assert odd[0].bytes == {"q8_0": 128, "f16": 192}  # 3 * 34 is 102


def test_measured_types_are_candidates() -> None:
    def of(*types: str) -> Group:
        return Group(
            name="g",
            kind="g",
            tensors=("t",),
            block=0,
            source=types[-1],
            bytes=dict.fromkeys(types, 1),
            n_values=1,
        )

    assert measured_types(of("q2_k", "q4_k", "f16"), ("q2_k", "q4_k")) == ("q2_k", "q4_k")
    # q5_0 has 5.5 bits a weight, q4_0 4.5: q2_k's 2.6 and q4_k's 4.5 are both next to q4_0
    assert measured_types(of("q4_0", "q5_0", "f32"), ("q2_k", "q4_k")) == ("q4_0",)
    assert measured_types(of("f16"), ("q2_k",)) == ()


def test_a_model_that_is_quantized_already() -> None:
    refuse_quantized([tensor("a", 256, 2), tensor("b", 256, 2, kind="BF16")], "x.gguf")
    with pytest.raises(ValueError, match=r"x\.gguf: b is q4_k, so this model is quantized already"):
        refuse_quantized([tensor("a", 256, 2), tensor("b", 256, 2, kind="Q4_K")], "x.gguf")


def test_sizes_and_targets() -> None:
    for text, n_bytes in (
        ("12G", 12 * 1024**3),
        ("12GiB", 12 * 1024**3),
        ("12GB", 12 * 1000**3),
        ("1.5m", 3 * 1024**2 // 2),
        (".5 TiB", 1024**4 // 2),
        ("900", 900),
        ("900B", 900),
        (900, 900),
    ):
        assert parse_size(text) == n_bytes
    for text in ("12X", "", "G", "-1G", "1e9", "12 GiBs"):
        with pytest.raises(ValueError, match="expected a size"):
            parse_size(text)
    assert targets_of(["1K", 7], 3, [0.5, 0.5]) == (
        Target("size", 1024),
        Target("size", 7),
        Target("bpw", 3.0),
        Target("kl", 0.5),
    )
    for kind in ("size", "bpw", "kl"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{kind} must be a number above 0"):
                Target(kind, value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to choose for"):
        targets_of(None, None, None)
