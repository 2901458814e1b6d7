"""Coverage compared with llama-quantize: the same verdict, the same types, the same complaints.

The models' weights are zero: no verdict depends on them, and low-bit types skip zeros, for which
they would otherwise search for seconds. The search for neighbours that ggml does once per process
and type remains (iq2xs_init_impl in ggml-quants.c). It takes seconds for IQ1_S, which is why the
grid has gaps, for the architectures that it leaves to forge_any.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers import reconvert
from helpers.forge import ARCHS, Arch, ModelSpec, make_model
from helpers.forge_any import MTP_ARCHS, make_any
from helpers.ggufs import hollowed
from helpers.running import EngineTool, Forged

from imatrix import (
    Collector,
    EngineError,
    Entry,
    FormatError,
    ImportanceMatrix,
    ModelError,
    ModelFile,
    cli,
)
from imatrix import quantize as quantize_model
from imatrix.cli.commands.check import COMMAND as CHECK
from imatrix.cli.program import build_parser
from imatrix.cli.terminal import Terminal
from imatrix.entries import THIN
from imatrix.quantization.coverage import Coverage, coverage

TYPES = ["IQ1_S", "IQ2_XXS", "IQ2_M", "IQ3_XXS", "Q2_K_S", "Q4_K_M"]
DATA = ["full", "trunk", "partial", "none"]


def small(arch: Arch) -> dict[str, Any]:
    """With a head if the architecture can have one. The mixture has a special rule for 8 experts,
    which is the forge's number; 3 experts follow the general rules."""
    moe = {"n_expert": 3, "n_expert_used": 2}
    return {
        "n_ff": 256,
        "n_layer": 2,
        **(moe if arch in ("glm4moe", "hy_v3") else {}),
        **({} if arch == "llama" else {"n_nextn": 1}),
    }


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Forged:
    """make_model without the path, with all weights zero; equal arguments give the same file."""
    folder = tmp_path_factory.mktemp("hollow")
    made: dict[str, ModelSpec] = {}

    def forge(arch: Arch, **options: Any) -> ModelSpec:
        key = repr((arch, sorted(options.items())))
        if key not in made:
            made[key] = make_model(folder / f"{arch}-{len(made)}.gguf", arch, **options)
            hollowed(made[key].path)
        return made[key]

    return forge


def made_up(model: Path, data: str, *, drop: Iterable[str] = ()) -> ImportanceMatrix | None:
    """A matrix for every weight that a run could reach, or for some of them."""
    if data == "none":
        return None
    file = ModelFile.read(model)
    rng = np.random.default_rng(1)
    entries = {}
    for name, (n_in, *more) in file.tensors.items():
        block = re.match(r"blk\.(\d+)\.", name)
        if block is None or not more or not name.endswith(".weight") or "embed_tokens" in name:
            continue
        if data == "trunk" and int(block[1]) >= file.n_trunk:
            continue
        n_mat = more[1] if len(more) > 1 else 1
        counts = np.full(n_mat if "_exps" in name else 1, 500)
        if data == "partial" and len(counts) > 1:
            counts[:2] = 0, 7
        sums = rng.uniform(1, 2, (n_mat, n_in)) * np.where(counts > 0, counts, 0)[:, None]
        if name not in drop:
            entries[name] = Entry(sums, counts)
    return ImportanceMatrix(entries, chunk_count=1, chunk_size=512)


@dataclass(frozen=True)
class Run:
    """What llama-quantize did."""

    status: int
    log: str
    types: dict[str, str]

    @property
    def culprit(self) -> str:
        """The tensor at which it stopped."""
        for pattern in (
            r"Missing importance matrix for tensor (\S+)",
            r"offending tensor: (\S+)",
            r"is different from tensor size \d+ for (\S+)",
        ):
            if found := re.search(pattern, self.log):
                return found[1]
        return re.findall(r"^\[ *\d+/ *\d+\] (\S+)", self.log, re.MULTILINE)[-1]

    @property
    def unfound(self) -> set[str]:
        return set(re.findall(r"did not find weights for (\S+)", self.log))


Quantize = Callable[..., Run]


@pytest.fixture
def quantize(engine_tool: EngineTool, tmp_path: Path) -> Quantize:
    tool = engine_tool("llama-quantize")

    def run(model: Path, matrix: ImportanceMatrix | None, ftype: str, *options: str) -> Run:
        out, file = tmp_path / "out.gguf", tmp_path / "matrix.gguf"
        if matrix is not None:
            matrix.save(file)
            options = ("--imatrix", str(file), *options)
        done = subprocess.run(
            [tool, *options, model, out, ftype, "2"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
        )
        types = {}
        if done.returncode == 0:
            types = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(out).tensors}
        return Run(done.returncode, done.stdout + done.stderr, types)

    return run


