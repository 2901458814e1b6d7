"""What is collected from each architecture that has an MTP graph, compared with a reading of the
graphs.

The models are forged (forge_any.py). Each is collected from in a process of its own, because the
engine ends the process if one of its assertions fails. docs/make_architectures.py makes its table
from the same measurements.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.forge_any import ARCHS, MTP_ARCHS, ROOT, make_any
from helpers.measured import (
    HEAD_CROPS,
    MISSING,
    N_CHUNKS,
    NEXT_HEAD_CROPS,
    NO_HEAD_GRAPH,
    NO_TABLES,
    OUTSIDE,
    ROWS,
    ROWS_A_TOKEN,
    SEVERAL,
    VECTORS,
    Measuring,
    Quantizing,
    child,
    iq2_xxs,
    iq2_xxs_of_most,
    measure,
    never,
    variants,
)
from helpers.running import EngineTool, Forged

import imatrix
from imatrix import ImportanceMatrix, extract_mtp

MODELS = ROOT / "vendor" / "llama.cpp" / "src" / "models"


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measuring:
    folder = tmp_path_factory.mktemp("architectures")
    return cache(lambda arch: measure(arch, folder))


@pytest.fixture(scope="session")
def quantized(measured: Measuring, engine_tool: EngineTool) -> Quantizing:

    def most(arch: str) -> tuple[list[str], str]:
        return iq2_xxs_of_most(arch, measured(arch), engine_tool("llama-quantize"))

    return cache(most)


EACH = [
    pytest.param(arch, variant, id=f"{arch}-{variant}")
    for arch in MTP_ARCHS
    for variant in variants(arch)
]


def block(name: str) -> int:
    return int(name.split(".")[1])


@pytest.mark.engine(
    "src/models", "which weights a graph multiplies, how often a token, and on which rows"
)
@pytest.mark.parametrize(("arch", "variant"), EACH)
class TestCollected:
    """The expected entries follow from the tensors of the file and from the tables in
    helpers/measured.py."""

    @pytest.mark.slow
    def test_every_weight_that_is_multiplied_has_an_entry(
        self, arch: str, variant: str, measured: Measuring
    ) -> None:
        found = measured(arch)[variant]
        model = found.model
        matrices = {
            name
            for name, shape in model.shapes.items()
            if name.startswith("blk.") and (len(shape) > 1 or name.endswith(VECTORS))
        } - set(never(arch, variant))
        head = {name for name in matrices if block(name) >= model.n_layer}
        matrices |= set(OUTSIDE.get(arch, ()))
        assert set(found.head) == head
        assert set(found.trunk) == matrices - head
        assert set(found.counts) == matrices
        assert set(found.trunk_entries) == matrices - head
        assert {block(name) for name in head} == set(
            range(model.n_layer, model.n_layer + model.n_nextn)
        )
        assert found.finite

    def test_counts_are_the_rows_fed(self, arch: str, variant: str, measured: Measuring) -> None:
        found = measured(arch)[variant]
        used = found.model.keys.get(f"{arch}.expert_used_count")
        for name, counts in found.counts.items():
            # No draft begins at slot 0 of a chunk, so that head d has its first turn at slot d+1.
            head = -1 if name in OUTSIDE.get(arch, ()) else block(name) - found.model.n_layer
            rows = ROWS - N_CHUNKS * (head + 1 if head >= 0 else 0)
            if "_exps." in name:
                assert sum(counts) == rows * used, name
                assert len(counts) == found.model.keys[f"{arch}.expert_count"], name
                assert found.rows[name] == used, name
            else:
                each = ROWS_A_TOKEN.get((arch, name.split(".", 2)[-1]), 1)
                assert counts == [rows * each], name
                assert found.rows[name] == each, name

    def test_weights_that_never_run_are_named(
        self, arch: str, variant: str, measured: Measuring
    ) -> None:
        assert measured(arch)[variant].never == sorted(never(arch, variant))

    def test_trunk_is_the_same_with_and_without_the_head(
        self, arch: str, variant: str, measured: Measuring
    ) -> None:
        assert measured(arch)[variant].same_trunk

    def test_outputs_are_asked_for_where_rows_would_be_lost(
        self, arch: str, variant: str, measured: Measuring
    ) -> None:
        found = measured(arch)[variant]
        assert found.trunk_outputs is (arch in OUTSIDE)
        wanted = (
            arch in HEAD_CROPS
            or variant == "tables"  # shared_head_head is the head's LM head
            or (variant == "three" and arch in NEXT_HEAD_CROPS)
        )
        assert found.head_outputs is wanted


@pytest.mark.slow
@pytest.mark.engine("src/llama-quant.cpp", "which weights IQ2_XXS demands data for")
@pytest.mark.parametrize("arch", MTP_ARCHS)
def test_iq2_xxs_completes(arch: str, measured: Measuring, quantized: Quantizing) -> None:
    """Only the weights that no graph multiplies are left without data."""
    without, log = quantized(arch)
    assert "failed to quantize" not in log
    assert "quant size" in log
    variant = "plain" if arch in NO_TABLES else "tables"
    assert set(without) <= set(never(arch, variant))
    if variant == "tables":  # its use is a lookup, but the quantizer asks data for it
        assert f"blk.{ARCHS[arch].n_layer}.nextn.embed_tokens.weight" in without


@pytest.mark.parametrize("arch", ["deepseek4", "glm-dsa"])
def test_iq2_xxs_asks_for_data_that_cannot_be_had(
    arch: str, measured: Measuring, quantized: Quantizing, engine_tool: EngineTool
) -> None:
    log = iq2_xxs(measured(arch)["plain"], [], engine_tool("llama-quantize"))
    named = MISSING.search(log)
    assert named is not None
    assert named[1] in quantized(arch)[0]


@pytest.mark.parametrize("arch", MTP_ARCHS)
def test_iq2_xxs_with_the_trunk_alone_names_a_weight_of_the_head(
    arch: str, measured: Measuring, quantized: Quantizing, tmp_path: Path
) -> None:
    found = measured(arch)["plain"]
    # those weights that never run and that the quantizer asks data for: a rule for another one is
    # warned about
    larger = [name for name in quantized(arch)[0] if name in found.model.shapes]
    with pytest.raises(imatrix.EngineError, match=r"MTP head") as error:
        imatrix.quantize(
            found.model.path,
            tmp_path / "out.gguf",
            "IQ2_XXS",
            imatrix=ImportanceMatrix.load(found.trunk_file),
            tensor_types={f"^{re.escape(name)}$": "q8_0" for name in larger},
            n_threads=2,
        )
    named = MISSING.search(str(error.value))
    assert named is not None
    assert block(named[1]) == found.model.n_layer
    assert not (tmp_path / "out.gguf").exists()


# --- refusals ------------------------------------------------------------------------------------

_REFUSAL = """
import json, sys
from imatrix import Collector

