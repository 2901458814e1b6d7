"""The cells of the study in quality.py: collecting, quantizing, evaluating, and the cached results."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import imatrix
from imatrix.entries import Entry
from imatrix.files import atomic
from imatrix.matrix.importance import ImportanceMatrix

TYPES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "Q2_K", "Q3_K", "Q4_K",
    "Q4_0", "Q8_0",
)  # fmt: skip
# Kinds of head data for each part of the main grid: the trunk at Q8_0, or at the head's type.
DATA = {"head": ("ours", "flat", "borrowed", "none"), "whole": ("ours", "flat", "none")}
CALIBRATED = ("IQ1_S", "IQ2_XXS", "IQ3_XXS")  # the types of the calibration grid
DEPTH = 3
N_CTX = 512
# Cached results are of this version of the code that makes them.
_VERSION = 1


@dataclass(frozen=True)
class Text:
    """A text: its name in the table, its content, and how much of it is used.

    Attributes:
        name: as the tables call it.
        content: the text.
        chunks: chunks of N_CTX tokens; None for all.
    """

    name: str
    content: str
    chunks: int | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Study:
    """What to run.

    Attributes:
        model: the F16 or BF16 model.
        calibration: the texts to collect from; the main grid uses the first.
        sizes: calibration sizes in chunks, ascending; the main grid uses the last.
        held_out: the texts to evaluate on: in-domain, then out-of-domain.
        types, calibrated: types of the main grid and of the calibration grid.
        parts: "head" (trunk at Q8_0), "whole" (trunk at the head's type), or both.

    Every cell is evaluated in-domain. Out-of-domain only cells with collected or flat data and the
    trunk at Q8_0 are evaluated (see `texts_of`).
    """

    model: Path
    calibration: tuple[Text, ...]
    sizes: tuple[int, ...]
    held_out: tuple[Text, ...]
    types: tuple[str, ...] = TYPES
    calibrated: tuple[str, ...] = CALIBRATED
    parts: tuple[str, ...] = ("head", "whole")


@dataclass(frozen=True)
class Cell:
    """One quantized model of the study.

    Attributes:
        part: "head" or "whole", see Study.parts.
        type: the head's tensor type.
        data: "ours" (collected), "flat" (ones), "borrowed" (of the last trunk block), "none".
        text: calibration text, by name.
        chunks: chunks of the calibration text.
    """

    part: str
    type: str
    data: str
    text: str
    chunks: int


def texts_of(study: Study, part: str, data: str) -> tuple[Text, ...]:
    """The texts that such cells are evaluated on."""
    out_of_domain = part == "head" and data in ("ours", "flat")
    return study.held_out if out_of_domain else study.held_out[:1]


# --- head data ---------------------------------------------------------------------------------


def flat(matrix: ImportanceMatrix) -> ImportanceMatrix:
    """The trunk's data, with ones for the head's weights: every column weighs the same."""
    return _with_head(matrix, {name: _ones(entry) for name, entry in matrix.head.items()})


def borrowed(matrix: ImportanceMatrix) -> ImportanceMatrix:
    """The trunk's data, and for the head's weights those of the last trunk block.

    A weight `blk.<head>.x` gets the entry of `blk.<last of the trunk>.x`, expert by expert. What
    that block does not have in the same shape (`nextn.eh_proj`, `nextn.shared_head_head`; expert
    weights where it is dense) gets ones.
    """
    last = max(_block(name) for name in matrix.trunk if name.startswith("blk."))
    found = {}
    for name, entry in matrix.head.items():
        lent = matrix.get(re.sub(r"^blk\.\d+\.", f"blk.{last}.", name))
        fits = lent is not None and lent.sums.shape == entry.sums.shape
        found[name] = lent if lent is not None and fits else _ones(entry)
    return _with_head(matrix, found)


def head_data(matrix: ImportanceMatrix, data: str) -> ImportanceMatrix:
    """A matrix of trunk and head with head data of the given kind, see Cell."""
    kinds: dict[str, Callable[[ImportanceMatrix], ImportanceMatrix]] = {
        "ours": lambda whole: whole,
        "flat": flat,
        "borrowed": borrowed,
        "none": lambda whole: whole.trunk,
    }
    return kinds[data](matrix)


def _with_head(matrix: ImportanceMatrix, head: Mapping[str, Entry]) -> ImportanceMatrix:
    return ImportanceMatrix(
        {**matrix.trunk, **head},
        datasets=matrix.datasets,
        chunk_count=matrix.chunk_count,
        chunk_size=matrix.chunk_size,
    )


def _ones(entry: Entry) -> Entry:
    return Entry(np.ones_like(entry.sums), np.ones_like(entry.counts))


def _block(name: str) -> int:
    return int(name.split(".")[1])


# --- work, done in processes of their own ------------------------------------------------------


def _silence() -> None:
    """Hide the quantizer's warnings: it warns about every override."""
    logging.getLogger("imatrix.engine").setLevel(logging.ERROR)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _identity(model: Path) -> list[str]:
    return [hashlib.sha256(model.read_bytes()).hexdigest(), imatrix.backends().engine]


def collect(model: Path, text: Text, sizes: Sequence[int], folder: Path) -> dict[int, Path]:
    """A matrix file for each size, made of that many chunks of the text. One run makes them all."""
    key = [_VERSION, *_identity(model), text.digest, N_CTX]
    paths = {size: folder / "matrices" / f"{_digest([*key, size])}.gguf" for size in sizes}
    if all(path.exists() for path in paths.values()):
        return paths
    (folder / "matrices").mkdir(parents=True, exist_ok=True)
    with imatrix.Collector(model, n_ctx=N_CTX, n_threads=1) as collector:

        def keep(progress: imatrix.Progress) -> None:
            if progress.chunks in paths:
                collector.matrix.save(paths[progress.chunks])

        done = collector.run(text.content, mtp=True, max_chunks=max(sizes), progress=keep)
    if done.chunk_count < max(sizes):
        raise ValueError(
            f"the calibration text {text.name!r} has {done.chunk_count} chunks of {N_CTX} tokens "
            f"only; {max(sizes)} are asked for"
        )
    return paths


def make_cell(
    study: Study, cell: Cell, matrix: Path, folder: Path
) -> tuple[dict[str, Any], dict[str, Path]]:
    """Quantize and evaluate.

    Returns:
        Figures of the quantization ("refused": the engine's reason or None, "head_bpw", "trunk": a
        digest of the tensors outside the head), and the files of the evaluations by held-out text.
    """
    key = [_VERSION, *_identity(study.model), asdict(cell), _calibration(study, cell.text).digest]
    about = folder / "cells" / f"{_digest(key)}.json"
    texts = texts_of(study, cell.part, cell.data)
    about.parent.mkdir(parents=True, exist_ok=True)
    (folder / "evaluations").mkdir(exist_ok=True)
    if about.exists():
        facts = json.loads(about.read_text())
        if facts["refused"] is not None:
            return facts, {}
        paths = {text.name: _evaluation(study, facts, text, folder) for text in texts}
        if all(path.exists() for path in paths.values()):
            return facts, paths
    with tempfile.TemporaryDirectory(prefix="imatrix-quality-") as place:
        quantized = Path(place) / "quantized.gguf"
        facts = _quantized(study.model, cell, ImportanceMatrix.load(matrix), quantized)
        paths = {}
        if facts["refused"] is None:
            for text in texts:
                # equal tensors are evaluated once: some types ignore the data
                paths[text.name] = _evaluation(study, facts, text, folder)
                if not paths[text.name].exists():
                    found = evaluated(quantized, text, study.model)
                    save(found, paths[text.name])
    with atomic.replacing(about) as temporary:
        temporary.write_text(json.dumps(facts))
    return facts, paths


def _evaluation(study: Study, facts: Mapping[str, Any], text: Text, folder: Path) -> Path:
    key = [_VERSION, *_identity(study.model), facts["trunk"], facts["head"], text.digest]
    return folder / "evaluations" / f"{_digest([*key, text.chunks, N_CTX, DEPTH])}.npz"


def _quantized(model: Path, cell: Cell, matrix: ImportanceMatrix, target: Path) -> dict[str, Any]:
    file = imatrix.ModelFile.read(model)
    heads = "|".join(str(file.n_trunk + k) for k in range(file.n_nextn))
    weights = rf"^blk\.({heads})\." if cell.part == "head" else r"^blk\."
    try:
        imatrix.quantize(
            model,
            target,
            "Q8_0",
            imatrix=head_data(matrix, cell.data),
            tensor_types={weights: cell.type.lower()},
            n_threads=1,
        )
    except imatrix.EngineError as error:
        if cell.data != "none" or "Missing importance matrix" not in str(error):
            raise
        return {"refused": str(error).replace(f"{model}", model.name)}
    digests = {"trunk": hashlib.sha256(), "head": hashlib.sha256()}
    n_bytes = n_values = 0
    for tensor in gguf.GGUFReader(target).tensors:
        in_head = re.match(rf"blk\.({heads})\.", tensor.name) is not None
        digest = digests["head" if in_head else "trunk"]
        digest.update(f"{tensor.name} {tensor.tensor_type.name}".encode())
        digest.update(np.ascontiguousarray(tensor.data).tobytes())
        if in_head and tensor.tensor_type.name == cell.type:
            n_bytes += int(tensor.n_bytes)
            n_values += int(tensor.n_elements)
    return {
        "refused": None,
        "bpw": 8 * n_bytes / n_values,
        **{name: digest.hexdigest() for name, digest in digests.items()},
    }


def evaluated(model: Path, text: Text, reference: Path | None) -> imatrix.Evaluation:
    """imatrix.evaluate with the study's settings."""
    return imatrix.evaluate(
        model,
        text.content,
        reference=reference,
        depth=DEPTH,
        n_ctx=N_CTX,
        max_chunks=text.chunks,
        n_threads=1,
        rehearse=False,
    )


def make_reference(study: Study, text: Text, folder: Path) -> Path:
    """The unquantized model's own evaluation."""
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    key = [_VERSION, *_identity(study.model), "reference", text.digest, text.chunks, N_CTX, DEPTH]
    path = folder / "evaluations" / f"{_digest(key)}.npz"
    if not path.exists():
        save(evaluated(study.model, text, None), path)
    return path


_ROWS = ("nll", "top", "reference_nll", "reference_top", "kl")


def save(found: imatrix.Evaluation, path: Path) -> None:
    """Keep an evaluation as arrays."""
    assert found.head is not None
    arrays: dict[str, Any] = {
        "chunk": found.chunk,
        "position": found.position,
        "known": found.known,
        "accepted": found.accepted,
        "about": np.array(json.dumps([found.n_ctx, found.n_vocab, found.depth, found.digest])),
    }
    for side, rows in (("trunk", found.trunk), ("head", found.head)):
        for name in _ROWS:
            if getattr(rows, name) is not None:
                arrays[f"{side}.{name}"] = getattr(rows, name)
    with atomic.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load(path: Path) -> imatrix.Evaluation:
    """Load what save() wrote."""
    with np.load(path) as arrays:
        n_ctx, n_vocab, depth, digest = json.loads(str(arrays["about"]))
        trunk, head = (
            imatrix.Predictions(*(arrays.get(f"{side}.{n}") for n in _ROWS))
            for side in ("trunk", "head")
        )
        return imatrix.Evaluation(
            model=path.stem,
            mtp_model=None,
            reference=None,
            n_ctx=n_ctx,
            n_vocab=n_vocab,
            digest=digest,
            chunk=arrays["chunk"],
            position=arrays["position"],
            trunk=trunk,
            head=head,
            depth=depth,
            known=arrays["known"],
            accepted=arrays["accepted"],
        )


# --- the whole of it ---------------------------------------------------------------------------


def _calibration(study: Study, name: str) -> Text:
    return next(text for text in study.calibration if text.name == name)


def cells(study: Study) -> list[Cell]:
    """The cells of the study, the most important first."""
    base = {"text": study.calibration[0].name, "chunks": study.sizes[-1]}
    main = {
        part: [Cell(part, type_, data, **base) for type_ in study.types for data in DATA[part]]
        for part in study.parts
    }
    calibrations = [
        Cell("head", type_, "ours", text.name, size)
        for type_ in study.calibrated
        for text in study.calibration
        for size in study.sizes
    ]
    return list(dict.fromkeys([*main.get("head", ()), *calibrations, *main.get("whole", ())]))


@dataclass(frozen=True)
class Made:
    """The results of a cell: see make_cell."""

    cell: Cell
    facts: Mapping[str, Any]
    evaluations: Mapping[str, imatrix.Evaluation]


def run(
    study: Study, wanted: Sequence[Cell], folder: Path, workers: int
) -> tuple[dict[Cell, Made], dict[str, imatrix.Evaluation]]:
    """Make the cells, or take them from the folder.

    Returns:
        The results of each cell, and the reference's evaluations by held-out text.
    """
    started = time.monotonic()
    # spawned, since the engine's threads would not survive a fork
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_silence
    ) as pool:
        references = {
            text.name: pool.submit(make_reference, study, text, folder) for text in study.held_out
        }
        sizes: dict[str, set[int]] = {}
        for cell in wanted:
            sizes.setdefault(cell.text, set()).add(cell.chunks)
        matrices = {
            name: pool.submit(
                collect, study.model, _calibration(study, name), sorted(chunks), folder
            )
            for name, chunks in sizes.items()
        }
        files = {name: future.result() for name, future in matrices.items()}
        print(f"{time.monotonic() - started:.0f} s: {len(files)} calibrations", flush=True)
        running = [
            pool.submit(make_cell, study, cell, files[cell.text][cell.chunks], folder)
            for cell in wanted
        ]
        made = {}
        for done, (cell, future) in enumerate(zip(wanted, running, strict=True), 1):
            facts, paths = future.result()
            made[cell] = Made(cell, facts, {name: load(path) for name, path in paths.items()})
            if done % 10 == 0 or done == len(wanted):
                print(f"{time.monotonic() - started:.0f} s: {done}/{len(wanted)}", flush=True)
        trunks = {
            each.facts["trunk"]
            for cell, each in made.items()
            if cell.part == "head" and each.facts["refused"] is None
        }
        if len(trunks) > 1:
            raise AssertionError("the trunk at Q8_0 differs from cell to cell")
        return made, {name: load(future.result()) for name, future in references.items()}
