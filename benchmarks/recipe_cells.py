"""The cells of the study in recipes.py: measuring, choosing, quantizing, evaluating; cached results."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import recipe_errors

import imatrix
from imatrix.files import atomic
from imatrix.quantization.file_size import padded
from imatrix.quantization.recipe import Recipe
from imatrix.quantization.source import data_bytes
from imatrix.recipes.choosing import Frontier, Item, Option
from imatrix.recipes.groups import OFFERED

MIXTURES = (
    "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M",
)  # fmt: skip
EFFORTS = ("quick", "standard", "thorough")
# Cached results are of this version of the code that makes them.
_VERSION = 1
_PIECE = 2000  # characters of the text that is measured, which the seeds put in another order


@dataclass(frozen=True)
class Text:
    """A text to evaluate on: its name in the tables, its content, and how much of it is used."""

    name: str
    content: str
    chunks: int | None = None


@dataclass(frozen=True)
class Study:
    """What to run.

    Attributes:
        model: the F16 or BF16 model, without a head.
        calibration: the text that the matrix is made of.
        measured: the text that recipes are measured on. A seed puts its pieces in another order, and
            an effort takes as many chunks of it as it does.
        tests: the texts that all are evaluated on: in-domain, then out-of-domain. None of them
            shares a part with `measured`.
        mixtures: the engine's, from the smallest.
        seeds: of the measured text. The first one has all efforts.
        efforts: the main tables are of the second.
        baselines: kinds of errors, see recipe_errors.
        types: that recipes and baselines choose from.
        n_ctx: tokens a chunk.
    """

    model: Path
    calibration: str
    measured: str
    tests: tuple[Text, ...]
    mixtures: tuple[str, ...] = MIXTURES
    seeds: tuple[int, ...] = (1, 2, 3)
    efforts: tuple[str, ...] = EFFORTS
    baselines: tuple[str, ...] = recipe_errors.ERRORS
    types: tuple[str, ...] = OFFERED
    n_ctx: int = 512

    def text(self, seed: int) -> str:
        """The text that a seed measures on."""
        pieces = [
            self.measured[start : start + _PIECE] for start in range(0, len(self.measured), _PIECE)
        ]
        random.Random(seed).shuffle(pieces)
        return "".join(pieces)

    def runs(self) -> list[tuple[str, int]]:
        """(effort, seed) of each measurement: the main one for all seeds, all for the first."""
        main = self.efforts[min(1, len(self.efforts) - 1)]
        runs = [(main, seed) for seed in self.seeds]
        return runs + [(each, self.seeds[0]) for each in self.efforts if each != main]


@dataclass(frozen=True)
class Way:
    """A way to choose types.

    Attributes:
        name: "mixture", "recipe", or a kind of error.
        effort, seed: of a recipe.
    """

    name: str
    effort: str = ""
    seed: int = 0


MIXTURE = Way("mixture")


@dataclass(frozen=True)
class Made:
    """A quantized model of the study.

    Attributes:
        mixture: the one whose bytes it has at most.
        types: tensor -> ggml type, of all tensors of two dimensions or more.
        bytes: of its file.
        evaluations: by the name of the text.
    """

    way: Way
    mixture: str
    types: Mapping[str, str]
    bytes: int
    evaluations: Mapping[str, imatrix.Evaluation]


@dataclass(frozen=True)
class Results:
    """All of the study.

    Attributes:
        made: by way and mixture.
        recipes: by effort, seed and mixture, as JSON has them.
        minutes: that a measurement took, by effort and seed.
    """

    made: Mapping[tuple[Way, str], Made]
    recipes: Mapping[tuple[str, int, str], dict[str, Any]]
    minutes: Mapping[tuple[str, int], float]


# --- work, done in processes of their own ------------------------------------------------------


def _begin() -> None:
    """Hide the quantizer's warnings, since it warns about every override, and load the package: a
    change of its files does not reach a study that runs."""
    logging.getLogger("imatrix").setLevel(logging.ERROR)
    for name in imatrix.__all__:
        getattr(imatrix, name)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _identity(path: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest(), imatrix.backends().engine]


def _keep(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as temporary:
        temporary.write_text(json.dumps(value))


def collect(study: Study, folder: Path) -> Path:
    """The matrix of the calibration text."""
    key = [_VERSION, *_identity(study.model), study.calibration, study.n_ctx]
    path = folder / "matrices" / f"{digest(key)}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with imatrix.Collector(study.model, n_ctx=study.n_ctx, n_threads=1) as collector:
            collector.run(study.calibration).save(path)
    return path


def make_mixture(study: Study, mixture: str, matrix: Path, folder: Path) -> Path:
    """Quantize to a mixture, and evaluate."""
    return _made(study, matrix, folder, {"mixture": mixture}, lambda target: _mix(study, mixture, matrix, target))  # fmt: skip


def _mix(study: Study, mixture: str, matrix: Path, target: Path) -> None:
    imatrix.quantize(study.model, target, mixture, imatrix=matrix, n_threads=1)


def make_types(
    study: Study, types: Mapping[str, str], ftype: str, matrix: Path, folder: Path
) -> Path:
    """Quantize with a type for each tensor, and evaluate."""

    def quantize(target: Path) -> None:
        imatrix.quantize(
            study.model,
            target,
            ftype,
            imatrix=matrix,
            tensor_types=[(f"^{re.escape(name)}$", type_) for name, type_ in types.items()],
            n_threads=1,
        )

    return _made(study, matrix, folder, {"ftype": ftype, "types": dict(types)}, quantize)


def make_recipe(study: Study, recipe: Path, matrix: Path, folder: Path) -> Path:
    """Quantize by a recipe, and evaluate."""
    found = Recipe.load(recipe)

    def quantize(target: Path) -> None:
        done = imatrix.quantize(
            study.model, target, found.ftype, imatrix=matrix, recipe=found, n_threads=1
        )
        if done.bytes != found.bytes:
            raise AssertionError(f"the recipe says {found.bytes} bytes, the file has {done.bytes}")

    about = {"recipe": found.ftype, "types": dict(found.types)}
    return _made(study, matrix, folder, about, quantize)


def _made(
    study: Study,
    matrix: Path,
    folder: Path,
    about: Mapping[str, Any],
    quantize: Callable[[Path], None],
) -> Path:
    """Quantize and evaluate, unless it is in the folder.

    Returns:
        A file of JSON: "bytes", "types", and "evaluations": the files of arrays by text.
    """
    key = digest([_VERSION, *_identity(study.model), matrix.name, about, study.n_ctx])
    path = folder / "cells" / f"{digest([key, [asdict(text) for text in study.tests]])}.json"
    rows = {
        text.name: folder
        / "evaluations"
        / f"{digest([key, text.name, text.content, text.chunks])}.npz"
        for text in study.tests
    }
    if path.exists() and all(each.exists() for each in rows.values()):
        return path
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantized-", dir=folder) as place:
        target = Path(place) / "quantized.gguf"
        quantize(target)
        for text in study.tests:
            if not rows[text.name].exists():
                save(evaluated(study, target, text), rows[text.name])
        facts = {
            "bytes": target.stat().st_size,
            "types": types_of(target),
            "evaluations": {name: each.name for name, each in rows.items()},
        }
    _keep(path, facts)
    return path


def types_of(path: Path) -> dict[str, str]:
    """Tensor -> ggml type in lower case, of tensors of two dimensions or more."""
    import gguf

    return {
        each.name: each.tensor_type.name.lower()
        for each in gguf.GGUFReader(path).tensors
        if len(each.shape) > 1
    }


def evaluated(study: Study, model: Path, text: Text) -> imatrix.Evaluation:
    """imatrix.evaluate with the study's settings."""
    return imatrix.evaluate(
        model,
        text.content,
        reference=study.model,
        n_ctx=study.n_ctx,
        max_chunks=text.chunks,
        n_threads=1,
        rehearse=False,
    )


