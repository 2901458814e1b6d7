"""Talking to a person at a terminal, or to a log: messages, progress, the engine's log."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import rich.text
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.segment import Segment
from rich.style import Style

from imatrix.files.names import encoded
from imatrix.words import duration, plural, printable, size

if TYPE_CHECKING:
    import imatrix

__all__ = [
    "CollectProgress",
    "Console",
    "DataOut",
    "StepProgress",
    "Terminal",
    "Text",
    "describe",
    "describe_bytes",
    "describe_tensors",
    "write_json",
]

# bytes of a name that is not UTF-8
_RAW = re.compile("[\udc80-\udcff]")

# Wide enough for a table in a file or a pipe, where there is no width to fit.
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
        """As Rich's. The strings inside a table, a bar, and whatever else there is come by here,
        when their lines are broken already."""
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
        self.err.print(Text("warning: ", "yellow") + Text(text), soft_wrap=True)

    def error(self, text: str) -> None:
        self.err.print(Text("error: ", "bold red") + Text(text), soft_wrap=True)

    def traceback(self, text: str) -> None:
        """Several lines on stderr."""
        for line in text.splitlines():
            self.note(line)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Show Python's warnings and the engine's log as plain lines, until the block ends."""
        log = logging.getLogger("imatrix.engine")
        handler = _EngineLog(self)
        level, propagate = log.level, log.propagate
        log.addHandler(handler)
        package, own = logging.getLogger("imatrix"), _OwnLog(self)
        package.addHandler(own)
        log.setLevel(logging.INFO if self.verbose else logging.WARNING)
        log.propagate = False
        # whatever handler a library has for what it logs
        factory = logging.getLogRecordFactory()
        logging.setLogRecordFactory(_printable_records(factory))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = self._show_warning
                yield
        finally:
            package.removeHandler(own)
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate
            logging.setLogRecordFactory(factory)

    def _show_warning(
        self, message: Warning | str, category: type[Warning], *_where: object, **_more: object
    ) -> None:
        self.warn(str(message))


# The head's tensors are unused whenever the trunk runs alone. Contexts get somewhat more room than
# chunks need, in multiples of 256 (llama_context), which may be more than the model was trained
# on: of chunks that are, Collector warns. Overrides are what the user asked for (llama-quant.cpp).
# What is better with tensors on the CPU is --no-mmap here (docs/backends.md).
_NO_NEWS = (
    "unused tensor",
    "n_ctx is not divisible by n_seq_max",
    "possible training context overflow",
    "applying manual override",
    "tensor overrides to CPU are used with mmap",
)


class _EngineLog(logging.Handler):
    """The engine's log on stderr.

    Unless the terminal is verbose, only what is news; errors come back as exceptions that carry
    them.
    """

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if self._terminal.verbose:
            self._terminal.note(line)
        elif record.levelno == logging.WARNING and not any(known in line for known in _NO_NEWS):
            self._terminal.warn(f"engine: {line.strip()}")


