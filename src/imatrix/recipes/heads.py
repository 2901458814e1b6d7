"""Draft heads of several types: what each takes, and how many of its tokens the trunk accepts.

A head is quantized in the loaded model, by the engine's quantizer, behind a trunk that may hold the
types of a recipe by then; the engine's drafting is evaluated on a text as `imatrix.evaluate` does it,
and the head's own weights are put back. What follows from the figures is in head_table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from imatrix.engine.background import NativeThread, Work, ended_at_exit
from imatrix.engine.model_files import ModelFiles
from imatrix.engine.quantizing import Quantizer
from imatrix.engine.settings import ModelOptions
from imatrix.errors import ModelError
from imatrix.files.outputs import PathLike
from imatrix.heads.source import Source
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.model.architectures import lacks_head
from imatrix.model.raw import Tensor
from imatrix.native import engine, quantizer
from imatrix.quantization.coverage import examine
from imatrix.quantization.options import Options
from imatrix.quantization.rules import tensor_type
from imatrix.quantization.types import ASKING, FTYPES
from imatrix.quantization.verdicts import TensorCoverage
from imatrix.tensors import apart_expert
from imatrix.words import few

__all__ = [
    "AS_IT_IS",
    "HEAD_TYPES",
    "Candidates",
    "HeadCandidate",
    "HeadFiles",
    "HeadTrial",
    "HeadWeights",
    "head_candidates",
    "measure_head",
]

AS_IT_IS = "as it is"
"""Label of the head as its file has it, which the others are compared with."""

HEAD_TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K", "IQ2_XXS",
    "Q4_K+Q8_0", "Q3_K+Q6_K", "IQ2_XXS+Q5_K",
)  # fmt: skip
"""Types that are tried. "A+B" is a mixture: B for the head's attention and its eh_proj, A for the
rest, which is mostly its feed-forward part or its experts."""

# What every drafted token passes, and what is small beside experts.
_LARGER = r"(?:attn_|nextn\.eh_proj|nextn\.pre_projection|nextn\.post_projection)"
# A head's own file holds its embeddings and its LM head too. A matrix has data of the trunk's at
# best, so that these get a type that needs none.
_TABLES = r"^(?:token_embd|output)\.weight"
_NEEDS_NONE = "Q4_K"
# A file type that gives each weight that can be quantized another type, whatever its shape.
_BASE = "Q8_0"
_FEW = 3


class HeadWeights(Protocol):
    """Weights of a loaded model that can be changed in place: imatrix.native.engine.Weights."""

    def names(self) -> list[str]:
        """Names of the weights that were loaded."""

    def quantize(
        self,
        name: str,
        type: int,
        source: NDArray[np.uint8],
        importance: NDArray[np.float32] | None,
    ) -> float:
        """Put what a type makes of a weight."""

    def put(self, name: str, source: NDArray[np.uint8]) -> None:
        """Put the file's own bytes."""

    def holds(self, name: str, source: NDArray[np.uint8]) -> bool:
        """Whether a weight is that of the file, bit for bit."""


class Drafting(Protocol):
    """An open evaluator of the models: imatrix.native.engine.Evaluator."""

    def keep(self, tokens: NDArray[np.int32]) -> int:
        """Run the trunk over a chunk, and keep what it gives; the number it has then."""

    def step_kept(self, chunk: int) -> engine.ChunkEvaluation:
        """Evaluate a chunk that was kept, with the head as it is now."""

    def cancel(self) -> None:
        """End a step early, from any thread."""

    def clear_cancel(self) -> None:
        """Let steps run again."""