def agree(found: Coverage, run: Run) -> None:
    """Checks the module's claim on one case."""
    assert found.ready == (run.status == 0), run.log[-2000:]
    order = [tensor.name for tensor in found.tensors]
    expected = {tensor.name for tensor in found.without_data if "ignored" not in tensor.detail}
    if found.ready:
        assert {t.name: t.target_type.lower() for t in found.tensors} == run.types
        assert found.failing == ()
    else:
        culprit = found.failing[0].name
        assert culprit == run.culprit
        expected &= set(order[: order.index(culprit)])
        if found.failing[0].n_counts == 0:
            expected.add(culprit)
    if found.has_matrix:
        assert run.unfound == expected


# --- the grid ------------------------------------------------------------------------------------


# Each process makes the tables of IQ1_S anew, which takes it a dozen seconds, and those of iq2_s, which
# IQ2_M and IQ3_XXS mix in if there is a matrix, in some four. So with data these are quantized to for
# one or two architectures. Where data lack is told of them as of IQ2_XXS, and which tensor gets which
# type depends on there being data at all.
ONCE = {
    "IQ1_S": ("glm4moe",),
    "IQ2_M": ("llama", "glm4moe"),
    "IQ3_XXS": ("llama", "glm4moe"),
}
GRID = [
    (arch, ftype, data)
    for arch in ARCHS
    for ftype in TYPES
    for data in DATA
    if ftype not in ONCE or data == "none" or (data == "full" and arch in ONCE[ftype])
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "ftype", "data"), GRID)
def test_the_grid(arch: Arch, ftype: str, data: str, hollow: Forged, quantize: Quantize) -> None:
    model = hollow(arch, **small(arch)).path
    matrix = made_up(model, data)
    found = coverage(model, matrix, ftype)
    agree(found, quantize(model, matrix, ftype))
    file = ModelFile.read(model)
    assert {t.name for t in found.tensors} == set(file.tensors)
    assert {t.name for t in found.head} == {n for n in file.tensors if n.startswith("blk.2.")}
    assert bool(found.head) == (arch != "llama")
    if data == "trunk" and not found.ready:
        assert all(tensor.in_head for tensor in found.failing)
    if data == "partial":
        assert all(t.n_empty == 1 and t.thinnest == (1, 7) for t in found.partial)
    assert bool(found.partial) == (data == "partial" and arch not in ("llama", "qwen35"))


@pytest.fixture(scope="module")
def any_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("any")

    def make(arch: str) -> Path:
        path = folder / f"{arch}.gguf"
        if not path.exists():
            make_any(path, arch)
            hollowed(path)
        return path

    return make


@pytest.mark.parametrize("data", ["full", "trunk", "none"])
@pytest.mark.parametrize("arch", [arch for arch in MTP_ARCHS if arch not in ARCHS])
def test_every_architecture_with_a_head(
    arch: str, data: str, any_model: Callable[[str], Path], quantize: Quantize
) -> None:
    model = any_model(arch)
    matrix = made_up(model, data)
    for ftype in ("IQ2_XXS", "Q2_K_S"):
        agree(coverage(model, matrix, ftype), quantize(model, matrix, ftype))


# --- options, sources and odd matrices -----------------------------------------------------------


@pytest.mark.parametrize("ftype", ["Q4_0", "Q3_K_M", "IQ4_XS", "IQ3_XS", "TQ2_0", "Q8_0", "F16"])
def test_types_that_ask_for_nothing(ftype: str, hollow: Forged, quantize: Quantize) -> None:
    """Their mixture depends on whether there is a matrix at all."""
    model = hollow("glm4moe", **small("glm4moe")).path
    for data in ("trunk", "none"):
        matrix = made_up(model, data)
        agree(coverage(model, matrix, ftype), quantize(model, matrix, ftype))


def test_untied_embeddings_get_a_type_of_their_own(hollow: Forged, quantize: Quantize) -> None:
    for tied in (False, True):
        model = hollow("llama", tied=tied, **small("llama")).path
        matrix = made_up(model, "full")
        found = coverage(model, matrix, "IQ2_XXS")
        agree(found, quantize(model, matrix, "IQ2_XXS"))


