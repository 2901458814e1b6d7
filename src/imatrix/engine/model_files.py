"""The files of a model: the trunk's, and the one that holds its head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imatrix.engine.settings import ModelOptions
from imatrix.errors import ModelError
from imatrix.formats.checkpoint import Setting
from imatrix.model.architectures import (
    check_assistant,
    check_head,
    check_memory,
    check_trunk,
    check_whole,
    lacks_head,
)
from imatrix.model.fit import check_fit
from imatrix.model.header import ModelFile

__all__ = ["ModelFiles"]


@dataclass(frozen=True)
class ModelFiles:
    """The headers of a model's files, which are found to go together.

    Attributes:
        trunk, head: the same object if one file holds both.
    """

    trunk: ModelFile
    head: ModelFile

    @classmethod
    def read(cls, options: ModelOptions) -> ModelFiles:
        """Read the headers.

        Raises:
            FileNotFoundError: there is no such file.
            ModelError: one is damaged, or the head does not fit the trunk.
        """
        trunk = ModelFile.read(options.model)
        check_whole(trunk)
        check_trunk(trunk)
        if options.mtp_model is None:
            return cls(trunk, trunk)
        head = ModelFile.read(options.mtp_model)
        if head.n_nextn == 0:
            raise ModelError(
                f"{head.path}: {lacks_head(head)}; give the head's own file as mtp_model, such as "
                "imatrix extract-mtp makes"
            )
        check_whole(head)
        if head.architecture == "gemma4-assistant":
            check_assistant(trunk, head)
        else:
            check_fit(trunk, head)
        return cls(trunk, head)

    @property
    def bundled(self) -> bool:
        """Whether one file holds both."""
        return self.head is self.trunk

    @property
    def n_blocks(self) -> int:
        """Blocks that the engine counts: the trunk's, and the head's if one file holds both."""
        return self.trunk.n_trunk + self.trunk.n_nextn

    def loaded(self, head: bool) -> tuple[ModelFile, ...]:
        """The files that a run reads, with or without the head."""
        return (self.trunk, self.head) if head and not self.bundled else (self.trunk,)

    def paths(self, head: bool) -> tuple[Path, Path | None]:
        """Path of the trunk's file and, with `head`, of a head's that is not in it."""
        return self.trunk.path, self.head.path if head and not self.bundled else None

    def identity(self, head: bool) -> dict[str, Setting]:
        """What tells these files from others, for a checkpoint."""
        found: dict[str, Setting] = {
            "model_size": self.trunk.size,
            "model_fingerprint": self.trunk.fingerprint(),
        }
        if head and not self.bundled:
            found["mtp_model_size"] = self.head.size
            found["mtp_model_fingerprint"] = self.head.fingerprint()
        return found

    def check(self, head: bool, n_ctx: int) -> None:
        """That the files have what they claim, and what a chunk of n_ctx tokens needs.

        Raises:
            ModelError: they have not.
            ValueError: a chunk is longer than the table of positions.
            MemoryError: they cannot fit.
        """
        if head:
            check_head(self.head)
        check_memory(self.trunk)
        # each token looks its position up (src/models/gpt2.cpp, bert.cpp), and a row that the table
        # does not have ends the process (ggml-cpu/ops.cpp, ggml_compute_forward_get_rows)
        positions = self.trunk.tensors.get("position_embd.weight")
        if positions is not None and positions[1:] and positions[1] < n_ctx:
            raise ValueError(
                f"n_ctx={n_ctx} (-c), but {self.trunk.path.name} ({self.trunk.architecture}) has a "
                f"table of {positions[1]} positions (position_embd.weight): give "
                f"n_ctx={positions[1]} (-c {positions[1]}) or less"
            )
