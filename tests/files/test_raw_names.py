"""Names that are not UTF-8: a path may hold any bytes, and llama-imatrix writes them into its
file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.running import EngineTool, Run

import imatrix
from imatrix import Collector, Mixture, Source
from imatrix.cli.data import DataOut
from imatrix.entries import Entry, Provenance, TextSource
from imatrix.files.names import cut, decoded, encoded
from imatrix.formats import checkpoint
from imatrix.matrix.importance import ImportanceMatrix

pytestmark = pytest.mark.skipif(
    sys.platform in ("win32", "darwin"), reason="file systems there take Unicode only"
)

RAW = b"caf\xe9 \xff\xc3"  # Latin-1, a byte that UTF-8 never has, and a character that is cut short
NAME = os.fsdecode(RAW)
SHOWN = r"caf\xe9 \xff\xc3"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / f"folder {NAME}"
    made.mkdir()
    return made


@pytest.fixture
def files(folder: Path, model: Path, text: Path) -> tuple[Path, Path]:
    """A model and a text with such names."""
    ours = folder / f"model {NAME}.gguf", folder / f"{NAME}.txt"
    shutil.copy(model, ours[0])
    shutil.copy(text, ours[1])
    return ours


def strings(path: Path, key: str) -> list[bytes]:
    """The strings of a key, as the bytes in the file."""
    field = gguf.GGUFReader(path).fields[key]
    return [field.parts[at].tobytes() for at in field.data]


def theirs(tool: Path, *argv: object) -> str:
    done = subprocess.run(
        [os.fsencode(str(each)) for each in (tool, *argv)], capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).decode("utf-8", "replace")


SMALL = ("-c", 64, "-b", 64, "-t", 1, "--chunks", 2)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_what_llama_imatrix_wrote(
    form: str, files: tuple[Path, Path], folder: Path, run: Run, engine_tool: EngineTool
) -> None:
    model, text = files
    out = folder / f"theirs {NAME}.{form}"
    theirs(
        *(engine_tool("llama-imatrix"), "-m", model, "-f", text, "-o", out, *SMALL),
        *("--output-format", form),
    )
    assert os.fsencode(text) in out.read_bytes()
    assert ImportanceMatrix.load(out).datasets == (str(text),)
    for command in ("show", "stats"):
        done = run(command, out)
        assert done.status == 0, done.err
        assert SHOWN in done.out
    assert json.loads(run("show", out, "--json").out)["datasets"] == [str(text)]
    merged = folder / f"merged {NAME}.gguf"
    assert run("merge", out, out, "-o", merged).status == 0
    assert strings(merged, "imatrix.datasets") == [os.fsencode(text)]
    done = run("quantize", model, folder / f"q {NAME}.gguf", "Q4_0", "--imatrix", out)
    assert done.status == 0, done.err


def test_what_collect_writes(
    files: tuple[Path, Path], folder: Path, run: Run, engine_tool: EngineTool
) -> None:
    """In both formats the bytes are those that llama-imatrix writes, and it can read them."""
    model, text = files
    for isolate in ("--isolate", "--no-isolate"):
        out = folder / f"ours {NAME}{isolate}.gguf"
        done = run("collect", "-m", model, "-f", text, "-o", out, *SMALL, isolate, "-ofreq", 1)
        assert done.status == 0, done.err
        assert SHOWN in done.err
        assert strings(out, "imatrix.datasets") == [os.fsencode(text)]
        assert strings(out, "imatrix.collector.sources.names") == [os.fsencode(text)]
    old = folder / f"ours {NAME}.dat"
    assert run("convert", out, old).status == 0
    assert os.fsencode(text) in old.read_bytes()
    for ours in (out, old):
        theirs(
            *(engine_tool("llama-imatrix"), "-m", model, "--in-file", ours),
            *("-o", folder / f"again {NAME}.gguf"),
        )
        again = folder / f"again {NAME}.gguf"
        assert strings(again, "imatrix.datasets") == [os.fsencode(text)]


def test_going_on_from_a_checkpoint(files: tuple[Path, Path], folder: Path) -> None:
    model, text = files
    kept = folder / f"{NAME}.checkpoint"
    options = {"max_chunks": 3, "checkpoint": kept, "checkpoint_every": 1}
    whole = None
    for stop_at in (None, 2, None):

        def progress(now: imatrix.Progress, stop_at: int | None = stop_at) -> None:
            if now.chunks == stop_at:
                raise KeyboardInterrupt

        with Collector(model, n_ctx=64, n_threads=1) as collector:
            try:
                matrix = collector.run(text, progress=progress, **options)  # type: ignore[arg-type]
            except KeyboardInterrupt:
                assert checkpoint.read(kept).done == 2
                continue
        if whole is None:
            whole = matrix
            kept.unlink()
    assert matrix == whole


def test_sources_of_every_kind(
    files: tuple[Path, Path], folder: Path, tmp_path: Path, run: Run
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    model, text = files
    words = text.read_text(encoding="utf-8")
    texts = folder / f"texts {NAME}"
    texts.mkdir()
    (texts / f"a {NAME}.txt").write_text(words)
    (texts / f"b {NAME}.jsonl").write_text(json.dumps({"text": words}) + "\n")
    parquet.write_table(pyarrow.table({"text": [words]}), tmp_path / "c.parquet")
    (tmp_path / "c.parquet").rename(texts / f"c {NAME}.parquet")
    assert sum(1 for _ in Source(texts).documents()) == 3
    out = folder / f"{NAME}.gguf"
    done = run("collect", "-m", model, "-f", texts, "-o", out, *SMALL)
    assert done.status == 0, done.err
    assert strings(out, "imatrix.datasets") == [os.fsencode(texts)]
    done = run("collect", "-m", model, "-f", f"{texts}:1", "-f", f"{text}:2", "-o", out, *SMALL)
    assert done.status == 0, done.err
    assert strings(out, "imatrix.collector.sources.names") == [
        os.fsencode(texts),
        os.fsencode(text),
    ]
    done = run("show", out)
    assert done.out.count(SHOWN) >= 3


@pytest.mark.slow
def test_every_command(files: tuple[Path, Path], folder: Path, run: Run) -> None:
    pytest.importorskip("matplotlib")
    _, text = files
    model = folder / f"with a head {NAME}.gguf"
    shutil.copy(Path(imatrix.__file__).parent / "data" / "tiny-glm4moe-mtp.gguf", model)
    out = folder / f"matrix {NAME}.gguf"
    small = ("-c", 64, "--chunks", 1, "-t", 1)
    new = {
        end: folder / f"new {NAME}.{end}" for end in ("gguf", "dat", "html", "svg", "png", "head")
    }
    for argv in (
        ("collect", "-m", model, "-f", text, "-o", out, "--mtp", "--in-file", out, *small),
        ("show", out),
        ("stats", out, "--layers"),
        ("diff", out, out),
        ("convert", out, new["dat"]),
        ("merge", out, new["dat"], "-o", new["gguf"]),
        ("adapt", out, "--to", model, "-o", new["gguf"]),
        ("check", model, out, "--type", "Q4_K", "--plan"),
        ("quantize", model, new["gguf"], "Q4_K", "--imatrix", out),
        ("report", out, "-m", model, "--against", out, "-o", new["html"]),
        ("plot", out, "-o", new["svg"]),
        ("plot", out, "--with", out, "-o", new["png"]),
        ("evaluate", model, "-f", text, "--reference", model, *small),
        ("extract-mtp", model, "-o", new["head"], "--trunk-out", new["gguf"]),
        ("graft-mtp", new["gguf"], new["head"], "-o", folder / f"grafted {NAME}.gguf"),
        ("collect", "-m", new["gguf"], "--mtp-model", new["head"], "-f", text, "-o", out, *small),
    ):
        if argv[0] == "collect" and "--in-file" in argv:
            ImportanceMatrix({"blk.0.attn_q.weight": Entry(np.ones((1, 256)), [64])}).save(out)
        done = run(*argv)
        assert done.status == 0, (argv, done.err)
        assert NAME not in done.out + done.err
    done = run("evaluate", model, "-f", text, "--json", *small)
    assert json.loads(done.out)["model"] == str(model)
    assert NAME.encode("utf-8", "surrogateescape") not in new["html"].read_bytes()
    assert r"caf\xe9" in new["html"].read_text(encoding="utf-8").replace("<wbr>", "")


def test_errors_have_the_name(files: tuple[Path, Path], folder: Path, run: Run) -> None:
    model, text = files
    for argv in (
        ("collect", "-m", text, "-f", text, "-o", folder / "o.gguf"),
        ("quantize", text, folder / "o.gguf", "Q4_0"),
        ("quantize", model, folder / f"{NAME}/o.gguf", "Q4_0"),
        ("check", text, "--type", "Q4_0"),
        ("extract-mtp", text),
        ("show", text),
        ("show", folder / f"absent {NAME}"),
        ("merge", model, "-o", model),
    ):
        done = run(*argv)
        assert done.status == 2, (argv, done.err)
        assert SHOWN in done.err


def test_a_text_spelled_out_in_other_bytes() -> None:
    """A surrogate that stands for no byte cannot be written, and the sums are worth more than a
    name."""
    assert encoded("caf\udce9 \ud83d") == b"caf\xe9 \xef\xbf\xbd"
    assert decoded(b"caf\xe9") == "caf\udce9"
    assert cut("aé\udce9日", 3) == "aé"
    assert cut("aé\udce9日", 4) == "aé\udce9"
    assert cut("aé\udce9日", 6) == "aé\udce9"
    assert cut("aé\udce9日", 7) == "aé\udce9日"


def test_names_in_both_formats(tmp_path: Path) -> None:
    """Names of data sets come back unchanged."""
    weight = "blk.0.x.weight"
    source = TextSource(NAME, 1, 64, 0, None)
    matrix = ImportanceMatrix(
        {weight: Entry(np.ones((1, 32)), [512]), "blk.1.x.weight": Entry(np.ones((1, 32)), [512])},
        datasets=(NAME, "\ud83d"),
        chunk_count=1,
        chunk_size=512,
        provenance=Provenance(sources=(source,)),
    )
    matrix.save(tmp_path / "m.dat", format="dat")
    assert weight in ImportanceMatrix.load(tmp_path / "m.dat")
    assert ImportanceMatrix.load(tmp_path / "m.dat").datasets == ("\N{REPLACEMENT CHARACTER}",)
    plain = ImportanceMatrix({"blk.1.x.weight": matrix["blk.1.x.weight"]}, datasets=(NAME,))
    plain.save(tmp_path / "m.gguf")
    assert ImportanceMatrix.load(tmp_path / "m.gguf").datasets == (NAME,)
    assert strings(tmp_path / "m.gguf", "imatrix.datasets") == [RAW]
    assert Mixture([Source(NAME)]).names == (NAME,)


def test_csv_has_the_bytes(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    out = DataOut()
    out.write("plain,Zürich\n")
    out.write(f"{NAME},1\n")
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == "plain,Zürich\n".encode() + RAW + b",1\n"
