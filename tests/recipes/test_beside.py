"""A recipe beside mixtures: what is compared is what separate calls give, and nothing is left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers.running import TEXT

import imatrix
from imatrix import ImportanceMatrix, ModelFile, Recipe, evaluate, quantize
from imatrix.cli.program import main
from imatrix.cli.status import OK, USAGE
from imatrix.recipes.beside import (
    LEAST_CHUNKS,
    BesideProgress,
    Shares,
    check_mixtures,
    compare_beside,
    count_chunks,
    kl_ratio,
    share_text,
)

N_CTX = 32
OPTIONS: dict[str, Any] = {"n_ctx": N_CTX, "n_threads": 1, "rehearse": False}
HELD_BACK = TEXT[12_000:16_000]


class Given(NamedTuple):
    model: Path
    matrix: Path
    for_size: Callable[[int], Recipe]


@pytest.fixture(scope="module")
def given(model: Path, head_matrix: Path, tmp_path_factory: pytest.TempPathFactory) -> Given:
    """The random model, and recipes for it: everything q2_k, which is smaller than any of the
    mixtures here."""
    folder = tmp_path_factory.mktemp("recipes")
    types = {
        tensor.name: "q2_k"
        for tensor in imatrix.coverage(model, head_matrix, "Q4_K_M").tensors
        if tensor.source_type != tensor.target_type
    }
    made = quantize(
        model,
        folder / "q2.gguf",
        "Q2_K",
        imatrix=head_matrix,
        tensor_types=[(f"^{name}$", kind) for name, kind in types.items()],
    )
    recipe = Recipe.for_model(ModelFile.read(model), types, ftype="Q2_K", bytes=made.bytes)
    return Given(model, head_matrix, lambda n_bytes: recipe)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_comparison_is_what_separate_calls_give(given: Given, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    asked: list[int] = []

    def for_size(n_bytes: int) -> Recipe:
        asked.append(n_bytes)
        return given.for_size(n_bytes)

    steps: list[BesideProgress] = []
    [pair] = compare_beside(
        given.model,
        given.matrix,
        ["q8_0"],
        for_size,
        HELD_BACK,
        skip_chunks=2,
        max_chunks=9,
        folder=folder,
        progress=steps.append,
        **OPTIONS,
    )
    assert left_in(folder) == []
    alone = {
        "mixture": quantize(given.model, tmp_path / "a.gguf", "Q8_0", imatrix=given.matrix),
        "recipe": quantize(
            given.model,
            tmp_path / "b.gguf",
            "Q2_K",
            imatrix=given.matrix,
            recipe=given.for_size(0),
        ),
    }
    assert asked == [alone["mixture"].bytes]
    kl = {}
    for name, done in alone.items():
        found = evaluate(
            done.path,
            HELD_BACK,
            reference=given.model,
            skip_chunks=2,
            max_chunks=9,
            **OPTIONS,
        )
        side = getattr(pair, name)
        assert side.bytes == done.bytes == done.path.stat().st_size
        assert side.bits_per_weight == done.bits_per_weight
        assert side.path is None
        for rows, others in (
            (side.evaluation.trunk, found.trunk),
            (side.evaluation.head, found.head),
        ):
            assert np.array_equal(rows.kl, others.kl)
            assert np.array_equal(rows.nll, others.nll)
            assert np.array_equal(rows.top, others.top)
        kl[name] = found.trunk.kl
    assert kl["recipe"] is not None
    assert kl["mixture"] is not None
    assert pair.difference.kl is not None
    assert pair.difference.kl.value == pytest.approx(np.mean(kl["recipe"] - kl["mixture"]))
    # 15 positions of each of the 9 chunks, so that means of chunks are the mean
    ratio = kl["recipe"].mean() / kl["mixture"].mean()
    assert pair.kl_ratio.value == pytest.approx(ratio)
    chunks = {name: rows.reshape(9, -1).mean(1) for name, rows in kl.items()}
    # the resamples of imatrix.evaluation.estimates, by hand
    drawn = np.random.default_rng(20240229).multinomial(9, np.full(9, 1 / 9), size=1000)
    low, high = np.percentile((drawn @ chunks["recipe"]) / (drawn @ chunks["mixture"]), (2.5, 97.5))
    assert (pair.kl_ratio.low, pair.kl_ratio.high) == pytest.approx((low, high))

    assert [(step.doing, step.name) for step in steps if step.total is None] == [
        ("quantizing", "Q8_0"),
        ("evaluating", "Q8_0"),
        ("choosing", "recipe for Q8_0"),
        ("quantizing", "recipe for Q8_0"),
        ("evaluating", "recipe for Q8_0"),
    ]
    assert {step.steps for step in steps} == {5}
    assert [step.done for step in steps if step.step == 5][-1] == 9
    data = pair.as_data()
    assert data["mixture"]["bytes"] == alone["mixture"].bytes
    assert data["kl_ratio"]["value"] == pytest.approx(ratio)


def test_what_is_kept(given: Given, tmp_path: Path) -> None:
    [pair] = compare_beside(
        given.model,
        given.matrix,
        ["Q8_0"],
        given.for_size,
        HELD_BACK,
        max_chunks=LEAST_CHUNKS,
        folder=tmp_path,
        keep=tmp_path,
        mtp=False,
        **OPTIONS,
    )
    stem = given.model.stem
    assert left_in(tmp_path) == [f"{stem}-Q8_0.gguf", f"{stem}-recipe-Q8_0.gguf"]
    assert pair.mixture.path == tmp_path / f"{stem}-Q8_0.gguf"
    assert pair.recipe.path == tmp_path / f"{stem}-recipe-Q8_0.gguf"
    assert pair.mixture.path.stat().st_size == pair.mixture.bytes
    assert pair.mixture.evaluation.head is None


@pytest.mark.parametrize("named", [True, False])
def test_the_sizes_of_mixtures_are_known_before(named: bool, given: Given, tmp_path: Path) -> None:
    # the name of the matrix's file is written too
    matrix = given.matrix if named else ImportanceMatrix.load(given.matrix)
    done = quantize(given.model, tmp_path / "q.gguf", "Q8_0", imatrix=matrix)
    assert check_mixtures(given.model, matrix, ["q8_0"]) == {"Q8_0": done.bytes}


class Broken(Exception):
    pass


@pytest.mark.parametrize(
    ("at", "error"), [("quantizing", KeyboardInterrupt), ("evaluating", Broken)]
)
def test_nothing_is_left_of_what_failed(
    at: str, error: type[BaseException], given: Given, tmp_path: Path
) -> None:
    def fail(step: BesideProgress) -> None:
        if step.doing == at and step.done == 0:
            raise error

    with pytest.raises(error):
        compare_beside(
            given.model,
            given.matrix,
            ["Q8_0"],
            given.for_size,
            HELD_BACK,
            folder=tmp_path,
            progress=fail,
            **OPTIONS,
        )
    assert left_in(tmp_path) == []


def test_a_recipe_that_is_larger_is_refused(given: Given, tmp_path: Path) -> None:
    def for_size(n_bytes: int) -> Recipe:
        file = ModelFile.read(given.model)
        types = dict.fromkeys(given.for_size(n_bytes).types, "f16")
        return Recipe.for_model(file, types, ftype="Q8_0", bytes=n_bytes)

    with pytest.raises(ValueError, match=r"makes a file of .* no comparison at equal size"):
        compare_beside(
            given.model, given.matrix, ["Q8_0"], for_size, HELD_BACK, folder=tmp_path, **OPTIONS
        )
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mixtures": []}, "no mixture to compare with"),
        ({"mixtures": ["Q3_K_M", "q3_k_m"]}, "the mixture Q3_K_M is named twice"),
        ({"mixtures": ["Q3_K_X"]}, "unknown type 'Q3_K_X'"),
        ({"matrix": None, "mixtures": ["IQ2_XXS"]}, "cannot be quantized to IQ2_XXS: blk.*no matrix"),
        ({"max_chunks": LEAST_CHUNKS - 1}, "takes 8 chunks at least, max_chunks is 7"),
        ({"texts": HELD_BACK[:300]}, "8 are needed for an interval"),
        ({"texts": (Path(__file__)).open}, "an open file can be read once only"),
    ],
)  # fmt: skip
def test_what_is_refused(change: dict[str, Any], told: str, given: Given, tmp_path: Path) -> None:
    asked: dict[str, Any] = {
        "mixtures": ["Q8_0"], "matrix": given.matrix, "texts": HELD_BACK, **change
    }  # fmt: skip
    opened = asked["texts"]("rb") if callable(asked["texts"]) else None
    if opened is not None:
        asked["texts"] = opened
    try:
        with pytest.raises(ValueError, match=told):
            compare_beside(
                given.model,
                asked.pop("matrix"),
                asked.pop("mixtures"),
                given.for_size,
                asked.pop("texts"),
                folder=tmp_path,
                **asked,
                **OPTIONS,
            )
    finally:
        if opened is not None:
            opened.close()
    assert left_in(tmp_path) == []


def test_folders_and_room(given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        check_mixtures(given.model, given.matrix, ["Q3_K_M"], folder=tmp_path / "nowhere")
    [size] = check_mixtures(given.model, given.matrix, ["Q3_K_M"]).values()
    usage = shutil.disk_usage(tmp_path)
    # one file at a time, and both if they are kept
    for keep, needed in ((None, size), (tmp_path, 2 * size)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=needed: usage._replace(free=n))
        check_mixtures(given.model, given.matrix, ["Q3_K_M"], folder=tmp_path, keep=keep)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, n=needed: usage._replace(free=n - 1))
        with pytest.raises(OSError, match="make room, or name a folder on another disk"):
            check_mixtures(given.model, given.matrix, ["Q3_K_M"], folder=tmp_path, keep=keep)


def test_a_kept_file_replaces_no_input(given: Given, tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    shutil.copy(given.model, model)
    (tmp_path / "m-Q3_K_M.gguf").hardlink_to(model)
    with pytest.raises(ValueError, match="would replace the input"):
        check_mixtures(model, given.matrix, ["Q3_K_M"], keep=tmp_path)


@pytest.mark.parametrize(
    ("total", "wanted", "expected"),
    [
        (60, None, (40, 20)),
        (60, 16, (16, 44)),
        (60, 50, (40, 20)),
        (61, None, (40, 21)),  # a third, rounded up
        (12, None, (4, 8)),
        (9, 5, (1, 8)),
    ],
)
def test_one_text_for_both(total: int, wanted: int | None, expected: tuple[int, int]) -> None:
    assert share_text(total, wanted) == Shares(measured=expected[0], compared=expected[1])


@pytest.mark.parametrize("total", [0, 1, 8])
def test_a_text_too_short_for_both(total: int) -> None:
    with pytest.raises(ValueError, match=r"too few to measure on one part .*--beside-file"):
        share_text(total)
    with pytest.raises(ValueError, match="1 chunk or more, got 0"):
        share_text(100, 0)


def test_chunks_are_counted(given: Given) -> None:
    options = {"n_ctx": N_CTX, "rehearse": False}
    found = evaluate(given.model, HELD_BACK, mtp=False, **OPTIONS)
    assert count_chunks(given.model, HELD_BACK, **options) == found.n_chunks
    assert count_chunks(given.model, HELD_BACK, most=5, **options) == 5
    assert count_chunks(given.model, HELD_BACK, skip_chunks=3, **options) == found.n_chunks - 3


def test_a_ratio_needs_the_same_reference(given: Given) -> None:
    found = evaluate(given.model, HELD_BACK, mtp=False, max_chunks=2, **OPTIONS)
    with pytest.raises(ValueError, match="against one reference"):
        kl_ratio(found, found)


def test_the_command(
    given: Given,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "held-out.txt"
    text.write_text(HELD_BACK[:2_000], "utf-8")
    words = ["recipe", str(given.model), str(given.matrix), "-f", str(text)]
    words += ["--kl", "5", "--types", "q2_k,q8_0", "--head", "keep", "--effort", "quick"]
    words += ["--chunks", "2", "-c", str(N_CTX), "-t", "1", "--beside", "Q8_0", "--keep", "."]
    assert main([*words, "--beside-chunks", "9"]) == OK
    out = capsys.readouterr().out
    assert "measured on 2 chunks of held-out.txt, compared on the 9 chunks after them" in out
    stem = given.model.stem
    # the files that were compared are those that are told of
    mixture, recipe = Path(f"{stem}-Q8_0.gguf"), Path(f"{stem}-recipe-Q8_0.gguf")
    kl = []
    for path in (mixture, recipe):
        found = evaluate(
            path, text, reference=given.model, skip_chunks=2, max_chunks=9, **OPTIONS
        ).kl
        assert found is not None
        kl.append(found.value)
        assert f" {path.stat().st_size} " in out
        assert f" {found.value:.5f} " in out
    assert f"the recipe's KL is {kl[1] / kl[0]:.3f} (" in out
    assert recipe.stat().st_size <= mixture.stat().st_size

    assert main([*words, "--beside-file", str(text)]) == USAGE
    assert "is measured too (-f)" in capsys.readouterr().err


def test_flags_that_go_with_beside(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recipe", str(given.model), "-p", "text", "--bpw", "4", "-o", str(tmp_path / "r.json")]
    assert main([*words, "--keep", str(tmp_path)]) == USAGE
    assert "--keep goes with --beside" in capsys.readouterr().err
    # the text is too short for both
    assert main([*words, "--beside", "Q8_0"]) == USAGE
    assert (
        "too few to measure on one part of it and to compare on another" in capsys.readouterr().err
    )
    assert main([*words, "--beside", "Q8_0,"]) == USAGE
    assert "expected types with commas between" in capsys.readouterr().err
