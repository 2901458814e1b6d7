"""Argument types and flags that several commands share."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

from imatrix.words import printable

__all__ = [
    "Commands",
    "Parser",
    "add_gpu_layers",
    "add_parse_special",
    "add_skipped_chunks",
    "add_tensor_type",
    "add_threads",
    "add_verbose",
    "at_least",
    "chunks",
    "files",
    "gpu_layers",
    "tensor_type_files",
    "tensor_types",
    "threads",
    "whole",
]


class Parser(argparse.ArgumentParser):
    """argparse's, whose messages may repeat what was given."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        # one line, whatever was given
        super().exit(status, message and printable(message.removesuffix("\n")) + "\n")


Commands = Any
"""What `ArgumentParser.add_subparsers` returns; its class is private to argparse."""


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def at_least(least: int) -> Callable[[str], int]:
    """A whole number, `least` or more."""

    def parse(text: str) -> int:
        value = whole(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {value}")
        return value

    return parse


def threads(text: str) -> int:
    """Threads; 0 and less for all logical processors, as llama.cpp takes it (common/arg.cpp)."""
    value = whole(text)
    return value if value > 0 else os.cpu_count() or 1


def chunks(text: str) -> int | None:
    """Chunks at most; None for -1, all."""
    value = whole(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be 1 or more, or -1 for all, got 0")
    return value if value > 0 else None


def files(text: str) -> list[str]:
    """One file, or several with commas between them, as llama.cpp takes it (parse_csv_row in
    common/arg.cpp); a file that has a comma in its name is one file all the same."""
    return [text] if Path(text).exists() else next(csv.reader([text]))


def gpu_layers(text: str) -> int | Literal["auto"]:
    """Layers on the GPU; -1 for all. llama.cpp's -1 is auto, and what is below all
    (common/arg.cpp)."""
    if text in ("auto", "-1"):
        return "auto"
    return -1 if text == "all" else max(-1, whole(text))


def add_tensor_type(command: argparse.ArgumentParser) -> None:
    """--tensor-type and --tensor-type-file, into `args.tensor_type`; see `tensor_types`."""
    command.add_argument(
        "--tensor-type",
        metavar="NAME=TYPE",
        action="append",
        default=[],
        type=_tensor_type,
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


def _tensor_type(text: str) -> tuple[str, str]:
    from imatrix.quantization.rules import parse_rule  # here: it needs the native part

    try:
        return parse_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def tensor_types(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The rules of `add_tensor_type`, in the order given, those of a file in its place.

    Raises:
        ValueError: a rule of a file is wrong.
        OSError: a file cannot be read.
    """
    from imatrix.quantization.rules import read_rules

    rules: list[tuple[str, str]] = []
    for given in args.tensor_type:
        rules += read_rules(given) if isinstance(given, Path) else [given]
    return rules


def tensor_type_files(args: argparse.Namespace) -> list[str]:
    """The files of `add_tensor_type`."""
    return [str(given) for given in args.tensor_type if isinstance(given, Path)]


def add_threads(command: argparse.ArgumentParser) -> None:
    """-t, into `args.threads`; None where it is not given."""
    command.add_argument(
        "-t",
        "--threads",
        metavar="N",
        type=threads,
        help="threads (default: the physical cores; 0: all logical ones)",
    )


def add_gpu_layers(command: argparse.ArgumentParser) -> None:
    """-ngl, into `args.gpu_layers`; None where it is not given."""
    command.add_argument(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        metavar="N",
        type=gpu_layers,
        help="layers on the GPU, a number, 'all' or 'auto': as many as there is room for (default: "
        "auto)",
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
