"""No command replaces a file that it reads: every output is tried against every input, under every
name of the input."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.forge import make_model
from helpers.ggufs import rewritten
from helpers.running import Run

import imatrix
from imatrix import Collector, Mixture, Source
from imatrix.cli.commands.completion import may_be_file
from imatrix.cli.program import COMMANDS, build_parser
from imatrix.entries import Entry
from imatrix.matrix.importance import ImportanceMatrix

OUT = "OUT"  # in a command line: the place for the output's name


@dataclass(frozen=True)
class Case:
    """A command line with a place for each output's name, and the files that it reads."""

    argv: tuple[str, ...]
    inputs: tuple[str, ...]
    # the names that it makes from the name that is given; the given name is the first
    derived: tuple[str, ...] = ("{}",)


_PARTS = ("s-00001-of-00003.gguf", "s-00002-of-00003.gguf", "s-00003-of-00003.gguf")
_HEAD = ("mtp-00001-of-00002.gguf", "mtp-00002-of-00002.gguf")
_OTHERS = ("r-00001-of-00002.gguf", "r-00002-of-00002.gguf")
_TEXTS = ("texts/a.txt", "texts/b/c.jsonl", "text.txt")

CASES = {
    "collect": Case(
        (
            *("collect", "-m", _PARTS[0], "--mtp-model", _HEAD[0], "-f", "texts:1"),
            *("-f", "text.txt:2", "--chat-template-file", "chat.jinja", "--chat-tools"),
            *("tools.json", "--in-file", "a.gguf,b.dat", "--save-frequency", "2", "-o", OUT),
        ),
        (*_PARTS, *_HEAD, *_TEXTS, "chat.jinja", "tools.json", "a.gguf", "b.dat"),
        ("{}", "{}.lock", "{}.checkpoint", "{}.checkpoint.lock", "{}-mtp", "{}.at_40"),
    ),
    "collect, workers": Case(
        (
            *("collect", "-m", "model.gguf", "-f", "text:texts", "--dask", "local:1"),
            *("--dask-model", "$HERE/" + _PARTS[0], "--dask-mtp-model", _HEAD[0], "-o", OUT),
        ),
        ("model.gguf", *_PARTS, *_HEAD, "texts/a.txt"),
        ("{}", "{}.checkpoint"),
    ),
    "quantize": Case(
        ("quantize", _PARTS[0], OUT, "Q4_K", "--imatrix", "a.gguf"), (*_PARTS, "a.gguf")
    ),
    "recipe": Case(
        (
            *("recipe", _PARTS[0], "a.gguf", "-f", "texts", "-f", "text.txt", "--size", "1M"),
            *("--chat-template-file", "chat.jinja", "--chat-tools", "tools.json", "-o", OUT),
        ),
        (*_PARTS, "a.gguf", *_TEXTS, "chat.jinja", "tools.json"),
        ("{}", "{}.measured", "{}.measured.lock"),
    ),
    "recipe, several": Case(
        (
            *("recipe", "model.gguf", "a.gguf", "-f", "text.txt", "--size", "1M,2M"),
            *("--kl", "0.1", "-o", OUT),
        ),
        ("model.gguf", "a.gguf", "text.txt"),
        ("{}", "{}-1M", "{}-2M", "{}-kl0.1", "{}.measured", "{}.measured.lock"),
    ),
    "drop-mtp": Case(("drop-mtp", _PARTS[0], "-o", OUT), _PARTS),
    "quantize, rules of a file": Case(
        ("quantize", "model.gguf", OUT, "Q4_K", "--tensor-type-file", "rules.txt"),
        ("model.gguf", "rules.txt"),
    ),
    "adapt": Case(("adapt", "a.gguf", "--to", _PARTS[0], "-o", OUT), ("a.gguf", *_PARTS)),
    "convert": Case(("convert", "a.gguf", OUT), ("a.gguf",)),
    "merge": Case(("merge", "a.gguf", "b.dat", "-o", OUT), ("a.gguf", "b.dat")),
    "plot": Case(("plot", "a.gguf", "--with", "b.dat", "-o", OUT), ("a.gguf", "b.dat")),
    "report": Case(
        ("report", "a.gguf", "-m", _PARTS[0], "--against", "b.dat", "-o", OUT),
        ("a.gguf", *_PARTS, "b.dat"),
    ),
    "extract-mtp, head": Case(("extract-mtp", _PARTS[0], "-o", OUT), _PARTS),
    "extract-mtp, trunk": Case(
        ("extract-mtp", _PARTS[0], "-o", "new.gguf", "--trunk-out", OUT), _PARTS
    ),
    "graft-mtp": Case(("graft-mtp", _OTHERS[0], _HEAD[0], "-o", OUT), (*_OTHERS, *_HEAD)),
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files that the commands read, made once; if all is well, nobody writes to them."""
    folder = tmp_path_factory.mktemp("scene")
    make_model(folder / "model.gguf", "glm4moe", n_nextn=1, n_layer=1, n_expert=2, n_vocab=300)
    names = [tensor.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors]
    for stem, n_parts in (("s", 3), ("r", 2)):
        rewritten(folder / "model.gguf", folder / f"{stem}.gguf", split=-(-len(names) // n_parts))
    # its architecture has a second matrix file; only its header is read
    for number, name in enumerate(_HEAD):
        writer = gguf.GGUFWriter(folder / name, "gemma4-assistant")
        writer.add_block_count(1)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 2)
        writer.add_tensor(f"blk.0.{'ab'[number]}", np.zeros((2, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    matrix = ImportanceMatrix(
        {"blk.0.attn_q.weight": Entry(np.ones((1, 256)), [512])}, chunk_count=1, chunk_size=512
    )
    matrix.save(folder / "a.gguf")
    matrix.save(folder / "b.dat", format="dat")
    (folder / "texts" / "b").mkdir(parents=True)
    (folder / "texts" / "a.txt").write_text("A text.\n")
    (folder / "texts" / "b" / "c.jsonl").write_text('{"text": "Another."}\n')
    (folder / "text.txt").write_text("A third.\n")
    (folder / "chat.jinja").write_text("{{ messages }}")
    (folder / "tools.json").write_text("[]")
    (folder / "rules.txt").write_text("attn_q=q8_0\n")
    for name in (*_PARTS, *_HEAD, *_OTHERS):
        assert (folder / name).is_file(), name
    return folder


def state(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def names_of(target: Path, base: Path) -> Iterator[tuple[str, str]]:
    """The ways to name a file, each with such a path; links are made in the folder `base`."""
    yield "same", str(target)
    yield "relative", os.path.relpath(target)
    yield "around", f"{target.parent}/../{target.parent.name}/{target.name}"
    link = base / "link.png"
    link.symlink_to(target)
    yield "symlink", str(link)
    twice = base / "twice.png"
    twice.symlink_to(link)
    yield "symlink to a symlink", str(twice)
    through = base / "through"
    through.symlink_to(target.parent, target_is_directory=True)
    yield "through a folder's symlink", str(through / target.name)
    hard = base / "hard.png"
    hard.hardlink_to(target)
    yield "hard link", str(hard)
    other = target.with_name(target.name.swapcase())
    if other.exists():  # only if the file system ignores case
        yield "case", str(other)


def refused(run: Run, case: Case, out: str, told: str, given: str) -> None:
    """The command ends with status 2 and names both files."""
    done = run(*(out if word == OUT else word for word in case.argv))
    assert done.status == 2, (out, done.err)
    assert re.search(r"the outputs? .* (would replace the input|are one file)", done.err), done.err
    assert told in done.err, (told, done.err)
    assert given in done.err or Path(given).name in done.err, (given, done.err)


@pytest.mark.parametrize("name", CASES)
def test_no_output_is_an_input(
    name: str, scene: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    monkeypatch.chdir(scene)
    monkeypatch.setenv("HERE", str(scene))
    before = state(scene)
    for number, given in enumerate(case.inputs):
        base = tmp_path / str(number)
        base.mkdir()
        for way, out in names_of(scene / given, base):
            if name == "plot" and Path(out).suffix != ".png":
                continue  # refused for its name before anything else is looked at, or afterwards
            if name == "collect" and given in ("a.gguf", "b.dat") and way != "hard link":
                continue  # the documentation offers --in-file X -o X
            refused(run, case, out, out, given)
        assert state(scene) == before, given


@pytest.mark.parametrize("way", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, case in CASES.items() for form in case.derived if form != "{}"],
)
def test_no_name_made_from_an_output_is_an_input(
    name: str,
    form: str,
    way: str,
    scene: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[name]
    monkeypatch.chdir(scene)
    monkeypatch.setenv("HERE", str(scene))
    before = state(scene)
    for number, given in enumerate(case.inputs):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = folder / form.format("out")
        getattr(made, way)(scene / given)
        refused(run, case, str(folder / "out"), str(made), given)
        assert state(scene) == before, given
        assert [path.name for path in folder.iterdir()] == [made.name]


def test_the_name_that_extract_chooses(scene: Path, tmp_path: Path, run: Run) -> None:
    """mtp-<name>.gguf beside the model, or in a folder, even if it is a link to the model."""
    for folder, argv in ((tmp_path / "a", ()), (tmp_path / "b", ("-o", tmp_path / "b"))):
        folder.mkdir()
        model = tmp_path / "a" / "model.gguf"
        if not model.exists():
            model.write_bytes((scene / "model.gguf").read_bytes())
        made = folder / "mtp-model.gguf"
        made.hardlink_to(model)
        done = run("extract-mtp", model, *argv)
        assert done.status == 2
        assert f"the output {made} would replace the input {model}" in done.err
        assert model.read_bytes() == (scene / "model.gguf").read_bytes()


def test_a_copy_that_is_counted_already_is_no_output(scene: Path, tmp_path: Path, run: Run) -> None:
    """--save-frequency continues to count where the earlier files stopped: OUT.at_1, a copy after
    one chunk, is never written again."""
    earlier = tmp_path / "out.at_1"
    earlier.write_bytes((scene / "a.gguf").read_bytes())
    argv = ("collect", "-m", scene / "model.gguf", "-f", scene / "text.txt", "-o", tmp_path / "out")
    done = run(*argv, "--in-file", earlier, "--save-frequency", 1, "--chunks", 1, "-c", 512)
    assert "would replace" not in done.err


def test_an_output_in_a_folder_of_texts(scene: Path, tmp_path: Path, run: Run) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("A text.")
    argv = ("collect", "-m", scene / "model.gguf", "-f")
    for source, out, bad in (
        (texts, texts / "out.txt", True),
        (f"text:{texts}", texts / "out.gguf", True),  # its lock file would be read as a text too
        (texts, tmp_path / "through" / "out.jsonl", True),
        (texts, tmp_path / "out.txt", False),
    ):
        (tmp_path / "through").unlink(missing_ok=True)
        (tmp_path / "through").symlink_to(texts)
        done = run(*argv, source, "-o", out, "--chunks", 1)
        assert (f"the output {out}" in done.err and "would be read as a text" in done.err) == bad
        assert (done.status == 2) == bad
        for made in tmp_path.glob("out.*"):
            made.unlink()
    assert [path.name for path in texts.iterdir()] == ["a.txt"]


def test_a_leftover_that_a_run_would_remove(scene: Path, tmp_path: Path, run: Run) -> None:
    """`collect` removes a half-written file that a killed run left, but not if it is an input."""
    left = tmp_path / ".out.gguf.0123456789abcdef.tmp"
    left.write_bytes((scene / "a.gguf").read_bytes())
    done = run("collect", "--in-file", left, "-o", tmp_path / "out.gguf")
    assert done.status == 2
    assert f"would replace the input {left}" in done.err
    assert left.exists()


@pytest.mark.parametrize("command", ["quantize", "merge"])
def test_a_link_into_the_cache_of_the_hub(
    command: str, scene: Path, tmp_path: Path, run: Run
) -> None:
    """The file behind the link belongs to other revisions too, whoever reads it."""
    repository = tmp_path / "models--user--model"
    blob = repository / "blobs" / ("0" * 64)
    link = repository / "snapshots" / "1" / "model-Q4_K.gguf"
    blob.parent.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    blob.write_bytes(b"of the Hub")
    link.symlink_to(Path("..", "..", "blobs", blob.name))
    argv = {
        "quantize": ("quantize", scene / "model.gguf", link, "Q4_K"),
        "merge": ("merge", scene / "a.gguf", "-o", link),
    }[command]
    done = run(*argv)
    assert done.status == 2
    assert "a file of the Hub's cache" in done.err
    assert str(link) in done.err
    assert blob.read_bytes() == b"of the Hub"


def test_an_in_file_may_be_the_output(scene: Path, tmp_path: Path, run: Run) -> None:
    """This is the only exception, under any spelling of the name."""
    total = tmp_path / "total.gguf"
    total.write_bytes((scene / "a.gguf").read_bytes())
    (tmp_path / "link.gguf").symlink_to(total)
    for given in (total, tmp_path / "link.gguf"):
        done = run("collect", "--in-file", given, "--in-file", scene / "a.gguf", "-o", total)
        assert done.status == 0, done.err
    assert ImportanceMatrix.load(total).chunk_count == 3


def test_two_outputs_of_one_command(scene: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "link.gguf").symlink_to("new.gguf")  # to a file that does not exist yet
    for head, trunk in (("new.gguf", "new.gguf"), ("new.gguf", "link.gguf")):
        done = run(
            "extract-mtp",
            scene / "model.gguf",
            "-o",
            tmp_path / head,
            "--trunk-out",
            tmp_path / trunk,
        )
        assert done.status == 2
        assert f"{tmp_path / head} and {tmp_path / trunk} are one file" in done.err
    out = tmp_path / "out.gguf"
    (tmp_path / "out.gguf.checkpoint").symlink_to(out)
    done = run("collect", "-m", scene / "model.gguf", "-f", scene / "text.txt", "-o", out)
    assert done.status == 2
    assert "are one file" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.gguf", "out.gguf.checkpoint"]


def test_standard_input_that_is_the_output(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text.")
    with text.open(encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        done = run("collect", "-m", scene / "model.gguf", "-f", "-", "-o", text)
    assert done.status == 2
    assert f"the output {text} would replace the input standard input" in done.err
    assert text.read_text() == "A text."


def test_the_demo_writes_over_none_of_its_own_files(tmp_path: Path, run: Run) -> None:
    from imatrix import demo
    from imatrix.cli.commands.demo import FILES

    model = hashlib.sha256(demo.MODEL.read_bytes()).hexdigest()
    for name in FILES:
        (tmp_path / name).symlink_to(demo.MODEL)
        done = run("demo", "--dir", tmp_path)
        assert done.status == 2
        assert f"{tmp_path / name} (for the output {tmp_path}) would replace the input" in done.err
        (tmp_path / name).unlink()
    assert hashlib.sha256(demo.MODEL.read_bytes()).hexdigest() == model


# --- from Python -------------------------------------------------------------


def _quantize(scene: Path, out: Path) -> None:
    imatrix.quantize(scene / _PARTS[0], out, "Q4_K", imatrix=scene / "a.gguf")


def _extract(scene: Path, out: Path) -> None:
    imatrix.extract_mtp(scene / _PARTS[0], out)


def _extract_trunk(scene: Path, out: Path) -> None:
    imatrix.extract_mtp(scene / _PARTS[0], scene / "new.gguf", trunk_out=out)


def _graft(scene: Path, out: Path) -> None:
    imatrix.graft_mtp(scene / _PARTS[0], scene / _OTHERS[0], out)


def _convert(scene: Path, out: Path) -> None:
    imatrix.convert(scene / "a.gguf", out)


def _checkpoint(scene: Path, out: Path) -> None:
    texts = Mixture([Source(scene / "texts"), Source(scene / "text.txt")])
    with Collector(scene / _PARTS[0]) as collector:
        collector.run(texts, checkpoint=out, restart=True)


@pytest.mark.parametrize(
    ("call", "inputs"),
    [
        (_quantize, (*_PARTS, "a.gguf")),
        (_extract, _PARTS),
        (_extract_trunk, _PARTS),
        (_graft, (*_PARTS, *_OTHERS)),
        (_convert, ("a.gguf",)),
        (_checkpoint, (*_PARTS, *_TEXTS)),
    ],
)
def test_from_python(
    call: Callable[[Path, Path], None],
    inputs: tuple[str, ...],
    scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(scene)
    before = state(scene)
    for number, given in enumerate(inputs):
        base = tmp_path / str(number)
        base.mkdir()
        for way, out in names_of(scene / given, base):
            with pytest.raises(ValueError, match="would replace the input") as error:
                call(scene, Path(out))
            assert Path(given).name in str(error.value), way
        assert state(scene) == before, given


def test_from_python_a_lock_file(scene: Path, tmp_path: Path) -> None:
    before = state(scene)
    (tmp_path / "checkpoint.lock").hardlink_to(scene / _PARTS[1])
    with (
        Collector(scene / _PARTS[0]) as collector,
        pytest.raises(ValueError, match=r"checkpoint\.lock \(for the output .* would replace"),
    ):
        collector.run("A text.", checkpoint=tmp_path / "checkpoint")
    assert state(scene) == before


# --- every command is known --------------------------------------------------


def _arguments() -> Iterator[tuple[str, argparse.Action]]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, parser in action.choices.items():
                for each in parser._actions:
                    if each.nargs != 0:
                        yield command, each


def test_every_argument_that_may_be_a_file_is_declared() -> None:
    """An argument that is not declared would be compared with nothing."""
    written = {"output", "dst", "trunk_out", "dir", "measured", "keep"}
    values = {"type", "tensor_type", "dask", "weight"}  # only the completion treats these as files
    commands = set()
    for command, action in _arguments():
        commands.add(command)
        if not may_be_file(action) or action.dest in values:
            continue
        known = COMMANDS[command].files
        declared = {*known.models, *known.texts, *known.files}
        assert (action.dest in declared) != (action.dest in written), (command, action.dest)
    assert commands == set(COMMANDS)
