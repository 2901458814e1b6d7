"""Parts of the names of weights, and rows of experts, compared with literals."""

from __future__ import annotations

import numpy as np
import pytest

from imatrix.entries import Entry
from imatrix.matrix.experts import coverage_of, experts, fewest_rows, layer_rows
from imatrix.tensors import (
    apart_expert,
    block_label,
    block_of,
    kind_of,
    listed_place,
    marks_head,
    n_entry_values,
    n_values,
    name_in_block,
    natural_order,
    parsed_name,
    row_and_matrices,
)


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("blk.3.attn_q.weight", 3, "attn_q.weight"),
        ("blk.0.ssm_a", 0, "ssm_a"),
        ("blk.12.nextn.eh_proj.weight", 12, "nextn.eh_proj.weight"),
        ("blk.03.attn_q.weight", 3, "attn_q.weight"),
        ("blk.7.a name with blanks\nand a line end", 7, "a name with blanks\nand a line end"),
        ("blk.1.blk.2.x", 1, "blk.2.x"),
        ("blk.5.", 5, ""),
        ("blk.999999999.x", 999999999, "x"),
        # outside the blocks
        ("blk.1000000000.x", None, "blk.1000000000.x"),  # the engine writes no such number
        ("blk.5", None, "blk.5"),
        ("blk.-1.x", None, "blk.-1.x"),
        ("blk..x", None, "blk..x"),
        ("blk.\N{ARABIC-INDIC DIGIT THREE}.x", None, "blk.\N{ARABIC-INDIC DIGIT THREE}.x"),
        ("Blk.1.x", None, "Blk.1.x"),
        ("output.weight", None, "output.weight"),
        ("nextn.embed_tokens.weight", None, "nextn.embed_tokens.weight"),
        ("mtp:blk.1.x", None, "mtp:blk.1.x"),
        ("enc.blk.1.x", None, "enc.blk.1.x"),
        ("", None, ""),
    ],
)
def test_block_and_kind(name: str, block: int | None, kind: str) -> None:
    assert (block_of(name), kind_of(name)) == (block, kind)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("blk.3.attn_q.weight", ("", "3", "attn_q.weight")),
        ("blk.03.x", ("", "03", "x")),
        ("mtp:blk.1.x", ("mtp:", "1", "x")),
        ("enc.blk.1.x", ("enc.", "1", "x")),
        ("blk.x.blk.4.y", ("blk.x.", "4", "y")),
        ("a\nb.blk.4.y", ("a\nb.", "4", "y")),
        ("blk.1000000000.blk.4.y", ("blk.1000000000.", "4", "y")),
        ("output.weight", None),
    ],
)
def test_parsed(name: str, parts: tuple[str, str, str] | None) -> None:
    found = parsed_name(name)
    assert found == parts
    assert found is None or found.block == int(parts[1])  # type: ignore[index]


def test_name_in_another_block() -> None:
    assert name_in_block("blk.3.attn_q.weight", 2) == "blk.2.attn_q.weight"
    assert name_in_block("blk.3.attn_q.weight", "*") == "blk.*.attn_q.weight"
    assert name_in_block("mtp:blk.03.blk.4.x", 9) == "mtp:blk.9.blk.4.x"
    assert name_in_block("output.weight", 2) is None


def test_label() -> None:
    assert block_label("blk.3.x") == "blk.3"
    assert block_label("mtp:blk.3.x") == "mtp:blk.3"
    assert block_label("enc.blk.3.x") is None
    assert block_label("output.weight") is None


def test_what_marks_a_head() -> None:
    assert marks_head("blk.3.nextn.eh_proj.weight")
    assert not marks_head("blk.3.attn_q.weight")
    assert not marks_head("blk.3.nextn")
    assert not marks_head("nextn.embed_tokens.weight")
    assert not marks_head("mtp:blk.3.nextn.eh_proj.weight")


def test_experts_apart() -> None:
    assert apart_expert("blk.3.ffn_gate.5.weight") == ("ffn_gate", 5)
    assert apart_expert("blk.3.ffn_down.12.weight") == ("ffn_down", 12)
    assert apart_expert("blk.3.ffn_up.0.weight") == ("ffn_up", 0)
    for name in (
        *("blk.3.ffn_gate.weight", "blk.3.ffn_gate_exps.weight", "blk.3.ffn_gate.5.bias"),
        *("ffn_gate.5.weight", "mtp:blk.3.ffn_gate.5.weight", "blk.3.attn_q.5.weight"),
    ):
        assert apart_expert(name) is None


