"""Runs the fenced blocks of a Markdown page, for tests/docs; docs/writing-docs.md says how a page
asks for what.

page = parse(path)              # what is to be done, in the order of the page
run(page, folder, stand_ins)    # does it there; BlockError if a block does not do as shown
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "src" / "imatrix" / "data"

RUN = ("bash", "console", "python")
# shown, but never run; a block of Sphinx has a name in braces
SHOWN = ("text", "json", "toml", "ini", "yaml", "jinja", "c", "html", "markdown", "powershell")

TIMEOUT = 120  # seconds per block; most take less than one

StandIns = Mapping[str, Callable[[Path], None]]


class BlockError(AssertionError):
    """A block breaks a rule of docs/writing-docs.md, or did not do what the page shows."""


@dataclass(frozen=True)
class Setup:
    """Things that a page wants done out of sight: names of stand-ins, or commands."""

    where: str
    names: tuple[str, ...] = ()
    script: str = ""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    where: page and line, from 1, of its first line of content.
    output: what the page says that it prints; None if the page does not say it.
    not_run: why it is not run; empty if it is run.
    """

    where: str
    line: int
    language: str
    text: str
    not_run: str = ""
    exit_status: int = 0
    numbers_vary: bool = False
    wrapped: bool = False
    output: str | None = None


@dataclass(frozen=True)
class Page:
    path: Path
    steps: tuple[Setup | Block, ...]

    @property
    def name(self) -> str:
        return (
            self.path.relative_to(ROOT).as_posix() if ROOT in self.path.parents else str(self.path)
        )

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(step for step in self.steps if isinstance(step, Block))


# --- reading a page ------------------------------------------------------------------------------


def parse(path: Path) -> Page:
    """The blocks of a page and the requests in its comments.

    Raises:
        BlockError: a fence has no language, or the comment above it means nothing.
    """
    name = path.relative_to(ROOT).as_posix() if ROOT in path.parents else path.name
    steps: list[Setup | Block] = []
    asked: list[tuple[str, str]] = []  # comments since the last thing that was not one
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
        line = token.map[0] + 1 if token.map else 0
        where = f"{name}:{line}"
        if token.type == "html_block":
            for comment in re.findall(r"<!--(.*?)-->", token.content, re.DOTALL):
                word, _, rest = comment.strip().partition("\n")
                if word == "setup":
                    steps.append(Setup(where, script=textwrap.dedent(rest)))
                elif word.startswith("setup:"):
                    steps.append(Setup(where, names=tuple(word.removeprefix("setup:").split())))
                else:
                    asked.append((where, " ".join(comment.split())))
        elif token.type == "fence":
            block = _block(f"{name}:{line + 1}", line + 1, token.info, token.content, asked)
            if block is None:
                _attach(steps, where, token.content, asked)
            else:
                steps.append(block)
            asked = []
        else:
            asked = []
    return Page(path, tuple(steps))


def _block(
    where: str, line: int, info: str, text: str, asked: list[tuple[str, str]]
) -> Block | None:
    """The block; None if it is the output of the block before."""
    if any(comment == "output" for _, comment in asked):
        return None
    language = info.split()[0] if info.split() else ""
    if language not in (*RUN, *SHOWN) and not re.fullmatch(r"\{[\w-]+\}", language):
        raise BlockError(
            f"{where}: a block needs a language, one of {', '.join((*RUN, *SHOWN))}; this one has "
            f"{language!r}"
        )
    not_run, status, vary, wrapped = "", 0, False, False
    for place, comment in asked:
        word, _, rest = (part.strip() for part in comment.partition(":"))
        if word == "not run" and rest:
            not_run = rest
        elif word == "exit" and rest.isdigit():
            status = int(rest)
        elif comment == "numbers vary":
            vary = True
        elif comment == "wrapped":
            wrapped = True
        else:
            raise BlockError(f"{place}: a comment above a block that means nothing: {comment!r}")
    if asked and language not in RUN:
        raise BlockError(f"{where}: a {language} block is not run; what is asked of it?")
    return Block(where, line, language, text, not_run, status, vary, wrapped)


def _attach(
    steps: list[Setup | Block], where: str, text: str, asked: list[tuple[str, str]]
) -> None:
    """`text` is the output of the last block."""
    before = next((s for s in reversed(steps) if isinstance(s, Block)), None)
    if before is None or before.language not in ("bash", "python") or before.output is not None:
        raise BlockError(f"{where}: output of what? There is no bash or python block before it")
    comments = {comment for _, comment in asked}
    if comments - {"output", "numbers vary", "wrapped"}:
        raise BlockError(f"{where}: a comment above output that means nothing: {comments}")
    steps[steps.index(before)] = replace(
        before,
        output=text,
        numbers_vary=before.numbers_vary or "numbers vary" in comments,
        wrapped=before.wrapped or "wrapped" in comments,
    )