_ROWS = ("nll", "top", "reference_nll", "reference_top", "kl")


def save(found: imatrix.Evaluation, path: Path) -> None:
    """Keep an evaluation of a trunk as arrays."""
    arrays: dict[str, Any] = {name: getattr(found.trunk, name) for name in _ROWS}
    about = [found.n_ctx, found.n_vocab, found.digest, found.model, found.reference]
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            chunk=found.chunk,
            position=found.position,
            about=np.array(json.dumps(about)),
            **arrays,
        )


def load(path: Path) -> imatrix.Evaluation:
    """Load what save() wrote."""
    with np.load(path) as arrays:
        n_ctx, n_vocab, text, model, reference = json.loads(str(arrays["about"]))
        return imatrix.Evaluation(
            model=model,
            mtp_model=None,
            reference=reference,
            n_ctx=n_ctx,
            n_vocab=n_vocab,
            digest=text,
            chunk=arrays["chunk"],
            position=arrays["position"],
            trunk=imatrix.Predictions(*(arrays[name] for name in _ROWS)),
            head=None,
            depth=0,
            known=np.empty(0, np.int8),
            accepted=np.empty(0, np.int8),
        )


def make_recipes(
    study: Study, effort: str, seed: int, sizes: Mapping[str, int], matrix: Path, folder: Path
) -> Path:
    """Measure once, and choose a recipe for each mixture's bytes.

    Returns:
        A folder with MIXTURE.json for each, and minutes.json.
    """
    text = study.text(seed)
    key = [_VERSION, *_identity(study.model), matrix.name, effort, text, study.n_ctx, sizes]
    key += [] if study.types == OFFERED else [study.types]
    place = folder / "recipes" / f"{effort}-{seed}-{digest(key)}"
    if (place / "minutes.json").exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    found = imatrix.recipe(
        study.model,
        matrix,
        text,
        size=list(sizes.values()),
        effort=effort,
        types=study.types,
        n_ctx=study.n_ctx,
        measured=place / "measured.jsonl",
        n_threads=1,
    )
    for mixture, recipe in zip(sizes, found, strict=True):
        recipe.save(place / f"{mixture}.json")
    _keep(place / "minutes.json", (time.monotonic() - started) / 60)
    return place


