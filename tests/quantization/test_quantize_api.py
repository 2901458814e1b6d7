"""imatrix.quantize compared with llama-quantize, and everything that it refuses."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from helpers.ggufs import keys_of, tensors_of

import imatrix
from imatrix import quantize
from imatrix.entries import Entry
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.native import quantizer
from imatrix.quantization.types import FTYPES

EngineTool = Callable[[str], Path]


@pytest.fixture(scope="module")
def matrix_file(head_matrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trunk and head, a few chunks, and one expert that saw nothing."""
    path = tmp_path_factory.mktemp("quantize") / "with-head.gguf"
    matrix = ImportanceMatrix.load(head_matrix)
    entries = dict(matrix)
    name = "blk.1.ffn_up_exps.weight"
    sums, counts = matrix[name].sums.copy(), matrix[name].counts.copy()
    sums[3], counts[3] = 0, 0
    entries[name] = Entry(sums, counts)
    ImportanceMatrix(entries, datasets=["täxt.txt"], chunk_count=4, chunk_size=64).save(path)
    return path


# --- names -----------------------------------------------------------------------------------


def test_the_names_and_numbers_are_those_of_llama_quantize(engine_tool: EngineTool) -> None:
    help_ = subprocess.run(
        [engine_tool("llama-quantize"), "--help"], capture_output=True, text=True
    )
    listed = re.findall(r"^ +(\d+)  or  (\w+) *:", help_.stdout, re.MULTILINE)
    assert len(listed) > 30
    assert {name: int(number) for number, name in listed} == dict(FTYPES)


def test_the_engine_that_is_linked_knows_every_number_by_a_like_name() -> None:
    known = {number: name for name, number in quantizer.ftypes().items()}
    sizes = {"S": "small", "M": "medium", "L": "large"}
    for name, number in FTYPES.items():
        printed = re.sub(r"[ _-]", "", known[number].lower())
        k_quant, _, size = name.partition("_K_")
        if size:  # "Q4_K_M" is printed as "Q4_K - Medium"
            assert printed.startswith(f"{k_quant}k{sizes[size]}".lower()), name
        elif name == "IQ3_M":  # "IQ3_S mix - 3.66 bpw"
            assert "mix" in printed
        else:
            assert name.replace("_", "").lower() in printed, name


def test_the_tensor_types_are_those_that_ggml_can_write() -> None:
    types = quantizer.tensor_types()
    assert {"f32", "q8_0", "q4_K", "iq1_m", "mxfp4"} <= set(types)
    # types for dot products only, and plain integers, would end the process in ggml_quantize_chunk
    assert not {"q8_1", "q8_K", "i32", "f64"} & set(types)
    # ggml_quantize_requires_imatrix
    demanding = {name for name, (_, demands) in types.items() if demands}
    assert demanding == {"iq2_xxs", "iq2_xs", "iq1_s"}


# --- the same as llama-quantize ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ftype", "options", "flags"),
    [
        ("IQ2_XXS", {}, []),
        ("Q2_K_S", {}, []),
        ("Q4_K_M", {"imatrix": None}, []),
        ("Q3_K_M", {"quantize_output": False}, ["--leave-output-tensor"]),
        ("Q4_0", {"pure": True}, ["--pure"]),
        (
            "IQ2_XXS",
            {"tensor_types": {"attn_(q|k)": "q8_0", "ffn_down": "q3_K"}},
            ["--tensor-type", "attn_(q|k)=q8_0", "--tensor-type", "ffn_down=q3_K"],
        ),
        ("F32", {}, []),
    ],
)
def test_same_bytes_and_keys_as_llama_quantize(
    ftype: str,
    options: dict[str, Any],
    flags: list[str],
    model: Path,
    matrix_file: Path,
    engine_tool: EngineTool,
    tmp_path: Path,
) -> None:
    options = {"imatrix": matrix_file, **options}
    if options["imatrix"] is not None:
        flags = ["--imatrix", str(matrix_file), *flags]
    theirs = tmp_path / "theirs.gguf"
    subprocess.run(
        [engine_tool("llama-quantize"), *flags, model, theirs, ftype, "1"],
        check=True,
        capture_output=True,
    )
    ours = tmp_path / "ours.gguf"

    done = quantize(model, ours, ftype.lower(), n_threads=1, **options)

    assert tensors_of(ours) == tensors_of(theirs)
    assert keys_of(ours) == keys_of(theirs)
    assert done.path == ours
    assert done.bytes == ours.stat().st_size
    tensors = GGUFReader(theirs).tensors
    bits = 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)
    assert done.bits_per_weight == pytest.approx(bits)


