"""--tensor-type and --tensor-type-file of `check` and `quantize`: rules of weights' types."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from imatrix.files.outputs import Input

__all__ = ["add_arguments", "read", "rule_files"]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """--tensor-type and --tensor-type-file, into `args.tensor_type`; see `read`."""
    command.add_argument(
        "--tensor-type",
        metavar="NAME=TYPE",
        action="append",
        default=[],
        type=_rule,
        help="another type for the weights whose names match, as attn_q=q8_0; may be repeated: of "
        "several that match the first counts",
    )
    command.add_argument(
        "--tensor-type-file",
        metavar="FILE",
        dest="tensor_type",
        action="append",
        default=[],
        type=Path,
        help="a file of such NAME=TYPE, with spaces or line ends between them, in this place",
    )


def _rule(text: str) -> tuple[str, str]:
    from imatrix.quantization.rules import parse_rule  # here: it needs the native part

    try:
        return parse_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def read(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The rules, in the order given, those of a file in its place.

    Raises:
        ValueError: a rule of a file is wrong.
        OSError: a file cannot be read.
    """
    from imatrix.quantization.rules import read_rules

    rules: list[tuple[str, str]] = []
    for given in args.tensor_type:
        rules += read_rules(given) if isinstance(given, Path) else [given]
    return rules


def rule_files(args: argparse.Namespace) -> Iterator[Input]:
    """The files of rules, which the command reads."""
    # beside the rules themselves, which are pairs
    yield from (Input(os.fspath(each)) for each in args.tensor_type if isinstance(each, Path))
