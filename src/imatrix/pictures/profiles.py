"""`channels`: the mean squared activation of each channel, in their order and sorted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from imatrix.entries import Entry
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.pictures.arguments import check_matrix, describe_matrix, find_weight
from imatrix.pictures.heatmaps import row_ticks
from imatrix.pictures.looks import Style
from imatrix.pictures.numbers import Profile, heaviest_count, profile
from imatrix.pictures.page import MARGIN, WIDE, Page, drawing, within
from imatrix.pictures.scales import add_scale, log_scale, number_ticks
from imatrix.pictures.texts import SMALL, TEXT, clean, fitted, percent, wrapped
from imatrix.words import plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "channels",
]

_MOST_WEIGHTS = 16
# Channels that are drawn each by itself; of more, neighbours share a column.
_MOST_COLUMNS = 800


def channels(
    matrix: ImportanceMatrix,
    weights: str | Sequence[str],
    *,
    expert: int | Literal["pooled", "each"] = "pooled",
    heaviest: int = 5,
    name: str = "",
    style: Style = "light",
    width: float | None = None,
) -> Figure:
    """Profiles: mean squared activation by channel, in their order and sorted.

    The heaviest channels are named by their number, from 0, and their share of the sum over all
    channels. Of more than 800 channels neighbours share a column: from their least to their
    largest.

    Args:
        weights: names of one weight or of up to 16; `.weight` may be left out.
        expert: of a weight with several matrices (experts), "pooled" for all together (sums over
            rows, so that an expert weighs as much as the rows it saw), the number of one, or
            "each" for a map of experts against channels, where of more than 800 channels the
            largest of neighbours is shown. Weights of one matrix have nothing to choose.
        heaviest: how many channels to name, 0 to 20; fewer if there is no room for them.
        name, style, width: as for `layers`.

    Returns:
        A figure with, for each weight, the axes "<weight> channels" and "<weight> sorted", or
        "<weight> experts" for the map.

    Raises:
        ImportError, ValueError: as for `layers`.
        KeyError: there is no such weight; the message names the nearest ones.
        IndexError: there is no such expert.
    """
    check_matrix(matrix, style, width)
    names = [
        find_weight(matrix, each) for each in ([weights] if isinstance(weights, str) else weights)
    ]
    if not 1 <= len(names) <= _MOST_WEIGHTS:
        raise ValueError(f"weights must be 1 to {_MOST_WEIGHTS} names, got {len(names)}")
    if not 0 <= heaviest <= 20:
        raise ValueError(f"heaviest must be 0 to 20, got {heaviest}")
    if isinstance(expert, str) and expert not in ("pooled", "each"):
        raise ValueError(f"expert must be a number, 'pooled' or 'each', got {expert!r}")
    for each in names:
        n_mat = matrix[each].n_mat
        if not isinstance(expert, str) and n_mat > 1 and not 0 <= expert < n_mat:
            raise IndexError(f"{each} has experts 0 to {n_mat - 1}, not {expert}")
    with drawing():
        page = Page(
            style,
            width or 9.0,
            "Mean squared activation by channel",
            [describe_matrix(matrix, name)],
        )
        for each in names:
            entry = matrix[each]
            if expert == "each" and entry.n_mat > 1:
                _add_expert_profiles(page, each, entry, heaviest, style)
            else:
                one = expert if isinstance(expert, int) and entry.n_mat > 1 else None
                _add_profile(page, each, entry, one, heaviest)
        return page.finish()


def _add_profile(page: Page, name: str, entry: Entry, expert: int | None, heaviest: int) -> None:
    found = profile(entry, expert)
    whose = ""
    if entry.n_mat > 1:
        whose = f"all {entry.n_mat} matrices (experts) pooled" if expert is None else ""
        whose = whose or f"expert {expert} of {entry.n_mat}"
    _add_heading(page, name, entry.n_in, found, whose)
    if found is None or not found.values.any():
        page.take(0.12)
        return
    wide = page.width >= WIDE
    left = MARGIN + 0.55
    free = page.width - left - MARGIN
    first = 0.66 * free - 0.1 if wide else free
    second = 0.34 * free - 0.1 if wide else free
    top = page.take(0.44 + 1.7 + 0.46) + 0.44
    other = top if wide else page.take(0.1 + 1.5 + 0.46) + 0.1
    page.add(lambda: _draw_channels(page, name, found, (left, top, first, 1.7), heaviest))
    box = (left + first + 0.2, other, second, 1.7) if wide else (left, other, second, 1.5)
    page.add(lambda: _draw_sorted(page, name, found, box, heaviest, labels=not wide))


def _add_heading(
    page: Page, name: str, n_in: int, found: Profile | None, whose: str, *, pooled: bool = False
) -> None:
    room = page.width - 2 * MARGIN
    for line in wrapped(clean(name, 80), room, TEXT, bold=True):
        page.line(line, TEXT, 0.18, weight="bold")
    facts = [f"{n_in} channels"] + ([whose] if whose else [])
    if found is None:
        facts.append("no rows: there is nothing to draw")
    elif not found.values.any():
        facts.append(f"{plural(found.rows, 'row')} of zeros: there is nothing to draw")
    else:
        facts.append(f"{'pooled, they have ' if pooled else ''}{plural(found.rows, 'row')}")
        k = heaviest_count(n_in)
        share = float(np.sort(found.shares)[-k:].sum())
        of = f"the heaviest 1 % ({plural(k, 'channel')}) " if n_in >= 100 else "the heaviest one "
        facts.append(f"{of}{'hold' if k > 1 else 'holds'} {percent(share)} of the sum")
        if zeros := int(np.count_nonzero(found.values == 0)):
            facts.append(f"{zeros} always 0, not drawn")
    for line in wrapped("; ".join(facts), room, SMALL):
        page.line(line, SMALL, 0.16, color=page.look.muted)


def _limits(values: NDArray[np.float64]) -> tuple[float, float]:
    some = values[values > 0]
    return float(some.min()) / 1.6, float(some.max()) * 1.6


def _draw_channels(
    page: Page,
    name: str,
    found: Profile,
    box: tuple[float, float, float, float],
    heaviest: int,
) -> None:
    axes = page.axes(box, f"{name} channels")
    axes.set_facecolor(page.look.paper)
    values = found.values
    low, high = _limits(values)
    axes.set_yscale("log")
    n = len(values)
    per = -(-n // _MOST_COLUMNS)
    if per == 1:
        axes.plot(np.arange(n), np.where(values > 0, values, np.nan), color=page.look.line, lw=0.7)
        what = "channel"
    else:
        starts = np.arange(0, n, per)
        least = np.maximum(np.minimum.reduceat(values, starts), low)
        most = np.maximum(np.maximum.reduceat(values, starts), low)
        axes.fill_between(starts, least, most, color=page.look.line, lw=0.4)
        what = f"channel (a column: the least to the largest of {per})"
    axes.set(xlim=(-0.01 * n - 0.5, 1.01 * n - 0.5), ylim=(low, high))
    number_ticks(axes, low, high, box[3], axis="y", shown=True)
    axes.set_ylabel("mean square", size=SMALL, color=page.look.muted)
    axes.set_xlabel(fitted(what, box[2], SMALL), size=SMALL, color=page.look.muted)
    _channel_ticks(axes, n, box[2])
    _name_channels(page, axes, found, heaviest, box)


def _channel_ticks(axes: Axes, n: int, width: float) -> None:
    from matplotlib.ticker import MaxNLocator

    most = int(within(width / 0.7, 2, 9))
    ticks = [t for t in MaxNLocator(most, integer=True).tick_values(0, n - 1) if 0 <= t < n]
    axes.set_xticks(ticks, [f"{int(tick)}" for tick in ticks])


def _name_channels(
    page: Page,
    axes: Axes,
    found: Profile,
    heaviest: int,
    box: tuple[float, float, float, float],
    *,
    mark: bool = True,
) -> None:
    """Numbers and shares of the heaviest channels above the axes, each with a line to its own."""
    left, top, width, _ = box
    slot = 0.58
    named = sorted(found.heaviest(min(heaviest, int(width / slot))))
    low, high = axes.get_xlim()
    at = [(channel - low) / (high - low) * width for channel in named]
    for channel, place, label in zip(named, at, _spread(at, slot, width), strict=True):
        page.text(left + label, top - 0.42, f"#{channel}", SMALL, ha="center", weight="bold")
        page.text(left + label, top - 0.28, percent(float(found.shares[channel])), SMALL,
                  ha="center", color=page.look.muted)  # fmt: skip
        page.add_line((left + label, top - 0.13), (left + place, top))
    if mark and named:
        axes.plot(
            named, found.values[named], linestyle="", marker="o", markersize=4.5,
            markerfacecolor="none", markeredgecolor=page.look.second, markeredgewidth=1.3,
            label="heaviest",
        )  # fmt: skip


def _spread(at: Sequence[float], slot: float, width: float) -> list[float]:
    """Places for labels `slot` wide, in order, as near to `at` as they fit into `width`."""
    # Neighbours that would overlap move together, centred on what they belong to.
    groups: list[tuple[list[float], float]] = []
    for place in at:
        group, centre = [place], within(place, slot / 2, width - slot / 2)
        while groups and groups[-1][1] + (len(groups[-1][0]) + len(group)) * slot / 2 > centre:
            group = groups.pop()[0] + group
            half = len(group) * slot / 2
            centre = within(sum(group) / len(group), half, width - half)
        groups.append((group, centre))
    return [
        centre + (n - (len(group) - 1) / 2) * slot
        for group, centre in groups
        for n in range(len(group))
    ]


def _draw_sorted(
    page: Page,
    name: str,
    found: Profile,
    box: tuple[float, float, float, float],
    heaviest: int,
    *,
    labels: bool,
) -> None:
    axes = page.axes(box, f"{name} sorted")
    axes.set_facecolor(page.look.paper)
    ordered = np.sort(found.values[found.values > 0])[::-1]
    n = len(ordered)
    rank = np.unique(np.geomspace(1, n, 400).round().astype(np.int64))
    low, high = _limits(found.values)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(float(found.values.mean()), color=page.look.muted, lw=0.9, linestyle=(0, (4, 2)))
    axes.plot(rank, ordered[rank - 1], color=page.look.line, lw=1.4)
    k = min(heaviest, n)
    axes.plot(
        np.arange(1, k + 1), ordered[:k], linestyle="", marker="o", markersize=4.5,
        markerfacecolor="none", markeredgecolor=page.look.second, markeredgewidth=1.3,
        label="heaviest",
    )  # fmt: skip
    axes.set(xlim=(0.8, len(found.values) * 1.25), ylim=(low, high))
    number_ticks(axes, low, high, box[3], axis="y", shown=labels)
    number_ticks(axes, *axes.get_xlim(), box[2], axis="x", shown=True)
    if labels:
        axes.set_ylabel("mean square", size=SMALL, color=page.look.muted)
    axes.set_xlabel("rank (dashed: mean)", size=SMALL, color=page.look.muted)


def _add_expert_profiles(page: Page, name: str, entry: Entry, heaviest: int, style: Style) -> None:
    """A map of experts against channels."""
    found = profile(entry)
    unseen = int(np.count_nonzero(np.broadcast_to(entry.counts == 0, entry.n_mat)))
    whose = f"{entry.n_mat} matrices (experts)"
    if unseen:
        whose += f", {unseen} without rows"
    _add_heading(page, name, entry.n_in, found, whose, pooled=True)
    if found is None or not found.values.any():
        page.take(0.12)
        return
    seen = np.broadcast_to(entry.counts > 0, entry.n_mat)
    per = -(-entry.n_in // _MOST_COLUMNS)
    starts = np.arange(0, entry.n_in, per)
    values = np.maximum.reduceat(entry.importance, starts, axis=1)
    values = np.where(seen[:, np.newaxis] & (values > 0), values, np.nan)
    cmap, norm = log_scale(values[np.isfinite(values)], style)
    left = MARGIN + 0.55
    width = page.width - left - MARGIN
    height = within(0.05 * entry.n_mat, 1.4, 5.0)
    box = (left, page.take(0.44 + height + 0.46) + 0.44, width, height)

    def draw() -> None:
        axes = page.axes(box, f"{name} experts")
        axes.imshow(
            values,
            cmap=cmap,
            norm=norm,
            aspect="auto",
            interpolation="none",
            extent=(-0.5, len(starts) * per - 0.5, entry.n_mat - 0.5, -0.5),
        )
        axes.set_xlim(-0.5, entry.n_in - 0.5)
        _channel_ticks(axes, entry.n_in, width)
        row_ticks(axes, [str(n) for n in range(entry.n_mat)], height / entry.n_mat, shown=True)
        axes.set_ylabel("expert", size=SMALL, color=page.look.muted)
        what = "channel" + (f" (a column: the largest of {per})" if per > 1 else "")
        axes.set_xlabel(fitted(what, width, SMALL), size=SMALL, color=page.look.muted)
        _name_channels(page, axes, found, heaviest, box, mark=False)

    page.add(draw)
    label = "mean squared activation (log scale); plain: no rows, or only zeros"
    add_scale(page, (left, min(width, 4.2)), cmap, norm, label)
    page.take(0.16)
