"""Recipes: their files, the models that they are for, and llama-quantize following them."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from helpers.forge_any import make_any
from helpers.ggufs import rewritten, tensors_of
from helpers.running import EngineTool, Run

from imatrix import FormatError, ImportanceMatrix, ModelFile, Recipe, coverage, quantize
from imatrix.quantization.file_size import quantized_bytes
from imatrix.quantization.frontier import FrontierCurve, FrontierPoint
from imatrix.quantization.keys import matrix_keys
from imatrix.quantization.recipe import HeadChoice, Measured, SourceTensor
from imatrix.quantization.rules import read_rules

pytestmark = [pytest.mark.engine("src/llama-quant.cpp", "rules, and what a quantized file holds")]

# What is quick for large weights. F16 is what most tensors here are already.
QUICK = ["q4_0", "q5_1", "q8_0", "q4_1", "f16", "bf16", "f32"]
# Small weights, one of the head among them, and types that take longer.
SLOW = {
    "blk.1.attn_v.weight": "q4_k",
    "blk.3.attn_k.weight": "q6_k",
    "blk.0.attn_v.weight": "q3_k",
}
# The engine takes seconds to lay out the tables of IQ1 and IQ2, in each process.
WITH_DATA = {
    "blk.1.attn_k.weight": "iq3_xxs",
    "blk.2.attn_k.weight": "iq3_s",
}
KINDS = ("ffn_gate_inp", "_norm.", "ssm_conv1d")


def source_of(path: Path) -> dict[str, SourceTensor]:
    """By gguf-py."""
    return {
        t.name: SourceTensor(t.tensor_type.name.lower(), tuple(int(n) for n in t.shape))
        for t in GGUFReader(path).tensors
    }


def changeable(path: Path) -> list[str]:
    """Matrices, but for norms and routers, as tensor_allows_quantization has it."""
    return [
        name
        for name, tensor in source_of(path).items()
        if len(tensor.shape) > 1
        and name.endswith("weight")
        and not any(kind in name for kind in KINDS)
    ]


def mixed(path: Path, *, with_data: bool = False) -> dict[str, str]:
    """A type for each, at random for most."""
    rng = np.random.default_rng(3)
    names = changeable(path)
    types = {name: str(rng.choice(QUICK)) for name in names}
    chosen = {**SLOW, **(WITH_DATA if with_data else {})}
    return types | {name: kind for name, kind in chosen.items() if name in names}


def recipe_for(
    path: Path, types: Mapping[str, str], *, ftype: str = "Q3_K_M", **more: Any
) -> Recipe:
    return Recipe.for_model(ModelFile.read(path), types, ftype=ftype, bytes=1000, **more)


def full(path: Path, types: Mapping[str, str]) -> Recipe:
    """One with every field."""
    curve = FrontierCurve(
        bytes=np.array([900, 1000]),
        kl=np.array([0.5, 0.25]),
        measured=(FrontierPoint(bytes=1000, kl=0.3, error=0.01),),
        mixtures=(FrontierPoint(bytes=1100, kl=0.4, name="Q3_K_M"),),
        chosen=(1000,),
    )
    return recipe_for(
        path,
        types,
        predicted_kl=0.25,
        measured_kl=Measured(0.3, math.nan, 4096),
        head=HeadChoice(label="Q4_K+Q8_0", bytes=77, accepted=1.5, depth=3, speed_up=1.2),
        text="held-out.txt",
        chunks=8,
        n_ctx=512,
        frontier=curve,
    )


@pytest.fixture(scope="module")
def matrix(head_matrix: Path) -> ImportanceMatrix:
    return ImportanceMatrix.load(head_matrix)


# --- followed ------------------------------------------------------------------------------------


def follow(
    recipe: Recipe, source: Path, imatrix: Path | None, engine_tool: EngineTool, folder: Path
) -> Path:
    """What llama-quantize makes of the command that a recipe gives."""
    rules, out = folder / "rules.txt", folder / "theirs.gguf"
    recipe.write_rules(rules)
    program, *words = recipe.command(rules, source, out, imatrix=imatrix)
    assert program == "llama-quantize"
    subprocess.run([engine_tool(program), *words, "1"], check=True, capture_output=True)
    return out


@pytest.mark.parametrize("ftype", ["Q3_K_M", "F16", "IQ2_XXS"])
def test_llama_quantize_follows_the_rules(
    ftype: str,
    model: Path,
    matrix: ImportanceMatrix,
    head_matrix: Path,
    engine_tool: EngineTool,
    tmp_path: Path,
) -> None:
    """A model with experts, a head and an output of its own; the recipe's file type counts for
    nothing but general.file_type, also where llama-quantize passes over rules by itself (F16)."""
    types = mixed(model, with_data=True)
    assert {"output.weight", "token_embd.weight"} < set(types)
    assert set(types.values()) >= {*WITH_DATA.values(), "f16", "bf16", "f32", "q4_k"}
    recipe = recipe_for(model, types, ftype=ftype)
    theirs = follow(recipe, model, head_matrix, engine_tool, tmp_path)
    ours = tmp_path / "ours.gguf"
    done = quantize(model, ours, imatrix=head_matrix, recipe=recipe, n_threads=1)
    assert done.rules == ()
    assert tensors_of(ours) == tensors_of(theirs)
    assert ours.read_bytes() == theirs.read_bytes()
    found = {name: kind.lower() for name, (kind, _) in tensors_of(ours).items()}
    kept = {name: tensor.type for name, tensor in source_of(model).items()}
    assert found == {**kept, **types}
    assert done.bits_per_weight == pytest.approx(recipe.bits_per_weight, rel=1e-15)


def test_a_tied_model_by_rules(engine_tool: EngineTool, tmp_path: Path) -> None:
    """The output is token_embd.weight there, whose type a mixture would choose as the output's."""
    source = tmp_path / "m.gguf"
    make_any(source, "qwen35moe", tied=True)
    assert "output.weight" not in source_of(source)
    recipe = recipe_for(source, mixed(source), ftype="Q4_K_M")
    theirs = follow(recipe, source, None, engine_tool, tmp_path)
    ours = tmp_path / "ours.gguf"
    quantize(source, ours, recipe=recipe, n_threads=1)
    assert ours.read_bytes() == theirs.read_bytes()
    assert tensors_of(ours)["token_embd.weight"][0].lower() == recipe.types["token_embd.weight"]


