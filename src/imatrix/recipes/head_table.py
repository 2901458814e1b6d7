"""Which type a draft head should have, and whether it is worth its memory.

A head's currency is not KL but speed: its bytes are read for every drafted token, its worth is how many
of these the trunk accepts. Expected speed-up of greedy decoding at batch 1 with drafts of `depth` tokens,
beside decoding without a head:

    speed-up = (1 + accepted) / (1 + draft bytes / trunk bytes)

accepted is the expected number of drafted tokens that a verification accepts (as
Evaluation.accepted_length has it: the sum over depths of the product of the agreements up to there), draft
bytes are what `depth` steps of the head read, and trunk bytes what the trunk reads for a token; with the
LM head in both, see reads.py. It assumes that

- decoding waits for memory, by the bytes of the weights, and not for the memory of keys and values,
  arithmetic, launches of kernels or sampling
- a verification of 1 + depth tokens reads as much as one token. That is so for dense models. Of a mixture
  of experts the tokens use different experts.
- nothing is read to fill the head's memory. The engine runs the head once more over every verified batch,
  without its LM head (process() of common_speculative_impl_draft_mtp in common/speculative.cpp), unless it
  shares the trunk's memory.
- a draft always has `depth` tokens (--spec-draft-p-min 0)
- the text that was measured is like what will be written

The second and the third flatter a head. HeadRow.cautious counts both, with experts chosen
independently, which flatters nobody: real tokens that follow each other share experts.

This is Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2023), theorem 3.8,
with a cost in bytes and an acceptance that is measured by depth instead of one rate for all.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from imatrix.evaluation.estimates import (
    F64,
    Difference,
    Estimate,
    Sample,
    estimate_data,
    with_verdict,
)
from imatrix.files.outputs import PathLike
from imatrix.recipes.heads import AS_IT_IS, Candidates, HeadCandidate, HeadFiles, HeadTrial
from imatrix.recipes.reads import ReadBytes, reads_of_head_block, reads_of_trunk
from imatrix.words import size

__all__ = ["HeadDecision", "HeadReads", "HeadRow", "HeadTable", "Purchase", "speed_up"]


def speed_up(accepted: F64 | float, draft_bytes: float, trunk_bytes: float) -> F64:
    """(1 + accepted) / (1 + draft_bytes / trunk_bytes), see above.

    Args:
        accepted: drafted tokens accepted a verification.
        draft_bytes: read by the head for a draft.
        trunk_bytes: read by the trunk for a token.
    """
    return (1 + np.asarray(accepted, np.float64)) / (1 + draft_bytes / trunk_bytes)


@dataclass(frozen=True, kw_only=True)
class HeadReads:
    """What is read with a head of these types.

    Attributes:
        trunk: by the trunk.
        steps: by each step of a draft, as deep as was measured.
        catch_up: to fill the head's memory after a verification; nothing if it shares the trunk's.
    """

    trunk: ReadBytes
    steps: tuple[ReadBytes, ...]
    catch_up: ReadBytes

    @classmethod
    def of(
        cls,
        files: HeadFiles,
        head_types: Mapping[str, str],
        trunk_types: Mapping[str, str],
        depth: int,
    ) -> HeadReads:
        """Count what is read.

        Args:
            head_types, trunk_types: tensor -> ggml type of the head's and of the trunk's file; the
                others keep the file's.
            depth: steps of a draft.
        """
        if not files.own_file:  # the head's types in their places, the rest is the trunk's
            trunk_types = {**trunk_types, **head_types}
            head_types = trunk_types
        blocks: Sequence[int | None] = [*files.head.header.head_blocks]
        if files.shares_memory:
            blocks = [None]

        def reads(block: int | None, logits: bool) -> ReadBytes:
            return reads_of_head_block(
                files.trunk, files.head, block, trunk_types, head_types, logits=logits
            )

        catch_up = ReadBytes()
        if not files.shares_memory:
            for block in blocks:
                catch_up += reads(block, False)
        chain = files.n_heads > 1
        return cls(
            trunk=reads_of_trunk(files.trunk, trunk_types),
            steps=tuple(reads(blocks[k if chain else 0], True) for k in range(depth)),
            catch_up=catch_up,
        )

    def draft(self, depth: int) -> float:
        """Bytes for a draft of `depth` tokens."""
        return sum(step.of() for step in self.steps[:depth])

    def speed_up(self, accepted: F64, depth: int) -> F64:
        """The speed-up with drafts of `depth` tokens."""
        return speed_up(accepted, self.draft(depth), self.trunk.of())

    def cautious(self, accepted: float, depth: int) -> float:
        """The same with the experts of a verification chosen independently, and the head run once
        more over it."""
        read = self.trunk.of(1 + depth) + self.draft(depth) + self.catch_up.of(1 + depth)
        return (1 + accepted) * self.trunk.of() / read


@dataclass(frozen=True, kw_only=True)
class HeadRow:
    """A candidate, and what it is worth at the table's depth.

    Attributes:
        candidate: the types.
        bytes: of the data of all the head's tensors.
        draft_bytes: read for a draft.
        trunk_bytes: read by the trunk for a token.
        accepted: drafted tokens accepted a verification.
        speed_up: of decoding, beside the trunk alone.
        difference: `accepted`, this minus the head as it is, over the same resamples.
        speed_up_difference: `speed_up`, likewise.
        cautious: the speed-up if a verification's experts are chosen independently and the head runs
            once more over it: HeadReads.cautious.
        speed_up_by_depth: `speed_up` at depth 1, 2, ... as deep as was measured.
    """

    candidate: HeadCandidate
    bytes: int
    draft_bytes: float
    trunk_bytes: float
    accepted: Estimate
    speed_up: Estimate
    difference: Difference
    speed_up_difference: Difference
    cautious: float
    speed_up_by_depth: tuple[Estimate, ...]

    @property
    def label(self) -> str:
        """The candidate's."""
        return self.candidate.label

    @property
    def shown(self) -> bool:
        """Whether the speed-up is shown to be above 1: its interval is."""
        return self.speed_up.low > 1

    def as_data(self) -> dict[str, Any]:
        """As plain data for JSON; NaN as None."""
        return {
            "label": self.label,
            "types": dict(self.candidate.types),
            "bytes": self.bytes,
            "draft_bytes": self.draft_bytes,
            "trunk_bytes": self.trunk_bytes,
            "accepted": estimate_data(self.accepted),
            "speed_up": estimate_data(self.speed_up),
            "difference": estimate_data(self.difference),
            "speed_up_difference": estimate_data(self.speed_up_difference),
            "cautious": self.cautious,
            "speed_up_by_depth": [estimate_data(found) for found in self.speed_up_by_depth],
        }