def make_errors(study: Study, tensors: Sequence[str], matrix: Path, folder: Path) -> Path:
    """The errors of all tensors in all types, as JSON."""
    key = [_VERSION, *_identity(study.model), matrix.name, tensors, study.types]
    path = folder / "errors" / f"{digest(key)}.json"
    if not path.exists():
        found = recipe_errors.errors(
            study.model, imatrix.ImportanceMatrix.load(matrix), tensors, study.types, folder
        )
        _keep(path, found)
    return path


def choose(study: Study, errors: recipe_errors.Errors, kind: str, mixture: Made) -> dict[str, str]:
    """The types that minimize the sum of errors within the mixture's bytes."""
    shapes = imatrix.ModelFile.read(study.model).tensors
    bits = {type_: 8 * data_bytes((256,), type_) / 256 for type_ in study.types}
    n_values = {name: int(np.prod(shapes[name])) for name in errors}
    whole = (
        8 * sum(data_bytes(shapes[n], mixture.types[n]) for n in errors) / sum(n_values.values())
    )
    tied = None
    if "output.weight" not in shapes and "token_embd.weight" in errors:
        tied = n_values["token_embd.weight"] / sum(n_values.values())
    errors = recipe_errors.by_kind(errors, bits, whole, tied)

    def n_bytes(name: str, type_: str) -> int:
        return padded(data_bytes(shapes[name], type_))

    items = [
        Item(name, tuple(Option(type_, n_bytes(name, type_), of[kind]) for type_, of in types.items()))
        for name, types in errors.items()
    ]  # fmt: skip
    return dict(Frontier(items).at_most(sum(n_bytes(n, mixture.types[n]) for n in errors)).types)


# --- the whole of it ---------------------------------------------------------------------------


def run(study: Study, folder: Path, workers: int, told: Callable[[str], object] = print) -> Results:
    """Make all cells, or take them from the folder."""
    started = time.monotonic()

    def tell(text: str) -> None:
        told(f"{time.monotonic() - started:5.0f} s  {text}")

    folder.mkdir(parents=True, exist_ok=True)
    # spawned, since the engine's threads would not survive a fork
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin) as pool:
        matrix = pool.submit(collect, study, folder).result()
        tell("matrix")
        made: dict[tuple[Way, str], Made] = {}

        def finish(running: Mapping[tuple[Way, str], Future[Path]]) -> None:
            for number, ((way, mixture), future) in enumerate(running.items(), 1):
                made[way, mixture] = _read(way, mixture, future.result(), folder)
                if number % 9 == 0 or number == len(running):
                    tell(f"{way.name} {way.effort} {mixture}: {number} of {len(running)}")

        finish(
            {
                (MIXTURE, each): pool.submit(make_mixture, study, each, matrix, folder)
                for each in study.mixtures
            }
        )
        mixtures = {each: made[MIXTURE, each] for each in study.mixtures}
        sizes = {name: each.bytes for name, each in mixtures.items()}
        first = next(iter(mixtures.values()))
        source = types_of(study.model)
        tensors = [name for name, type_ in first.types.items() if type_ != source[name]]
        measuring = {
            each: pool.submit(make_recipes, study, *each, sizes, matrix, folder)
            for each in study.runs()
        }
        if study.baselines:
            path = pool.submit(make_errors, study, tensors, matrix, folder).result()
            errors = json.loads(path.read_text())
            tell("errors of the weights")
            finish(
                {
                    (Way(kind), name): pool.submit(
                        make_types,
                        study,
                        choose(study, errors, kind, mixture),
                        name,
                        matrix,
                        folder,
                    )
                    for kind in study.baselines
                    for name, mixture in mixtures.items()
                }
            )
        recipes: dict[tuple[str, int, str], dict[str, Any]] = {}
        minutes: dict[tuple[str, int], float] = {}
        for (effort, seed), future in measuring.items():
            place = future.result()
            minutes[effort, seed] = json.loads((place / "minutes.json").read_text())
            tell(f"measured: {effort}, seed {seed}")
            paths = {name: place / f"{name}.json" for name in study.mixtures}
            for name, path in paths.items():
                recipes[effort, seed, name] = json.loads(path.read_text("utf-8"))
            finish(
                {
                    (Way("recipe", effort, seed), name): pool.submit(
                        make_recipe, study, path, matrix, folder
                    )
                    for name, path in paths.items()
                }
            )
    for (way, name), each in made.items():
        if each.bytes > sizes[name]:
            raise AssertionError(f"{way} has {each.bytes} bytes, {name} {sizes[name]}")
    return Results(made, recipes, minutes)


def _read(way: Way, mixture: str, path: Path, folder: Path) -> Made:
    facts = json.loads(path.read_text())
    evaluations = {
        name: load(folder / "evaluations" / file) for name, file in facts["evaluations"].items()
    }
    return Made(way, mixture, facts["types"], facts["bytes"], evaluations)
