"""README's picture of the study: its points are the rows of benchmarks/results/recipes.json."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.recipes import recipe_data

from imatrix import pictures

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """docs/make_pictures.py as a module."""
    path = ROOT / "docs" / "make_pictures.py"
    spec = importlib.util.spec_from_file_location("make_pictures", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def made(way: str, text: str, size: int, kl: float, **more: Any) -> dict[str, Any]:
    interval = {"value": kl, "error": 0.5, "low": 0.9 * kl, "high": 1.2 * kl}
    empty = {"effort": "", "seed": 0, "mixture": "Q3_K_M", "ratio": None}
    return {"way": way, "text": text, "bytes": size, "kl": interval, **empty, **more}


def test_the_points_are_those_of_the_study(script: ModuleType) -> None:
    kept = {"effort": "standard", "seed": 1}
    study = {
        "made": [
            made("recipe", "in-domain", 2_990_000, 0.7, effort="quick", seed=1),
            made("recipe", "in-domain", 2_990_000, 0.8, effort="standard", seed=2),
            made("mixture", "in-domain", 3_000_000, 0.5),
            made("mixture", "in-domain", 2_000_000, 0.9, mixture="IQ2_XXS"),
            made("mixture", "out-of-domain", 3_000_000, 0.6),
            made("recipe", "in-domain", 1_990_000, 0.4, **kept),
            made("recipe", "in-domain", 2_995_000, 0.2, **kept),
            made("recipe", "out-of-domain", 2_995_000, 0.3, **kept),
            made("squared", "in-domain", 2_995_000, 0.35),
        ],
        "recipe": recipe_data(),  # of 3,000,000 bytes
    }
    found = script.study_recipe(study)
    assert found.measured_kl.value == 0.2
    assert [(point.bytes, point.kl, point.name) for point in found.frontier.measured] == [
        (1_990_000, 0.4, ""),
        (2_995_000, 0.2, ""),
    ]
    assert [(point.bytes, point.kl, point.name) for point in found.frontier.mixtures] == [
        (3_000_000, 0.5, "Q3_K_M"),
        (2_000_000, 0.9, "IQ2_XXS"),
    ]
    # the drawn interval is as wide as the study's: 0.3 of the KL
    assert 2 * 1.96 * found.frontier.mixtures[0].error == pytest.approx(0.3 * 0.5)
    figure = pictures.recipe(found, width=script.WIDTH)
    assert {"frontier", "trunk", "head"} <= {axes.get_label() for axes in figure.axes}
    assert "recipes, predicted" not in {text.get_text() for text in figure.texts}
