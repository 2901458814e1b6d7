"""How well a model and its MTP head predict a text, and what a quantization took from them.

All figures are over the same positions: the second half of every chunk without its last token, as
llama-perplexity scores it (tools/perplexity/perplexity.cpp in llama.cpp). There the trunk, at
position p, and the head, at slot p with token x_p and the trunk's row p-1, both predict x_{p+1}.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from imatrix import _isolate, _session, corpus
from imatrix._batch import Batch, Wanted
from imatrix._chunking import cut
from imatrix._models import Models, session_settings
from imatrix._native_thread import NativeThread, Work, ended_at_exit
from imatrix._placement import Overrides, Placement, SplitMode
from imatrix._threads import physical_cores
from imatrix.architectures import lacks_head
from imatrix.chat_template import ChatOptions
from imatrix.errors import ModelError
from imatrix.run_report import Perplexity, Progress
from imatrix.text_sources import OnBadRecord

__all__ = ["Comparison", "Difference", "Estimate", "Evaluation", "Predictions", "evaluate"]

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

_RESAMPLES = 1000
_SEED = 20240229
# A head this little above chance drafts nothing worth verifying. Trained heads agree with their
# trunk on more than half of all tokens; what separates broken from bad is a convention.
_DEAD_MARGIN = 0.05


@dataclass(frozen=True)
class Estimate:
    """A figure and how sure it is.

    Attributes:
        value: the figure itself.
        error: standard error, with every position taken as independent, as llama-perplexity has
            it; for the accepted length the standard deviation of the bootstrap. NaN where there
            are too few positions.
        low, high: 95 % interval, from a bootstrap over chunks (percentiles of 1000 resamples, a
            fixed seed). Positions of a chunk hang together, so it is the one to trust. NaN with
            fewer than two chunks.
        n: positions behind it.
    """

    value: float
    error: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """One evaluation's figure minus another's, and what can be said of it.

    Attributes:
        verdict: "better" or "worse", for the first of the two, where the interval leaves out
            zero; "no difference shown" where it does not; "too few chunks to tell" without one.
    """

    verdict: str


@dataclass(frozen=True, eq=False)
class Predictions:
    """What was predicted at each scored position; arrays [n].

    Attributes:
        nll: -log p(x_{p+1}) in nats, float64.
        top: the likeliest token, int32; the first of equals.
        reference_nll, reference_top: the reference's; None without one.
        kl: KL(reference || model) = sum over v of q_v (log q_v - log p_v), nats, float64, over
            the whole vocabulary and from the float32 logits of both; None without a reference.
    """

    nll: F64
    top: I32
    reference_nll: F64 | None
    reference_top: I32 | None
    kl: F64 | None


class _Sample:
    """Chunks, and bootstrap resamples of them: means are ratios of sums over chunks."""

    def __init__(self, chunk: NDArray[np.int32]) -> None:
        self._chunk = chunk
        self._n_chunks = int(chunk.max()) + 1
        rng = np.random.default_rng(_SEED)
        share = np.full(self._n_chunks, 1 / self._n_chunks)
        # how often each chunk is drawn: [resamples, chunks]
        self._drawn = rng.multinomial(self._n_chunks, share, size=_RESAMPLES)

    def means(self, values: NDArray[Any], where: NDArray[np.bool_] | None = None) -> F64:
        """The mean of `values`, then that of every resample: [1 + resamples]; NaN for none."""
        weights = None if where is None else where.astype(np.float64)
        counts = np.bincount(self._chunk, weights, self._n_chunks).astype(np.float64)
        kept = values if where is None else np.where(where, values, 0)
        sums = np.bincount(self._chunk, kept.astype(np.float64), self._n_chunks)
        out = np.full(1 + _RESAMPLES, np.nan)
        n = np.concatenate([[counts.sum()], self._drawn @ counts])
        total = np.concatenate([[sums.sum()], self._drawn @ sums])
        np.divide(total, n, out=out, where=n > 0)
        return out

    def estimate(self, means: F64, error: float, n: int) -> Estimate:
        resampled = means[1:][np.isfinite(means[1:])]
        low = high = math.nan
        if self._n_chunks > 1 and resampled.size:
            low, high = (float(v) for v in np.percentile(resampled, (2.5, 97.5)))
        return Estimate(float(means[0]), error, low, high, n)

    def mean(self, values: NDArray[Any], where: NDArray[np.bool_] | None = None) -> Estimate:
        kept = values if where is None else values[where]
        return self.estimate(self.means(values, where), _standard_error(kept), len(kept))

    def spread(self, means: F64) -> float:
        """Standard deviation of the resamples."""
        resampled = means[1:][np.isfinite(means[1:])]
        return float(resampled.std()) if self._n_chunks > 1 and resampled.size else math.nan


def _standard_error(values: NDArray[Any]) -> float:
    """sqrt((mean of squares - square of mean) / (n - 1)), as llama-perplexity has it."""
    if len(values) < 2:
        return math.nan
    return float(np.std(values.astype(np.float64)) / math.sqrt(len(values) - 1))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What evaluate() found. The figures are properties; the arrays behind them stay.

    Attributes:
        model, mtp_model, reference: paths; None for none.
        n_ctx: tokens a chunk.
        n_vocab: tokens of the vocabulary.
        digest: SHA-256 of the tokens, which tells whether two evaluations are of the same text.
        chunk: number of the chunk of each scored position, int32 [n].
        position: where in its chunk each is, int32 [n]: the slot p that holds x_p and predicts
            x_{p+1}.
        trunk: the trunk's predictions.
        head: the first head's predictions, each slot fed with the text and the trunk's rows
            (teacher forcing); None without a head.
        depth: how many tokens a draft has; fewer than asked for where a chain has fewer heads.
        known: int8 [n], how deep the draft that begins at a slot could be judged, see `draft`;
            0 to depth, empty without a head.
        accepted: int8 [n], how many of these tokens were accepted: known or known - 1. On text
            that the trunk wrote greedily, accepted[i] is what the engine's speculative decoding
            accepts of the draft that it begins at slot position[i]; the next one begins at
            position[i] + accepted[i] + 1.
        causal: False of a model whose tokens see those after them too: then it has seen the token
            that `nll`, `perplexity` and the head's figures are about, and only what compares it
            with a reference says something of it.
    """

    model: str
    mtp_model: str | None
    reference: str | None
    n_ctx: int
    n_vocab: int
    digest: str
    chunk: I32
    position: I32
    trunk: Predictions
    head: Predictions | None
    depth: int
    known: NDArray[np.int8]
    accepted: NDArray[np.int8]
    causal: bool = True

    # --- figures -------------------------------------------------------------

    @property
    def n_chunks(self) -> int:
        return int(self.chunk.max()) + 1

    @property
    def nll(self) -> Estimate:
        """Negative log-likelihood of the text by the trunk, nats a token."""
        return self._sample.mean(self.trunk.nll)

    @property
    def perplexity(self) -> Estimate:
        """exp of `nll`; the error is value times the error of `nll`, as llama-perplexity has it."""
        return _exp(self.nll)

    @property
    def kl(self) -> Estimate | None:
        """KL(reference || model) of the trunks, nats a token; None without a reference."""
        return None if self.trunk.kl is None else self._sample.mean(self.trunk.kl)

    @property
    def top1(self) -> Estimate | None:
        """How often the trunk's likeliest token is the reference's; None without a reference."""
        return self._same_top(self.trunk)

    @property
    def head_nll(self) -> Estimate | None:
        """Negative log-likelihood of the text by the first head, nats a token."""
        return None if self.head is None else self._sample.mean(self.head.nll)

    @property
    def head_kl(self) -> Estimate | None:
        """KL(reference's head || head), each behind its own trunk, nats a token."""
        if self.head is None or self.head.kl is None:
            return None
        return self._sample.mean(self.head.kl)

    @property
    def head_top1(self) -> Estimate | None:
        """How often the head's likeliest token is that of the reference's head."""
        return None if self.head is None else self._same_top(self.head)

    @property
    def draft(self) -> tuple[Estimate, ...]:
        """Draft agreement by depth: of the drafts whose tokens before were accepted, the share
        whose next token the trunk accepts too. Empty without a head; shorter than `depth` where
        no draft could be judged that deep.

        Depth 1: the head's likeliest token equals the trunk's at the same position. Depth k feeds
        the head its own hidden row and its own token of depth k-1, as the engine's driver drafts
        (common/speculative.cpp, common_speculative_impl_draft_mtp::draft). Greedy speculative
        decoding would ask the trunk what follows the drafted tokens. That answer is at hand where
        they are the text's own tokens, so depth k >= 2 counts the slots whose earlier drafted
        tokens were accepted by the trunk and are the text. On text that the model itself wrote
        greedily these are all accepted slots, and the figures are exactly those of greedy
        speculative decoding; on other text, deeper figures speak of places where the text goes
        as the trunk expects, which are somewhat easier than the rest.
        """
        return tuple(
            self._sample.mean(self.accepted >= k, self.known >= k)
            for k in range(1, self._depth_known + 1)
        )

    @property
    def accepted_length(self) -> Estimate | None:
        """Drafted tokens accepted a verification, expected from `draft`: the sum over k of the
        product of the agreements up to k. A verification yields one token more, the trunk's own.
        None without a head.
        """
        if self.head is None:
            return None
        means = self._length_means()
        return self._sample.estimate(means, self._sample.spread(means), len(self.known))

    @property
    def chance(self) -> float | None:
        """Agreement at depth 1 that two independent choices with the same habits would have: the
        sum over tokens of the trunk's share of choices times the head's. None without a head."""
        if self.head is None:
            return None
        shares = [
            np.bincount(rows.top, minlength=self.n_vocab) / len(rows.top)
            for rows in (self.trunk, self.head)
        ]
        return float(shares[0] @ shares[1])

    @property
    def head_is_dead(self) -> bool:
        """Whether the head agrees with its trunk no better than chance: by less than 5 % of what
        is above `chance`, or within two standard errors of it. False without a head."""
        if self.chance is None:
            return False
        agreement = self.draft[0]
        noise = 0.0 if math.isnan(agreement.error) else 2 * agreement.error
        margin = max(_DEAD_MARGIN * (1 - self.chance), noise)
        # two that always choose the same token agree by chance as well as in truth
        return agreement.value <= self.chance + margin and agreement.value < 1

    @property
    def verdict(self) -> str | None:
        """A dead head in plain words; None for a live one, or none."""
        if not self.head_is_dead or self.head is None or self.chance is None:
            return None
        uniform = math.log(self.n_vocab)
        nll = float(self.head.nll.mean())
        worse = " (worse than guessing evenly)" if nll > uniform else ""
        return (
            f"the MTP head is dead: it agrees with the trunk on {self.draft[0].value:.1%} of the "
            f"tokens, where chance alone makes {self.chance:.1%}; its loss is {nll:.2f} nats a "
            f"token{worse}, an even guess has {uniform:.2f}. Usual causes: the head is "
            "fed the wrong pairing of token and hidden row, its tensors are of another model, the "
            "metadata claim a head whose tensors were never trained or converted, or its "
            "quantization is broken (no importance data for the head)."
        )

    # --- two of them -----------------------------------------------------------

    def compare(self, other: Evaluation) -> Comparison:
        """This one minus the other, position by position of the same text.

        Raises:
            ValueError: another text, n_ctx or vocabulary.
        """
        if (self.digest, self.n_ctx, self.n_vocab) != (other.digest, other.n_ctx, other.n_vocab):
            raise ValueError(
                "two evaluations can be compared on the same tokens only: these differ in text, "
                "n_ctx or vocabulary"
            )
        sample = self._sample
        same_reference = (
            self.trunk.reference_nll is not None
            and other.trunk.reference_nll is not None
            and np.array_equal(self.trunk.reference_nll, other.trunk.reference_nll)
        )

        def difference(
            mine: NDArray[Any] | None, theirs: NDArray[Any] | None, *, less_is_better: bool
        ) -> Difference | None:
            if mine is None or theirs is None:
                return None
            apart = mine.astype(np.float64) - theirs.astype(np.float64)
            return _difference(sample.mean(apart), less_is_better)

        def strayed(rows: Predictions, others: Predictions) -> tuple[Difference | None, ...]:
            if not same_reference:
                return None, None
            return (
                difference(rows.kl, others.kl, less_is_better=True),
                difference(_matches(rows), _matches(others), less_is_better=False),
            )

        nll = _difference(sample.mean(self.trunk.nll - other.trunk.nll), True)
        kl, top1 = strayed(self.trunk, other.trunk)
        if self.head is None or other.head is None:
            return Comparison(nll, kl, top1, None, None, None, (), None)
        head_kl, head_top1 = strayed(self.head, other.head)
        length = self._length_means() - other._length_means()
        return Comparison(
            nll=nll,
            kl=kl,
            top1=top1,
            head_nll=difference(self.head.nll, other.head.nll, less_is_better=True),
            head_kl=head_kl,
            head_top1=head_top1,
            draft=tuple(
                self._draft_difference(other, k)
                for k in range(1, min(self._depth_known, other._depth_known) + 1)
            ),
            accepted_length=_difference(
                sample.estimate(length, sample.spread(length), len(self.known)), False
            ),
        )

    def as_data(self) -> dict[str, Any]:
        """The figures as plain data for JSON; NaN as None."""
        figures: dict[str, Any] = {
            "model": self.model,
            "mtp_model": self.mtp_model,
            "reference": self.reference,
            "n_ctx": self.n_ctx,
            "depth": self.depth,
            "n_chunks": self.n_chunks,
            "n_scored": len(self.chunk),
            "causal": self.causal,
            "tokens_sha256": self.digest,
            "trunk": {
                "nll": _data(self.nll),
                "perplexity": _data(self.perplexity),
                "kl": _data(self.kl),
                "top1": _data(self.top1),
            },
            "head": None,
        }
        if self.head is not None:
            figures["head"] = {
                "nll": _data(self.head_nll),
                "kl": _data(self.head_kl),
                "top1": _data(self.head_top1),
                "agreement": [_data(found) for found in self.draft],
                "accepted_length": _data(self.accepted_length),
                "chance": self.chance,
                "dead": self.head_is_dead,
                "verdict": self.verdict,
            }
        return figures

    # --- inside ----------------------------------------------------------------

    @cached_property
    def _sample(self) -> _Sample:
        return _Sample(self.chunk)

    @property
    def _depth_known(self) -> int:
        """The deepest depth that any slot reached."""
        return int(self.known.max()) if self.known.size else 0

    def _same_top(self, rows: Predictions) -> Estimate | None:
        matches = _matches(rows)
        return None if matches is None else self._sample.mean(matches)

    def _draft_difference(self, other: Evaluation, k: int) -> Difference:
        """Agreement at depth k of this one minus the other's.

        At depth 1 both are judged at every position. Deeper, each has slots of its own, those
        where the drafts before were accepted: a difference of two shares over the same resamples.
        """
        mine, theirs = self.accepted >= k, other.accepted >= k
        if k == 1:
            apart = mine.astype(np.float64) - theirs.astype(np.float64)
            return _difference(self._sample.mean(apart), False)
        means = self._sample.means(mine, self.known >= k) - self._sample.means(
            theirs, other.known >= k
        )
        n = min(int((self.known >= k).sum()), int((other.known >= k).sum()))
        return _difference(self._sample.estimate(means, self._sample.spread(means), n), False)

    def _length_means(self) -> F64:
        length = np.zeros(1 + _RESAMPLES)
        reached = np.ones(1 + _RESAMPLES)
        for k in range(1, self._depth_known + 1):
            # a resample without any slot at this depth accepts nothing there
            reached *= np.nan_to_num(self._sample.means(self.accepted >= k, self.known >= k))
            length += reached
        return length


