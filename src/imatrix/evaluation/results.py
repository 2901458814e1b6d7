"""What evaluate() gives back: the predictions, the figures made of them, and comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imatrix.evaluation.estimates import (
    F64,
    I32,
    RESAMPLES,
    Difference,
    Estimate,
    Sample,
    estimate_data,
    exponential,
    with_verdict,
)

__all__ = ["Comparison", "Evaluation", "Predictions"]

# A head this little above chance drafts nothing worth verifying. Trained heads agree with their
# trunk on more than half of all tokens; what separates broken from bad is a convention.
_DEAD_MARGIN = 0.05


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
        depth: how many tokens a draft has; fewer than asked for if a chain has fewer heads.
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
        return exponential(self.nll)

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
        whose next token the trunk accepts too. Empty without a head; shorter than `depth` if
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
            return with_verdict(sample.mean(apart), less_is_better)

        def strayed(rows: Predictions, others: Predictions) -> tuple[Difference | None, ...]:
            if not same_reference:
                return None, None
            return (
                difference(rows.kl, others.kl, less_is_better=True),
                difference(_matches(rows), _matches(others), less_is_better=False),
            )

        nll = with_verdict(sample.mean(self.trunk.nll - other.trunk.nll), True)
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
            accepted_length=with_verdict(
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
                "nll": estimate_data(self.nll),
                "perplexity": estimate_data(self.perplexity),
                "kl": estimate_data(self.kl),
                "top1": estimate_data(self.top1),
            },
            "head": None,
        }
        if self.head is not None:
            figures["head"] = {
                "nll": estimate_data(self.head_nll),
                "kl": estimate_data(self.head_kl),
                "top1": estimate_data(self.head_top1),
                "agreement": [estimate_data(found) for found in self.draft],
                "accepted_length": estimate_data(self.accepted_length),
                "chance": self.chance,
                "dead": self.head_is_dead,
                "verdict": self.verdict,
            }
        return figures

    # --- inside ----------------------------------------------------------------

    @cached_property
    def _sample(self) -> Sample:
        return Sample(self.chunk)

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
            return with_verdict(self._sample.mean(apart), False)
        means = self._sample.means(mine, self.known >= k) - self._sample.means(
            theirs, other.known >= k
        )
        n = min(int((self.known >= k).sum()), int((other.known >= k).sum()))
        return with_verdict(self._sample.estimate(means, self._sample.spread(means), n), False)

    def _length_means(self) -> F64:
        length = np.zeros(1 + RESAMPLES)
        reached = np.ones(1 + RESAMPLES)
        for k in range(1, self._depth_known + 1):
            # a resample without any slot at this depth accepts nothing there
            reached *= np.nan_to_num(self._sample.means(self.accepted >= k, self.known >= k))
            length += reached
        return length


@dataclass(frozen=True)
class Comparison:
    """Differences of two evaluations of the same text: the one asked minus the one given.

    Paired: each difference is taken position by position, and the intervals resample the chunks
    of both together. None if either has no such figure; those that need a reference, if it
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
                "nll": estimate_data(self.head_nll),
                "kl": estimate_data(self.head_kl),
                "top1": estimate_data(self.head_top1),
                "agreement": [estimate_data(found) for found in self.draft],
                "accepted_length": estimate_data(self.accepted_length),
            }
        return {
            "trunk": {
                "nll": estimate_data(self.nll),
                "kl": estimate_data(self.kl),
                "top1": estimate_data(self.top1),
            },
            "head": head,
        }


def _matches(rows: Predictions) -> NDArray[np.bool_] | None:
    return None if rows.reference_top is None else rows.top == rows.reference_top
