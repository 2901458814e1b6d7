"""The flags of llama-quantize beside the type and the rules: the same files come out."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from helpers.forge_any import make_any
from helpers.ggufs import rewritten
from helpers.running import EngineTool, Forged, Run

from imatrix import EngineError, ImportanceMatrix, ModelError, coverage, quantize

pytestmark = [
    pytest.mark.engine("src/llama-quant.cpp", "the options that change types, keys and parts"),
]


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


def keys_of(path: Path) -> dict[str, Any]:
    """Each key with its types and its value."""
    return {
        name: (field.types, field.contents())
        for name, field in GGUFReader(path).fields.items()
        if not name.startswith("GGUF.")
    }


@pytest.fixture
def theirs(engine_tool: EngineTool, tmp_path: Path) -> Any:
    """llama-quantize, which writes theirs.gguf or its parts."""

    def run(source: Path, ftype: str, *flags: object) -> Path:
        out = tmp_path / "theirs.gguf"
        command = [engine_tool("llama-quantize"), *map(str, flags), source, out, ftype, "1"]
        subprocess.run(command, check=True, capture_output=True)
        return out

    return run


@pytest.fixture
def split(model: Path, tmp_path: Path) -> list[Path]:
    """The model in several parts."""
    rewritten(model, tmp_path / "m.gguf", split=9)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    return parts


# --- types of the output and the embeddings, keys ------------------------------------------------

KEYS: dict[str, bool | int | float | str] = {
    "general.name": "an other name",
    "imatrix.test.whole": 7,
    "imatrix.test.real": 0.1,
    "imatrix.test.truth": True,
    "general.file_type": 3,
}
KEY_FLAGS = [
    word
    for text in (
        "general.name=str:an other name",
        "imatrix.test.whole=int:7",
        "imatrix.test.real=float:0.1",
        "imatrix.test.truth=bool:true",
        "general.file_type=int:3",
    )
    for word in ("--override-kv", text)
]


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize(
    ("ftype", "options", "flags"),
    [
        ("Q4_0", {"output_tensor_type": "Q8_0"}, ["--output-tensor-type", "q8_0"]),
        ("Q4_0", {"token_embedding_type": "q5_K"}, ["--token-embedding-type", "q5_k"]),
        # heeded for float types, and before a rule
        (
            "F16",
            {"output_tensor_type": "q6_k", "token_embedding_type": "bf16"},
            ["--output-tensor-type", "q6_k", "--token-embedding-type", "bf16"],
        ),
        (
            "Q4_0",
            {"override_kv": KEYS, "tensor_types": {"attn_q": "q8_0"}},
            [*KEY_FLAGS, "--tensor-type", "attn_q=q8_0"],
        ),
    ],
)
def test_the_same_file_as_llama_quantize(
    ftype: str,
    options: dict[str, Any],
    flags: list[str],
    isolate: bool,
    model: Path,
    theirs: Any,
    tmp_path: Path,
) -> None:
    expected = theirs(model, ftype, *flags)
    ours = tmp_path / "ours.gguf"
    done = quantize(model, ours, ftype, n_threads=1, isolate=isolate, **options)
    assert tensors_of(ours) == tensors_of(expected)
    assert keys_of(ours) == keys_of(expected)
    assert done.parts == (ours,)


def test_the_options_count_before_a_rule(model: Path, theirs: Any, tmp_path: Path) -> None:
    expected = theirs(
        model, "Q4_0", "--output-tensor-type", "q8_0", "--tensor-type", "^output.weight=q5_0"
    )
    ours = tmp_path / "ours.gguf"
    with pytest.warns(UserWarning, match="output_tensor_type and token_embedding_type count bef"):
        quantize(
            model,
            ours,
            "Q4_0",
            n_threads=1,
            output_tensor_type="q8_0",
            tensor_types={"^output.weight": "q5_0"},
        )
    assert tensors_of(ours) == tensors_of(expected)
    assert tensors_of(ours)["output.weight"][0] == "Q8_0"


@pytest.mark.parametrize(
    ("rules", "expected"), [({}, "Q8_0"), ({"^per_layer_token_embd": "q5_0"}, "Q5_0")]
)
def test_the_table_of_each_layer(
    rules: dict[str, str], expected: str, theirs: Any, tmp_path: Path
) -> None:
    """It goes with the token embeddings, unless a rule names it."""
    source = tmp_path / "m.gguf"
    make_any(source, "gemma4")
    flags = [word for pair in rules.items() for word in ("--tensor-type", "=".join(pair))]
    reference = theirs(source, "Q4_0", "--token-embedding-type", "q8_0", *flags)
    ours = tmp_path / "ours.gguf"
    quantize(source, ours, "Q4_0", n_threads=1, token_embedding_type="q8_0", tensor_types=rules)
    assert tensors_of(ours) == tensors_of(reference)
    assert tensors_of(ours)["token_embd.weight"][0] == "Q8_0"
    assert tensors_of(ours)["per_layer_token_embd.weight"][0] == expected


def test_a_key_of_ours_wins_over_a_float_type_with_rules(model: Path, tmp_path: Path) -> None:
    """The engine is asked for Q8_0 there, and general.file_type has to say F16, or what is given."""
    ours = tmp_path / "ours.gguf"
    rules = {"attn_q": "q8_0"}
    quantize(model, ours, "F16", n_threads=1, tensor_types=rules)
    assert keys_of(ours)["general.file_type"][1] == 1
    quantize(
        model, ours, "F16", n_threads=1, tensor_types=rules, override_kv={"general.file_type": 7}
    )
    assert keys_of(ours)["general.file_type"][1] == 7


def test_the_matrix_sets_its_own_keys(model: Path, head_matrix: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    with pytest.raises(ValueError, match="it follows from the importance matrix"):
        quantize(
            model,
            ours,
            "Q4_0",
            imatrix=head_matrix,
            override_kv={"quantize.imatrix.file": "x"},
        )
    assert not ours.exists()


def test_keys_that_the_engine_reads_the_model_by(model: Path, tmp_path: Path) -> None:
    """A result that would not load is not written, and no process ends."""
    ours = tmp_path / "ours.gguf"
    arch = keys_of(model)["general.architecture"][1]
    with pytest.raises((EngineError, ModelError)):
        quantize(model, ours, "Q4_0", override_kv={f"{arch}.block_count": 100_000})
    with pytest.raises((EngineError, ModelError)):
        quantize(model, ours, "Q4_0", override_kv={f"{arch}.embedding_length": 32})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_tensor_type": "q9"}, "unknown tensor type 'q9' for output_tensor_type"),
        ({"token_embedding_type": "q8_1"}, "unknown tensor type 'q8_1' for token_embedding_type"),
        ({"token_embedding_type": 8}, "token_embedding_type takes the name of a type as text"),
        ({"override_kv": {"": 1}}, "keys as text that is not empty"),
        ({"override_kv": {"k" * 128: 1}}, "has 128 bytes; the engine takes 127 at most"),
        ({"override_kv": {"k": "ü" * 64}}, "has 128 bytes"),
        ({"override_kv": {"k": "a\0b"}}, "holds a zero byte"),
        ({"override_kv": {"k": "\udc80"}}, "is not UTF-8"),
        ({"override_kv": {"k": -1}}, "outside 0 to 4294967295"),
        ({"override_kv": {"k": 2**32}}, "outside 0 to 4294967295"),
        ({"override_kv": {"k": float("nan")}}, "is no finite float32"),
        ({"override_kv": {"k": 1e39}}, "is no finite float32"),
        ({"override_kv": {"k": None}}, "takes int, float, bool or str, got NoneType"),
        ({"override_kv": {"general.alignment": 64}}, "always aligns to 32 bytes"),
        ({"override_kv": {"split.count": 2}}, "follows from the parts"),
        # ggml would end the process
        ({"output_tensor_type": "iq2_xxs"}, "output_tensor_type: output.weight would get iq2_xxs"),
        ({"token_embedding_type": "iq1_s"}, "token_embedding_type: token_embd.weight would get"),
    ],
)
def test_what_is_refused(
    options: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(model, tmp_path / "q.gguf", "Q4_0", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_type_whose_blocks_do_not_fit(forged: Forged, tmp_path: Path) -> None:
    """The engine looks for another one only if the type is that of the file or of a rule."""
    spec = forged("qwen35", n_embd=96)
    for option, name in (
        ("output_tensor_type", "output.weight"),
        ("token_embedding_type", "token_embd.weight"),
    ):
        if name not in spec.tensors:
            continue
        options: Any = {option: "q4_k"}
        message = f"{option}: the rows of {name} have 96 values, no multiple of the 256 of a block"
        with pytest.raises(ValueError, match=message):
            quantize(spec.path, tmp_path / "q.gguf", "Q8_0", **options)
        with pytest.raises(ValueError, match=message):
            coverage(spec.path, None, "Q8_0", **options)


def test_options_that_do_nothing(forged: Forged, model: Path) -> None:
    tied = forged("qwen35", tied=True)
    found = coverage(tied.path, None, "Q4_0", output_tensor_type="q8_0")
    assert any("there is no output.weight" in text for text in found.warnings)
    found = coverage(model, None, "Q4_0", output_tensor_type="q8_0", quantize_output=False)
    assert "output_tensor_type does nothing: output.weight is left as it is" in found.warnings


def test_check_judges_with_the_same_flags(model: Path, head_matrix: Path, run: Run) -> None:
    """llama-quantize asks no data for these two, and ggml then ends the process."""
    matrix = ImportanceMatrix.load(head_matrix)
    assert "output.weight" not in matrix
    assert coverage(model, matrix, "Q4_0").ready
    found = coverage(model, matrix, "Q4_0", output_tensor_type="iq2_xxs")
    assert [tensor.name for tensor in found.failing] == ["output.weight"]
    assert found.failing[0].cure == "collect the output"
    # a rule would not count
    assert found.overrides == {}
    assert any(
        "name a type that needs none, as --output-tensor-type q4_K" in f for f in found.fixes
    )
    done = run("check", model, head_matrix, "--type", "Q4_0", "--output-tensor-type", "IQ2_XXS")
    assert done.status == 1
    assert "would fail at output.weight" in done.out
    done = run("check", model, head_matrix, "--type", "Q4_0", "--output-tensor-type", "q8_0")
    assert done.status == 0


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolate", [False, True])
def test_the_same_parts_as_llama_quantize(
    isolate: bool, split: list[Path], head_matrix: Path, theirs: Any, tmp_path: Path
) -> None:
    theirs(split[0], "Q4_K_M", "--imatrix", head_matrix, "--keep-split")
    folder = tmp_path / "ours"
    folder.mkdir()
    done = quantize(
        split[0],
        folder / "q.gguf",
        "Q4_K_M",
        imatrix=head_matrix,
        n_threads=1,
        keep_split=True,
        isolate=isolate,
    )
    count = len(split)
    names = [f"q-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in done.parts] == names
    assert done.path == done.parts[0]
    assert done.bytes == sum(path.stat().st_size for path in done.parts)
    for ours, number in zip(done.parts, range(1, count + 1), strict=True):
        expected = tmp_path / f"theirs-{number:05d}-of-{count:05d}.gguf"
        assert tensors_of(ours) == tensors_of(expected)
        assert keys_of(ours) == keys_of(expected)


def test_a_model_in_one_file_is_part_1_of_1(model: Path, theirs: Any, tmp_path: Path) -> None:
    theirs(model, "Q8_0", "--keep-split")
    done = quantize(model, tmp_path / "q.gguf", "Q8_0", n_threads=1, keep_split=True)
    assert done.parts == (tmp_path / "q-00001-of-00001.gguf",)
    assert done.path.read_bytes() == (tmp_path / "theirs-00001-of-00001.gguf").read_bytes()


def test_parts_are_replaced_together_or_not_at_all(split: list[Path], tmp_path: Path) -> None:
    count = len(split)
    folder = tmp_path / "ours"
    folder.mkdir()
    old = [folder / f"q-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for path in old:
        path.write_text("old")

    class Stopped(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        if done > 0:
            raise Stopped

    with pytest.raises(Stopped):
        quantize(split[0], folder / "q.gguf", "Q4_K", n_threads=1, keep_split=True, progress=stop)
    assert sorted(folder.iterdir()) == old
    assert {path.read_text() for path in old} == {"old"}
    quantize(split[0], folder / "q.gguf", "Q8_0", n_threads=1, keep_split=True)
    assert sorted(folder.iterdir()) == old
    assert all(path.read_bytes()[:4] == b"GGUF" for path in old)


def in_parts(source: Path, folder: Path, shares: list[float]) -> list[Path]:
    """The model in parts, each of which has that share of the tensors; the first has the keys."""
    reader = GGUFReader(source)
    count, start = len(shares), 0.0
    parts = [folder / f"e-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
        writer = GGUFWriter(part, keys_of(source)["general.architecture"][1])
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        end = start + share * len(reader.tensors)
        for tensor in reader.tensors[round(start) : round(end)]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        start = end
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


@pytest.mark.parametrize(
    ("shares", "count"),
    [([0.0, 0.5, 0.5], 3), ([0.5, 0.5, 0.0], 2)],  # as gguf-split --no-tensor-first-split makes it
)
def test_parts_without_tensors_at_an_end(
    shares: list[float], count: int, model: Path, theirs: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    first = in_parts(model, source, shares)[0]
    theirs(first, "Q8_0", "--keep-split")
    done = quantize(first, tmp_path / "ours.gguf", "Q8_0", n_threads=1, keep_split=True)
    assert len(done.parts) == count
    assert len(list(tmp_path.glob("theirs-*"))) == len(list(tmp_path.glob("ours-*"))) == count
    for number, part in enumerate(done.parts, 1):
        expected = tmp_path / f"theirs-{number:05d}-of-{count:05d}.gguf"
        assert part.read_bytes() == expected.read_bytes()


def test_a_part_without_tensors_in_the_middle(model: Path, tmp_path: Path) -> None:
    """llama-quantize ends by a signal there: it has no place for such a part."""
    source = tmp_path / "source"
    source.mkdir()
    parts = in_parts(model, source, [0.5, 0.0, 0.5])
    message = f"{parts[1]}: it has no tensors, and the engine writes no such part"
    with pytest.raises(ModelError, match=re.escape(message)):
        quantize(parts[0], tmp_path / "q.gguf", "Q8_0", keep_split=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    done = quantize(parts[0], tmp_path / "q.gguf", "Q8_0", n_threads=1)
    assert len(GGUFReader(done.path).tensors) == len(GGUFReader(model).tensors)


def test_parts_never_go_over_the_model(split: list[Path], run: Run) -> None:
    before = [path.read_bytes() for path in split]
    out = split[0].with_name("m.gguf")
    message = f"the output {split[0]} (for the output {out}) would replace the input {split[0]}"
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(split[0], out, "Q8_0", keep_split=True)
    done = run("quantize", split[0], out, "Q8_0", "--keep-split")
    assert (done.status, message in done.err) == (2, True)
    part = split[0].with_name("q-00001-of-00003.gguf")
    done = run("quantize", split[0], part, "Q8_0", "--keep-split")
    assert done.status == 2
    assert f"expected a name such as {split[0].with_name('q.gguf')}, got the name" in done.err
    assert [path.read_bytes() for path in split] == before


# --- the command ---------------------------------------------------------------------------------


def test_a_dry_run(
    model: Path, head_matrix: Path, engine_tool: EngineTool, run: Run, tmp_path: Path
) -> None:
    flags = ["--imatrix", head_matrix, "--token-embedding-type", "q5_k", "--dry-run"]
    log = subprocess.run(
        [engine_tool("llama-quantize"), *map(str, flags), model, "Q3_K_M"],
        check=True,
        capture_output=True,
        text=True,
    )
    total = re.search(r"quant size  = +([\d.]+) MiB \(([\d.]+) BPW\)", log.stdout + log.stderr)
    assert total is not None
    real = tmp_path / "q.gguf"
    quantize(model, real, "Q3_K_M", imatrix=head_matrix, n_threads=1, token_embedding_type="q5_k")
    expected = {
        t.name: (t.tensor_type.name.lower(), int(t.n_bytes)) for t in GGUFReader(real).tensors
    }

    done = run("quantize", model, tmp_path / "no.gguf", "Q3_K_M", *flags, "--json")
    assert done.status == 0
    data = json.loads(done.out)
    assert {
        t["name"]: (t["target_type"].lower(), t["target_bytes"]) for t in data["tensors"]
    } == expected
    assert f"{data['target_bytes'] / 2**20:.2f}" == total[1]
    assert f"{data['bits_per_weight']:.2f}" == total[2]

    done = run("quantize", model, *flags, "Q3_K_M")  # without a name, as llama-quantize takes it
    assert done.status == 0
    before = sum(int(t.n_bytes) for t in GGUFReader(model).tensors)
    assert f"Q3_K_M: {before} -> {data['target_bytes']} bytes" in done.out
    assert f"-> {total[2]} bits per weight" in done.out
    assert all(name in done.out for name in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.gguf"]


def test_a_dry_run_that_would_fail(model: Path, run: Run) -> None:
    done = run("quantize", "--dry-run", model, "IQ2_XXS")
    assert done.status == 0
    assert "would stop the quantizer, first" in done.err


def test_the_flags(split: list[Path], run: Run, tmp_path: Path) -> None:
    flags = ["--keep-split", "--output-tensor-type", "Q6_K", *KEY_FLAGS, "-t", 1]
    done = run("quantize", split[0], tmp_path / "q.gguf", "Q4_0", *flags)
    assert done.status == 0
    first = tmp_path / f"q-00001-of-{len(split):05d}.gguf"
    assert f"wrote {first} and {len(split) - 1} more parts: Q4_0," in done.err
    keys = keys_of(first)
    assert keys["general.name"][1] == "an other name"
    assert keys["imatrix.test.whole"][1] == 7
    assert keys["imatrix.test.truth"][1] is True
    types = {
        t.name: t.tensor_type.name for p in tmp_path.glob("q-*") for t in GGUFReader(p).tensors
    }
    assert types["output.weight"] == "Q6_K"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output-tensor-type", "q9"], "argument --output-tensor-type: unknown tensor type 'q9'"),
        (["--token-embedding-type", "i32"], "argument --token-embedding-type: unknown tensor type"),
        (
            ["--override-kv", "a.b"],
            "argument --override-kv: expected KEY=TYPE:VALUE with a TYPE of int, float, bool or str",
        ),
        (["--override-kv", "a.b=u32:1"], "argument --override-kv: unknown type 'u32' for a.b"),
        (["--override-kv", "a.b=int:1x"], "expected a whole number for a.b, got '1x'"),
        (["--override-kv", "a.b=float:x"], "expected a number for a.b, got 'x'"),
        (["--override-kv", "a.b=bool:yes"], "expected true or false for a.b, got 'yes'"),
        (["--override-kv", "a.b=int:-1"], "argument --override-kv: override_kv: -1 for a.b is"),
        (
            ["--override-kv", "a.b=int:1", "--override-kv", "a.b=int:2"],
            "--override-kv sets a.b twice",
        ),
        (["--json"], "--json goes with --dry-run"),
    ],
)
def test_flags_that_are_wrong(
    flags: list[str], message: str, model: Path, run: Run, tmp_path: Path
) -> None:
    done = run("quantize", model, tmp_path / "q.gguf", "Q4_0", *flags)
    assert done.status == 2
    assert message in " ".join(done.err.split())
    assert list(tmp_path.iterdir()) == []