def test_natural_order() -> None:
    names = ["output.weight", "blk.10.a", "blk.2.b", "blk.2.a", "a", "blk.02.c", "mtp:blk.1.x"]
    assert sorted(names, key=natural_order) == [
        *("blk.02.c", "blk.2.a", "blk.2.b", "blk.10.a", "a", "mtp:blk.1.x", "output.weight"),
    ]


@pytest.mark.parametrize(
    ("name", "place"),
    [  # process_tensor_name in tools/imatrix/imatrix.cpp
        ("blk.3.attn_q.weight", (3, "attn_q")),
        ("blk.03.attn_q.weight", (3, "attn_q")),
        ("enc.blk.3.attn_q.weight", (3, "attn_q")),
        ("blk.3.nextn.eh_proj.weight", (3, "eh_proj")),
        ("blk.3.attn_q.bias", (3, "blk.3.attn_q.bias")),
        ("output.weight", (None, "output")),
        ("weight", (None, "weight")),
        (".weight", (None, ".weight")),
        ("blk.x.y.weight", (None, "y")),
        ("blk", (None, "blk")),
    ],
)
def test_place_as_llama_imatrix_lists_it(name: str, place: tuple[int | None, str]) -> None:
    assert listed_place(name) == place


def test_shapes() -> None:
    assert row_and_matrices((64,)) == (64, 1)
    assert row_and_matrices((64, 32)) == (64, 1)
    assert row_and_matrices((64, 32, 8)) == (64, 8)
    assert row_and_matrices((64, 32, 8, 2)) == (64, 8)
    assert n_values((64, 32, 8, 2)) == 32768
    assert n_values((2**21, 2**21)) == 2**42
    assert n_entry_values((64, 32, 8)) == 512
    assert n_entry_values((64, 32)) == 64


# --- rows of experts ---------------------------------------------------------


def counts(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def test_an_expert_has_the_rows_of_its_weight_with_the_fewest() -> None:
    found = fewest_rows(
        [("b", counts(4, 0, 9)), ("a", counts(1, 2)), ("b", counts(3, 5, 9)), ("c", counts(7))]
    )
    assert {block: rows.tolist() for block, rows in found.items()} == {"b": [3, 0, 9], "a": [1, 2]}
    assert list(found) == ["b", "a"]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_experts_of_a_block_are_those_of_the_largest_number(first: int) -> None:
    """GroveMoE has groups of experts besides its experts (src/models/grovemoe.cpp)."""
    weights = {
        "blk.2.ffn_up_chexps.weight": counts(0, 9),
        "blk.2.ffn_up_exps.weight": counts(5, 1, 8, 2),
        "blk.2.ffn_down_exps.weight": counts(5, 1, 7, 2),
    }
    names = [*weights][first:] + [*weights][:first]
    in_order = {name: weights[name] for name in names}
    entries = {
        name: Entry(np.ones((len(n), 2)), n, name=name) for name, n in reversed(in_order.items())
    }
    found = coverage_of(in_order, 2)
    assert found is not None
    assert (found.n_experts, found.n_reached, found.n_unseen) == (4, 3, 0)
    assert found.thinnest == ("blk.2", 1, 1)
    shown = experts(entries)
    assert (shown.n_experts, shown.n_blocks) == (4, 1)
    assert (shown.unseen, shown.thinnest) == ((), (2, 1, 1))
    # the rows of all weights that have experts, the smaller set included
    assert layer_rows(names, entries) == {
        **{"n_experts": 4, "unseen": 0, "rows_min": 0, "rows_max": 9}
    }


def test_rows_of_a_block_without_experts() -> None:
    entries = {"a": Entry([[1.0]], [3]), "b": Entry([[1.0]], [0])}
    assert layer_rows(["a", "b"], entries) == {
        **{"n_experts": 0, "unseen": 0, "rows_min": 0, "rows_max": 3}
    }


def test_coverage_of_a_head_of_another_file() -> None:
    found = coverage_of(
        {
            "blk.1.ffn_up_exps.weight": counts(3, 4),
            "mtp:blk.1.ffn_up_exps.weight": counts(0, 2),
            "blk.1.attn_q.weight": counts(9),
            "output.weight": counts(1, 1),
        },
        3,
    )
    assert found is not None
    assert (found.n_experts, found.n_reached, found.n_unseen) == (4, 2, 1)
    assert found.thinnest == ("mtp:blk.1", 0, 0)
    assert coverage_of({"blk.1.attn_q.weight": counts(9)}, 3) is None
