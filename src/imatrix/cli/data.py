"""Data on stdout, for programs: JSON and CSV."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Sequence

from imatrix.files.names import encoded
from imatrix.words import printable

__all__ = ["DataOut", "write_csv", "write_json"]

# bytes of a name that is not UTF-8
_RAW = re.compile("[\udc80-\udcff]")


def write_json(data: object, *, allow_nan: bool = True) -> None:
    """Data as JSON on stdout. The json module spells out what is not ASCII, and DEL, which is ASCII,
    is spelled out here."""
    text = json.dumps(data, indent=2, allow_nan=allow_nan).replace("\x7f", "\\u007f")
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # here, where a closed pipe is expected


def write_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A heading and a line for each row, on stdout; None is empty, and a float is written so that
    it comes back."""
    writer = csv.writer(DataOut(), lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    sys.stdout.flush()  # here, where a closed pipe is expected


class DataOut:
    """stdout for data that must be exact, as CSV: the bytes of a name that is not UTF-8 come out as
    they were. At a terminal, characters that it would act on are spelled out."""

    def write(self, text: str) -> None:
        """As a file's."""
        if sys.stdout.isatty():
            sys.stdout.write(printable(text, "\n"))
        elif _RAW.search(text) and hasattr(sys.stdout, "buffer"):
            sys.stdout.flush()
            sys.stdout.buffer.write(encoded(text))
        else:
            sys.stdout.write(text)