# --- running the blocks --------------------------------------------------------------------------


def run(page: Page, folder: Path, stand_ins: StandIns) -> None:
    """Run a page's blocks in a folder, in order.

    Raises:
        BlockError: one of them fails, or prints something else.
    """
    environment = _environment(folder)
    for name in ("model-BF16.gguf", "calibration.txt", "held-out.txt"):
        stand_ins[name](folder / name)
    python: _Python | None = None
    try:
        for step in page.steps:
            if isinstance(step, Setup):
                for name in step.names:
                    if name not in stand_ins:
                        raise BlockError(f"{step.where}: no stand-in {name}; {list(stand_ins)}")
                    stand_ins[name](folder / name)
                if step.script:
                    _shell(step.script, step.where, folder, environment, 0)
            elif step.not_run or step.language not in RUN:
                continue
            elif step.language == "python":
                python = _Python(folder, environment) if python is None else python
                found = python.run(step, page.name)
                if step.output is not None:
                    compare(step, step.output, found)
            elif step.language == "bash":
                found = _shell(step.text, step.where, folder, environment, step.exit_status)
                if step.output is not None:
                    compare(step, step.output, found)
            else:
                _console(step, folder, environment)
    finally:
        if python is not None:
            python.close()


def _environment(folder: Path) -> dict[str, str]:
    dropped = ("LLAMA_", "IMATRIX_", "HF_", "GGML_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "PYTHONUNBUFFERED": "1",
        "DATA": str(DATA),
        "REPO": str(ROOT),
        "SECONDS_A_BLOCK": str(TIMEOUT),
    }


def _shell(
    script: str, where: str, folder: Path, environment: Mapping[str, str], status: int
) -> str:
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BlockError(f"{where}: not done after {TIMEOUT} s:\n{error.output}") from None
    if done.returncode != status:
        raise BlockError(
            f"{where}: exit status {done.returncode}, expected {status}:\n{script}\n{done.stdout}"
        )
    return done.stdout


def _console(block: Block, folder: Path, environment: Mapping[str, str]) -> None:
    commands = console_commands(block)
    for i, (command, shown) in enumerate(commands):
        status = block.exit_status if i + 1 == len(commands) else 0
        found = _shell(command, block.where, folder, environment, status)
        if shown.strip():
            compare(block, shown, found)


def console_commands(block: Block) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output that the block shows below it."""
    found: list[tuple[list[str], list[str]]] = []
    goes_on = False
    for line in block.text.splitlines():
        if goes_on:
            found[-1][0].append(line.removeprefix("> "))
        elif line.startswith("$ "):
            found.append(([line[2:]], []))
        elif not found:
            raise BlockError(f"{block.where}: a console block begins with a command, `$ …`")
        else:
            found[-1][1].append(line)
            continue
        goes_on = found[-1][0][-1].endswith("\\")
    return [("\n".join(command), "\n".join(shown)) for command, shown in found]


class _Python:
    """An interpreter that keeps its names from block to block."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error::DeprecationWarning", "-c", _DRIVER],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, block: Block, name: str) -> str:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([block.text, name, block.line]) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
        if not reply:
            raise BlockError(f"{block.where}: the interpreter ended")
        told = json.loads(reply)
        if told["error"]:
            raise BlockError(f"{block.where}: {told['error']}\nIt printed:\n{told['out']}")
        return str(told["out"])

    def close(self) -> None:
        try:
            self._process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


# The blocks' output is kept apart from the replies: these go to the descriptor that was stdout.
_DRIVER = """
import contextlib, io, json, os, signal, sys, traceback
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
names = {"__name__": "__main__"}
for request in sys.stdin:
    text, page, line = json.loads(request)
    out, error = io.StringIO(), ""
    signal.alarm(int(os.environ["SECONDS_A_BLOCK"]))
    try:
        with contextlib.redirect_stdout(out):
            exec(compile("\\n" * (line - 1) + text, page, "exec"), names)
    except BaseException:
        error = traceback.format_exc()
    signal.alarm(0)
    replies.write(json.dumps({"out": out.getvalue(), "error": error}) + "\\n")
    replies.flush()
"""


# --- what a page shows, and what was printed -----------------------------------------------------

_NUMBER = r"[-+]?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?"
_ANY = re.compile(r"…|\.\.\.")


def compare(block: Block, shown: str, found: str) -> None:
    """Check that what was printed is what a page shows.

    … (or ...) alone on a line stands for any lines, inside a line for any characters. Spaces at
    the ends of lines, and empty lines at the ends of the text, do not count.

    Raises:
        BlockError: it is not.
    """
    any_lines, end = r"(?:.*\n)*", r"\n"
    expected, got = _tidied(shown, block).splitlines(), _tidied(found, block) + "\n"
    pattern = "".join(
        any_lines if _ANY.fullmatch(line.strip()) else _line(line, block.numbers_vary) + end
        for line in expected
    )
    if re.fullmatch(pattern, got) is None:
        raise BlockError(f"{block.where}: the page shows\n\n{shown}\n\nbut it is\n\n{found}")


