"""The results of the study in quality.py: tables, sentences, and a picture."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_cells import DATA, DEPTH, N_CTX, Cell, Made, Study, Text, texts_of
from store import machine

import imatrix
from imatrix import Comparison, Estimate, Evaluation

Cells = Mapping[Cell, Made]
References = Mapping[str, Evaluation]

# The measures: key -> name in the tables, and how a value is written.
MEASURES = {
    "nll": "head NLL",
    "kl": "KL",
    **{f"agreement {k}": f"agreement {k}" for k in range(1, DEPTH + 1)},
    "accepted": "accepted",
}
# The measures that the sentences are about.
SPOKEN = ("kl", "nll", "agreement 1", "accepted")
PARTS = {"head": "Trunk at Q8_0", "whole": "Trunk at the head's type"}
NAMES = {"ours": "collected", "flat": "flat", "borrowed": "borrowed", "none": "none"}


# --- figures ---------------------------------------------------------------------------------


def figures(found: Evaluation) -> dict[str, Estimate]:
    """Those measures that an evaluation has."""
    every = {
        "nll": found.head_nll,
        "kl": found.head_kl,
        **{f"agreement {k}": rate for k, rate in enumerate(found.draft, 1)},
        "accepted": found.accepted_length,
    }
    return {key: value for key, value in every.items() if value is not None}


def gains(better: Evaluation, other: Evaluation) -> dict[str, Estimate]:
    """By how much `better` is better than `other`, paired; below zero if it is worse."""
    difference: Comparison = better.compare(other)
    every = {
        "nll": _negated(difference.head_nll),
        "kl": _negated(difference.head_kl),
        **{f"agreement {k}": rate for k, rate in enumerate(difference.draft, 1)},
        "accepted": difference.accepted_length,
    }
    return {key: value for key, value in every.items() if value is not None}


def _negated(found: Estimate | None) -> Estimate | None:
    if found is None:
        return None
    return Estimate(0.0 - found.value, found.error, 0.0 - found.high, 0.0 - found.low, found.n)


def verdict(gain: Estimate) -> str:
    """What the 95 % interval says: "better", "worse", "same" (exactly the same) or "open"."""
    if gain.low == gain.high == 0:
        return "same"
    return "better" if gain.low > 0 else "worse" if gain.high < 0 else "open"


class Grid:
    """The main grid: the cells of a part by type and kind of data."""

    def __init__(self, study: Study, made: Cells, part: str) -> None:
        base = {"text": study.calibration[0].name, "chunks": study.sizes[-1]}
        self.study = study
        self.part = part
        self.cells = {
            (type_, data): made[Cell(part, type_, data, **base)]
            for type_ in study.types
            for data in DATA[part]
        }
        self.bpw = {type_: float(self.cells[type_, "ours"].facts["bpw"]) for type_ in study.types}
        self.types = sorted(study.types, key=lambda type_: (self.bpw[type_], type_))

    def data(self, text: Text) -> list[str]:
        """The kinds of head data that were evaluated on a text, collected ones first."""
        return [d for d in DATA[self.part] if text in texts_of(self.study, self.part, d)]

    def texts(self) -> list[Text]:
        """The texts on which several kinds of data were evaluated."""
        return [text for text in self.study.held_out if len(self.data(text)) > 1]

    def refused(self, type_: str, data: str) -> bool:
        return self.cells[type_, data].facts["refused"] is not None

    def found(self, type_: str, data: str, text: str) -> Evaluation:
        return self.cells[type_, data].evaluations[text]

    def gain(self, type_: str, other: str, text: str) -> dict[str, Estimate] | None:
        """The gain of collected head data over another kind; None if that kind was refused."""
        if self.refused(type_, other):
            return None
        return gains(self.found(type_, "ours", text), self.found(type_, other, text))


# --- sentences --------------------------------------------------------------------------------


def _value(key: str, value: float) -> str:
    if key.startswith("agreement"):
        return f"{100 * value:.2f} %"
    return f"{value:.3f}" if key == "accepted" else _nats(value)


def _nats(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2g}"


def _gain(key: str, gain: Estimate) -> str:
    """A gain as "+0.0123 [+0.0100, +0.0150]", bold if zero is outside the interval."""
    if verdict(gain) == "same":
        return "same"
    share = key.startswith("agreement")
    scale, digits = (100, 2) if share else (1, 4)
    value, low, high = (f"{scale * each:+.{digits}f}" for each in (gain.value, gain.low, gain.high))
    text = f"{value} [{low}, {high}]"
    return f"**{text}**" if verdict(gain) in ("better", "worse") else text


def _sentence(grid: Grid, other: str, key: str, text: str) -> str:
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "open": [], "same": []}
    for type_ in grid.types:
        gain = grid.gain(type_, other, text)
        if gain is not None:
            verdicts[verdict(gain[key])].append(type_)
    parts = []
    if verdicts["better"]:
        parts.append(f"better at {_listed(verdicts['better'])}")
    if verdicts["worse"]:
        parts.append(f"worse at {_listed(verdicts['worse'])}")
    if verdicts["open"]:
        parts.append(f"no difference shown at {_listed(verdicts['open'])}")
    if verdicts["same"]:
        parts.append(f"the same at {_listed(verdicts['same'])}")
    return f"{MEASURES[key]}: " + "; ".join(parts) + f". {_from_which(grid, other, key, text)}"


def _from_which(grid: Grid, other: str, key: str, text: str) -> str:
    """The first type from which on nothing is gained, with types in the order of their bits."""
    known = [
        (type_, gain[key])
        for type_ in grid.types
        if (gain := grid.gain(type_, other, text)) is not None
    ]
    better = [i for i, (_, gain) in enumerate(known) if verdict(gain) == "better"]
    if not better:
        return "No gain at any type."
    if better[-1] == len(known) - 1:
        return "A gain up to the largest type."
    return f"No gain from {known[better[-1] + 1][0]} on."


def _listed(types: Sequence[str]) -> str:
    return ", ".join(types)


def _shares(grid: Grid, other: str, text: str) -> str:
    """How much of the KL divergence collecting takes away, by type."""
    parts = []
    for type_ in grid.types:
        gain = grid.gain(type_, other, text)
        if gain is None or verdict(gain["kl"]) == "same":
            continue
        whole = figures(grid.found(type_, other, text))["kl"].value
        low, value, high = (100 * each / whole for each in _span(gain["kl"]))
        parts.append(f"{type_} {value:.1f} % [{low:.1f}, {high:.1f}]")
    return ", ".join(parts)


def _span(found: Estimate) -> tuple[float, float, float]:
    return found.low, found.value, found.high


def words(grids: Sequence[Grid]) -> list[str]:
    """The sentences about the main grid, made from the intervals alone."""
    lines = []
    for grid in grids:
        for text in grid.texts():
            lines += ["", f"**{PARTS[grid.part]}, {text.name}**", ""]
            for other in grid.data(text)[1:]:
                lines.append(f"- Collected head data beside {_against(other)}:")
                lines += [f"  - {_sentence(grid, other, key, text.name)}" for key in SPOKEN]
                lines.append(
                    f"  - Share of the other's KL that collecting takes away: "
                    f"{_shares(grid, other, text.name)}."
                )
    return lines


def _against(other: str) -> str:
    return {
        "flat": "flat ones",
        "borrowed": "the last trunk block's data",
        "none": "no head data (where the quantizer allows it)",
    }[other]


# --- tables ----------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _values_table(grid: Grid, reference: Evaluation, text: Text) -> list[str]:
    rows = []
    own = figures(reference)
    rows.append(
        [
            "F16",
            "16.00",
            "",
            *(_value(key, own[key].value) if key in own else "" for key in MEASURES),
        ]
    )
    for type_ in grid.types:
        for data in grid.data(text):
            row = [type_, f"{grid.bpw[type_]:.2f}", NAMES[data]]
            if grid.refused(type_, data):
                rows.append([*row, "refused", *[""] * (len(MEASURES) - 1)])
                continue
            found = figures(grid.found(type_, data, text.name))
            rows.append(
                [*row, *(_value(key, found[key].value) if key in found else "" for key in MEASURES)]
            )
    return _table(["type", "bits", "head data", *MEASURES.values()], rows)


def _gains_table(grid: Grid, text: Text) -> list[str]:
    rows = []
    for type_ in grid.types:
        for other in grid.data(text)[1:]:
            gain = grid.gain(type_, other, text.name)
            if gain is not None:
                cells = (_gain(key, gain[key]) if key in gain else "" for key in MEASURES)
                rows.append([type_, NAMES[other], *cells])
    return _table(["type", "over", *MEASURES.values()], rows)


def _calibration_table(study: Study, made: Cells, text: str) -> list[str]:
    rows = []
    base = made[
        Cell("head", study.calibrated[0], "ours", study.calibration[0].name, study.sizes[-1])
    ].cell
    for calibration in study.calibration:
        for size in study.sizes:
            row = [calibration.name, f"{size * N_CTX:,}"]
            for type_ in study.calibrated:
                one = made[Cell("head", type_, "ours", calibration.name, size)]
                other = made[Cell("head", type_, "ours", base.text, base.chunks)]
                kl = one.evaluations[text].head_kl
                assert kl is not None
                if one is other:
                    row.append(f"{_nats(kl.value)}")
                    continue
                gain = gains(one.evaluations[text], other.evaluations[text])
                row.append(f"{_nats(kl.value)}, {_gain('kl', gain['kl'])}")
            rows.append(row)
    return _table(["text", "tokens", *study.calibrated], rows)


# --- the results ---------------------------------------------------------------------------------


def _about(study: Study, references: References, command: str) -> list[str]:
    """Machine, date, model and texts."""
    texts = []
    for text in study.held_out:
        found = references[text.name]
        texts.append(
            f"{text.name}: {found.n_chunks} chunks of {found.n_ctx} tokens, {len(found.chunk):,} "
            f"scored positions (tokens sha256 {found.digest[:12]}…)"
        )
    calibrated = ", ".join(f"{text.name} ({text.digest[:12]}…)" for text in study.calibration)
    sha256 = hashlib.sha256(study.model.read_bytes()).hexdigest()
    return _wrapped(
        f"{datetime.date.today()}, {machine()}, CPU, {imatrix.backends().engine}, imatrix "
        f"{imatrix.__version__}. Model: {study.model.name} (sha256 {sha256[:12]}…). Held-out "
        f"texts: {'; '.join(texts)}. Calibration texts (sha256): {calibrated}. In the main grid: "
        f"{study.sizes[-1] * N_CTX:,} tokens of {study.calibration[0].name}. Made by `{command}`."
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)


_HOW = """\
How it was made:

