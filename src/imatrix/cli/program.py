"""The `imatrix` command; its subcommands are those of `_COMMANDS`.

It takes llama-imatrix's flags (tools/imatrix/imatrix.cpp and common/arg.cpp in llama.cpp) and
does nothing that `import imatrix` does not offer.

Messages and progress go to stderr, data to stdout. Exit status: 0 done, 1 it failed, 2 wrong
usage or bad input, 130 interrupted (SIGINT, Ctrl-C), 143 terminated (SIGTERM). `collect` saves
what there is on either; a second signal ends it at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import imatrix
from imatrix.cli.commands import (
    adapt,
    check,
    completion,
    convert,
    diff,
    evaluate,
    plot,
    report,
    stats,
)
from imatrix.cli.commands.collect import add_collect
from imatrix.cli.commands.demo import add_demo
from imatrix.cli.commands.heads import add_mtp_files
from imatrix.cli.commands.quantize import add_quantize
from imatrix.cli.commands.show import add_show
from imatrix.cli.commands.version import show_version
from imatrix.cli.flags import hub
from imatrix.cli.flags.common import Commands, Parser
from imatrix.cli.outputs import check_command
from imatrix.cli.signals import (
    FAILED,
    INTERRUPTED,
    TERMINATED,
    USAGE,
    Stopped,
    Terminated,
    describe_error,
)
from imatrix.cli.terminal import Terminal

__all__ = ["entry", "main"]


def entry() -> None:
    """The console script."""
    try:
        status = main()
    except Exception:
        # a defect of ours; its message may have text from a file all the same
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
    except SystemExit as stop:  # argparse has told the user
        return stop.code if isinstance(stop.code, int) else USAGE
    terminal = Terminal(verbose=getattr(args, "verbose", False))
    if args.version:
        return show_version(terminal)
    if args.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    with terminal.listening():
        return _run(args.run, args, terminal)


def _run(
    command: Callable[[argparse.Namespace, Terminal], int],
    args: argparse.Namespace,
    terminal: Terminal,
) -> int:
    try:
        check_command(args)
        return command(args, terminal)
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


# --- arguments ---------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="imatrix",
        description="Importance matrices for low-bit GGUF quantization, MTP heads included.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="store_true", help="this build: engine, backends, devices"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=hub.Parser)
    for add_parser in _COMMANDS:
        add_parser(commands)
    return parser


# in the order of the help
_COMMANDS: tuple[Callable[[Commands], None], ...] = (
    add_collect,
    check.add_parser,
    add_show,
    stats.add_parser,
    plot.add_parser,
    report.add_parser,
    convert.add_parser,
    diff.add_parser,
    adapt.add_parser,
    add_quantize,
    evaluate.add_parser,
    add_mtp_files,
    add_demo,
    completion.add_parser,
)
