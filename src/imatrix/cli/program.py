"""The `imatrix` command; its subcommands are those of `COMMANDS`.

It takes llama-imatrix's flags (tools/imatrix/imatrix.cpp and common/arg.cpp in llama.cpp) and
does nothing that `import imatrix` does not offer.

Messages and progress go to stderr, data to stdout. Exit status: 0 done, 1 it failed, 2 wrong
usage or bad input, 130 interrupted (SIGINT, Ctrl-C), 143 terminated (SIGTERM). On either signal
`collect` saves what there is; a second signal ends it at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

import imatrix
from imatrix.cli.command import Command
from imatrix.cli.commands import (
    adapt,
    check,
    collect,
    completion,
    convert,
    demo,
    diff,
    drop_mtp,
    evaluate,
    extract_mtp,
    graft_mtp,
    merge,
    plot,
    quantize,
    recipe,
    report,
    show,
    stats,
)
from imatrix.cli.flags import hub
from imatrix.cli.flags.common import Parser
from imatrix.cli.logs import show_logs
from imatrix.cli.outputs import check_command
from imatrix.cli.signals import Terminated
from imatrix.cli.status import FAILED, INTERRUPTED, TERMINATED, USAGE, Stopped, describe_error
from imatrix.cli.terminal import Terminal
from imatrix.cli.version import show_version

__all__ = ["COMMANDS", "build_parser", "entry", "main"]

COMMANDS: Mapping[str, Command] = {
    command.name: command
    for command in (
        collect.COMMAND,
        check.COMMAND,
        show.COMMAND,
        stats.COMMAND,
        plot.COMMAND,
        report.COMMAND,
        convert.COMMAND,
        merge.COMMAND,
        diff.COMMAND,
        adapt.COMMAND,
        recipe.COMMAND,
        quantize.COMMAND,
        evaluate.COMMAND,
        extract_mtp.COMMAND,
        graft_mtp.COMMAND,
        drop_mtp.COMMAND,
        demo.COMMAND,
        completion.COMMAND,
    )
}
"""The commands by their names, in the order of the help."""


def entry() -> None:
    """The console script."""
    try:
        status = main()
    except Exception:
        # a defect of this program; its message may have text from a file all the same
        Terminal().traceback(traceback.format_exc())
        status = FAILED
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None for sys.argv's.

    Returns:
        The exit status, see the module.
    """
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed why
        return stop.code if isinstance(stop.code, int) else USAGE
    terminal = Terminal(verbose=getattr(args, "verbose", False))
    if args.version:
        return show_version(terminal)
    if args.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    args.parser = parser  # for `completion`, which writes a script of all of it
    with show_logs(terminal):
        return _run(COMMANDS[args.command], args, terminal)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="imatrix",
        description="Importance matrices for low-bit GGUF quantization, MTP heads included.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="store_true", help="this build: engine, backends, devices"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=hub.Parser)
    for command in COMMANDS.values():
        command.add_parser(commands)
    return parser


def _run(command: Command, args: argparse.Namespace, terminal: Terminal) -> int:
    try:
        check_command(command.files, args)
        return command.run(args, terminal)
    except Terminated:
        terminal.error("terminated")
        return TERMINATED
    except KeyboardInterrupt:
        terminal.error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # `imatrix show | head`: nobody is left to tell; the interpreter must not try either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (
        Stopped,
        imatrix.ImatrixError,
        ValueError,
        OSError,
        MemoryError,
        RuntimeError,
        ImportError,
    ) as error:
        if terminal.verbose:
            terminal.traceback(traceback.format_exc())
        terminal.error(describe_error(error))
        return _status(error)


def _status(error: Exception) -> int:
    if isinstance(error, Stopped):
        return error.status
    bad_input = (
        ValueError,
        FileNotFoundError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
    )
    return USAGE if isinstance(error, bad_input) else FAILED