@dataclass(frozen=True)
class Comparison:
    """Differences of two evaluations of the same text: the one asked minus the one given.

    Paired: each difference is taken position by position, and the intervals resample the chunks
    of both together. None where either has no such figure; those that need a reference, where it
    was not the same one.

    Attributes:
        nll, kl: of the trunk, nats a token.
        top1: the trunk's likeliest token is the reference's, share of positions.
        head_nll, head_kl: of the head, nats a token.
        head_top1: as top1, of the head and the reference's head.
        draft: draft agreement by depth, as deep as both were judged. From depth 2 on each model
            has been judged at slots of its own, those that Evaluation.draft speaks of: `error` is
            then the standard deviation of the bootstrap and `n` the smaller number of slots.
            Empty without heads.
        accepted_length: drafted tokens accepted a verification.
    """

    nll: Difference
    kl: Difference | None
    top1: Difference | None
    head_nll: Difference | None
    head_kl: Difference | None
    head_top1: Difference | None
    draft: tuple[Difference, ...]
    accepted_length: Difference | None

    def as_data(self) -> dict[str, Any]:
        """The differences as plain data for JSON, in the form of Evaluation.as_data()."""
        head = None
        if self.head_nll is not None:
            head = {
                "nll": _data(self.head_nll),
                "kl": _data(self.head_kl),
                "top1": _data(self.head_top1),
                "agreement": [_data(found) for found in self.draft],
                "accepted_length": _data(self.accepted_length),
            }
        return {
            "trunk": {"nll": _data(self.nll), "kl": _data(self.kl), "top1": _data(self.top1)},
            "head": head,
        }


