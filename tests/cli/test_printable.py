"""Text from a file never acts on the terminal: no command, no error message, no progress bar lets
it."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers.forge import make_model
from helpers.running import Run

from imatrix import cli
from imatrix.cli import program
from imatrix.cli.data import DataOut
from imatrix.cli.logs import show_logs
from imatrix.cli.program import build_parser
from imatrix.cli.progress import CollectProgress, StepProgress
from imatrix.cli.terminal import Terminal, Text
from imatrix.entries import Entry, LeftOut, Provenance, TextSource
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.words import printable

# A title, colours (of C0 and of C1), a cleared screen, a changed direction of writing, codes that
# go up a line or write over it, Rich's markup and emoji, and a forged message on a line of its own.
EVIL = (
    "\x1b]0;owned\x07\x1b[38;5;201m\x9b38;5;201m\x1b[2J\u202e\u2066\x1b[3A\r\x08\x7f\u2028"
    "[bold red]:skull:[blink]\nerror: forged"
)
SHOWN = r"\x1b]0;owned\x07\x1b[38;5;201m\x9b38;5;201m\x1b[2J\u202e\u2066\x1b[3A\r\x08\x7f\u2028"
SHOWN += r"[bold red]:skull:[blink]\nerror: forged"
MARKUP = EVIL + "[/bold]"  # ends what never began, which Rich refuses; no file can have this name

# What Rich itself writes to a terminal: styles, a hidden and a shown cursor, a line up, a deleted
# line.
_RICH = re.compile(r"\x1b\[(?:[0-9;]*m|\?25[lh]|1A|2K)|\r")


def acting(text: str) -> set[str]:
    """The characters of a text that a terminal would act on."""
    return {
        each
        for each in text
        if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp") and each not in "\n\t"
    }


def test_the_characters() -> None:
    """All characters that Unicode calls controls, formats, surrogates and line ends, by the
    database of this Python."""
    for code in range(0x110000):
        each = chr(code)
        bad = unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        if bad:
            assert not acting(printable(each)), hex(code)
            assert printable(each).isascii()
        elif unicodedata.category(each) != "Cn":  # a later Unicode may call it a format
            assert printable(each) == each, hex(code)
    assert printable(EVIL) == SHOWN
    assert printable("a\nb\tc", "\n\t") == "a\nb\tc"
    # as bytes if they stand for bytes, and in full otherwise
    assert printable(b"caf\xe9.txt".decode("utf-8", "surrogateescape")) == r"caf\xe9.txt"
    assert printable("\ud83d\U000e0041") == r"\ud83d\U000e0041"
    for text in ("Zürich 東京\u3000", "\u05e2\u05d1\u05e8\u05d9\u05ea\u00a0", "C:\\new"):
        assert printable(text) == text


@dataclass(frozen=True)
class Tried:
    """A command line, its status, and whether its messages contain the hostile text."""

    argv: tuple[str, ...]
    status: int
    seen: bool = True

    @property
    def name(self) -> str:
        return " ".join(self.argv)


# FILE: matrix.gguf and so on, in files whose names are hostile too
TRIED = [
    Tried(("show", "matrix"), 0),
    Tried(("show", "matrix", "--all"), 0),
    Tried(("show", "old"), 0),
    Tried(("show", "text"), 2),
    Tried(("show", "kind"), 2),
    Tried(("show", "model"), 2),
    Tried(("show", "absent"), 2),
    Tried(("stats", "matrix"), 0),
    Tried(("stats", "matrix", "--layers"), 0),
    Tried(("stats", "matrix", "--experts"), 0),
    Tried(("stats", "text"), 2),
    Tried(("diff", "matrix", "old"), 0),
    Tried(("diff", "matrix", "matrix", "--all"), 0),
    Tried(("diff", "matrix", "text"), 2),
    Tried(("merge", "matrix", "old", "-o", "new"), 0),
    Tried(("merge", "matrix", "matrix", "-o", "new"), 0),
    Tried(("merge", "matrix", "-o", "matrix"), 2),
    Tried(("convert", "matrix", "new", "--output-format", "dat"), 0),
    Tried(("convert", "text", "new"), 2),
    Tried(("adapt", "matrix", "--to", "model", "--all"), 0),
    Tried(("adapt", "matrix", "--to", "model"), 0),
    Tried(("adapt", "matrix", "--to", "odd"), 2),
    Tried(("adapt", "matrix", "--to", "text"), 2),
    Tried(("check", "model", "matrix", "--type", "Q4_K"), 0),
    Tried(("check", "model", "matrix", "--type", "IQ2_XXS", "--all", "--plan"), 1),
    Tried(("check", "odd", "--type", "Q4_K"), 2),
    Tried(("check", "model", "matrix", "--type", EVIL), 2),
    Tried(("check", "text", "--type", "Q4_K"), 2),
    Tried(("check", "model", "--type", "Q4_K", "--tensor-type", f"{EVIL}=q8_0"), 0),
    Tried(("quantize", "model", "new", "Q4_K", "--imatrix", "matrix"), 0),
    Tried(("quantize", "model", "new", "IQ2_XXS", "--imatrix", "other"), 1),
    Tried(("quantize", "odd", "new", "Q4_K"), 2),
    Tried(("quantize", "text", "new", "Q4_K"), 2),
    Tried(("quantize", "model", "new", EVIL), 2),
    Tried(("quantize", "model", "new", "Q4_K", "--tensor-type", f"({EVIL}=q8_0"), 2, seen=False),
    Tried(("extract-mtp", "model", "-o", "new"), 0),
    Tried(("extract-mtp", "text"), 2),
    Tried(("extract-mtp", "odd"), 2),
    Tried(("drop-mtp", "model", "-o", "new"), 0),
    Tried(("drop-mtp", "text", "-o", "new"), 2),
    Tried(("graft-mtp", "model", "model", "-o", "new"), 2),
    Tried(("graft-mtp", "model", "odd", "-o", "new"), 2),
    Tried(("recipe", "model", "matrix", "-f", "text", "--size", "1K", "-o", "new.json"), 2),
    Tried(("report", "matrix", "-m", "model", "-o", "new.html", "--no-pictures"), 0),
    Tried(("report", "text", "-o", "new.html"), 2),
    Tried(("report", "matrix", "-o", "new.html", "--recipe", "text"), 2),
    Tried(("plot", "matrix", "-o", "new.svg"), 0),
    Tried(("plot", "matrix", "-o", "new.svg", "--kind", "bits"), 2),
    Tried(("plot", "text", "-o", "new.svg", "--kind", "bits"), 2),
    Tried(("plot", "matrix", "-o", "new.svg", "--weight", MARKUP), 2),
    Tried(("plot", "matrix", "-o", "new"), 2),
    Tried(("evaluate", "model", "-f", "text", "--chunks", "1", "-c", "32"), 0),
    Tried(("evaluate", "model", "-f", "text", "--against", "model", "--chunks", "1", "-c", "32"), 0),
    Tried(("evaluate", "text", "-f", "text"), 2),
    Tried(("evaluate", "model", "-f", "absent"), 2),
    Tried(("collect", "-m", "model", "-f", "text", "-o", "new", "-c", "32", "--chunks", "2"), 0),
    Tried(("collect", "-m", "model", "-f", "text", "-o", "new", "-v", "-c", "32", "--chunks", "1"), 0),
    Tried(("collect", "-m", "text", "-f", "text", "-o", "new"), 2),
    Tried(("collect", "-m", "odd", "-f", "text", "-o", "new"), 2),
    Tried(("collect", "-m", "model", "-f", "chat.jsonl", "-o", "new", "--chunks", "1"), 2),
    Tried(("collect", "-m", "model", "-f", "keys.jsonl", "-o", "new"), 2),
    Tried(("collect", "-m", "model", "-f", "broken.jsonl", "-o", "new"), 2),
    Tried(("collect", "-m", "model", "-f", "chat.jsonl", "--chat-template", EVIL, "-o", "new"), 2),
    Tried(("collect", "-m", "model", "-f", "text", "--chat-tools", "text", "-o", "new"), 2),
    Tried(("collect", "-m", "model", "-f", "text", "--in-file", "matrix", "-o", "new"), 0),
    Tried(("collect", "--in-file", "matrix", "-o", "new"), 0),
    Tried(("collect", "-m", "model", "-f", "absent", "-o", "new"), 2),
    Tried(("collect", "-m", "model", "-f", "text", "-o", "new", "--chunks", EVIL), 2),
    Tried(("collect", "-m", "model", "-f", "text", "-o", "new", "-ot", EVIL), 2),
    Tried(("show", "matrix", EVIL), 2),
    Tried((EVIL,), 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene") / EVIL
    folder.mkdir()
    template = "{{ raise_exception('" + EVIL.replace("\n", "\\n") + "') }}"
    make_model(
        folder / f"model{EVIL}.gguf",
        "glm4moe",
        n_nextn=1,
        n_layer=1,
        n_expert=2,
        metadata={"general.name": EVIL, "tokenizer.chat_template": template},
    )
    # every name that a header has
    writer = gguf.GGUFWriter(folder / f"odd{EVIL}.gguf", MARKUP)
    writer.add_block_count(1)
    writer.add_string("tokenizer.ggml.model", MARKUP)
    writer.add_string(MARKUP, MARKUP)
    writer.add_tensor("blk.0." + EVIL[:30], np.zeros((2, 32), np.float32))
    _finish(writer)
    writer = gguf.GGUFWriter(folder / f"kind{EVIL}.gguf", "llama")
    writer.add_string("general.type", EVIL)
    _finish(writer)
    matrix = ImportanceMatrix(
        {
            "blk.0.attn_q.weight": Entry(np.ones((1, 256)), [512]),
            "blk.0.ffn_up_exps.weight": Entry(np.ones((2, 256)), [512, 0]),
            "blk.0." + EVIL[:20]: Entry(np.ones((1, 32)), [512]),
            MARKUP[-40:]: Entry(np.zeros((1, 32)), [0]),
        },
        datasets=(MARKUP, EVIL),
        chunk_count=1,
        chunk_size=512,
        provenance=Provenance(
            collector=MARKUP,
            engine=MARKUP,
            mtp=False,
            n_ctx=512,
            dataset_digest=EVIL,
            left_out=(LeftOut(1, 512, MARKUP),),
            tokens=512,
            packing=MARKUP,
            sources=(TextSource(MARKUP, 1, 256, 0, None), TextSource(EVIL, 1, 256, 0, None)),
        ),
    )
    matrix.save(folder / f"matrix{EVIL}.gguf")
    plain = {"blk.0.attn_q.weight": matrix["blk.0.attn_q.weight"]}
    ImportanceMatrix(plain).save(folder / f"other{EVIL}.gguf")
    # a file in the old format is recognized by the name that it begins with
    old = ImportanceMatrix(
        {**plain, "blk.1." + EVIL[:20]: matrix["blk.0." + EVIL[:20]]}, datasets=[EVIL]
    )
    old.save(folder / f"old{EVIL}.dat", format="dat")
    (folder / f"text{EVIL}.txt").write_text(f"{EVIL} and more of it. " * 20, encoding="utf-8")
    chat = {"messages": [{"role": "user", "content": EVIL}]}
    (folder / f"chat{EVIL}.jsonl").write_text(json.dumps(chat) + "\n")
    (folder / f"keys{EVIL}.jsonl").write_text(json.dumps({MARKUP: EVIL}) + "\n")
    (folder / f"broken{EVIL}.jsonl").write_text('{"text": ' + EVIL.replace("\n", "") + "\n")
    return folder


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def named(scene: Path, folder: Path, word: str) -> str:
    """A word of a command line; a word that is the beginning of a file name becomes its path."""
    stem, _, ending = word.partition(".")
    if stem == "new":
        return str(folder / f"new{EVIL}.{ending or 'gguf'}")
    if stem == "absent":
        return str(scene / f"absent{EVIL}")
    found = [each for each in scene.iterdir() if each.name.startswith(stem + EVIL)]
    return str(found[0]) if found and word.isascii() else word


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / EVIL
    made.mkdir()
    return made


@pytest.mark.parametrize("tried", TRIED, ids=lambda each: printable(each.name)[:60])
def test_nothing_acts_on_the_terminal(tried: Tried, scene: Path, folder: Path, run: Run) -> None:
    done = run(*(named(scene, folder, word) for word in tried.argv))
    assert done.status == tried.status, done.err
    assert not acting(done.out + done.err)
    assert "\U0001f480" not in done.out + done.err  # the emoji that the code stands for
    lines = (done.out + done.err).splitlines()
    assert not any(line.startswith("error: forged") for line in lines)
    if tried.seen:
        assert r"\x1b" in done.out + done.err
        assert " red]:skull:[blink]" in done.out + done.err


@pytest.mark.parametrize("tried", TRIED, ids=lambda each: printable(each.name)[:60])
def test_nothing_acts_on_a_real_terminal(
    tried: Tried, scene: Path, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich draws bars and colours here; the output has its own codes and no others."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # with this, rich takes the stream for a terminal
    monkeypatch.setenv("COLUMNS", "300")
    done = run(*(named(scene, folder, word) for word in tried.argv))
    said = done.out + done.err
    assert not acting(_RICH.sub("", said))
    assert "\x1b[38;5;201m" not in said
    assert "\U0001f480" not in said


def test_every_command_is_tried() -> None:
    commands = {each.argv[0] for each in TRIED}
    parser = build_parser()
    assert parser._subparsers is not None
    (action,) = parser._subparsers._group_actions
    assert action.choices is not None
    # demo reads the package's own files, completion reads none
    assert set(action.choices) - {"demo", "completion"} == commands - {EVIL}


# --- data stay exact ---------------------------------------------------------


def test_json_is_exact(scene: Path, run: Run) -> None:
    path = named(scene, scene, "matrix")
    done = run("show", path, "--json")
    assert not acting(done.out)
    found = json.loads(done.out)
    assert found["file"] == path
    assert found["datasets"] == [MARKUP, EVIL]
    assert found["provenance"]["sources"][0]["name"] == MARKUP
    assert {each["name"] for each in found["weights"]} >= {"blk.0." + EVIL[:20], MARKUP[-40:]}


def test_csv_is_exact_but_at_a_terminal(
    scene: Path, run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("stats", named(scene, scene, "matrix"), "--csv")
    rows = list(csv.reader(io.StringIO(done.out, newline="")))
    assert "blk.0." + EVIL[:20] in {cell for row in rows for cell in row}
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    csv.writer(DataOut(), lineterminator="\n").writerow(["a", EVIL])
    sys.stdout.flush()
    assert not acting(capfd.readouterr().out)


# --- what no command line reaches --------------------------------------------


@pytest.fixture
def terminals(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> tuple[Terminal, pytest.CaptureFixture[str]]:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    capfd.readouterr()
    return Terminal(verbose=True), capfd


def test_logs_warnings_bars_and_tracebacks(
    terminals: tuple[Terminal, pytest.CaptureFixture[str]],
) -> None:
    terminal, captured = terminals
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []  # as a program of its own would do
    try:
        with show_logs(terminal):
            logging.getLogger("imatrix.engine").info("%s", MARKUP)
            logging.getLogger("imatrix").warning("%s", MARKUP)
            library = logging.getLogger("another.library")
            library.addHandler(handler := logging.StreamHandler(stream := io.StringIO()))
            library.warning("%s", MARKUP)
            try:
                raise ValueError(MARKUP)
            except ValueError:
                library.exception("%s", MARKUP)
            warnings.warn(MARKUP, UserWarning, stacklevel=1)
    finally:
        root.handlers = handlers
        library.removeHandler(handler)
    assert stream.getvalue().count(SHOWN) == 2
    assert not acting(stream.getvalue())
    said = captured.readouterr().err
    assert said.count(SHOWN) == 3
    assert not acting(_RICH.sub("", said))
    for bar in (
        CollectProgress(terminal, MARKUP, every=1),
        StepProgress(terminal, MARKUP, lambda done, total: MARKUP),
    ):
        with bar:
            if isinstance(bar, StepProgress):
                bar(1, 2)
    terminal.traceback(f"Traceback\n  {MARKUP}")
    terminal.out.print(Text(MARKUP, "bold") + Text(MARKUP), soft_wrap=True)
    found = captured.readouterr()
    assert SHOWN in found.out
    assert SHOWN in found.err
    assert not acting(_RICH.sub("", found.out + found.err))


def test_the_traceback_of_an_error(scene: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", named(scene, scene, "odd"), "--type", "Q4_K", "-v"]) == 2
    said = capfd.readouterr().err
    assert "Traceback" in said
    assert SHOWN in said
    assert not acting(said)


def test_a_defect_of_ours(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python would print these itself."""

    def broken() -> int:
        raise KeyError(0, MARKUP.splitlines()[0], type("X", (), {"__repr__": lambda _: EVIL})())

    monkeypatch.setattr(program, "main", broken)
    with pytest.raises(SystemExit) as stop:
        cli.entry()
    assert stop.value.code == 1
    said = capfd.readouterr().err
    assert "KeyError" in said
    assert not acting(said)
