"""A matrix on one HTML page: what was collected, how, from what text, what is thin, would it do.

The page stands alone: it loads nothing, and its policy lets it load nothing. Names come from
strangers' files: every value is escaped where the template writes it, and characters that would
turn or hide the text around them are spelled out (see `plain`). The script only sorts tables;
nothing is missing without it.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup

from imatrix._version import __version__
from imatrix.entries import THIN, Provenance
from imatrix.formats import Format, detected
from imatrix.matrix.experts import coverage_of, expert_rows
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.matrix.statistics import LayerStatistics, statistics
from imatrix.matrix.summary import Line, describe_left_out, describe_unused, lines
from imatrix.matrix.weight_statistics import WeightStatistics
from imatrix.pictures.numbers import STATISTICS, profile
from imatrix.report.html import FOLDER, content_hash, make_environment
from imatrix.report.parts import (
    Drawing,
    ExpertBlock,
    Fact,
    Fix,
    Heavy,
    Part,
    Picture,
    Source,
    Verdict,
)
from imatrix.words import few

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from imatrix.matrix.comparison import MatrixComparison
    from imatrix.quantization.coverage import Coverage
    from imatrix.quantization.verdicts import TensorCoverage

__all__ = ["COMMON_TYPES", "report_page"]

COMMON_TYPES = (
    *("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "Q2_K_S"),
    *("IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)
"""Types that are checked where none are named: the common ones that gain from data."""


_PARTS: tuple[Part, ...] = ("trunk", "head")
_STYLES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
_FORMATS: dict[Format | None, str] = {"gguf": "GGUF", "dat": ".dat", None: ""}

# Rows of a table that nobody reads to its end; below it stands how many more there are.
_ROWS = 25

# Lines of a fix to paste. More of them, for a matrix of another model, help nobody.
_FIX_LINES = 64

# Inches, and up to which width of the screen the narrow drawing is the one to show.
_PHONE = 3.6
_NARROW = "(max-width: 40rem)"

# CSS pixels an inch: text of 8 points is then as large as it is in the tables' notes.
_PIXELS = 112


def report_page(
    matrix: ImportanceMatrix | str | os.PathLike[str],
    *,
    name: str | None = None,
    model: str | os.PathLike[str] | None = None,
    types: Sequence[str] = (),
    against: ImportanceMatrix | str | os.PathLike[str] | None = None,
    pictures: bool = True,
    chunk_size: int = 512,
) -> str:
    """Tell all about a matrix on one HTML page, which stands alone.

    Args:
        matrix: the matrix, or the path of a file that holds one.
        name: what to call it; None: the file's name, or "importance matrix".
        model: its model; the page then tells whether it would quantize, see imatrix.coverage.
        types: what to quantize it to, llama-quantize's names; none for COMMON_TYPES.
        against: another matrix of the model, or the path of one, to compare with.
        pictures: whether to draw; needs matplotlib, which the extra `plot` installs.
        chunk_size: tokens a chunk of .dat files, see imatrix.formats.dat.read.

    Returns:
        The page. Encode it as UTF-8. The same arguments give the same page.

    Raises:
        ValueError: an unknown type, types without a model, or a matrix without entries.
        ModelError (a ValueError): `model` is not a model.
        FormatError (a ValueError): a file is not an importance matrix.
        OSError: a file cannot be read.
        ImportError: pictures are wanted and matplotlib is missing.
    """
    if types and model is None:
        raise ValueError(
            f"types were given ({', '.join(types)}) and no model to check them on; name the model"
        )
    found, form, called = _loaded(matrix, name, chunk_size)
    if not found:
        raise ValueError(f"{called}: nothing to report, the matrix has no entries")
    page = _Page(found, called, form)
    if model is not None:
        page.check(model, types or COMMON_TYPES)
    if against is not None:
        if isinstance(against, ImportanceMatrix):
            page.compare(against, "the other matrix")
        else:
            page.compare(*_loaded(against, None, chunk_size)[::2])
    if pictures:
        page.draw()
    return page.render()


def _loaded(
    matrix: ImportanceMatrix | str | os.PathLike[str], name: str | None, chunk_size: int
) -> tuple[ImportanceMatrix, Format | None, str]:
    """The matrix, the format of its file if it has one, and what to call it."""
    if isinstance(matrix, ImportanceMatrix):
        return matrix, None, name or "importance matrix"
    form = detected(matrix)
    return ImportanceMatrix.load(matrix, chunk_size=chunk_size), form, name or Path(matrix).name


class _Page:
    """What the template is given: plain data, in the order of the page."""

    def __init__(self, matrix: ImportanceMatrix, name: str, form: Format | None) -> None:
        self.matrix = matrix
        self.name = name
        self.format = _FORMATS[form]
        self.checks: list[Coverage] = []
        self.comparison: MatrixComparison | None = None
        self.against = ""
        self.pictures: dict[str, Picture] = {}
        self._other: ImportanceMatrix | None = None
        self._form = form
        self._made = matrix.provenance or Provenance()
        self._head = frozenset(matrix.head)
        self._head_blocks = matrix.head_blocks

    def check(self, model: str | os.PathLike[str], types: Iterable[str]) -> None:
        from imatrix.quantization.coverage import coverage

        for ftype in dict.fromkeys(each.upper() for each in types):
            self.checks.append(coverage(model, self.matrix, ftype))

    def compare(self, other: ImportanceMatrix, name: str) -> None:
        from imatrix.matrix.comparison import compare_matrices

        self.comparison = compare_matrices(self.matrix, other)
        self.against = name
        self._other = other

    def draw(self) -> None:
        from imatrix import pictures

        matrix = self.matrix
        numbers = "The tables have the numbers."
        self._draw(
            "layers",
            partial(pictures.layers, matrix),
            "Heat map: mean squared activation of each weight, kinds of weights against blocks. "
            + numbers,
            "Mean squared activation, on a logarithmic scale. Hatched: in the file, without a row.",
        )
        self._draw(
            "concentration",
            partial(pictures.layers, matrix, statistic="peak"),
            "Heat map: the heaviest channel of each weight divided by the mean of its matrix, "
            f"kinds of weights against blocks. {numbers}",
            "How many times the mean the heaviest channel of a weight is, on a logarithmic scale.",
        )
        if coverage := self.experts:
            block, expert, rows = coverage.thinnest
            self._draw(
                "experts",
                partial(pictures.experts, matrix),
                f"Map of the rows that each of {coverage.n_experts:,} experts saw, experts against "
                f"blocks. {coverage.n_unseen:,} saw none; the fewest has {block} expert {expert}: "
                f"{rows:,}. {numbers}",
                "Rows of each expert, on a logarithmic scale. A dot: no row. A circle: the fewest.",
            )
        if chosen := self._profiled():
            self._draw(
                "channels",
                partial(pictures.channels, matrix, chosen),
                "Profiles: mean squared activation by channel, of the weights with the heaviest "
                f"ones: {', '.join(chosen)}. {numbers}",
                "Left, or above: channels in their order, the heaviest named with their share of "
                "the sum. Right, or below: sorted.",
            )

        if self._other is not None:
            self._draw(
                "against",
                partial(
                    pictures.compare,
                    matrix,
                    self._other,
                    names=(self.name, self.against),
                    difference="cosine",
                ),
                "Three heat maps, kinds of weights against blocks: mean squared activation in this "
                f"matrix and in the other, and how far apart they are. {numbers}",
                "1 - cosine similarity of the channels' importance, on a logarithmic scale: 0.01 "
                "is close, 1 is nothing in common.",
            )

    def _profiled(self) -> list[str]:
        """Weights whose channels are drawn: those of the trunk and the head with the heaviest."""
        found = {part: [each for each in self.heavy if each.part == part] for part in _PARTS}
        n_head = min(2, len(found["head"]))
        chosen = found["trunk"][: 4 - n_head] + found["head"][:n_head]
        return [each.name for each in chosen]

    def _draw(self, key: str, make: Callable[..., Figure], alt: str, caption: str) -> None:
        drawings = []
        for narrow in (True, False):
            for style in _STYLES:
                query = [_NARROW] if narrow else []
                if style == "dark":
                    query.append("(prefers-color-scheme: dark)")
                try:
                    figure = make(style=style, width=_PHONE if narrow else None)
                except ValueError as error:  # too many kinds, names that are no blocks
                    self.pictures[key] = Picture(alt, caption, refusal=str(error))
                    return
                drawings.append(_drawing(figure, " and ".join(query)))
        # the most particular query first
        drawings.sort(key=lambda each: -each.media.count("("))
        self.pictures[key] = Picture(alt, caption, tuple(drawings))

    def render(self) -> str:
        style, script = ((FOLDER / name).read_text("utf-8") for name in ("report.css", "sort.js"))
        text = (
            make_environment()
            .get_template("report.html")
            .render(
                page=self,
                # of our own making; the policy lets nothing else through
                style=Markup(style),
                script=Markup(script),
                style_hash=content_hash(style),
                script_hash=content_hash(script),
                version=__version__,
                THIN=THIN,
                ROWS=_ROWS,
            )
        )
        return text + "\n"

    # --- the first screen ---

    @property
    def verdicts(self) -> list[Verdict]:
        """What there is to judge, in the order of its weight."""
        found = [self._quantizing()]
        if self.checks and self.checks[0].head and not self.matrix.head_blocks:
            found.append(
                Verdict(
                    "warn",
                    "no head",
                    "The model has an MTP/NextN head, and the matrix has no data for it.",
                )
            )
        elif not self.checks and not self.matrix.head_blocks:
            found.append(
                Verdict(
                    "note",
                    "no head",
                    "No data for an MTP/NextN head. Should the model have one, it needs its own.",
                )
            )
        found.append(self._covering())
        if left_out := self._made.left_out:
            found.append(
                Verdict("warn", "left out", f"{describe_left_out(left_out)}. They do not count.")
            )
        if self.checks and (unused := self.checks[0].unused):
            found.append(
                Verdict(
                    "warn",
                    "unused",
                    f"{_plural(len(unused), 'entry', 'entries')} of the matrix belong to no tensor "
                    "of the model.",
                )
            )
        return found

    def _quantizing(self) -> Verdict:
        if not self.checks:
            return Verdict(
                "note",
                "not checked",
                "Whether the model would quantize with these data was not looked into: "
                "name it with --model.",
            )
        failing = [check for check in self.checks if not check.ready]
        model = self.checks[0].model.name
        if not failing:
            types = ", ".join(check.ftype for check in self.checks)
            return Verdict("good", "ready", f"{model} would quantize to {types}.")
        first = failing[0].failing[0]
        types = ", ".join(check.ftype for check in failing)
        why = self.stop(first, failing[0])
        text = f"{model} would not quantize to {types}: it stops at {first.name} ({why})"
        if ready := [check.ftype for check in self.checks if check.ready]:
            text += f". Ready: {', '.join(ready)}"
        return Verdict("bad", "would fail", f"{text}.")

    def _covering(self) -> Verdict:
        coverage = self.experts
        without = len(self.without_rows)
        if coverage and coverage.n_unseen:
            return Verdict(
                "warn",
                "gaps",
                f"{coverage.n_unseen:,} of {coverage.n_experts:,} experts saw no row: their columns "
                "weigh all the same.",
            )
        if without:
            return Verdict(
                "warn", "gaps", f"{_plural(without, 'weight')} saw no row: no data for them."
            )
        if coverage and not coverage.reached:
            few = coverage.n_experts - coverage.n_reached
            return Verdict(
                "warn",
                "thin",
                f"{few:,} of {coverage.n_experts:,} experts saw fewer than {THIN} rows.",
            )
        if self.few_rows:
            return Verdict(
                "warn",
                "thin",
                f"{_plural(len(self.few_rows), 'weight')} saw fewer than {THIN} rows.",
            )
        if self.blind:
            return Verdict(
                "note",
                "experts unknown",
                "The file does not tell the rows of one expert from those of another, as no .dat "
                "file does.",
            )
        what = "expert" if coverage else "weight"
        return Verdict("good", "covered", f"Every {what} in it saw {THIN} rows or more.")

    @property
    def tiles(self) -> list[Fact]:
        """The figures at the top."""
        matrix = self.matrix
        blocks = sorted(matrix.head_blocks)
        head = f"{len(matrix.head)} head"
        if blocks:
            head += f" (block {few(blocks, 4)})"
        found = [
            Fact("weights", f"{len(matrix):,}", f"{len(matrix.trunk):,} trunk, {head}"),
            Fact("chunks", f"{matrix.chunk_count:,}" if matrix.chunk_count else "", self._cut()),
            Fact("tokens", f"{self.tokens:,}" if self.tokens else "", self._tokens_note()),
        ]
        if coverage := self.experts:
            found.append(
                Fact(
                    "experts",
                    f"{coverage.n_experts:,}",
                    f"the thinnest saw {_plural(coverage.thinnest[2], 'row')}",
                )
            )
        return found

    def _cut(self) -> str:
        if not self.matrix.chunk_size or self._form == "dat":
            return "of unknown size"
        told = "up to " if self._made.packing == "document" else ""
        return f"of {told}{self.matrix.chunk_size:,} tokens"

    @property
    def tokens(self) -> int:
        """Tokens that count, 0 if not known."""
        if self._made.tokens is not None:
            return self._made.tokens
        return self.matrix.chunk_count * self.matrix.chunk_size

    def _tokens_note(self) -> str:
        if self._made.tokens is not None:
            return "that count"
        if not self.tokens:
            return ""
        if self._form == "dat":
            return f"if a chunk has {self.matrix.chunk_size:,}: .dat files do not tell"
        return "chunks times their size"

    # --- how, and from what ---

    @property
    def facts(self) -> list[Fact]:
        """How it was made."""
        made, matrix = self._made, self.matrix
        packing = {
            "stream": "all texts one stream, cut at every chunk's end",
            "document": "no chunk has tokens of two documents",
        }
        if made.seed is not None:
            order = Fact("Order of the text", "shuffled", f"with seed {made.seed}")
        elif made.packing:
            order = Fact("Order of the text", "as it was given")
        else:
            order = Fact("Order of the text", "")
        if made.mtp is None:
            head = Fact("MTP head", "in the file" if self._head else "not in the file")
        else:
            head = Fact("MTP head", "collected" if made.mtp else "not collected")
        # read() gave it the size that it was told
        n_ctx = made.n_ctx or (0 if self._form == "dat" else matrix.chunk_size)
        return [
            *([Fact("File", f"{self.format} importance matrix")] if self.format else []),
            Fact("Collected by", made.collector or ""),
            Fact("Engine", made.engine or ""),
            head,
            Fact("Context", f"{n_ctx:,} tokens" if n_ctx else "", "what a token can look back on"),
            Fact("Packing", made.packing or "", packing.get(made.packing or "", "")),
            order,
            self._left_out(),
            *([Fact("Not used", told)] if (told := describe_unused(self._made.sources)) else []),
            self._digest(),
        ]

    def _left_out(self) -> Fact:
        label = "Chunks left out"
        if self.matrix.provenance is None:
            return Fact(label, "")
        left_out = self._made.left_out
        if not left_out:
            return Fact(label, "none", "no NaN or infinite activation came up")
        places = few([f"{one.chunk} at token {one.token:,} ({one.weight})" for one in left_out], 4)
        return Fact(label, f"{len(left_out):,}", f"a NaN or infinite activation came up: {places}")

    def _digest(self) -> Fact:
        label = "Digest of the tokens"
        if self._made.dataset_digest:
            return Fact(label, self._made.dataset_digest, "SHA-256: the same text, the same digest")
        if self.matrix.provenance is None:
            return Fact(label, "")
        return Fact(label, "", "a matrix that was merged from several has none")

    @property
    def sources(self) -> list[Source]:
        """Where the text came from, the largest first where that is known."""
        if not self._made.sources:
            return [Source(name) for name in self.matrix.datasets]
        total = sum(each.tokens for each in self._made.sources)
        return [
            Source(
                each.name,
                each.documents,
                each.tokens,
                each.tokens / total if total else 0.0,
                each.dropped,
                each.weight,
            )
            for each in sorted(self._made.sources, key=lambda each: -each.tokens)
        ]

    # --- what is thin ---

    @cached_property
    def experts(self) -> Any:
        """ExpertCoverage for THIN rows; None without experts."""
        return coverage_of({name: entry.counts for name, entry in self.matrix.items()}, THIN)

    @property
    def more_text(self) -> str:
        """What it would take for every expert to have THIN rows; "" where all have."""
        coverage = self.experts
        if coverage is None or coverage.reached:
            return ""
        if not self.tokens:
            return "How much text it would take cannot be told: the tokens are not known."
        needed = coverage.tokens_needed(self.tokens)
        if needed is None:
            return (
                f"No text reached {coverage.n_unseen:,} of them in {self.tokens:,} tokens; more of "
                "the same may not either. Add text of another kind: code, other languages, chats."
            )
        return (
            f"About {needed:,} tokens of such text would do, {needed - self.tokens:,} more; text "
            "of another kind may reach the thin ones sooner."
        )

    @cached_property
    def _expert_rows(self) -> dict[int, Any]:
        return expert_rows(self.matrix)

    @property
    def expert_blocks(self) -> list[ExpertBlock]:
        """Rows of the experts by block."""
        return [
            ExpertBlock(
                block=block,
                part=self._part_of_block(block),
                n_experts=len(rows),
                unseen=int(np.count_nonzero(rows == 0)),
                few=int(np.count_nonzero((rows > 0) & (rows < THIN))),
                fewest=int(rows.min()),
                median=float(np.median(rows)),
                most=int(rows.max()),
            )
            for block, rows in self._expert_rows.items()
        ]

    @property
    def thinnest(self) -> list[tuple[int, Part, int, int]]:
        """(block, part, expert, rows), the fewest rows first."""
        found = [
            (int(n), block, expert)
            for block, rows in self._expert_rows.items()
            for expert, n in enumerate(rows)
        ]
        found.sort()
        return [(block, self._part_of_block(block), expert, n) for n, block, expert in found]

    def _part_of_block(self, block: int) -> Part:
        return "head" if block in self._head_blocks else "trunk"

    @cached_property
    def blind(self) -> list[str]:
        """Weights of experts with one count for all of them."""
        return [
            name for name, entry in self.matrix.items() if "_exps." in name and entry.n_counts == 1
        ]

    @cached_property
    def without_rows(self) -> list[str]:
        """Weights that saw no row."""
        return [name for name, entry in self.matrix.items() if not entry.counts.any()]

    @cached_property
    def few_rows(self) -> list[tuple[str, int]]:
        """(weight, rows) of those without experts that saw some, but fewer than THIN."""
        return [
            (name, int(entry.counts[0]))
            for name, entry in self.matrix.items()
            if entry.n_counts == 1 and 0 < entry.counts[0] < THIN
        ]

    @cached_property
    def heavy(self) -> list[Heavy]:
        """The weights by their heaviest channel, the heaviest first."""
        found = []
        for name, entry in self.matrix.items():
            pooled = profile(entry)
            if pooled is None or not (order := pooled.heaviest(1)):
                continue
            found.append(
                Heavy(
                    name=name,
                    part="head" if name in self._head else "trunk",
                    channel=order[0],
                    share=float(pooled.shares[order[0]]),
                    top=STATISTICS["top"].of(entry),
                    peak=STATISTICS["peak"].of(entry),
                    constant=pooled.constant(order[0]),
                )
            )
        return sorted(found, key=lambda each: -each.peak)

    # --- statistics ---

    @property
    def parts(self) -> list[tuple[Part, list[Line], list[LayerStatistics]]]:
        """The trunk and the head: a line a kind of weight, and a line a block."""
        matrices = {"trunk": self.matrix.trunk, "head": self.matrix.head}
        return [
            (
                part,
                lines(matrices[part]),
                [each for each in self._statistics.layers if each.part == part],
            )
            for part in _PARTS
            if matrices[part]
        ]

    @cached_property
    def _statistics(self) -> Any:
        return statistics(self.matrix)

    @property
    def weights(self) -> list[tuple[WeightStatistics, Heavy | None]]:
        """Every weight that saw rows, in the order of the matrix."""
        found = {each.name: each for each in self._statistics.weights}
        heavy = {each.name: each for each in self.heavy}
        return [(found[name], heavy.get(name)) for name in self.matrix if name in found]

    # --- would it do ---

    @staticmethod
    def stop(tensor: TensorCoverage, check: Coverage) -> str:
        """Why a tensor stops the quantizer."""
        from imatrix.quantization.coverage import describe_stop

        return describe_stop(tensor, check)

    @staticmethod
    def without_data(check: Coverage) -> list[TensorCoverage]:
        """Tensors that would be quantized without the data that they would have used; but for
        embeddings, for which no run collects any: rows are looked up in them."""
        from imatrix.quantization.types import UNASKED

        return [
            tensor
            for tensor in check.without_data
            if tensor.uses_data and tensor.name not in UNASKED[:2]
        ]

    @classmethod
    def told(cls, check: Coverage) -> bool:
        """Whether there is more to tell than the verdict."""
        return bool(check.failing or check.partial or check.fixes or cls.without_data(check))

    @staticmethod
    def fixes(check: Coverage) -> list[Fix]:
        """What to do, the cure first."""
        found = []
        for fix in check.fixes:
            words, _, paste = fix.partition("\n")
            if not paste and ": imatrix " in words:
                words, _, command = words.rpartition(": imatrix ")
                words, paste = f"{words}:", f"imatrix {command}"
            told = paste.splitlines()
            found.append(Fix(words, "\n".join(told[:_FIX_LINES]), max(0, len(told) - _FIX_LINES)))
        return found


def _drawing(figure: Figure, media: str) -> Drawing:
    from imatrix import pictures

    text = pictures.svg(figure, background=False)
    width, height = figure.get_size_inches()
    return Drawing(
        media,
        "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode(),
        round(float(width) * _PIXELS),
        round(float(height) * _PIXELS),
    )


def _plural(n: int, noun: str, plural: str | None = None) -> str:
    """As imatrix.words.plural, with digits in groups, as the page has all of its numbers."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"
