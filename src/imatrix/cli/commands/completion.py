"""`imatrix completion`: a shell's script that completes this command, made by shtab."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imatrix.cli.flags.common import Commands
from imatrix.cli.terminal import Terminal

__all__ = ["SHELLS", "add_parser", "run", "script"]

SHELLS = ("bash", "zsh", "fish")

# Values spelled out by a person; every other argument that is plain text is a file.
_NO_FILES = {
    "chat_system",
    "chat_template",
    "hf_file",
    "hf_repo",
    "hf_token",
    "prompt",
    "rpc",
    "sort",
    "text_field",
}


def add_parser(commands: Commands) -> None:
    """Add the command to the parser's."""
    command = commands.add_parser(
        "completion",
        help="a script that completes commands, options, files and types in a shell",
        description="Write a shell's completion script to stdout. bash: put it into "
        "~/.local/share/bash-completion/completions/imatrix. zsh: as _imatrix into a folder of "
        "$fpath. fish: ~/.config/fish/completions/imatrix.fish.",
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    command.add_argument("shell", choices=SHELLS, help="whose script")


def run(args: argparse.Namespace, _terminal: Terminal) -> int:
    """Do what `add_parser` describes; the exit status."""
    from imatrix.cli.program import build_parser

    sys.stdout.write(script(build_parser(), args.shell))
    sys.stdout.flush()
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
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
        elif action.dest not in _NO_FILES and not action.choices and _is_file(action):
            action.complete = shtab.FILE
        if isinstance(action.metavar, str) and re.search(r"[^\w=,./-]", action.metavar):
            action.metavar = action.dest  # a colon or bracket would end it, in zsh's script
    text = shtab.complete(parser, shell)
    return text if text.endswith("\n") else text + "\n"


def _is_file(action: argparse.Action) -> bool:
    return action.type in (None, Path) or str(action.metavar).startswith("FILE")


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those that take a value, of all commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        elif action.nargs != 0:
            yield action
