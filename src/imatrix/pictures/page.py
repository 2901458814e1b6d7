"""The page that pictures are drawn on: matplotlib's settings, places in inches, scales, texts."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "LOOKS",
    "MARGIN",
    "SMALL",
    "TEXT",
    "TITLE",
    "Look",
    "Page",
    "Style",
    "clean",
    "drawing",
    "fitted",
    "labels_width",
    "percent",
    "width_of",
    "within",
    "wrapped",
]

Style = Literal["light", "dark"]

# Inches. Text sizes are points, 72 an inch.
WIDE = 8.0  # panels stand side by side from this width on
MARGIN = 0.14


TITLE, TEXT, SMALL = 12.0, 9.0, 8.0


_LOCK = threading.RLock()


# what of matplotlib's settings may show in a picture
_GROUPS = [
    "axes",
    "font",
    "figure",
    "grid",
    "hatch",
    "image",
    "legend",
    "lines",
    "mathtext",
    "patch",
    "path",
    "savefig",
    "scatter",
    "svg",
    "text",
    "xtick",
    "ytick",
    "agg",
]


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib with its defaults instead of the user's settings, which belong to the process:
    hence one at a time."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'imatrix[plot]' (or pip install matplotlib)"
        ) from error
    ours = {key: value for key, value in mpl.rcParamsDefault.items() if _shows(key)}
    ours |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "imatrix",
        "text.parse_math": False,  # a weight's name is not a formula
        "hatch.linewidth": 0.7,
        "font.size": TEXT,
        # the first comes with matplotlib; the others are for a browser that has it not
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    }
    with _LOCK, mpl.rc_context(ours), warnings.catch_warnings():
        # names may be in any script; what the font lacks is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _shows(key: str) -> bool:
    return key.split(".")[0] in _GROUPS and key != "figure.hooks"


@dataclass(frozen=True)
class Look:
    """Colours. Those of the lines are of Okabe and Ito's set, which colour-blind people tell
    apart (jfly.uni-koeln.de/color), the vermilion darker on white, for text."""

    paper: str
    ink: str
    muted: str
    frame: str
    absent: str
    first: str
    second: str
    line: str
    colours: str
    diverging: tuple[str, ...]


LOOKS = {
    "light": Look(
        paper="#ffffff",
        ink="#1a1d21",
        muted="#555c64",
        frame="#aab1b9",
        absent="#d8dce1",
        first="#0072b2",
        second="#b34700",
        line="#0072b2",
        colours="viridis",
        diverging=("#08519c", "#6baed6", "#fafafa", "#f4a261", "#b35806"),
    ),
    "dark": Look(
        paper="#14171c",
        ink="#eceff2",
        muted="#a9b0b9",
        frame="#505862",
        absent="#2a2f36",
        first="#56b4e9",
        second="#e69f00",
        line="#56b4e9",
        colours="viridis",
        diverging=("#8fd0ff", "#3f8ac6", "#5d6570", "#c98332", "#ffc078"),
    ),
}


class Page:
    """A figure that is filled from the top, in inches; made when its height is known."""

    def __init__(self, style: Style, width: float, title: str, notes: Sequence[str]) -> None:
        self.look = LOOKS[style]
        self.width = width
        self.title = title
        self.y = MARGIN
        self._steps: list[Callable[[], object]] = []
        self._figure: Figure | None = None
        room = width - 2 * MARGIN
        for line in wrapped(title, room, TITLE, bold=True):
            self.line(line, TITLE, 0.22, weight="bold")
        for note in notes:
            for line in wrapped(note, room, SMALL):
                self.line(line, SMALL, 0.16, color=self.look.muted)
        self.y += 0.1

    @property
    def figure(self) -> Figure:
        assert self._figure is not None, "the page is not finished"
        return self._figure

    def take(self, height: float) -> float:
        """Reserve a strip and give its top."""
        top = self.y
        self.y += height
        return top

    def add(self, step: Callable[[], object]) -> None:
        """Something to draw once there is a figure."""
        self._steps.append(step)

    def line(self, text: str, size: float, height: float, **how: Any) -> None:
        top = self.take(height)
        self.add(lambda: self.text(MARGIN, top, text, size, **how))

    def finish(self) -> Figure:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.y += MARGIN
        self._figure = Figure(figsize=(self.width, self.y), facecolor=self.look.paper)
        FigureCanvasAgg(self._figure)
        self._figure.set_label(self.title)
        for step in self._steps:
            step()
        return self._figure

    def text(self, left: float, top: float, text: str, size: float, **how: Any) -> None:
        """Text whose top left corner is there (or what `ha` and `va` say)."""
        how = {"color": self.look.ink, "va": "top", "ha": "left"} | how
        self.figure.text(left / self.width, 1 - top / self.y, text, size=size, **how)

    def add_line(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """A thin line from one place to another, in inches from the top left."""
        from matplotlib.lines import Line2D

        self.figure.add_artist(
            Line2D(
                [start[0], end[0]],
                [self.y - start[1], self.y - end[1]],
                transform=self.figure.dpi_scale_trans,
                color=self.look.frame,
                linewidth=0.8,
            )
        )

    def axes(self, box: tuple[float, float, float, float], label: str) -> Axes:
        """Axes at (left, top, width, height)."""
        left, top, width, height = box
        axes = self.figure.add_axes(
            (
                left / self.width,
                1 - (top + height) / self.y,
                width / self.width,
                height / self.y,
            ),
            label=label,
            facecolor=self.look.absent,
        )
        # said here, for ticks are made when they are drawn, by then with the user's settings
        axes.tick_params(
            which="both",
            labelsize=SMALL,
            labelcolor=self.look.ink,
            color=self.look.frame,
            length=2.5,
            width=0.8,
            pad=2.5,
        )
        axes.minorticks_off()
        for spine in axes.spines.values():
            spine.set(color=self.look.frame, linewidth=0.8)
        return axes


def percent(share: float) -> str:
    """A share in [0, 1] in two digits; ">99.9 %" if it is nearly all, "<0.01 %" if it is hardly any."""
    value = 100 * share
    if value >= 99.95:
        return "100 %" if share == 1 else ">99.9 %"
    if value < 0.01:
        return "<0.01 %"
    return f"{value:.0f} %" if value >= 9.95 else f"{value:#.2g} %"


def within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def clean(text: str, most: int = 400) -> str:
    """A text from a file as it may be shown: nothing that XML forbids, and not without end."""
    text = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def width_of(text: str, size: float, *, bold: bool = False) -> float:
    """Inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold" if bold else "normal")
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    # Agg rounds each letter to whole pixels: at 100 an inch, a twentieth more in all
    return 1.06 * float(width) / 72


def labels_width(labels: Sequence[str]) -> float:
    """Room for labels left of an axes, in inches."""
    return max(width_of(clean(label, 34), SMALL) for label in labels) + 0.12


def fitted(text: str, room: float, size: float, *, bold: bool = False) -> str:
    """Shortened in the middle until it fits."""
    text = clean(text)
    most = len(text)
    while most > 5 and width_of(text, size, bold=bold) > room:
        most -= 1
        text = clean(text, most) if len(text) > most else text
    return text


def wrapped(text: str, room: float, size: float, *, bold: bool = False) -> list[str]:
    """Lines that fit; "" gives none."""
    lines: list[str] = []
    for word in clean(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size, bold=bold) <= room:
            lines[-1] = longer
        else:
            lines.append(fitted(word, room, size, bold=bold))
    return lines