@dataclass(frozen=True, kw_only=True)
class HeadFiles:
    """The files of a model with a head, by their headers.

    Attributes:
        trunk, head: the same object if one file holds both.
    """

    trunk: Source
    head: Source

    @classmethod
    def read(cls, model: PathLike, mtp_model: PathLike | None = None) -> HeadFiles:
        """Read the headers.

        Raises:
            FileNotFoundError: there is no such file.
            ModelError: one is damaged, there is no head, it does not fit the trunk, or the engine
                does not run it; with the reason.
        """
        files = ModelFiles.read(ModelOptions(model=model, mtp_model=mtp_model))
        if files.head.n_nextn == 0:
            raise ModelError(
                f"{files.head.path}: {lacks_head(files.head)}, so there is none to measure"
            )
        files.check(head=True, n_ctx=0)
        for file in files.loaded(head=True):
            if apart := next((name for name in file.tensors if apart_expert(name)), None):
                raise ModelError(
                    f"{file.path}: each expert is a tensor of its own ({apart}), and the engine loads "
                    "no such file; convert the model again"
                )
        trunk = Source.read(files.trunk.path)
        return cls(trunk=trunk, head=trunk if files.bundled else Source.read(files.head.path))

    @property
    def own_file(self) -> bool:
        """Whether the head has a file of its own."""
        return self.head is not self.trunk

    @property
    def shares_memory(self) -> bool:
        """Whether the head reads the trunk's keys and values, and runs in one graph."""
        return self.head.header.architecture == "gemma4-assistant"

    @property
    def names(self) -> tuple[str, ...]:
        """The head's tensors: all that its file has, if it has one of its own."""
        header = self.head.header
        return tuple(t for t in self.head.tensors if self.own_file or header.in_head(t))

    @property
    def trunk_names(self) -> tuple[str, ...]:
        """The tensors that are left without the head."""
        return tuple(t for t in self.trunk.tensors if not self.trunk.header.in_head(t))

    @property
    def n_heads(self) -> int:
        """Blocks that draft one after the other; 1 if one drafts any depth."""
        return 1 if self.shares_memory else self.head.header.n_nextn


