"""A recipe beside the engine's own mixtures: both quantized, evaluated on the same text, compared.

A mixture is what llama-quantize makes of a type's name. For each one the recipe gets no more bytes
than the mixture's file has. Both are measured against the model before quantization, on text that the
recipe was not measured on, and compared position by position.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from imatrix.engine.models import Models
from imatrix.engine.placement import Overrides, SplitMode
from imatrix.engine.settings import ModelOptions
from imatrix.evaluation.estimates import Estimate, Sample, estimate_data
from imatrix.evaluation.results import Comparison, Evaluation
from imatrix.evaluation.scoring import evaluate
from imatrix.files.outputs import check_files
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.header import ModelFile
from imatrix.model.parts import model_inputs
from imatrix.quantization.coverage import coverage, describe_stop
from imatrix.quantization.file_size import quantized_bytes
from imatrix.quantization.keys import matrix_keys
from imatrix.quantization.quantizer import Quantized, quantize
from imatrix.quantization.recipe import Recipe
from imatrix.text.chats import ChatOptions
from imatrix.text.cutting import cut
from imatrix.text.documents import OnBadRecord
from imatrix.text.inputs import TextFile, Texts, text_inputs
from imatrix.text.mixtures import Mixture
from imatrix.text.progress import Progress
from imatrix.text.sources import Source
from imatrix.text.tokens import Packing
from imatrix.words import plural, size

__all__ = [
    "LEAST_CHUNKS",
    "Beside",
    "BesideProgress",
    "BesideSide",
    "Shares",
    "check_mixtures",
    "compare_beside",
    "count_chunks",
    "kept_files",
    "kl_ratio",
    "share_text",
]

PathLike = str | os.PathLike[str]

# An interval is a bootstrap over chunks (imatrix.evaluation.estimates). With fewer than these it says
# more of the few chunks than of the text.
LEAST_CHUNKS = 8


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How one text serves both: its first chunks are measured, those after them compared.

    Attributes:
        measured: how many chunks the measurement gets, from the first on.
        compared: how many are left for the comparison.
    """

    measured: int
    compared: int


def share_text(total: int, wanted: int | None = None) -> Shares:
    """Share the chunks of a text between the measurement and the comparison.

    The comparison keeps a third of the text, and LEAST_CHUNKS at least.

    Args:
        total: chunks of the text.
        wanted: chunks that the measurement would take; None for as many as it may.

    Raises:
        ValueError: the text is too short for both, or `wanted` is below 1.
    """
    if wanted is not None and wanted < 1:
        raise ValueError(f"the measurement needs 1 chunk or more, got {wanted}")
    most = total - max(LEAST_CHUNKS, math.ceil(total / 3))
    if most < 1:
        raise ValueError(
            f"the text has {plural(total, 'chunk')}, too few to measure on one part of it and to "
            f"compare on another: the comparison takes {LEAST_CHUNKS} chunks at least. Give more "
            "text, or another text to compare on (--beside-file)"
        )
    measured = most if wanted is None else min(most, wanted)
    return Shares(measured=measured, compared=total - measured)


def count_chunks(
    model: PathLike,
    texts: Texts,
    *,
    n_ctx: int = 512,
    most: int | None = None,
    skip_chunks: int = 0,
    parse_special: bool = False,
    packing: Packing = "stream",
    chat: ChatOptions | None = None,
    on_bad_record: OnBadRecord = "stop",
    rehearse: bool = True,
) -> int:
    """How many chunks a text has, by the tokenizer of a model, whose weights stay on the disk.

    Args:
        texts, n_ctx, skip_chunks, parse_special, packing, chat, on_bad_record, rehearse: as
            evaluate() takes them. The text is read, so that it must be one that can be read again.
        most: stop counting there.

    Raises:
        as evaluate().
    """
    options = ModelOptions(model=model, n_gpu_layers=0, rehearse=rehearse)
    models = Models(options, n_ctx=n_ctx)
    try:
        models.load_vocabulary()
        with closing(models.renderer(ChatOptions() if chat is None else chat)) as render:
            text = cut(
                _again(texts),
                models.tokenizer(),
                n_ctx,
                packing=packing,
                chat=chat,
                render=render,
                parse_special=parse_special,
                skip_chunks=skip_chunks,
                max_chunks=most,
                on_bad_record=on_bad_record,
            )
            return sum(1 for _ in text.chunks)
    finally:
        models.free()


