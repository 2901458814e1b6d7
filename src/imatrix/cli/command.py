"""What the program knows of a command: its name, its flags, its files, and the function that does it.

Every module of imatrix.cli.commands offers one, COMMAND; the table of them is in imatrix.cli.program.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from imatrix.cli.flags.common import Commands
from imatrix.cli.flags.hub import Parser
from imatrix.cli.outputs import Files
from imatrix.cli.terminal import Terminal

__all__ = ["Command"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command.

    Attributes:
        name: as it is typed.
        help: a line for `imatrix --help`.
        description: what `imatrix NAME --help` tells in front of the flags; None for nothing.
        add_arguments: adds its flags and positional arguments to its parser.
        files: which of the arguments name files that it reads or writes.
        run: does it, and returns the exit status.
    """

    name: str
    help: str
    description: str | None = None
    add_arguments: Callable[[Parser], None]
    files: Files
    run: Callable[[argparse.Namespace, Terminal], int]

    def add_parser(self, commands: Commands) -> None:
        """Add its parser to those of the other commands."""
        parser = commands.add_parser(
            self.name, help=self.help, description=self.description, allow_abbrev=False
        )
        self.add_arguments(parser)
