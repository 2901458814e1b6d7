"""What a run reports: where it stands, and what it made of its text (tokens by source, what was
dropped, how many rows its experts got)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from imatrix.entries import TextSource
from imatrix.matrix.experts import ExpertCoverage

__all__ = ["Ended", "Perplexity", "Progress", "Report", "Tally"]

Ended = Literal["text", "max_chunks", "min_expert_rows"]
# Of each chunk: sums of the negative log-likelihoods and of their squares, and tokens scored.
Scores = list[tuple[float, float, int]]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of the trunk over the chunks so far, as llama-imatrix prints it: the second
    half of every chunk is scored (tools/imatrix/imatrix.cpp, compute_imatrix).

    Attributes:
        value: exp of the mean negative log-likelihood.
        error: standard error of `value`; 0 with fewer than two scored tokens.
        n_scored: tokens scored.
    """

    value: float
    error: float
    n_scored: int


@dataclass(frozen=True)
class Progress:
    """Where a run stands, given to its `progress` function after every step.

    Attributes:
        chunks: chunks collected so far.
        total: chunks there will be, None if the text is a stream of unknown length.
        tokens: tokens collected so far.
        seconds: spent on chunks, in an interrupted run that this one goes on from too.
        perplexity: of the chunks so far, None unless asked for.
        resumed: chunks taken over from a checkpoint, those left out among them; 0 if none were.
        experts: rows of the experts so far, None unless min_expert_rows was given.
        workers: of a cluster, that are there now; None without one.
        ahead: chunks that a cluster's workers have collected beside those, which are added when
            their turn comes; the order is fixed.
    """

    chunks: int
    total: int | None
    tokens: int
    seconds: float
    perplexity: Perplexity | None
    resumed: int = 0
    experts: ExpertCoverage | None = None
    workers: int | None = None
    ahead: int = 0


@dataclass(frozen=True)
class Report:
    """What a run made of its text.

    Attributes:
        sources: the sources, in the order they were given.
        chunks, tokens: that count; a BOS in front of a chunk counts.
        packing: "stream" or "document".
        seed: of the order of the documents; None for the order of the sources.
        digest: SHA-256 of the tokens that count (int32, little endian), in hexadecimal.
        ended: what ended the run: the text did ("text"), max_chunks, or min_expert_rows.
        ended_by: name of the source that ended a mixture with weights; None otherwise.
        experts: rows of the experts; None for a model without any.
        first_skipped: of each source, what was wrong with the first record that was skipped; ""
            for none. Known once the run is over.
    """

    sources: tuple[TextSource, ...]
    chunks: int
    tokens: int
    packing: str
    seed: int | None
    digest: str
    ended: Ended
    ended_by: str | None
    experts: ExpertCoverage | None
    first_skipped: tuple[str, ...] = ()

    @property
    def dropped(self) -> float:
        """Share of the tokens read that no chunk got, in [0, 1]."""
        dropped = sum(each.dropped for each in self.sources)
        used = sum(each.tokens for each in self.sources)
        return dropped / (used + dropped) if dropped else 0.0

    def lines(self) -> list[str]:
        """The report in words, a sentence a line."""
        found = []
        if len(self.sources) > 1 or any(each.weight for each in self.sources):
            for each in self.sources:
                share = each.tokens / self.tokens if self.tokens else 0.0
                found.append(
                    f"{each.name or 'text'}: {each.tokens} tokens ({share:.1%}) of "
                    f"{each.documents} document(s)"
                )
        for at, each in enumerate(self.sources):
            read = each.documents + each.empty + each.skipped
            name = each.name or "text"
            if each.empty:
                found.append(
                    f"{name}: {each.empty} of {read} document(s) ({each.empty / read:.1%}) are "
                    "empty: without a text, or chats in which no message says anything"
                )
            if each.skipped:
                found.append(
                    f"{name}: {each.skipped} of {read} record(s) ({each.skipped / read:.1%}) "
                    "skipped: they could not be used"
                )
                if at < len(self.first_skipped) and self.first_skipped[at]:
                    found.append(f"the first of them: {self.first_skipped[at]}")
        if self.ended_by is not None:
            found.append(f"{self.ended_by} came to its end, and the mixture with it")
        if dropped := sum(each.dropped for each in self.sources):
            why = "filled no chunk" if self.packing == "stream" else "stood alone"
            found.append(f"{dropped} token(s) ({self.dropped:.2%}) dropped: they {why}")
        if self.experts is not None and self.experts.wanted > 1:
            found.extend(self._describe_experts(self.experts))
        return found

    def _describe_experts(self, experts: ExpertCoverage) -> list[str]:
        found = [experts.told()]
        if experts.reached:
            return found
        needed = experts.tokens_needed(self.tokens)
        if needed is None:
            block, expert, _ = experts.thinnest
            found.append(
                f"no text reached {block} expert {expert} and {experts.n_unseen - 1} other(s) in "
                f"{self.tokens} tokens: more of the same may not either; add text of another kind "
                "(code, other languages, chats)"
            )
        else:
            found.append(
                f"about {needed} tokens of such text would do, {needed - self.tokens} more; text "
                "of another kind may reach the thin experts sooner"
            )
        return found


class Tally:
    """Negative log-likelihoods, summed in the order of the chunks.

    Attributes:
        nll, nll_sq: sums of the negative log-likelihoods in nats, and of their squares.
        n: tokens scored.
    """

    def __init__(self) -> None:
        self.nll = 0.0
        self.nll_sq = 0.0
        self.n = 0

    def add(self, scores: Scores) -> None:
        """Add the scores of the chunks that follow."""
        for nll, nll_sq, n in scores:
            self.nll += nll
            self.nll_sq += nll_sq
            self.n += n

    @property
    def perplexity(self) -> Perplexity | None:
        """Of the chunks so far; None if no token was scored."""
        if self.n == 0:
            return None
        mean = self.nll / self.n
        variance = self.nll_sq / self.n - mean * mean
        value = math.exp(mean) if mean < 700 else math.inf
        deviation = math.sqrt(variance / (self.n - 1)) if self.n > 1 and variance > 0 else 0.0
        return Perplexity(value, value * deviation, self.n)
