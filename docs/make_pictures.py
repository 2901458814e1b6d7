"""Draw the pictures of docs/plot.md and README.md into docs/pictures/.

    python docs/make_pictures.py            # of the model that comes with the package
    python docs/make_pictures.py --study    # recipe.png alone, of benchmarks/results/recipes.json

The study takes hours (benchmarks/recipes.py), so that its picture is drawn of its results. The recipe
of the others is measured: a few minutes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from imatrix import pictures
from imatrix.quantization.frontier import NORMAL_95, FrontierCurve, FrontierPoint
from imatrix.quantization.recipe import Measured, Recipe

HERE = Path(__file__).parent
DATA = HERE.parent / "src" / "imatrix" / "data"
STUDY = HERE.parent / "benchmarks" / "results" / "recipes.json"
MODEL = DATA / "tiny-glm4moe-mtp.gguf"
TEXTS = {"imatrix.gguf": "calibration.txt", "python.gguf": "held-out.txt"}
PICTURES = {
    "layers.png": ["--dpi", "120"],
    "experts.svg": ["--kind", "experts"],
    "channels.svg": ["--weight", "blk.3.ffn_down_exps", "--weight", "blk.4.nextn.eh_proj"],
    "compare.svg": ["--with", "python.gguf", "--difference", "cosine"],
}
RECIPE = ("--size", "2.2M", "--effort", "quick", "-f", "held-out.txt", "-o", "recipe.json")
# Effort and seed of the recipe that the study keeps whole.
KEPT = ("standard", 1)
# README shows it 800 pixels wide; twice as many for a fine screen.
WIDTH, DPI = 8.6, 186


def draw_model() -> None:
    """Collect two matrices of the package's model, measure a recipe, and draw them."""
    with tempfile.TemporaryDirectory() as folder:

        def imatrix(*arguments: object) -> None:
            command = [sys.executable, "-m", "imatrix", *map(str, arguments)]
            subprocess.run(command, cwd=folder, check=True)

        for matrix, text in TEXTS.items():
            imatrix("collect", "-m", MODEL, "-f", DATA / text, "-o", matrix, "--mtp", "--no-ppl")
        for name, flags in PICTURES.items():
            imatrix("plot", "imatrix.gguf", "-o", HERE / "pictures" / name, *flags)
        # copied, since a recipe names its text as it was given
        shutil.copy(DATA / "held-out.txt", folder)
        imatrix("recipe", MODEL, "imatrix.gguf", *RECIPE)
        imatrix("plot", "recipe.json", "-o", HERE / "pictures" / "recipe-plot.png", "--dpi", "120")


def study_recipe(study: dict[str, Any]) -> Recipe:
    """The recipe that the study keeps whole, with all mixtures and recipes of the study as its
    frontier, as they were evaluated on text that no measurement saw.

    Args:
        study: of one model, from benchmarks/results/recipes.json.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.json"
        path.write_text(json.dumps(study["recipe"]), "utf-8")
        found = Recipe.load(path)
    rows = [row for row in study["made"] if row["text"] == "in-domain"]
    recipes = [
        _point(row, "")
        for row in rows
        if row["way"] == "recipe" and (row["effort"], row["seed"]) == KEPT
    ]
    own = min(recipes, key=lambda point: abs(point.bytes - found.bytes))
    return dataclasses.replace(
        found,
        measured_kl=Measured(own.kl, own.error, 0),
        predicted_kl=None,
        text="on text that the measurement did not see",
        chunks=0,
        frontier=FrontierCurve(
            # what was predicted is of the measurement's text
            bytes=np.array([], np.int64),
            kl=np.array([]),
            measured=tuple(recipes),
            mixtures=tuple(_point(row, row["mixture"]) for row in rows if row["way"] == "mixture"),
        ),
    )


def _point(row: dict[str, Any], name: str) -> FrontierPoint:
    """A row of the study; its interval is a bootstrap's over chunks, given as a standard error."""
    error = (row["kl"]["high"] - row["kl"]["low"]) / (2 * NORMAL_95)
    return FrontierPoint(bytes=row["bytes"], kl=row["kl"]["value"], error=error, name=name)


def draw_study() -> None:
    """Draw README's picture."""
    found = study_recipe(json.loads(STUDY.read_text("utf-8"))["shipped"])
    figure = pictures.recipe(found, width=WIDTH)
    pictures.save(figure, HERE / "pictures" / "recipe.png", dpi=DPI)


def main() -> None:
    """Draw what was asked for."""
    (HERE / "pictures").mkdir(exist_ok=True)
    if "--study" not in sys.argv[1:]:
        draw_model()
    draw_study()


if __name__ == "__main__":
    main()