def test_names_that_rules_cannot_spell_plainly(engine_tool: EngineTool, tmp_path: Path) -> None:
    """llama-quantize lowers a rule, ends it at a blank and cuts it at "="; a name is matched alone."""
    names = ["Attn_Q.weight", "attn_q.weight", "attn q=x.weight", "a+b*(c).weight", "größe.weight"]
    source = tmp_path / "m.gguf"
    make_any(source, "llama", n_layer=1)
    reader = GGUFReader(source)
    writer = GGUFWriter(tmp_path / "odd.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name in names:
        writer.add_tensor(name, np.zeros((2, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    odd = tmp_path / "odd.gguf"
    kinds = dict(zip(names, ["q4_0", "q5_0", "q8_0", "q5_1", "q4_1"], strict=True))
    recipe = recipe_for(odd, {**dict.fromkeys(changeable(odd), "q8_0"), **kinds})
    theirs = follow(recipe, odd, None, engine_tool, tmp_path)
    found = {name: kind.lower() for name, (kind, _) in tensors_of(theirs).items()}
    assert {name: found[name] for name in names} == kinds
    # and our reader of such files takes it the same way
    assert dict(read_rules(tmp_path / "rules.txt")) == recipe.tensor_types()


def test_in_parts_and_in_a_process_of_its_own(
    model: Path, matrix: ImportanceMatrix, head_matrix: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(model, mixed(model, with_data=True))
    whole = tmp_path / "whole.gguf"
    quantize(model, whole, imatrix=head_matrix, recipe=recipe, n_threads=1)
    rewritten(model, tmp_path / "m.gguf", split=9)
    first = min(tmp_path.glob("m-*.gguf"))
    done = quantize(
        first, tmp_path / "parts.gguf", imatrix=head_matrix, recipe=recipe, n_threads=1,
        keep_split=True, isolate=True,
    )  # fmt: skip
    assert len(done.parts) > 2
    found = {name: t for part in done.parts for name, t in tensors_of(part).items()}
    assert found == tensors_of(whole)


# --- the size ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alike", [False, True])
def test_the_size_is_known_to_the_byte(
    alike: bool, model: Path, matrix: ImportanceMatrix, head_matrix: Path, tmp_path: Path
) -> None:
    types = dict.fromkeys(changeable(model), "q8_0") if alike else mixed(model, with_data=True)
    file = ModelFile.read(model)
    override = {"general.name": "of another length", "imatrix.test": True}
    ours = tmp_path / "ours.gguf"
    recipe = recipe_for(model, types)
    quantize(model, ours, imatrix=head_matrix, recipe=recipe, override_kv=override, n_threads=1)
    keys = [*override.items(), *matrix_keys(matrix, head_matrix)]
    assert quantized_bytes(file, types, keys) == ours.stat().st_size
    # a matrix from memory has no name that is written
    quantize(model, ours, imatrix=matrix, recipe=recipe, n_threads=1)
    assert quantized_bytes(file, types, matrix_keys(matrix, None)) == ours.stat().st_size
    # by an upper-case name too, and without a matrix
    plain = dict.fromkeys(changeable(model), "Q4_1")
    quantize(model, ours, recipe=recipe_for(model, plain), n_threads=1)
    assert quantized_bytes(file, plain) == ours.stat().st_size


def test_the_size_of_a_model_in_parts(model: Path, tmp_path: Path) -> None:
    """The result is one file, without the keys of parts."""
    rewritten(model, tmp_path / "m.gguf", split=9)
    first = min(tmp_path.glob("m-*.gguf"))
    ours = tmp_path / "ours.gguf"
    types = dict.fromkeys(changeable(model), "q4_0")
    quantize(first, ours, recipe=recipe_for(first, types), n_threads=1)
    assert quantized_bytes(ModelFile.read(first), types) == ours.stat().st_size


def test_the_size_with_texts_that_hold_a_zero_byte(tmp_path: Path) -> None:
    """The engine hands keys on as C has texts, and so cuts them there."""
    source = tmp_path / "m.gguf"
    make_any(source, "llama", n_layer=1, metadata={"odd.list": ["a\0bc", "d", "\0"]})
    file = ModelFile.read(source)
    types = dict.fromkeys(changeable(source), "q4_0")
    ours = tmp_path / "ours.gguf"
    quantize(source, ours, recipe=recipe_for(source, types), n_threads=1)
    assert quantized_bytes(file, types) == ours.stat().st_size


# --- the file ------------------------------------------------------------------------------------


def test_a_recipe_is_read_as_it_was_written(
    model: Path, matrix: ImportanceMatrix, tmp_path: Path
) -> None:
    recipe = full(model, mixed(model, with_data=True))
    recipe.save(tmp_path / "r.json")
    found = Recipe.load(tmp_path / "r.json")
    assert found.measured_kl is not None
    assert found.head is not None
    assert math.isnan(found.measured_kl.error)
    assert math.isnan(found.head.accepted_low)
    # NaN is not equal to itself
    for name in ("measured_kl", "head"):
        object.__setattr__(found, name, None)
        object.__setattr__(recipe, name, None)
    assert found == recipe
    assert found.frontier is not None
    assert recipe.frontier is not None
    assert found.frontier.as_data() == recipe.frontier.as_data()
    assert recipe.head_blocks == (3,)
    assert recipe.source == source_of(model)
    data = json.loads((tmp_path / "r.json").read_text("ascii"))
    assert (data["format"], data["version"]) == ("imatrix-recipe", 1)
    assert data["head"]["accepted_low"] is None


def test_types_in_any_case_and_bits_a_weight(model: Path) -> None:
    types = dict.fromkeys(changeable(model), "Q8_0")
    recipe = recipe_for(model, types, ftype="q8_0")
    assert set(recipe.types.values()) == {"q8_0"}
    assert recipe.ftype == "Q8_0"
    bits = {"f32": 32.0, "f16": 16.0}
    values = {name: math.prod(tensor.shape) for name, tensor in source_of(model).items()}
    expected = sum(
        n * (8.5 if name in types else bits[source_of(model)[name].type])
        for name, n in values.items()
    ) / sum(values.values())
    assert recipe.bits_per_weight == pytest.approx(expected, rel=1e-12)


def damaged(path: Path, change: Any) -> Path:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


def setting(*places: str, to: Any) -> Any:
    def change(data: Any) -> None:
        for place in places[:-1]:
            data = data[place]
        if to is ...:
            del data[places[-1]]
        else:
            data[places[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (setting("version", to=2), "a recipe of version 2; this imatrix reads version 1. Use the"),
        (setting("version", to=...), "a recipe of version null; this imatrix reads version 1"),
        (setting("format", to="x"), 'this is no recipe: it lacks "format": "imatrix-recipe"; `ima'),
        (setting("types", to=...), '"types" is missing; make it again'),
        (setting("types", to=[]), r'"types" is \[\], expected an object'),
        (setting("types", "output.weight", to=3), '"types.output.weight" is 3, expected a text'),
        (
            setting("types", "output.weight", to="q9_k"),
            "unknown tensor type 'q9_k' for output.weight.*If a newer imatrix made the recipe, use",
        ),
        (setting("types", "x.weight", to="q4_k"), "x.weight has a type, but it is no tensor"),
        (setting("ftype", to="Q9_K"), "unknown file type 'Q9_K'"),
        (setting("bytes", to=-1), '"bytes" is -1, expected a whole number'),
        (setting("bytes", to=True), '"bytes" is true, expected a whole number'),
        (setting("bits_per_weight", to="x"), '"bits_per_weight" is "x", expected a number'),
        (setting("predicted_kl", to=math.nan), '"predicted_kl" is NaN, expected a number'),
        (setting("measured_kl", "positions", to=...), '"measured_kl.positions" is missing'),
        (setting("head", "depth", to=1.5), '"head.depth" is 1.5, expected a whole number'),
        (setting("head_blocks", to=["3"]), "expected a list of whole numbers"),
        (setting("source", "output.weight", to=["f16", []]), "expected a type and a shape"),
        (setting("source", "output.weight", to="f16"), '"source.output.weight" is "f16"'),
        (setting("frontier", "chosen", to=3), '"frontier" is damaged: expected "chosen" as a list'),
    ],
)
def test_what_is_wrong_with_a_file_is_told(
    change: Any, told: str, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    full(model, mixed(model)).save(path)
    with pytest.raises(FormatError, match=told) as caught:
        Recipe.load(damaged(path, change))
    assert caught.value.path == str(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"GGUF\x03\0\0\0", "this is no recipe: not JSON"),
        (b"\xff\xfe", "this is no recipe: not JSON"),
        (b"[]", "this is no recipe: it lacks"),
        (b'{"format": 1, "format": 2}', '"format" is there twice'),
        (b"[" * 100_000, "this is no recipe: not JSON"),
    ],
)
def test_what_is_no_recipe_at_all(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(FormatError, match=told):
        Recipe.load(tmp_path / "r.json")
    with pytest.raises(FileNotFoundError):
        Recipe.load(tmp_path / "none.json")


def test_a_type_that_does_not_fit_the_rows(tmp_path: Path) -> None:
    source = {"a.weight": SourceTensor("f16", (96, 4))}
    about: dict[str, Any] = {
        "architecture": "llama", "model": "m", "tensors_digest": "", "source": source,
        "ftype": "Q4_K_M", "bytes": 1, "bits_per_weight": 4.0,
    }  # fmt: skip
    assert Recipe(types={"a.weight": "Q8_0"}, **about).types == {"a.weight": "q8_0"}
    with pytest.raises(
        ValueError, match=r"a\.weight as q4_k: rows of 96 values are no multiple of"
    ):
        Recipe(types={"a.weight": "q4_k"}, **about)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tensor_types": {"attn_q": "q8_0"}}, "tensor_types does not go with a recipe"),
        ({"output_tensor_type": "q8_0"}, "output_tensor_type does not go with a recipe"),
        ({"token_embedding_type": "q8_0"}, "token_embedding_type does not go with a recipe"),
        ({"pure": True}, "pure does not go with a recipe"),
        ({"quantize_output": False}, "quantize_output does not go with a recipe"),
    ],
)
def test_what_does_not_go_with_a_recipe(
    options: dict[str, Any], told: str, model: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(model, mixed(model))
    with pytest.raises(ValueError, match=told):
        quantize(model, tmp_path / "o.gguf", recipe=recipe, **options)
    with pytest.raises(ValueError, match=told):
        coverage(model, None, recipe=recipe, **options)
    assert not (tmp_path / "o.gguf").exists()


def test_without_a_recipe_a_type_is_needed(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no type to quantize to; only a recipe brings one"):
        quantize(model, tmp_path / "o.gguf")
    with pytest.raises(ValueError, match="no type to quantize to"):
        coverage(model, None)


def changed(model: Path, out: Path, name: str, what: str) -> Path:
    """The model with one tensor of another shape or type, without it, or with one more."""
    reader = GGUFReader(model)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if tensor.name == name:
            if what == "missing":
                continue
            if what == "shape":
                data = data[:-32]
            if what == "type":
                writer.add_tensor(name, data.astype(np.float32))
                continue
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    if what == "more":
        writer.add_tensor("blk.0.more.weight", np.zeros((2, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("shape", "blk.1.attn_q.weight has the shape 256 x 224, not 256 x 256"),
        ("type", "blk.1.attn_q.weight is f32, not f16"),
        ("missing", "it has no blk.1.attn_q.weight"),
        ("more", "it has blk.0.more.weight, which that one lacks"),
    ],
)
def test_a_recipe_for_another_model(what: str, told: str, model: Path, tmp_path: Path) -> None:
    recipe = recipe_for(model, mixed(model))
    other = changed(model, tmp_path / "other.gguf", "blk.1.attn_q.weight", what)
    with pytest.raises(ValueError, match=f"the recipe was made for random.gguf, and .*: {told}"):
        quantize(other, tmp_path / "o.gguf", recipe=recipe)
    with pytest.raises(ValueError, match=told):
        coverage(other, None, recipe=recipe)
    assert not (tmp_path / "o.gguf").exists()


def test_a_recipe_for_another_architecture(model: Path, tmp_path: Path) -> None:
    make_any(tmp_path / "m.gguf", "llama", n_layer=1)
    recipe = recipe_for(model, mixed(model))
    with pytest.raises(ValueError, match="its architecture is llama, not glm4moe"):
        quantize(tmp_path / "m.gguf", tmp_path / "o.gguf", recipe=recipe)


def test_a_recipe_whose_digest_is_another(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    recipe_for(model, mixed(model)).save(path)
    damaged(path, setting("tensors_digest", to="0" * 64))
    with pytest.raises(ValueError, match="tensors_digest is not that of its tensors"):
        quantize(model, tmp_path / "o.gguf", recipe=path)


def test_a_recipe_that_leaves_a_tensor_open(model: Path, tmp_path: Path) -> None:
    types = mixed(model)
    del types["blk.2.ffn_down_exps.weight"]
    told = "the recipe has no type for blk.2.ffn_down_exps.weight, which the quantizer would change"
    with pytest.raises(ValueError, match=told):
        quantize(model, tmp_path / "o.gguf", recipe=recipe_for(model, types))
    assert not (tmp_path / "o.gguf").exists()


def test_a_recipe_for_what_the_quantizer_leaves(model: Path, tmp_path: Path) -> None:
    types = {**mixed(model), "blk.1.ffn_gate_inp.weight": "q8_0"}
    with pytest.raises(
        ValueError, match=r"wants q8_0 for blk.1.ffn_gate_inp.weight, but this engi"
    ):
        quantize(model, tmp_path / "o.gguf", recipe=recipe_for(model, types))
    # as it is, it may be named
    types["blk.1.ffn_gate_inp.weight"] = source_of(model)["blk.1.ffn_gate_inp.weight"].type
    quantize(model, tmp_path / "o.gguf", recipe=recipe_for(model, types), n_threads=1)


@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "output.weight"])
def test_data_that_the_matrix_lacks(
    name: str, model: Path, head_matrix: Path, matrix: ImportanceMatrix, tmp_path: Path
) -> None:
    recipe = recipe_for(model, {**mixed(model), name: "iq2_xxs"})
    lacking = ImportanceMatrix({each: entry for each, entry in matrix.items() if each != name})
    with pytest.raises((ValueError, RuntimeError), match=name) as caught:
        quantize(model, tmp_path / "o.gguf", imatrix=lacking, recipe=recipe)
    assert "--tensor-type" not in str(caught.value)
    assert not (tmp_path / "o.gguf").exists()
    found = coverage(model, lacking, recipe=recipe)
    assert [t.name for t in found.failing] == [name]
    assert not any("--tensor-type" in fix for fix in found.fixes)


# --- the command line ----------------------------------------------------------------------------


def test_on_the_command_line(
    model: Path, matrix: ImportanceMatrix, head_matrix: Path, tmp_path: Path, run: Run
) -> None:
    recipe = recipe_for(model, mixed(model, with_data=True))
    path = tmp_path / "r.json"
    recipe.save(path)
    ours, same = tmp_path / "ours.gguf", tmp_path / "same.gguf"
    flags = ("--imatrix", head_matrix, "--recipe", path)
    done = run("quantize", model, ours, "Q3_K_M", *flags, "--threads", 1)
    assert done.status == 0, done.err
    assert "manual override" not in done.err
    quantize(model, same, imatrix=head_matrix, recipe=path, n_threads=1)
    assert ours.read_bytes() == same.read_bytes()

    done = run("quantize", model, "Q3_K_M", *flags, "--dry-run", "--json")
    assert done.status == 0, done.err
    told = {t["name"]: t["target_type"].lower() for t in json.loads(done.out)["tensors"]}
    assert {name: told[name] for name in recipe.types} == dict(recipe.types)

    done = run("check", model, head_matrix, "--recipe", path, "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["type"] == "Q3_K_M"


def test_wrong_on_the_command_line(model: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "r.json"
    recipe_for(model, mixed(model)).save(path)
    out = tmp_path / "o.gguf"
    for flags, told in (
        (["--pure"], "pure does not go with a recipe"),
        (["--tensor-type", "attn_q=q8_0"], "tensor_types does not go with a recipe"),
    ):
        done = run("quantize", model, out, "Q4_K_M", "--recipe", path, *flags)
        assert done.status == 2
        assert told in done.err
    # an output is not an input
    done = run("quantize", model, path, "Q4_K_M", "--recipe", path)
    assert done.status == 2
    assert Recipe.load(path).architecture == "glm4moe"
    path.write_text("{}")
    done = run("quantize", model, out, "Q4_K_M", "--recipe", path)
    assert done.status == 2
    assert f"{path}: this is no recipe" in " ".join(done.err.split())
    done = run("check", model)
    assert done.status == 2
    assert "--type, or --recipe" in done.err
    assert not out.exists()
