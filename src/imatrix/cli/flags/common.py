"""The parser of the command line, and flags that several commands share."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from imatrix.cli.flags.values import at_least, threads
from imatrix.words import printable

__all__ = [
    "Commands",
    "Parser",
    "add_isolate",
    "add_output",
    "add_parse_special",
    "add_skipped_chunks",
    "add_threads",
    "add_verbose",
]


class Parser(argparse.ArgumentParser):
    """argparse's, whose messages may repeat what was given."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        # one line, whatever was given
        super().exit(status, message and printable(message.removesuffix("\n")) + "\n")


Commands = Any
"""What `ArgumentParser.add_subparsers` returns; its class is private to argparse."""


def add_output(command: argparse.ArgumentParser) -> None:
    """-o, which has to be given, into `args.output`."""
    command.add_argument("-o", "--output", metavar="OUT", required=True, help="what to write")


def add_threads(command: argparse.ArgumentParser) -> None:
    """-t, into `args.threads`; None if it is not given."""
    command.add_argument(
        "-t",
        "--threads",
        metavar="N",
        type=threads,
        help="threads (default: the physical cores; 0: all logical ones)",
    )


def add_isolate(command: argparse.ArgumentParser) -> None:
    """--isolate and --no-isolate, into `args.isolate`."""
    command.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the engine in a process of its own: if the engine or the system ends that one, "
        "say what is left and how to go on (default: on)",
    )


def add_skipped_chunks(command: argparse.ArgumentParser) -> None:
    """--chunk, into `args.chunk`."""
    command.add_argument(
        "--chunk",
        "--from-chunk",
        metavar="N",
        type=at_least(0),
        default=0,
        help="start with chunk N of the text (default: 0)",
    )


def add_parse_special(command: argparse.ArgumentParser) -> None:
    """--parse-special, into `args.parse_special`."""
    command.add_argument(
        "--parse-special",
        action="store_true",
        help="read special tokens that the text spells out as such",
    )


def add_verbose(command: argparse.ArgumentParser) -> None:
    """-v, into `args.verbose`."""
    command.add_argument(
        "-v", "--verbose", action="store_true", help="show the engine's log, and tracebacks"
    )
