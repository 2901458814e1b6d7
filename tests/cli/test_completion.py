"""`imatrix completion`: the shells accept the scripts, and bash completes with its script."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.running import EngineTool, run_tool

from imatrix import cli
from imatrix.cli.commands.completion import SHELLS
from imatrix.cli.program import build_parser


def made(shell: str, capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert cli.main(["completion", shell]) == 0
    return capfd.readouterr().out


# bash is installed wherever these tests run
@pytest.mark.parametrize(
    "shell", [shell for shell in SHELLS if shell == "bash" or shutil.which(shell)]
)
def test_the_shell_takes_it(shell: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = shutil.which(shell)
    assert program is not None
    path = tmp_path / "script"
    path.write_text(made(shell, capfd), encoding="utf-8")
    done = subprocess.run([program, "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# This does what readline does: it calls the function that `complete` names with the words so far;
# the last word is the one to complete.
ASK = """
source "$1"; shift
set -- "$@"
line=$(complete -p imatrix)
[[ $line =~ -F\\ ([^ ]+) ]]
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"${BASH_REMATCH[1]}" imatrix "${@: -1}"
((${#COMPREPLY[@]})) && printf '%s\\n' "${COMPREPLY[@]}"
"""


def options(command: argparse.ArgumentParser, start: str) -> set[str]:
    return {
        flag for action in command._actions for flag in action.option_strings
        if flag.startswith(start)
    }  # fmt: skip


def test_bash_completes(
    tmp_path: Path, engine_tool: EngineTool, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.bash"
    script.write_text(made("bash", capfd), encoding="utf-8")
    folder = tmp_path / "files"
    (folder / "models").mkdir(parents=True)
    for name in ("model F16.gguf", "model.gguf", "text.txt"):
        (folder / name).touch()

    def complete(*words: str) -> set[str]:
        done = subprocess.run(
            ["bash", "--norc", "-c", ASK, "bash", script, "imatrix", *words],
            capture_output=True, text=True, cwd=folder, check=False,
        )  # fmt: skip
        assert done.stderr == ""
        return set(done.stdout.splitlines())

    (commands,) = (
        action.choices for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )  # fmt: skip
    assert complete("") >= set(commands)
    assert complete("ch") == {name for name in commands if name.startswith("ch")}
    assert complete("collect", "--mt") == options(commands["collect"], "--mt")
    assert complete("collect", "--packing", "") == {"stream", "document"}
    # files, wherever an argument is a file
    models = {"model F16.gguf", "model.gguf", "models"}
    for words in (
        ["collect", "-m"], ["collect", "-f"], ["collect", "--in-file"], ["check"],
        ["check", "model.gguf"], ["evaluate", "x", "--reference"], ["quantize", "x", "y", "--imatrix"],
    ):  # fmt: skip
        assert complete(*words, "mod") == models, words
    assert complete("demo", "--dir", "") == {"models"}
    assert complete("collect", "-p", "mod") == set()  # free text, which cannot be completed
    # types: each is one that llama-quantize lists
    theirs = run_tool(engine_tool("llama-quantize"), "--help", ok=False)
    for words in (["check", "model.gguf", "--type"], ["quantize", "a", "b"]):
        types = complete(*words, "IQ")
        assert len(types) > 8
        assert all(f"  {name} " in theirs for name in types)
        assert complete(*words, "Q4_K_") == {"Q4_K_S", "Q4_K_M"}


def test_every_file_argument_is_found() -> None:
    """An argument that takes plain text is a file, or is known to be something else."""
    from imatrix.cli.commands.completion import NO_FILES

    def dests(parser: argparse.ArgumentParser) -> Iterator[str]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    yield from dests(command)
            else:
                yield action.dest

    assert set(dests(build_parser())) >= NO_FILES  # no name in that list is out of date


def test_without_the_library(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert "pip install 'imatrix[completion]'" in capfd.readouterr().err
