"""A model in memory whose weights are changed in place, and what each change does to its output.

The model is loaded once. The chunks of the text run through it unchanged, and what it says of each
position is kept. A trial gives some tensors other types, by the engine's quantizer, runs the chunks
again from the block that changed on, and compares. The source of every weight is its file, which is
mapped and read only; at the end every weight is found to be the file's again, bit for bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from imatrix._version import __version__
from imatrix.engine.background import NativeThread, ended_at_exit
from imatrix.engine.devices import engine_name
from imatrix.engine.memory import available_memory
from imatrix.engine.models import Models
from imatrix.errors import ModelError, NonFiniteError
from imatrix.formats.checkpoint import Setting
from imatrix.heads.source import Source
from imatrix.matrix.importance import ImportanceMatrix
from imatrix.native import engine, quantizer
from imatrix.recipes.groups import Group, importance_fits
from imatrix.recipes.heads import Candidates, HeadFiles, HeadTrial, measure_head
from imatrix.recipes.measured import Measurement, Trial
from imatrix.recipes.options import MIN_CHUNKS, RecipeOptions
from imatrix.tensors import block_of, n_values, row_and_matrices
from imatrix.text.chats import ChatOptions
from imatrix.text.cutting import cut, tokens_of
from imatrix.text.inputs import Texts
from imatrix.words import few, plural

__all__ = ["Bench", "Cost", "Measurer", "RecipeProgress"]

T = TypeVar("T")

# Rows of a tensor that errors are estimated from. The errors of rows spread by a third of their mean in
# the shipped model (256 rows gave 2 %), by more where some rows have outliers. All types go by the same
# rows, so that what is off cancels in the ratios that matter.
_ROWS = 1024

# Of a row's logits that are kept if there is no room for all; the rest of a distribution that a model
# learned is some 1e-3 behind so many.
_MOST_KEPT = 4096


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a measurement takes, as far as it is known before it begins.

    Attributes:
        trials: changes that are measured.
        passes: whole passes over the text that they come to; one that begins in the middle of the
            model counts as half of one.
        tokens: of the text.
        seconds: that the passes take, as the first one did; quantizing comes on top.
        kept_bytes: memory for what the unchanged model says.
        top: logits that are kept of a position, the likeliest ones; 0 for all.
    """

    trials: int
    passes: float
    tokens: int
    seconds: float
    kept_bytes: int
    top: int


@dataclass(frozen=True, kw_only=True)
class RecipeProgress:
    """Where a measurement stands.

    Attributes:
        what: is being done, in words.
        done, total: trials of this stage, those that were there already not counted.
        seconds: since the stage began.
        seconds_left: until it ends, from what is done; None if nothing is.
        cost: of the first stage, told once before it begins; None afterwards.
    """

    what: str
    done: int
    total: int
    seconds: float = 0.0
    seconds_left: float | None = None
    cost: Cost | None = None