def evaluate(
    model: str | os.PathLike[str],
    texts: corpus.Texts,
    *,
    mtp_model: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    reference_mtp_model: str | os.PathLike[str] | None = None,
    mtp: bool | None = None,
    depth: int = 3,
    n_ctx: int = 512,
    n_batch: int | None = None,
    n_ubatch: int | None = None,
    max_chunks: int | None = None,
    skip_chunks: int = 0,
    parse_special: bool = False,
    packing: corpus.Packing = "stream",
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
    progress: Callable[[Progress], object] | None = None,
) -> Evaluation:
    """Score a text with a model and its MTP head, beside a reference if one is given.

    Both models are loaded at once and go through the text chunk by chunk; logits never leave the
    native code. KL divergences come from float32 logits: against `llama-perplexity
    --kl-divergence`, which stores the reference's log-probabilities in 16 bits over at most
    16 nats (steps of up to 2.4e-4) and leaves out tokens below exp(-16), a single position may
    differ by some 1e-4 nats, a mean by far less.

    Args:
        model: path of a GGUF model, or of the first part of a multi-part one.
        texts: as Collector.run takes them: sources, mixtures and chats too; rendered and tokenized
            by the model. Take other text than the calibration's.
        mtp_model: the head's own file, where it is not in the model.
        reference: the model to measure against, usually the one before quantization.
        reference_mtp_model: its head's own file, where it is not in it.
        mtp: score the head too (True), never (False), or where there is one (None).
        depth: tokens the head drafts, 1 or more. A chain of heads drafts one each at most.
        n_ctx: tokens a chunk, 4 or more.
        n_batch: tokens a decode; None for n_ctx. Each context keeps the logits of the scored rows
            of a batch: n_batch * n_vocab * 4 bytes at most, half of it where n_batch is n_ctx.
        n_ubatch: tokens a graph; None for 512. A model whose tokens see those after them too
            (Collector.causal) needs each chunk in one decode and one graph: there both are n_ctx
            where they are None, and must be no less where they are not.
        max_chunks, skip_chunks, parse_special, packing, chat: as in Collector.run. A chunk of
            2 tokens, which document packing can make, has no position to score.
        on_bad_record: as in Collector.run; records that are left out are a UserWarning.
        n_gpu_layers, n_threads, use_mmap, rehearse: as in Collector.
        split_mode, tensor_split, main_gpu, devices, override_tensor, cpu_moe, n_cpu_moe: as in
            Collector, for all the models alike.
        progress: called with a Progress after every chunk, in this thread.

    Returns:
        The evaluation.

    Raises:
        FileNotFoundError: there is no such file.
        ModelError (a ValueError): not a model, or a head that the metadata claim is missing.
        TemplateError (a ValueError): a chat cannot be rendered.
        ValueError: a bad number, no tokens, mtp=True without a head, a source that cannot be
            understood, or a reference of another architecture or vocabulary, or without a head
            where the model has one.
        ImportError: a library that reads a source is not installed.
        NonFiniteError: NaN or infinite logits.
        MemoryError: the models or the contexts do not fit.
    """
    wanted = Wanted(1, n_batch, n_ubatch)
    for name, value, least in (
        ("depth", depth, 1),
        ("n_ctx", n_ctx, 4),
        ("n_ubatch", 1 if n_ubatch is None else n_ubatch, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    if n_threads is not None and n_threads < 1:
        raise ValueError(f"n_threads must be 1 or more, got {n_threads}")
    n_threads = physical_cores() if n_threads is None else n_threads
    if (least := wanted.of_causal(n_ctx).n_batch) < depth:
        raise ValueError(f"n_batch must be depth ({depth}) or more, got {least}")
    if reference_mtp_model is not None and reference is None:
        raise ValueError("reference_mtp_model was given without a reference")
    placement = Placement.of(
        split_mode=split_mode,
        tensor_split=tensor_split,
        main_gpu=main_gpu,
        devices=devices,
        override_tensor=override_tensor,
        cpu_moe=cpu_moe,
        n_cpu_moe=n_cpu_moe,
    )

    batches: list[Batch] = []  # as each model needs it
    with ExitStack() as stack:
        work = stack.enter_context(ended_at_exit("evaluation"))

        def opened(path: str | os.PathLike[str], head: str | os.PathLike[str] | None) -> Models:
            models = Models(
                path,
                head,
                n_ctx=n_ctx,
                n_gpu_layers=n_gpu_layers,
                placement=placement,
                use_mmap=use_mmap,
                rehearse=rehearse,
            )
            stack.callback(models.free)
            return models

        def loaded(
            models: Models, beside: Mapping[str, int]
        ) -> tuple[_session.Model, _session.Model | None]:
            models.check(with_head)
            # the evaluator reads logits, and sums nothing
            batch = wanted.of_causal(n_ctx)
            settings = session_settings(
                n_ctx, batch, n_threads, mtp=with_head, perplexity=True, device_sums=False
            )
            models.rehearse(settings)
            if with_head:
                models.check_predicts(
                    "there is a head to score", "leave it out (mtp=False, --no-mtp)"
                )
            batches.append(models.batch(wanted))
            settings |= asdict(batches[-1])
            trunk = models.load(with_head, settings, beside)
            assert isinstance(trunk, _session.Model)
            assert not isinstance(models.head, _isolate.Model)
            return trunk, models.head

        ours = opened(model, mtp_model)
        if mtp is True and ours.head_file.n_nextn == 0:
            raise ModelError(f"{os.fspath(model)}: {lacks_head(ours.head_file)} (mtp=True)")
        with_head = ours.head_file.n_nextn > 0 if mtp is None else mtp
        theirs = None
        if reference is not None:
            theirs = opened(reference, reference_mtp_model)
            _check_reference(ours, theirs, with_head, os.fspath(reference))
        own, own_head = loaded(ours, {})
        render = ours.renderer(ChatOptions() if chat is None else chat)
        stack.callback(render.close)
        cut_chunks, total, _ = cut(
            ours,
            texts,
            n_ctx,
            packing=packing,
            render=render,
            parse_special=parse_special,
            skip_chunks=skip_chunks,
            max_chunks=max_chunks,
            on_bad_record=on_bad_record,
        )
        chunks = (chunk.tokens for chunk in cut_chunks)
        first = next(chunks)  # bad text is an error before any context is made
        beside = beside_head = None
        if theirs is not None:
            beside, beside_head = loaded(theirs, ours.contexts)
        evaluator = _session.Evaluator(own, own_head, beside, beside_head)
        try:
            evaluator.open(
                n_ctx=n_ctx,
                # the larger one, where only one of the two needs its chunks whole
                n_batch=max(batch.n_batch for batch in batches),
                n_ubatch=max(batch.n_ubatch for batch in batches),
                n_threads=n_threads,
                depth=depth,
            )
        except ModelError as error:
            raise ModelError(f"{os.fspath(model)}: {error}") from None
        found, lengths, digest = _drive(work, evaluator, first, chunks, total, progress)
        for tally in cut_chunks.tallies:
            if tally.skipped:
                warnings.warn(
                    f"{tally.skipped} record(s) could not be used and were skipped, the first: "
                    f"{tally.first_skipped}",
                    stacklevel=2,
                )
        n_vocab = own.n_vocab
        causal = ours.causal
        # a gemma4-assistant runs all its blocks in one graph, which drafts any depth
        if (
            with_head
            and ours.head_file.n_nextn > 1
            and ours.head_file.architecture != "gemma4-assistant"
        ):
            depth = min(depth, ours.head_file.n_nextn)
        del evaluator, own, own_head, beside, beside_head

    sizes = [len(chunk["trunk"]["nll"]) for chunk in found]
    if sum(sizes) == 0:
        raise ValueError("the text is too short: no chunk has a position to score (4 tokens do)")
    return Evaluation(
        model=os.fspath(model),
        mtp_model=None if mtp_model is None else os.fspath(mtp_model),
        reference=None if reference is None else os.fspath(reference),
        n_ctx=n_ctx,
        n_vocab=n_vocab,
        digest=digest,
        chunk=np.repeat(np.arange(len(found), dtype=np.int32), sizes),
        position=np.concatenate(
            [
                np.arange(n // 2, n // 2 + size, dtype=np.int32)
                for n, size in zip(lengths, sizes, strict=True)
            ]
        ),
        trunk=_joined([chunk["trunk"] for chunk in found], reference is not None),
        head=_joined([chunk["head"] for chunk in found], reference is not None)
        if with_head
        else None,
        depth=depth,
        known=np.concatenate([chunk["known"] for chunk in found]),
        accepted=np.concatenate([chunk["accepted"] for chunk in found]),
        causal=causal,
    )


def _check_reference(ours: Models, theirs: Models, with_head: bool, path: str) -> None:
    if ours.trunk_file.architecture != theirs.trunk_file.architecture:
        raise ValueError(
            f"{path} is {theirs.trunk_file.architecture}, the model is {ours.trunk_file.architecture}: a reference is "
            "the same model before it was quantized"
        )
    if with_head and theirs.head_file.n_nextn == 0:
        raise ValueError(
            f"{path} has no MTP head to measure the model's against; give its head's file, or "
            "mtp=False to leave the heads out"
        )
    if with_head and ours.head_file.architecture != theirs.head_file.architecture:
        raise ValueError(
            f"the head is {ours.head_file.architecture}, the reference's is {theirs.head_file.architecture}"
        )


def _drive(
    work: Work,
    evaluator: _session.Evaluator,
    first: NDArray[np.int32],
    rest: Iterator[NDArray[np.int32]],
    total: int | None,
    progress: Callable[[Progress], object] | None,
) -> tuple[list[_session.ChunkEvaluation], list[int], str]:
    """What was found by chunk, their lengths, and the digest of their tokens. Native steps run in
    a second thread, so that Ctrl-C reaches this one."""
    found: list[_session.ChunkEvaluation] = []
    lengths: list[int] = []
    digest = hashlib.sha256()
    n_tokens = n_scored = 0
    nll = nll_sq = 0.0
    started = time.monotonic()
    work.cancel = evaluator.cancel
    with NativeThread() as native:
        try:
            chunk: NDArray[np.int32] | None = first
            while chunk is not None:
                work.check()
                running = native.submit(evaluator.step, chunk)
                following = next(rest, None)
                done = running.result()
                found.append(done)
                lengths.append(len(chunk))
                digest.update(len(chunk).to_bytes(8, "little") + chunk.astype("<i4").tobytes())
                n_tokens += len(chunk)
                n_scored += len(done["trunk"]["nll"])
                nll += float(done["trunk"]["nll"].sum())
                nll_sq += float(np.square(done["trunk"]["nll"]).sum())
                if progress is not None:
                    seconds = time.monotonic() - started
                    so_far = _so_far(nll, nll_sq, n_scored)
                    progress(Progress(len(found), total, n_tokens, seconds, so_far))
                chunk = following
        except BaseException as error:
            evaluator.cancel()
            if isinstance(error, InterruptedError):
                work.check()
            raise
    return found, lengths, digest.hexdigest()


def _so_far(nll: float, nll_sq: float, n: int) -> Perplexity | None:
    if n == 0:
        return None
    mean = nll / n
    value = math.exp(mean) if mean < 700 else math.inf
    variance = max(0.0, nll_sq / n - mean * mean)
    return Perplexity(value, value * math.sqrt(variance / (n - 1)) if n > 1 else 0.0, n)


def _joined(rows: list[_session.ChunkPredictions], with_reference: bool) -> Predictions:
    nll = np.concatenate([row["nll"] for row in rows])
    top = np.concatenate([row["top"] for row in rows])
    if not with_reference:
        return Predictions(nll, top, None, None, None)
    return Predictions(
        nll,
        top,
        np.concatenate([row["reference_nll"] for row in rows]),
        np.concatenate([row["reference_top"] for row in rows]),
        np.concatenate([row["kl"] for row in rows]),
    )


def _matches(rows: Predictions) -> NDArray[np.bool_] | None:
    return None if rows.reference_top is None else rows.top == rows.reference_top


def _exp(mean: Estimate) -> Estimate:
    with np.errstate(over="ignore"):
        value, low, high = (float(v) for v in np.exp([mean.value, mean.low, mean.high]))
    return Estimate(value, value * mean.error, low, high, mean.n)


def _difference(found: Estimate, less_is_better: bool) -> Difference:
    if math.isnan(found.low):
        verdict = "too few chunks to tell"
    elif found.low <= 0 <= found.high:
        verdict = "no difference shown"
    else:
        verdict = "better" if (found.high < 0) == less_is_better else "worse"
    return Difference(found.value, found.error, found.low, found.high, found.n, verdict)


def _data(estimate: Estimate | None) -> dict[str, float | int | str | None] | None:
    if estimate is None:
        return None
    verdict = {"verdict": estimate.verdict} if isinstance(estimate, Difference) else {}
    figures = {
        "value": estimate.value,
        "error": estimate.error,
        "low": estimate.low,
        "high": estimate.high,
    }
    return {
        **{name: v if math.isfinite(v) else None for name, v in figures.items()},
        "n": estimate.n,
        **verdict,
    }