@dataclass(frozen=True, kw_only=True)
class BesideProgress:
    """Where a comparison stands.

    Attributes:
        name: what is at work: "Q3_K_M", or "recipe for Q3_K_M".
        doing: what is done with it.
        done, total: of the tensors that are quantized, or the chunks that are evaluated; a total of
            None is not known.
        step, steps: the number of this work, from 1, and of all.
    """

    name: str
    doing: Literal["quantizing", "choosing", "evaluating"]
    done: int
    total: int | None
    step: int
    steps: int


@dataclass(frozen=True, eq=False, kw_only=True)
class BesideSide:
    """One of the two that are compared.

    Attributes:
        name: "Q3_K_M", or "recipe for Q3_K_M".
        bytes: of its file.
        bits_per_weight: of its tensors' data, metadata not counted.
        evaluation: against the model before quantization.
        path: its file, if it was kept; None if it is gone.
    """

    name: str
    bytes: int
    bits_per_weight: float
    evaluation: Evaluation
    path: Path | None

    def as_data(self) -> dict[str, Any]:
        """Its figures as plain data for JSON."""
        return {
            "name": self.name,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "path": None if self.path is None else os.fspath(self.path),
            "evaluation": self.evaluation.as_data(),
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class Beside:
    """A mixture, and a recipe with no more bytes.

    Attributes:
        mixture: the engine's mixture.
        recipe: what the recipe makes.
        choice: the recipe.
    """

    mixture: BesideSide
    recipe: BesideSide
    choice: Recipe

    @cached_property
    def difference(self) -> Comparison:
        """The recipe's figures minus the mixture's, paired."""
        return self.recipe.evaluation.compare(self.mixture.evaluation)

    @cached_property
    def kl_ratio(self) -> Estimate:
        """The recipe's KL divergence over the mixture's: below 1 the recipe is nearer to the
        model. See kl_ratio()."""
        return kl_ratio(self.recipe.evaluation, self.mixture.evaluation)

    def as_data(self) -> dict[str, Any]:
        """Both, and what is between them, as plain data for JSON."""
        return {
            "mixture": self.mixture.as_data(),
            "recipe": self.recipe.as_data(),
            "difference": self.difference.as_data(),
            "kl_ratio": estimate_data(self.kl_ratio),
            "predicted_kl": self.choice.predicted_kl,
        }


def kl_ratio(one: Evaluation, other: Evaluation) -> Estimate:
    """The mean KL divergence of one evaluation over that of another of the same text.

    Paired: the interval resamples the chunks of both together. `error` is the standard deviation of
    these resamples.

    Raises:
        ValueError: they are of different texts, or not against the same reference.
    """
    # compare() also says whether they can be compared at all
    if one.compare(other).kl is None or one.trunk.kl is None or other.trunk.kl is None:
        raise ValueError("a ratio of KL divergences needs two evaluations against one reference")
    sample = Sample(one.chunk)
    means = sample.means(one.trunk.kl) / sample.means(other.trunk.kl)
    return sample.estimate(means, sample.spread(means), len(one.chunk))


def check_mixtures(
    model: PathLike,
    matrix: ImportanceMatrix | PathLike | None,
    mixtures: Sequence[str],
    *,
    folder: PathLike = ".",
    keep: PathLike | None = None,
    isolate: bool = False,
) -> dict[str, int]:
    """Find out whether the mixtures can be made here, before anything else is done.

    Args:
        model, matrix, mixtures, folder, keep, isolate: as compare_beside takes them.

    Returns:
        How many bytes each mixture's file will have, by its name in upper case.

    Raises:
        ValueError: an unknown mixture, one twice or none, one that needs data which the matrix lacks,
            or a file to keep would replace one that is read.
        FileNotFoundError: there is no such folder.
        OSError: the disk has not room enough.
    """
    names = [name.upper() for name in mixtures]
    if not names:
        raise ValueError("no mixture to compare with; name one or more, such as Q4_K_M")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the mixture {min(twice)} is named twice")
    for place in (folder, *([] if keep is None else [keep])):
        if not Path(place).is_dir():
            raise FileNotFoundError(f"there is no folder {os.fspath(place)}; create it first")
    if keep is not None:
        read = [matrix] if isinstance(matrix, (str, os.PathLike)) else []
        check_files(kept_files(keep, model, names), [*model_inputs(model), *read])
    file = ModelFile.read(model)
    keys = _matrix_keys(matrix)
    sizes = {}
    for name in names:
        found = coverage(model, matrix, name, isolate=isolate)
        if not found.ready:
            raise ValueError(
                f"{os.fspath(model)} cannot be quantized to {name}: {found.failing[0].name}: "
                f"{describe_stop(found.failing[0], found)}. See imatrix check, or leave the mixture "
                "out"
            )
        types = {tensor.name: tensor.target_type for tensor in found.tensors}
        sizes[name] = quantized_bytes(file, types, keys)
    if keep is None:
        _check_room(folder, max(sizes.values()))
    else:
        _check_room(keep, 2 * sum(sizes.values()))
    return sizes


def compare_beside(
    model: PathLike,
    matrix: ImportanceMatrix | PathLike | None,
    mixtures: Sequence[str],
    for_size: Callable[[int], Recipe],
    texts: Texts,
    *,
    skip_chunks: int = 0,
    max_chunks: int | None = None,
    folder: PathLike = ".",
    keep: PathLike | None = None,
    mtp_model: PathLike | None = None,
    mtp: bool | None = None,
    depth: int = 3,
    n_ctx: int = 512,
    n_batch: int | None = None,
    n_ubatch: int | None = None,
    parse_special: bool = False,
    packing: Packing = "stream",
    chat: ChatOptions | None = None,
    on_bad_record: OnBadRecord = "stop",
    n_gpu_layers: int | Literal["auto"] = "auto",
    split_mode: SplitMode = "layer",
    tensor_split: Sequence[float] | None = None,
    main_gpu: int = 0,
    devices: Sequence[str] | None = None,
    override_tensor: Overrides = (),
    cpu_moe: bool = False,
    n_cpu_moe: int = 0,
    n_threads: int | None = None,
    use_mmap: bool = True,
    rehearse: bool = True,
    isolate: bool = False,
    progress: Callable[[BesideProgress], object] | None = None,
) -> tuple[Beside, ...]:
    """Compare a recipe with the engine's mixtures, each with no more bytes than the mixture has.

    One file is on the disk at a time, unless they are kept. It lies in a folder of its own that is
    removed at the end, also after an error or Ctrl-C.

    Args:
        model: the model before quantization, or the first part of a multi-part one.
        matrix: the importance data that both use.
        mixtures: names as quantize() takes them, such as "Q3_K_M".
        for_size: gives the recipe whose file has that many bytes at most; a ValueError that it
            raises ends the comparison.
        texts: as evaluate() takes them. It must not be the text that the recipe was measured on: if
            it is the same source, `skip_chunks` leaves out the chunks that were measured (see
            share_text). It is read once for each file.
        skip_chunks, max_chunks: which of its chunks count. There must be LEAST_CHUNKS of them.
        folder: where the temporary files lie.
        keep: a folder that keeps the files, as MODEL-Q3_K_M.gguf and MODEL-recipe-Q3_K_M.gguf; None
            to remove them.
        mtp_model: the head's own file, which stays as it is.
        mtp, depth, n_ctx, n_batch, n_ubatch, parse_special, packing, chat, on_bad_record: as
            evaluate() takes them.
        n_gpu_layers, split_mode, tensor_split, main_gpu, devices, override_tensor: likewise.
        cpu_moe, n_cpu_moe, n_threads, use_mmap, rehearse, isolate: likewise.
        progress: called several times a second, in this thread. An exception that it raises ends
            the work.

    Returns:
        A pair for each mixture, in their order.

    Raises:
        ValueError: as check_mixtures; the text is too short; for_size has no recipe of that size, or
            one whose file is larger.
        OSError: as check_mixtures, or a file cannot be read or written.
        EngineError, EngineDiedError, MemoryError: as quantize() and evaluate().
    """
    sizes = check_mixtures(model, matrix, mixtures, folder=folder, keep=keep, isolate=isolate)
    if max_chunks is not None and max_chunks < LEAST_CHUNKS:
        raise ValueError(
            f"a comparison takes {LEAST_CHUNKS} chunks at least, max_chunks is {max_chunks}"
        )
    if keep is not None:
        check_files(kept_files(keep, model, list(sizes)), text_inputs(texts))
    texts = _again(texts)
    tell = _Teller(progress, steps=5 * len(sizes))

    def quantized(path: Path, ftype: str, recipe: Recipe | None) -> Quantized:
        return quantize(
            model,
            path,
            ftype,
            imatrix=matrix,
            recipe=recipe,
            n_threads=n_threads,
            isolate=isolate,
            progress=tell.tensors,
        )

    def evaluated(path: Path) -> Evaluation:
        found = evaluate(
            path,
            texts,
            mtp_model=mtp_model,
            reference=model,
            reference_mtp_model=mtp_model,
            mtp=mtp,
            depth=depth,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            max_chunks=max_chunks,
            skip_chunks=skip_chunks,
            parse_special=parse_special,
            packing=packing,
            chat=chat,
            on_bad_record=on_bad_record,
            n_gpu_layers=n_gpu_layers,
            split_mode=split_mode,
            tensor_split=tensor_split,
            main_gpu=main_gpu,
            devices=devices,
            override_tensor=override_tensor,
            cpu_moe=cpu_moe,
            n_cpu_moe=n_cpu_moe,
            n_threads=n_threads,
            use_mmap=use_mmap,
            rehearse=rehearse,
            isolate=isolate,
            progress=tell.chunks,
        )
        if found.n_chunks < LEAST_CHUNKS:
            raise ValueError(
                f"the text has {plural(found.n_chunks, 'chunk')} to compare on"
                + (f" after the first {skip_chunks}, which were measured" if skip_chunks else "")
                + f"; {LEAST_CHUNKS} are needed for an interval. Give more text"
            )
        return found

    def made(name: str, of: str, recipe: Recipe | None) -> BesideSide:
        label = name if recipe is None else f"recipe for {name}"
        with _place(folder, keep, model, name, of) as path:
            tell.start(label, "quantizing")
            done = quantized(path, name if recipe is None else recipe.ftype, recipe)
            tell.start(label, "evaluating")
            found = evaluated(path)
        return BesideSide(
            name=label,
            bytes=done.bytes,
            bits_per_weight=done.bits_per_weight,
            evaluation=found,
            path=None if keep is None else path,
        )

    pairs = []
    for name in sizes:
        mixture = made(name, "mixture", None)
        tell.start(f"recipe for {name}", "choosing")
        recipe = for_size(mixture.bytes)
        side = made(name, "recipe", recipe)
        if side.bytes > mixture.bytes:
            raise ValueError(
                f"the recipe for {mixture.bytes} bytes, those of {name}, makes a file of "
                f"{side.bytes} bytes: that is no comparison at equal size"
            )
        pairs.append(Beside(mixture=mixture, recipe=side, choice=recipe))
    return tuple(pairs)


class _Teller:
    """Hands the progress of both works on as one.

    Args:
        steps: how many times start() will be called.
    """

    def __init__(self, told: Callable[[BesideProgress], object] | None, *, steps: int) -> None:
        self._told = told
        self._steps = steps
        self._step = 0
        self._name = ""
        self._doing: Literal["quantizing", "choosing", "evaluating"] = "quantizing"

    def start(self, name: str, doing: Literal["quantizing", "choosing", "evaluating"]) -> None:
        self._step += 1
        self._name, self._doing = name, doing
        self._tell(0, None)

    def tensors(self, done: int, total: int) -> None:
        self._tell(done, total)

    def chunks(self, found: Progress) -> None:
        self._tell(found.chunks, found.total)

    def _tell(self, done: int, total: int | None) -> None:
        if self._told is not None:
            self._told(
                BesideProgress(
                    name=self._name,
                    doing=self._doing,
                    done=done,
                    total=total,
                    step=self._step,
                    steps=self._steps,
                )
            )


@contextmanager
def _place(
    folder: PathLike, keep: PathLike | None, model: PathLike, name: str, of: str
) -> Iterator[Path]:
    """Where a quantized file goes; what is not kept is gone after the block."""
    if keep is not None:
        yield _kept(keep, model, name, of)
        return
    # in this folder, since the system's one for temporary files is often small, or in memory
    with tempfile.TemporaryDirectory(prefix=".imatrix-beside-", dir=folder) as place:
        yield Path(place) / f"{name}-{of}.gguf"


def kept_files(keep: PathLike, model: PathLike, mixtures: Sequence[str]) -> list[Path]:
    """The files that compare_beside() writes into a folder that keeps them."""
    return [
        _kept(keep, model, name.upper(), of) for name in mixtures for of in ("mixture", "recipe")
    ]


def _kept(keep: PathLike, model: PathLike, name: str, of: str) -> Path:
    recipe = "recipe-" if of == "recipe" else ""
    return Path(keep) / f"{Path(model).stem}-{recipe}{name}.gguf"


def _matrix_keys(matrix: ImportanceMatrix | PathLike | None) -> list[tuple[str, int | str]]:
    """What a quantized file says of the matrix."""
    if isinstance(matrix, (str, os.PathLike)):
        return matrix_keys(ImportanceMatrix.load(matrix), matrix)
    return [] if matrix is None else matrix_keys(matrix, None)


def _check_room(folder: PathLike, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"the comparison needs {size(needed)} in {os.fspath(folder)}, and {size(free)} are "
            "free; make room, or name a folder on another disk"
        )


def _again(texts: Texts) -> Texts:
    """The same texts, such that they can be read several times."""
    if isinstance(texts, (str, os.PathLike, Source, Mixture)):
        return texts
    if isinstance(texts, TextFile):
        raise ValueError(
            "the text is read once for each file that is compared, and an open file can be read once "
            "only; give its path, or what is in it"
        )
    return cast("Texts", list(texts))