def test_requantizing_gives_what_llama_quantize_gives(
    model: Path, engine_tool: EngineTool, tmp_path: Path
) -> None:
    q8, ours, theirs = (tmp_path / f"{name}.gguf" for name in ("q8", "ours", "theirs"))
    quantize(model, q8, "Q8_0")
    quantize(q8, ours, "Q4_0", allow_requantize=True)
    command = [engine_tool("llama-quantize"), "--allow-requantize", q8, theirs, "Q4_0", "1"]
    subprocess.run(command, check=True, capture_output=True)
    assert tensors_of(ours) == tensors_of(theirs)


def test_a_matrix_in_memory_gives_the_same_tensors_and_no_file_name(
    model: Path, matrix_file: Path, tmp_path: Path
) -> None:
    quantize(model, tmp_path / "a.gguf", "IQ2_XXS", imatrix=matrix_file)
    quantize(model, tmp_path / "b.gguf", "IQ2_XXS", imatrix=ImportanceMatrix.load(matrix_file))
    assert tensors_of(tmp_path / "a.gguf") == tensors_of(tmp_path / "b.gguf")
    a, b = keys_of(tmp_path / "a.gguf"), keys_of(tmp_path / "b.gguf")
    assert a.pop("quantize.imatrix.file") == str(matrix_file)[:127]
    assert a == b
    assert b["quantize.imatrix.dataset"] == "täxt.txt"
    assert b["quantize.imatrix.entries_count"] == 41
    assert b["quantize.imatrix.chunks_count"] == 4


def test_long_names_are_cut_between_characters(
    model: Path, matrix_file: Path, tmp_path: Path
) -> None:
    matrix = ImportanceMatrix(ImportanceMatrix.load(matrix_file), datasets=["ä" * 100])
    quantize(model, tmp_path / "a.gguf", "Q4_0", imatrix=matrix)
    keys = keys_of(tmp_path / "a.gguf")
    assert keys["quantize.imatrix.dataset"] == "ä" * 63  # 126 of 127 bytes
    assert "quantize.imatrix.chunks_count" not in keys  # not a known value


def test_an_existing_file_is_replaced_and_progress_reported(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    target.write_text("old")
    told: list[tuple[int, int]] = []
    quantize(model, target, "Q4_0", progress=lambda *now: told.append(now))
    n_tensors = len(tensors_of(model))
    assert told[-1] == (n_tensors, n_tensors)
    assert told == sorted(told)
    assert len(tensors_of(target)) == n_tensors
    assert list(tmp_path.iterdir()) == [target]


def test_two_at_once(model: Path, matrix_file: Path, tmp_path: Path) -> None:
    """Each sees only its own errors."""
    trunk = ImportanceMatrix.load(matrix_file).trunk

    def good(path: Path) -> object:
        return quantize(model, path, "IQ2_XXS", imatrix=matrix_file, n_threads=1)

    def bad(path: Path) -> object:
        with pytest.raises(imatrix.EngineError, match=r"Missing importance matrix for .*blk\.3\."):
            quantize(model, path, "IQ2_XXS", imatrix=trunk, n_threads=1)
        return None

    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(job, tmp_path / f"{n}.gguf") for n, job in enumerate([good, bad, good, bad])
        ]
        for job in jobs:
            job.result()
    assert tensors_of(tmp_path / "0.gguf") == tensors_of(tmp_path / "2.gguf")


# --- what it refuses -----------------------------------------------------------------------------


def refused(
    kind: type[Exception], message: str, src: Path, dst: Path, *args: Any, **kw: Any
) -> str:
    """Run it and expect an error that contains `message`; the folder must stay as it was."""
    before = {path: path.read_bytes() for path in dst.parent.iterdir() if path.is_file()}
    with pytest.raises(kind) as caught:
        quantize(src, dst, *args, **kw)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    after = {path: path.read_bytes() for path in dst.parent.iterdir() if path.is_file()}
    assert after == before
    return str(caught.value)


