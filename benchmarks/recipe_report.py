"""The results of the study in recipes.py: tables, sentences, and a picture."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from recipe_cells import EFFORTS, MIXTURE, Made, Results, Study, Text, Way
from store import machine

import imatrix
from imatrix import Estimate
from imatrix.recipes.beside import kl_ratio

# What recipes are to reach at equal bytes, over the KL of the mixtures.
MEDIAN, MOST = 0.60, 0.85
NAMES = {"shipped": "The model of the package", "gemma": "Gemma 3 270M"}


class Named(NamedTuple):
    """A study with its results."""

    name: str
    study: Study
    results: Results


class View:
    """One study on one text."""

    def __init__(self, study: Study, results: Results, text: Text) -> None:
        self.study = study
        self.results = results
        self.text = text
        self.main = study.runs()[0][0]
        self.seed = study.seeds[0]

    def made(self, way: Way, mixture: str) -> Made:
        return self.results.made[way, mixture]

    def kl(self, way: Way, mixture: str) -> Estimate:
        found = self.made(way, mixture).evaluations[self.text.name].kl
        assert found is not None
        return found

    def ratio(self, way: Way, mixture: str, over: Way = MIXTURE) -> Estimate:
        """Its KL over another way's, paired."""
        one, other = (self.made(each, mixture).evaluations[self.text.name] for each in (way, over))
        return kl_ratio(one, other)

    def recipe(self, seed: int | None = None, effort: str | None = None) -> Way:
        return Way("recipe", effort or self.main, self.seed if seed is None else seed)

    def saved(self, mixture: str) -> float | None:
        """The share of the mixture's bytes that a recipe of its KL does without.

        Interpolated between the recipes of the study, the logarithm of the KL over the bytes. None
        outside them.
        """
        points = sorted(
            (self.made(self.recipe(), each).bytes, self.kl(self.recipe(), each).value)
            for each in self.study.mixtures
        )
        wanted = math.log(self.kl(MIXTURE, mixture).value)
        for (low, more), (high, less) in itertools.pairwise(points):
            if math.log(less) <= wanted <= math.log(more) and more > less:
                part = (math.log(more) - wanted) / (math.log(more) - math.log(less))
                n_bytes = low + part * (high - low)
                return 1 - n_bytes / self.made(MIXTURE, mixture).bytes
        return None


def verdict(found: Estimate) -> str:
    """What the 95 % interval of a ratio says: "better", "worse" or "open"."""
    return "better" if found.high < 1 else "worse" if found.low > 1 else "open"


# --- words -------------------------------------------------------------------------------------


def _nats(value: float) -> str:
    return f"{value:.4f}" if value >= 0.001 else f"{value:.2g}"