def test_rows_that_do_not_fit_fall_back(hollow: Forged, quantize: Quantize) -> None:
    model = hollow("llama", n_ff=320, n_layer=2).path
    matrix = made_up(model, "full")
    found = coverage(model, matrix, "IQ2_XXS")
    kinds = {tensor.name: tensor.target_type for tensor in found.tensors}
    assert kinds["blk.1.ffn_down.weight"] == "iq4_nl"
    agree(found, quantize(model, matrix, "IQ2_XXS"))


@pytest.mark.parametrize("n_in", [1, 3])
@pytest.mark.parametrize("name", ["blk.1.attn_q.weight", "token_embd.weight"])
def test_entry_of_another_size(name: str, n_in: int, hollow: Forged, quantize: Quantize) -> None:
    model = hollow("llama", **small("llama")).path
    matrix = made_up(model, "full")
    assert matrix is not None
    matrix = ImportanceMatrix({**matrix, name: Entry(np.ones((1, n_in)), [9])}, chunk_count=1)
    found = coverage(model, matrix, "Q4_K_M")
    agree(found, quantize(model, matrix, "Q4_K_M"))
    if name == "token_embd.weight":
        assert found.ready  # the engine ignores it
        assert "ignored" in next(t for t in found.without_data if t.name == name).detail
    else:
        assert [t.name for t in found.wrong_size] == [name]
        assert f"{n_in} values" in found.failing[0].detail
        assert "another model" in found.fixes[0]


@pytest.mark.parametrize("data", ["full", "none"])
def test_a_quantized_source(data: str, hollow: Forged, quantize: Quantize) -> None:
    model = hollow("llama", dtype="Q8_0", **small("llama")).path
    matrix = made_up(model, data)
    for ftype in ("IQ2_XXS", "Q4_K_M", "Q8_0"):
        for allow in (False, True):
            found = coverage(model, matrix, ftype, allow_requantize=allow)
            agree(found, quantize(model, matrix, ftype, *(["--allow-requantize"] if allow else [])))
    found = coverage(model, matrix, "Q4_K_M")
    assert {tensor.status for tensor in found.failing} == {"requantize"}
    assert "--allow-requantize" in found.fixes[0]


def test_a_source_of_the_target_type(hollow: Forged, quantize: Quantize, tmp_path: Path) -> None:
    """It is copied if there is a matrix; without one the engine still asks for data."""
    model = hollow("llama", **small("llama")).path
    assert quantize(model, made_up(model, "full"), "IQ2_XXS").status == 0
    small_one = tmp_path / "small.gguf"
    (tmp_path / "out.gguf").rename(small_one)
    for data in ("full", "none"):
        matrix = made_up(model, data)
        for options in ({}, {"allow_requantize": True}):
            found = coverage(small_one, matrix, "IQ2_XXS", **options)
            agree(found, quantize(small_one, matrix, "IQ2_XXS", *_flags(options)))
    assert found.failing[0].source_type == found.failing[0].target_type == "iq2_xxs"


def _flags(options: dict[str, Any]) -> list[str]:
    known = {"allow_requantize": "--allow-requantize", "pure": "--pure"}
    flags = [flag for option, flag in known.items() if options.get(option)]
    if options.get("quantize_output") is False:
        flags.append("--leave-output-tensor")
    for option in ("output_tensor_type", "token_embedding_type"):
        if option in options:
            flags += [f"--{option.replace('_', '-')}", options[option]]
    for pattern, kind in options.get("tensor_types", {}).items():
        flags += ["--tensor-type", f"{pattern}={kind}"]
    return flags


@pytest.mark.parametrize(
    "options",
    [
        {"quantize_output": False},
        {"tensor_types": {"attn_q": "q8_0", r"ffn_(up|gate)_exps": "iq2_xxs"}},
        {"tensor_types": {"ffn_down": "iq3_xxs"}, "quantize_output": False},
        {"pure": True, "tensor_types": {"^(token_embd|output)": "q4_k"}},
        {"output_tensor_type": "iq4_xs", "token_embedding_type": "iq2_s"},
        {"output_tensor_type": "iq2_xxs"},  # the engine ends its process at it
        {"pure": True},  # the engine ends its process at output.weight
    ],
    ids=str,
)
def test_options(options: dict[str, Any], hollow: Forged, quantize: Quantize) -> None:
    model = hollow("glm4moe", **small("glm4moe")).path
    for ftype, data in (("IQ2_XXS", "full"), ("Q4_K_M", "trunk")):
        matrix = made_up(model, data)
        found = coverage(model, matrix, ftype, **options)
        agree(found, quantize(model, matrix, ftype, *_flags(options)))
    if options == {"pure": True}:
        found = coverage(model, made_up(model, "full"), "IQ2_XXS", pure=True)
        assert found.failing[0].name == "output.weight"
        assert "^output.weight" in found.overrides