- Every head weight that the quantizer can change gets the type named (`tensor_types`); the trunk
  stays at Q8_0, or gets the same type. Embeddings and output stay at Q8_0. Bits are bits a weight
  of the head.
- Head data: *collected* by imatrix; *flat*: ones; *borrowed*: the last trunk block's, renamed,
  expert by expert, and ones for `nextn.eh_proj`, which no trunk block has; *none*: no entry, where
  the quantizer allows it. The trunk's data are collected in every case. Q4_0 and the K types go
  another way with flat data than with none.
- In-domain: modules of Python's library (src/imatrix/data/held-out.txt); out-of-domain: its
  language reference (held-out-prose.txt); the model was trained on other modules and tests.
  Calibration: *code*, modules kept out of training; *prose*, the rest of the reference and
  docstrings; *tables*, test vectors, code pages and markup (benchmarks/corpus.py). Not the full
  cross product: benchmarks/quality.py says which cells.
- All measures are over the same positions: the second half of every chunk. NLL in nats a token;
  KL is KL(F16 head || head), in nats; agreement k: share of drafts accepted at depth k where the
  tokens before were; accepted: drafted tokens accepted a verification, of 3. Agreement is with the
  quantized trunk.
- Intervals are 95 %, by bootstrap over chunks, of paired differences. They speak of the text, not
  of another model or training run; of twenty, one is expected to miss zero by chance.
