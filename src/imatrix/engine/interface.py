"""What the engine offers: the interface that imatrix.native.engine fills in this process and
imatrix.engine.process in a process of its own.

The native module documents the methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from imatrix.formats.checkpoint import Group

if TYPE_CHECKING:
    from imatrix.native.engine import ContextPlans, MemoryUse

__all__ = ["FOREIGN_HEAD", "MemoryUses", "NativeModel", "NativeSession"]

# Prefix of the weights of a head that is a model of its own kind: kForeignHead in ext/model.h
FOREIGN_HEAD = "mtp:"

# Bytes that models and a session take, by device.
MemoryUses: TypeAlias = "Sequence[MemoryUse]"


class NativeModel(Protocol):
    """A loaded model file."""

    @property
    def n_nextn(self) -> int:
        """Blocks of the head that are loaded."""

    @property
    def n_trunk(self) -> int:
        """Blocks of the trunk."""

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary."""

    @property
    def n_ctx_train(self) -> int:
        """Tokens of the contexts that the model was trained on; 0 if the file does not say."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file has a vocabulary to tokenize with."""

    @property
    def has_decoder(self) -> bool:
        """Whether the model decodes text."""

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder has to read a text first."""

    @property
    def add_bos(self) -> bool:
        """Whether the model wants a BOS token in front."""

    @property
    def bos(self) -> int:
        """The BOS token."""

    @property
    def description(self) -> str:
        """Architecture, size and type in the engine's words."""

    def causal(self) -> bool:
        """Whether a token sees only those before it."""

    def token_text(self, token: int) -> str:
        """The spelling of a token."""

    def metadata(self, prefix: str) -> dict[str, str]:
        """Metadata whose keys start with `prefix`, as text."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        """Tokens of a text, [n] int32."""


class NativeSession(Protocol):
    """Contexts on a trunk and perhaps its head, and the sums that they collect."""

    def step(
        self, tokens: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> list[tuple[float, float, int]]:
        """Collect chunks side by side, all or none of them.

        Args:
            tokens: [sum of lengths] int32, one chunk behind the other.
            lengths: [n chunks] int32.

        Returns:
            Of each chunk (nll, nll_sq, n_scored) in nats.
        """

    def clear_sums(self) -> None:
        """Set the sums and counts to zero; between two steps."""

    def cancel(self) -> None:
        """End the running step early, from any thread."""

    def clear_cancel(self) -> None:
        """Let steps run again after cancel()."""

    def snapshot(
        self,
    ) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64] | None]]:
        """Copies of the sums, the counts and the signed sums of each weight."""

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """Copies of the counts of each weight."""

    def groups(self) -> list[Group]:
        """The same as snapshot(), once for all weights that share their rows."""

    def restore(
        self,
        names: list[str],
        sums: NDArray[np.float64],
        counts: NDArray[np.int64],
        signed_sums: NDArray[np.float64] | None = None,
    ) -> None:
        """Set the sums and counts of the weights of one group."""

    @property
    def counters(self) -> Mapping[str, object]:
        """What the hook did since the contexts were made."""

    @property
    def plan(self) -> ContextPlans:
        """What the graphs would collect."""

    @property
    def memory(self) -> MemoryUses:
        """Bytes that the models and the contexts take, by device."""
