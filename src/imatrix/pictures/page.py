"""The page that a picture is drawn on, with places in inches, and matplotlib's settings."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from imatrix.pictures.looks import LOOKS, Style
from imatrix.pictures.texts import SMALL, TEXT, TITLE, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "LEAST_PLOT",
    "MARGIN",
    "WIDE",
    "Page",
    "drawing",
    "within",
]

# inches
WIDE = 8.0  # panels stand side by side from this width on
MARGIN = 0.14
LEAST_PLOT = 1.2  # width of a plot, however wide the labels are

_LOCK = threading.RLock()


# groups of matplotlib's settings that may show in a picture
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
    """matplotlib with its defaults instead of the user's settings. Settings belong to the process,
    so that one thread at a time draws."""
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
        # the first comes with matplotlib; the others are for a browser that lacks it
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    }
    with _LOCK, mpl.rc_context(ours), warnings.catch_warnings():
        # names may be in any script; what the font lacks is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _shows(key: str) -> bool:
    return key.split(".")[0] in _GROUPS and key != "figure.hooks"


class Page:
    """A figure that is filled from the top, in inches; made when its height is known."""

    def __init__(self, style: Style, width: float, title: str, notes: Sequence[str]) -> None:
        self.style: Style = style
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
        """The figure; not before `finish` has made it."""
        assert self._figure is not None, "the page is not finished"
        return self._figure

    def take(self, height: float) -> float:
        """Reserve a strip and give its top."""
        top = self.y
        self.y += height
        return top

    def add(self, step: Callable[[], object]) -> None:
        """Note a step that draws something once there is a figure."""
        self._steps.append(step)

    def line(self, text: str, size: float, height: float, **how: Any) -> None:
        """A line of text, the next from the top."""
        top = self.take(height)
        self.add(lambda: self.text(MARGIN, top, text, size, **how))

    def finish(self) -> Figure:
        """Make the figure, as high as it needs to be, and draw everything on it."""
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
        # set here, since ticks are made when they are drawn, by then with the user's settings
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


def within(value: float, low: float, high: float) -> float:
    """The value, or the limit that it is beyond."""
    return min(max(value, low), high)