@dataclass(frozen=True, kw_only=True)
class Purchase:
    """What more bytes buy.

    Attributes:
        bytes: how many more.
        accepted, speed_up: how much more, over the same resamples.
    """

    bytes: int
    accepted: Difference
    speed_up: Difference


@dataclass(frozen=True, kw_only=True)
class HeadDecision:
    """What the head shall be.

    Attributes:
        drop: the model is better off without it: the recipe is for the model without the head.
        candidate: the types; None with `drop`.
        row: the figures of `candidate`, or those for which it is dropped; None if dropping was asked
            for.
        why: the reason, in a sentence.
        notes: what else there is to know, in sentences.
        files: the model.
    """

    drop: bool
    candidate: HeadCandidate | None
    row: HeadRow | None
    why: str
    notes: tuple[str, ...]
    files: HeadFiles

    def commands(self, matrix: PathLike | None = None) -> list[str]:
        """What to do beside following the recipe, as command lines.

        Args:
            matrix: path of the importance data of a head's own file.
        """
        trunk, head = self.files.trunk.path, self.files.head.path
        if self.drop and not self.files.own_file:
            out = trunk.with_name(f"{trunk.stem}-no-mtp.gguf")
            return [shlex.join(["imatrix", "drop-mtp", str(trunk), "-o", str(out)])]
        if self.candidate is None or not self.candidate.types or not self.files.own_file:
            return []  # without its file there is no head
        out = head.with_name(f"{head.stem}-{self.candidate.label.replace('+', '-')}.gguf")
        words = ["imatrix", "quantize", str(head), str(out), self.candidate.ftype]
        if matrix is not None:
            words += ["--imatrix", str(matrix)]
        for pattern, kind in self.candidate.rules:
            words += ["--tensor-type", f"{pattern}={kind}"]
        return [shlex.join(words)]