def test_a_head_without_data(model: Path, matrix_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    target.write_text("old")
    trunk = ImportanceMatrix.load(matrix_file).trunk
    message = (
        f"{model}: cannot quantize to IQ2_XXS: Missing importance matrix for tensor "
        "blk.3.attn_q.weight in a very low-bit quantization. Block 3 is the model's MTP head, "
        "which the importance matrix does not cover: collect it with mtp (imatrix collect --mtp)."
    )
    refused(imatrix.EngineError, message, model, target, "IQ2_XXS", imatrix=trunk)


def test_another_weight_without_data(model: Path, matrix_file: Path, tmp_path: Path) -> None:
    whole = ImportanceMatrix.load(matrix_file)
    part = ImportanceMatrix({n: e for n, e in whole.items() if n != "blk.1.attn_q.weight"})
    message = (
        "Missing importance matrix for tensor blk.1.attn_q.weight in a very low-bit quantization. "
        "The importance matrix has no entry for it. 1 tensor of a part that the matrix covers is "
        "not in it. A type that needs no data lets such pass:\n"
        "--tensor-type blk.1.attn_q.weight=q4_k"
    )
    refused(imatrix.EngineError, message, model, tmp_path / "q.gguf", "IQ2_XXS", imatrix=part)


def test_no_matrix_for_a_type_that_needs_one(model: Path, tmp_path: Path) -> None:
    message = (
        "this quantization requires an imatrix! blk.0.attn_q.weight would become iq2_xxs, which "
        "needs importance data."
    )
    refused(imatrix.EngineError, message, model, tmp_path / "q.gguf", "IQ2_XXS")


def test_quantized_already(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "q8.gguf", "Q8_0")
    message = "requantizing from type q8_0 is disabled. The model is quantized already"
    refused(imatrix.EngineError, message, tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0")


def test_sizes_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    matrix = ImportanceMatrix({"blk.0.attn_q.weight": Entry(np.ones((1, 512)), [1])})
    message = "imatrix size 512 is different from tensor size 256 for blk.0.attn_q.weight"
    refused(imatrix.EngineError, message, model, tmp_path / "q.gguf", "Q4_0", imatrix=matrix)


def test_importance_beyond_float32(model: Path, tmp_path: Path) -> None:
    matrix = ImportanceMatrix({"blk.0.attn_q.weight": Entry(np.full((1, 256), 1e300), [1])})
    message = "imatrix contains non-finite value inf"
    refused(imatrix.EngineError, message, model, tmp_path / "q.gguf", "Q4_0", imatrix=matrix)


def test_a_matrix_of_another_model(model: Path, tmp_path: Path) -> None:
    matrix = ImportanceMatrix({"blk.0.ssm_in.weight": Entry(np.ones((1, 256)), [1])})
    message = (
        f"the importance matrix names no weight of {model}: its first is 'blk.0.ssm_in.weight'"
    )
    refused(ValueError, message, model, tmp_path / "q.gguf", "Q4_0", imatrix=matrix)
    refused(
        ValueError, "'missing'", model, tmp_path / "q.gguf", "Q4_0", imatrix=ImportanceMatrix({})
    )


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"pure": True}, "token_embd.weight"),
        ({"pure": True, "tensor_types": {"token_embd": "q4_0"}}, "output.weight"),
        ({"tensor_types": {"^output": "iq2_xs"}}, "output.weight"),
        ({"tensor_types": {"embd": "IQ1_S"}}, "token_embd.weight"),
    ],
)
def test_what_would_end_the_process(
    options: dict[str, Any], weight: str, model: Path, matrix_file: Path, tmp_path: Path
) -> None:
    """ggml asserts that these types get data (ggml_quantize_chunk), but nothing asks for them
    before."""
    message = f"{weight} would get a type that needs importance data, and there are none for it."
    told = refused(
        ValueError, message, model, tmp_path / "q.gguf", "IQ2_XXS", imatrix=matrix_file, **options
    )
    assert ("process_output" in told) == (weight == "output.weight")


