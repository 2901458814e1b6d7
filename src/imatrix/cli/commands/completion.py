"""`imatrix completion`: a shell's script that completes this command, made by shtab."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imatrix.cli.command import Command
from imatrix.cli.flags.hub import Parser
from imatrix.cli.outputs import Files
from imatrix.cli.status import OK
from imatrix.cli.terminal import Terminal

__all__ = ["COMMAND", "NO_FILES", "SHELLS", "may_be_file"]

SHELLS = ("bash", "zsh", "fish")

# Values that a person spells out; every other argument that is plain text is a file.
NO_FILES = {
    "bpw",
    "chat_system",
    "chat_template",
    "head",
    "hf_file",
    "hf_repo",
    "hf_token",
    "kl",
    "prompt",
    "rpc",
    "size",
    "sort",
    "text_field",
    "types",
}


def _add_arguments(command: Parser) -> None:
    command.add_argument("shell", choices=SHELLS, help="whose script")


def _run(args: argparse.Namespace, _terminal: Terminal) -> int:
    sys.stdout.write(_script(args.parser, args.shell))  # which main puts there
    sys.stdout.flush()
    return OK


def _script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script of one of SHELLS.

    Args:
        parser: of the whole command; it is changed, and good for this only.

    Raises:
        ImportError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError(
            "completion needs the library shtab, which is not installed: "
            "pip install 'imatrix[completion]'"
        ) from error
    from imatrix.quantization.types import FTYPES

    action: Any
    for action in _actions(parser):
        if action.metavar == "TYPE":
            action.choices = sorted(FTYPES)
        elif action.metavar == "DIR":
            action.complete = shtab.DIRECTORY
        elif may_be_file(action):
            action.complete = shtab.FILE
        if isinstance(action.metavar, str) and re.search(r"[^\w=,./-]", action.metavar):
            action.metavar = action.dest  # a colon or bracket would end it, in zsh's script
    text = shtab.complete(parser, shell)
    return text if text.endswith("\n") else text + "\n"


def may_be_file(action: argparse.Action) -> bool:
    """Whether the value of an argument is completed as the name of a file."""
    if action.choices or action.dest in NO_FILES:
        return False
    return action.type in (None, Path) or str(action.metavar).startswith("FILE")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of all commands that take a value."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        elif action.nargs != 0:
            yield action


COMMAND = Command(
    name="completion",
    help="a script that completes commands, options, files and types in a shell",
    description="Write a shell's completion script to stdout. bash: put it into "
    "~/.local/share/bash-completion/completions/imatrix. zsh: as _imatrix into a folder of "
    "$fpath. fish: ~/.config/fish/completions/imatrix.fish.",
    add_arguments=_add_arguments,
    files=Files(),
    run=_run,
)