@dataclass(frozen=True, kw_only=True)
class HeadCandidate:
    """Types that the head could have.

    Attributes:
        label: what it is called: "Q4_K", or AS_IT_IS.
        types: tensor of the head -> ggml type, of those that are changed; none as it is.
        bytes: of the data of all the head's tensors.
        ftype, rules: a file type and exceptions, with which imatrix.quantize gives the head's
            tensors these types.
    """

    label: str
    types: Mapping[str, str]
    bytes: int
    ftype: str = ""
    rules: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """What is tried.

    Attributes:
        offered: AS_IT_IS, then the others, by falling bytes.
        left_out: label -> why it is not tried.
    """

    offered: tuple[HeadCandidate, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class HeadTrial:
    """What the trunk accepted of a candidate's drafts, by chunk and depth.

    Attributes:
        label: the candidate's.
        judged: [chunk][depth - 1]: drafts whose tokens before were accepted and whose token there
            could be judged by the text, as Evaluation.draft has it.
        accepted: [chunk][depth - 1]: those whose token there was accepted.
    """

    label: str
    judged: tuple[tuple[int, ...], ...]
    accepted: tuple[tuple[int, ...], ...]

    def as_data(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "label": self.label,
            "judged": [list(chunk) for chunk in self.judged],
            "accepted": [list(chunk) for chunk in self.accepted],
        }

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> HeadTrial:
        """The trial of as_data().

        Raises:
            ValueError: these are no data of one.
        """
        try:
            judged, accepted = (
                tuple(tuple(int(n) for n in chunk) for chunk in data[key])
                for key in ("judged", "accepted")
            )
            label = str(data["label"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no trial of a head: {error!r}") from None
        if [len(chunk) for chunk in judged] != [len(chunk) for chunk in accepted]:
            raise ValueError("no trial of a head: judged and accepted are of two shapes")
        return cls(label=label, judged=judged, accepted=accepted)


# --- candidates ----------------------------------------------------------------------------------


def head_candidates(
    files: HeadFiles,
    matrix: ImportanceMatrix | None,
    quantizer: Quantizer,
    types: Sequence[str] = HEAD_TYPES,
) -> Candidates:
    """The types that the head can have.

    Which tensors a type changes, and what tensors get whose rows it does not fit, is what the
    engine's quantizer answers in a dry run. A type that some tensor lacks data for is left out.

    Args:
        files: the model.
        matrix: importance data of the head's file; those of the trunk are of no use for a
            gemma4-assistant, whose blocks have the same names. None for none.
        quantizer: the engine's.
        types: ggml types, in any case; "A+B" for B for the attention and eh_proj, A for the rest.

    Raises:
        ValueError: there is no such type, or all are left out, with the reasons.
        ModelError, EngineError: the quantizer does not take the file.
    """
    offered: list[HeadCandidate] = []
    left_out: dict[str, str] = {}
    source = sum(files.head.tensors[name].size for name in files.names)
    for wanted in types:
        label = wanted.upper()
        ftype, rules = _asked(files, label)
        tensors = _examined(files, matrix, quantizer, ftype, rules)
        if why := _refusal(tensors, matrix is not None and len(matrix) > 0):
            left_out[label] = why
            continue
        changed = {t.name: t.target_type for t in tensors if t.source_type != t.target_type}
        twin = next((c.label for c in offered if c.types == changed), None)
        if twin is not None or not changed:
            left_out[label] = f"it gives the head what {twin or 'its file'} gives it"
            continue
        n_bytes = sum(t.target_bytes for t in tensors)
        offered.append(
            HeadCandidate(label=label, types=changed, bytes=n_bytes, ftype=ftype, rules=rules)
        )
    if left_out and not offered:
        reasons = "; ".join(f"{label}: {why}" for label, why in left_out.items())
        raise ValueError(f"{files.head.path}: the head can have none of these types: {reasons}")
    offered.sort(key=lambda candidate: -candidate.bytes)
    as_it_is = HeadCandidate(label=AS_IT_IS, types={}, bytes=source)
    return Candidates(offered=(as_it_is, *offered), left_out=left_out)


def _asked(files: HeadFiles, label: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The file type and the exceptions that give the head these types."""
    small, _, large = label.partition("+")
    for each in filter(None, (small, large)):
        tensor_type(each, "the head")
    if files.shares_memory:
        inside = r"^(?:blk\.[0-9]+\.|nextn\.)"
        larger = rf"^(?:blk\.[0-9]+\.)?{_LARGER}"
    else:
        blocks = "|".join(map(str, files.head.header.head_blocks))
        inside = rf"^blk\.(?:{blocks})\."
        larger = inside + _LARGER
    rules = [(inside, small.lower())]
    if large:
        rules.insert(0, (larger, large.lower()))
    if not files.own_file:
        return _BASE, tuple(rules)  # the other weights do not matter here
    rules.append((_TABLES, _NEEDS_NONE.lower() if small.lower() in ASKING else small.lower()))
    return small if small in FTYPES else _BASE, tuple(rules)


def _examined(
    files: HeadFiles,
    matrix: ImportanceMatrix | None,
    quantizer: Quantizer,
    ftype: str,
    rules: Sequence[tuple[str, str]],
) -> list[TensorCoverage]:
    """What would become of each of the head's tensors."""
    options = Options.read(
        ftype,
        tensor_types=rules,
        output_tensor_type=None,
        token_embedding_type=None,
        override_kv=None,
        has_matrix=matrix is not None,
        allow_requantize=False,
        pure=False,
        quantize_output=True,
        keep_split=False,
    )
    names = set(files.names)
    found = examine(quantizer, files.head.path, matrix, options)
    return [tensor for tensor in found.tensors if tensor.name in names]


def _refusal(tensors: Sequence[TensorCoverage], has_matrix: bool) -> str:
    """Why the quantizer would stop at one of these; "" if it would not."""
    missing = [t.name for t in tensors if t.status == "missing"]
    if missing and not has_matrix:
        return "it needs importance data, and there is no matrix"
    if missing and len(missing) == sum(t.needs_data for t in tensors):
        return (
            "it needs importance data, and the matrix has none of the head: collect with mtp=True "
            "(--mtp)"
        )
    if missing:
        return f"it needs importance data, and the matrix has none of {few(missing, _FEW)}"
    for tensor in tensors:
        if tensor.status in ("wrong size", "requantize", "not convertible"):
            return f"{tensor.name}: {tensor.detail}"
    return ""


# --- measuring -----------------------------------------------------------------------------------


def measure_head(
    evaluator: Drafting,
    weights: HeadWeights,
    files: HeadFiles,
    candidates: Sequence[HeadCandidate],
    chunks: Sequence[NDArray[np.int32]],
    matrix: ImportanceMatrix | None,
    *,
    depth: int,
    known: Mapping[str, HeadTrial] | None = None,
    done: Callable[[HeadTrial], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, HeadTrial]:
    """Quantize the head in place to each candidate, and count what the trunk accepts.

    The trunk stays as it is in the models, so put a recipe's types there before. Afterwards, also
    after an error, the head is the file's again, bit for bit.

    Args:
        evaluator: open, of these models, with that depth; what the trunk gives is kept in it.
        weights: of the model that holds the head, by the names in its file: Weights(head), where
            head is the trunk's model if one file holds both. With the trunk's beside it, a name that
            both files have, such as output.weight, would mean both.
        files: their files.
        candidates: from head_candidates.
        chunks: tokens, each [n] int32; a chunk of 2 tokens has no position to judge.
        matrix: importance data of the head's file, as head_candidates got it.
        depth: tokens a draft; a chain of heads drafts one each at most.
        known: trials by label that are there already, of the same chunks and the same trunk; they
            are not made again.
        done: called with every new trial.
        progress: called after each chunk with how many were run, and how many there are to run: by
            the trunk once, and by each candidate.

    Returns:
        The trials by label, those of `known` among them.

    Raises:
        ValueError: there are no chunks, or a trial of `known` is of other ones.
        NonFiniteError: NaN or infinite logits; the candidate is named.
        RuntimeError: the interpreter exits, or the head's weights could not be put back.
    """
    deepest = depth if files.n_heads == 1 else min(depth, files.n_heads)
    if not chunks:
        raise ValueError("no chunks: a head is measured on a text")
    trials: dict[str, HeadTrial] = {}
    for candidate in candidates:
        if (trial := (known or {}).get(candidate.label)) is None:
            continue
        if [len(chunk) for chunk in trial.judged] != [deepest] * len(chunks):
            raise ValueError(
                f"the trial of {candidate.label} is of {len(trial.judged)} chunks, not of these "
                f"{len(chunks)} at depth {deepest}"
            )
        trials[candidate.label] = trial
    missing = [candidate for candidate in candidates if candidate.label not in trials]
    in_place = _InPlace(weights, files, matrix)
    # the trunk's passes are one for all candidates
    total, run = (len(missing) + 1) * len(chunks) if missing else 0, 0
    with ended_at_exit("measurement") as work, NativeThread() as native:
        work.cancel = evaluator.cancel

        def told() -> None:
            nonlocal run
            run += 1
            if progress is not None:
                progress(run, total)

        try:
            kept = []
            for chunk in chunks if missing else ():
                work.check()
                kept.append(native.submit(evaluator.keep, chunk).result())
                told()
            for candidate in missing:
                native.submit(in_place.change, candidate.types, work).result()
                counted = []
                for number in kept:
                    work.check()
                    found = native.submit(evaluator.step_kept, number).result()
                    counted.append(_counted(found["known"], found["accepted"], deepest))
                    told()
                trial = HeadTrial(
                    label=candidate.label,
                    judged=tuple(judged for judged, _ in counted),
                    accepted=tuple(accepted for _, accepted in counted),
                )
                trials[candidate.label] = trial
                if done is not None:
                    done(trial)
        except BaseException:
            evaluator.cancel()
            native.submit(in_place.restore).result()  # once the step that runs has ended
            evaluator.clear_cancel()
            work.check()
            raise
        native.submit(in_place.restore).result()
    return {c.label: trials[c.label] for c in candidates}


def _counted(
    known: NDArray[np.int8], accepted: NDArray[np.int8], depth: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many drafts were judged and accepted, by depth."""
    depths = range(1, depth + 1)
    return (
        tuple(int(np.count_nonzero(known >= k)) for k in depths),
        tuple(int(np.count_nonzero(accepted >= k)) for k in depths),
    )


class _InPlace:
    """The head's weights in the loaded models, which differ from the file's in `changed`."""

    def __init__(
        self, weights: HeadWeights, files: HeadFiles, matrix: ImportanceMatrix | None
    ) -> None:
        self._weights = weights
        self._files = files
        self._matrix = matrix
        self._read = frozenset(weights.names())
        self._changed: set[str] = set()

    def change(self, types: Mapping[str, str], work: Work) -> None:
        """Give the tensors these types, and all others of the head the file's bytes.

        Tensors that the engine did not load, because no graph reads them, are passed over.
        """
        for name in sorted(self._changed - set(types)):
            self._put(name)
        numbers = quantizer.tensor_types()
        for name, type_ in types.items():
            if name not in self._read:
                continue
            work.check()
            entry = self._matrix.get(name) if self._matrix is not None else None
            importance = None
            if entry is not None:
                # as imatrix.quantize hands it to the engine
                importance = entry.importance.astype(np.float32).reshape(-1)
            self._changed.add(name)
            self._weights.quantize(name, numbers[type_][0], self._bytes(name), importance)

    def restore(self) -> None:
        """Put all of the head's weights back.

        Raises:
            RuntimeError: one is not what the file has.
        """
        for name in sorted(self._changed):
            self._put(name)

    def _put(self, name: str) -> None:
        source = self._bytes(name)
        self._weights.put(name, source)
        if not self._weights.holds(name, source):
            raise RuntimeError(
                f"{name} could not be put back: the model in memory is not its file's"
            )
        self._changed.discard(name)

    def _bytes(self, name: str) -> NDArray[np.uint8]:
        return _read(self._files.head.tensors[name])


def _read(tensor: Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes in its file."""
    return np.fromfile(tensor.path, dtype=np.uint8, count=tensor.size, offset=tensor.start)