- Equal tensors are evaluated once: Q8_0 takes no notice of importance data, so that every kind of
  data gives the same bits.
"""

_LIMITS = """\
The model is small (4.8 million parameters). Large models have outlier channels; in this one's head
the strongest channel of most weights is 2 to 5 times the mean (31 in the experts' ffn_down). A larger
effect is to be expected there; it was not measured, for want of a GPU."""


def write(study: Study, made: Cells, references: References, out: Path) -> None:
    """Write quality.md, quality.json and quality.png into a folder."""
    grids = [Grid(study, made, part) for part in study.parts]
    lines = [
        "# What importance data for the head are worth",
        "",
        *_about(study, references, "make quality"),
        "Every figure with its interval is in quality.json.",
        "",
        "![Head quality by type and head data](quality.png)",
        "",
        _LIMITS,
        "",
        "## In words",
        "",
        "Made from the intervals below, types in the order of their bits.",
        *words(grids),
        "",
        "## How",
        "",
        *_HOW.splitlines(),
    ]
    for grid in grids:
        for text in grid.texts():
            lines += ["", f"## {PARTS[grid.part]}, {text.name}", ""]
            lines += [
                "What collecting gains over the others; bold where zero is outside. Agreement",
                "in percentage points.",
                "",
            ]
            lines += _gains_table(grid, text)
            lines += ["", "The figures themselves:", ""]
            lines += _values_table(grid, references[text.name], text)
    for text in study.held_out:
        lines += ["", f"## Calibration text and size, {text.name}", ""]
        lines += [
            "KL of the collected head data, trunk at Q8_0, and the gain in KL over the main grid's",
            "calibration (below zero: worse than that).",
            "",
        ]
        lines += _calibration_table(study, made, text.name)
    _text(out / "quality.md", lines)
    _text(out / "quality.json", [_data(study, made, references, grids)])
    picture(study, grids[0], references, out / "quality.png")


def _text(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _data(study: Study, made: Cells, references: References, grids: Sequence[Grid]) -> str:
    """Everything as JSON, one cell on each line; each figure is [value, low, high]."""

    def spans(found: Mapping[str, Estimate]) -> dict[str, list[float | None]]:
        return {
            key: [
                float(f"{each:.6g}") if math.isfinite(each) else None
                for each in (value.value, value.low, value.high)
            ]
            for key, value in found.items()
        }

    rows: list[dict[str, Any]] = [
        {"part": "reference", "held_out": name, "figures": spans(figures(found))}
        for name, found in references.items()
    ]
    by_part = {grid.part: grid for grid in grids}
    for cell, each in made.items():
        row: dict[str, Any] = {
            "part": cell.part,
            "type": cell.type,
            "data": cell.data,
            "calibration": cell.text,
            "calibration_tokens": cell.chunks * N_CTX,
        }
        if each.facts["refused"] is not None:
            rows.append({**row, "refused": each.facts["refused"]})
            continue
        for name, found in each.evaluations.items():
            own = by_part[cell.part].found(cell.type, "ours", name)
            rows.append(
                {
                    **row,
                    "bits": round(each.facts["bpw"], 4),
                    "held_out": name,
                    "figures": spans(figures(found)),
                    "trunk_nll": spans({"nll": found.nll})["nll"],
                    # the gain of the main grid's collected data over this cell
                    "gain_of_collected": spans(gains(own, found)),
                }
            )
    cells = ",\n".join("  " + json.dumps(row) for row in rows)
    about = {
        "date": f"{datetime.date.today()}",
        "machine": machine(),
        "engine": imatrix.backends().engine,
        "imatrix": imatrix.__version__,
        "model": study.model.name,
        "model_sha256": hashlib.sha256(study.model.read_bytes()).hexdigest(),
        "texts": {text.name: text.digest for text in (*study.calibration, *study.held_out)},
        "n_ctx": N_CTX,
        "n_scored": {name: len(found.chunk) for name, found in references.items()},
    }
    return f'{{"about": {json.dumps(about, indent=1)},\n"cells": [\n{cells}\n]}}'


# --- the picture -----------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind people can tell apart too
_LOOKS = {
    "ours": ("#0072B2", "o", "collected"),
    "flat": ("#D55E00", "s", "flat ones"),
    "borrowed": ("#009E73", "^", "last trunk block's"),
    "none": ("#595959", "x", "none"),
}


def picture(study: Study, grid: Grid, references: References, path: Path) -> None:
    """Four panels: KL and agreement by type and head data, and the gains of collecting over flat and
    borrowed data, with intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    text = study.held_out[0].name
    labels = [f"{type_} {grid.bpw[type_]:.2f}" for type_ in grid.types]
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), facecolor="white", layout="constrained")
    figure.suptitle(
        "An MTP head with and without importance data of its own\n"
        f"trunk at Q8_0, text: {text}, 95 % intervals from a bootstrap over chunks",
        fontsize=15,
    )
    (kl, agreement), (kl_gain, agreement_gain) = axes

    _levels(kl, grid, text, "kl", lambda v: v)
    kl.set_yscale("log")
    kl.set_title("KL divergence from the F16 head (nats, lower is better)")
    kl.legend(title="head data", fontsize=11, loc="lower left")

    _levels(agreement, grid, text, "agreement 1", lambda v: 100 * v)
    reference = references[text].draft[0].value
    agreement.axhline(100 * reference, color="black", linewidth=1, linestyle="--")
    agreement.annotate(
        "F16 head and trunk",
        (0.0, 100 * reference),
        xytext=(0, -15),
        textcoords="offset points",
        fontsize=11,
    )
    agreement.set_title("Drafted tokens the trunk accepts, depth 1 (%)")

    def share(type_: str, other: str) -> float:
        return 100 / figures(grid.found(type_, other, text))["kl"].value

    _differences(kl_gain, grid, text, "kl", share)
    kl_gain.set_title("KL that collecting takes away (% of the other's)")
    kl_gain.legend(title="collected, beside", fontsize=11)
    _differences(agreement_gain, grid, text, "agreement 1", lambda _type, _other: 100)
    agreement_gain.set_title("Acceptance that collecting adds (percentage points)")

    for each in axes.flat:
        each.set_xticks(range(len(labels)), labels, fontsize=10, rotation=35, ha="right")
        each.set_facecolor("white")
        each.grid(axis="y", color="#DDDDDD")
        each.set_axisbelow(True)
        each.title.set_fontsize(12.5)
    for each in axes[1]:
        each.set_xlabel("type of the head, bits a weight", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _levels(axis: Any, grid: Grid, text: str, key: str, scaled: Callable[[float], float]) -> None:
    for data in DATA[grid.part]:
        colour, marker, label = _LOOKS[data]
        at = [i for i, type_ in enumerate(grid.types) if not grid.refused(type_, data)]
        values = [figures(grid.found(grid.types[i], data, text))[key].value for i in at]
        axis.plot(
            at,
            [scaled(value) for value in values],
            color=colour,
            marker=marker,
            linewidth=1.5,
            markersize=7,
            label=label,
        )


def _differences(
    axis: Any, grid: Grid, text: str, key: str, scale: Callable[[str, str], float]
) -> None:
    axis.axhline(0, color="black", linewidth=1)
    for other, shift in (("flat", -0.14), ("borrowed", 0.14)):
        colour, marker, label = _LOOKS[other]
        at, spans = [], []
        for i, type_ in enumerate(grid.types):
            gain = grid.gain(type_, other, text)
            if gain is not None:
                at.append(i + shift)
                spans.append([scale(type_, other) * each for each in _span(gain[key])])
        axis.errorbar(
            at,
            [value for _, value, _ in spans],
            yerr=[
                [value - low for low, value, _ in spans],
                [high - value for _, value, high in spans],
            ],
            color=colour,
            marker=marker,
            linestyle="none",
            capsize=4,
            markersize=7,
            label=label,
        )