class Bench:
    """The model, changed in place. A context that frees it.

    Args:
        options: what was asked for.
        matrix: importance data; None for none.

    Attributes:
        models: its files.
        source: its tensors, where they lie.
        chunks: tokens of each chunk, [n] int32, once read() was called.
        top: logits that are kept of a position; 0 for all.
    """

    def __init__(self, options: RecipeOptions, matrix: ImportanceMatrix | None) -> None:
        self._options = options
        self._matrix = matrix
        self._stack = ExitStack()
        self.models = Models(options.loading, n_ctx=options.n_ctx)
        self.source = Source.read(self.models.trunk_file.path)
        self.chunks: list[NDArray[np.int32]] = []
        self.top = 0
        self._weights: engine.Weights | None = None
        self._trials: engine.Trials | None = None
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._changed: dict[str, str] = {}  # tensor -> type that is in place
        self._begins_at = 0
        self.seconds_of_a_pass = 0.0
        self._numbers = {name.lower(): n for name, (n, _) in quantizer.tensor_types().items()}

    def __enter__(self) -> Bench:
        self._work = self._stack.enter_context(ended_at_exit("measurement"))
        self._native = self._stack.enter_context(NativeThread())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._work.cancel = None
        self._stack.close()
        self._trials = self._weights = None  # before the models go
        self.models.free()

    # --- before it runs --------------------------------------------------------------------------

    def load(self, *, with_head: bool) -> None:
        """Check, rehearse and load.

        Args:
            with_head: load the head too, which has to be in the same file.

        Raises:
            ModelError, ValueError, MemoryError: it cannot be run.
        """
        models = self.models
        settings = replace(self._options.session, mtp=with_head)
        models.check(head=with_head)
        models.rehearse(settings)
        models.check_predicts(
            "a recipe is measured by how the model predicts the next token",
            "quantize it by a file type (imatrix quantize)",
        )
        model = models.load(settings)
        assert isinstance(model, engine.Model)
        self._weights = engine.Weights(model)
        self._weights.set_threads(self._options.threads)
        self._trials = engine.Trials(model)
        self._work.cancel = self._trials.cancel

    def loaded_names(self) -> frozenset[str]:
        """Names of the weights that the trunk has loaded."""
        return frozenset(self._of_weights().names())

    def read(self, texts: Texts) -> str:
        """Cut the text into chunks, and tell how many there are if they are fewer than wanted.

        Returns:
            "", or what is to be said of a text that is shorter than wanted.

        Raises:
            ValueError: it is too short, or cannot be understood.
        """
        options = self._options
        render = self.models.renderer(ChatOptions() if options.chat is None else options.chat)
        try:
            text = cut(
                texts,
                self.models.tokenizer(),
                options.n_ctx,
                packing=options.packing,
                chat=options.chat,
                render=render,
                parse_special=options.parse_special,
                skip_chunks=options.skip_chunks,
                max_chunks=options.chunks,
                on_bad_record=options.on_bad_record,
            )
            self.chunks = [chunk.tokens for chunk in text.chunks]
        finally:
            render.close()
        found, wanted = sum(len(chunk) > 2 for chunk in self.chunks), options.chunks
        needed = f"{wanted * options.n_ctx} tokens ({wanted} chunks of {options.n_ctx})"
        if found < MIN_CHUNKS:
            raise ValueError(
                f"the text is too short: it gives {plural(found, 'chunk')} of {options.n_ctx} "
                f"tokens, and an error of a figure needs {MIN_CHUNKS} or more. Effort "
                f"{options.effort} takes {needed}; give more text, or shorter chunks (n_ctx, -c)"
            )
        if found < wanted:
            return (
                f"the text gives {found} chunks, and effort {options.effort} takes {needed}: the "
                "figures are less certain than they could be"
            )
        return ""

    def identity(self, matrix_digest: str) -> dict[str, Setting]:
        """What decides the figures."""
        text = hashlib.sha256()
        for chunk in self.chunks:
            text.update(len(chunk).to_bytes(8, "little") + tokens_of(chunk))
        layers = self.models.layers
        return {
            "imatrix": __version__,
            "engine": engine_name(),
            **self.models.files.identity(False),
            "matrix_digest": matrix_digest,
            "text_digest": text.hexdigest(),
            "n_ctx": self._options.n_ctx,
            "chunks": len(self.chunks),
            "top": self.top,
            "devices": (
                "CPU"
                if layers is None or not self.models.has_gpu
                else layers.describe(self.models.files.n_blocks)
            ),
        }

    def choose_top(self, known: int | None) -> None:
        """Decide how many logits of a position are kept: all if a quarter of the free memory has
        room for them.

        Args:
            known: what a measurement that is gone on from has kept; None for none.
        """
        if known is not None:
            self.top = known
            return
        try:
            room = available_memory() // 4
        except ImportError:  # a system that does not tell
            room = 1 << 30
        rows = sum(scored_positions(len(chunk)) for chunk in self.chunks)
        n_vocab = self.models.loaded().n_vocab
        if rows * n_vocab * 4 <= room:
            self.top = 0
        else:
            self.top = max(1, min(_MOST_KEPT, n_vocab, room // (8 * rows)))

    def check_weights(self, names: Iterable[str]) -> None:
        """That the weights in memory are those of the file, bit for bit.

        Raises:
            ModelError: one is not.
        """
        for name in names:
            if not self._call(self._of_weights().holds, name, self.bytes_of(name)):
                raise ModelError(
                    f"{self.models.trunk_file.path}: the engine holds {name} otherwise than the file "
                    "does, so that it cannot be put back after a trial; report it with the output "
                    "of `imatrix --version`"
                )

    def keep(self, progress: Callable[[int, int], object]) -> tuple[int, ...]:
        """Run the text through the unchanged model, and keep what it says.

        Args:
            progress: called with chunks done and in all.

        Returns:
            Scored positions of each chunk.
        """
        trials = self._of_trials()
        trials.open(n_ctx=self._options.n_ctx, n_threads=self._options.threads, top=self.top)
        started = time.monotonic()
        positions = []
        for number, chunk in enumerate(self.chunks, 1):
            positions.append(len(self._call(trials.keep, chunk)["nll"]))
            progress(number, len(self.chunks))
        self.seconds_of_a_pass = time.monotonic() - started
        return tuple(positions)

    @property
    def kept_bytes(self) -> int:
        """Memory that was taken for what the unchanged model says."""
        return int(self._of_trials().kept_bytes)

    # --- changes ---------------------------------------------------------------------------------

    def run(self, types: Mapping[str, str]) -> tuple[float, ...]:
        """Mean KL divergence of each chunk with these types, all other tensors as the file has them.

        Args:
            types: tensor -> ggml type in lower case.

        Raises:
            NonFiniteError: NaN or infinite logits.
        """
        block = min((first_block(name, self.n_trunk) for name in types), default=0)
        if block != self._begins_at:
            self.place({})
            self._begins_at = block
            self._call(self._of_trials().start, block)
        self.place(types)
        found = []
        for number in range(len(self.chunks)):
            try:
                kl = self._call(self._of_trials().run, number)["kl"]
            except NonFiniteError as error:
                names = few([f"{name} as {kind}" for name, kind in types.items()], 3)
                error.args = (f"{error.args[0]}, in chunk {number} with {names}",)
                raise
            found.append(float(kl.mean()) if len(kl) else 0.0)
        return tuple(found)

    def place(self, types: Mapping[str, str]) -> None:
        """Put these types in place, and the file's own bytes wherever else something is changed."""
        for name in sorted(self._changed.keys() - types.keys()):
            self._call(self._of_weights().put, name, self.bytes_of(name))
            del self._changed[name]
        for name, kind in types.items():
            if self._changed.get(name) == kind:
                continue
            self._changed[name] = ""  # neither the file's nor that type's, if it fails
            self._call(
                self._of_weights().quantize,
                name,
                self._numbers[kind],
                self.bytes_of(name),
                self.importance_of(name),
            )
            self._changed[name] = kind

    def error(self, name: str, kind: str) -> float:
        """The importance-weighted squared error of a type, summed over the tensor, from a sample of
        its rows."""
        every = self._every(name)
        return float(
            self._call(
                lambda: self._of_weights().error(
                    name,
                    self._numbers[kind],
                    self.bytes_of(name),
                    self.importance_of(name),
                    every=every,
                )
            )
        )

    def values_of_error(self, name: str) -> int:
        """How many values of a tensor error() goes by."""
        return n_values(self.source.tensors[name].shape) // self._every(name)

    def _every(self, name: str) -> int:
        shape = self.source.tensors[name].shape
        n_rows = n_values(shape) // shape[0]
        _, n_mat = row_and_matrices(shape)
        return max(1, n_rows // max(_ROWS, n_mat))

    def evaluator(self, depth: int) -> engine.Evaluator:
        """An evaluator of the trunk and the head, as they are in memory, that drafts so deep."""
        head = self.models.head
        trunk = self.models.loaded()
        assert isinstance(trunk, engine.Model)
        assert isinstance(head, engine.Model)
        evaluator = engine.Evaluator(trunk, head)
        batch = self._options.session.batch
        evaluator.open(
            n_ctx=self._options.n_ctx,
            n_batch=batch.n_batch,
            n_ubatch=batch.n_ubatch,
            n_threads=self._options.threads,
            depth=depth,
        )
        return evaluator

    @property
    def weights(self) -> engine.Weights:
        """The weights in memory, for whoever puts them back."""
        return self._of_weights()

    @property
    def matrix(self) -> ImportanceMatrix | None:
        """Importance data; None for none."""
        return self._matrix

    def importance_of(self, name: str) -> NDArray[np.float32] | None:
        """What imatrix.quantize hands to the engine: [n_mat * n_in] float32; None without data."""
        shape = self.source.tensors[name].shape
        if self._matrix is None or not importance_fits(name, shape, self._matrix):
            return None
        with np.errstate(over="ignore"):
            return self._matrix[name].importance.astype(np.float32).reshape(-1)

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes in its file, mapped and read-only: [size] uint8."""
        tensor = self.source.tensors[name]
        path = str(tensor.path)
        if path not in self._maps:
            self._maps[path] = np.memmap(tensor.path, np.uint8, "r")
        return self._maps[path][tensor.start : tensor.start + tensor.size]

    @property
    def n_trunk(self) -> int:
        """Blocks of the trunk."""
        return self.models.trunk_file.n_trunk

    def _of_weights(self) -> engine.Weights:
        assert self._weights is not None
        return self._weights

    def _of_trials(self) -> engine.Trials:
        assert self._trials is not None
        return self._trials

    def _call(self, function: Callable[..., T], *args: object) -> T:
        """Have the engine's thread do it, so that Ctrl-C reaches this one."""
        self._work.check()
        running = self._native.submit(function, *args)
        try:
            return running.result()
        except BaseException:
            if self._trials is not None:
                self._trials.cancel()
            running.exception()  # wait for it; what it says no longer matters
            self._work.check()
            raise


@dataclass(frozen=True)
class _Job:
    """A piece of a measurement.

    Attributes:
        block: of the model, where it begins.
        passes: over the text that it takes.
        values: that it converts to find errors; 0 for a trial.
        do: does it.
    """

    block: int
    passes: float
    values: int
    do: Callable[[], object]


class Measurer:
    """Makes the trials and errors that a measurement lacks.

    Args:
        bench: loaded, with its text read.
        measurement: what is there already.
        progress: called before the first trial and after each one.
    """

    def __init__(
        self,
        bench: Bench,
        measurement: Measurement,
        progress: Callable[[RecipeProgress], object] | None,
    ) -> None:
        self._bench = bench
        self.measurement = measurement
        self._progress = progress
        self._kept = False
        self._told = False  # what it costs

    def measure_groups(
        self, groups: Sequence[Group], measured: Mapping[str, Sequence[str]]
    ) -> None:
        """The errors of all types of each group, and a trial of each with some types, by block.

        Args:
            groups: by block.
            measured: group -> types that are tried.
        """
        for group in groups:
            for name in group.tensors:
                self._bench.importance_of(name)  # a matrix that does not fit is told at once
        trials = [group.types(kind) for group in groups for kind in measured[group.name]]
        self.trials(trials, "groups of tensors", errors_of=groups)

    def trials(
        self,
        wanted: Sequence[Mapping[str, str]],
        what: str,
        errors_of: Sequence[Group] = (),
    ) -> list[Trial]:
        """Trials of changes, those that are not there yet made now, by the block where they begin.

        Args:
            wanted: tensor -> type, of each.
            what: is tried, in words.
            errors_of: groups whose errors are estimated on the way.

        Returns:
            The trials, in the order of `wanted`.
        """
        found = self.measurement
        n_trunk = self._bench.n_trunk
        missing = [types for types in wanted if types and found.trial(types) is None]
        jobs: list[_Job] = []
        for group in errors_of:
            for name in group.tensors:
                lacking = [
                    kind
                    for kind in group.bytes
                    if kind != group.source and found.error(name, kind) is None
                ]
                if lacking:
                    size = len(lacking) * self._bench.values_of_error(name)
                    jobs.append(_Job(group.block, 0.0, size, self._errors_job(name, lacking)))
        for types in missing:
            block = min(first_block(name, n_trunk) for name in types)
            share = (n_trunk + 1 - block) / (n_trunk + 1)
            jobs.append(_Job(block, share, 0, self._trial_job(types)))
        jobs.sort(key=lambda job: job.block)  # stable: a group's errors come before its trials
        if missing:
            self._keep()
        self._run(jobs, len(missing), what)
        return [
            trial if (trial := found.trial(types)) is not None else Trial({}, ())
            for types in wanted
        ]

    def measure_head(
        self, files: HeadFiles, candidates: Candidates, depth: int
    ) -> dict[str, HeadTrial]:
        """What the trunk, as its file has it, accepts of the drafts of each candidate.

        Args:
            files: the model, whose head is in the same file.
            candidates: types of the head.
            depth: tokens of a draft.
        """
        bench, found = self._bench, self.measurement
        bench.place({})
        known = {
            c.label: found.heads[c.label] for c in candidates.offered if c.label in found.heads
        }
        if len(known) == len(candidates.offered):
            return known
        what = "types of the head"
        started = time.monotonic()

        def told(done: int, total: int) -> None:
            seconds = time.monotonic() - started
            self._tell(
                RecipeProgress(
                    what=what,
                    done=done,
                    total=total,
                    seconds=seconds,
                    seconds_left=seconds / done * (total - done),
                )
            )

        return measure_head(
            bench.evaluator(depth),
            bench.weights,
            files,
            candidates.offered,
            bench.chunks,
            bench.matrix,
            depth=depth,
            known=known,
            done=found.add_head,
            progress=told,
        )

    def _errors_job(self, name: str, kinds: Sequence[str]) -> Callable[[], object]:
        return lambda: self.measurement.add_errors(
            name, {kind: self._bench.error(name, kind) for kind in kinds}
        )

    def _trial_job(self, types: Mapping[str, str]) -> Callable[[], object]:
        return lambda: self.measurement.add_trial(types, self._bench.run(types))

    def _keep(self) -> None:
        if self._kept:
            return
        total = len(self._bench.chunks)
        self._tell(RecipeProgress(what="the unchanged model", done=0, total=total))
        positions = self._bench.keep(
            lambda done, total: self._tell(
                RecipeProgress(what="the unchanged model", done=done, total=total)
            )
        )
        self.measurement.set_positions(positions)
        self._kept = True

    def _run(self, jobs: Sequence[_Job], total: int, what: str) -> None:
        passes = sum(job.passes for job in jobs)
        values = sum(job.values for job in jobs)
        if total and not self._told:
            self._told = True
            cost = Cost(
                trials=total,
                passes=passes,
                tokens=sum(map(len, self._bench.chunks)),
                seconds=passes * self._bench.seconds_of_a_pass,
                kept_bytes=self._bench.kept_bytes,
                top=self._bench.top,
            )
            self._tell(RecipeProgress(what=what, done=0, total=total, cost=cost))
        started = time.monotonic()
        run = converted = 0.0  # passes, and values for errors, that are done
        of_run = of_converted = 0.0  # their seconds
        done = 0
        for job in jobs:
            began = time.monotonic()
            job.do()
            seconds = time.monotonic() - began
            if job.values:
                converted, of_converted = converted + job.values, of_converted + seconds
                continue
            run, of_run, done = run + job.passes, of_run + seconds, done + 1
            left = of_run / run * (passes - run)
            if converted:
                left += of_converted / converted * (values - converted)
            self._tell(
                RecipeProgress(
                    what=what,
                    done=done,
                    total=total,
                    seconds=time.monotonic() - started,
                    seconds_left=left,
                )
            )

    def finish(self, names: Iterable[str]) -> None:
        """Put every weight back, and see that it is the file's again.

        Raises:
            ModelError: one is not.
        """
        self._bench.place({})
        self._bench.check_weights(names)

    def _tell(self, progress: RecipeProgress) -> None:
        if self._progress is not None:
            self._progress(progress)


def first_block(name: str, n_trunk: int) -> int:
    """Number of the first block that sees a change of this tensor: 0 for embeddings, n_trunk for the
    output."""
    block = block_of(name)
    if block is not None:
        return block
    return n_trunk if name.startswith("output") else 0


def scored_positions(n_tokens: int) -> int:
    """Positions that are scored of a chunk: its second half without the last token, as
    llama-perplexity has it (tools/perplexity/perplexity.cpp)."""
    return max(0, n_tokens - n_tokens // 2 - 1)
