"""The measurements of test_collect.py: their file, written after each one, with table and picture."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import models

RESULTS = Path(__file__).parent / "results"
BARE, OURS = "bare forward pass, trunk", "imatrix, trunk"
BARE_BOTH, OURS_BOTH = "bare forward pass, trunk + head", "imatrix, trunk + head"
THEIRS = "llama-imatrix --no-ppl"
THEIRS_BOTH = "llama-imatrix --no-ppl --nextn, mended"

Key = tuple[str, int, str]  # model, tokens a chunk, variant


class Cell(NamedTuple):
    """One measurement: seconds for a chunk, and the peak of resident bytes."""

    seconds: float
    peak: int


def over(cells: list[Cell], base: list[Cell]) -> list[float]:
    """Ratios of the times, pass by pass; unfinished passes are left out."""
    return [one.seconds / other.seconds for one, other in zip(cells, base, strict=False)]


def machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (found := re.search(r"model name\s*: (.*)", cpuinfo.read_text())):
        name = found[1]
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


@dataclass
class Store:
    """Measurements by model, chunk size and variant, in the order of the passes."""

    about: dict[str, Any]
    cells: dict[Key, list[Cell]]
    folder: Path = RESULTS

    @classmethod
    def open(cls, size: str, *, resume: bool, folder: Path = RESULTS) -> Store:
        """A new store; with `resume` the existing one, if it is of this machine and size."""
        about = {
            "size": size,
            "machine": machine(),
            "date": str(datetime.date.today()),
            "load": os.getloadavg()[0],
        }
        path = folder / "collect.json"
        if resume and path.is_file():
            kept = json.loads(path.read_text())
            if all(kept["about"][name] == about[name] for name in ("size", "machine")):
                cells = {
                    (model, n_ctx, variant): [Cell(*cell) for cell in values]
                    for model, n_ctx, variant, values in kept["cells"]
                }
                return cls(kept["about"], cells, folder)
        return cls(about, {}, folder)

    def has(self, key: Key, measuring_pass: int) -> bool:
        return len(self.cells.get(key, [])) >= measuring_pass

    def add(self, key: Key, cell: Cell) -> None:
        """Add a measurement, and write all of them."""
        self.cells.setdefault(key, []).append(cell)
        self.folder.mkdir(exist_ok=True)
        kept = [[*key, values] for key, values in self.cells.items()]
        temporary = self.folder / "collect.json.part"
        temporary.write_text(json.dumps({"about": self.about, "cells": kept}, indent=1) + "\n")
        temporary.replace(self.folder / "collect.json")
        (self.folder / "collect.md").write_text(self.table())

    def grids(self) -> dict[tuple[str, int], dict[str, list[Cell]]]:
        """The variants of each model and chunk size."""
        found: dict[tuple[str, int], dict[str, list[Cell]]] = {}
        for (model, n_ctx, variant), values in sorted(
            self.cells.items(), key=lambda item: item[0][:2]
        ):
            found.setdefault((model, n_ctx), {})[variant] = values
        return found

    def table(self) -> str:
        sizes = sorted({len(values) for values in self.cells.values()})
        passes = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
        lines = [
            "# Seconds per chunk",
            "",
            f"{self.about['date']}, {self.about['machine']}, {passes} interleaved passes; median "
            "[lowest, highest], of the ratios too, which are of times of the same pass. Peak "
            "resident memory has the mapped model in it. Made by `make bench` "
            "(benchmarks/test_collect.py). llama-imatrix's time is the difference of two runs, and "
            "spreads the more for it. It is the pinned engine's own program; with --nextn that one "
            "ends on every model, so its two wrong calls are replaced where it is built for this "
            "(vendor/engine.cmake).",
        ]
        if self.about["load"] > 0.5:
            lines += [
                "",
                f"The load average before the run was {self.about['load']:.1f}. Where that was not "
                "another benchmark, just ended, other programs had the processors too.",
            ]
        for (model, n_ctx), variants in self.grids().items():
            options = models.options(model, self.about["size"])
            size = models.model(model, self.about["size"]).stat().st_size / 1e9
            vocabulary = options.get("n_vocab", 151936)
            lines += [
                "",
                f"## {model}, chunks of {n_ctx}",
                "",
                f"{options['arch']}, {options['n_layer']} + {options['n_nextn']} layers, "
                f"{size:.2f} GB F16, vocabulary of {vocabulary}",
                "",
                "| variant | s/chunk | of llama-imatrix | of llama-imatrix --nextn "
                "| of the bare forward pass | peak, GB |",
                "|---|---|---|---|---|---|",
            ]
            middle = {
                v: statistics.median(c.seconds for c in cells) for v, cells in variants.items()
            }

            def ratio(variant: str, base: str, variants: dict[str, list[Cell]] = variants) -> str:
                if base not in variants:
                    return ""
                found = over(variants[variant], variants[base])
                return f"{statistics.median(found):.3f} [{min(found):.3f}, {max(found):.3f}]"

            for variant, cells in variants.items():
                seconds = [cell.seconds for cell in cells]
                bare = BARE_BOTH if variant in (BARE_BOTH, OURS_BOTH) else BARE
                lines.append(
                    f"| {variant} | {middle[variant]:.2f} [{min(seconds):.2f}, {max(seconds):.2f}] "
                    f"| {ratio(variant, THEIRS)} | {ratio(variant, THEIRS_BOTH)} "
                    f"| {ratio(variant, bare)} "
                    f"| {max(cell.peak for cell in cells) / 1e9:.2f} |"
                )
        return "\n".join(lines) + "\n"

    def draw(self) -> None:
        """Draw results/collect.png: times relative to the bare forward pass of the trunk."""
        grids = {key: variants for key, variants in self.grids().items() if BARE in variants}
        if not grids:
            return
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        names = sorted({model for model, _ in grids})
        chunks = sorted({n_ctx for _, n_ctx in grids})
        figure, axes = plt.subplots(
            len(chunks), len(names), squeeze=False, sharex=True, sharey=True,
            figsize=(1.6 + 3.2 * len(names), 0.6 + 2.4 * len(chunks)), layout="constrained",
        )  # fmt: skip
        order = list(dict.fromkeys(v for variants in grids.values() for v in variants))
        for row, n_ctx in enumerate(chunks):
            for column, name in enumerate(names):
                axis = axes[row][column]
                axis.set_title(f"{name}, {n_ctx} tokens", fontsize=10)
                axis.axvline(1, color="0.6", linewidth=0.8, zorder=0)
                variants = grids.get((name, n_ctx), {})
                if not variants:
                    axis.set_visible(False)
                    continue
                for place, variant in enumerate(order):
                    if variant not in variants:
                        continue
                    times = over(variants[variant], variants[BARE])
                    middle = statistics.median(times)
                    color = (
                        "#b0b0b0" if variant.startswith("bare")
                        else "#2a6fbb" if variant.startswith("imatrix")
                        else "#d08030"
                    )  # fmt: skip
                    axis.barh(
                        place, middle, color=color,
                        xerr=[[middle - min(times)], [max(times) - middle]], error_kw={"lw": 0.8},
                    )  # fmt: skip
                    axis.annotate(
                        f"{middle:.2f}", (0, place), (4, 0), textcoords="offset points",
                        va="center", fontsize=8, color="white",
                    )  # fmt: skip
                axis.set_yticks(range(len(order)), order, fontsize=8)
                axis.tick_params(axis="x", labelsize=8)
                axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].invert_yaxis()
        figure.supxlabel("time a chunk, over the bare forward pass of the trunk", fontsize=9)
        figure.savefig(self.folder / "collect.png", dpi=120)
        plt.close(figure)
