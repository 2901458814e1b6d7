"""A command's words: data to stdout, messages for a person at a terminal, or in a log, to stderr.

Text may come from files: nothing in it acts on the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import rich.text
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import Style

from imatrix.words import printable

__all__ = ["Console", "Terminal", "Text"]

# Wide enough for a table in a file or a pipe, which has no width to fit.
_WIDE = 120


class Text(rich.text.Text):
    """One line of text, of which nothing acts on the terminal: see printable()."""

    def __init__(self, text: str = "", style: str | Style = "") -> None:
        super().__init__(printable(text), style)


class Console(rich.console.Console):
    """Rich's, for text that comes from files: it has no markup and no emoji codes, a string is one
    line, and what would act on the terminal is spelled out, wherever it stands."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """As Rich's."""
        super().print(*(Text(o) if isinstance(o, str) else o for o in objects), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As Rich's. The strings inside a table, a bar and everything else pass through here, when
        their lines are broken already."""
        for segment in super().render(renderable, options):
            if not segment.control and (text := printable(segment.text, "\n\t")) != segment.text:
                segment = Segment(text, segment.style)
            yield segment


class Terminal:
    """Where a command's output goes: data to stdout, everything else to stderr.

    Args:
        verbose: show the engine's log, and tracebacks of errors.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        self.out = Console()
        self.err = Console(stderr=True)
        self.verbose = verbose
        if not self.out.is_terminal:
            self.out.width = max(self.out.width, _WIDE)

    def note(self, text: str) -> None:
        """A message on stderr, one line however long."""
        self.err.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning on stderr, one line."""
        self.err.print(Text("warning: ", "yellow") + Text(text), soft_wrap=True)

    def error(self, text: str) -> None:
        """An error on stderr, one line."""
        self.err.print(Text("error: ", "bold red") + Text(text), soft_wrap=True)

    def traceback(self, text: str) -> None:
        """Several lines on stderr."""
        for line in text.splitlines():
            self.note(line)