class HeadTable:
    """The candidates with what each is worth, behind a trunk of given types.

    It is made of counts alone, so that another trunk's types cost nothing to try.

    Attributes:
        rows: AS_IT_IS first, then by falling bytes.
        depth: tokens of a draft that the rows are about.
    """

    def __init__(
        self,
        files: HeadFiles,
        candidates: Candidates,
        trials: Mapping[str, HeadTrial],
        trunk_types: Mapping[str, str],
        *,
        depth: int | None = None,
    ) -> None:
        """Make the table.

        Args:
            files: the model.
            candidates: from head_candidates.
            trials: from measure_head, AS_IT_IS among them; candidates without one are left out.
            trunk_types: tensor -> ggml type of the trunk's file, as the recipe has it; those that it
                lacks keep the file's.
            depth: tokens of a draft; None for the depth with the largest speed-up of all that were
                measured.

        Raises:
            ValueError: there is no trial of AS_IT_IS, none has a position to judge, or none was
                measured that deep.
        """
        if AS_IT_IS not in trials:
            raise ValueError(
                f"there is no trial of the head {AS_IT_IS}, which others are compared with"
            )
        self._files = files
        self._left_out = candidates.left_out
        measured = [c for c in candidates.offered if c.label in trials]
        judged = np.asarray(trials[AS_IT_IS].judged, np.float64)
        # chunks of 2 tokens have no position, and are none that resamples could draw
        kept = judged[:, 0] > 0 if judged.size else np.zeros(0, bool)
        if not kept.any():
            raise ValueError(
                "the text is too short: no chunk has a position to judge (4 tokens do)"
            )
        sample = Sample(np.arange(int(kept.sum()), dtype=np.int32))
        deepest = judged.shape[1]
        if depth is not None and not 1 <= depth <= deepest:
            raise ValueError(f"depth must be 1 to {deepest}, which was measured, got {depth}")
        self._n = int(judged[:, 0].sum())
        self._sample = sample
        self._lengths = {
            c.label: _lengths(trials[c.label], sample, kept, deepest) for c in measured
        }
        self._reads = {
            c.label: HeadReads.of(files, c.types, trunk_types, deepest) for c in measured
        }
        if depth is None:
            best = {
                k: max(float(self._speed_ups(c.label, k)[0]) for c in measured)
                for k in range(1, deepest + 1)
            }
            depth = max(best, key=lambda k: (best[k], -k))
        self.depth = depth
        self.rows = tuple(self._row(candidate, deepest) for candidate in measured)

    def row(self, label: str) -> HeadRow:
        """The row of a candidate, by its label in any case.

        Raises:
            KeyError: there is none; the message has the reason or the labels.
        """
        for row in self.rows:
            if row.label.upper() == label.upper():
                return row
        if label.upper() in self._left_out:
            raise KeyError(f"the head cannot be {label.upper()}: {self._left_out[label.upper()]}")
        raise KeyError(
            f"{label} was not measured; there are {', '.join(r.label for r in self.rows)}"
        )

    def buys(self, more: str, less: str) -> Purchase:
        """What one candidate has over another.

        Args:
            more, less: their labels.

        Raises:
            KeyError: one was not measured.
        """
        one, other = self.row(more), self.row(less)
        return Purchase(
            bytes=one.bytes - other.bytes,
            accepted=self._difference(
                self._lengths[one.label][self.depth], self._lengths[other.label][self.depth]
            ),
            speed_up=self._difference(
                self._speed_ups(one.label, self.depth), self._speed_ups(other.label, self.depth)
            ),
        )

    @cached_property
    def best(self) -> HeadRow | None:
        """The candidate with the largest speed-up. Of those that are not shown to be slower the one
        with the fewest bytes; None if no candidate's speed-up is shown to be above 1."""
        shown = [row for row in self.rows if row.shown]
        if not shown:
            return None
        first = max(shown, key=lambda row: row.speed_up.value)
        equal = [
            row
            for row in shown
            if row is first or not self.buys(first.label, row.label).speed_up.low > 0
        ]
        return min(equal, key=lambda row: (row.bytes, -row.speed_up.value))

    def choose(self, wanted: str = "auto") -> HeadDecision:
        """What the head shall be.

        Args:
            wanted: "auto" for `best`, and to drop the head if there is none; "drop"; or a label.

        Raises:
            KeyError: no such candidate.
            ValueError: "auto" with fewer than two chunks, which show nothing.
        """
        if wanted.lower() == "drop":
            return self._decision(
                None, None, f"the head is dropped, as asked for. {self._stored()}"
            )
        if wanted.lower() != "auto":
            row = self.row(wanted)
            why = f"the head is {row.label}, as asked for: {_describe(row)}"
            if not row.shown and not math.isnan(row.speed_up.low):
                why += "; that is not shown to be faster than no head at all"
            return self._decision(row.candidate, row, why)
        if math.isnan(self.rows[0].speed_up.low):
            raise ValueError(
                "one chunk of text shows nothing: a head is chosen by intervals over chunks; give "
                "more text, or name its type"
            )
        if self.best is None:
            row = max(self.rows, key=lambda row: row.speed_up.value)
            return self._decision(
                None,
                row,
                f"the head is dropped: no type is shown to speed decoding up. The best, {row.label}: "
                f"{_describe(row)}. {self._stored()}",
            )
        row = self.best
        return self._decision(row.candidate, row, f"the head is {row.label}: {_describe(row)}")

    def as_data(self) -> dict[str, Any]:
        """As plain data for JSON; NaN as None."""
        return {
            "depth": self.depth,
            "rows": [row.as_data() for row in self.rows],
            "left_out": dict(self._left_out),
        }

    # --- inside ----------------------------------------------------------------

    def _decision(
        self, candidate: HeadCandidate | None, row: HeadRow | None, why: str
    ) -> HeadDecision:
        return HeadDecision(
            drop=candidate is None,
            candidate=candidate,
            row=row,
            why=why,
            notes=tuple(self._notes(row if candidate is not None else None)),
            files=self._files,
        )

    def _notes(self, chosen: HeadRow | None) -> list[str]:
        told = []
        labels = {row.label for row in self.rows}
        if {"Q8_0", "Q4_K"} <= labels:
            more = self.buys("Q8_0", "Q4_K")
            told.append(
                f"Q8_0 takes {size(more.bytes)} more than Q4_K and buys {_signed(more.accepted)} "
                f"accepted tokens a draft and {_signed(more.speed_up)} of speed-up "
                f"({_verdict(more.speed_up)})"
            )
        if chosen is not None and chosen.cautious <= 1:
            told.append(
                f"with the experts of {1 + self.depth} verified tokens read apart, and the head run "
                f"again over them, the speed-up would be {chosen.cautious:.2f}: time it before "
                "relying on it"
            )
        needy = [label for label, why in self._left_out.items() if "importance data" in why]
        if needy:
            told.append(f"not tried: {', '.join(needy)}: {self._left_out[needy[0]]}")
        return told

    def _stored(self) -> str:
        n_bytes = self.rows[0].bytes
        return f"It takes {size(n_bytes)} as it is"

    def _speed_ups(self, label: str, depth: int) -> F64:
        return self._reads[label].speed_up(self._lengths[label][depth], depth)

    def _estimate(self, means: F64) -> Estimate:
        return self._sample.estimate(means, self._sample.spread(means), self._n)

    def _difference(self, one: F64, other: F64) -> Difference:
        return with_verdict(self._estimate(one - other), False)

    def _row(self, candidate: HeadCandidate, deepest: int) -> HeadRow:
        label, depth = candidate.label, self.depth
        reads, lengths = self._reads[label], self._lengths[label][depth]
        return HeadRow(
            candidate=candidate,
            bytes=candidate.bytes,
            draft_bytes=reads.draft(depth),
            trunk_bytes=reads.trunk.of(),
            accepted=self._estimate(lengths),
            speed_up=self._estimate(self._speed_ups(label, depth)),
            difference=self._difference(lengths, self._lengths[AS_IT_IS][depth]),
            speed_up_difference=self._difference(
                self._speed_ups(label, depth), self._speed_ups(AS_IT_IS, depth)
            ),
            cautious=reads.cautious(float(lengths[0]), depth),
            speed_up_by_depth=tuple(
                self._estimate(self._speed_ups(label, k)) for k in range(1, deepest + 1)
            ),
        )


def _lengths(
    trial: HeadTrial, sample: Sample, kept: np.ndarray[Any, Any], deepest: int
) -> list[F64]:
    """Accepted tokens a verification by depth, beginning with depth 0: each [1 + resamples].

    As Evaluation.accepted_length has it.
    """
    judged = np.asarray(trial.judged, np.float64)[kept]
    accepted = np.asarray(trial.accepted, np.float64)[kept]
    ratio = [sample.ratios(accepted[:, k], judged[:, k]) for k in range(deepest)]
    length = np.zeros_like(ratio[0])
    reached = np.ones_like(ratio[0])
    found = [length]
    for each in ratio:
        # a resample without any slot at this depth accepts nothing there
        reached = reached * np.nan_to_num(each)
        found.append(found[-1] + reached)
    return found


def _describe(row: HeadRow) -> str:
    return (
        f"{size(row.bytes)}, {row.accepted.value:.2f} tokens of a draft accepted, decoding "
        f"{row.speed_up.value:.2f} times as fast ({row.speed_up.low:.2f} to {row.speed_up.high:.2f})"
    )


def _signed(found: Difference) -> str:
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def _verdict(found: Difference) -> str:
    return {"better": "faster", "worse": "slower"}.get(found.verdict, found.verdict)