# --- what to do ----------------------------------------------------------------------------------


def pasted(fix: str) -> list[str]:
    """The options of a fix, as a shell would read them."""
    return shlex.split(fix.partition("\n")[2].replace("\\\n", " "))


@pytest.mark.parametrize(
    ("arch", "ftype"), [("glm4moe", "IQ2_XXS"), ("glm4moe", "Q2_K_S"), ("qwen35", "IQ2_XXS")]
)
def test_pasted_overrides_work(arch: Arch, ftype: str, hollow: Forged, quantize: Quantize) -> None:
    model = hollow(arch, embed_tokens=True, shared_head_head=True, **small(arch)).path
    trunk = made_up(model, "trunk")
    found = coverage(model, trunk, ftype)
    collect, never, instead = found.fixes
    assert "with --mtp: imatrix collect -m " in collect
    # the head's own embedding is never multiplied, so that --mtp does not help it
    assert [line.split("=")[0] for line in pasted(never)[1::2]] == [
        "blk.2.nextn.embed_tokens.weight"
    ]
    assert "at a loss" in instead
    run = quantize(model, trunk, ftype, *pasted(instead))
    agree(coverage(model, trunk, ftype, tensor_types=found.overrides), run)
    assert run.status == 0
    assert run.types["blk.2.nextn.eh_proj.weight"] == "q4_k"

    whole = made_up(model, "full")
    found = coverage(model, whole, ftype)
    assert [tensor.name for tensor in found.missing] == ["blk.2.nextn.embed_tokens.weight"]
    assert found.missing[0].collectable is False
    assert quantize(model, whole, ftype, *pasted(found.fixes[0])).status == 0


def test_own_overrides_come_after_the_fix(hollow: Forged, quantize: Quantize) -> None:
    """Otherwise they would override the fix."""
    model = hollow("qwen35", **small("qwen35")).path
    matrix = made_up(model, "full", drop=["blk.1.attn_q.weight"])
    own = {"attn_q": "iq2_xxs", "ffn_up": "q6_k"}
    found = coverage(model, matrix, "Q4_K_M", tensor_types=own)
    assert [tensor.name for tensor in found.failing] == ["blk.1.attn_q.weight"]
    run = quantize(model, matrix, "Q4_K_M", *pasted(found.fixes[0]))
    assert run.status == 0
    assert run.types["blk.1.attn_q.weight"] == "q4_k"
    assert run.types["blk.2.attn_q.weight"] == "iq2_xxs"
    assert run.types["blk.1.ffn_up.weight"] == "q6_k"


def test_a_gap_in_the_trunk_is_not_for_mtp(hollow: Forged) -> None:
    model = hollow("qwen35", **small("qwen35")).path
    matrix = made_up(model, "full", drop=["blk.0.ffn_up.weight"])
    found = coverage(model, matrix, "IQ2_XXS")
    assert [tensor.name for tensor in found.failing] == ["blk.0.ffn_up.weight"]
    assert not any("--mtp" in fix for fix in found.fixes)
    assert dict(found.overrides) == {"blk.0.ffn_up.weight": "q4_k"}


def test_without_a_matrix_collect(hollow: Forged) -> None:
    with_head = coverage(hollow("qwen35", **small("qwen35")).path, None, "IQ2_XXS")
    assert "--mtp" in with_head.fixes[0]
    without = coverage(hollow("llama", **small("llama")).path, None, "IQ2_XXS")
    assert without.fixes[0].startswith("Collect the data: imatrix collect -m ")


def test_a_plan_tells_what_no_run_reaches(any_model: Callable[[str], Path]) -> None:
    """deepseek32's head has an indexer that its graph never runs."""
    model = any_model("deepseek32")
    with Collector(model, n_ctx=32, n_threads=1) as collector:
        plan = collector.plan(mtp=True)
    found = coverage(model, None, "IQ2_XXS", plan=plan)
    never = {t.name for t in found.missing if t.collectable is False}
    assert any("indexer" in name for name in never)
    assert never <= set(plan.never)
    assert set(pasted(found.fixes[1])[1::2]) == {f"{n}=q4_k" for n in never}


# Each cure is done as printed: the command is run, or the rules are given, and then the check has
# to say ready.


