"""What the value of a flag may be: functions for argparse's `type`."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

__all__ = ["at_least", "chunks", "files", "gpu_layers", "threads", "whole"]


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
    """One file, or several with commas between them, as llama.cpp takes them (parse_csv_row in
    common/arg.cpp); a file that has a comma in its name is one file all the same."""
    return [text] if Path(text).exists() else next(csv.reader([text]))


def gpu_layers(text: str) -> int | Literal["auto"]:
    """Layers on the GPU; -1 for all. To llama.cpp -1 means auto, and any number below it all
    (common/arg.cpp)."""
    if text in ("auto", "-1"):
        return "auto"
    return -1 if text == "all" else max(-1, whole(text))