for path, head, mtp in json.loads(sys.argv[1]):
    read = []
    def texts():
        read.append(1)
        yield [1] * 64

    answer = None
    try:
        with Collector(path, mtp_model=head or None, n_ctx=32, n_threads=1) as collector:
            collector.run(texts(), mtp=mtp)
    except ValueError as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps([answer, len(read)]))
"""


def refusals(models: Iterable[Path], *, mtp: bool = True) -> list[str]:
    """The messages of the ModelErrors that end the runs before they read any text."""
    models = list(models)
    lines = child(_REFUSAL, json.dumps([(str(model), "", mtp) for model in models])).splitlines()
    messages = []
    for model, line in zip(models, lines, strict=True):
        answer, read = json.loads(line)
        assert answer is not None, f"{model.name} ran"
        kind, message = answer
        assert kind == "ModelError", message
        assert read == 0, f"text was read before: {message}"
        assert message.startswith(str(model)), message
        messages.append(message)
    return messages


def refusal(model: Path, *, mtp: bool = True) -> str:
    return refusals([model], mtp=mtp)[0]


def norm(arch: str) -> str:
    """The norm that a block of every kind has, and that a head must have."""
    return "hc_attn_norm" if arch == "qwen4exp" else "attn_norm"


def bare(
    path: Path, arch: str, *, block_count: int = 2, n_nextn: int = 1, without: Iterable[str] = ()
) -> Path:
    """A header with the tensors that are checked before the engine is asked."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(block_count)
    writer.add_uint32(f"{arch}.nextn_predict_layers", n_nextn)
    writer.add_tokenizer_model("no_vocab")
    names = ["token_embd.weight", *(f"blk.{il}.{norm(arch)}.weight" for il in range(block_count))]
    if arch.startswith(("qwen3", "qwen4")):
        names.append("blk.0.ssm_conv1d.weight")
    for il in range(block_count - n_nextn, block_count):
        names += [f"blk.{il}.nextn.{part}.weight" for part in ("eh_proj", "enorm", "hnorm")]
    for name in names:
        if name not in without:
            writer.add_tensor(name, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestRefusals:
    @pytest.mark.parametrize("arch", NO_HEAD_GRAPH)
    def test_no_graph_for_the_head(self, arch: str, tmp_path: Path) -> None:
        message = refusal(bare(tmp_path / "m.gguf", arch))
        assert f"no graph for the MTP head of {arch}" in message

    @pytest.mark.engine("src/models", "which architectures have a graph for a head")
    def test_these_are_the_architectures_without_one(self) -> None:
        """Looks in the engine's source for loaders that make room for a head's projection, and for
        graphs."""
        if not MODELS.is_dir():
            pytest.skip("the engine's source is not here")

        def having(text: str) -> set[str]:
            return {p.stem for p in MODELS.glob("*.cpp") if text in p.read_text(encoding="utf-8")}

        graphs = having("::graph_mtp::graph_mtp(") - {"gemma4-assistant"}
        names = {"glm4-moe": "glm4moe", "hy-v3": "hy_v3", "nemotron-h-moe": "nemotron_h_moe"}
        assert {names.get(stem, stem) for stem in graphs} == set(MTP_ARCHS)
        # nemotron-h.cpp loads the head that nemotron-h-moe.cpp runs
        loaders = having("LLM_TENSOR_NEXTN_EH_PROJ") - {"nemotron-h"}
        assert loaders - graphs == set(NO_HEAD_GRAPH)

    @pytest.mark.engine("src/models", "which graphs run more than one head")
    def test_these_are_the_architectures_that_run_one_head(self) -> None:
        if not MODELS.is_dir():
            pytest.skip("the engine's source is not here")
        stems = {"glm4moe": "glm4-moe", "hy_v3": "hy-v3", "nemotron_h_moe": "nemotron-h-moe"}
        several = {
            arch
            for arch in MTP_ARCHS
            if "GGML_ASSERT(hparams.n_layer_nextn == 1"
            not in (MODELS / f"{stems.get(arch, arch)}.cpp").read_text(encoding="utf-8")
        }
        assert several == set(SEVERAL)

    @pytest.mark.parametrize("arch", [arch for arch in MTP_ARCHS if arch not in SEVERAL])
    def test_more_heads_than_the_graph_runs(self, arch: str, tmp_path: Path) -> None:
        message = refusal(bare(tmp_path / "m.gguf", arch, block_count=4, n_nextn=3))
        assert f"3 MTP head blocks, but the engine's graph for {arch} runs 1" in message

    @pytest.mark.parametrize("arch", MTP_ARCHS)
    def test_head_that_the_metadata_only_claim(self, arch: str, tmp_path: Path) -> None:
        parts = ["nextn.eh_proj", "nextn.enorm", "nextn.hnorm", norm(arch)]
        if arch == "deepseek4":
            parts.remove("nextn.eh_proj")  # without it there is no head (test_disagreeing_heads.py)
        names = [f"blk.1.{part}.weight" for part in parts]
        paths = [bare(tmp_path / f"{name}.gguf", arch, without=[name]) for name in names]
        for name, message in zip(names, refusals(paths), strict=True):
            assert "claim 1 MTP head block(s)" in message
            assert f"tensor {name} is missing" in message

    def test_last_of_several_heads(self, tmp_path: Path) -> None:
        name = "blk.3.nextn.hnorm.weight"
        path = bare(tmp_path / "m.gguf", "step35", block_count=4, n_nextn=3, without=[name])
        assert name in refusal(path)

    def test_another_tensor_of_the_head_is_the_loaders_error(self, tmp_path: Path) -> None:
        name = "blk.2.attn_q.weight"
        model = make_any(tmp_path / "m.gguf", "glm4moe", drop=[name])
        message = refusal(model.path)
        assert "could not load" in message
        assert name in message

    def test_deepseek4_with_equal_key_lengths(self, tmp_path: Path) -> None:
        lengths = {"attention.key_length": 128, "attention.value_length": 128}
        model = make_any(tmp_path / "m.gguf", "deepseek4", metadata=lengths)
        assert model.keys["deepseek4.attention.indexer.key_length"] == 128
        for mtp in (False, True):
            message = refusal(model.path, mtp=mtp)
            assert "attention.key_length and attention.indexer.key_length are both 128" in message

    @pytest.mark.parametrize("arch", ["qwen35", "qwen35moe", "qwen3next"])
    def test_hybrid_without_a_recurrent_layer(self, arch: str, tmp_path: Path) -> None:
        every = {"full_attention_interval": 1}
        model = make_any(tmp_path / "m.gguf", arch, metadata=every)
        for mtp in (False, True):
            assert f"{arch} without a recurrent layer" in refusal(model.path, mtp=mtp)

    def test_head_alone_as_the_model(self, tmp_path: Path, forged: Forged) -> None:
        extract_mtp(forged("glm4moe", n_nextn=1).path, tmp_path / "head.gguf")
        for mtp in (False, True):
            message = refusal(tmp_path / "head.gguf", mtp=mtp)
            assert "the file holds a head alone" in message
            assert "mtp_model" in message

    def test_gemma4_assistant_as_the_model(self, tmp_path: Path) -> None:
        model = make_any(tmp_path / "m.gguf", "gemma4-assistant", n_nextn=2)
        for mtp in (False, True):
            assert "gemma4-assistant is a draft head" in refusal(model.path, mtp=mtp)


# Inputs for which the engine ends the process; the reason for each is the assertion, or the tensor
# that is used without a check. "head" inputs run with mtp=True only. Most are found in the
# rehearsal (src/imatrix/engine/rehearsal.py), the others by their header.
_DENSE_HEAD = {"leading_dense_block_count": 3}
ENDS_THE_PROCESS: list[tuple[str, str, dict[str, Any]]] = [
    # GGML_ASSERT(layer.ffn_gate_inp), deepseek2: il >= n_layer_dense_lead
    *((arch, "head", {"metadata": _DENSE_HEAD}) for arch in ("deepseek2", "deepseek32")),
    *((arch, "head", {"metadata": _DENSE_HEAD}) for arch in ("glm-dsa", "glm4moe")),
    # GGML_ASSERT(hparams.n_lora_q > 0), (f_attn_temp_scale == 0.0f) in graph_mtp of deepseek2.cpp
    ("deepseek2", "head", {"metadata": {"attention.q_lora_rank": 0}}),
    ("deepseek2", "head", {"metadata": {"attention.temperature_scale": 0.1}}),
    # deepseek4.cpp:1450, :938
    ("deepseek4", "head", {"metadata": {"hash_layer_count": 4}}),
    ("deepseek4", "head", {"metadata": {"attention.compress_ratios": [0, 4, 128, 4]}}),
    # GGML_ASSERT(layer.ffn_gate && layer.ffn_down && layer.ffn_up) in mimo2.cpp
    *(("mimo2", "head", {"drop": f"blk.2.ffn_{x}.weight"}) for x in ("gate", "up", "down")),
    # optional for the loaders, but used without a check
    *(("step35", "head", {"drop": f"blk.2.ffn_{x}.weight"}) for x in ("up", "down")),
    *(("hy_v3", "head", {"drop": f"blk.2.ffn_{x}_exps.weight"}) for x in ("up", "down")),
    *(("hy_v3", "trunk", {"drop": f"blk.0.ffn_{x}.weight"}) for x in ("up", "down")),
    *(("mimo2", "trunk", {"drop": f"blk.1.ffn_{x}_exps.weight"}) for x in ("up", "down")),
    *(("step35", "trunk", {"drop": f"blk.1.ffn_{x}_exps.weight"}) for x in ("up", "down")),
    *(("qwen35", "trunk", {"drop": f"blk.0.attn_{x}.weight"}) for x in ("qkv", "gate")),
    *(("glm-dsa", "trunk", {"drop": f"blk.1.indexer.{x}.weight"}) for x in ("proj", "attn_k")),
    ("nemotron_h_moe", "trunk", {"drop": "blk.0.ssm_conv1d.bias"}),
    # a hybrid memory without layers of one kind: GGML_ASSERT(buffer) in ggml-backend.cpp
    *(
        (arch, "trunk", {"metadata": {"full_attention_interval": 9}})
        for arch in ("qwen35", "qwen35moe", "qwen3next")
    ),
    ("bailingmoe3", "trunk", {"metadata": {"attention.head_count_kv": [1, 1, 1]}}),
    ("bailingmoe3", "trunk", {"metadata": {"attention.head_count_kv": [0, 0, 1]}}),
    ("nemotron_h_moe", "trunk", {"metadata": {"attention.head_count_kv": [2, 2, 0, 2]}}),
    # hparams.is_swa_any() in llama-model.cpp
    *(
        (arch, "trunk", {"metadata": {"attention.sliding_window_pattern": [False] * 3}})
        for arch in ("cohere2moe", "mimo2", "step35")
    ),
]


@pytest.mark.parametrize(
    ("arch", "part", "options"),
    ENDS_THE_PROCESS,
    ids=[f"{arch}-{part}-{i}" for i, (arch, part, _) in enumerate(ENDS_THE_PROCESS)],
)
def test_what_would_end_the_process_is_refused(
    arch: str, part: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_any(tmp_path / "m.gguf", arch, **options)
    refusal(model.path, mtp=part == "head")


def test_mimo2_head_with_separate_q_k_and_v_is_refused(tmp_path: Path) -> None:
    assert "blk.1.attn_qkv.weight" in refusal(bare(tmp_path / "m.gguf", "mimo2"))


# --- the table -----------------------------------------------------------------------------------


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_architectures", ROOT / "docs" / "make_architectures.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_was_measured(
    measured: Measuring,
    quantized: Quantizing,
) -> None:
    """docs/architectures.md is out of date otherwise. docs/make_architectures.py makes it again."""
    generator = _generator()
    text = generator.page({arch: (measured(arch), quantized(arch)[0]) for arch in MTP_ARCHS})
    committed = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    for ours, theirs in itertools.zip_longest(text.splitlines(), committed.splitlines()):
        assert ours == theirs
    assert text == committed