def follow(fix: str, text: Path, tmp_path: Path) -> Path:
    """Run the command at the end of a fix; returns its output."""
    words = shlex.split(fix[fix.index("imatrix ") :].partition("\n")[0])[1:]
    out = tmp_path / "followed.gguf"
    if words[0] == "collect":
        words[words.index("TEXT")] = str(text)
        words += ["-o", str(out), "-c", "64", "--chunks", "3", "--no-ppl"]
    else:
        words[words.index("adapted.gguf")] = str(out)
    assert cli.main(words) == 0
    return out


def rules_in(fix: str) -> list[tuple[str, str]]:
    return [(p, t) for p, _, t in (flag.rpartition("=") for flag in pasted(fix)[1::2])]


def causes(found: Coverage) -> dict[str, str]:
    """Kind of tensor -> cure."""
    return {re.sub(r"^blk\.\d+\.|\.weight$", "", t.name): t.cure for t in found.missing}


def saved(matrix: ImportanceMatrix | None, path: Path) -> Path:
    assert matrix is not None
    matrix.save(path)
    return path


def test_cure_mtp(forged: Forged, prose_file: Path, tmp_path: Path) -> None:
    model = forged("qwen35", **small("qwen35")).path
    file = saved(made_up(model, "trunk"), tmp_path / "trunk.gguf")
    found = coverage(model, file, "IQ2_XXS")
    assert set(causes(found).values()) == {"collect the head"}
    assert coverage(model, follow(found.fixes[0], prose_file, tmp_path), "IQ2_XXS").ready


@pytest.mark.parametrize("data", ["full", "trunk", "none"])
def test_cure_process_output(data: str, forged: Forged, prose_file: Path, tmp_path: Path) -> None:
    """One command collects data for it and for the head, which the matrix may have and must not
    lose."""
    model = forged("qwen35", **small("qwen35")).path
    rules = [("^output.weight", "iq2_xs")]
    found = coverage(model, made_up(model, data), "IQ2_XXS", tensor_types=rules)
    assert causes(found)["output"] == "collect the output"
    if data == "full":
        assert len(found.missing) == 1
        assert found.fixes[0].startswith("Collect output.weight too: imatrix collect -m ")
    again = follow(found.fixes[0], prose_file, tmp_path)
    assert coverage(model, again, "IQ2_XXS", tensor_types=rules).ready
    # and for a model without a head
    plain = forged("llama", **small("llama")).path
    found = coverage(plain, made_up(plain, "full"), "Q4_0", tensor_types=rules)
    assert "--mtp" not in found.fixes[0]
    again = follow(found.fixes[0], prose_file, tmp_path)
    assert coverage(plain, again, "Q4_0", tensor_types=rules).ready


@pytest.mark.parametrize(
    ("drop", "kinds", "how"),
    [
        ("ffn_gate_exps", {"ffn_gate_exps"}, "gate and up take the same rows"),
        ("ffn_gate_shexp", {"ffn_gate_shexp"}, "gate and up take the same rows"),
        ("ffn_gate.weight", {"ffn_gate"}, "gate and up take the same rows"),
        ("ffn_", {"ffn_down", "ffn_up", "ffn_gate"}, "experts are apart there and merged here"),
        ("attn_q.", {"attn_q"}, "weights are fused there and apart here"),
    ],
)
def test_cure_adapt(
    drop: str, kinds: set[str], how: str, hollow: Forged, prose_file: Path, tmp_path: Path
) -> None:
    """The matrix has it in another form, made by an older program or from another conversion."""
    model = hollow("glm4moe", **small("glm4moe")).path
    whole = made_up(model, "full")
    assert whole is not None
    entries = dict(whole)
    for name in [name for name in whole if drop in name]:
        entry = entries.pop(name)
        if how.startswith("experts") and "_exps" in name:
            for expert in range(3):
                old = name.replace("_exps", f".{expert}")
                entries[old] = Entry(entry.sums[expert : expert + 1], [500])
        elif how.startswith("experts"):
            entries[name] = entry
        elif drop == "attn_q.":
            entries[name.replace("attn_q", "attn_qkv")] = entry
    file = saved(ImportanceMatrix(entries, chunk_count=1, chunk_size=512), tmp_path / "old.gguf")
    found = coverage(model, file, "IQ2_XXS")
    assert set(causes(found).values()) == {"adapt"}
    assert {kind.removesuffix("_exps").removesuffix("_shexp") for kind in causes(found)} == {
        kind.removesuffix("_exps").removesuffix("_shexp") for kind in kinds
    }
    assert how in found.fixes[0]
    assert f"imatrix adapt {file} --to {model} -o adapted.gguf" in found.fixes[0]
    again = coverage(model, follow(found.fixes[0], prose_file, tmp_path), "IQ2_XXS")
    assert again.ready
    assert not again.without_data or {t.name for t in again.without_data} == {
        "token_embd.weight",
        "output.weight",
    }
    # the other direction is reported as a loss, and works
    assert "at a loss" in found.fixes[1]
    assert coverage(model, file, "IQ2_XXS", tensor_types=rules_in(found.fixes[1])).ready
    # quantize says the same
    with pytest.raises(EngineError, match=r"has no entry for it\. .*imatrix adapt "):
        quantize_model(model, tmp_path / "q.gguf", "IQ2_XXS", imatrix=file)


