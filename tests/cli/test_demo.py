"""`imatrix demo` does what it says, and the README shows what it says."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from helpers.running import EngineTool, run_tool

import imatrix
from imatrix import cli, demo
from imatrix.cli.commands import demo as command
from imatrix.matrix.importance import ImportanceMatrix

README = Path(__file__).resolve().parents[2] / "README.md"
FILES = [
    "head-IQ2_XXS-collected.gguf",
    "head-IQ2_XXS-flat.gguf",
    "trunk-only.gguf",
    "with-head.gguf",
]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few chunks show as much as all of them."""
    monkeypatch.setattr(command, "_CALIBRATION_CHUNKS", 4)
    monkeypatch.setattr(command, "_HELD_OUT_CHUNKS", 3)


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


def normalized(text: str) -> str:
    """Without whatever may change between runs and with the width of a terminal: numbers, lines and
    spaces, rules, and whether a difference is one."""
    text = re.sub(r"collected is better|flat is better|no difference shown", "~", text)
    text = re.sub(r"[+-]?\d+(\.\d+)?%?", "#", text)
    return " ".join(text.replace("─", " ").split())


@pytest.mark.slow
def test_the_story_the_files_and_the_readme(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], engine_tool: EngineTool
) -> None:
    folder = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--dir", str(folder)]) == 0
    out, err = capfd.readouterr()
    assert "collecting: chunk 4/4" in err
    assert "warning" not in err
    assert "error" not in err
    assert f"The files are in {folder}" in " ".join(out.split())

    # the output has every part of the README's block, in this order
    block = re.search(
        r"^## `imatrix demo`$.*?^```text\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S
    )
    assert block is not None
    told = normalized(out)
    for part in block[1].split("…\n"):
        _, found, told = told.partition(normalized(part))
        assert found, f"{part}\nis not in, or not after what the README has before it:\n{out}"

    # each file is of the kind that its name says
    assert sorted(path.name for path in folder.iterdir()) == FILES
    whole = ImportanceMatrix.load(folder / "with-head.gguf")
    head = max(whole.head_blocks)
    assert not ImportanceMatrix.load(folder / "trunk-only.gguf").head
    assert dict(ImportanceMatrix.load(folder / "trunk-only.gguf")) == dict(whole.trunk)

    # the engine's own program makes the same tensors from it, and refuses for the same reason
    def quantized(matrix: Path, ok: bool) -> str:
        return run_tool(
            engine_tool("llama-quantize"), "--imatrix", matrix,
            "--tensor-type", rf"^blk\.{head}\.=iq2_xxs", demo.MODEL, tmp_path / "theirs.gguf",
            "Q8_0", ok=ok,
        )  # fmt: skip

    quantized(folder / "with-head.gguf", True)
    theirs = tensors_of(tmp_path / "theirs.gguf")
    assert theirs == tensors_of(folder / "head-IQ2_XXS-collected.gguf")
    assert theirs[f"blk.{head}.nextn.eh_proj.weight"][0] == "IQ2_XXS"
    flat = tensors_of(folder / "head-IQ2_XXS-flat.gguf")
    differing = {name for name in theirs if theirs[name] != flat[name]}
    assert differing
    assert all(name.startswith(f"blk.{head}.") for name in differing)
    reason = re.search(
        r"Missing importance matrix for tensor \S+ in a very low-bit quantization",
        quantized(folder / "trunk-only.gguf", False),
    )
    assert reason is not None
    assert f"none: {demo.MODEL.name}: cannot quantize to Q8_0: {reason[0]}." in " ".join(
        out.split()
    )

    # and the figures are those in the files
    for name in ("flat", "collected"):
        found = imatrix.evaluate(
            folder / f"head-IQ2_XXS-{name}.gguf",
            demo.HELD_OUT,
            reference=demo.MODEL,
            max_chunks=3,
        )
        assert found.head_nll is not None
        assert found.head_kl is not None
        assert re.search(
            rf"^ *{name}( ones)? +{found.head_nll.value:.4f} +{found.head_kl.value:.4f} "
            rf"+{found.draft[0].value:.2%} ",
            out,
            re.M,
        )


@pytest.mark.parametrize("keep", [False, True])
def test_the_temporary_folder(
    keep: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main(["demo", *(["--keep"] if keep else [])]) == 0
    out = capfd.readouterr().out
    left = list(tmp_path.iterdir())
    if keep:
        assert sorted(path.name for path in left[0].iterdir()) == FILES
        assert f"The files are in {left[0]}" in " ".join(out.split())
    else:
        assert left == []
        assert "The files are in" not in out


def test_it_fails_when_the_engine_takes_the_trunk_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(imatrix, "quantize", lambda *_args, **_kw: None)
    assert cli.main(["demo", "--dir", str(tmp_path)]) == 1
    told = "error: the engine took a matrix without the head, which it should refuse\n"
    assert told in capfd.readouterr().err


def test_it_fails_when_the_engine_refuses_the_head_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: Any, **_kw: Any) -> None:
        raise imatrix.EngineError("no")

    monkeypatch.setattr(imatrix, "quantize", refuse)
    assert cli.main(["demo", "--dir", str(tmp_path)]) == 1
    assert capfd.readouterr().err.endswith("error: no\n")


def test_a_folder_that_cannot_be(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--dir", str(tmp_path / "file")]) != 0
    assert f"error: {tmp_path / 'file'}: " in capfd.readouterr().err
