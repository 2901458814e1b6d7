"""A matrix on one HTML page: what was collected, how, from what text, what is thin, would it do.

The page stands alone: it loads nothing, and its policy lets it load nothing. Names come from
strangers' files: every value is escaped where the template writes it, and characters that would
turn or hide the text around them are spelled out (see `plain`). The script only sorts tables;
nothing is missing without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from imatrix._version import __version__
from imatrix.entries import THIN
from imatrix.formats import detected
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.matrix.statistics import LayerStatistics, statistics
from imatrix.matrix.summary import Line
from imatrix.matrix.weight_statistics import WeightStatistics
from imatrix.report.checks import describe_stop, fixes, has_details, without_data
from imatrix.report.html import FOLDER, content_hash, make_environment
from imatrix.report.origin import made_facts, text_sources, tiles
from imatrix.report.parts import Fact, Heavy, Part, Picture, Source, Verdict
from imatrix.report.recipe import RecipeView, check_matrix, load_recipe, recipe_view
from imatrix.report.subject import Subject
from imatrix.report.tables import part_tables, weight_table
from imatrix.report.thin import Thin
from imatrix.report.verdicts import verdicts

if TYPE_CHECKING:
    from imatrix.matrix.comparison import MatrixComparison
    from imatrix.quantization.coverage import Coverage
    from imatrix.quantization.recipe import Recipe

__all__ = ["COMMON_TYPES", "report_page"]

COMMON_TYPES = (
    *("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "Q2_K_S"),
    *("IQ2_M", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)
"""Types that are checked if none are named: the common ones that gain from data."""

# Rows of a table that nobody reads to its end; below it stands how many more there are.
_ROWS = 25


@dataclass(frozen=True, kw_only=True, eq=False)
class Page:
    """What the template is given, in the order of the page.

    Attributes:
        subject: the matrix, with its name and format.
        checks: what each type would come to; none without a model.
        recipe: which tensor gets which type; None for none.
        tiles: the figures at the top.
        verdicts: what there is to judge, in the order of its weight.
        facts: how the matrix was made.
        sources: where the text came from.
        thin: experts and weights with few rows, and heavy channels.
        parts: of trunk and head, a line for each kind of weight, and one for each block.
        weights: every weight that saw rows.
        comparison: with the other matrix; None for none.
        against: what to call the other matrix.
        pictures: by their names; empty without pictures.
    """

    subject: Subject
    checks: Sequence[Coverage]
    recipe: RecipeView | None
    tiles: Sequence[Fact]
    verdicts: Sequence[Verdict]
    facts: Sequence[Fact]
    sources: Sequence[Source]
    thin: Thin
    parts: Sequence[tuple[Part, list[Line], list[LayerStatistics]]]
    weights: Sequence[tuple[WeightStatistics, Heavy | None]]
    comparison: MatrixComparison | None
    against: str
    pictures: Mapping[str, Picture]


def report_page(
    matrix: ImportanceMatrix | str | os.PathLike[str],
    *,
    name: str | None = None,
    model: str | os.PathLike[str] | None = None,
    types: Sequence[str] = (),
    against: ImportanceMatrix | str | os.PathLike[str] | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
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
        recipe: a recipe for the model, or the path of one, to show: what each size costs, and
            which types the tensors get.
        pictures: whether to draw; needs matplotlib, which the extra `plot` installs.
        chunk_size: tokens a chunk of .dat files, see imatrix.formats.dat.read.

    Returns:
        The page. Encode it as UTF-8. The same arguments give the same page.

    Raises:
        ValueError: an unknown type, types without a model, a matrix without entries, a file that is
            no recipe, or a recipe for another model.
        ModelError (a ValueError): `model` is not a model.
        FormatError (a ValueError): a file is not an importance matrix.
        OSError: a file cannot be read.
        ImportError: pictures are wanted and matplotlib is missing.
    """
    if types and model is None:
        raise ValueError(
            f"types were given ({', '.join(types)}) and no model to check them on; name the model"
        )
    subject = _load(matrix, name, chunk_size)
    if not subject.matrix:
        raise ValueError(f"{subject.name}: nothing to report, the matrix has no entries")
    view = None if recipe is None else _recipe(recipe, subject, model)
    checks = [] if model is None else _check(subject.matrix, model, types or COMMON_TYPES)
    comparison, other = None, None
    if against is not None:
        called = "the other matrix" if isinstance(against, ImportanceMatrix) else None
        other = _load(against, called, chunk_size)
        comparison = _compare(subject.matrix, other.matrix)
    thin = Thin(subject)
    found = statistics(subject.matrix)
    page = Page(
        subject=subject,
        checks=checks,
        recipe=view,
        tiles=tiles(subject, thin),
        verdicts=verdicts(subject, thin, checks, view),
        facts=made_facts(subject),
        sources=text_sources(subject),
        thin=thin,
        parts=part_tables(subject, found),
        weights=weight_table(subject, found, thin),
        comparison=comparison,
        against="" if other is None else other.name,
        pictures=_draw(subject, thin, other, view) if pictures else {},
    )
    return _render(page)


def _load(
    matrix: ImportanceMatrix | str | os.PathLike[str], name: str | None, chunk_size: int
) -> Subject:
    """A matrix, or the one of a file."""
    if isinstance(matrix, ImportanceMatrix):
        return Subject(matrix, name or "importance matrix", None)
    form = detected(matrix)
    found = ImportanceMatrix.load(matrix, chunk_size=chunk_size)
    return Subject(found, name or Path(matrix).name, form)


def _check(
    matrix: ImportanceMatrix, model: str | os.PathLike[str], types: Sequence[str]
) -> list[Coverage]:
    from imatrix.quantization.coverage import coverage  # here: it needs the native part

    return [
        coverage(model, matrix, ftype) for ftype in dict.fromkeys(each.upper() for each in types)
    ]


def _recipe(
    recipe: Recipe | str | os.PathLike[str], subject: Subject, model: str | os.PathLike[str] | None
) -> RecipeView:
    """The recipe, after a look whether it is for the model, or at least may be for the matrix."""
    found, called = load_recipe(recipe)
    if model is None:
        check_matrix(found, called, subject.matrix, subject.name)
    else:
        from imatrix.model.header import ModelFile  # here: it needs the native part

        found.check_model(ModelFile.read(model))
    return recipe_view(found, called)


def _compare(matrix: ImportanceMatrix, other: ImportanceMatrix) -> MatrixComparison:
    from imatrix.matrix.comparison import compare_matrices

    return compare_matrices(matrix, other)


def _draw(
    subject: Subject, thin: Thin, other: Subject | None, recipe: RecipeView | None
) -> Mapping[str, Picture]:
    # here: only pictures need it
    from imatrix.report.drawings import draw_pictures, draw_recipe

    found = {**draw_pictures(subject, thin, other)}
    if recipe is not None:
        found |= draw_recipe(recipe.recipe)
    return found


def _render(page: Page) -> str:
    style, script = ((FOLDER / name).read_text("utf-8") for name in ("report.css", "sort.js"))
    text = (
        make_environment()
        .get_template("report.html")
        .render(
            page=page,
            describe_stop=describe_stop,
            fixes=fixes,
            has_details=has_details,
            without_data=without_data,
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