def test_the_advice_for_it_works(model: Path, matrix_file: Path, tmp_path: Path) -> None:
    types = {"^token_embd.weight$": "q4_K", "^output.weight$": "q4_K"}
    target = tmp_path / "q.gguf"
    quantize(model, target, "IQ2_XXS", imatrix=matrix_file, pure=True, tensor_types=types)
    assert tensors_of(target)["token_embd.weight"][0] == "Q4_K"
    # the first matching pattern counts, and output.weight may be left as it is
    types = {"token": "q8_0", "token_embd": "iq2_xxs"}
    quantize(
        model,
        target,
        "IQ2_XXS",
        imatrix=matrix_file,
        pure=True,
        tensor_types=types,
        quantize_output=False,
    )
    assert tensors_of(target)["token_embd.weight"][0] == "Q8_0"
    assert tensors_of(target)["output.weight"][0] == "F16"


def test_wrong_arguments(model: Path, matrix_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    refused(ValueError, "unknown type 'Q4_KM'; near: Q4_K_M, Q4_K", model, target, "Q4_KM")
    refused(ValueError, "unknown type 'COPY'. Types: BF16, F16", model, target, "COPY")
    refused(ValueError, "n_threads must be 1 or more, got 0", model, target, "Q4_0", n_threads=0)
    for type_, message in (
        ("q4", "unknown tensor type 'q4' for 'attn_q'; near: q4_k, q4_1, q4_0. Types: bf16"),
        ("q8_K", "unknown tensor type 'q8_K'"),
    ):
        refused(ValueError, message, model, target, "Q4_0", tensor_types={"attn_q": type_})
    empty = "a pattern for 'q8_0' is empty"
    refused(ValueError, empty, model, target, "Q4_0", tensor_types={"": "q8_0"})
    pattern = "a pattern in tensor_types is wrong: Mismatched '(' and ')' in regular expression"
    refused(ValueError, pattern, model, target, "Q4_0", tensor_types={"attn_(q": "q8_0"})


def test_files_that_will_not_do(model: Path, matrix_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    missing = tmp_path / "missing.gguf"
    refused(FileNotFoundError, "no such model file", missing, target, "Q4_0")
    refused(imatrix.ModelError, "not a model", matrix_file, target, "Q4_0")
    refused(imatrix.FormatError, "it has no sums", model, target, "Q4_0", imatrix=model)
    refused(FileNotFoundError, "missing.gguf", model, target, "Q4_0", imatrix=missing)
    nowhere = tmp_path / "nowhere" / "q.gguf"
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist; create it first"):
        quantize(model, nowhere, "Q4_0")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        quantize(model, tmp_path, "Q4_0")


def test_never_over_the_model_itself(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy(model, copy)
    link = tmp_path / "link.gguf"
    link.symlink_to(copy)
    for target in (copy, link):
        message = f"the output {target} would replace the input {copy}"
        refused(ValueError, message, copy, target, "Q4_0")


def test_a_truncated_model(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(model.read_bytes()[:-100_000])
    with pytest.raises((imatrix.ModelError, imatrix.EngineError), match=r"short\.gguf"):
        quantize(short, tmp_path / "q.gguf", "Q4_0")
    assert list(tmp_path.iterdir()) == [short]


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_full_disk(model: Path, tmp_path: Path) -> None:
    """A limit on the file size makes the engine's write fail as a full disk does."""
    script = """
        import resource, sys
        import imatrix
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            imatrix.quantize(sys.argv[1], sys.argv[2], "Q4_0")
        except OSError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), model, tmp_path / "q.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"cannot write '{tmp_path / 'q.gguf'}'" in done.stdout
    assert "is the disk full?" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_interrupting_ends_it_after_the_tensor_at_hand(
    model: Path, matrix_file: Path, tmp_path: Path
) -> None:
    """As with Ctrl-C: the exception is raised in this thread, and the engine is told to stop."""
    seen: list[int] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(done)
        if total:
            raise KeyboardInterrupt

    target = tmp_path / "q.gguf"
    with pytest.raises(KeyboardInterrupt):
        quantize(model, target, "IQ2_XXS", imatrix=matrix_file, n_threads=1, progress=interrupt)
    assert seen[-1] < len(tensors_of(model))
    assert list(tmp_path.iterdir()) == []


def test_the_engines_log_reaches_logging(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="imatrix.engine"):
        quantize(model, tmp_path / "q.gguf", "Q4_0")
    assert any("converting to q4_0" in line for line in caplog.messages)
