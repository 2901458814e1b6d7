"""Pictures of importance matrices (layers, experts, channels, two of them side by side) and of recipes.

from imatrix import ImportanceMatrix, pictures

matrix = ImportanceMatrix.load("imatrix.gguf")
pictures.save(pictures.layers(matrix), "layers.png")

Every function gives a `matplotlib.figure.Figure`. Nothing goes through pyplot, and no window opens.
Figures are built and written one at a time, with matplotlib's own defaults in place of the user's
(`rcParams` are put back after), so that the same matrix gives the same bytes. Text in an SVG stays
text. matplotlib is the extra `plot`, and is imported on first use.
"""

from __future__ import annotations

from imatrix.pictures.expert_map import experts
from imatrix.pictures.layer_map import layers
from imatrix.pictures.looks import Style
from imatrix.pictures.numbers import Difference, Statistic
from imatrix.pictures.profiles import channels
from imatrix.pictures.recipe_pictures import bits, frontier, recipe
from imatrix.pictures.side_by_side import compare
from imatrix.pictures.writing import DPI, FORMATS, png, save, svg

__all__ = [
    "DPI",
    "FORMATS",
    "Difference",
    "Statistic",
    "Style",
    "bits",
    "channels",
    "compare",
    "experts",
    "frontier",
    "layers",
    "png",
    "recipe",
    "save",
    "svg",
]