def _tidied(text: str, block: Block) -> str:
    lines = [line.rstrip() for line in text.splitlines()]
    if block.wrapped:
        lines = [" ".join(text.split())]
    elif block.numbers_vary:  # the width of a table's columns follows its figures
        lines = [re.sub("─+", "─", " ".join(line.split())) for line in lines]
    return "\n".join(lines).strip("\n")


def _line(line: str, numbers_vary: bool) -> str:
    pieces = []
    for piece in _ANY.split(line):
        if numbers_vary:
            pieces.append(_NUMBER.join(re.escape(part) for part in re.split(_NUMBER, piece)))
        else:
            pieces.append(re.escape(piece))
    return ".*".join(pieces)


# --- files that stand in for those that pages name -----------------------------------------------


def stand_ins(cache: Path) -> dict[str, Callable[[Path], None]]:
    """Functions by name that put such a file at a path. Each file is made once, in `cache`, when a
    page first asks for it; pages get copies, which they may change."""
    from imatrix import Collector, extract_mtp, quantize

    model = DATA / "tiny-glm4moe-mtp.gguf"
    text = (DATA / "calibration.txt").read_text(encoding="utf-8")
    held_out = (DATA / "held-out.txt").read_text(encoding="utf-8")
    made: dict[str, Callable[[Path], object]] = {
        "model-BF16.gguf": lambda to: shutil.copyfile(model, to),
        "calibration.txt": lambda to: to.write_text(text[:12_000], encoding="utf-8"),
        "held-out.txt": lambda to: to.write_text(held_out[:12_000], encoding="utf-8"),
    }

    def cached(name: str) -> Path:
        path = cache / name
        if not path.exists():
            made[name](path)
        return path

    def collected(part: slice, form: str = "gguf") -> Callable[[Path], object]:
        def make(to: Path) -> None:
            source = cache / "calibration.txt"
            source.write_text(text[part], encoding="utf-8")
            with Collector(cached("model-BF16.gguf")) as collector:
                collector.run(source, mtp=True).save(to, format=form)  # type: ignore[arg-type]

        return make

    def trunk_only(to: Path) -> None:
        from imatrix import ImportanceMatrix

        ImportanceMatrix.load(cached("imatrix.gguf")).trunk.save(to)

    def recipe(to: Path) -> None:
        import numpy as np

        from imatrix.model.header import ModelFile
        from imatrix.quantization.frontier import FrontierCurve, FrontierPoint
        from imatrix.quantization.recipe import Measured, Recipe
        from imatrix.quantization.source import source_tensors

        file = ModelFile.read(cached("model-BF16.gguf"))
        types = {
            name: "q4_k" if "ffn" in name else "q6_k"
            for name, tensor in source_tensors(file).items()
            if tensor.type == "f16"
        }
        sizes = np.arange(2_000_000, 5_000_000, 100_000)
        Recipe.for_model(
            file,
            types,
            ftype="Q4_K_M",
            bytes=3_000_000,
            predicted_kl=0.02,
            measured_kl=Measured(0.021, 0.001, 3060),
            text="held-out.txt",
            chunks=12,
            n_ctx=512,
            frontier=FrontierCurve(
                bytes=sizes,
                kl=0.02 * np.exp((3_000_000 - sizes) / 1_000_000),
                measured=(FrontierPoint(bytes=3_000_000, kl=0.021, error=0.001),),
                chosen=(3_000_000,),
            ),
        ).save(to)

    made |= {
        "imatrix.gguf": collected(slice(12_000)),
        "imatrix.dat": collected(slice(12_000), "dat"),
        "a.gguf": collected(slice(8_000)),
        "b.gguf": collected(slice(8_000, 16_000)),
        "c.gguf": collected(slice(16_000, 24_000)),
        "recipe.json": recipe,
        "trunk-only.gguf": trunk_only,
        "mtp-model-BF16.gguf": lambda to: extract_mtp(cached("model-BF16.gguf"), to),
        "trunk-BF16.gguf": lambda to: extract_mtp(
            cached("model-BF16.gguf"), to.with_name("mtp-unused.gguf"), trunk_out=to
        ),
        "model-IQ2_XXS.gguf": lambda to: quantize(
            cached("model-BF16.gguf"), to, "IQ2_XXS", imatrix=cached("imatrix.gguf")
        ),
    }
    return {name: lambda to, name=name: shutil.copyfile(cached(name), to) for name in made}