def test_cure_merge(prose_file: Path, tmp_path: Path) -> None:
    """Separate experts: the engine runs no such model, so that only the other conversion gives
    data."""
    merged = make_any(tmp_path / "merged.gguf", "glm4moe")
    tensors = reconvert.experts_apart(reconvert.tensors_of(merged.path))
    apart = reconvert.write(tmp_path / "apart.gguf", merged.arch, merged.keys, tensors)
    hollowed(apart)
    for data in ("none", "trunk"):
        matrix = made_up(merged.path, data)
        if matrix is not None:  # the trunk's data, without experts
            names = [name for name in matrix if "_exps" not in name]
            matrix = ImportanceMatrix({name: matrix[name] for name in names})
        found = coverage(apart, matrix, "IQ2_XXS")
        assert causes(found)["ffn_up.0"] == "merge"
        assert set(causes(found).values()) == {"merge"}
        assert "The engine runs no model whose experts are apart" in found.fixes[0]
    whole = saved(made_up(merged.path, "full"), tmp_path / "MERGED-MATRIX.gguf")
    fix = found.fixes[0].replace("MERGED-MATRIX.gguf", str(whole))
    assert coverage(apart, follow(fix, prose_file, tmp_path), "IQ2_XXS").ready
    # with the merged matrix itself, adapt works at once
    found = coverage(apart, whole, "IQ2_XXS")
    assert set(causes(found).values()) == {"adapt"}
    assert "experts are merged there and apart here" in found.fixes[0]
    assert coverage(apart, follow(found.fixes[0], prose_file, tmp_path), "IQ2_XXS").ready


def test_cure_of_what_is_looked_up(hollow: Forged) -> None:
    model = hollow("glm4moe", embed_tokens=True, **small("glm4moe")).path
    matrix = made_up(model, "full")
    assert matrix is not None
    output = Entry(np.ones((1, ModelFile.read(model).tensors["output.weight"][0])), [500])
    matrix = ImportanceMatrix({**matrix, "output.weight": output})
    found = coverage(model, matrix, "IQ2_XXS", pure=True)
    assert causes(found) == {"token_embd": "another type", "nextn.embed_tokens": "another type"}
    assert len(found.fixes) == 1
    assert "rows are looked up in a table" in found.fixes[0]
    rules = rules_in(found.fixes[0])
    assert coverage(model, matrix, "IQ2_XXS", pure=True, tensor_types=rules).ready