def _ratio(found: Estimate) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.2f}" if n_bytes < 2**24 else f"{n_bytes / 2**20:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def goal(view: View) -> str:
    """Whether the goals were reached, for a sentence."""
    ratios = [
        view.ratio(view.recipe(seed), mixture).value
        for seed in view.study.seeds
        for mixture in view.study.mixtures
    ]
    median, most = statistics.median(ratios), max(ratios)
    told = [
        f"median {median:.2f} ({'reached' if median <= MEDIAN else 'missed'}: at most {MEDIAN:.2f})",
        f"largest {most:.2f} ({'reached' if most <= MOST else 'missed'}: at most {MOST:.2f})",
    ]
    return f"- {view.text.name}: {', '.join(told)}; smallest {min(ratios):.2f}."


def losses(view: View) -> list[str]:
    """Where a recipe is not shown to be better than the mixture, and where another way beats it."""
    lines = []
    ways = [*(view.recipe(seed) for seed in view.study.seeds), *_efforts(view)]
    for way in ways:
        for mixture in view.study.mixtures:
            found = view.ratio(way, mixture)
            if verdict(found) != "better":
                word = "worse than" if verdict(found) == "worse" else "no better for sure than"
                lines.append(
                    f"- {view.text.name}, {way.effort}, seed {way.seed}: {word} {mixture}, "
                    f"{_ratio(found)}."
                )
    for kind in view.study.baselines:
        beaten = [
            f"{mixture} ({_ratio(found)})"
            for mixture in view.study.mixtures
            if verdict(found := view.ratio(view.recipe(), mixture, Way(kind))) == "worse"
        ]
        if beaten:
            lines.append(
                f"- {view.text.name}: beaten by the choice by error ({kind}) at {', '.join(beaten)}."
            )
    return lines


def _efforts(view: View) -> list[Way]:
    return [view.recipe(effort=each) for each in view.study.efforts if each != view.main]


def _main_table(view: View) -> list[str]:
    seeds = view.study.seeds
    head = ["mixture", "MiB", "its KL", "recipe's KL", f"ratio, seed {seeds[0]}"]
    head += [f"seed {seed}" for seed in seeds[1:]] + ["fewer bytes at its KL"]
    rows = []
    for mixture in view.study.mixtures:
        ratios = [view.ratio(view.recipe(seed), mixture) for seed in seeds]
        saved = view.saved(mixture)
        rows.append(
            [
                mixture,
                _mib(view.made(MIXTURE, mixture).bytes),
                _nats(view.kl(MIXTURE, mixture).value),
                _nats(view.kl(view.recipe(), mixture).value),
                *map(_ratio, ratios),
                "" if saved is None else f"{100 * saved:.1f} %",
            ]
        )
    return _table(head, rows)


def _effort_table(views: Sequence[View]) -> list[str]:
    first = views[0]
    ways = [first.recipe(effort=each) for each in first.study.efforts]
    head = ["mixture", *(f"{view.text.name}, {way.effort}" for view in views for way in ways)]
    rows = [
        [mixture, *(_ratio(view.ratio(way, mixture)) for view in views for way in ways)]
        for mixture in first.study.mixtures
    ]
    medians = [
        f"**{statistics.median(view.ratio(way, m).value for m in first.study.mixtures):.2f}**"
        for view in views
        for way in ways
    ]
    return _table(head, [*rows, ["median", *medians]])


def _baseline_table(view: View) -> list[str]:
    ways = [Way(kind) for kind in view.study.baselines]
    head = ["mixture", "recipe", *view.study.baselines, f"recipe over {ways[-1].name}"]
    rows = [
        [
            mixture,
            *(_ratio(view.ratio(way, mixture)) for way in (view.recipe(), *ways)),
            _ratio(view.ratio(view.recipe(), mixture, ways[-1])),
        ]
        for mixture in view.study.mixtures
    ]

    def median(one: Way, over: Way) -> str:
        values = [view.ratio(one, mixture, over).value for mixture in view.study.mixtures]
        return f"**{statistics.median(values):.2f}**"

    medians = [median(way, MIXTURE) for way in (view.recipe(), *ways)]
    return _table(head, [*rows, ["median", *medians, median(view.recipe(), ways[-1])]])


def _prediction_table(view: View) -> list[str]:
    rows = []
    for mixture in view.study.mixtures:
        recipe = view.results.recipes[view.main, view.seed, mixture]
        measured = recipe["measured_kl"]
        predicted = recipe["predicted_kl"]
        rows.append(
            [
                mixture,
                "" if predicted is None else _nats(predicted),
                ""
                if measured is None
                else f"{_nats(measured['value'])} ± {_nats(measured['error'])}",
                _nats(view.kl(view.recipe(), mixture).value),
            ]
        )
    return _table(["size of", "predicted", "measured", f"on the test text, {view.text.name}"], rows)


# --- the page ----------------------------------------------------------------------------------


def _section(named: Named) -> list[str]:
    study, results = named.study, named.results
    views = [View(study, results, text) for text in study.tests]
    first = views[0]
    lines = [f"## {NAMES[named.name]}", ""]
    chunks = [
        next(iter(results.made.values())).evaluations[text.name].n_chunks for text in study.tests
    ]
    lines += textwrap.wrap(
        f"Evaluated on {chunks[0]} chunks of {study.n_ctx} tokens in-domain, which is text like that "
        f"which was measured, and {chunks[1]} chunks out-of-domain. A ratio is the KL of the one over that of the other; in brackets its 95 % "
        "interval, paired: a bootstrap over the chunks of both together. Below 1 the first is nearer "
        "to the source. A seed is a sample of chunks of the measured text; samples overlap.",
        100,
    )
    seeds = f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else "1 seed"
    lines += ["", f"Recipes with the effort {first.main}, {seeds}, all mixtures:", ""]
    lines += [goal(view) for view in views]
    lost = [line for view in views for line in losses(view)]
    lines += ["", "Where recipes lose, or are not shown to win:", ""]
    lines += lost or ["- Nowhere in this study."]
    for view in views:
        lines += ["", f"### At equal bytes: {view.text.name}", "", *_main_table(view)]
    lines += textwrap.wrap(
        "The last column: how much smaller a recipe of the mixture's KL would be, interpolated "
        f"between the recipes above (seed {first.seed}); empty outside them.",
        100,
    )
    if len(study.efforts) > 1:
        lines += ["", "### By effort", ""]
        lines += [f"The ratio to the mixture, seed {first.seed}.", "", *_effort_table(views)]
        known = [each for each in study.efforts if results.minutes.get((each, first.seed))]
        if known:
            minutes = ", ".join(f"{e} {results.minutes[e, first.seed]:.1f}" for e in known)
            lines += textwrap.wrap(
                f"Minutes for all {len(study.mixtures)} recipes together, with one thread, on a "
                f"machine that was busy with other work: {minutes}.",
                100,
            )
    if study.baselines:
        lines += ["", "### Beside the error of the weights alone", ""]
        lines += textwrap.wrap(
            "Types chosen by the same chooser, from the same types, such that the sum of an error of "
            "the weights is least; no text runs through the model for it. squared: the "
            "importance-weighted squared error. relative: that of each row over the row's own weight. "
            "pull request: with what llama.cpp's pull request 15550 adds to it (benchmarks/"
            "recipe_errors.py says what is left out). Ratios to the mixture; the last column is of the "
            "recipe to that choice.",
            100,
        )
        for view in views:
            lines += ["", f"**{view.text.name}**", "", *_baseline_table(view)]
    lines += ["", "### Predicted and measured", ""]
    lines += textwrap.wrap(
        f"Of the recipes of seed {first.seed}: the KL that was predicted, as measured on the "
        "measurement's own text, and on the test text.",
        100,
    )
    lines += ["", *_prediction_table(first)]
    return lines


def write(found: Sequence[tuple[str, Study, Results]], out: Path) -> None:
    """Write recipes.md, recipes.json and recipes.png."""
    studies = [Named(*each) for each in found]
    lines = ["# Recipes beside mixtures", ""]
    lines += textwrap.wrap(
        f"Made by `python benchmarks/recipes.py{_flags(studies)}` on {datetime.date.today()}: {machine()}; {imatrix.backends().engine}. KL "
        "divergences are to the model before quantization, in nats a token. Recipes have no more "
        "bytes than the mixture beside them, as whole files, and the same importance matrix. The text "
        "that is evaluated on was not measured on, nor is it the calibration's.",
        100,
    )
    if len(studies) == 1:
        lines += ["", "No larger model was measured: what holds for this one need not hold for it."]
    lines += ["", "![KL over bytes](recipes.png)", ""]
    for named in studies:
        lines += _section(named)
        if named.name == "gemma":
            lines += textwrap.wrap(
                "The source is what Q4_K_M made of the original, as F16 (the package index has no "
                "other): its weights lie on the grids of Q4_K and Q6_K, so that types with these grids "
                "lose less than they would of the original. Few chunks and the quick effort, since "
                "the machine is small.",
                100,
            )
            lines.append("")
    text = "\n".join(lines).rstrip() + "\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    (out / "recipes.md").write_text(text, "utf-8")
    (out / "recipes.json").write_text(
        json.dumps({each.name: _data(each) for each in studies}, indent=1) + "\n", "utf-8"
    )
    _picture(studies, out / "recipes.png")


def _flags(studies: Sequence[Named]) -> str:
    """Those that the study was made with, if they are not the default."""
    efforts = studies[0].study.efforts
    flags = "" if efforts == EFFORTS else f" --efforts {' '.join(efforts)}"
    return flags + (" --gemma" if len(studies) > 1 else "")


def _rounded(found: Estimate) -> dict[str, float]:
    return {
        name: float(f"{getattr(found, name):.5g}") for name in ("value", "error", "low", "high")
    }


def _data(named: Named) -> dict[str, Any]:
    """All figures, and one recipe whole.

    "made": one for each way, mixture and text: bytes, KL, and the ratio to the mixture.
    """
    study, results = named.study, named.results
    rows = [
        {
            "way": way.name,
            "effort": way.effort,
            "seed": way.seed,
            "mixture": mixture,
            "text": text.name,
            "bytes": made.bytes,
            "kl": _rounded(view.kl(way, mixture)),
            "ratio": None if way == MIXTURE else _rounded(view.ratio(way, mixture)),
        }
        for text in study.tests
        for view in [View(study, results, text)]
        for (way, mixture), made in results.made.items()
    ]
    whole = study.mixtures[min(3, len(study.mixtures) - 1)]
    effort, seed = study.runs()[0]
    return {
        "date": str(datetime.date.today()),
        "machine": machine(),
        "engine": imatrix.backends().engine,
        "n_ctx": study.n_ctx,
        "minutes": {f"{effort}, seed {seed}": n for (effort, seed), n in results.minutes.items()},
        "made": rows,
        "recipe": results.recipes[effort, seed, whole] if named.name == "shipped" else None,
    }


def _picture(studies: Sequence[Named], path: Path) -> None:
    """KL over bytes: a row for each study, a column for each text."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, grid = plt.subplots(
        len(studies), 2, figsize=(11, 4.6 * len(studies)), squeeze=False, layout="constrained"
    )
    for row, named in zip(grid, studies, strict=True):
        for axes, text in zip(row, named.study.tests, strict=True):
            view = View(named.study, named.results, text)
            curves = [("mixtures", MIXTURE, "o", "none"), ("recipes", view.recipe(), "D", "-")]
            curves += [(f"by error: {kind}", Way(kind), "x", ":") for kind in named.study.baselines]
            for label, way, mark, line in curves:
                points = sorted(
                    (view.made(way, each).bytes / 2**20, view.kl(way, each).value)
                    for each in named.study.mixtures
                )
                x, y = np.array(points).T
                axes.plot(x, y, marker=mark, linestyle=line, label=label, markersize=5)
            for mixture in named.study.mixtures:
                axes.annotate(
                    mixture,
                    (view.made(MIXTURE, mixture).bytes / 2**20, view.kl(MIXTURE, mixture).value),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
            axes.set_yscale("log")
            axes.set_title(f"{NAMES[named.name]}, {text.name}", fontsize=10)
            axes.set_xlabel("file, MiB")
            axes.set_ylabel("KL to the source, nats a token")
            axes.grid(True, which="both", alpha=0.2)
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": ""})
    plt.close(figure)