class _OwnLog(logging.Handler):
    """What the package itself has to tell, on stderr."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.WARNING)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self._terminal.warn(record.getMessage())


def _printable_records(make: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
    """A maker of log records of which nothing acts on the terminal."""

    def made(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        try:
            record.msg, record.args = printable(record.getMessage(), "\t"), None
        except Exception:
            return record  # its handler says that the message and its arguments do not fit
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            record.exc_text = printable(trace, "\n\t")
        return record

    return made


class CollectProgress:
    """Progress of a run: a bar on a terminal, a line now and then elsewhere.

    Args:
        every: chunks between two lines; 0 for a line at the start and the end only.
    """

    def __init__(self, terminal: Terminal, label: str, *, every: int) -> None:
        self._terminal = terminal
        self._label = printable(label)
        self._every = every
        self._shown: int | None = None  # chunks in the last line
        self._last: imatrix.Progress | None = None
        self._bar = _bar(terminal) if terminal.err.is_terminal else None
        self._task: TaskID | None = None
        self._experts: TaskID | None = None

    def __enter__(self) -> CollectProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=None, info="loading")
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._last is not None and self._shown != self._last.chunks:
            self._line(self._last)

    def __call__(self, progress: imatrix.Progress) -> None:
        """Show where the run stands."""
        self._last = progress
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                total=progress.total,
                completed=progress.chunks + progress.ahead,
                info=describe(progress),
            )
            if progress.experts is not None:
                self._show_experts(self._bar, progress.experts)
        elif self._shown is None or (
            self._every and progress.chunks // self._every > self._shown // self._every
        ):
            self._line(progress)

    def _show_experts(self, bar: Progress, experts: imatrix.ExpertCoverage) -> None:
        """A second bar: how many of them have the rows that they shall have."""
        if self._experts is None:
            self._experts = bar.add_task("experts", total=experts.n_experts, info="")
        bar.update(self._experts, completed=experts.n_reached, info=_describe_experts(experts))

    def _line(self, progress: imatrix.Progress) -> None:
        self._shown = progress.chunks
        text = f"{self._label}: {describe(progress)}"
        if progress.experts is not None:
            text += f", experts {_describe_experts(progress.experts)}"
        self._terminal.note(text)


class StepProgress:
    """Progress of a shorter work: a bar on a terminal, nothing elsewhere.

    Args:
        told: how a position is told, from what is done and the total.
    """

    def __init__(self, terminal: Terminal, label: str, told: Callable[[int, int], str]) -> None:
        self._bar = _bar(terminal) if terminal.err.is_terminal else None
        self._label = printable(label)
        self._told = told
        self._task: TaskID | None = None

    def __enter__(self) -> StepProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=None, info="reading")
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show how much is done."""
        if self._bar is not None and self._task is not None and total:
            self._bar.update(self._task, total=total, completed=done, info=self._told(done, total))


def write_json(data: object, *, allow_nan: bool = True) -> None:
    """Data as JSON on stdout. JSON spells out what is not ASCII, but not DEL, which is."""
    text = json.dumps(data, indent=2, allow_nan=allow_nan).replace("\x7f", "\\u007f")
    sys.stdout.write(text + "\n")


class DataOut:
    """stdout for data that are to be exact, as CSV: the bytes of a name that is not UTF-8 come out
    as they were. At a terminal, which would act on some characters, those are spelled out."""

    def write(self, text: str) -> None:
        """As a file's."""
        if sys.stdout.isatty():
            sys.stdout.write(printable(text, "\n"))
        elif _RAW.search(text) and hasattr(sys.stdout, "buffer"):
            sys.stdout.flush()
            sys.stdout.buffer.write(encoded(text))
        else:
            sys.stdout.write(text)


def describe_tensors(done: int, total: int) -> str:
    """Progress of a quantization: "tensor 3/35"."""
    return f"tensor {done}/{total}"


def describe_bytes(done: int, total: int) -> str:
    """Progress of a copy: "1.5 of 13.7 GiB"."""
    return f"{size(done)} of {size(total)}"


def _bar(terminal: Terminal) -> Progress:
    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[info]}", markup=False),
    ]
    return Progress(*columns, console=terminal.err)


def describe(progress: imatrix.Progress) -> str:
    """Progress in a line: "chunk 12/216, 14057 tokens/s, ETA 0:13, PPL 9.4213"."""
    parts = [f"chunk {progress.chunks}" + (f"/{progress.total}" if progress.total else "")]
    if progress.ahead:
        parts[0] += f" (+{progress.ahead})"
    if progress.workers is not None:
        parts.append(plural(progress.workers, "worker"))
    if progress.seconds > 0:
        parts.append(f"{progress.tokens / progress.seconds:.0f} tokens/s")
    if progress.total and 0 < progress.chunks < progress.total:
        left = (progress.total - progress.chunks) * progress.seconds / progress.chunks
        parts.append(f"ETA {duration(left)}")
    if progress.perplexity is not None:
        parts.append(f"PPL {progress.perplexity.value:.4f}")
    return ", ".join(parts)


def _describe_experts(experts: imatrix.ExpertCoverage) -> str:
    """Experts in a line: "23/24 at 50 rows, thinnest blk.1 expert 1: 40"."""
    block, expert, rows = experts.thinnest
    return (
        f"{experts.n_reached}/{experts.n_experts} at {experts.wanted} rows, thinnest {block} "
        f"expert {expert}: {rows}"
    )
