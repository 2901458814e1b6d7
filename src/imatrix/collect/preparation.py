"""The model of a Collector, made ready for what is asked of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

from imatrix.engine.cores import physical_cores
from imatrix.engine.models import Models
from imatrix.engine.plan import Plan
from imatrix.engine.settings import (
    MAX_SEQ,
    Batch,
    ModelOptions,
    SessionSettings,
    Wanted,
    check_head_runs_alone,
    usual,
)
from imatrix.errors import ModelError
from imatrix.model.architectures import lacks_head

__all__ = ["CollectorOptions", "Preparation", "wanted_batch"]


def wanted_batch(
    n_batch: int | Literal["auto"] | None, n_ubatch: int | None, n_seq: int
) -> Wanted | None:
    """The batch that Collector was asked for; None for "auto".

    Raises:
        ValueError: another word, or "auto" with a number that it chooses.
    """
    if not isinstance(n_batch, str):
        return Wanted(n_seq, n_batch, n_ubatch)
    if n_batch != "auto":
        raise ValueError(f"n_batch must be a number, 'auto' or None, got {n_batch!r}")
    if n_ubatch is not None or n_seq != 1:
        raise ValueError("n_batch='auto' chooses n_ubatch and n_seq too: leave them out")
    return None


@dataclass(frozen=True, kw_only=True)
class CollectorOptions:
    """The arguments of Collector, in groups.

    Attributes:
        model: the model's files, and how they are loaded.
        wanted: the batch that was asked for; None for "auto", which each run chooses by the memory
            that is free.
        n_ctx, n_threads, mtp, device_sums: as Collector has them.
    """

    model: ModelOptions
    wanted: Wanted | None
    n_ctx: int
    n_threads: int | None
    mtp: bool | None
    device_sums: bool

    def session(self) -> SessionSettings:
        """Settings of a session on the trunk alone, of a `causal` model.

        Raises:
            ValueError: a number is too small.
        """
        batch = usual(self.n_ctx) if self.wanted is None else self.wanted.of_causal(self.n_ctx)
        n_threads = physical_cores() if self.n_threads is None else self.n_threads
        return SessionSettings(
            n_ctx=self.n_ctx, batch=batch, n_threads=n_threads, device_sums=self.device_sums
        )


class Preparation:
    """Loads the model for a run or a plan, and settles the session that it needs.

    Args:
        options: the arguments of Collector.

    Attributes:
        models: the files of the model.
        batch: of the current or last run; before the first one, as a `causal` model would have it.
    """

    def __init__(self, options: CollectorOptions) -> None:
        self.options = options
        self._session = options.session()  # all others are made from it
        self._wanted = options.wanted
        self.batch = self._session.batch
        self.models = Models(options.model, n_ctx=options.n_ctx)
        if options.mtp is not None:
            self.models.load(self.settings(with_head=self._has_head(options.mtp)))

    @property
    def batch_by_memory(self) -> bool:
        """Whether each run chooses its batch by the memory that is free (n_batch="auto")."""
        return self._wanted is None

    def settings(
        self,
        *,
        with_head: bool = False,
        process_output: bool = False,
        perplexity: bool = False,
        signed_sums: bool = True,
    ) -> SessionSettings:
        """Of a session for this, with the batch as it stands."""
        return replace(
            self._session,
            batch=self.batch,
            mtp=with_head,
            process_output=process_output,
            perplexity=perplexity,
            signed_sums=signed_sums,
        )

    def causal(self) -> bool:
        """See Collector.causal."""
        if not self.models.knows_causal:
            self.models.rehearse(self.settings())
        return self.models.causal

    def prepare(
        self,
        *,
        mtp: bool,
        process_output: bool,
        perplexity: bool | None,
        signed_sums: bool = True,
        weights: bool = True,
    ) -> SessionSettings:
        """Load the model for this, without `weights` its vocabulary only.

        Returns:
            The settings of the session: whether there is a head to collect, and whether the text
            can be scored, is known now. With "auto" the batch is not: see choose_batch().
        """
        models = self.models
        if self._wanted is None:
            self.batch = usual(self.options.n_ctx)
        if mtp:
            if self._wanted is not None:
                check_head_runs_alone(self._wanted.n_seq)
            if self.options.mtp is False:
                raise ValueError("mtp=True, but this Collector was made with mtp=False")
            if models.head_file.claimed_nextn == 0:
                warnings.warn(
                    f"{models.trunk_file.path.name} ({models.trunk_file.architecture}) has no MTP "
                    "head (nextn_predict_layers is absent or 0): collecting the trunk only",
                    stacklevel=4,
                )
        with_head = self._has_head(mtp)

        def settled(scored: bool) -> SessionSettings:
            return self.settings(
                with_head=with_head,
                process_output=process_output,
                perplexity=scored,
                signed_sums=signed_sums,
            )

        models.check(with_head)
        models.rehearse(settled(perplexity is not False))
        if with_head:
            models.check_predicts("mtp=True (--mtp)", "leave the head out")
        if perplexity:
            models.check_predicts(
                "perplexity=True (--ppl)", "leave it out (perplexity=False, --no-ppl)"
            )
        if self._wanted is not None:
            self.batch = models.batch(self._wanted)
        elif not models.causal:
            self.batch = models.batch(Wanted(1, None, None))
        settings = settled(models.causal if perplexity is None else perplexity)
        if weights:
            models.load(settings)
        else:
            models.load_vocabulary()
        return settings

    def choose_batch(
        self, settings: SessionSettings, total: int | None, before: Batch | None
    ) -> SessionSettings:
        """The settings with the batch that "auto" comes to, for a model that is loaded.

        Args:
            total: chunks there will be; None if nobody knows.
            before: the batch of the run that this one resumes. Rounding depends on the batch, so a
                resumed run keeps it.
        """
        if settings.mtp and before is not None and before.n_seq != 1:
            before = None  # of a run without the head: its checkpoint will be refused
        if before is None:
            most = 1 if settings.mtp else min(MAX_SEQ, max(1, MAX_SEQ if total is None else total))
            before = self.models.choose_batch(settings, most)
        self.batch = before
        settings = replace(settings, batch=before)
        self.models.rehearse(settings)
        return settings

    def plan(self, settings: SessionSettings) -> Plan:
        """What a session with these settings would collect, of a model that is loaded."""
        plan = self.models.open(settings).plan
        (trunk_outputs, trunk), (head_outputs, head) = plan["trunk"], plan["head"]
        tensors = {**self.models.trunk_file.tensors, **self.models.head_file.tensors}
        never = tuple(
            name
            for name, shape in tensors.items()
            if name.startswith("blk.") and len(shape) > 1 and name not in trunk and name not in head
        )
        return Plan(trunk, head, never, trunk_outputs, head_outputs)

    def _has_head(self, mtp: bool) -> bool:
        """Whether there is a head to run, if one is wanted; refuses one that is only claimed."""
        file = self.models.head_file
        if mtp and file.claimed_nextn and not file.n_nextn:
            raise ModelError(
                f"{file.path}: {lacks_head(file)}. Put the head in with imatrix graft-mtp; or "
                f"collect the trunk alone (mtp=False), and drop the claim: imatrix drop-mtp "
                f"{file.path} -o OUT.gguf"
            )
        return mtp and file.n_nextn > 0