def test_cure_of_what_only_a_plan_tells(
    forged: Forged, prose_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A weight that is run, but that the matrix lacks for no reason that the file shows."""
    model = forged("qwen35", **small("qwen35")).path
    lost = "blk.0.ffn_up.weight"
    file = saved(made_up(model, "full", drop=[lost]), tmp_path / "part.gguf")
    found = coverage(model, file, "IQ2_XXS")
    assert causes(found) == {"ffn_up": "find out"}
    assert "no run" not in " ".join(found.fixes).lower()
    safe = rules_in(found.fixes[0])
    assert coverage(model, file, "IQ2_XXS", tensor_types=safe).ready
    words = shlex.split(found.fixes[1][found.fixes[1].index("imatrix ") :])[1:]
    assert words[-1] == "--plan"
    assert cli.main(words) == 1
    told = capsys.readouterr().out
    printed = re.search(r"1\. Collect the data: (imatrix collect .*)", told)
    assert printed is not None
    # data of the head, if the matrix has them, are collected again
    assert printed[1].endswith("--mtp")
    assert coverage(model, follow(printed[1], prose_file, tmp_path), "IQ2_XXS").ready


def test_cure_of_what_no_graph_multiplies(
    any_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = any_model("deepseek32")
    whole = made_up(model, "full")
    assert whole is not None
    with Collector(model, n_ctx=32, n_threads=1) as collector:
        never = [name for name in collector.plan(mtp=True).never if "indexer" in name]
    part = ImportanceMatrix({name: e for name, e in whole.items() if name not in never})
    file = saved(part, tmp_path / "part.gguf")
    assert {t.cure for t in coverage(model, file, "IQ2_XXS").missing} == {"find out"}
    assert check(model, file, "--type", "IQ2_XXS", "--plan", "--json") == 1
    data = json.loads(capsys.readouterr().out)
    assert {t["cure"] for t in data["tensors"]} == {"", "another type"}
    assert "no graph multiplies it" in data["fixes"][0]
    rules = rules_in(data["fixes"][0])
    assert coverage(model, file, "IQ2_XXS", tensor_types=rules).ready


def test_cure_for_a_tensor_outside_the_blocks(
    any_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """qwen4exp's output_hc_down is multiplied, but data are collected only for blocks and the
    output."""
    model = any_model("qwen4exp")
    matrix = made_up(model, "full")
    found = coverage(model, matrix, "IQ2_XXS")
    outside = {t.name for t in found.missing if not t.name.startswith("blk.")}
    assert outside
    assert {t.cure for t in found.missing if t.name in outside} == {"another type"}
    fixes = [fix for fix in found.fixes if "for blk.* and output.weight alone" in fix]
    rules = rules_in(fixes[0])
    again = coverage(model, matrix, "IQ2_XXS", tensor_types=rules)
    assert outside.isdisjoint(t.name for t in again.missing)


def test_rules_given_are_kept_behind_a_fix(hollow: Forged, tmp_path: Path) -> None:
    """Pairs in their order, one pattern twice among them."""
    model = hollow("llama", **small("llama")).path
    own = [("attn_q", "iq2_xxs"), ("attn_q", "q8_0"), ("ffn_up", "q6_k")]
    found = coverage(model, made_up(model, "full", drop=["blk.1.attn_q.weight"]), "Q4_K_M",
                     tensor_types=own)  # fmt: skip
    assert rules_in(found.fixes[0]) == [
        ("blk.1.attn_q.weight", "q4_k"), ("attn_q", "iq2_xxs"), ("attn_q", "q8_0"),
        ("ffn_up", "q6_K"),
    ]  # fmt: skip
    assert "instead of the rules given" in found.fixes[0]


def test_a_head_that_the_engine_cannot_run(hollow: Forged) -> None:
    model = hollow("glm4moe", **{**small("glm4moe"), "n_nextn": 2}).path
    found = coverage(model, made_up(model, "trunk"), "IQ2_XXS")
    assert not any("with --mtp" in fix for fix in found.fixes)
    assert "2 MTP head blocks" in found.fixes[0]
    assert pasted(found.fixes[1])


def test_a_matrix_of_another_model(hollow: Forged, quantize: Quantize) -> None:
    model = hollow("llama", **small("llama")).path
    other = ImportanceMatrix({"some.weight": Entry(np.ones((1, 4)), [1])}, chunk_count=1)
    for ftype in ("IQ2_XXS", "Q4_K_M"):
        found = coverage(model, other, ftype)
        assert found.unused == ("some.weight",)
        assert "another one" in found.fixes[0]
        agree(found, quantize(model, other, ftype))


def test_thin_and_empty_experts(hollow: Forged) -> None:
    model = hollow("glm4moe", **small("glm4moe")).path
    matrix = made_up(model, "full")
    assert matrix is not None
    name = "blk.1.ffn_up_exps.weight"
    sums = matrix[name].sums
    for counts, status, empty, thin, thinnest in (
        ([THIN, 900, THIN], "ready", 0, 0, (0, THIN)),
        ([900, THIN - 1, 900], "partial", 0, 1, (1, THIN - 1)),
        ([0, 900, 3], "partial", 1, 1, (2, 3)),
        ([0, 0, 0], "partial", 3, 0, None),
    ):
        changed = ImportanceMatrix({**matrix, name: Entry(sums, counts)})
        found = coverage(model, changed, "IQ2_XXS")
        tensor = next(t for t in found.tensors if t.name == name)
        assert found.ready
        assert (tensor.status, tensor.n_empty, tensor.n_thin, tensor.thinnest) == (
            status,
            empty,
            thin,
            thinnest,
        )
        assert any("no rows" in fix for fix in found.fixes) == (empty > 0)


def test_sizes_are_the_results(hollow: Forged, quantize: Quantize, tmp_path: Path) -> None:
    model = hollow("qwen35", **small("qwen35")).path
    matrix = made_up(model, "full")
    found = coverage(model, matrix, "IQ2_M")
    assert quantize(model, matrix, "IQ2_M").status == 0
    for path, expected in (
        (model, found.source_bytes),
        (tmp_path / "out.gguf", found.target_bytes),
    ):
        assert sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors) == expected
    n_values = sum(int(np.prod(shape)) for shape in ModelFile.read(model).tensors.values())
    assert found.bits_per_weight == pytest.approx(8 * found.target_bytes / n_values)


# --- errors and the log --------------------------------------------------------------------------


def test_errors(hollow: Forged, tmp_path: Path) -> None:
    model = hollow("llama", **small("llama")).path
    with pytest.raises(ValueError, match="unknown type 'IQ2'"):
        coverage(model, None, "IQ2")
    with pytest.raises(ValueError, match="unknown tensor type"):
        coverage(model, None, "IQ2_XXS", tensor_types={"attn_q": "q9"})
    with pytest.raises(ValueError, match="pattern in tensor_types is wrong"):
        coverage(model, None, "IQ2_XXS", tensor_types={"(": "q8_0"})
    with pytest.raises(FileNotFoundError):
        coverage(tmp_path / "no.gguf", None, "IQ2_XXS")
    with pytest.raises(FormatError):
        coverage(model, model, "IQ2_XXS")
    broken = hollow("llama", metadata={"llama.embedding_length": None}, **small("llama")).path
    with pytest.raises(ModelError, match=r"does not load this model.*embedding_length"):
        coverage(broken, None, "IQ2_XXS")


def test_the_log_is_left_alone(hollow: Forged, caplog: pytest.LogCaptureFixture) -> None:
    """A dry run's lines are its result; fallbacks and overrides are not warnings."""
    caplog.set_level("DEBUG", "imatrix.engine")
    model = hollow("llama", n_ff=320, n_layer=2).path
    assert not coverage(model, None, "IQ2_XXS", tensor_types={"attn_q": "q8_0"}).ready
    assert caplog.records == []
    with Collector(model, n_ctx=32, n_threads=1) as collector:
        collector.plan()
    assert caplog.records  # the engine's lines are logged again


# --- the command ---------------------------------------------------------------------------------


def check(*arguments: str | os.PathLike[str]) -> int:
    args = build_parser().parse_args(["check", *map(os.fspath, arguments)])
    return CHECK.run(args, Terminal())


def test_command(hollow: Forged, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = hollow("glm4moe", **small("glm4moe")).path
    for data in ("trunk", "partial"):
        matrix = made_up(model, data)
        assert matrix is not None
        matrix.save(tmp_path / f"{data}.gguf")

    assert check(model, tmp_path / "trunk.gguf", "--type", "iq2_xxs") == 1
    out = capsys.readouterr().out
    assert out.startswith("would fail at blk.2.attn_k.weight: iq2_xxs needs importance data")
    assert "\x1b" not in out
    assert "1. Collect the head's weights with --mtp: imatrix collect -m" in out
    assert "   --tensor-type blk.2.nextn.eh_proj.weight=q4_k" in out

    assert check(model, tmp_path / "partial.gguf", "--type", "IQ2_XXS") == 0
    out = capsys.readouterr().out
    assert out.startswith("ready: ")
    assert "1 of 3 (33 %)" in out
    assert "expert 1: 7" in out

    assert check(model, "--type", "IQ2_XXS", "--plan") == 1
    out = capsys.readouterr().out
    assert "no matrix" in out
    assert "a run would collect" in out
    assert "more (--all)" in out
    assert check(model, "--type", "IQ2_XXS", "--all") == 1
    assert "more (--all)" not in capsys.readouterr().out

    assert check(model, "--type", "Q4_K_M") == 0
    assert "without a matrix" in capsys.readouterr().out


def test_command_as_json(
    hollow: Forged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hollow("glm4moe", **small("glm4moe")).path
    matrix = made_up(model, "trunk")
    assert matrix is not None
    matrix.save(tmp_path / "trunk.gguf")
    assert check(model, tmp_path / "trunk.gguf", "--type", "IQ2_XXS", "--json") == 1
    data = json.loads(capsys.readouterr().out)
    assert data["ready"] is False
    assert data["failing"][0] == "blk.2.attn_k.weight"
    assert len(data["tensors"]) == len(ModelFile.read(model).tensors)
    again = [*("--type", "IQ2_XXS", "--json")]
    for pattern, kind in data["overrides"].items():
        again += ["--tensor-type", f"{pattern}={kind}"]
    assert check(model, tmp_path / "trunk.gguf", *again) == 0
