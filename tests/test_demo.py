"""`imatrix demo` does what it tells."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

import imatrix
from imatrix import cli
from imatrix.matrix import ImportanceMatrix

FILES = ["demo-F16.gguf", "demo-IQ2_XXS.gguf", "trunk-only.gguf", "with-head.gguf"]


def types_of(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}


def test_the_story_and_the_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--dir", str(folder)]) == 0
    out, err = capfd.readouterr()
    assert len(out.splitlines()) < 62  # a screen and a half
    assert "trunk-only.gguf: 29 weights: 29 trunk, 0 head\n" in out
    assert "with-head.gguf: 41 weights: 29 trunk, 12 head (block 3)\n" in out
    assert "blk.3.nextn.eh_proj.weight" in out
    flat = " ".join(out.split())
    assert (
        "refused: demo-F16.gguf: cannot quantize to IQ2_XXS: Missing importance matrix for tensor "
        "blk.3.attn_q.weight in a very low-bit quantization."
    ) in flat
    assert re.search(r"done: demo-IQ2_XXS\.gguf, .* 2\.\d\d bits per weight, head included\n", out)
    assert f"The files are in {folder}" in flat
    assert "collecting: chunk 16/16" in err
    assert "warning" not in err
    assert "error" not in err

    # and it is true
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert not ImportanceMatrix.load(folder / "trunk-only.gguf").head
    matrix = ImportanceMatrix.load(folder / "with-head.gguf")
    assert matrix.head_blocks == {3}
    assert all(entry.covered == 1.0 for entry in matrix.values())
    types = types_of(folder / "demo-IQ2_XXS.gguf")
    assert types["blk.3.nextn.eh_proj.weight"] == "IQ2_XXS"
    assert set(types) == set(types_of(folder / "demo-F16.gguf"))


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
